"""The text files that list a data set's images and classes, and the reading of listed images into an ``ImageData``."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.images import Decoding, read_images
from contlearn.scenarios.datasets.loading import Request
from contlearn.scenarios.datasets.normalisation import IMAGENET


@dataclass
class Listing:
    """Image files, labels and domains of one side of a split, in order."""

    files: list[Path] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)


def read_listed(
    request: Request,
    train: Listing,
    test: Listing,
    class_names: Sequence[str],
    *,
    directory: Path,
    default_size: int,
    domain_names: tuple[str, ...] = (),
) -> ImageData:
    """Read RGB images with a given split: train and test become views of one array, normalised as ImageNet is.

    Args:
        request: The arguments of ``load``.
        train: Training images.
        test: Test images.
        class_names: One per class, in label order.
        directory: The data set's own directory, above all files.
        default_size: Height and width in pixels unless the request gives one.
        domain_names: One per domain; the listings then hold ``domains``.

    Raises:
        ContlearnError: A side is empty, or images cannot be read.
    """
    for side, listing in (("training", train), ("test", test)):
        if not listing.files:
            raise ContlearnError(f"data set {request.name!r}: {directory} lists no {side} images")
    decoding = Decoding(image_size=request.image_size or default_size)
    images = read_images([*train.files, *test.files], decoding, root=directory, name=request.name)
    n_train = len(train.files)
    return ImageData(
        name=request.name,
        train_images=images[:n_train],
        test_images=images[n_train:],
        train_targets=torch.tensor(train.targets),
        test_targets=torch.tensor(test.targets),
        class_names=tuple(class_names),
        mean=IMAGENET.mean,
        std=IMAGENET.std,
        train_domains=torch.tensor(train.domains) if domain_names else None,
        test_domains=torch.tensor(test.domains) if domain_names else None,
        domain_names=domain_names,
    )


def read_rows(path: Path, *, separator: str | None = None, at_least: int) -> list[list[str]]:
    """The non-empty lines of a text file, split into columns at ``separator`` (``None``: white space).

    Raises:
        ContlearnError: The file cannot be read, is empty, or a line has too few columns; names the file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ContlearnError(f"cannot read {path} ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = line.split(separator)
        if len(row) < at_least:
            raise ContlearnError(f"{path}, line {number}: expected at least {at_least} columns, got {line!r}")
        rows.append(row)
    if not rows:
        raise ContlearnError(f"{path} is empty")
    return rows


def read_table(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a csv file with a header line.

    Raises:
        ContlearnError: The file cannot be read, or a column or value is missing.
    """
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise ContlearnError(f"{path} has no column {missing[0]!r}; expected the header {','.join(columns)}")
            rows = [[row[column] for column in columns] for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ContlearnError(f"cannot read {path} ({error})") from error
    for number, row in enumerate(rows, start=2):
        if not all(row):
            raise ContlearnError(f"{path}, line {number}: expected {','.join(columns)}, got {row}")
    return rows


def distinct_names(keys: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The name of every key, or the key itself; names that keys share (ImageNet's two cranes) get the key added."""
    found = [names.get(key, key) for key in keys]
    counts = Counter(found)
    return [f"{name} ({key})" if counts[name] > 1 else name for key, name in zip(keys, found, strict=True)]
