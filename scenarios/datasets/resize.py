"""Resizing of images that are tensors already (data sets that are not files of pictures)."""

from __future__ import annotations

import torch
from torch.nn import functional

_CHUNK = 1024


def resized(images: torch.Tensor, image_size: int | None) -> torch.Tensor:
    """Resize square uint8 images ``(n, channels, side, side)`` to ``image_size`` pixels, bilinear and antialiased.

    ``None`` or the present side returns ``images`` itself.
    """
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    out = torch.empty((*images.shape[:2], image_size, image_size), dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].float()
        scaled = functional.interpolate(chunk, size=(image_size, image_size), mode="bilinear", antialias=True)
        out[start : start + _CHUNK] = scaled.round().clamp(0, 255).to(torch.uint8)
    return out
