"""The teacher of distillation: one frozen copy of the model per strategy, and its one forward pass per iteration.

Shared by every plug-in that distils (arXiv 2203.17269, section 4): memory and checkpoints hold the copy once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import avalanche_forward
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import GrowingHead
from contlearn.strategies.step_part import PlainStep

_CLASSIFIERS = ("head", "classifier", "fc")


def classifier_name(model: nn.Module) -> str:
    """Name of the submodule that turns features into logits; everything outside it is the encoder.

    ``head`` where the model has one (every model of contlearn), else ``classifier`` or ``fc``, else its last linear
    layer.

    Raises:
        ContlearnError: a model with none of these.
    """
    for name in _CLASSIFIERS:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    linear = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not linear:
        raise ContlearnError(
            f"model {type(model).__name__}: has no classifier to tell from the encoder; expected a submodule named "
            f"{', '.join(_CLASSIFIERS)}, or a linear layer"
        )
    last: str = linear[-1]
    return last


@dataclass
class Pass:
    """One forward pass: its input ``(batch, ...)``, task labels, features ``(batch, d)`` and logits ``(batch, C)``."""

    x: Tensor | None = None
    task_labels: Any = None
    features: Tensor | None = None
    logits: Tensor | None = None


class Watch:
    """Notes what the next forward pass of ``model`` reads, and the features its classifier reads.

    Of several passes the first counts: ER-ACE sends its exemplars through the network in a second one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen = Pass()
        self._handles = [
            model.register_forward_pre_hook(self._input),
            model.get_submodule(classifier_name(model)).register_forward_pre_hook(self._features),
        ]

    def _input(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.seen.x is None:
            self.seen.x, self.seen.task_labels = arguments[0], arguments[1] if len(arguments) > 1 else None

    def _features(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self.seen.features is None:
            self.seen.features = arguments[0]

    def close(self) -> Pass:
        """Stop and give what was seen."""
        for handle in self._handles:
            handle.remove()
        return self.seen


class Teacher:
    """A frozen copy of a model in evaluation mode.

    Attributes:
        model: the copy; ``None`` until one is taken.
        student: what the student's forward pass of this iteration read; empty outside an iteration.
    """

    # What lives for one iteration only.
    checkpoint_exclude = ("student", "_watch", "_passes")

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.student = Pass()
        self._watch: Watch | None = None
        self._passes: list[Pass] = []

    def take(self, model: nn.Module) -> None:
        """Copy ``model`` as it is now."""
        self.model = None  # first let go: two models in memory, never three
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def watch(self, model: nn.Module) -> None:
        """Begin to follow the student's forward pass."""
        if self._watch is not None:
            self._watch.close()  # a pass that an exception ended
        self._watch = Watch(model)

    def unwatch(self) -> None:
        """The student's forward pass is over."""
        if self._watch is not None:
            self.student, self._watch = self._watch.close(), None

    @torch.no_grad()
    def see(self, x: Tensor, task_labels: Any) -> Pass:
        """The teacher's features and logits of ``x``; asked again for the same tensor, it does not compute again.

        Raises:
            ContlearnError: no copy was taken yet.
        """
        for known in self._passes:
            if known.x is x:
                return known
        if self.model is None:
            raise ContlearnError("teacher: there is none yet; it is taken before or after training on an experience")
        watch = Watch(self.model)
        try:
            logits = avalanche_forward(self.model, x, task_labels)
        finally:
            found = watch.close()
        found.x, found.logits = x, logits
        self._passes.append(found)
        return found

    def forget(self) -> None:
        """Let go of what belongs to this iteration."""
        self.student, self._passes = Pass(), []


class TeacherPlugin(PlainStep, SupervisedPlugin):
    """Base of plug-ins that distil: all of a strategy's share one :class:`Teacher`, and the first keeps it.

    Attributes:
        teacher: the copy of the model after the last experience.
    """

    memory_names = {"teacher": "teacher"}
    from_start = False
    """Whether the weights before the first experience are a teacher, too."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Teacher()

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Share one teacher: that of the first plug-in, or the first that has taken a copy already."""
        teachers = [plugin.teacher for plugin in strategy.plugins if isinstance(plugin, TeacherPlugin)]
        self.teacher = next((teacher for teacher in teachers if teacher.model is not None), teachers[0])

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the initial weights where the method wants them."""
        if self.from_start and self.teacher.model is None:
            self.teacher.take(strategy.model)

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Follow the student: its features are read on their way, not computed a second time."""
        if self._leads(strategy):
            self.teacher.watch(strategy.model)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Stop following."""
        if self._leads(strategy):
            self.teacher.unwatch()

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Features and logits of the batch are no longer needed."""
        self.teacher.forget()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take the model as it is now."""
        if self._leads(strategy):
            self.teacher.take(strategy.model)

    def step_ready(self, strategy: Any) -> None:
        """There is a teacher with as many outputs as the model."""
        if self.teacher.model is None:
            self.teacher.take(strategy.model)
        head = getattr(self.teacher.model, "head", None)
        if isinstance(head, GrowingHead):
            head.grow(strategy.model.head.out_features)
            head.requires_grad_(False)

    def step_modules(self, strategy: Any) -> dict[str, nn.Module]:
        """The teacher, once."""
        model = self.teacher.model
        return {"teacher": model} if model is not None and self._leads(strategy) else {}

    def step_copies(self, strategy: Any) -> dict[str, str]:
        """The teacher is the model after each experience."""
        modules = self.step_modules(strategy).items()
        return {f"{name}.{key}": key for name, model in modules for key in model.state_dict()}

    def step_forget(self) -> None:
        """Let go of the batch."""
        self.teacher.forget()

    def _leads(self, strategy: Any) -> bool:
        return next(plugin for plugin in strategy.plugins if isinstance(plugin, TeacherPlugin)) is self
