"""ER-ACE: replay with an asymmetric cross-entropy on incoming data (arXiv 2104.05025)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from avalanche.models import avalanche_forward
from torch import Tensor

from contlearn.strategies.loader import Batch, BatchSource, CyclingSampler
from contlearn.strategies.memories import Policy, device_policy, require_positive, storage_policy, take_in
from contlearn.strategies.rehearsal import Rehearsal
from contlearn.strategies.step import Memory


class ERACE(Rehearsal):
    """Experience replay with asymmetric cross-entropy.

    Incoming samples compete among the classes of their own batch only, exemplars among all; the two losses are
    averaged. As in Avalanche, the memory takes in an experience before it is trained on, and the two batches pass the
    network separately: BatchNorm sees each by itself. In other code bases incoming samples compete with classes not
    seen yet as well; here only among those present.

    Args:
        memory_size: exemplars in memory.
        memory_budget: bytes of the memory (``65536``, ``64KB``), instead of ``memory_size``.
        policy: which exemplars are kept.
        batch_size_memory: exemplars per iteration, fewer while the memory holds fewer.
        joint_forward: one pass of incoming samples followed by exemplars, which share the statistics of BatchNorm.
        kwargs: options of the training loop.
    """

    def __init__(
        self,
        *,
        memory_size: int = 200,
        memory_budget: int | str | None = None,
        policy: Policy = "class_balanced",
        batch_size_memory: int = 10,
        joint_forward: bool = False,
        **kwargs: Any,
    ) -> None:
        require_positive(batch_size_memory=batch_size_memory)
        super().__init__(memory_budget=memory_budget, **kwargs)
        self.batch_size_memory = batch_size_memory
        self.joint_forward = joint_forward
        self.storage_policy = storage_policy(policy, memory_size)
        self.memory: CyclingSampler | None = None
        self._exemplars: Batch = []
        self._exemplar_output = torch.empty(0)

    memory_names = {
        "storage_policy": "reservoir_weights",
        "memory": "memory_loader",
        "_exemplars": "memory_batch",
        "_exemplar_output": "memory_batch",
    }
    checkpoint_exclude = ("memory", "_exemplars", "_exemplar_output")

    def set_memory_size(self, count: int) -> None:
        """Take ``count`` as the number of exemplars."""
        self.storage_policy.max_size = count

    def _before_training_exp(self, **kwargs: Any) -> None:
        if not self._fitted:  # the memory takes this experience in before the base class looks at it
            self.fit_memory(self.experience)
        take_in(self.storage_policy, self, self.experience)
        buffer = self.storage_policy.buffer
        if len(buffer) and self.clock.train_exp_counter > 0:
            self.memory = CyclingSampler(
                BatchSource(buffer.train(), self.device), batch_size=self.batch_size_memory, generator=self.generator
            )
        super()._before_training_exp(**kwargs)

    def _before_forward(self, **kwargs: Any) -> None:
        if self.memory is not None:
            self._exemplars = self.memory.next()
        super()._before_forward(**kwargs)

    @property
    def pass_targets(self) -> Tensor:
        """Labels ``(rows,)`` of the pass that is about to run: with a joint one, the exemplars' follow."""
        if self.joint_forward and self.is_training and self.memory is not None:
            return torch.cat([self.mb_y, self._exemplars[1]])
        return self.mb_y  # type: ignore[no-any-return]

    def forward(self) -> Tensor:
        """Outputs of the current batch; while training, exemplars pass the network too."""
        if self.joint_forward and self.is_training and self.memory is not None:
            count = len(self.mb_y)
            x = torch.cat([self.mb_x, self._exemplars[0]])
            joint = avalanche_forward(self.model, x, torch.cat([self.mb_task_id, self._exemplars[-1]]))
            self._exemplar_output = joint[count:]
            return joint[:count]  # type: ignore[no-any-return]
        output = super().forward()
        if self.is_training and self.memory is not None:
            self._exemplar_output = avalanche_forward(self.model, self._exemplars[0], self._exemplars[-1])
        return output

    def criterion(self) -> Tensor:
        """Asymmetric cross-entropy while training with a memory, else the plain criterion."""
        if not self.is_training or self.memory is None:
            return super().criterion()  # type: ignore[no-any-return]
        return asymmetric_cross_entropy(self.mb_output, self.mb_y, self._exemplar_output, self._exemplars[1])

    def step_memory(self) -> Memory:
        """The memory that a device keeps."""
        return Memory(self.storage_policy.max_size, device_policy(self.storage_policy), self.batch_size_memory)

    def step_batch(self, x: Tensor, y: Tensor, given: dict[str, Tensor]) -> Batch:
        """Incoming samples alone: exemplars pass by themselves."""
        return [x, y, torch.zeros_like(y)]

    @contextlib.contextmanager
    def step_bound(self, masks: Any, given: dict[str, Tensor]) -> Iterator[None]:
        """While open, the exemplars are the ones given."""
        kept = self.memory, self._exemplars, self._exemplar_output
        batch = [given["x_memory"], given["y_memory"], torch.zeros_like(given["y_memory"])]
        self.memory, self._exemplars = cast(Any, batch), batch
        try:
            yield
        finally:
            self.memory, self._exemplars, self._exemplar_output = kept

    def training_state(self) -> dict[str, Any]:
        """The loop's state and the position in memory."""
        return {**super().training_state(), "memory": self.memory}

    def _train_cleanup(self) -> None:
        super()._train_cleanup()
        self.memory, self._exemplars = None, []


def asymmetric_cross_entropy(
    output: Tensor, target: Tensor, exemplar_output: Tensor, exemplar_target: Tensor
) -> Tensor:
    """Mean of two cross-entropies: of incoming data among the classes in its batch, of exemplars among all.

    The formula of Avalanche's ``ACECriterion``, but without its logarithm of a softmax, which gives NaN once a
    probability underflows.
    """
    columns = torch.arange(output.shape[1], device=output.device)
    present = (target[:, None] == columns).any(0)
    # Absent classes take no part: their share of the softmax, and their gradient, is exactly 0.
    incoming = F.cross_entropy(output.masked_fill(~present, -math.inf), target)
    return (incoming + F.cross_entropy(exemplar_output, exemplar_target)) / 2
