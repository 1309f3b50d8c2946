"""What the cells of a sweep come to, rebuildable from them: ``pareto.json``, ``pareto.csv``, ``pareto.png``."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contlearn import results as results_module
from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_text
from contlearn.pareto import statistics
from contlearn.pareto.folder import SweepFolder, read_record
from contlearn.pareto.plan import Cell

JSON, TABLE, FIGURE = "pareto.json", "pareto.csv", "pareto.png"
SCHEMA = 1
# Whether more is better. Hypervolumes need a worst value as well: 0 for accuracies, 1 for errors.
METRICS = {
    "final_accuracy": True,
    "average_accuracy": True,
    "learning_accuracy": True,
    "forgetting": False,
    "global_forgetting": False,
    "local_forgetting": False,
    "backward_transfer": True,
    "forward_transfer": True,
    "mean_error": False,
}
SHARES = ("final_accuracy", "average_accuracy", "learning_accuracy", "mean_error")
PAIRED = ("final_accuracy", "average_accuracy", "forgetting", "mean_error")
GIVEN = ("budget", "memory_size")
NOT_BYTES = ("exemplars", "memory_size")

Found = Mapping[str, Any]


def rebuild(folder: str | Path) -> dict[str, Any]:
    """Sum up the cells of a sweep's folder and write its tables, figure and page; the content of ``pareto.json``.

    Cells that have not run count as ``missing``. The figure needs a finished cell, the page ``contlearn.report``.

    Raises:
        ContlearnError: no sweep's folder, or it cannot be written.
    """
    place = SweepFolder(folder)
    plan, planned = place.plan()
    content = summarise(plan, [found(cell, place) for cell in planned])
    atomic_write_text(place.path / JSON, json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write_text(place.path / TABLE, as_csv(content))
    from contlearn.pareto import figure  # late: drawing needs Matplotlib, the numbers do not

    figure.draw(content, place.path / FIGURE)
    _page(place.path)
    return content


def found(cell: Cell, folder: SweepFolder) -> dict[str, Any]:
    """An entry of ``cells``: the cell and what came of it."""
    place = folder.cell(cell.id)
    record = read_record(place)
    entry: dict[str, Any] = {
        "id": cell.id,
        "group": cell.group,
        "label": cell.label,
        "strategy": cell.strategy,
        "budget": cell.budget,
        "memory_size": cell.memory_size,
        "seed": cell.seed,
        "axes": dict(cell.axes),
        "status": record["status"] if record else "missing",
        "error": record["error"] if record else None,
        "folder": place.relative_to(folder.path).as_posix(),
        "metrics": {},
        "memory": {},
        "accuracy_matrix": [],
        "accuracy_seen": [],
        "domains": {},
        "time": {},
    }
    if record is None or record["status"] != "complete":
        return entry
    try:
        results = results_module.read(place)
    except ContlearnError as error:
        return {**entry, "status": "missing", "error": str(error)}
    return {
        **entry,
        "metrics": dict(results["metrics"]),
        "memory": flat(results.get("memory") or {}),
        "accuracy_matrix": results.get("accuracy_matrix", []),
        "accuracy_seen": results.get("accuracy_seen", []),
        "domains": {
            name: [results["error_by_domain"][name], results["source_error_by_domain"][name]]
            for name in results.get("domains", ())
        },
        "time": {**results["time"], "cell_s": record["seconds"]},
    }


def flat(memory: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a memory account; of a nested one, the sum and each part as ``method_state.NAME``."""
    numbers: dict[str, float] = {}
    for name, value in memory.items():
        if isinstance(value, Mapping):
            parts = flat(value)
            numbers[name] = sum(part for key, part in parts.items() if "." not in key)
            numbers.update({f"{name}.{key}": part for key, part in parts.items()})
        elif _number(value):
            numbers[name] = value
    return numbers


