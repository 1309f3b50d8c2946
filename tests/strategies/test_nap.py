"""Normalize-and-project: the function stays, the norms stay, the learning rate follows its schedule."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from avalanche.training.supervised import Naive as AvalancheNaive
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn import models, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory.account import snapshot
from contlearn.state import Decoder, Encoder, Samples
from contlearn.strategies.naive import Naive
from contlearn.strategies.nap import NaPPlugin
from contlearn.strategies.norm_log import NormLog, Reference

SPEC = SimpleNamespace(input_shape=(3, 32, 32), n_classes=4, task_labels=False)
NETWORKS = {  # model: projected matrices, rescaled pairs
    "mlp": (3, 2),
    "resnet20": (19, 9),
    "efficientnet_lite0": (49, 2),
    "vit_tiny_patch16_224": (12, 12),
}


def prepared(name: str, **options) -> tuple[nn.Module, NaPPlugin]:
    shape = {"hidden_layers": 3, "dropout": 0.0} if name == "mlp" else {}
    model = models.create(name, SPEC, seed=0, head="fixed", **shape)
    plugin = NaPPlugin(**options)
    plugin.prepare_model(model)
    return model, plugin


def norms(model: nn.Module, names) -> list[float]:
    return [math.sqrt(float(model.get_parameter(name).detach().double().pow(2).sum())) for name in names]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits in training and in evaluation mode; the model is left as it is."""
    found = []
    with torch.no_grad():
        for training in (True, False):
            found.append(copy.deepcopy(model).double().train(training)(x.double()))
    return found


