"""The AdaB2N plug-in in its hosts: which rows it balances, what it adds to the loss, and that runs can be resumed."""

from __future__ import annotations

import collections
import copy
import json
import os
import random
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from contlearn import models, run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.models._classifier import Classifier
from contlearn.models._growing_head import GrowingHead
from contlearn.running import RunInterrupted
from contlearn.strategies.adab2n import AdaB2NPlugin, from_batchnorm
from contlearn.strategies.adab2n_layer import AdaB2N, AdaB2N1d, AdaB2N2d, TaskRegister
from contlearn.strategies.er_ace import asymmetric_cross_entropy

SOON: dict[str, Any] = {"lr": 0.05, "epochs": 1, "batch_size": 5, "device": "cpu"}


def normalised() -> Classifier:
    """A convolution, a linear layer and a head that grows, with a BatchNorm of each kind."""
    torch.manual_seed(3)
    backbone = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(),
    )  # fmt: skip
    return Classifier(backbone, GrowingHead(8), feature_dim=8)


def host(name: str, plugin: AdaB2NPlugin, *more: SupervisedPlugin, **options: Any) -> Any:
    """A strategy on a prepared model."""
    model = normalised()
    plugin.prepare_model(model)
    return strategies.create(name, model, plugins=[plugin, *more], **{**SOON, **options})


def layers(strategy: Any) -> list[AdaB2N]:
    return [module for module in strategy.model.modules() if isinstance(module, AdaB2N)]


def train(strategy: Any, stream: Any) -> Any:
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


# ---------------------------------------------------------------- replacement


def test_layers_are_replaced_in_place_and_keep_their_tensors() -> None:
    model = normalised()
    model.backbone[5].weight.requires_grad_(False)
    before, x = dict(model.state_dict(keep_vars=True)), torch.randn(6, 1, 4, 4)
    model(x)
    expected = copy.deepcopy(model).eval()(x)
    plugin = AdaB2NPlugin(kappa=0.7, renormalise=True, fused=False)
    plugin.prepare_model(model)
    first, second = model.backbone[1], model.backbone[5]
    assert (type(first), type(second)) == (AdaB2N2d, AdaB2N1d)
    after = dict(model.state_dict(keep_vars=True))
    assert all(after[name] is tensor for name, tensor in before.items())
    added = {f"backbone.{index}.{name}" for index in (1, 5) for name in ("psi", "eta")}
    assert set(after) - set(before) == added
    assert (first.kappa, first.renormalise, first.fused) == (0.7, True, False)
    assert first.register is second.register is plugin.register and first.batch is plugin.batch
    assert first.psi.requires_grad and not second.psi.requires_grad
    assert torch.equal(model.eval()(x), expected)
    plugin.prepare_model(model)  # what a strategy does once more
    assert model.backbone[1] is first


def test_a_layer_that_sits_in_two_places_stays_one_layer() -> None:
    norm = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": norm})
    AdaB2NPlugin().prepare_model(model)
    assert isinstance(model["a"], AdaB2N) and model["a"] is model["b"][0] is model["c"]


