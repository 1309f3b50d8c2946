"""The blurs of ImageNet-C (arXiv 1903.12261): defocus, frosted glass, motion and zoom.

Constants: ``small`` from make_cifar_c.py, ``large`` from make_imagenet_c.py of github.com/hendrycks/robustness; lengths
are shortened for images smaller than the official ones (``filters.reach``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from contlearn.scenarios.corruption.draws import Draws
from contlearn.scenarios.corruption.filters import constants, filtered, reach, shrunk, smeared, smooth, zoomed


def defocus_blur(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Average over a disc, its rim softened; nothing is drawn."""
    radius, softness = constants(
        x,
        severity,
        small=((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
        large=((3.0, 0.1), (4.0, 0.5), (6.0, 0.5), (8.0, 0.5), (10.0, 0.5)),
    )
    return filtered(x, shrunk(disc(radius, softness), reach(x)))


def disc(radius: float, softness: float) -> Tensor:
    """A disc of equal weights that sum to 1, smoothed by a Gaussian of 3 (radius up to 8) or 5 pixels.

    Args:
        radius: in pixels.
        softness: the Gaussian's standard deviation in pixels.

    Returns:
        The kernel, float64 ``(k, k)``; the official one loses a little weight where the disc touches its rim.
    """
    rim = 1 if radius <= 8 else 2
    extent = int(radius) + rim
    offsets = torch.arange(-extent, extent + 1, dtype=torch.float64)
    inside = (offsets[:, None] ** 2 + offsets**2 <= radius**2).double()
    near = torch.exp(-0.5 * ((offsets[:, None] - offsets) / softness) ** 2)
    near = near * ((offsets[:, None] - offsets).abs() <= rim)
    near = near / near.sum(dim=0).max()  # a column of the middle, whose Gaussian is whole
    return near @ (inside / inside.sum()) @ near.T


def glass_blur(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Smooth, let every pixel away from the border take the value of a near one, smooth again.

    The paper shuffles pixels. The official code means to swap pairs, but the pixels of a colour image are views, so the
    second half of the swap finds the first already done and one value is copied; CIFAR-10-C and ImageNet-C were made
    that way, and so are these.
    """
    sigma, distance, passes = constants(
        x,
        severity,
        small=((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        large=((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    )
    height, width = x.shape[-2:]
    distance = max(1, round(distance * reach(x)))
    sigma *= reach(x)
    # As in the official code, what is shuffled has 256 levels.
    pixels = (smooth(x, sigma).clamp(0, 1) * 255).round().flatten(2)
    for _ in range(passes):
        source = copied_from(draws.integers(-distance, distance, 2, height, width), distance)
        pixels = pixels.gather(2, source.flatten(1)[:, None].expand_as(pixels))
    return smooth(pixels.view_as(x) / 255, sigma)


def copied_from(offsets: Tensor, distance: int) -> Tensor:
    """Where the value of each pixel comes from when pixels, last row and column first, copy a near one in turn.

    A pixel that copies one visited before it gets what that one copied. Such chains are followed by doubling: all
    pixels at once, the logarithm of the longest chain in steps.

    Args:
        offsets: row and column offset of the pixel each one copies, int64 ``(n, 2, height, width)``.
        distance: pixels this near the border copy nothing (the first ``distance + 1``, the last ``distance - 1``).

    Returns:
        Flat position of the source of each pixel, int64 ``(n, height, width)``.
    """
    count, _, height, width = offsets.shape
    own = torch.arange(height * width, device=offsets.device).view(1, height, width)
    row, column = own // width, own % width
    visited = (row > distance) & (row <= height - distance) & (column > distance) & (column <= width - distance)
    target = torch.where(visited, own + offsets[:, 0] * width + offsets[:, 1], own)
    waits = visited & (target > own) & visited.flatten()[target]  # the visit runs from the last position to the first
    # The lower half of the table: what a pixel holds afterwards; the upper half: what it held before.
    before = own + height * width
    after = torch.where(waits, target, target + height * width).flatten(1)
    table = torch.cat((after, before.flatten(1).expand(count, -1)), dim=1)
    while bool((table < height * width).any()):
        table = table.gather(1, table)
    return (table[:, : height * width] - height * width).view(count, height, width)


def motion_blur(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Smear each image in a direction of its own, -45 to 45 degrees."""
    radius, sigma = constants(
        x,
        severity,
        small=((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
        large=((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)),
    )
    return smeared(x, radius, sigma, draws.uniform(low=-45.0, high=45.0))


def zoom_blur(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """The mean of the image and of copies enlarged a little more each; nothing is drawn."""
    end, step = constants(
        x,
        severity,
        small=((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        large=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    )
    factors = np.arange(1, end, step).tolist()  # as written officially, with what rounding makes of its end
    total = x.clone()
    for factor in factors:
        total += zoomed(x, factor)
    return total / (len(factors) + 1)
