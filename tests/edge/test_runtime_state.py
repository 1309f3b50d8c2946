"""Saved states: what comes back, bit for bit, and what happens to files that are damaged or foreign."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from contlearn.edge.runtime import RunnerError, Session, encode_tensors, read_tensors

Linear = Callable[..., Path]
ALL: dict[str, Any] = {
    "memory": {"capacity": 7, "policy": "balanced", "dtype": "float32", "shape": [6]},
    "mask": True,
    "uniform": True,
    "entries": {"guards": {"snapshot_every": 2, "collapse_window": 8, "collapse_share": 0.9}},
}


def steps(session: Session, first: int, last: int) -> list[float]:
    losses = []
    for number in range(first, last):
        rng = np.random.default_rng(number)
        losses.append(session.step(rng.normal(size=(4, 6)).astype(np.float32), rng.integers(0, 3, 4))["loss"])
    return losses


def same(first: Session, second: Session) -> None:
    """Everything that lives on is equal bit for bit."""
    mine, theirs = first.learned.tensors(), second.learned.tensors()
    # One of them may have stored a snapshot that equals its state.
    assert {name for name in mine if name[:8] != "snapshot"} == {name for name in theirs if name[:8] != "snapshot"}
    assert all(np.array_equal(theirs[name], array) for name, array in mine.items() if name in theirs)
    assert json.loads(first.learned.record()) == json.loads(second.learned.record())
    mine, theirs = first.learned.weights.snapshot, second.learned.weights.snapshot
    assert mine.keys() == theirs.keys() and all(np.array_equal(theirs[name], array) for name, array in mine.items())


@pytest.mark.parametrize("cut", [1, 2, 5, 8])
def test_a_reopened_session_goes_on_bit_for_bit(cut: int, linear: Linear, tmp_path: Path) -> None:
    folder = linear(**ALL)
    whole = Session(folder, threads=1, state_dir=tmp_path / "whole", seed=3)
    whole.lr = 0.03
    losses = steps(whole, 0, 12)
    first = Session(folder, threads=1, state_dir=tmp_path / "pieces", seed=3)
    first.lr = 0.03
    pieces = steps(first, 0, cut)
    assert first.save() == tmp_path / "pieces" / "state-000001.safetensors"
    second = Session(folder, threads=1, state_dir=tmp_path / "pieces", seed=99)  # the saved generator counts
    assert second.opened == "state-000001.safetensors"
    same(first, second)
    assert pieces + steps(second, cut, 12) == losses
    same(whole, second)


def test_a_snapshot_that_is_older_than_the_state_is_saved_too(linear: Linear) -> None:
    folder = linear(**ALL)
    session = Session(folder, threads=1)
    steps(session, 0, 3)  # the snapshot is from step 2
    session.save()
    opened = Session(folder, threads=1)
    same(session, opened)
    assert session.rollback("snapshot") == opened.rollback("snapshot") == "snapshot"
    same(session, opened)


def test_rollback_and_reset(linear: Linear) -> None:
    folder = linear(**ALL)
    session, fresh = Session(folder, threads=1), Session(folder, threads=1)
    shipped = session.state()
    steps(session, 0, 2)
    assert session.rollback() == "shipped"
    same(session, fresh)
    losses = steps(session, 0, 4)
    session.save()
    saved = session.state()
    steps(session, 4, 8)
    assert session.rollback() == "state-000001.safetensors"
    assert all(np.array_equal(saved[name], array) for name, array in session.state().items())
    assert session.steps == 4
    session.reset()
    same(session, fresh)
    assert all(np.array_equal(shipped[name], array) for name, array in session.state().items())
    assert steps(session, 0, 4) == losses
    assert Session(folder, threads=1).steps == 4  # a reset is not saved unasked


def test_two_generations_are_kept(linear: Linear) -> None:
    folder = linear()
    session = Session(folder, threads=1)
    for number in range(4):
        steps(session, number, number + 1)
        session.save()
    assert sorted(os.listdir(folder / "state")) == ["state-000003.safetensors", "state-000004.safetensors"]


def test_numbers_grow_beyond_six_digits(linear: Linear) -> None:
    folder = linear()
    session = Session(folder, threads=1)
    session.save().rename(folder / "state" / "state-999999.safetensors")
    session = Session(folder, threads=1)
    assert session.save().name == "state-1000000.safetensors"
    assert Session(folder, threads=1).opened == "state-1000000.safetensors"


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "empty":
        data.clear()
    elif how == "cut":
        del data[len(data) // 2 :]
    elif how == "longer":
        data += b"\0"
    else:
        data[{"header": 200, "payload": -3, "length": 0}[how]] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["empty", "cut", "longer", "header", "payload", "length"])
def test_a_damaged_generation_is_passed_over(how: str, linear: Linear) -> None:
    folder = linear(**ALL)
    session = Session(folder, threads=1)
    for number in range(2):
        steps(session, number, number + 1)
        session.save()
    damage(folder / "state" / "state-000002.safetensors", how)
    opened = Session(folder, threads=1)
    assert (opened.opened, opened.steps, len(opened.skipped)) == ("state-000001.safetensors", 1, 1)
    assert "state-000002.safetensors" in opened.skipped[0]
    # The next save keeps the one that could be read, not the damaged one.
    opened.save()
    assert sorted(os.listdir(folder / "state")) == ["state-000001.safetensors", "state-000003.safetensors"]
    damage(folder / "state" / "state-000001.safetensors", how)
    damage(folder / "state" / "state-000003.safetensors", how)
    opened = Session(folder, threads=1)
    assert (opened.opened, opened.steps, len(opened.skipped)) == ("state.safetensors", 0, 2)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_altered_byte_or_cut_is_noticed(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": np.arange(5, dtype=np.int64), "b": np.ones((2, 3), np.float16), "c": np.zeros(0, np.float32)}
    whole = b"".join(map(bytes, encode_tensors(tensors, {"k": "v"})))
    if data.draw(st.booleans()):
        content = bytearray(whole)
        content[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = bytearray(whole[: data.draw(st.integers(0, len(whole) - 1))])
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    with pytest.raises(RunnerError, match=r"damaged|empty"):
        read_tensors(path, sealed=True)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.one_of(st.none(), st.integers(), st.text(max_size=4), st.sampled_from(["F32", "BOOL"])),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(["__metadata__", "a", "b", "dtype", "shape", "data_offsets"]), inner, max_size=3
                ),
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
    ),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    payload=st.binary(max_size=24),
)
def test_any_bytes_are_read_or_refused(header: bytes, length: int | None, payload: bytes, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + payload)
    try:
        tensors, _ = read_tensors(path)
    except RunnerError as error:
        assert "\n" not in str(error)
    else:
        assert sum(array.nbytes for array in tensors.values()) == len(payload)


def test_files_are_ordinary_safetensors(tmp_path: Path) -> None:
    tensors = {
        "scalar": np.array(3.5, np.float64),
        "none": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False, True]),
        "bytes": np.arange(7, dtype=np.uint8),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "name/with ümlaut": np.array([1, -1], np.int16),
    }
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"".join(map(bytes, encode_tensors(tensors, {"note": "x"}))))
    theirs, (mine, metadata) = load_file(path), read_tensors(path, sealed=True)
    assert theirs.keys() == mine.keys() == tensors.keys() and metadata["note"] == "x"
    for name, array in tensors.items():
        for found in (theirs[name], mine[name]):
            assert found.dtype == array.dtype and np.array_equal(found, array) and found.shape == array.shape
    assert all(array.ctypes.data % array.itemsize == 0 and not array.flags.writeable for array in mine.values())
    save_file({"x": np.ones(3, np.float32)}, tmp_path / "d.safetensors")
    assert np.array_equal(read_tensors(tmp_path / "d.safetensors")[0]["x"], np.ones(3))
    with pytest.raises(RunnerError, match="checksum mismatch"):
        read_tensors(tmp_path / "d.safetensors", sealed=True)


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str], dict[str, Any]], None]) -> None:
    """Edit a saved state and seal it again."""
    tensors, metadata = read_tensors(path, sealed=True)
    tensors, record = {name: np.array(array) for name, array in tensors.items()}, json.loads(metadata["session"])
    metadata.pop("sha256")
    change(tensors, metadata, record)
    content = b"".join(map(bytes, encode_tensors(tensors, {**metadata, "session": json.dumps(record)})))
    path.unlink()
    path.write_bytes(content)


def dropped(name: str) -> Any:
    return lambda tensors, metadata, record: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m, r: m.update(artifact="0" * 64), "another artifact learned"),
        (lambda t, m, r: m.update(schema="2"), "expected a state of schema 1, got '2'"),
        (lambda t, m, r: r.pop("steps"), "does not fit this artifact"),
        (lambda t, m, r: r["rng"].update(bit_generator="MT19937"), "does not fit"),
        (lambda t, m, r: r["rng"]["state"].update(state="x"), "does not fit"),
        (lambda t, m, r: r.update(lr=-1.0), "lr: expected a finite number from 0"),
        (dropped("state/w"), "does not fit"),
        (dropped("memory/labels"), "does not fit"),
        (lambda t, m, r: t.update({"state/w": np.zeros((2, 2), np.float32)}), "another shape or dtype"),
        (lambda t, m, r: t.update({"memory/labels": np.full_like(t["memory/labels"], 9)}), "does not fit"),
        (lambda t, m, r: t.update({"memory/frames": np.zeros((99, 6), np.float32)}), "does not fit"),
        (lambda t, m, r: t.update({"classes/open": np.zeros(3, np.float32)}), "another shape or dtype"),
        (lambda t, m, r: t.update({"guard/recent": np.full(3, -5, np.int32)}), "holds no classes"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change: Any, message: str, linear: Linear) -> None:
    folder = linear(**ALL)
    session = Session(folder, threads=1)
    steps(session, 0, 3)
    path = session.save()
    steps(session, 3, 5)
    rewrite(path, change)
    before = Session(folder, threads=1, state_dir=folder / "elsewhere")
    steps(before, 0, 5)
    with pytest.raises(RunnerError, match=message) as error:
        session.rollback()
    assert "\n" not in str(error.value)
    same(session, before)
    with pytest.raises(RunnerError, match=message):
        Session(folder, threads=1)


def test_the_state_of_another_artifact_is_not_taken(linear: Linear) -> None:
    first, second = linear("first"), linear("second", seed=1)
    Session(first, threads=1).save()
    shutil.copytree(first / "state", second / "state")
    with pytest.raises(RunnerError, match="another artifact learned; remove it, or give this one its own state_dir"):
        Session(second, threads=1)


def test_a_state_folder_that_is_none(linear: Linear, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunnerError, match=r"cannot read .*file': Not a directory"):
        Session(linear(), threads=1, state_dir=tmp_path / "file")


def test_a_full_disk_leaves_the_old_states(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = linear()
    session = Session(folder, threads=1)
    steps(session, 0, 2)
    session.save()
    steps(session, 2, 4)
    state = session.state()

    def full(file: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(RunnerError, match="No space left on device"):
            session.save()
    assert os.listdir(folder / "state") == ["state-000001.safetensors"]
    assert all(np.array_equal(state[name], array) for name, array in session.state().items())
    assert Session(folder, threads=1).steps == 2
    session.save()
    assert Session(folder, threads=1).steps == 4
