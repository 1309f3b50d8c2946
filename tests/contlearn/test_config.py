"""Defaults, files and command-line overrides come to one resolved mapping, which says all there is about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from contlearn import config, models, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.options import model_options, scenario_options, strategy_options, type_name


def resolve(text: str = "", *overrides: str) -> dict[str, Any]:
    return config.resolve(config._yaml(text) or {}, overrides)


# ---------------------------------------------------------------------- defaults


def test_nothing_given_is_a_whole_configuration() -> None:
    resolved = resolve()
    assert {section: resolved[section]["name"] for section in config.SECTIONS} == config.DEFAULT_NAMES
    assert (resolved["seed"], resolved["threads"], resolved["loggers"]) == (0, None, [])


@pytest.mark.parametrize("name", strategies.list())
def test_the_defaults_are_those_of_the_python_interface(name: str) -> None:
    resolved = resolve("", f"--strategy.name={name}")["strategy"]
    stream = scenarios.class_incremental("digits")
    adapts = strategies.describe(name).kind == "test-time"
    staged = adapts or name in ("adab2n", "sherl", "unipt", "lst")  # they need BatchNorm, or stages of blocks
    model = "test_efficientnet" if name in ("mobiletl", "tinytl") else "resnet14" if staged else "mlp"
    assert resolved == strategies.create(name, models.create(model, stream, seed=0)).spec


@pytest.mark.parametrize("name", scenarios.list())
def test_a_stream_from_defaults_says_the_same_as_its_configuration(name: str) -> None:
    resolved = resolve("", f"--scenario.name={name}")["scenario"]
    stream = scenarios.create(**resolved)
    assert {key: stream.spec[key] for key in resolved} == resolved


@pytest.mark.parametrize("name", strategies.list())
def test_every_option_of_a_strategy_can_be_given(name: str) -> None:
    python_only = {"criterion", "evaluator"}
    assert {option.name for option in strategy_options(name)} == set(strategies.parameters(name)) - python_only


def options_of_everything() -> list[Any]:
    found = [pytest.param(option, id=f"run-{option.name}") for option in config.RUN_OPTIONS]
    for kind, names, options in (
        ("strategy", strategies.list(), strategy_options),
        ("scenario", scenarios.list(), scenario_options),
        ("model", models.list(), lambda name: model_options(name) or []),
    ):
        for name in names:
            found += [pytest.param(option, id=f"{kind}-{name}-{option.name}") for option in options(name)]
    return found


@pytest.mark.parametrize("option", options_of_everything())
def test_every_option_is_documented_and_its_type_can_be_said(option: Any) -> None:
    assert len(option.help) > 10, "a help text comes from the docstring's Args"
    said = type_name(option.type)
    assert said
    assert not any(sign in said for sign in "<>[]|'"), said  # words, not Python
    assert "typing" not in said


# ---------------------------------------------------------------------- files and overrides


@pytest.mark.parametrize(
    ("overrides", "section", "key", "value"),
    [
        (["--strategy.lr=0.5"], "strategy", "lr", 0.5),
        (["--strategy.lr", "0.5"], "strategy", "lr", 0.5),
        (["--strategy.lr", "1e-3"], "strategy", "lr", 0.001),
        (["--strategy.lr=1"], "strategy", "lr", 1.0),
        (["--strategy.lr=0.1", "--strategy.lr=0.2"], "strategy", "lr", 0.2),
        (["--strategy.reset_optimizer=true"], "strategy", "reset_optimizer", True),
        (["--strategy.optimizer", "adam"], "strategy", "optimizer", "adam"),
        (["--strategy.milestones=[1, 2]"], "strategy", "milestones", [1, 2]),
        (["--strategy.name", "replay", "--strategy.batch_size_memory=7"], "strategy", "batch_size_memory", 7),
        (["--strategy.name=replay", "--strategy.batch_size_memory=null"], "strategy", "batch_size_memory", None),
        (["--scenario.class_order=[1,0,2,3,4,5,6,7,8,9]"], "scenario", "class_order", [1, 0, *range(2, 10)]),
        (["--scenario.class_order", "[9,8,7,6,5,4,3,2,1,0]"], "scenario", "class_order", [*range(9, -1, -1)]),
        (["--scenario.class_order=random"], "scenario", "class_order", "random"),
        (["--scenario.image_size=null"], "scenario", "image_size", None),
        (["--scenario.normalise=false"], "scenario", "normalise", False),
        (["--scenario.dataset=folder:/a path/with=signs"], "scenario", "dataset", "folder:/a path/with=signs"),
        (["--model.hidden=7", "--model.dropout", "0.25"], "model", "dropout", 0.25),
        (["--model.weights=null"], "model", "weights", None),
    ],
)
def test_overrides_of_every_kind(overrides: list[str], section: str, key: str, value: Any) -> None:
    found = resolve("", *overrides)[section][key]
    assert found == value
    assert type(found) is type(value)


def test_options_of_the_run_itself() -> None:
    resolved = resolve("seed: 3\nloggers: [csv]", "--threads", "2", "--loggers+=tensorboard")
    assert (resolved["seed"], resolved["threads"], resolved["loggers"]) == (3, 2, ["csv", "tensorboard"])
    assert resolve("loggers: [csv]", "--loggers=[tensorboard]")["loggers"] == ["tensorboard"]


def test_an_override_wins_over_the_file_and_leaves_its_neighbours() -> None:
    text = "strategy: {name: ewc, lr: 0.3, epochs: 4}\nmodel: {hidden: 9}\ndescription: {any: thing}"
    resolved = resolve(text, "--strategy.lr=0.2")
    assert (resolved["strategy"]["name"], resolved["strategy"]["lr"], resolved["strategy"]["epochs"]) == ("ewc", 0.2, 4)
    assert resolved["model"]["hidden"] == 9
    assert "description" not in resolved


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "0.001", "'1e-3'"])
def test_numbers_as_people_write_them(text: str) -> None:
    assert resolve(f"strategy: {{lr: {text}}}")["strategy"]["lr"] == 0.001


@pytest.mark.parametrize("empty", ["strategy:", "strategy: {}", "strategy: null"])
def test_a_section_without_content_is_the_default(empty: str) -> None:
    assert resolve(empty) == resolve()


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(strategies.list(kind=("class-incremental", "plug-in"))),
    lr=st.floats(0, 1e6),
    seed=st.integers(0, 2**63 - 1),
    order=st.permutations(range(10)),
    milestones=st.lists(st.integers(0, 99), max_size=3),
)
def test_a_resolved_configuration_written_and_read_resolves_to_itself(
    name: str, lr: float, seed: int, order: list[int], milestones: list[int]
) -> None:
    given_file = {
        "seed": seed,
        "scenario": {"class_order": order},
        "strategy": {"name": name, "lr": lr, "milestones": milestones},
    }
    resolved = config.resolve(given_file)
    assert (resolved["strategy"]["lr"], resolved["seed"], resolved["scenario"]["class_order"]) == (lr, seed, order)
    assert resolve(yaml.safe_dump(resolved, sort_keys=False)) == resolved
    # And through the command line, one option at a time.
    overrides = [
        f"--{section}.{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...').strip()}"
        for section in config.SECTIONS
        for key, value in resolved[section].items()
        if not isinstance(value, str)
    ]
    assert config.resolve({}, [f"--strategy.name={name}", f"--seed={seed}", *overrides]) == resolved


# ---------------------------------------------------------------------- models of timm


def test_options_of_a_timm_model_are_passed_through(tmp_path: Path) -> None:
    text = "model: {name: resnet10t, head: fixed, drop_rate: 1e-1}"
    resolved = resolve(text, "--model.zero_init_last=false", "--model.output_stride", "16", "--model.weights=null")
    assert resolved["model"] == {
        "name": "resnet10t",
        "head": "fixed",
        "weights": None,
        "trainable": None,
        "drop_rate": 0.1,
        "zero_init_last": False,
        "output_stride": 16,
        "seed": None,
    }
    strategy, _ = config.build(resolve("model: {name: resnet10t}", "--model.drop_rate=0.25"))
    assert strategy.model.spec["drop_rate"] == 0.25


def test_what_timm_does_not_know_is_named() -> None:
    with pytest.raises(ContlearnError, match="nonsense"):
        config.build(resolve("model: {name: resnet10t}", "--model.nonsense=3"))
    with pytest.raises(ContlearnError, match=r"model\.foo: expected a YAML value, got '\[1'"):
        resolve("model: {name: resnet10t}", "--model.foo=[1")
    with pytest.raises(ContlearnError, match=r"model\.head: expected one of auto, growing, task, fixed, got 'grown'"):
        resolve("model: {name: resnet10t}", "--model.head=grown")


def test_plugins_are_filled_in_whether_named_or_given_with_options() -> None:
    text = "strategy: {name: replay, plugins: [si, {name: lwf, temperature: 3}]}"
    filled = [
        {"name": "si", "si_lambda": 1.0, "damping": 0.001, "max_importance": 0.001},
        {"name": "lwf", "alpha": 1.0, "temperature": 3.0, "teacher_in_train_mode": False},
    ]
    assert resolve(text)["strategy"]["plugins"] == filled
    given = yaml.safe_dump({"strategy": {"name": "replay", "plugins": filled}})
    assert resolve(given)["strategy"]["plugins"] == filled
    assert resolve(text, "--strategy.plugins=[{name: si, damping: 1}]")["strategy"]["plugins"] == [
        {"name": "si", "si_lambda": 1.0, "damping": 1.0, "max_importance": 0.001}
    ]
    strategy, _ = config.build(resolve(text))
    assert strategy.spec["plugins"] == filled
    assert [type(plugin).__name__ for plugin in strategy.plugins[:3]] == ["ReplayPlugin", "SIPlugin", "LwFPlugin"]


# ---------------------------------------------------------------------- what is built


def test_the_seed_decides_the_first_weights() -> None:
    import torch

    nets = [config.build(resolve("", f"--seed={seed}", "--model.head=fixed"))[0].model for seed in (1, 1, 2)]
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in nets]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_thread_count_is_set() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        config.make_stream(resolve("", "--threads=2"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_that_memory_cannot_hold_is_one_line() -> None:
    with pytest.raises(ContlearnError, match="model 'mlp': not enough memory"):
        config.build(resolve("model: {name: mlp, hidden: 100000000000}"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("strategy: {name: ewc, ewc_lambda: -1}", "ewc_lambda: expected at least 0, got -1"),
        ("strategy: {name: naive, lr_schedule: multistep, milestones: [1], gamma: -1}", "gamma: expected more than 0"),
    ],
)
def test_factors_that_would_train_backwards_are_refused(text: str, named: str) -> None:
    with pytest.raises(ContlearnError, match=named):
        config.build(resolve(text))
