"""WA: cross-entropy with distillation, then the head's new rows aligned to the old ones (arXiv 1911.07053)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from contlearn.models._growing_head import UNSEEN
from contlearn.strategies.distillation import OldClassDistillation, distil_softmax
from contlearn.strategies.herded import HerdedRehearsal


class WeightAligningPlugin(OldClassDistillation):
    """The loss of WA: ``(1 - lam) * cross-entropy + lam * distillation`` with lam = old classes / all classes.

    Args:
        temperature: softmax temperature of the distillation.
    """

    def __init__(self, *, temperature: float = 2.0) -> None:
        super().__init__(temperature=temperature)

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
