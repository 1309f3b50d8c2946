"""A traced function of named tensors computes what the function does."""

from __future__ import annotations

import torch
from torch import Tensor

from contlearn.edge.capture import trace

Tensors = dict[str, Tensor]


def test_constants_before_any_operator() -> None:
    """A frozen first layer: the graph begins with a constant, and there are more."""
    weight, bias = torch.rand(3, 2), torch.rand(2)

    def function(named: Tensors) -> Tensors:
        return {"y": torch.addmm(bias, named["x"], weight).relu() * named["scale"]}

    given = {"unread": torch.ones(1), "x": torch.rand(4, 3), "scale": torch.rand(2)}
    captured = trace(function, given, profile="onnxruntime")
    assert captured.inputs == ("x", "scale") and captured.outputs == ("y",)
    other = {"x": torch.rand(4, 3), "scale": torch.rand(2)}
    torch.testing.assert_close(captured(other)["y"], function(other)["y"])


def test_what_a_function_does_to_its_own_tensors_is_no_mutation_afterwards() -> None:
    def function(named: Tensors) -> Tensors:
        moved = named["state"].clone()
        moved.mul_(0.5).add_(named["x"])
        return {"new": moved, "sum": moved.sum()}

    given = {"state": torch.rand(3), "x": torch.rand(3)}
    captured = trace(function, given, profile="onnxruntime")
    assert not any(str(node.target).split(".")[-2].endswith("_") for node in captured.graph.graph.nodes
                   if node.op == "call_function")  # fmt: skip
    kept = given["state"].clone()
    torch.testing.assert_close(captured(given), function(given))
    assert torch.equal(given["state"], kept)
