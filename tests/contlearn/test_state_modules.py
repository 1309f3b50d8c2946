"""Models, weights and optimizers in a checkpoint: put back into a fresh strategy, by name and never by position."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from contlearn import models, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.state import Decoder, Encoder, Samples


def small() -> Any:
    """A strategy that has met its first experience."""
    stream = scenarios.class_incremental("digits", n_experiences=3)
    strategy = strategies.create("naive", models.create("mlp", stream, seed=0, hidden=4), device="cpu")
    strategy.model.train()
    strategy.experience = stream.streams["train"][0]
    strategy.model_adaptation()
    strategy.check_model_and_optimizer()
    return SimpleNamespace(stream=stream, strategy=strategy, samples=Samples(stream))


def stored(value: Any, world: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """What would be on the disk: the JSON text read back, and the bytes of the tensors read back."""
    encoder = Encoder(world.strategy, world.samples)
    text = json.dumps(encoder.value(value, "x"), allow_nan=False)
    return json.loads(text), load(save(encoder.tensors))


def round_trip(value: Any, world: Any, current: Any = None) -> Any:
    description, tensors = stored(value, world)
    return Decoder(world.strategy, world.samples, tensors).value(description, current)


def test_references_to_the_models_weights_and_parts_lead_to_the_new_model() -> None:
    old, new = small(), small()
    weight = old.strategy.model.head.weight
    description, held = stored(
        {"weights": [weight, weight], "part": old.strategy.model.head, "strategy": old.strategy}, old
    )
    back = Decoder(new.strategy, new.samples, held).value(description)
    assert back["weights"][0] is back["weights"][1] is new.strategy.model.head.weight
    assert back["part"] is new.strategy.model.head
    assert back["strategy"] is new.strategy
    assert held == {}


def test_a_plug_ins_own_parameter_and_its_optimizer_stay_together() -> None:
    def make() -> dict[str, Any]:
        weight = nn.Parameter(torch.zeros(2))
        return {"weight": weight, "optimizer": torch.optim.Adam([weight], lr=0.1)}

    def step(held: dict[str, Any]) -> None:
        held["weight"].pow(2).sum().add(held["weight"].sum()).backward()
        held["optimizer"].step()

    trained = make()
    step(trained)
    trained["weight"].grad = None
    back = round_trip(trained, small(), current=make())
    assert torch.equal(back["weight"], trained["weight"])
    for held in (trained, back):
        step(held)
    assert torch.equal(back["weight"], trained["weight"])


def test_a_teacher_with_a_narrower_head_comes_back_beside_a_model_that_grew() -> None:
    old, new = small(), small()
    teacher = copy.deepcopy(old.strategy.model).eval().requires_grad_(False)
    for world in (old, new):
        world.strategy.experience = world.stream.streams["train"][1]
        world.strategy.model_adaptation()
    description, held = stored({"teacher": teacher}, old)
    back = Decoder(new.strategy, new.samples, held).value(description)["teacher"]
    x = torch.rand(3, 1, 8, 8)
    assert back.head.out_features == teacher.head.out_features < new.strategy.model.head.out_features
    assert torch.equal(back(x), teacher(x))
    assert not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())
    assert {id(p) for p in back.parameters()}.isdisjoint(id(p) for p in new.strategy.model.parameters())


def test_a_model_keeps_what_it_holds_beside_its_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.prototypes = torch.zeros(0, 2)  # no buffer
            self._seen: set[int] = set()

    old, new = small(), small()
    old.strategy.model, new.strategy.model = Net(), Net()
    for world in (old, new):
        world.strategy.optimizer = torch.optim.SGD(world.strategy.model.parameters(), lr=0.1)
    old.strategy.model.prototypes = torch.ones(3, 2)
    old.strategy.model._seen = {1, 4}
    old.strategy.model.layer.requires_grad_(False)
    move(old, new)
    assert torch.equal(new.strategy.model.prototypes, torch.ones(3, 2))
    assert new.strategy.model._seen == {1, 4}
    assert not new.strategy.model.layer.weight.requires_grad
    assert torch.equal(new.strategy.model.layer.weight, old.strategy.model.layer.weight)


def move(old: Any, new: Any, experiences: int = 1) -> None:
    """The whole state of one strategy into another."""
    encoder = Encoder(old.strategy, old.samples)
    description = json.loads(json.dumps(encoder.strategy_state(), allow_nan=False))
    decoder = Decoder(new.strategy, new.samples, load(save(encoder.tensors)))
    decoder.strategy_state(description, experiences_done=new.stream.streams["train"][:experiences])


def test_a_model_of_another_shape_is_refused_by_name() -> None:
    old, new = small(), small()
    new.strategy.model = models.create("mlp", new.stream, seed=0, hidden=5)
    with pytest.raises(ContlearnError, match=r"'backbone\.layers.*': its shape was \(4, 64\) and is now \(5, 64\)"):
        move(old, new)


def test_a_model_of_other_parts_is_refused_by_name() -> None:
    old, new = small(), small()
    new.strategy.model = models.create("mlp", new.stream, seed=0, hidden=4, hidden_layers=2)
    with pytest.raises(ContlearnError, match=r"differ in 'backbone\.layers"):
        move(old, new)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_optimizer_state_finds_its_weight_by_name(name: str) -> None:
    def world(trained: bool) -> Any:
        made = small()
        parameters = list(made.strategy.model.parameters())
        if not trained:
            parameters.reverse()  # a position would give every weight another one's moments
        options = {"sgd": {"momentum": 0.9}, "adam": {"betas": (0.8, 0.9)}, "adamw": {"weight_decay": 0.3}}[name]
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        made.strategy.optimizer = kind(parameters, lr=0.03, **options)
        return made

    def step(made: Any, seed: int) -> None:
        torch.manual_seed(seed)
        made.strategy.model.eval()(torch.rand(4, 1, 8, 8)).pow(2).sum().backward()
        made.strategy.optimizer.step()
        made.strategy.optimizer.zero_grad()

    old, new = world(True), world(False)
    step(old, 1)
    old.strategy.optimizer.param_groups[0]["lr"] = 0.007
    move(old, new)
    assert new.strategy.optimizer.param_groups[0]["lr"] == 0.007
    step(old, 2)
    step(new, 2)
    for (key, left), (_, right) in zip(
        old.strategy.model.named_parameters(), new.strategy.model.named_parameters(), strict=True
    ):
        assert torch.equal(left, right), key


def test_tensors_follow_the_strategy_to_its_device_unless_they_never_were_there() -> None:
    # The device "meta" stands in for an accelerator: tensors can be put there on any machine.
    moved, stays = small(), small()
    held = {"work": torch.ones(2), "device": torch.device("cpu"), "type": torch.float16}
    description, tensors = stored(held, moved)
    moved.strategy.device = torch.device("meta")
    back = Decoder(moved.strategy, moved.samples, tensors).value(description)
    assert (back["work"].device.type, back["device"].type, back["type"]) == ("meta", "meta", torch.float16)
    stays.strategy.device = torch.device("meta")
    back = round_trip(held, stays)  # held on the CPU beside a strategy on the accelerator
    assert (back["work"].device.type, back["device"].type) == ("cpu", "cpu")
    assert round_trip(held, stays, current={"work": torch.zeros(3, device="meta")})["work"].device.type == "meta"


def test_functions_and_configuration_do_not_travel() -> None:
    old, new = small(), small()
    old.strategy.wrapped = lambda: "old"
    old.strategy.clip_grad_norm = 3.0  # an attribute that outlives the constructor does
    old.strategy.train_epochs = 99  # the constructor alone decides
    new.strategy.wrapped = mine = lambda: "new"
    move(old, new)
    assert new.strategy.wrapped is mine
    assert (new.strategy.clip_grad_norm, new.strategy.train_epochs) == (3.0, 1)
    third = small()
    move(old, third)
    assert not hasattr(third.strategy, "wrapped")
