"""Checked access to JSON that somebody else wrote: what is missing is empty, what has another type is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contlearn.errors import ContlearnError

TEXT_LIMIT = 4000  # characters


class Node:
    """A JSON object that knows where it stands, for error messages.

    Args:
        value: the object.
        where: file and path inside it, such as ``pareto.json: cells[3]``.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise ContlearnError(f"{where}: expected an object, got {_short(value)}")
        self.value: Mapping[str, Any] = value
        self.where = where

    def at(self, key: str) -> str:
        """Where a key of this object stands."""
        return f"{self.where}.{key}"

    def object(self, key: str) -> Node:
        """The object under ``key``; empty where it is missing or null."""
        value = self.value.get(key)
        return Node({} if value is None else value, self.at(key))

    def objects(self, key: str) -> list[Node]:
        """The list of objects under ``key``."""
        return [Node(value, f"{self.at(key)}[{index}]") for index, value in enumerate(self.items(key))]

    def children(self) -> list[tuple[str, Node]]:
        """Every value of this object, each an object itself; nulls are left out."""
        return [(str(key), Node(value, self.at(key))) for key, value in self.value.items() if value is not None]

    def items(self, key: str) -> Sequence[Any]:
        """The list under ``key``; empty where it is missing or null."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise ContlearnError(f"{self.at(key)}: expected a list, got {_short(value)}")
        return value

    def text(self, key: str, default: str = "") -> str:
        """The text under ``key``, at most 4,000 characters of it."""
        value = self.value.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ContlearnError(f"{self.at(key)}: expected text, got {_short(value)}")
        return value if len(value) <= TEXT_LIMIT else value[:TEXT_LIMIT] + " …"

    def number(self, key: str) -> float | None:
        """The number under ``key``; ``None`` where it is missing, null or not finite."""
        return number(self.value.get(key), self.at(key))

    def whole(self, key: str) -> int | None:
        """The whole number under ``key``, or ``None``."""
        found = self.number(key)
        return None if found is None else int(found)


def number(value: Any, where: str) -> float | None:
    """A finite number as it is; ``None`` for null and what is not finite.

    Raises:
        ContlearnError: another type.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ContlearnError(f"{where}: expected a number, got {_short(value)}")
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def matrix(value: Sequence[Any], where: str) -> list[list[float | None]]:
    """A list of rows of numbers; short rows are filled with ``None``."""
    rows = []
    for index, row in enumerate(value):
        if not isinstance(row, list):
            raise ContlearnError(f"{where}[{index}]: expected a list, got {_short(row)}")
        rows.append([number(item, f"{where}[{index}]") for item in row])
    width = max(map(len, rows), default=0)
    return [row + [None] * (width - len(row)) for row in rows]


def read_json(path: Path) -> Node:
    """The object in a JSON file.

    Raises:
        ContlearnError: it cannot be read, or holds something else.
    """
    try:
        return Node(json.loads(path.read_bytes()), str(path))
    except OSError as error:
        raise ContlearnError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ContlearnError(f"{path}: damaged ({error}); expected JSON") from error


def _short(value: Any) -> str:
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return shown if len(shown) <= 60 else shown[:57] + "..."