def change(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest change of a logit, relative to the largest logit."""
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def blown_up(name: str) -> tuple[nn.Module, NaPPlugin, Tensor]:
    """A prepared network away from its initial point, every projected group 0.5 to 4 times too large.

    The constants inside the roots of the normalisations are taken out: with them, scale invariance is approximate.
    """
    model, plugin = prepared(name)
    draw = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    for group in [*((name,) for name in plugin.projected), *plugin.rescaled]:
        factor = float(torch.empty(1).uniform_(0.5, 4.0, generator=draw))
        for one in group:
            parameters[one].mul_(factor)
    for module in model.modules():
        if isinstance(getattr(module, "eps", None), float):
            module.eps = 1e-14
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.9
    x = torch.rand(8, 3, 32, 32, generator=draw)
    for _ in range(2):
        model.train()(x)
    return model, plugin, x


@pytest.mark.parametrize("name", NETWORKS)
def test_projecting_leaves_the_function_as_it_is_in_both_modes(name) -> None:
    model, plugin, x = blown_up(name)
    assert (len(plugin.projected), len(plugin.rescaled)) == NETWORKS[name]
    before = outputs(model, x)
    plugin.project(model)
    assert change(before, outputs(model, x)) < 1e-4
    # The same measure sees what must not be projected: the output layer, ...
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.head.weight.mul_(1.5)
    assert change(before, outputs(wrong, x)) > 0.1
    # ... and running statistics that do not follow.
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            wrong.get_parameter(plugin.projected[0]).mul_(1.5)
        train, evaluation = (change([a], [b]) for a, b in zip(before, outputs(wrong, x), strict=True))
        assert train < 1e-4 and evaluation > 1e-3


def test_projecting_a_layer_without_a_norm_behind_it_changes_the_function() -> None:
    model, plugin, x = blown_up("vit_tiny_patch16_224")
    before = outputs(model, x)
    matrices = [name for name, p in model.backbone.named_parameters("backbone") if p.ndim >= 2]
    free = [name for name in matrices if name not in plugin.projected]
    assert "backbone.patch_embed.proj.weight" in free and "backbone.blocks.0.attn.qkv.weight" in free
    for name in [name for name in free if name.endswith("weight")][:4]:
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            wrong.get_parameter(name).mul_(1.5)
        assert change(before, outputs(wrong, x)) > 1e-4, name


def test_after_real_steps_the_usual_constants_in_the_roots_do_little() -> None:
    for name in ("mlp", "resnet20"):
        model, plugin = prepared(name, every=0)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 4
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        targets = plugin.rho[: len(plugin.projected)].tolist()
        growth = [now / then - 1 for now, then in zip(norms(model, plugin.projected), targets, strict=True)]
        assert max(map(abs, growth)) > 0.002
        before = outputs(model, x)
        plugin.project(model)
        assert norms(model, plugin.projected) == pytest.approx(targets, rel=1e-5)
        assert change(before, outputs(model, x)) < 1e-3


def trained(stream, plugin, model, *, lr: float = 0.05):
    strategy = Naive(model=model, plugins=[plugin], lr=lr, epochs=2, batch_size=5, device="cpu")
    strategy.generator.manual_seed(0)
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def test_norms_are_kept_every_nth_step_and_the_head_grows_freely(stream, small, watch) -> None:
    seen: list[list[float]] = []
    plugin, model = NaPPlugin(every=3, affine="free"), small(stream, hidden_layers=3)
    before = norms(model, names := [f"backbone.layers.{i}.0.weight" for i in range(3)])
    strategy = Naive(model=model, lr=0.3, epochs=1, batch_size=5, device="cpu",
                     plugins=[plugin, watch(after_update=lambda s: seen.append(norms(s.model, names)))])  # fmt: skip
    head = []
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        head.append(norms(model, ["head.weight"])[0])
    assert plugin.projected == names and plugin.steps == len(seen) == 12
    for step, now in enumerate(seen, 1):
        assert (now == pytest.approx(before, rel=1e-5)) == (step % 3 == 0)
    assert head[0] < head[1] < head[2] and model.head.out_features == 6


def test_normalisation_alone_never_projects(stream, small) -> None:
    plugin, model = NaPPlugin(every=0), small(stream)
    before = norms(model, ["backbone.layers.0.0.weight"])
    trained(stream, plugin, model, lr=0.3)
    assert plugin.projected == ["backbone.layers.0.0.weight"]
    assert norms(model, plugin.projected)[0] > 1.01 * before[0]


def test_avalanches_own_strategy_is_a_host(stream, small, quiet) -> None:
    plugin, model = NaPPlugin(), small(stream, hidden_layers=2)
    with pytest.raises(ContlearnError, match="nap: the model was not prepared; call plugin"):
        AvalancheNaive(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3), plugins=[NaPPlugin()], evaluator=quiet()
        ).train(stream.train_stream[0])
    plugin.prepare_model(model)
    before = norms(model, plugin.projected)
    strategy = AvalancheNaive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.3), plugins=[plugin], evaluator=quiet(),
        train_mb_size=5,
    )  # fmt: skip
    for experience in stream.train_stream:
        strategy.train(experience)
    assert norms(model, plugin.projected) == pytest.approx(before, rel=1e-5)


def test_frozen_weights_keep_their_bits(stream, small) -> None:
    plugin, model = NaPPlugin(), small(stream, hidden_layers=2)
    plugin.prepare_model(model)
    frozen = model.backbone.layers[0][0].weight
    with torch.no_grad():
        frozen.mul_(1.7)
    frozen.requires_grad_(False)
    bits = frozen.clone()
    plugin.project(model)
    assert torch.equal(bits, frozen)


# ---------------------------------------------------------------- scale and offset


def test_pairs_are_rescaled_jointly_pulled_or_fixed(stream, small) -> None:
    def pair(model: nn.Module, layer: int) -> tuple[Tensor, Tensor]:
        norm = model.backbone.layers[layer][1].norm
        return norm.weight.detach(), norm.bias.detach()

    model, plugin = small(stream, hidden_layers=2), NaPPlugin(affine_decay=0.0)
    trained(stream, plugin, model, lr=0.3)
    # Behind the first norm: ReLU, a weight, another norm. Behind the second: ReLU and the output layer.
    assert plugin.rescaled == [("backbone.layers.0.1.norm.weight", "backbone.layers.0.1.norm.bias")]
    a, b = pair(model, 0)
    assert float(b.abs().max()) > 0.01 and float((a**2).sum() + (b**2).sum()) == pytest.approx(8.0, rel=1e-5)
    a, b = pair(model, 1)
    assert abs(float((a**2).sum() + (b**2).sum()) - 8.0) > 0.05

    model, plugin = small(stream, hidden_layers=2), NaPPlugin(affine="fixed")
    trained(stream, plugin, model, lr=0.3)
    for layer in (0, 1):
        a, b = pair(model, layer)
        assert torch.equal(a, torch.ones(8)) and torch.equal(b, torch.zeros(8))
    assert plugin.rescaled == [] and plugin.anchors == {}


def test_a_pair_is_pulled_by_lr_times_decay_of_its_distance(stream, small, watch) -> None:
    model, plugin = small(stream), NaPPlugin(affine_decay=0.5)
    plain: list[Tensor] = []
    norm = lambda: model.backbone.layers[0][1].norm  # noqa: E731
    strategy = Naive(model=model, lr=0.2, batch_size=5, device="cpu", plugins=[
        watch(after_update=lambda s: plain.append(norm().weight.detach().clone())), plugin,
        watch(after_update=lambda s: plain.append(norm().weight.detach().clone())),
    ])  # fmt: skip
    strategy.train(stream.train_stream[0], eval_streams=[])
    for before, after in zip(plain[::2], plain[1::2], strict=True):
        torch.testing.assert_close(after, before - 0.2 * 0.5 * (before - 1.0))
    assert float((plain[0] - plain[1]).abs().max()) > 1e-4


# ---------------------------------------------------------------- schedules


def rates_of(stream, small, watch, plugin) -> tuple[list[float], list[float]]:
    """Learning rate at the optimizer's step, and after it."""
    during, after = [], []
    model = small(stream)
    watching = watch(after_update=lambda s: after.append(s.optimizer.param_groups[0]["lr"]))
    strategy = Naive(model=model, lr=0.2, batch_size=4, device="cpu", plugins=[plugin, watching])
    strategy.optimizer.register_step_pre_hook(lambda optimizer, *_: during.append(optimizer.param_groups[0]["lr"]))
    for experience in stream.train_stream[:2]:
        strategy.train(experience, eval_streams=[])
    return during, after


def test_linear_falls_over_the_whole_run_and_the_rate_is_put_back(stream, small, watch) -> None:
    plugin = NaPPlugin(rate="linear", total_steps=5, final_factor=0.5)
    during, after = rates_of(stream, small, watch, plugin)
    assert during == pytest.approx([0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.1, 0.1])
    assert after == [0.2] * 8


def test_the_reference_schedule_follows_the_norms_of_the_other_run(stream, small, watch, tmp_path) -> None:
    path = tmp_path / "reference.json"
    log = NormLog(["a", "b"], size=4)
    log.add(0, 0.1, torch.tensor([3.0, 4.0]))  # 5 together
    log.add(4, 0.1, torch.tensor([6.0, 8.0]))  # 10
    log.write(path)
    growth = [1, 1.25, 1.5, 1.75, 2, 2, 2, 2]  # linear in between, and the last one stays
    for power in (1, 2):
        plugin = NaPPlugin(rate="reference", reference=str(path), reference_power=power)
        during, _ = rates_of(stream, small, watch, plugin)
        assert during == pytest.approx([0.2 / times**power for times in growth])


def test_a_factor_for_each_layer_scales_that_layers_own_step(stream, small, watch, tmp_path) -> None:
    names = [f"backbone.layers.{i}.0.weight" for i in range(2)]
    path = tmp_path / "reference.json"
    log = NormLog(names, size=4)
    log.add(0, 0.1, torch.tensor([1.0, 1.0]))
    log.add(1, 0.1, torch.tensor([2.0, 4.0]))
    log.write(path)
    plugin = NaPPlugin(every=0, rate="reference", reference=str(path), reference_scale="layer", affine="free")
    model = small(stream, hidden_layers=2)
    seen: list[dict[str, Tensor]] = []

    def note(strategy) -> None:
        seen.append({n: p.detach().clone() for n, p in strategy.model.named_parameters()})
        seen.append({n: p.grad.clone() for n, p in strategy.model.named_parameters()})

    strategy = Naive(model=model, lr=0.5, batch_size=4, device="cpu", plugins=[watch(before_update=note), plugin])
    strategy.train(stream.train_stream[0], eval_streams=[])
    before, gradient, after = seen[2:5]  # the second step, made after one update
    for name, old in before.items():
        factor = {names[0]: 1 / 2, names[1]: 1 / 4}.get(name, 1.0)
        torch.testing.assert_close(after[name] - old, -0.5 * factor * gradient[name], atol=1e-6, rtol=1e-4)


def test_a_recorded_run_is_a_reference_for_the_next(stream, small, tmp_path) -> None:
    path = tmp_path / "norms.json"
    first, model = NaPPlugin(every=0, record=str(path)), small(stream, hidden_layers=2)
    start = norms(model, [f"backbone.layers.{i}.0.weight" for i in range(2)])
    trained(stream, first, model, lr=0.3)
    end = norms(model, first.projected)
    reference = Reference(path)
    assert reference.names == first.projected and reference.steps == list(range(first.steps + 1))
    assert reference.norms[0] == pytest.approx(start) and reference.norms[-1] == pytest.approx(end)
    assert reference.factors(first.steps, [1], power=2) == pytest.approx([(start[1] / end[1]) ** 2])
    second = NaPPlugin(rate="reference", reference=str(path), reference_scale="layer")
    trained(stream, second, small(stream, hidden_layers=2), lr=0.3)
    other = NaPPlugin(rate="reference", reference=str(path), reference_scale="layer")
    with pytest.raises(ContlearnError, match=r"no norms of 'backbone.layers.2.0.weight'; the nearest is 'backbone.lay"):
        other.prepare_model(small(stream, hidden_layers=3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ({"format": "?"}, "is not a norm log"),
        ({"schema": 2}, "has schema 2, expected 1"),
        ({"steps": [3, 0]}, "is damaged"),
        ({"norms": [[1.0], [0.0]]}, "is damaged"),
        ({"norms": [[1.0]]}, "is damaged"),
        ({"norms": [[1.0], ["x"]]}, "is damaged"),
        ({"matrices": []}, "is damaged"),
    ],
)
def test_references_that_are_none(tmp_path, change, said) -> None:
    path = tmp_path / "reference.json"
    log = NormLog(["a"], size=4)
    log.add(0, 0.1, torch.ones(1))
    log.add(1, 0.1, torch.ones(1))
    log.write(path)
    if change is None:
        path.unlink()
    else:
        path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ContlearnError, match=f"reference: .*{said}") as caught:
        NaPPlugin(rate="reference", reference=str(path))
    assert "\n" not in str(caught.value)


