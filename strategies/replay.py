"""Experience replay: every batch of the current experience is joined by a batch from memory (arXiv 1902.10486)."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import ReplayPlugin as AvalancheReplayPlugin

from contlearn.strategies.loader import BatchLoader, BatchSource, CyclingSampler, ReplayLoader
from contlearn.strategies.memories import Policy, device_policy, require_positive, storage_policy, take_in
from contlearn.strategies.rehearsal import Rehearsal
from contlearn.strategies.step import Memory
from contlearn.strategies.step_part import PlainStep
from contlearn.strategies.template import SupervisedTemplate


class ReplayPlugin(AvalancheReplayPlugin, PlainStep):
    """Avalanche's replay plug-in; on our template its batches are gathered as tensors.

    Args:
        memory_size: exemplars in memory.
        policy: which exemplars are kept.
        batch_size_memory: exemplars per iteration; default: as many as samples of the current experience.
    """

    memory_names = {"storage_policy": "reservoir_weights"}
    checkpoint_exclude = ("_batch",)
    _batch = 0

    def __init__(
        self, memory_size: int = 200, *, policy: Policy = "class_balanced", batch_size_memory: int | None = None
    ) -> None:
        require_positive(batch_size_memory=batch_size_memory)
        super().__init__(
            mem_size=memory_size,
            batch_size_mem=batch_size_memory,
            storage_policy=storage_policy(policy, memory_size),
        )

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Serve current data and memory side by side, once there is a memory."""
        if not isinstance(strategy, SupervisedTemplate):
            super().before_training_exp(strategy, **kwargs)
            return
        memory = self.storage_policy.buffer
        if len(memory) == 0:
            return
        assert isinstance(strategy.dataloader, BatchLoader)
        strategy.dataloader = ReplayLoader(
            strategy.dataloader,
            CyclingSampler(
                BatchSource(memory.train(), strategy.device),
                batch_size=self.batch_size_mem or strategy.train_mb_size,
                generator=strategy.generator,
            ),
        )

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take in the experience."""
        take_in(self.storage_policy, strategy, strategy.experience)

    def step_ready(self, strategy: Any) -> None:
        """As many exemplars as samples, unless told otherwise."""
        self._batch = self.batch_size_mem or strategy.train_mb_size

    def step_memory(self) -> Memory:
        """The memory that a device keeps."""
        return Memory(self.storage_policy.max_size, device_policy(self.storage_policy), self._batch)


class Replay(Rehearsal):
    """Rehearsal from a bounded memory.

    Args:
        memory_size: exemplars in memory.
        memory_budget: bytes of the memory (``65536``, ``64KB``), instead of ``memory_size``.
        policy: ``reservoir`` (a uniform sample of everything seen), ``class_balanced`` or ``experience_balanced``
            (equal shares), ``herding`` (equal shares per class, chosen nearest to the class mean in feature space).
        batch_size_memory: exemplars per iteration; default: as many as samples of the current experience.
        kwargs: options of the training loop.
    """

    def __init__(
        self,
        *,
        memory_size: int = 200,
        memory_budget: int | str | None = None,
        policy: Policy = "class_balanced",
        batch_size_memory: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_budget=memory_budget, **kwargs)
        self.replay = ReplayPlugin(memory_size, policy=policy, batch_size_memory=batch_size_memory)
        self.plugins.insert(0, self.replay)

    def set_memory_size(self, count: int) -> None:
        """Take ``count`` as the number of exemplars."""
        self.replay.mem_size = self.replay.storage_policy.max_size = count
