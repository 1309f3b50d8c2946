"""Transforms that act on whole batches of uint8 images; every random choice is made per sample.

torchvision's v2 transforms draw one set of parameters per call, so a batch would share one crop. The two cheap
augmentations are therefore vectorised here, and any other v2 transform is applied sample by sample (``PerSample``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from contlearn.errors import unknown_name

Augmentation = Literal["none", "flip", "crop_flip", "cifar", "imagenet"]
AUGMENTATIONS: tuple[str, ...] = ("none", "flip", "crop_flip", "cifar", "imagenet")


class Normalise:
    """uint8 pixels to float32: ``(x / scale - mean) / std``.

    Args:
        scale: pixel value that maps to 1.0 (255 for ordinary images, 16 for scikit-learn's digits).
        mean: per-channel mean of ``x / scale``; ``None`` leaves values in [0, 1].
        std: per-channel standard deviation of ``x / scale``.
    """

    def __init__(
        self, scale: float = 255.0, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        self.scale = float(scale)
        self.mean = tuple(mean) if mean is not None else None
        self.std = tuple(std) if std is not None else None
        self._offset: Tensor | None = None
        self._divisor: Tensor | None = None
        if self.mean is not None and self.std is not None:
            self._offset = torch.tensor(self.mean).view(-1, 1, 1) * self.scale
            self._divisor = torch.tensor(self.std).view(-1, 1, 1) * self.scale

    def __call__(self, images: Tensor) -> Tensor:
        """Shape in and out ``(..., channels, height, width)``; uint8 in, float32 out."""
        if self._offset is None or self._divisor is None:
            return images.div(self.scale)
        if self._offset.device != images.device:
            self._offset, self._divisor = self._offset.to(images.device), self._divisor.to(images.device)
        return images.sub(self._offset).div_(self._divisor)


class RandomFlip:
    """Mirror each image left-right with probability 1/2.

    Args:
        generator: source of the draws; default: the global one of the images' device.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        mirrored = drawn(len(images), images, self.generator) < 0.5
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


class RandomCrop:
    """Pad each image by ``padding`` pixels and cut its original size out at a random place.

    Args:
        padding: pixels on each side.
        fill: value of the padding, per channel; one value serves all.
        generator: source of the draws; default: the global one of the images' device.
    """

    def __init__(
        self, padding: int = 4, *, fill: Sequence[float] = (0.0,), generator: torch.Generator | None = None
    ) -> None:
        self.padding = padding
        self.fill = tuple(fill)
        self.generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        pad, device = self.padding, images.device
        place = device if self.generator is None else self.generator.device
        top, left = (
            torch.randint(0, 2 * pad + 1, (count, 1), generator=self.generator, device=place).to(device).squeeze(1)
            for _ in range(2)
        )
        fill = torch.tensor(self.fill, dtype=images.dtype, device=device).view(1, -1, 1, 1)
        padded = fill.expand(count, channels, height + 2 * pad, width + 2 * pad).contiguous()
        padded[:, :, pad : pad + height, pad : pad + width] = images
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(count, device=device), :, top, left]


def drawn(count: int, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """``count`` numbers from 0 to 1 on the images' device, drawn where the generator is."""
    place = images.device if generator is None else generator.device
    return torch.rand(count, generator=generator, device=place).to(images.device)


class PerSample:
    """Apply a torchvision v2 transform (or any callable) to each image of a batch with its own random draw."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


class BatchTransform:
    """A chain that takes one image ``(channels, height, width)`` or a batch ``(batch, channels, height, width)``.

    The single-image form keeps Avalanche's own per-sample loaders working on our streams.
    """

    batched = True

    def __init__(self, *steps: Callable[[Tensor], Tensor]) -> None:
        self.steps = steps

    def __call__(self, images: Tensor) -> Tensor:
        single = images.dim() == 3
        if single:
            images = images.unsqueeze(0)
        for step in self.steps:
            images = step(images)
        return images.squeeze(0) if single else images


def augmentation(name: str, image_size: tuple[int, int]) -> list[Callable[[Tensor], Tensor]]:
    """The steps of a named augmentation, applied to uint8 images before normalisation.

    ``flip``: mirror. ``crop_flip``: pad 4, crop, mirror. ``cifar``: ``crop_flip`` and brightness jitter 63/255, the
    recipe of class-incremental papers on CIFAR. ``imagenet``: random resized crop and mirror.

    Raises:
        ContlearnError: unknown name.
    """
    if name == "none":
        return []
    if name == "flip":
        return [RandomFlip()]
    if name == "crop_flip":
        return [RandomCrop(4), RandomFlip()]
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    from torchvision.transforms import v2

    if name == "cifar":
        return [RandomCrop(4), RandomFlip(), PerSample(v2.ColorJitter(brightness=63 / 255))]
    return [PerSample(v2.RandomResizedCrop(image_size, antialias=True)), RandomFlip()]
