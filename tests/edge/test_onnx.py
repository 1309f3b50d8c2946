"""From a traced graph to ONNX: batch normalisation as one node, and single values at full rank."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contlearn.edge.broadcast import give_full_rank
from contlearn.edge.capture import trace
from contlearn.edge.onnx import lower


def run(model, given):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [place.name for place in session.get_outputs()]
    feed = {place.name: given[place.name].numpy() for place in session.get_inputs()}
    before = {name: value.copy() for name, value in feed.items()}
    found = dict(zip(names, session.run(None, feed), strict=True))
    for name, value in before.items():  # onnxruntime writes statistics over those it was given
        np.testing.assert_array_equal(feed[name], value, err_msg=name)
    return found


def training(model):
    return [n for n in model.graph.node if any(a.name == "training_mode" and a.i for a in n.attribute)]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("profile", ["onnxruntime", "tensorrt"])
def test_batch_normalisation_by_the_batch_behind_a_convolution(frozen, profile):
    """A frozen layer's weights are constants, which must not tempt an optimizer to fold it into the convolution."""
    kernel, weight, bias = torch.randn(4, 3, 3, 3), torch.rand(4) + 0.5, torch.randn(4)

    def function(named):
        held = named if not frozen else {"weight": weight, "bias": bias}
        mean, var = named["mean"].clone(), named["var"].clone()
        y = F.batch_norm(torch.conv2d(named["x"], kernel), mean, var, held["weight"], held["bias"], True, 0.3, 1e-3)
        return {"y": y, "new_mean": mean, "new_var": var}

    given = {"x": torch.randn(2, 3, 7, 7) + 1, "mean": torch.randn(4), "var": torch.rand(4) + 1}
    given |= {} if frozen else {"weight": weight, "bias": bias}
    model = lower(trace(function, given, profile=profile))
    assert len(training(model)) == (profile == "onnxruntime")
    expected = function(given)
    for name, got in run(model, given).items():
        np.testing.assert_allclose(got, expected[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_batch_normalisation_without_running_statistics_behind_a_convolution():
    kernel = torch.randn(4, 3, 3, 3)

    def function(named):
        return {"y": F.batch_norm(torch.conv2d(named["x"], kernel), None, None, None, None, True)}

    given = {"x": torch.randn(2, 3, 7, 7) + 1}
    np.testing.assert_allclose(run(lower(trace(function, given, profile="onnxruntime")), given)["y"],
                               function(given)["y"].numpy(), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_gradients_of_batch_normalisation_on_values_far_from_zero():
    """What is subtracted is subtracted before it is scaled."""
    norm = nn.BatchNorm2d(4)
    x = torch.randn(4, 4, 5, 5) * 0.1 + 100

    def function(named):
        leaf, weight = named["x"].clone().requires_grad_(), named["weight"].clone().requires_grad_()
        mean, var = named["mean"].clone(), named["var"].clone()
        y = F.batch_norm(leaf, mean, var, weight, named["bias"], True, 0.1, 1e-5)
        dx, dw = torch.autograd.grad((y.sin() * y).sum(), [leaf, weight])
        return {"dx": dx, "dw": dw, "new_var": var}

    given = {"x": x, "weight": norm.weight.detach() + 0.5, "bias": norm.bias.detach(), "mean": norm.running_mean,
             "var": norm.running_var}  # fmt: skip
    exact = function({name: value.double() for name, value in given.items()})
    for name, got in run(lower(trace(function, given, profile="onnxruntime")), given).items():
        scale = float(exact[name].abs().max())
        assert float((torch.from_numpy(got).double() - exact[name]).abs().max()) <= 2e-3 * scale, name


def test_single_values_take_the_rank_of_weights_that_end_in_ones():
    def function(named):
        w = named["w"] * 0.9 + named["lr"] * named["g"]
        return {"moved": w, "kept": named["lr"] * 2.0, "mask": torch.where(named["g"] > 0.5, w, named["lr"])}

    given = {"w": torch.randn(5, 3, 1, 1), "g": torch.rand(5, 3, 1, 1), "lr": torch.tensor([0.1])}
    model = lower(trace(function, given, profile="onnxruntime"))
    ranks = {value.name: len(value.dims) for value in model.graph.initializer}
    made = {name: 4 for node in model.graph.node if node.op_type == "Reshape" for name in node.output}
    for node in model.graph.node:
        if node.output[0] != "kept" and node.op_type in ("Mul", "Add", "Greater", "Where"):
            assert all(ranks.get(name, made.get(name, 4)) == 4 for name in node.input), node
    got, expected = run(model, given), function(given)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-6)
    before = model.SerializeToString()
    give_full_rank(model)
    assert model.SerializeToString() == before  # nothing is left to do


def test_a_mean_of_a_million_values_keeps_its_digits():
    given = {"x": torch.rand(64, 16, 32, 32, generator=torch.Generator().manual_seed(0))}
    got = run(lower(trace(lambda named: {"y": named["x"].mean().reshape(1)}, given, profile="onnxruntime")), given)
    assert float(got["y"][0]) == pytest.approx(float(given["x"].double().mean()), rel=2e-6)


@pytest.mark.parametrize("constant", [1e-8, -1e-8, 1e-12, 1e-30])
def test_constants_near_zero_are_terms_still(constant):
    """Adam divides by sqrt(v) + 1e-8, which is 0 for what has had no gradient."""

    def function(named):
        x = named["x"]
        return {"plus": 1 / (x + constant), "minus": 1 / (x - constant), "tensor": 1 / (x + torch.tensor(constant))}

    given = {"x": torch.zeros(3)}
    expected = function(given)
    for name, got in run(lower(trace(function, given, profile="onnxruntime")), given).items():
        np.testing.assert_allclose(got, expected[name].numpy(), rtol=1e-6, err_msg=name)


def test_constants_near_one_are_factors_still():
    near = 1 + 2**-22

    def function(named):
        x = named["x"]
        return {"times": x * near - x, "over": x / near - x}

    given = {"x": torch.ones(3)}
    for name, got in run(lower(trace(function, given, profile="onnxruntime")), given).items():
        np.testing.assert_array_equal(got, function(given)[name].numpy(), err_msg=name)
        assert got.all()
