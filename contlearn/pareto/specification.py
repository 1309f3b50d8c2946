"""What a sweep's YAML says, checked as far as that is possible without loading any method.

base:                                       # what all runs share: a run's configuration without a strategy's name
  scenario: {dataset: digits, n_experiences: 5}
  strategy: {lr: 0.1, epochs: 30}
  threads: 1                                # the default; --jobs is the number of cores by it
strategies:                                 # options by label; `name` where the label is not the strategy's
  naive: {}
  herding: {name: replay, policy: herding}
budgets: [4KB, 64KiB]                       # bytes of memory, or `memory_sizes: [50, 200]` in exemplars
axes: {strategy.lr: [0.05, 0.1]}            # any further option of scenario, model or strategy
seeds: 3                                    # or a list of them
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from contlearn.config import read
from contlearn.errors import ContlearnError, nearest
from contlearn.memory.units import parse_bytes

KEYS = ("description", "base", "strategies", "budgets", "memory_sizes", "axes", "seeds")
BASE_KEYS = ("scenario", "model", "strategy", "threads")
SECTIONS = ("scenario", "model", "strategy")
UNITS = ("B", "KB", "MB", "GB", "KiB", "MiB", "GiB")
_BYTES = "whole bytes such as 65536, 64KB (1000 bytes each) or 64KiB (1024)"


@dataclass(frozen=True)
class Specification:
    """A sweep as its author wrote it.

    Attributes:
        base: what all runs share: sections ``scenario``, ``model`` and ``strategy`` (without a name).
        strategies: options of each strategy by label; ``name`` where the label is not the strategy's.
        budgets: bytes, for ``memory_budget``; empty without.
        memory_sizes: exemplars, for ``memory_size``; empty without. At most one of the two is given.
        axes: further values to vary, by ``SECTION.OPTION``.
        seeds: seeds of the runs.
        threads: compute threads of each run.
        description: one line.
    """

    base: Mapping[str, Any]
    strategies: Mapping[str, Mapping[str, Any]]
    budgets: Sequence[int] = ()
    memory_sizes: Sequence[int] = ()
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    threads: int = 1
    description: str = ""

    @property
    def most_cells(self) -> int:
        """Number of cells if every strategy took part in every axis."""
        count = len(self.strategies) * max(1, len(self.budgets) + len(self.memory_sizes)) * len(self.seeds)
        for values in self.axes.values():
            count *= len(values)
        return count

    def as_config(self) -> dict[str, Any]:
        """The same as a YAML would say it, with bytes and seeds written out."""
        written: dict[str, Any] = {"description": self.description} if self.description else {}
        written["base"] = {**self.base, "threads": self.threads}
        written["strategies"] = {label: dict(options) for label, options in self.strategies.items()}
        if self.budgets:
            written["budgets"] = list(self.budgets)
        if self.memory_sizes:
            written["memory_sizes"] = list(self.memory_sizes)
        if self.axes:
            written["axes"] = {name: list(values) for name, values in self.axes.items()}
        return {**written, "seeds": list(self.seeds)}


def load(path: str | Path) -> dict[str, Any]:
    """Read a sweep's YAML file.

    Raises:
        ContlearnError: no such file, not YAML, or no mapping.
    """
    return _mapping(read(path), f"config {str(path)!r}")


def check(content: Mapping[str, Any], *, seeds: int | None = None) -> Specification:
    """The specification that a YAML's content stands for.

    Args:
        content: what :func:`load` gives, or the same as a dictionary.
        seeds: this many seeds, 0 and up, whatever the content says.

    Raises:
        ContlearnError: an unknown key or a value of the wrong form, with the nearest valid one.
    """
    _known_keys(_mapping(content, "sweep"), KEYS, "sweep")
    if "strategies" not in content:
        raise ContlearnError("strategies: missing; expected a mapping such as 'strategies: {naive: {}, replay: {}}'")
    if "budgets" in content and "memory_sizes" in content:
        raise ContlearnError("budgets and memory_sizes: expected one of them, bytes or exemplars, got both")
    base = _base(content.get("base"))
    description = content.get("description") or ""
    return Specification(
        base={section: base[section] for section in SECTIONS if section in base},
        strategies=_strategies(content["strategies"]),
        budgets=[_bytes(value) for value in _values(content, "budgets")],
        memory_sizes=[_whole(value, "memory_sizes", 1) for value in _values(content, "memory_sizes")],
        axes=_axes(content["axes"]) if "axes" in content else {},
        seeds=_seeds(content.get("seeds", 1) if seeds is None else seeds),
        threads=_whole(1 if base.get("threads") is None else base["threads"], "base.threads", 1),
        description=" ".join(str(description).split()),
    )


def _base(given: Any) -> dict[str, Any]:
    base = _mapping({} if given is None else given, "base")
    if "seed" in base:
        raise ContlearnError("base.seed: a sweep counts its own; expected 'seeds: 3' or 'seeds: [0, 1, 2]' beside base")
    _known_keys(base, BASE_KEYS, "base")
    for section in SECTIONS:
        if section in base:
            base[section] = _mapping(base[section] or {}, f"base.{section}")
    if "name" in base.get("scenario", {}):
        _registered("scenarios", base["scenario"]["name"])
    if "name" in base.get("strategy", {}):
        raise ContlearnError("base.strategy.name: strategies are named under 'strategies', not in base")
    return base


def _strategies(given: Any) -> dict[str, dict[str, Any]]:
    strategies = _mapping(given, "strategies")
    if not strategies:
        raise ContlearnError("strategies: expected at least one, as in 'strategies: {naive: {}, replay: {}}'")
    found = {label: _mapping(options or {}, f"strategies.{label}") for label, options in strategies.items()}
    for label, options in found.items():
        if not isinstance(options.get("name", ""), str):
            raise ContlearnError(f"strategies.{label}.name: expected text, got {options['name']!r}")
        _registered("strategies", options.get("name", label))
    return found


def _registered(kind: Literal["strategies", "scenarios"], name: Any) -> None:
    """Check a name against its registry, which is cheaper to read than what it names."""
    if kind == "strategies":
        from contlearn.strategies import registry
    else:
        from contlearn.scenarios import registry  # type: ignore[no-redef]
    try:
        registry.describe(name)
    except ContlearnError as error:
        raise ContlearnError(f"{'strategies' if kind == 'strategies' else 'base.scenario'}: {error}") from None


def _axes(given: Any) -> dict[str, list[Any]]:
    axes = _mapping(given, "axes")
    if not axes:
        raise ContlearnError("axes: expected at least one, as in 'axes: {strategy.lr: [0.05, 0.1]}'")
    for name, values in axes.items():
        section, dot, option = name.partition(".")
        if section not in SECTIONS or not dot or not option:
            close = nearest(section, SECTIONS)
            hint = f"; did you mean {f'{close}.{option}' if option else f'{close}.lr'!r}?" if close else ""
            raise ContlearnError(f"axes: expected names such as strategy.lr or model.hidden, got {name!r}{hint}")
        if name == "strategy.name":
            raise ContlearnError("axes: strategy.name is no axis; methods are listed under 'strategies'")
        if not isinstance(values, list) or not values:
            raise ContlearnError(f"axes.{name}: expected a list of values such as [0.05, 0.1], got {values!r}")
        _distinct(values, f"axes.{name}")
    return {name: list(values) for name, values in axes.items()}


def _seeds(given: Any) -> list[int]:
    if isinstance(given, list):
        if not given:
            raise ContlearnError("seeds: expected a number of seeds or a list of them, got an empty list")
        seeds = [_whole(value, "seeds", 0) for value in given]
        _distinct(seeds, "seeds")
        return seeds
    return list(range(_whole(given, "seeds", 1)))


def _values(content: Mapping[str, Any], key: str) -> list[Any]:
    if key not in content:
        return []
    values = content[key]
    if not isinstance(values, list) or not values:
        raise ContlearnError(f"{key}: expected a list that is not empty, got {values!r}")
    known = [_bytes(value) if key == "budgets" else value for value in values]
    _distinct(known, key)
    return known


def _bytes(value: Any) -> int:
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ContlearnError("not an amount")
        return parse_bytes(value, "budgets")
    except ContlearnError:
        close = _nearest_bytes(str(value)) if isinstance(value, str) else None
        hint = f"; did you mean {close!r}?" if close else ""
        raise ContlearnError(f"budgets: expected {_BYTES}, got {value!r}{hint}") from None


def _nearest_bytes(text: str) -> str | None:
    """An amount that :func:`parse_bytes` takes and that looks like ``text``, or ``None``."""
    match = re.search(r"(\d+(?:[.,]\d+)?)\s*([a-zA-Z]*)", text)
    if match is None or float(match.group(1).replace(",", ".")) == 0:
        return None
    unit = match.group(2)
    by_first = {name[0].lower(): name for name in ("B", "KB", "MB", "GB")}
    close = difflib.get_close_matches(unit.lower(), [name.lower() for name in UNITS], n=1, cutoff=0.7)
    exact = {name.lower(): name for name in UNITS}
    chosen = exact[close[0]] if close else by_first.get(unit[:1].lower(), "KB")
    return f"{match.group(1).replace(',', '.')}{chosen}"


def _whole(value: Any, key: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ContlearnError(f"{key}: expected a whole number of at least {least}, got {value!r}")
    return value


def _distinct(values: Sequence[Any], key: str) -> None:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ContlearnError(f"{key}: {value!r} is given twice")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ContlearnError(f"{where}: expected a mapping with text keys, got {_shown(value)}")
    return dict(value)


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)


def _known_keys(content: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    for key in content:
        if key not in valid:
            close = nearest(key, valid)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ContlearnError(f"{where}: unknown key {key!r}{hint} (expected one of: {', '.join(valid)})")
