"""Guards and replay memory: what trips, what is put back, what is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contlearn.edge.runtime import ReplayMemory, Session

Linear = Callable[..., Path]


def frames(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 6)).astype(np.float32)


def guarded(**guards: Any) -> dict[str, Any]:
    return {"entries": {"guards": guards}}


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(second[name], array) for name, array in first.items())


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, {"capacity": 5, "policy": "balanced", "dtype": "float32", "shape": [6]}])
def test_a_step_that_overflows_is_not_taken(memory: Any, linear: Linear) -> None:
    session = Session(linear(mask=True, memory=memory), threads=1)
    session.step(frames(0), np.array([0, 0, 0, 0]))
    state, opened = session.state(), session.learned.opened.copy()
    size = session.learned.replay.size if session.learned.replay else 0
    good = session.predict(10 * frames(1))
    session.lr = 3e38
    result = session.step(10 * frames(1), np.array([1, 0, 0, 0]))
    assert (result["tripped"], result["restored"]) == ("non_finite_state", "previous")
    np.testing.assert_array_equal(result["logits"], good)  # the answer of the state in place, its class still closed
    assert equal(state, session.state()) and session.trips == {"non_finite_state": 1}
    assert np.array_equal(session.learned.opened, opened)
    assert session.learned.replay is None or session.learned.replay.size == size
    session.lr = 0.1
    assert session.step(frames(1), np.array([1, 0, 0, 0]))["tripped"] is None
    assert session.steps == 3


def test_frames_that_overflow_any_state_change_nothing(linear: Linear) -> None:
    session = Session(linear(), threads=1)
    session.step(frames(0), np.array([0, 1, 2, 0]))
    state = session.state()
    result = session.step(np.full((4, 6), 3e38, np.float32) * np.sign(frames(2)), np.array([0, 1, 2, 0]))
    assert result["tripped"] in ("non_finite_loss", "non_finite_logits") and result["restored"] == "previous"
    assert equal(state, session.state())


def test_weights_that_overflow_give_way_to_the_shipped_ones(linear: Linear) -> None:
    session = Session(linear(), threads=1)
    shipped = session.state()
    huge = {name: np.full_like(array, 2e38) for name, array in session.learned.weights.moving().items()}
    session.learned.weights.write(huge)
    result = session.step(np.abs(frames(0)) + 1, np.array([0, 1, 2, 0]))
    assert result["restored"] == "shipped" and np.isfinite(result["logits"]).all()
    assert equal(shipped, session.state())


def test_without_the_guard_the_step_is_taken(linear: Linear) -> None:
    session = Session(linear(**guarded(non_finite=False, collapse_window=0)), threads=1)
    session.lr = 3e38
    assert session.step(10 * frames(0), np.array([0, 1, 2, 0]))["tripped"] is None
    assert not np.isfinite(session.state()["w"]).all()


# --- collapse ---------------------------------------------------------------------------------------------------------

WINDOW = 16


def test_collapse_without_labels(linear: Linear) -> None:
    """Each step pulls the bias of class 0 up by the learning rate, until everything is class 0."""
    entries = {
        "guards": {"collapse_window": WINDOW, "collapse_share": 0.95, "snapshot_every": 2},
        "hyperparameters": {"lr": 4.0},
    }
    session = Session(linear(labelled=False, entries=entries), threads=1)
    shipped, tripped, restored = session.state(), [], []
    for seed in range(200):
        result = session.step(frames(seed))
        if result["tripped"]:
            tripped.append(seed)
            restored.append(result["restored"])
            np.testing.assert_array_equal(result["logits"], session.predict(frames(seed)))
            if restored[-1] == "shipped":
                assert equal(shipped, session.state())
    assert set(session.trips) == {"collapse"} and len(tripped) == session.trips["collapse"] >= 3
    # Two windows of 4 frames a step at least: one to see it, one to be sure.
    assert tripped[0] >= 2 * WINDOW // 4 - 1
    assert all(after - before >= 2 * WINDOW // 4 - 1 for before, after in itertools.pairwise(tripped))
    assert "shipped" in restored  # a snapshot that collapses again is not put back twice
    session.reset()
    assert equal(shipped, session.state())


def test_a_run_of_one_class_is_no_collapse(linear: Linear) -> None:
    """With labels, the labels decide; 40 batches of class 1 end in class 1 everywhere, rightly."""
    session = Session(linear(**guarded(collapse_window=WINDOW, snapshot_every=1)), threads=1)
    for seed in range(40):
        result = session.step(frames(seed), np.full(4, 1))
    assert session.trips == {} and (result["logits"].argmax(1) == 1).all()


def test_a_run_of_one_class_without_labels(linear: Linear) -> None:
    """What the shipped state calls class 0 as well is no collapse."""
    session = Session(linear(labelled=False, **guarded(collapse_window=WINDOW)), threads=1)
    w, b = session.state()["w"], session.state()["b"]
    x = np.random.default_rng(0).normal(size=(4000, 6)).astype(np.float32)
    x = x[(x @ w + b).argmax(1) == 0][:160]
    for start in range(0, 160, 4):
        session.step(x[start : start + 4])
    assert session.trips == {}


def test_no_snapshot_under_suspicion(linear: Linear) -> None:
    entries = {"guards": {"collapse_window": WINDOW, "snapshot_every": 1}, "hyperparameters": {"lr": 100.0}}
    session = Session(linear(labelled=False, entries=entries), threads=1)
    snapshots = []
    while not session.trips:
        session.step(frames(session.steps))
        snapshots.append(session.learned.weights.snapshot["b"][0] if session.learned.weights.snapshot else None)
    # Four steps make up the second window; nothing is copied in them, and in every one before.
    assert len(set(snapshots[-5:-1])) == 1
    assert len(set(snapshots[:-4])) == len(snapshots) - 4 >= 3


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_puts_the_snapshot_back(linear: Linear) -> None:
    entries = {"guards": {"max_drift": 1.0, "snapshot_every": 1, "collapse_window": 0}, "hyperparameters": {"lr": 0.5}}
    session = Session(linear(labelled=False, entries=entries), threads=1)
    start = session.state()
    length = np.sqrt(sum((start[name].astype(float) ** 2).sum() for name in ("w", "b")))

    def drift(state: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum(((state[n] - start[n]).astype(float) ** 2).sum() for n in ("w", "b"))) / length)

    seen = []
    for seed in range(60):
        result = session.step(frames(seed))
        assert drift(session.state()) <= 1.0
        if result["tripped"]:
            assert result["tripped"] == "drift"
            seen.append((result["restored"], round(drift(session.state()), 3)))
            np.testing.assert_allclose(result["logits"], session.predict(frames(seed)))
    # The snapshot lies within half of the limit. A step from there is beyond that half, so none is taken: the next one
    # to be put back is the shipped state.
    snapshot = round(float(max(k * 0.5 / length for k in range(60) if k * 0.5 / length <= 0.5)), 3)
    assert seen[:4] == [("snapshot", snapshot), ("shipped", 0.0)] * 2


# --- replay memory ----------------------------------------------------------------------------------------------------


def memory(policy: str, capacity: int, classes: int = 3) -> ReplayMemory:
    return ReplayMemory({"policy": policy, "capacity": capacity, "shape": [1], "dtype": "float32"}, classes)


def test_a_reservoir_keeps_everything_equally_often() -> None:
    rng, kept = np.random.default_rng(0), np.zeros(40)
    for _ in range(2000):
        held = memory("reservoir", 10)
        for number in range(40):
            held.take(np.array([number], np.float32), 0, rng)
        assert held.size == 10 and held.seen == 40
        kept[held.frames[:, 0].astype(int)] += 1
    # Each with probability 10/40: 500 times, standard deviation 19.4.
    assert abs(kept - 500).max() < 4 * 19.4


def test_a_balanced_memory_holds_rare_classes_and_samples_each_uniformly() -> None:
    rng, kept = np.random.default_rng(0), np.zeros(200)
    for _ in range(300):
        held = memory("balanced", 12)
        for number in range(200):
            held.take(np.array([number], np.float32), 2 if number >= 196 else number % 2, rng)
        counts = np.bincount(held.labels, minlength=3)
        assert counts.tolist() == [4, 4, 4]  # class 2 came last and four times only
        kept[held.frames[:, 0].astype(int)] += 1
    assert (kept[196:] == 300).all()
    # 4 of 98 each: 12.2 times, standard deviation 3.4.
    assert abs(kept[:196] - 12.2).max() < 5 * 3.4


def test_draws_repeat_only_where_they_must() -> None:
    rng, held = np.random.default_rng(0), memory("reservoir", 8)
    held.take(np.zeros(1, np.float32), 0, rng)
    assert held.draw(4, rng).tolist() == [0, 0, 0, 0]
    for number in range(7):
        held.take(np.array([number], np.float32), 0, rng)
    assert len(set(held.draw(8, rng).tolist())) == 8


@pytest.mark.parametrize(("limit", "capacity"), [(0, 9), (5 * 10, 5), (5 * 10 + 9, 5), (10**9, 9)])
def test_the_byte_bound_holds(limit: int, capacity: int, linear: Linear) -> None:
    rule = {"capacity": 9, "bytes": limit, "policy": "reservoir", "dtype": "uint8", "shape": [6]}
    session = Session(linear(memory=rule, entries={"preprocessing": {"input": "uint8"}}), threads=1)
    for seed in range(8):
        session.step(np.random.default_rng(seed).integers(0, 3, (4, 6), dtype=np.uint8), np.array([0, 1, 2, 0]))
    replay = session.learned.replay
    assert replay is not None and replay.capacity == replay.size == capacity
    assert replay.nbytes == session.account()["replay"] == capacity * 10
