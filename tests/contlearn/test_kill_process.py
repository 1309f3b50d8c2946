"""A process that dies without a word: whatever it was doing, the run resumes from its last checkpoint, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contlearn import cli

ROOT = Path(__file__).parents[2]
Train = Callable[..., Any]
Killed = Callable[[Callable[[], object]], None]
Events = Callable[..., list[dict[str, Any]]]

SPEC: dict[str, Any] = {
    "name": "replay",
    "options": {"memory_size": 30, "momentum": 0.9, "lr_schedule": "cosine"},
    "model": {"dropout": 0.5},
    "scenario": {"n_experiences": 4},
}


def same_run(whole: Path, resumed: Path) -> None:
    assert (whole / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (whole, resumed))
    assert mine["accuracy_matrix"] == theirs["accuracy_matrix"]
    assert theirs["status"] == "complete"


def one_checkpoint(run: Path) -> None:
    """No half-written file and no tensors that nothing names are left."""
    description = json.loads((run / "checkpoint" / "state.json").read_text())
    assert {path.name for path in (run / "checkpoint").iterdir()} == {"state.json", description["tensors"]["file"]}


@pytest.fixture
def whole(train: Train, tmp_path: Path) -> Path:
    train(out=tmp_path / "whole", **SPEC)
    return tmp_path / "whole"


def iterations_of(events: list[dict[str, Any]], experience: int) -> range:
    """The iterations of an experience, counted over the whole run."""
    counts = [record["iterations"] for record in events]
    return range(sum(counts[:experience]), sum(counts[: experience + 1]))


@pytest.mark.parametrize("place", ["first iteration", "middle", "last iteration"])
def test_killed_inside_the_third_experience(
    place: str, train: Train, killed: Killed, kill: Callable[[], None], events: Events, whole: Path, tmp_path: Path
) -> None:
    third = iterations_of(events(whole, "experience"), 2)
    at = {"first iteration": third[0], "middle": third[len(third) // 2], "last iteration": third[-1]}[place]
    killed(lambda: train(out=tmp_path / "run", at=at, act=kill, **SPEC))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    train(out=tmp_path / "run", resume=True, **SPEC)
    assert events(tmp_path / "run", "resume") == [{"event": "resume", "experience": 2}]
    same_run(whole, tmp_path / "run")
    one_checkpoint(tmp_path / "run")


def test_killed_while_evaluating(
    train: Train, killed: Killed, kill: Callable[[], None], events: Events, whole: Path, tmp_path: Path
) -> None:
    from avalanche.core import SupervisedPlugin

    class InEvaluation(SupervisedPlugin):  # type: ignore[type-arg]
        def __init__(self, armed: bool) -> None:
            super().__init__()
            self.armed = armed

        checkpoint_exclude = ("armed",)

        def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
            if self.armed and strategy.clock.train_exp_counter == 3:
                kill()

    killed(lambda: train(out=tmp_path / "run", plugins=(InEvaluation(True),), **SPEC))
    assert len(events(tmp_path / "run", "experience")) == 2
    train(out=tmp_path / "run", resume=True, plugins=(InEvaluation(False),), **SPEC)
    assert events(tmp_path / "run", "resume") == [{"event": "resume", "experience": 2}]
    same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("moment", "resumes_at"),
    [("before its tensors", 2), ("before its description", 2), ("before tidying up", 3)],
)
def test_killed_while_the_third_checkpoint_is_written(
    moment: str,
    resumes_at: int,
    train: Train,
    killed: Killed,
    kill: Callable[[], None],
    events: Events,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from contlearn import checkpoint

    replace, tidy, done = os.replace, checkpoint.CheckpointFolder._tidy, {"tensors": 0, "tidied": 0}

    def replacing(source: Any, target: Any) -> None:
        part = "tensors" if Path(target).suffix == ".safetensors" else "description"
        done["tensors"] += part == "tensors"
        if done["tensors"] == 3 and moment == f"before its {part}":
            kill()
        replace(source, target)

    def tidying(folder: Any) -> None:
        done["tidied"] += 1
        if done["tidied"] == 3 and moment == "before tidying up":
            kill()
        tidy(folder)

    def work() -> None:
        monkeypatch.setattr(os, "replace", replacing)
        monkeypatch.setattr(checkpoint.CheckpointFolder, "_tidy", tidying)
        train(out=tmp_path / "run", **SPEC)

    killed(work)
    left = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert len(left) > 2, left  # more than a checkpoint's two files
    train(out=tmp_path / "run", resume=True, **SPEC)
    assert events(tmp_path / "run", "resume") == [{"event": "resume", "experience": resumes_at}]
    same_run(whole, tmp_path / "run")
    one_checkpoint(tmp_path / "run")


def test_killed_before_the_first_checkpoint_starts_over(
    train: Train, killed: Killed, kill: Callable[[], None], events: Events, whole: Path, tmp_path: Path
) -> None:
    killed(lambda: train(out=tmp_path / "run", at=5, act=kill, **SPEC))
    assert not (tmp_path / "run" / "checkpoint").exists()
    train(out=tmp_path / "run", resume=True, **SPEC)
    assert events(tmp_path / "run", "resume") == []
    same_run(whole, tmp_path / "run")
    assert not (tmp_path / "run.1").exists()


def test_killed_before_the_weights_are_written(
    train: Train,
    killed: Killed,
    kill: Callable[[], None],
    events: Events,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from contlearn import session

    def work() -> None:
        monkeypatch.setattr(session, "atomic_write_bytes", lambda path, data: kill())
        train(out=tmp_path / "run", **SPEC)

    killed(work)
    assert events(tmp_path / "run", "end") == [{"event": "end"}]
    train(out=tmp_path / "run", resume=True, **SPEC)
    assert events(tmp_path / "run", "resume") == [{"event": "resume", "experience": 4}]
    same_run(whole, tmp_path / "run")


def test_killed_after_it_was_stopped_and_resumed(
    train: Train, killed: Killed, kill: Callable[[], None], events: Events, whole: Path, tmp_path: Path
) -> None:
    from contlearn.running import RunInterrupted

    third = iterations_of(events(whole, "experience"), 2)
    with pytest.raises(RunInterrupted):
        train(out=tmp_path / "run", at=third[2], **SPEC)
    killed(lambda: train(out=tmp_path / "run", resume=True, at=third[-2], act=kill, **SPEC))
    # The position inside the experience is still there; the one after the experience replaces it.
    train(out=tmp_path / "run", resume=True, **SPEC)
    same_run(whole, tmp_path / "run")
    one_checkpoint(tmp_path / "run")
    assert events(tmp_path / "run", "experience") == events(whole, "experience")


def test_killed_between_a_checkpoint_and_the_removal_of_the_position_inside(
    train: Train,
    killed: Killed,
    kill: Callable[[], None],
    events: Events,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from contlearn.running import RunInterrupted

    with pytest.raises(RunInterrupted):
        train(out=tmp_path / "run", at=iterations_of(events(whole, "experience"), 1)[3], **SPEC)
    unlink = Path.unlink

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        if path.name == "interrupted.json":
            kill()
        unlink(path, missing_ok=missing_ok)

    def work() -> None:
        monkeypatch.setattr(Path, "unlink", unlinking)
        train(out=tmp_path / "run", resume=True, **SPEC)

    killed(work)
    assert (tmp_path / "run" / "checkpoint" / "interrupted.json").exists()
    train(out=tmp_path / "run", resume=True, **SPEC)
    assert [record["experience"] for record in events(tmp_path / "run", "resume")] == [1, 2]
    same_run(whole, tmp_path / "run")
    one_checkpoint(tmp_path / "run")


def test_avalanches_own_strategy_resumes_between_experiences(
    killed: Killed, kill: Callable[[], None], events: Events, tmp_path: Path
) -> None:
    import torch
    from avalanche.core import SupervisedPlugin
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.supervised import Naive

    from contlearn import models, run, scenarios

    class Count(SupervisedPlugin):  # type: ignore[type-arg]
        """A user's plug-in whose state matters: it decides when to die, and the learning rate follows it."""

        def __init__(self) -> None:
            super().__init__()
            self.experiences: list[int] = []

        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            self.experiences.append(len(strategy.experience.dataset))
            strategy.optimizer.param_groups[0]["lr"] /= len(self.experiences)

        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            if dying and len(self.experiences) == 2:
                kill()

    def go(out: Path, resume: bool = False) -> Any:
        stream = scenarios.class_incremental("digits", n_experiences=4)
        model = models.create("mlp", stream, seed=0)
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            train_mb_size=32,
            train_epochs=1,
            eval_mb_size=512,
            plugins=[ReplayPlugin(mem_size=40), Count()],
            evaluator=EvaluationPlugin(loggers=[]),
        )
        return run(strategy, stream, out=out, resume=resume, quiet=True)

    dying = False
    go(tmp_path / "whole")
    dying = True
    killed(lambda: go(tmp_path / "run"))
    dying = False
    go(tmp_path / "run", resume=True)
    assert events(tmp_path / "run", "resume") == [{"event": "resume", "experience": 2}]
    same_run(tmp_path / "whole", tmp_path / "run")


