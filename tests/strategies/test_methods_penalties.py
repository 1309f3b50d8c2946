"""Methods that add to the loss or bend the gradient, against plain loops: EWC, SI, LwF, A-GEM."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from avalanche.training.plugins import SynapticIntelligencePlugin
from avalanche.training.supervised import Naive as AvalancheNaive
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from contlearn import strategies
from contlearn.errors import ContlearnError
from contlearn.strategies.agem import AGEMPlugin
from contlearn.strategies.lwf import LwFPlugin
from contlearn.strategies.si import SIPlugin

SOON = {"lr": 0.2, "epochs": 2, "batch_size": 5}


def train(strategy, stream):
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def batches_of(experience, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    samples = [(x, y) for x, y, _ in experience.dataset.train()]
    cuts = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [(torch.stack([x for x, _ in cut]), torch.tensor([y for _, y in cut])) for cut in cuts]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def pull(model: nn.Module, anchor: dict[str, torch.Tensor], importance: dict[str, torch.Tensor]) -> float:
    """Sum of importance * (weight - anchor)**2, one number at a time; what has grown since has no importance."""
    total = 0.0
    for name, parameter in model.named_parameters():
        rows = slice(len(anchor[name])) if anchor[name].dim() else ...
        now, then, weight = parameter.detach()[rows].flatten(), anchor[name].flatten(), importance[name].flatten()
        for a, b, w in zip(now.tolist(), then.tolist(), weight.tolist(), strict=True):
            total += w * (a - b) ** 2
    return total


# ---------------------------------------------------------------- EWC


@pytest.mark.parametrize("options", [{}, {"mode": "online", "decay_factor": 0.5}])
def test_the_ewc_penalty_is_the_plain_loops(stream, small, watch, options) -> None:
    anchors: list[dict[str, torch.Tensor]] = []
    importances: list[dict[str, torch.Tensor]] = []
    penalties: list[float] = []

    def check(strategy) -> None:
        task = F.cross_entropy(strategy.mb_output, strategy.mb_y).item()
        past = list(zip(anchors, importances, strict=True))[-1 if options else 0 :]
        penalty = 3.0 * sum(pull(strategy.model, anchor, importance) for anchor, importance in past)
        assert strategy.loss.item() == pytest.approx(task + penalty, rel=1e-4, abs=1e-6)
        penalties.append(penalty)

    def consolidate(strategy) -> None:
        model = copy.deepcopy(strategy.model).eval()
        found = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        batches = batches_of(strategy.experience, 5)
        for x, y in batches:
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            for name, gradient in zip(found, gradients, strict=True):
                found[name] += gradient**2 / len(batches)
        if options and importances:
            for name, older in importances[-1].items():
                found[name][: len(older)] += 0.5 * older
        anchors.append(weights(model))
        importances.append(found)

    strategy = strategies.create(
        "ewc",
        small(stream, dropout=0.3),
        ewc_lambda=3.0,
        plugins=[watch(before_backward=check, after_training_exp=consolidate)],
        **options,
        **SOON,
    )
    train(strategy, stream)
    ewc = next(plugin for plugin in strategy.plugins if hasattr(plugin, "ewc_lambda"))
    for name, expected in importances[-1].items():
        torch.testing.assert_close(ewc.importances[2][name].data, expected, rtol=1e-4, atol=1e-7)
    assert penalties[:9] == [0.0] * 9 and min(penalties[9:16]) > 0  # at its anchor a model is not pulled


# ---------------------------------------------------------------- SI


def synaptic_intelligence(stream, model, *, si_lambda, damping, cap, lr, momentum, epochs) -> dict[str, torch.Tensor]:
    """Training on whole experiences by the paper's equations; the model is changed in place, importances returned."""
    importance = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    anchor, uphill = weights(model), 0
    for experience in stream.train_stream:
        [(x, y)] = batches_of(experience, 99)
        start, path = weights(model), {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for _ in range(epochs):
            named = dict(model.named_parameters())
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                drag = si_lambda * importance[name] * (parameter.detach() - anchor[name])
                velocity[name] = momentum * velocity[name] + gradient + drag
                step = -lr * velocity[name]
                path[name] += -gradient * step
                parameter.data += step
        for name, parameter in model.named_parameters():
            change = parameter.detach() - start[name]
            uphill += int((path[name] < 0).sum())
            importance[name] = importance[name] + torch.clamp(path[name] / (change**2 + damping), min=0)
            importance[name] = importance[name].clamp(max=cap)
        anchor = weights(model)
    assert uphill, "no weight was carried uphill, so that nothing was there to clip at 0"
    return importance


@pytest.mark.parametrize("cap", [None, 0.05])
def test_si_is_the_plain_loops(stream, small, cap) -> None:
    reference, model = small(stream, head="fixed"), small(stream, head="fixed")
    options = {"si_lambda": 0.7, "damping": 0.01, "lr": 0.2, "momentum": 0.9, "epochs": 6}
    expected = synaptic_intelligence(stream, reference, cap=cap or float("inf"), **options)
    strategy = strategies.create("si", model, max_importance=cap, batch_size=99, **options)
    train(strategy, stream)
    plugin = next(plugin for plugin in strategy.plugins if isinstance(plugin, SIPlugin))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plugin.importance[name], expected[name], rtol=1e-3, atol=1e-5)
    assert max(value.max() for value in expected.values()) > 0.05 - 1e-6


