"""L2 and online EWC on the encoder: against plain loops and closed forms, and what they leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from avalanche.training.supervised import Naive as AvalancheNaive
from torch import nn

from contlearn import models, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory.account import snapshot
from contlearn.strategies.naive import Naive
from contlearn.strategies.penalties import L2Plugin, OnlineEWCPlugin, encoder_parameters, fisher_diagonal, quadratic
from contlearn.strategies.rehearsal_free import RehearsalFree

SOON = {"lr": 0.1, "epochs": 2, "batch_size": 5, "device": "cpu"}


def train(strategy, stream):
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def encoder(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith("head.")}


def pull(model: nn.Module, anchor, importance=None) -> float:
    """Sum of importance * (weight - anchor)**2 outside the head, one number at a time."""
    total = 0.0
    for name, now in encoder(model).items():
        weights = torch.ones_like(now) if importance is None else importance[name]
        rows = zip(now.flatten().tolist(), anchor[name].flatten().tolist(), weights.flatten().tolist(), strict=True)
        total += sum(w * (a - b) ** 2 for a, b, w in rows)
    return total


# ---------------------------------------------------------------- the quadratic form


@pytest.mark.parametrize("weighted", [False, True])
def test_the_quadratic_form_and_its_gradient(weighted) -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = [(3, 2), (4,), ()]
    now = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    then = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    weights = [torch.rand(shape, generator=draw, dtype=torch.float64) for shape in shapes] if weighted else []
    factors = weights or [torch.ones(shape, dtype=torch.float64) for shape in shapes]
    plain = 0.7 * sum((w * (a - b) ** 2).sum() for a, b, w in zip(now, then, factors, strict=True))
    expected = torch.autograd.grad(3 * plain, now)
    value = quadratic(0.7, now, then, weights)
    assert value.item() == pytest.approx(plain.item(), rel=1e-12)
    for found, wanted in zip(torch.autograd.grad(3 * value, now), expected, strict=True):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------- L2


@pytest.mark.parametrize("anchor", ["previous", "initial"])
def test_l2_pulls_from_the_first_experience_towards_its_anchor(stream, small, watch, anchor) -> None:
    model = small(stream)
    initial = encoder(model)
    anchors, penalties = [initial], []

    def check(strategy) -> None:
        task = F.cross_entropy(strategy.mb_output, strategy.mb_y).item()
        penalty = 0.5 * pull(strategy.model, anchors[-1])
        assert strategy.loss.item() == pytest.approx(task + penalty, rel=1e-4, abs=1e-6)
        penalties.append(strategy.loss.item() - task)

    def consolidate(strategy) -> None:
        if anchor == "previous":
            anchors.append(encoder(strategy.model))

    plugins = [L2Plugin(coefficient=0.5, anchor=anchor), watch(before_backward=check, after_training_exp=consolidate)]
    train(Naive(model=model, plugins=plugins, **SOON), stream)
    per_experience = len(penalties) // 3
    starts = [penalties[i * per_experience] for i in range(3)]
    assert starts[0] == 0.0 and penalties[1] > 0  # active in the first experience, at its anchor zero
    assert (starts[1:] == [0.0, 0.0]) == (anchor == "previous")


def test_l2_gradient_is_zero_at_the_start_and_two_c_times_the_distance_after(stream, small, watch) -> None:
    model = small(stream)
    initial, steps = encoder(model), []

    def compare(strategy) -> None:
        plain = torch.autograd.grad(
            F.cross_entropy(strategy.model(strategy.mb_x), strategy.mb_y), list(strategy.model.parameters())
        )
        for (name, parameter), task in zip(strategy.model.named_parameters(), plain, strict=True):
            extra = parameter.grad - task
            if name.startswith("head.") or not steps:
                assert torch.equal(extra, torch.zeros_like(extra))
            else:
                torch.testing.assert_close(extra, 2 * 0.3 * (parameter - initial[name]).detach(), atol=1e-6, rtol=1e-4)
        steps.append(1)

    strategy = Naive(model=model, plugins=[L2Plugin(coefficient=0.3), watch(after_backward=compare)], **SOON)
    strategy.train(stream.train_stream[0], eval_streams=[])
    assert len(steps) > 2


def test_only_what_trains_and_is_asked_for_is_pulled(stream, small) -> None:
    model = small(stream, hidden_layers=2)
    assert {n for n, _ in encoder_parameters(model)} == set(encoder(model))
    model.backbone.layers[0][0].bias.requires_grad_(False)
    assert "backbone.layers.0.0.bias" not in dict(encoder_parameters(model))
    assert list(dict(encoder_parameters(model, ["*.1.*weight"]))) == ["backbone.layers.1.0.weight"]
    foreign = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))  # no head: all but the last linear layer
    assert list(dict(encoder_parameters(foreign))) == ["0.weight", "0.bias"]
    with pytest.raises(ContlearnError, match=r"'backbone.layer.0.weight' matches no parameter.*did you mean"):
        list(encoder_parameters(model, ["backbone.layer.0.weight"]))
    with pytest.raises(ContlearnError, match="no classifier"):
        list(encoder_parameters(nn.Conv2d(1, 1, 1)))


def test_a_parameter_that_appears_or_grows_is_free_until_the_anchor_moves(stream, small, watch) -> None:
    model = small(stream)
    plugin = L2Plugin(coefficient=1.0)
    extra = []

    def grow(strategy) -> None:
        if strategy.clock.train_exp_counter == 1:
            old = strategy.model.backbone.psi
            grown = nn.Parameter(torch.cat([old.detach() + 1, torch.tensor([5.0, 7.0])]))
            strategy.model.backbone.psi = grown
            strategy.model.backbone.register_parameter("late", nn.Parameter(torch.ones(3)))

    def note(strategy) -> None:
        if strategy.clock.train_exp_counter == 1 and strategy.clock.train_exp_iterations == 0:
            extra.append(strategy.loss.item() - F.cross_entropy(strategy.mb_output, strategy.mb_y).item())
            found = torch.autograd.grad(strategy.loss, strategy.model.backbone.psi, retain_graph=True)
            assert torch.equal(found[0], torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0]))

    model.backbone.register_parameter("psi", nn.Parameter(torch.zeros(3)))
    plugins = [watch(before_training_exp=grow), plugin, watch(before_backward=note)]
    train(Naive(model=model, plugins=plugins, **SOON), stream)
    assert extra == [pytest.approx(3.0, rel=1e-5)]  # three rows moved by 1 each; the two new ones and `late` are free
    assert plugin.anchors["backbone.psi"].shape == (5,) and "backbone.late" in plugin.anchors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2Plugin(coefficient=-1), "coefficient: expected at least 0, got -1"),
        (lambda: L2Plugin(coefficient=float("nan")), "coefficient: expected at least 0"),
        (lambda: L2Plugin(anchor="last"), "anchor: expected previous or initial, got 'last'"),
        (lambda: L2Plugin(parameters="*qkv*"), "parameters: expected a list"),
        (lambda: OnlineEWCPlugin(fisher="true"), "fisher: expected batch or sample, got 'true'"),
    ],
)
def test_bad_options_are_named(make, message) -> None:
    with pytest.raises(ContlearnError, match=message):
        make()


# ---------------------------------------------------------------- online EWC


class _Host:
    """What the Fisher pass asks of a strategy: a scalar logistic model and two classes."""

    device = torch.device("cpu")
    _criterion = nn.CrossEntropyLoss()

    def __init__(self, model, experience, batch_size):
        self.model, self.experience, self.train_mb_size = model, experience, batch_size


class _Logistic(nn.Module):
    """Logits (0, w * sum of pixels): the gradient of the cross-entropy by w is (sigmoid(w s) - y) s."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 1, bias=False)
        self.head = nn.Identity()
        with torch.no_grad():
            self.encoder.weight.fill_(0.4)

    def forward(self, x):
        score = self.encoder(x.flatten(1).sum(1, keepdim=True))
        return self.head(torch.cat([torch.zeros_like(score), score], 1))


