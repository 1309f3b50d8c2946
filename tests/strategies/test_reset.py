"""Starting over at every experience."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from contlearn import models, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory.account import snapshot
from contlearn.state import Decoder, Encoder, Samples
from contlearn.strategies.naive import Naive
from contlearn.strategies.reset import ResetPlugin


def at_start(stream, model, plugin, watch, *, until: int = 3) -> tuple[list[dict[str, Tensor]], list[int], Naive]:
    """The model's tensors, and the number of parameters the optimizer remembers, at the start of each experience."""
    seen: list[dict[str, Tensor]] = []
    remembered: list[int] = []

    def note(strategy) -> None:
        seen.append({name: value.clone() for name, value in strategy.model.state_dict().items()})
        remembered.append(len(strategy.optimizer.state))

    strategy = Naive(model=model, plugins=[plugin, watch(before_training_epoch=note)], optimizer="adam", lr=0.05,
                     batch_size=5, device="cpu")  # fmt: skip
    for experience in stream.train_stream[:until]:
        strategy.train(experience, eval_streams=[])
    return seen, remembered, strategy


def test_the_encoder_goes_back_to_its_initial_bits_and_the_head_stays(stream, small, watch) -> None:
    model = small(stream)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    seen, remembered, strategy = at_start(stream, model, ResetPlugin(), watch)
    assert remembered == [0, 0, 0]
    for now in seen:
        for name, value in now.items():
            if name.startswith("backbone."):
                assert torch.equal(value, start[name])
    assert not torch.equal(seen[1]["head.weight"][:2], seen[0]["head.weight"])
    name = "backbone.layers.0.0.weight"
    assert not torch.equal(strategy.model.get_parameter(name), start[name])  # it did train


def test_rows_of_a_growing_head_go_back_to_what_they_were_when_they_appeared(stream, small, watch) -> None:
    seen, _, _ = at_start(stream, small(stream), ResetPlugin(head=True), watch)
    for earlier, later in ((seen[0], seen[1]), (seen[1], seen[2])):
        count = len(earlier["head.weight"])
        assert len(later["head.weight"]) == count + 2
        assert torch.equal(later["head.weight"][:count], earlier["head.weight"])
        assert torch.equal(later["head.bias"][:count], earlier["head.bias"])


def test_fresh_is_a_new_draw_with_the_same_values(stream, small, watch) -> None:
    model = small(stream)
    start = model.backbone.layers[0][0].weight.detach().clone()
    seen, _, _ = at_start(stream, model, ResetPlugin("fresh"), watch)
    weights = [now["backbone.layers.0.0.weight"] for now in seen]
    assert torch.equal(weights[0], start)
    for one in weights[1:]:
        assert torch.equal(one.flatten().sort().values, start.flatten().sort().values)
        assert float((one == start).float().mean()) < 0.2
    assert not torch.equal(weights[1], weights[2])


def test_moments_are_kept_when_asked_and_frozen_weights_always(stream, small, watch) -> None:
    _, remembered, _ = at_start(stream, small(stream), ResetPlugin(moments=False), watch)
    assert remembered[0] == 0 and remembered[1] > 0
    model = small(stream, hidden_layers=2)
    frozen = model.backbone.layers[0][0].weight.requires_grad_(False)
    plugin = ResetPlugin()
    at_start(stream, model, plugin, watch, until=1)
    with torch.no_grad():
        frozen.add_(1.0)
    bits = frozen.clone()
    at_start(stream, model, plugin, watch, until=2)
    assert torch.equal(frozen, bits) and "backbone.layers.0.0.weight" not in plugin.initial


def test_batch_norm_statistics_start_over(made_up, watch) -> None:
    stream = scenarios.class_incremental(made_up(side=8), n_experiences=2)
    seen, _, strategy = at_start(stream, models.create("resnet14", stream, seed=0), ResetPlugin(), watch)
    names = [name for name in seen[1] if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert names and all(torch.equal(seen[1][name], seen[0][name]) for name in names)
    assert int(strategy.model.state_dict()[names[-1]]) > 0


def test_pieces_of_one_experience_are_not_reset(stream, small) -> None:
    plugin = ResetPlugin()
    model = small(stream)
    strategy = SimpleNamespace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    weight = model.backbone.layers[0][0].weight
    start = weight.detach().clone()
    for first_piece, stays in ((True, False), (False, True), (True, False)):
        with torch.no_grad():
            if plugin.initial:
                weight.add_(1.0)
        moved = weight.detach().clone()
        strategy.experience = SimpleNamespace(is_first_subexp=first_piece)
        plugin.before_training_exp(strategy)
        assert torch.equal(weight, moved if stays else start)


def test_what_is_kept_is_accounted_and_stored(stream, small, watch) -> None:
    plugin = ResetPlugin(head=True)
    _, _, strategy = at_start(stream, small(stream), plugin, watch, until=2)
    held = sum(4 * parameter.numel() for parameter in strategy.model.parameters())
    assert snapshot(strategy).method_state["initial_weights"] == held
    encoder = Encoder(strategy, Samples(stream))
    state, tensors = json.loads(json.dumps(encoder.strategy_state())), load(save(encoder.tensors))
    other = ResetPlugin(head=True)
    again = Naive(model=small(stream), plugins=[other, watch()], optimizer="adam", device="cpu")
    Decoder(again, Samples(stream), tensors).strategy_state(state, experiences_done=stream.train_stream[:2])
    assert other.initial.keys() == plugin.initial.keys()
    assert all(torch.equal(other.initial[name], value) for name, value in plugin.initial.items())


def test_mistakes_get_one_line() -> None:
    with pytest.raises(ContlearnError, match="to: expected initial or fresh, got 'zero'"):
        ResetPlugin("zero")
