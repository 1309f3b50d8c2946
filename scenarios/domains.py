"""Domain-incremental streams: the same classes, a new input distribution in every experience."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.source import Source, load_source, order_of_appearance, relabel
from contlearn.scenarios.stream import ImageTensors, Scenario, classification_dataset, experiences_of, recorded

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData

Domains = Literal["auto", "rotation", "permutation", "instances", "sessions"]


@recorded
def domain_incremental(
    dataset: str | ImageData = "digits",
    *,
    n_experiences: int = 5,
    domains: Domains = "auto",
    max_rotation: float = 180.0,
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """Every experience holds all classes under a new input distribution.

    ``rotation``: images turned by 0 to ``max_rotation`` degrees in even steps (Rotated MNIST). ``permutation``: a fixed
    random permutation of the pixels per experience, the first one untouched (Permuted MNIST). ``instances``: the
    samples shared out at random, tested on all test data (new instances). ``sessions``: the domains the data set comes
    with (CORe50's sessions, a folder's domains). ``auto``: the data set's own domains if it has any, else ``rotation``.

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, or an ``ImageData``.
        n_experiences: number of experiences; ignored for ``sessions``, where the data set fixes it.
        domains: what changes from one experience to the next.
        max_rotation: angle of the last experience in degrees.
        seed: seeds permutations, the sharing out of instances and the split.
        data_options: options of the data set.

    Raises:
        ContlearnError: ``sessions`` for a data set without domains, fewer samples than experiences, files missing.
    """
    if n_experiences < 1:
        raise ContlearnError(f"n_experiences: expected at least 1, got {n_experiences}")
    source = load_source(dataset, seed=seed, **data_options)
    generator = torch.Generator().manual_seed(seed)
    if domains == "auto":
        domains = "sessions" if source.data.train_domains is not None else "rotation"
    if domains == "sessions":
        return _sessions(source)
    if domains == "instances":
        return _instances(source, n_experiences, generator)
    train, test = [], []
    for index in range(n_experiences):
        if domains == "rotation":
            angle = max_rotation * index / max(1, n_experiences - 1)
            train.append(rotate(source.data.train_images, angle))
            test.append(rotate(source.data.test_images, angle))
        elif domains == "permutation":
            pixels = source.data.train_images[0, 0].numel()
            order = torch.arange(pixels) if index == 0 else torch.randperm(pixels, generator=generator)
            train.append(permute_pixels(source.data.train_images, order))
            test.append(permute_pixels(source.data.test_images, order))
        else:
            raise ContlearnError(
                f"domains: expected auto, rotation, permutation, instances or sessions, got {domains!r}"
            )
    targets, test_targets = source.data.train_targets, source.data.test_targets
    return _scenario(
        source,
        train=train,
        train_targets=[targets] * n_experiences,
        test=test,
        test_targets=[test_targets] * n_experiences,
    )


def rotate(images: Tensor, angle: float) -> Tensor:
    """Images ``(n, channels, height, width)`` uint8 turned counter-clockwise by ``angle`` degrees, corners black."""
    if angle == 0:
        return images
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import rotate as turn

    chunks = [turn(chunk, angle, interpolation=InterpolationMode.BILINEAR) for chunk in images.split(4096)]
    return torch.cat(chunks)


def permute_pixels(images: Tensor, order: Tensor) -> Tensor:
    """Images with their pixels rearranged by ``order`` ``(height * width,)``, the same for every channel."""
    return images.flatten(2)[:, :, order].view_as(images)


def _instances(source: Source, n_experiences: int, generator: torch.Generator) -> Scenario:
    count = len(source.data.train_targets)
    if n_experiences > count:
        raise ContlearnError(f"n_experiences: {n_experiences} experiences asked for, but only {count} training images")
    parts = [part.sort().values for part in torch.randperm(count, generator=generator).tensor_split(n_experiences)]
    everything = torch.arange(len(source.data.test_targets))
    return _indexed(source, parts, [everything] * n_experiences)


def _sessions(source: Source) -> Scenario:
    data = source.data
    if data.train_domains is None or data.test_domains is None:
        raise ContlearnError(
            f"domains: data set {data.name!r} has no domains of its own; expected rotation, permutation or instances"
        )
    train_ids, test_ids = data.train_domains.unique().tolist(), data.test_domains.unique().tolist()
    train = [torch.nonzero(data.train_domains == d).squeeze(1) for d in train_ids]
    if set(train_ids) <= set(test_ids):
        test = [torch.nonzero(data.test_domains == d).squeeze(1) for d in train_ids]
    else:  # CORe50: whole sessions are held out, so every experience is tested on all of them
        test = [torch.arange(len(data.test_targets))] * len(train)
    return _indexed(source, train, test)


def _indexed(source: Source, train: list[Tensor], test: list[Tensor]) -> Scenario:
    """Experiences that index one shared copy of the images."""
    data = source.data
    order = order_of_appearance(data.train_targets, train)
    streams = []
    for images, targets, parts, transform in (
        (data.train_images, relabel(data.train_targets, order), train, source.train_transform),
        (data.test_images, relabel(data.test_targets, order), test, source.test_transform),
    ):
        base = classification_dataset(
            ImageTensors(images, targets),
            task_labels=torch.zeros_like(targets),
            train=transform,
            evaluation=source.test_transform,
        )
        streams.append(experiences_of(base, parts, targets=targets, tasks=[0] * len(parts)))
    return _named(source, streams, order)


def _scenario(
    source: Source, *, train: list[Tensor], train_targets: list[Tensor], test: list[Tensor], test_targets: list[Tensor]
) -> Scenario:
    """Experiences with images of their own."""
    streams = []
    for images, targets, transform in (
        (train, train_targets, source.train_transform),
        (test, test_targets, source.test_transform),
    ):
        bases = [
            classification_dataset(
                ImageTensors(one, labels),
                task_labels=torch.zeros_like(labels),
                train=transform,
                evaluation=source.test_transform,
            )
            for one, labels in zip(images, targets, strict=True)
        ]
        parts = [torch.arange(len(labels)) for labels in targets]
        streams.append(experiences_of(bases, parts, targets=targets, tasks=[0] * len(parts)))
    return _named(source, streams, range(source.data.n_classes))


def _named(source: Source, streams: list[Any], order: Sequence[int]) -> Scenario:
    return Scenario(
        streams[0],
        streams[1],
        kind="domain_incremental",
        input_shape=source.data.input_shape,
        class_names=[source.data.class_names[c] for c in order],
        original_classes=order,
    )