def test_timms_norm_with_activation_keeps_the_activation() -> None:
    norm = BatchNormAct2d(3, act_layer=nn.ReLU6, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(1, 20)
    layer, x = from_batchnorm(norm, kappa=1.0), torch.randn(5, 3, 4, 4)
    expected = norm(x)
    torch.testing.assert_close(layer(x), expected)
    assert expected.min() == 0 and expected.max() == 6
    torch.testing.assert_close(layer.eval()(x), norm.eval()(x), rtol=0.05, atol=0.05)


def test_mistakes_get_one_line(stream, small, quiet) -> None:
    class Other(nn.BatchNorm2d):
        """It might do anything."""

    cases: list[tuple[str, Callable[[], Any]]] = [
        ("Classifier has no BatchNorm1d or BatchNorm2d layer", lambda: AdaB2NPlugin().prepare_model(small(stream))),
        ("adab2n: 0 is a Other; expected", lambda: AdaB2NPlugin().prepare_model(nn.Sequential(Other(2)))),
        (
            "adab2n: 1.0 has no running statistics",
            lambda: AdaB2NPlugin().prepare_model(
                nn.Sequential(nn.ReLU(), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)))
            ),
        ),
        ("layer has momentum None", lambda: from_batchnorm(nn.BatchNorm1d(2, momentum=None))),
        ("kappa: expected 0..1, got 1.5", lambda: AdaB2NPlugin(kappa=1.5)),
        ("lam: expected at least 0, got -1", lambda: AdaB2NPlugin(lam=-1)),
        ("start_task: expected at least 0, got -1", lambda: AdaB2NPlugin(start_task=-1)),
    ]
    model = normalised()
    theirs = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), plugins=[AdaB2NPlugin()], evaluator=quiet()
    )
    cases.append(("the model has no AdaB2N layer", lambda: theirs.train(stream.train_stream[0])))
    for said, call in cases:
        with pytest.raises(ContlearnError) as caught:
            call()
        assert said in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- rows and tasks


HOSTS: list[tuple[str, dict[str, Any], int]] = [  # rows per step: 5 current and ...
    ("naive", {}, 0),
    ("replay", {"memory_size": 12, "batch_size_memory": 6}, 6),
    ("er_ace", {"memory_size": 12, "batch_size_memory": 6, "joint_forward": True}, 6),
    ("der", {"memory_size": 12, "batch_size_memory": 6}, 6),
    ("derpp", {"memory_size": 12, "batch_size_memory": 6, "second_batch": True}, 12),
]


