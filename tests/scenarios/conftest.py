"""A made-up data set whose images are all different, so that the pixels of a sample say which one it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from contlearn.scenarios.datasets import ImageData

Rows = Callable[[ImageData, str, Any], list[int]]


@pytest.fixture
def made_up() -> Callable[..., ImageData]:
    """``made_up(classes, per_class=..., ...)``: random images, training labels in random order."""

    def make(
        classes: int = 6, *, per_class: int = 8, side: int = 6, channels: int = 1, seed: int = 0, **fields: Any
    ) -> ImageData:
        generator = torch.Generator().manual_seed(seed)

        def images(count: int) -> torch.Tensor:
            return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)

        targets = torch.arange(classes).repeat_interleave(per_class)
        return ImageData(
            name="made_up",
            train_images=images(len(targets)),
            test_images=images(3 * classes),
            train_targets=targets[torch.randperm(len(targets), generator=generator)],
            test_targets=torch.arange(classes).repeat(3),
            class_names=tuple(f"class {label}" for label in range(classes)),
            **fields,
        )

    return make


@pytest.fixture
def rows() -> Rows:
    """``rows(data, "train", dataset)``: which rows of the data set the samples of a stream's data set are, by pixels.

    Reads through Avalanche's own per-sample path under the evaluation transform; the stream must not be normalised by
    mean and standard deviation.
    """

    def find(data: ImageData, part: str, dataset: Iterable[Any]) -> list[int]:
        images = data.train_images if part == "train" else data.test_images
        table = {bytes(image.flatten().tolist()): row for row, image in enumerate(images)}
        assert len(table) == len(images), "two images are alike"
        pixels = ((image * data.scale).round().to(torch.uint8) for image, *_ in dataset.eval())
        return [table[bytes(image.flatten().tolist())] for image in pixels]

    return find


@pytest.fixture
def contents() -> Callable[[Any], list[tuple[torch.Tensor, list[int], list[int]]]]:
    """``contents(stream)``: per training and test experience, its images, labels and task labels."""

    def of(stream: Any) -> list[tuple[torch.Tensor, list[int], list[int]]]:
        return [
            (
                torch.stack([sample[0] for sample in experience.dataset.eval()]),
                list(experience.dataset.targets),
                list(experience.dataset.targets_task_labels),
            )
            for experience in [*stream.train_stream, *stream.test_stream]
        ]

    return of
