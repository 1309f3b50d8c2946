"""Steps of the runner against the same step in NumPy, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contlearn.edge.runtime import Session

Linear = Callable[..., Path]
MEMORY = {"capacity": 5, "policy": "reservoir", "dtype": "float32", "shape": [6]}


def batch(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(4, 6)).astype(np.float32), rng.integers(0, 3, 4)


def step_in_numpy(
    state: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, *, lr: float = 0.1, mask: np.ndarray | None = None
) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
    """Softmax cross-entropy, momentum 0.9 on the weights; in double precision."""
    w, b, v = (state[name].astype(np.float64) for name in "wbv")
    logits = x.astype(np.float64) @ w + b
    if mask is not None:
        logits = logits + (mask - 1.0) * 10_000
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    delta = (p - np.eye(3)[y]) / len(y)
    v = 0.9 * v + x.T @ delta
    return float(loss), logits[:4], {"w": w - lr * v, "b": b - lr * delta.sum(0), "v": v}


def check(session: Session, expected: dict[str, np.ndarray]) -> None:
    for name, array in session.state().items():
        np.testing.assert_allclose(array, expected[name], atol=2e-6)


@pytest.mark.parametrize("segments", [1, 2])
def test_steps_equal_numpy(segments: int, linear: Linear) -> None:
    session, rng = Session(linear(segments=segments), threads=1), np.random.default_rng(0)
    state = session.state()
    for number in range(1, 7):
        x, y = batch(rng)
        loss, logits, state = step_in_numpy(state, x, y)
        result = session.step(x, y)
        assert result["loss"] == pytest.approx(loss, abs=1e-5)
        np.testing.assert_allclose(result["logits"], logits, atol=1e-5)
        assert (result["step"], result["tripped"], result["restored"]) == (number, None, None)
        check(session, state)
    assert session._adapt.in_place and session._predict.in_place


def test_a_class_is_switched_on_by_its_first_label(linear: Linear) -> None:
    session, rng = Session(linear(mask=True), threads=1), np.random.default_rng(0)
    x, _ = batch(rng)
    plain = x @ session.state()["w"] + session.state()["b"]
    np.testing.assert_allclose(session.predict(x), plain, atol=1e-5)  # nothing seen: all are open
    for labels, opened in (([2, 2, 2, 2], [0, 0, 1]), ([0, 2, 0, 2], [1, 0, 1])):
        before, y = session.state(), np.array(labels)
        _, logits, after = step_in_numpy(before, x, y, mask=np.array(opened))
        np.testing.assert_allclose(session.step(x, y)["logits"], logits, rtol=1e-5, atol=1e-5)
        check(session, after)
        assert (session.predict(x)[:, 1] < -1000).all()


def test_classes_that_the_shipped_state_knows_are_open(linear: Linear) -> None:
    session = Session(linear(mask=True, entries={"open_classes": [1]}), threads=1)
    assert (session.predict(batch(np.random.default_rng(0))[0]).argmax(1) == 1).all()
    session.step(np.ones((4, 6), np.float32), np.array([0, 0, 0, 0]))
    assert session.learned.opened.tolist() == [True, True, False]


def test_uniform_inputs_come_from_the_seed(linear: Linear) -> None:
    folder = linear(uniform=True)
    x, y = batch(np.random.default_rng(0))
    session = Session(folder, threads=1, seed=5)
    noise = np.random.default_rng(5).random((4, 6), np.float32)
    _, _, after = step_in_numpy(session.state(), x * (noise > 0.25), y)
    session.step(x, y)
    check(session, after)
    other = Session(folder, threads=1, seed=6)
    other.step(x, y)
    assert not np.array_equal(other.state()["w"], session.state()["w"])


def test_replay_joins_rows_that_were_seen(linear: Linear) -> None:
    session, rng = Session(linear(memory=MEMORY), threads=1), np.random.default_rng(0)
    seen: list[tuple[bytes, int]] = []
    for _ in range(6):
        x, y = batch(rng)
        state = session.state()
        session.step(x, y)
        past_x, past_y = session.inputs.buffers["x_memory"].array, session.inputs.buffers["y_memory"].array
        _, _, expected = step_in_numpy(state, np.concatenate([x, past_x]), np.concatenate([y, past_y]))
        check(session, expected)
        drawn = [(row.tobytes(), int(label)) for row, label in zip(past_x, past_y, strict=True)]
        rows = [(row.tobytes(), int(label)) for row, label in zip(x, y, strict=True)]
        assert set(drawn) <= set(seen or rows)  # nothing is past in the first step: the current rows stand in
        assert len(set(drawn)) == 4
        seen += rows
    assert session.learned.replay is not None and session.learned.replay.size == 5 and session.learned.replay.seen == 24


def test_the_learning_rate_can_be_set(linear: Linear) -> None:
    session = Session(linear(), threads=1)
    x, y = batch(np.random.default_rng(0))
    _, _, expected = step_in_numpy(session.state(), x, y, lr=0.5)
    session.lr = 0.5
    session.step(x, y)
    check(session, expected)
    session.reset()
    assert session.lr == 0.1


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 11])
def test_predict_takes_any_number_of_rows(rows: int, linear: Linear) -> None:
    session = Session(linear(), threads=1)
    before = session.state()
    x = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32)
    logits = session.predict(x)
    assert logits.shape == (rows, 3)
    np.testing.assert_allclose(logits, x @ before["w"] + before["b"], atol=1e-5)
    assert all(np.array_equal(before[name], array) for name, array in session.state().items())


# --- frames -----------------------------------------------------------------------------------------------------------


def raw(**changes: Any) -> dict[str, Any]:
    rule = {"scale": 1 / 255, "mean": [0.5], "std": [0.25], "layout": "NCHW", "input": "uint8", **changes}
    return {"entries": {"preprocessing": rule}}


def test_raw_frames_are_prepared(linear: Linear) -> None:
    folder = linear(**raw(mean=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], std=[0.5, 1, 2, 3, 4, 5]))
    x = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    y = np.array([0, 1, 2, 0])
    prepared = (x / 255 - np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])) / np.array([0.5, 1, 2, 3, 4, 5])
    first, second = Session(folder, threads=1), Session(folder, threads=1)
    state = first.state()
    np.testing.assert_allclose(first.predict(x), prepared @ state["w"] + state["b"], atol=1e-5)
    first.step(x, y)
    second.step(prepared.astype(np.float32), y)  # float32 frames were prepared already
    check(second, first.state())


def test_float_frames_are_raw_unless_said(linear: Linear) -> None:
    session = Session(linear(**raw(input="float32", scale=2.0, mean=[], std=[])), threads=1)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    np.testing.assert_allclose(session.predict(x), session.predict(2 * x, prepared=True), atol=1e-6)


def test_the_memory_keeps_raw_bytes(linear: Linear) -> None:
    session = Session(linear(memory={**MEMORY, "dtype": "uint8"}, **raw()), threads=1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = rng.integers(0, 256, (4, 6), dtype=np.uint8)
        session.step(x, np.array([0, 1, 2, 0]))
    assert session.learned.replay is not None and session.learned.replay.frames.dtype == np.uint8
    assert session.account()["replay"] == 5 * (6 + 4)
    past = session.inputs.buffers["x_memory"].array
    np.testing.assert_allclose((past * 0.25 + 0.5) * 255, np.rint((past * 0.25 + 0.5) * 255), atol=1e-3)
    session.predict(x)
    prepared = session.inputs.prepared.copy()
    np.testing.assert_allclose(prepared, (x / 255 - 0.5) / 0.25, atol=1e-6)


# --- where tensors lie ------------------------------------------------------------------------------------------------


def pointers(session: Session) -> list[dict[str, int]]:
    sets = session.learned.weights._sets
    return [{name: buffer.value.data_ptr() for name, buffer in half.items()} for half in sets]


@pytest.mark.parametrize("segments", [1, 2])
def test_a_step_writes_into_the_other_set(segments: int, linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    session, rng = Session(linear(segments=segments), threads=1), np.random.default_rng(0)
    weights = session.learned.weights
    places = pointers(session)
    assert not set(places[0].values()) & set(places[1].values())
    # The runner itself copies no state within a step: ONNX Runtime writes where the state lies.
    monkeypatch.setattr("contlearn.edge.runner.graph.Buffer.write", counting := Counting())
    for number in range(4):
        front, before = weights.front, {name: array.copy() for name, array in weights.moving().items()}
        session.step(*batch(rng))
        assert weights.front == 1 - front
        old = weights._sets[front]
        assert all(np.array_equal(old[name].read(), before[name]) for name in old)
        assert all(not np.array_equal(array, before[name]) for name, array in weights.moving().items())
        assert pointers(session) == places
        assert session._adapt.in_place, number
    assert counting.shapes == [(4,), (1,)] * 4  # labels and learning rate
    held = [b for half in weights._sets for b in half.values()]
    assert all(buffer.value.data_ptr() == buffer.array.ctypes.data for buffer in held)


class Counting:
    """Stands in for ``Buffer.write`` and notes the shapes written."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __get__(self, buffer: Any, owner: Any) -> Callable[[Any], None]:
        def write(content: Any) -> None:
            self.shapes.append(buffer.array.shape)
            buffer.array[...] = content

        return write


