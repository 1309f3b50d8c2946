"""Where normalisations go, which biases go away, and what cannot be done."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.strategies.norm_layers import NormalisedActivation, ReusedNormalisedActivation, RMSNormalisation
from contlearn.strategies.normalise import insert_norms

SPEC = SimpleNamespace(input_shape=(3, 32, 32), n_classes=4, task_labels=False)


def layers(*made: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*made)


def test_a_norm_goes_in_front_of_every_activation_that_has_none() -> None:
    net = layers(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(),
        nn.Linear(16, 8), nn.LayerNorm(8), nn.Unflatten(1, (2, 4)), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 5), nn.Dropout(0.5), nn.Sigmoid(), nn.Linear(5, 2),
    )  # fmt: skip
    assert insert_norms(net, input_shape=(3, 6, 6)) == ["1", "13"]
    assert isinstance(net[1], NormalisedActivation) and isinstance(net[1].act, nn.ReLU)
    assert isinstance(net[1].norm, nn.GroupNorm) and (net[1].norm.num_groups, net[1].norm.num_channels) == (1, 4)
    assert isinstance(net[13].norm, nn.LayerNorm) and net[13].norm.normalized_shape == (5,)
    # What feeds a norm with an offset has lost its bias; the last layer keeps it.
    assert [net[i].bias is None for i in (0, 2, 6, 11, 14)] == [True, True, True, True, False]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_what_reaches_the_activations_is_normalised(norm) -> None:
    class Tokens(nn.Module):
        """(batch, 3, 4, 4) -> maps -> tokens (batch, 16, 6) -> vector."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act1 = nn.Conv2d(3, 6, 1), nn.ReLU()
            self.fc, self.act2 = nn.Linear(6, 5), nn.GELU()
            self.map, self.act3 = nn.Linear(5, 7), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act1(self.conv(x)).flatten(2).transpose(1, 2)
            x = self.act2(self.fc(x))
            return self.act3(self.map(x.view(-1, 4, 4, 5)))  # channels last: the Linear tells

    torch.manual_seed(0)
    net = Tokens()
    insert_norms(net, norm=norm, input_shape=(3, 4, 4))
    seen: dict[str, Tensor] = {}
    for name in ("act1", "act2", "act3"):
        getattr(net, name).act.register_forward_pre_hook(lambda _, x, name=name: seen.__setitem__(name, x[0]))
    net(torch.randn(5, 3, 4, 4) * 3 + 1)
    for name, dims in (("act1", (1, 2, 3)), ("act2", (2,)), ("act3", (3,))):
        x = seen[name]
        if norm == "layer":
            torch.testing.assert_close(x.mean(dims), torch.zeros_like(x.mean(dims)), atol=1e-5, rtol=0)
        power = x.pow(2).mean(dims)
        torch.testing.assert_close(power, torch.ones_like(power), atol=0.05, rtol=0)
    assert seen["act3"].shape == (5, 4, 4, 7)


def test_rms_is_its_formula_with_scale_and_offset_per_channel() -> None:
    torch.manual_seed(0)
    for channels_first, x in ((True, torch.randn(2, 3, 4, 5)), (False, torch.randn(2, 4, 3))):
        layer = RMSNormalisation(3, channels_first=channels_first)
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        y = layer(x)
        dim = 1 if channels_first else -1
        for sample, out in zip(x, y, strict=True):
            for channel in range(3):
                part, got = (t.select(dim - 1 if channels_first else -1, channel) for t in (sample, out))
                square = sample.pow(2).mean() if channels_first else sample.pow(2).mean(-1)
                root = (square + 1e-5).sqrt()
                torch.testing.assert_close(got, part / root * layer.weight[channel] + layer.bias[channel])


