"""Streams that ask whether a network can still learn: the same images under new labels, or under new permutations.

Label resets measure plasticity alone (arXiv 2303.01486, 2407.01800): nothing of the past helps or is tested,
only how well the labels of the current experience are learned. All classes are there from the first experience on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.utils import DataAttribute, TaskLabels, TransformGroups
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.source import Source, load_source
from contlearn.scenarios.stream import ImageTensors, LabelList, Scenario, Transform, _annotate, recorded

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData


@recorded
def label_reshuffle(
    dataset: str | ImageData = "digits",
    *,
    n_experiences: int = 50,
    samples: int | None = None,
    labels: Literal["random", "permuted"] = "random",
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """The same images in every experience, with new labels in each.

    ``random``: every image gets a label of its own, drawn evenly; nothing but memorising helps, and test experience
    ``i`` is the training images with the labels of experience ``i``: its accuracy right after training is the measure
    of plasticity. ``permuted``: the classes change places, on the training and the test data alike.

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        n_experiences: number of experiences.
        samples: training images used, drawn at random; default: all.
        labels: ``random`` labels per image, or classes ``permuted``.
        seed: seeds the labels, the choice of images and the split.
        data_options: options of the data set.

    Raises:
        ContlearnError: a value out of range, more samples than images, files missing.
    """
    _at_least_one("n_experiences", n_experiences)
    if labels not in ("random", "permuted"):
        raise ContlearnError(f"labels: expected random or permuted, got {labels!r}")
    source = load_source(dataset, seed=seed, **data_options)
    data = source.data
    generator = torch.Generator().manual_seed(seed)
    images, targets = _chosen(data, samples, generator)
    train, test = [], []
    for _ in range(n_experiences):
        if labels == "random":
            drawn = torch.randint(data.n_classes, (len(targets),), generator=generator)
            leaf, listed = ImageTensors(images, drawn), LabelList(drawn)
            tested, test_list = leaf, listed
        else:
            order = torch.randperm(data.n_classes, generator=generator)
            leaf = ImageTensors(images, order[targets])
            tested = ImageTensors(data.test_images, order[data.test_targets])
            listed, test_list = LabelList(leaf.targets), LabelList(tested.targets)
        train.append(_dataset(leaf, listed, source.train_transform, source.test_transform))
        test.append(_dataset(tested, test_list, source.test_transform, source.test_transform))
    return _scenario("label_reshuffle", source, train, test)


@recorded
def input_permutation(
    dataset: str | ImageData = "digits",
    *,
    n_experiences: int = 10,
    samples: int | None = None,
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """All classes in every experience, each under its own fixed permutation of the pixels, the first one included.

    The images are kept once, however many experiences there are: pixels are rearranged when a batch is formed, before
    augmentation. (``domain_incremental`` with ``permutation`` leaves the first experience as it is and copies.)

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        n_experiences: number of experiences.
        samples: training images used, drawn at random; default: all.
        seed: seeds the permutations, the choice of images and the split.
        data_options: options of the data set.

    Raises:
        ContlearnError: a value out of range, more samples than images, files missing.
    """
    _at_least_one("n_experiences", n_experiences)
    source = load_source(dataset, seed=seed, **data_options)
    data = source.data
    generator = torch.Generator().manual_seed(seed)
    images, targets = _chosen(data, samples, generator)
    train: list[TaskAwareSupervisedClassificationDataset] = []
    test: list[TaskAwareSupervisedClassificationDataset] = []
    labels = LabelList(targets), LabelList(data.test_targets)
    for _ in range(n_experiences):
        order = torch.randperm(images[0, 0].numel(), generator=generator)
        for kept, transform, whole, listed in (
            (train, source.train_transform, images, labels[0]),
            (test, source.test_transform, data.test_images, labels[1]),
        ):
            # The loader and the account ask of a leaf's images what PermutedImages can answer.
            lazy = cast(Tensor, PermutedImages(whole, order))
            kept.append(_dataset(ImageTensors(lazy, listed.tensor), listed, transform, source.test_transform))
    return _scenario("input_permutation", source, train, test)


class PermutedImages:
    """Images ``(n, channels, height, width)`` whose pixels are rearranged when they are taken out.

    Args:
        images: the images, shared and never copied.
        order: permutation of the pixels ``(height * width,)``, the same for every channel.
    """

    def __init__(self, images: Tensor, order: Tensor) -> None:
        self.images = images
        self.order = order
        self.shape = images.shape
        self.dtype = images.dtype

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Tensor | slice) -> Tensor:
        taken = self.images[index]
        return taken.flatten(-2)[..., self.order].view_as(taken)

    def new_empty(self, size: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor of the same kind."""
        return self.images.new_empty(size)

    def element_size(self) -> int:
        """Bytes of a pixel."""
        return self.images.element_size()


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ContlearnError(f"{name}: expected at least 1, got {value}")


def _chosen(data: ImageData, samples: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training images and targets, or ``samples`` of them in their order."""
    if samples is None:
        return data.train_images, data.train_targets
    _at_least_one("samples", samples)
    count = len(data.train_targets)
    if samples > count:
        raise ContlearnError(f"samples: expected at most the {count} training images, got {samples}")
    rows = torch.randperm(count, generator=generator)[:samples].sort().values
    return data.train_images[rows], data.train_targets[rows]


def _dataset(
    leaf: ImageTensors, labels: LabelList, train: Transform, evaluation: Transform
) -> TaskAwareSupervisedClassificationDataset:
    """A data set over ``leaf`` with task label 0; not a subset: hundreds of these would be hundreds of index lists."""
    return TaskAwareSupervisedClassificationDataset(
        [leaf],
        data_attributes=[DataAttribute(labels, "targets"), TaskLabels(ConstantSequence(0, len(leaf)))],
        transform_groups=TransformGroups({"train": (train, None), "eval": (evaluation, None)}),
    )


def _scenario(
    kind: str,
    source: Source,
    train: list[TaskAwareSupervisedClassificationDataset],
    test: list[TaskAwareSupervisedClassificationDataset],
) -> Scenario:
    data = source.data
    classes = set(range(data.n_classes))
    streams = []
    for datasets in (train, test):
        experiences = [DatasetExperience(dataset=one, current_experience=i) for i, one in enumerate(datasets)]
        # All classes belong to every experience, also one that a small random draw leaves out.
        _annotate(experiences, classes=[classes] * len(datasets), tasks=[[0] for _ in datasets])
        streams.append(experiences)
    return Scenario(
        streams[0],
        streams[1],
        kind=kind,
        input_shape=data.input_shape,
        class_names=data.class_names,
        original_classes=range(data.n_classes),
    )
