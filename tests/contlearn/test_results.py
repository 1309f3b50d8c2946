"""``results.json`` follows from the events alone, byte for byte, and is never seen half written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from contlearn import results
from contlearn.errors import ContlearnError
from contlearn.events import EventLog
from contlearn.files import atomic_write_bytes, atomic_write_text

CORRECT = [[9, 0], [6, 8]]


def write_run(folder: Path, *, memory: bool = False, end: bool = True, seed: int = 3) -> None:
    with EventLog(folder / "events.jsonl") as log:
        log.append(
            "run",
            schema=1,
            strategy="ewc",
            scenario="class_incremental",
            seed=seed,
            classes_per_experience=[[0, 1], [2, 3]],
            class_names=["a", "b", "c", "d"],
            environment={"python": "3.11"},
            joint=False,
        )
        for i, row in enumerate(CORRECT):
            log.append("epoch", experience=i, epoch=0, loss=0.1, iterations=5, lr=0.1, seconds=1.0)
            log.append("experience", experience=i, train_s=1.1, eval_s=0.3, samples=10, iterations=5)
            for j, correct in enumerate(row):
                log.append(
                    "evaluation",
                    after=i,
                    on=j,
                    n=10,
                    correct=correct,
                    correct_local=correct,
                    correct_upto=correct,
                    loss=None,
                )
            if memory:
                log.append(
                    "memory", after=i, weights=100, replay=50 * i, peak_static=300 - i, activations=None, how="x"
                )
        if end:
            log.append("end")


def test_results_hold_what_the_design_names(tmp_path: Path) -> None:
    write_run(tmp_path)
    built = results.write(tmp_path)
    assert built == results.read(tmp_path) == json.loads((tmp_path / "results.json").read_text())
    assert built["schema"] == 1
    assert (built["strategy"], built["scenario"], built["seed"]) == ("ewc", "class_incremental", 3)
    assert built["classes_per_experience"] == [[0, 1], [2, 3]]
    assert built["accuracy_matrix"] == [[0.9, 0.0], [0.6, 0.8]]
    assert built["accuracy_seen"] == [0.9, 0.7]
    assert built["metrics"]["final_accuracy"] == 0.7
    assert built["metrics"]["forgetting"] == pytest.approx(0.3)
    assert built["metrics"]["forward_transfer"] is None
    assert built["time"] == {"train_s": 2.2, "eval_s": 0.6}
    assert built["environment"] == {"python": "3.11"}
    assert built["status"] == "complete"
    assert built["joint"] is False


def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path, memory=True)
    results.write(tmp_path)
    first = (tmp_path / "results.json").read_bytes()
    results.write(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == first
    (tmp_path / "results.json").unlink()
    results.write(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "results.json"]


def test_memory_is_absent_when_none_was_recorded(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert "memory" not in results.write(tmp_path)


def test_memory_holds_the_largest_of_each_recorded_field_and_no_other(tmp_path: Path) -> None:
    write_run(tmp_path, memory=True)
    assert results.write(tmp_path)["memory"] == {"weights": 100, "replay": 50, "peak_static": 300, "how": "x"}


def test_a_memory_record_that_a_resumed_run_replaced_does_not_count(tmp_path: Path) -> None:
    write_run(tmp_path)
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("memory", after=1, weights=999)
        log.append("memory", after=1, weights=7)
    assert results.write(tmp_path)["memory"] == {"weights": 7}


@pytest.mark.parametrize(
    ("stages", "status"),
    [
        ([], "incomplete"),
        (["interrupted"], "incomplete"),
        (["interrupted", "resume"], "incomplete"),
        (["resume", "end"], "complete"),
        (["end", "resume"], "incomplete"),
    ],
)
def test_a_run_is_complete_when_its_end_is_the_last_stage(tmp_path: Path, stages: list[str], status: str) -> None:
    write_run(tmp_path, end=False)
    with EventLog(tmp_path / "events.jsonl") as log:
        for stage in stages:
            log.append(stage)
    assert results.write(tmp_path)["status"] == status


def test_an_experience_repeated_after_a_kill_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path)
    before = results.write(tmp_path)
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append("resume", experience=1)
        log.append("experience", experience=1, train_s=2.0, eval_s=0.3, samples=10, iterations=5)
        log.append("evaluation", after=1, on=1, n=10, correct=10, correct_local=10, correct_upto=10, loss=None)
        log.append("end")
    after = results.write(tmp_path)
    assert before["time"]["train_s"] == 2.2
    assert after["time"]["train_s"] == 3.1
    assert after["accuracy_matrix"] == [[0.9, 0.0], [0.6, 1.0]]


def test_a_killed_run_without_results_is_read_from_its_events(tmp_path: Path) -> None:
    write_run(tmp_path, end=False)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"event":"evaluat')
    found = results.read(tmp_path)
    assert found["status"] == "incomplete"
    assert found["metrics"]["final_accuracy"] == 0.7
    assert not (tmp_path / "results.json").exists()


def test_reading_what_is_no_run_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match=r"no run folder"):
        results.read(tmp_path)
    with pytest.raises(ContlearnError, match=r"cannot read .*events\.jsonl"):
        results.write(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"schema": 2}', b"[" * 100_000])
def test_damaged_results_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ContlearnError, match=r"results\.json"):
        results.read(tmp_path)


def test_events_of_another_schema_are_refused() -> None:
    with pytest.raises(ContlearnError, match="schema 2"):
        results.build([{"event": "run", "schema": 2}])


def test_the_environment_is_json_and_names_every_package() -> None:
    found = results.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["cpu_count"] == os.cpu_count()
    assert set(found["packages"]) == set(results.PACKAGES)
    import numpy

    assert found["packages"]["numpy"] == numpy.__version__


def test_a_missing_package_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PACKAGES", ("no-such-package-here",))
    assert results.environment()["packages"] == {"no-such-package-here": None}


def test_reading_and_building_results_imports_nothing_heavy() -> None:
    code = """
