"""What several families share: placing tensors in zeros, shifted windows, masks and constant matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def constant(values: Sequence[object], dtype: torch.dtype) -> Tensor:
    """Nested numbers as a tensor that a trace takes up as a constant."""
    return torch.tensor(values, dtype=dtype)


def masked(gradient: Tensor, keep: Tensor) -> Tensor:
    """``gradient`` where ``keep``, else 0.

    As a product: onnxruntime's Where is three times slower on a CPU. An infinite gradient gives NaN where masked.
    """
    return gradient * keep.to(gradient.dtype)


def padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    """``torch.nn.functional.pad`` (last axis first) with the negative pads as slices, which every target executes."""
    ndim = x.ndim
    for number in range(len(pads) // 2):
        low, high = pads[2 * number], pads[2 * number + 1]
        axis, size = ndim - 1 - number, x.shape[ndim - 1 - number]
        if low < 0 or high < 0:
            x = x.narrow(axis, max(-low, 0), size - max(-low, 0) - max(-high, 0))
    grown = [max(pad, 0) for pad in pads]
    return torch.constant_pad_nd(x, grown, value) if any(grown) else x


def spread(x: Tensor, axis: int, size: int, start: int, step: int) -> Tensor:
    """Zeros of ``size`` along ``axis`` with ``x`` at ``start, start + step, ...``; what falls outside is dropped."""
    axis %= x.ndim
    count = x.shape[axis]
    if step > 1:
        inner = x.unsqueeze(axis + 1)
        pads = [0, 0] * (x.ndim - 1 - axis) + [0, step - 1]
        x = padded(inner, pads).flatten(axis, axis + 1)
    pads = [0, 0] * (x.ndim - 1 - axis) + [start, size - start - count * step]
    return padded(x, pads)


def strided(x: Tensor, axis: int, start: int, count: int, step: int) -> Tensor:
    """``count`` slices of ``x`` along ``axis`` from ``start`` at distance ``step``."""
    if start == 0 and step == 1 and count == x.shape[axis]:
        return x
    return torch.ops.aten.slice.Tensor(x, axis, start, start + (count - 1) * step + 1, step)  # type: ignore[no-any-return]


def windows(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    out: Sequence[int], value: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    """For each kernel position, in row order, the ``(batch, channels, *out)`` values that it meets."""
    pads: list[int] = []
    for axis in reversed(range(len(kernel))):
        reach = (out[axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        pads += [padding[axis], max(reach - padding[axis] - x.shape[2 + axis], 0)]
    whole = padded(x, pads, value)
    shifted = []
    for position in product(*(range(size) for size in kernel)):
        part = whole
        for axis, index in enumerate(position):
            part = strided(part, 2 + axis, index * dilation[axis], out[axis], stride[axis])
        shifted.append(part)
    return shifted


def unwindowed(
    parts: Sequence[Tensor], size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """The transpose of :func:`windows`: each part goes back to where it came from, and sums are formed."""
    whole: Tensor | None = None
    for part, position in zip(parts, product(*(range(count) for count in kernel)), strict=True):
        for axis, index in enumerate(position):
            start = index * dilation[axis] - padding[axis]
            # In zeros that begin at -padding, so that windows over the edge are cut off afterwards.
            part = spread(part, 2 + axis, size[axis], start, stride[axis])
        whole = part if whole is None else whole + part
    assert whole is not None
    return whole


def numbers(values: Sequence[int] | int, count: int) -> list[int]:
    """An ATen list of integers, where one number or none stands for all axes."""
    listed = [values] if isinstance(values, int) else list(values)
    return listed * count if len(listed) == 1 else listed


def per_channel(values: Tensor, ndim: int) -> Tensor:
    """``(channels,)`` as ``(1, channels, 1, ...)``."""
    return values.reshape([1, -1] + [1] * (ndim - 2))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Booleans ``(*labels.shape, classes)`` by comparison: no scatter, no scalar read."""
    return labels.unsqueeze(-1) == torch.arange(classes, dtype=labels.dtype, device=labels.device)


def linear_pair(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows @ x @ columns^T`` over the last two axes; ``rows`` ``(out, in)``, ``columns`` ``(out, in)``."""
    return torch.matmul(torch.matmul(rows, x), columns.t())

