"""Streams: an Avalanche ``CLScenario`` whose images stay uint8 tensors in memory until a batch is formed."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import torch
from avalanche.benchmarks import CLScenario, DatasetExperience, EagerCLStream, OnlineCLExperience
from avalanche.benchmarks.utils import DataAttribute, TaskLabels, TransformGroups
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from torch import Tensor
from torch.utils.data import Dataset

from contlearn.errors import unknown_name
from contlearn.scenarios.source import load_source

Transform = Callable[[Tensor], Tensor]
P = ParamSpec("P")


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """The leaf every data set of a stream ends in: uint8 images ``(n, channels, height, width)``, int64 labels.

    Indexing gives one raw image and its label, so that any PyTorch loader works; batched loaders gather from
    ``images`` and ``targets`` directly.
    """

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images = images
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


class LabelList(list[int]):
    """Labels as the list Avalanche wants, with the tensor that batched loaders want beside it."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.tolist())
        self.tensor = values


def classification_dataset(
    leaf: ImageTensors, *, task_labels: Tensor, train: Transform, evaluation: Transform
) -> TaskAwareSupervisedClassificationDataset:
    """A task-aware Avalanche data set over ``leaf`` that carries ``targets`` and ``targets_task_labels``."""
    return TaskAwareSupervisedClassificationDataset(
        [leaf],
        data_attributes=[DataAttribute(LabelList(leaf.targets), "targets"), TaskLabels(LabelList(task_labels))],
        transform_groups=TransformGroups({"train": (train, None), "eval": (evaluation, None)}),
    )


class Scenario(CLScenario[EagerCLStream[DatasetExperience]]):
    """A stream of experiences with what models, metrics and checkpoints need to know about it.

    Labels are numbered in order of first appearance, so that a head can grow by appending rows;
    ``original_classes[label]`` is the data set's own class index.

    Attributes:
        train_stream, test_stream: Avalanche streams. Test experience ``j`` holds the classes (or the domain) of the
            ``j``-th training experience; in an online stream, of the ``j``-th experience before it was cut.
        kind: name of the scenario.
        input_shape: ``(channels, height, width)``.
        n_classes: number of classes over the whole stream.
        class_names, original_classes: by label.
        task_labels: whether the task id is given at test time (multi-head).
        spec: name and resolved options, for a run's ``config.yaml``.
    """

    def __init__(
        self,
        train: Sequence[DatasetExperience],
        test: Sequence[DatasetExperience],
        *,
        kind: str,
        input_shape: tuple[int, int, int],
        class_names: Sequence[str],
        original_classes: Sequence[int],
        task_labels: bool = False,
        spec: dict[str, Any] | None = None,
    ) -> None:
        super().__init__([EagerCLStream("train", train), EagerCLStream("test", test)])
        self.kind = kind
        self.input_shape = input_shape
        self.n_classes = len(class_names)
        self.class_names = tuple(class_names)
        self.original_classes = tuple(original_classes)
        self.task_labels = task_labels
        self.spec = spec or {"name": kind}

    @property
    def classes_per_experience(self) -> list[list[int]]:
        """The labels of each test experience, sorted."""
        return [sorted(experience.classes_in_this_experience) for experience in self.streams["test"]]


def _annotate(
    experiences: Iterable[DatasetExperience], *, classes: Sequence[set[int]], tasks: Sequence[list[int]]
) -> None:
    """Give experiences Avalanche's class timeline and task labels."""
    every: set[int] = set().union(*classes)
    seen: set[int] = set()
    for experience, current, labels in zip(experiences, classes, tasks, strict=True):
        experience.classes_in_this_experience = set(current)
        experience.previous_classes = set(seen)
        seen |= current
        experience.classes_seen_so_far = set(seen)
        experience.future_classes = every - seen
        experience.task_labels = labels
        if len(labels) == 1:
            experience.task_label = labels[0]


def experiences_of(
    base: TaskAwareSupervisedClassificationDataset | Sequence[TaskAwareSupervisedClassificationDataset],
    parts: Sequence[Tensor],
    *,
    targets: Tensor | Sequence[Tensor],
    tasks: Sequence[int],
) -> list[DatasetExperience]:
    """Cut data sets into experiences.

    Args:
        base: one data set that all experiences index, or one per experience (domains).
        parts: per experience, the positions ``(n,)`` int64 it takes from its base.
        targets: the labels of the base (or of each base).
        tasks: per experience, its task label.

    All experiences cut from one base share it, so that buffers made of them stay flat index lists.
    """
    experiences, classes = [], []
    for index, positions in enumerate(parts):
        source = base if isinstance(base, TaskAwareSupervisedClassificationDataset) else base[index]
        labels = targets if isinstance(targets, Tensor) else targets[index]
        experiences.append(DatasetExperience(dataset=source.subset(positions.tolist()), current_experience=index))
        classes.append(set(labels[positions].unique().tolist()))
    _annotate(experiences, classes=classes, tasks=[[task] for task in tasks])
    return experiences


def split_online(
    experiences: Sequence[DatasetExperience],
    *,
    experience_size: int,
    access_task_boundaries: bool,
    generator: torch.Generator,
) -> list[OnlineCLExperience]:
    """Cut each experience into shuffled sub-experiences of ``experience_size`` samples, seen once each."""
    pieces: list[OnlineCLExperience] = []
    classes: list[set[int]] = []
    tasks: list[list[int]] = []
    for origin in experiences:
        labels = torch.as_tensor(list(origin.dataset.targets))
        chunks = torch.randperm(len(labels), generator=generator).split(experience_size)
        for position, chunk in enumerate(chunks):
            pieces.append(
                OnlineCLExperience(
                    dataset=origin.dataset.subset(chunk.tolist()),
                    origin_experience=origin,
                    is_first_subexp=position == 0,
                    is_last_subexp=position == len(chunks) - 1,
                    sub_stream_length=len(chunks),
                    access_task_boundaries=access_task_boundaries,
                )
            )
            classes.append(set(labels[chunk].tolist()))
            tasks.append(list(origin.task_labels))
    _annotate(pieces, classes=classes, tasks=tasks)
    return pieces


def recorded(function: Callable[P, Scenario]) -> Callable[P, Scenario]:
    """Decorate a scenario function: the stream keeps the name and the resolved options it was made with in ``spec``.

    The function it makes raises ``ContlearnError`` for an option that neither the scenario nor the data set has.
    """
    signature = inspect.signature(function)
    known = {*signature.parameters, *inspect.signature(load_source).parameters} - {"data_options"}

    @functools.wraps(function)
    def scenario(*args: P.args, **kwargs: P.kwargs) -> Scenario:
        for option in kwargs:
            if option not in known:
                raise unknown_name(f"option of scenario {function.__name__!r}", option, known)
        stream = function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = dict(bound.arguments)
        options.update(options.pop("data_options", {}))
        stream.spec = {"name": function.__name__, **{key: _plain(value) for key, value in options.items()}}
        return stream

    return scenario


def _plain(value: Any) -> Any:
    """An option as YAML can hold it; objects given in Python are recorded by name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # a tensor, an array, or one of their numbers
        return value.tolist()
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__
