"""The local engine: warm worker processes that take one cell after the other, replaced when they die."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from contlearn.errors import ContlearnError
from contlearn.pareto.cell import failure
from contlearn.pareto.folder import SweepFolder, write_record
from contlearn.pareto.plan import Cell
from contlearn.pareto.specification import Specification
from contlearn.pareto.tasks import Ended, Event, Started, Waiting

ATTEMPTS = 2
GRACE = 10.0  # seconds for a run to store its position
TICK = 0.1
# Not -m: that would put the working directory, and any random.py in it, in front of the standard library.
_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from contlearn.pareto.worker import main; main()"


class WorkerDied(Exception):
    """A worker process has ended with its cell unfinished."""

    def __init__(self, reason: str, *, started: bool) -> None:
        super().__init__(reason)
        self.started = started
        """Whether its imports were done, or it was killed from outside: another one may fare better."""


class Worker:
    """One worker process.

    Args:
        log: file that gets what the process prints.
        threads: compute threads of the process.
        inherit: descriptor that the process holds as long as it lives.
    """

    def __init__(self, log: Path, *, threads: int, inherit: int | None) -> None:
        self.log = log
        self.ready = False
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        with open(log, "ab") as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *(path or os.getcwd() for path in sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env={**os.environ, **counts},
                pass_fds=() if inherit is None else (inherit,),
                start_new_session=True,  # the terminal's Ctrl-C is for the sweep, which then asks its workers
                text=True,
                encoding="utf-8",
            )

    def ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Hand over a task and wait for the answer.

        Raises:
            WorkerDied: the process ended before it could answer.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                message = json.loads(line)
                self.ready = True
                if message["event"] != "ready":
                    return dict(message)
        except (OSError, ValueError):  # a broken pipe, half a line, or closed by close()
            pass
        raise self._died()

    def _died(self) -> WorkerDied:
        try:
            code = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:  # it lives, but what it says is not to be understood
            self.process.kill()
            code = self.process.wait()
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            return WorkerDied(f"its worker process was killed by {name}{hint}", started=True)
        reason = f"its worker process ended with status {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return WorkerDied(": ".join([reason, *lines]), started=self.ready)

    def stop(self, number: int) -> None:
        """Send a signal, unless the process has gone."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def close(self, patience: float) -> None:
        """End the process: at once when it is idle, by force after ``patience`` seconds."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError, ValueError):
                assert pipe is not None
                pipe.close()


class LocalPool:
    """Runs cells on worker processes of this machine.

    Args:
        jobs: number of workers.
        threads: compute threads of each.
        folder: where their logs go.
        warm: number of workers to start at once; the others start when there are cells for them.
        inherit: descriptor that workers hold as long as they live.
    """

    def __init__(
        self, jobs: int, *, threads: int, folder: SweepFolder, warm: int = 1, inherit: int | None = None
    ) -> None:
        self.jobs = jobs
        self.warm = warm
        self.threads = threads
        self.folder = folder
        self.inherit = inherit
        self.workers: dict[int, Worker] = {}
        self._cells: deque[Cell] = deque()
        self._events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self._stopping = False
        self._lock = threading.Lock()  # no worker may start once stopping has begun

    def __enter__(self) -> LocalPool:
        for number in range(max(1, min(self.jobs, self.warm))):
            self._start(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopping = True
        self._cells.clear()
        polite = kind is not None and issubclass(kind, KeyboardInterrupt)
        workers = list(self.workers.values())
        try:
            for worker in workers:
                worker.stop(signal.SIGTERM if polite else signal.SIGKILL)
            until = time.monotonic() + GRACE
            for worker in workers:
                worker.close(max(0.0, until - time.monotonic()))
        finally:  # asked to stop a second time
            for worker in workers:
                worker.stop(signal.SIGKILL)
        for worker in workers:
            worker.close(GRACE)
            with contextlib.suppress(OSError):
                if worker.log.stat().st_size == 0:
                    worker.log.unlink()

    def _start(self, number: int) -> Worker:
        log = self.folder.log(number)
        if number in self.workers:
            self.workers[number].close(GRACE)
        else:
            log.unlink(missing_ok=True)
        with self._lock:
            if self._stopping:
                raise WorkerDied("the sweep is stopping", started=True)
            self.workers[number] = Worker(log, threads=self.threads, inherit=self.inherit)
        return self.workers[number]

    def plan(self, specification: Specification) -> list[Cell]:
        """The cells, checked by a worker: this process need not load what it will not use."""
        try:
            answer = self.workers[0].ask({"sweep": specification.as_config()})
        except WorkerDied as death:
            raise ContlearnError(f"workers cannot start: {death}; see {self.workers[0].log}") from death
        if answer["event"] == "refused":
            raise ContlearnError(answer["error"])
        return [Cell(**cell) for cell in answer["cells"]]

    def run(self, cells: Sequence[Cell], folder: SweepFolder) -> Iterator[Event]:
        """Run the cells; a worker that dies is replaced and its cell tried once more.

        Raises:
            ContlearnError: workers cannot start.
        """
        self._cells.extend(cells)
        numbers = range(min(self.jobs, len(cells)))
        for number in numbers:
            threading.Thread(target=self._serve, args=(number, folder), daemon=True).start()
        serving = len(numbers)
        while serving:
            try:
                event = self._events.get(timeout=TICK)
            except queue.Empty:
                yield Waiting()
                continue
            if event is None:
                serving -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                yield event

    def _serve(self, number: int, folder: SweepFolder) -> None:
        """Hand cells to one worker until none are left."""
        try:
            while not self._stopping:
                try:
                    cell = self._cells.popleft()
                except IndexError:
                    break
                self._events.put(Started(cell))
                record = self._attempt(number, cell, folder)
                if record is not None:
                    self._events.put(Ended(cell, record))
        except BaseException as error:
            self._events.put(error)
        self._events.put(None)

    def _attempt(self, number: int, cell: Cell, folder: SweepFolder) -> dict[str, Any] | None:
        target = folder.cell(cell.id).resolve()
        task = {"id": cell.id, "config": cell.config, "folder": str(target)}
        reason = ""
        for _ in range(ATTEMPTS):
            worker = self.workers.get(number)
            try:
                if worker is None or worker.process.poll() is not None:
                    worker = self._start(number)
                return dict(worker.ask(task)["record"])
            except WorkerDied as death:
                if self._stopping:
                    return None
                if not death.started:
                    raise ContlearnError(f"workers cannot start: {death}; see {self.folder.log(number)}") from death
                reason = f"{death}, {ATTEMPTS} times"
        record = failure(cell.id, reason)
        write_record(target, record)
        return record
