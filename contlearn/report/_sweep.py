"""A sweep folder: ``pareto.json`` as the content of a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from contlearn.errors import ContlearnError
from contlearn.report._content import (
    GIVEN,
    MEMORY,
    Area,
    Cell,
    Content,
    Group,
    Paired,
    Setting,
    Spread,
    complete_fronts,
    group_cells,
    level_of,
    with_given,
)
from contlearn.report._reading import Node, matrix, number, read_json

FILE_NAME = "pareto.json"
SCHEMA = 1


def read(folder: Path) -> Content:
    """The content of a sweep folder. Fields that an older or partial sweep lacks stay empty.

    Raises:
        ContlearnError: ``pareto.json`` is missing, damaged, or of another schema.
    """
    path = folder / FILE_NAME
    file = read_json(path)
    if file.value.get("schema") != SCHEMA:
        raise ContlearnError(f"{path}: schema {file.value.get('schema')!r}, expected {SCHEMA}")
    cells = [_cell(node) for node in file.objects("cells")]
    members: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if cell.status == "complete":
            members.setdefault(cell.setting.key, []).append(cell)
    groups = with_given([_group(node, members) for node in file.objects("groups")] or group_cells(cells))
    config = dict(file.object("config").value)
    given = {
        memory: {metric: [str(one) for one in node.items(metric)] for metric in node.value}
        for memory, node in file.object("fronts").children()
    }
    return Content(
        kind="sweep",
        name=folder.resolve().name or str(folder),
        description=description(config),
        scenario=scenario_words(config),
        config=_as_yaml(config),
        environment=dict(file.object("environment").value),
        cells=cells,
        groups=groups,
        fronts=complete_fronts(groups, given),
        hypervolume={
            memory: _numbers(node) for memory, node in file.object("hypervolume").children() if _is_memory(memory)
        },
        areas=[
            Area(label, memory, node.number("auc_a"), node.number("auc_l"), node.number("from"), node.number("to"))
            for label, fields in file.object("auc").children()
            for memory, node in fields.children()
            if _is_memory(memory)
        ],
        paired=[_paired(node) for node in file.objects("paired")],
        notices=_notices(cells),
    )


def scenario_words(config: Mapping[str, Any]) -> str:
    """The stream of a configuration in a few words, such as ``class_incremental digits, 5 experiences``."""
    base = config.get("base") if isinstance(config.get("base"), Mapping) else config
    scenario = config.get("scenario") or (base.get("scenario") if isinstance(base, Mapping) else None)
    if not isinstance(scenario, Mapping):
        return scenario if isinstance(scenario, str) else ""
    names = (scenario.get("name"), scenario.get("dataset"))
    words = " ".join(name for name in names if isinstance(name, str)).replace("_", "-")
    count = scenario.get("n_experiences")
    return f"{words}, {count} experiences" if isinstance(count, int) else words


def description(config: Mapping[str, Any]) -> str:
    """The sentence that a configuration says about itself, or nothing."""
    found = config.get("description")
    return found if isinstance(found, str) else ""


def memory_numbers(node: Node) -> dict[str, float]:
    """Bytes by field from a memory record; parts of a field may be nested or have dotted names."""
    found: dict[str, float] = {}
    for name, value in node.value.items():
        if not _is_memory(name) or name in GIVEN:
            continue
        if isinstance(value, Mapping):
            parts = {f"{name}.{part}": part_bytes for part, part_bytes in _numbers(node.object(name)).items()}
            found |= parts
            found.setdefault(name, sum(parts.values()))
        elif (amount := number(value, node.at(name))) is not None:
            found[name] = amount
    return found


def _is_memory(name: str) -> bool:
    return name.split(".")[0] in MEMORY


def _numbers(node: Node) -> dict[str, float]:
    return {name: found for name in node.value if (found := node.number(name)) is not None}


def _setting(node: Node) -> Setting:
    strategy = node.text("strategy")
    return Setting(
        label=node.text("label") or strategy or node.text("id", "unnamed"),
        strategy=strategy or node.text("label", "unnamed"),
        budget=node.number("budget"),
        memory_size=node.whole("memory_size"),
        options=dict(node.object("axes").value),
    )


def _cell(node: Node) -> Cell:
    status = node.text("status", "missing")
    return Cell(
        id=node.text("id"),
        setting=_setting(node),
        seed=node.whole("seed"),
        status="complete" if status == "complete" else "failed" if status == "failed" else "missing",
        error=node.text("error") or None,
        folder=node.text("folder") or None,
        metrics={name: node.object("metrics").number(name) for name in node.object("metrics").value},
        memory=memory_numbers(node.object("memory")),
        matrix=matrix(node.items("accuracy_matrix"), node.at("accuracy_matrix")),
        seen=[number(value, node.at("accuracy_seen")) for value in node.items("accuracy_seen")],
        seconds=node.object("time").number("adapt_s" if node.value.get("domains") else "train_s"),
        domains=_domains(node.object("domains")),
    )


def _domains(node: Node) -> dict[str, tuple[float, float | None]]:
    pairs = {str(name): [number(item, node.at(name)) for item in node.items(name)][:2] for name in node.value}
    return {name: (pair[0], pair[1]) for name, pair in pairs.items() if len(pair) == 2 and pair[0] is not None}


def _group(node: Node, members: Mapping[tuple[Any, ...], list[Cell]]) -> Group:
    setting = _setting(node)
    seeds = [number(seed, node.at("seeds")) for seed in node.items("seeds")]
    return Group(
        id=node.text("id") or setting.label,
        setting=setting,
        seeds=[None if seed is None else int(seed) for seed in seeds],
        metrics={name: _spread(child) for name, child in node.object("metrics").children()},
        memory={
            name: _spread(child)
            for name, child in node.object("memory").children()
            if _is_memory(name) and name not in GIVEN
        },
        cells=members.get(setting.key, []),
    )


def _spread(node: Node) -> Spread:
    mean, sd, low, high = (node.number(name) for name in ("mean", "sd", "low", "high"))
    return Spread(mean, sd, low, high, node.whole("n") or 0)


def _paired(node: Node) -> Paired:
    difference, low, high, p_value = (node.number(name) for name in ("difference", "low", "high", "p_value"))
    return Paired(
        a=node.text("a"),
        b=node.text("b"),
        level=level_of(node.number("budget"), node.whole("memory_size")),
        metric=node.text("metric"),
        n=node.whole("n") or 0,
        difference=difference,
        low=low,
        high=high,
        p_value=p_value,
    )


def _as_yaml(config: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100) if config else ""
    except (yaml.YAMLError, RecursionError) as error:
        raise ContlearnError(f"{FILE_NAME}: a configuration that cannot be shown ({type(error).__name__})") from error


def _notices(cells: list[Cell]) -> list[str]:
    failed = sum(cell.status == "failed" for cell in cells)
    missing = sum(cell.status == "missing" for cell in cells)
    notices = []
    if failed:
        notices.append(f"{failed} of {len(cells)} cells failed; their errors are listed below.")
    if missing:
        notices.append(
            f"{missing} of {len(cells)} cells have not run yet: the same contlearn pareto command continues the sweep."
        )
    return notices
