"""Bits for ReLUs, int8 for frozen weights, nothing for what does not train: same numbers, fewer bytes."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from contlearn.memory.holdings import model_tensors
from contlearn.memory.saved import SavedForBackward, unique_bytes
from contlearn.strategies.frozen_operations import FrozenOperations
from contlearn.strategies.packed import (
    Int8Conv2d,
    Int8Linear,
    PackedReLU,
    PartedConv2d,
    dequantise,
    pack,
    packed_clamp,
    packed_relu,
    quantise,
    quantise_frozen,
    unpack,
)

SHAPES = [(1,), (7,), (8,), (4096,), (3, 5, 7, 9), (2, 1, 1, 1), (1, 17)]


def inputs(shape, *, dtype=torch.float32, layout=torch.contiguous_format):
    x = torch.randn(shape, dtype=dtype)
    x.view(-1)[:: max(1, x.numel() // 3)] = 0.0  # the kink
    return x.to(memory_format=layout)


def through(function, x, gradient):
    """Output and gradient with respect to ``x``."""
    leaf = x.clone().requires_grad_()
    out = function(leaf * 1)  # not the leaf itself, which may not be written
    out.backward(gradient)
    return out.detach(), leaf.grad


def saved(function, *tensors, exclude=()):
    watch = SavedForBackward(exclude)
    with watch.watching():
        kept = function(*tensors)
    size = watch.live
    del kept
    return size


@given(st.lists(st.booleans(), max_size=70), st.integers(0, 9))
def test_bits_are_the_flags_again(flags, offset):
    view = torch.tensor([True] * offset + flags, dtype=torch.bool)[offset:]
    bits = pack(view)
    assert bits.dtype is torch.uint8 and len(bits) == math.ceil(len(flags) / 8)
    assert unpack(bits, (len(flags),)).tolist() == flags


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_packed_relu_is_relu_forward_and_backward(shape, inplace):
    x, gradient = inputs(shape), torch.randn(shape)
    expected, slope = through(F.relu, x, gradient)
    for function in (PackedReLU(inplace), lambda x: packed_relu(x, inplace)):
        out, found = through(function, x, gradient)
        assert torch.equal(out, expected)
        assert torch.equal(found, slope)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_packed_relu_of_other_precisions(dtype):
    x, gradient = inputs((3, 11), dtype=dtype), torch.randn(3, 11, dtype=dtype)
    assert all(map(torch.equal, through(packed_relu, x, gradient), through(F.relu, x, gradient)))


@pytest.mark.parametrize("flip", [False, True])
def test_packed_relu_with_channels_last_on_either_side(flip):
    layouts = [torch.channels_last, torch.contiguous_format]
    x = inputs((2, 3, 5, 7), layout=layouts[flip])
    gradient = torch.randn(2, 3, 5, 7).to(memory_format=layouts[not flip])
    assert all(map(torch.equal, through(packed_relu, x, gradient), through(F.relu, x, gradient)))


def test_values_and_gradients_that_are_not_finite_pass_as_in_pytorch():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -1.0])
    gradient = torch.tensor([2.0, math.inf, math.inf, math.nan, math.nan])
    for ours, theirs in zip(through(packed_relu, x, gradient), through(F.relu, x, gradient), strict=True):
        assert torch.equal(ours.nan_to_num(nan=77.0), theirs.nan_to_num(nan=77.0))


def test_a_relu_that_is_used_twice_keeps_two_masks():
    relu = PackedReLU()
    weight = torch.randn(6, 6)

    def network(act):
        return lambda x: act(act(x) @ weight)

    x, gradient = inputs((5, 6)), torch.randn(5, 6)
    assert all(map(torch.equal, through(network(relu), x, gradient), through(network(F.relu), x, gradient)))


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0), (0.0, 0.5)])
def test_packed_clamp_is_hardtanh(low, high):
    x = torch.cat([inputs((40,)) * 4, torch.tensor([low, high])])
    gradient = torch.randn(42)
    for ours, theirs in zip(
        through(lambda x: packed_clamp(x, low, high), x, gradient),
        through(lambda x: F.hardtanh(x, low, high), x, gradient),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_bit_per_element_is_kept(shape):
    x = torch.randn(shape, requires_grad=True)
    size = math.prod(shape)
    assert saved(packed_relu, x) == math.ceil(size / 8)
    if size % 8 == 0:
        assert 32 * saved(packed_relu, x) == saved(F.relu, x)


# ---------------------------------------------------------------------- any frozen network


class Mixed(nn.Module):
    """The ways in which networks spell the same layers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, (3, 1), padding=(2, 0), dilation=(2, 1), groups=4, bias=False)
        self.c = nn.Conv2d(8, 6, 2, stride=(3, 2), padding=1)
        self.same = nn.Conv2d(6, 6, 3, padding="same")
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6(inplace=True)
        self.affineless = nn.BatchNorm2d(6, affine=False)
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        x = self.relu6(self.b(x) * 3)
        x = F.relu(self.affineless(self.same(self.c(x))), inplace=True)
        x = torch.relu(x - 0.1) + (x - 0.2).relu_() + (x - 0.3).relu() + F.relu6(x) + F.hardtanh(x)
        return self.linear(x.mean(dim=(2, 3)))


