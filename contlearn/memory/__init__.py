"""The byte-exact memory account: reports per experience, the papers' own conventions, budgets.

``MemoryAccount`` measures a run, ``snapshot`` what a strategy holds now, ``papers`` reproduces published conventions.
Importing this package loads neither PyTorch nor Avalanche.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from contlearn.memory.units import in_words, parse_bytes

if TYPE_CHECKING:
    from contlearn.memory import papers
    from contlearn.memory.account import MemoryAccount, MemoryReport, snapshot

__all__ = ["MemoryAccount", "MemoryReport", "in_words", "papers", "parse_bytes", "snapshot"]

_LATE = dict.fromkeys(("MemoryAccount", "MemoryReport", "snapshot"), "contlearn.memory.account")


def __getattr__(name: str) -> Any:
    if name == "papers":
        return importlib.import_module("contlearn.memory.papers")
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
