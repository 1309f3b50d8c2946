"""Layers that put a normalisation in front of a non-linearity, and which layers count as either."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RMSNormalisation(nn.Module):
    """Root-mean-square normalisation with scale and offset (arXiv 1910.07467, equation 4: the offset stays).

    Args:
        size: length of ``weight`` and ``bias``.
        channels_first: normalise ``(batch, size, ...)`` over all but the batch; else ``(..., size)`` over the last.
        eps: added to the mean square.
    """

    def __init__(self, size: int, *, channels_first: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.channels_first = channels_first
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        dims = tuple(range(1, x.ndim)) if self.channels_first else (-1,)
        shape = (-1, *[1] * (x.ndim - 2)) if self.channels_first else (-1,)
        x = x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + self.eps)
        return x * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, channels_first={self.channels_first}, eps={self.eps}"


class NormalisedActivation(nn.Module):
    """``act(norm(x))`` in the place of ``act(x)``."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        y: Tensor = self.act(self.norm(x))
        return y


class ReusedNormalisedActivation(nn.Module):
    """The same for one activation module that a forward calls several times: each call has a norm of its own.

    ``calls`` counts within one forward; it starts anew with each (``restart``) and after the last call.
    """

    def __init__(self, norms: Sequence[nn.Module], act: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.act = act
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        norm = self.norms[self.calls]
        self.calls = (self.calls + 1) % len(self.norms)
        y: Tensor = self.act(norm(x))
        return y


def restart(module: nn.Module, inputs: Any) -> None:
    """Forward pre-hook: a forward that was cut short must not shift the calls of the next."""
    for child in module.modules():
        if isinstance(child, ReusedNormalisedActivation):
            child.calls = 0


def norm_pairs(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of scale and offset of every normalisation, those that several share once; the output layer has none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = []
    for module in model.modules():
        if is_norm(module):
            pair = tuple(
                names[id(held)] for held in (getattr(module, "weight", None), getattr(module, "bias", None))
                if isinstance(held, nn.Parameter)
            )  # fmt: skip
            if pair and pair not in pairs:
                pairs.append(pair)
    return pairs


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer of torch, timm or ours."""
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm, RMSNormalisation)
    return isinstance(module, kinds) or type(module).__module__ in ("timm.layers.norm", "timm.layers.norm_act")


_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Threshold, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
    nn.SiLU, nn.Hardswish, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh,
    nn.Tanhshrink, nn.Hardshrink, nn.Softshrink,
)  # fmt: skip


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an element-wise non-linearity of torch or timm; softmax is not element-wise."""
    return isinstance(module, _ACTIVATIONS) or type(module).__module__ in (
        "timm.layers.activations", "timm.layers.activations_me",
    )  # fmt: skip
