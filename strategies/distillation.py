"""Distillation from the model before this experience: of predictions (PredKD, LwF.MC) and of features (FeatKD).

Smith et al., arXiv 2203.17269, section 4; the forms are those of the authors' development code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from avalanche.models import MultiTaskModule
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import UNSEEN
from contlearn.models._task_head import TaskClassifier
from contlearn.strategies.step_part import Masks
from contlearn.strategies.teacher import TeacherPlugin


class SeenClasses:
    """Class labels by when they were seen; blurry and domain streams bring classes back.

    Attributes:
        earlier: classes of the experiences trained on before this one.
        new: classes of the current experience.
    """

    def __init__(self) -> None:
        self.earlier: list[int] = []
        self.new: list[int] = []

    @property
    def old(self) -> list[int]:
        """Classes of earlier experiences that the current one has none of."""
        return [label for label in self.earlier if label not in self.new]

    @property
    def seen(self) -> list[int]:
        """All classes met so far, the current ones included."""
        return sorted({*self.earlier, *self.new})

    def start(self, experience: Any) -> None:
        """Begin an experience."""
        self.new = sorted(int(label) for label in experience.classes_in_this_experience)

    def finish(self) -> None:
        """Count the current experience as an earlier one."""
        self.earlier = self.seen


class OldClassDistillation(TeacherPlugin):
    """What distillations of old classes share: which classes those are, in training by label and in a step by mask.

    Args:
        temperature: of the softmax.

    Raises:
        ContlearnError: a temperature that is not positive.
    """

    checkpoint_exclude = ("_masks",)

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        if not temperature > 0:
            raise ContlearnError(f"temperature: expected more than 0, got {temperature}")
        self.temperature = temperature
        self.classes = SeenClasses()
        self._masks: Masks | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Learn which classes are new."""
        super().before_training_exp(strategy, **kwargs)
        self.classes.start(strategy.experience)

    @contextlib.contextmanager
    def step_bound(self, strategy: Any, tensors: dict[str, Tensor], masks: Masks) -> Iterator[None]:
        """While open, classes are old by mask."""
        self._masks = masks
        try:
            yield
        finally:
            self._masks = None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The classes of this experience are old from now on."""
        super().after_training_exp(strategy, **kwargs)
        self.classes.finish()


class PredKDPlugin(OldClassDistillation):
    """Distillation of predictions: old classes answer as they did before this experience; from the second on.

    ``sigmoid`` (LwF.MC) adds ``scale * sum over old columns of BCE(logit, sigmoid(teacher)) / (batch * classes seen)``;
    the targets of a sample do not sum to 1. ``softmax`` adds ``scale * T^2 * KL`` between the two softmaxes over the
    old columns at temperature T.

    Models with a ``TaskHead`` are compared before their mask, on the columns of all old tasks: under its mask, a sample
    of the current task has no old column to compare.

    Args:
        scale: weight of the term; 5 is the authors' for their binary cross-entropy.
        kind: ``sigmoid`` or ``softmax``.
        temperature: T of ``softmax``.

    Raises:
        ContlearnError: a value out of range; in training, a multi-task model that is not one of contlearn's.
    """

    def __init__(
        self, *, scale: float = 5.0, kind: Literal["sigmoid", "softmax"] = "sigmoid", temperature: float = 2.0
    ) -> None:
        if kind not in ("sigmoid", "softmax"):
            raise ContlearnError(f"kind: expected sigmoid or softmax, got {kind!r}")
        if not scale >= 0:
            raise ContlearnError(f"scale: expected at least 0, got {scale}")
        super().__init__(temperature=temperature)
        self.scale = scale
        self.kind = kind

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the term."""
        if not self.scale or self.teacher.model is None:
            return
        if self._masks is not None:
            student, teacher = self._logits(strategy)
            strategy.loss = strategy.loss + self.scale * self._masked(student, teacher, self._masks)
            return
        if not self.classes.old:
            return
        student, teacher = self._logits(strategy)
        old = torch.tensor(self.classes.old, device=student.device)
        if self.kind == "sigmoid":
            term = distil_sigmoid(student[:, old], teacher[:, old], len(self.classes.seen))
        else:
            term = distil_softmax(student[:, old], teacher[:, old], self.temperature)
        strategy.loss += self.scale * term

    def _masked(self, student: Tensor, teacher: Tensor, masks: Masks) -> Tensor:
        """The term with old classes given by a mask; 0 where there are none."""
        if self.kind == "sigmoid":
            each = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
            return (each * masks.old).sum() / (len(student) * masks.seen.sum())
        old = masks.old > 0
        return distil_softmax(
            torch.where(old, student, UNSEEN), torch.where(old, teacher, UNSEEN), self.temperature
        )

    def _logits(self, strategy: Any) -> tuple[Tensor, Tensor]:
        """Logits of student and teacher for the same rows, unmasked."""
        model, teacher = strategy.model, self.teacher.model
        if not isinstance(model, MultiTaskModule):
            logits = self.teacher.see(strategy.mb_x, None).logits
            assert logits is not None
            return strategy.mb_output, logits
        if not isinstance(model, TaskClassifier):
            raise ContlearnError(
                f"PredKD: the multi-task model {type(model).__name__} tells no logits outside a sample's task; "
                "expected a model of contlearn.models, or one without task labels"
            )
        assert isinstance(teacher, TaskClassifier)
        seen = self.teacher.student
        assert seen.x is not None and seen.features is not None
        taught = self.teacher.see(seen.x, seen.task_labels)
        with torch.no_grad():
            before = teacher.head(taught.features, None)
        return model.head(seen.features, None), before


class FeatKDPlugin(TeacherPlugin):
    """Distillation of features: ``mu * mean over batch and features of (f(x) - f_teacher(x))^2``.

    Features are what the classifier reads. The term acts from the first experience on, with the initial weights as
    teacher (section 4; so in the authors' code, too).

    Args:
        mu: weight of the term.

    Raises:
        ContlearnError: a negative weight.
    """

    from_start = True

    def __init__(self, *, mu: float = 5.0) -> None:
        super().__init__()
        if not mu >= 0:
            raise ContlearnError(f"mu: expected at least 0, got {mu}")
        self.mu = mu

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the term."""
        if not self.mu:
            return
        seen = self.teacher.student
        if seen.features is None:
            raise ContlearnError(
                "FeatKD: the strategy's forward pass did not call the model's classifier; expected one that calls model"
            )
        # A host that calls features and head itself has not called the model: then the batch is what was read.
        x = strategy.mb_x if seen.x is None else seen.x
        asked = seen.task_labels is None and isinstance(strategy.model, MultiTaskModule)
        labels = strategy.mb_task_id if asked else seen.task_labels
        taught = self.teacher.see(x, labels).features
        assert taught is not None
        strategy.loss += self.mu * F.mse_loss(seen.features.float(), taught.float())


def distil_sigmoid(student: Tensor, teacher: Tensor, classes: int) -> Tensor:
    """Binary cross-entropy towards the teacher's sigmoids, summed and divided by batch and ``classes``.

    Args:
        student: logits ``(batch, old)``.
        teacher: logits ``(batch, old)``.
        classes: number of classes seen: the width of the one binary cross-entropy this is a part of.
    """
    loss = F.binary_cross_entropy_with_logits(student, teacher.to(student.dtype).sigmoid(), reduction="sum")
    return loss / (len(student) * classes)


def distil_softmax(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teacher || student)`` of the softmaxes of logits ``(batch, old)`` at temperature T, batch mean."""
    now, before = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(now, before, reduction="batchmean", log_target=True)
