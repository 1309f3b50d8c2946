"""Max, average and adaptive average pooling in two dimensions, and their gradients.

Averages are separable, so both directions are two products with constant matrices. The gradient of a maximum goes to
the first of equal values in a window, as in PyTorch: by indices, or by first-match masks where a target has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Gap, Profile, Registry, Rule
from contlearn.edge.rules.shapes import constant, linear_pair, masked, numbers, unwindowed, windows

aten = torch.ops.aten


def pooled_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Output size of a pooling window; with ``ceil_mode`` the last window begins inside the input or left padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (-(-room // stride) if ceil_mode else room // stride) + 1
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


# ---------------------------------------------------------------------- maximum


def _geometry(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:  # fmt: skip
    kernel = numbers(kernel, 2)
    step = numbers(stride, 2) if len(numbers(stride, 2)) == 2 else kernel
    pad, apart = numbers(padding, 2), numbers(dilation, 2)
    out = [pooled_size(x.shape[-2 + a], kernel[a], step[a], pad[a], apart[a], ceil_mode) for a in (0, 1)]
    return kernel, step, pad, apart, out


def _first_matches(
    x: Tensor, top: Tensor | None, kernel: list[int], step: list[int], pad: list[int], apart: list[int], out: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """The maximum of each window, and per kernel position which windows have it there first."""
    shifted = windows(x, kernel, step, pad, apart, out, float("-inf"))
    if top is None:
        top = shifted[0]
        for part in shifted[1:]:
            top = torch.maximum(top, part)
    firsts: list[Tensor] = []
    found: Tensor | None = None
    for part in shifted:
        here = part == top
        firsts.append(here if found is None else here & ~found)
        found = here if found is None else found | here
    return top, firsts


def max_pool2d_with_indices(
    target: Profile, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,), ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Values and flat indices ``(batch, channels, out, out)``, by masks where the target has no indices."""
    if target.allows_indices_pooling:
        return NotImplemented  # type: ignore[no-any-return]
    kernel, step, pad, apart, out = _geometry(x, kernel_size, stride, padding, dilation, ceil_mode)
    image = x if x.ndim == 4 else x.unsqueeze(0)
    top, firsts = _first_matches(image, None, kernel, step, pad, apart, out)
    rows, columns = (torch.arange(out[a]) * step[a] - pad[a] for a in (0, 1))
    index: Tensor | None = None
    for number, first in enumerate(firsts):
        row, column = divmod(number, kernel[1])
        flat = (rows + row * apart[0])[:, None] * x.shape[-1] + columns + column * apart[1]
        part = first.to(torch.int64) * flat
        index = part if index is None else index + part
    assert index is not None
    return (top, index) if x.ndim == 4 else (top.squeeze(0), index.squeeze(0))


