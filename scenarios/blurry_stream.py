"""Si-blurry streams: some classes arrive in one experience only, the others leak a share of samples everywhere."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.source import load_source, order_of_appearance, relabel
from contlearn.scenarios.stream import ImageTensors, Scenario, classification_dataset, experiences_of, recorded

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData


@recorded
def blurry(
    dataset: str | ImageData = "digits",
    *,
    n_experiences: int = 5,
    disjoint_ratio: float = 0.5,
    blurry_ratio: float = 0.1,
    stochastic: bool = True,
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """Si-blurry (arXiv 2308.09303, section 3; i-Blurry, arXiv 2110.10031, with ``stochastic=False``).

    Classes are split into a disjoint and a blurry part. Every class has a home experience. A disjoint class appears
    there only; of a blurry class, ``blurry_ratio`` of the samples is pooled over all blurry classes, shuffled and
    spread over all experiences. ``stochastic`` draws the number of classes and the share of the pool per experience at
    random, otherwise both are even. Test experience ``j`` holds the classes at home in experience ``j``.

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        n_experiences: number of experiences; each is home to at least one class.
        disjoint_ratio: share of classes that appear in one experience only (0..1).
        blurry_ratio: share of a blurry class's samples that leak into other experiences (0..1); one sample always
            stays.
        stochastic: random group sizes (Si-blurry) instead of even ones (i-Blurry).
        seed: seeds every random choice.
        data_options: options of the data set.

    Raises:
        ContlearnError: ratios outside 0..1, more experiences than classes, files missing or damaged.
    """
    for name, value in (("disjoint_ratio", disjoint_ratio), ("blurry_ratio", blurry_ratio)):
        if not 0.0 <= value <= 1.0:
            raise ContlearnError(f"{name}: expected a share in 0..1, got {value}")
    source = load_source(dataset, seed=seed, **data_options)
    n_classes = source.data.n_classes
    if not 1 <= n_experiences <= n_classes:
        raise ContlearnError(
            f"n_experiences: expected 1..{n_classes}, the number of classes of the data set, got {n_experiences}"
        )
    generator = torch.Generator().manual_seed(seed)
    home, disjoint = _homes(n_classes, n_experiences, disjoint_ratio, stochastic, generator)
    parts = _parts(source.data.train_targets, home, disjoint, n_experiences, blurry_ratio, stochastic, generator)
    order = order_of_appearance(source.data.train_targets, parts, home=home)

    train_labels, test_labels = relabel(source.data.train_targets, order), relabel(source.data.test_targets, order)
    test_home = home[source.data.test_targets]
    test_parts = [torch.nonzero(test_home == index).squeeze(1) for index in range(n_experiences)]
    streams = []
    for images, labels, cut, transform in (
        (source.data.train_images, train_labels, parts, source.train_transform),
        (source.data.test_images, test_labels, test_parts, source.test_transform),
    ):
        base = classification_dataset(
            ImageTensors(images, labels),
            task_labels=torch.zeros_like(labels),
            train=transform,
            evaluation=source.test_transform,
        )
        streams.append(experiences_of(base, cut, targets=labels, tasks=[0] * n_experiences))
    return Scenario(
        streams[0],
        streams[1],
        kind="blurry",
        input_shape=source.data.input_shape,
        class_names=[source.data.class_names[c] for c in order],
        original_classes=order,
    )


def _group_sizes(total: int, groups: int, stochastic: bool, generator: torch.Generator) -> list[int]:
    """Share ``total`` items out over ``groups``: by random cuts, or evenly."""
    if stochastic:
        cuts = torch.randint(0, total + 1, (groups - 1,), generator=generator).sort().values.tolist()
        edges = [0, *cuts, total]
        return [after - before for before, after in itertools.pairwise(edges)]
    return [total * (index + 1) // groups - total * index // groups for index in range(groups)]


def _homes(
    n_classes: int, n_experiences: int, disjoint_ratio: float, stochastic: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Home experience of each class ``(n_classes,)`` and whether it is disjoint ``(n_classes,)``."""
    shuffled = torch.randperm(n_classes, generator=generator)
    n_disjoint = round(n_classes * disjoint_ratio)
    disjoint = torch.zeros(n_classes, dtype=torch.bool)
    disjoint[shuffled[:n_disjoint]] = True
    home = torch.empty(n_classes, dtype=torch.int64)
    # One class is placed in every experience first: a test experience without classes would have no accuracy.
    first = shuffled[torch.randperm(n_classes, generator=generator)[:n_experiences]]
    home[first] = torch.randperm(n_experiences, generator=generator)
    placed = torch.zeros(n_classes, dtype=torch.bool)
    placed[first] = True
    for group in (shuffled[:n_disjoint], shuffled[n_disjoint:]):
        rest = group[~placed[group]]
        sizes = _group_sizes(len(rest), n_experiences, stochastic, generator)
        home[rest] = torch.repeat_interleave(torch.arange(n_experiences), torch.tensor(sizes))
    return home, disjoint


def _parts(
    targets: Tensor,
    home: Tensor,
    disjoint: Tensor,
    n_experiences: int,
    blurry_ratio: float,
    stochastic: bool,
    generator: torch.Generator,
) -> list[Tensor]:
    """Positions of the training samples of each experience, every sample in exactly one."""
    experience = home[targets]
    leaking: list[Tensor] = []
    for label in torch.nonzero(~disjoint).squeeze(1).tolist():
        positions = torch.nonzero(targets == label).squeeze(1)
        positions = positions[torch.randperm(len(positions), generator=generator)]
        # One sample stays at home: an experience left without any could not be trained on.
        leaking.append(positions[: min(round(len(positions) * blurry_ratio), len(positions) - 1)])
    pool = torch.cat(leaking) if leaking else torch.empty(0, dtype=torch.int64)
    pool = pool[torch.randperm(len(pool), generator=generator)]
    sizes = _group_sizes(len(pool), n_experiences, stochastic, generator)
    experience[pool] = torch.repeat_interleave(torch.arange(n_experiences), torch.tensor(sizes))
    return [torch.nonzero(experience == index).squeeze(1) for index in range(n_experiences)]
