"""Writing, reading and changing the folder that goes to a device."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from contlearn.edge import artifact, manifest
from contlearn.edge.manifest import TensorSpec
from contlearn.edge.runtime import Session, runner_source
from contlearn.errors import ContlearnError

Linear = Callable[..., Path]


def test_an_artifact_holds_what_its_manifest_says(linear: Linear) -> None:
    folder = linear(segments=2)
    read = artifact.read(folder)
    names = {path.name for path in folder.iterdir()}
    assert (
        names
        == {*read.manifest["files"], "manifest.json"}
        == {
            *(
                "adapt-0.onnx",
                "adapt-1.onnx",
                "predict.onnx",
                "state.safetensors",
                "runner.py",
                "README.md",
                "manifest.json",
            )
        }
    )
    assert [path.name for path in read.graphs("adapt")] == ["adapt-0.onnx", "adapt-1.onnx"]
    assert (folder / "runner.py").read_text() == runner_source()
    tensors = load_file(folder / "state.safetensors")
    assert tensors.keys() == read.state().keys() == read.manifest["state"]["tensors"].keys()
    assert all(np.array_equal(read.state()[name], array) for name, array in tensors.items())
    roles = {name: entry["role"] for name, entry in read.manifest["state"]["tensors"].items()}
    assert roles == {"w": "weight", "b": "weight", "v": "optimizer"}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".tmp")]


def test_the_guide_says_how_to_call_this_one(linear: Linear) -> None:
    guide = (linear() / "README.md").read_text()
    assert "session.step(frames, labels)" in guide and "--labels labels.npy" in guide and "$" not in guide
    other = (linear("other", labelled=False) / "README.md").read_text()
    assert "session.step(frames)" in other and "--labels" not in other


@pytest.mark.parametrize("name", ["README.md", "runner.py", "adapt.onnx", "state.safetensors"])
def test_reading_looks_at_every_file(name: str, linear: Linear) -> None:
    folder = linear()
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ContlearnError, match=rf"{name}' was altered"):
        artifact.read(folder)


def test_nothing_is_replaced_unasked(linear: Linear, tmp_path: Path) -> None:
    folder = linear()
    Session(folder, threads=1).save()
    before = sorted(os.walk(folder))
    with pytest.raises(ContlearnError, match="exists; expected a new folder, or overwrite"):
        linear()
    assert sorted(os.walk(folder)) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ContlearnError, match="exists; expected an artifact"):
        artifact.write(tmp_path / "mine", {}, {}, {}, overwrite=True)
    assert (tmp_path / "mine" / "notes").read_text() == "x"


def given(folder: Path) -> tuple[dict[str, Any], dict[str, bytes | Path], dict[str, np.ndarray]]:
    """What the artifact in ``folder`` was written from."""
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("files")
    graphs: dict[str, bytes | Path] = {path.name: path for path in folder.glob("*.onnx")}
    return content, graphs, {n: np.array(a) for n, a in artifact.read(folder).state().items()}


def test_overwriting_drops_what_was_learned(linear: Linear) -> None:
    folder, other = linear(), linear("other", seed=1)
    Session(folder, threads=1).save()
    artifact.write(folder, *given(other), overwrite=True)
    assert Session(folder, threads=1).opened == "state.safetensors"
    assert np.array_equal(artifact.read(folder).state()["w"], artifact.read(other).state()["w"])
    assert {path.name for path in folder.parent.iterdir()} == {"artifact", "other"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(peak_sttic=3), "unknown entry 'peak_sttic'; did you mean 'peak_static'?"),
        (lambda m: m.update(target="tflite"), "target: expected one of onnxruntime, coreml, got 'tflite'"),
        (lambda m: m.update(peak_static=1.5), "peak_static: expected bytes as a whole number, got 1.5"),
        (
            lambda m: m.update(peak_measured=5),
            "peak_measured_how: expected how peak_measured was measured, got nothing",
        ),
        (lambda m: m.update(tiers="all"), "tiers: expected names of verification tiers, got 'all'"),
        (lambda m: m["graphs"].update(adapt=["x.onnx"]), "graphs.adapt: 'x.onnx' is not among files"),
        (lambda m: m["outputs"].pop(), "optimizer state 'v' is replaced by no output"),
        (lambda m: m["inputs"].pop(), "output 'new_v': 'v' is the input of no graph"),
    ],
)
def test_a_manifest_that_does_not_hold_leaves_no_folder(
    change: Any, message: str, linear: Linear, tmp_path: Path
) -> None:
    content, graphs, state = given(linear())
    change(content)
    if "new_v" in message:
        message = "state tensor 'v' is the input of no graph; leave it out"
    with pytest.raises(ContlearnError, match=re.escape(message)):
        artifact.write(tmp_path / "new", content, graphs, state)
    assert {path.name for path in tmp_path.iterdir()} == {"artifact"}


def test_a_state_that_is_not_the_manifests(linear: Linear, tmp_path: Path) -> None:
    content, graphs, state = given(linear())
    for changed in ({**state, "extra": state["w"]}, {**state, "w": state["w"].astype(np.float16)}, {"w": state["w"]}):
        with pytest.raises(ContlearnError, match="state tensor"):
            artifact.write(tmp_path / "new", content, graphs, changed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../x.onnx", "/x.onnx"])
def test_names_stay_inside(name: str, linear: Linear, tmp_path: Path) -> None:
    content, graphs, state = given(linear())
    with pytest.raises(ContlearnError, match="is no free name inside an artifact"):
        artifact.write(tmp_path / "new", content, {**graphs, name: b""}, state)


def test_a_place_that_cannot_be_written(linear: Linear, tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match=r"the folder .*missing' does not exist"):
        artifact.write(tmp_path / "missing" / "new", *given(linear()))


def test_side_files_and_packages_are_checked_too(linear: Linear, tmp_path: Path) -> None:
    content, _, state = given(linear())
    package = tmp_path / "package"
    (package / "Data").mkdir(parents=True)
    (package / "Data" / "weights").write_bytes(b"w")
    content.update(target="coreml", graphs={"adapt": ["adapt.mlpackage"], "predict": ["adapt.mlpackage"]})
    folder = artifact.write(tmp_path / "new", content, {"adapt.mlpackage": package}, state).folder
    assert "adapt.mlpackage/Data/weights" in artifact.read(folder).manifest["files"]
    assert "`runner.py` does not run them" in (folder / "README.md").read_text()
    (folder / "adapt.mlpackage" / "Data" / "weights").write_bytes(b"v")
    with pytest.raises(ContlearnError, match="weights' was altered"):
        artifact.read(folder)


def test_figures_are_added_afterwards_and_states_stay_valid(linear: Linear) -> None:
    folder = linear()
    session = Session(folder, threads=1)
    session.step(np.ones((4, 6), np.float32), np.array([0, 1, 2, 0]))
    session.save()
    artifact.update(folder, peak_measured=1234, peak_measured_how="resident growth of one step", tiers=["one step"])
    read = artifact.read(folder)
    assert (read.manifest["peak_measured"], read.manifest["tiers"]) == (1234, ["one step"])
    assert "1234 bytes (resident growth of one step)" in (folder / "README.md").read_text()
    assert Session(folder, threads=1).steps == 1
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ContlearnError, match="cannot change 'batch_size' of an artifact"):
        artifact.update(folder, batch_size=3)
    with pytest.raises(ContlearnError, match="peak_measured: expected bytes"):
        artifact.update(folder, peak_measured=-1)
    assert (folder / "manifest.json").read_bytes() == before
    artifact.read(folder)


def test_building_a_manifest() -> None:
    frames = TensorSpec("x", [1, 2], "float32", "frames")
    arguments: dict[str, Any] = {
        "inputs": [frames],
        "outputs": [],
        "predict_inputs": [frames],
        "predict_outputs": [],
        "state": {"w": np.zeros(2, np.float32)},
        "method": "m",
        "model": "n",
        "opset": 20,
        "batch_size": 1,
    }
    built = manifest.build(**arguments)
    assert built["state"]["tensors"] == {"w": {"shape": [2], "dtype": "float32", "role": "weight"}}
    assert json.loads(json.dumps(built)) == built
    with pytest.raises(ContlearnError, match="unknown state tensor in roles 'v'"):
        manifest.build(**arguments, roles={"v": "optimizer"})
    with pytest.raises(ContlearnError, match="unknown entry 'clases'; did you mean 'classes'"):
        manifest.build(**arguments, clases=[])
    arguments.pop("opset")
    with pytest.raises(ContlearnError, match="manifest: opset is missing"):
        manifest.build(**arguments)
