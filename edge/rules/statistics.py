"""Variances and deviations over axes, from centred values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Profile, Registry, Rule

aten = torch.ops.aten


def var_mean(
    target: Profile, x: Tensor, dim: Sequence[int] | None = None, *, correction: int | float | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Variance with ``count - correction`` (1 by default) in the denominator, and mean."""
    axes = [axis % x.ndim for axis in dim] if dim else list(range(x.ndim))
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    over = max(count - (1 if correction is None else correction), 0)
    variance = (centred * centred).sum(axes, keepdim=keepdim) / over
    return variance, mean if keepdim else mean.reshape(variance.shape)  # squeeze of several axes has no ONNX form


def var(
    target: Profile, x: Tensor, dim: Sequence[int] | None = None, *, correction: int | float | None = None,
    keepdim: bool = False,
) -> Tensor:  # fmt: skip
    """Variance."""
    return var_mean(target, x, dim, correction=correction, keepdim=keepdim)[0]


def std(
    target: Profile, x: Tensor, dim: Sequence[int] | None = None, *, correction: int | float | None = None,
    keepdim: bool = False,
) -> Tensor:  # fmt: skip
    """Standard deviation."""
    return torch.sqrt(var(target, x, dim, correction=correction, keepdim=keepdim))


REGISTRY = Registry(
    "statistics",
    [
        Rule(aten.var_mean.correction, var_mean, "two passes", "variance and mean"),
        Rule(aten.var.correction, var, "two passes", "variance"),
        Rule(aten.std.correction, std, "two passes", "standard deviation"),
    ],
)
