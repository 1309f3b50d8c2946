"""Methods joined to one another: every host of the registry with every method that can be joined to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import nn

from contlearn import run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.strategies.naive import Naive

# What makes a method's effect show on so small a stream.
STRONG: dict[str, dict[str, Any]] = {
    "replay": {"memory_size": 8},
    "agem": {"patterns_per_experience": 4, "sample_size": 8},
    "ewc": {"ewc_lambda": 10.0},
    "si": {"si_lambda": 10.0},
    "mesa": {"min_elements": 1},
}
MEMORIES = {"memory_size": 8, "patterns_per_experience": 4}
PAIRS = [
    (host, joined)
    for host in strategies.list(kind=("class-incremental", "plug-in"))
    for joined in strategies.list(joinable=True)
    # Methods of transfer need networks of their own kind; their pairs are in test_mobiletl_runs.py and its like.
    if joined in strategies.describe(host).composes_with and strategies.describe(joined).kind != "transfer"
]


def train(stream: Any, model: nn.Module, host: str, *joined: str) -> tuple[Any, dict[str, torch.Tensor]]:
    known = strategies.parameters(host)
    options = {key: value for key, value in {**MEMORIES, **STRONG.get(host, {})}.items() if key in known}
    plugins = [{"name": name, **STRONG.get(name, {})} for name in joined]
    strategy = strategies.create(host, model, epochs=2, batch_size=8, lr=0.2, device="cpu", plugins=plugins, **options)
    result = run(strategy, stream, quiet=True)
    return result, {key: value.clone() for key, value in strategy.model.state_dict().items()}


@pytest.fixture
def alone(stream: Any, normed: Callable[[Any], nn.Module]) -> Callable[[str], dict[str, torch.Tensor]]:
    return lambda host: train(stream, normed(stream), host)[1]


@pytest.mark.parametrize(("host", "joined"), PAIRS)
def test_every_method_works_inside_every_other(stream, normed, alone, host, joined) -> None:
    result, weights = train(stream, normed(stream), host, joined)
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    assert all(accuracy is not None for accuracy in result.accuracy_matrix[-1])
    assert result.memory["peak_static"] >= result.memory["persistent"] > 0
    before = alone(host)
    changed = set(weights) != set(before) or any(not torch.equal(weights[key], before[key]) for key in before)
    # Trained on everything at once, there is nothing before it that a memory or a penalty could keep.
    assert changed or host == "joint"


def test_three_methods_at_once_and_in_the_order_given(stream, normed) -> None:
    plugins = ["si", {"name": "lwf", "temperature": 3.0}, "ewc"]
    strategy = strategies.create("replay", normed(stream), memory_size=8, plugins=plugins)
    assert [type(plugin).__name__ for plugin in strategy.plugins[:4]] == [
        "ReplayPlugin", "SIPlugin", "LwFPlugin", "EWCPlugin",
    ]  # fmt: skip
    assert run(strategy, stream, quiet=True).metrics["final_accuracy"] is not None


@pytest.mark.parametrize("name", strategies.list(joinable=True))
def test_a_method_that_joins_is_a_plugin_with_defaults_and_a_page_of_options(name) -> None:
    plugin = strategies.plugin(name)
    assert isinstance(plugin, SupervisedPlugin)
    parameters = strategies.plugin_parameters(name)
    assert all(parameter.default is not parameter.empty for parameter in parameters.values())
    record = strategies.describe(name)
    assert record.kind != "plug-in" or record.load() is Naive


@pytest.mark.parametrize("name", strategies.list(kind="plug-in"))
def test_a_plugins_own_name_is_fine_tuning_with_it(stream, normed, name) -> None:
    by_name = strategies.create(name, normed(stream), epochs=2, batch_size=8, lr=0.2, device="cpu")
    run(by_name, stream, quiet=True)
    joined = strategies.create("naive", normed(stream), epochs=2, batch_size=8, lr=0.2, device="cpu", plugins=[name])
    run(joined, stream, quiet=True)
    first, second = by_name.model.state_dict(), joined.model.state_dict()
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


class Prepares(SupervisedPlugin):
    """Puts a scale on the features."""

    def prepare_model(self, model: Any) -> None:
        model.backbone = nn.Sequential(model.backbone, nn.LayerNorm(8))


def test_what_a_plugin_puts_into_the_model_is_trained(stream, normed) -> None:
    strategy = strategies.create("naive", normed(stream), epochs=1, lr=0.5, plugins=[Prepares()])
    before = strategy.model.backbone[1].weight.detach().clone()
    strategy.train(stream.train_stream[0], eval_streams=[])
    assert not torch.equal(strategy.model.backbone[1].weight, before)


def test_the_targets_of_a_pass_are_the_batchs_labels(stream, small, watch) -> None:
    seen: list[bool] = []
    plugin = watch(before_forward=lambda s: seen.append(torch.equal(s.pass_targets, s.mbatch[1])))
    strategies.create("naive", small(stream), plugins=[plugin]).train(stream.train_stream[0], eval_streams=[])
    assert seen and all(seen)


@pytest.mark.parametrize(
    ("plugins", "said"),
    [
        (["ewcc"], "unknown plug-in 'ewcc'; did you mean 'ewc'"),
        (["gdumb"], "unknown plug-in 'gdumb'"),
        ([{"ewc_lambda": 1.0}], "plugins: expected a name, or a mapping with one"),
        ([{"name": "ewc", "lambda": 1.0}], "plug-in 'ewc' has no option 'lambda'"),
        ([{"name": "l2", "parameters": ["zz.*"]}], "parameters: 'zz.*' matches no parameter of the encoder"),
        (["si", {"name": "si"}], "plugins: SIPlugin is given twice"),
        ("ewc", "plugins: expected a list of plug-ins, got 'ewc'"),
    ],
)
def test_mistakes_get_one_line(stream, small, plugins, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        strategies.create("naive", small(stream), plugins=plugins)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_plugin_does_not_join_itself(stream, small) -> None:
    with pytest.raises(ContlearnError, match="'replay' is given twice"):
        strategies.create("replay", small(stream), plugins=["replay"])


def test_pairs_that_exclude_each_other_are_named(stream, small) -> None:
    for host in strategies.list(kind=("class-incremental", "plug-in")):
        for joined in strategies.describe(host).excludes:
            with pytest.raises(ContlearnError, match=f"strategy '{host}' cannot be joined by '{joined}'"):
                strategies.create(host, small(stream), plugins=[joined])


def test_projection_sees_through_balanced_batchnorm(stream, normed) -> None:
    plugins = ["adab2n", {"name": "nap", "every": 1}]
    strategy = strategies.create("naive", normed(stream), epochs=2, batch_size=8, lr=0.2, plugins=plugins)
    run(strategy, stream, quiet=True)
    nap = strategy.plugins[1]
    assert list(nap.projected) == ["backbone.1.weight", "backbone.4.weight"]
    images = torch.rand(5, 1, 4, 4)
    strategy.model.eval()
    before = strategy.model(images)
    with torch.no_grad():
        for index in (1, 4):
            strategy.model.backbone[index].weight.mul_(3.0)
    assert not torch.allclose(strategy.model(images), before, atol=1e-2)
    with torch.no_grad():  # the statistics that training with such weights would have left
        for index in (2, 5):
            strategy.model.backbone[index].running_mean.mul_(3.0)
            strategy.model.backbone[index].running_var.mul_(9.0)
    nap.project(strategy.model)
    assert torch.allclose(strategy.model(images), before, atol=1e-3)


def test_task_ids_reach_the_methods(made_up, small) -> None:
    stream = scenarios.task_incremental(made_up(), n_experiences=3)
    for name in strategies.list(joinable=True):
        if name == "adab2n" or strategies.describe(name).kind == "transfer":  # need other networks than this one
            continue
        strategy = strategies.create("naive", small(stream), epochs=1, batch_size=8, plugins=[name])
        assert run(strategy, stream, quiet=True).metrics["final_accuracy"] is not None
