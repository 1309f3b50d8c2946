"""The local engine with workers that only pretend to train: deaths, replacements, starts that fail, and endings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from contlearn.errors import ContlearnError
from contlearn.pareto import pool
from contlearn.pareto.folder import SweepFolder, read_record
from contlearn.pareto.plan import Cell
from contlearn.pareto.pool import LocalPool
from contlearn.pareto.specification import Specification
from contlearn.pareto.tasks import Ended, Event, Started

# Speaks the protocol of contlearn.pareto.worker. What a cell does is its id: "die" ends the process every time,
# "die once" leaves a mark and does so the first time; "sleep" never comes back.
PRETENDER = """
import json, os, pathlib, signal, sys, time
print(json.dumps({"event": "ready"}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if "sweep" in task:
        print(json.dumps({"event": "refused", "error": "no such strategy"}), flush=True)
        continue
    folder = pathlib.Path(task["folder"])
    mark = folder.with_name("mark-" + folder.name)
    if task["id"] == "sleep":
        mark.write_text(str(os.getpid()))
        time.sleep(600)
    if task["id"].startswith("die") and not ("once" in task["id"] and mark.exists()):
        mark.write_text("")
        if "status" in task["id"]:
            sys.exit("no more disk")
        os.kill(os.getpid(), signal.SIGKILL)
    record = {"schema": 1, "id": task["id"], "status": "complete", "error": None, "seconds": 0.1, "pid": os.getpid()}
    folder.mkdir()
    (folder / "cell.json").write_text(json.dumps(record))
    print(json.dumps({"event": "ended", "record": record}), flush=True)
"""


def cell(name: str) -> Cell:
    return Cell(name, name, "naive", None, None, 0, {}, {})


def gone(pid: int) -> bool:
    """Whether a process has ended, within ten seconds (a zombie has)."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    monkeypatch.setattr(pool, "_BOOT", PRETENDER)
    found = SweepFolder(tmp_path / "sweep")
    with found.locked():
        return found


@pytest.fixture
def run(folder: SweepFolder) -> Callable[..., dict[str, dict[str, object]]]:
    """``run(names, jobs=2)``: run cells of these names and give their records."""

    def go(*names: str, jobs: int = 2) -> dict[str, dict[str, object]]:
        with LocalPool(jobs, threads=1, folder=folder, warm=1) as workers:
            events: list[Event] = list(workers.run([cell(name) for name in names], folder))
        started = [event.cell.id for event in events if isinstance(event, Started)]
        ended = {event.cell.id: dict(event.record) for event in events if isinstance(event, Ended)}
        assert sorted(started) == sorted(names) == sorted(ended)
        assert all(read_record(folder.cell(name)) == ended[name] for name in names)
        return ended

    return go


def test_workers_take_one_cell_after_the_other(run: Callable[..., dict[str, dict[str, object]]]) -> None:
    ended = run(*"abcdefgh")
    assert {record["status"] for record in ended.values()} == {"complete"}
    assert len({record["pid"] for record in ended.values()}) == 2


def test_a_worker_that_dies_is_replaced_and_its_cell_tried_again(
    run: Callable[..., dict[str, dict[str, object]]],
) -> None:
    ended = run("die once", "b", "c", jobs=1)
    assert {record["status"] for record in ended.values()} == {"complete"}


def test_a_cell_that_kills_its_worker_twice_has_failed_and_the_others_finish(
    run: Callable[..., dict[str, dict[str, object]]],
) -> None:
    ended = run("a", "die", "b", "die with a status", "c", jobs=1)
    assert [name for name, record in ended.items() if record["status"] == "failed"] == ["die", "die with a status"]
    assert ended["die"]["error"] == "its worker process was killed by SIGKILL (out of memory?), 2 times"
    assert ended["die with a status"]["error"] == "its worker process ended with status 1: no more disk, 2 times"


@pytest.mark.parametrize("boot", ["raise ImportError('no torch here')", "import sys; sys.exit('no torch here')"])
def test_workers_that_cannot_start_end_the_sweep(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, boot: str
) -> None:
    monkeypatch.setattr(pool, "_BOOT", boot)
    with (
        pytest.raises(ContlearnError, match=r"workers cannot start: .* 1: .*no torch here; see .*worker-0\.log"),
        LocalPool(1, threads=1, folder=folder) as workers,
    ):
        list(workers.run([cell("a"), cell("b")], folder))
    with pytest.raises(ContlearnError, match="workers cannot start"), LocalPool(1, threads=1, folder=folder) as workers:
        workers.plan(Specification(base={}, strategies={"naive": {}}))


def test_what_a_worker_refuses_is_the_users_mistake(folder: SweepFolder) -> None:
    with pytest.raises(ContlearnError, match=r"^no such strategy$"), LocalPool(1, threads=1, folder=folder) as workers:
        workers.plan(Specification(base={}, strategies={"naive": {}}))


def test_leaving_in_the_middle_ends_the_workers(folder: SweepFolder) -> None:
    with LocalPool(2, threads=1, folder=folder, warm=2) as workers:
        pids = [worker.process.pid for worker in workers.workers.values()]
        for _ in workers.run([cell("sleep"), cell("sleep too")], folder):
            if (folder.path / "cells" / "mark-sleep").exists():
                break
    assert all(gone(pid) for pid in pids)


def test_no_worker_outlives_a_sweep_that_was_killed(tmp_path: Path) -> None:
    """The true worker: it ends with its input, even while it still loads its libraries."""
    script = (
        "import sys, time\n"
        "from contlearn.pareto.folder import SweepFolder\n"
        "from contlearn.pareto.pool import LocalPool\n"
        "folder = SweepFolder(sys.argv[1])\n"
        "with folder.locked() as lock, LocalPool(2, threads=1, folder=folder, warm=2, inherit=lock) as workers:\n"
        "    print(*(worker.process.pid for worker in workers.workers.values()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "sweep")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(pids) == 2 and all(gone(pid) for pid in pids)
    with SweepFolder(tmp_path / "sweep").locked(patience=10):  # free again: the workers held it too
        pass


def test_a_worker_has_the_threads_it_was_given_and_no_working_directory_in_front(
    tmp_path: Path, folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "seen.json"
    boot = (
        f"import json, os, sys; sys.path[:] = sys.argv[1:]; import random; random.random(); "
        f"json.dump([os.environ['OMP_NUM_THREADS'], sys.path], open({str(out)!r}, 'w')); sys.exit(1)"
    )
    monkeypatch.setattr(pool, "_BOOT", boot)
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    with LocalPool(1, threads=3, folder=folder) as workers:
        workers.workers[0].process.wait()
    threads, path = json.loads(out.read_text())
    assert threads == "3" and path == [entry or os.getcwd() for entry in sys.path]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_sweep_and_its_workers(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import sys\n"
        "from contlearn.pareto import command, pool\n"
        "from contlearn.pareto.plan import Cell\n"
        "pool._BOOT = sys.argv[1]\n"
        "cells = [Cell(name, name, 'naive', None, None, 0, {}, {}) for name in ('a', 'sleep')]\n"
        "pool.LocalPool.plan = lambda *_: cells\n"
        "sys.exit(command.main(sys.argv[2:]))\n"
    )
    (tmp_path / "sweep.yaml").write_text("strategies: {naive: {}}\n")
    out = tmp_path / "sweep"
    process = subprocess.Popen(
        [sys.executable, "-c", script, PRETENDER, str(tmp_path / "sweep.yaml"), "--out", str(out), "--jobs", "1"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    mark = out / "cells" / "mark-sleep"
    while process.poll() is None and not (mark.exists() and mark.read_text()):
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1] == (
        f"contlearn: stopped by {number.name}; finished cells are kept in {out}, the same command goes on"
    )
    assert gone(int(mark.read_text()))
    assert read_record(out / "cells" / "a") is not None
