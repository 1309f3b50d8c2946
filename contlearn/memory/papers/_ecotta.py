"""EcoTTA's memory column (Song et al., arXiv 2303.01904): its networks under TinyTL's rules.

Architecture and partitions (Table 13) as in the authors' published sample; the numbers come from the real backbones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.errors import ContlearnError, unknown_name
from contlearn.memory.papers._tinytl import TinyTLAccount, tinytl
from contlearn.models._checks import whole
from contlearn.models._residual import ResidualBackbone, conv3x3
from contlearn.models._wide_resnet import wrn28_10, wrn40_2

_IMAGE = (3, 32, 32)
_FACTORIES = {"wrn40_2": wrn40_2, "wrn28_10": wrn28_10}

ECOTTA_PARTITIONS: Mapping[str, Mapping[int, tuple[int, ...]]] = MappingProxyType(
    {
        "wrn40_2": MappingProxyType({4: (3, 3, 6, 6), 5: (3, 3, 3, 3, 6)}),
        "wrn28_10": MappingProxyType({4: (2, 2, 4, 4), 5: (2, 2, 2, 2, 4)}),
    }
)
"""Residual blocks per partition, by backbone and number of partitions K (Table 13). The paper's ResNet-50 is left out:
the only public channel lists of its meta parts give 535 MB where the paper is said to report about 296."""


def ecotta(
    model: str = "wrn40_2", k: int = 4, *, batch_size: int = 64, frozen_bytes: int = 1, n_classes: int = 10
) -> TinyTLAccount:
    """EcoTTA's training memory: only the meta parts train. ``stored`` is the paper's column, in MB of 10^6 bytes.

    Batch 64, 3x32x32 images, K = 4 / 5: WRN-40-2 79.6 / 92.3 MB (the paper prints 80 / 92), WRN-28-10 404.9 / 471.6
    (404 / 471). TinyTL's profiler, run on these networks, returns ``profiler_peak``: 81.6 / 94.4 and 415.1 / 481.7.

    What a process needs is another matter: the rules leave out what back-propagation through the frozen blocks stores,
    the functional ReLUs of the meta parts, gradients and momentum.

    Args:
        model: Backbone, a key of ``ECOTTA_PARTITIONS``.
        k: Number of partitions.
        batch_size: Images per step.
        frozen_bytes: Bytes of one frozen weight: 1 as in the paper, or 4.
        n_classes: Outputs of the frozen classifier.

    Raises:
        ContlearnError: Unknown model, a number of partitions the paper does not define for it, or a value out of range.
    """
    backbone, head = _network(model, n_classes)
    partitions = ECOTTA_PARTITIONS[model]
    if not isinstance(k, int) or isinstance(k, bool) or k not in partitions:
        raise ContlearnError(f"k is {k!r}, expected one of {', '.join(map(str, partitions))} for EcoTTA on {model}")
    network = _EcoTTA(backbone, head, partitions[k])
    return tinytl(
        network, _IMAGE, batch_size=batch_size, trainable=network.meta_parameters(), frozen_bytes=frozen_bytes
    )


def ecotta_tent(
    model: str = "wrn40_2", *, batch_size: int = 64, frozen_bytes: int = 1, n_classes: int = 10
) -> TinyTLAccount:
    """TENT in EcoTTA's tables: weight and bias of every BatchNorm train.

    ``stored`` at batch 64 is 188.25 MB for WRN-40-2 (the paper prints 188) and 646.4 MB for WRN-28-10.

    Arguments and errors as for ``ecotta``.
    """
    network = nn.Sequential(*_network(model, n_classes))
    affine = [p for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    return tinytl(network, _IMAGE, batch_size=batch_size, trainable=affine, frozen_bytes=frozen_bytes)


def ecotta_fine_tuning(model: str = "wrn40_2", *, batch_size: int = 64, n_classes: int = 100) -> TinyTLAccount:
    """Training everything, by default for 100 classes as in the authors' sample.

    The sample prints 392,864,976 bytes for WRN-40-2: ``profiler_peak``, to the byte. ``stored`` is 390.87 MB.

    Arguments and errors as for ``ecotta``.
    """
    network = nn.Sequential(*_network(model, n_classes))
    return tinytl(network, _IMAGE, batch_size=batch_size, trainable=network.parameters())


class _Partition(nn.Module):
    """x -> BN_k(f_k(x)) + relu(BN(conv3x3(x))), with f_k frozen residual blocks."""

    def __init__(self, blocks: Iterable[nn.Module], in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(out_channels)
        self.conv = conv3x3(in_channels, out_channels, stride)
        self.conv_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        replaced: Tensor = self.norm(self.blocks(x))
        # A functional ReLU, as in the authors' sample: as a module it would count.
        return replaced + F.relu(self.conv_norm(self.conv(x)))


class _EcoTTA(nn.Module):
    """EcoTTA's network, for accounting only: stem, partitions, the backbone's tail and the head."""

    def __init__(self, backbone: ResidualBackbone, head: nn.Module, blocks: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.partitions = nn.ModuleList()
        remaining = iter(backbone.blocks)
        with torch.no_grad():
            x = backbone.stem(torch.zeros(1, *_IMAGE, device="meta"))
            for count in blocks:
                part = [next(remaining) for _ in range(count)]
                y = nn.Sequential(*part)(x)
                stride = x.shape[2] // y.shape[2]
                self.partitions.append(_Partition(part, x.shape[1], y.shape[1], stride).to("meta"))
                x = y

    def meta_parameters(self) -> list[nn.Parameter]:
        """Of the parts that train: BN_k, convolution and its BatchNorm of every partition."""
        return [p for part in self.partitions for n, p in part.named_parameters() if not n.startswith("blocks.")]

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone.stem(x)
        for partition in self.partitions:
            x = partition(x)
        logits: Tensor = self.head(self.backbone.tail(x))
        return logits


def _network(model: str, n_classes: int) -> tuple[ResidualBackbone, nn.Linear]:
    """Backbone and classifier on the meta device: shapes without numbers.

    RobustBench's networks scale their input in the stem or before it, by functional operations that cost nothing.
    """
    if model not in _FACTORIES:
        raise unknown_name("model of EcoTTA", model, _FACTORIES)
    outputs = whole("n_classes", n_classes, least=1)
    with torch.device("meta"):
        backbone = _FACTORIES[model](_IMAGE)
        return backbone, nn.Linear(backbone.feature_dim, outputs)
