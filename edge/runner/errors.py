"""The one error of the runner, and how it names the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RunnerError(ValueError):
    """Something in what was given (artifact, state, frames, labels, options) is wrong; the message is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def unknown(kind: str, name: object, valid: Iterable[str]) -> RunnerError:
    """The error for a name that is none of ``valid``, with the nearest of them."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return RunnerError(f"unknown {kind} {str(name)!r}{hint} (expected one of: {', '.join(valid)})")
