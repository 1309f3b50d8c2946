"""Entries of a manifest, each checked for its kind and range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from contlearn.edge.runner.errors import RunnerError, unknown
from contlearn.edge.runner.tensors import CODES


def field(record: Any, key: str, kind: type | tuple[type, ...], *, at: str = "", default: Any = ...) -> Any:
    """The entry ``key`` if it is of ``kind``; ``default`` where it is missing. ``at`` names the record in messages."""
    name = f"{at}.{key}" if at else key
    if not isinstance(record, dict):
        raise RunnerError(f"{at or 'content'}: expected an object, got {type(record).__name__}")
    if key not in record:
        if default is ...:
            raise RunnerError(f"{name} is missing")
        return default
    value = record[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if float in kinds and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise RunnerError(f"{name}: expected {' or '.join(k.__name__ for k in kinds)}, got {value!r:.60}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RunnerError(f"{name}: expected a finite number, got {value}")
    return value


def number(record: Any, key: str, low: float, *, at: str = "", high: float = math.inf) -> float:
    """An entry that is a finite number within ``low`` and ``high``."""
    value: float = field(record, key, float, at=at)
    _within(value, f"{at}.{key}".lstrip("."), low, high)
    return value


def whole(record: Any, key: str, low: int, *, at: str = "", default: Any = ...) -> int:
    """An entry that is a whole number from ``low``."""
    value: int = field(record, key, int, at=at, default=default)
    _within(value, f"{at}.{key}".lstrip("."), low, math.inf)
    return value


def _within(value: float, name: str, low: float, high: float) -> None:
    if not low <= value <= high:
        expected = f"expected at least {low}" if high == math.inf else f"expected {low} to {high}"
        raise RunnerError(f"{name}: {expected}, got {value!r:.60}")


def shape_of(record: Any, at: str) -> list[int]:
    """The entry ``shape``: fixed sizes."""
    shape: list[int] = field(record, "shape", list, at=at)
    if any(type(size) is not int or size < 0 for size in shape):
        raise RunnerError(f"{at}.shape: expected whole numbers, got {shape!r:.60}")
    return shape


def tensor_specs(items: list[Any], at: str, meanings: Sequence[str]) -> list[dict[str, Any]]:
    """Inputs or outputs of a graph: names that differ, known meanings, known dtypes, fixed shapes."""
    specs: list[dict[str, Any]] = []
    for item in items:
        name = field(item, "name", str, at=at)
        here = f"{at} {name!r}"
        meaning, dtype = field(item, "meaning", str, at=here), field(item, "dtype", str, at=here)
        if meaning not in meanings:
            raise unknown(f"meaning of {here}", meaning, meanings)
        if dtype not in CODES:
            raise unknown(f"dtype of {here}", dtype, CODES)
        if any(spec["name"] == name for spec in specs):
            raise RunnerError(f"{here} stands twice")
        specs.append({**item, "shape": shape_of(item, here)})
    return specs


def single(specs: list[dict[str, Any]], meaning: str, at: str, *, optional: bool = False) -> dict[str, Any] | None:
    """The spec with a meaning; there may be only one."""
    found = [spec for spec in specs if spec["meaning"] == meaning]
    if len(found) > 1 or not (found or optional):
        raise RunnerError(f"{at}: expected {'at most ' * optional}one with the meaning {meaning!r}, got {len(found)}")
    return found[0] if found else None


def same_form(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether shape and dtype are equal."""
    return bool(first["shape"] == second["shape"] and first["dtype"] == second["dtype"])
