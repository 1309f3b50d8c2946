"""CIFAR-10-C, CIFAR-100-C and ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261): official corrupted test images.

Test images only, too many to hold at once: ``open_corrupted`` reads one corruption at one severity when asked, for the
scenario ``corruptions``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.images import Decoding, read_images
from contlearn.scenarios.datasets.loading import Request
from contlearn.scenarios.datasets.locate import data_root, missing_files, not_found
from contlearn.scenarios.datasets.normalisation import CIFAR10, CIFAR100, IMAGENET, Normalisation
from contlearn.scenarios.datasets.registry import describe
from contlearn.scenarios.datasets.resize import resized
from contlearn.scenarios.datasets.tree import images_below, subdirectories

_SEVERITIES = 5
_GROUPS = ("noise", "blur", "weather", "digital")  # as the archives of ImageNet-C are called
_IMAGENET_SIZE = 224


class CorruptedFiles(Protocol):
    """Official test images under each corruption, in one order for all of them.

    Attributes:
        name: the data set's name.
        source: name of the data set whose training part goes with it, or ``None``.
        targets: int64 ``(n,)``, by position in the clean test set.
        class_names: by label.
        input_shape: ``(channels, height, width)``.
        normalisation: mean and std of ``x / 255``.
    """

    name: str
    source: str | None
    targets: Tensor
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    normalisation: Normalisation

    def images(self, corruption: str, severity: int, positions: Tensor) -> Tensor:
        """The images at ``positions`` ``(k,)``, uint8 ``(k, channels, height, width)``."""


@dataclass(frozen=True, kw_only=True)
class _Arrays:
    folder: str
    source: str
    classes: tuple[str, ...]
    normalisation: Normalisation


_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_ARRAYS = {
    "cifar10_c": _Arrays(folder="CIFAR-10-C", source="cifar10", classes=_CIFAR10_NAMES, normalisation=CIFAR10),
    "cifar100_c": _Arrays(
        folder="CIFAR-100-C",
        source="cifar100",
        classes=tuple(f"class {label}" for label in range(100)),
        normalisation=CIFAR100,
    ),
}
CORRUPTED = (*_ARRAYS, "imagenet_c")


def load_corrupted(request: Request) -> NoReturn:
    """What ``load`` does with these data sets: it says which scenario reads them.

    Raises:
        ContlearnError: always.
    """
    raise ContlearnError(
        f"data set {request.name!r} holds corrupted test images only, one set per corruption and severity; "
        f"use the scenario corruptions (scenarios.corruptions({request.name!r}))"
    )


def open_corrupted(
    name: str,
    *,
    corruptions: list[str],
    severity: int = 5,
    root: str | Path | None = None,
    image_size: int | None = None,
) -> CorruptedFiles:
    """Open one of ``CORRUPTED`` without reading its images.

    Args:
        name: the data set.
        corruptions: those that will be asked for; their files must be there.
        severity: one that will be asked for.
        root: the directory that holds the data sets; default: CONTLEARN_DATA.
        image_size: side in pixels to resize images to; default: 32, or 224 for ImageNet-C.

    Raises:
        ContlearnError: files missing or damaged.
    """
    info, where = describe(name), data_root(root)
    if missing_files(info, where.path):
        raise ContlearnError(not_found(info, where))
    if image_size is not None and (type(image_size) is not int or not 8 <= image_size <= 4096):
        raise ContlearnError(f"data set {name!r}: image_size must be 8 to 4096 pixels, got {image_size!r}")
    try:
        if name in _ARRAYS:
            return _ArrayFiles(name, where.path, corruptions, image_size)
        return _PictureFiles(name, where.path, corruptions, severity, image_size)
    except OSError as error:
        raise ContlearnError(f"data set {name!r}: cannot read {error.filename} ({error.strerror or error})") from error


class _ArrayFiles:
    """CIFAR-C: ``labels.npy`` and one ``<corruption>.npy`` of all five severities, ``(5 n, 32, 32, 3)``, mapped."""

    def __init__(self, name: str, root: Path, corruptions: list[str], image_size: int | None) -> None:
        facts = _ARRAYS[name]
        self.name, self.normalisation = name, facts.normalisation
        self.source: str | None = facts.source
        self.class_names = facts.classes
        self._folder = root / facts.folder
        self._size = image_size
        side = image_size or 32
        self.input_shape = (3, side, side)
        self.targets = self._labels()
        for corruption in corruptions:
            self._opened(corruption)

    def _labels(self) -> Tensor:
        path = self._folder / "labels.npy"
        labels = _mapped(path)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or len(labels) % _SEVERITIES:
            raise ContlearnError(
                f"damaged file {path}: {labels.dtype} array of shape {labels.shape}, expected whole numbers, "
                "five times as many as test images (50,000); unpack the official archive again"
            )
        blocks = labels.astype(np.int64).reshape(_SEVERITIES, -1)
        if (blocks != blocks[0]).any() or blocks.min() < 0 or blocks.max() >= len(self.class_names):
            raise ContlearnError(
                f"damaged file {path}: expected five equal blocks of labels in 0..{len(self.class_names) - 1}; "
                "unpack the official archive again"
            )
        return torch.from_numpy(blocks[0].copy())

    def _opened(self, corruption: str) -> np.ndarray:
        path = self._folder / f"{corruption}.npy"
        if not path.exists():
            raise ContlearnError(
                f"data set {self.name!r}: {path} is missing; unpack {describe(self.name).url} there, or leave "
                f"{corruption!r} out of corruptions"
            )
        array = _mapped(path)
        expected = (_SEVERITIES * len(self.targets), 32, 32, 3)
        if array.dtype != np.uint8 or array.shape != expected:
            raise ContlearnError(
                f"damaged file {path}: {array.dtype} array of shape {array.shape}, expected uint8 {expected} "
                "(five per label); unpack the official archive again"
            )
        return array

    def images(self, corruption: str, severity: int, positions: Tensor) -> Tensor:
        rows = positions.numpy() + (severity - 1) * len(self.targets)
        pixels = np.ascontiguousarray(self._opened(corruption)[rows].transpose(0, 3, 1, 2))
        return resized(torch.from_numpy(pixels), self._size)


def _mapped(path: Path) -> np.ndarray:
    """A ``.npy`` file as a memory map; one that holds pickled objects is refused."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ContlearnError(f"damaged file {path} ({error}); unpack the official archive again") from error
    if not isinstance(array, np.ndarray):
        raise ContlearnError(f"damaged file {path}: an archive of arrays, expected a single .npy array")
    return array


