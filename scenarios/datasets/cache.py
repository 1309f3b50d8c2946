"""Decoded images kept between runs: one memory-mapped ``.npy`` per data set, checked against its checksum before use.

Lies in CONTLEARN_CACHE (default ``~/.cache/contlearn``) under ``images/``; everything there may be deleted at any time.
The key covers every file's path, size and modification time: a changed data set gets a new entry. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contlearn.scenarios.datasets.locate import CACHE_VARIABLE, cache_directory

_VERSION = 1
_PIECE = 2**22  # bytes
_STALE_SECONDS = 24 * 3600


def fingerprint(files: Sequence[Path], *, root: Path, settings: str) -> str:
    """The key of ``files`` decoded with ``settings``: a SHA-256 in hex. A missing file is left to the reader."""
    digest = hashlib.sha256(json.dumps([_VERSION, str(root.resolve()), settings]).encode())
    for path in files:
        try:
            facts = path.stat()
            stamp = (facts.st_size, facts.st_mtime_ns)
        except OSError:
            stamp = (-1, -1)
        digest.update(json.dumps([os.path.relpath(path, root), *stamp]).encode())
    return digest.hexdigest()


def load(key: str) -> np.ndarray | None:
    """The cached array, uint8 ``(n, channels, height, width)``, mapped copy-on-write; ``None`` when there is none.

    An entry that does not match its checksum is deleted with a warning.
    """
    array_file, facts_file = _entry(key)
    if not array_file.exists() and not facts_file.exists():
        return None
    try:
        facts: Any = json.loads(facts_file.read_text())
        if _sha256(array_file) != facts["sha256"]:
            raise ValueError("checksum mismatch")
        # Copy-on-write keeps torch from warning of a read-only tensor; the file never changes.
        array: np.ndarray = np.load(array_file, mmap_mode="c", allow_pickle=False)
        if array.dtype != np.uint8 or array.ndim != 4:
            raise ValueError(f"unexpected {array.dtype} array of {array.ndim} dimensions")
        return array
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"discarding the damaged image cache {array_file} ({error}); decoding again", stacklevel=2)
        for path in (array_file, facts_file):
            with contextlib.suppress(OSError):  # gone already, or not ours to delete
                path.unlink()
        return None


def store(key: str, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> np.ndarray | None:
    """Write uint8 ``chunks`` that make up an array of ``shape`` as the entry ``key``, and map it as ``load`` does.

    The entry appears whole or not at all. A cache that cannot be written (no space, no permission) warns and gives
    ``None``; errors raised by ``chunks`` pass through.
    """
    array_file, facts_file = _entry(key)
    try:
        array_file.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(array_file.parent)
        checksum = _write_array(array_file, shape, chunks)
        _replace(facts_file, json.dumps({"sha256": checksum}).encode())
        array: np.ndarray = np.load(array_file, mmap_mode="c", allow_pickle=False)
        return array
    except OSError as error:
        warnings.warn(
            f"decoded images are not cached: cannot write {array_file.parent} ({error.strerror or error}); "
            f"{CACHE_VARIABLE} names another directory",
            stacklevel=2,
        )
        return None


def _entry(key: str) -> tuple[Path, Path]:
    directory = cache_directory() / "images"
    return directory / f"{key}.npy", directory / f"{key}.json"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _write_array(target: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> str:
    """Stream the array to disk, a chunk at a time, so that it never has to fit in memory; gives its SHA-256."""
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    try:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as stream:
            for piece in itertools.chain((header.getvalue(),), (chunk.tobytes() for chunk in chunks)):
                digest.update(piece)
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
        return digest.hexdigest()
    finally:
        Path(partial).unlink(missing_ok=True)


def _replace(target: Path, content: bytes) -> None:
    handle, partial = tempfile.mkstemp(dir=target.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


def _remove_stale(directory: Path) -> None:
    """Delete what killed runs left behind more than a day ago."""
    for partial in directory.glob("*.partial"):
        with contextlib.suppress(OSError):  # another process may be first
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                partial.unlink()
