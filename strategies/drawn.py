"""Dropout by uniform numbers that come from outside: what makes a step that drops units a pure function.

Element-wise and channel-wise dropout, and what fills a tensor with Bernoulli draws (stochastic depth), are concerned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

NAME = "uniform_"
"""Inputs with the numbers, in the order they are drawn: ``uniform_0``, ``uniform_1``, ..."""


class Drawn(TorchFunctionMode):
    """Inside, a unit stays where its number is at least p, as ``torch.nn.functional.dropout`` would draw it.

    Args:
        given: uniform numbers in [0, 1) by name; where one is missing, nothing is dropped.

    Attributes:
        shapes: of the numbers asked for so far, in order.
    """

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given = given
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _HANDLERS.get(func)
        return func(*args, **(kwargs or {})) if handler is None else handler(self, *args, **(kwargs or {}))

    def numbers(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The next ones."""
        found = self.given.get(f"{NAME}{len(self.shapes)}")
        self.shapes.append(shape)
        return torch.ones(shape, dtype=like.dtype, device=like.device) if found is None else found

    def kept(self, x: Tensor, p: float, training: bool, inplace: bool, shape: tuple[int, ...]) -> Tensor:
        """``x`` with units dropped and the others scaled; one number stands for all that ``shape`` broadcasts to."""
        if not training or not p:
            return x
        if p == 1:
            mask = torch.zeros_like(x)
        else:
            mask = (self.numbers(shape, x) >= p).to(x.dtype) / (1 - p)
        return x.mul_(mask) if inplace else x * mask


def _units(mode: Drawn, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return mode.kept(input, p, training, inplace, tuple(input.shape))


def _channels(mode: Drawn, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return mode.kept(input, p, training, inplace, (*input.shape[:2], *[1] * (input.ndim - 2)))


def _bernoulli_(mode: Drawn, input: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    return input.copy_((mode.numbers(tuple(input.shape), input) >= 1 - p).to(input.dtype))


def _plain_units(mode: Drawn, input: Tensor, p: float, train: bool) -> Tensor:
    return _units(mode, input, p, train)


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.dropout: _units, F.dropout1d: _channels, F.dropout2d: _channels, F.dropout3d: _channels,
    torch.dropout: _plain_units, torch.Tensor.bernoulli_: _bernoulli_,
}  # fmt: skip
