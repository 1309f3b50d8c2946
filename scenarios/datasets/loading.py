"""``load``, from a name to ``ImageData``: checks the arguments, finds or fetches the files and calls the reader."""

from __future__ import annotations

import importlib
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.locate import data_root, missing_files, not_found
from contlearn.scenarios.datasets.registry import DatasetInfo, resolve

_LARGEST_IMAGE = 4096


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a reader is asked for: the arguments of ``load``, checked.

    ``option`` is what followed the colon of the name: a path for ``folder``.
    """

    info: DatasetInfo
    name: str
    option: str
    root: Path
    image_size: int | None
    seed: int
    test_share: float


def load(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    test_share: float = 0.2,
    download: bool = False,
) -> ImageData:
    """Read a whole data set into memory (large decoded sets stay on disk as a memory map).

    Args:
        name: One of ``list_datasets()``; ``folder:PATH`` for your own images, ``core50:categories`` for 10 classes.
        root: The directory that holds the data sets. Default: the environment variable CONTLEARN_DATA, else
            ``~/.contlearn/data``. A relative ``folder:PATH`` is relative to the working directory instead.
        image_size: Height and width in pixels. Default: the set's usual size (native for digits, MNIST, CIFAR and
            Tiny ImageNet, 84 mini_imagenet, 128 core50, 224 imagenet_r and cub200; a folder's own size when all its
            images share one, else 224).
        seed: Draws the split where the data come without one (digits, mnist5k, imagenet_r, folders without test/).
        test_share: Share of test images, 0 < share < 1, where the data come without a split.
        download: Fetch missing files with torchvision or Avalanche's addresses, where these offer it.

    Returns:
        The data set.

    Raises:
        ContlearnError: Unknown name, bad argument, missing or damaged files, failed download.
    """
    info, option = resolve(name)
    _check_arguments(name, image_size, seed, test_share)
    where = data_root(root)
    if missing_files(info, where.path):
        if not download:
            raise ContlearnError(not_found(info, where))
        if info.downloader is None:
            raise ContlearnError(f"{not_found(info, where)}; download=True cannot help: no library offers it")
        _imported(info.downloader)(where.path)
        if missing_files(info, where.path):
            raise ContlearnError(f"after the download: {not_found(info, where)}")
    request = Request(
        info=info,
        name=name,
        option=option,
        root=where.path,
        image_size=None if image_size is None else int(image_size),
        seed=int(seed),
        test_share=float(test_share),
    )
    try:
        data: ImageData = _imported(info.loader)(request)
    except OSError as error:
        raise ContlearnError(f"data set {name!r}: cannot read {error.filename} ({error.strerror or error})") from error
    except MemoryError as error:
        raise ContlearnError(f"data set {name!r} does not fit in memory; a smaller image_size needs less") from error
    return data


def _imported(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _check_arguments(name: str, image_size: int | None, seed: int, test_share: float) -> None:
    if image_size is not None and not (_is_integer(image_size) and 1 <= image_size <= _LARGEST_IMAGE):
        raise ContlearnError(
            f"data set {name!r}: image_size must be an integer from 1 to {_LARGEST_IMAGE} pixels, got {image_size!r}"
        )
    if not (_is_integer(seed) and 0 <= seed < 2**63):
        raise ContlearnError(f"data set {name!r}: seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    if isinstance(test_share, bool) or not isinstance(test_share, numbers.Real) or not 0 < test_share < 1:
        raise ContlearnError(f"data set {name!r}: test_share must lie strictly between 0 and 1, got {test_share!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
