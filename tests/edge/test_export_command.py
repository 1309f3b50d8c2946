"""``contlearn export``: from a configuration, and from what a run left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from contlearn import cli, models, run, scenarios, strategies
from contlearn.edge import artifact
from contlearn.edge.from_run import preprocessing_of, ready
from contlearn.edge.runtime import Session
from contlearn.errors import ContlearnError

FILE = """\
scenario: {name: class_incremental, dataset: digits, n_experiences: 5}
model: {name: mlp, hidden: 8, dropout: 0.0}
strategy: {name: naive, epochs: 1, batch_size: 16, device: cpu}
"""
METHOD: dict[str, Any] = {
    "lr": 0.02, "momentum": 0.9, "batch_size": 8, "epochs": 1, "l2": 0.05, "reset_optimizer": False, "device": "cpu",
    "plugins": [{"name": "replay", "memory_size": 30}],
}  # fmt: skip
Refused = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with one good configuration file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(FILE)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(arguments, *said)``: exit code 2, one line that says these things, nothing written."""

    def check(arguments: list[str], *said: str) -> None:
        before = sorted(here.rglob("*"))
        assert cli.main(["export", *arguments, "--quiet"]) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1, output.err
        assert output.err.startswith("contlearn: error: ")
        for text in said:
            assert text in output.err, output.err
        assert sorted(here.rglob("*")) == before

    return check


def test_a_configuration_is_exported_untrained(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "good.yaml", "--out", "a", "--batch-size", "4", "--classes", "12"]) == 0
    output = capsys.readouterr()
    assert "verified: rules, one_step, many_steps" in output.out and "stage 6/6 write" in output.err
    manifest = artifact.read("a").manifest
    assert (manifest["method"], manifest["model"], manifest["batch_size"]) == ("naive", "mlp", 4)
    assert manifest["classes"] == [*map(str, range(10)), "class 10", "class 11"]
    assert manifest["open_classes"] == manifest["old_classes"] == []
    assert manifest["preprocessing"] == {
        "scale": 1 / 16, "layout": "NCHW", "input": "uint8", "mean": [], "std": []
    }  # fmt: skip
    assert manifest["peak_measured"] is None or manifest["peak_measured"] > manifest["peak_static"] > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of distillation, L2, momentum and exemplars over two of five experiences' worth, and its artifact."""
    place = tmp_path_factory.mktemp("run")
    (place / "run.yaml").write_text(
        "scenario: {name: class_incremental, dataset: digits, n_experiences: 2, initial_classes: 6}\n"
        "model: {name: mlp, hidden: 8, dropout: 0.0}\n"
        "strategy: {name: rehearsal_free, lr: 0.02, momentum: 0.9, batch_size: 8, epochs: 1, l2: 0.05, device: cpu,\n"
        "  reset_optimizer: false, plugins: [{name: replay, memory_size: 30}]}\n"
    )
    assert cli.main(["run", str(place / "run.yaml"), "--out", str(place / "run"), "--quiet"]) == 0
    assert cli.main(["export", str(place / "run"), "--out", str(place / "artifact"), "--no-verify", "--quiet"]) == 0
    return place / "run", place / "artifact"


def test_a_run_goes_on_where_training_left_it(trained: tuple[Path, Path]) -> None:
    folder, made = trained
    read = artifact.read(made)
    manifest, state = read.manifest, read.state()
    weights = load_file(folder / "model.safetensors")
    for name in (name for name, entry in manifest["state"]["tensors"].items() if entry["role"] == "weight"):
        np.testing.assert_array_equal(state[name], weights[name])
    # Teacher and anchor are the weights after the last experience, and the momentum is what was left.
    for target, source in manifest["copies"].items():
        np.testing.assert_array_equal(state[target], weights[source])
    slots = [state[name] for name, entry in manifest["state"]["tensors"].items() if entry["role"] == "optimizer"]
    assert len(slots) == 4 and all(np.abs(slot).max() > 0 for slot in slots)
    assert manifest["open_classes"] == manifest["old_classes"] == list(range(10))
    assert manifest["resets"] == []


def test_the_exemplars_of_a_run_are_shipped(trained: tuple[Path, Path]) -> None:
    folder, made = trained
    session = Session(made, threads=1)
    replay = session.learned.replay
    left = ready(folder)
    assert replay is not None
    buffer = _buffer(left.strategy)
    assert replay.size == len(buffer) == 30
    found = {(replay.frames[i].tobytes(), int(replay.labels[i])) for i in range(30)}
    wanted = {((x * 16).round().to(torch.uint8).numpy().tobytes(), int(y)) for x, y, *_ in buffer}
    assert found == wanted
    assert replay.seen == 1437 and replay.seen_of.sum() == 1437


def _buffer(strategy: Any) -> Any:
    return next(p.storage_policy for p in strategy.plugins if hasattr(p, "storage_policy")).buffer.eval()


