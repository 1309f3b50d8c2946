"""Gradient of a convolution with respect to its weight, in several forms of standard operators.

Every form maps ``(gradient, x, geometry)`` to ``(out, in / groups, *kernel)``; docs/edge_rules.md says which is fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from contlearn.edge.rules.registry import Profile
from contlearn.edge.rules.shapes import constant, padded, strided, windows

aten = torch.ops.aten

# Up to here (pixels in times pixels out) a product over all pairs of pixels beats one per kernel row.
SMALL_MAPS = 1600


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding and dilation per spatial axis, and the number of groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def by_convolution(gradient: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """A convolution of the input by the gradient: strides and dilations change places, then the kernel is cut out."""
    groups, batch, channels = how.groups, x.shape[0], x.shape[1]
    spatial = list(x.shape[2:])
    rest = list(range(3, 3 + len(spatial)))
    folded = x.reshape([batch, groups, channels // groups, *spatial]).permute([2, 1, 0, *rest])
    folded = folded.reshape([channels // groups, groups * batch, *spatial])
    result = aten.convolution.default(
        folded, gradient.transpose(0, 1), None, how.dilation, how.padding, how.stride, False, [0] * len(spatial), groups
    )
    for axis, size in enumerate(how.kernel):
        result = strided(result, 2 + axis, 0, size, 1)  # strides leave rows that no window reached
    return result.transpose(0, 1)  # type: ignore[no-any-return]


def by_shifts(gradient: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """One product of matrices per kernel position, over strided slices of the padded input: no dilated convolution."""
    out_size = list(gradient.shape[2:])
    batch, groups, pixels = x.shape[0], how.groups, math.prod(out_size)
    inner, outer = x.shape[1] // groups, gradient.shape[1] // groups
    left = gradient.reshape(batch, groups, outer, pixels)
    parts = [
        torch.matmul(left, part.reshape(batch, groups, inner, pixels).transpose(2, 3)).sum(0)
        for part in windows(x, how.kernel, how.stride, how.padding, how.dilation, out_size)
    ]
    return torch.stack(parts, -1).reshape([groups * outer, inner, *how.kernel])


def by_folded_shifts(gradient: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """As :func:`by_shifts` without groups, the batch inside the product: better where images are small."""
    out_size = list(gradient.shape[2:])
    left = gradient.transpose(0, 1).flatten(1)
    parts = [
        torch.matmul(left, part.transpose(0, 1).flatten(1).t())
        for part in windows(x, how.kernel, how.stride, how.padding, how.dilation, out_size)
    ]
    return torch.stack(parts, -1).reshape([gradient.shape[1], x.shape[1], *how.kernel])


def by_products(gradient: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """Depthwise: element-wise product with each shifted input, summed."""
    out_size = list(gradient.shape[2:])
    axes = [0, *range(2, x.ndim)]
    parts = [
        (part * gradient).sum(axes)
        for part in windows(x, how.kernel, how.stride, how.padding, how.dilation, out_size)
    ]
    return torch.stack(parts, 1).reshape([x.shape[1], 1, *how.kernel])


def meets(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[list[list[float]]]:
    """``[in][out][kernel]``: 1 where an input position and an output position meet at a kernel position."""
    return [
        [[float(o * stride + k * dilation - padding == i) for k in range(kernel)] for o in range(out)]
        for i in range(size)
    ]


def pixel_picks(size: Sequence[int], out: Sequence[int], how: Geometry, dtype: torch.dtype) -> Tensor:
    """``(in pixels, out pixels, kernel positions)``: 1 where the three meet in a 2-D convolution."""
    met = [
        meets(size[a], out[a], how.kernel[a], how.stride[a], how.padding[a], how.dilation[a]) for a in (0, 1)
    ]
    # Multiplied out before the trace sees it, so that the graph holds one constant.
    whole = np.einsum("hoi,wpj->hwopij", np.asarray(met[0]), np.asarray(met[1]))
    flat = whole.reshape(math.prod(size), math.prod(out), math.prod(how.kernel))
    return torch.tensor(flat.tolist(), dtype=dtype)


def by_rows(gradient: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """Depthwise 2-D: per kernel row a product of all columns by all columns, of which a constant picks the diagonals.

    Wasteful in arithmetic (width / kernel) and still several times faster than a grouped convolution.
    """
    batch, channels, _, width = x.shape
    height_out, width_out = gradient.shape[2:]
    right = gradient.transpose(0, 1).reshape(channels, batch * height_out, width_out)
    reach = (height_out - 1) * how.stride[0] + how.dilation[0] * (how.kernel[0] - 1) + 1
    low = how.padding[0]
    whole = padded(x.transpose(0, 1), [0, 0, low, max(reach - low - x.shape[2], 0)])
    columns = meets(width, width_out, how.kernel[1], how.stride[1], how.padding[1], how.dilation[1])
    picks = constant(columns, x.dtype).reshape(width * width_out, how.kernel[1])
    rows = []
    for row in range(how.kernel[0]):
        part = strided(whole, 2, row * how.dilation[0], height_out, how.stride[0])
        left = part.reshape(channels, batch * height_out, width).transpose(1, 2)
        rows.append(torch.matmul(torch.matmul(left, right).reshape(channels, width * width_out), picks))
    return torch.stack(rows, 1).reshape(channels, 1, *how.kernel)


def by_pixels(gradient: Tensor, x: Tensor, how: Geometry) -> Tensor:
    """Depthwise 2-D on small maps: a product of all pixels by all pixels; a constant picks those that meet."""
    batch, channels, height, width = x.shape
    height_out, width_out = gradient.shape[2:]
    left = x.permute(1, 2, 3, 0).reshape(channels, height * width, batch)
    right = gradient.transpose(0, 1).reshape(channels, batch, height_out * width_out)
    picks = pixel_picks([height, width], [height_out, width_out], how, x.dtype)
    pairs = torch.matmul(left, right).reshape(channels, -1)
    return torch.matmul(pairs, picks.reshape(-1, math.prod(how.kernel))).reshape(channels, 1, *how.kernel)


FORMS: dict[str, Callable[[Tensor, Tensor, Geometry], Tensor]] = {
    "convolution": by_convolution,
    "shifts": by_shifts,
    "folded shifts": by_folded_shifts,
    "products": by_products,
    "rows": by_rows,
    "pixels": by_pixels,
}


def choose(target: Profile, gradient: Sequence[int], x: Sequence[int], how: Geometry) -> str:
    """The name of the form for these shapes: the fastest that was measured, among those the target executes."""
    depthwise = how.groups == x[1] == gradient[1]
    pairs = math.prod(x[2:]) * math.prod(gradient[2:])
    if depthwise and len(how.kernel) == 2 and how.groups > 1:
        if pairs <= SMALL_MAPS:
            return "pixels"
        # A kernel row costs height x width^2: on large maps, and for long kernels of few rows, sums are cheaper.
        return "rows" if x[3] <= 64 else "products"
    if how.groups == 1:
        # Summing (out, in) matrices over the batch against moving both inputs.
        inner, outer, pixels = x[1], gradient[1], math.prod(gradient[2:])
        return "folded shifts" if inner * outer > (inner + outer) * pixels else "shifts"
    if depthwise:
        return "products"
    strided_kernel = any(step > 1 for step in how.stride)
    if strided_kernel and not target.allows_dilated_dynamic_conv:
        return "shifts"
    return "convolution" if how.groups > 8 else "shifts"