def test_both_fisher_forms_in_closed_form(made_up) -> None:
    stream = scenarios.class_incremental(made_up(2, per_class=6), n_experiences=1)
    experience = stream.train_stream[0]
    model = _Logistic()
    sums = torch.stack([x.sum() for x, *_ in experience.dataset])
    labels = torch.tensor([y for _, y, *_ in experience.dataset], dtype=torch.float)
    gradients = ((0.4 * sums).sigmoid() - labels) * sums  # of each sample's loss by w
    named = dict(encoder_parameters(model))
    assert list(named) == ["encoder.weight"]

    sample = fisher_diagonal(_Host(model, experience, 5), named, "sample")["encoder.weight"].item()
    assert sample == pytest.approx(gradients.pow(2).mean().item(), rel=1e-4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    cut = gradients[order].split(5)  # two batches of 5 and one of 2: each counts by its own size
    expected = sum((part.mean() ** 2 * len(part)).item() for part in cut) / 3
    batch = fisher_diagonal(_Host(model, experience, 5), named, "batch", seed=7)["encoder.weight"].item()
    assert batch == pytest.approx(expected, rel=1e-4)
    # One sample per batch: the two forms are one.
    single = fisher_diagonal(_Host(model, experience, 1), named, "batch", seed=7)["encoder.weight"].item()
    assert single == pytest.approx(sample, rel=1e-4) and abs(batch - sample) > 0.01 * sample
    assert model.training  # left in the mode it was in


def test_the_per_sample_fisher_of_a_network_is_the_loops(made_up) -> None:
    stream = scenarios.class_incremental(made_up(4, per_class=10, side=8), n_experiences=2)
    model = models.create("slim_resnet18", stream, width=2, seed=0)
    strategy = RehearsalFree(model=model, class_loss="bce", lr=0.01, batch_size=15, device="cpu")
    experience = stream.train_stream[0]
    strategy.train(experience, eval_streams=[])
    strategy.experience = experience  # let go of when training ends
    found = fisher_diagonal(strategy, dict(encoder_parameters(model)), "sample")
    expected = {name: torch.zeros_like(value) for name, value in found.items()}
    model.eval()
    for x, y, *_ in experience.dataset:
        target = F.one_hot(torch.tensor([y]), 2).float()
        loss = 5 * F.binary_cross_entropy_with_logits(model(x[None])[:, [0, 1]], target)
        model.zero_grad()
        loss.backward()
        for name, value in expected.items():
            value += model.get_parameter(name).grad.pow(2) / 20
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("half", [True, False])
def test_ewc_adds_fishers_and_pulls_from_the_second_experience(stream, small, watch, half) -> None:
    plugin = OnlineEWCPlugin(coefficient=2.0, half=half)
    anchor, fishers, penalties = {}, [], []

    def check(strategy) -> None:
        task = F.cross_entropy(strategy.mb_output, strategy.mb_y).item()
        total = {n: sum(f[n] for f in fishers) for n in fishers[0]} if fishers else {}
        expected = (1.0 if half else 2.0) * pull(strategy.model, anchor, total) if fishers else 0.0
        assert strategy.loss.item() == pytest.approx(task + expected, rel=1e-4, abs=1e-6)
        penalties.append(strategy.loss.item() - task)

    def consolidate(strategy) -> None:
        model = copy.deepcopy(strategy.model).eval()
        classes = sorted(strategy.experience.classes_in_this_experience)
        found = {name: torch.zeros_like(value) for name, value in encoder(model).items()}
        samples = [(x, y) for x, y, *_ in strategy.experience.dataset.train()]
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(len(fishers)))
        cuts = order.split(5)
        for cut in cuts:
            x = torch.stack([samples[i][0] for i in cut.tolist()])
            y = torch.tensor([classes.index(samples[i][1]) for i in cut.tolist()])
            model.zero_grad()
            F.cross_entropy(model(x)[:, classes], y).backward()
            for name, value in found.items():
                value += model.get_parameter(name).grad ** 2 * len(cut) / len(cuts)
        fishers.append(found)
        anchor.update(encoder(strategy.model))

    strategy = Naive(
        model=small(stream, dropout=0.3),
        plugins=[watch(before_backward=check, after_training_exp=consolidate), plugin],
        **SOON,
    )
    strategy.plugins.sort(key=lambda p: p is not plugin)  # the penalty first, then what checks it
    train(strategy, stream)
    third = len(penalties) // 3
    assert penalties[:third] == [0.0] * third and penalties[third] == 0.0 and penalties[third + 2] > 0
    for name, value in plugin.importance.items():
        torch.testing.assert_close(value, sum(f[name] for f in fishers), rtol=1e-4, atol=1e-8)


