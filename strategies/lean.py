"""Frozen layers keep for backward only what the derivative needs; what is computed stays the same, bit for bit.

PyTorch saves the input of a convolution also where its weight is frozen (measured in arXiv 2404.12406), which hides
what training biases or norms alone would save (arXiv 2007.11622, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from contlearn.errors import ContlearnError
from contlearn.strategies.frozen_operations import FrozenOperations
from contlearn.strategies.packed import FrozenConv, FrozenNorm
from contlearn.strategies.step import exporting

FrozenNorms = Literal["batch", "running"]


class LeanPlugin(SupervisedPlugin):
    """Frozen layers keep for backward only what the derivative needs, in every forward pass that has one.

    A convolution with a frozen weight keeps no input (its bias may train: that derivative is a sum of the incoming
    gradient), ReLU, ReLU6 and hardtanh keep bits, and a BatchNorm in evaluation mode with a frozen scale one factor
    per channel. Other functions, layers whose weight trains, and passes without gradients are left to PyTorch. The bits
    of a ReLU between layers that train come on top, since the layer behind it keeps its output anyway: this plug-in is
    for networks of which little trains (``trainable: [biases]``, ``[norms]``).

    Args:
        frozen_norms: statistics of BatchNorm layers with a frozen scale while training: those of the ``batch``, as in
            any layer in training mode (the derivative then needs the layer's input), or the ``running`` ones, which
            then stay as they are. ``running`` computes something else than the same network without the plug-in.
        packed: keep bits of ReLUs; else PyTorch's own, which keep their output.

    Raises:
        ContlearnError: unknown ``frozen_norms``.
    """

    def __init__(self, *, frozen_norms: FrozenNorms = "batch", packed: bool = True) -> None:
        super().__init__()
        if frozen_norms not in ("batch", "running"):
            raise ContlearnError(f"frozen_norms: expected batch or running, got {frozen_norms!r}")
        self.frozen_norms = frozen_norms
        self.packed = packed

    def prepare_model(self, model: nn.Module) -> None:
        """Have every forward pass of ``model`` run lean from now on."""
        run_lean(model, frozen_norms=self.frozen_norms, packed=self.packed)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """See to it that the model is prepared: it may be another than before, or the host one of Avalanche's own."""
        self.prepare_model(strategy.model)


def run_lean(model: nn.Module, *, frozen_norms: FrozenNorms = "batch", packed: bool = True) -> None:
    """Put hooks on ``model`` that run each of its forward passes as :class:`LeanPlugin` says; once is enough."""
    if not any(isinstance(getattr(hook, "__self__", None), _Hooks) for hook in model._forward_pre_hooks.values()):
        hooks = _Hooks(frozen_norms, packed)
        model.register_forward_pre_hook(hooks.open)
        model.register_forward_hook(hooks.close, always_call=True)


class _Hooks:
    """Opens the function mode in front of a forward pass and closes it behind, also when the pass fails."""

    def __init__(self, frozen_norms: FrozenNorms, packed: bool) -> None:
        self.frozen_norms = frozen_norms
        self.packed = packed
        self.opened: list[LeanOperations] = []

    def open(self, model: nn.Module, inputs: Any) -> None:
        if self.frozen_norms == "running" and model.training:
            for module in model.modules():
                if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
                    module.training = False  # the loop sets it anew with every model.train()
        self.opened.append(LeanOperations(packed=self.packed))
        self.opened[-1].__enter__()

    def close(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if self.opened:
            self.opened.pop().__exit__(None, None, None)


class LeanOperations(FrozenOperations):
    """:class:`FrozenOperations`, also for a frozen weight or scale with a bias that trains."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over the functions listed below, and those of the base."""
        kwargs = kwargs or {}
        # Per-sample gradients (torch.func) cannot pass autograd functions like ours; an exported graph is planned by
        # itself.
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or exporting():
            return func(*args, **kwargs)
        own = _OWN.get(func)
        made = None if own is None else own(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs) if made is None else made


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:  # fmt: skip
    if weight.requires_grad or bias is None or not bias.requires_grad or isinstance(padding, str) or input.ndim != 4:
        return None
    how = tuple((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
    return _ShiftedConv.apply(input, weight, None, bias, (*how, groups))  # type: ignore[no-any-return]


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    fixed = not training and running_mean is not None and (weight is None or not weight.requires_grad)
    if not fixed or bias is None or not bias.requires_grad:
        return None
    return _ShiftedNorm.apply(input, running_mean, running_var, weight, bias, eps)  # type: ignore[no-any-return]


_OWN: dict[Any, Callable[..., Tensor | None]] = {torch.conv2d: _conv2d, F.batch_norm: _batch_norm}


def _summed(gradient: Tensor) -> Tensor:
    """Gradient of a bias ``(channels,)`` from that of ``(batch, channels, ...)``."""
    return gradient.sum([0, *range(2, gradient.ndim)])


class _ShiftedConv(FrozenConv):
    """A convolution of which the bias alone trains."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dx = FrozenConv.backward(ctx, gradient)[0] if ctx.needs_input_grad[0] else None
        return dx, None, None, _summed(gradient), None


class _ShiftedNorm(FrozenNorm):
    """BatchNorm by constant statistics of which the offset alone trains."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        dx = FrozenNorm.backward(ctx, gradient)[0] if ctx.needs_input_grad[0] else None
        return dx, None, None, None, _summed(gradient), None
