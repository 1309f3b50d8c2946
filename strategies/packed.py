"""What a frozen network must keep so that a gradient can pass it: 1 bit per ReLU output, weights as int8, no inputs.

PyTorch keeps more than the derivatives need: a ReLU its output, a convolution its input although its weight is frozen
(arXiv 2404.12406 measures this), a BatchNorm its input although its statistics are constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from contlearn.strategies.step import exporting

# A byte 0/1 per flag, eight of them read as one int64: this product moves the eight flags into its top byte, and the
# product of a packed byte with it moves flag i to the top bit of byte i.
_SPREAD = 0x8040201008040201 - (1 << 64)
_LOW_BITS = 0x0101010101010101
_PART = 1 << 20
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(flags: Tensor) -> Tensor:
    """Booleans of any shape as bits: ``(ceil(n / 8),)`` uint8, in the order of ``flags.flatten()``."""
    flat = flags.flatten()
    if len(flat) % 8 or flat.storage_offset() % 8:
        flat = F.pad(flat, (0, -len(flat) % 8))
    # The shift is arithmetic; the conversion keeps the low byte.
    return (flat.view(torch.int64) * _SPREAD >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What :func:`pack` was given."""
    flags = (bits.to(torch.int64) * _SPREAD).bitwise_right_shift_(7).bitwise_and_(_LOW_BITS).view(torch.bool)
    return flags[: math.prod(shape)].view(shape)