def settled(network, dtype=torch.float64):
    """Frozen, in evaluation mode, with statistics that are not 0 and 1."""
    network = network.to(dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return network.eval().requires_grad_(False)


def networks():
    yield "mixed", Mixed(), (4, 3, 13, 17)
    for name in ("resnet18", "efficientnet_lite0", "mobilenetv2_050"):
        yield name, timm.create_model(name, num_classes=0), (2, 3, 40, 40)


@pytest.mark.parametrize("case", networks(), ids=lambda case: case[0])
@pytest.mark.parametrize("packed", [True, False])
def test_a_frozen_network_computes_and_differentiates_the_same(case, packed):
    _, network, shape = case
    settled(network)
    x = torch.randn(shape, dtype=torch.float64)
    gradient = torch.randn(network(x).shape, dtype=torch.float64)
    expected = through(network, x, gradient)
    with FrozenOperations(packed=packed):
        found = through(network, x, gradient)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-12)


def test_frozen_layers_keep_bits_and_nothing_else():
    network = settled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 1),
        ),
        torch.float32,
    )  # fmt: skip
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    relus = 2 * 8 * 12 * 12
    with FrozenOperations():
        assert saved(network, x, exclude=model_tensors(network)) == 2 * relus // 8 + 2 * 8 * 4
    # PyTorch itself: inputs of all layers but the first, in floats, and more.
    assert saved(network, x, exclude=[*model_tensors(network), x]) > 4 * 4 * relus


def test_batch_statistics_are_those_of_training_mode_and_move_nothing():
    network = settled(Mixed())
    x = torch.randn(5, 3, 13, 17, dtype=torch.float64)
    training = copy.deepcopy(network).train()
    gradient = torch.randn(5, 4, dtype=torch.float64)
    expected = through(training, x, gradient)
    before = copy.deepcopy(network.state_dict())
    with FrozenOperations(batch_statistics=True):
        found = through(network, x, gradient)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_one_value_per_channel_keeps_to_the_running_statistics():
    norm = settled(nn.BatchNorm2d(3))
    x = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    with FrozenOperations(batch_statistics=True):
        assert torch.equal(norm(x), norm.eval()(x))
        pair = torch.cat([x, -x])
        torch.testing.assert_close(norm(pair), F.batch_norm(pair, None, None, norm.weight, norm.bias, True))


