"""The sweep: run every cell that the folder lacks, on an engine, and sum all of them up."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from contlearn.errors import ContlearnError, unknown_name
from contlearn.pareto import specification as specifications
from contlearn.pareto.display import SweepProgress
from contlearn.pareto.folder import SweepFolder
from contlearn.pareto.specification import Specification
from contlearn.pareto.tasks import Engine

EngineName = Literal["local", "ray"]


class SweepInterrupted(KeyboardInterrupt):
    """A sweep was stopped by SIGINT or SIGTERM; its finished cells are kept.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def sweep(
    config: Mapping[str, Any] | str | Path,
    *,
    out: str | Path,
    jobs: int | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    seeds: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the cells of a sweep that are not finished yet, then write its tables, figure and page.

    Cells are known by their resolved configuration: after a change of the sweep, those that are still part of it are
    kept and the others stay on the disk, unused. Failed cells run again.

    Args:
        config: a YAML file, or its content.
        out: the sweep's folder.
        jobs: runs at a time; default: as many as there are cores for (``ray``: as the cluster has CPUs for).
        engine: ``local`` (processes of this machine) or ``ray`` (tasks of a cluster).
        address: ``ray`` only: an existing cluster; default: a new one on this machine.
        seeds: this many seeds, whatever the configuration says.
        quiet: no progress display.

    Returns:
        The content of ``pareto.json``.

    Raises:
        ContlearnError: a mistake in the configuration, or a folder that cannot be used.
        SweepInterrupted: SIGINT or SIGTERM.
    """
    if engine not in get_args(EngineName):
        raise unknown_name("engine", engine, get_args(EngineName))
    if jobs is not None and jobs < 1:
        raise ContlearnError(f"jobs: expected at least 1, got {jobs}")
    if address is not None and engine != "ray":
        raise ContlearnError("address: only the engine ray takes one; expected --engine ray beside it")
    content = config if isinstance(config, Mapping) else specifications.load(config)
    specification = specifications.check(content, seeds=seeds)
    folder = SweepFolder(out)
    with _signals(), folder.locked() as lock:
        _run(specification, folder, lock, jobs=jobs, engine=engine, address=address, quiet=quiet)
    from contlearn.pareto.summary import rebuild

    return rebuild(folder.path)


def _run(
    specification: Specification,
    folder: SweepFolder,
    lock: int | None,
    *,
    jobs: int | None,
    engine: EngineName,
    address: str | None,
    quiet: bool,
) -> None:
    started = time.perf_counter()
    if jobs is None and not (engine == "ray" and address is not None):
        jobs = max(1, usable_cores() // specification.threads)

    if not quiet:
        print(f"checking at most {specification.most_cells} cells while workers start", file=sys.stderr)
    with _engine(specification, folder, lock, jobs=jobs, engine=engine, address=address) as running:
        cells = running.plan(specification)
        folder.write_plan(specification.as_config(), cells, environment=_environment(specification, engine, jobs))
        finished = folder.finished(cells)
        todo = [cell for cell in cells if cell.id not in finished]
        with SweepProgress(cells, finished=finished, jobs=jobs, quiet=quiet) as progress:
            unused = folder.others(cells)
            if unused:
                progress.message(f"{unused} cells of other configurations are kept in {folder.path} and not shown")
            if not todo:
                return
            for event in running.run(todo, folder):
                progress.update(event)
            progress.message(f"{len(todo)} cells in {time.perf_counter() - started:.1f} s")


def _engine(
    specification: Specification,
    folder: SweepFolder,
    lock: int | None,
    *,
    jobs: int | None,
    engine: EngineName,
    address: str | None,
) -> Engine:
    if engine == "ray":
        from contlearn.pareto.cluster import RayEngine

        return RayEngine(jobs, threads=specification.threads, address=address)
    from contlearn.pareto.pool import LocalPool

    # A sweep that goes on may have little left to do, or nothing: then one worker, for the plan, is enough.
    fresh = not any((folder.path / "cells").iterdir())
    return LocalPool(
        jobs or 1,
        threads=specification.threads,
        folder=folder,
        warm=specification.most_cells if fresh else 1,
        inherit=lock,
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment(specification: Specification, engine: str, jobs: int | None) -> dict[str, Any]:
    from contlearn.results import environment

    return {**environment(), "engine": engine, "jobs": jobs, "threads": specification.threads}


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM stop the sweep; its workers are asked to stop, and killed when the signal comes again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        raise SweepInterrupted(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:  # ours, or what ray makes of it
        raise SweepInterrupted(received[0] if received else signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
