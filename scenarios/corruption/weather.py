"""The weather of ImageNet-C (arXiv 1903.12261): snow, frost, fog and brightness.

Constants: ``small`` from make_cifar_c.py, ``large`` from make_imagenet_c.py of github.com/hendrycks/robustness.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from contlearn.scenarios.corruption.draws import Draws
from contlearn.scenarios.corruption.filters import constants, reach, smeared, zoomed


def snow(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Bleach the image and let smeared flakes fall over it, once and once more turned by 180 degrees."""
    mean, deviation, size, threshold, radius, sigma, keep = constants(
        x,
        severity,
        small=(
            (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        large=(
            (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    )
    height, width = x.shape[-2:]
    flakes = zoomed(mean + deviation * draws.normal(1, height, width), max(1.0, size * reach(x)))
    flakes = torch.where(flakes < threshold, torch.zeros_like(flakes), flakes).clamp(0, 1)
    flakes = smeared(flakes, radius, sigma, draws.uniform(low=-135.0, high=-45.0))
    bleached = torch.maximum(x, grey(x) * 1.5 + 0.5)
    return keep * x + (1 - keep) * bleached + flakes + flakes.flip(-1, -2)


def grey(x: Tensor) -> Tensor:
    """The brightness of each pixel ``(n, 1, height, width)``, by ITU-R BT.601 for colour."""
    if x.shape[1] == 1:
        return x
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def frost(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Darken the image and lay ice over it.

    Not the official frost: that one pastes crops of five photographs, which no package ships. The weights are the
    official ones, the ice is drawn (``ice``).
    """
    keep, weight = constants(
        x,
        severity,
        small=((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        large=((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    )
    return keep * x + weight * ice(x, draws)


# Cells per side of a layer and its share: from needles across the picture to fine crystals.
_LAYERS = ((2, 0.45), (4, 0.4), (8, 0.3), (16, 0.25), (32, 0.2))


def ice(x: Tensor, draws: Draws) -> Tensor:
    """A texture in 0..1 of veins on a cloudy ground, bluish for colour images; shape of ``x``.

    A layer is smooth noise ``v`` folded to ridges, ``1 - |2 v - 1|``, sharpened; coarse layers make needles, fine ones
    crystals between them.
    """
    height, width = x.shape[-2:]
    texture = x.new_zeros(len(x), 1, height, width)
    for cells, share in _LAYERS:
        if 2 * cells > min(height, width):
            break
        noise = _smooth_noise(x, cells, draws)
        texture += share * (1 - (2 * noise - 1).abs()).clamp(0, 1) ** 5
    ground = _smooth_noise(x, 2, draws)
    texture = (0.2 + 0.2 * ground + 0.8 * texture * (0.4 + ground)).clamp(0, 1)
    if x.shape[1] == 1:
        return texture
    return texture * texture.new_tensor((0.86, 0.95, 1.0)).view(1, 3, 1, 1)


def _smooth_noise(x: Tensor, cells: int, draws: Draws) -> Tensor:
    """Noise in 0..1 that varies over ``1 / cells`` of the picture, ``(n, 1, height, width)``."""
    coarse = draws.uniform(1, cells + 3, cells + 3).to(x.dtype)
    height, width = x.shape[-2:]
    step = (height // cells + 1, width // cells + 1)
    fine = functional.interpolate(
        coarse, size=(step[0] * (cells + 3), step[1] * (cells + 3)), mode="bicubic", align_corners=False
    )
    return fine[..., step[0] : step[0] + height, step[1] : step[1] + width].clamp(0, 1)


def fog(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add a plasma cloud and compress the sum so that the brightest value stays."""
    amount, decay = constants(
        x,
        severity,
        small=((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
        large=((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    )
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    height, width = x.shape[-2:]
    cloud = plasma(max(height, width), decay, draws).to(x.dtype)[:, None, :height, :width]
    return (x + amount * cloud) * brightest / (brightest + amount)


def plasma(side: int, decay: float, draws: Draws) -> Tensor:
    """Clouds by the diamond-square algorithm, periodic, stretched to 0..1.

    Args:
        side: least side in pixels; the next power of two is made.
        decay: what the range of the noise is divided by, squared, from one scale to the next.
        draws: random numbers of each image.

    Returns:
        float32 ``(n, size, size)``.
    """
    size = 1 << max(1, (side - 1).bit_length())
    cloud = draws.zeros(size, size)
    step, spread = size, 1.0
    while step >= 2:
        half, cells = step // 2, size // step

        def noise(spread: float = spread, cells: int = cells) -> Tensor:
            return draws.uniform(cells, cells, low=-spread, high=spread)

        corners = cloud[:, ::step, ::step]
        below = corners.roll(-1, 1)
        middle = (corners + below + corners.roll(-1, 2) + below.roll(-1, 2)) / 4 + noise()
        cloud[:, half::step, half::step] = middle
        # Points between two corners and two middles; over the edge the cloud repeats.
        cloud[:, ::step, half::step] = (corners + corners.roll(-1, 2) + middle + middle.roll(1, 1)) / 4 + noise()
        cloud[:, half::step, ::step] = (corners + below + middle + middle.roll(1, 2)) / 4 + noise()
        step, spread = half, spread / decay**2
    low, high = cloud.amin(dim=(1, 2), keepdim=True), cloud.amax(dim=(1, 2), keepdim=True)
    return (cloud - low) / (high - low)


def brightness(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Raise the value (the largest channel) and keep hue and saturation; nothing is drawn.

    torchvision's adjust_brightness multiplies; this adds to the value of HSV, as the official code does.
    """
    added = constants(x, severity, small=(0.05, 0.1, 0.15, 0.2, 0.3), large=(0.1, 0.2, 0.3, 0.4, 0.5))
    value = x.amax(dim=1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (raised / value.clamp(min=1e-6)), raised)
