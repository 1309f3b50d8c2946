"""Strategies by name: every one is made, described, trained and made again from its spec."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from contlearn import config, models, strategies
from contlearn.errors import ContlearnError
from contlearn.models import Classifier, GrowingHead
from contlearn.models._resnet18 import SmallImageResNet18
from contlearn.strategies.adapter import Adapter
from contlearn.strategies.registry import STRATEGIES, StrategyInfo
from contlearn.strategies.template import SupervisedTemplate

LOOP = {
    "lr", "epochs", "batch_size", "optimizer", "momentum", "weight_decay", "reset_optimizer", "lr_schedule",
    "milestones", "gamma", "warmup_epochs", "first_experience", "clip_grad_norm", "amp", "eval_batch_size",
    "device", "criterion", "plugins", "evaluator",
}  # fmt: skip
HERDED = {"memory_size", "per_class", "memory_budget", "budget_covers", "budget_reference", "classifier", "align"}
OWN = {
    "naive": set(),
    "joint": set(),
    "cumulative": set(),
    "replay": {"memory_size", "memory_budget", "policy", "batch_size_memory"},
    "er_ace": {"memory_size", "memory_budget", "policy", "batch_size_memory", "joint_forward"},
    "der": {"memory_size", "memory_budget", "alpha", "beta", "batch_size_memory", "joint_forward", "second_batch"},
    "derpp": {"memory_size", "memory_budget", "alpha", "beta", "batch_size_memory", "joint_forward", "second_batch"},
    "lwf": {"alpha", "temperature", "teacher_in_train_mode"},
    "ewc": {"ewc_lambda", "mode", "decay_factor"},
    "si": {"si_lambda", "damping", "max_importance"},
    "agem": {"patterns_per_experience", "memory_budget", "sample_size", "partial_batches"},
    "gdumb": {"memory_size", "memory_budget"},
    "icarl": {"memory_size", "memory_budget", "classifier", "mirror"},
    "wa": {*HERDED, "temperature"},
    "memo": {*HERDED, "alpha_aux", "specialised", "train_base"},
    "der_expand": {*HERDED, "alpha_aux"},
    "rehearsal_free": {
        "class_loss", "loss_scale", "pred_kd", "feat_kd", "l2", "ewc", "fisher", "temperature", "update_mode",
    },
    "prd": {
        "alpha", "beta", "temperature", "prototypes_lr", "relation", "distil_temperature", "teacher_mode",
        "views", "crop", "flip", "jitter", "grayscale", "seed",
    },
    "l2": {"coefficient", "anchor", "parameters"},
    "online_ewc": {"coefficient", "fisher", "half", "parameters"},
    "pred_kd": {"scale", "kind", "temperature"},
    "feat_kd": {"mu"},
    "adab2n": {"kappa", "lam", "start_task", "renormalise", "fused"},
    "nap": {
        "every", "norm", "affine", "affine_decay", "rate", "total_steps", "final_factor", "reference",
        "reference_scale", "reference_power", "record", "log_size", "input_shape",
    },
    "reset": {"to", "head", "moments"},
    "mobiletl": {
        "blocks", "head_layers", "activation_backward", "last_norm", "trunk_int8", "trunk_batch", "cache_trunk",
    },
    "sherl": {
        "width", "features", "late", "down", "up", "redundancy", "residual", "temperature", "dropout", "eps", "packed",
        "seed",
    },
    "unipt": {"width", "confidence", "eps", "seed"},
    "lst": {"factor", "dropped", "temperature", "init", "seed"},
    "tinytl": {"blocks", "biases", "kernel", "groups", "seed"},
    "lean": {"frozen_norms", "packed"},
    "mesa": {"groups", "rounding", "ranges", "decay", "min_elements"},
}  # fmt: skip

ADAPTERS = ("source", "bn_stats", "tent", "eata", "cotta", "sar", "ecotta")
SUPERVISED = strategies.list(kind=("class-incremental", "plug-in", "transfer"))


@pytest.fixture
def network(small, normed):
    """``network(name, stream)``: the small network, or one with what a method looks for."""

    def make(name, stream):
        if name in ("mobiletl", "tinytl"):
            return models.create("test_efficientnet", stream, seed=0)  # inverted residual blocks
        if name in ("sherl", "unipt", "lst"):
            return staged(stream)
        return normed(stream) if name == "adab2n" else small(stream)

    return make


def staged(stream):
    """A tiny ResNet of several stages."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(SmallImageResNet18(1, 2), GrowingHead(16), feature_dim=16)
    model.input_shape = stream.input_shape
    return model


