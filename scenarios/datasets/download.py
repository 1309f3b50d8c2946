"""Downloads: CIFAR by torchvision; the others by torchvision's archive helper from Avalanche's addresses and MD5 sums.

Avalanche's own data set classes are not constructed: CORe50's unpickles file lists it has not verified, and CUB-200's
always turns to a Google Drive copy, through a gdown call that newer gdown releases do not have.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from contlearn.errors import ContlearnError


def fetch_cifar10(root: Path) -> None:
    """Download ``cifar-10-batches-py`` into ``root`` with torchvision."""
    from torchvision.datasets import CIFAR10

    with _explained("cifar10", CIFAR10.url, root):
        CIFAR10(root, download=True)


def fetch_cifar100(root: Path) -> None:
    """Download ``cifar-100-python`` into ``root`` with torchvision."""
    from torchvision.datasets import CIFAR100

    with _explained("cifar100", CIFAR100.url, root):
        CIFAR100(root, download=True)


def fetch_tiny_imagenet(root: Path) -> None:
    """Download ``tiny-imagenet-200`` into ``root``."""
    from avalanche.benchmarks.datasets import TinyImagenet

    _fetch_archive("tiny_imagenet", TinyImagenet.filename[1], TinyImagenet.md5, root, "tiny-imagenet-200")


def fetch_core50(root: Path) -> None:
    """Download ``core50_128x128`` into ``root``."""
    from avalanche.benchmarks.datasets.core50 import core50_data

    _, url, md5 = core50_data.data[0]
    _fetch_archive("core50", url, md5, root, "core50_128x128")


def fetch_cub200(root: Path) -> None:
    """Download ``CUB_200_2011`` into ``root``."""
    from avalanche.benchmarks.datasets import CUB200

    _fetch_archive("cub200", CUB200.official_url, CUB200.tgz_md5, root, "CUB_200_2011")


def _fetch_archive(name: str, url: str, md5: str, root: Path, folder: str) -> None:
    """Download, verify and unpack; ``root/folder`` appears whole or not at all."""
    from torchvision.datasets.utils import download_and_extract_archive

    if (root / folder).exists():
        raise ContlearnError(
            f"data set {name!r}: {root / folder} is there but incomplete; remove it to download it again"
        )
    with _explained(name, url, root):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as unpacked:
            download_and_extract_archive(url, str(root), extract_root=unpacked, md5=md5)
            os.replace(Path(unpacked) / folder, root / folder)


@contextmanager
def _explained(name: str, url: str, root: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, disk, checksum or archive: every library raises its own
        raise ContlearnError(
            f"the download of data set {name!r} from {url} to {root} failed ({type(error).__name__}: {error}); "
            "check the network and the disk, or fetch it by hand and unpack it there"
        ) from error