def max_pool2d_with_indices_backward(
    target: Profile, gradient: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], ceil_mode: bool, indices: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient to the input, of its shape."""
    if target.allows_indices_pooling and target.allows_scatter_reduce:
        flat = torch.zeros_like(x).flatten(-2)
        return flat.scatter_add(-1, indices.flatten(-2), gradient.flatten(-2)).reshape(x.shape)
    kernel, step, pad, apart, out = _geometry(x, kernel_size, stride, padding, dilation, ceil_mode)
    image, gradient = (x, gradient) if x.ndim == 4 else (x.unsqueeze(0), gradient.unsqueeze(0))
    # The maximum is found anew, as forward found it: runtimes merge the two.
    _, firsts = _first_matches(image, None, kernel, step, pad, apart, out)
    parts = [masked(gradient, first) for first in firsts]
    return unwindowed(parts, list(image.shape[2:]), kernel, step, pad, apart).reshape(x.shape)


# ---------------------------------------------------------------------- averages


def _average_matrix(
    size: int, out: int, kernel: int, stride: int, padding: int, count_padding: bool, divisor: int | None
) -> list[list[float]]:
    """``(out, size)``: the weight of each input in each window along one axis."""
    rows = []
    for window in range(out):
        start = window * stride - padding
        end = min(start + kernel, size + padding)
        inside = range(max(start, 0), min(end, size))
        count = divisor or (end - start if count_padding else len(inside))
        rows.append([1.0 / count if i in inside else 0.0 for i in range(size)])
    return rows


def _average_pair(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool,
    count_include_pad: bool, divisor_override: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel, step, pad, _, out = _geometry(x, kernel_size, stride, padding, [1], ceil_mode)
    matrices = []
    for a in (0, 1):
        # An override divides the whole window once: by the rows, so that the columns only sum.
        divisor = None if divisor_override is None else (divisor_override, 1)[a]
        listed = _average_matrix(x.shape[-2 + a], out[a], kernel[a], step[a], pad[a], count_include_pad, divisor)
        matrices.append(constant(listed, x.dtype))
    return matrices[0], matrices[1]


def avg_pool2d(
    target: Profile, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (0,),
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    """Average pooling: the operator itself, or constant matrices where exporters leave attributes out."""
    if not ceil_mode and divisor_override is None:
        return NotImplemented  # type: ignore[no-any-return]
    return linear_pair(
        x, *_average_pair(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    )


def avg_pool2d_backward(
    target: Profile, gradient: Tensor, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], ceil_mode: bool, count_include_pad: bool, divisor_override: int | None,
) -> Tensor:  # fmt: skip
    """Gradient to the input, of its shape."""
    rows, columns = _average_pair(x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return linear_pair(gradient, rows.t(), columns.t())


def _adaptive_matrix(size: int, out: int) -> list[list[float]]:
    rows = []
    for window in range(out):
        start, end = window * size // out, -(-(window + 1) * size // out)
        rows.append([1.0 / (end - start) if start <= i < end else 0.0 for i in range(size)])
    return rows


def adaptive_avg_pool2d(target: Profile, x: Tensor, output_size: Sequence[int]) -> Tensor:
    """``(..., height, width)`` to ``(..., *output_size)``."""
    if list(output_size) == [1, 1]:
        return x.mean([-2, -1], keepdim=True)
    rows, columns = (constant(_adaptive_matrix(x.shape[-2 + a], output_size[a]), x.dtype) for a in (0, 1))
    return linear_pair(x, rows, columns)


def adaptive_avg_pool2d_backward(target: Profile, gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient to the input, of its shape."""
    if gradient.shape[-2:] == (1, 1):
        return (gradient / (x.shape[-2] * x.shape[-1])).expand(x.shape)
    rows, columns = (constant(_adaptive_matrix(x.shape[-2 + a], gradient.shape[-2 + a]), x.dtype) for a in (0, 1))
    return linear_pair(gradient, rows.t(), columns.t())


def adaptive_max_pool2d(target: Profile, x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Windows of equal size as a plain maximum; others are a gap."""
    sizes = [x.shape[-2], x.shape[-1]]
    if any(size % out for size, out in zip(sizes, output_size, strict=True)):
        raise Gap(
            "adaptive_max_pool2d", {"input": sizes, "output_size": list(output_size)}, "its windows differ in size",
            "choose an output size that divides the input's",
        )  # fmt: skip
    kernel = [size // out for size, out in zip(sizes, output_size, strict=True)]
    return aten.max_pool2d_with_indices.default(x, kernel, kernel)  # type: ignore[no-any-return]


def adaptive_max_pool2d_backward(target: Profile, gradient: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """Gradient to the input, of its shape."""
    kernel = [x.shape[-2 + a] // gradient.shape[-2 + a] for a in (0, 1)]
    return max_pool2d_with_indices_backward(target, gradient, x, kernel, kernel, [0], [1], False, indices)


REGISTRY = Registry(
    "pooling",
    [
        Rule(aten.max_pool2d_with_indices.default, max_pool2d_with_indices, "operator, masks",
             "maxima and their indices; first-match masks over shifted windows where a target gives no indices"),
        Rule(aten.max_pool2d_with_indices_backward.default, max_pool2d_with_indices_backward, "scatter, masks",
             "gradient to the first maximum of each window"),
        Rule(aten.avg_pool2d.default, avg_pool2d, "operator, matrices", "averages; matrices for ceil_mode"),
        Rule(aten.avg_pool2d_backward.default, avg_pool2d_backward, "matrices", "gradient of averages"),
        Rule(aten._adaptive_avg_pool2d.default, adaptive_avg_pool2d, "mean, matrices", "averages to a fixed size"),
        Rule(aten._adaptive_avg_pool2d_backward.default, adaptive_avg_pool2d_backward, "expand, matrices",
             "gradient of averages to a fixed size"),
        Rule(aten.adaptive_max_pool2d.default, adaptive_max_pool2d, "pooling", "to a size that divides the input"),
        Rule(aten.adaptive_max_pool2d_backward.default, adaptive_max_pool2d_backward, "scatter, masks",
             "gradient of maxima to a fixed size"),
    ],
)  # fmt: skip