@pytest.mark.parametrize("name", SUPERVISED)
def test_every_strategy_is_made_trained_and_evaluated(stream, network, watch, name) -> None:
    answers: list[torch.Tensor] = []
    plugin = watch(after_eval_iteration=lambda s: answers.append(s.mb_output))
    strategy = strategies.create(name, network(name, stream), epochs=1, batch_size=8, plugins=[plugin])
    before = {key: value.detach().clone() for key, value in strategy.model.backbone.named_parameters()}
    strategy.train(stream.train_stream if name == "joint" else stream.train_stream[0], eval_streams=[])
    assert strategy.model.head.out_features == (6 if name == "joint" else 2)
    now = dict(strategy.model.backbone.named_parameters())
    assert any(not torch.equal(before[key], now[key]) for key in before)
    assert all(parameter.isfinite().all() for parameter in strategy.model.parameters())
    strategy.eval(stream.test_stream)
    assert [len(output) for output in answers] == [6, 6, 6] and all(output.isfinite().all() for output in answers)


@pytest.mark.parametrize("name", strategies.list())
def test_every_record_is_filled_in(name) -> None:
    record = strategies.describe(name)
    assert record.name == name
    for field in dataclasses.fields(record):
        optional = ("exportable", "defaults", "plugin", "excludes")
        assert field.name in optional or getattr(record, field.name), field.name
    assert len(record.description) < 100 and record.description.endswith(".")
    adapts = record.kind == "test-time"
    assert issubclass(record.load(), Adapter if adapts else SupervisedTemplate)
    assert set(record.defaults) <= (set() if adapts else OWN[name] | LOOP)


@pytest.mark.parametrize("name", SUPERVISED)
def test_parameters_are_the_methods_own_and_the_training_loops(name) -> None:
    parameters = strategies.parameters(name)
    assert set(parameters) == LOOP | OWN[name]
    assert set(list(parameters)[: len(OWN[name])]) == OWN[name]
    assert not OWN[name] & LOOP
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())


