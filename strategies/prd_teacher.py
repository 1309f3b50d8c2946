"""The model before this experience, and the relation of its old prototypes to what it sees (arXiv 2303.14771).

The teacher is a copy of what can move, run through the student's own modules; it lives while an experience is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn
from torch.func import functional_call

from contlearn.errors import ContlearnError
from contlearn.strategies.distillation import SeenClasses
from contlearn.strategies.prd_losses import (
    Relation,
    check_relation,
    masked_relation_distillation,
    prototype_scores,
    relation_distillation,
)
from contlearn.strategies.step import Tensors
from contlearn.strategies.step_part import Masks, PlainStep

TeacherMode = Literal["eval", "train"]
PROTOTYPES = "head.weight"
TASK = "task"


class RelationTeacher(PlainStep, SupervisedPlugin):  # type: ignore[type-arg]
    """Keeps the last model while the next experience is trained, and gives L_d.

    The teacher is the model as it stands when an experience begins, so that nothing of it outlives the experience.
    Classes of earlier experiences that return in the current one are not distilled.

    Args:
        relation: over ``samples`` or ``classes``, see ``relation_distillation``.
        temperature: T of its softmax.
        mode: of the teacher's BatchNorm and dropout; ``train`` is what the released code does, where the line that
            switches the teacher to evaluation is commented out.

    Attributes:
        tensors: trainable parameters and all buffers of the backbone, and the prototypes, by name in the model;
            empty without a teacher.
        tasks: the classes each experience brought that had not been met before.
        classes: which were met when.

    Raises:
        ContlearnError: a value out of range.
    """

    memory_names = {"tensors": "teacher"}
    checkpoint_exclude = ("_bound", "_task")

    def __init__(
        self, *, relation: Relation = "samples", temperature: float = 1.0, mode: TeacherMode = "eval"
    ) -> None:
        super().__init__()
        check_relation(relation)
        if not temperature > 0:
            raise ContlearnError(f"distil_temperature: expected more than 0, got {temperature}")
        if mode not in ("eval", "train"):
            raise ContlearnError(f"teacher_mode: expected eval or train, got {mode!r}")
        self.relation: Relation = relation
        self.temperature = temperature
        self.mode = mode
        self.tensors: Tensors = {}
        self.tasks: list[list[int]] = []
        self.classes = SeenClasses()
        self._bound: tuple[Tensors, Masks] | None = None
        self._task: Tensor | None = None

    # ------------------------------------------------------------------ experiences

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Note the classes, and take the teacher where there is something to keep."""
        self.classes.start(strategy.experience)
        self.tensors = taken(strategy.model) if self.classes.old else {}
        self._task = None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Let the teacher go: the model itself is the next one."""
        self.tensors = {}
        fresh = [label for label in self.classes.new if label not in self.classes.earlier]
        if fresh:
            self.tasks.append(fresh)
        self.classes.finish()

    # ------------------------------------------------------------------ loss

    def loss(self, model: Any, x: Tensor, features: Tensor) -> Tensor:
        """L_d summed over old tasks; 0 where there are none.

        Args:
            model: the student.
            x: the batch ``(rows, channels, height, width)``.
            features: the student's ``(rows, d)`` of it.
        """
        if self._bound is not None:
            tensors, masks = self._bound
            now, before = self._scores(model, x, features, tensors)
            task = tensors[TASK]
            return masked_relation_distillation(now, before, task, masks.old, self.relation, self.temperature)
        total = features.new_zeros(())
        if not self.tensors:
            return total
        now, before = self._scores(model, x, features, self.tensors)
        for classes in self.tasks:
            kept = [label for label in classes if label not in self.classes.new]
            if kept:
                columns = torch.tensor(kept, device=now.device)
                total = total + relation_distillation(
                    now[:, columns], before[:, columns], self.relation, self.temperature
                )
        return total

    def _scores(self, model: Any, x: Tensor, features: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Scores ``(rows, classes)`` of the student and of the teacher, in single precision."""
        now = prototype_scores(features.float(), model.head.weight)
        with torch.no_grad():
            seen = teacher_features(model.backbone, x, tensors, training=self.mode == "train")
            before = prototype_scores(seen.float(), tensors[PROTOTYPES])
        return now, before

    # ------------------------------------------------------------------ export

    def step_ready(self, strategy: Any) -> None:
        """There is a teacher with as many prototypes as the model has."""
        if not self.tensors:
            self.tensors = taken(strategy.model)
        held = self.tensors[PROTOTYPES]
        self.tensors[PROTOTYPES] = torch.cat([held, strategy.model.head.weight.detach()[len(held) :]])

    def step_tensors(self, strategy: Any) -> Tensors:
        """The teacher, and the number of each class's task; classes of no finished experience have the next one."""
        task = torch.full((strategy.model.head.out_features,), float(len(self.tasks)))
        for number, classes in enumerate(self.tasks):
            task[classes] = float(number)
        return {**{name: held for name, held in self.tensors.items() if held.is_floating_point()}, TASK: task}

    def step_copies(self, strategy: Any) -> dict[str, str]:
        """The teacher is the model after each experience."""
        return {name: name for name, held in self.tensors.items() if held.is_floating_point()}

    @contextlib.contextmanager
    def step_bound(self, strategy: Any, tensors: Tensors, masks: Masks) -> Iterator[None]:
        """While open, teacher and old classes are these."""
        held = {**self.tensors, **tensors}
        if self.mode == "train":  # writes to statistics, which nothing reads in that mode: to copies of them
            held = {name: tensor.clone() for name, tensor in held.items()}
        following = torch.where(masks.old > 0, tensors[TASK], -1.0).max() + 1
        self._task = torch.where(masks.new > 0, following, tensors[TASK])
        self._bound = (held, masks)
        try:
            yield
        finally:
            self._bound = None

    def step_after(self, weights: Tensors, statistics: Tensors, tensors: Tensors, lr: Tensor) -> Tensors:
        """Classes of the current experience are of one task, the next after the old ones'."""
        task, self._task = self._task, None
        return {} if task is None else {TASK: task}


def taken(model: Any) -> Tensors:
    """Copies of what of the features and the prototypes can move, by name in ``model``."""
    held = {f"backbone.{name}": p for name, p in model.backbone.named_parameters() if p.requires_grad}
    held.update({f"backbone.{name}": b for name, b in model.backbone.named_buffers()})
    held[PROTOTYPES] = model.head.weight
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def teacher_features(backbone: nn.Module, x: Tensor, tensors: Tensors, *, training: bool) -> Tensor:
    """Features ``(rows, d)`` of the teacher: the student's modules with the teacher's tensors.

    Args:
        backbone: of the student; its modes are put back.
        x: ``(rows, channels, height, width)``.
        tensors: by ``backbone.NAME``.
        training: whether in training mode; BatchNorm then moves the teacher's statistics.
    """
    held = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    modes = {module: module.training for module in backbone.modules()}
    backbone.train(training)
    try:
        features: Tensor = functional_call(backbone, held, (x,))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return features
