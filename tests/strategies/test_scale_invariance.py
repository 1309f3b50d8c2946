"""Degrees of homogeneity read off a graph, against scaling the weights and looking at what comes out."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.strategies.norm_layers import RMSNormalisation
from contlearn.strategies.scale_invariance import Statistic, analyse, degrees

WIDTH = 6


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def random_net(seed: int) -> nn.Module:
    """Twelve layers drawn at random; a bias is never followed by a BatchNorm, which would cancel it."""
    draw = random.Random(seed)
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH, bias=False)]
    for _ in range(11):
        kind = draw.choice(["linear", "biased", "layer", "batch", "rms", "plain", "relu", "leaky", "gelu", "residual"])
        if kind == "linear":
            layers.append(nn.Linear(WIDTH, WIDTH, bias=False))
        elif kind == "biased":
            layers += [nn.Linear(WIDTH, WIDTH), draw.choice([nn.LayerNorm(WIDTH), nn.GELU(), nn.LeakyReLU()])]
        elif kind == "layer":
            layers.append(nn.LayerNorm(WIDTH))
        elif kind == "plain":
            layers.append(nn.LayerNorm(WIDTH, elementwise_affine=False))
        elif kind == "rms":
            layers.append(draw.choice([RMSNormalisation(WIDTH), nn.RMSNorm(WIDTH)]))
        elif kind == "batch":
            layers += [nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH)]
        elif kind == "residual":
            inner: list[nn.Module] = [nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()]
            layers.append(Residual(nn.Sequential(*inner[: draw.choice([1, 2])])))
        else:
            layers.append({"relu": nn.PReLU(), "leaky": nn.LeakyReLU(), "gelu": nn.GELU()}[kind])
    if draw.random() < 0.6:
        layers.append(nn.LayerNorm(WIDTH))
    net = nn.Sequential(*layers).double()
    torch.manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    without_epsilon(net)
    return net


def without_epsilon(net: nn.Module) -> nn.Module:
    """Scale invariance is exact only without the constant inside the root."""
    for module in net.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-30
    return net


@torch.no_grad()
def stays(net: nn.Module, names: tuple[str, ...], x: Tensor) -> bool:
    """Whether scaling the named parameters up or far down leaves the output in training mode as it is.

    Up alone would not tell: GELU of large numbers is ReLU, and next to them no bias is seen.
    """
    same = True
    for factor in (3.0, 1e-5):
        scaled = copy.deepcopy(net)
        for name in names:
            scaled.get_parameter(name).mul_(factor)
        same &= torch.allclose(copy.deepcopy(net).train()(x), scaled.train()(x), rtol=1e-7, atol=1e-9)
    return same


def test_the_analysis_agrees_with_scaling_the_weights_of_random_networks() -> None:
    met = {True: 0, False: 0}
    for seed in range(24):
        net = random_net(seed)
        x = torch.randn(16, WIDTH, dtype=torch.float64)
        found = analyse(net, input_shape=(WIDTH,))
        assert [group.parameters[0] for group in found.matrices] == [
            name for name, p in net.named_parameters() if p.ndim >= 2
        ]
        for group in (*found.matrices, *found.pairs):
            assert group.invariant == stays(net, group.parameters, x), (seed, group, net)
            met[group.invariant] += 1
    assert min(met.values()) > 30  # both answers are common


@torch.no_grad()
def test_batch_norm_statistics_follow_with_the_degree_their_input_has() -> None:
    """Two convolutions in a row: the BatchNorm sees degree 1 in each, and 2 in both together."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4),
    )  # fmt: skip
    without_epsilon(net.double())
    x = torch.randn(8, 2, 5, 5, dtype=torch.float64)
    for _ in range(3):
        net(x)
    net.eval()
    for names, expected in (
        (("0.weight",), [Statistic("2.running_mean", "2.running_var", 1.0)]),
        (("0.weight", "1.weight"), [Statistic("2.running_mean", "2.running_var", 2.0)]),
        (("4.weight",), [Statistic("5.running_mean", "5.running_var", 1.0)]),
        (("2.weight", "2.bias"), [Statistic("5.running_mean", "5.running_var", 1.0)]),
    ):
        (group,) = degrees(net, [names], input_shape=(2, 5, 5))
        assert group.invariant and list(group.statistics) == expected
        scaled = copy.deepcopy(net)
        for name in names:
            scaled.get_parameter(name).mul_(5.0)
        assert not torch.allclose(scaled(x), net(x), rtol=1e-3)
        for one in group.statistics:
            scaled.get_buffer(one.mean).mul_(5.0**one.degree)
            scaled.get_buffer(one.variance).mul_(25.0**one.degree)
        torch.testing.assert_close(scaled(x), net(x))


