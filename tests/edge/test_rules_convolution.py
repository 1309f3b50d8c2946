"""Gradients of convolutions: every form, over a grid and odd attributes, against autograd's own operator."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contlearn.edge.capture import trace
from contlearn.edge.rules import PROFILES, Gap
from contlearn.edge.rules import convolution as rule
from contlearn.edge.rules import convolution_forward as forward
from contlearn.edge.rules.convolution_weight import FORMS, Geometry, choose

BATCH = 3
# in, out, groups: dense, grouped, depthwise, depthwise with two outputs per input
CHANNELS = [(4, 6, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)]
GRID = list(itertools.product(CHANNELS, (1, 2, 3), (0, 1, 2), (1, 2), (1, 3), (11, 12)))


def case(channels, kernel, stride, padding, dilation, size, *, seed=0):
    """Gradient, input, weight and the operator's answer; ``None`` where nothing comes out."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer, groups = channels
    x = torch.randn((BATCH, inner, *size), generator=generator)
    weight = torch.randn((outer, inner // groups, *kernel), generator=generator)
    room = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    if min(room) < 0:
        return None
    axes = len(kernel)
    out = torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * axes, groups)
    gradient = torch.randn(out.shape, generator=generator)
    rest = ([outer], stride, padding, dilation, False, [0] * axes, groups)
    exact = torch.ops.aten.convolution_backward(
        gradient.double(), x.double(), weight.double(), *rest, [True, True, True]
    )
    return gradient, x, weight, rest, exact


def worst(got, expected):
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_gradients_over_the_grid_of_attributes(channels, profile):
    for channel, stride, padding, dilation, kernel, size in GRID:
        if channel != channels:
            continue
        made = case(channel, [kernel] * 2, [stride] * 2, [padding] * 2, [dilation] * 2, [size] * 2)
        gradient, x, weight, rest, exact = made
        found = rule.convolution_backward(profile, gradient, x, weight, *rest, [True, True, True])
        for name, got, expected in zip(("dX", "dW", "bias"), found, exact, strict=True):
            assert worst(got, expected) <= 1e-5, (name, stride, padding, dilation, kernel, size)


def forms_for(channels, axes):
    depthwise = channels[0] == channels[1] == channels[2]
    for name in FORMS:
        if name in ("rows", "pixels") and (axes != 2 or not depthwise):
            continue
        if name == "products" and not depthwise:
            continue
        if name == "folded shifts" and channels[2] > 1:
            continue
        yield name


@settings(max_examples=60, deadline=None)
@given(
    channels=st.sampled_from(CHANNELS),
    attributes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 13)),
        min_size=1,
        max_size=2,
    ),
    seed=st.integers(0, 1000),
)
def test_every_form_with_odd_attributes(channels, attributes, seed):
    kernel, stride, padding, dilation, size = (list(values) for values in zip(*attributes, strict=True))
    made = case(channels, kernel, stride, padding, dilation, size, seed=seed)
    if made is None:
        return
    gradient, x, weight, _, exact = made
    how = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), channels[2])
    for name in forms_for(channels, len(kernel)):
        # Sums of few numbers may cancel: the error is against the gradients that were summed.
        scale = float(gradient.abs().max() * x.abs().max())
        assert float((FORMS[name](gradient, x, how).double() - exact[1]).abs().max()) <= 2e-5 * scale, name
    for name, form in rule.INPUT_FORMS.items():
        if name == "pixels" and (len(kernel) != 2 or not channels[0] == channels[1] == channels[2]):
            continue
        pointwise = all(k == s == 1 and p == 0 for k, s, p in zip(kernel, stride, padding, strict=True))
        if name == "product" and (channels[2] > 1 or not pointwise):
            continue
        scale = float(gradient.abs().max() * weight.abs().max())
        assert float((form(gradient, weight, size, how).double() - exact[0]).abs().max()) <= 2e-5 * scale, name


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 2, 1), (2, 1, 2), (4, 3, 1)])
def test_gradients_of_a_transposed_convolution(profile, groups, stride, dilation):
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(4, 8 // groups, 3, 2)
    how = ([stride] * 2, [1, 0], [dilation] * 2, True, [0, 1 if stride > 1 else 0], groups)
    gradient = torch.randn_like(torch.convolution(x, weight, None, *how))
    exact = torch.ops.aten.convolution_backward(gradient, x, weight, [8], *how, [True] * 3)
    found = rule.convolution_backward(profile, gradient, x, weight, [8], *how, [True] * 3)
    for got, expected in zip(found, exact, strict=True):
        assert worst(got, expected.double()) <= 1e-5


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_what_the_mask_asks_for(mask):
    gradient, x, weight, rest, exact = case((4, 4, 4), [3, 3], [2, 2], [1, 1], [1, 1], [9, 9])
    found = rule.convolution_backward(PROFILES["onnxruntime"], gradient, x, weight, *rest, list(mask))
    assert [part is not None for part in found] == list(mask)
    for got, expected in zip(found, exact, strict=True):
        assert got is None or worst(got, expected) <= 1e-5


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_core_ml_never_dilates_by_run_time_weights(channels):
    for stride, kernel in itertools.product((1, 2, 3), (1, 3, 5)):
        how = Geometry((kernel, kernel), (stride, stride), (kernel // 2,) * 2, (1, 1), channels[2])
        size = [BATCH, channels[0], 40, 40]
        out = [BATCH, channels[1], (40 - 1) // stride + 1, (40 - 1) // stride + 1]
        form = choose(PROFILES["coreml"], out, size, how)
        assert stride == 1 or form != "convolution"


def test_an_unbatched_gradient_is_a_gap_that_says_what_to_do():
    with pytest.raises(Gap, match=r"aten\.convolution_backward\(shape=\(4, 5, 5\)\).*give a batch"):
        rule.convolution_backward(
            PROFILES["onnxruntime"], torch.zeros(4, 5, 5), torch.zeros(4, 5, 5), torch.zeros(4, 4, 1, 1), [4], [1, 1],
            [0, 0], [1, 1], False, [0, 0], 1, [True] * 3,
        )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(2, 4),
    attributes=st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2), st.integers(1, 13)),
        min_size=2,
        max_size=2,
    ),
    seed=st.integers(0, 1000),
)
def test_every_form_of_a_depthwise_convolution(channels, attributes, seed):
    kernel, stride, padding, dilation, size = (list(values) for values in zip(*attributes, strict=True))
    made = case((channels,) * 3, kernel, stride, padding, dilation, size, seed=seed)
    if made is None:
        return
    _, x, weight, _, _ = made
    how = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), channels)
    exact = torch.conv2d(x.double(), weight.double(), None, stride, padding, dilation, channels)
    for name, form in forward.FORMS.items():
        got = form(x, weight, how)
        assert got.shape == exact.shape, name
        assert float((got.double() - exact).abs().max()) <= 2e-5 * float(x.abs().max() * weight.abs().max()), name


@pytest.mark.parametrize("profile", PROFILES)
def test_only_weights_that_train_take_products_in_place_of_a_depthwise_convolution(profile):
    frozen = torch.randn(8, 1, 3, 3)

    def function(named):
        fixed = torch.conv2d(named["x"], frozen, None, 1, 1, 1, 8)
        return {"y": torch.conv2d(fixed, named["weight"], named["bias"], 1, 1, 1, 8)}

    given = {"x": torch.randn(2, 8, 6, 6), "weight": torch.randn(8, 1, 3, 3), "bias": torch.randn(8)}
    captured = trace(function, given, profile=profile)
    left = [n for n in captured.graph.graph.nodes if n.target is torch.ops.aten.convolution.default]
    assert len(left) == (1 if profile == "onnxruntime" else 2)
    torch.testing.assert_close(captured(given)["y"], function(given)["y"], rtol=1e-4, atol=1e-5)
