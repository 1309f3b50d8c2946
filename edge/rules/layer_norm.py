"""Layer and group normalisation and their gradients, from means over centred values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Profile, Registry, Rule

aten = torch.ops.aten


def native_layer_norm(
    target: Profile, x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and inverse deviation ``(..., 1, ...)``; the operator itself where it may give the statistics."""
    if target.allows_layer_norm_statistics and weight is not None:
        return NotImplemented  # type: ignore[no-any-return]
    axes = list(range(x.ndim - len(normalized_shape), x.ndim))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)
    out = centred * rstd
    if weight is not None:
        out = out * weight
    return out if bias is None else out + bias, mean, rstd


def native_layer_norm_backward(
    target: Profile, gradient: Tensor, x: Tensor, normalized_shape: Sequence[int], mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients to input, weight and bias."""
    first = x.ndim - len(normalized_shape)
    axes, batch_axes = list(range(first, x.ndim)), list(range(first))
    unit = (x - mean) * rstd
    dx: Tensor | None = None
    if output_mask[0]:
        scaled = gradient if weight is None else gradient * weight
        drift = scaled.mean(axes, keepdim=True)
        slope = (scaled * unit).mean(axes, keepdim=True)
        dx = (scaled - drift - unit * slope) * rstd
    dw = (gradient * unit).sum(batch_axes) if output_mask[1] and batch_axes else None
    db = gradient.sum(batch_axes) if output_mask[2] and batch_axes else None
    if not batch_axes:  # one sample and no batch: nothing to sum over
        dw = gradient * unit if output_mask[1] else None
        db = gradient if output_mask[2] else None
    return dx, dw, db


def _split(values: Tensor | None, groups: int, ndim: int) -> Tensor | None:
    """``(channels,)`` as ``(1, groups, channels / groups, 1)``."""
    return None if values is None else values.reshape(1, groups, -1, 1)


def native_group_norm(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output of the input's shape, mean and inverse deviation ``(batch, groups)``."""
    parts = x.reshape(N, group, C // group, HxW)
    mean = parts.mean([2, 3], keepdim=True)
    centred = parts - mean
    rstd = torch.rsqrt((centred * centred).mean([2, 3], keepdim=True) + eps)
    scale, shift = _split(weight, group, 4), _split(bias, group, 4)
    out = centred * (rstd if scale is None else rstd * scale)
    if shift is not None:
        out = out + shift
    return out.reshape(x.shape), mean.reshape(N, group), rstd.reshape(N, group)


def native_group_norm_backward(
    target: Profile, gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, N: int, C: int,
    HxW: int, group: int, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients to input, weight and bias, from two sums per sample and channel."""
    parts, passed = x.reshape(N, group, C // group, HxW), gradient.reshape(N, group, C // group, HxW)
    centred = parts - mean.reshape(N, group, 1, 1)
    deviation = rstd.reshape(N, group, 1, 1)
    sums = passed.sum(3, keepdim=True)
    dots = (passed * centred).sum(3, keepdim=True) * deviation
    dx: Tensor | None = None
    if output_mask[0]:
        scale, count = _split(weight, group, 4), math.prod(parts.shape[2:])
        drift = (sums if scale is None else sums * scale).sum(2, keepdim=True) / count
        slope = (dots if scale is None else dots * scale).sum(2, keepdim=True) / count
        scaled = passed * (deviation if scale is None else scale * deviation)
        dx = (scaled - centred * (slope * deviation * deviation) - drift * deviation).reshape(x.shape)
    dw = dots.reshape(N, C).sum(0) if output_mask[1] else None
    db = sums.reshape(N, C).sum(0) if output_mask[2] else None
    return dx, dw, db


REGISTRY = Registry(
    "layer normalisation",
    [
        Rule(aten.native_layer_norm.default, native_layer_norm, "operator, primitives", "layer normalisation"),
        Rule(aten.native_layer_norm_backward.default, native_layer_norm_backward, "primitives", "its gradients"),
        Rule(aten.native_group_norm.default, native_group_norm, "primitives", "group normalisation"),
        Rule(aten.native_group_norm_backward.default, native_group_norm_backward, "primitives", "its gradients"),
    ],
)
