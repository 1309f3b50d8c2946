"""Decoding, resizing and the cache of decoded images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import cache, images
from contlearn.scenarios.datasets.images import Decoding, read_images
from contlearn.scenarios.datasets.resize import resized


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five noisy RGB images of different sizes."""
    generator = np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate([(20, 31), (31, 20), (7, 9), (16, 16), (40, 17)]):
        path = tmp_path / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that takes even small data sets; gives the directory of its entries."""
    monkeypatch.setattr(images, "_CACHE_ABOVE", 1)
    monkeypatch.setenv("CONTLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def read(files: list[Path], size: int | None = 16) -> torch.Tensor:
    return read_images(files, Decoding(image_size=size), root=files[0].parent, name="toy")


def entries(directory: Path, pattern: str = "*") -> list[Path]:
    return sorted(directory.glob(pattern))


@pytest.mark.parametrize("size", [8, 16, 25])
def test_resizing_equals_torchvision(files: list[Path], size: int) -> None:
    transform = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    expected = torch.stack([transform(Image.open(path)) for path in files])
    assert torch.equal(read(files, size), expected)


def test_tensors_resize_as_one_whole_whatever_the_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1030, 1, 6, 6), dtype=torch.uint8, generator=generator)
    small = resized(pixels, 3)
    assert small.shape == (1030, 1, 3, 3) and small.dtype == torch.uint8
    assert torch.equal(small[1020:], resized(pixels[1020:], 3))
    assert resized(pixels, 6) is pixels and resized(pixels, None) is pixels


def test_order_is_kept_over_many_chunks(tmp_path: Path) -> None:
    paths = []
    for number in range(600):
        paths.append(tmp_path / f"{number}.pgm")
        paths[-1].write_bytes(b"P5 1 1 255\n" + bytes([number % 251]))
    pixels = read_images(paths, Decoding(channels=None), root=tmp_path, name="toy")
    assert pixels.flatten().tolist() == [number % 251 for number in range(600)]


def test_small_sets_leave_no_cache(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTLEARN_CACHE", str(tmp_path / "cache"))
    read(files)
    assert not (tmp_path / "cache").exists()


def test_a_cache_hit_gives_the_same_tensor_without_decoding(
    files: list[Path], cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(files)
    assert [path.suffix for path in entries(cached)] == [".json", ".npy"]
    monkeypatch.setattr(images._Decoder, "_decode", None)  # decoding would fail
    assert torch.equal(read(files), first)


def test_writing_to_a_cached_tensor_leaves_the_cache_alone(files: list[Path], cached: Path) -> None:
    first = read(files).clone()
    read(files).zero_()
    assert torch.equal(read(files), first)


def test_another_size_or_a_changed_file_gets_its_own_entry(files: list[Path], cached: Path) -> None:
    before = read(files)
    read(files, 8)
    assert len(entries(cached, "*.npy")) == 2
    Image.new("RGB", (16, 16), (1, 2, 3)).save(files[0])
    os.utime(files[0], ns=(1, 1))
    after = read(files)
    assert len(entries(cached, "*.npy")) == 3
    assert after[0, :, 0, 0].tolist() == [1, 2, 3] and torch.equal(after[1:], before[1:])


def flip_a_pixel(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)


def cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-100])


def replace_by_pickle(entry: Path) -> None:
    np.save(entry, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def drop_the_array(entry: Path) -> None:
    entry.unlink()


def drop_the_checksum(entry: Path) -> None:
    entry.with_suffix(".json").unlink()


def spoil_the_checksum(entry: Path) -> None:
    entry.with_suffix(".json").write_text("[]")


@pytest.mark.parametrize(
    "damage", [flip_a_pixel, cut, replace_by_pickle, drop_the_array, drop_the_checksum, spoil_the_checksum]
)
def test_a_damaged_cache_is_discarded_with_a_warning(files: list[Path], cached: Path, damage: object) -> None:
    first = read(files).clone()
    damage(entries(cached, "*.npy")[0])  # type: ignore[operator]
    with pytest.warns(UserWarning, match="discarding the damaged image cache"):
        assert torch.equal(read(files), first)
    assert torch.equal(read(files), first)  # mended: no warning


def test_a_pickled_array_with_a_matching_checksum_is_not_read(files: list[Path], cached: Path) -> None:
    first = read(files).clone()
    entry = entries(cached, "*.npy")[0]
    replace_by_pickle(entry)
    entry.with_suffix(".json").write_text(f'{{"sha256": "{hashlib.sha256(entry.read_bytes()).hexdigest()}"}}')
    with pytest.warns(UserWarning, match="Python objects"):
        assert torch.equal(read(files), first)


def test_a_cache_that_cannot_be_written_warns_and_reads_anyway(
    files: list[Path], tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(files)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CONTLEARN_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="CONTLEARN_CACHE names another directory"):
        assert torch.equal(read(files), expected)


def test_a_full_disk_leaves_nothing_behind(files: list[Path], cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert read(files).shape == (5, 3, 16, 16)
    assert entries(cached) == []


def test_an_unreadable_image_leaves_nothing_in_the_cache(files: list[Path], cached: Path) -> None:
    files[3].write_bytes(b"")
    files[4].unlink()
    with pytest.raises(ContlearnError, match=f"{files[3]}.*1 other image.*{files[4]}"):
        read(files)
    assert entries(cached) == []


def test_remains_of_killed_runs_are_removed_after_a_day(files: list[Path], cached: Path) -> None:
    cached.mkdir(parents=True)
    old, young = cached / "old.partial", cached / "young.partial"
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    read(files)
    assert not old.exists() and young.exists()


def test_progress_is_shown_on_a_terminal_only_for_many_images(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "_PROGRESS_ABOVE", 2)
    read(files)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(images.sys.stderr, "isatty", lambda: True)
    read(files[:2])
    assert capsys.readouterr().err == ""
    read(files)
    assert "reading toy" in capsys.readouterr().err
