"""The 15 corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261) on batches of uint8 images.

``corrupt(images, "fog", severity=3)`` makes one, ``CORRUPTIONS`` lists them in the official order, ``grid`` draws all.
Sides up to 64 pixels take the constants of CIFAR-10-C, larger ones those of ImageNet-C; below 32 (or between 65 and
224) pixels, lengths shrink with the side. Values are rounded; the official code cuts decimals off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from contlearn.errors import ContlearnError, unknown_name
from contlearn.scenarios.corruption import blur, digital, noise, weather
from contlearn.scenarios.corruption.draws import Draws
from contlearn.scenarios.corruption.sheet import grid

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corruption", "corrupt", "describe", "grid"]

SEVERITIES = (1, 2, 3, 4, 5)
_CHUNK = 2**20  # values corrupted at once: 4 MiB in float32, and a few times that for what is made on the way


@dataclass(frozen=True)
class Corruption:
    """One corruption.

    Attributes:
        name: as in the official files.
        group: noise, blur, weather or digital.
        function: from images float32 ``(n, channels, height, width)`` in 0..1, a severity and draws to the same shape.
    """

    name: str
    group: Literal["noise", "blur", "weather", "digital"]
    function: Callable[[Tensor, int, Draws], Tensor]


_RECORDS = (
    Corruption("gaussian_noise", "noise", noise.gaussian_noise),
    Corruption("shot_noise", "noise", noise.shot_noise),
    Corruption("impulse_noise", "noise", noise.impulse_noise),
    Corruption("defocus_blur", "blur", blur.defocus_blur),
    Corruption("glass_blur", "blur", blur.glass_blur),
    Corruption("motion_blur", "blur", blur.motion_blur),
    Corruption("zoom_blur", "blur", blur.zoom_blur),
    Corruption("snow", "weather", weather.snow),
    Corruption("frost", "weather", weather.frost),
    Corruption("fog", "weather", weather.fog),
    Corruption("brightness", "weather", weather.brightness),
    Corruption("contrast", "digital", digital.contrast),
    Corruption("elastic_transform", "digital", digital.elastic_transform),
    Corruption("pixelate", "digital", digital.pixelate),
    Corruption("jpeg_compression", "digital", digital.jpeg_compression),
)
CORRUPTIONS: dict[str, Corruption] = {record.name: record for record in _RECORDS}


def describe(name: str) -> Corruption:
    """The record of a corruption.

    Raises:
        ContlearnError: unknown name; the message gives the nearest.
    """
    if name not in CORRUPTIONS:
        raise unknown_name("corruption", name, CORRUPTIONS)
    return CORRUPTIONS[name]


def corrupt(
    images: Tensor,
    name: str,
    *,
    severity: int = 5,
    seed: int = 0,
    indices: Tensor | None = None,
    scale: float = 255.0,
) -> Tensor:
    """Corrupt images; the same image gets the same corruption in whatever batch it comes.

    Args:
        images: uint8 ``(n, channels, height, width)`` with 1 or 3 channels and sides of at least 8 pixels.
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: seeds the draws, together with name, severity and the image's index.
        indices: number of each image in its data set, int64 ``(n,)``; default: 0 to n - 1.
        scale: pixel value of white (16 for scikit-learn's digits).

    Returns:
        New images, same shape, type and device.

    Raises:
        ContlearnError: unknown corruption, severity outside 1..5, images of another shape or type.
    """
    function = describe(name).function
    if severity not in SEVERITIES:
        raise ContlearnError(f"severity: expected a whole number from 1 to 5, got {severity!r}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 8:
        raise ContlearnError(
            "images: expected uint8 (n, channels, height, width) with 1 or 3 channels and sides of at least 8 pixels, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    numbers = range(len(images)) if indices is None else indices.tolist()
    if len(numbers) != len(images):
        raise ContlearnError(f"indices: expected one per image, {len(images)}, got {len(numbers)}")
    # Places are computed in float64, which Apple's GPUs lack.
    device = images.device if images.device.type in ("cpu", "cuda") else torch.device("cpu")
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK // max(1, images[:1].numel()))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        draws = Draws(f"{seed}/{name}/{severity}", numbers[part], device)
        corrupted = function(images[part].to(device).float() / scale, int(severity), draws)
        out[part] = corrupted.clamp_(0, 1).mul_(scale).round_().to(torch.uint8)
    return out