def test_one_binding_serves_all_steps_of_a_set(linear: Linear) -> None:
    session, rng = Session(linear(), threads=1), np.random.default_rng(0)
    for _ in range(5):
        session.step(*batch(rng))
    assert len(session._adapt._bindings) == 2


def test_where_outputs_cannot_be_bound_results_are_copied(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rng = linear(segments=2), np.random.default_rng(0)
    bound, copied = Session(folder, threads=1), Session(folder, threads=1)

    def refuse(*arguments: Any) -> bool:
        raise RuntimeError("this provider binds no outputs")

    monkeypatch.setattr(copied._adapt, "_run_bound", refuse)
    for _ in range(3):
        x, y = batch(rng)
        assert bound.step(x, y)["loss"] == copied.step(x, y)["loss"]
    assert bound._adapt.in_place and not copied._adapt.in_place
    assert all(np.array_equal(copied.state()[name], array) for name, array in bound.state().items())


def test_an_output_that_lies_elsewhere_is_noticed(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    session, rng = Session(linear(), threads=1), np.random.default_rng(0)
    state = session.state()
    x, y = batch(rng)
    _, _, expected = step_in_numpy(state, x, y)
    # Targets at another place than ONNX Runtime was told, as when it could not use them.
    monkeypatch.setattr(type(session._results["loss"].value), "data_ptr", lambda value: id(value))
    session.step(x, y)
    assert not session._adapt.in_place
    check(session, expected)


def test_account_is_what_the_arrays_hold(linear: Linear) -> None:
    session = Session(linear(memory=MEMORY), threads=1)
    one = 4 * (18 + 3 + 18)
    inputs = 4 * 24 + 8 * 4 + 4 * 24 + 8 * 4 + 4
    assert session.account() == {
        "state": one,
        "second_buffer": one,
        "snapshot": 0,
        "replay": 5 * (6 * 4 + 4),
        "inputs_outputs": inputs + 4 + 48 + 48,
    }
