"""Networks that grow by a part per task: shared layers, one specialised part a task, a head over all their features.

MEMO (arXiv 2205.13218) and DER (arXiv 2103.16788), whose specialised part is the whole backbone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.models.dynamic_modules import DynamicModule
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import GrowingHead
from contlearn.models._task_head import TaskHead


class ExpandableBackbone(DynamicModule):
    """``general`` layers, then every part of ``specialised`` on what they give; features (batch, d * tasks).

    A task is an experience that brings classes not seen before: in training mode it appends a copy of the last part
    and freezes those before it, so that resumed runs and exported models grow in the same way. What is frozen stays in
    evaluation mode whatever ``train()`` says: weights and BatchNorm statistics keep their bits.

    Args:
        general: maps images to what the parts read; an empty ``Sequential`` where the parts are whole backbones.
        part: maps that to (batch, d).
        part_features: d.
        train_base: ``general`` trains on after the first task, and stays in training mode.

    Attributes:
        old: classes of earlier tasks.
        new: classes of the task that trains now, or trained last.
    """

    def __init__(self, general: nn.Module, part: nn.Module, *, part_features: int, train_base: bool) -> None:
        super().__init__()
        self.general = general
        self.specialised = nn.ModuleList([part])
        self.part_features = part_features
        self.train_base = train_base
        self.old: list[int] = []
        self.new: list[int] = []

    @property
    def feature_dim(self) -> int:
        """Number of features: d times the parts there are."""
        return self.part_features * len(self.specialised)

    @property
    def sizes(self) -> tuple[int, int]:
        """Parameters of the general layers and of one specialised part."""
        general, part = (sum(p.numel() for p in m.parameters()) for m in (self.general, self.specialised[0]))
        return general, part

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, d * tasks) of images (batch, channels, height, width), the newest part's last."""
        shared = self.general(x)
        return torch.cat([part(shared) for part in self.specialised], dim=1)

    def train(self, mode: bool = True) -> ExpandableBackbone:
        """Training mode, but for what is frozen."""
        super().train(mode)
        if len(self.specialised) > 1:
            for part in [*self.specialised[:-1], *([] if self.train_base else [self.general])]:
                part.eval()
        return self

    def adaptation(self, experience: Any) -> None:
        """Begin a task where ``experience`` brings new classes, in training mode only."""
        if self.training:
            self.begin(classes_of(experience))

    def begin(self, classes: Iterable[int]) -> None:
        """Begin a task with those of ``classes`` that were not seen before; none of them: nothing happens."""
        fresh = sorted({int(label) for label in classes} - {*self.old, *self.new})
        if not fresh:
            return
        if self.new:
            self.append_part()
        self.old, self.new = sorted([*self.old, *self.new]), fresh

    def append_part(self) -> None:
        """Append a copy of the last part and freeze what was there."""
        last = self.specialised[-1]
        added = _copied(last)
        for module in [last] if self.train_base else [last, self.general]:
            module.requires_grad_(False)
            for parameter in module.parameters():
                parameter.grad = None
        self.specialised.append(added)
        self.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}specialised."
        stored = {int(key.removeprefix(start).split(".")[0]) for key in state_dict if key.startswith(start)}
        while len(self.specialised) < len(stored):
            self.append_part()
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Widening(GrowingHead):
    """A growing head that follows an :class:`ExpandableBackbone`: columns come with its parts."""

    def follow(self, backbone: ExpandableBackbone) -> None:
        """Take the number of columns from ``backbone`` from now on."""
        self.__dict__["_followed"] = backbone  # not by assignment: it would become a submodule

    def adaptation(self, experience: Any) -> None:
        """Widen for a new task, then grow to the highest label."""
        if self.training:
            self.widen(1 + max((int(label) for label in classes_of(experience)), default=-1))
        super().adaptation(experience)

    @torch.no_grad()
    def widen(self, rows: int = 0) -> None:
        """A new layer where the backbone has more features; what the old one knew of earlier classes is copied.

        Rows of earlier classes keep their columns and bias and get random ones for the new features, as released; rows
        of new classes are random as a whole, even where a higher label had made them exist.
        """
        backbone: ExpandableBackbone = self._followed
        if self.in_features == backbone.feature_dim:
            return
        wide, offset = _fresh(max(rows, self.out_features), backbone.feature_dim)
        known = torch.tensor([label for label in backbone.old if label < self.out_features], dtype=torch.int64)
        wide[known, : self.in_features] = self.weight[known].to(wide)
        offset[known] = self.bias[known].to(offset)
        self.in_features = backbone.feature_dim
        self.weight, self.bias = _like(self.weight, wide), _like(self.bias, offset)
        if "task_classes" in self._buffers:
            self._reserve(self.task_classes.shape[0], self.out_features)  # type: ignore[operator]

    @torch.no_grad()
    def grow(self, out_features: int) -> None:
        """Append rows, initialised as the rest."""
        before = self.out_features
        super().grow(out_features)
        if self.out_features > before:
            weight, bias = _fresh(self.out_features - before, self.in_features)
            self.weight[before:] = weight.to(self.weight)
            self.bias[before:] = bias.to(self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}weight")
        if stored is not None and stored.ndim == 2 and stored.shape[1] != self.in_features:
            self.in_features = stored.shape[1]
            self.weight = _like(self.weight, torch.zeros(self.out_features, self.in_features))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ExpandableHead(_Widening):
    """Linear(d * tasks -> classes)."""


