"""Augmented views of whole batches for contrastive methods: crop, mirror, colour jitter, grayscale; drawn per image.

The recipe of PRD (arXiv 2303.14771) and its kin (SimCLR, arXiv 2002.05709, appendix A, without blur and hue). It acts
on images as the network sees them (normalised, on the device), so whatever loader served them does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.transforms import RandomCrop, RandomFlip, drawn

JITTER = 0.4
"""Factors of brightness, contrast and saturation are drawn from 1 - JITTER to 1 + JITTER."""


def check_views(views: int, crop: int | None, jitter: float, grayscale: float) -> None:
    """Check the options of :class:`Views`.

    Raises:
        ContlearnError: one that is out of range.
    """
    if views < 1:
        raise ContlearnError(f"views: expected at least 1, got {views}")
    if crop is not None and crop < 0:
        raise ContlearnError(f"crop: expected at least 0 pixels, got {crop}")
    for name, value in (("jitter", jitter), ("grayscale", grayscale)):
        if not 0 <= value <= 1:
            raise ContlearnError(f"{name}: expected a probability from 0 to 1, got {value}")


class Views:
    """So many augmented views of every image of a batch.

    Args:
        views: how many.
        crop: pixels of padding with black that a crop of the original size moves over; ``None``: an eighth of the
            shorter side (4 of 32).
        flip: mirror half of the images.
        jitter: probability that an image's brightness, contrast and saturation change; three channels only.
        grayscale: probability that an image loses its colour; three channels only.
        generator: source of every draw.

    Attributes:
        black, white: values per channel of the darkest and the brightest pixel there can be.

    Raises:
        ContlearnError: a value out of range.
    """

    def __init__(
        self, views: int = 2, *, generator: torch.Generator, crop: int | None = None, flip: bool = True,
        jitter: float = 0.8, grayscale: float = 0.2,
    ) -> None:  # fmt: skip
        check_views(views, crop, jitter, grayscale)
        self.views = views
        self.crop = crop
        self.flip = flip
        self.jitter = jitter
        self.grayscale = grayscale
        self.generator = generator
        self.black: tuple[float, ...] = (0.0,)
        self.white: tuple[float, ...] = (1.0,)

    def __call__(self, images: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(views * batch, ...)``: all first views, then all second ones."""
        images = images.repeat(self.views, 1, 1, 1)
        for step in self._steps(images):
            images = step(images)
        return images

    def _steps(self, images: Tensor) -> list[Callable[[Tensor], Tensor]]:
        _, channels, height, width = images.shape
        padding = min(height, width) // 8 if self.crop is None else self.crop
        steps: list[Callable[[Tensor], Tensor]] = []
        if padding:
            steps.append(RandomCrop(padding, fill=self.black, generator=self.generator))
        if self.flip:
            steps.append(RandomFlip(self.generator))
        if channels == 3 and (self.jitter or self.grayscale):
            steps.append(self._coloured)
        return steps

    def _coloured(self, images: Tensor) -> Tensor:
        black, white = _per_channel(self.black, images), _per_channel(self.white, images)
        pixels = (images - black) / (white - black)
        if self.jitter:
            changed = drawn(len(images), images, self.generator) < self.jitter
            factors = 1 + JITTER * (2 * drawn(3 * len(images), images, self.generator).view(3, -1, 1, 1, 1) - 1)
            # One order of the three for the batch; factors are each image's own.
            order = torch.randperm(3, generator=self.generator, device=self.generator.device).tolist()
            pixels = torch.where(_each(changed), jittered(pixels, factors, order), pixels)
        if self.grayscale:
            without = drawn(len(images), images, self.generator) < self.grayscale
            pixels = torch.where(_each(without), _luma(pixels).expand_as(pixels), pixels)
        return pixels * (white - black) + black


def jittered(pixels: Tensor, factors: Tensor, order: Sequence[int] = (0, 1, 2)) -> Tensor:
    """Brightness (0), contrast (1) and saturation (2) scaled in this order, as torchvision defines each.

    Args:
        pixels: ``(batch, 3, height, width)`` from 0 to 1.
        factors: ``(3, batch, 1, 1, 1)``: of the three, for each image.
        order: a permutation of 0, 1, 2.
    """
    for which in order:
        if which == 0:
            other = torch.zeros_like(pixels)
        elif which == 1:
            other = _luma(pixels).mean((1, 2, 3), keepdim=True)
        else:
            other = _luma(pixels)
        pixels = torch.lerp(other, pixels, factors[which]).clamp(0, 1)
    return pixels


def _luma(pixels: Tensor) -> Tensor:
    from torchvision.transforms.v2 import functional

    gray: Tensor = functional.rgb_to_grayscale(pixels, num_output_channels=1)
    return gray


def _each(chosen: Tensor) -> Tensor:
    return chosen.view(-1, 1, 1, 1)


def _per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
