"""Run any frozen network so that a gradient can pass it at the least memory: what its layers call is taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from contlearn.strategies.packed import FrozenConv, FrozenNorm, packed_clamp, packed_relu
from contlearn.strategies.step import exporting


class FrozenOperations(TorchFunctionMode):
    """Inside the block, frozen layers keep for backward what the derivative with respect to their input needs.

    It looks at the functions that layers call, so that it holds for any network and for functional ReLUs: ReLU, ReLU6
    and hardtanh keep bits, convolutions nothing beside their weight, and BatchNorm in evaluation mode one factor per
    channel. What trains (``weight.requires_grad``) is left to PyTorch, and so are all other functions.

    Args:
        batch_statistics: normalise with the statistics of the batch, without moving the running ones, wherever a
            BatchNorm in evaluation mode would use the running ones; a batch of one value per channel keeps to those.
            The gradient passes the statistics too, which takes the layer's input.
        packed: keep bits of ReLUs; else PyTorch's own, which keep their output.
    """

    def __init__(self, *, batch_statistics: bool = False, packed: bool = True) -> None:
        super().__init__()
        self.batch_statistics = batch_statistics
        self.packed = packed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over the functions listed below."""
        kwargs = kwargs or {}
        # Bits and written-out derivatives are for autograd in PyTorch; a graph is planned by itself.
        own = _OWN.get(func) if func is F.batch_norm or not exporting() else None
        return func(*args, **kwargs) if own is None else own(self, func, *args, **kwargs)


def _relu(mode: FrozenOperations, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    if not mode.packed or not _differentiated(input):
        return func(input, inplace)  # type: ignore[no-any-return]
    return packed_relu(input, inplace)


def _torch_relu(mode: FrozenOperations, func: Any, input: Tensor) -> Tensor:
    if not mode.packed or not _differentiated(input):
        return func(input)  # type: ignore[no-any-return]
    return packed_relu(input, func in (torch.relu_, Tensor.relu_))


def _hardtanh(
    mode: FrozenOperations, func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    if not mode.packed or not _differentiated(input):
        return func(input, min_val, max_val, inplace)  # type: ignore[no-any-return]
    return packed_clamp(input, min_val, max_val, inplace)


def _relu6(mode: FrozenOperations, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(mode, F.hardtanh, input, 0.0, 6.0, inplace)


def _conv2d(
    mode: FrozenOperations, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains or isinstance(padding, str) or not _differentiated(input):
        return func(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    how = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return FrozenConv.apply(input, weight, None, bias, how)  # type: ignore


def _batch_norm(
    mode: FrozenOperations, func: Any, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    trains = any(held is not None and held.requires_grad for held in (weight, bias))
    if not trains and not training and mode.batch_statistics and several_values(input):
        return func(input, None, None, weight, bias, True, 0.0, eps)  # type: ignore[no-any-return]
    if trains or training or running_mean is None or running_var is None or not _differentiated(input):
        return func(  # type: ignore[no-any-return]
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    return FrozenNorm.apply(input, running_mean, running_var, weight, bias, eps)  # type: ignore


def several_values(x: Tensor) -> bool:
    """Whether each channel of ``(batch, channels, ...)`` has more than one value, so that it has a variance."""
    return x.numel() > x.shape[1]


def _differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


_OWN: dict[Any, Callable[..., Tensor]] = {
    F.relu: _relu, torch.relu: _torch_relu, torch.relu_: _torch_relu,
    Tensor.relu: _torch_relu, Tensor.relu_: _torch_relu,
    F.relu6: _relu6, F.hardtanh: _hardtanh, torch.conv2d: _conv2d, F.batch_norm: _batch_norm,
}  # fmt: skip
