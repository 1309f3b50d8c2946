"""A normalisation in front of every element-wise non-linearity, by module surgery (NaP, arXiv 2407.01800).

A probe forward finds the places: activation modules whose input does not come straight from a normalisation. Biases
that a following normalisation makes redundant are removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import nn

from contlearn.errors import ContlearnError
from contlearn.strategies.norm_layers import (
    NormalisedActivation,
    ReusedNormalisedActivation,
    RMSNormalisation,
    restart,
)
from contlearn.strategies.probe import place_of, probe, shape_of

Norm = Literal["layer", "rms"]


def insert_norms(model: nn.Module, *, norm: Norm = "layer", input_shape: Sequence[int] | None = None) -> list[str]:
    """Put a normalisation before every non-linearity of ``model`` that has none, and drop redundant biases; in place.

    Doing it twice changes nothing. Of a model with a method ``features(x)`` only that part is touched. Inputs
    ``(batch, n)`` and the outputs of Linear layers are normalised over the last dimension, other inputs over channels
    and places, with scale and offset per channel. An input of a single number per sample is left alone.

    Args:
        model: the network.
        norm: ``layer`` (LayerNorm; GroupNorm with one group on maps) or ``rms``.
        input_shape: ``(channels, height, width)``; default: the model's own.

    Returns:
        Names of the activations that were given norms, in the order of their first call.

    Raises:
        ContlearnError: a non-linearity called as a function, or a model that does not take such inputs.
    """
    if norm not in ("layer", "rms"):
        raise ContlearnError(f"norm: expected layer or rms, got {norm!r}")
    device, dtype = place_of(model)
    sites = probe(model, shape_of(model, input_shape))
    inserted = []
    for site in sites.activations:
        norms = [
            nn.Identity() if call.normalised else _make(norm, call.shape, call.last).to(device, dtype)
            for call in site.calls
        ]
        if all(isinstance(one, nn.Identity) for one in norms):
            continue
        inserted.append(site.name)
        if len(norms) == 1:
            _replace(model, site.module, NormalisedActivation(norms[0], site.module))
        else:
            _replace(model, site.module, ReusedNormalisedActivation(norms, site.module))
            root = getattr(model, "backbone", model)
            if restart not in root._forward_pre_hooks.values():
                root.register_forward_pre_hook(restart)
    for module in sites.redundant_biases:
        module.register_parameter("bias", None)
    return inserted


def _make(norm: Norm, shape: Sequence[int], last: bool) -> nn.Module:
    """A norm for inputs of ``shape`` (with the batch in front), over the last dimension or over all."""
    size = shape[-1] if last else shape[1]
    if math.prod(shape[1:]) == 1 or (last and size == 1):
        return nn.Identity()  # a single number normalises to a constant
    if norm == "rms":
        return RMSNormalisation(size, channels_first=not last)
    return nn.LayerNorm(size) if last else nn.GroupNorm(1, size)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent, name in list(_places(model, old)):
        if parent is not new:
            setattr(parent, name, new)


def _places(model: nn.Module, wanted: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is wanted:
                yield parent, name