def changed(name: str) -> dict[str, object]:
    """Another value for each option of ``name`` that a configuration file can give."""
    others = {
        "lr": 0.025, "epochs": 4, "batch_size": 3, "momentum": 0.5, "weight_decay": 0.01, "reset_optimizer": True,
        "lr_schedule": "multistep", "milestones": [1, 3], "gamma": 0.3, "warmup_epochs": 1, "clip_grad_norm": 2.5,
        "first_experience": {"epochs": 5, "gamma": 0.2},
        "eval_batch_size": 11, "device": "cpu", "memory_size": 17, "policy": "reservoir", "batch_size_memory": 6,
        "alpha": 0.25, "beta": 0.75, "temperature": 3.0, "teacher_in_train_mode": True, "ewc_lambda": 0.4,
        "mode": "online", "decay_factor": 0.9, "si_lambda": 0.2, "damping": 0.1, "max_importance": 0.5,
        "patterns_per_experience": 5, "sample_size": 9, "partial_batches": True, "classifier": "head", "mirror": True,
        "optimizer": "sgd", "amp": "none", "memory_budget": "64KB", "joint_forward": name == "er_ace",
        "second_batch": True, "kappa": 0.7, "lam": 0.5, "start_task": 1, "renormalise": True, "fused": False,
        "class_loss": "ce_kd", "loss_scale": 2.0, "pred_kd": True, "feat_kd": 1.5, "l2": 0.01, "ewc": 3.0,
        "fisher": "sample", "update_mode": "train", "coefficient": 0.25, "anchor": "initial", "half": False,
        "parameters": ["backbone.layers.0.0.*"], "scale": 2.0, "kind": "softmax", "mu": 0.5, "every": 3, "norm": "rms",
        "affine": "fixed", "affine_decay": 0.1, "rate": "linear", "total_steps": 30, "final_factor": 0.1,
        "reference_scale": "layer", "reference_power": 2, "log_size": 16, "to": "fresh", "head": True, "moments": False,
        "blocks": 2, "head_layers": "frozen", "activation_backward": "exact", "last_norm": "running",
        "alpha_aux": 0.5, "specialised": 1, "train_base": True, "align": True, "budget_covers": "model",
        "trunk_int8": True, "trunk_batch": 4, "cache_trunk": True, "width": 12, "late": "none", "redundancy":
        "detached", "residual": "none", "dropout": 0.2, "eps": 1e-6, "packed": False,
        "seed": 3, "confidence": "merged", "factor": 4, "init": "random", "biases": False, "kernel": 3, "groups": 1,
        "frozen_norms": "running", "rounding": "nearest", "ranges": "ema", "decay": 0.8, "min_elements": 16,
    }  # fmt: skip
    return {key: value for key, value in others.items() if key in strategies.parameters(name)}


@pytest.mark.parametrize("name", SUPERVISED)
def test_the_spec_is_plain_data_that_a_configuration_takes_and_makes_the_strategy_again(stream, network, name) -> None:
    for options in ({}, changed(name)):
        strategy = strategies.create(name, network(name, stream), **options)
        spec = json.loads(json.dumps(strategy.spec))
        assert spec["name"] == name and set(spec) == {"name"} | OWN[name] | LOOP - {"criterion", "evaluator"}
        assert {key: spec[key] for key in options} == options
        assert config.resolve({"strategy": spec})["strategy"] == spec
        again = strategies.create(model=network(name, stream), **spec)
        assert type(again) is type(strategy) and again.spec == strategy.spec
        assert plain_state(again) == plain_state(strategy)


def plain_state(strategy) -> dict[str, object]:
    """Every number, text and flag the strategy and its own plug-ins hold, and the optimizer's settings."""

    def plain(owner: object) -> dict[str, object]:
        def is_plain(value: object) -> bool:
            if isinstance(value, list):
                return all(map(is_plain, value))
            return value is None or isinstance(value, bool | int | float | str)

        return {key: value for key, value in vars(owner).items() if is_plain(value)}

    settings = {key: value for key, value in strategy.optimizer.param_groups[0].items() if key != "params"}
    held = {key: value for key, value in plain(strategy).items() if key not in ("plugins", "dataloader")}
    return {
        "strategy": held,
        "plugins": [(type(plugin).__name__, plain(plugin)) for plugin in strategy.plugins],
        "memory": getattr(getattr(strategy, "storage_policy", None), "max_size", None),
        "optimizer": (type(strategy.optimizer).__name__, settings),
        "rates": [(plan.epochs, [plan.factor(epoch) for epoch in range(5)]) for plan in strategy.plans],
    }


def test_der_and_derpp_are_one_class_with_different_defaults(stream, small) -> None:
    der, derpp = (strategies.create(name, small(stream)) for name in ("der", "derpp"))
    assert type(der) is type(derpp)
    assert ((der.alpha, der.beta), (derpp.alpha, derpp.beta)) == ((0.1, 0.0), (0.1, 0.5))
    assert strategies.create("derpp", small(stream), beta=0.2).beta == 0.2


