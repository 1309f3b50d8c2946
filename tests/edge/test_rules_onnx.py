"""Traces through the tables as ONNX: standard operators only, and in onnxruntime the same numbers as PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from contlearn.edge import rules
from contlearn.edge.operators import TRANSLATIONS
from contlearn.strategies import packed
from contlearn.strategies.step import tracing

_spec = importlib.util.spec_from_file_location("rules_cases", Path(__file__).with_name("rules_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

CHOSEN = {
    "pooling": ["max 3/2 padded, ties", "avg without padding, ceil", "adaptive"],
    "norms": ["layer", "group", "batch, evaluation"],
    "activations": ["relu6", "hardswish", "gelu", "elu"],
    "losses": ["smoothing", "ignored", "masked classes", "bce logits", "smooth l1"],
    "shapes": ["causal, scale", "bilinear", "embedding", "steps", "index", "gather", "convolution 1-D"],
    "convolutions": ["dense k3 s2", "grouped k3 s2", "depthwise k3 s1"],
}
WITHOUT_SCATTER = {
    "pooling": ["max overlapping, ceil", "global"],
    "norms": ["layer plain"],
    "shapes": ["negative pads", "gather", "index by a table", "convolution up"],
    "convolutions": ["dense k1 s1", "depthwise k3 s2"],
}  # fmt: skip


def lowered(function, inputs, target):
    """The ONNX model of a flat function, and what onnxruntime computes with it."""
    graph = make_fx(function, decomposition_table=rules.table(target))(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(graph, tuple(inputs), dynamo=True, opset_version=18, verbose=False,
                                    custom_translation_table=TRANSLATIONS)  # fmt: skip
    model = program.model_proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # Inputs that the graph does not read stay in its signature.
    feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return model, session.run(None, feed)


def portable(model, target):
    assert {node.domain for node in model.graph.node} == {""}
    assert [opset.domain for opset in model.opset_import if opset.domain] == []
    for node in model.graph.node:
        if target != "onnxruntime":
            assert node.op_type != "MaxPool" or len([name for name in node.output if name]) == 1
        if target == "tensorrt":
            reductions = {a.name: a.s for a in node.attribute}.get("reduction", b"none")
            assert not node.op_type.startswith("Scatter") or reductions == b"none"
            if node.op_type in ("ReduceSum", "ReduceMean", "Slice", "Pad"):
                constants = {value.name for value in model.graph.initializer}
                assert all(name in constants for name in list(node.input)[1:] if name), node


def equal(found, expected, tolerance=2e-5):
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == tuple(want.shape)
        np.testing.assert_allclose(got, want.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("target", "names"), [("onnxruntime", CHOSEN), ("tensorrt", WITHOUT_SCATTER)], ids=["onnxruntime", "tensorrt"]
)
def test_gradients_of_many_functions_in_one_graph(target, names):
    chosen = [cases.FAMILIES[family][name] for family, members in names.items() for name in members]

    def together(*inputs):
        rest, found = list(inputs), []
        for function, own in chosen:
            found += cases.step(function)(*(rest.pop(0) for _ in own))
        return tuple(found)

    inputs = [value for _, own in chosen for value in own]
    model, found = lowered(together, inputs, target)
    portable(model, target)
    equal(found, together(*inputs))


def test_one_training_step_of_a_network():
    torch.manual_seed(0)
    network = cases.SmallNet().train()
    names = [name for name, _ in network.named_parameters()]
    statistics = [name for name, value in network.named_buffers() if value.is_floating_point()]
    inputs = [value.detach().clone() for value in network.parameters()]
    inputs += [value.clone() for name, value in network.named_buffers() if name in statistics]
    inputs += [torch.randn(4, 3, 40, 40), torch.tensor([0, 1, 2, 3]), torch.tensor([0.1])]

    def step(*values):
        *state, x, y, lr = values
        leaves = [value.detach().requires_grad_() for value in state[: len(names)]]
        moving = [value.clone() for value in state[len(names) :]]
        whole = {**dict(zip(names, leaves, strict=True)), **dict(zip(statistics, moving, strict=True))}
        loss = F.cross_entropy(functional_call(network, whole, (x,)), y)
        gradients = torch.autograd.grad(loss, leaves)
        new = [leaf.detach() - lr * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]
        return (loss.detach().reshape(1), *new, *moving)

    model, found = lowered(step, inputs, "onnxruntime")
    portable(model, "onnxruntime")
    equal(found, step(*inputs), 1e-4)


@pytest.mark.parametrize("target", rules.PROFILES)
def test_activations_that_keep_bits_export_as_booleans(target):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1), torch.nn.Conv2d(4, 4, 3)).requires_grad_(False)
    assert packed.quantise_frozen(layers) == ["0", "1"]

    def gradient(x):
        leaf = x.detach().requires_grad_()
        out = packed.packed_relu(layers[1](packed.packed_clamp(layers[0](leaf), 0.0, 6.0)), inplace=True)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaf)

    inputs = [torch.randn(2, 3, 12, 12)]
    expected = gradient(*inputs)
    with tracing():
        model, found = lowered(gradient, inputs, target)
    portable(model, target)
    equal(found, expected)
