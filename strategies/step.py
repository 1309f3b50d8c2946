"""The training or adaptation step of a strategy as a pure function: what is exported to a device.

A strategy declares its :class:`Step` (``declare_step``); everything about graphs, runtimes and artifacts is in
``contlearn.edge``, which knows no strategy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from contlearn.errors import ContlearnError

Tensors = dict[str, Tensor]
_exporting: ContextVar[bool] = ContextVar("exporting", default=False)


class NotExportable(ContlearnError):
    """A strategy, or a part of one, whose step cannot run on a device; the message says why in one line."""


def exporting() -> bool:
    """Whether a step is being traced: no Python decision may then depend on a tensor's value."""
    return _exporting.get()


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Steps called inside are traced."""
    token = _exporting.set(True)
    try:
        yield
    finally:
        _exporting.reset(token)


@dataclass(frozen=True)
class Input:
    """One input of a step beside its state.

    Attributes:
        shape: fixed.
        dtype: of the tensor.
        meaning: what the runner puts there: ``frames``, ``labels``, ``memory_frames``, ``memory_labels``,
            ``learning_rate``, ``class_mask``, ``old_class_mask``, ``uniform`` (new numbers in [0, 1) for every step).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    meaning: str


@dataclass(frozen=True)
class Memory:
    """A rehearsal memory that the runner keeps: samples at most, how they are chosen, and how many join a step."""

    capacity: int
    policy: str
    batch: int


@dataclass
class Step:
    """One step.

    Attributes:
        method: the strategy's name.
        model: what ``compute`` runs; only names and shapes are read from it.
        inputs: by name, in order.
        state: starting values of everything that moves, or that the runner moves at the end of an experience.
        roles: ``weight``, ``optimizer``, ``statistic`` or ``method`` for each state.
        compute: ``(state, inputs) -> (outputs, new state)``; outputs hold ``loss`` (1,) and ``logits``
            (batch, classes). States that it does not return stay.
        predict: ``(state, inputs) -> logits`` (batch, classes) for ``x`` and, where the step has one, ``class_mask``.
        rates: default values of inputs the caller may set, by name.
        classes: number of outputs.
        open_classes: labels trained on so far; the class mask is 1 there.
        memory: kept by the runner.
        copies: at the end of an experience the runner copies state ``source`` to ``target``: ``{target: source}``.
        hyperparameters: for the manifest.
    """

    method: str
    model: nn.Module
    inputs: dict[str, Input]
    state: Tensors
    roles: dict[str, str]
    compute: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]
    predict: Callable[[Tensors, Tensors], Tensor]
    classes: int
    rates: dict[str, float] = field(default_factory=dict)
    open_classes: tuple[int, ...] = ()
    memory: Memory | None = None
    copies: dict[str, str] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def examples(self, seed: int = 0) -> Tensors:
        """Made-up inputs of the right shapes, by name."""
        generator = torch.Generator().manual_seed(seed)
        made: Tensors = {}
        for name, one in self.inputs.items():
            if one.meaning in ("labels", "memory_labels"):
                allowed = torch.tensor(self.open_classes or range(self.classes))
                made[name] = allowed[torch.randint(len(allowed), one.shape, generator=generator)]
            elif one.meaning == "class_mask":
                made[name] = torch.zeros(one.shape)
                made[name][list(self.open_classes or range(self.classes))] = 1.0
            elif one.meaning == "old_class_mask":
                made[name] = torch.zeros(one.shape)
                made[name][list(self.open_classes)[: len(self.open_classes) // 2]] = 1.0
            elif name in self.rates:
                made[name] = torch.full(one.shape, self.rates[name], dtype=one.dtype)
            else:
                made[name] = torch.rand(one.shape, generator=generator, dtype=one.dtype)
        return made


class _Call(nn.Module):
    """Modules under one roof, so that the tensors of all can be swapped for one call of ``function``."""

    def __init__(self, parts: Mapping[str, nn.Module], function: Callable[[], Any]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = function

    def forward(self) -> Any:
        return self.function()


def swapped(parts: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], function: Callable[[], Any]) -> Any:
    """``function()`` while modules hold ``tensors`` instead of their own.

    Args:
        parts: modules by name.
        tensors: by ``PART.NAME`` of the parameter or buffer.
        function: called without arguments.
    """
    return functional_call(_Call(parts, function), dict(tensors), ())


def buffers_of(model: nn.Module) -> Tensors:
    """Buffers by name; a call on copies of them leaves the model's own alone."""
    return dict(model.named_buffers())


def moving_buffers(model: nn.Module, function: Callable[[Tensors], Any]) -> list[str]:
    """Names of the buffers that ``function``, given copies of all, writes to; counters that nothing reads left out.

    BatchNorm counts its batches, which only a momentum of ``None`` (or AdaB2N's kappa 0) looks at.
    """
    copies = {name: held.clone() for name, held in model.named_buffers()}
    before = {name: (held._version, held.clone()) for name, held in copies.items()}
    function(copies)

    def moved(name: str) -> bool:
        # BatchNorm writes to its statistics without telling their version counters.
        version, value = before[name]
        return copies[name]._version != version or not torch.equal(copies[name], value)

    return [name for name in copies if name.rpartition(".")[2] != "num_batches_tracked" and moved(name)]


def where_any(gate: Tensor, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Tensors:
    """``new`` where the boolean ``gate`` () holds, else ``old``: an update that may not take place."""
    return {name: torch.where(gate, value, old[name]) for name, value in new.items()}
