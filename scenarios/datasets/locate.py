"""Where data sets lie on disk, and whether one is there: standard library only, so that ``status`` is cheap."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from contlearn.scenarios.datasets.registry import DatasetInfo, resolve

DATA_VARIABLE = "CONTLEARN_DATA"
CACHE_VARIABLE = "CONTLEARN_CACHE"
DEFAULT_ROOT = "~/.contlearn/data"
DEFAULT_CACHE = "~/.cache/contlearn"


@dataclass(frozen=True)
class DataRoot:
    """The directory that holds the data sets, and in words how it was chosen."""

    path: Path
    origin: str


def expand(path: str | Path) -> Path:
    """``path`` with a leading ``~`` resolved; an unknown user's ``~`` stays as it is."""
    return Path(os.path.expanduser(path))


def data_root(root: str | Path | None = None) -> DataRoot:
    """The argument, else the environment variable CONTLEARN_DATA, else ``~/.contlearn/data``."""
    if root is not None:
        return DataRoot(expand(root), "the root argument")
    chosen = os.environ.get(DATA_VARIABLE)
    if chosen:
        return DataRoot(expand(chosen), f"from {DATA_VARIABLE}")
    return DataRoot(expand(DEFAULT_ROOT), "the default")


def cache_directory() -> Path:
    """The environment variable CONTLEARN_CACHE, else ``~/.cache/contlearn``; anything in it may be deleted."""
    return expand(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE)


def missing_files(info: DatasetInfo, root: Path) -> list[str]:
    """What the most complete layout of ``info`` lacks under ``root``; empty when one layout is there in full."""
    lacks = [[path for path in layout if not os.path.exists(root / path)] for layout in info.layouts]
    return min(lacks, key=len, default=[])


def has_layout(info: DatasetInfo, root: Path, index: int) -> bool:
    """Whether the layout at ``index`` of ``info.layouts`` is there in full."""
    return all(os.path.exists(root / path) for path in info.layouts[index])


def not_found(info: DatasetInfo, root: DataRoot) -> str:
    """One line: what is missing, where it was looked for and what to do."""
    missing = missing_files(info, root.path)
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    folders = [layout[0].split("/", 1)[0] for layout in info.layouts]
    wanted = " or ".join(f"{folder}/" for folder in folders)
    text = (
        f"data set {info.name!r} not found under {root.path} ({root.origin}): expected {wanted} there (missing {shown})"
    )
    if root.path.name in folders:
        return f"{text}; the root is the directory that holds {root.path.name}: give {root.path.parent}"
    way = f"get it from {info.url} and unpack it there"
    if info.downloadable:
        way += ", or load with download=True"
    return f"{text}; {way}; {DATA_VARIABLE} or root= names another directory"


def status(name: str, root: str | Path | None = None) -> tuple[bool, str]:
    """Whether ``name`` can be loaded from here, and one line saying where it is or what to do.

    Looks at paths and installed packages only: it reads no image and imports no heavy library.

    Raises:
        ContlearnError: No such data set.
    """
    info, option = resolve(name)
    if info.package is not None:
        return _package_status(info)
    if info.name == "folder":
        if option in ("", "PATH"):
            return True, "any directory with one sub-directory of images per class, as folder:PATH"
        directory = expand(option)
        return (True, f"found {directory}") if directory.is_dir() else (False, f"no such directory: {directory}")
    where = data_root(root)
    if missing_files(info, where.path):
        return False, not_found(info, where)
    return True, f"found under {where.path}"


def _package_status(info: DatasetInfo) -> tuple[bool, str]:
    if importlib.util.find_spec(str(info.package)) is not None:
        return True, f"ships with the installed package {info.package}"
    return False, missing_package(info)


def missing_package(info: DatasetInfo) -> str:
    """One line: which package is missing and the command that installs it."""
    target = f"contlearn[{info.extra}]" if info.extra else "contlearn"
    return f'data set {info.name!r} needs the package {info.package}, which is not installed: pip install "{target}"'
