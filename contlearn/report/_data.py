"""What the scripts of a page draw, as plain JSON types."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from contlearn.report._content import (
    COMPONENTS,
    Cell,
    Content,
    Group,
    Matrix,
    Spread,
    level_words,
    lower_is_better,
    memory_name,
    metric_name,
    option_words,
)

EPOCHS_LIMIT = 5000  # points of the loss that are drawn


def page_data(content: Content) -> dict[str, Any]:
    """Series, groups, fronts and records of a page, numbers rounded to what a plot can show."""
    numbers = {group.id: index for index, group in enumerate(content.groups)}
    levels = content.levels
    return {
        "kind": content.kind,
        "series": content.series,
        "levels": [level_words(level) for level in levels],
        "metrics": [
            {"key": name, "label": metric_name(name), "lower": lower_is_better(name)} for name in content.metrics
        ],
        "memory": [
            {"key": name, "label": memory_name(name), "unit": "exemplars" if name == "memory_size" else "bytes"}
            for name in content.memory
        ],
        "components": [{"key": name, "label": memory_name(name)} for name in COMPONENTS if name in content.memory],
        "groups": [_group(content, group) for group in content.groups],
        "fronts": {
            memory: {metric: [numbers[one] for one in ids] for metric, ids in found.items()}
            for memory, found in content.fronts.items()
        },
        "epochs": _thinned(
            [[e["experience"], e["epoch"], _rounded(e["loss"], 6), _rounded(e["lr"], 9)] for e in content.epochs]
        ),
        "steps": [{"label": _step(after), "memory": dict(memory)} for after, memory in content.memory_steps],
        "domains": _domains(content.groups),
    }


def mean_matrix(matrices: Sequence[Matrix]) -> list[list[float | None]]:
    """The mean over seeds of every pair that all of them have."""
    if not matrices:
        return []
    rows = min(map(len, matrices))
    columns = min((len(row) for matrix in matrices for row in matrix), default=0)
    return [[_mean([matrix[i][j] for matrix in matrices]) for j in range(columns)] for i in range(rows)]


def curve(group: Group) -> list[list[float | None]]:
    """(mean, standard deviation) of the accuracy on everything seen, after each experience that all seeds reached."""
    spreads = [Spread.of(values) for values in zip(*(cell.seen for cell in group.cells), strict=False)]
    return [[_rounded(spread.mean), _rounded(spread.sd)] for spread in spreads]


def _group(content: Content, group: Group) -> dict[str, Any]:
    setting = group.setting
    level = setting.level
    return {
        "id": group.id,
        "series": content.series.index(content.series_of[group.id]),
        "label": setting.label,
        "strategy": setting.strategy,
        "level": None if level is None else content.levels.index(level),
        "budget": level_words(level),
        "options": option_words(setting.options),
        "seeds": [seed for seed in group.seeds if seed is not None],
        "metrics": {name: _spread(spread, 6) for name, spread in group.metrics.items()},
        "memory": {name: _spread(spread, 1) for name, spread in group.memory.items()},
        "curve": curve(group),
        "joint": bool(group.cells) and all(cell.joint for cell in group.cells),
        "matrix": mean_matrix([cell.matrix for cell in group.cells if cell.matrix]),
        "runs": [
            {"seed": cell.seed, "matrix": [[_rounded(value) for value in row] for row in cell.matrix]}
            for cell in group.cells
            if cell.matrix and len(group.cells) > 1
        ],
    }


def _domains(groups: Sequence[Group]) -> dict[str, Any]:
    """Errors by domain: a line of means over the seeds for each group, and one for the source model of the first."""
    names = list(dict.fromkeys(name for group in groups for cell in group.cells for name in cell.domains))
    known = [(index, group.cells) for index, group in enumerate(groups) if any(cell.domains for cell in group.cells)]

    def means(cells: Sequence[Cell], which: int) -> list[float | None]:
        return [_mean([cell.domains.get(name, (None, None))[which] for cell in cells]) for name in names]

    source = means(known[0][1], 1) if known else []
    return {
        "names": names,
        "lines": [{"group": index, "errors": means(cells, 0)} for index, cells in known],
        "source": source if any(error is not None for error in source) else [],
    }


def _spread(spread: Spread, digits: int) -> list[float | int | None]:
    return [*(_rounded(value, digits) for value in (spread.mean, spread.sd, spread.low, spread.high)), spread.n]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(fmean(known)) if known and len(known) == len(values) else None


def _rounded(value: Any, digits: int = 4) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return round(value, digits)


def _thinned(points: list[Any]) -> list[Any]:
    step = -(-len(points) // EPOCHS_LIMIT) or 1
    return points[::step]


def _step(after: int) -> str:
    return "before training" if after < 0 else f"after experience {after + 1}"
