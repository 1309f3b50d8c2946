"""Walking directories of images: sub-directories in name order, the images below one, and links that loop."""

from __future__ import annotations

import os
from pathlib import Path

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.images import EXTENSIONS


def subdirectories(directory: Path) -> list[Path]:
    """The visible sub-directories, by name; hidden ones and macOS archive leftovers are skipped."""
    return [directory / entry.name for entry in _visible(directory) if _is_directory(entry)]


def images_below(directory: Path) -> list[Path]:
    """All image files in ``directory`` and its sub-directories, in path order; links are followed.

    Hidden files and files without an image extension are skipped.

    Raises:
        ContlearnError: A directory cannot be listed, a link loops, or something named like an image is no file.
    """
    return _walk(directory, frozenset())


def _walk(directory: Path, above: frozenset[tuple[int, int]]) -> list[Path]:
    entries = _visible(directory)
    facts = directory.stat()
    identity = (facts.st_dev, facts.st_ino)
    if identity in above:
        raise ContlearnError(f"the link {directory} loops back to a directory that contains it; remove the link")
    found: list[Path] = []
    for entry in entries:
        path = directory / entry.name
        if _is_directory(entry):
            found += _walk(path, above | {identity})
        elif path.suffix.lower() in EXTENSIONS:
            if not entry.is_file():
                raise ContlearnError(f"{path} is not a file (a broken link, pipe or device); remove or mend it")
            found.append(path)
    return found


def _visible(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            kept = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise ContlearnError(f"cannot list the directory {directory} ({error.strerror})") from error
    return sorted(kept, key=lambda entry: entry.name)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself, or into a directory that may not be entered
        raise ContlearnError(f"cannot follow {entry.path} ({error.strerror}); remove or mend it") from error