@dataclass
class _PictureFiles:
    """ImageNet-C: ``<corruption>/<severity>/<wnid>/*.JPEG``; labels follow the sorted wnids, as ImageNet's do."""

    name: str
    root: Path
    corruptions: list[str]
    severity: int
    image_size: int | None
    source: str | None = None
    normalisation: Normalisation = IMAGENET
    _listed: list[Path] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._folder = self.root / "ImageNet-C"
        side = self.image_size or _IMAGENET_SIZE
        self.input_shape = (3, side, side)
        first = self._domain(self.corruptions[0], self.severity)
        folders = subdirectories(first)
        if len(folders) < 2:
            raise ContlearnError(f"{first} holds {len(folders)} class directories; expected 1,000, <wnid>/*.JPEG")
        self.class_names = tuple(folder.name for folder in folders)
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = images_below(folder)
            if not found:
                raise ContlearnError(f"{folder} holds no images; unpack the official archive again")
            self._listed += [path.relative_to(first) for path in found]
            labels += [label] * len(found)
        self.targets = torch.tensor(labels)
        for corruption in self.corruptions:
            self._domain(corruption, self.severity)

    def _domain(self, corruption: str, severity: int) -> Path:
        for parent in (self._folder, *(self._folder / group for group in _GROUPS)):
            if (parent / corruption / str(severity)).is_dir():
                return parent / corruption / str(severity)
        raise ContlearnError(
            f"data set {self.name!r}: {self._folder / corruption / str(severity)} is missing; unpack "
            f"{describe(self.name).url} there, or leave {corruption!r} out of corruptions"
        )

    def images(self, corruption: str, severity: int, positions: Tensor) -> Tensor:
        domain = self._domain(corruption, severity)
        files = [domain / self._listed[position] for position in positions.tolist()]
        # A file missing here but listed under the first corruption is reported by the reader, with its path.
        return read_images(files, Decoding(image_size=self.input_shape[1]), root=self._folder, name=self.name)
