"""Learning without forgetting: distillation from the model as it was after the last experience (arXiv 1606.09282)."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import LwFPlugin as AvalancheLwFPlugin

from contlearn.errors import ContlearnError
from contlearn.strategies.step_part import PlainStep
from contlearn.strategies.template import SupervisedTemplate


class LwFPlugin(AvalancheLwFPlugin, PlainStep):
    """Avalanche's LwF plug-in with its teacher in evaluation mode.

    Avalanche leaves the copied model in training mode: its dropout then adds noise to the targets, and the statistics
    of its BatchNorm layers drift with every batch. ``teacher_in_train_mode`` gives that reading back.

    Args:
        alpha: weight of the distillation loss; a list gives one per experience.
        temperature: softmax temperature.
        teacher_in_train_mode: keep Avalanche's behaviour.
    """

    memory_names = {"lwf.prev_model": "teacher"}

    def __init__(
        self, alpha: float | list[float] = 1.0, temperature: float = 2.0, *, teacher_in_train_mode: bool = False
    ) -> None:
        if not temperature > 0:
            raise ContlearnError(f"temperature: expected more than 0, got {temperature}")
        super().__init__(alpha, temperature)
        self.teacher_in_train_mode = teacher_in_train_mode

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Keep a copy of the model as teacher."""
        super().after_training_exp(strategy, **kwargs)
        self.lwf.prev_model.train(self.teacher_in_train_mode)
        self.lwf.prev_model.requires_grad_(False)


class LwF(SupervisedTemplate):
    """Learning without forgetting.

    Args:
        alpha: weight of the distillation loss.
        temperature: softmax temperature.
        teacher_in_train_mode: leave the teacher's dropout and BatchNorm in training mode, as Avalanche does.
        kwargs: options of the training loop.
    """

    def __init__(
        self, *, alpha: float = 1.0, temperature: float = 2.0, teacher_in_train_mode: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.plugins.insert(0, LwFPlugin(alpha, temperature, teacher_in_train_mode=teacher_in_train_mode))