def summarise(plan: Mapping[str, Any], cells: Sequence[Found]) -> dict[str, Any]:
    """The content of ``pareto.json``.

    ``cells``: every run. ``groups``: the finished runs that differ in their seed alone, with a
    :class:`~contlearn.pareto.statistics.Spread` of every metric and every part of memory. ``fronts``: ids of the groups
    whose mean no other beats, by memory field and metric, in order of memory. ``hypervolume``: area under those fronts
    with memory divided by the largest of the sweep, up to that largest memory and accuracy 0 (error 1): 0 to 1.
    ``auc``: areas under a label's curve in MiB (``statistics.area_under_curve``). ``paired``: two labels at equal
    budgets over their common seeds; one without a budget is compared at every budget of the other.

    Memory fields are those of the account, and ``budget`` or ``memory_size`` where the sweep sets them: there, a
    strategy that remembers nothing stands at 0.
    """
    complete = [cell for cell in cells if cell["status"] == "complete"]
    groups = [_group(members) for members in _by(complete, "group").values()]
    config = plan["config"]
    axes = [{"name": "budget", "values": config["budgets"]}] if config.get("budgets") else []
    axes += [{"name": "memory_size", "values": config["memory_sizes"]}] if config.get("memory_sizes") else []
    axes += [{"name": name, "values": values} for name, values in (config.get("axes") or {}).items()]
    fields = memory_fields(groups)
    return {
        "schema": SCHEMA,
        "config": config,
        "environment": plan.get("environment") or {},
        "axes": axes,
        "cells": list(cells),
        "groups": groups,
        "fronts": {field: _fronts(groups, field) for field in fields},
        "hypervolume": {field: _hypervolumes(groups, field) for field in fields},
        "auc": _areas(groups, [field for field in fields if field not in NOT_BYTES]),
        "paired": _paired(complete),
    }


def headline(groups: Sequence[Found]) -> str:
    """The metric that a sweep is drawn by: final accuracy, or mean error where all runs are test-time runs."""
    known = {name for group in groups for name in group["metrics"]}
    return "mean_error" if "mean_error" in known and "final_accuracy" not in known else "final_accuracy"


def memory_fields(groups: Sequence[Found]) -> list[str]:
    """The fields that can be an axis of memory: what all of it comes to, not the named parts of it, and no ratios."""
    names = dict.fromkeys(name for group in groups for name in group["memory"])
    account = [name for name in names if "." not in name and not name.endswith("ratio")]
    return [*account, *(name for name in GIVEN if any(group[name] is not None for group in groups))]


def memory_of(group: Found, field: str) -> float | None:
    """A group's memory by field: a mean over seeds, or what it was given (0 for nothing)."""
    if field in GIVEN:
        return float(group[field] or 0)
    return group["memory"][field]["mean"] if field in group["memory"] else None


def as_csv(content: Mapping[str, Any]) -> str:
    """A row per cell."""
    rows = []
    for cell in content["cells"]:
        row = {key: cell[key] for key in ("id", "label", "strategy", "budget", "memory_size", "seed")}
        row.update({f"axes.{name}": value for name, value in cell["axes"].items()})
        row.update(status=cell["status"], error=cell["error"], **cell["metrics"])
        for part in ("memory", "time"):
            row.update({f"{part}.{name}": value for name, value in cell[part].items()})
        rows.append({**row, "folder": cell["folder"]})
    columns = sorted(dict.fromkeys(name for row in rows for name in row), key=_column)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _column(name: str) -> int:
    """Sorts columns by kind; within one they stay in the order in which rows have them."""
    if name == "folder":
        return 5
    before = ("id", "label", "strategy", "budget", "memory_size", "seed")
    kinds = {"axes": 1, "memory": 3, "time": 4}
    return 0 if name in before else kinds.get(name.partition(".")[0], 2)


def _group(members: Sequence[Found]) -> dict[str, Any]:
    first = members[0]
    return {
        "id": first["group"],
        **{key: first[key] for key in ("label", "strategy", "budget", "memory_size", "axes")},
        "seeds": [member["seed"] for member in members],
        "metrics": _spreads(members, "metrics"),
        "memory": _spreads(members, "memory"),
    }