@pytest.mark.parametrize(("name", "options", "exemplars"), HOSTS, ids=[name for name, *_ in HOSTS])
def test_joint_hosts_hand_over_the_task_of_every_row_in_order(
    stream, watch, identify, name, options, exemplars
) -> None:
    places, passed, used = identify(stream, "train"), [], []
    plugin = AdaB2NPlugin()
    note = watch(after_forward=lambda s: used.append((s.clock.train_exp_counter, *passed)))
    strategy = host(name, plugin, note, **options)

    def look(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if module.training:
            rows = plugin.batch.rows
            passed[:] = [[index for index, _ in places(arguments[0])], rows and rows.index.tolist(), rows]

    strategy.model.register_forward_pre_hook(look)
    train(strategy, stream)
    sizes = collections.Counter()
    for experience, tasks, rows, record in used:
        if experience == 0:
            assert rows is None
            continue
        assert rows == tasks  # an experience is a task here
        assert record.counts.tolist() == [rows.count(task) for task in range(experience + 1)]
        sizes[len(rows)] += 1
    assert sizes == {5 + exemplars: 6, 1 + exemplars: 2}
    assert all(len(layer.psi) == 3 for layer in layers(strategy)) and plugin.batch.rows is None
    if exemplars:  # rows of several tasks: psi has an effect and is trained
        assert all((layer.psi != 0).all() for layer in layers(strategy))


@pytest.mark.parametrize(("name", "second"), [("er_ace", False), ("derpp", False), ("derpp", True)])
def test_with_separate_passes_the_second_gets_no_stale_rows(stream, watch, name, second) -> None:
    options: dict[str, Any] = {"memory_size": 12, "batch_size_memory": 5, "joint_forward": False}
    plugin, found, reference = AdaB2NPlugin(lam=0.0), [], []
    if second:
        options["second_batch"] = True
    strategy = host(name, plugin, **options)
    layer = strategy.model.backbone[1]

    def compare(module: AdaB2N, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if module.training:
            x = arguments[0].detach()
            plain = F.batch_norm(x, None, None, module.weight, module.bias, training=True)
            found.append((len(x), bool(torch.allclose(output, plain, atol=1e-5)), layer.eta.item()))
            reference.append(strategy.clock.train_iterations)

    layer.register_forward_hook(compare)
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    passes = collections.defaultdict(list)
    for iteration, seen in zip(reference, found, strict=True):
        passes[iteration].append(seen)
    for iteration, step in passes.items():
        joined = iteration >= 4
        assert len(step) == 1 + joined * (2 if second else 1)
        # Only the current samples, all of task 1 of 2, are weighed; one momentum for all passes of a step.
        assert [plain for _, plain, _ in step] == [not joined, *[True] * (len(step) - 1)]
        assert len({eta for *_, eta in step}) == 1
    etas = [step[0][2] for step in passes.values()]
    assert all(after == pytest.approx(before / (before + 0.9**0.4)) for before, after in pairwise(etas))


@pytest.mark.parametrize("boundaries", [False, True])
def test_pieces_of_an_online_experience_are_one_task(made_up, boundaries) -> None:
    stream = scenarios.online(
        made_up(6), n_experiences=3, experience_size=5, access_task_boundaries=boundaries, transform=lambda x: x
    )
    plugin, counts = AdaB2NPlugin(), []
    strategy = host("er_ace", plugin, joint_forward=True, memory_size=12)
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        counts.append((experience.logging().origin_experience.current_experience, plugin.register.count - 1))
    assert counts == [(task, task) for task in range(3) for _ in range(4)]
    assert plugin.register.task_of == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}


def test_experiences_with_the_same_classes_are_one_task_with_plain_statistics(made_up, watch) -> None:
    stream = scenarios.domain_incremental(made_up(6), n_experiences=2, domains="instances")
    plugin, rows = AdaB2NPlugin(), []
    strategy = host("replay", plugin, watch(after_forward=lambda s: None), memory_size=12)
    layers(strategy)[0].register_forward_pre_hook(lambda *_: rows.append(plugin.batch.rows))
    train(strategy, stream)
    assert plugin.register.count == 1 and rows and set(rows) == {None}


def test_evaluation_registers_nothing(stream) -> None:
    plugin = AdaB2NPlugin()
    strategy = host("naive", plugin)
    strategy.train(stream.train_stream[0], eval_streams=[])
    strategy.eval(stream.test_stream)
    assert plugin.register.count == 1 and all(len(layer.psi) == 1 for layer in layers(strategy))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(("lam", "start_task"), [(0.0, 0), (0.3, 0), (0.3, 1), (0.3, 2)])
def test_the_regularisers_of_all_layers_join_the_loss_from_the_first_task_on(stream, watch, lam, start_task) -> None:
    plugin, parts, checked = AdaB2NPlugin(lam=lam, start_task=start_task), [], []

    def before(strategy: Any) -> None:
        penalties = plugin.batch.penalties
        parts.append((strategy.loss.item(), [penalty.item() for penalty in penalties]))

    def after(strategy: Any) -> None:
        loss, penalties = parts.pop()
        task = strategy.clock.train_exp_counter
        assert len(penalties) == (2 if lam and task >= start_task else 0)
        assert strategy.loss.item() == pytest.approx(loss + lam * sum(penalties), rel=1e-6)
        checked.append(task)

    model = normalised()
    plugin.prepare_model(model)
    chain = [watch(before_backward=before), plugin, watch(before_backward=after)]
    train(strategies.create("naive", model, plugins=chain, **SOON), stream)
    assert collections.Counter(checked) == {0: 4, 1: 4, 2: 4}


@pytest.mark.parametrize("name", ["er_ace", "derpp"])
def test_without_batch_statistics_joint_and_separate_passes_are_the_same(stream, small, name) -> None:
    ends = []
    for joint in (False, True):
        torch.manual_seed(0), random.seed(0)  # rows of the head, and the memory's choice
        options = {"joint_forward": joint, "memory_size": 12, "batch_size_memory": 6, **SOON}
        strategy = train(strategies.create(name, small(stream), **options), stream)
        ends.append(strategy.model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key])