DRIVER = """
import os, signal, sys
from contlearn import cli
from contlearn.strategies.template import SupervisedTemplate

step = SupervisedTemplate.optimizer_step
def stepping(strategy):
    if strategy.clock.train_iterations == int(sys.argv[1]):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    step(strategy)
SupervisedTemplate.optimizer_step = stepping
sys.exit(cli.main(sys.argv[3:]))
"""


def test_a_killed_command_resumes_and_three_processes_end_with_the_bits_of_one(events: Events, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(
        "scenario: {name: class_incremental, dataset: digits, n_experiences: 4}\n"
        "model: {name: mlp, dropout: 0.5}\n"
        "strategy: {name: icarl, epochs: 2, momentum: 0.9, memory_size: 40}\n"
    )
    command = ["run", str(tmp_path / "small.yaml"), "--quiet", "--seed=3"]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert cli.main([*command, "--out", str(whole)]) == 0
    third, last = (iterations_of(events(whole, "experience"), experience) for experience in (2, 3))

    def process(*arguments: object, hash_seed: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments), *command, "--out", str(pieces), "--resume"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            text=True,
            check=False,
        )

    dead = process("-c", DRIVER, third[3], "SIGKILL", hash_seed=1)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    stopped = process("-c", DRIVER, last[2], "SIGINT", hash_seed=2)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == (
        f"contlearn: stopped by SIGINT; continue with the same command and --resume (position stored in {pieces})"
    )
    assert "Traceback" not in stopped.stderr
    assert cli.main([*command, "--out", str(pieces), "--resume"]) == 0
    assert [record["experience"] for record in events(pieces, "resume")] == [2, 3]
    same_run(whole, pieces)
