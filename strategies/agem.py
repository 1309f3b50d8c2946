"""A-GEM: gradients that would raise the loss on memory are projected (arXiv 1812.00420)."""

from __future__ import annotations

import random
from typing import Any

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.training.plugins import AGEMPlugin as AvalancheAGEMPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer

from contlearn.errors import ContlearnError
from contlearn.strategies.loader import Batch, BatchSource, CyclingSampler
from contlearn.strategies.memories import require_positive, take_in
from contlearn.strategies.rehearsal import Rehearsal


class AGEMPlugin(AvalancheAGEMPlugin):
    """Avalanche's A-GEM plug-in with its memory read in batches of tensors, from a position that can be stored.

    Args:
        patterns_per_experience: exemplars kept of each experience, chosen at random.
        sample_size: exemplars per reference gradient, in equal shares from each past experience.
        partial_batches: serve the memory in whole passes, as Avalanche does: the last sample of a pass is then smaller
            (2 of 50 exemplars at a share of 16). The paper draws a full random sample at every step.
    """

    not_exportable = "it takes two gradients per step and its memory is by experience; export replay or er_ace"

    def __init__(
        self, patterns_per_experience: int = 50, sample_size: int = 64, *, partial_batches: bool = False
    ) -> None:
        require_positive(patterns_per_experience=patterns_per_experience, sample_size=sample_size)
        super().__init__(patterns_per_experience, sample_size)
        self.partial_batches = partial_batches
        self.samplers: list[CyclingSampler] = []
        self.reservoir: ReservoirSamplingBuffer | None = None

    memory_names = {
        "reference_gradients": "reference_gradient",
        "samplers": "memory_loader",
        "reservoir": "reservoir_weights",
    }
    # Loaders of the parent that we do not use; samplers are made again from the stored buffers.
    checkpoint_exclude = ("buffer_dataloader", "buffer_dliter", "reference_gradients", "samplers")

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Make one sampler per past experience."""
        share = max(1, self.sample_size // max(1, len(self.buffers)))
        self.samplers = [
            CyclingSampler(
                BatchSource(buffer, strategy.device),
                batch_size=share,
                generator=getattr(strategy, "generator", None),  # Avalanche's own templates have none
                partial=self.partial_batches,
            )
            for buffer in self.buffers
        ]

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take in the experience; the pieces of an online stream share the memory of the one they are cut from."""
        experience = strategy.experience
        if not isinstance(experience, OnlineCLExperience):
            self.update_memory(experience.dataset)
            return
        if self.reservoir is None or experience.logging().is_first_subexp:
            self.reservoir = ReservoirSamplingBuffer(self.patterns_per_experience)
            self.buffers.append(self.reservoir.buffer)
        take_in(self.reservoir, strategy, experience)
        self.buffers[-1] = self.reservoir.buffer

    @torch.no_grad()
    def update_memory(self, dataset: AvalancheDataset[Any], num_workers: int = 0, **kwargs: Any) -> None:
        """Keep ``patterns_per_experience`` random samples of ``dataset``."""
        indices = list(range(len(dataset)))
        if len(indices) > self.patterns_per_experience:
            random.shuffle(indices)
            dataset = dataset.subset(indices[: self.patterns_per_experience])
        self.buffers.append(dataset)

    def sample_from_memory(self) -> Batch:
        """A batch ``[x, y, ..., t]`` with equal shares of each past experience."""
        return [torch.cat(parts) for parts in zip(*(sampler.next() for sampler in self.samplers), strict=True)]


class AGEM(Rehearsal):
    """Averaged gradient episodic memory.

    Args:
        patterns_per_experience: exemplars kept of each experience.
        memory_budget: bytes of the memory after the last experience (``64KB``), instead of ``patterns_per_experience``.
        sample_size: exemplars per reference gradient.
        partial_batches: serve the memory in whole passes with a smaller last sample, as Avalanche does.
        kwargs: options of the training loop.
    """

    def __init__(
        self,
        *,
        patterns_per_experience: int = 50,
        memory_budget: int | str | None = None,
        sample_size: int = 64,
        partial_batches: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_budget=memory_budget, **kwargs)
        self.agem = AGEMPlugin(patterns_per_experience, sample_size, partial_batches=partial_batches)
        self.plugins.insert(0, self.agem)

    def set_memory_size(self, count: int) -> None:
        """Share ``count`` exemplars out over the experiences of the stream.

        Raises:
            ContlearnError: fewer exemplars than experiences.
        """
        assert self.experience is not None
        pieces = [experience.logging() for experience in self.experience.logging().origin_stream]
        experiences = sum(getattr(piece, "is_first_subexp", True) for piece in pieces)
        if count < experiences:
            raise ContlearnError(
                f"memory_budget: {self.memory_budget} bytes hold {count} exemplars, fewer than the {experiences} "
                f"experiences; expected at least {experiences * self.exemplar_bytes(self.experience)}"
            )
        self.agem.patterns_per_experience = count // experiences

    def training_state(self) -> dict[str, Any]:
        """The loop's state and the positions in memory."""
        return {**super().training_state(), "memory": self.agem.samplers}
