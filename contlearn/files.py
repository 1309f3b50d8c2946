"""Writing files so that a reader, or a power cut, meets the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from contlearn.errors import ContlearnError


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the content of ``path`` in one step: temporary file in its folder, fsync, rename, fsync of the folder.

    A failure, an exception included, leaves the old file as it was and no temporary file behind; a killed process may
    leave one named ``.tmp-*``.

    Raises:
        ContlearnError: the target cannot be written (missing folder, a folder in its place, no permission, full disk).
    """
    target = Path(path)
    # Not tempfile.mkstemp: its files are readable by the owner alone, and the rename would keep that.
    temporary = target.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        if target.is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise unwritable(target, error) from error
    _sync_folder(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`atomic_write_bytes` of ``text`` in UTF-8, its line ends kept as they are."""
    atomic_write_bytes(path, text.encode("utf-8"))


def unwritable(path: str | os.PathLike[str], error: Exception) -> ContlearnError:
    """The error for a path that cannot be written, with the system's reason and the part of the path at fault."""
    target = Path(path)
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, FileNotFoundError) and not target.parent.exists():
        reason = f"the folder {str(target.parent)!r} does not exist"
    return ContlearnError(f"cannot write {str(target)!r}: {reason}")


def _sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut, where the system can do that (Windows cannot)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
