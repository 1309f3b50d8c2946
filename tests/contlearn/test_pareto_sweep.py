"""A whole sweep from the command line: its cells against single runs, a kill and what follows, failures, ray."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from contlearn import cli
from contlearn.errors import ContlearnError
from contlearn.pareto import command, sweep
from contlearn.pareto.cluster import RayEngine
from contlearn.pareto.folder import SweepFolder
from contlearn.pareto.tasks import Ended, Started

SWEEP = {
    "base": {
        "scenario": {"dataset": "digits", "n_experiences": 2},
        "model": {"name": "mlp", "hidden": 16},
        "strategy": {"epochs": 2, "lr": 0.1},
    },
    "strategies": {
        "naive": {},
        "replay": {},
        "broken": {"name": "naive", "optimizer": "adam", "momentum": 0.9},  # resolves; cannot be built
    },
    "budgets": ["2KB", "4KiB"],
    "seeds": 2,
}
COMMAND = "import sys; from contlearn.pareto.command import main; sys.exit(main(sys.argv[1:]))"


def contlearn(*arguments: str) -> int:
    """The command line, with the command ``pareto`` in its table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.COMMANDS, "pareto", (command.main, ""))
        return cli.main(["pareto", *arguments])


def finished_cells(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "cells").glob("*/cell.json")}


def bits(folder: Path) -> dict[str, Any]:
    """What must not depend on where and when a cell ran."""
    results = json.loads((folder / "results.json").read_text())
    kept = {key: results.get(key) for key in ("accuracy_matrix", "accuracy_seen", "metrics", "memory", "seed", "joint")}
    return {
        **kept,
        "model": (folder / "model.safetensors").read_bytes(),
        "config": (folder / "config.yaml").read_text(),
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A sweep that has run, of which two cells have failed."""
    out = config.parent / "finished"
    assert contlearn(str(config), "--out", str(out), "--jobs", "2", "--quiet") == 1
    return out


def cells_of(finished: Path) -> dict[str, dict[str, Any]]:
    return {cell["id"]: cell for cell in json.loads((finished / "pareto.json").read_text())["cells"]}


# ---------------------------------------------------------------------- what comes out


def test_every_cell_is_there_and_a_failing_one_does_not_stop_the_others(finished: Path) -> None:
    cells = cells_of(finished).values()
    assert [(cell["label"], cell["budget"], cell["seed"], cell["status"]) for cell in cells] == [
        (label, budget, seed, "failed" if label == "broken" else "complete")
        for seed in (0, 1)
        for label, budget in (("naive", None), ("replay", 2000), ("replay", 4096), ("broken", None))
    ]
    errors = {cell["error"] for cell in cells if cell["status"] == "failed"}
    assert errors == {"momentum: only sgd takes it; expected 0 with optimizer adam, got 0.9"}
    content = json.loads((finished / "pareto.json").read_text())
    assert content["config"]["budgets"] == [2000, 4096] and content["config"]["seeds"] == [0, 1]
    assert content["environment"]["jobs"] == 2 and content["environment"]["packages"]["torch"]
    assert [group["id"] for group in content["groups"]] == ["naive", "replay @ 2000 B", "replay @ 4096 B"]
    assert content["groups"][1]["memory"]["replay"]["mean"] <= 2000
    assert content["fronts"]["persistent"]["final_accuracy"][0] == "naive"
    rows = list(csv.DictReader((finished / "pareto.csv").open()))
    assert len(rows) == 8 and float(rows[0]["final_accuracy"]) > 0
    assert (finished / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_cells_equal_single_runs_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    from contlearn import config as configuration
    from contlearn import run

    compared = 0
    for cell in cells_of(finished).values():
        if cell["seed"] == 1 and cell["status"] == "complete":
            folder = finished / cell["folder"]
            resolved = configuration.resolve(configuration.load(folder / "config.yaml"))
            strategy, stream = configuration.build(resolved)
            run(strategy, stream, out=tmp_path / cell["id"], seed=resolved["seed"], quiet=True, config=resolved)
            assert bits(tmp_path / cell["id"]) == bits(folder)
            compared += 1
    assert compared == 3


def test_a_killed_sweep_goes_on_and_ends_with_the_same_cells(
    config: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(config), "--out", str(out), "--jobs", "1", "--seeds", "40", "--quiet"]
    )
    while process.poll() is None and len(finished_cells(out)) < 2:
        time.sleep(0.005)
    workers = [int(pid) for pid in children(process.pid)]
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert workers and all(wait_until(lambda pid=pid: not alive(pid)) for pid in workers)
    seen = {cell: (out / "cells" / cell / "cell.json").stat().st_mtime_ns for cell in finished_cells(out)}
    assert 2 <= len(seen) < 160
    assert contlearn(str(config), "--out", str(out), "--jobs", "1") == 1
    told = capsys.readouterr().err
    complete = {cell_id for cell_id, cell in cells_of(finished).items() if cell["status"] == "complete"}
    kept = [cell for cell in seen if cell in complete]
    assert kept and f"{len(kept)} of 8 cells were finished before" in told
    assert all((out / "cells" / cell / "cell.json").stat().st_mtime_ns == seen[cell] for cell in kept)
    assert set(cells_of(out)) == set(cells_of(finished))
    assert {cell: bits(out / "cells" / cell) for cell in complete} == {
        cell: bits(finished / "cells" / cell) for cell in complete
    }
    others = len(finished_cells(out)) - 8
    assert (f"{others} cells of other configurations are kept" in told) == bool(others)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], bool]) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------------- ray


class FakeRay(types.ModuleType):
    """As much of ray as the engine uses; tasks run in this process when they are fetched."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.options: dict[str, Any] = {}
        self.initialised = False
        self.most = self.waiting = 0
        self.cancelled: list[object] = []
        self.breaks = ""

    def is_initialized(self) -> bool:
        return self.initialised

    def init(self, **options: Any) -> None:
        self.options, self.initialised = options, True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the real one does

    def shutdown(self) -> None:
        self.initialised = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 5.0}

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        assert options == {"num_cpus": 1, "max_retries": 1}

        def wrap(function: Callable[..., Any]) -> Any:
            def submit(*arguments: Any) -> Any:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
                return lambda: function(*json.loads(json.dumps(arguments)))

            return types.SimpleNamespace(remote=submit)

        return wrap

    def wait(self, references: list[Any], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        self.waiting -= 1
        if self.breaks:
            raise RuntimeError(self.breaks)
        return reference()

    def cancel(self, reference: object, *, force: bool) -> None:
        self.cancelled.append(reference)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    before = signal.getsignal(signal.SIGTERM)
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    yield fake
    assert signal.getsignal(signal.SIGTERM) is before  # the sweep's own handlers answered meanwhile


def test_ray_gives_the_same_cells(ray: FakeRay, config: Path, finished: Path, tmp_path: Path) -> None:
    content = sweep(config, out=tmp_path / "sweep", engine="ray", jobs=2, quiet=True)
    assert ray.options["num_cpus"] == 2 and ray.options["address"] == "local"
    assert ray.most == 2 and not ray.initialised
    for cell in content["cells"]:
        was = cells_of(finished)[cell["id"]]
        assert (cell["status"], cell["error"], cell["metrics"]) == (was["status"], was["error"], was["metrics"])
        if cell["status"] == "complete":
            assert bits(tmp_path / "sweep" / cell["folder"]) == bits(finished / cell["folder"])


def test_ray_reports_a_worker_that_died(ray: FakeRay, finished: Path, tmp_path: Path) -> None:
    place = SweepFolder(tmp_path / "sweep")
    shutil.copytree(finished, place.path)
    _, cells = place.plan()
    ray.breaks = "The worker died unexpectedly.\nMuch more that nobody reads."
    with place.locked(), RayEngine(None, threads=1, address="there:6379") as engine:
        events = list(engine.run(cells[:7], place))
    assert ray.options["address"] == "there:6379" and "num_cpus" not in ray.options
    assert ray.most == 5  # as many as the cluster has CPUs
    assert len([event for event in events if isinstance(event, Started)]) == 7
    errors = {event.record["error"] for event in events if isinstance(event, Ended)}
    assert errors == {"RuntimeError: The worker died unexpectedly."}
    assert place.finished(cells[:7]) == {}


def test_a_cluster_of_the_program_around_stays_and_its_tasks_are_cancelled(
    ray: FakeRay, finished: Path, tmp_path: Path
) -> None:
    place = SweepFolder(tmp_path / "sweep")
    ray.initialised = True
    _, cells = SweepFolder(finished).plan()
    with place.locked(), RayEngine(3, threads=1) as engine:
        running = engine.run(cells, place)
        assert all(isinstance(next(running), Started) for _ in range(3))
        running.close()  # type: ignore[attr-defined]
    assert ray.initialised and not ray.options and len(ray.cancelled) == 3


def test_a_mistake_that_only_the_method_knows_ends_with_2_before_any_cell_runs(
    ray: FakeRay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "strategies": {"replay": {"epocs": 3}}}))
    assert contlearn(str(path), "--out", str(tmp_path / "out"), "--engine", "ray", "--quiet") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "'strategy.epocs'; did you mean 'strategy.epochs'?" in line
    assert ray.most == 0 and not finished_cells(tmp_path / "out")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ContlearnError, match=r"engine ray: not installed .*contlearn\[ray\]"):
        RayEngine(1, threads=1)


