"""The training loop: Avalanche's hooks and weights, learning rates by hand, and what plug-ins may rely on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.supervised import Naive as AvalancheNaive
from torch import nn

from contlearn import strategies
from contlearn.errors import ContlearnError, Interrupted
from contlearn.strategies.template import SupervisedTemplate

HOOKS = sorted(name for name in dir(SupervisedPlugin) if name.startswith(("before_", "after_")))


def recorder(log: list[str]) -> SupervisedPlugin:
    """A plug-in of a class that defines every hook there is."""

    def hook(name):
        return lambda self, strategy, *args, **kwargs: log.append(name)

    return type("Recorder", (SupervisedPlugin,), {name: hook(name) for name in HOOKS})()


def ours(model, **options) -> SupervisedTemplate:
    return strategies.create("naive", model, **{"batch_size": 5, "lr": 0.1, **options})


def avalanches(model, evaluator, *, plugins=(), optimizer=torch.optim.SGD, epochs=1, batch_size=5, lr=0.1, **options):
    return AvalancheNaive(
        model=model,
        optimizer=optimizer(model.parameters(), lr=lr, **options),
        train_mb_size=batch_size,
        train_epochs=epochs,
        eval_mb_size=7,
        plugins=list(plugins),
        evaluator=evaluator,
    )


# ---------------------------------------------------------------- the same as Avalanche's


def test_hooks_come_in_avalanches_order(stream, small, quiet) -> None:
    logs: list[list[str]] = [[], []]
    pair = (
        ours(small(stream), epochs=2, eval_batch_size=7, plugins=[recorder(logs[0])]),
        avalanches(small(stream), quiet(), epochs=2, plugins=[recorder(logs[1])]),
    )
    for strategy in pair:
        for experience in list(stream.train_stream)[:2]:
            strategy.train(experience, eval_streams=[])
            strategy.eval(stream.test_stream)
    assert logs[0] == logs[1]
    assert set(logs[0]) == set(HOOKS) and logs[0].count("before_update") == 2 * 2 * 4


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "weight_decay": 0.01}, {"optimizer": "adam"}, {"optimizer": "adamw", "weight_decay": 0.1}],
)
def test_weights_after_training_are_avalanches(stream, small, quiet, options) -> None:
    first, second = small(stream), small(stream)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    kind = kinds.get(options.get("optimizer"), torch.optim.SGD)
    rest = {key: value for key, value in options.items() if key != "optimizer"}
    pair = (
        ours(first, epochs=3, **({"weight_decay": 0.0} | options)),
        avalanches(second, quiet(), epochs=3, optimizer=kind, **({"weight_decay": 0.0} | rest)),
    )
    for strategy in pair:
        for experience in stream.train_stream:
            torch.manual_seed(0)  # for the rows the head gains
            strategy.train(experience, eval_streams=[], shuffle=False)
    assert set(first.state_dict()) == set(second.state_dict())
    for name, weight in first.state_dict().items():
        torch.testing.assert_close(weight, second.state_dict()[name], rtol=0, atol=1e-6)
    name = "backbone.layers.0.0.weight"
    assert not torch.equal(first.state_dict()[name], small(stream).state_dict()[name])


def test_a_full_batch_gives_avalanches_weights_in_any_order(stream, small, quiet) -> None:
    pair = (
        ours(small(stream, head="fixed"), epochs=4, batch_size=99),
        avalanches(small(stream, head="fixed"), quiet(), epochs=4, batch_size=99),
    )
    for strategy in pair:
        strategy.train(stream.train_stream, eval_streams=[])
    for one, other in zip(*(strategy.model.parameters() for strategy in pair), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_train_takes_avalanches_loader_options(stream, small, watch) -> None:
    sizes: list[int] = []
    strategy = ours(small(stream), plugins=[watch(before_forward=lambda s: sizes.append(len(s.mb_y)))])
    strategy.train(stream.train_stream[0], eval_streams=[])
    strategy.train(stream.train_stream[1], eval_streams=[], drop_last=True)
    assert sizes == [5, 5, 5, 1, 5, 5, 5]


# ---------------------------------------------------------------- learning rates


def cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"lr_schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_schedule": "cosine"}, [cosine(epoch / 6) for epoch in range(6)]),
        ({"lr_schedule": "multistep", "milestones": [2, 5], "gamma": 0.5}, [1, 1, 0.5, 0.5, 0.5, 0.25]),
        ({"warmup_epochs": 2}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"warmup_epochs": 2, "lr_schedule": "linear"}, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"warmup_epochs": 2, "lr_schedule": "cosine"}, [1 / 3, 2 / 3, *(cosine(epoch / 4) for epoch in range(4))]),
        ({"warmup_epochs": 1, "lr_schedule": "multistep", "milestones": [3]}, [0.5, 1, 1, 0.1, 0.1, 0.1]),
    ],
)
def test_learning_rates_follow_the_schedule_and_start_anew(stream, small, watch, options, factors) -> None:
    rates: list[float] = []
    plugin = watch(before_update=lambda s: rates.append(s.optimizer.param_groups[0]["lr"]))
    strategy = ours(small(stream), lr=0.4, epochs=6, batch_size=99, plugins=[plugin], **options)
    strategy.train(list(stream.train_stream)[:2], eval_streams=[])
    assert rates == pytest.approx([0.4 * factor for factor in factors] * 2)


def test_a_torch_optimizer_keeps_its_groups_and_their_rates(stream, small, watch) -> None:
    model = small(stream, head="fixed")
    groups = [{"params": model.backbone.parameters(), "lr": 0.2}, {"params": model.head.parameters(), "lr": 0.6}]
    rates: list[list[float]] = []
    plugin = watch(before_update=lambda s: rates.append([group["lr"] for group in s.optimizer.param_groups]))
    optimizer = torch.optim.SGD(groups, lr=1.0)
    strategy = ours(model, optimizer=optimizer, epochs=2, batch_size=99, lr_schedule="linear", plugins=[plugin])
    strategy.train(list(stream.train_stream)[:2], eval_streams=[])
    assert torch.tensor(rates) == pytest.approx(torch.tensor([[0.2, 0.6], [0.1, 0.3]] * 2))
    assert "optimizer" not in strategy.spec


def test_the_optimizer_can_forget_between_experiences(stream, small, watch) -> None:
    held: list[bool] = []

    def momentum(strategy) -> None:
        held.append(any("momentum_buffer" in state for state in strategy.optimizer.state.values()))

    for reset in (False, True):
        strategy = ours(
            small(stream), momentum=0.9, reset_optimizer=reset, plugins=[watch(before_training_exp=momentum)]
        )
        strategy.train(list(stream.train_stream)[:2], eval_streams=[])
    assert held == [False, True, False, False]


# ---------------------------------------------------------------- the step


def gradient_of(model: nn.Module, batch, *, factor: float = 1.0) -> list[torch.Tensor]:
    loss = factor * nn.functional.cross_entropy(model(batch[0]), batch[1])
    return list(torch.autograd.grad(loss, list(model.parameters())))


def one_step(stream, small, *, plugins=(), **options):
    """Weights before and after one full-batch step, and the batch."""
    model = small(stream, head="fixed")
    strategy = ours(model, batch_size=99, plugins=list(plugins), **options)
    before = copy.deepcopy(model)
    strategy.train(stream.train_stream[0], eval_streams=[], shuffle=False)
    data = stream.train_stream[0].dataset
    batch = torch.stack([x for x, *_ in data]), torch.tensor(list(data.targets))
    return before, model, batch


@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_clipping_shortens_the_gradient_to_the_limit(stream, small, limit) -> None:
    before, after, batch = one_step(stream, small, lr=0.3, clip_grad_norm=limit)
    gradient = gradient_of(before, batch)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradient))
    assert 0.05 < norm < 1e6
    for old, new, g in zip(before.parameters(), after.parameters(), gradient, strict=True):
        torch.testing.assert_close(new, old - 0.3 * g * min(1.0, limit / norm), rtol=1e-4, atol=1e-6)


def test_a_plugin_may_replace_the_loss_before_backward(stream, small, watch) -> None:
    def tripled(strategy) -> None:
        strategy.loss = 2 * strategy.loss

    def added(strategy) -> None:
        strategy.loss += strategy.criterion()

    before, after, batch = one_step(
        stream, small, lr=0.3, plugins=[watch(before_backward=tripled), watch(before_backward=added)]
    )
    gradient = gradient_of(before, batch, factor=3.0)
    for old, new, g in zip(before.parameters(), after.parameters(), gradient, strict=True):
        torch.testing.assert_close(new, old - 0.3 * g, rtol=1e-4, atol=1e-6)


def test_epoch_losses_are_the_mean_over_iterations(stream, small, watch) -> None:
    losses: list[float] = []
    plugin = watch(after_training_iteration=lambda s: losses.append(s.loss.item()))
    strategy = ours(small(stream), epochs=2, plugins=[plugin])
    strategy.train(stream.train_stream[0], eval_streams=[])
    assert strategy.epoch_losses == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])


def test_plugins_added_between_calls_are_heard(stream, small, watch) -> None:
    log: list[str] = []
    strategy = ours(small(stream))
    strategy.train(stream.train_stream[0], eval_streams=[])
    plugin = watch(before_update=lambda s: log.append("update"), after_eval=lambda s: log.append("eval"))
    strategy.plugins.insert(0, plugin)
    strategy.train(stream.train_stream[1], eval_streams=[])
    strategy.eval(stream.test_stream)
    assert log == ["update"] * 4 + ["eval"]


def test_training_stops_when_asked(stream, small, watch) -> None:
    iterations: list[int] = []

    def stop(strategy) -> None:
        iterations.append(strategy.clock.train_iterations)
        if len(iterations) == 2:
            strategy.stop_training()

    strategy = ours(small(stream), epochs=5, plugins=[watch(after_training_iteration=stop)])
    strategy.train(stream.train_stream[0], eval_streams=[])
    assert len(iterations) == 2
    strategy.train(stream.train_stream[1], eval_streams=[])
    assert len(iterations) == 2 + 5 * 4


def test_an_interrupt_ends_training_after_the_iteration(stream, small, watch) -> None:
    log: list[str] = []

    def interrupt(strategy) -> None:
        strategy.interrupt = len(log) == 2
        log.append("iteration")

    plugin = watch(before_forward=interrupt, after_training_exp=lambda s: log.append("end"))
    strategy = ours(small(stream), plugins=[plugin])
    with pytest.raises(Interrupted):
        strategy.train(stream.train_stream[0], eval_streams=[])
    assert log == ["iteration"] * 3


# ---------------------------------------------------------------- evaluation


def test_labels_without_an_output_have_no_loss_and_break_nothing(stream, watch) -> None:
    losses: dict[int, list[bool]] = {}

    def note(strategy) -> None:
        losses.setdefault(strategy.experience.current_experience, []).append(bool(strategy.loss.isnan()))

    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    strategy = ours(model, eval_batch_size=4, plugins=[watch(after_eval_iteration=note)])
    strategy.train(stream.train_stream[0], eval_streams=[])
    strategy.eval(stream.test_stream)
    assert losses == {0: [False, False], 1: [False, False], 2: [True, True]}


def test_evaluating_between_epochs_changes_nothing_about_training(stream, small, watch) -> None:
    ends = []
    for evaluate in (False, True):
        modes: list[bool] = []
        plugin = watch(before_forward=lambda s, modes=modes: modes.append(s.model.training))
        strategy = ours(small(stream, dropout=0.5), epochs=3, plugins=[plugin])
        if evaluate:
            strategy.plugins.insert(0, watch(after_training_epoch=lambda s: s.eval(stream.test_stream)))
        torch.manual_seed(0)
        strategy.train(list(stream.train_stream)[:2], eval_streams=[])
        assert modes == [True] * 2 * 3 * 4
        ends.append((strategy.model.state_dict(), strategy.epoch_losses))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": -1}, "eval_batch_size"),
        ({"lr": -0.1}, "lr: expected at least 0.0, got -0.1"),
        ({"lr": float("nan")}, "lr"),
        ({"momentum": -1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm"),
        ({"optimizer": "sdg"}, "optimizer: expected sgd, adam, adamw or sinkgd, got 'sdg'"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum: only sgd"),
        ({"lr_schedule": "cosinus"}, "lr_schedule: expected constant, linear, cosine or multistep"),
        ({"lr_schedule": "multistep"}, "milestones"),
        ({"lr_schedule": "multistep", "milestones": [3, 2]}, "in increasing order, got [3, 2]"),
        ({"lr_schedule": "multistep", "milestones": [3, 3]}, "in increasing order"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"epochs": 3, "warmup_epochs": 3}, "fewer than the 3 epochs"),
        ({"amp": "fp8"}, "amp: expected none, bf16 or fp16"),
        ({"device": "gpu"}, "device: expected auto, cpu or cuda, got 'gpu'"),
        ({"device": "cuda:7"}, "device: expected auto, cpu or cuda, got 'cuda:7'"),
    ],
)
def test_options_out_of_range_get_one_line(stream, small, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        ours(small(stream), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
