"""Data sets cut from ImageNet: Tiny ImageNet, mini-ImageNet and ImageNet-R. A class's key is its WordNet id (wnid)."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.images import Decoding, read_images
from contlearn.scenarios.datasets.listings import Listing, distinct_names, read_listed, read_rows, read_table
from contlearn.scenarios.datasets.loading import Request
from contlearn.scenarios.datasets.normalisation import IMAGENET
from contlearn.scenarios.datasets.splits import stratified_split, take
from contlearn.scenarios.datasets.tree import images_below, subdirectories


def load_tiny_imagenet(request: Request) -> ImageData:
    """Tiny ImageNet (CS231n, Stanford): 500 training images per class; the labelled val images are the test data.

    Labels follow ``wnids.txt``, as in Avalanche.

    Raises:
        ContlearnError: A listing is damaged, a class has no images, or an image cannot be read.
    """
    directory = request.root / "tiny-imagenet-200"
    wnids = [row[0] for row in read_rows(directory / "wnids.txt", at_least=1)]
    words = {row[0]: row[1].strip() for row in read_rows(directory / "words.txt", separator="\t", at_least=2)}
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train, test = Listing(), Listing()
    for wnid in wnids:
        files = _class_images(directory / "train" / wnid)
        train.files += files
        train.targets += [label_of[wnid]] * len(files)
    annotations = directory / "val" / "val_annotations.txt"
    for file_name, wnid, *_ in read_rows(annotations, separator="\t", at_least=2):
        if wnid not in label_of:
            raise ContlearnError(f"{annotations}: {file_name} has class {wnid!r}, which wnids.txt does not list")
        test.files.append(directory / "val" / "images" / file_name)
        test.targets.append(label_of[wnid])
    names = distinct_names(wnids, words)
    return read_listed(request, train, test, names, directory=directory, default_size=64)


def load_mini_imagenet(request: Request) -> ImageData:
    """Mini-ImageNet: the 100 classes of the three few-shot csv files (Ravi and Larochelle 2017) taken together.

    There is no one official format and no official split for class-incremental work. This reads ``images/`` with
    ``train.csv``, ``val.csv`` and ``test.csv`` (columns filename, label) and takes the first five sixths of every
    class, in csv order, to train and the rest to test: 500 and 100 of 600, the numbers class-incremental papers use.
    Labels follow the sorted wnids.

    Raises:
        ContlearnError: A csv file is damaged, a class has a single image, or an image cannot be read.
    """
    directory = request.root / "mini-imagenet"
    files_of: dict[str, list[Path]] = {}
    for part in ("train", "val", "test"):
        for file_name, wnid in read_table(directory / f"{part}.csv", ("filename", "label")):
            files_of.setdefault(wnid, []).append(directory / "images" / file_name)
    train, test = Listing(), Listing()
    wnids = sorted(files_of)
    for label, wnid in enumerate(wnids):
        files = files_of[wnid]
        if len(files) < 2:
            raise ContlearnError(f"{directory}: the csv files list a single image of class {wnid!r}; expected 600")
        n_train = max(len(files) * 5 // 6, 1)
        for listing, chosen in ((train, files[:n_train]), (test, files[n_train:])):
            listing.files += chosen
            listing.targets += [label] * len(chosen)
    return read_listed(request, train, test, wnids, directory=directory, default_size=84)


def load_imagenet_r(request: Request) -> ImageData:
    """ImageNet-R (Hendrycks et al., arXiv 2006.16241): renditions of 200 ImageNet classes.

    It comes without a split. As in DualPrompt (arXiv 2204.04799) and CODA-Prompt (arXiv 2211.13218), 80 % train and
    20 % test, 24,000 and 6,000 images; drawn here from the seed, in proportion per class, so the members differ from
    those papers' own draws. Names come from ``README.txt`` where it is there.

    Raises:
        ContlearnError: Fewer than 2 classes, a class with fewer than 2 images, or an unreadable image.
    """
    directory = request.root / "imagenet-r"
    folders = subdirectories(directory)
    if len(folders) < 2:
        raise ContlearnError(
            f"{directory} holds {len(folders)} class directories; expected 200, imagenet-r/<wnid>/*.jpg"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = _class_images(folder, at_least=2)
        files += found
        labels += [label] * len(found)
    train, test = stratified_split(labels, test_share=request.test_share, seed=request.seed)
    images = read_images(files, Decoding(image_size=request.image_size or 224), root=directory, name=request.name)
    targets = torch.tensor(labels)
    return ImageData(
        name=request.name,
        train_images=take(images, train),
        test_images=take(images, test),
        train_targets=targets[train],
        test_targets=targets[test],
        class_names=tuple(distinct_names([folder.name for folder in folders], _readme_names(directory))),
        mean=IMAGENET.mean,
        std=IMAGENET.std,
    )


def _readme_names(directory: Path) -> dict[str, str]:
    """The lines ``<wnid> <name>`` of README.txt."""
    readme = directory / "README.txt"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return {wnid: name.strip() for wnid, name in re.findall(r"^(n\d{8})[ \t]+(\S.*)$", text, flags=re.MULTILINE)}


def _class_images(directory: Path, at_least: int = 1) -> list[Path]:
    found = images_below(directory) if directory.is_dir() else []
    if len(found) < at_least:
        raise ContlearnError(f"{directory} holds {len(found)} image(s), expected at least {at_least}; unpack it again")
    return found
