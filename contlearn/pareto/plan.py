"""From a specification to the cells of a sweep: the resolved configuration of every run, before any of them starts."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from contlearn.errors import ContlearnError
from contlearn.pareto.specification import Specification

# Options that say how much a strategy may remember, by what a sweep gives: bytes, or exemplars.
BUDGET = "memory_budget"
EXEMPLARS = ("memory_size", "patterns_per_experience")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        id: folder name: strategy, memory, seed and a hash of the configuration. Equal ids mean equal configurations.
        label: the curve it belongs to: the strategy's label and the values of its axes.
        strategy: the registered strategy.
        budget: bytes it was given; ``None`` without.
        memory_size: exemplars it was given; ``None`` without.
        seed: seed of the run.
        axes: value of each axis it takes part in.
        config: resolved configuration, as ``contlearn run`` would write it.
    """

    id: str
    label: str
    strategy: str
    budget: int | None
    memory_size: int | None
    seed: int
    axes: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def group(self) -> str:
        """What it shares with the same run under other seeds."""
        if self.budget is not None:
            return f"{self.label} @ {self.budget} B"
        return self.label if self.memory_size is None else f"{self.label} @ {self.memory_size}"

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def expand(specification: Specification) -> list[Cell]:
    """The cells, all strategies at the first seed before any at the second.

    A strategy that remembers nothing runs once per seed whatever the budgets, and takes part in those axes only that it
    has an option for.

    Raises:
        ContlearnError: an unknown name or key, a value of the wrong type, a budget that a strategy cannot take, an axis
            that nothing has, or two cells that are the same.
    """
    used: set[str] = set()
    variants = [
        variant
        for label, options in specification.strategies.items()
        for variant in _variants(specification, label, dict(options), used)
    ]
    for axis in specification.axes:
        if axis not in used:
            raise ContlearnError(f"axes.{axis}: none of the strategies {', '.join(specification.strategies)} has it")
    if (specification.budgets or specification.memory_sizes) and all(v[2] is None and v[3] is None for v in variants):
        key = "budgets" if specification.budgets else "memory_sizes"
        raise ContlearnError(f"{key}: none of the strategies {', '.join(specification.strategies)} has a memory")
    cells: dict[str, Cell] = {}
    for seed in specification.seeds:
        for label, name, budget, memory_size, axes, resolved in variants:
            config = {**copy.deepcopy(resolved), "seed": seed}
            cell_id = _id(name, budget, memory_size, seed, config)
            if cell_id in cells:
                raise ContlearnError(
                    f"strategies: {cells[cell_id].group!r} and {label!r} are the same configuration; expected each once"
                )
            cells[cell_id] = Cell(cell_id, label, name, budget, memory_size, seed, axes, config)
    return list(cells.values())


def _variants(
    specification: Specification, label: str, options: dict[str, Any], used: set[str]
) -> Iterator[tuple[str, str, int | None, int | None, dict[str, Any], dict[str, Any]]]:
    """Label, strategy, budget, memory size, axes and resolved configuration of a strategy, seed aside."""
    from contlearn.config import resolve
    from contlearn.options import strategy_options

    name = str(options.pop("name", label))
    try:
        valid = [option.name for option in strategy_options(name)]
    except ContlearnError as error:
        raise ContlearnError(f"strategies: {error}") from None
    axes = {
        axis: values
        for axis, values in specification.axes.items()
        if not axis.startswith("strategy.") or axis.removeprefix("strategy.") in valid
    }
    used.update(axes)
    for axis in axes:
        if axis.startswith("strategy.") and axis.removeprefix("strategy.") in options:
            raise ContlearnError(f"strategies.{label}.{axis.removeprefix('strategy.')}: given here and as an axis")
    for budget, memory_size in _memories(specification, label, name, valid, options):
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            content: dict[str, Any] = {key: dict(value) for key, value in specification.base.items()}
            content["strategy"] = {**content.get("strategy", {}), **options, "name": name}
            content["threads"] = specification.threads
            for axis, value in chosen.items():
                section, _, option = axis.partition(".")
                content.setdefault(section, {})[option] = value
            if budget is not None:
                content["strategy"][BUDGET] = budget
            if memory_size is not None:
                content["strategy"].update(_exemplars(content, valid, memory_size, label))
            try:
                resolved = resolve(content)
            except ContlearnError as error:
                raise ContlearnError(f"strategies.{label}: {error}") from None
            yield _labelled(label, chosen), name, budget, memory_size, chosen, resolved


def _memories(
    specification: Specification, label: str, name: str, valid: Sequence[str], options: Mapping[str, Any]
) -> list[tuple[int | None, int | None]]:
    """Pairs of bytes and exemplars to give a strategy in turn."""
    counted = [option for option in EXEMPLARS if option in valid]
    if specification.budgets and BUDGET not in valid and counted:
        raise ContlearnError(
            f"budgets: strategy {name!r} takes no {BUDGET}, only {counted[0]}; expected 'memory_sizes: [...]' instead"
        )
    swept = [BUDGET, *counted] if BUDGET in valid else counted
    if not (specification.budgets or specification.memory_sizes) or not swept:
        return [(None, None)]
    base = specification.base.get("strategy", {})
    for option in swept:
        where = f"strategies.{label}" if option in options else "base.strategy" if option in base else None
        if where is not None:
            key = "budgets" if specification.budgets else "memory_sizes"
            raise ContlearnError(f"{where}.{option}: the sweep sets it through {key}; expected one of the two")
    if specification.budgets:
        return [(budget, None) for budget in specification.budgets]
    return [(None, size) for size in specification.memory_sizes] if counted else [(None, None)]


def _exemplars(content: Mapping[str, Any], valid: Sequence[str], memory_size: int, label: str) -> dict[str, int]:
    """The option that gives a strategy so many exemplars in all."""
    if "memory_size" in valid:
        return {"memory_size": memory_size}
    from contlearn.config import resolve

    scenario = resolve({"scenario": content.get("scenario") or {}})["scenario"]
    experiences = int(scenario.get("n_experiences") or 1)
    if memory_size < experiences:
        raise ContlearnError(
            f"memory_sizes: {label} keeps as many exemplars of each of {experiences} experiences; expected at least "
            f"{experiences}, got {memory_size}"
        )
    return {"patterns_per_experience": memory_size // experiences}


def _labelled(label: str, axes: Mapping[str, Any]) -> str:
    """The label with the values of its axes: ``replay, lr=0.05``; an axis is named in full where two end alike."""
    last = [axis.partition(".")[2] for axis in axes]
    names = [axis if last.count(short) > 1 else short for axis, short in zip(axes, last, strict=True)]
    values = [f"{name}={value}" for name, value in zip(names, axes.values(), strict=True)]
    return ", ".join([label, *values])


def _id(name: str, budget: int | None, memory_size: int | None, seed: int, config: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]
    memory = [f"{budget}B"] if budget is not None else [f"m{memory_size}"] if memory_size is not None else []
    return "-".join([name, *memory, f"seed{seed}", digest])