def test_the_fisher_pass_leaves_the_training_order_alone(stream, small) -> None:
    def orders(*plugins):
        strategy = Naive(model=small(stream), plugins=list(plugins), **{**SOON, "lr": 0.0})
        strategy.generator.manual_seed(5)
        train(strategy, stream)
        return strategy.generator.get_state()

    assert torch.equal(orders(), orders(OnlineEWCPlugin(), L2Plugin()))


# ---------------------------------------------------------------- bytes, other hosts, attention only


def test_bytes_l2_is_one_encoder_and_ewc_two(stream, small) -> None:
    bytes_of = 4 * sum(value.numel() for value in encoder(small(stream)).values())
    l2 = train(Naive(model=small(stream), plugins=[L2Plugin()], **SOON), stream)
    assert snapshot(l2).method_state == {"anchor": bytes_of}
    ewc = train(Naive(model=small(stream), plugins=[OnlineEWCPlugin()], **SOON), stream)
    assert snapshot(ewc).method_state == {"anchor": bytes_of, "fisher": bytes_of}


@pytest.mark.parametrize("make", [lambda: L2Plugin(coefficient=3.0), lambda: OnlineEWCPlugin(coefficient=500.0)])
def test_avalanches_naive_takes_them(stream, small, quiet, make) -> None:
    def moved(*plugins):
        torch.manual_seed(0)
        model = small(stream, head="fixed")
        strategy = AvalancheNaive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=8,
            train_epochs=3,
            plugins=list(plugins),
            evaluator=quiet(),
        )
        before = []
        for index, experience in enumerate(stream.train_stream):
            if index == 2:
                before = encoder(model)
            strategy.train(experience, eval_streams=[])
        return pull(model, before)

    assert moved(make()) < 0.8 * moved()