def _spreads(members: Sequence[Found], part: str) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(name for member in members for name in member[part])
    values = {name: [member[part][name] for member in members if _number(member[part].get(name))] for name in names}
    return {name: asdict(statistics.spread(known)) for name, known in values.items() if known}


def _fronts(groups: Sequence[Found], field: str) -> dict[str, list[str]]:
    fronts = {}
    for metric, maximise in METRICS.items():
        points = _points(groups, field, metric)
        if points:
            front = statistics.pareto_front(*_columns(points), maximise=maximise)
            fronts[metric] = [points[i][0]["id"] for i in front]
    return fronts


def _hypervolumes(groups: Sequence[Found], field: str) -> dict[str, float]:
    volumes = {}
    for metric in SHARES:
        memory, value = _columns(_points(groups, field, metric))
        value = value if METRICS[metric] else [1 - error for error in value]
        if memory and max(memory) > 0:
            scaled = [amount / max(memory) for amount in memory]
            volumes[metric] = statistics.hypervolume(scaled, value, reference=(1.0, 0.0))
    return volumes


def _areas(groups: Sequence[Found], fields: Sequence[str]) -> dict[str, dict[str, Any]]:
    areas: dict[str, dict[str, Any]] = {}
    for label, members in _by(groups, "label").items():
        for field in fields:
            average, last = (_columns(_points(members, field, m)) for m in ("average_accuracy", "final_accuracy"))
            auc_a, auc_l = statistics.area_under_curve(*average), statistics.area_under_curve(*last)
            if auc_a is not None or auc_l is not None:
                ends = {"from": min(last[0] or average[0]), "to": max(last[0] or average[0])}
                areas.setdefault(label, {})[field] = {"auc_a": auc_a, "auc_l": auc_l, **ends}
    return areas


def _paired(cells: Sequence[Found]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    by_label = {label: _by(members, *GIVEN) for label, members in _by(cells, "label").items()}
    for (a, ours), (b, theirs) in itertools.combinations(by_label.items(), 2):
        for memory in _levels(ours, theirs):
            first, second = (side.get(memory, side.get((None, None), [])) for side in (ours, theirs))
            for metric in PAIRED:
                compared = statistics.compare(_by_seed(first, metric), _by_seed(second, metric))
                if compared is not None:
                    equal = dict(zip(GIVEN, memory, strict=True))
                    found.append({"a": a, "b": b, **equal, "metric": metric, **asdict(compared)})
    return found


def _levels(ours: Mapping[Any, Any], theirs: Mapping[Any, Any]) -> list[Any]:
    """The amounts of memory that two labels can be compared at."""
    nothing = (None, None)
    if nothing in ours or nothing in theirs:
        given = [memory for memory in {**ours, **theirs} if memory != nothing]
        return given or [nothing]
    return [memory for memory in ours if memory in theirs]


def _by_seed(cells: Iterable[Found], metric: str) -> dict[Any, float]:
    return {cell["seed"]: cell["metrics"][metric] for cell in cells if _number(cell["metrics"].get(metric))}


def _points(groups: Sequence[Found], field: str, metric: str) -> list[tuple[Found, float, float]]:
    """Groups that have both, with their memory and their mean."""
    return [
        (group, memory, group["metrics"][metric]["mean"])
        for group in groups
        if metric in group["metrics"] and (memory := memory_of(group, field)) is not None
    ]


def _columns(points: Sequence[tuple[Found, float, float]]) -> tuple[list[float], list[float]]:
    return [memory for _, memory, _ in points], [value for _, _, value in points]


def _by(entries: Iterable[Found], *keys: str) -> dict[Any, list[Found]]:
    grouped: dict[Any, list[Found]] = {}
    for entry in entries:
        grouped.setdefault(entry[keys[0]] if len(keys) == 1 else tuple(entry[key] for key in keys), []).append(entry)
    return grouped


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _page(folder: Path) -> None:
    """``report.html``, where its writer is installed."""
    try:
        from contlearn import report
    except ImportError:
        return
    report.write_page(folder)