# ---------------------------------------------------------------------- one cell


def test_a_cell_that_was_stopped_goes_on_from_its_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contlearn.pareto import cell as cells
    from contlearn.strategies.template import SupervisedTemplate

    monkeypatch.setattr(cells, "CHECKPOINT_EVERY", 0.0)
    cell = next(cell for cell in cells_of(finished).values() if cell["label"] == "replay")
    config = yaml.safe_load((finished / cell["folder"] / "config.yaml").read_text())
    whole, trained = SupervisedTemplate.training_epoch, []

    def epoch(strategy: Any, **arguments: Any) -> None:
        trained.append(strategy)
        if len(trained) == 4:  # the last epoch of the second experience
            os.kill(os.getpid(), signal.SIGTERM)
        whole(strategy, **arguments)

    monkeypatch.setattr(SupervisedTemplate, "training_epoch", epoch)
    with pytest.raises(KeyboardInterrupt):
        cells.execute(cell["id"], config, tmp_path / cell["id"])
    assert not (tmp_path / cell["id"] / "cell.json").exists()
    assert cells.execute(cell["id"], config, tmp_path / cell["id"])["status"] == "complete"
    assert len(trained) == 5  # the interrupted epoch went on; none was repeated
    ours, theirs = bits(tmp_path / cell["id"]), bits(finished / cell["folder"])
    for found in (ours, theirs):
        del found["memory"]  # a restored reservoir has lost the slack of its tensor
    assert ours == theirs


def test_an_unexpected_error_is_one_line_and_leaves_its_traceback(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contlearn.pareto import cell as cells

    cell = next(iter(cells_of(finished).values()))
    config = yaml.safe_load((finished / cell["folder"] / "config.yaml").read_text())
    monkeypatch.setattr("contlearn.config.build", lambda resolved: 1 / 0)
    record = cells.execute(cell["id"], config, tmp_path / cell["id"])
    assert (record["status"], record["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert "Traceback" in (tmp_path / cell["id"] / "error.txt").read_text()