class _PackedClamp(torch.autograd.Function):
    """clamp(x, low, high) that keeps which elements were strictly inside; NaN counts as inside, as in PyTorch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        outside = x <= low
        if high < math.inf:
            outside.logical_or_(x >= high)
        # No ONNX operator reads bits through an integer view: a graph keeps booleans, 8 bits each.
        ctx.shape, ctx.plain = tuple(x.shape), exporting()
        inside = outside.logical_not_()
        ctx.save_for_backward(inside if ctx.plain else pack(inside))
        del inside
        del outside
        if inplace:
            ctx.mark_dirty(x)
        if low == 0 and high == math.inf:
            return x.relu_() if inplace else x.relu()
        return x.clamp_(low, high) if inplace else x.clamp(low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (bits,) = ctx.saved_tensors
        if ctx.plain:
            return gradient * bits.to(gradient.dtype), None, None, None
        # As integers: the product keeps a passed gradient's bits (infinity too), and is the fastest way on a CPU.
        integers = gradient.view(_INTEGER[gradient.element_size()])
        return (integers * unpack(bits, ctx.shape)).view(gradient.dtype), None, None, None


def packed_relu(x: Tensor, inplace: bool = False) -> Tensor:
    """ReLU of a floating-point tensor of any shape that keeps 1 bit per element for backward."""
    return packed_clamp(x, 0.0, math.inf, inplace)


def packed_clamp(x: Tensor, low: float, high: float, inplace: bool = False) -> Tensor:
    """``F.hardtanh`` (ReLU6 is 0..6) that keeps 1 bit per element for backward; x of at least 16 bits per number."""
    return _PackedClamp.apply(x, low, high, inplace)  # type: ignore[no-any-return, no-untyped-call]


class PackedReLU(nn.Module):
    """``nn.ReLU`` that keeps 1 bit per element for backward, 1/32 of the float's bytes.

    Args:
        inplace: write the result into the input.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return packed_relu(x, self.inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


# ---------------------------------------------------------------------- frozen layers


def dequantise(weight: Tensor, scale: Tensor | None) -> Tensor:
    """``(out, ...)`` int8 times ``(out,)``; a weight without scale is returned as it is."""
    return weight if scale is None else weight.to(scale.dtype).mul_(scale.view(-1, *[1] * (weight.ndim - 1)))


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per output channel: ``(out, ...)`` int8, ``(out,)`` scale; no element is off by over scale / 2."""
    weight = weight.detach()
    scale = weight.flatten(1).abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).round_().clamp_(-127, 127)
    return rounded.to(torch.int8), scale


def _in_parts(gradient: Tensor, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Both cut along the batch so that a part has about 1 MB on the CPU, whose kernels copy what they are given."""
    size = max(gradient.nbytes, x.nbytes) // max(len(gradient), 1)
    rows = max(1, _PART // max(size, 1)) if gradient.device.type == "cpu" else max(len(gradient), 1)
    return gradient.split(rows), x.split(rows)


class FrozenConv(torch.autograd.Function):
    """A 2-D convolution whose weight does not train: backward needs the weight alone, and makes floats of it anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, how: Any) -> Tensor:
        ctx.how, ctx.size = how, x.shape[2:]
        ctx.save_for_backward(weight, scale)
        return torch.conv2d(x, dequantise(weight, scale), bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        strides, paddings, dilations, groups = ctx.how
        weight = dequantise(weight, scale)
        dx = gradient.new_empty(len(gradient), groups * weight.shape[1], *ctx.size)
        for part, into in zip(*_in_parts(gradient, dx), strict=True):
            # Of the input only the shape enters, so nothing is allocated for it.
            like = into.new_empty(()).expand(into.shape)
            into.copy_(
                torch.ops.aten.convolution_backward(
                    part, like, weight, None, strides, paddings, dilations, False, [0, 0], groups, [True, False, False]
                )[0]
            )
        return dx, None, None, None, None


class _PartedConv(torch.autograd.Function):
    """A 2-D convolution that trains, as PyTorch's, but for the CPU kernels' copies: backward goes part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Any) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, weight)
        return torch.conv2d(x, weight, None, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        strides, paddings, dilations, groups = ctx.how
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        dx = torch.empty_like(x) if wanted[0] else None
        dw = torch.zeros_like(weight) if wanted[1] else None
        begin = 0
        for part, rows in zip(*_in_parts(gradient, x), strict=True):
            found = torch.ops.aten.convolution_backward(
                part, rows, weight, None, strides, paddings, dilations, False, [0, 0], groups, wanted
            )
            if dx is not None:
                dx[begin : begin + len(part)] = found[0]
            if dw is not None:
                dw += found[1]
            begin += len(part)
        return dx, dw, None


class PartedConv2d(nn.Conv2d):
    """``nn.Conv2d`` without offset and with padding by zeros; its backward has no copy of a whole batch on the CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        if exporting():
            return super().forward(input)
        how = (self.stride, self.padding, self.dilation, self.groups)
        return _PartedConv.apply(input, self.weight, how)  # type: ignore[no-any-return, no-untyped-call]


class FrozenLinear(torch.autograd.Function):
    """x W^T + b with W held as int8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantise(weight, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ dequantise(*ctx.saved_tensors), None, None, None


class FrozenNorm(torch.autograd.Function):
    """BatchNorm by constant statistics: backward needs one factor per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        factor = torch.rsqrt(var + eps)
        ctx.save_for_backward(factor if weight is None else factor * weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (factor,) = ctx.saved_tensors
        return gradient * factor.view(-1, *[1] * (gradient.ndim - 2)), None, None, None, None, None


class Int8Conv2d(nn.Module):
    """A frozen convolution with its weight as int8 and one scale per output channel; floats exist while it runs.

    Args:
        conv: zero-padded by numbers.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight, scale = quantise(conv.weight)
        self.register_buffer("weight_int8", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = conv.bias
        self.how = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        return FrozenConv.apply(x, self.weight_int8, self.weight_scale, self.bias, self.how)  # type: ignore


class Int8Linear(nn.Module):
    """A frozen linear layer with its weight as int8 and one scale per output; floats exist while it runs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantise(linear.weight)
        self.register_buffer("weight_int8", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return FrozenLinear.apply(x, self.weight_int8, self.weight_scale, self.bias)  # type: ignore


def quantise_frozen(module: nn.Module) -> list[str]:
    """Replace the plain convolutions and linear layers in ``module`` by their int8 forms, in place.

    Subclasses with a forward of their own (input scaling, TensorFlow's padding) and layers that train are left alone.

    Returns:
        Names of the replaced layers.
    """
    replaced = []
    for name, layer in list(module.named_modules()):
        made: nn.Module
        if any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            continue
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            made = Int8Conv2d(layer)
        elif type(layer) is nn.Linear:
            made = Int8Linear(layer)
        else:
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf:
            setattr(module.get_submodule(owner), leaf, made.train(layer.training))
            replaced.append(name)
    return replaced
