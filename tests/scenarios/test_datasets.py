"""Names, records, status and arguments of the data sets, and what ``ImageData`` refuses."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from contlearn.errors import ContlearnError
from contlearn.scenarios import datasets
from contlearn.scenarios.datasets import ImageData, describe, list_datasets, load, status

ON_DISK = [name for name in list_datasets() if describe(name).layouts]


def data(**changes: object) -> ImageData:
    fields: dict[str, object] = {
        "name": "toy",
        "train_images": torch.zeros(4, 3, 5, 6, dtype=torch.uint8),
        "test_images": torch.zeros(2, 3, 5, 6, dtype=torch.uint8),
        "train_targets": torch.tensor([0, 1, 0, 1]),
        "test_targets": torch.tensor([1, 0]),
        "class_names": ("cat", "dog"),
    }
    return ImageData(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_required_data_sets_are_listed_and_described() -> None:
    expected = "digits mnist5k folder:PATH cifar10 cifar100 tiny_imagenet mini_imagenet imagenet_r core50 cub200"
    expected += " cifar10_c cifar100_c imagenet_c"
    assert list_datasets() == tuple(expected.split())
    for name in list_datasets():
        info = describe(name)
        assert info.description and info.url and info.licence
        assert "\n" not in info.description


def test_every_import_string_of_the_registry_resolves() -> None:
    for name in list_datasets():
        info = describe(name)
        for target in (info.loader, info.downloader):
            if target is not None:
                module, function = target.split(":")
                assert callable(getattr(importlib.import_module(module), function))


def test_listing_describing_and_status_import_nothing_heavy() -> None:
    program = (
        "import sys, contlearn.scenarios.datasets as d\n"
        "for name in d.list_datasets(): d.describe(name), d.status(name), d.status(name, root='/nowhere')\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'mlxtend', 'avalanche', 'numpy', 'PIL', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ON_DISK)
def test_missing_files_name_the_root_the_files_the_source_and_the_variable(name: str, tmp_path: Path) -> None:
    with pytest.raises(ContlearnError) as caught:
        load(name, root=tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), describe(name).layouts[0][0], describe(name).url, "CONTLEARN_DATA", name):
        assert part in message
    assert ("download=True" in message) == describe(name).downloadable
    assert status(name, root=tmp_path) == (False, message)


def test_the_root_comes_from_the_argument_then_the_variable_then_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imagenet-r").mkdir()
    monkeypatch.setenv("CONTLEARN_DATA", str(tmp_path))
    assert status("imagenet_r") == (True, f"found under {tmp_path}")
    found, message = status("imagenet_r", root=tmp_path / "elsewhere")
    assert not found and "the root argument" in message
    monkeypatch.setenv("CONTLEARN_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found, message = status("imagenet_r")
    assert not found and str(tmp_path / "home" / ".contlearn" / "data") in message


def test_a_root_that_is_the_data_set_itself_is_recognised(tmp_path: Path) -> None:
    inside = tmp_path / "tiny-imagenet-200"
    inside.mkdir()
    with pytest.raises(ContlearnError, match=f"give {tmp_path}$"):
        load("tiny_imagenet", root=inside)


def test_download_of_a_set_no_library_offers_says_so(tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match="no library offers it"):
        load("imagenet_r", root=tmp_path, download=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar_10", "did you mean 'cifar10'"),
        ("core50:category", "did you mean 'categories'"),
        ("digits:8", "takes no option"),
        ("folder", "needs a path"),
        ("folder:", "needs a path"),
        (7, "named by a string"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(ContlearnError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("image_size", 0),
        ("image_size", 8.0),
        ("image_size", True),
        ("image_size", 10**6),
        ("seed", -1),
        ("seed", 0.5),
        ("test_share", 0),
        ("test_share", 1.0),
        ("test_share", "half"),
        ("test_share", float("nan")),
    ],
)
def test_wrong_arguments_are_named_with_their_value(argument: str, value: object) -> None:
    with pytest.raises(ContlearnError, match=argument) as caught:
        load("digits", **{argument: value})  # type: ignore[arg-type]
    assert repr(value) in str(caught.value)


def test_status_of_folders(tmp_path: Path) -> None:
    assert status("folder:PATH")[0]
    assert status(f"folder:{tmp_path}") == (True, f"found {tmp_path}")
    assert status(f"folder:{tmp_path}/none") == (False, f"no such directory: {tmp_path}/none")


def test_image_data_knows_its_shape_and_classes_and_prints_short() -> None:
    toy = data()
    assert (toy.n_classes, toy.input_shape) == (2, (3, 5, 6))
    assert repr(toy) == "ImageData('toy', train=4, test=2, input_shape=(3, 5, 6), n_classes=2, n_domains=0)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy.scale = 1.0  # type: ignore[misc]


def test_image_data_takes_domains_and_normalisation() -> None:
    toy = data(
        train_domains=torch.tensor([0, 0, 1, 1]),
        test_domains=torch.tensor([2, 2]),
        domain_names=("sun", "rain", "snow"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    assert toy.domain_names == ("sun", "rain", "snow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": torch.zeros(4, 3, 5, 6)}, "train_images must be a uint8 tensor"),
        ({"test_images": torch.zeros(2, 5, 6, dtype=torch.uint8)}, "test_images must be a uint8 tensor"),
        ({"train_images": [[1]]}, "got list"),
        ({"test_images": torch.zeros(0, 3, 5, 6, dtype=torch.uint8)}, "test_images is empty"),
        ({"test_images": torch.zeros(2, 3, 6, 6, dtype=torch.uint8)}, "differ in shape"),
        ({"train_targets": torch.tensor([0, 1, 0])}, r"train_targets must be an int64 tensor of shape \(4,\)"),
        ({"test_targets": torch.tensor([0.0, 1.0])}, "test_targets must be an int64"),
        ({"test_targets": torch.tensor([0, 2])}, "must lie in 0..1"),
        ({"train_targets": torch.tensor([0, -1, 0, 1])}, "got -1..1"),
        ({"class_names": ("cat", "dog", "eel")}, "1 of 3 classes have no training image .eel"),
        ({"class_names": ()}, "class_names is empty"),
        ({"scale": 0.0}, "scale must be a positive"),
        ({"scale": 16.0, "test_images": torch.full((2, 3, 5, 6), 17, dtype=torch.uint8)}, "reach 17"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std need 3 values"),
        ({"mean": (0.5,), "std": (0.5,)}, "mean and std need 3 values"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"train_domains": torch.tensor([0, 0, 0, 0])}, "domain_names is empty"),
        ({"domain_names": ("sun",), "train_domains": torch.zeros(4, dtype=torch.int64)}, "test_domains must be"),
        (
            {
                "domain_names": ("sun",),
                "train_domains": torch.tensor([0, 0, 0, 1]),
                "test_domains": torch.tensor([0, 0]),
            },
            "train_domains must lie in 0..0",
        ),
    ],
)
def test_image_data_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ContlearnError, match=message) as caught:
        data(**changes)
    assert "'toy'" in str(caught.value)


def test_the_package_exports_what_it_documents() -> None:
    for name in datasets.__all__:
        assert hasattr(datasets, name)
