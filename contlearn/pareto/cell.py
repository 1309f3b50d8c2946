"""One cell of a sweep: a run as ``contlearn run`` does it, in a process that keeps imports and data for the next."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contlearn.errors import ContlearnError
from contlearn.pareto.folder import RECORD, SCHEMA, discard, write_record

if TYPE_CHECKING:
    from contlearn.running import Result
    from contlearn.scenarios.datasets import ImageData

CHECKPOINT_EVERY = 60.0  # seconds; a cell that is over sooner is cheaper to repeat than to store
KEPT_DATA_SETS = 4
HEADLINES = ("final_accuracy", "mean_error")  # what a cell's line shows, by the kind of run

_DATA: OrderedDict[tuple[Any, ...], ImageData] = OrderedDict()


def warm_up() -> None:
    """Import what every cell needs."""
    from contlearn.cli import quiet_libraries

    quiet_libraries()
    from contlearn import config, models, running, scenarios, strategies  # noqa: F401
    from contlearn.strategies import template  # noqa: F401


def execute(cell_id: str, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a cell in its folder and write its record, ``cell.json``, last.

    A cell that was killed goes on from its checkpoint if it has one, else it starts again.

    Returns:
        The record: ``schema``, ``id``, ``status`` (``complete`` or ``failed``), ``error`` (one line or ``None``),
        ``final_accuracy`` or, of a test-time run, ``mean_error``, ``started`` (unix seconds), ``seconds`` of this
        attempt.

    Raises:
        ContlearnError: the folder cannot be written.
    """
    started, clock = time.time(), time.perf_counter()
    error: str | None = None
    headline: dict[str, float | None] = {"final_accuracy": None}
    try:
        metrics = _train(config, folder).metrics
        headline = {name: metrics[name] for name in HEADLINES if name in metrics}
    except ContlearnError as problem:
        error = str(problem)
    except Exception as problem:
        error = " ".join(f"{type(problem).__name__}: {problem}".split())
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    record = {
        "schema": SCHEMA,
        "id": cell_id,
        "status": "complete" if error is None else "failed",
        "error": error,
        **headline,
        "started": started,
        "seconds": time.perf_counter() - clock,
    }
    write_record(folder, record)
    return record


def execute_elsewhere(cell_id: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Run a cell in a folder of this machine's own and give its record and files, for an engine on many machines."""
    warm_up()
    with tempfile.TemporaryDirectory(prefix="contlearn-") as place:
        folder = Path(place) / cell_id
        record = execute(cell_id, config, folder)
        return record, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def failure(cell_id: str, error: str) -> dict[str, Any]:
    """The record of a cell whose process did not live to write one."""
    record = {"schema": SCHEMA, "id": cell_id, "status": "failed", "error": " ".join(error.split())}
    return {**record, "final_accuracy": None, "started": time.time(), "seconds": 0.0}


def _train(config: Mapping[str, Any], folder: Path) -> Result:
    from contlearn.running import MODEL

    (folder / RECORD).unlink(missing_ok=True)
    if (folder / "checkpoint" / "state.json").exists() or (folder / MODEL).exists():
        with contextlib.suppress(ContlearnError):  # damaged, or of another version: start again
            return _run(config, folder, resume=True)
    discard(folder)
    return _run(config, folder, resume=False)


def _run(config: Mapping[str, Any], folder: Path, *, resume: bool) -> Result:
    from contlearn.config import build
    from contlearn.running import run

    strategy, stream = build(_with_data(config))
    folder.parent.mkdir(parents=True, exist_ok=True)
    result = run(
        strategy, stream, out=folder, resume=resume, seed=config["seed"], loggers=config["loggers"], quiet=True,
        config=dict(config), checkpoint_every=CHECKPOINT_EVERY,
    )  # fmt: skip
    with open(folder / "events.jsonl", "rb") as events:  # the record must not outlive them in a power cut
        os.fsync(events.fileno())
    return result


def _with_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with its data set in place of the data set's name, loaded once per process."""
    from contlearn.scenarios import datasets
    from contlearn.scenarios.registry import describe

    scenario = dict(config["scenario"])
    dataset = inspect.signature(describe(scenario["name"]).load()).parameters.get("dataset")
    if dataset is not None and "ImageData" in str(dataset.annotation) and isinstance(scenario.get("dataset"), str):
        taken = [name for name in list(inspect.signature(datasets.load).parameters)[1:] if name in scenario]
        key = (scenario["dataset"], *((name, scenario[name]) for name in taken))
        if key not in _DATA:
            while len(_DATA) >= KEPT_DATA_SETS:
                _DATA.popitem(last=False)
            _DATA[key] = datasets.load(scenario["dataset"], **{name: scenario[name] for name in taken})
        _DATA.move_to_end(key)
        scenario["dataset"] = _DATA[key]
    return {**config, "scenario": scenario}
