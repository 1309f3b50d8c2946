"""Errors that are the user's to mend: one line saying what is wrong, what was expected, the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ContlearnError(Exception):
    """A mistake in what the user gave (config, data, file, option).

    The message is one line and needs no traceback; the command line prints it and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class Interrupted(Exception):
    """Raised between two iterations after ``interrupt`` of a strategy was set."""


def nearest(name: object, valid: Iterable[str]) -> str | None:
    """The valid name closest to ``name``, or ``None`` when nothing is close."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ContlearnError:
    """The error for a name that no registry holds, with the nearest valid one and the full list."""
    names = sorted(valid)
    close = nearest(name, names)
    hint = f"; did you mean {close!r}?" if close else ""
    return ContlearnError(f"unknown {kind} {str(name)!r}{hint} (expected one of: {', '.join(names)})")