def test_the_log_stays_small_and_evenly_spaced() -> None:
    log = NormLog(["a"], size=8)
    for step in range(101):
        if log.due(step):
            log.add(step, 0.5, torch.tensor([float(step + 1)]))
    steps = log.steps[: log.count].tolist()
    assert steps == list(range(0, 101, 16)) and log.stride == 16
    assert log.norms[: log.count, 0].tolist() == [step + 1 for step in steps]
    torch.testing.assert_close(log.effective_rates(2)[:, 0], torch.tensor([0.5 / (s + 1) ** 2 for s in steps]))


# ---------------------------------------------------------------- state


def test_a_stored_run_goes_on_with_the_same_bits(small, made_up) -> None:
    stream = scenarios.class_incremental(made_up(side=8), n_experiences=2)

    def fresh():
        plugin = NaPPlugin(every=2, rate="linear", total_steps=9, final_factor=0.1)
        model = models.create("resnet14", stream, seed=0)
        strategy = Naive(model=model, plugins=[plugin], lr=0.05, batch_size=9, optimizer="adam", device="cpu")
        strategy.generator.manual_seed(3)
        return strategy, plugin

    strategy, plugin = fresh()
    strategy.train(stream.train_stream[0], eval_streams=[])
    encoder = Encoder(strategy, Samples(stream))
    state, tensors = json.loads(json.dumps(encoder.strategy_state())), load(save(encoder.tensors))
    again, other = fresh()
    other.before_training(again)  # the tensors were looked up before the checkpoint replaced the buffers
    Decoder(again, Samples(stream), tensors).strategy_state(state, experiences_done=[stream.train_stream[0]])
    assert other.steps == plugin.steps == 3
    for one in (strategy, again):
        torch.manual_seed(5)
        one.train(stream.train_stream[1], eval_streams=[])
    left, right = strategy.model.state_dict(), again.model.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert torch.equal(plugin.log.norms, other.log.norms) and plugin.steps == other.steps == 6
    assert torch.equal(plugin.log.rates, other.log.rates)