import sys
import contlearn.events, contlearn.metrics, contlearn.results, contlearn.plots, contlearn.progress, contlearn.files
contlearn.results.environment()
found = {"torch", "avalanche", "pandas", "matplotlib", "rich", "numpy"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# contlearn/files.py


def test_a_written_file_replaces_the_old_one_and_has_ordinary_permissions(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old and long")
    atomic_write_text(path, "neu ü\r\n")
    assert path.read_bytes() == "neu ü\r\n".encode()
    assert path.stat().st_mode == ordinary.stat().st_mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "ordinary"]


def test_a_target_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ContlearnError, match=r"absent/file.*does not exist"):
        atomic_write_text(tmp_path / "absent" / "file", "")
    with pytest.raises(ContlearnError, match=r"file/below"):
        atomic_write_text(tmp_path / "file" / "below", "")
    with pytest.raises(ContlearnError, match=r"folder.*is a folder"):
        atomic_write_text(tmp_path / "folder", "")
    with pytest.raises(ContlearnError, match="cannot write"):
        atomic_write_text(tmp_path / ("n" * 300), "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_a_failed_write_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
import resource, sys
from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_bytes
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic_write_bytes(sys.argv[1], b"x" * 5000)
except ContlearnError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert str(path) in done.stdout
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_writer_killed_at_any_moment_leaves_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = """
import sys
from contlearn.files import atomic_write_bytes
print("ready", flush=True)
while True:
    for letter in b"ab":
        atomic_write_bytes(sys.argv[1], bytes([letter]) * 3_000_000)
"""
    for delay in (0.0, 0.005, 0.02):
        path.write_bytes(b"a" * 3_000_000)
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(50):  # nor does a reader ever meet half of one
            assert len(path.read_bytes()) == 3_000_000
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        data: Any = path.read_bytes()
        assert data in (b"a" * 3_000_000, b"b" * 3_000_000)
