"""Gradients of activations and of softmax, as few element-wise operators as possible.

Masks multiply instead of selecting. At a kink the gradient is PyTorch's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Profile, Registry, Rule
from contlearn.edge.rules.shapes import masked

aten = torch.ops.aten
Number = int | float


def threshold_backward(target: Profile, gradient: Tensor, x: Tensor, threshold: Number) -> Tensor:
    """ReLU, by its output or input."""
    return masked(gradient, x > threshold)


def hardtanh_backward(target: Profile, gradient: Tensor, x: Tensor, min_val: Number, max_val: Number) -> Tensor:
    """ReLU6 too: open interval."""
    if max_val == math.inf:
        return masked(gradient, x > min_val)
    return masked(gradient, (x > min_val) & (x < max_val))


def hardswish_backward(target: Profile, gradient: Tensor, x: Tensor) -> Tensor:
    """``x * relu6(x + 3) / 6``: slope ``x / 3 + 1/2`` in between, 1 from 3 on."""
    # Clamped at the upper end the line reaches 3/2; half of the upper mask brings it to 1.
    line = torch.clamp(x, -3.0, 3.0) / 3 + 0.5
    inside = (x > -3) & (x < 3)
    return gradient * (line * inside.to(x.dtype) + (x >= 3).to(x.dtype))


def hardsigmoid_backward(target: Profile, gradient: Tensor, x: Tensor) -> Tensor:
    """Slope 1/6 between -3 and 3."""
    return masked(gradient / 6, (x > -3) & (x < 3))


def silu_backward(target: Profile, gradient: Tensor, x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    gate = torch.sigmoid(x)
    return gradient * (gate * (1 + x * (1 - gate)))


def gelu_backward(target: Profile, gradient: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Exact, or by its tanh approximation."""
    if approximate == "tanh":
        beta, kappa = math.sqrt(2 / math.pi), 0.044715
        bend = torch.tanh(beta * (x + kappa * x * x * x))
        slope = beta * (1 + 3 * kappa * x * x)
        return gradient * (0.5 * (1 + bend) + 0.5 * x * (1 - bend * bend) * slope)
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return gradient * (below + x * density)


def sigmoid_backward(target: Profile, gradient: Tensor, output: Tensor) -> Tensor:
    """By the output."""
    return gradient * (output * (1 - output))


def tanh_backward(target: Profile, gradient: Tensor, output: Tensor) -> Tensor:
    """By the output."""
    return gradient * (1 - output * output)


def elu_backward(
    target: Profile, gradient: Tensor, alpha: Number, scale: Number, input_scale: Number, is_result: bool, kept: Tensor
) -> Tensor:
    """ELU, SELU and CELU, by input or output."""
    low = torch.clamp(kept, max=0)
    negative = (low + alpha * scale) * input_scale if is_result else torch.exp(low * input_scale) * (
        input_scale * alpha * scale
    )  # fmt: skip
    positive = (kept > 0).to(kept.dtype)
    return gradient * (positive * scale + (1 - positive) * negative)


def leaky_relu_backward(
    target: Profile, gradient: Tensor, x: Tensor, negative_slope: Number, self_is_result: bool
) -> Tensor:
    """1 above 0, the slope elsewhere."""
    return gradient * ((x > 0).to(x.dtype) * (1 - negative_slope) + negative_slope)


def prelu_backward(target: Profile, gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """To the input and, of its shape, to the broadcast slope."""
    positive = (x > 0).to(x.dtype)
    return gradient * (positive + (1 - positive) * weight), gradient * torch.clamp(x, max=0)


def softplus_backward(target: Profile, gradient: Tensor, x: Tensor, beta: Number, threshold: Number) -> Tensor:
    """Slope ``sigmoid(beta x)``, exactly 1 above the threshold."""
    above = (x * beta > threshold).to(x.dtype)
    return gradient * (above + (1 - above) * torch.sigmoid(x * beta))


def mish_backward(target: Profile, gradient: Tensor, x: Tensor) -> Tensor:
    """``x * tanh(softplus(x))``."""
    bend = torch.tanh(torch.nn.functional.softplus(x))
    return gradient * (bend + x * torch.sigmoid(x) * (1 - bend * bend))


def log_sigmoid_forward(target: Profile, x: Tensor) -> tuple[Tensor, Tensor]:
    """``min(x, 0) - log(1 + exp(-|x|))`` and an empty buffer."""
    return torch.clamp(x, max=0) - torch.log(1 + torch.exp(-x.abs())), x.new_empty(0)


def log_sigmoid_backward(target: Profile, gradient: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    """Slope ``sigmoid(-x)``."""
    return gradient * torch.sigmoid(-x)


def glu_backward(target: Profile, gradient: Tensor, x: Tensor, dim: int) -> Tensor:
    """``a * sigmoid(b)`` of the two halves."""
    half = x.shape[dim] // 2
    left, gate = x.narrow(dim, 0, half), torch.sigmoid(x.narrow(dim, half, half))
    passed = gradient * gate
    return torch.cat([passed, passed * left * (1 - gate)], dim)


def softmax_backward(target: Profile, gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """By the output."""
    weighted = gradient * output
    return weighted - output * weighted.sum(dim, keepdim=True)


def log_softmax_backward(target: Profile, gradient: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """By the output."""
    return gradient - torch.exp(output) * gradient.sum(dim, keepdim=True)


def _rule(op: object, function: object, description: str) -> Rule:
    return Rule(op, function, "primitives", description)  # type: ignore[arg-type]


REGISTRY = Registry(
    "activation",
    [
        _rule(aten.threshold_backward.default, threshold_backward, "ReLU"),
        _rule(aten.hardtanh_backward.default, hardtanh_backward, "ReLU6, hardtanh"),
        _rule(aten.hardswish_backward.default, hardswish_backward, "hardswish"),
        _rule(aten.hardsigmoid_backward.default, hardsigmoid_backward, "hardsigmoid"),
        _rule(aten.silu_backward.default, silu_backward, "SiLU"),
        _rule(aten.gelu_backward.default, gelu_backward, "GELU, exact and by tanh"),
        _rule(aten.sigmoid_backward.default, sigmoid_backward, "sigmoid"),
        _rule(aten.tanh_backward.default, tanh_backward, "tanh"),
        _rule(aten.elu_backward.default, elu_backward, "ELU, SELU, CELU"),
        _rule(aten.leaky_relu_backward.default, leaky_relu_backward, "leaky ReLU"),
        _rule(aten._prelu_kernel_backward.default, prelu_backward, "PReLU"),
        _rule(aten.softplus_backward.default, softplus_backward, "softplus"),
        _rule(aten.mish_backward.default, mish_backward, "Mish"),
        _rule(aten.log_sigmoid_forward.default, log_sigmoid_forward, "log-sigmoid, forward"),
        _rule(aten.log_sigmoid_backward.default, log_sigmoid_backward, "log-sigmoid"),
        _rule(aten.glu_backward.default, glu_backward, "GLU"),
        _rule(aten._softmax_backward_data.default, softmax_backward, "softmax"),
        _rule(aten._log_softmax_backward_data.default, log_softmax_backward, "log-softmax"),
    ],
)