def test_its_first_step_is_the_one_training_would_have_taken(trained: tuple[Path, Path]) -> None:
    folder, made = trained
    left = ready(folder)
    step = left.strategy.declare_step(batch_size=8, input_shape=(1, 8, 8), classes=10, open_classes=left.seen)
    session = Session(made, threads=1)
    raw = np.random.default_rng(0).integers(0, 17, (8, 1, 8, 8)).astype(np.uint8)
    y = np.arange(8)
    loss = session.step(raw, y, remember=False)["loss"]
    buffers = session.inputs.buffers
    given = {name: torch.from_numpy(np.array(buffers[name].array)) for name in step.inputs}
    outputs, new = step.compute(step.state, given)
    assert loss == pytest.approx(float(outputs["loss"]), rel=1e-5)
    for name, value in session.state().items():
        wanted = new.get(name, step.state[name]).detach().numpy()
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_configuration_can_be_changed_on_the_way(here: Path) -> None:
    made = ready("good.yaml", ["--strategy.lr=0.5", "--model.hidden=4"])
    assert made.strategy.optimizer.param_groups[0]["lr"] == 0.5 and made.seen == []
    assert made.stream.n_classes == 10 and not made.adapts


def test_preprocessing_is_what_the_stream_does() -> None:
    plain = scenarios.class_incremental("digits", n_experiences=2)
    assert preprocessing_of(plain) == {"scale": 1 / 16, "layout": "NCHW", "input": "uint8", "mean": [], "std": []}
    spoilt = scenarios.corruptions("digits", corruptions=["fog"], severity=1)
    assert preprocessing_of(spoilt) == preprocessing_of(plain)


def test_an_unfinished_run(here: Path, refused: Refused) -> None:
    stream = scenarios.class_incremental("digits", n_experiences=2)
    strategy = strategies.create("naive", models.create("mlp", stream, hidden=4, dropout=0.0), epochs=1, device="cpu")
    run(strategy, stream, out=here / "r", quiet=True)
    for path in (here / "r" / "checkpoint").iterdir():
        path.unlink()
    with pytest.raises(ContlearnError, match="expected a run with a finished experience, found none stored"):
        ready(here / "r")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["good.yaml"], ["export: the following arguments are required: --out"]),
        (["good.yaml", "--out", "a", "--target", "coreml"], ["target: coreml is not available yet"]),
        (["good.yaml", "--out", "a", "--target", "corml"], ["unknown target 'corml'; did you mean 'coreml'?"]),
        (["god.yaml", "--out", "a"], ["no such file", "did you mean 'good.yaml'?"]),
        ([".", "--out", "a"], ["expected a configuration file or a run folder, found no config.yaml"]),
        (["good.yaml", "--out", "good.yaml"], ["out: 'good.yaml' exists; expected a new folder"]),
        (["good.yaml", "--out", "no/a"], ["no' does not exist"]),
        (["good.yaml", "--out", "a", "--budget", "lots"], ["--budget: expected bytes such as"]),
        (["good.yaml", "--out", "a", "--batch-size", "0"], ["--batch-size", "expected a whole number from 1"]),
        (["good.yaml", "--out", "a", "--profile", "onnx"], ["unknown target profile 'onnx'"]),
        (["good.yaml", "--out", "a", "--strategy.lrr=1"], ["unknown key 'strategy.lrr'; did you mean 'strategy.lr'?"]),
        (["good.yaml", "--out", "a", "--strategy.name=agem"], ["AGEMPlugin: "]),
        (["good.yaml", "--out", "a", "--strategy.name=replay", "--strategy.policy=herding"], ["HerdingBuffer cannot"]),
        (["good.yaml", "--out", "a", "--classes", "3", "--model.head=fixed"], ["classes: the model's head has 10"]),
        (
            ["good.yaml", "--out", "a", "--scenario.name=task_incremental"],
            ["a head per task needs task labels on the device"],
        ),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments: list[str], said: list[str], refused: Refused) -> None:
    refused(arguments, *said)


def test_an_adapter_goes_from_its_configuration_to_frames(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tta.yaml").write_text(
        "scenario: {name: corruptions, dataset: digits, corruptions: [fog], samples: 64}\n"
        "model: {name: resnet14}\n"
        "strategy: {name: bn_stats, batch_size: 16, source_epochs: 1, source_lr: 0.05, device: cpu}\n"
    )
    assert cli.main(["export", "tta.yaml", "--out", "a"]) == 0
    assert "verified: rules, one_step, many_steps" in capsys.readouterr().out
    manifest = artifact.read("a").manifest
    assert manifest["method"] == "bn_stats" and {one["meaning"] for one in manifest["inputs"]} == {"frames"}
    assert cli.main(["adapt", "a", "--data", "digits", "--corruption", "gaussian_noise:3"]) == 0
    assert "error" in capsys.readouterr().out
