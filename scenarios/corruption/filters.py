"""Filters and resampling that treat every image alike, whatever the batch it comes in.

A convolution may sum in another order for another batch size, and one flipped bit can move a pixel by one. Here a sum
over a kernel is written out as shifted copies, and matrix products are taken image by image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

SMALL_SIDE = 64  # up to here the constants of CIFAR-10-C hold, above those of ImageNet-C
REFERENCE = {True: 32, False: 224}  # the side in pixels that the constants were made for

Edge = Literal["nearest", "reflect", "mirror"]
C = TypeVar("C")


def side(x: Tensor) -> int:
    """The shorter side of images ``(..., height, width)`` in pixels."""
    return min(x.shape[-2], x.shape[-1])


def constants(x: Tensor, severity: int, *, small: Sequence[C], large: Sequence[C]) -> C:
    """The official constant of a severity (1..5) for images of this size."""
    return (small if side(x) <= SMALL_SIDE else large)[severity - 1]


def reach(x: Tensor) -> float:
    """What lengths in pixels are multiplied by, 0..1: images smaller than the official ones get shorter blurs."""
    return min(1.0, side(x) / REFERENCE[side(x) <= SMALL_SIDE])


def smooth(x: Tensor, sigma: float, *, edge: Edge = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian filter of ``(n, channels, height, width)``; ``sigma`` in pixels, cut at ``truncate`` sigmas.

    ``edge`` is ``nearest`` or ``reflect``, as in :func:`sampled`.

    torchvision's mirrors the edge and cannot reach further than the image; the official code repeats it (``nearest``).
    """
    height, width = x.shape[-2:]
    rows = _smoothing_matrix(height, sigma, truncate, edge).to(x.device)
    columns = _smoothing_matrix(width, sigma, truncate, edge).to(x.device)
    return torch.stack([rows @ image.double() @ columns.T for image in x]).to(x.dtype)


@functools.lru_cache(maxsize=32)
def _smoothing_matrix(size: int, sigma: float, truncate: float, edge: str) -> Tensor:
    """A one-dimensional Gaussian filter with its edge as a matrix ``(size, size)``; each row sums to 1."""
    radius = int(truncate * sigma + 0.5)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    if radius == 0:
        return matrix.fill_diagonal_(1.0)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = torch.arange(size)[:, None] + offsets
    if edge == "nearest":
        places = places.clamp(0, size - 1)
    else:  # d c b a | a b c d | d c b a, as often as it takes
        places = places % (2 * size)
        places = torch.minimum(places, 2 * size - 1 - places)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel with an odd square kernel ``(k, k)``; the edge is mirrored (``d c b | a b c d``)."""
    radius = len(kernel) // 2
    height, width = x.shape[-2:]
    padded = functional.pad(x, (radius,) * 4, mode="reflect")
    out = torch.zeros_like(x)
    for row, weights in enumerate(kernel.tolist()):
        for column, weight in enumerate(weights):
            if weight:
                out.add_(padded[..., row : row + height, column : column + width], alpha=weight)
    return out


def shrunk(kernel: Tensor, factor: float) -> Tensor:
    """A kernel ``(k, k)`` with all offsets multiplied by ``factor``; a weight between pixels is shared linearly.

    The sum stays; factor 1 changes nothing.
    """
    radius = len(kernel) // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64) * factor
    lower = offsets.floor()
    span = math.ceil(radius * factor)
    share = torch.zeros(2 * span + 2, len(offsets), dtype=torch.float64)
    place, column = lower.long() + span, torch.arange(len(offsets))
    share[place, column] += 1 - (offsets - lower)
    share[place + 1, column] += offsets - lower
    share = share[:-1]  # nothing lies beyond the outermost pixel
    return share @ kernel.double() @ share.T


def sampled(x: Tensor, rows: Tensor, columns: Tensor, *, edge: Edge = "nearest") -> Tensor:
    """Images ``(n, channels, height, width)`` read at fractional places, bilinear.

    Args:
        x: the images.
        rows: row in pixels of every output pixel, ``(n or 1, height, width)``.
        columns: column in pixels, the same shape.
        edge: ``nearest`` repeats the border, ``reflect`` mirrors about its outer edge, ``mirror`` about its centre.
    """
    height, width = x.shape[-2:]
    centres = edge != "reflect"
    if centres:
        down, across = 2 * rows / max(height - 1, 1) - 1, 2 * columns / max(width - 1, 1) - 1
    else:
        down, across = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    grid = torch.stack((across, down), dim=-1).to(x.dtype).expand(len(x), -1, -1, -1)
    mode = "border" if edge == "nearest" else "reflection"
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode=mode, align_corners=centres)


def pixel_places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel, float64 ``(1, height, width)`` each."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, dtype=torch.float64, device=x.device).view(1, height, 1).expand(1, height, width)
    columns = torch.arange(width, dtype=torch.float64, device=x.device).view(1, 1, width).expand(1, height, width)
    return rows, columns


def zoomed(x: Tensor, factor: float) -> Tensor:
    """Enlarge about the centre by ``factor`` (at least 1) and cut to the same size.

    The official code crops to whole pixels first, which moves the picture by up to a pixel and does nothing to an
    8-pixel image below factor 1.07; here the zoom is exact.
    """
    if factor == 1.0:
        return x
    rows, columns = pixel_places(x)
    middle_row, middle_column = (x.shape[-2] - 1) / 2, (x.shape[-1] - 1) / 2
    return sampled(x, middle_row + (rows - middle_row) / factor, middle_column + (columns - middle_column) / factor)


def smeared(x: Tensor, radius: float, sigma: float, angles: Tensor) -> Tensor:
    """Motion blur: half a Gaussian trailing in one direction per image, as ImageMagick's; the edge is repeated.

    ImageMagick rounds the steps to whole pixels; here they are read between pixels.

    Args:
        x: images ``(n, channels, height, width)``.
        radius: number of steps after the first, halved, in pixels of the official image size.
        sigma: width of the half Gaussian in the same unit.
        angles: direction in degrees ``(n,)``.
    """
    scale = reach(x)
    steps = range(2 * math.ceil(radius) + 1)
    weights = [math.exp(-0.5 * (step / sigma) ** 2) for step in steps]
    total = sum(weights)
    turns = angles.double().deg2rad().view(-1, 1, 1)
    rows, columns = pixel_places(x)
    out = x * (weights[0] / total)
    for step in steps[1:]:
        moved = sampled(x, rows + step * scale * turns.sin(), columns + step * scale * turns.cos())
        out.add_(moved, alpha=weights[step] / total)
    return out
