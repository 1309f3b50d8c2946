"""What counts as rounding: a tensor that misses the tolerance is held against the same step in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contlearn.edge import verify as checks
from contlearn.edge.precision import OtherRounding, doubled, in_float64, weights_off
from contlearn.edge.verify import ROUNDING, UPDATE, ParityError, examine, verify
from contlearn.strategies.step import Input, Step

Tensors = dict[str, Tensor]


def cancelling_step(share: float = 0.0) -> Step:
    """A weight with a plain gradient, and a bias whose gradient is 0 but for rounding (and ``share`` of its own)."""
    model = nn.Linear(5, 3)

    def compute(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        w, b = (state[name].detach().requires_grad_() for name in ("w", "b"))
        scores = given["x"] @ w.t() + b
        centred = scores - scores.mean(0)  # so b has no influence, as in front of BatchNorm
        loss = (centred * given["x"].sum(1, keepdim=True)).square().sum() + share * b.sum()
        gw, gb = torch.autograd.grad(loss, [w, b])
        new = {"w": state["w"] - given["lr"] * gw, "b": state["b"] - given["lr"] * gb}
        return {"loss": loss.detach().reshape(1), "logits": scores.detach()}, new

    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = {"w": torch.randn(3, 5), "b": 1e-3 * torch.randn(3)}
    inputs = {
        "x": Input((4, 5), torch.float32, "frames"),
        "lr": Input((1,), torch.float32, "learning_rate"),
    }
    return Step(
        "cancelling", model, inputs, state, {"w": "weight", "b": "weight"}, compute,
        lambda state, given: given["x"] @ state["w"].t() + state["b"], classes=3, rates={"lr": 0.1},
    )  # fmt: skip


class Double:
    """Stands for a graph: the step itself, with some of its new values changed."""

    def __init__(self, step: Step, **changes: Any) -> None:
        self.step, self.changes = step, changes

    def __call__(self, tensors: Tensors) -> Tensors:
        outputs, new = self.step.compute(
            {name: tensors[name] for name in self.step.state}, {name: tensors[name] for name in self.step.inputs}
        )
        moved = {**new, **{name: change(tensors[name], new[name]) for name, change in self.changes.items()}}
        return {**outputs, **{f"new.{name}": value.detach() for name, value in moved.items()}}


@pytest.fixture
def graph_is(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``graph_is(step, b=lambda before, after: ...)``: what is verified in the place of an ONNX model."""

    def put(step: Step, **changes: Any) -> None:
        monkeypatch.setattr(checks, "_Graph", lambda model, options: Double(step, **changes))

    return put


def test_an_update_of_rounding_alone_is_held_against_float64(graph_is: Any) -> None:
    step = cancelling_step()
    noise = float((step.compute(step.state, step.examples())[1]["b"] - step.state["b"]).norm())
    assert 0 < noise < 1e-5  # float32 leaves something of a gradient that is 0
    graph_is(step, b=lambda before, after: before)  # the graph leaves nothing of it: right, and 100% off
    report = verify(step, None, many=False)  # type: ignore[arg-type]
    assert set(report.rounding) == {"b"} and report.figures["update"] <= UPDATE
    assert report.rounding["b"].graph <= ROUNDING * report.rounding["b"].pytorch


def test_an_error_far_beyond_pytorchs_own_is_none(graph_is: Any) -> None:
    step = cancelling_step()
    graph_is(step, b=lambda before, after: before + 1e-3)
    with pytest.raises(ParityError, match="one step moves 'b' otherwise than PyTorch does"):
        verify(step, None, many=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["w", "b"])
def test_a_real_gradient_that_is_wrong_is_never_rounding(graph_is: Any, name: str) -> None:
    step = cancelling_step(share=0.5)
    graph_is(step, **{name: lambda before, after: before + 1.01 * (after - before)})
    report = examine(step, None, many=False)  # type: ignore[arg-type]
    assert len(report.faults) == 2 and all(f"moves '{name}' otherwise" in fault for fault in report.faults)
    assert report.figures["update"] == pytest.approx(0.01, rel=0.1) and not report.rounding


def test_what_is_not_a_number_is_never_rounding(graph_is: Any) -> None:
    step = cancelling_step()
    graph_is(step, b=lambda before, after: after * float("nan"))
    report = examine(step, None, many=False)  # type: ignore[arg-type]
    assert report.faults and report.figures["update"] == float("inf") and not report.rounding


