"""A run that was stopped by a signal in the middle of an experience goes on from there and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contlearn import strategies
from contlearn.errors import ContlearnError

Train = Callable[..., Any]
Events = Callable[..., list[dict[str, Any]]]
SCENARIOS = ("task_incremental", "domain_incremental", "blurry")
RECORDS = ("epoch", "evaluation", "experience")


def interrupted(train: Train, *arguments: Any, **options: Any) -> Any:
    from contlearn.running import RunInterrupted

    with pytest.raises(RunInterrupted) as stopped:
        train(*arguments, **options)
    return stopped.value


def same_end(whole: Path, pieces: Path) -> None:
    for name in ("model.safetensors", "config.yaml"):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes(), name
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (whole, pieces))
    for key in ("accuracy_matrix", "accuracy_seen", "metrics", "memory", "status", "classes_per_experience"):
        assert mine[key] == theirs[key], key


def stop_and_resume(train: Train, events: Events, folder: Path, fractions: tuple[float, ...], **spec: Any) -> None:
    """Compare a whole run with one stopped inside an experience, at each of these fractions of its iterations."""
    train(out=folder / "whole", **spec)
    total = sum(record["iterations"] for record in events(folder / "whole", "epoch"))
    for fraction in fractions:
        pieces = folder / f"{fraction}"
        stopped = interrupted(train, out=pieces, at=int(fraction * total), **spec)
        assert (stopped.signum, stopped.folder) == (signal.SIGTERM, pieces)
        assert (pieces / "checkpoint" / "interrupted.json").exists()
        assert json.loads((pieces / "results.json").read_text())["status"] == "incomplete"
        train(out=pieces, resume=True, **spec)
        same_end(folder / "whole", pieces)
        # It went on, it did not start over: every epoch was finished once, with the same loss.
        assert events(pieces, *RECORDS) == events(folder / "whole", *RECORDS)
        stages = [record["event"] for record in events(pieces, "experience", "interrupted")]
        assert events(pieces, "resume") == [{"event": "resume", "experience": stages.index("interrupted")}]


@pytest.mark.parametrize("name", strategies.list(kind=("class-incremental", "plug-in")))
def test_every_strategy_resumes_inside_an_experience_bit_for_bit(
    name: str, train: Train, events: Events, tmp_path: Path
) -> None:
    other = SCENARIOS[strategies.list().index(name) % len(SCENARIOS)]
    spec: dict[str, Any] = {}
    if name == "adab2n":  # which replaces BatchNorm
        spec = {"model": {"name": "slim_resnet18", "width": 2}, "options": {"epochs": 1}}
    stop_and_resume(train, events, tmp_path / "classes", (0.6, 0.97), name=name, **spec)
    spec |= {"scenario": {"name": other, "n_experiences": 2}, "options": {"epochs": 1}}
    stop_and_resume(train, events, tmp_path / "other", (0.55,), name=name, **spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"options": {"momentum": 0.9, "lr_schedule": "cosine", "epochs": 3}},
        {"options": {"optimizer": "adam", "lr": 0.003, "weight_decay": 0.01}},
        {"options": {"optimizer": "adamw", "lr": 0.003, "lr_schedule": "multistep", "milestones": [1]}},
        {"options": {"momentum": 0.9, "reset_optimizer": True, "clip_grad_norm": 0.5, "warmup_epochs": 1}},
        {"model": {"dropout": 0.5}},
        {"scenario": {"augment": "crop_flip"}},
        {"scenario": {"augment": "cifar"}},
        {"model": {"name": "slim_resnet18", "width": 2}, "options": {"epochs": 1}},
        {"model": {"name": "simple_cnn", "head": "fixed"}},
        {"name": "lwf", "model": {"name": "slim_resnet18", "width": 2, "head": "growing"}, "options": {"epochs": 1}},
        {"name": "replay", "options": {"policy": "herding", "memory_size": 30}},
        {"name": "replay", "options": {"policy": "reservoir", "memory_size": 30}, "model": {"dropout": 0.5}},
        {"name": "replay", "options": {"policy": "experience_balanced", "memory_size": 30}},
        {"name": "ewc", "options": {"mode": "online", "decay_factor": 0.9, "momentum": 0.9}},
        {"name": "derpp", "scenario": {"augment": "flip"}, "options": {"momentum": 0.9}},
    ],
    ids=str,
)
def test_whatever_holds_state_is_stored(spec: dict[str, Any], train: Train, events: Events, tmp_path: Path) -> None:
    stop_and_resume(train, events, tmp_path, (0.45, 0.7), **spec)


def test_an_online_stream_stops_after_a_small_experience(train: Train, events: Events, tmp_path: Path) -> None:
    spec: dict[str, Any] = {
        "name": "er_ace",
        "scenario": {"name": "online", "experience_size": 60},
        "options": {"epochs": 1, "momentum": 0.9},
    }
    train(out=tmp_path / "whole", **spec)
    total = sum(record["iterations"] for record in events(tmp_path / "whole", "epoch"))
    for at in (3, total // 2, total - 2):
        pieces = tmp_path / str(at)
        interrupted(train, out=pieces, at=at, **spec)
        position = json.loads((pieces / "checkpoint" / "state.json").read_text())["experiences_done"]
        assert position > 0
        train(out=pieces, resume=True, **spec)
        same_end(tmp_path / "whole", pieces)
        assert events(pieces, "resume") == [{"event": "resume", "experience": position}]
        assert events(pieces, *RECORDS) == events(tmp_path / "whole", *RECORDS)


def test_a_run_can_be_stopped_again_and_again(train: Train, events: Events, tmp_path: Path) -> None:
    spec: dict[str, Any] = {"name": "icarl", "options": {"momentum": 0.9}}
    train(out=tmp_path / "whole", **spec)
    for stop in (0, 1, 30, 31, 50, 80):
        interrupted(train, out=tmp_path / "pieces", at=stop, resume=True, **spec)
    train(out=tmp_path / "pieces", resume=True, **spec)
    same_end(tmp_path / "whole", tmp_path / "pieces")
    assert len(events(tmp_path / "pieces", "interrupted")) == 6
    assert events(tmp_path / "pieces", *RECORDS) == events(tmp_path / "whole", *RECORDS)


def test_a_signal_during_evaluation_stops_the_run_after_it(train: Train, events: Events, tmp_path: Path) -> None:
    from avalanche.core import SupervisedPlugin

    class InEvaluation(SupervisedPlugin):  # type: ignore[type-arg]
        checkpoint_exclude = ("left",)

        def __init__(self, left: int) -> None:
            super().__init__()
            self.left = left

        def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    # Two experiences of one batch each; before training, after the first, after the second.
    spec: dict[str, Any] = {"name": "replay", "scenario": {"name": "domain_incremental", "n_experiences": 2}}
    train(out=tmp_path / "whole", plugins=(InEvaluation(0),), **spec)
    for left, rows in ((1, 0), (3, 1), (6, 2)):
        pieces = tmp_path / str(left)
        stopped = interrupted(train, out=pieces, plugins=(InEvaluation(left),), **spec)
        assert stopped.folder == pieces
        assert len(events(pieces, "experience")) == rows
        train(out=pieces, resume=True, plugins=(InEvaluation(0),), **spec)
        same_end(tmp_path / "whole", pieces)
        assert events(pieces, *RECORDS) == events(tmp_path / "whole", *RECORDS)


def test_a_run_that_skips_checkpoints_stops_where_it_can_be_resumed(
    train: Train, events: Events, tmp_path: Path
) -> None:
    spec: dict[str, Any] = {"name": "replay", "checkpoint_every": 1e9}
    train(out=tmp_path / "whole", **spec)
    assert not (tmp_path / "whole" / "checkpoint").exists()
    for at in (20, 50, 80):  # in the first, second and third experience
        pieces = tmp_path / str(at)
        assert interrupted(train, out=pieces, at=at, **spec).folder == pieces
        train(out=pieces, resume=True, **spec)
        assert len(events(pieces, "resume")) == 1
        assert events(pieces, *RECORDS) == events(tmp_path / "whole", *RECORDS)
        same_end(tmp_path / "whole", pieces)


def test_a_second_signal_stops_at_once_and_the_last_position_stays(
    train: Train, events: Events, tmp_path: Path
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    train(out=tmp_path / "whole")
    stopped = interrupted(train, out=tmp_path / "pieces", at=50, act=twice)
    assert (stopped.signum, stopped.folder) == (signal.SIGTERM, None)
    assert not (tmp_path / "pieces" / "checkpoint" / "interrupted.json").exists()
    train(out=tmp_path / "pieces", resume=True)
    same_end(tmp_path / "whole", tmp_path / "pieces")
    assert events(tmp_path / "pieces", "resume") == [{"event": "resume", "experience": 1}]


def test_without_a_folder_one_signal_stops_at_once(train: Train) -> None:
    seen: list[int] = []

    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append(1)

    stopped = interrupted(train, at=0, act=act)
    assert (stopped.signum, stopped.folder) == (signal.SIGTERM, None)
    assert seen == []


def test_signals_are_the_users_again_after_a_run(train: Train, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupted(train, out=tmp_path, at=0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_resuming_with_another_configuration_names_the_key_and_both_values(train: Train, tmp_path: Path) -> None:
    interrupted(train, out=tmp_path, at=5)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ContlearnError, match=r"strategy\.lr was 0\.05 and is now 0\.1\b"):
        train(out=tmp_path, resume=True, options={"lr": 0.1})
    with pytest.raises(ContlearnError, match=r"scenario\.n_experiences was 3 and is now 5\b"):
        train(out=tmp_path, resume=True, scenario={"n_experiences": 5})
    with pytest.raises(ContlearnError, match=r"strategy\.name was 'naive' and is now 'replay'"):
        train("replay", out=tmp_path, resume=True)
    with pytest.raises(ContlearnError, match=r"seed was 0 and is now 1\b"):
        train(out=tmp_path, resume=True, seed=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_resuming_a_finished_run_changes_nothing(train: Train, tmp_path: Path) -> None:
    whole = train(out=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = train(out=tmp_path, resume=True, at=0)  # a signal in the first iteration, if there were one
    assert again == whole
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
