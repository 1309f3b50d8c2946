"""``results.json``: what a run came to, derived from ``events.jsonl`` and rebuildable from it at any time."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contlearn import events as event_log
from contlearn import metrics
from contlearn.errors import ContlearnError
from contlearn.events import Event, field, latest
from contlearn.files import atomic_write_text

FILE_NAME = "results.json"
SCHEMA = 1
TEST_TIME = "test-time"
PACKAGES = ("torch", "torchvision", "avalanche-lib", "timm", "numpy", "contlearn")


def build(events: Sequence[Event]) -> dict[str, Any]:
    """The content of ``results.json`` for the records of a run.

    Keys: ``schema`` 1, ``status`` (``complete`` when the record ``end`` closes the run, else ``incomplete``),
    ``strategy``, ``scenario``, ``seed``, ``joint``, ``classes_per_experience`` (class ids of every test experience),
    ``accuracy_matrix`` and ``accuracy_seen`` (``contlearn.metrics``), ``metrics``, ``time`` (``train_s``, ``eval_s``:
    of the experiences that count, not of what a killed run repeated), ``environment``, and ``memory`` where the run
    recorded any. Of a number recorded after several experiences, ``memory`` holds the largest: what a device must have.
    A test-time run has other keys: see :func:`build_test_time`.

    Raises:
        ContlearnError: a record lacks a field, or there is no record ``run``.
    """
    run = event_log.run_record(events)
    if field(run, "schema") != SCHEMA:
        raise ContlearnError(f"events with schema {run['schema']!r}: this version reads schema {SCHEMA}")
    if run.get("kind") == TEST_TIME:
        return build_test_time(events, run)
    experiences = latest(events, "experience", "experience").values()
    built = {
        "schema": SCHEMA,
        "status": _status(events),
        **{name: field(run, name) for name in ("strategy", "scenario", "seed")},
        "joint": bool(run.get("joint", False)),
        "classes_per_experience": [list(classes) for classes in field(run, "classes_per_experience")],
        "accuracy_matrix": metrics.accuracy_matrix(events),
        "accuracy_seen": metrics.accuracy_seen(events),
        "metrics": metrics.summary(events),
        "time": {
            name: math.fsum(record[name] for record in experiences if record.get(name) is not None)
            for name in ("train_s", "eval_s")
        },
        "environment": dict(run.get("environment") or {}),
    }
    memory = _memory(events)
    if memory:
        built["memory"] = memory
    return built


def build_test_time(events: Sequence[Event], run: Event) -> dict[str, Any]:
    """The content of ``results.json`` of a test-time run.

    Keys: ``schema``, ``status``, ``kind`` ``test-time``, ``strategy``, ``scenario``, ``seed``, ``error_by_domain`` and
    ``source_error_by_domain`` (0..1, by name; a visit that mixes several domains gives each of them), ``domains``
    (these names in order of time, which JSON's objects do not keep), ``mean_error`` and ``source_mean_error`` (over
    these entries, whatever their number of samples; the source model, never adapted, answers the same samples),
    ``worse_than_source``, ``metrics`` (the two means again), ``time`` (``adapt_s``, and ``per_batch_s`` of the batches
    whose memory was not measured), ``samples``, ``batches``, ``trips`` of the guards, ``memory``, ``environment``.

    Raises:
        ContlearnError: a record lacks a field.
    """
    visits = [record for _, record in sorted(latest(events, "domain", "visit").items())]
    entries: dict[str, tuple[int, int, int]] = {}
    for visit in visits:
        parts = visit.get("by_domain") or {field(visit, "name"): visit}
        for name, counts in parts.items():
            before = entries.get(name, (0, 0, 0))
            added = (_count(visit, counts, key) for key in ("n", "errors", "source_errors"))
            n, errors, source = (a + b for a, b in zip(before, added, strict=True))
            entries[name] = n, errors, source
    errors_of = {name: errors / n for name, (n, errors, _) in entries.items()}
    source_of = {name: source / n for name, (n, _, source) in entries.items()}
    means = {
        "mean_error": math.fsum(errors_of.values()) / len(errors_of) if errors_of else None,
        "source_mean_error": math.fsum(source_of.values()) / len(source_of) if source_of else None,
    }
    mean, source_mean = means.values()
    seconds, batches = (sum(field(visit, name) for visit in visits) for name in ("seconds", "batches"))
    watched_s, watched = (sum(visit.get(name) or 0 for visit in visits) for name in ("watched_s", "watched"))
    if batches == watched:  # too few batches to leave out those that were measured
        watched_s = watched = 0
    built = {
        "schema": SCHEMA,
        "status": _status(events),
        "kind": TEST_TIME,
        **{name: field(run, name) for name in ("strategy", "scenario", "seed")},
        "domains": list(errors_of),
        "error_by_domain": errors_of,
        "source_error_by_domain": source_of,
        **means,
        "worse_than_source": mean is not None and source_mean is not None and mean > source_mean,
        "metrics": dict(means),
        "samples": sum(n for n, _, _ in entries.values()),
        "batches": batches,
        "trips": [
            {"domain": visit["name"], **trip} for visit in visits for trip in field(visit, "trips", list)
        ],
        "time": {
            "adapt_s": seconds,
            "per_batch_s": (seconds - watched_s) / (batches - watched) if batches else None,
        },
        "environment": dict(run.get("environment") or {}),
    }
    memory = _memory(events)
    if memory:
        built["memory"] = memory
    return built


def _count(visit: Event, counts: Any, key: str) -> int:
    value = counts.get(key) if isinstance(counts, Mapping) else None
    if not isinstance(value, int) or value < (key == "n"):
        raise ContlearnError(f"damaged events: a record 'domain' of {visit['name']!r} has {key!r} = {value!r}")
    return value


def _status(events: Sequence[Event]) -> str:
    stages = [record["event"] for record in events if record["event"] in ("run", "resume", "interrupted", "end")]
    return "complete" if stages[-1] == "end" else "incomplete"


def write(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Rebuild ``results.json`` of a run folder from its ``events.jsonl``, atomically, and return it.

    The same events give the same bytes.

    Raises:
        ContlearnError: events missing or damaged, or the folder cannot be written.
    """
    built = build(event_log.read(Path(folder) / event_log.FILE_NAME))
    text = json.dumps(built, indent=2, sort_keys=True, allow_nan=False) + "\n"
    atomic_write_text(Path(folder) / FILE_NAME, text)
    return built


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """``results.json`` of a run folder; where it is missing, what its events give (a killed run has no results yet).

    Raises:
        ContlearnError: neither file is there, or the one that is there is damaged.
    """
    path = Path(folder) / FILE_NAME
    events_path = Path(folder) / event_log.FILE_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if events_path.exists():
            return build(event_log.read(events_path))
        raise ContlearnError(
            f"{str(folder)!r} is no run folder: it has neither {FILE_NAME} nor {event_log.FILE_NAME}"
        ) from None
    except (OSError, ValueError) as error:
        raise ContlearnError(f"cannot read {str(path)!r}: {error}") from error
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ContlearnError(
            f"{path}: damaged ({error}); it can be rebuilt from {event_log.FILE_NAME} beside it"
        ) from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        schema = found.get("schema") if isinstance(found, dict) else None
        raise ContlearnError(f"{path}: schema {schema!r}, expected {SCHEMA}")
    return found


def environment() -> dict[str, Any]:
    """What a run ran on: ``python``, ``platform``, ``cpu_count`` and ``packages`` (version, or ``None`` if missing)."""
    from importlib.metadata import PackageNotFoundError, version  # late: not needed to read results

    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": packages,
    }


def _memory(events: Sequence[Event]) -> dict[str, Any]:
    """Largest value of every number in the memory records, last value of everything else; absent, not zero."""
    merged: dict[str, Any] = {}
    for record in latest(events, "memory", "after").values():
        for name, value in record.items():
            if name in ("event", "time", "after") or value is None:
                continue
            before = merged.get(name)
            merged[name] = max(before, value) if _number(before) and _number(value) else value
    if merged.get("peak_measured") and merged.get("peak_static"):
        merged["peak_ratio"] = merged["peak_measured"] / merged["peak_static"]
    return merged


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
