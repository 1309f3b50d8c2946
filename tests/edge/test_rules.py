"""Traces through the tables: the same numbers as autograd, no operator left that a target lacks, gaps in one go."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from contlearn.edge import rules
from contlearn.edge.rules import registry
from contlearn.errors import ContlearnError

_spec = importlib.util.spec_from_file_location("rules_cases", Path(__file__).with_name("rules_cases.py"))
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)


def traced(function, inputs, target, **options):
    return make_fx(function, decomposition_table=rules.table(target, **options), tracing_mode="real")(*inputs)


def close(got, expected, tolerance=2e-5, name=""):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


def operators(graph):
    return {str(node.target).removeprefix("aten.") for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("target", rules.PROFILES)
@pytest.mark.parametrize("family", cases.FAMILIES)
def test_traced_steps_equal_autograd(family, target):
    members = cases.FAMILIES[family]
    steps = {name: cases.step(function) for name, (function, _) in members.items()}

    def together(inputs):
        return {name: step(*inputs[name]) for name, step in steps.items()}

    inputs = {name: given for name, (_, given) in members.items()}
    graph = traced(together, [inputs], target)
    expected = together(inputs)
    for name, got in graph(inputs).items():
        close(got, expected[name], name=name)
    assert not {op for op in operators(graph) if "backward" in op}
    if target == "tensorrt":
        assert not any("scatter" in op or op.startswith("max_pool") for op in operators(graph))


@pytest.mark.parametrize("target", rules.PROFILES)
@pytest.mark.parametrize(("training", "pure"), [(True, True), (True, False), (False, True)])
def test_a_step_of_a_network_with_its_running_statistics(target, training, pure):
    torch.manual_seed(0)
    model = cases.SmallNet().train(training)
    x, y = torch.randn(4, 3, 40, 40), torch.tensor([0, 1, 2, 3])
    weights = {name: value.detach() for name, value in model.named_parameters()}
    names, statistics = zip(*((n, b) for n, b in model.named_buffers() if b.is_floating_point()), strict=True)

    def update(weights, statistics, x, y):
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        moving = {name: value.clone() for name, value in zip(names, statistics, strict=True)}
        loss = F.cross_entropy(functional_call(model, {**leaves, **moving}, (x,)), y)
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values())), *moving.values()]

    def copied():
        return [{**weights}, [value.clone() for value in statistics], x, y]

    expected = update(*copied())
    # Functionalised after autograd has run, which that transform does not allow inside.
    step = functionalize(make_fx(update)(*copied())) if pure else update
    graph = make_fx(step, decomposition_table=rules.table(target))(*copied())
    close(graph(*copied()), expected, 5e-5)
    assert not any("backward" in op for op in operators(graph))


def test_running_variance_is_unbiased():
    x = torch.randn(2, 3, 2, 2) * 5
    layer = torch.nn.BatchNorm2d(3, momentum=1.0)

    def step(mean, var, x):
        return torch.ops.aten._native_batch_norm_legit_functional(x, None, None, mean, var, True, 1.0, 1e-5)[3:]

    layer(x)
    got = traced(step, [torch.zeros(3), torch.ones(3), x], "onnxruntime")(torch.zeros(3), torch.ones(3), x)
    close(got, (layer.running_mean, layer.running_var))
    close(got[1:], (x.transpose(0, 1).flatten(1).var(1, correction=1),))


def test_variance_survives_a_mean_far_above_the_deviation():
    x = torch.randn(8, 2, 16, 16) + 1000
    got = traced(cases.step(lambda x: F.batch_norm(x, None, None, None, None, True)), [x], "onnxruntime")(x)
    exact = cases.step(lambda x: F.batch_norm(x, None, None, None, None, True))(x.double())
    assert float((got[0].double() - exact[0]).abs().max()) < 1e-3  # E[x^2] - E[x]^2 is off by more than 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_accelerators_equals_plain_attention(causal):
    table = rules.table("onnxruntime")
    query, key, value = (torch.randn(2, 3, 5, 4) for _ in range(3))
    bias = torch.randn(2, 1, 5, 5)
    out, lse, seed, offset = table[torch.ops.aten._scaled_dot_product_efficient_attention.default](
        query, key, value, bias, True, 0.0, causal
    )
    leaves = [t.clone().requires_grad_() for t in (query, key, value, bias)]
    # PyTorch's own takes a mask or causality, not both.
    mask = leaves[3] + (torch.full((5, 5), float("-inf")).triu(1) if causal else 0)
    plain = F.scaled_dot_product_attention(*leaves[:3], attn_mask=mask)
    gradient = torch.randn_like(plain)
    close((out,), (plain.detach(),))
    found = table[torch.ops.aten._scaled_dot_product_efficient_attention_backward.default](
        gradient, query, key, value, bias, out, lse, seed, offset, 0.0, [True] * 4, causal
    )
    close(found, torch.autograd.grad(plain, leaves, gradient))


def test_first_maximum_takes_the_whole_gradient():
    x = torch.zeros(1, 1, 3, 3)
    for target in rules.PROFILES:
        run = cases.step(lambda x: F.max_pool2d(x, 2, 1))
        gradient = traced(run, [x], target)(x)[1]
        assert torch.count_nonzero(gradient[..., :2, :2]) == 4
        assert torch.count_nonzero(gradient) == 4


@pytest.mark.parametrize("target", rules.PROFILES)
def test_indices_of_maxima_are_pytorchs(target):
    x = torch.randint(0, 3, (2, 3, 9, 10)).float()
    graph = traced(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True), [x], target)
    close(graph(x), F.max_pool2d(x, 3, 2, 1, return_indices=True))


def test_all_gaps_are_collected_in_one_trace():
    gaps = []

    def step(x):
        x = F.dropout(x, 0.3, training=True)
        x = F.adaptive_max_pool2d(x, (2, 2))
        return x + torch.rand_like(x)

    traced(step, [torch.randn(2, 3, 7, 7)], "tensorrt", gaps=gaps)
    assert [gap.op.split(".")[0] for gap in gaps] == ["bernoulli_", "adaptive_max_pool2d", "rand_like"]
    assert all("\n" not in str(gap) and gap.way_out in str(gap) for gap in gaps)


def test_the_first_gap_is_raised_without_a_list():
    with pytest.raises(rules.Gap, match=r"aten\.bernoulli_\.float\(p=0\.7\): .* random numbers; set dropout to 0"):
        traced(lambda x: F.dropout(x, 0.3, training=True), [torch.randn(3)], "coreml")


def test_sums_by_two_indices_are_a_gap_only_where_nothing_scatters():
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([1, 1, 2])
    run = cases.step(lambda x: x[rows, columns])
    x = torch.randn(3, 4)
    close(traced(run, [x], "onnxruntime")(x), run(x))
    with pytest.raises(rules.Gap, match="one axis at a time"):
        traced(run, [x], "tensorrt")


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(ContlearnError, match=r"unknown target profile 'onnxruntim'; did you mean 'onnxruntime'"):
        rules.table("onnxruntim")


def test_every_rule_is_listed_once_per_profile():
    infos = rules.list_rules()
    for target in rules.PROFILES:
        listed = [info.op for info in infos if target in info.profiles]
        assert len(set(listed)) == len(listed) == len(rules.table(target))
    assert all(info.description and info.family and info.variant for info in infos)


def test_two_rules_for_one_operator_are_refused():
    op = torch.ops.aten.relu.default
    one = registry.Rule(op, torch.relu, "a", "a")
    with pytest.raises(ValueError, match="two rules"):
        registry.Registry("family", [one, one])
    with pytest.raises(ValueError, match="two families"):
        registry.merged((registry.Registry("a", [one]), registry.Registry("b", [one])))
