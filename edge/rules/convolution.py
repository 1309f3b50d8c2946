"""``aten.convolution_backward`` for dense, grouped and depthwise, strided, dilated and padded, 1-D and 2-D.

The gradient to the input is a transposed convolution whose ``output_padding`` restores the rows that strides missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from contlearn.edge.rules import convolution_weight
from contlearn.edge.rules.convolution_weight import SMALL_MAPS, Geometry
from contlearn.edge.rules.registry import Gap, Profile, Registry, Rule
from contlearn.edge.rules.shapes import numbers, spread

aten = torch.ops.aten

# Up to here pixels of a map come last in a pointwise product.
FEW_PIXELS = 36


def by_transpose(gradient: Tensor, weight: Tensor, size: Sequence[int], how: Geometry) -> Tensor:
    """Transposed convolution by the weight."""
    rest = [
        full - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for full, out, stride, padding, dilation, kernel in zip(
            size, gradient.shape[2:], how.stride, how.padding, how.dilation, how.kernel, strict=True
        )
    ]
    return aten.convolution.default(  # type: ignore[no-any-return]
        gradient, weight, None, how.stride, how.padding, how.dilation, True, rest, how.groups
    )


def by_flip(gradient: Tensor, weight: Tensor, size: Sequence[int], how: Geometry) -> Tensor:
    """Convolution of the gradient, spread by the strides, by the weight turned round."""
    groups, outer, inner = how.groups, weight.shape[0] // how.groups, weight.shape[1]
    axes = list(range(len(how.kernel)))
    for axis in axes:
        # Beyond the last row reached, up to where a window of stride 1 ends.
        reach = how.dilation[axis] * (how.kernel[axis] - 1)
        start = reach - how.padding[axis]
        if how.stride[axis] > 1 or start != how.padding[axis] or gradient.shape[2 + axis] != size[axis]:
            gradient = spread(gradient, 2 + axis, size[axis] + reach, start, how.stride[axis])
    padding = [
        0 if gradient.shape[2 + axis] != size[axis] else how.dilation[axis] * (how.kernel[axis] - 1) // 2
        for axis in axes
    ]
    turned = weight.reshape([groups, outer, inner, *how.kernel]).transpose(1, 2)
    turned = turned.reshape([groups * inner, outer, *how.kernel])
    if math.prod(how.kernel) > 1:
        turned = turned.flip([2 + axis for axis in axes])
    ones = [1] * len(axes)
    return aten.convolution.default(  # type: ignore[no-any-return]
        gradient, turned, None, ones, padding, how.dilation, False, [0] * len(axes), groups
    )


def by_pixels(gradient: Tensor, weight: Tensor, size: Sequence[int], how: Geometry) -> Tensor:
    """Depthwise 2-D on small maps: the weights laid out as a matrix of all pixels by all pixels, per channel."""
    batch, channels, kernel = gradient.shape[0], gradient.shape[1], math.prod(how.kernel)
    picks = convolution_weight.pixel_picks(size, list(gradient.shape[2:]), how, weight.dtype)
    into, outof = picks.shape[:2]
    laid = picks.permute(2, 0, 1).reshape(kernel, into * outof)  # as in the forward pass: a runtime lays it out once
    matrix = torch.matmul(weight.reshape(channels, kernel), laid).reshape(channels, into, outof)
    passed = gradient.transpose(0, 1).reshape(channels, batch, outof)
    return torch.matmul(passed, matrix.transpose(1, 2)).transpose(0, 1).reshape([batch, channels, *size])


def by_product(gradient: Tensor, weight: Tensor, size: Sequence[int], how: Geometry) -> Tensor:
    """Pointwise: one product with the pixels of the batch as rows, which does not turn the weight round."""
    flat = torch.matmul(gradient.movedim(1, -1).flatten(0, -2), weight.flatten(1))
    return flat.reshape([gradient.shape[0], *size, weight.shape[1]]).movedim(-1, 1)


INPUT_FORMS: dict[str, Callable[[Tensor, Tensor, Sequence[int], Geometry], Tensor]] = {
    "transpose": by_transpose,
    "flip": by_flip,
    "product": by_product,
    "pixels": by_pixels,
}


def choose_input(gradient: Sequence[int], x: Sequence[int], how: Geometry) -> str:
    """The name of the form of the gradient to the input for these shapes, the fastest that was measured."""
    depthwise = how.groups == gradient[1] == x[1] > 1
    if depthwise and len(how.kernel) == 2 and math.prod(x[2:]) * math.prod(gradient[2:]) <= SMALL_MAPS:
        return "pixels"
    pointwise = all(
        kernel == stride == 1 and padding == 0
        for kernel, stride, padding in zip(how.kernel, how.stride, how.padding, strict=True)
    )
    if pointwise and how.groups == 1 and math.prod(x[2:]) <= FEW_PIXELS:
        return "product"
    return "flip" if pointwise else "transpose"


def convolution_backward(
    target: Profile, gradient: Tensor, x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool,
    output_padding: Sequence[int], groups: int, output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients to input ``(batch, in, *size)``, weight and bias, each where ``output_mask`` asks for it."""
    axes = weight.ndim - 2
    how = Geometry(
        tuple(weight.shape[2:]), tuple(numbers(stride, axes)), tuple(numbers(padding, axes)),
        tuple(numbers(dilation, axes)), groups,
    )  # fmt: skip
    if gradient.ndim != weight.ndim or 0 in gradient.shape:
        raise Gap(
            "convolution_backward", {"shape": tuple(gradient.shape)}, "the batch is missing or empty",
            "give a batch of at least one sample",
        )  # fmt: skip
    dx: Tensor | None = None
    dw: Tensor | None = None
    if output_mask[0]:
        if transposed:
            dx = aten.convolution.default(
                gradient, weight, None, how.stride, how.padding, how.dilation, False, [0] * axes, groups
            )
        else:
            size = list(x.shape[2:])
            dx = INPUT_FORMS[choose_input(gradient.shape, x.shape, how)](gradient, weight, size, how)
    if output_mask[1]:
        # A transposed convolution is the transpose of one that maps its output to its input.
        small, large = (x, gradient) if transposed else (gradient, x)
        form = convolution_weight.choose(target, small.shape, large.shape, how)
        dw = convolution_weight.FORMS[form](small, large, how)
    bias = gradient.sum([0, *range(2, gradient.ndim)]) if output_mask[2] else None
    return dx, dw, bias


REGISTRY = Registry(
    "convolution",
    [
        Rule(
            aten.convolution_backward.default,
            convolution_backward,
            f"dX: {', '.join(INPUT_FORMS)}; dW: {', '.join(convolution_weight.FORMS)}",
            "gradients of convolutions and transposed convolutions, the form by shape and target",
        )
    ],
)
