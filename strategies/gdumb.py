"""GDumb: fill a class-balanced memory greedily and train from scratch on it alone (ECCV 2020, Prabhu et al.)."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import GDumbPlugin as AvalancheGDumbPlugin

from contlearn.strategies.memories import require_positive, take_in
from contlearn.strategies.rehearsal import Rehearsal


class GDumbPlugin(AvalancheGDumbPlugin):
    """Avalanche's GDumb plug-in, handing its memory over under the training transform.

    Avalanche also grows the initial model by what is evaluated: the next experience would then be trained with outputs
    for classes that only the test stream has shown so far.

    Args:
        memory_size: exemplars in memory, class-balanced.
    """

    memory_names = {"init_model": "initial_model", "storage_policy": "reservoir_weights"}

    def __init__(self, memory_size: int = 200) -> None:
        require_positive(memory_size=memory_size)
        super().__init__(memory_size)

    def before_eval_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Leave the initial model as it is."""

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        """Take in the experience and train on the memory alone."""
        take_in(self.storage_policy, strategy, strategy.experience)
        strategy.adapted_dataset = self.storage_policy.buffer.train()


class GDumb(Rehearsal):
    """Greedy sampler and dumb learner: Avalanche's plug-in on our template.

    Args:
        memory_size: exemplars in memory, class-balanced.
        memory_budget: bytes of the memory (``65536``, ``64KB``), instead of ``memory_size``.
        kwargs: options of the training loop.
    """

    not_exportable = "it trains from scratch on its memory; a device adapts what it has; export replay"

    def __init__(self, *, memory_size: int = 200, memory_budget: int | str | None = None, **kwargs: Any) -> None:
        super().__init__(memory_budget=memory_budget, **kwargs)
        self.gdumb = GDumbPlugin(memory_size)
        self.plugins.insert(0, self.gdumb)

    def set_memory_size(self, count: int) -> None:
        """Take ``count`` as the number of exemplars."""
        self.gdumb.mem_size = self.gdumb.storage_policy.max_size = count

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Know the size of the memory before the plug-in fills it."""
        if not self._fitted:
            self.fit_memory(self.experience)
        super().train_dataset_adaptation(**kwargs)
