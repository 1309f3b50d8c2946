"""Dark experience replay: exemplars are stored with the logits they had, and matched to them (arXiv 2004.07211)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from avalanche.models import avalanche_forward
from torch import Tensor

from contlearn.strategies.loader import Batch, BatchSource, CyclingSampler
from contlearn.strategies.memories import LogitMemory, require_positive, take_in
from contlearn.strategies.rehearsal import Rehearsal


class DER(Rehearsal):
    """Dark experience replay, and DER++ with ``beta`` above 0.

    Loss: cross-entropy on current data + ``alpha`` * mean squared error of an exemplar batch's logits to the stored
    ones + ``beta`` * cross-entropy on the same batch. Like Avalanche's DER and unlike the authors' code: one joint
    forward pass, one exemplar batch for both terms, and logits stored at the end of an experience in evaluation mode;
    ``joint_forward=False`` and ``second_batch=True`` take the first two as the authors do.
    Avalanche's own class fails once the head grows, since stored rows then differ in length; here the squared error
    covers the columns that existed when an exemplar was stored.

    Args:
        memory_size: exemplars in memory, class-balanced.
        memory_budget: bytes of the memory (``65536``, ``64KB``), instead of ``memory_size``.
        alpha: weight of the squared error.
        beta: weight of the exemplars' cross-entropy; 0 is DER, above 0 DER++.
        batch_size_memory: exemplars per iteration, fewer while the memory holds fewer; default: as many as samples of
            the current experience.
        joint_forward: exemplars and current samples share one pass and the statistics of BatchNorm; else each batch
            passes by itself, the current one first.
        second_batch: draw another exemplar batch for the cross-entropy.
        kwargs: options of the training loop.
    """

    not_exportable = "its exemplars keep logits, which the runner's memory does not hold; export replay or er_ace"

    def __init__(
        self,
        *,
        memory_size: int = 200,
        memory_budget: int | str | None = None,
        alpha: float = 0.1,
        beta: float = 0.0,
        batch_size_memory: int | None = None,
        joint_forward: bool = True,
        second_batch: bool = False,
        **kwargs: Any,
    ) -> None:
        require_positive(memory_size=memory_size, batch_size_memory=batch_size_memory)
        super().__init__(memory_budget=memory_budget, **kwargs)
        self.alpha = alpha
        self.beta = beta
        self.batch_size_memory = batch_size_memory or self.train_mb_size
        self.joint_forward = joint_forward
        self.second_batch = second_batch
        self.storage_policy = LogitMemory(memory_size)
        self.memory: CyclingSampler | None = None
        self.output_width = 0
        """Number of outputs the model had in the last training iteration."""
        self._stored_logits = torch.empty(0)
        self._counts: list[int] = []  # of the exemplar batches
        self._exemplars: list[Batch] = []  # [x, y, task] of each, where they pass by themselves
        self._outputs: list[Tensor] = []

    memory_names = {
        "storage_policy": "reservoir_weights",
        "memory": "memory_loader",
        "_stored_logits": "memory_batch",
        "_exemplars": "memory_batch",
        "_outputs": "memory_batch",
    }
    checkpoint_exclude = ("memory", "_stored_logits", "_counts", "_exemplars", "_outputs")

    def extra_bytes(self, n_classes: int) -> int:
        """The logits, float32, at their full width."""
        return 4 * n_classes

    def set_memory_size(self, count: int) -> None:
        """Take ``count`` as the number of exemplars."""
        self.storage_policy.max_size = count

    def _before_training_exp(self, **kwargs: Any) -> None:
        buffer = self.storage_policy.buffer
        if len(buffer):  # Avalanche would leave a memory that is smaller than one batch unused
            self.memory = CyclingSampler(
                BatchSource(buffer.train(), self.device), batch_size=self.batch_size_memory, generator=self.generator
            )
        super()._before_training_exp(**kwargs)

    def _before_forward(self, **kwargs: Any) -> None:
        if self.memory is not None:
            batches = [_with_logits_last(self.memory.next())]
            if self.second_batch and self.beta:
                batches.append(_with_logits_last(self.memory.next()))
            self._stored_logits = batches[0].pop()
            exemplars = [batch[:3] for batch in batches]
            self._counts = [len(y) for _, y, _ in exemplars]
            if self.joint_forward:
                self.mbatch = [torch.cat(parts) for parts in zip(*exemplars, self.mbatch, strict=True)]
            else:
                self._exemplars = exemplars
        super()._before_forward(**kwargs)

    def forward(self) -> Tensor:
        """Outputs of ``mbatch``: exemplars first, then the current samples; where they pass apart, the latter's."""
        output = super().forward()
        if self.is_training and self.memory is not None and not self.joint_forward:
            self._outputs = [avalanche_forward(self.model, x, task) for x, _, task in self._exemplars]
        return output

    def _rehearsed(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and labels of each exemplar batch."""
        if not self.joint_forward:
            return self._outputs, [y for _, y, _ in self._exemplars]
        count = sum(self._counts)
        return [*self.mb_output[:count].split(self._counts)], [*self.mb_y[:count].split(self._counts)]

    def criterion(self) -> Tensor:
        """The loss above; plain cross-entropy when evaluating or without a memory."""
        if not self.is_training:
            return super().criterion()  # type: ignore[no-any-return]
        self.output_width = self.mb_output.shape[1]
        if self.memory is None:
            return super().criterion()  # type: ignore[no-any-return]
        outputs, labels = self._rehearsed()
        count = sum(self._counts) if self.joint_forward else 0
        loss = F.cross_entropy(self.mb_output[count:], self.mb_y[count:])
        loss = loss + self.alpha * logit_error(outputs[0], self._stored_logits)
        if self.beta:
            loss = loss + self.beta * F.cross_entropy(outputs[-1], labels[-1])
        return loss

    def _after_training_exp(self, **kwargs: Any) -> None:
        self.memory = None
        take_in(self.storage_policy, self, self.experience)
        super()._after_training_exp(**kwargs)

    def training_state(self) -> dict[str, Any]:
        """The loop's state and the position in memory."""
        return {**super().training_state(), "memory": self.memory}

    def _train_cleanup(self) -> None:
        super()._train_cleanup()
        self.memory, self._exemplars, self._outputs = None, [], []


def logit_error(output: Tensor, stored: Tensor) -> Tensor:
    """Mean squared error over the logits that were stored; columns of ``stored`` ``(batch, <= outputs)`` may be NaN."""
    output = output[:, : stored.shape[1]]
    known = stored.isfinite()
    if bool(known.all()):
        return F.mse_loss(output, stored)
    return (output - stored.nan_to_num())[known].pow(2).mean()


def _with_logits_last(batch: list[Tensor]) -> list[Tensor]:
    """``[x, y, task, logits]``: attributes come in the order they were added to the data set."""
    x, y, *rest = batch
    task = next(part for part in rest if not part.is_floating_point())
    logits = next(part for part in rest if part.is_floating_point())
    return [x, y, task, logits]
