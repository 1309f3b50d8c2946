"""Variances and deviations over axes, from centred values; sums of very many values in two stages."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Profile, Registry, Rule

aten = torch.ops.aten

# More values than this are not added up in one go.
MANY = 1 << 14


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


def _in_two_stages(x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Sums ``(k,)`` over the last axes of ``x``, about as many as there are values in each; ``None`` for few values."""
    if x.numel() <= MANY or not x.is_floating_point() or dtype not in (None, x.dtype):
        return None
    inner = 1
    for size in reversed(x.shape):
        if inner * inner >= x.numel():
            break
        inner *= size
    return x.reshape(-1, inner).sum(1)


def whole_sum(target: Profile, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of all values (): a runtime adds them up one after the other, and a million of them lose two digits."""
    parts = _in_two_stages(x, dtype)
    return NotImplemented if parts is None else parts.sum(0)  # type: ignore[no-any-return]


def whole_mean(target: Profile, x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Mean of all values (), likewise."""
    parts = _in_two_stages(x, dtype)
    return NotImplemented if parts is None else parts.sum(0) / x.numel()  # type: ignore[no-any-return]


REGISTRY = Registry(
    "statistics",
    [
        Rule(aten.sum.default, whole_sum, "operator, two stages", "sum of all values"),
        Rule(aten.mean.default, whole_mean, "operator, two stages", "mean of all values"),
        Rule(aten.var_mean.correction, var_mean, "two passes", "variance and mean"),
        Rule(aten.var.correction, var, "two passes", "variance"),
        Rule(aten.std.correction, std, "two passes", "standard deviation"),
    ],
)