def test_avalanches_si_sees_only_steps_of_length_zero_on_the_cpu(stream, small, quiet) -> None:
    """Why ours exists."""
    model, plugin = small(stream, head="fixed"), SynapticIntelligencePlugin(1.0)
    before = weights(model)
    strategy = AvalancheNaive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.2),
        train_mb_size=5,
        plugins=[plugin],
        evaluator=quiet(),
    )
    strategy.train(stream.train_stream[0], eval_streams=[])
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())
    assert all(not held.data.any() for held in plugin.syn_data["trajectory"].values())
    assert all(not held.data.any() for held in plugin.ewc_data[1].values())


def test_si_follows_a_head_that_grows(stream, small, watch) -> None:
    penalties = []

    def check(strategy) -> None:
        plugin = strategy.plugins[0]
        task = F.cross_entropy(strategy.mb_output, strategy.mb_y).item()
        drag = pull(strategy.model, plugin.anchor, plugin.importance) / 2 if plugin.importance else 0.0
        assert strategy.loss.item() == pytest.approx(task + drag, rel=1e-4)
        penalties.append(drag)

    model = small(stream)
    strategy = strategies.create("si", model, max_importance=None, plugins=[watch(before_backward=check)], **SOON)
    train(strategy, stream)
    importance = strategy.plugins[0].importance["head.weight"]
    assert importance.shape == (6, 8) and bool(importance[4:].any()) and max(penalties) > 0


def test_si_leaves_out_what_is_frozen_later(stream, small) -> None:
    model = small(stream)
    strategy = strategies.create("si", model, **SOON)
    strategy.train(stream.train_stream[0], eval_streams=[])
    model.backbone.requires_grad_(False)
    held = weights(model.backbone)
    strategy.train(stream.train_stream[1], eval_streams=[])
    assert all(torch.equal(value, held[name]) for name, value in weights(model.backbone).items())


# ---------------------------------------------------------------- LwF


