"""Online streams: a class-incremental stream seen once, a few samples at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from contlearn.errors import ContlearnError
from contlearn.scenarios.incremental import class_incremental
from contlearn.scenarios.source import ClassOrder
from contlearn.scenarios.stream import Scenario, recorded, split_online

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData


@recorded
def online(
    dataset: str | ImageData = "digits",
    *,
    n_experiences: int = 5,
    experience_size: int = 10,
    access_task_boundaries: bool = False,
    initial_classes: int | None = None,
    class_order: ClassOrder | Sequence[int] = "natural",
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """A class-incremental stream cut into experiences of a few samples, each seen once.

    Train the strategy with ``epochs`` = passes over each small experience (1 in the literature). The test stream keeps
    the uncut experiences, and a run evaluates after the last piece of each.

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        n_experiences: number of experiences before they are cut.
        experience_size: samples per small experience.
        access_task_boundaries: let the strategy know where an uncut experience begins (the head then grows once for
            the whole of it); without, it grows whenever a new class turns up.
        initial_classes: classes in the first uncut experience.
        class_order: ``natural``, ``random`` (by ``seed``), or a list of the data set's class indices.
        seed: seeds the order of samples, the class order and the split.
        data_options: options of the data set.

    Raises:
        ContlearnError: ``experience_size`` below 1, more experiences than classes, files missing or damaged.
    """
    if experience_size < 1:
        raise ContlearnError(f"experience_size: expected at least 1 sample, got {experience_size}")
    whole = class_incremental(
        dataset,
        n_experiences=n_experiences,
        initial_classes=initial_classes,
        class_order=class_order,
        seed=seed,
        **data_options,
    )
    pieces = split_online(
        list(whole.streams["train"]),
        experience_size=experience_size,
        access_task_boundaries=access_task_boundaries,
        generator=torch.Generator().manual_seed(seed),
    )
    return Scenario(
        pieces,
        list(whole.streams["test"]),
        kind="online",
        input_shape=whole.input_shape,
        class_names=whole.class_names,
        original_classes=whole.original_classes,
    )
