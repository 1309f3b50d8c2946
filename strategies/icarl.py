"""iCaRL: herded exemplars, sigmoid distillation, nearest-mean-of-exemplars classification (arXiv 1611.07725)."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.models import avalanche_forward
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.memories import HerdingBuffer, feature_extractor, require_positive
from contlearn.strategies.nearest_mean import class_means, nearest_mean_scores
from contlearn.strategies.rehearsal import Rehearsal


class ICaRL(Rehearsal):
    """Incremental classifier and representation learning.

    Trains on new data and all exemplars together with binary cross-entropy on every output: one-hot targets for new
    classes, the previous model's sigmoids for old ones (algorithm 3). Exemplars are herded per class on normalised
    features; evaluation takes the nearest class mean of exemplars (algorithm 1), averaged over each exemplar and its
    mirror image where ``mirror`` is set, as in the authors' code. ``classifier="head"`` evaluates the network's
    outputs.

    Ours, because Avalanche 0.6.0's iCaRL reads attributes of the deprecated benchmarks (``n_classes_per_exp``,
    ``classes_order``), which streams of the new API do not have.

    Args:
        memory_size: exemplars in all, shared out equally over the classes seen.
        memory_budget: bytes of the memory (``65536``, ``64KB``), instead of ``memory_size``.
        classifier: ``nme`` (nearest mean of exemplars) or ``head``.
        mirror: add mirrored exemplars to the class means.
        kwargs: options of the training loop.
    """

    not_exportable = "its exemplars are herded by features, which the runner does not compute; export replay"

    memory_names = {"teacher": "teacher", "_means": "class_means"}
    checkpoint_exclude = ("_means",)

    def __init__(
        self,
        *,
        memory_size: int = 200,
        memory_budget: int | str | None = None,
        classifier: Literal["nme", "head"] = "nme",
        mirror: bool = False,
        **kwargs: Any,
    ) -> None:
        require_positive(memory_size=memory_size)
        if classifier not in ("nme", "head"):
            raise ContlearnError(f"classifier: expected nme or head, got {classifier!r}")
        super().__init__(memory_budget=memory_budget, **kwargs)
        feature_extractor(self.model)
        self.classifier = classifier
        self.mirror = mirror
        self.storage_policy = HerdingBuffer(memory_size)
        self.teacher: nn.Module | None = None
        self.old_classes: list[int] = []
        self._means: dict[int, Tensor] | None = None

    def set_memory_size(self, count: int) -> None:
        """Take ``count`` as the number of exemplars."""
        self.storage_policy.max_size = count

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Join the exemplars to the current experience."""
        assert self.experience is not None
        data: AvalancheDataset[Any] = self.experience.dataset
        if self.old_classes:
            data = concat_datasets([data, self.storage_policy.buffer])
        self.adapted_dataset = data.train()

    def _before_eval(self, **kwargs: Any) -> None:
        self._means = None  # those of the model as it is now are wanted
        super()._before_eval(**kwargs)

    def criterion(self) -> Tensor:
        """Mean binary cross-entropy over samples and outputs (cross-entropy of the outputs when evaluating)."""
        if not self.is_training:
            return super().criterion()  # type: ignore[no-any-return]
        targets = F.one_hot(self.mb_y, self.mb_output.shape[1]).to(self.mb_output.dtype)
        if self.teacher is not None:
            with torch.no_grad():
                old = avalanche_forward(self.teacher, self.mb_x, self.mb_task_id)
            targets[:, self.old_classes] = old[:, self.old_classes].sigmoid()
        return F.binary_cross_entropy_with_logits(self.mb_output, targets)

    def _after_training_exp(self, **kwargs: Any) -> None:
        assert self.experience is not None
        self.storage_policy.post_adapt(self, self.experience)
        self.old_classes = sorted(set(self.old_classes) | set(self.experience.classes_in_this_experience))
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        super()._after_training_exp(**kwargs)

    def forward(self) -> Tensor:
        """Network outputs ``(batch, classes)``; with ``nme``, minus squared distances to class means."""
        if self.is_training or self.classifier == "head" or not self.old_classes:
            return super().forward()
        if self._means is None:
            self._means = class_means(
                self.model, self.storage_policy.buffer_groups, device=self.device, mirror=self.mirror
            )
        features = feature_extractor(self.model)(self.mb_x)
        return nearest_mean_scores(features, self._means, int(self.mb_y.max()) + 1)
