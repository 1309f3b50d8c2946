"""Transfer learning: one experience that holds all classes of a data set, or of a few of its images."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.incremental import by_classes
from contlearn.scenarios.source import load_source
from contlearn.scenarios.stream import Scenario, recorded

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData


@recorded
def transfer(
    dataset: str | ImageData = "digits",
    *,
    samples: int | None = None,
    test_samples: int | None = None,
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """One experience with all classes: fine-tuning of a network that was trained elsewhere.

    Its metrics are the accuracies; what compares experiences (forgetting, transfer) stays undefined. A growing head
    gains all its outputs at the start, in the order of the data set's classes.

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        samples: training images used, drawn at random and as evenly over the classes as they allow; default: all.
        test_samples: the same for test images.
        seed: seeds the draws and, where the data set has no split of its own, the train/test split.
        data_options: options of the data set.

    Raises:
        ContlearnError: unknown data set, fewer samples than classes or more than images, files missing or damaged.
    """
    source = load_source(dataset, seed=seed, **data_options)
    data = source.data
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {}
    for part, name, count in (("train", "samples", samples), ("test", "test_samples", test_samples)):
        if count is not None:
            rows = evenly(getattr(data, f"{part}_targets"), count, generator, name=name)
            for kind in ("images", "targets", "domains"):
                whole = getattr(data, f"{part}_{kind}")
                if whole is not None:
                    fields[f"{part}_{kind}"] = whole[rows]
    source = replace(source, data=replace(data, **fields))
    return by_classes(
        source, sizes=[data.n_classes], order=range(data.n_classes), kind="transfer", task_labels=False
    )


def evenly(targets: Tensor, count: int, generator: torch.Generator, *, name: str) -> Tensor:
    """Rows ``(count,)`` of ``targets`` in ascending order, drawn so that class sizes differ as little as can be.

    Args:
        targets: class of each image ``(n,)``.
        count: rows to draw, at least one of each class that occurs.
        generator: source of the draw.
        name: what errors call ``count``.

    Raises:
        ContlearnError: ``count`` out of range.
    """
    classes = len(targets.unique())
    if not classes <= count <= len(targets):
        raise ContlearnError(
            f"{name}: expected {classes} (the number of classes) to {len(targets)} (that of images), got {count}"
        )
    shuffled = torch.randperm(len(targets), generator=generator)
    ordered = shuffled[targets[shuffled].argsort(stable=True)]
    sizes = targets.unique(return_counts=True)[1]
    # Every class gives its first image, then every class its second, and so on.
    turn = torch.cat([torch.arange(int(size)) for size in sizes])
    return ordered[turn.argsort(stable=True)[:count]].sort().values
