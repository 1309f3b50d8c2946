"""``contlearn adapt``: an artifact over a stream, as a device runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contlearn import cli, models, scenarios, strategies
from contlearn.edge import device_data
from contlearn.edge.adapt import batches, learn, watch
from contlearn.edge.device_data import DeviceData
from contlearn.edge.export import export
from contlearn.edge.from_run import preprocessing_of
from contlearn.edge.runtime import Session
from contlearn.errors import ContlearnError

Linear = Callable[..., Path]


def test_batches_carry_over_what_an_epoch_leaves() -> None:
    served = list(batches(10, 4, 3, np.random.default_rng(0)))
    assert [len(places) for places in served] == [4] * 7
    flat = np.concatenate(served)
    # Epoch by epoch each sample comes once; two of the third are left over.
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10)) and len(set(flat[20:])) == 8
    again = np.concatenate(list(batches(10, 4, 3, np.random.default_rng(0))))
    assert np.array_equal(flat, again)
    few = list(batches(3, 8, 2, np.random.default_rng(0)))
    assert len(few) == 1 and sorted(set(few[0].tolist())) == [0, 1, 2]


def separable(classes: int = 3, rows: int = 24) -> DeviceData:
    """Frames (rows, 6) whose class is the position of their large value."""
    y = np.arange(rows) % classes
    x = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32) * 0.1
    x[np.arange(rows), y] += 3
    return DeviceData(x, y, x, y, list(range(classes)))


def test_learning_with_a_memory_keeps_what_came_first(linear: Linear, tmp_path: Path) -> None:
    memory = {"capacity": 12, "policy": "balanced", "dtype": "float32", "shape": [6]}
    folder = linear(memory=memory, mask=True, entries={"guards": {"collapse_window": 0}})
    session = Session(folder, threads=1, state_dir=tmp_path / "state")
    found = learn(session, separable(), experiences=3, epochs=10)
    assert found["metrics"]["final_accuracy"] == 1.0
    assert [len(row) for row in found["accuracy_matrix"]] == [3, 3, 3]
    assert found["accuracy_matrix"][0][1:] == [None, None]
    assert session.learned.replay is not None and np.bincount(session.learned.replay.labels).tolist() == [4, 4, 4]
    # Every experience was finished and saved.
    assert Session(folder, threads=1, state_dir=tmp_path / "state").learned.old.all()


def test_steps_are_counted_over_all_experiences(linear: Linear) -> None:
    session = Session(linear(mask=True), threads=1)
    found = learn(session, separable(), experiences=3, epochs=2, steps=5)
    assert session.steps == 5 and found["losses"][-1] is None and len(found["accuracy_matrix"]) == 3


def test_without_labels_every_frame_is_answered_once(linear: Linear) -> None:
    # Each step of this artifact pulls the bias towards class 0: from the second batch on that is the answer to all.
    session = Session(linear(labelled=False, entries={"guards": {"collapse_window": 0}}), threads=1)
    data = separable(rows=26)
    wrong = session.predict(data.test_x).argmax(1) != data.test_y
    session.lr = 5.0
    found = watch(session, data)
    assert found["error_before"] == pytest.approx(wrong.mean())
    assert session.steps == 6  # the last two frames are only predicted
    order = np.random.default_rng(0).permutation(26)
    expected = np.concatenate([wrong[order[:4]], data.test_y[order[4:]] != 0])
    assert found["error"] == pytest.approx(expected.mean())


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ("fog", ("fog", 5)), ("gaussian_noise:2", ("gaussian_noise", 2))]
)
def test_corruptions_as_written(text: str | None, expected: Any) -> None:
    assert device_data.parse_corruption(text) == expected


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuning of a small network, classes in another order than the data set's."""
    stream = scenarios.class_incremental("digits", n_experiences=5, class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    model = models.create("mlp", stream, seed=0, hidden=16, dropout=0.0)
    strategy = strategies.create("naive", model, lr=0.2, batch_size=16, device="cpu")
    folder = tmp_path_factory.mktemp("adapt") / "artifact"
    return export(
        strategy, folder, input_shape=stream.input_shape, classes=10, open_classes=(), verify=False, measure=False,
        preprocessing=preprocessing_of(stream), class_names=stream.class_names,
    ).folder  # fmt: skip


def test_the_command_writes_what_it_found(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    before = sorted(path.name for path in digits.iterdir())
    arguments = ["adapt", str(digits), "--data", "digits", "--epochs", "8", "--experiences", "1", "--out", str(out)]
    assert cli.main([*arguments, "--threads", "1"]) == 0
    result = json.loads(out.read_text())
    assert result["metrics"]["final_accuracy"] > 0.85
    assert result["steps"] == 1437 * 8 // 16 and result["trips"] == {}
    assert result["seconds_per_step"] > 0 and result["account"]["state"] > 0
    assert result["peak_measured"] is None or result["peak_measured"] > 0
    assert f"{result['steps']} steps" in capsys.readouterr().out
    assert sorted(path.name for path in digits.iterdir()) == before  # nothing is kept unasked
    again = tmp_path / "again.json"
    assert cli.main([*arguments[:-1], str(again), "--threads", "1", "--quiet"]) == 0
    assert json.loads(again.read_text())["accuracy_matrix"] == result["accuracy_matrix"]


def test_labels_are_found_by_the_names_of_classes(digits: Path) -> None:
    from contlearn.edge import artifact

    manifest = artifact.read(digits).manifest
    data = device_data.load(manifest, "digits")
    plain = device_data.load({**manifest, "classes": []}, "digits")
    assert manifest["classes"][0] == "9" and data.order == list(range(9, -1, -1))
    assert np.array_equal(data.train_y, 9 - plain.train_y)
    assert data.train_x.dtype == np.uint8 and data.train_x.shape[1:] == (1, 8, 8)
    prepared = device_data.load({**manifest, "preprocessing": None}, "digits")
    np.testing.assert_allclose(prepared.train_x, data.train_x.astype(np.float32) / 16, rtol=1e-6)
    spoilt = device_data.load(manifest, "digits", corruption="gaussian_noise:3")
    assert (spoilt.test_x != data.test_x).mean() > 0.1 and np.array_equal(spoilt.test_y, data.test_y)


def test_what_is_learned_is_kept_where_asked(digits: Path, tmp_path: Path) -> None:
    base = ["adapt", str(digits), "--data", "digits", "--steps", "3", "--state", str(tmp_path / "s"), "--quiet"]
    assert cli.main(base) == 0
    assert Session(digits, threads=1, state_dir=tmp_path / "s").steps == 3
    assert cli.main(base) == 0
    assert Session(digits, threads=1, state_dir=tmp_path / "s").steps == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "digts"], ["unknown data set 'digts'", "did you mean 'digits'?"]),
        (["--data", "mnist5k"], ["--data: expected frames of shape (1, 8, 8)", "(1, 28, 28)"]),
        (["--data", "digits", "--corruption", "gausian_noise"], ["did you mean 'gaussian_noise'?"]),
        (["--data", "digits", "--corruption", "fog:7"], ["severity from 1 to 5", "'fog:7'"]),
        (["--data", "digits", "--epochs", "0"], ["--epochs", "expected a whole number from 1, got '0'"]),
        (["--data", "digits", "--experiences", "11"], ["n_experiences: 11 experiences asked for"]),
        (["--data", "digits", "--provider", "cdua"], ["unknown execution provider 'cdua'; did you mean 'cuda'?"]),
        (["--data", "digits", "--lr", "-1"], ["lr: expected a finite number from 0"]),
        (["--data", "digits", "--seed", "-1"], ["--seed: expected a whole number from 0"]),
        (["--data", "digits", "--out", "missing/r.json"], ["--out: the folder of 'missing/r.json' does not exist"]),
        (["--data", "digits", "--stpes", "3"], ["adapt: unrecognized arguments: --stpes 3"]),
        ([], ["the following arguments are required: --data"]),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: list[str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["adapt", str(digits), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("contlearn: error: ")
    for text in said:
        assert text in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["adapt", str(tmp_path), "--data", "digits"]) == 2
    assert "expected an artifact folder" in capsys.readouterr().err


def test_experiences_need_labels(linear: Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_data, "load", lambda *_, **__: separable())
    from contlearn.edge import commands

    with pytest.raises(ContlearnError, match="--experiences: 'naive' adapts without labels"):
        commands.adapt_main([str(linear(labelled=False)), "--data", "digits", "--experiences", "2", "--quiet"])
