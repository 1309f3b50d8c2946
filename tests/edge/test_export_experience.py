"""The end of an experience on a device: teachers and anchors follow, classes grow old, exemplars are taken in once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contlearn.edge import artifact, manifest
from contlearn.edge.manifest import TensorSpec
from contlearn.edge.runtime import RunnerError, Session, encode_tensors
from contlearn.errors import ContlearnError

Linear = Callable[..., Path]
GRAPH = """<ir_version: 10, opset_import: ["": 18]> g
(float[2,3] x, int64[2] y, float[1] lr, float[3] mask, float[3] old, float[3] w, float[3] anchor, float[3] v)
=> (float[1] loss, float[2,3] logits, float[3] new_w, float[3] new_v) <int64[1] flat = {1}> {
    wx = Add(x, w)  seen = Mul(wx, mask)  logits = Identity(seen)
    gap = Sub(w, anchor)  square = Mul(gap, gap)  aged = Mul(square, old)  sum = ReduceSum<keepdims=0>(aged)
    yf = Cast<to=1>(y)  ysum = ReduceSum<keepdims=0>(yf)  both = Add(sum, ysum)  loss = Reshape(both, flat)
    new_v = Add(v, lr)  new_w = Add(w, new_v) }"""
PREDICT = """<ir_version: 10, opset_import: ["": 18]> g (float[2,3] x, float[3] mask, float[3] w) => (float[2,3] logits)
{ wx = Add(x, w)  logits = Mul(wx, mask) }"""
X, COPIES = np.zeros((2, 3), np.float32), {"anchor": "w"}


def _specs() -> tuple[list[TensorSpec], list[TensorSpec]]:
    inputs = [
        TensorSpec("x", [2, 3], "float32", "frames"), TensorSpec("y", [2], "int64", "labels"),
        TensorSpec("lr", [1], "float32", "learning_rate"), TensorSpec("mask", [3], "float32", "class_mask"),
        TensorSpec("old", [3], "float32", "old_class_mask"),
        *(TensorSpec(name, [3], "float32", "state") for name in ("w", "anchor", "v")),
    ]  # fmt: skip
    outputs = [
        TensorSpec("loss", [1], "float32", "loss"), TensorSpec("logits", [2, 3], "float32", "logits"),
        TensorSpec("new_w", [3], "float32", "state", of="w"), TensorSpec("new_v", [3], "float32", "state", of="v"),
    ]  # fmt: skip
    return inputs, outputs


@pytest.fixture
def anchored(tmp_path: Path) -> Linear:
    """``anchored(name="artifact", **entries)``: weights that move by v, v that grows by lr, and an anchor.

    The loss is the sum of labels plus the squared distance from the anchor over old classes.
    """
    import onnx.parser

    def make(name: str = "artifact", **entries: Any) -> Path:
        inputs, outputs = _specs()
        state = {"w": np.array([1, 2, 3], np.float32), "anchor": np.zeros(3, np.float32), "v": np.zeros(3, np.float32)}
        content = manifest.build(
            inputs=inputs, outputs=outputs, predict_inputs=[s for s in inputs if s.name in ("x", "mask", "w")],
            predict_outputs=outputs[1:2], state=state, roles={"anchor": "method", "v": "optimizer"},
            **{
                "method": "anchored", "model": "sum", "opset": 18, "batch_size": 2, "copies": COPIES,
                "hyperparameters": {"lr": 1.0}, "guards": {"collapse_window": 0}, **entries,
            },
        )  # fmt: skip
        graphs = {"adapt.onnx": GRAPH, "predict.onnx": PREDICT}
        made = {name: onnx.parser.parse_model(text).SerializeToString() for name, text in graphs.items()}
        return artifact.write(tmp_path / name, content, made, state).folder

    return make


def labels(*values: int) -> np.ndarray:
    return np.array(values)


def test_classes_grow_old_and_the_anchor_follows(anchored: Linear) -> None:
    session = Session(anchored(), threads=1)
    first = session.step(X, labels(0, 1))
    assert first["loss"] == 1.0  # nothing is old yet
    assert first["logits"].tolist() == [[1, 2, 0], [1, 2, 0]]
    moved = session.state()
    assert moved["w"].tolist() == [2, 3, 4] and moved["anchor"].tolist() == [0, 0, 0]
    session.finish_experience()
    assert session.state()["anchor"].tolist() == [2, 3, 4]
    assert session.learned.old.tolist() == [True, True, False]
    assert session.step(X, labels(2, 2))["loss"] == 4.0  # the anchor is where the weights are
    assert session.state()["w"].tolist() == [4, 5, 6]  # v went on: it is not reset
    # Two old classes are each 2 away from the anchor; class 2 is open but not old.
    assert session.step(X, labels(0, 0))["loss"] == 8.0
    assert session.learned.opened.all() and session.learned.old.sum() == 2


def test_the_optimizer_starts_afresh_where_the_manifest_says_so(anchored: Linear) -> None:
    session = Session(anchored(resets=["v"]), threads=1)
    for _ in range(3):
        session.step(X, labels(0, 1))
    assert session.state()["v"].tolist() == [3, 3, 3]
    session.finish_experience()
    assert session.state()["v"].tolist() == [0, 0, 0]
    session.step(X, labels(0, 1))
    assert session.state()["w"].tolist() == [1 + 6 + 1, 2 + 6 + 1, 3 + 6 + 1]


def test_an_experience_ends_on_disk_only_when_it_is_saved(anchored: Linear) -> None:
    folder = anchored()
    session = Session(folder, threads=1)
    session.step(X, labels(0, 1))
    session.save()
    session.finish_experience()
    before = Session(folder, threads=1)
    assert not before.learned.old.any() and before.state()["anchor"].tolist() == [0, 0, 0]
    session.save()
    after = Session(folder, threads=1)
    assert after.learned.old.tolist() == [True, True, False] and after.state()["anchor"].tolist() == [2, 3, 4]
    assert after.step(X, labels(0, 0))["loss"] == session.step(X, labels(0, 0))["loss"]
    after.reset()
    assert not after.learned.old.any() and after.state()["anchor"].tolist() == [0, 0, 0]
    assert after.rollback() == "state-000002.safetensors" and after.state()["anchor"].tolist() == [2, 3, 4]


def test_an_artifact_can_start_in_the_middle_of_a_stream(anchored: Linear) -> None:
    session = Session(anchored(open_classes=[0, 1], old_classes=[1]), threads=1)
    assert session.step(X, labels(0, 0))["loss"] == 4.0  # class 1 alone is old: w - anchor is 2 there
    assert session.learned.opened.tolist() == [True, True, False]


def test_a_snapshot_keeps_the_anchor_and_the_shipped_state_does_not(anchored: Linear) -> None:
    guards = {"collapse_window": 0, "max_drift": 9.0, "snapshot_every": 1}
    session = Session(anchored(guards=guards), threads=1)
    session.step(X, labels(0, 1))
    session.finish_experience()
    session.step(X, labels(0, 1))
    assert session.rollback("snapshot") == "snapshot"
    assert session.state()["anchor"].tolist() == [2, 3, 4]
    session.learned.weights.put_back()  # the snapshot was used: what was shipped is next
    assert session.state()["anchor"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"copies": {"anchr": "w"}}, "unknown state tensor in copies 'anchr'; did you mean 'anchor'?"),
        ({"copies": {"anchor": "ww"}}, "unknown state tensor in copies 'ww'"),
        ({"copies": {"anchor": "w", "w": "v"}}, "copies: 'w' is both copied and replaced"),
        ({"copies": ["anchor"]}, "copies: expected dict"),
        ({"resets": ["vv"]}, "unknown state tensor in resets 'vv'"),
        ({"resets": ["anchor"]}, "resets: 'anchor' stands in copies, too"),
        ({"old_classes": [3]}, "old_classes: expected whole numbers from 0 to 2, got 3"),
    ],
)
def test_entries_that_do_not_hold(change: dict[str, Any], message: str, anchored: Linear) -> None:
    with pytest.raises(ContlearnError, match=re.escape(message)):
        anchored(**change)


def test_a_mask_and_a_copy_of_another_shape(linear: Linear, tmp_path: Path) -> None:
    def mistake(content: dict[str, Any]) -> None:
        content["copies"] = {"w": "b"}

    with pytest.raises(ContlearnError, match="copies: 'w' and 'b' differ in shape or dtype"):
        linear(change=mistake)

    def mask(content: dict[str, Any]) -> None:
        next(s for s in content["inputs"] if s["name"] == "lr")["meaning"] = "old_class_mask"

    with pytest.raises(ContlearnError, match=re.escape("input 'lr': expected the shape [3], got [1]")):
        linear("other", change=mask)


# --- the replay memory ------------------------------------------------------------------------------------------------

MEMORY: dict[str, Any] = {"capacity": 6, "policy": "balanced", "dtype": "float32", "shape": [6]}


def test_frames_of_several_epochs_are_remembered_once(linear: Linear) -> None:
    session = Session(linear(memory=MEMORY), threads=1)
    x, y = np.arange(24, dtype=np.float32).reshape(4, 6), labels(0, 1, 2, 0)
    for _ in range(3):
        session.step(x, y, remember=False)
    replay = session.learned.replay
    assert replay is not None and replay.size == 0
    session.remember(x[:3], y[:3])  # any number of rows
    assert replay.size == 3 and np.array_equal(replay.frames[:3], x[:3]) and replay.labels[:3].tolist() == [0, 1, 2]


def test_what_cannot_be_remembered(linear: Linear) -> None:
    plain, keeps = Session(linear(), threads=1), Session(linear("other", memory=MEMORY), threads=1)
    with pytest.raises(RunnerError, match="remember: 'naive' keeps no replay memory"):
        plain.remember(np.zeros((1, 6), np.float32), labels(0))
    for x, y, message in (
        (np.full((1, 6), np.nan, np.float32), labels(0), "row 0 holds NaN"),
        (np.zeros((2, 6), np.float32), labels(0), r"shape \(2,\)"),
        (np.zeros((1, 6), np.float32), labels(3), "3 is outside the head"),
        (np.zeros((1, 6), np.float32), None, "learns from labels"),
    ):
        with pytest.raises(RunnerError, match=message):
            keeps.remember(x, y)
    assert keeps.learned.replay is not None and keeps.learned.replay.seen == 0


def exemplars(rows: int = 2, **changes: Any) -> dict[str, np.ndarray]:
    return {
        "frames": np.arange(rows * 6, dtype=np.float32).reshape(rows, 6), "labels": np.arange(rows, dtype=np.int32) % 3,
        "seen": np.array([9], np.int64), "seen_of": np.array([5, 4, 0], np.int64), "full": np.ones(3, bool),
        "order": np.empty(0, np.int64), **changes,
    }  # fmt: skip


def with_exemplars(folder: Path, target: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The same artifact, shipped with a memory."""
    content = json.loads((folder / "manifest.json").read_text())
    content["memory"]["file"] = "memory.safetensors"
    graphs: dict[str, bytes | Path] = {path.name: path for path in folder.glob("*.onnx")}
    graphs["memory.safetensors"] = b"".join(bytes(piece) for piece in encode_tensors(tensors))
    state = {name: np.array(array) for name, array in artifact.read(folder).state().items()}
    return artifact.write(target, content, graphs, state).folder


