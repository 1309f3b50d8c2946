"""Class- and task-incremental streams: every experience brings classes not seen before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contlearn.scenarios.source import ClassOrder, Source, load_source, relabel, split_classes
from contlearn.scenarios.source import class_order as ordered
from contlearn.scenarios.stream import ImageTensors, Scenario, classification_dataset, experiences_of, recorded

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData


@recorded
def class_incremental(
    dataset: str | ImageData = "digits",
    *,
    n_experiences: int = 5,
    initial_classes: int | None = None,
    class_order: ClassOrder | Sequence[int] = "natural",
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """Every experience brings new classes; no task id is given at test time.

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        n_experiences: number of experiences; classes are shared out as evenly as can be.
        initial_classes: classes in the first experience (the B50 streams of class-incremental papers).
        class_order: ``natural``, ``random`` (by ``seed``), or a list of the data set's class indices.
        seed: seeds the class order and, where the data set has no split of its own, the train/test split.
        data_options: options of the data set.

    Raises:
        ContlearnError: unknown data set, more experiences than classes, files missing or damaged.
    """
    source = load_source(dataset, seed=seed, **data_options)
    return by_classes(
        source,
        sizes=split_classes(source.data.n_classes, n_experiences, initial_classes),
        order=ordered(class_order, source.data.n_classes, torch.Generator().manual_seed(seed)),
        kind="class_incremental",
        task_labels=False,
    )


@recorded
def task_incremental(
    dataset: str | ImageData = "digits",
    *,
    n_experiences: int = 5,
    initial_classes: int | None = None,
    class_order: ClassOrder | Sequence[int] = "natural",
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """Every experience brings new classes, and its index is given as task id at training and test time (multi-head).

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        n_experiences: number of experiences; classes are shared out as evenly as can be.
        initial_classes: classes in the first experience.
        class_order: ``natural``, ``random`` (by ``seed``), or a list of the data set's class indices.
        seed: seeds the class order and, where the data set has no split of its own, the train/test split.
        data_options: options of the data set.

    Raises:
        ContlearnError: unknown data set, more experiences than classes, files missing or damaged.
    """
    source = load_source(dataset, seed=seed, **data_options)
    return by_classes(
        source,
        sizes=split_classes(source.data.n_classes, n_experiences, initial_classes),
        order=ordered(class_order, source.data.n_classes, torch.Generator().manual_seed(seed)),
        kind="task_incremental",
        task_labels=True,
    )


def by_classes(source: Source, *, sizes: Sequence[int], order: Sequence[int], kind: str, task_labels: bool) -> Scenario:
    """A stream whose experience ``i`` holds the next ``sizes[i]`` classes of ``order``."""
    task_of_label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
    tasks = list(range(len(sizes))) if task_labels else [0] * len(sizes)
    streams = []
    for images, targets, transform in (
        (source.data.train_images, source.data.train_targets, source.train_transform),
        (source.data.test_images, source.data.test_targets, source.test_transform),
    ):
        labels = relabel(targets, order)
        owner = task_of_label[labels]
        base = classification_dataset(
            ImageTensors(images, labels),
            task_labels=owner if task_labels else torch.zeros_like(owner),
            train=transform,
            evaluation=source.test_transform,
        )
        parts: list[Tensor] = [torch.nonzero(owner == index).squeeze(1) for index in range(len(sizes))]
        streams.append(experiences_of(base, parts, targets=labels, tasks=tasks))
    return Scenario(
        streams[0],
        streams[1],
        kind=kind,
        input_shape=source.data.input_shape,
        class_names=[source.data.class_names[c] for c in order],
        original_classes=order,
        task_labels=task_labels,
    )
