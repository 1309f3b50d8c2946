"""The published data sets, read from tiny stand-ins in the official file formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import describe, load, status

WNIDS = ("n02124075", "n01443537", "n02012849", "n03126707")


def write(path: Path, value: int, *, size: int = 8) -> None:
    """A square of a single grey, which JPEG keeps exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


def values(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def cifar_records(labels: list[tuple[int, ...]], seed: int) -> tuple[bytes, np.ndarray]:
    """Records of the binary version, and their images ``(n, 3, 32, 32)``."""
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    return b"".join(bytes(label) + image.tobytes() for label, image in zip(labels, images, strict=True)), images


def make_cifar10(root: Path) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    parts = []
    for number in range(1, 6):
        content, images = cifar_records([(label,) for label in (0, 1, 2)], number)
        (folder / f"data_batch_{number}.bin").write_bytes(content)
        parts.append(images)
    content, test = cifar_records([(2,), (0,)], 9)
    (folder / "test_batch.bin").write_bytes(content)
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    return np.concatenate(parts), test


def make_cifar100(root: Path) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    content, train = cifar_records([(9, 1), (8, 0), (9, 1)], 0)
    (folder / "train.bin").write_bytes(content)
    content, test = cifar_records([(8, 0)], 1)
    (folder / "test.bin").write_bytes(content)
    (folder / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    return train, test


def make_tiny_imagenet(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    for number, wnid in enumerate(WNIDS):
        for index in range(3):
            write(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", number * 50 + index, size=64)
    lines = []
    for index, number in enumerate((3, 0, 2, 1)):
        write(folder / "val" / "images" / f"val_{index}.JPEG", number * 50 + 10, size=64)
        lines.append(f"val_{index}.JPEG\t{WNIDS[number]}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    (folder / "words.txt").write_text(
        "n02124075\tEgyptian cat\nn01443537\tgoldfish, Carassius auratus\nn02012849\tcrane\nn03126707\tcrane\n"
    )


def make_mini_imagenet(root: Path) -> None:
    folder = root / "mini-imagenet"
    for part, wnids in (("train", WNIDS[:2]), ("val", WNIDS[2:3]), ("test", WNIDS[3:])):
        lines = ["filename,label"]
        for wnid in wnids:
            for index in range(12):
                name = f"{wnid}{index:08}.jpg"
                write(folder / "images" / name, sorted(WNIDS).index(wnid) * 50 + index, size=84)
                lines.append(f"{name},{wnid}")
        (folder / f"{part}.csv").write_text("\n".join(lines))


def make_imagenet_r(root: Path) -> None:
    folder = root / "imagenet-r"
    for number, wnid in enumerate(sorted(WNIDS)):
        for index in range(10):
            write(folder / wnid / f"art_{index}.jpg", number * 50 + index, size=5 + index)
    (folder / "README.txt").write_text("The classes are\n\nn01443537 goldfish\nn02124075 Egyptian cat\n")


def make_core50(root: Path) -> None:
    for session in range(1, 12):
        for number in range(1, 51):
            frame = f"C_{session:02}_{number:02}_000.png"
            write(root / "core50_128x128" / f"s{session}" / f"o{number}" / frame, session * 20 + number % 20, size=2)


def make_cub200(root: Path) -> None:
    folder = root / "CUB_200_2011"
    names = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    images, labels, split = [], [], []
    for identifier in range(1, 9):
        label = 1 + identifier % 2
        name = f"{names[label - 1]}/bird_{identifier:04}.jpg"
        write(folder / "images" / name, identifier * 20)
        images.append(f"{identifier} {name}")
        labels.append(f"{identifier} {label}")
        split.append(f"{identifier} {int(identifier <= 5)}")
    for file, lines in (
        ("images.txt", images),
        ("image_class_labels.txt", labels),
        ("train_test_split.txt", split),
        ("classes.txt", [f"{number} {name}" for number, name in enumerate(names, start=1)]),
    ):
        (folder / file).write_text("\n".join(lines) + "\n")


def test_cifar10_binary(tmp_path: Path) -> None:
    train, test = make_cifar10(tmp_path)
    data = load("cifar10", root=tmp_path)
    assert status("cifar10", root=tmp_path) == (True, f"found under {tmp_path}")
    assert np.array_equal(data.train_images.numpy(), train) and np.array_equal(data.test_images.numpy(), test)
    assert data.train_targets.tolist() == [0, 1, 2] * 5 and data.test_targets.tolist() == [2, 0]
    assert data.class_names == ("airplane", "automobile", "bird")
    assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2470, 0.2435, 0.2616)
    assert load("cifar10", root=tmp_path, image_size=16).input_shape == (3, 16, 16)


def test_cifar100_binary_takes_the_fine_label(tmp_path: Path) -> None:
    train, test = make_cifar100(tmp_path)
    data = load("cifar100", root=tmp_path)
    assert np.array_equal(data.train_images.numpy(), train) and np.array_equal(data.test_images.numpy(), test)
    assert data.train_targets.tolist() == [1, 0, 1] and data.class_names == ("apple", "aquarium_fish")
    assert data.mean == (0.5071, 0.4867, 0.4408) and data.std == (0.2675, 0.2565, 0.2761)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "3073"),
        (lambda content: b"", "0 bytes"),
        (lambda content: b"\x07" + content[1:], "record 0 has label 7, expected 0..2"),
    ],
)
def test_damaged_cifar_binary_files_are_named(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    make_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ContlearnError, match=f"damaged file {file}.*{message}"):
        load("cifar10", root=tmp_path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    make_cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    file.unlink()
    file.mkdir()
    with pytest.raises(ContlearnError, match=f"cannot read {file} .Is a directory"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_python_files_that_are_not_the_official_ones_are_never_unpickled(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "unpickled"
    for file in describe(name).layouts[1]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"cos\nmkdir\n(V%s\ntR." % bytes(mark))  # makes the directory when unpickled
    with pytest.raises(ContlearnError, match=f"{(tmp_path / file).parent} does not hold the official files"):
        load(name, root=tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("source", [torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100])
def test_the_installed_torchvision_has_a_checksum_for_every_file_it_unpickles(
    source: type[torchvision.datasets.CIFAR10],
) -> None:
    checksums = [md5 for _, md5 in source.train_list + source.test_list] + [source.meta["md5"]]
    assert all(isinstance(md5, str) and len(md5) == 32 for md5 in checksums)


@pytest.mark.parametrize(("name", "source"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_the_python_version_is_left_to_torchvision(
    tmp_path: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in describe(name).layouts[1]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    pixels = {train: np.random.default_rng(train).integers(0, 256, (2, 32, 32, 3), np.uint8) for train in (True, False)}
    opened = []

    class StandIn:
        """What torchvision's class gives for the official files."""

        base_folder, url, classes = "folder", "https://example.org", ["apple", "bear"]

        def __init__(self, root: Path, train: bool) -> None:
            opened.append(root)
            self.data, self.targets = pixels[train], [0, 1] if train else [1, 0]

    monkeypatch.setattr(torchvision.datasets, source, StandIn)
    data = load(name, root=tmp_path)
    assert opened == [tmp_path, tmp_path]
    assert np.array_equal(data.train_images.numpy(), pixels[True].transpose(0, 3, 1, 2))
    assert np.array_equal(data.test_images.numpy(), pixels[False].transpose(0, 3, 1, 2))
    assert data.test_targets.tolist() == [1, 0] and data.class_names == ("apple", "bear")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_binary_version_is_preferred(tmp_path: Path, name: str) -> None:
    for file in describe(name).layouts[1]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"not the official file")
    train, _ = (make_cifar10 if name == "cifar10" else make_cifar100)(tmp_path)
    assert np.array_equal(load(name, root=tmp_path).train_images.numpy(), train)


def test_tiny_imagenet(tmp_path: Path) -> None:
    make_tiny_imagenet(tmp_path)
    data = load("tiny_imagenet", root=tmp_path)
    assert data.input_shape == (3, 64, 64)
    assert values(data.train_images) == [0, 1, 2, 50, 51, 52, 100, 101, 102, 150, 151, 152]
    assert data.train_targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert values(data.test_images) == [160, 10, 110, 60] and data.test_targets.tolist() == [3, 0, 2, 1]
    assert data.class_names == (
        "Egyptian cat",
        "goldfish, Carassius auratus",
        "crane (n02012849)",
        "crane (n03126707)",
    )


def test_mini_imagenet_splits_every_class_five_to_one_in_csv_order(tmp_path: Path) -> None:
    make_mini_imagenet(tmp_path)
    data = load("mini_imagenet", root=tmp_path)
    assert data.input_shape == (3, 84, 84) and data.class_names == tuple(sorted(WNIDS))
    assert values(data.train_images) == [label * 50 + index for label in range(4) for index in range(10)]
    assert values(data.test_images) == [label * 50 + index for label in range(4) for index in (10, 11)]
    assert data.test_targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_imagenet_r_is_split_by_seed(tmp_path: Path) -> None:
    make_imagenet_r(tmp_path)
    data = load("imagenet_r", root=tmp_path)
    assert data.input_shape == (3, 224, 224)
    assert data.class_names == ("goldfish", "n02012849", "Egyptian cat", "n03126707")
    assert data.train_targets.bincount().tolist() == [8] * 4 and data.test_targets.bincount().tolist() == [2] * 4
    assert [value // 50 for value in values(data.test_images)] == data.test_targets.tolist()
    small = [values(load("imagenet_r", root=tmp_path, seed=seed, image_size=4).test_images) for seed in (0, 0, 1)]
    assert small[0] == small[1] == values(data.test_images) and small[2] != small[0]


def test_core50_has_sessions_as_domains(tmp_path: Path) -> None:
    make_core50(tmp_path)
    objects = load("core50", root=tmp_path, image_size=2)
    assert objects.n_classes == 50 and objects.class_names[5] == "mobile_phone1"
    assert objects.domain_names == tuple(f"s{number}" for number in range(1, 12))
    assert objects.train_domains is not None and objects.test_domains is not None
    assert set(objects.train_domains.tolist()) == {0, 1, 3, 4, 5, 7, 8, 10}
    assert set(objects.test_domains.tolist()) == {2, 6, 9}
    expected = (objects.test_domains + 1) * 20 + (objects.test_targets + 1) % 20
    assert values(objects.test_images) == expected.tolist()
    categories = load("core50:categories", root=tmp_path, image_size=2)
    assert categories.class_names[1] == "mobile_phone" and categories.name == "core50:categories"
    assert torch.equal(categories.train_targets, objects.train_targets // 5)
    assert load("core50:objects", root=tmp_path).input_shape == (3, 128, 128)


def test_cub200_follows_the_official_split(tmp_path: Path) -> None:
    make_cub200(tmp_path)
    data = load("cub200", root=tmp_path)
    assert data.input_shape == (3, 224, 224)
    assert values(data.train_images) == [20, 40, 60, 80, 100] and values(data.test_images) == [120, 140, 160]
    assert data.train_targets.tolist() == [1, 0, 1, 0, 1] and data.test_targets.tolist() == [0, 1, 0]
    assert data.class_names == ("001.Black_footed_Albatross", "002.Laysan_Albatross")


IMAGENET_MEAN = (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("tiny_imagenet", make_tiny_imagenet),
        ("mini_imagenet", make_mini_imagenet),
        ("imagenet_r", make_imagenet_r),
        ("cub200", make_cub200),
    ],
)
def test_photographs_are_normalised_as_imagenet_and_take_a_size(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path)
    data = load(name, root=tmp_path, image_size=6)
    assert data.input_shape == (3, 6, 6) and data.mean == IMAGENET_MEAN and data.std == (0.229, 0.224, 0.225)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def unknown_class_in_val(root: Path) -> tuple[str, str]:
    file = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    edit(file, WNIDS[0], "n99999999")
    return "tiny_imagenet", f"{file}: val_1.JPEG has class 'n99999999'"


def short_line_in_val(root: Path) -> tuple[str, str]:
    file = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    file.write_text("val_0.JPEG\n")
    return "tiny_imagenet", f"{file}, line 1: expected at least 2 columns"


def empty_wnids(root: Path) -> tuple[str, str]:
    file = root / "tiny-imagenet-200" / "wnids.txt"
    file.write_text("\n")
    return "tiny_imagenet", f"{file} is empty"


def binary_wnids(root: Path) -> tuple[str, str]:
    file = root / "tiny-imagenet-200" / "wnids.txt"
    file.write_bytes(b"\xff\xfe\x00")
    return "tiny_imagenet", f"cannot read {file}"


def class_without_images(root: Path) -> tuple[str, str]:
    folder = root / "tiny-imagenet-200" / "train" / WNIDS[2]
    for file in (folder / "images").iterdir():
        file.unlink()
    return "tiny_imagenet", f"{folder} holds 0 image"


def class_without_directory(root: Path) -> tuple[str, str]:
    edit(root / "tiny-imagenet-200" / "wnids.txt", WNIDS[3], "n00000000")
    return "tiny_imagenet", f"{root / 'tiny-imagenet-200' / 'train' / 'n00000000'} holds 0 image"


def missing_listed_image(root: Path) -> tuple[str, str]:
    file = root / "tiny-imagenet-200" / "val" / "images" / "val_2.JPEG"
    file.unlink()
    return "tiny_imagenet", f"cannot read the image {file}"


def wrong_csv_header(root: Path) -> tuple[str, str]:
    file = root / "mini-imagenet" / "val.csv"
    edit(file, "filename,label", "file,label")
    return "mini_imagenet", f"{file} has no column 'filename'"


def short_csv_row(root: Path) -> tuple[str, str]:
    file = root / "mini-imagenet" / "val.csv"
    edit(file, f"{WNIDS[2]}00000004.jpg,{WNIDS[2]}", f"{WNIDS[2]}00000004.jpg")
    return "mini_imagenet", f"{file}, line 6"


def single_csv_image(root: Path) -> tuple[str, str]:
    file = root / "mini-imagenet" / "val.csv"
    file.write_text("\n".join(file.read_text().splitlines()[:2]))
    return "mini_imagenet", f"{root / 'mini-imagenet'}: the csv files list a single image of class '{WNIDS[2]}'"


def no_rendition_classes(root: Path) -> tuple[str, str]:
    for folder in (root / "imagenet-r").iterdir():
        folder.rename(root / folder.name)
    return "imagenet_r", f"{root / 'imagenet-r'} holds 0 class directories"


def single_rendition(root: Path) -> tuple[str, str]:
    folder = root / "imagenet-r" / WNIDS[0]
    for index in range(1, 10):
        (folder / f"art_{index}.jpg").unlink()
    return "imagenet_r", f"{folder} holds 1 image"


def missing_object(root: Path) -> tuple[str, str]:
    folder = root / "core50_128x128" / "s4" / "o17"
    folder.rename(root / "o17")
    return "core50", f"{folder} holds no frames"


def unsplit_bird(root: Path) -> tuple[str, str]:
    edit(root / "CUB_200_2011" / "train_test_split.txt", "4 1\n", "")
    return "cub200", f"{root / 'CUB_200_2011' / 'images.txt'}: image 4 "


def unlabelled_bird(root: Path) -> tuple[str, str]:
    edit(root / "CUB_200_2011" / "image_class_labels.txt", "4 1\n", "4 7\n")
    return "cub200", f"{root / 'CUB_200_2011' / 'images.txt'}: image 4 "


def no_test_birds(root: Path) -> tuple[str, str]:
    edit(root / "CUB_200_2011" / "train_test_split.txt", " 0", " 1")
    return "cub200", f"{root / 'CUB_200_2011'} lists no test images"


@pytest.mark.parametrize(
    ("make", "damage"),
    [
        (make_tiny_imagenet, unknown_class_in_val),
        (make_tiny_imagenet, short_line_in_val),
        (make_tiny_imagenet, empty_wnids),
        (make_tiny_imagenet, binary_wnids),
        (make_tiny_imagenet, class_without_images),
        (make_tiny_imagenet, class_without_directory),
        (make_tiny_imagenet, missing_listed_image),
        (make_mini_imagenet, wrong_csv_header),
        (make_mini_imagenet, short_csv_row),
        (make_mini_imagenet, single_csv_image),
        (make_imagenet_r, no_rendition_classes),
        (make_imagenet_r, single_rendition),
        (make_core50, missing_object),
        (make_cub200, unsplit_bird),
        (make_cub200, unlabelled_bird),
        (make_cub200, no_test_birds),
    ],
)
def test_damage_is_explained_with_the_path(
    tmp_path: Path, make: Callable[[Path], None], damage: Callable[[Path], tuple[str, str]]
) -> None:
    make(tmp_path)
    name, message = damage(tmp_path)
    with pytest.raises(ContlearnError) as caught:
        load(name, root=tmp_path, image_size=8)
    assert message in str(caught.value)
