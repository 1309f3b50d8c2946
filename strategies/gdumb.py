"""GDumb: fill a class-balanced memory greedily and train from scratch on it alone (ECCV 2020, Prabhu et al.)."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import GDumbPlugin as AvalancheGDumbPlugin

from contlearn.strategies.memories import require_positive
from contlearn.strategies.template import SupervisedTemplate


class GDumbPlugin(AvalancheGDumbPlugin):
    """Avalanche's GDumb plug-in, handing its memory over under the training transform.

    Avalanche also grows the initial model by what is evaluated: the next experience would then be trained with outputs
    for classes that only the test stream has shown so far.

    Args:
        memory_size: exemplars in memory, class-balanced.
    """

    def __init__(self, memory_size: int = 200) -> None:
        require_positive(memory_size=memory_size)
        super().__init__(memory_size)

    def before_eval_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the initial model as it is."""

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Take in the experience and train on the memory alone."""
        self.storage_policy.post_adapt(strategy, strategy.experience)
        strategy.adapted_dataset = self.storage_policy.buffer.train()


class GDumb(SupervisedTemplate):
    """Greedy sampler and dumb learner: Avalanche's plug-in on our template.

    Args:
        memory_size: exemplars in memory, class-balanced.
        kwargs: options of the training loop.
    """

    def __init__(self, *, memory_size: int = 200, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plugins.insert(0, GDumbPlugin(memory_size))
