"""timm's networks of inverted residual blocks, split into a frozen trunk and a tail that trains.

MobileNetV2 (arXiv 1801.04381), V3 (1905.02244), EfficientNet (1905.11946), MnasNet (1807.11626) and their relatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.frozen_operations import FrozenOperations

# Per kind of block its inner norms and the one behind the projection. A depthwise-separable block is an inverted
# residual without expansion; in an edge residual one dense convolution stands for expansion and depthwise convolution.
_NORMS: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    InvertedResidual: (("bn_s2d", "bn1", "bn2"), "bn3"),
    DepthwiseSeparableConv: (("bn_s2d", "bn1"), "bn2"),
    EdgeResidual: (("bn1",), "bn2"),
}
# What follows the blocks in each network's own forward, in that order.
_HEADS: dict[type[nn.Module], tuple[str, ...]] = {
    EfficientNet: ("conv_head", "bn2", "global_pool", "dropout", "classifier"),
    MobileNetV3: ("global_pool", "conv_head", "norm_head", "act2", "flatten", "dropout", "classifier"),
}
SUGGESTIONS = "efficientnet_lite0, mobilenetv2_100, mobilenetv3_small_100 or mnasnet_100"

Serve = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class Split:
    """Submodule names of a backbone, in the order they run.

    Attributes:
        trunk: what runs in front of the first block that trains.
        blocks: from there to the last inverted residual block.
        head: what follows, up to the features.
    """

    trunk: tuple[str, ...]
    blocks: tuple[str, ...]
    head: tuple[str, ...]


class SplitBackbone(nn.Module):
    """A backbone that runs its trunk without a gradient and in evaluation mode, and its tail as usual.

    It holds the backbone's own submodules under their own names, so that state dicts fit both.

    Args:
        backbone: timm's EfficientNet or MobileNetV3 class, without classifier.
        split: where to cut.
        frozen_head: the layers behind the blocks do not train, and keep no inputs for backward.
        trunk_batch: images that pass the trunk at a time; 0 for all of a batch.

    Attributes:
        still: names of modules beside the trunk that stay in evaluation mode.
        serve: asked for the trunk's output while training: called with the images and the function that computes it.
    """

    def __init__(self, backbone: nn.Module, split: Split, *, frozen_head: bool, trunk_batch: int) -> None:
        super().__init__()
        self._modules.update(backbone._modules)
        if "dropout" in split.head:
            self.dropout = nn.Dropout(float(backbone.drop_rate))  # type: ignore[arg-type]
        self.feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        self.split = split
        self.frozen_head = frozen_head
        self.trunk_batch = trunk_batch
        self.settings: dict[str, object] = {}
        self.still: tuple[str, ...] = ()
        self.serve: Serve | None = None
        self.train(backbone.training)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(batch, feature_dim)`` of images ``(batch, channels, height, width)``."""
        return self.tail(self.trunk(x))

    @torch.no_grad()
    def trunk(self, x: Tensor) -> Tensor:
        """What the first trained block reads ``(batch, channels, height, width)``; no gradient, nothing is saved."""
        if self.serve is not None and self.training:
            return self.serve(x, self.compute_trunk)
        return self.compute_trunk(x)

    @torch.no_grad()
    def compute_trunk(self, x: Tensor) -> Tensor:
        """The same, always computed."""
        parts = x.split(self.trunk_batch) if 0 < self.trunk_batch < len(x) else (x,)
        done = []
        for part in parts:
            for name in self.split.trunk:
                part = self.get_submodule(name)(part)
            done.append(part)
        return done[0] if len(done) == 1 else torch.cat(done)

    def tail(self, z: Tensor) -> Tensor:
        """Features ``(batch, feature_dim)`` from the trunk's output."""
        for name in self.split.blocks:
            z = self.get_submodule(name)(z)
        with FrozenOperations() if self.frozen_head else contextlib.nullcontext():
            for name in self.split.head:
                z = self.get_submodule(name)(z)
        return z

    def train(self, mode: bool = True) -> SplitBackbone:
        """Training mode for the tail; the trunk stays in evaluation mode."""
        super().train(mode)
        for name in (*self.split.trunk, *self.still):
            self.get_submodule(name).eval()
        return self

    def trunk_tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers of the trunk."""
        for name in self.split.trunk:
            module = self.get_submodule(name)
            yield from module.parameters()
            yield from module.buffers()

    def inner_norms(self) -> Iterator[str]:
        """Names of the norms inside the trained blocks, and of those in the head: an activation follows each."""
        for name in self.split.blocks:
            block = self.get_submodule(name)
            inside, _ = _NORMS.get(type(block), (("bn1",), ""))
            yield from (f"{name}.{leaf}" for leaf in inside if getattr(block, leaf, None) is not None)
        for name in self.split.head:
            module = self.get_submodule(name)
            if isinstance(module, ConvBnAct):
                yield f"{name}.bn1"
            elif name in ("bn2", "norm_head") and not isinstance(module, nn.Identity):
                yield name

    def last_norms(self) -> Iterator[str]:
        """Names of the norms behind the projections of the trained blocks."""
        for name in self.split.blocks:
            kind = type(self.get_submodule(name))
            if kind in _NORMS:
                yield f"{name}.{_NORMS[kind][1]}"


def split_of(backbone: nn.Module, blocks: int, *, model: str) -> Split:
    """Cut a backbone in front of its last ``blocks`` inverted residual blocks.

    Args:
        backbone: the network.
        blocks: how many train; 0 for none.
        model: what error messages call it.

    Raises:
        ContlearnError: a network without such blocks, fewer than ``blocks`` of them, or a block of another kind where
            training would reach.
    """
    head = _HEADS.get(type(backbone))
    stages: Any = backbone.blocks if head else ()
    every = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    kinds = [type(backbone.get_submodule(name)) for name in every]
    if head is None or InvertedResidual not in kinds:
        found = f" (its blocks are {', '.join(sorted({kind.__name__ for kind in kinds}))})" if kinds else ""
        raise ContlearnError(
            f"mobiletl: model {model!r} has no inverted residual blocks{found}; expected one that has, such as "
            f"{SUGGESTIONS}"
        )
    places = [place for place, kind in enumerate(kinds) if kind in _NORMS]
    if not 0 <= blocks <= len(places):
        raise ContlearnError(f"blocks: expected 0..{len(places)} for model {model!r}, got {blocks}")
    last = places[-1] + 1
    first = places[-blocks] if blocks else last
    for name, kind in zip(every[first:], kinds[first:], strict=True):
        if kind not in _NORMS and kind is not ConvBnAct:
            raise ContlearnError(
                f"blocks: {blocks} of model {model!r} reach {name}, a {kind.__name__}; expected inverted residual "
                "blocks from there on, so fewer blocks, or another model"
            )
    if not getattr(backbone, "drop_rate", 0.0):
        head = tuple(name for name in head if name != "dropout")
    return Split(("conv_stem", "bn1", *every[:first]), tuple(every[first:last]), (*every[last:], *head))