def test_a_step_in_float64_reaches_what_stands_in_no_state() -> None:
    """Frozen weights and constants of a network are float32 and are widened where they are used."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        x = torch.rand(2, 3, 5, 5)
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).double()
    wide.load_state_dict(net.state_dict())
    net.eval()
    wide.eval()
    leaf, other = x.double().requires_grad_(), x.double().requires_grad_()
    with in_float64():
        found = (net(leaf) * torch.full((2,), 0.5)).sum()
        (gradient,) = torch.autograd.grad(found, [leaf])
    wanted = (wide(other) * 0.5).sum()
    (expected,) = torch.autograd.grad(wanted, [other])
    assert found.dtype == torch.float64 and torch.get_default_dtype() == torch.float32
    np.testing.assert_allclose(float(found.detach()), float(wanted.detach()), rtol=1e-14)
    np.testing.assert_allclose(gradient.numpy(), expected.numpy(), rtol=1e-12, atol=1e-15)
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_the_default_precision_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), in_float64():
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32


def test_only_numbers_with_fractions_are_doubled() -> None:
    made = doubled({"w": torch.ones(2), "y": torch.ones(2, dtype=torch.int64), "m": torch.ones(2, dtype=torch.bool)})
    assert [value.dtype for value in made.values()] == [torch.float64, torch.int64, torch.bool]


def test_other_roundings_are_of_a_unit_in_the_last_place_and_by_seed() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1
    found = []
    for seed in (0, 0, 1):
        with OtherRounding(seed):
            found.append(x * 1.0)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert 0 < float(((found[0] - x) / x).abs().max()) <= 2 * torch.finfo(torch.float32).eps
    with OtherRounding(0):
        assert torch.equal(torch.arange(3) + 1, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("own", [False, True])
def test_a_graph_that_writes_to_its_inputs(own: bool) -> None:
    """ONNX Runtime computes new running statistics in the memory of the old ones, even where these are the caller's."""
    import onnx.parser

    copies = "m2 = Mul(m, c)  v2 = Mul(v, c)" if own else ""
    mean, variance = ("m2", "v2") if own else ("m", "v")
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]> g (float[2,3,4,4] x, float[3] s, float[3] m, float[3] v)
        => (float[3] a, float[3] b) <float c = {{1.5}}> {{ {copies}
        y, mean, variance = BatchNormalization<training_mode=1, momentum=0.0>(x, s, s, {mean}, {variance})
        a = Add(mean, s)  b = Add(variance, s) }}"""
    )
    tensors = {"x": torch.rand(2, 3, 4, 4), "s": torch.ones(3), "m": torch.full((3,), 7.0), "v": torch.full((3,), 9.0)}
    graph = checks._Graph(model, None)
    if own:
        torch.testing.assert_close(graph(tensors)["a"], tensors["x"].mean((0, 2, 3)) + 1)
    else:
        with pytest.raises(ParityError, match="the graph writes to its input 'm'"):
            graph(tensors)
    assert torch.equal(tensors["m"], torch.full((3,), 7.0))


def test_a_control_of_a_frozen_network_has_its_weights_perturbed() -> None:
    """Only statistics move here: without the frozen weight's perturbation the control would be PyTorch itself."""
    model = nn.Linear(5, 3, bias=False)

    def compute(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        scores = given["x"] @ model.weight.detach().t()
        return {"loss": scores.mean().reshape(1), "logits": scores}, {"mean": 0.5 * state["mean"] + scores.mean(0)}

    inputs = {"x": Input((4, 5), torch.float32, "frames")}
    state, roles = {"mean": torch.zeros(3)}, {"mean": "statistic"}
    step = Step("frozen", model, inputs, state, roles, compute, lambda state, given: given["x"], classes=3)

    def graph_off_by(share: float) -> checks.Advance:
        def device(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
            outputs, new = compute(state, given)
            return outputs, {"mean": new["mean"] * (1 + share)}

        return device

    before = model.weight.detach().clone()
    for share, holds in ((1e-7, True), (1e-4, False)):
        report = checks.Report()
        assert checks._many_steps(step, graph_off_by(share), compute, report) is holds
        assert 1e-7 < report.figures["control_drift"] < 1e-5
    assert torch.equal(model.weight, before)


def test_weights_come_back_to_the_bit_after_an_error() -> None:
    model = nn.Linear(5, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), weights_off(model, 1e-3, torch.Generator().manual_seed(0)):
        assert not any(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))
        raise ZeroDivisionError
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))
