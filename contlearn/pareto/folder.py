"""A sweep's folder: what was planned (``sweep.json``), a run folder per cell, and a lock against a second sweep."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contlearn import results
from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_text, unwritable
from contlearn.pareto.plan import Cell

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

PLAN = "sweep.json"
CELLS = "cells"
LOGS = "logs"
RECORD = "cell.json"
SCHEMA = 1
LOCK = ".lock"
TRASH = ".trash-"


class SweepFolder:
    """The folder of a sweep.

    Args:
        path: made by :meth:`locked` where it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @contextlib.contextmanager
    def locked(self, *, patience: float = 10.0) -> Iterator[int | None]:
        """Hold the folder for this process and those that inherit the descriptor that is given.

        Workers inherit it, so that a sweep that was killed is over only when its last worker has gone.

        Raises:
            ContlearnError: not a sweep's folder, not writable, or in use for longer than ``patience`` seconds.
        """
        self._check()
        try:
            (self.path / CELLS).mkdir(parents=True, exist_ok=True)
            (self.path / LOGS).mkdir(exist_ok=True)
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            self._wait_for(descriptor, patience)
            for rest in (self.path / CELLS).glob(f"{TRASH}*"):
                shutil.rmtree(rest, ignore_errors=True)
            yield descriptor if fcntl is not None else None
        finally:
            os.close(descriptor)

    def _check(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ContlearnError(f"out: {str(self.path)!r} is a file; expected a folder")
        content = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}
        if content - {CELLS, LOGS} and not (self.path / PLAN).exists():
            raise ContlearnError(f"out: {str(self.path)!r} exists and is not the folder of a sweep; choose another")

    def _wait_for(self, descriptor: int, patience: float) -> None:
        if fcntl is None:
            return
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ContlearnError(f"out: another sweep is at work in {str(self.path)!r}") from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                return

    def write_plan(self, config: Mapping[str, Any], cells: Sequence[Cell], **facts: Any) -> None:
        """Write what is planned, before the first cell runs."""
        content = {"schema": SCHEMA, "config": config, **facts, "cells": [cell.as_dict() for cell in cells]}
        atomic_write_text(self.path / PLAN, json.dumps(content, indent=1) + "\n")

    def plan(self) -> tuple[dict[str, Any], list[Cell]]:
        """What was planned last: the whole content, and the cells.

        Raises:
            ContlearnError: no sweep here, or a damaged plan.
        """
        path = self.path / PLAN
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ContlearnError(f"{path}: schema {content['schema']!r}, expected {SCHEMA}")
            cells = [Cell(**cell) for cell in content["cells"]]
            if not all(Path(cell.id).name == cell.id for cell in cells):
                raise ValueError("a cell's id is no file name")
            return content, cells
        except FileNotFoundError:
            raise ContlearnError(f"{str(self.path)!r} is no sweep's folder: it has no {PLAN}") from None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise ContlearnError(f"{path}: damaged ({error}); running the sweep again writes it anew") from error

    def cell(self, cell_id: str) -> Path:
        """The run folder of a cell."""
        return self.path / CELLS / cell_id

    def log(self, worker: int) -> Path:
        """Where a worker process writes what it prints."""
        return self.path / LOGS / f"worker-{worker}.log"

    def finished(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Records of the cells that need not run again, by id."""
        found: dict[str, dict[str, Any]] = {}
        for cell in cells:
            record = read_record(self.cell(cell.id))
            if record is not None and record["status"] == "complete":
                with contextlib.suppress(ContlearnError):  # results that are damaged are made again from the events
                    results.read(self.cell(cell.id))
                    found[cell.id] = record
        return found

    def others(self, cells: Sequence[Cell]) -> int:
        """Number of finished cells that belong to other configurations."""
        known = {cell.id for cell in cells}
        return sum(p.parent.name not in known for p in (self.path / CELLS).glob(f"*/{RECORD}"))


def read_record(folder: Path) -> dict[str, Any] | None:
    """``cell.json`` of a cell, or ``None`` where the cell has not ended or the file is damaged (it runs again)."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("id") != folder.name:
        return None
    return record if record.get("status") in ("complete", "failed") else None


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Say that a cell has ended: the last file of it to be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    atomic_write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def discard(folder: Path) -> None:
    """Remove a cell's folder; a kill leaves it whole or gone, never half.

    Raises:
        ContlearnError: it cannot be removed.
    """
    if not folder.exists():
        return
    try:
        rest = folder.with_name(f"{TRASH}{os.getpid()}-{time.monotonic_ns()}-{folder.name}")
        folder.rename(rest)
        shutil.rmtree(rest)
    except OSError as error:
        raise unwritable(folder, error) from error
