"""WA: cross-entropy with distillation, then the head's new rows aligned to the old ones (arXiv 1911.07053)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import UNSEEN
from contlearn.strategies.distillation import SeenClasses, distil_softmax
from contlearn.strategies.herded import HerdedRehearsal
from contlearn.strategies.step_part import Masks
from contlearn.strategies.teacher import TeacherPlugin


class WeightAligningPlugin(TeacherPlugin):
    """The loss of WA: ``(1 - lam) * cross-entropy + lam * distillation`` with lam = old classes / all classes.

    Args:
        temperature: softmax temperature of the distillation.
    """

    checkpoint_exclude = ("_masks",)

    def __init__(self, *, temperature: float = 2.0) -> None:
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

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Mix the two terms."""
        if self.teacher.model is None or (self._masks is None and not self.classes.earlier):
            return
        student = strategy.mb_output
        taught = self.teacher.see(strategy.mb_x, strategy.mb_task_id).logits
        assert taught is not None
        if self._masks is not None:
            old = self._masks.old > 0
            lam: Any = self._masks.old.sum() / self._masks.seen.sum()
            student, taught = (torch.where(old, logits, UNSEEN) for logits in (student, taught))
        else:
            labels = torch.tensor(self.classes.earlier, device=student.device)
            lam = len(self.classes.earlier) / len(self.classes.seen)
            student, taught = student[:, labels], taught[:, labels]
        # The paper's cross-entropy of softened outputs, without the T^2 that other distillation has; the entropy of the
        # teacher is left out, which no gradient sees.
        term = distil_softmax(student, taught, self.temperature) / self.temperature**2
        strategy.loss = (1 - lam) * strategy.loss + lam * term

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """The classes of this experience are old from now on."""
        super().after_training_exp(strategy, **kwargs)
        self.classes.finish()

    def kept_bytes(self, model: nn.Module, *, experiences: int, head_rows: int) -> int:
        """Bytes of the teacher at the end of the stream."""
        tensors = [*model.parameters(), *model.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors) + head_rows


class WA(HerdedRehearsal):
    """Weight aligning.

    Trained on new data and herded exemplars together; from the second experience on with distillation from the model
    before it. After training, the rows of new classes are scaled to the mean norm of the old ones.

    Args:
        temperature: softmax temperature of the distillation.
        kwargs: options of the exemplars and of the training loop.
    """

    def __init__(self, *, temperature: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # First, so that it mixes the loss before other methods add to it.
        self.plugins.insert(0, WeightAligningPlugin(temperature=temperature))
