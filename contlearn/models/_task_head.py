"""The head and the model for streams that give the task id at test time (multi-head, task-incremental)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models.dynamic_modules import MultiTaskModule
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._classifier import Classifier
from contlearn.models._growing_head import GrowingHead

MASKED = -1e4
"""Logit of a class that is not in the sample's task.

Finite, so that a loss that looks at such a class (a cross-entropy with a label of another task, the squared distance
of two outputs under one mask) gives a number and not NaN. Within fp16 (largest 65504) and bf16, so that it survives
mixed precision. Far enough down that its softmax probability is exactly 0 in fp32 up to a temperature of about 90
(distillation uses 2 to 4), so it takes no part in a softmax. Losses that read one head, such as LwF's, pick that
task's columns and never meet it.
"""


class TaskHead(GrowingHead):
    """One growing linear layer and a table that says which classes belong to which task.

    Outputs keep their global labels: (batch, outputs) for every task, with ``MASKED`` in the columns of classes
    outside the sample's task. A class may belong to several tasks; they then share its row.

    Attributes:
        task_classes: Buffer (tasks, outputs), True where the class belongs to the task; rows are task ids.
    """

    task_classes: Tensor

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.register_buffer("task_classes", torch.zeros(0, 0, dtype=torch.bool))

    @property
    def known_tasks(self) -> list[int]:
        """Ids of the tasks met in training, in order."""
        return [int(task) for task in self.task_classes.any(dim=1).nonzero().flatten()]

    def grow(self, out_features: int) -> None:
        """Append rows until there are ``out_features``; a new row belongs to no task yet."""
        super().grow(out_features)
        if "task_classes" in self._buffers:  # absent while the parent class is being initialised
            self._reserve(self.task_classes.shape[0], self.out_features)

    def adaptation(self, experience: Any) -> None:
        """Grow to the classes of ``experience`` and enter them under its task; in training mode only.

        Raises:
            ContlearnError: The experience mixes tasks and has no data set that tells which class is in which.
        """
        super().adaptation(experience)
        if not self.training:
            return
        for task, classes in _classes_by_task(experience).items():
            self._reserve(max(task + 1, self.task_classes.shape[0]), self.out_features)
            self.task_classes[task, classes] = True

    def forward(self, features: Tensor, task_labels: Tensor | int | None = None) -> Tensor:
        """Logits (batch, outputs) of features (batch, in_features).

        Args:
            features: (batch, in_features).
            task_labels: Task id of each sample (batch,), or one id for all of them. A task that was never trained
                has no classes: all its logits are ``MASKED``. None masks nothing: every class competes.
        """
        logits = super().forward(features)
        if task_labels is None:
            return logits
        return logits.masked_fill(~self._admitted(task_labels), MASKED)

    def by_task(self, features: Tensor) -> dict[int, Tensor]:
        """Logits (batch, outputs) of features (batch, in_features) under every known task."""
        logits = super().forward(features)
        return {task: logits.masked_fill(~self._admitted(task), MASKED) for task in self.known_tasks}

    def _admitted(self, task_labels: Tensor | int) -> Tensor:
        tasks = self.task_classes.shape[0]
        if isinstance(task_labels, int):
            return self.task_classes[task_labels] if task_labels < tasks else self.task_classes.new_zeros(1)
        if tasks == 0:
            return self.task_classes.new_zeros(1)
        # Tensor arithmetic alone: asking the tensor whether a task is known would make a GPU wait at every batch.
        known = (task_labels < tasks).unsqueeze(1)
        return self.task_classes[task_labels.clamp(max=tasks - 1)] & known

    def _reserve(self, tasks: int, classes: int) -> None:
        old = self.task_classes
        if old.shape != (tasks, classes):
            table = old.new_zeros(tasks, classes)
            table[: old.shape[0], : old.shape[1]] = old
            self.task_classes = table

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "task_classes")
        if stored is not None and stored.shape != self.task_classes.shape:
            self.task_classes = self.task_classes.new_zeros(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class TaskClassifier(Classifier, MultiTaskModule):
    """A ``Classifier`` whose forward takes task labels, as Avalanche's multi-task strategies call it.

    Attributes:
        head: A ``TaskHead``.
        known_train_tasks_labels: Ids of the tasks met in training (Avalanche's record; follows the head's table).
        max_class_label: Highest class label met in training, plus 1 (likewise).
    """

    head: TaskHead
    known_train_tasks_labels: set[int]
    max_class_label: int

    def __init__(
        self, backbone: nn.Module, head: TaskHead, *, feature_dim: int, spec: dict[str, Any] | None = None
    ) -> None:
        super().__init__(backbone, head, feature_dim=feature_dim, spec=spec)
        self.register_load_state_dict_post_hook(_read_tasks)

    def adaptation(self, experience: Any) -> None:
        """Note the tasks of ``experience``, in training mode only; the head adapts itself."""
        if self.training:
            super().adaptation(experience)

    def forward(  # type: ignore[override]
        self, x: Tensor, task_labels: Tensor | int | None = None
    ) -> Tensor | dict[int, Tensor]:
        """Logits (batch, outputs) of images (batch, channels, height, width).

        Args:
            x: (batch, channels, height, width).
            task_labels: Task id of each sample (batch,), or one id for all. With None the result is a dictionary
                from every known task id to the logits under it, as Avalanche's ``MultiTaskModule`` promises.
        """
        if task_labels is None:
            return self.forward_all_tasks(x)
        logits: Tensor = self.head(self.features(x), task_labels)
        return logits

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Logits (batch, outputs) with every sample in task ``task_label``."""
        logits: Tensor = self.head(self.features(x), int(task_label))
        return logits

    def forward_all_tasks(self, x: Tensor) -> dict[int, Tensor]:
        """Logits (batch, outputs) under every known task; the backbone runs once."""
        return self.head.by_task(self.features(x))


def _read_tasks(model: nn.Module, _incompatible_keys: object) -> None:
    """Restore Avalanche's own record of tasks and classes from the head's table, which the state dict holds."""
    assert isinstance(model, TaskClassifier)
    model.known_train_tasks_labels = set(model.head.known_tasks)
    model.max_class_label = model.head.out_features


def _classes_by_task(experience: Any) -> dict[int, list[int]]:
    """The class labels of ``experience`` under each of its tasks."""
    tasks = sorted({int(task) for task in experience.task_labels})
    if len(tasks) == 1:
        return {tasks[0]: sorted(int(label) for label in experience.classes_in_this_experience)}
    dataset = getattr(experience, "dataset", None)
    if dataset is None:
        raise ContlearnError(f"an experience that mixes the tasks {tasks} needs a data set with targets_task_labels")
    pairs = {(int(task), int(label)) for task, label in zip(dataset.targets_task_labels, dataset.targets, strict=True)}
    return {task: sorted(label for other, label in pairs if other == task) for task in tasks}
