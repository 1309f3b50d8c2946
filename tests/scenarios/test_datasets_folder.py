"""``folder:PATH``: the layouts it reads, the image formats it takes and the mistakes it explains."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import ImageData, load


def write(path: Path, value: int = 0, *, size: tuple[int, int] = (6, 6), mode: str = "RGB") -> Path:
    """One image of a single colour; ``size`` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I", "F", "I;16") else (value,) * len(mode)).save(path)
    return path


def write_class(directory: Path, values: range, **options: object) -> None:
    for value in values:
        write(directory / f"{value:03}.png", value, **options)  # type: ignore[arg-type]


def read(path: Path, **options: object) -> ImageData:
    return load(f"folder:{path}", **options)  # type: ignore[arg-type]


def values(images: torch.Tensor) -> list[int]:
    """The colour of single-coloured images."""
    return images[:, 0, 0, 0].tolist()


def fails(path: Path, *parts: object) -> None:
    with pytest.raises(ContlearnError) as caught:
        read(path)
    for part in parts:
        assert str(part) in str(caught.value)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Cats 0..9 and dogs 100..104, not split."""
    write_class(tmp_path / "cat", range(10))
    write_class(tmp_path / "dog", range(100, 105))
    return tmp_path


def test_classes_are_split_by_seed(flat: Path) -> None:
    data = read(flat)
    assert data.name == f"folder:{flat}" and data.class_names == ("cat", "dog")
    assert data.input_shape == (3, 6, 6) and data.scale == 255.0 and data.domain_names == ()
    assert torch.bincount(data.test_targets).tolist() == [2, 1]
    assert sorted(values(data.train_images) + values(data.test_images)) == [*range(10), *range(100, 105)]
    for images, targets in ((data.train_images, data.train_targets), (data.test_images, data.test_targets)):
        assert [value >= 100 for value in values(images)] == [bool(label) for label in targets.tolist()]
    assert values(read(flat).test_images) == values(data.test_images)
    assert len({tuple(values(read(flat, seed=seed).test_images)) for seed in range(5)}) > 1
    assert len(read(flat, test_share=0.5).test_images) == 8


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_a_given_split_is_kept_for_every_seed(tmp_path: Path, held_out: str) -> None:
    write_class(tmp_path / "train" / "cat", range(3))
    write_class(tmp_path / "train" / "dog", range(100, 101))
    write_class(tmp_path / held_out / "cat", range(10, 12))
    write_class(tmp_path / held_out / "dog", range(110, 111))
    for seed in (0, 1):
        data = read(tmp_path, seed=seed)
        assert values(data.train_images) == [0, 1, 2, 100] and data.train_targets.tolist() == [0, 0, 0, 1]
        assert values(data.test_images) == [10, 11, 110] and data.test_targets.tolist() == [0, 0, 1]


def test_train_can_be_the_name_of_a_class(tmp_path: Path) -> None:
    write_class(tmp_path / "bus", range(2))
    write_class(tmp_path / "train", range(2))
    assert read(tmp_path).class_names == ("bus", "train")


def test_domains_label_every_image(tmp_path: Path) -> None:
    for number, domain in enumerate(("rain", "sun")):
        write_class(tmp_path / "domains" / domain / "cat", range(number * 10, number * 10 + 4))
        write_class(tmp_path / "domains" / domain / "dog", range(100 + number * 10, 100 + number * 10 + 2))
    data = read(tmp_path)
    assert data.domain_names == ("rain", "sun")
    assert data.train_domains is not None and data.test_domains is not None
    for images, domains in ((data.train_images, data.train_domains), (data.test_images, data.test_domains)):
        assert [value % 100 // 10 for value in values(images)] == domains.tolist()
        assert set(domains.tolist()) == {0, 1}


def test_a_domain_may_bring_its_own_split(tmp_path: Path) -> None:
    write_class(tmp_path / "domains" / "sun" / "train" / "cat", range(2))
    write_class(tmp_path / "domains" / "sun" / "train" / "dog", range(100, 102))
    write_class(tmp_path / "domains" / "snow" / "cat", range(10, 14))
    write_class(tmp_path / "domains" / "snow" / "dog", range(110, 114))
    write_class(tmp_path / "domains" / "sun" / "test" / "cat", range(5, 6))
    write_class(tmp_path / "domains" / "sun" / "test" / "dog", range(105, 106))
    data = read(tmp_path)
    assert {5, 105} < set(values(data.test_images)) and {0, 1, 100, 101} < set(values(data.train_images))
    assert data.test_domains is not None and data.test_domains.bincount().tolist() == [2, 2]


def test_nested_and_foreign_files(flat: Path) -> None:
    write(flat / "cat" / "more" / "200.JPG", 50)
    (flat / "cat" / "notes.txt").write_text("not an image")
    (flat / "cat" / ".hidden.png").write_text("not an image either")
    (flat / ".git").mkdir()
    (flat / "__MACOSX").mkdir()
    data = read(flat)
    assert data.class_names == ("cat", "dog") and len(data.train_images) + len(data.test_images) == 16


def test_links_to_directories_are_followed(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_class(elsewhere, range(50, 52))
    (flat / "eel").symlink_to(elsewhere)
    assert read(flat).class_names == ("cat", "dog", "eel")


def test_all_grey_stays_grey_and_one_colour_image_makes_all_rgb(tmp_path: Path) -> None:
    write_class(tmp_path / "cat", range(4), mode="L")
    write_class(tmp_path / "dog", range(100, 104), mode="L")
    grey = read(tmp_path)
    assert grey.input_shape == (1, 6, 6) and grey.mean is not None and len(grey.mean) == 1
    write(tmp_path / "dog" / "104.png", 104)
    assert read(tmp_path).input_shape == (3, 6, 6)


def test_sixteen_bit_grey_keeps_its_contrast(tmp_path: Path) -> None:
    for number, level in enumerate((0, 256, 32768, 65535)):
        for name in ("cat", "dog"):
            write(tmp_path / name / f"{number}.png", level, mode="I;16")
    data = read(tmp_path)
    assert sorted(set(values(data.train_images) + values(data.test_images))) == [0, 1, 128, 255]


def test_transparency_and_palettes_become_rgb(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name / "0.png", 7, mode="RGBA")
        Image.new("P", (6, 6), 0).save(tmp_path / name / "1.gif")
    assert read(tmp_path).input_shape == (3, 6, 6)


def test_a_common_size_is_kept_and_mixed_sizes_become_224(tmp_path: Path) -> None:
    write_class(tmp_path / "cat", range(2), size=(9, 5))
    write_class(tmp_path / "dog", range(2), size=(9, 5))
    assert read(tmp_path).input_shape == (3, 5, 9)
    assert read(tmp_path, image_size=4).input_shape == (3, 4, 4)
    write(tmp_path / "dog" / "9.png", 9, size=(10, 5))
    assert read(tmp_path).input_shape == (3, 224, 224)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # bright on the left; a quarter turn clockwise brings it to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png", exif=exif)
    data = read(tmp_path)
    assert data.input_shape == (3, 8, 4)
    assert data.train_images[0, 0, :4].eq(255).all() and data.train_images[0, 0, 4:].eq(0).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
def test_damaged_exif_blocks_do_not_spoil_a_photograph(flat: Path, block: bytes) -> None:
    Image.new("RGB", (6, 6), (50, 50, 50)).save(flat / "cat" / "zz.png", exif=block)
    data = read(flat)
    assert 50 in values(data.train_images) + values(data.test_images)


def truncated(path: Path) -> None:
    write(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:-30])


def test_unreadable_images_are_named_and_counted(flat: Path) -> None:
    truncated(flat / "dog" / "zz.jpg")
    fails(flat, flat / "dog" / "zz.jpg", "replace or delete")
    (flat / "cat" / "aa.png").write_bytes(b"")
    (flat / "cat" / "bb.png").write_bytes(b"no image")
    fails(flat, flat / "cat" / "aa.png", "2 other image(s)", flat / "cat" / "bb.png")


def test_float_pixels_are_refused(flat: Path) -> None:
    write(flat / "cat" / "f.tif", 1, mode="F")
    fails(flat, flat / "cat" / "f.tif", "32 bits per pixel")


def no_path(path: Path) -> list[object]:
    (path / "cat").rmdir()
    path.rmdir()
    return [path, "does not exist"]


def a_file(path: Path) -> list[object]:
    (path / "cat").rmdir()
    path.rmdir()
    path.write_text("")
    return [path, "is not a directory"]


def no_classes(path: Path) -> list[object]:
    (path / "cat").rmdir()
    return [path, "no class directories"]


def loose_images(path: Path) -> list[object]:
    (path / "cat").rmdir()
    write_class(path, range(3))
    return [path, "3 image(s) directly in it"]


def no_images(path: Path) -> list[object]:
    return [path, "no images"]


def one_class(path: Path) -> list[object]:
    write_class(path / "cat", range(3))
    return [path, "single class 'cat'"]


def empty_class(path: Path) -> list[object]:
    write_class(path / "dog", range(3))
    return [path / "cat", "no images"]


def single_image(path: Path) -> list[object]:
    write_class(path / "dog", range(3))
    write_class(path / "cat", range(1))
    return [path / "cat", "single image"]


def no_test(path: Path) -> list[object]:
    (path / "cat").rmdir()
    write_class(path / "train" / "cat", range(3))
    return [path, "no test/"]


def no_train(path: Path) -> list[object]:
    (path / "cat").rmdir()
    write_class(path / "test" / "cat", range(3))
    return [path, "no train/"]


def loose_train(path: Path) -> list[object]:
    (path / "cat").rmdir()
    write_class(path / "train", range(3))
    write_class(path / "test", range(3))
    return [path / "train", "no class directories"]


def only_in_test(path: Path) -> list[object]:
    for name in ("train/cat", "train/dog", "test/cat", "test/dog", "test/eel"):
        write_class(path / name, range(1))
    return [path / "test" / "eel", "no training images"]


def only_in_train(path: Path) -> list[object]:
    for name in ("train/cat", "train/dog", "train/eel", "test/cat", "test/dog"):
        write_class(path / name, range(1))
    return [path / "train" / "eel", "no test images"]


def no_domain(path: Path) -> list[object]:
    (path / "cat").rmdir()
    (path / "domains").mkdir()
    return [path / "domains", "no domain"]


def domains_and_classes(path: Path) -> list[object]:
    write_class(path / "domains" / "sun" / "cat", range(3))
    return [path, "also cat/"]


def looping_link(path: Path) -> list[object]:
    write_class(path / "dog", range(3))
    (path / "cat" / "again").symlink_to(path / "cat")
    return [path / "cat" / "again", "loops"]


def link_to_itself(path: Path) -> list[object]:
    (path / "dog").symlink_to(path / "dog")
    return [path / "dog", "cannot follow"]


def broken_link(path: Path) -> list[object]:
    (path / "cat" / "a.png").symlink_to(path / "gone.png")
    return [path / "cat" / "a.png", "broken link"]


def pipe(path: Path) -> list[object]:
    os.mkfifo(path / "cat" / "a.png")
    return [path / "cat" / "a.png", "is not a file"]


@pytest.mark.parametrize(
    "mistake",
    [
        no_path,
        a_file,
        no_classes,
        loose_images,
        no_images,
        one_class,
        empty_class,
        single_image,
        no_test,
        no_train,
        loose_train,
        only_in_test,
        only_in_train,
        no_domain,
        domains_and_classes,
        looping_link,
        link_to_itself,
        broken_link,
        pipe,
    ],
)
def test_mistakes_are_explained_with_the_path(tmp_path: Path, mistake: Callable[[Path], list[object]]) -> None:
    folder = tmp_path / "pictures"
    (folder / "cat").mkdir(parents=True)
    fails(folder, *mistake(folder))


def test_a_directory_that_cannot_be_listed_is_named(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path) == flat / "cat":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    fails(flat, flat / "cat", "Permission denied")
