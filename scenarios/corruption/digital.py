"""The digital corruptions of ImageNet-C (arXiv 1903.12261): contrast, elastic transform, pixelate and JPEG.

Constants: ``small`` from make_cifar_c.py, ``large`` from make_imagenet_c.py of github.com/hendrycks/robustness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contlearn.scenarios.corruption.draws import Draws
from contlearn.scenarios.corruption.filters import SMALL_SIDE, constants, pixel_places, sampled, side, smooth


def contrast(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Shrink the distance to the mean of each channel of the image; nothing is drawn.

    torchvision's adjust_contrast shrinks towards the mean of the grey picture instead.
    """
    kept = constants(x, severity, small=(0.75, 0.5, 0.4, 0.3, 0.15), large=(0.4, 0.3, 0.2, 0.1, 0.05))
    means = x.double().mean(dim=(2, 3), keepdim=True).to(x.dtype)
    return (x - means) * kept + means


def elastic_transform(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """A random affine map, then every pixel moved by smoothed noise.

    torchvision's elastic moves a whole batch alike and fills the edge with black; this one is drawn per image and
    mirrors the edge. The constants are shares of the side (244 / 224 of it in make_imagenet_c.py, a slip its comment
    admits).
    """
    amplitude, sigma, affine = constants(
        x,
        severity,
        small=((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        large=((2.0, 0.7, 0.1), (2.0, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    )
    unit = side(x) * (1.0 if side(x) <= SMALL_SIDE else 244 / 224)
    rows, columns = _affine_places(x, draws.uniform(3, 2, low=-1, high=1).double() * affine * unit)
    moved = sampled(x, rows, columns, edge="mirror")
    height, width = x.shape[-2:]
    noise = draws.uniform(2, height, width, low=-1, high=1).double()
    shift = smooth(noise, sigma * unit, edge="reflect", truncate=3.0) * (amplitude * unit)
    rows, columns = pixel_places(x)
    return sampled(moved, rows + shift[:, 1], columns + shift[:, 0], edge="reflect")


def _affine_places(x: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel is read when three points of the middle move by ``jitter`` ``(n, 3, 2)`` (column, row)."""
    height, width = x.shape[-2:]
    middle = torch.tensor((width // 2, height // 2), dtype=torch.float64, device=x.device)
    arm = min(height, width) // 3
    arms = torch.tensor(((arm, arm), (arm, -arm), (-arm, -arm)), dtype=torch.float64, device=x.device)
    points = middle + arms
    ones = points.new_ones(3, 1)
    # Solved backwards, from the moved points to the old ones: a pixel of the result asks where it came from.
    moved = torch.cat((points + jitter, ones.expand(len(x), 3, 1)), dim=2)
    back = torch.stack([torch.linalg.solve(each, points) for each in moved])  # (n, 3, 2)
    rows, columns = pixel_places(x)
    across, down = (
        columns * back[:, 0, i, None, None] + rows * back[:, 1, i, None, None] + back[:, 2, i, None, None]
        for i in (0, 1)
    )
    return down, across


def pixelate(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Shrink and enlarge with a box filter, by torchvision on Pillow images (its tensors have no box filter)."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as v2

    share = constants(x, severity, small=(0.95, 0.9, 0.85, 0.75, 0.65), large=(0.6, 0.5, 0.4, 0.3, 0.25))
    height, width = x.shape[-2:]
    small = [max(1, int(height * share)), max(1, int(width * share))]
    blocks = []
    for image in _eight_bit(x):
        picture = v2.resize(v2.to_pil_image(image), small, interpolation=InterpolationMode.BOX)
        blocks.append(v2.pil_to_tensor(v2.resize(picture, [height, width], interpolation=InterpolationMode.BOX)))
    return (torch.stack(blocks) / 255).to(x.device)


def jpeg_compression(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Compress and read again, by torchvision."""
    from torchvision.transforms.v2 import functional as v2

    quality = constants(x, severity, small=(80, 65, 58, 50, 40), large=(25, 18, 15, 10, 7))
    compressed: Tensor = v2.jpeg(_eight_bit(x), quality)
    return (compressed / 255).to(x.device)


def _eight_bit(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8).cpu()
