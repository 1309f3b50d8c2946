"""The user's own images, ``folder:PATH``: one directory per class.

* ``PATH/<class>/*``: split per class, drawn from the seed.
* ``PATH/train/<class>/*`` with ``PATH/test/<class>/*``: a given split; ``val`` serves where there is no ``test``.
* ``PATH/domains/<domain>/`` with either of the two inside: the same, with a domain label on every image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.images import Decoding, read_images
from contlearn.scenarios.datasets.loading import Request
from contlearn.scenarios.datasets.locate import expand
from contlearn.scenarios.datasets.normalisation import GREY, IMAGENET
from contlearn.scenarios.datasets.splits import stratified_split, take
from contlearn.scenarios.datasets.tree import images_below, subdirectories

_PARTS = ("train", "test", "val")
_LAYOUT = "PATH/<class>/* or PATH/train/<class>/* with PATH/test/<class>/*"


@dataclass(frozen=True)
class _ClassFolder:
    """The images of one class in one domain; ``part`` is "train", "test" or, to be split, ``None``."""

    class_name: str
    domain: str
    part: str | None
    directory: Path
    files: list[Path]


def load_folder(request: Request) -> ImageData:
    """Read a directory of images; a class is named after its directory, labels follow the names' order.

    All-grey images give 1 channel, anything else RGB; photographs are turned upright (EXIF). Images in nested
    directories belong to the class above. Normalised with ImageNet's mean and std, as pretrained models expect.

    Raises:
        ContlearnError: No such directory, no classes, fewer than 2 classes, an empty class, a class on one side of the
            split only, a class with a single image to split, or an unreadable image; the message names the path.
    """
    if not request.option:
        raise ContlearnError("data set 'folder' needs a path: folder:PATH, with one sub-directory of images per class")
    path = expand(request.option)
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise ContlearnError(f"data set {request.name!r}: {path} {problem}; expected {_LAYOUT}")
    folders, domain_names = _class_folders(path)
    class_names = tuple(sorted({folder.class_name for folder in folders}))
    if len(class_names) < 2:
        raise ContlearnError(f"{path} holds the single class {class_names[0]!r}; expected at least 2: {_LAYOUT}")
    _check_parts(folders)

    # Given parts come first and in blocks, so that train and test are views of one array.
    folders.sort(key=lambda folder: ("train", None, "test").index(folder.part))
    files = [file for folder in folders for file in folder.files]
    sizes = torch.tensor([len(folder.files) for folder in folders])
    group = torch.arange(len(folders)).repeat_interleave(sizes)
    in_test = torch.tensor([folder.part == "test" for folder in folders])[group]
    undecided = torch.tensor([folder.part is None for folder in folders])[group].nonzero().flatten()
    if len(undecided):
        _, drawn = stratified_split(group[undecided], test_share=request.test_share, seed=request.seed)
        in_test[undecided[drawn]] = True
    targets = torch.tensor([class_names.index(folder.class_name) for folder in folders])[group]
    domains = torch.tensor([domain_names.index(folder.domain) for folder in folders])[group]

    decoding = Decoding(image_size=request.image_size, channels=None, upright=True)
    images = read_images(files, decoding, root=path, name=request.name)
    train, test = (~in_test).nonzero().flatten(), in_test.nonzero().flatten()
    normalisation = GREY if images.shape[1] == 1 else IMAGENET
    named = domain_names != ("",)
    return ImageData(
        name=request.name,
        train_images=take(images, train),
        test_images=take(images, test),
        train_targets=targets[train],
        test_targets=targets[test],
        class_names=class_names,
        mean=normalisation.mean,
        std=normalisation.std,
        train_domains=domains[train] if named else None,
        test_domains=domains[test] if named else None,
        domain_names=domain_names if named else (),
    )


def _class_folders(path: Path) -> tuple[list[_ClassFolder], tuple[str, ...]]:
    """All class folders below ``path`` and the domain names, ``("",)`` without domains."""
    if not (path / "domains").is_dir():
        return _one_domain(path, ""), ("",)
    others = [directory.name for directory in subdirectories(path) if directory.name != "domains"]
    if others:
        raise ContlearnError(
            f"{path} holds domains/ and also {others[0]}/; with domains, all images go below {path / 'domains'}"
        )
    domains = subdirectories(path / "domains")
    if not domains:
        raise ContlearnError(f"{path / 'domains'} holds no domain; expected {path}/domains/<domain>/<class>/*")
    folders = [folder for domain in domains for folder in _one_domain(domain, domain.name)]
    return folders, tuple(domain.name for domain in domains)


def _one_domain(path: Path, domain: str) -> list[_ClassFolder]:
    if not _is_split(path):
        return _classes(path, domain, None)
    held_out = path / ("test" if (path / "test").is_dir() else "val")
    for part, words in ((path / "train", "train/"), (held_out, "test/ (or val/)")):
        if not part.is_dir():
            raise ContlearnError(f"{path} holds no {words}; expected {_LAYOUT}")
    return _classes(path / "train", domain, "train") + _classes(held_out, domain, "test")


def _is_split(path: Path) -> bool:
    """Whether ``train`` and ``test`` are the two sides of a split, not classes of that name (trains, say)."""
    names = {directory.name for directory in subdirectories(path)}
    if names and names <= set(_PARTS):
        return True
    return any(name in names and subdirectories(path / name) for name in _PARTS[:2])


def _classes(path: Path, domain: str, part: str | None) -> list[_ClassFolder]:
    directories = subdirectories(path)
    if not directories:
        loose = len(images_below(path))
        beside = f" but {loose} image(s) directly in it" if loose else ""
        raise ContlearnError(f"{path} holds no class directories{beside}; expected {_LAYOUT}")
    folders = [_ClassFolder(each.name, domain, part, each, images_below(each)) for each in directories]
    if not any(folder.files for folder in folders):
        raise ContlearnError(f"{path} holds no images in its {len(folders)} directories; expected {_LAYOUT}")
    for folder in folders:
        if not folder.files:
            raise ContlearnError(f"the class directory {folder.directory} holds no images; add some or remove it")
        if part is None and len(folder.files) == 1:
            raise ContlearnError(
                f"the class directory {folder.directory} holds a single image; "
                "a split needs at least 2 (1 train, 1 test)"
            )
    return folders


def _check_parts(folders: list[_ClassFolder]) -> None:
    """Every class needs images on both sides of the split, in some domain."""
    trained = {folder.class_name for folder in folders if folder.part != "test"}
    tested = {folder.class_name for folder in folders if folder.part != "train"}
    for folder in folders:
        if folder.class_name not in trained:
            raise ContlearnError(f"{folder.directory} is a class of the test data that has no training images")
        if folder.class_name not in tested:
            raise ContlearnError(f"{folder.directory} is a class of the training data that has no test images")
