"""The event log loses at most the line being written, and never keeps or hides a damaged one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contlearn import events
from contlearn.errors import ContlearnError
from contlearn.events import EventLog


def write_records(path: Path, count: int) -> None:
    with EventLog(path) as log:
        for i in range(count):
            log.append("epoch", experience=0, epoch=i, loss=i / 3, name="ü 中")


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def test_records_come_back_in_order_with_kind_and_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("run", schema=1, classes_per_experience=[(0, 1), [2]], joint=False, environment={"python": "3"})
        log.append("end")
    first, last = events.read(path)
    assert first["classes_per_experience"] == [[0, 1], [2]]
    assert first["joint"] is False
    assert first["environment"] == {"python": "3"}
    assert last["event"] == "end"
    assert 0 < first["time"] <= last["time"]


def test_a_record_is_on_the_file_as_soon_as_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("resume", experience=1)
        assert [record["event"] for record in events.read(path)] == ["resume"]
        log.append("end")
        assert [record["event"] for record in events.read(path)] == ["resume", "end"]


def test_scalars_of_numpy_and_torch_become_numbers(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append(
            "evaluation",
            n=np.int64(3),
            f32=np.float32(0.5),
            f64=np.float64(0.1),
            flag=np.bool_(True),
            zero_d=np.array(7),
            correct=torch.tensor(2),
            nested={"loss": [torch.tensor(0.25)]},
        )
    (record,) = without_time(events.read(path))
    assert record == {
        "event": "evaluation",
        "n": 3,
        "f32": 0.5,
        "f64": 0.1,
        "flag": True,
        "zero_d": 7,
        "correct": 2,
        "nested": {"loss": [0.25]},
    }
    assert record["flag"] is True


def test_a_float_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("epoch", loss=float("nan"), lr=float("inf"), more=[np.float32("-inf"), 1.0])
    text = path.read_text()
    (record,) = events.read(path)
    assert (record["loss"], record["lr"], record["more"]) == (None, None, [None, 1.0])
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize(
    "value", [np.zeros(2), {1: "a"}, {"a": {2: 3}}, object(), b"bytes", {1, 2}, Path("x"), 1j, np.complex64(1)]
)
def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append("resume", experience=0)
        before = path.read_bytes()
        with pytest.raises(TypeError, match="payload"):
            log.append("end", payload=value)
        assert path.read_bytes() == before


def test_the_time_is_set_by_the_log(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log, pytest.raises(TypeError, match="time"):
        log.append("end", time=0)


@given(cut=st.integers(min_value=0))
def test_a_log_cut_at_any_byte_keeps_its_whole_records_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    write_records(path, 3)
    data, whole = path.read_bytes(), events.read(path)
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    # A record that lost nothing but its line end is whole.
    ends = [i for i in range(len(data)) if data[i : i + 1] == b"\n"]
    kept = whole[: sum(end <= cut for end in ends)]
    assert events.read(path) == kept
    with EventLog(path) as log:
        log.append("resume", experience=0)
    assert without_time(events.read(path)) == [*without_time(kept), {"event": "resume", "experience": 0}]


def test_a_whole_last_record_without_its_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write_records(path, 2)
    data = path.read_bytes()
    path.write_bytes(data.removesuffix(b"\n"))  # an editor may do this
    assert len(events.read(path)) == 2
    EventLog(path).close()
    assert path.read_bytes() == data


@pytest.mark.parametrize("tail", [b'{"event":"epo', b"\0\0\0\0", b'{"event":"epoch","name":"\xff', b"[1, 2]", b"  "])
def test_opening_cuts_a_torn_tail_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "events.jsonl"
    write_records(path, 2)
    data = path.read_bytes()
    path.write_bytes(data + tail)
    assert len(events.read(path)) == 2
    EventLog(path).close()
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"event":"epoch","lo',
        b"5",
        b'{"loss":1}',
        b'{"event":3}',
        b'{"event":"epoch","loss":NaN}',
        b'{"event":"epoch","loss":1e999}',
        b'{"event":"\xff"}',
        b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("reader", [events.read, EventLog])
def test_a_damaged_line_in_the_middle_is_named_by_file_and_line(tmp_path: Path, damaged: bytes, reader: Any) -> None:
    path = tmp_path / "events.jsonl"
    write_records(path, 3)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], damaged, *lines[2:]]))
    before = path.read_bytes()
    with pytest.raises(ContlearnError, match=r"events\.jsonl, line 2") as raised:
        reader(path)
    assert len(str(raised.value)) < 400
    assert path.read_bytes() == before


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match=r"nowhere.*does not exist"):
        EventLog(tmp_path / "nowhere" / "events.jsonl")
    with pytest.raises(ContlearnError, match="cannot write"):
        EventLog(tmp_path)
    with pytest.raises(ContlearnError, match=r"cannot read.*absent"):
        events.read(tmp_path / "absent")


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_a_killed_writer_leaves_a_log_that_can_be_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = """
import sys
from contlearn.events import EventLog
log = EventLog(sys.argv[1])
for i in range(10**9):
    log.append("epoch", experience=0, epoch=i, text="x" * 20000)
    print(i, flush=True)
"""
    with run_python(code, path) as process:
        assert process.stdout is not None
        reported = 0
        while reported < 50:
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
    found = events.read(path)
    assert [record["epoch"] for record in found] == list(range(len(found)))
    assert len(found) > reported  # every append that returned is there
    with EventLog(path) as log:
        log.append("resume", experience=0)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()][-1] == "resume"


def test_a_full_disk_is_one_clear_error_and_the_log_keeps_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = """
import resource, sys
from contlearn.errors import ContlearnError
from contlearn.events import EventLog
log = EventLog(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
log.append("epoch", experience=0, epoch=0)
try:
    log.append("epoch", experience=0, epoch=1, text="x" * 5000)  # part of it fits
except ContlearnError as error:
    print(error)
log.append("end")
"""
    with run_python(code, path) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    assert "events.jsonl" in output
    assert [record["event"] for record in events.read(path)] == ["epoch", "end"]


def test_the_last_record_of_a_key_counts() -> None:
    records = [
        {"event": "epoch", "experience": 0, "epoch": 0, "loss": 3.0},
        {"event": "epoch", "experience": 0, "epoch": 1, "loss": 2.0},
        {"event": "resume", "experience": 0},
        {"event": "epoch", "experience": 0, "epoch": 0, "loss": 1.0},
    ]
    found = events.latest(records, "epoch", "experience", "epoch")
    assert {key: record["loss"] for key, record in found.items()} == {(0, 0): 1.0, (0, 1): 2.0}
    with pytest.raises(ContlearnError, match=r"'epoch'.*'lr'"):
        events.latest(records, "epoch", "lr")
