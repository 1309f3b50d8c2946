"""What a plug-in says of its share of an exported step, and the classes a step knows."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from contlearn.strategies.step import Tensors


class Masks:
    """Which classes a step knows, as tensors ``(classes,)`` of 0 and 1, so that one graph serves a growing stream.

    Attributes:
        seen: met so far, those of the current experience included.
        old: met in earlier experiences.
    """

    def __init__(self, seen: Tensor, old: Tensor) -> None:
        self.seen, self.old = seen, old

    @property
    def new(self) -> Tensor:
        """Of the current experience."""
        return self.seen - self.old


class PlainStep:
    """A plug-in whose share of a step is told by its hooks up to ``before_backward``; others override what they need.

    Attributes:
        not_exportable: why it has no step; empty if it has.
    """

    not_exportable = ""

    def step_ready(self, strategy: Any) -> None:
        """The strategy stands as it will be exported."""

    def step_tensors(self, strategy: Any) -> Tensors:
        """Tensors that move, or that the runner moves, by name; the methods below get them back."""
        return {}

    def step_modules(self, strategy: Any) -> dict[str, nn.Module]:
        """Modules beside the model whose tensors are states of the step, too, by name."""
        return {}

    def step_buffers(self, strategy: Any) -> list[str]:
        """Buffers of the model that :meth:`step_after` moves."""
        return []

    def step_copies(self, strategy: Any) -> dict[str, str]:
        """What the runner copies at the end of an experience: own tensor's name to the model's."""
        return {}

    def step_bound(self, strategy: Any, tensors: Tensors, masks: Masks) -> contextlib.AbstractContextManager[Any]:
        """While open, the plug-in works with these tensors and masks instead of its own values."""
        return contextlib.nullcontext()

    def step_rate(self, lr: Tensor, tensors: Tensors) -> Tensor:
        """The learning rate (1,) of this update."""
        return lr

    def step_after(self, weights: Tensors, statistics: Tensors, tensors: Tensors, lr: Tensor) -> Tensors:
        """After the update: change ``weights`` and ``statistics`` in place, return the own tensors that moved."""
        return {}

    def step_forget(self) -> None:
        """The step is over."""
