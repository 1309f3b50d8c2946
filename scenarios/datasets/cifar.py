"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the official binary version, or the Python version through torchvision.

The Python version is pickled. Only torchvision's own classes open it, and they first compare the MD5 of every file with
the official one, so that nothing but the published bytes is unpickled. The binary version is preferred when both exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import normalisation
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.loading import Request
from contlearn.scenarios.datasets.locate import has_layout
from contlearn.scenarios.datasets.resize import resized

_PIXELS = 3 * 32 * 32
_BINARY = 0  # position in DatasetInfo.layouts


@dataclass(frozen=True, kw_only=True)
class _Version:
    """Where the binary version keeps what, and torchvision's class for the Python version."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last one is the class; CIFAR-100 puts the coarse label before it
    torchvision_class: str
    normalisation: normalisation.Normalisation


_CIFAR10 = _Version(
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    names="batches.meta.txt",
    label_bytes=1,
    torchvision_class="CIFAR10",
    normalisation=normalisation.CIFAR10,
)
_CIFAR100 = _Version(
    folder="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    names="fine_label_names.txt",
    label_bytes=2,
    torchvision_class="CIFAR100",
    normalisation=normalisation.CIFAR100,
)


def load_cifar10(request: Request) -> ImageData:
    """50,000 training and 10,000 test images, uint8 ``(n, 3, 32, 32)``, 10 classes.

    Raises:
        ContlearnError: A file is damaged or not the official one.
    """
    return _load(request, _CIFAR10)


def load_cifar100(request: Request) -> ImageData:
    """50,000 training and 10,000 test images, uint8 ``(n, 3, 32, 32)``, 100 (fine) classes.

    Raises:
        ContlearnError: A file is damaged or not the official one.
    """
    return _load(request, _CIFAR100)


@dataclass(frozen=True)
class _Part:
    images: torch.Tensor  # uint8 (n, 3, 32, 32)
    targets: torch.Tensor  # int64 (n,)


def _load(request: Request, version: _Version) -> ImageData:
    binary = has_layout(request.info, request.root, _BINARY)
    train, test, class_names = (_from_binary if binary else _from_torchvision)(request, version)
    return ImageData(
        name=request.name,
        train_images=resized(train.images, request.image_size),
        test_images=resized(test.images, request.image_size),
        train_targets=train.targets,
        test_targets=test.targets,
        class_names=class_names,
        mean=version.normalisation.mean,
        std=version.normalisation.std,
    )


def _from_binary(request: Request, version: _Version) -> tuple[_Part, _Part, tuple[str, ...]]:
    folder = request.root / version.folder
    lines = (folder / version.names).read_text(encoding="utf-8", errors="replace").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    batches = [_read_records(folder / file, version.label_bytes, len(names)) for file in version.train]
    train = _Part(torch.cat([batch.images for batch in batches]), torch.cat([batch.targets for batch in batches]))
    return train, _read_records(folder / version.test, version.label_bytes, len(names)), names


def _read_records(path: Path, label_bytes: int, n_classes: int) -> _Part:
    """One file of records: the label bytes, then 3,072 bytes, the red, green and blue planes row by row."""
    record = label_bytes + _PIXELS
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % record:
        raise ContlearnError(
            f"damaged file {path}: {content.size} bytes, expected a positive multiple of {record}; "
            "unpack the official binary version again"
        )
    records = content.reshape(-1, record)
    labels = records[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= n_classes:
        row = int(labels.argmax())
        raise ContlearnError(f"damaged file {path}: record {row} has label {labels[row]}, expected 0..{n_classes - 1}")
    images = np.ascontiguousarray(records[:, label_bytes:]).reshape(-1, 3, 32, 32)
    return _Part(torch.from_numpy(images), torch.from_numpy(labels))


def _from_torchvision(request: Request, version: _Version) -> tuple[_Part, _Part, tuple[str, ...]]:
    from torchvision import datasets

    source = getattr(datasets, version.torchvision_class)
    try:
        train, test = source(request.root, train=True), source(request.root, train=False)
    except Exception as error:
        raise ContlearnError(
            f"data set {request.name!r}: {request.root / source.base_folder} does not hold the official files "
            f"(torchvision: {error}); unpack {source.url} again"
        ) from error
    return _converted(train.data, train.targets), _converted(test.data, test.targets), tuple(train.classes)


def _converted(images: np.ndarray, targets: list[int]) -> _Part:
    """From torchvision's ``(n, height, width, channels)``."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return _Part(pixels, torch.tensor(targets, dtype=torch.int64))
