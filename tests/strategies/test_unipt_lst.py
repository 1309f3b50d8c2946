"""UniPT and LST: their formulas against plain loops, what they freeze, and mistakes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from contlearn import models, run, strategies
from contlearn.errors import ContlearnError
from contlearn.strategies.lst import LSTPlugin, SideBlock
from contlearn.strategies.unipt import UniPTPlugin


def vit(stream: Any, **options: Any) -> Any:
    tiny = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "seed": 0}
    return models.create("vit_tiny_patch16_224", stream, **{**tiny, **options})


@pytest.mark.parametrize("confidence", ["layer", "merged"])
def test_unipt_is_the_published_formula(stream, confidence) -> None:
    model = vit(stream).double()
    UniPTPlugin(confidence=confidence).prepare_model(model)
    side = model.backbone.double()
    x = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    features, _ = side.features(x)
    lowered = [down(feature) for down, feature in zip(side.down, features, strict=True)]
    anchor, merged, scores = lowered[-1], [], []
    for tokens in lowered[:-1]:
        joined = torch.empty_like(tokens)
        for image in range(len(x)):
            for place in range(tokens.shape[1]):
                attention = [max((anchor[image, place] @ key).item(), 0.0) for key in tokens[image]]
                whole = sum(attention) + 1e-8
                joined[image, place] = tokens[image, place] + sum(
                    a / whole * key for a, key in zip(attention, tokens[image], strict=True)
                )
        merged.append(joined)
        compared = joined if confidence == "merged" else tokens
        scores.append(side.gate(anchor.mean(1) * compared.mean(1)))
    confidences = torch.stack(scores).softmax(0)
    mixed = sum(c[:, None] * one for c, one in zip(confidences, merged, strict=True))
    out = side.up(torch.relu(anchor + side.project(mixed)))
    assert torch.allclose(side(x), side.host.pool(side.trunk, out), atol=1e-10)
    assert len(features) == 4 and torch.equal(features[-1], side.trunk.forward_features(x))


def test_lst_is_the_published_ladder(stream) -> None:
    model = vit(stream)
    LSTPlugin(factor=4, dropped=[2], init="random").prepare_model(model)
    side = model.backbone.eval()
    with torch.no_grad():
        for place, gate in enumerate(side.gates):
            gate.fill_(0.03 * (place - 1))
    x = torch.rand(2, 1, 4, 4)
    features, _ = side.features(x)
    h = side.down[0](features[0])
    for place in (1, 2, 3):
        share = 1 / (1 + torch.exp(torch.tensor(-0.03 * (place - 2) / 0.1)))
        h = share * h + (1 - share) * side.down[place](features[place])
        if place != 2:
            h = side.blocks[str(place)](h)
    expected = side.host.pool(side.trunk, side.up(side.norm(h)))
    assert torch.allclose(side(x), expected, atol=1e-6)
    assert sorted(side.blocks) == ["1", "3"]


def test_at_the_start_both_sides_of_the_ladder_count_half(stream) -> None:
    model = vit(stream)
    LSTPlugin().prepare_model(model)
    assert [torch.sigmoid(gate / 0.1).item() for gate in model.backbone.gates] == [0.5] * 3


def test_a_pruned_side_block_is_the_backbones_own_where_nothing_is_cut(stream) -> None:
    model = vit(stream)
    LSTPlugin(factor=1, init="prune").prepare_model(model)
    side = model.backbone
    x = torch.randn(2, 5, 16)
    for place in (1, 2, 3):
        assert torch.allclose(side.blocks[str(place)](x), side.trunk.blocks[place - 1](x), atol=1e-5)


def test_pruning_keeps_the_channels_with_the_largest_weights(stream) -> None:
    model = vit(stream)
    trunk = model.backbone
    strong = [1, 4, 8, 15]
    with torch.no_grad():
        for block in trunk.blocks:
            block.attn.proj.weight[strong] *= 50
    LSTPlugin(factor=4).prepare_model(model)
    side = model.backbone
    assert [row.nonzero().flatten().tolist() for row in side.down[2].weight] == [[one] for one in strong]
    small, big = side.blocks["2"], trunk.blocks[1]
    assert torch.equal(small.norm1.weight, big.norm1.weight[strong])
    rows = big.mlp.fc1.weight.abs().sum(1).topk(16).indices.sort().values
    assert torch.equal(small.fc1.weight, big.mlp.fc1.weight[rows][:, strong])
    assert torch.equal(small.fc2.weight, big.mlp.fc2.weight[strong][:, rows])


def test_the_side_networks_width_is_an_eighth() -> None:
    images = SimpleNamespace(input_shape=(3, 32, 32), n_classes=3, task_labels=False)
    model = models.create("vit_small_patch16_224", images, head="fixed", depth=2, patch_size=8)
    LSTPlugin().prepare_model(model)
    block = model.backbone.blocks["1"]
    assert isinstance(block, SideBlock) and (block.qkv.in_features, block.heads) == (48, 6)


@pytest.mark.parametrize("plugin", [UniPTPlugin, LSTPlugin])
def test_no_block_of_the_backbone_runs_with_gradients_and_training_leaves_it(stream, plugin) -> None:
    model = vit(stream)
    strategy = strategies.create("replay", model, memory_size=8, epochs=2, batch_size=8, lr=0.05, plugins=[plugin()])
    before = {key: value.clone() for key, value in model.backbone.trunk.state_dict().items()}
    side = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad and "backbone" in name}
    seen: set[bool] = set()
    for block in model.backbone.trunk.blocks:
        block.register_forward_hook(lambda *_: seen.add(torch.is_grad_enabled()))
    run(strategy, stream, quiet=True)
    after = strategy.model.backbone.trunk.state_dict()
    assert seen == {False} and all(torch.equal(before[key], after[key]) for key in before)
    now = dict(strategy.model.named_parameters())
    side.pop("backbone.gate.bias", None)  # the same for every layer: the softmax does not see it
    assert all(not torch.equal(value, now[name]) for name, value in side.items())


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda s: UniPTPlugin(confidence="all"), "unknown confidence 'all'"),
        (lambda s: UniPTPlugin(eps=0.0), "eps: expected more than 0, got 0.0"),
        (lambda s: LSTPlugin(factor=0), "factor: expected a whole number of at least 1, got 0"),
        (lambda s: LSTPlugin(init="fisher"), "unknown init 'fisher'"),
        (lambda s: LSTPlugin(dropped=[4]).prepare_model(vit(s)), "dropped: expected positions in 1..3, got 4"),
        (lambda s: LSTPlugin(factor=16, init="prune").prepare_model(vit(s)), "lst: init 'prune' needs plain ViT"),
    ],
)
def test_mistakes_get_one_line(stream, act, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        act(stream)
    assert said in str(caught.value) and "\n" not in str(caught.value)