class ExpandableTaskHead(_Widening, TaskHead):
    """The same where the task id is given at test time."""


class AuxiliaryHead(DynamicModule):
    """Linear(d -> new classes + 1) on the newest part: which new class, or (output 0) an old one; none in task 1.

    It is made anew at the start of every task.
    """

    def __init__(self, backbone: ExpandableBackbone) -> None:
        super().__init__()
        self.__dict__["_followed"] = backbone
        self.classes: list[int] = []
        self.weight = nn.Parameter(torch.empty(0, backbone.part_features))
        self.bias = nn.Parameter(torch.empty(0))

    def adaptation(self, experience: Any) -> None:
        """A new layer for a new task, in training mode only."""
        if self.training:
            self.renew()

    def renew(self) -> None:
        """A new layer where the backbone's task is another one than this layer's."""
        backbone: ExpandableBackbone = self._followed
        if not backbone.old or self.classes == backbone.new:
            return
        self.classes = list(backbone.new)
        weight, bias = _fresh(len(self.classes) + 1, backbone.part_features)
        self.weight, self.bias = _like(self.weight, weight), _like(self.bias, bias)

    def targets(self, labels: Tensor) -> Tensor:
        """0 for every label of an old class, else 1 + its place among the new ones: (batch,) of (batch,)."""
        classes = torch.tensor(self.classes, device=labels.device)
        places = torch.arange(1, len(self.classes) + 1, device=labels.device)
        return ((labels[:, None] == classes) * places).sum(1)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (batch, new classes + 1) of all features (batch, d * tasks); the newest part's are read."""
        return F.linear(features[:, -self.weight.shape[1] :], self.weight, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(f"{prefix}weight")
        if stored is not None and stored.shape != self.weight.shape:
            self.weight = _like(self.weight, torch.zeros(stored.shape))
            self.bias = _like(self.bias, torch.zeros(stored.shape[0]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def expand(model: Any, general: nn.Module, part: nn.Module, *, train_base: bool) -> ExpandableBackbone:
    """Give ``model`` (a ``Classifier``) a backbone that grows and the heads that follow it, in place.

    Args:
        model: its head keeps the rows it has.
        general: see :class:`ExpandableBackbone`.
        part: likewise.
        train_base: likewise.

    Raises:
        ContlearnError: a head that is neither contlearn's nor one linear layer.
    """
    head: Any = model.head
    if not isinstance(head, GrowingHead | nn.Linear):
        raise ContlearnError(f"head: expected one of contlearn.models or a linear layer, got {type(head).__name__}")
    backbone = ExpandableBackbone(general, part, part_features=head.in_features, train_base=train_base)
    made: Any = (ExpandableTaskHead if isinstance(head, TaskHead) else ExpandableHead)(head.in_features)
    made.weight = head.weight
    made.bias = head.bias if head.bias is not None else nn.Parameter(head.weight.detach().new_zeros(head.out_features))
    if isinstance(head, TaskHead):
        made.task_classes = head.task_classes
    made.follow(backbone)
    model.backbone, model.head = backbone, made
    model.aux = AuxiliaryHead(backbone)
    return backbone


def classes_of(experience: Any) -> list[int]:
    """The labels of an experience; of a piece of one where pieces are told apart, those of the whole."""
    if isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries:
        experience = experience.origin_experience
    return [int(label) for label in experience.classes_in_this_experience]


def _fresh(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight and bias as released: Kaiming-uniform with the gain of a linear layer, and zeros."""
    bound = math.sqrt(3 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound), torch.zeros(rows)


def _like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(old), requires_grad=old.requires_grad)


def _copied(part: nn.Module) -> nn.Module:
    """A copy with weights, buffers and flags of its own; other objects that its modules share stay shared."""
    shared: dict[int, Any] = {}
    for module in part.modules():
        for name, value in vars(module).items():
            if name not in _MODULE_INTERNALS and hasattr(value, "__dict__") and not isinstance(value, Tensor):
                shared[id(value)] = value
    return copy.deepcopy(part, shared)


_MODULE_INTERNALS = frozenset(vars(nn.Module()))
