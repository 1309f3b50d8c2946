"""Distillation of predictions and features: against independent computations, and the one teacher they share."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from avalanche.models import MultiTaskModule
from avalanche.training.supervised import Naive as AvalancheNaive
from safetensors.torch import load_file
from torch import nn

from contlearn import models, run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.memory.account import snapshot
from contlearn.strategies.distillation import FeatKDPlugin, PredKDPlugin, SeenClasses
from contlearn.strategies.naive import Naive
from contlearn.strategies.penalties import L2Plugin, OnlineEWCPlugin
from contlearn.strategies.rehearsal_free import RehearsalFree
from contlearn.strategies.replay import ReplayPlugin
from contlearn.strategies.teacher import classifier_name

SOON = {"lr": 0.1, "epochs": 2, "batch_size": 5, "device": "cpu"}


def train(strategy, stream):
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def teacher_bytes(model: nn.Module) -> int:
    return 4 * sum(value.numel() for value in model.parameters())


class Copies:
    """A teacher of the test's own: the model before each experience."""

    def __init__(self, watch) -> None:
        self.before: nn.Module | None = None
        self.plugin = watch(before_training_exp=self.take)

    def take(self, strategy) -> None:
        self.before = copy.deepcopy(strategy.model).eval()

    @torch.no_grad()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.before(x)


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_predictions_of_old_classes_are_distilled_from_the_second_experience(stream, small, watch, kind) -> None:
    copies, terms = Copies(watch), []

    def check(strategy) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        old = list(range(new[0]))
        z, x = strategy.mb_output, strategy.mb_x
        expected = torch.zeros(())
        if old and kind == "sigmoid":
            p = copies.logits(x)[:, old].double().sigmoid()
            s = z[:, old].double().sigmoid()
            terms_of = -(p * s.log() + (1 - p) * (1 - s).log())
            expected = 5 * terms_of.sum() / (len(x) * (len(old) + len(new)))
            assert not torch.allclose(p.sum(1), torch.ones(len(x), dtype=torch.float64), atol=1e-3)
        elif old:
            p, q = (copies.logits(x)[:, old].double() / 3).softmax(1), (z[:, old].double() / 3).softmax(1)
            expected = 5 * 9 * (p * (p.log() - q.log())).sum(1).mean()
        term = strategy.loss - F.cross_entropy(z, strategy.mb_y)
        assert term.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
        terms.append((len(old), term.item()))

    plugin = PredKDPlugin(kind=kind, temperature=3.0)
    plugins = [copies.plugin, plugin, watch(before_backward=check)]
    train(Naive(model=small(stream, dropout=0.3), plugins=plugins, **SOON), stream)
    assert {old for old, _ in terms} == {0, 2, 4}
    assert all(term == 0 for old, term in terms if not old) and max(term for old, term in terms if old == 4) > 0.01


def test_the_gradient_on_old_columns_is_the_gap_of_the_sigmoids(stream, small, watch) -> None:
    copies, seen = Copies(watch), []

    def keep(strategy) -> None:
        strategy.mb_output.retain_grad()

    def check(strategy) -> None:
        old = list(range(min(strategy.experience.classes_in_this_experience)))
        if old:
            z, x = strategy.mb_output, strategy.mb_x
            gap = z[:, old].sigmoid() - copies.logits(x)[:, old].sigmoid()
            expected = 5 * gap / (len(x) * (len(old) + 2))
            torch.testing.assert_close(z.grad[:, old], expected, rtol=1e-3, atol=1e-7)
            seen.append(gap.abs().max().item())

    strategy = RehearsalFree(
        model=small(stream, head="fixed"),
        pred_kd=True,
        plugins=[copies.plugin, watch(after_forward=keep, after_backward=check)],
        **SOON,
    )
    train(strategy, stream)
    assert max(seen) > 0.003


def test_classes_that_return_are_not_old() -> None:
    classes = SeenClasses()
    for new, old, seen in (([2, 0], [], [0, 2]), ([1], [0, 2], [0, 1, 2]), ([2, 4], [0, 1], [0, 1, 2, 4])):
        classes.start(type("Experience", (), {"classes_in_this_experience": new}))
        assert (classes.old, classes.seen) == (old, seen)
        classes.finish()