def distillation(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """Kullback-Leibler divergence of the tempered softmaxes over the teacher's classes, mean over the batch."""
    total = 0.0
    for now, then in zip(student.double(), teacher.double(), strict=True):
        p = (then / temperature).softmax(0)
        q = (now[: len(then)] / temperature).softmax(0)
        total += float((p * (p / q).log()).sum())
    return total / len(student)


@pytest.mark.parametrize("in_train_mode", [False, True])
def test_the_loss_of_lwf_is_the_plain_loops(stream, small, watch, in_train_mode) -> None:
    teachers, extras = [], []

    def check(strategy) -> None:
        lwf = strategy.plugins[0].lwf
        task = F.cross_entropy(strategy.mb_output, strategy.mb_y).item()
        extra = strategy.loss.item() - task
        if teachers:
            modes = {module.training for module in lwf.prev_model.modules()}
            assert modes == {in_train_mode} and not any(p.requires_grad for p in lwf.prev_model.parameters())
            with torch.no_grad():
                old = teachers[-1](strategy.mb_x)
            expected = 1.5 * distillation(strategy.mb_output.detach(), old, 3.0)
            assert extra == pytest.approx(expected, rel=1e-3, abs=1e-5)
        extras.append(extra)

    def keep(strategy) -> None:
        teachers.append(copy.deepcopy(strategy.model).eval())

    strategy = strategies.create(
        "lwf",
        small(stream),  # without dropout, both modes of the teacher answer alike
        alpha=1.5,
        temperature=3.0,
        teacher_in_train_mode=in_train_mode,
        plugins=[watch(before_backward=check, after_training_exp=keep)],
        **SOON,
    )
    train(strategy, stream)
    assert extras[:8] == [0.0] * 8
    # A student that equals its teacher has nothing to distil: the first step of an experience.
    assert extras[8] == pytest.approx(0, abs=1e-6) and max(extras[9:16]) > 1e-4


def test_the_teacher_answers_without_dropout(stream, small) -> None:
    strategy = strategies.create("lwf", small(stream, dropout=0.5), **SOON)
    strategy.train(stream.train_stream[0], eval_streams=[])
    teacher, images = strategy.plugins[0].lwf.prev_model, batches_of(stream.train_stream[0], 99)[0][0]
    assert torch.equal(teacher(images), teacher(images))
    torch.testing.assert_close(teacher(images), strategy.model.eval()(images))


# ---------------------------------------------------------------- A-GEM


@given(st.integers(0, 10_000))
def test_a_projected_gradient_no_longer_opposes_the_memorys(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    plugin = AGEMPlugin()
    plugin.buffers, plugin.reference_gradients = [None], torch.randn(8, generator=generator)
    plugin.after_backward(SimpleNamespace(model=model, device="cpu"))
    after = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    reference = plugin.reference_gradients
    if before @ reference >= 0:
        assert torch.equal(after, before)
    else:
        assert float(after @ reference) >= -1e-4
        torch.testing.assert_close(after, before - (before @ reference) / (reference @ reference) * reference)


def test_agem_projects_onto_the_gradient_of_its_memory(stream, small, watch) -> None:
    drawn, raw, outcomes = [], [], []

    def flat(model) -> torch.Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def check(strategy) -> None:
        index = strategy.clock.train_exp_counter
        if index == 0:
            return
        batch = drawn[-1]
        assert (batch[1] // 2).tolist() == [origin for origin in range(index) for _ in range(8 // index)]
        gradients = torch.autograd.grad(
            F.cross_entropy(strategy.model(batch[0]), batch[1]), list(strategy.model.parameters())
        )
        reference, gradient = torch.cat([g.flatten() for g in gradients]), raw[-1]
        agrees = bool(gradient @ reference >= 0)
        expected = gradient if agrees else gradient - (gradient @ reference) / (reference @ reference) * reference
        torch.testing.assert_close(flat(strategy.model), expected, rtol=1e-4, atol=1e-6)
        assert float(flat(strategy.model) @ reference) >= -1e-5
        outcomes.append(agrees)

    strategy = strategies.create(
        "agem",
        small(stream),
        patterns_per_experience=8,
        sample_size=8,
        plugins=[watch(before_update=check)],
        **{**SOON, "epochs": 4},
    )
    sample = strategy.agem.sample_from_memory
    strategy.agem.sample_from_memory = lambda: drawn.append(sample()) or drawn[-1]
    strategy.plugins.insert(0, watch(after_backward=lambda s: raw.append(flat(s.model))))
    train(strategy, stream)
    assert set(outcomes) == {True, False} and len(outcomes) == 2 * 4 * 4


@pytest.mark.parametrize("patterns", [8, 50])
def test_agem_keeps_some_exemplars_of_each_experience(stream, small, identify, patterns) -> None:
    places = identify(stream, "train")
    strategy = train(strategies.create("agem", small(stream), patterns_per_experience=patterns, **SOON), stream)
    for index, buffer in enumerate(strategy.agem.buffers):
        found = places(torch.stack([x for x, *_ in buffer.train()]))
        assert len(set(found)) == len(found) == min(patterns, 16) and {origin for origin, _ in found} == {index}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SIPlugin(damping=0.0), "damping: expected more than 0, got 0.0"),
        (lambda: LwFPlugin(temperature=0.0), "temperature: expected more than 0, got 0.0"),
        (lambda: AGEMPlugin(0), "patterns_per_experience: expected at least 1, got 0"),
        (lambda: AGEMPlugin(5, 0), "sample_size: expected at least 1, got 0"),
    ],
)
def test_values_that_cannot_work_get_one_line(make, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        make()
    assert str(caught.value) == said
