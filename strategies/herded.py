"""What class-incremental methods with herded exemplars share: union training, equal-memory budgets, two classifiers.

Exemplars and budgets as in MEMO's comparison of methods at equal bytes (arXiv 2205.13218).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.utils import concat_datasets
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.memory.papers import memo_extra_exemplars
from contlearn.memory.units import in_words, parse_bytes
from contlearn.strategies.alignment import align_rows
from contlearn.strategies.distillation import SeenClasses
from contlearn.strategies.memo_network import classes_of
from contlearn.strategies.memories import HerdingBuffer, feature_extractor, require_positive
from contlearn.strategies.nearest_mean import class_means, nearest_mean_scores
from contlearn.strategies.rehearsal import Rehearsal
from contlearn.strategies.step import Memory

PARAMETER_BYTES = 4


class HerdedRehearsal(Rehearsal):
    """Base of methods that train on new data and herded exemplars together.

    After each experience: weight alignment where the method has it, then herding on normalised features. Evaluation
    answers with the head and with the nearest mean of exemplars in one pass; ``classifier`` says which is the run's.

    Args:
        memory_size: exemplars in all, shared out equally over the classes seen.
        per_class: exemplars of each class instead, so that the memory grows with the classes.
        memory_budget: bytes instead of a number (``65536``, ``64KB``, ``23.5MiB``).
        budget_covers: what ``memory_budget`` must hold: the ``exemplars`` alone (pixels, label and index, as everywhere
            in contlearn), or also the backbones at the end of the stream, ``model`` (the papers' count: 4 bytes a
            parameter, 1 a pixel, no classifier).
        budget_reference: ``der`` adds, to ``memory_size``, the exemplars that fit into what this method's backbones
            leave of DER's, one whole backbone per task (arXiv 2205.13218, the memory-aligned comparison).
        classifier: ``head`` (the network's outputs) or ``nme`` (nearest mean of exemplars).
        align: after each experience but the first, shrink the rows of new classes to the old ones' mean norm.
        kwargs: options of the training loop.

    Attributes:
        other_outputs: while a batch is evaluated, the answers ``(batch, classes)`` of the other classifier, by name.
        gamma: the last factor of alignment.

    Raises:
        ContlearnError: options that exclude each other or are out of range; when training starts, a budget without
            room for one exemplar.
    """

    memory_names = {"_means": "class_means", "other_outputs": "class_means"}
    checkpoint_exclude: tuple[str, ...] = ("_means", "other_outputs")

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        per_class: int | None = None,
        memory_budget: int | str | None = None,
        budget_covers: Literal["exemplars", "model"] = "exemplars",
        budget_reference: Literal["none", "der"] = "none",
        classifier: Literal["head", "nme"] = "head",
        align: bool = True,
        **kwargs: Any,
    ) -> None:
        require_positive(memory_size=memory_size, per_class=per_class)
        for option, value, known in (
            ("budget_covers", budget_covers, ("exemplars", "model")), ("budget_reference", budget_reference,
            ("none", "der")), ("classifier", classifier, ("head", "nme")),
        ):  # fmt: skip
            if value not in known:
                raise ContlearnError(f"{option}: expected {' or '.join(known)}, got {value!r}")
        given = [per_class is not None, memory_budget is not None, budget_reference != "none"]
        if sum(given) > 1:
            raise ContlearnError("memory_budget, per_class and budget_reference: expected at most one, got several")
        if budget_covers == "model" and memory_budget is None:
            raise ContlearnError("budget_covers: 'model' needs a memory_budget, got none")
        whole = budget_covers == "model"
        super().__init__(memory_budget=None if whole else memory_budget, **kwargs)
        feature_extractor(self.model)
        self.model_budget = parse_bytes(memory_budget) if whole and memory_budget is not None else None
        self.budget_reference = budget_reference
        self.per_class = per_class
        self.classifier = classifier
        self.align = align
        self.storage_policy = HerdingBuffer(memory_size)
        self.classes = SeenClasses()
        self.gamma = 1.0
        self.other_outputs: dict[str, Tensor] = {}
        self._means: dict[int, Tensor] | None = None
        self._fitted = self.memory_budget is None and self.model_budget is None and budget_reference == "none"

    # ------------------------------------------------------------------ memory

    def set_memory_size(self, count: int) -> None:
        """Take ``count`` as the number of exemplars."""
        self.storage_policy.max_size = count

    def backbone_parameters(self, tasks: int) -> int:
        """Parameters of the method's backbones after ``tasks`` tasks."""
        return sum(p.numel() for p in self.model.backbone.parameters())

    def whole_backbone(self) -> int:
        """Parameters of one whole backbone."""
        return self.backbone_parameters(1)

    def fit_memory(self, experience: Any) -> int | None:
        """Turn a budget into a number of exemplars, once; ``None`` without one."""
        if self.memory_budget is not None:
            return super().fit_memory(experience)
        if self.model_budget is None and self.budget_reference == "none":
            return None
        tasks, image = tasks_of(experience), image_bytes(experience)
        own = self.backbone_parameters(tasks)
        if self.model_budget is None:
            count = self.storage_policy.max_size + memo_extra_exemplars(tasks * self.whole_backbone(), own, image)
        else:
            count = (self.model_budget - PARAMETER_BYTES * own) // image
            if count < 1:
                least = PARAMETER_BYTES * own + image
                raise ContlearnError(
                    f"memory_budget: {self.model_budget} bytes hold no exemplar beside the backbones of {tasks} tasks; "
                    f"expected at least {least} bytes ({in_words(least)})"
                )
        self.set_memory_size(count)
        self._fitted = True
        return int(count)

    def aligned_bytes(self, experience: Any) -> int:
        """Bytes by the papers' count at the end of the stream: backbones and exemplars."""
        own = PARAMETER_BYTES * self.backbone_parameters(tasks_of(experience))
        return int(own + self.storage_policy.max_size * image_bytes(experience))

    def step_memory(self) -> Memory:
        """The memory that a device keeps; it cannot herd, so that new classes are sampled at random there."""
        return Memory(self.storage_policy.max_size, "balanced", self.train_mb_size)

    # ------------------------------------------------------------------ training

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.classes.start(self.experience)
        super()._before_training_exp(**kwargs)

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Join the exemplars to the current experience."""
        assert self.experience is not None
        data: AvalancheDataset[Any] = self.experience.dataset
        if len(self.storage_policy.buffer_groups):
            data = concat_datasets([data, self.storage_policy.buffer])
        self.adapted_dataset = data.train()

    def _after_training_exp(self, **kwargs: Any) -> None:
        earlier = self.classes.earlier
        fresh = [label for label in self.classes.new if label not in earlier]
        if self.align and earlier and fresh:
            self.gamma = align_rows(self.model.head, earlier, fresh)
        self.classes.finish()
        if self.per_class is not None:
            self.set_memory_size(self.per_class * len(self.classes.earlier))
        self.storage_policy.post_adapt(self, self.experience)
        super()._after_training_exp(**kwargs)

    # ------------------------------------------------------------------ evaluation

    def _before_eval(self, **kwargs: Any) -> None:
        self._means = None  # those of the model as it is now are wanted
        super()._before_eval(**kwargs)

    def forward(self) -> Tensor:
        """Outputs ``(batch, classes)`` of the head, or while evaluating those of ``classifier``."""
        if self.is_training or not self.storage_policy.buffer_groups:
            return super().forward()
        with read_features(self.model) as read:
            logits = super().forward()
        if self._means is None:
            self._means = class_means(self.model, self.storage_policy.buffer_groups, device=self.device)
        scores = nearest_mean_scores(read[0], self._means, max(logits.shape[1], int(self.mb_y.max()) + 1))
        answers = {"head": logits, "nme": scores}
        chosen = answers.pop(self.classifier)
        self.other_outputs = answers
        return chosen

    def _eval_cleanup(self) -> None:
        super()._eval_cleanup()
        self.other_outputs, self._means = {}, None


@contextlib.contextmanager
def read_features(model: Any) -> Iterator[list[Tensor]]:
    """While open, what the head of ``model`` reads, in order of the passes."""
    read: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, arguments: read.append(arguments[0]))
    try:
        yield read
    finally:
        handle.remove()


def tasks_of(experience: Any) -> int:
    """Experiences of its stream that bring classes not seen before."""
    whole = getattr(experience, "origin_experience", experience)
    seen: set[int] = set()
    tasks = 0
    for one in whole.origin_stream:
        classes = set(classes_of(one))
        tasks += not classes <= seen
        seen |= classes
    return tasks


def image_bytes(experience: Any) -> int:
    """Bytes of one image at the size it is trained at, a byte per pixel and channel."""
    image = experience.dataset.eval()[0][0]
    return int(image.numel())
