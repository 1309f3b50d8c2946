"""Where a run writes, what it never touches, and what it says when something cannot be stored."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from avalanche.core import SupervisedPlugin

from contlearn.errors import ContlearnError
from contlearn.running import RunInterrupted

Train = Callable[..., Any]


def test_an_earlier_run_is_kept_aside(train: Train, tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"  # characters that mean something to glob
    marks = []
    for seed in (0, 1, 2):
        train(out=folder, seed=seed)
        marks.append((folder / "model.safetensors").read_bytes())
    kept = [folder.with_name("run[1].1"), folder.with_name("run[1].2"), folder]
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert [(path / "model.safetensors").read_bytes() for path in kept] == marks
    assert [yaml.safe_load((path / "config.yaml").read_text())["seed"] for path in kept] == [0, 1, 2]


def test_numbers_that_are_taken_are_not_used_again(train: Train, tmp_path: Path) -> None:
    train(out=tmp_path / "run")
    (tmp_path / "run.7").write_text("mine")
    (tmp_path / "run.old").mkdir()
    train(out=tmp_path / "run")
    assert (tmp_path / "run.8" / "results.json").exists()
    assert (tmp_path / "run.7").read_text() == "mine"


@pytest.mark.parametrize("content", [{"data.csv": "1"}, {"config.yaml": "seed: 1", "photo.jpg": "x"}, {"sub/x": "1"}])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_no_run_is_refused_and_untouched(
    content: dict[str, str], resume: bool, train: Train, tmp_path: Path
) -> None:
    for name, text in content.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    with pytest.raises(ContlearnError, match=r"mine"):
        train(out=tmp_path / "mine", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    left = {str(p.relative_to(tmp_path / "mine")): p.read_text() for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    assert left == content


def test_an_empty_folder_and_what_a_killed_process_leaves_are_used(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tmp-0123456789abcdef").write_text("half a file")
    assert train(out=tmp_path / "run").folder == tmp_path / "run"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_folder_we_stand_in_can_be_the_run_folder(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first = train(out=Path("."))
    second = train(out=Path("."), seed=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "here.1"]
    assert (first.folder, second.folder) == (tmp_path / "here", tmp_path / "here")
    assert json.loads((tmp_path / "here" / "results.json").read_text())["seed"] == 1
    assert json.loads((tmp_path / "here.1" / "results.json").read_text())["seed"] == 0


@pytest.mark.parametrize("place", ["file", "file/run", "x" * 300])
def test_a_place_that_cannot_be_written_is_named(place: str, train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ContlearnError) as refused:
        train(out=tmp_path / place)
    assert str(tmp_path / place) in str(refused.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_folder_nothing_is_written(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written, silent = train(out=tmp_path / "run"), train()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert silent.folder is None
    assert silent.accuracy_matrix == written.accuracy_matrix
    assert silent.metrics == written.metrics


# ---------------------------------------------------------------------- loggers


def test_loggers_write_beside_the_run_and_a_resumed_run_keeps_what_is_there(train: Train, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted):
        train(out=tmp_path / "run", loggers=["csv", "tensorboard"], at=50)
    before = (tmp_path / "run" / "csv" / "eval_results.csv").read_bytes()
    train(out=tmp_path / "run", loggers=["csv", "tensorboard"], resume=True)
    train(out=tmp_path / "whole", loggers=[])
    assert (tmp_path / "run" / "csv" / "eval_results.csv").read_bytes() == before
    rows = [list(csv.DictReader((tmp_path / "run" / name / "eval_results.csv").open())) for name in ("csv", "csv.1")]
    assert [{row["training_exp"] for row in part} for part in rows] == [{"0"}, {"1", "2"}]
    found = json.loads((tmp_path / "run" / "results.json").read_text())["accuracy_matrix"]
    assert [float(row["eval_accuracy"]) for row in rows[1] if row["training_exp"] == "2"] == pytest.approx(
        found[2], abs=1e-4
    )
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    # Logs change no bit of the run.
    left, right = (tmp_path / name / "model.safetensors" for name in ("run", "whole"))
    assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("loggers", [["wandb"], "csv", ["csv", "cvs"]])
def test_an_unknown_logger_is_refused_before_anything_is_made(loggers: Any, train: Train, tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match="loggers: expected a list of tensorboard and csv"):
        train(out=tmp_path / "run", loggers=loggers)
    assert list(tmp_path.iterdir()) == []


def test_loggers_need_a_folder(train: Train) -> None:
    with pytest.raises(ContlearnError, match="give out as well"):
        train(loggers=["csv"])


# ---------------------------------------------------------------------- what cannot be stored


class Holding(SupervisedPlugin):  # type: ignore[type-arg]
    """A user's plug-in with something no checkpoint can hold."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = {"deep": [held]}


@pytest.mark.parametrize("held", [object(), {1, b"x"}, torch.eye(2).to_sparse()], ids=["object", "bytes", "sparse"])
def test_a_run_with_something_unstorable_finishes_and_says_so(
    held: Any, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(out=tmp_path / "plain")
    result = train(out=tmp_path / "run", plugins=(Holding(held),), quiet=False)
    assert result.accuracy_matrix == plain.accuracy_matrix
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be resumed" in line]
    assert len(said) == 1
    assert re.search(r"plugins\.\d\.held\.deep\.0", said[0])
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_stopping_a_run_that_cannot_be_resumed_does_not_promise_it(train: Train, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted) as stopped:
        train(out=tmp_path / "run", plugins=(Holding(object()),), at=50)
    assert stopped.value.folder is None


def test_numpys_numbers_are_welcome_in_a_configuration(train: Train, tmp_path: Path) -> None:
    options = {"lr": np.float64(0.05), "epochs": np.int64(2), "milestones": (1, 2), "lr_schedule": "multistep"}
    train(out=tmp_path / "run", options=options, seed=np.int64(3))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["strategy"]["lr"], config["strategy"]["milestones"], config["seed"]) == (0.05, [1, 2], 3)
    train(out=tmp_path / "run", options=options, seed=np.int64(3), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
