"""The ray engine: the same cells as tasks of a ray cluster; their files come back to the sweep's folder."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_bytes
from contlearn.pareto.cell import execute_elsewhere, failure
from contlearn.pareto.folder import RECORD, SweepFolder, discard, write_record
from contlearn.pareto.plan import Cell, expand
from contlearn.pareto.specification import Specification
from contlearn.pareto.tasks import Ended, Event, Started, Waiting

TICK = 0.5


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Put back what answers SIGINT and SIGTERM: ray puts an abort in its place."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


class RayEngine:
    """Runs cells on a ray cluster. Its machines need contlearn, and data sets that do not come in packages.

    Args:
        jobs: cells at a time; default: as many as the cluster has CPUs for.
        threads: CPUs of each.
        address: an existing cluster; default: a new one on this machine with ``jobs * threads`` CPUs.
    """

    def __init__(self, jobs: int | None, *, threads: int, address: str | None = None) -> None:
        self.jobs = jobs
        self.threads = threads
        self.address = address
        self.ours = False
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ContlearnError(
                f"engine ray: not installed ({error}); expected pip install 'contlearn[ray]', or --engine local"
            ) from error

    def __enter__(self) -> RayEngine:
        if self.ray.is_initialized():  # by the program around us, whose cluster it stays
            return self
        options: dict[str, Any] = {"address": self.address, "log_to_driver": False, "logging_level": "ERROR"}
        if self.address is None:
            options |= {"num_cpus": (self.jobs or 1) * self.threads, "include_dashboard": False}
            options["address"] = "local"  # not a cluster that RAY_ADDRESS or an earlier program left behind
        try:
            with _own_signals():
                self.ray.init(**options)
        except Exception as error:  # ray has its own for some causes
            where = f"address {self.address!r}" if self.address else "a local cluster"
            hint = "; one with authentication needs RAY_AUTH_MODE=token and its token" if self.address else ""
            raise ContlearnError(f"engine ray: cannot use {where} ({error}){hint}") from error
        self.ours = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.ours:
            self.ray.shutdown()

    def plan(self, specification: Specification) -> list[Cell]:
        """The cells, checked by this process."""
        return expand(specification)

    def run(self, cells: Sequence[Cell], folder: SweepFolder) -> Iterator[Event]:
        """Run the cells; ray repeats one whose worker died once."""
        task = self.ray.remote(num_cpus=self.threads, max_retries=1)(execute_elsewhere)
        waiting = deque(cells)
        running: dict[Any, Cell] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._room():
                    cell = waiting.popleft()
                    running[task.remote(cell.id, dict(cell.config))] = cell
                    yield Started(cell)
                ready, _ = self.ray.wait(list(running), num_returns=1, timeout=TICK)
                for reference in ready:
                    cell = running.pop(reference)
                    yield Ended(cell, self._collect(reference, cell, folder))
                if not ready:
                    yield Waiting()
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def _room(self) -> int:
        """Cells to have under way; a cluster may have grown."""
        if self.jobs is not None:
            return self.jobs
        return max(1, int(self.ray.cluster_resources().get("CPU", 1) // self.threads))

    def _collect(self, reference: Any, cell: Cell, folder: SweepFolder) -> Mapping[str, Any]:
        """Write a cell's files, its record last."""
        files: dict[str, bytes] = {}
        try:
            record, files = self.ray.get(reference)
        except Exception as error:  # ray's own, of which a dead worker is one
            lines = str(error).strip().splitlines() or [""]
            record = failure(cell.id, f"{type(error).__name__}: {lines[0]}")
        target = folder.cell(cell.id)
        discard(target)
        target.mkdir(parents=True)
        for name, data in files.items():
            if name != RECORD:
                atomic_write_bytes(target / Path(name).name, data)
        write_record(target, record)
        return dict(record)
