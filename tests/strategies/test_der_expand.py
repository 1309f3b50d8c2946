"""DER (expandable): a whole backbone per task, each from the last, the old ones frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from contlearn import models, scenarios, strategies

SOON = {"lr": 0.1, "epochs": 1, "batch_size": 8, "device": "cpu", "memory_size": 12}


@pytest.fixture
def stream(made_up) -> Any:
    return scenarios.class_incremental(made_up(side=8), n_experiences=3)


def der(stream: Any, name: str = "slim_resnet18", **options: Any) -> Any:
    torch.manual_seed(0)
    network = {"width": 2} if name == "slim_resnet18" else {}
    return strategies.create("der_expand", models.create(name, stream, seed=0, **network), **{**SOON, **options})


def test_every_task_has_a_whole_backbone_that_starts_as_the_last_one(stream, watch) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    note = watch(before_training_exp=lambda s: starts.append(copy.deepcopy(s.model.backbone.state_dict())))
    strategy = der(stream, plugins=[note])
    single = sum(p.numel() for p in models.create("slim_resnet18", stream, width=2).backbone.parameters())
    for task, experience in enumerate(stream.train_stream, start=1):
        strategy.train(experience, eval_streams=[])
        backbone = strategy.model.backbone
        assert sum(p.numel() for p in backbone.parameters()) == task * single
        assert strategy.backbone_parameters(task) == task * single
        assert strategy.model.head.weight.shape == (2 * task, 16 * task)
    ends = strategy.model.backbone.state_dict()
    for task in (1, 2):
        for key, value in starts[task].items():
            if key.startswith(f"specialised.{task}."):  # a copy of the one before it
                assert torch.equal(value, starts[task][key.replace(f".{task}.", f".{task - 1}.", 1)]), key
            else:  # and those before it never move again, BatchNorm statistics included
                assert torch.equal(value, ends[key]), key
    assert any(not torch.equal(ends[key], starts[2][key]) for key in ends)


def test_rows_are_aligned_only_where_asked_for(stream) -> None:
    for options, aligned in (({}, False), ({"align": True}, True)):
        strategy = der(stream, **options)
        for experience in list(stream.train_stream)[:2]:
            strategy.train(experience, eval_streams=[])
        assert (strategy.gamma != 1.0) == aligned


def test_any_backbone_can_be_expanded_as_a_whole(stream) -> None:
    strategy = der(stream, "simple_cnn")
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    assert len(strategy.model.backbone.specialised) == 2
    assert strategy.model.aux.weight.shape == (3, 64)
    assert strategy.model.features(torch.rand(2, 1, 8, 8)).shape == (2, 128)
