"""Per-channel mean and standard deviation of ``x / 255``, as the papers on each data set use them."""

from __future__ import annotations

from typing import NamedTuple


class Normalisation(NamedTuple):
    """``(x / scale - mean) / std``, one value per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = Normalisation((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Normalisation((0.449,), (0.226,))  # ImageNet's, averaged over the channels
MNIST = Normalisation((0.1307,), (0.3081,))
