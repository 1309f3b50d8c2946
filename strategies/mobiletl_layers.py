"""MobileTL's layers (arXiv 2212.03246): BatchNorm of which only the offset trains, activations that keep one bit.

y = gamma (x - mu) / sigma + beta where beta alone trains, and g_in = g * 1[a >= 0] for h-swish and ReLU6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from contlearn.errors import ContlearnError
from contlearn.strategies.packed import pack, packed_clamp, unpack

ActivationBackward = Literal["sign", "exact"]

# Each kind's own kernel, so that the forward keeps its bits. The paper has ReLU6 and h-swish. ReLU is ReLU6 without its
# cap, which the approximation leaves out anyway; SiLU (EfficientNet) is an extension of ours: the shape of h-swish.
_FORWARDS: dict[type[nn.Module], Callable[[Tensor, bool], Tensor]] = {
    nn.ReLU: lambda x, inplace: F.relu(x, inplace),
    nn.ReLU6: lambda x, inplace: F.relu6(x, inplace),
    nn.Hardswish: lambda x, inplace: F.hardswish(x, inplace),
    nn.SiLU: lambda x, inplace: F.silu(x, inplace),
}


class _Sign(torch.autograd.Function):
    """Any activation, with g * 1[a >= 0] for a backward."""

    @staticmethod
    def forward(a: Tensor, kind: type[nn.Module], inplace: bool) -> tuple[Tensor, Tensor]:
        mask = a >= 0
        # A traced step holds the comparison itself: how masks are stored is the export's choice, and the integer
        # tricks of packing would be operators that no stock runtime has.
        kept = pack(mask) if get_proxy_mode() is None else mask
        del mask
        return _FORWARDS[kind](a, inplace), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, _, inplace = inputs
        ctx.shape = tuple(a.shape)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        if inplace:
            ctx.mark_dirty(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        (mask,) = ctx.saved_tensors
        if mask.dtype is not torch.bool:
            mask = unpack(mask, ctx.shape)
        return torch.where(mask, gradient, 0.0), None, None


class SignActivation(nn.Module):
    """An activation whose forward is that of ``act``, bit for bit, and whose backward is g * 1[a >= 0].

    For backward it keeps one bit per element of its input.

    Args:
        act: ReLU, ReLU6, Hardswish or SiLU; writes into its input if ``act`` does.
    """

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.kind = type(act)
        self.inplace = bool(getattr(act, "inplace", False))

    def forward(self, a: Tensor) -> Tensor:
        """Same shape in and out."""
        if not (torch.is_grad_enabled() and a.requires_grad):
            return _FORWARDS[self.kind](a, self.inplace)
        out: Tensor = _Sign.apply(a, self.kind, self.inplace)[0]  # type: ignore[no-untyped-call]
        return out

    def extra_repr(self) -> str:
        return f"{self.kind.__name__}, inplace={self.inplace}"


class ExactReLU6(nn.Module):
    """ReLU6 with its derivative 1[0 < a < 6], which takes one bit per element; PyTorch keeps a copy of the input.

    Args:
        inplace: write the result into the input.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, a: Tensor) -> Tensor:
        """Same shape in and out."""
        if not (torch.is_grad_enabled() and a.requires_grad) or get_proxy_mode() is not None:  # traced: as in _Sign
            return F.relu6(a, self.inplace)
        return packed_clamp(a, 0.0, 6.0, self.inplace)

    def extra_repr(self) -> str:
        return f"inplace={self.inplace}"


def with_backward(act: nn.Module, backward: ActivationBackward, *, name: str) -> nn.Module:
    """``act`` with the backward that is asked for, at the least memory.

    What ``exact`` needs: of ReLU6 one bit; of ReLU its output, which the next convolution keeps anyway; of h-swish and
    SiLU their input.

    Args:
        act: the activation; an identity stays.
        backward: ``sign`` or ``exact``.
        name: what error messages call it.

    Raises:
        ContlearnError: ``sign`` for an activation that it is not defined for.
    """
    if isinstance(act, nn.Identity | SignActivation | ExactReLU6):
        return act
    if backward == "exact":
        return ExactReLU6(act.inplace) if type(act) is nn.ReLU6 else act
    if type(act) not in _FORWARDS:
        known = ", ".join(kind.__name__ for kind in _FORWARDS)
        raise ContlearnError(
            f"activation_backward: 'sign' is not defined for {name}, a {type(act).__name__}; expected one of {known}, "
            "or activation_backward 'exact'"
        )
    return SignActivation(act)


class _Shift(torch.autograd.Function):
    """BatchNorm by constant statistics and scale; what backward needs is made from parameters and buffers alone."""

    @staticmethod
    def forward(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, var, weight, _, ctx.eps = inputs
        ctx.save_for_backward(var, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        var, weight = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = gradient * (torch.rsqrt(var + ctx.eps) * weight).view(1, -1, 1, 1)
        if ctx.needs_input_grad[4]:
            dbias = gradient.sum((0, 2, 3), dtype=var.dtype)
        return dx, None, None, None, dbias, None


class ShiftNorm(nn.Module):
    """BatchNorm2d with running statistics and scale frozen: the offset alone trains, and nothing is kept for backward.

    dL/dbias = sum of g over batch and places, dL/dx = g * weight / sqrt(running_var + eps). Parameters and buffers are
    those of ``norm``, under the same names; it computes the same in training and in evaluation mode.

    Args:
        norm: a BatchNorm2d, or timm's BatchNormAct2d, whose activation follows.
        act: the activation that follows; default: that of ``norm``.
        name: what error messages call it.

    Raises:
        ContlearnError: another kind of layer, or one without running statistics, scale and offset.
    """

    def __init__(self, norm: nn.Module, act: nn.Module | None = None, *, name: str = "layer") -> None:
        super().__init__()
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
            raise ContlearnError(
                f"mobiletl: {name} is a {type(norm).__name__}; expected a BatchNorm2d (of methods that replace it, "
                "name mobiletl first)"
            )
        if norm.running_mean is None or norm.weight is None:
            raise ContlearnError(f"mobiletl: {name} lacks running statistics or scale and offset; expected both")
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self.eps = norm.eps
        self.drop: nn.Module = norm._modules.get("drop") or nn.Identity()
        self.act: nn.Module = act or norm._modules.get("act") or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` in and out."""
        held = (self.running_mean, self.running_var, self.weight, self.bias)
        if torch.is_grad_enabled():
            y = _Shift.apply(x, *held, self.eps)  # type: ignore[no-untyped-call]
        else:
            y = F.batch_norm(x, *held, False, 0.0, self.eps)  # type: ignore[arg-type]
        out: Tensor = self.act(self.drop(y))
        return out

    def extra_repr(self) -> str:
        return f"{len(self.running_mean)}, eps={self.eps}"  # type: ignore[arg-type]
