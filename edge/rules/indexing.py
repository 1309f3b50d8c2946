"""Slices, padding and look-ups backwards: zeros around values, and sums by index as products with comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Gap, Profile, Registry, Rule
from contlearn.edge.rules.shapes import constant, one_hot, padded, spread

aten = torch.ops.aten


def slice_backward(
    target: Profile, gradient: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    """``gradient`` within zeros of ``input_sizes``."""
    size = input_sizes[dim]
    start = max(start + size, 0) if start < 0 else min(start, size)
    return spread(gradient, dim, size, start, step)


def select_backward(target: Profile, gradient: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """``gradient`` at ``index`` of a new axis of zeros."""
    dim %= len(input_sizes)
    return spread(gradient.unsqueeze(dim), dim, input_sizes[dim], index % input_sizes[dim], 1)


def diagonal_backward(
    target: Profile, gradient: Tensor, input_sizes: Sequence[int], offset: int, dim1: int, dim2: int
) -> Tensor:
    """``gradient`` (..., length) on a diagonal within zeros of ``input_sizes``, by a constant mask."""
    first, second = dim1 % len(input_sizes), dim2 % len(input_sizes)
    height, width = input_sizes[first], input_sizes[second]
    rows = spread(gradient, -1, height, max(-offset, 0), 1)
    places = constant([[float(column - row == offset) for column in range(width)] for row in range(height)], rows.dtype)
    return (rows.unsqueeze(-1) * places).movedim((-2, -1), (first, second))


def constant_pad_nd(target: Profile, x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    """Negative pads as slices; the operator itself where there are none."""
    if all(number >= 0 for number in pad):
        return NotImplemented  # type: ignore[no-any-return]
    return padded(x, list(pad), value)


def _summed(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """``(count, ...)`` rows added up by index ``(count,)`` to ``(size, ...)``."""
    index = torch.where(index < 0, index + size, index)
    places = one_hot(index, size).to(rows.dtype).t()
    return torch.matmul(places, rows.flatten(1)).reshape([size, *rows.shape[1:]])


def embedding_dense_backward(
    target: Profile, gradient: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """To the table ``(num_weights, size)``."""
    places = one_hot(indices.flatten(), num_weights).to(gradient.dtype)
    if scale_grad_by_freq:
        places = places / torch.clamp(places.sum(0), min=1)
    if padding_idx >= 0:
        places = places * (torch.arange(num_weights) != padding_idx).to(gradient.dtype)
    return torch.matmul(places.t(), gradient.reshape(-1, gradient.shape[-1]))


def index_put(
    target: Profile, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    """Sums by one index tensor as a product; more of them only where the target scatters."""
    given = [number for number, index in enumerate(indices) if index is not None]
    index = indices[given[0]]
    assert index is not None
    if not accumulate or len(given) > 1 or index.dtype == torch.bool:
        if target.allows_scatter_reduce or not accumulate:
            return NotImplemented  # type: ignore[no-any-return]
        raise Gap(
            "index_put", {"indices": len(given), "accumulate": accumulate}, "the target cannot add while it scatters",
            "index one axis at a time, by integers",
        )  # fmt: skip
    axis = given[0]
    whole = list(x.shape[:axis]) + list(index.shape) + list(x.shape[axis + 1 :])
    values = values.expand(whole)
    count, ndim = math.prod(index.shape), index.ndim
    moved = values.reshape([*x.shape[:axis], count, *values.shape[axis + ndim :]]).movedim(axis, 0)
    return x + _summed(moved, index.flatten(), x.shape[axis]).movedim(0, axis)


def index_add(
    target: Profile, x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: int | float = 1
) -> Tensor:
    """Sums of slices by index."""
    added = _summed(source.movedim(dim, 0), index, x.shape[dim]).movedim(0, dim)
    return x + (added if alpha == 1 else added * alpha)


def scatter_add(target: Profile, x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """Element-wise sums by index: the operator, or comparisons with every position."""
    if target.allows_scatter_reduce:
        return NotImplemented  # type: ignore[no-any-return]
    for axis, size in enumerate(index.shape):
        src = src.narrow(axis, 0, size)
    places = one_hot(index.movedim(dim, -1), x.shape[dim]).to(src.dtype)
    added = torch.matmul(src.movedim(dim, -1).unsqueeze(-2), places).squeeze(-2).movedim(-1, dim)
    for axis, size in enumerate(x.shape):
        added = spread(added, axis, size, 0, 1)
    return x + added


REGISTRY = Registry(
    "indexing",
    [
        Rule(aten.slice_backward.default, slice_backward, "padding", "gradient of a slice, with steps"),
        Rule(aten.select_backward.default, select_backward, "padding", "gradient of one index"),
        Rule(aten.diagonal_backward.default, diagonal_backward, "mask", "gradient of a diagonal"),
        Rule(aten.constant_pad_nd.default, constant_pad_nd, "operator, slices", "negative pads as slices"),
        Rule(aten.embedding_dense_backward.default, embedding_dense_backward, "comparison", "to an embedding table"),
        Rule(aten.index_put.default, index_put, "comparison, operator", "gradient of indexing by tensors"),
        Rule(aten.index_add.default, index_add, "comparison", "gradient of index_select"),
        Rule(aten.scatter_add.default, scatter_add, "operator, comparison", "gradient of gather"),
    ],
)
