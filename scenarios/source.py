"""From a data set's name to what every scenario starts with: images, relabelled targets and transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios import datasets
from contlearn.scenarios.transforms import Augmentation, BatchTransform, Normalise, augmentation

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData

ClassOrder = Literal["natural", "random"]


@dataclass(frozen=True)
class Source:
    """A loaded data set with its batch transforms for training and evaluation."""

    data: ImageData
    train_transform: BatchTransform
    test_transform: BatchTransform


def load_source(
    dataset: str | ImageData,
    *,
    seed: int = 0,
    augment: Augmentation = "none",
    transform: Callable[[Tensor], Tensor] | None = None,
    normalise: bool = True,
    image_size: int | None = None,
    test_share: float = 0.2,
    root: str | None = None,
    download: bool = False,
) -> Source:
    """Load a data set and make its transforms.

    Args:
        dataset: a data set's name (``contlearn list datasets``), ``folder:PATH`` for your own images, or an
            ``ImageData``.
        seed: seeds the train/test split of data sets that have none of their own, and every random choice of the
            scenario.
        augment: augmentation of training batches, drawn per image.
        transform: a torchvision v2 transform for training images (uint8, one image at a time), after ``augment``;
            Python only.
        normalise: subtract the data set's mean and divide by its standard deviation, where it has them.
        image_size: side in pixels to resize images to; default: the data set's own.
        test_share: share of each class that goes to the test set, where the data set has no split of its own.
        root: folder that holds data sets on disk; default: the environment variable CONTLEARN_DATA.
        download: let the library that owns the data set fetch it.

    Raises:
        ContlearnError: unknown data set or augmentation, files missing or damaged.
    """
    if isinstance(dataset, str):
        data = datasets.load(
            dataset, root=root, image_size=image_size, seed=seed, test_share=test_share, download=download
        )
    else:
        data = dataset
    pixels = Normalise(data.scale, data.mean, data.std) if normalise else Normalise(data.scale)
    steps = augmentation(augment, (data.input_shape[1], data.input_shape[2]))
    if transform is not None:
        from contlearn.scenarios.transforms import PerSample

        steps.append(PerSample(transform))
    return Source(data, BatchTransform(*steps, pixels), BatchTransform(pixels))


def class_order(order: ClassOrder | Sequence[int], n_classes: int, generator: torch.Generator) -> list[int]:
    """The data set's classes in order of appearance.

    Raises:
        ContlearnError: an explicit order that is not a permutation of ``0..n_classes-1``.
    """
    if isinstance(order, str):
        if order == "natural":
            return list(range(n_classes))
        if order == "random":
            return torch.randperm(n_classes, generator=generator).tolist()
        raise ContlearnError(f"class_order: expected natural, random or a list of class indices, got {order!r}")
    given = [int(c) for c in order]
    if sorted(given) != list(range(n_classes)):
        raise ContlearnError(f"class_order: expected each class 0..{n_classes - 1} exactly once, got {given}")
    return given


def split_classes(n_classes: int, n_experiences: int, initial_classes: int | None = None) -> list[int]:
    """Number of classes per experience: as even as can be, the first experiences take what is left over.

    Args:
        initial_classes: size of the first experience (B50-style streams); the rest is split evenly.

    Raises:
        ContlearnError: more experiences than classes, or counts that cannot be met.
    """
    if n_experiences < 1:
        raise ContlearnError(f"n_experiences: expected at least 1, got {n_experiences}")
    if n_experiences > n_classes:
        raise ContlearnError(
            f"n_experiences: {n_experiences} experiences asked for, but the data set has {n_classes} classes; "
            f"expected at most {n_classes}"
        )
    if initial_classes is None:
        base, extra = divmod(n_classes, n_experiences)
        return [base + (index < extra) for index in range(n_experiences)]
    rest = n_classes - initial_classes
    least, most = (1 if n_experiences > 1 else n_classes), n_classes - n_experiences + 1
    if not least <= initial_classes <= most:
        raise ContlearnError(
            f"initial_classes: expected {least}..{most} with {n_experiences} experiences over {n_classes} classes, "
            f"got {initial_classes}"
        )
    return [initial_classes, *(split_classes(rest, n_experiences - 1) if n_experiences > 1 else [])]


def relabel(targets: Tensor, order: Sequence[int]) -> Tensor:
    """Targets as positions in ``order``: the class that appears first becomes label 0."""
    table = torch.empty(len(order), dtype=torch.int64)
    table[torch.tensor(order)] = torch.arange(len(order))
    return table[targets]


def order_of_appearance(targets: Tensor, parts: Sequence[Tensor], *, home: Tensor | None = None) -> list[int]:
    """Classes in order of the first experience that holds one of their samples.

    Args:
        targets: class of each sample ``(n,)``.
        parts: per experience, positions of its samples.
        home: home experience of each class ``(n_classes,)``: within an experience, classes at home there come first.

    Returns:
        Every class that occurs, once; within an experience by class index.
    """
    order: list[int] = []
    for index, positions in enumerate(parts):
        new = [c for c in targets[positions].unique().tolist() if c not in order]
        order += sorted(new, key=lambda c: home is not None and int(home[c]) != index)
    return order
