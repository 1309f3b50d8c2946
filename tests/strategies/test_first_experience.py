"""The plan of the first experience: lengths, rates and decays by experience, resuming, and mistakes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from contlearn import run, strategies
from contlearn.errors import ContlearnError
from contlearn.running import RunInterrupted

USUAL = {"lr": 0.5, "epochs": 2, "batch_size": 8, "momentum": 0.9, "weight_decay": 0.01, "device": "cpu"}
OWN = {"epochs": 4, "weight_decay": 0.25, "lr_schedule": "multistep", "milestones": [1, 3]}


def watched(stream: Any, small: Any, watch: Any, **options: Any) -> list[tuple[int, float, float]]:
    """Experience, rate and decay of every epoch."""
    seen: list[tuple[int, float, float]] = []

    def note(strategy: Any) -> None:
        (group,) = strategy.optimizer.param_groups
        seen.append((strategy.clock.train_exp_counter, group["lr"], group["weight_decay"]))

    strategy = strategies.create(
        "naive", small(stream), plugins=[watch(before_training_epoch=note)], **{**USUAL, **options}
    )
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return seen


def test_only_the_first_experience_is_trained_by_it(stream, small, watch) -> None:
    seen = watched(stream, small, watch, first_experience=OWN)
    first = [(0, pytest.approx(rate), 0.25) for rate in (0.5, 0.05, 0.05, 0.005)]
    assert seen == [*first, *((later, 0.5, 0.01) for later in (1, 1, 2, 2))]


def test_what_it_does_not_say_is_as_usual(stream, small, watch) -> None:
    options = {"lr_schedule": "linear", "warmup_epochs": 1, "epochs": 3}
    plain = watched(stream, small, watch, **options)
    assert watched(stream, small, watch, first_experience={"lr": 0.25}, **options) == [
        (number, rate / 2 if number == 0 else rate, decay) for number, rate, decay in plain
    ]
    assert watched(stream, small, watch, first_experience={}, **options) == plain


def test_its_weights_are_those_of_training_that_long(stream, small) -> None:
    def trained(**options: Any) -> dict[str, torch.Tensor]:
        strategy = strategies.create("naive", small(stream), **{**USUAL, **options})
        torch.manual_seed(3)  # of the head's first rows
        strategy.generator.manual_seed(3)
        strategy.train(stream.train_stream[0], eval_streams=[])
        return dict(strategy.model.state_dict())

    one, other = trained(first_experience={"epochs": 3, "lr": 0.125}), trained(epochs=3, lr=0.125)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_stopped_within_it_ends_with_the_same_bits(stream, small, watch, tmp_path: Path) -> None:
    epochs: list[int] = []

    def go(out: str, *, at: int = -1, resume: bool = False) -> Any:
        def stop(strategy: Any) -> None:
            if strategy.clock.train_iterations == at:
                os.kill(os.getpid(), signal.SIGTERM)

        def note(strategy: Any) -> None:
            epochs.append(strategy.clock.train_exp_counter)

        epochs.clear()
        plugins = [watch(after_training_iteration=stop, before_training_epoch=note)]
        strategy = strategies.create("naive", small(stream), plugins=plugins, first_experience=OWN, **USUAL)
        return run(strategy, stream, out=tmp_path / out, resume=resume, quiet=True)

    whole = go("whole")
    assert epochs == [0, 0, 0, 0, 1, 1, 2, 2]
    for at in (3, 10):
        with pytest.raises(RunInterrupted):
            go(f"pieces{at}", at=at)
        assert go(f"pieces{at}", resume=True).accuracy_matrix == whole.accuracy_matrix
        one, other = (tmp_path / name / "model.safetensors" for name in ("whole", f"pieces{at}"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"epoch": 3}, "first_experience: no option 'epoch'; did you mean 'epochs'? (expected one of: epochs, lr, "),
        ({"epochs": 0}, "first_experience.epochs: expected a whole number of at least 1, got 0"),
        ({"epochs": 2.5}, "first_experience.epochs: expected a whole number of at least 1, got 2.5"),
        ({"lr": -1.0}, "first_experience.lr: expected a number of at least 0, got -1.0"),
        ({"lr": "fast"}, "first_experience.lr: expected a number of at least 0, got 'fast'"),
        ({"weight_decay": True}, "first_experience.weight_decay: expected a number of at least 0, got True"),
        ({"milestones": "soon"}, "first_experience.milestones: expected whole numbers, got 'soon'"),
        ({"lr_schedule": "stairs"}, "first_experience.lr_schedule: expected constant, linear, cosine or multistep"),
        ({"lr_schedule": "multistep"}, "first_experience.milestones: lr_schedule multistep needs epochs"),
        ({"warmup_epochs": 2}, "first_experience.warmup_epochs: expected fewer than the 2 epochs"),
    ],
)
def test_mistakes_get_one_line(stream, small, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ContlearnError) as caught:
        strategies.create("naive", small(stream), first_experience=own, **USUAL)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
