"""Rehearsal-free regularisation: its class losses, the one mixed-target loss, evaluation mode inside the update."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from contlearn import models, run, scenarios
from contlearn.errors import ContlearnError
from contlearn.strategies.penalties import L2Plugin
from contlearn.strategies.rehearsal_free import RehearsalFree
from contlearn.strategies.replay import ReplayPlugin

SOON = {"lr": 0.1, "epochs": 2, "batch_size": 5, "device": "cpu"}


def train(strategy, stream):
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def teachers(watch, kept: list):
    """A plug-in that keeps a copy of the model before each experience."""
    return watch(before_training_exp=lambda s: kept.append(copy.deepcopy(s.model).eval()))


# ---------------------------------------------------------------- class losses


def bce(z, y, columns):
    p = z[:, columns].double().sigmoid()
    hot = F.one_hot(y, z.shape[1])[:, columns].double()
    return -5 * (hot * p.log() + (1 - hot) * (1 - p).log()).mean().item()


def ce(z, y, columns):
    p = z[:, columns].double().softmax(1)
    return -torch.stack([p[row, columns.index(label)].log() for row, label in enumerate(y.tolist())]).mean().item()


FORMS = {
    "bce": lambda z, y, new, old: bce(z, y, old + new),
    "bce_local": lambda z, y, new, old: bce(z, y, new),
    "ce": lambda z, y, new, old: ce(z, y, old + new),
    "ce_local": lambda z, y, new, old: ce(z, y, new),
}


@pytest.mark.parametrize("head", ["growing", "fixed"])
@pytest.mark.parametrize("form", FORMS)
def test_the_class_losses(stream, small, watch, form, head) -> None:
    found = []

    def check(strategy) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        expected = FORMS[form](strategy.mb_output, strategy.mb_y, new, list(range(new[0])))
        found.append((strategy.loss.item(), expected))

    model = small(stream, head=head)
    train(RehearsalFree(model=model, class_loss=form, plugins=[watch(before_backward=check)], **SOON), stream)
    for loss, expected in found:
        assert loss == pytest.approx(expected, rel=1e-4)


def test_class_loss_with_softmax_distillation(stream, small, watch) -> None:
    kept, seen = [], []

    def check(strategy) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        old, z = list(range(new[0])), strategy.mb_output
        expected = ce(z, strategy.mb_y, old + new)
        if old:
            with torch.no_grad():
                p = (kept[-1](strategy.mb_x)[:, old].double() / 2).softmax(1)
            q = (z[:, old].double() / 2).softmax(1)
            expected += (4 * (p * (p / q).log()).sum(1).mean()).item()
        assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)
        seen.append(len(old))

    plugins = [teachers(watch, kept), watch(before_backward=check)]
    train(RehearsalFree(model=small(stream), class_loss="ce_kd", plugins=plugins, **SOON), stream)
    assert {0, 2, 4} == set(seen)


@pytest.mark.parametrize("head", ["growing", "fixed"])
def test_distilled_bce_is_one_binary_cross_entropy_with_mixed_targets(stream, small, watch, head) -> None:
    kept, sums = [], []

    def check(strategy) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        seen, old, z = list(range(new[-1] + 1)), list(range(new[0])), strategy.mb_output
        targets = F.one_hot(strategy.mb_y, z.shape[1]).float()
        if old:
            with torch.no_grad():
                targets[:, old] = kept[-1](strategy.mb_x)[:, old].sigmoid()
            sums.append(targets[:, seen].sum(1).mean().item())
        mixed = 5 * F.binary_cross_entropy_with_logits(z[:, seen], targets[:, seen])
        assert strategy.loss.item() == pytest.approx(mixed.item(), rel=1e-5)
        found, expected = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (strategy.loss, mixed))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
        assert torch.equal(found[:, new[-1] + 1 :], torch.zeros_like(found[:, new[-1] + 1 :]))  # classes to come

    plugins = [teachers(watch, kept), watch(before_backward=check)]
    train(RehearsalFree(model=small(stream, head=head), pred_kd=True, plugins=plugins, **SOON), stream)
    assert min(sums) > 1.05  # a label is 1, and the sigmoids of the old classes come on top


@pytest.mark.parametrize("form", ["bce", "bce_local", "ce", "ce_local", "ce_kd"])
def test_rows_of_classes_to_come_never_move(stream, small, form) -> None:
    model = small(stream, head="fixed")
    before = copy.deepcopy(model.head)
    strategy = RehearsalFree(model=model, class_loss=form, pred_kd=True, **SOON)
    for experience in stream.train_stream[:2]:
        strategy.train(experience, eval_streams=[])
    assert torch.equal(model.head.weight[4:], before.weight[4:]) and torch.equal(model.head.bias[4:], before.bias[4:])
    assert not torch.equal(model.head.weight[2:4], before.weight[2:4])


@pytest.mark.parametrize("form", ["bce_local", "ce_local"])
def test_local_losses_leave_old_rows_alone(stream, small, form) -> None:
    model = small(stream)
    strategy = RehearsalFree(model=model, class_loss=form, **SOON)
    strategy.train(stream.train_stream[0], eval_streams=[])
    before = model.head.weight.detach().clone()
    strategy.train(stream.train_stream[1], eval_streams=[])
    assert torch.equal(model.head.weight[:2], before)


def test_classes_that_return_are_trained_as_current_ones(made_up, watch) -> None:
    stream = scenarios.blurry(made_up(), n_experiences=3, seed=1)
    earlier, checked = set(), []

    def check(strategy) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        seen = sorted(earlier | set(new))
        expected = bce(strategy.mb_output, strategy.mb_y, seen)
        assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)
        checked.append(bool(earlier & set(new)))

    def note(strategy) -> None:
        earlier.update(strategy.experience.classes_in_this_experience)

    model = models.create("mlp", stream, seed=0, hidden=8)
    plugins = [watch(before_backward=check, after_training_exp=note)]
    train(RehearsalFree(model=model, plugins=plugins, **SOON), stream)
    assert any(checked)  # the stream does bring classes back


# ---------------------------------------------------------------- heads and exemplars


@pytest.mark.parametrize("form", ["bce", "bce_local", "ce", "ce_local", "ce_kd"])
def test_under_task_heads_the_class_loss_is_the_samples_own_task(made_up, watch, form) -> None:
    stream = scenarios.task_incremental(made_up(), n_experiences=3)
    losses = []

    def check(strategy) -> None:
        z, y, new = strategy.mb_output, strategy.mb_y, sorted(strategy.experience.classes_in_this_experience)
        expected = bce(z, y, new) if form.startswith("bce") else ce(z, y, new)
        term = strategy.criterion().item()
        assert term == pytest.approx(expected, rel=1e-4)
        losses.append(strategy.loss.item())

    model = models.create("mlp", stream, seed=0, hidden=8)
    plugins = [watch(before_backward=check)]
    options = {**SOON, "epochs": 12, "feat_kd": 0.1, "l2": 0.001, "ewc": 0.1, "plugins": plugins}
    train(RehearsalFree(model=model, class_loss=form, **options), stream)
    assert all(loss < 5 for loss in losses)  # -1e4, the logit of a masked column, is in none of the terms


@pytest.mark.parametrize("form", ["bce_local", "ce_local"])
def test_exemplars_of_old_classes_are_negatives_or_left_out(stream, small, watch, form) -> None:
    seen = []

    def check(strategy) -> None:
        new = sorted(strategy.experience.classes_in_this_experience)
        z, y = strategy.mb_output, strategy.mb_y
        inside = y >= new[0]
        expected = bce(z, y, new) if form == "bce_local" else ce(z[inside], y[inside], new)
        assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)
        seen.append(int((~inside).sum()))

    plugins = [ReplayPlugin(12), watch(before_backward=check)]
    train(RehearsalFree(model=small(stream), class_loss=form, plugins=plugins, **SOON), stream)
    assert max(seen) == 5


# ---------------------------------------------------------------- evaluation mode inside the update


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batchnorm_statistics_in_either_update_mode(made_up, watch, mode) -> None:
    stream = scenarios.class_incremental(made_up(4, per_class=8, side=8), n_experiences=2)
    model = models.create("slim_resnet18", stream, width=2, seed=0)
    weight = model.backbone.stem[0].weight.detach().clone()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    modes = []
    plugins = [watch(after_forward=lambda s: modes.append((s.model.backbone.stem[1].training, s.model.head.training)))]
    options = {**SOON, "batch_size": 8}
    strategy = RehearsalFree(model=model, update_mode=mode, pred_kd=True, ewc=1.0, plugins=plugins, **options)
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        strategy.eval(stream.test_stream[0])  # leaves everything in evaluation mode
    still = [torch.equal(value, before[name]) for name, value in model.named_buffers() if "running" in name]
    assert len(still) > 10 and (all(still) if mode == "eval" else not any(still))
    assert set(modes) == {(mode == "train", True)}
    assert not torch.equal(model.backbone.stem[0].weight, weight) and model.head.out_features == 4


def test_dropout_is_off_in_eval_mode(stream, small, watch) -> None:
    same = []

    def check(strategy) -> None:
        same.append(torch.equal(strategy.model(strategy.mb_x), strategy.mb_output))

    for mode in ("eval", "train"):
        plugins = [watch(after_forward=check)]
        strategy = RehearsalFree(model=small(stream, dropout=0.5), update_mode=mode, plugins=plugins, **SOON)
        strategy.train(stream.train_stream[0], eval_streams=[])
    half = len(same) // 2
    assert all(same[:half]) and sum(same[half:]) < half / 2  # a batch of few may keep or lose the same units twice


# ---------------------------------------------------------------- whole runs


def test_distillation_keeps_what_fine_tuning_forgets() -> None:
    stream = scenarios.class_incremental("digits", n_experiences=5)

    def accuracy(**options) -> float:
        model = models.create("mlp", stream, seed=0, hidden=100, dropout=0.0)
        strategy = RehearsalFree(model=model, lr=0.1, epochs=5, batch_size=32, device="cpu", **options)
        return run(strategy, stream, seed=0, quiet=True).metrics["final_accuracy"]

    assert accuracy(pred_kd=True) > accuracy() + 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_loss": "bce-local"}, "class_loss: expected bce, bce_local, ce, ce_local, ce_kd, got 'bce-local'"),
        ({"update_mode": "test"}, "update_mode: expected eval or train, got 'test'"),
        ({"l2": -1.0}, "l2: expected at least 0, got -1.0"),
        ({"ewc": float("nan")}, "ewc: expected at least 0, got nan"),
        ({"loss_scale": 0.0}, "loss_scale: expected more than 0, got 0.0"),
    ],
)
def test_bad_options_are_named(stream, small, options, message) -> None:
    with pytest.raises(ContlearnError, match=message):
        RehearsalFree(model=small(stream), **options)


def test_a_term_is_not_added_twice(stream, small) -> None:
    with pytest.raises(ContlearnError, match="plugins: L2Plugin is given twice"):
        RehearsalFree(model=small(stream), l2=0.1, plugins=[L2Plugin()])
    assert RehearsalFree(model=small(stream), ewc=1.0, plugins=[L2Plugin()])