@pytest.mark.parametrize("joint", [False, True])
def test_er_ace_normalises_jointly_or_apart(stream, watch, joint) -> None:
    checked: list[bool] = []

    def check(strategy: Any) -> None:
        if strategy.memory is None:
            return
        model = copy.deepcopy(strategy.model).train()
        x, y, _ = strategy._exemplars
        with torch.no_grad():
            if joint:
                output, old = model(torch.cat([strategy.mb_x, x])).split([len(strategy.mb_y), len(y)])
            else:
                output, old = model(strategy.mb_x), model(x)
        expected = asymmetric_cross_entropy(output, strategy.mb_y, old, y)
        assert strategy.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        checked.append(True)

    options = {"memory_size": 12, "batch_size_memory": 6, "joint_forward": joint, **SOON, "batch_size": 4}
    train(strategies.create("er_ace", normalised(), plugins=[watch(before_backward=check)], **options), stream)
    assert len(checked) == 8


@pytest.mark.parametrize("joint", [False, True])
def test_derpp_takes_another_batch_for_the_labels(stream, watch, identify, joint) -> None:
    places, passes, checked = identify(stream, "train"), [], []

    def check(strategy: Any) -> None:
        batches, passes[:] = list(passes), []
        if strategy.memory is None:
            return
        if joint:
            ((x, output),) = batches
            batches = list(zip(x.split([6, 6, len(x) - 12]), output.split([6, 6, len(x) - 12]), strict=True))
            batches = [batches[2], *batches[:2]]
        assert [len(x) for x, _ in batches[1:]] == [6, 6]
        assert set(places(batches[1][0])).isdisjoint(places(batches[2][0]))  # twelve exemplars, six and six
        labels = [
            torch.tensor([stream.train_stream[i].dataset.targets[place] for i, place in places(x)]) for x, _ in batches
        ]
        current, first, second = (output for _, output in batches)
        known = strategy._stored_logits.isfinite()
        squares = (first[:, : known.shape[1]] - strategy._stored_logits.nan_to_num())[known].square().mean()
        expected = F.cross_entropy(current, labels[0]) + 0.3 * squares + 0.7 * F.cross_entropy(second, labels[2])
        assert strategy.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        checked.append(strategy.clock.train_exp_counter)

    options = {"memory_size": 12, "batch_size_memory": 6, "alpha": 0.3, "beta": 0.7, **SOON, "batch_size": 4}
    strategy = strategies.create(
        "derpp", normalised(), joint_forward=joint, second_batch=True, plugins=[watch(before_backward=check)], **options
    )

    def note(module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if module.training:
            passes.append((given[0], output.detach()))

    strategy.model.register_forward_hook(note)
    train(strategy, stream)
    assert collections.Counter(checked) == {1: 4, 2: 4}


# ---------------------------------------------------------------- any strategy


HOSTS = [n for n in strategies.list(kind="class-incremental") if "adab2n" not in strategies.describe(n).excludes]


@pytest.mark.parametrize("name", HOSTS)
def test_it_trains_in_every_strategy(stream, name) -> None:
    plugin = AdaB2NPlugin()
    strategy = host(name, plugin)
    if name == "joint":
        strategy.train(stream.train_stream, eval_streams=[])
    else:
        train(strategy, stream)
    for layer in layers(strategy):
        assert layer.register is plugin.register and layer.batch is plugin.batch and len(layer.psi) == 3
        assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
    held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    assert {id(parameter) for parameter in strategy.model.parameters()} <= held
    assert plugin.batch.penalties == [] and not plugin.batch.counts_steps


def test_it_trains_in_avalanches_naive(stream, quiet) -> None:
    model, plugin = normalised(), AdaB2NPlugin()
    plugin.prepare_model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(
        model=model, optimizer=optimizer, plugins=[plugin], evaluator=quiet(), train_mb_size=5, train_epochs=1
    )
    train(strategy, stream)
    assert plugin.register.count == 3 and [layer.psi.numel() for layer in layers(strategy)] == [3, 3]
    assert layers(strategy)[0].eta.item() == pytest.approx(_eta_after(0.4, steps=12))


def _eta_after(kappa: float, *, steps: int) -> float:
    eta = 0.1**kappa
    for _ in range(steps):
        eta = eta / (eta + 0.9**kappa)
    return eta


def test_copies_of_the_model_leave_the_batch_alone_and_copies_of_the_plugin_the_register(stream) -> None:
    plugin = AdaB2NPlugin()
    strategy = host("naive", plugin)
    strategy.train(stream.train_stream[0], eval_streams=[])
    teacher = copy.deepcopy(strategy.model)
    other = next(module for module in teacher.modules() if isinstance(module, AdaB2N))
    assert other.register is plugin.register and other.batch is not plugin.batch
    fork = copy.deepcopy(plugin)
    fork.register.task_of[99] = 1
    assert 99 not in plugin.register.task_of and (fork.kappa, fork.register.count) == (0.4, 1)
    assert isinstance(fork.register, TaskRegister) and fork.batch is not plugin.batch


# ---------------------------------------------------------------- runs


class StopAt(SupervisedPlugin):  # type: ignore[type-arg]
    """SIGTERM to this process in a training iteration."""

    checkpoint_exclude = ("at",)

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_iterations == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def one_run(stream: Any, name: str, out: Path, *, at: int = -1, **options: Any) -> Any:
    plugin = AdaB2NPlugin(kappa=0.4, lam=0.1)
    strategy = host(name, plugin, StopAt(at), memory_size=12, momentum=0.9, **options)
    return run(strategy, stream, out=out, resume=True, quiet=True), strategy, plugin


@pytest.mark.parametrize("online", [False, True])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(made_up, tmp_path, online) -> None:
    cut = {"experience_size": 6} if online else {}
    stream = (scenarios.online if online else scenarios.class_incremental)(made_up(6), n_experiences=3, **cut)
    name = "er_ace" if online else "derpp"
    options = {"joint_forward": True, "epochs": 1 if online else 2}
    whole, strategy, plugin = one_run(stream, name, tmp_path / "whole", **options)
    total = strategy.clock.train_iterations
    for at in (1, total // 2, total - 3):
        folder = tmp_path / str(at)
        with pytest.raises(RunInterrupted):
            one_run(stream, name, folder, at=at, **options)
        again, resumed, its = one_run(stream, name, folder, **options)
        model = "model.safetensors"
        assert (folder / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
        assert again.results["accuracy_matrix"] == whole.results["accuracy_matrix"]
        assert its.register.task_of == plugin.register.task_of and its.register.count == 3
        assert all(layer.register is its.register for layer in layers(resumed))
    assert len(layers(strategy)[0].psi) == 3 and layers(strategy)[0].eta.item() < 0.2
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["status"] == "complete"


def test_a_fixed_head_that_never_grows_resumes_too(made_up, tmp_path) -> None:
    stream = scenarios.class_incremental(made_up(6, side=8), n_experiences=3)

    def go(out: Path, at: int) -> Any:
        model, plugin = models.create("resnet14", stream, seed=0, head="fixed"), AdaB2NPlugin()
        plugin.prepare_model(model)
        strategy = strategies.create("derpp", model, plugins=[plugin, StopAt(at)], memory_size=6, **SOON)
        return run(strategy, stream, out=out, resume=True, quiet=True)

    go(tmp_path / "whole", -1)
    with pytest.raises(RunInterrupted):
        go(tmp_path / "pieces", 9)
    go(tmp_path / "pieces", -1)
    ends = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces")]
    assert ends[0] == ends[1]