@pytest.mark.parametrize("name", ["mlp", "simple_cnn", "resnet20", "mobilenetv3_small_100", "vit_tiny_patch16_224"])
def test_doing_it_twice_changes_nothing(name) -> None:
    model = models.create(name, SPEC, seed=0)
    head = copy.deepcopy(model.head)
    state = torch.get_rng_state()
    once = insert_norms(model)
    assert torch.equal(state, torch.get_rng_state()) and all(module.training for module in model.modules())
    text, weights = repr(model), {key: value.clone() for key, value in model.state_dict().items()}
    assert once and insert_norms(model) == [] and repr(model) == text
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert repr(model.head) == repr(head)


def test_networks_that_are_normalised_already_keep_their_layers() -> None:
    model = models.create("wrn40_2", SPEC, seed=0)
    text = repr(model)
    assert insert_norms(model) == [] and repr(model) == text
    joined = layers(nn.Conv2d(3, 4, 3, bias=False), BatchNormAct2d(4), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert insert_norms(joined, input_shape=(3, 5, 5)) == ["3"]  # timm's BatchNorm ends in an activation of its own


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 7)
        self.norm, self.relu = nn.LayerNorm(6), nn.ReLU()
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        if self.fail:
            raise RuntimeError("half way")
        x = self.relu(self.norm(self.second(x)))
        return self.relu(self.third(x))


def test_an_activation_that_is_called_often_gets_a_norm_for_each_call() -> None:
    net = Reused()
    plain = copy.deepcopy(net)
    assert insert_norms(net, input_shape=(4,)) == ["relu"]
    assert isinstance(net.relu, ReusedNormalisedActivation)
    assert [type(norm) for norm in net.relu.norms] == [nn.LayerNorm, nn.Identity, nn.LayerNorm]
    assert (net.first.bias, net.second.bias, net.third.bias) == (None, None, None)
    x = torch.randn(8, 4)

    def expected(x: Tensor) -> Tensor:
        x = F.relu(F.layer_norm(F.linear(x, plain.first.weight), (5,)))
        x = F.relu(F.layer_norm(F.linear(x, plain.second.weight), (6,)))
        return F.relu(F.layer_norm(F.linear(x, plain.third.weight), (7,)))

    torch.testing.assert_close(net(x), expected(x))
    net.fail = True
    with pytest.raises(RuntimeError):
        net(x)
    net.fail = False
    torch.testing.assert_close(net(x), expected(x))  # the calls are counted anew
    torch.testing.assert_close(copy.deepcopy(net)(x), expected(x))
    assert insert_norms(net, input_shape=(4,)) == []


def test_a_bias_is_removed_only_where_nothing_but_norms_reads_it() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
            self.bare, self.root = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4, elementwise_affine=False)
            self.rms = nn.RMSNorm(4)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.read(x)
            x = self.act(self.plain(x)) + y + self.act(y)
            return self.norm(self.bare(x)) + self.rms(self.root(x))

    net = Shared()
    insert_norms(net, input_shape=(4,))
    assert net.plain.bias is None and net.read.bias is not None  # also read by the sum
    assert net.bare.bias is not None and net.root.bias is not None  # norms without an offset to take its place


def test_a_function_cannot_be_replaced() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.normed = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return F.leaky_relu(self.norm(x) if self.normed else x)

    net = nn.Sequential(nn.Identity(), Block())
    assert insert_norms(net, input_shape=(3, 5, 5)) == []
    net[1].normed = False
    with pytest.raises(ContlearnError) as caught:
        insert_norms(net, input_shape=(3, 5, 5))
    said = str(caught.value)
    assert "1 (Block) calls leaky_relu as a function" in said and "torch.nn.ReLU" in said and "\n" not in said
    assert all(module.training and not module._forward_hooks for module in net.modules())


def test_other_mistakes_get_one_line() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for options, said in (
        ({"norm": "batch"}, "norm: expected layer or rms, got 'batch'"),
        ({}, "input_shape: Sequential does not say what it takes"),
        ({"input_shape": (5,)}, r"input_shape: Sequential does not take inputs of shape \(5,\)"),
    ):
        with pytest.raises(ContlearnError, match=said):
            insert_norms(net, **options)


def test_a_single_number_is_not_normalised() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.Tanh())
    assert insert_norms(net, input_shape=(4,)) == [] and net[0].bias is not None
