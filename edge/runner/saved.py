"""Saved states: generations in a folder, each written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from contlearn.edge.runner.errors import RunnerError
from contlearn.edge.runner.tensors import encode_tensors


class StateFolder:
    """``state-000001.safetensors``, ``state-000002.safetensors``, ...: the newest and the one before it.

    A generation is written to a temporary file, which is synced and renamed, and the folder is synced; only then older
    ones go. Whenever the power fails, the folder holds at least the last generation that was there before.
    """

    NAME = re.compile(r"state-(\d{6,18})\.safetensors")

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def generations(self) -> dict[int, Path]:
        """Number and path of those present, newest first; they may be damaged."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise RunnerError(f"cannot read {str(self.folder)!r}: {error.strerror or error}") from error
        found = {int(match[1]): self.folder / name for name in names if (match := self.NAME.fullmatch(name))}
        return dict(sorted(found.items(), reverse=True))

    def path(self, number: int) -> Path:
        """Where a generation lies."""
        return self.folder / f"state-{number:06d}.safetensors"

    def write(self, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, keep: int | None) -> int:
        """Add a generation and return its number; of the older ones only ``keep`` stays.

        Raises:
            RunnerError: it cannot be written; what was there is as it was.
        """
        temporary = self.folder / ".tmp-state"
        try:
            if not self.folder.is_dir():
                os.makedirs(self.folder, exist_ok=True)
                _sync_folder(self.folder.parent)
            number = max(self.generations(), default=0) + 1
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o644)
            try:
                for piece in encode_tensors(tensors, metadata):
                    left = memoryview(piece)
                    while len(left):
                        left = left[os.write(file, left) :]
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(temporary, self.path(number))
            _sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise RunnerError(f"cannot save to {str(self.folder)!r}: {error.strerror or error}") from error
        for old, path in self.generations().items():
            if old not in (number, keep):
                with contextlib.suppress(OSError):
                    os.unlink(path)
        return number


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last, where the system can (Windows cannot open a folder)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
