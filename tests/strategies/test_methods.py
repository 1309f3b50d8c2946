"""The bounds that keep all data: joint and cumulative training, and the naive one that keeps none."""

from __future__ import annotations

import collections
import random

import pytest
import torch

from contlearn import scenarios, strategies
from contlearn.errors import ContlearnError

SUPERVISED = strategies.list(kind=("class-incremental", "plug-in"))

SOON = {"lr": 0.1, "epochs": 2, "batch_size": 5}


@pytest.fixture
def seen(watch, identify):
    """``seen(stream)``: a plug-in that counts which samples each experience trains on, and those counts."""

    def make(stream):
        places, counts = identify(stream, "train"), collections.defaultdict(collections.Counter)
        return watch(before_forward=lambda s: counts[s.clock.train_exp_counter].update(places(s.mb_x))), counts

    return make


def everything(stream, first: int, last: int, times: int) -> dict[tuple[int, int], int]:
    return {
        (index, position): times
        for index, experience in list(enumerate(stream.train_stream))[first:last]
        for position in range(len(experience.dataset))
    }


def test_naive_trains_on_each_experience_in_turn(stream, small, seen) -> None:
    plugin, counts = seen(stream)
    strategies.create("naive", small(stream), plugins=[plugin], **SOON).train(stream.train_stream, eval_streams=[])
    assert counts == {index: everything(stream, index, index + 1, 2) for index in range(3)}


def test_cumulative_trains_on_everything_so_far(stream, small, seen) -> None:
    plugin, counts = seen(stream)
    strategies.create("cumulative", small(stream), plugins=[plugin], **SOON).train(stream.train_stream, eval_streams=[])
    assert counts == {index: everything(stream, 0, index + 1, 2) for index in range(3)}


def test_joint_trains_once_on_everything(stream, small, seen) -> None:
    plugin, counts = seen(stream)
    strategy = strategies.create("joint", small(stream), plugins=[plugin], **SOON)
    strategy.train(stream.train_stream, eval_streams=[])
    assert counts == {0: everything(stream, 0, 3, 2)}
    assert strategy.model.head.out_features == 6 and strategy.clock.train_iterations == 2 * 10


def test_joint_takes_one_experience_too(stream, small, seen) -> None:
    plugin, counts = seen(stream)
    strategies.create("joint", small(stream), plugins=[plugin], **SOON).train(stream.train_stream[1], eval_streams=[])
    assert counts == {0: everything(stream, 1, 2, 2)}


@pytest.mark.parametrize("boundaries", [False, True])
def test_joint_trains_on_the_pieces_of_an_online_stream(made_up, small, seen, boundaries) -> None:
    stream = scenarios.online(made_up(), n_experiences=3, experience_size=7, access_task_boundaries=boundaries)
    plugin, counts = seen(stream)
    strategy = strategies.create("joint", small(stream), plugins=[plugin], **SOON)
    strategy.train(stream.train_stream, eval_streams=[])
    assert counts == {0: everything(stream, 0, 99, 2)} and sum(counts[0].values()) == 2 * 48
    assert strategy.model.head.out_features == 6


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("name", [name for name in SUPERVISED if name != "joint"])
def test_every_strategy_trains_on_an_online_stream(made_up, fitting, name, boundaries) -> None:
    stream = scenarios.online(made_up(), n_experiences=2, experience_size=9, access_task_boundaries=boundaries)
    strategy = strategies.create(name, fitting(name, stream), lr=0.1, batch_size=4)
    strategy.train(stream.train_stream, eval_streams=[])
    strategy.eval(stream.test_stream)
    assert strategy.model.head.out_features == 6
    assert all(parameter.isfinite().all() for parameter in strategy.model.parameters())


@pytest.mark.parametrize("name", SUPERVISED)
def test_every_strategy_trains_with_task_ids(made_up, fitting, watch, name) -> None:
    stream = scenarios.task_incremental(made_up(), n_experiences=3)
    hits: list[bool] = []
    plugin = watch(after_eval_iteration=lambda s: hits.extend((s.mb_output.argmax(1) == s.mb_y).tolist()))
    model = fitting(name, stream, hidden=16)
    # At the others' rate PRD's projections become one.
    apt = {"lr": 0.05, "prototypes_lr": 1.0, "crop": 0, "flip": False} if name == "prd" else {"lr": 0.3}
    strategy = strategies.create(name, model, epochs=8, batch_size=4, plugins=[plugin], **apt)
    strategy.train(stream.train_stream, eval_streams=[])
    strategy.eval(stream.test_stream[2])
    assert sum(hits) / len(hits) > 0.6  # chance among the two classes of the task: one half
    assert all(parameter.isfinite().all() for parameter in strategy.model.parameters())


BYTES = 16 + 8 + 8  # pixels, label, place in the stream
BUDGETED = {"replay": 0, "er_ace": 0, "der": 6 * 4, "derpp": 6 * 4, "gdumb": 0, "icarl": 0, "agem": 0}  # logits


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_in_bytes_decides_how_many_exemplars_are_kept(stream, small, name) -> None:
    each = BYTES + BUDGETED[name]
    strategy = strategies.create(name, small(stream), memory_budget=12 * each - 1, **SOON)
    strategy.train(stream.train_stream, eval_streams=[])
    if name == "agem":  # shared out over the three experiences
        assert [len(buffer) for buffer in strategy.agem.buffers] == [3, 3, 3]
    else:
        owner = getattr(strategy, name) if name in ("replay", "gdumb") else strategy
        assert len(owner.storage_policy.buffer) == 11
    least = 3 * each if name == "agem" else each
    poor = strategies.create(name, small(stream), memory_budget=least - 1)
    with pytest.raises(ContlearnError, match=f"expected at least {least}$"):
        poor.train(stream.train_stream, eval_streams=[])


def test_a_run_repeats_itself_for_the_same_seeds(stream, fitting) -> None:
    for name in SUPERVISED:
        ends = []
        for _ in range(2):
            torch.manual_seed(1)
            random.seed(1)  # A-GEM's choice of exemplars, as in Avalanche
            strategy = strategies.create(name, fitting(name, stream, dropout=0.5), **SOON)
            strategy.generator.manual_seed(2)
            strategy.train(stream.train_stream, eval_streams=[])
            ends.append(strategy.model.state_dict())
        assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items()), name