@pytest.fixture
def attention(made_up):
    """Twelve images of 16x16 in two experiences, and a function that makes a tiny ViT of which the qkv train."""
    stream = scenarios.class_incremental(made_up(4, per_class=4, side=16), n_experiences=2)

    def make():
        return models.create(
            "vit_tiny_patch16_224", stream, seed=0, trainable=["qkv"], patch_size=8, embed_dim=24, depth=2, num_heads=2
        )

    return stream, make


def test_of_a_vision_transformer_only_qkv_moves_and_only_it_is_pulled(attention) -> None:
    stream, make = attention
    model = make()
    plugin = L2Plugin(coefficient=0.05)
    before = encoder(model)
    train(RehearsalFree(model=model, class_loss="ce_local", plugins=[plugin], **SOON), stream)
    changed = {name for name, value in encoder(model).items() if not torch.equal(value, before[name])}
    projections = {f"backbone.blocks.{i}.attn.qkv.{part}" for i in range(2) for part in ("weight", "bias")}
    assert changed == projections == set(plugin.anchors)


def test_the_qkv_of_a_vit_b_are_21261312_parameters() -> None:
    import timm

    from contlearn.models._selection import select_trainable

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    select_trainable(model, ["qkv"], model="vit_base_patch16_224")
    model.head = nn.Identity()
    assert sum(value.numel() for _, value in encoder_parameters(model)) == 21_261_312
