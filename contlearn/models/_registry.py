"""The names a model can be asked for: one frozen record per model of ours, and timm's names behind them.

Reading our own records imports no torch; a factory is an import string that is resolved when a model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING

from contlearn.errors import ContlearnError, nearest, unknown_name

if TYPE_CHECKING:
    from torch import nn

TIMM_PREFIX = "timm/"
TIMM_FACTORY = "contlearn.models._timm:timm_backbone"


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a model before it is built.

    Attributes:
        name: The name ``create`` takes.
        factory: ``"module:function"``; the function takes ``input_shape`` (channels, height, width) and keyword
            options, and returns the backbone: a module with ``feature_dim`` that maps
            (batch, channels, height, width) to (batch, feature_dim).
        description: One line.
        source: The paper (arXiv id where there is one) or the library.
        notes: What a user must know to get the published behaviour; may be empty.
    """

    name: str
    factory: str
    description: str
    source: str
    notes: str = ""

    def load_factory(self) -> Callable[..., nn.Module]:
        """Import the factory (and with it torch)."""
        module, _, function = self.factory.partition(":")
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
        return factory


def index(records: Iterable[ModelInfo]) -> Mapping[str, ModelInfo]:
    """Records by name.

    Raises:
        ValueError: A name occurs twice.
    """
    by_name: dict[str, ModelInfo] = {}
    for record in records:
        if record.name in by_name:
            raise ValueError(f"model {record.name!r} is registered twice")
        by_name[record.name] = record
    return MappingProxyType(by_name)


_HE = "He et al., Deep residual learning (arXiv 1512.03385), section 4.2"
_WRN = "Zagoruyko and Komodakis, Wide residual networks (arXiv 1605.07146)"
_GEM = "Lopez-Paz and Ranzato, Gradient episodic memory (arXiv 1706.08840)"

REGISTRY = index(
    [
        ModelInfo(
            "mlp",
            "contlearn.models._mlp:mlp",
            "Fully connected network, Linear-ReLU-Dropout per hidden layer; any image size.",
            "Avalanche's SimpleMLP, layer for layer",
        ),
        ModelInfo(
            "simple_cnn",
            "contlearn.models._simple_cnn:simple_cnn",
            "Five-convolution network with 64 features for small images.",
            "after Avalanche's SimpleCNN",
            "Pads every 3x3 convolution, so that 8x8 images pass; Avalanche's pads every other one.",
        ),
        ModelInfo(
            "slim_resnet18",
            "contlearn.models._resnet18:slim_resnet18",
            "ResNet-18 for small images at 20 instead of 64 channels, 160 features.",
            _GEM,
            "State dicts of Avalanche's SlimResNet18 load as they are.",
        ),
        ModelInfo(
            "resnet18_cifar",
            "contlearn.models._resnet18:resnet18_cifar",
            "ResNet-18 for small images: 3x3 stem, no max-pooling, 512 features.",
            _GEM,
            "The usual backbone of replay papers; timm's ImageNet network is 'resnet18'.",
        ),
        *(
            ModelInfo(
                f"resnet{depth}",
                f"contlearn.models._cifar_resnet:resnet{depth}",
                f"CIFAR ResNet-{depth}, parameter-free shortcuts (option A), 64 features.",
                _HE,
                "timm's ImageNet network of this name is 'timm/resnet26'." if depth == 26 else "",
            )
            for depth in (14, 20, 26, 32)
        ),
        ModelInfo(
            "wrn16_2",
            "contlearn.models._wide_resnet:wrn16_2",
            "WideResNet-16-2, pre-activation, 6 residual blocks, 128 features.",
            _WRN,
            "The network of wrn40_2 with 2 blocks per stage.",
        ),
        ModelInfo(
            "wrn40_2",
            "contlearn.models._wide_resnet:wrn40_2",
            "WideResNet-40-2, pre-activation, 18 residual blocks, 128 features.",
            _WRN,
            "RobustBench's and AugMix' files load as they are; AugMix' needs normalise_input=True.",
        ),
        ModelInfo(
            "wrn28_10",
            "contlearn.models._wide_resnet:wrn28_10",
            "WideResNet-28-10, pre-activation, 12 residual blocks, 640 features.",
            _WRN,
            "RobustBench's files load as they are.",
        ),
        ModelInfo(
            "efficientnet_lite0",
            "contlearn.models._timm:efficientnet_lite0",
            "EfficientNet-Lite0 as trained in TensorFlow, 1280 features; weights='imagenet' from a pip package.",
            "Tan and Le, EfficientNet (arXiv 1905.11946); Lite variant from tensorflow/tpu",
            "The ImageNet weights were trained on inputs (x - 0.5) / 0.5, x in 0..1, of 224x224 pixels."
            " timm's own weights belong to 'timm/efficientnet_lite0'.",
        ),
    ]
)


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create`` takes, sorted.

    Args:
        pattern: Shell-style wildcard. Our own models are searched; ``"timm/PATTERN"`` searches timm's instead.
    """
    if pattern.startswith(TIMM_PREFIX):
        import timm

        wanted = pattern.removeprefix(TIMM_PREFIX)
        return [TIMM_PREFIX + name for name in sorted(timm.list_models()) if fnmatchcase(name, wanted)]
    return sorted(name for name in REGISTRY if fnmatchcase(name, pattern))


def describe(name: str) -> ModelInfo:
    """The record of a model: one of ours, or any timm name (``"timm/NAME"`` where ours would hide it).

    Raises:
        ContlearnError: No model has this name; the message gives the nearest.
    """
    if name in REGISTRY:
        return REGISTRY[name]

    import timm

    bare = str(name).removeprefix(TIMM_PREFIX)
    if timm.is_model(bare):
        config = timm.get_pretrained_cfg(bare)
        papers = getattr(config, "paper_ids", None) or ()
        source = ", ".join([papers] if isinstance(papers, str) else papers)
        return ModelInfo(
            TIMM_PREFIX + bare if bare in REGISTRY else bare,
            TIMM_FACTORY,
            f"timm's {bare}, without its classifier.",
            f"timm ({source})" if source else "timm",
        )
    # timm has well over a thousand names: the message lists ours and, of timm's, at most the one that is close.
    timm_names = timm.list_models()
    prefixed = str(name).startswith(TIMM_PREFIX)
    close = nearest(name, (TIMM_PREFIX + other for other in timm_names) if prefixed else {*REGISTRY, *timm_names})
    known = sorted({*REGISTRY, close} if close else REGISTRY)
    raise ContlearnError(f"{unknown_name('model', name, known)} or any name of timm")
