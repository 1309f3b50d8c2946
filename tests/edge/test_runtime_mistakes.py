"""What users and files do wrong: one line each, and the state as it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from contlearn.edge.runtime import RunnerError, Session

Linear = Callable[..., Path]
X, Y = np.ones((4, 6), np.float32), np.array([0, 1, 2, 0])
RAW_MEMORY = {
    "memory": {"capacity": 5, "policy": "reservoir", "dtype": "uint8", "shape": [6]},
    "entries": {"preprocessing": {"input": "uint8"}},
}


def with_value(value: float) -> np.ndarray:
    x = X.copy()
    x[2, 3] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (with_value(np.nan), Y, "frames: row 2 holds NaN or infinite values; nothing was changed"),
        (with_value(-np.inf), Y, "frames: row 2 holds NaN or infinite values; nothing was changed"),
        (X[:3], Y, "frames: expected the shape (4, 6), got (3, 6)"),
        (X[:, :5], Y, "frames: expected the shape (4, 6), got (4, 5)"),
        (X[0], Y, "frames: expected the shape (4, 6), got (6,)"),
        (X.astype(np.float64), Y, "frames: expected dtype float32, got float64"),
        (X.astype(np.uint8), Y, "frames: expected dtype float32, got uint8"),
        ("frames", Y, "frames: expected dtype float32, got <U6"),
        (None, Y, "frames: expected dtype float32, got object"),
        (X, None, "labels: 'replay' learns from labels; expected y of shape (4,)"),
        (X, Y[:2], "labels: expected whole numbers of shape (4,), got int64 (2,)"),
        (X, Y.astype(np.float32), "labels: expected whole numbers of shape (4,), got float32 (4,)"),
        (X, np.array([0, 1, 3, 0]), "labels: 3 is outside the head; expected 0 to 2"),
        (X, np.array([0, 1, -1, 0]), "labels: -1 is outside the head; expected 0 to 2"),
    ],
)
def test_a_bad_batch_changes_nothing(x: Any, y: Any, message: str, linear: Linear) -> None:
    memory = {"capacity": 5, "policy": "balanced", "dtype": "float32", "shape": [6]}
    session = Session(linear(memory=memory, mask=True, uniform=True), threads=1)
    session.step(X, np.array([0, 0, 1, 0]))
    before, record = {n: a.copy() for n, a in session.learned.tensors().items()}, session.learned.record()
    with pytest.raises(RunnerError, match=f"^{re.escape(message)}$"):
        session.step(x, y)
    assert session.learned.record() == record
    assert all(np.array_equal(before[name], array) for name, array in session.learned.tensors().items())


def test_a_failure_of_the_runtime_changes_nothing(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(linear(uniform=True), threads=1)
    session.step(X, Y)
    before, record = session.state(), session.learned.record()

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(session._adapt, "_run_bound", failing)
    monkeypatch.setattr(session._adapt, "sessions", [type("Broken", (), {"run": failing})()])
    with pytest.raises(RunnerError, match=r"^onnxruntime failed in adapt\.onnx: out of memory$"):
        session.step(X, Y)
    assert session.learned.record() == record
    assert all(np.array_equal(before[name], array) for name, array in session.state().items())


def test_labels_for_a_method_without(linear: Linear) -> None:
    session = Session(linear(labelled=False), threads=1)
    with pytest.raises(RunnerError, match="labels: 'naive' adapts without labels; expected none"):
        session.step(X, Y)


def test_prepared_frames_for_a_memory_of_raw_ones(linear: Linear) -> None:
    session = Session(linear(**RAW_MEMORY), threads=1)
    with pytest.raises(RunnerError, match="the replay memory keeps raw frames"):
        session.step(X, Y)
    assert session.predict(X).shape == (4, 3)


def test_frames_of_another_kind_than_said(linear: Linear) -> None:
    session = Session(linear(**RAW_MEMORY), threads=1)
    with pytest.raises(RunnerError, match="frames: expected dtype float32 or uint8, got int64"):
        session.predict(X.astype(np.int64))
    with pytest.raises(RunnerError, match="frames: expected dtype float32, got uint8"):
        session.predict(X.astype(np.uint8), prepared=True)
    with pytest.raises(RunnerError, match=re.escape("frames: expected the shape (rows, 6), got (4, 7)")):
        session.predict(np.zeros((4, 7), np.uint8))


@pytest.mark.parametrize("value", [float("nan"), -0.1, float("inf"), "0.1", True, None])
def test_learning_rate(value: Any, linear: Linear) -> None:
    session = Session(linear(), threads=1)
    with pytest.raises(RunnerError, match="lr: expected a finite number from 0, got"):
        session.lr = value
    assert session.lr == 0.1


def test_rollback_mistakes(linear: Linear) -> None:
    session = Session(linear(), threads=1)
    with pytest.raises(RunnerError, match="unknown state to go back to 'save'; did you mean 'saved'"):
        session.rollback("save")
    with pytest.raises(RunnerError, match="the guards have no snapshot yet"):
        session.rollback("snapshot")


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"providers": "cud"}, "unknown execution provider 'cud'; did you mean 'cuda'?"),
        ({"providers": ["qnn", "cpu"]}, "has no QNNExecutionProvider; it has "),
        ({"threads": 0}, "threads: expected a whole number from 1, got 0"),
        ({"seed": -1}, "seed: expected a whole number from 0, got -1"),
        ({"memory_options": {"enable_mem_patern": True}}, "did you mean 'enable_mem_pattern'?"),
        ({"memory_options": {"enable_cpu_mem_arena": 1}}, "memory_options.enable_cpu_mem_arena: expected bool, got 1"),
        ({"memory_options": {"graph_optimization_level": "most"}}, "unknown memory_options.graph_optimization_level"),
    ],
)
def test_options(options: Any, message: str, linear: Linear) -> None:
    with pytest.raises(RunnerError, match=re.escape(message)) as error:
        Session(linear(), **options)
    if "QNN" in message:
        assert all(name in str(error.value) for name in onnxruntime.get_available_providers())


@pytest.mark.parametrize(
    "options",
    [
        {"providers": "CPUExecutionProvider"},
        {"providers": [("cpu", {})]},
        {"memory_options": {"enable_cpu_mem_arena": True, "malloc_mmap_threshold": 1 << 17}},
        {"memory_options": {"graph_optimization_level": "disabled", "enable_mem_pattern": False}},
        {"memory_options": {"config": {"session.intra_op.allow_spinning": "0"}}},
    ],
)
def test_options_do_not_change_the_step(options: Any, linear: Linear) -> None:
    folder = linear()
    plain, other = Session(folder, threads=1), Session(folder, threads=1, **options)
    assert other.step(X, Y)["loss"] == pytest.approx(plain.step(X, Y)["loss"], abs=1e-6)
    for name, array in plain.state().items():
        np.testing.assert_allclose(other.state()[name], array, atol=1e-6)


# --- artifacts --------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["adapt.onnx", "predict.onnx", "state.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "altered"])
def test_a_file_that_is_not_as_it_was(name: str, how: str, linear: Linear) -> None:
    folder = linear()
    data = bytearray((folder / name).read_bytes())
    if how == "missing":
        (folder / name).unlink()
    elif how == "cut":
        (folder / name).write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    expected = {"missing": "the artifact is incomplete", "cut": f"has {len(data) - 1} bytes, expected {len(data)}"}
    with pytest.raises(RunnerError, match=expected.get(how, "was altered")) as error:
        Session(folder)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_the_guide_and_the_runner_may_be_edited(linear: Linear) -> None:
    folder = linear()
    (folder / "README.md").write_text("mine")
    (folder / "runner.py").unlink()
    Session(folder).step(X, Y)


def spec(content: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in content["inputs"] + content["outputs"] if s["name"] == name)
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "schema 2 is newer than this runner (1); use the artifact's own runner.py"),
        (lambda m: m.update(schema=0), "schema: expected 1, got 0"),
        (lambda m: m.pop("schema"), "schema is missing"),
        (lambda m: m.pop("method"), "method is missing"),
        (lambda m: m.update(method=3), "method: expected str, got 3"),
        (lambda m: m.update(batch_size=8), "'x': expected batch_size (8) rows, got the shape [4, 6]"),
        (lambda m: m.update(batch_size=0), "batch_size: expected at least 1, got 0"),
        (lambda m: m.update(target="coreml"), "target 'coreml' runs elsewhere; expected 'onnxruntime'"),
        (
            lambda m: spec(m, "x").update(meaning="frame"),
            "unknown meaning of input 'x' 'frame'; did you mean 'frames'?",
        ),
        (lambda m: spec(m, "x").update(meaning="labels"), "expected one with the meaning 'frames', got 0"),
        (lambda m: spec(m, "x").update(dtype="float31"), "unknown dtype of input 'x' 'float31'; did you mean"),
        (lambda m: spec(m, "x").update(shape=[4, -1]), "input 'x'.shape: expected whole numbers, got [4, -1]"),
        (
            lambda m: spec(m, "w").update(shape=[6, 4]),
            "input 'w': state.tensors holds none of that name, shape and dtype",
        ),
        (
            lambda m: spec(m, "new_w").update(of="z"),
            "output 'new_w': state.tensors holds no 'z' of that shape and dtype",
        ),
        (lambda m: spec(m, "new_w").update(of="v"), "outputs: two of them replace the same state"),
        (lambda m: spec(m, "new_w").pop("of"), "output 'new_w'.of is missing"),
        (lambda m: m["inputs"].append(spec(m, "x")), "input 'x' stands twice"),
        (lambda m: m["outputs"].remove(spec(m, "loss")), "expected one with the meaning 'loss', got 0"),
        (lambda m: m.update(memory={}), "memory"),
        (
            lambda m: m.update(guards={"colapse_window": 3}),
            "unknown guard 'colapse_window'; did you mean 'collapse_window'?",
        ),
        (lambda m: m.update(guards={"collapse_share": 0.4}), "guards.collapse_share: expected more than 0.5, got 0.4"),
        (
            lambda m: m.update(preprocessing={"input": "int8"}),
            "unknown preprocessing.input 'int8'; did you mean 'uint8'?",
        ),
        (
            lambda m: m.update(preprocessing={"std": [0]}),
            "preprocessing.std: expected 1 or 6 finite numbers, std without 0",
        ),
        (lambda m: m.update(preprocessing={"mean": [1, 2]}), "preprocessing.mean: expected 1 or 6 finite numbers"),
        (
            lambda m: m.update(preprocessing={"layout": "NHWC"}),
            "preprocessing.layout: expected NCHW, or NHWC for frames of",
        ),
        (lambda m: m.update(hyperparameters={}), "hyperparameters.lr is missing"),
        (lambda m: m.update(classes=["a"]), "classes: expected 3 names, one per logit, got 1"),
        (lambda m: m.update(open_classes=[3]), "open_classes: expected whole numbers from 0 to 2, got 3"),
        (lambda m: m["graphs"].update(adapt=[]), "graphs.adapt: None is not among files"),
        (lambda m: m["graphs"].update(adapt=["other.onnx"]), "graphs.adapt: 'other.onnx' is not among files"),
        (
            lambda m: m["files"].update({"../x": {"sha256": "0" * 64, "bytes": 0}}),
            "'../x' is no file inside the artifact",
        ),
        (lambda m: m["files"].update({"/x": {"sha256": "0" * 64, "bytes": 0}}), "'/x' is no file inside the artifact"),
        (
            lambda m: m["files"]["adapt.onnx"].update(sha256="no"),
            "files.adapt.onnx.sha256: expected 64 hexadecimal digits",
        ),
        (lambda m: m["state"].update(file="no"), "state.file: 'no' is not among files"),
        (lambda m: m["state"]["tensors"].pop("w"), "input 'w': state.tensors holds none"),
        (
            lambda m: m["state"]["tensors"]["w"].update(role="wait"),
            "role of state tensor 'w' 'wait'; did you mean 'weight'?",
        ),
        (lambda m: m.update(session_options={"arena": 1}), "unknown entry of session_options 'arena'"),
    ],
)
def test_a_foreign_manifest(change: Any, message: str, linear: Linear) -> None:
    folder = linear()
    edit(folder, change)
    with pytest.raises(RunnerError, match=re.escape(message)) as error:
        Session(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 1, "schema": 1}', "[" * 100_000, '{"a": "\\ud800"}']
)
def test_a_manifest_that_is_none(text: str, linear: Linear) -> None:
    folder = linear()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(RunnerError, match=r"manifest\.json"):
        Session(folder)


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="expected an artifact folder"):
        Session(tmp_path)


def replace(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit(folder, lambda content: content["files"].update({name: entry}))


def test_a_graph_that_is_none(linear: Linear) -> None:
    folder = linear()
    replace(folder, "adapt.onnx", b"no graph")
    with pytest.raises(RunnerError, match=r"cannot load .*adapt\.onnx"):
        Session(folder)


def test_an_opset_that_is_too_new(linear: Linear) -> None:
    version = re.escape(onnxruntime.__version__)
    folder = linear()
    import onnx

    model = onnx.load(folder / "adapt.onnx")
    for field, value in (("opset", 99), ("ir", 99)):
        newer = onnx.ModelProto()
        newer.CopyFrom(model)
        if field == "opset":
            newer.opset_import[0].version = value
        else:
            newer.ir_version = value
        replace(folder, "adapt.onnx", newer.SerializeToString())
        edit(folder, lambda content: content.update(opset=99))
        with pytest.raises(
            RunnerError, match=rf"^onnxruntime {version} is too old for adapt\.onnx \(opset 99\); expected a"
        ):
            Session(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["outputs"].append({**spec(m, "loss"), "name": "extra", "meaning": "metric"}), "no output 'extra'"),
        (lambda m: m["inputs"].remove(spec(m, "lr")), "input 'lr' is neither in the manifest nor made before"),
        (lambda m: spec(m, "loss").update(shape=[]), "output 'loss' is float32 [1], the manifest says float32 []"),
        (lambda m: spec(m, "y").update(dtype="int32"), "input 'y' is int64 [4], the manifest says int32 [4]"),
    ],
)
def test_a_manifest_for_another_graph(change: Any, message: str, linear: Linear) -> None:
    folder = linear()
    edit(folder, change)
    with pytest.raises(RunnerError, match=re.escape(message)):
        Session(folder)


def test_a_state_for_another_manifest(linear: Linear) -> None:
    folder, other = linear(), linear("other", seed=1)
    replace(folder, "state.safetensors", (other / "state.safetensors").read_bytes())
    Session(folder)  # same names and shapes: a state like any other
    data = (folder / "state.safetensors").read_bytes().replace(b'"v"', b'"u"')
    replace(folder, "state.safetensors", data)
    with pytest.raises(RunnerError, match="tensor 'v' is missing"):
        Session(folder)
