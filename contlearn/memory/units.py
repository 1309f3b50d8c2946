"""Bytes as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from contlearn.errors import ContlearnError

_FACTORS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(value: int | float | str, name: str = "memory_budget") -> int:
    """Bytes of ``16MB``, ``64 KiB``, ``4096``: powers of ten without an ``i``, of two with one.

    Raises:
        ContlearnError: not a positive amount of memory.
    """
    # ASCII digits, and no more of them than Python is willing to turn into a number.
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})\s*([a-zA-Z]*)\s*", str(value))
    if isinstance(value, bool) or match is None or match.group(2).lower() not in _FACTORS:
        raise ContlearnError(f"{name}: expected bytes such as 65536, 64KB or 16MiB, got {value!r}")
    amount = int(Fraction(match.group(1)) * _FACTORS[match.group(2).lower()])  # a float makes 1000 of 1.001KB
    if amount < 1:
        raise ContlearnError(f"{name}: expected at least 1 byte, got {value!r}")
    return amount


def in_words(amount: float | None) -> str:
    """Bytes in decimal units with three digits: ``12.3 kB``, ``1.05 MB``; a dash for ``None``."""
    if amount is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(amount) >= factor:
            return f"{amount / factor:.3g} {unit}" if abs(amount) < 999.5 * factor else f"{amount / factor:.0f} {unit}"
    return f"{amount:.0f} B"
