"""Run folders, one or many, as the content of a page: from raw events, or ``results.json`` where those are gone."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from contlearn import events as event_log
from contlearn import results as run_results
from contlearn.errors import ContlearnError
from contlearn.events import Event, latest
from contlearn.memory.units import in_words, parse_bytes
from contlearn.report._content import Cell, Content, Setting, complete_fronts, group_cells, option_words, with_given
from contlearn.report._reading import Node, matrix, number
from contlearn.report._sweep import description, memory_numbers, scenario_words

CONFIG = "config.yaml"
CONFIG_LIMIT = 100_000  # characters of config.yaml on a page
DEPTH = 4  # folders below the one named in which runs are looked for
LEAVES = 500  # options of a configuration that are compared
# Two runs that differ only in these are seeds of one setting.
NOT_A_SETTING = ("seed", "threads", "loggers", "description", "memory_budget")
DOMAIN_METRICS = ("mean_error", "source_mean_error")


def is_run(folder: Path) -> bool:
    """Whether a folder holds the records of a run."""
    return (folder / event_log.FILE_NAME).is_file() or (folder / run_results.FILE_NAME).is_file()


def read_run(folder: Path) -> Content:
    """The content of one run folder.

    Raises:
        ContlearnError: its records are damaged.
    """
    found, events = _records(folder)
    results = Node(found, str(folder))
    config = _config(folder)
    cell = _cell(results, folder, folder.name, config)
    cells = [replace(cell, setting=replace(cell.setting, label=cell.setting.strategy))]
    groups = group_cells(cells)
    notices = []
    if cell.status == "incomplete":
        notices.append("This run has not finished: the same contlearn run command with --resume goes on with it.")
    if found.get("worse_than_source"):
        notices.append("Adaptation made this model worse than the source model it started from.")
    if trips := len(results.items("trips")):
        notices.append(f"The adapter's guard tripped {'once' if trips == 1 else f'{trips} times'}.")
    return Content(
        kind="run",
        name=folder.resolve().name or str(folder),
        description=description(config),
        scenario=scenario_words(config) or results.text("scenario").replace("_", "-"),
        config=_config_text(folder),
        environment=dict(results.object("environment").value),
        cells=cells,
        groups=groups,
        fronts=complete_fronts(groups, {}),
        epochs=[
            {"experience": int(key[0]), "epoch": int(key[1]), "loss": record.get("loss"), "lr": record.get("lr")}
            for key, record in latest(events, "epoch", "experience", "epoch").items()
            if all(isinstance(part, int) for part in key)
        ],
        memory_steps=[
            (int(after), memory_numbers(Node(record, f"{folder}: memory record")))
            for (after,), record in latest(events, "memory", "after").items()
            if isinstance(after, int)
        ],
        notices=notices,
    )


def read_runs(folder: Path) -> Content:
    """The content of a folder that has run folders in it; a damaged one is shown as failed.

    Raises:
        ContlearnError: there is no run in it.
    """
    cells: list[Cell] = []
    configs: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    for path in _run_folders(folder):
        name = path.relative_to(folder).as_posix()
        try:
            found, _ = _records(path)
            config = _config(path)
            cells.append(_cell(Node(found, str(path)), path, name, config))
            environment = environment or dict(found.get("environment") or {})
        except ContlearnError as error:
            config = {}
            cells.append(Cell(name, Setting(name, name), None, "failed", error=str(error), folder=name))
        configs.append(config)
    if not cells:
        raise ContlearnError(
            f"nothing to report in {str(folder)!r}: expected a sweep (pareto.json), a run (events.jsonl or "
            "results.json) or a folder of runs; contlearn run CONFIG.yaml --out DIR makes a run"
        )
    cells = _label(cells, configs)
    groups = with_given(group_cells(cells))
    failed = sum(cell.status == "failed" for cell in cells)
    running = sum(cell.status == "incomplete" for cell in cells)
    streams = dict.fromkeys(scenario_words(config) for config in configs if config)
    notices = []
    if failed:
        notices.append(f"{failed} of {len(cells)} runs could not be read; their errors are listed below.")
    if running:
        notices.append(f"{running} of {len(cells)} runs have not finished; what they recorded so far is shown.")
    if len(streams) > 1:
        notices.append(f"These runs are on different streams and not comparable as they stand: {'; '.join(streams)}.")
    return Content(
        kind="runs",
        name=folder.resolve().name or str(folder),
        scenario=next(iter(streams)) if len(streams) == 1 else "",
        environment=environment,
        cells=cells,
        groups=groups,
        fronts=complete_fronts(groups, {}),
        notices=notices,
    )


def _run_folders(folder: Path) -> Iterator[Path]:
    """Run folders below a folder in order of name; links are not followed and runs are not looked into."""
    for root, names, _ in os.walk(folder):
        path = Path(root)
        if path != folder and is_run(path):
            names.clear()
            yield path
        elif len(path.relative_to(folder).parts) >= DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))


def _records(folder: Path) -> tuple[dict[str, Any], Sequence[Event]]:
    """Results and events; the events count where both are there."""
    path = folder / event_log.FILE_NAME
    events = event_log.read(path) if path.is_file() else []
    try:
        built = run_results.build(events) if events else run_results.read(folder)
    except ContlearnError as error:
        raise ContlearnError(f"{folder}: {error}") from error
    if events and (folder / run_results.FILE_NAME).is_file():
        # What other tools added to the results, such as the errors of a test-time run, is kept.
        with contextlib.suppress(ContlearnError):  # a damaged copy of what the events say
            built = run_results.read(folder) | built
    return built, events


def _cell(results: Node, folder: Path, name: str, config: Mapping[str, Any]) -> Cell:
    metrics = {key: results.object("metrics").number(key) for key in results.object("metrics").value}
    for key in DOMAIN_METRICS:
        if results.value.get(key) is not None:
            metrics[key] = results.number(key)
    strategy = config.get("strategy") if isinstance(config.get("strategy"), Mapping) else {}
    size = strategy.get("memory_size") if isinstance(strategy, Mapping) else None
    setting = Setting(
        label=name,
        strategy=results.text("strategy", "unnamed"),
        budget=_budget(config, strategy if isinstance(strategy, Mapping) else {}),
        memory_size=size if isinstance(size, int) and not isinstance(size, bool) else None,
    )
    return Cell(
        id=name,
        setting=setting,
        seed=results.whole("seed"),
        status="incomplete" if results.text("status", "complete") == "incomplete" else "complete",
        folder=name,
        metrics=metrics,
        memory=memory_numbers(results.object("memory")),
        matrix=matrix(results.items("accuracy_matrix"), results.at("accuracy_matrix")),
        seen=[number(value, results.at("accuracy_seen")) for value in results.items("accuracy_seen")],
        seconds=results.object("time").number("adapt_s" if "error_by_domain" in results.value else "train_s"),
        domains=_domains(results),
    )


def _budget(config: Mapping[str, Any], strategy: Mapping[str, Any]) -> int | None:
    value = config.get("memory_budget") or strategy.get("memory_budget")
    try:
        return parse_bytes(value) if isinstance(value, (int, float, str)) else None
    except ContlearnError:
        return None


def _domains(results: Node) -> dict[str, tuple[float, float | None]]:
    errors, source = results.object("error_by_domain"), results.object("source_error_by_domain")
    names = [str(name) for name in results.items("domains")] or list(errors.value)
    return {name: (error, source.number(name)) for name in names if (error := errors.number(name)) is not None}


def _label(cells: Sequence[Cell], configs: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Cells named after their strategy and what else tells them apart; runs that differ in their seed share a name."""
    flat = [_flat(config) for config in configs]
    shared = _differing(flat, ("scenario.", "model."))
    peers: dict[str, list[Mapping[str, str]]] = {}
    for cell, options in zip(cells, flat, strict=True):
        peers.setdefault(cell.setting.strategy, []).append(options)
    own = {strategy: _differing(settings, ("strategy.",)) for strategy, settings in peers.items()}
    labelled = []
    for cell, config, options in zip(cells, configs, flat, strict=True):
        if cell.status == "failed" or not config:
            labelled.append(cell)
            continue
        varied = {name.split(".", 1)[1]: options.get(name) for name in shared + own[cell.setting.strategy]}
        label = f"{cell.setting.strategy} {option_words(varied)}".strip()
        labelled.append(replace(cell, setting=replace(cell.setting, label=label, options=varied)))
    # The same setting and seed twice are two runs of one thing, not two seeds.
    times = Counter((cell.setting.key, cell.seed) for cell in labelled)
    return [
        cell
        if times[cell.setting.key, cell.seed] == 1
        else replace(cell, setting=replace(cell.setting, label=f"{cell.setting.label} ({cell.folder})"))
        for cell in labelled
    ]


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration as ``section.option``: value as text; no more than a few hundred options."""
    found: dict[str, str] = {}
    waiting = [("", config)]
    seen = 0
    while waiting and len(found) < LEAVES and seen < LEAVES:  # YAML aliases can unfold to more than memory holds
        prefix, section = waiting.pop()
        seen += 1
        for name, value in section.items():
            if isinstance(value, Mapping) and prefix.count(".") < DEPTH:
                waiting.append((f"{prefix}{name}.", value))
            elif not isinstance(value, (Mapping, list, tuple, set)) and name not in (*NOT_A_SETTING, "memory_size"):
                found[f"{prefix}{name}"] = str(value)
    return found


def _differing(options: Sequence[Mapping[str, str]], sections: tuple[str, ...]) -> list[str]:
    names = sorted({name for one in options for name in one if name.startswith(sections)})
    known = [one for one in options if one]
    return [name for name in names if len({one.get(name) for one in known}) > 1]


def _config(folder: Path) -> dict[str, Any]:
    text = _config_text(folder)
    try:
        found = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ContlearnError(f"{folder / CONFIG}: damaged ({error}); expected YAML") from error
    return found if isinstance(found, dict) else {}


def _config_text(folder: Path) -> str:
    path = folder / CONFIG
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ContlearnError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if len(data) > CONFIG_LIMIT:
        limit = in_words(CONFIG_LIMIT)
        raise ContlearnError(f"{path}: {in_words(len(data))}; expected a configuration of {limit} at most")
    return data.decode("utf-8", "replace")
