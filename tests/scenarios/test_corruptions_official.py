"""CIFAR-C and ImageNet-C, read from tiny stand-ins in the official file formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contlearn import scenarios
from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import describe, load, status
from contlearn.strategies.loader import BatchSource

LABELS = [3, 0, 9, 3, 7, 1]
TWO = ["fog", "snow"]
WNIDS = ("n01443537", "n02012849", "n02124075")


def pixels(experience) -> torch.Tensor:
    source = BatchSource(experience.dataset.eval())
    return source.raw(torch.arange(len(source)))[0]


def make_cifar_c(root: Path, folder: str = "CIFAR-10-C") -> dict[str, np.ndarray]:
    """Two corruptions of six images; ``(5, 6, 32, 32, 3)`` each."""
    (root / folder).mkdir(parents=True)
    np.save(root / folder / "labels.npy", np.array(LABELS * 5, dtype=np.uint8))
    made = {}
    for number, name in enumerate(TWO):
        made[name] = np.random.default_rng(number).integers(0, 256, (5, 6, 32, 32, 3), dtype=np.uint8)
        np.save(root / folder / f"{name}.npy", made[name].reshape(30, 32, 32, 3))
    return made


def make_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    record = bytes(range(256)) * 12
    for number in range(1, 6):
        content = b"".join(bytes([label]) + record for label in (2 * number - 2, 2 * number - 1))
        (folder / f"data_batch_{number}.bin").write_bytes(content)
    (folder / "test_batch.bin").write_bytes(bytes([0]) + record)
    (folder / "batches.meta.txt").write_text("\n".join(f"thing {label}" for label in range(10)))


def make_imagenet_c(root: Path, *, below: str = "") -> None:
    """Pictures of a single grey that says corruption, severity, class and number."""
    for number, name in enumerate(TWO):
        for severity in range(1, 6):
            for label, wnid in enumerate(WNIDS):
                for index in range(2):
                    folder = root / "ImageNet-C" / below / name / str(severity) / wnid
                    folder.mkdir(parents=True, exist_ok=True)
                    value = 100 * number + 16 * severity + 5 * label + 2 * index
                    Image.new("RGB", (224, 224), (value,) * 3).save(folder / f"val_{index}.JPEG")


@pytest.mark.parametrize(("name", "folder"), [("cifar10_c", "CIFAR-10-C"), ("cifar100_c", "CIFAR-100-C")])
def test_cifar_c_gives_the_block_of_the_severity(tmp_path: Path, name: str, folder: str) -> None:
    made = make_cifar_c(tmp_path, folder)
    stream = scenarios.corruptions(name, corruptions=TWO, schedule="gradual", severity=2, root=str(tmp_path))
    assert stream.domains == ["fog:1", "fog:2", "fog:1#2", "snow:1", "snow:2", "snow:1#2"]
    assert stream.input_shape == (3, 32, 32) and stream.n_classes == (10 if name == "cifar10_c" else 100)
    for experience, (corruption, severity) in zip(
        stream.test_stream, [(c, s) for c in TWO for s in (1, 2, 1)], strict=True
    ):
        block = torch.from_numpy(made[corruption][severity - 1]).permute(0, 3, 1, 2)
        found = [next(i for i, image in enumerate(block) if torch.equal(image, one)) for one in pixels(experience)]
        assert sorted(found) == list(range(6))
        assert list(experience.dataset.targets) == [LABELS[row] for row in found]


def test_cifar_c_is_normalised_resized_and_sampled_as_cifar(tmp_path: Path) -> None:
    made = make_cifar_c(tmp_path)
    stream = scenarios.corruptions("cifar10_c", corruptions=["snow"], samples=2, severity=4, root=str(tmp_path))
    (experience,) = stream.test_stream
    raw = pixels(experience)
    known = {bytes(image.transpose(2, 0, 1).tobytes()) for image in made["snow"][3]}
    assert len(raw) == 2 and all(image.numpy().tobytes() in known for image in raw)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    expected = (raw / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(torch.stack([x for x, *_ in experience.dataset]), expected)
    plain = scenarios.corruptions("cifar10_c", corruptions=["snow"], normalise=False, root=str(tmp_path))
    assert float(plain.test_stream[0].dataset[0][0].min()) >= 0
    small = scenarios.corruptions("cifar10_c", corruptions=["snow"], image_size=16, root=str(tmp_path))
    assert small.input_shape == (3, 16, 16) == tuple(small.test_stream[0].dataset[0][0].shape)


def test_the_clean_cifar_is_the_training_stream_where_it_is_there(tmp_path: Path) -> None:
    make_cifar_c(tmp_path)
    without = scenarios.corruptions("cifar10_c", corruptions=TWO, root=str(tmp_path))
    assert len(without.test_stream) == 2 and without.class_names[0] == "airplane"
    for use in (list, len, lambda stream: stream[0], lambda stream: list(without.streams["train"])):
        with pytest.raises(ContlearnError, match=r"cifar10_c.* has no training images of its own.*'cifar10' not found"):
            use(without.train_stream)
    make_cifar10(tmp_path)
    stream = scenarios.corruptions("cifar10_c", corruptions=TWO, root=str(tmp_path))
    assert [list(e.dataset.targets) for e in stream.train_stream] == [list(range(10))]
    assert stream.class_names[3] == "thing 3"
    assert torch.equal(pixels(stream.test_stream[1]), pixels(without.test_stream[1]))


@pytest.mark.parametrize("below", ["", "weather"])
def test_imagenet_c_follows_the_sorted_class_folders(tmp_path: Path, below: str) -> None:
    make_imagenet_c(tmp_path, below=below)
    stream = scenarios.corruptions("imagenet_c", corruptions=TWO, severity=3, samples=4, root=str(tmp_path))
    assert stream.input_shape == (3, 224, 224) and stream.class_names == WNIDS
    chosen = []
    for number, experience in enumerate(stream.test_stream):
        values = pixels(experience)[:, 0, 0, 0].int() - 100 * number - 48
        assert (values // 5).tolist() == list(experience.dataset.targets)
        chosen.append(sorted(values.tolist()))
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 4  # the same pictures under both
    with pytest.raises(ContlearnError, match="'imagenet_c' has no training images"):
        list(stream.train_stream)
    small = scenarios.corruptions("imagenet_c", corruptions=["snow"], image_size=32, root=str(tmp_path))
    assert pixels(small.test_stream[0]).shape == (6, 3, 32, 32)


def cut(root: Path) -> str:
    path = root / "CIFAR-10-C" / "fog.npy"
    path.write_bytes(path.read_bytes()[:5000])
    return f"damaged file {path}"


def shorter(root: Path) -> str:
    path = root / "CIFAR-10-C" / "fog.npy"
    np.save(path, np.load(path)[:25])
    return f"damaged file {path}: uint8 array of shape (25, 32, 32, 3), expected uint8 (30, 32, 32, 3)"


def floats(root: Path) -> str:
    path = root / "CIFAR-10-C" / "fog.npy"
    np.save(path, np.load(path).astype(np.float32))
    return f"damaged file {path}: float32"


def objects(root: Path) -> str:
    path = root / "CIFAR-10-C" / "labels.npy"
    np.save(path, np.array([{}, 1], dtype=object), allow_pickle=True)
    return f"damaged file {path} ("


def unequal_blocks(root: Path) -> str:
    path = root / "CIFAR-10-C" / "labels.npy"
    np.save(path, np.arange(30, dtype=np.uint8) % 10)
    return f"damaged file {path}: expected five equal blocks of labels in 0..9"


def uneven_labels(root: Path) -> str:
    path = root / "CIFAR-10-C" / "labels.npy"
    np.save(path, np.array([*LABELS, 1], dtype=np.uint8))
    return f"damaged file {path}: uint8 array of shape (7,)"


def absent(root: Path) -> str:
    path = root / "CIFAR-10-C" / "fog.npy"
    path.unlink()
    return f"{path} is missing; unpack {describe('cifar10_c').url} there, or leave 'fog' out"


@pytest.mark.parametrize("damage", [cut, shorter, floats, objects, unequal_blocks, uneven_labels, absent])
def test_damaged_arrays_are_explained_when_the_stream_is_made(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    make_cifar_c(tmp_path)
    said = damage(tmp_path)
    with pytest.raises(ContlearnError) as caught:
        scenarios.corruptions("cifar10_c", corruptions=TWO, root=str(tmp_path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def no_classes(root: Path) -> str:
    for path in (root / "ImageNet-C" / "fog" / "5").iterdir():
        path.rename(root / path.name)
    return f"{root / 'ImageNet-C' / 'fog' / '5'} holds 0 class directories; expected 1,000"


def empty_class(root: Path) -> str:
    folder = root / "ImageNet-C" / "fog" / "5" / WNIDS[1]
    for path in folder.iterdir():
        path.unlink()
    return f"{folder} holds no images"


def no_corruption(root: Path) -> str:
    (root / "ImageNet-C" / "snow").rename(root / "snow")
    return f"{root / 'ImageNet-C' / 'snow' / '5'} is missing"


@pytest.mark.parametrize("damage", [no_classes, empty_class, no_corruption])
def test_damaged_folders_are_explained_when_the_stream_is_made(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    make_imagenet_c(tmp_path)
    said = damage(tmp_path)
    with pytest.raises(ContlearnError) as caught:
        scenarios.corruptions("imagenet_c", corruptions=TWO, root=str(tmp_path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_missing_under_one_corruption_is_named_when_it_is_read(tmp_path: Path) -> None:
    make_imagenet_c(tmp_path)
    gone = tmp_path / "ImageNet-C" / "snow" / "5" / WNIDS[2] / "val_1.JPEG"
    gone.unlink()
    stream = scenarios.corruptions("imagenet_c", corruptions=TWO, image_size=8, root=str(tmp_path))
    assert len(pixels(stream.test_stream[0])) == 6
    with pytest.raises(ContlearnError, match=f"cannot read the image {gone}"):
        pixels(stream.test_stream[1])


@pytest.mark.parametrize("size", [4, 10**6, 8.0, True])
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: object) -> None:
    make_cifar_c(tmp_path)
    with pytest.raises(ContlearnError, match="image_size must be 8 to 4096 pixels"):
        scenarios.corruptions("cifar10_c", corruptions=TWO, root=str(tmp_path), image_size=size)


@pytest.mark.parametrize("name", ["cifar10_c", "cifar100_c", "imagenet_c"])
def test_what_is_missing_is_said_and_load_points_to_the_scenario(tmp_path: Path, name: str) -> None:
    with pytest.raises(ContlearnError) as caught:
        scenarios.corruptions(name, root=str(tmp_path))
    assert str(caught.value) == status(name, root=tmp_path)[1]
    assert describe(name).layouts[0][0] in str(caught.value)
    for path in describe(name).layouts[0]:
        (tmp_path / path).mkdir(parents=True)
    with pytest.raises(ContlearnError, match="use the scenario corruptions"):
        load(name, root=tmp_path)