def test_exemplars_that_were_shipped_are_rehearsed(linear: Linear, tmp_path: Path) -> None:
    folder = with_exemplars(linear(memory=MEMORY), tmp_path / "shipped", exemplars())
    session = Session(folder, threads=1)
    replay = session.learned.replay
    assert replay is not None and (replay.size, replay.seen) == (2, 9)
    session.step(np.ones((4, 6), np.float32), labels(0, 0, 1, 1))
    assert replay.size == 6
    session.reset()
    assert (replay.size, replay.seen) == (2, 9) and np.array_equal(replay.frames[:2], exemplars()["frames"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (exemplars(7), "the replay memory does not fit"),
        (exemplars(order=np.array([2], np.int64)), "the replay memory does not fit"),
        (exemplars(labels=np.array([0, 3], np.int32)), "the replay memory does not fit"),
        (exemplars(frames=np.zeros((2, 5), np.float32)), "memory/frames has another shape or dtype"),
        ({"frames": np.zeros((1, 6), np.float32)}, "memory: expected frames, labels, seen, seen_of, full, order, got"),
    ],
)
def test_exemplars_that_do_not_fit(
    tensors: dict[str, np.ndarray], message: str, linear: Linear, tmp_path: Path
) -> None:
    folder = with_exemplars(linear(memory=MEMORY), tmp_path / "shipped", tensors)
    with pytest.raises(RunnerError, match=message):
        Session(folder, threads=1)


def test_a_memory_file_must_be_there(linear: Linear) -> None:
    with pytest.raises(ContlearnError, match=r"memory.file: 'gone.safetensors' is not among files"):
        linear(memory={**MEMORY, "file": "gone.safetensors"})


def test_the_program_finishes_an_experience(anchored: Linear, tmp_path: Path) -> None:
    from contlearn.edge.runner import program

    folder = anchored()
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", labels(0, 1))
    given = ["--artifact", str(folder), "--frames", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
    assert program.main([*given, "--threads", "1", "--finish"]) == 0
    assert Session(folder, threads=1).learned.old.tolist() == [True, True, False]