def test_what_only_python_can_give_stays_out_of_the_spec(stream, small, watch) -> None:
    model = small(stream)
    strategy = strategies.create(
        "naive", model, criterion=nn.CrossEntropyLoss(label_smoothing=0.1), plugins=[watch()],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    assert set(strategy.spec) == {"name"} | LOOP - {"criterion", "evaluator", "optimizer"}
    assert strategy.spec["plugins"] == []


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("ewc", {"ewc_lamda": 1.0}, "did you mean 'ewc_lambda'"),
        ("replay", {"batchsize": 8}, "did you mean 'batch_size'"),
        ("lwf", {"zzz": 1}, "has no option 'zzz' (expected one of: alpha, temperature"),
        ("replay", {"memory_size": 0}, "memory_size: expected at least 1, got 0"),
        ("replay", {"policy": "fifo"}, "policy: expected reservoir"),
        ("replay", {"batch_size_memory": 0}, "batch_size_memory: expected at least 1, got 0"),
        ("der", {"memory_size": 0}, "memory_size: expected at least 1, got 0"),
        ("derpp", {"batch_size_memory": -1}, "batch_size_memory: expected at least 1, got -1"),
        ("er_ace", {"batch_size_memory": 0}, "batch_size_memory: expected at least 1, got 0"),
        ("gdumb", {"memory_size": 0}, "memory_size: expected at least 1, got 0"),
        ("icarl", {"memory_size": 0}, "memory_size: expected at least 1, got 0"),
        ("icarl", {"classifier": "ncm"}, "classifier: expected nme or head"),
        ("replay", {"memory_budget": "64 sheep"}, "memory_budget: expected bytes such as"),
        ("agem", {"sample_size": 0}, "sample_size: expected at least 1, got 0"),
        ("ewc", {"mode": "offline"}, "mode: expected separate or online, got 'offline'"),
        ("lwf", {"temperature": 0.0}, "temperature: expected more than 0"),
        ("si", {"damping": -1.0}, "damping: expected more than 0"),
    ],
)
def test_mistakes_get_one_line(stream, small, name, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        strategies.create(name, small(stream), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_strategy_gets_the_nearest(stream, small) -> None:
    for call in (strategies.describe, strategies.parameters, lambda name: strategies.create(name, small(stream))):
        with pytest.raises(ContlearnError, match="unknown strategy 'der\\+\\+'; did you mean 'der'"):
            call("der++")


def test_the_list_can_be_narrowed() -> None:
    assert list(OWN) == SUPERVISED and strategies.list() == [*OWN, *ADAPTERS] == list(STRATEGIES)
    assert strategies.list(kind="test-time") == list(ADAPTERS)
    assert strategies.list("der*") == ["der", "derpp", "der_expand"]
    plugins = strategies.list(kind="plug-in")
    assert plugins == ["l2", "online_ewc", "pred_kd", "feat_kd", "adab2n", "nap", "reset", "mesa"]
    transfer = strategies.list(kind="transfer")
    assert transfer == ["mobiletl", "sherl", "unipt", "lst", "tinytl", "lean"]
    assert set(strategies.list(joinable=True)) == {"replay", "lwf", "ewc", "si", "agem", *plugins, *transfer}
    assert set(strategies.list(joinable=False)) == {*OWN, *ADAPTERS} - set(strategies.list(joinable=True))


def test_records_cannot_be_changed() -> None:
    record = strategies.describe("derpp")
    assert isinstance(record, StrategyInfo)
    with pytest.raises(AttributeError):
        record.status = "draft"  # type: ignore[misc]
    with pytest.raises(TypeError):
        record.defaults["beta"] = 1.0  # type: ignore[index]


def test_listing_loads_neither_torch_nor_avalanche() -> None:
    code = (
        "import sys; from contlearn import scenarios, strategies; "
        "[strategies.describe(n) for n in strategies.list()]; [scenarios.describe(n) for n in scenarios.list()]; "
        "print([m for m in ('torch', 'avalanche', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
