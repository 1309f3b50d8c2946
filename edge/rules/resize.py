"""Nearest and bilinear resizing and their gradients: separable, so two products with constant matrices each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Profile, Registry, Rule
from contlearn.edge.rules.shapes import constant, linear_pair

aten = torch.ops.aten
Rows = list[list[float]]


def nearest_rows(size: int, out: int, scale: float | None) -> Rows:
    """``(out, size)``: which input each output copies."""
    step = 1 / scale if scale else size / out
    return [[float(min(math.floor(o * step), size - 1) == i) for i in range(size)] for o in range(out)]


def bilinear_rows(size: int, out: int, scale: float | None, align_corners: bool) -> Rows:
    """``(out, size)``: the two inputs between which each output lies."""
    rows = []
    for o in range(out):
        if align_corners:
            place = o * (size - 1) / (out - 1) if out > 1 else 0.0
        else:
            place = max((o + 0.5) * (1 / scale if scale else size / out) - 0.5, 0.0)
        low = min(int(place), size - 1)
        part, row = place - low, [0.0] * size
        row[low] += 1 - part
        row[min(low + 1, size - 1)] += part
        rows.append(row)
    return rows


def _pair(
    size: Sequence[int], out: Sequence[int], scales: tuple[float | None, float | None], align_corners: bool | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    made = [
        constant(
            nearest_rows(size[a], out[a], scales[a])
            if align_corners is None
            else bilinear_rows(size[a], out[a], scales[a], align_corners),
            dtype,
        )
        for a in (0, 1)
    ]
    return made[0], made[1]


def nearest(
    target: Profile, x: Tensor, output_size: Sequence[int], scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:  # fmt: skip
    """``(batch, channels, height, width)`` to ``output_size``."""
    return linear_pair(x, *_pair(x.shape[2:], output_size, (scales_h, scales_w), None, x.dtype))


def nearest_backward(
    target: Profile, gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int],
    scales_h: float | None = None, scales_w: float | None = None,
) -> Tensor:  # fmt: skip
    """To the input."""
    rows, columns = _pair(input_size[2:], output_size, (scales_h, scales_w), None, gradient.dtype)
    return linear_pair(gradient, rows.t(), columns.t())


def bilinear(
    target: Profile, x: Tensor, output_size: Sequence[int], align_corners: bool, scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:  # fmt: skip
    """``(batch, channels, height, width)`` to ``output_size``."""
    return linear_pair(x, *_pair(x.shape[2:], output_size, (scales_h, scales_w), align_corners, x.dtype))


def bilinear_backward(
    target: Profile, gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], align_corners: bool,
    scales_h: float | None = None, scales_w: float | None = None,
) -> Tensor:  # fmt: skip
    """To the input."""
    rows, columns = _pair(input_size[2:], output_size, (scales_h, scales_w), align_corners, gradient.dtype)
    return linear_pair(gradient, rows.t(), columns.t())


REGISTRY = Registry(
    "resize",
    [
        Rule(aten.upsample_nearest2d.default, nearest, "matrices", "nearest neighbour"),
        Rule(aten.upsample_nearest2d_backward.default, nearest_backward, "matrices", "its gradient"),
        Rule(aten.upsample_bilinear2d.default, bilinear, "matrices", "bilinear"),
        Rule(aten.upsample_bilinear2d_backward.default, bilinear_backward, "matrices", "its gradient"),
    ],
)