class Made(nn.Module):
    """A matrix ``w``, a scale ``a`` and whatever is done with them."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
        self.a = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.made = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.made(x, self.w, self.a)


def written_out(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
    return (x - mean) * torch.rsqrt(variance + 1e-12)


@pytest.mark.parametrize(
    ("forward", "invariant"),
    [
        (lambda x, w, a: written_out(x @ w), True),
        (lambda x, w, a: (x @ w) / ((x @ w).pow(2).mean(-1, keepdim=True) + 1e-12).sqrt(), True),
        (lambda x, w, a: F.normalize(x @ w, dim=-1), True),
        (lambda x, w, a: F.linear(x, F.normalize(w, dim=1)), True),  # a normalised weight
        (lambda x, w, a: F.batch_norm(x @ w, None, None, training=True, eps=1e-12), True),
        (lambda x, w, a: (x @ w).softmax(-1), False),
        (lambda x, w, a: written_out(x @ w).softmax(-1) @ a.diag(), True),
        (lambda x, w, a: written_out(x @ w + a), False),  # the bias was not removed
        (lambda x, w, a: written_out(x @ w) + 1e-12 * w.sum(), False),
        (lambda x, w, a: written_out(torch.cat([x @ w, (x @ w).abs()], -1)), True),
        (lambda x, w, a: written_out(torch.cat([x @ w, x], -1)), False),
        (lambda x, w, a: written_out(torch.cat([x @ w, torch.zeros_like(x)], -1)), True),
        (lambda x, w, a: written_out((x @ w).clamp(min=0)), True),
        (lambda x, w, a: written_out((x @ w).clamp(min=0, max=1)), False),
        (lambda x, w, a: written_out((x @ w).relu() @ w), True),  # used twice
        (lambda x, w, a: written_out(x @ w + x @ w @ w), False),
        (lambda x, w, a: written_out(torch.maximum(x @ w, 2 * (x @ w))), True),
        (lambda x, w, a: written_out((x @ w).erfinv()), False),
        (lambda x, w, a: written_out(x * 2), False),  # never used
        (lambda x, w, a: ((x @ w) > 0).double(), False),  # no rule: the safe side
        (lambda x, w, a: (x @ w) / ((x @ w) + 1e-4), False),  # no second moment: 1e-4 is no epsilon
    ],
)
def test_rules_of_single_operators(forward, invariant) -> None:
    net = Made(forward)
    (group,) = degrees(net, [("w",)], input_shape=(WIDTH,))
    assert group.invariant is invariant


def test_a_tied_weight_counts_once_and_with_all_its_uses() -> None:
    first, second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
    second.weight = first.weight
    found = analyse(nn.Sequential(first, nn.LayerNorm(WIDTH), second), input_shape=(WIDTH,))
    assert [(g.parameters, g.invariant) for g in found.matrices] == [(("0.weight",), False)]
    found = analyse(nn.Sequential(first, nn.LayerNorm(WIDTH), second, nn.LayerNorm(WIDTH)), input_shape=(WIDTH,))
    assert [(g.parameters, g.invariant) for g in found.matrices] == [(("0.weight",), True)]


def test_a_frozen_batch_norm_does_not_make_its_input_invariant() -> None:
    class Fixed(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> nn.Module:
            return super().train(False)

    for norm, invariant in ((nn.BatchNorm2d(4), True), (Fixed(4).eval(), False)):
        net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), norm)
        assert analyse(net, input_shape=(1, 5, 5)).matrices[0].invariant is invariant


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_looking_leaves_the_model_and_the_random_numbers_as_they_are(name) -> None:
    spec = SimpleNamespace(input_shape=(3, 32, 32), n_classes=2, task_labels=False)
    model = models.create(name, spec, seed=0)
    model.backbone.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    analyse(model)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_that_cannot_be_traced_gets_one_line() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w if float(x.sum()) > 0 else x

    with pytest.raises(ContlearnError, match="Stubborn cannot be traced"):
        analyse(Stubborn(), input_shape=(3,))
    with pytest.raises(ContlearnError, match="input_shape: Stubborn does not say what it takes"):
        analyse(Stubborn())