def test_under_task_heads_predictions_are_compared_in_front_of_the_mask(made_up, watch) -> None:
    stream = scenarios.task_incremental(made_up(), n_experiences=3)
    model = models.create("mlp", stream, seed=0, hidden=8, dropout=0.0)
    copies, terms = Copies(watch), []

    def check(strategy) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        old, x = list(range(new[0])), strategy.mb_x
        expected = 0.0
        if old:
            teacher, student = copies.before, strategy.model
            with torch.no_grad():
                was = F.linear(teacher.features(x), teacher.head.weight, teacher.head.bias)[:, old].sigmoid()
                now = F.linear(student.features(x), student.head.weight, student.head.bias)[:, old]
            expected = 5 * F.binary_cross_entropy_with_logits(now, was, reduction="sum").item()
            expected /= len(x) * (len(old) + len(new))
        term = strategy.loss - F.cross_entropy(strategy.mb_output, strategy.mb_y)
        assert term.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        terms.append(expected)

    train(Naive(model=model, plugins=[copies.plugin, PredKDPlugin(), watch(before_backward=check)], **SOON), stream)
    assert max(terms) > 0.5


class _TwoHeads(MultiTaskModule):
    """A multi-task model that is not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 6)

    def forward(self, x, task_labels):
        return self.head(x.flatten(1))


def test_a_multi_task_model_of_others_is_refused_by_name(made_up) -> None:
    stream = scenarios.task_incremental(made_up(), n_experiences=3)
    strategy = Naive(model=_TwoHeads(), plugins=[PredKDPlugin()], **SOON)
    with pytest.raises(ContlearnError, match="PredKD: the multi-task model _TwoHeads"):
        train(strategy, stream)


# ---------------------------------------------------------------- features


def test_features_are_held_from_the_first_experience_by_one_student_pass(stream, small, watch) -> None:
    model = small(stream, dropout=0.0)
    copies, terms, passes = Copies(watch), [], []
    model.backbone.register_forward_hook(lambda *_: passes.append(model.training))

    def check(strategy) -> None:
        count = len(passes)
        now, then = strategy.model.features(strategy.mb_x), copies.before.features(strategy.mb_x).detach()
        expected = 7 * (now - then).pow(2).sum() / now.numel()
        term = strategy.loss - F.cross_entropy(strategy.mb_output, strategy.mb_y)
        assert term.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        weights = [strategy.model.backbone.layers[0][0].weight]
        found = torch.autograd.grad(term, weights, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected, weights), rtol=1e-3, atol=1e-6)
        del passes[count:]
        terms.append(term.item())

    plugins = [copies.plugin, FeatKDPlugin(mu=7.0), watch(before_backward=check)]
    strategy = Naive(model=model, plugins=plugins, **SOON)
    strategy.train(stream.train_stream[0], eval_streams=[])
    iterations = len(terms)
    # One pass of the student and one of its teacher, whose copy carries the counting hook along.
    assert len(passes) == 2 * iterations and terms[0] == pytest.approx(0, abs=1e-6)
    assert terms[-1] > 1e-5
    for experience in stream.train_stream[1:]:
        strategy.train(experience, eval_streams=[])
    assert abs(terms[iterations]) < 1e-6 < terms[-1]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3)), "2"),
        (nn.ModuleDict({"fc": nn.Linear(2, 2), "after": nn.Linear(2, 2)}), "fc"),
        (nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2)), "tail": nn.ReLU()}), "body.0"),
    ],
)
def test_the_classifier_is_found(model, name) -> None:
    assert classifier_name(model) == name


# ---------------------------------------------------------------- the one teacher


def test_two_plugins_share_one_teacher_and_one_pass(stream, small, watch) -> None:
    model = small(stream)
    seen = []
    predictions, features = PredKDPlugin(), FeatKDPlugin()

    def count(strategy) -> None:
        assert predictions.teacher is features.teacher and not features.teacher.model.training
        assert not any(p.requires_grad for p in features.teacher.model.parameters())
        features.teacher.model.register_forward_hook(lambda *_: seen.append(1))

    def empty(strategy) -> None:
        assert features.teacher.student.x is None and not features.teacher._passes

    strategy = Naive(
        model=model,
        plugins=[predictions, features, watch(before_training_epoch=count, after_training_iteration=empty)],
        **{**SOON, "epochs": 1},
    )
    train(strategy, stream)
    assert len(seen) == strategy.clock.train_iterations
    assert snapshot(strategy).method_state == {"teacher": teacher_bytes(model)}
    assert not model._forward_pre_hooks and not model.head._forward_pre_hooks


class _StopAt:
    """Stops a run from inside one of its iterations."""

    def __init__(self, watch, at: int) -> None:
        self.plugin = watch(after_training_iteration=self.stop)
        self.at = at

    def stop(self, strategy) -> None:
        if strategy.clock.train_iterations == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at", [3, 12])
def test_a_run_resumes_with_the_same_bits_and_stores_the_teacher_once(stream, small, watch, tmp_path, at) -> None:
    def made(*plugins):
        return RehearsalFree(
            model=small(stream, dropout=0.3),
            update_mode="train",
            pred_kd=True,
            feat_kd=5.0,
            l2=0.05,
            ewc=10.0,
            plugins=list(plugins),
            momentum=0.9,
            **SOON,
        )

    whole = made(watch())
    run(whole, stream, seed=3, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        run(made(_StopAt(watch, at).plugin), stream, seed=3, out=tmp_path / "run", quiet=True)
    [file] = (tmp_path / "run" / "checkpoint").glob("interrupted-*.safetensors")
    held = [name for name in load_file(file) if "teacher" in name]
    assert len(held) == len(list(small(stream).named_parameters())), held
    again = made(watch())
    run(again, stream, seed=3, out=tmp_path / "run", quiet=True, resume=True)
    for (name, left), (_, right) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(left, right), name
    first, second = again.plugins[0], again.plugins[1]
    assert first.teacher is second.teacher



# ---------------------------------------------------------------- hosts and company


COMPANY = {
    "replay": lambda: [ReplayPlugin(12)],
    "penalties": lambda: [L2Plugin(), OnlineEWCPlugin()],
    "all": lambda: [ReplayPlugin(12), L2Plugin(), OnlineEWCPlugin()],
}


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("host", ["naive", "er_ace", "derpp", "si", "rehearsal_free"])
def test_every_host_holds_on_to_old_answers(stream, small, watch, host, company) -> None:
    def drift(*plugins) -> float:
        torch.manual_seed(0)
        model, answers = small(stream), {}
        x = torch.stack([x for x, *_ in stream.test_stream[0].dataset])
        options = {**SOON, "epochs": 8, "plugins": list(plugins)}
        made = RehearsalFree(model=model, **options) if host == "rehearsal_free" else None
        strategy = made or strategies.create(host, model, **options)
        for index, experience in enumerate(stream.train_stream[:2]):
            strategy.train(experience, eval_streams=[])
            model.eval()
            answers[index] = model(x)[:, :2].sigmoid().detach()
        return (answers[1] - answers[0]).abs().mean().item()

    others = COMPANY[company]
    assert drift(*others(), PredKDPlugin(scale=100.0), FeatKDPlugin()) < 0.85 * drift(*others())


def test_avalanches_naive_takes_them(stream, small, quiet) -> None:
    def drift(*plugins) -> float:
        torch.manual_seed(0)
        model = small(stream, head="fixed")
        strategy = AvalancheNaive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=8,
            train_epochs=6,
            plugins=list(plugins),
            evaluator=quiet(),
        )
        x = torch.stack([x for x, *_ in stream.test_stream[0].dataset])
        answers = []
        for experience in stream.train_stream[:2]:
            strategy.train(experience, eval_streams=[])
            model.eval()
            answers.append(model(x)[:, :2].sigmoid().detach())
        return (answers[1] - answers[0]).abs().mean().item()

    assert drift(PredKDPlugin(scale=50.0), FeatKDPlugin()) < 0.5 * drift()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PredKDPlugin(kind="soft"), "kind: expected sigmoid or softmax, got 'soft'"),
        (lambda: PredKDPlugin(scale=-1), "scale: expected at least 0, got -1"),
        (lambda: PredKDPlugin(temperature=0), "temperature: expected more than 0, got 0"),
        (lambda: FeatKDPlugin(mu=-2), "mu: expected at least 0, got -2"),
    ],
)
def test_bad_options_are_named(make, message) -> None:
    with pytest.raises(ContlearnError, match=message):
        make()