def test_what_is_held_is_named_in_the_account(stream, small) -> None:
    plugin, model = NaPPlugin(log_size=16), small(stream, hidden_layers=2)
    strategy = trained(stream, plugin, model)
    state = snapshot(strategy).method_state
    assert state["target_norms"] == 4 * 3  # two matrices, one pair
    assert state["affine_anchor"] == 4 * 16 and state["norm_log"] == 16 * (8 + 4 + 4 * 2)
    assert set(state) == {"target_norms", "affine_anchor", "norm_log"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": -1}, "every: expected at least 0, got -1"),
        ({"norm": "batch"}, "norm: expected layer or rms, got 'batch'"),
        ({"affine": "free "}, "affine: expected rescale or fixed or free"),
        ({"rate": "cosine"}, "rate: expected constant or linear or reference"),
        ({"rate": "linear"}, "total_steps: belongs to rate linear and to it alone, got None"),
        ({"total_steps": 5}, "total_steps: belongs to rate linear"),
        ({"rate": "reference"}, "reference: belongs to rate reference"),
        ({"log_size": 0, "record": "x.json"}, "log_size: expected at least 4, or 0 without record, got 0"),
        ({"reference_power": 3}, "reference_power: expected 1 or 2, got 3"),
    ],
)
def test_mistakes_get_one_line(options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        NaPPlugin(**options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
