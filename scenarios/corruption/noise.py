"""The noises of ImageNet-C (arXiv 1903.12261): Gaussian, shot and impulse noise.

Constants: ``small`` from make_cifar_c.py, ``large`` from make_imagenet_c.py of github.com/hendrycks/robustness.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contlearn.scenarios.corruption.draws import Draws
from contlearn.scenarios.corruption.filters import constants

# torchvision's gaussian_noise draws from the global generator, one stream for a whole batch; hence our own below.


def gaussian_noise(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Add normal noise, independent per value."""
    deviation = constants(x, severity, small=(0.04, 0.06, 0.08, 0.09, 0.10), large=(0.08, 0.12, 0.18, 0.26, 0.38))
    return x + deviation * draws.normal(*x.shape[1:])


def shot_noise(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Count photons: a Poisson number with the pixel's value as rate; bright pixels vary most."""
    photons = constants(x, severity, small=(500, 250, 100, 75, 50), large=(60, 25, 12, 5, 3))
    return draws.poisson(x * photons) / photons


def impulse_noise(x: Tensor, severity: int, draws: Draws) -> Tensor:
    """Salt and pepper: a share of the values becomes 0 or 1, half each."""
    share = constants(x, severity, small=(0.01, 0.02, 0.03, 0.05, 0.07), large=(0.03, 0.06, 0.09, 0.17, 0.27))
    chance = draws.uniform(*x.shape[1:])
    salted = torch.where(chance < share / 2, torch.ones_like(x), x)
    return torch.where((chance >= share / 2) & (chance < share), torch.zeros_like(x), salted)