def test_what_trains_is_left_to_pytorch():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    network(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    with FrozenOperations(batch_statistics=True):
        out = network(x)
    out.sum().backward()
    assert torch.equal(out, network(x))  # statistics of the running kind, too
    torch.testing.assert_close([parameter.grad for parameter in network.parameters()], expected)


# ---------------------------------------------------------------------- int8


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6), st.sampled_from([(1, 1), (4, 3, 3, 3), (5, 7)]))
def test_no_weight_is_off_by_more_than_half_a_step(seed, size, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    weight[0] *= 0  # a dead channel
    held, scale = quantise(weight)
    assert held.dtype is torch.int8 and scale.shape == (shape[0],)
    error = (dequantise(held, scale) - weight).flatten(1).abs().amax(1)
    assert bool((error <= scale * 0.5001).all())
    assert torch.equal(dequantise(held, scale)[0], weight[0].abs())
    # The largest weight of each channel is at the end of the range.
    assert bool((held[1:].flatten(1).abs().amax(1) == 127).all())


def test_int8_layers_are_the_float_layers_of_the_rounded_weights():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2).requires_grad_(False)
    linear = nn.Linear(5, 3).requires_grad_(False)
    for layer, made, x in (
        (conv, Int8Conv2d(conv), torch.randn(2, 4, 8, 9)),
        (linear, Int8Linear(linear), torch.randn(7, 5)),
    ):
        if x.ndim == 4:
            bound = F.conv2d(x.abs(), torch.ones_like(conv.weight), None, 2, 1, 1, 2)
        else:
            bound = x.abs().sum(1, keepdim=True)
        scale = made.weight_scale.view(-1, *[1] * (x.ndim - 2))
        assert bool(((made(x) - layer(x)).abs() <= scale / 2 * bound + 1e-5).all())
        layer.weight.copy_(dequantise(made.weight_int8, made.weight_scale))
        gradient = torch.randn(made(x).shape)
        for ours, theirs in zip(through(made, x, gradient), through(layer, x, gradient), strict=True):
            torch.testing.assert_close(ours, theirs)
        # No float copy of the weight is held for backward.
        assert saved(made, x.clone().requires_grad_(), exclude=model_tensors(made)) == 0


def test_quantising_a_network_takes_a_quarter_of_the_weights_bytes_and_leaves_what_trains():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return super().forward(x - 0.5)

    network = nn.Sequential(
        Scaled(3, 8, 1), nn.Conv2d(8, 16, 3, padding="same"), nn.Sequential(nn.Conv2d(16, 16, 3, bias=False)),
        nn.Conv2d(16, 4, 1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    network.requires_grad_(False)
    network[3].requires_grad_(True)
    conv = network[2][0]
    before = copy.deepcopy(network)
    assert quantise_frozen(network) == ["2.0", "5"]
    assert (type(network[0]), type(network[1]), type(network[3])) == (Scaled, nn.Conv2d, nn.Conv2d)
    assert unique_bytes(model_tensors(network[2])) == conv.weight.numel() + 4 * 16
    assert quantise_frozen(network) == []
    x = torch.rand(2, 3, 3, 3)
    torch.testing.assert_close(network(x), before(x), rtol=0.05, atol=0.01)
    again = copy.deepcopy(network)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x), network(x))


@pytest.mark.parametrize("shape", [(1, 8, 9, 9), (5, 8, 11, 7), (40, 8, 96, 64)])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 1)])
def test_a_convolution_differentiated_in_parts_is_the_whole_one(shape, stride, kernel):
    torch.manual_seed(0)
    whole = nn.Conv2d(8, 4, kernel, stride=stride, padding=kernel // 2, bias=False)
    parted = PartedConv2d(8, 4, kernel, stride=stride, padding=kernel // 2, bias=False)
    parted.load_state_dict(whole.state_dict())
    x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    a, b = whole(x), parted(y)
    assert torch.equal(a, b)
    g = torch.randn_like(a)
    a.backward(g), b.backward(g)
    torch.testing.assert_close(y.grad, x.grad)
    assert (parted.weight.grad - whole.weight.grad).norm() < 1e-5 * whole.weight.grad.norm()  # another order of adding
    parted.weight.requires_grad_(False)
    (only,) = torch.autograd.grad(parted(y), y, g)
    torch.testing.assert_close(only, x.grad)
