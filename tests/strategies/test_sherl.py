"""SHERL: the early route against a plain loop, what is frozen, what backward keeps, resuming."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from contlearn import models, run, strategies
from contlearn.errors import ContlearnError
from contlearn.memory.saved import SavedForBackward
from contlearn.models import Classifier, GrowingHead
from contlearn.strategies.lst import LSTPlugin
from contlearn.strategies.sherl import SHERLPlugin
from contlearn.strategies.sherl_route import EarlyRoute, Merge, flat, redundancy, rolled
from contlearn.strategies.unipt import UniPTPlugin


def vit(stream: Any, **options: Any) -> Any:
    tiny = {"patch_size": 2, "embed_dim": 16, "depth": 3, "num_heads": 2, "seed": 0}
    return models.create("vit_tiny_patch16_224", stream, **{**tiny, **options})


@pytest.fixture
def images() -> Any:
    return SimpleNamespace(input_shape=(3, 16, 16), n_classes=4, task_labels=False)


# ---------------------------------------------------------------------- early route


def by_hand(route: EarlyRoute, features: list[torch.Tensor]) -> torch.Tensor:
    """m of every token, layer by layer, as the equations stand."""
    lowered = [down(feature) for down, feature in zip(route.down, features, strict=True)]
    shallow, guide = lowered[:-1], lowered[-1]
    weight, bias = route.merge.attend.weight[0], route.merge.attend.bias
    out = torch.empty_like(guide)
    for image in range(guide.shape[0]):
        for token in range(guide.shape[1]):
            e = guide[image, token]
            mine = [one[image, token] for one in shallow]
            gates = []
            for one in mine:
                r = sum(torch.relu(torch.cosine_similarity(one, other, dim=0)) for other in mine)
                gates.append(torch.relu((weight * one * e).sum() + bias[0]) / r)
            total = sum(gates) + 1e-8
            out[image, token] = sum(g / total * one for g, one in zip(gates, mine, strict=True)) + e
    return out


def test_the_route_is_the_published_formula() -> None:
    route = EarlyRoute([6, 6, 6, 6], 5, dropout=0.0).double()
    features = [torch.randn(2, 3, 6, dtype=torch.float64) for _ in range(4)]
    m = by_hand(route, features)
    assert torch.allclose(route.merged(features), m, atol=1e-12)
    with torch.no_grad():
        route.p.fill_(0.07)
    up = torch.nn.functional.layer_norm(
        route.up[1](torch.relu(m)), (6,), route.up[2].weight, route.up[2].bias, eps=1e-12
    )
    expected = up + torch.tanh(torch.tensor(0.7, dtype=torch.float64)) * features[-1]
    assert torch.allclose(route(features, features[-1]), expected, atol=1e-9)


def test_redundancy_counts_a_layer_itself_and_its_gradient_is_right() -> None:
    features = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.empty(3, 4, dtype=torch.float64)
    for place in range(3):
        for i in range(4):
            expected[place, i] = sum(
                torch.relu(torch.cosine_similarity(features[place, i], features[place, j], dim=0)) for j in range(4)
            )
    found = redundancy(features)
    assert torch.allclose(found, expected) and (found >= 1 - 1e-12).all()
    alone = torch.eye(4, 5, dtype=torch.float64)[None]
    assert torch.allclose(redundancy(alone), torch.ones(1, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(redundancy, features.requires_grad_())
    blank = torch.zeros(1, 3, 5, requires_grad=True)  # nothing to be redundant with, and no NaN
    redundancy(blank).sum().backward()
    assert (redundancy(blank) == 0).all() and blank.grad is not None and blank.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["differentiable", "detached", "off"])
def test_gates_sum_to_one_or_are_all_zero(mode: Any) -> None:
    merge = Merge(5, mode=mode)
    shallow, guide = torch.randn(4, 6, 3, 5), torch.randn(4, 6, 5)
    gates = merge.gates(shallow, guide)
    sums = gates.sum(-1)
    assert (gates >= 0).all() and (sums > 0.5).any()
    assert torch.allclose(sums[sums > 0], torch.ones_like(sums[sums > 0]), atol=1e-5)
    with torch.no_grad():
        merge.attend.bias.fill_(-100.0)
    assert (merge.gates(shallow, guide) == 0).all()
    assert torch.equal(merge(shallow, guide), guide)


def test_the_three_readings_of_redundancy_differ_where_they_should() -> None:
    shallow, guide = torch.randn(2, 3, 4, 5).requires_grad_(), torch.randn(2, 3, 5)
    merges = {mode: Merge(5, mode=mode) for mode in ("differentiable", "detached", "off")}
    for merge in merges.values():
        merge.load_state_dict(merges["off"].state_dict())
    outputs = {mode: merge(shallow, guide) for mode, merge in merges.items()}
    assert torch.equal(outputs["differentiable"], outputs["detached"])
    assert not torch.allclose(outputs["differentiable"], outputs["off"])
    into = {mode: torch.autograd.grad(out.square().sum(), shallow)[0] for mode, out in outputs.items()}
    assert not torch.allclose(into["differentiable"], into["detached"])


@pytest.mark.parametrize("kind", ["tokens", "maps"])
def test_at_the_start_the_raw_last_feature_has_no_influence_but_its_gate_learns(kind: str) -> None:
    route = EarlyRoute([6, 6, 6], 4, kind=kind, dropout=0.0)
    shape = (2, 5, 6) if kind == "tokens" else (2, 6, 3, 2)
    features = [torch.randn(shape) for _ in range(3)]
    last = torch.randn(shape)
    out = route(features, last)
    assert torch.equal(out, route(features, 1000 * last))
    direction = torch.randn(shape)
    (out * direction).sum().backward()
    assert route.p.grad is not None
    assert route.p.grad.item() == pytest.approx(10 * (direction * last).sum().item(), rel=1e-4)


def test_residuals_and_norm_constants() -> None:
    features = [torch.randn(2, 5, 6) for _ in range(3)]
    none, plain = EarlyRoute([6] * 3, 4, residual="none"), EarlyRoute([6] * 3, 4, residual="plain")
    plain.load_state_dict(none.state_dict())
    none.eval(), plain.eval()
    assert torch.allclose(plain(features, features[-1]), none(features, features[-1]) + features[-1])
    route = EarlyRoute([6] * 3, 4)
    assert [down[1].eps for down in route.down] == [1e-5] * 3 and route.up[2].eps == 1e-12
    assert [type(part) for part in route.up] == [nn.ReLU, nn.Linear, nn.LayerNorm, nn.Dropout] and route.up[3].p == 0.1


def test_the_gated_down_is_the_published_one() -> None:
    route = EarlyRoute([6] * 3, 4, down="gated", up="linear")
    assert [type(part) for part in route.up] == [nn.ReLU, nn.Linear]
    down, x = route.down[0], torch.randn(2, 6)
    u = torch.relu(x @ down.first.weight.T + down.first.bias)
    gate = torch.sigmoid(u @ down.gate.weight.T + down.gate.bias)
    expected = (u @ down.second.weight.T + down.second.bias + u) * gate
    assert torch.allclose(down(x), expected, atol=1e-6)


def test_maps_and_tokens_turn_into_each_other() -> None:
    maps = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    assert flat(maps).shape == (2, 20, 3) and torch.equal(flat(maps)[1, 7], maps[1, :, 1, 2])
    assert torch.equal(rolled(flat(maps), (4, 5)), maps)


# ---------------------------------------------------------------------- the network


def test_no_gradient_and_nothing_saved_inside_the_frozen_trunk(images) -> None:
    model = vit(images, depth=4)
    SHERLPlugin().prepare_model(model)
    trunk = model.backbone.trunk
    calls: list[bool] = []
    for block in trunk.blocks:
        block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    saved: list[torch.Tensor] = []
    features: list[torch.Tensor] = []
    model.backbone.early.register_forward_pre_hook(lambda _, given: features.extend(given[0]))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.backbone(torch.randn(2, 3, 16, 16))
    assert calls == [False, False, False, True]  # the withheld block once, with gradients
    out.sum().backward()
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert all(parameter.grad is not None for parameter in model.backbone.early.parameters())
    inside = {id(p) for p in trunk.blocks[:-1].parameters()} | {id(p) for p in trunk.patch_embed.parameters()}
    assert not inside & {id(tensor) for tensor in saved}
    # What comes out of the trunk are the features that Down_i reads, each of them one storage.
    kept = {feature.untyped_storage().data_ptr() for feature in features}
    assert len(features) == 4 and kept <= {tensor.untyped_storage().data_ptr() for tensor in saved}


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    watch = SavedForBackward([*model.parameters(), *model.buffers(), x])
    with watch.watching():
        model(x).sum().backward()
    return watch.peak


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 48, "depth": 8, "num_heads": 3}),
        ("slim_resnet18", {"width": 8}),
        ("efficientnet_lite0", {}),
    ],
)
def test_backward_keeps_less_than_full_fine_tuning(images, name, options) -> None:
    images.input_shape = (3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    full = saved_bytes(models.create(name, images, head="fixed", seed=0, **options), x)
    found = {}
    for plugin in (SHERLPlugin(), UniPTPlugin(), LSTPlugin()):
        model = models.create(name, images, head="fixed", seed=0, **options)
        plugin.prepare_model(model)
        found[plugin.method] = saved_bytes(model, x)
    assert all(0 < size < full / 2 for size in found.values()), (full, found)


def test_bits_instead_of_floats_in_the_late_route_change_no_gradient(images) -> None:
    images.input_shape = (3, 32, 32)
    x = torch.randn(4, 3, 32, 32)
    sizes, gradients = [], []
    for packed in (True, False):
        model = models.create("efficientnet_lite0", images, head="fixed", seed=0)
        SHERLPlugin(packed=packed).prepare_model(model)
        sizes.append(saved_bytes(model, x))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert sizes[0] < sizes[1]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("late", ["block", "none"])
def test_the_trunk_stays_in_evaluation_mode_through_every_switch(stream, late) -> None:
    model = vit(stream, drop_rate=0.5, drop_path_rate=0.5)
    SHERLPlugin(dropout=0.0, late=late).prepare_model(model)
    model.train()
    assert model.backbone.early.training and not any(m.training for m in model.backbone.trunk.modules())
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(model.backbone(x), model.backbone(x))
    model.eval()
    assert not model.backbone.early.training


def test_without_a_late_route_no_block_runs_with_gradients(stream) -> None:
    model = vit(stream)
    SHERLPlugin(late="none", residual="plain", up="linear").prepare_model(model)
    seen: list[bool] = []
    for block in model.backbone.trunk.blocks:
        block.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model.backbone(torch.randn(2, 1, 4, 4)).sum().backward()
    assert seen == [False] * 3 and len(model.backbone.early.down) == 4


def test_chosen_features_are_those_that_are_merged(stream) -> None:
    model = vit(stream, depth=6)
    SHERLPlugin(features=[1, 3, 5]).prepare_model(model)
    x = torch.randn(2, 1, 4, 4)
    every, _ = model.backbone.host.shallow(model.backbone.trunk, x)
    chosen, last, _ = model.backbone.collect(x)
    assert len(chosen) == 3 and all(torch.equal(one, every[i]) for one, i in zip(chosen, (1, 3, 5), strict=True))
    assert torch.equal(last, every[5])


def test_initial_weights_follow_the_models_seed_and_leave_the_global_generator_alone(stream) -> None:
    def made(plugin: SHERLPlugin, seed: int) -> torch.Tensor:
        model = vit(stream, seed=seed)
        state = torch.get_rng_state()
        plugin.prepare_model(model)
        assert torch.equal(state, torch.get_rng_state())
        return model.backbone.early.down[0][0].weight

    assert torch.equal(made(SHERLPlugin(), 3), made(SHERLPlugin(), 3))
    assert not torch.equal(made(SHERLPlugin(), 3), made(SHERLPlugin(), 4))
    assert torch.equal(made(SHERLPlugin(seed=7), 3), made(SHERLPlugin(seed=7), 4))


# ---------------------------------------------------------------------- as a plug-in


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.backbone.trunk.state_dict().items()}


@pytest.mark.parametrize("host", ["naive", "replay", "er_ace", "lwf"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_training_leaves_the_backbone_bit_for_bit(made_up, host, kind) -> None:
    from contlearn import scenarios

    stream = scenarios.class_incremental(made_up(side=8), n_experiences=3)
    model = vit(stream) if kind == "vit" else models.create("slim_resnet18", stream, width=4, seed=0)
    options = {"memory_size": 8} if host in ("replay", "er_ace") else {}
    strategy = strategies.create(
        host, model, epochs=2, batch_size=8, lr=0.05, weight_decay=0.1, momentum=0.9, device="cpu",
        plugins=[SHERLPlugin()], **options,
    )  # fmt: skip
    before, early = frozen(model), model.backbone.early.down[0][0].weight.clone()
    result = run(strategy, stream, quiet=True)
    after = frozen(strategy.model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(early, strategy.model.backbone.early.down[0][0].weight)
    assert strategy.model.backbone.early.p.item() != 0
    trained = sum(p.numel() * 4 for p in strategy.model.parameters() if p.requires_grad)
    assert result.memory["trainable_weights"] == trained < result.memory["weights"]


def test_a_run_that_was_stopped_ends_with_the_same_bits(stream, tmp_path, watch) -> None:
    def made(*more: Any) -> Any:
        options = {"epochs": 3, "batch_size": 8, "lr": 0.02, "optimizer": "adamw", "device": "cpu"}
        return strategies.create("naive", vit(stream), plugins=[SHERLPlugin(), *more], **options)

    whole = made()
    run(whole, stream, out=tmp_path / "whole", quiet=True)

    def stop(strategy: Any) -> None:
        if strategy.clock.train_iterations == 8:
            strategy.interrupt = True

    with contextlib.suppress(BaseException):
        run(made(watch(before_update=stop)), stream, out=tmp_path / "halves", quiet=True)
    assert (tmp_path / "halves" / "checkpoint").is_dir()
    again = made(watch())
    run(again, stream, out=tmp_path / "halves", resume=True, quiet=True)
    first, second = whole.model.state_dict(), again.model.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def test_preparing_twice_is_preparing_once(stream) -> None:
    model = vit(stream)
    plugin = SHERLPlugin()
    plugin.prepare_model(model)
    held = model.backbone
    plugin.prepare_model(model)
    assert model.backbone is held


def mlp_with_head(stream: Any) -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), GrowingHead(8), feature_dim=8)


def unshaped(stream: Any) -> Any:
    model = models.create("slim_resnet18", SimpleNamespace(input_shape=(1, 8, 8), n_classes=2, task_labels=False))
    model.input_shape = None
    return model


@pytest.mark.parametrize(
    ("options", "made", "said"),
    [
        ({}, mlp_with_head, "sherl: backbone Sequential has no structure known to side tuning; expected one of: timm"),
        ({}, lambda stream: nn.Linear(2, 2), "sherl: Linear has no backbone to keep frozen; expected a model of"),
        ({}, unshaped, "does not say the shape of its images, expected model.input_shape"),
        ({}, lambda stream: vit(stream, depth=1), "gives 1 feature in front of its last block, expected at least 2"),
        ({"features": [0, 1]}, vit, "features: expected at least two positions in 0..2, 2 (the guide) among them"),
        ({"late": "blok"}, None, "unknown late 'blok'; did you mean 'block'?"),
        ({"redundancy": "detach"}, None, "did you mean 'detached'?"),
        ({"residual": "gate"}, None, "unknown residual 'gate'"),
        ({"width": 0}, None, "width: expected a whole number of at least 1, or none, got 0"),
        ({"temperature": 0.0}, None, "temperature: expected more than 0, got 0.0"),
        ({"dropout": 1.0}, None, "dropout: expected 0 or more and less than 1, got 1.0"),
        ({"seed": -1}, None, "seed: expected 0..2**63-1, got -1"),
    ],
)
def test_mistakes_get_one_line(stream, options, made: Callable[[Any], Any] | None, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        plugin = SHERLPlugin(**options)
        if made is not None:
            plugin.prepare_model(made(stream))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_that_was_not_prepared_or_belongs_to_another_method(stream) -> None:
    strategy = strategies.create("naive", vit(stream), device="cpu")
    strategy.plugins.append(SHERLPlugin())
    with pytest.raises(ContlearnError, match=r"sherl: the model was not prepared; call plugin\.prepare_model"):
        strategy.train(stream.train_stream[0], eval_streams=[])
    model = vit(stream)
    UniPTPlugin().prepare_model(model)
    with pytest.raises(ContlearnError, match="sherl: the backbone is that of UniPT already"):
        SHERLPlugin().prepare_model(model)
    images = SimpleNamespace(input_shape=(1, 8, 8), n_classes=2, task_labels=False)
    with pytest.raises(ContlearnError, match="sherl: down 'gated' is for transformers; expected 'linear' on a CNN"):
        SHERLPlugin(down="gated").prepare_model(models.create("slim_resnet18", images, width=4))
