"""The same computation at other precisions: in float64, and in float32 with other roundings.

Both work below autograd, so that whatever a step does, its backward pass included, is concerned. And by a network whose
weights are a little off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from contlearn.strategies.step import Tensors


class _DoubleFunctions(TorchFunctionMode):
    """Every function takes float64 where it was given float32: frozen weights and constants stand in no state."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide_args, wide_kwargs = tree_map(_double, (args, kwargs or {}))
        return func(*wide_args, **wide_kwargs)


class _DoubleOperators(TorchDispatchMode):
    """The same for operators, which backward passes call without functions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide_args, wide_kwargs = tree_map(_double, (args, kwargs or {}))
        return func(*wide_args, **wide_kwargs)


def _double(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def doubled(tensors: Tensors) -> Tensors:
    return {name: _double(value) for name, value in tensors.items()}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """What is computed inside is computed in float64; what is made inside is float64."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _DoubleOperators(), _DoubleFunctions():
            yield
    finally:
        torch.set_default_dtype(kept)


class OtherRounding(TorchDispatchMode):
    """Every operator's result is off by up to some units of float32's last place, as by another order of its sums.

    Args:
        seed: of the errors.
        units: at most so many; one is that of an elementary operator, a sum of hundreds of products has several.
    """

    def __init__(self, seed: int, units: float = 1.0) -> None:
        super().__init__()
        self.units = units
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return found if func.is_view or func._schema.is_mutable else tree_map(self._off, found)

    def _off(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dtype == torch.float32):
            return value
        share = torch.rand(value.shape, generator=self.generator) * 2 - 1
        return value * (1 + share * self.units * torch.finfo(torch.float32).eps)


@contextlib.contextmanager
def weights_off(model: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, every parameter that ``model`` holds has noise of ``share`` of its root mean square: frozen ones, too."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.numel():
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(share * parameter.square().mean().sqrt() * noise)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
