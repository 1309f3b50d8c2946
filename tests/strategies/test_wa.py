"""Weight aligning: its mixed loss against a plain loop, its teacher, its exported step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from contlearn import strategies
from contlearn.errors import ContlearnError
from contlearn.strategies.alignment import align_rows

SOON = {"lr": 0.2, "epochs": 2, "batch_size": 5, "device": "cpu", "memory_size": 12}


def wa(model: Any, **options: Any) -> Any:
    return strategies.create("wa", model, **{**SOON, **options})


def log_softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    top = max(row) / temperature
    total = math.log(sum(math.exp(value / temperature - top) for value in row)) + top
    return [value / temperature - total for value in row]


@pytest.mark.parametrize("temperature", [2.0, 1.0])
def test_the_loss_mixes_cross_entropy_and_distillation_by_the_share_of_old_classes(
    stream, small, watch, temperature
) -> None:
    teachers: list[Any] = []
    lams: set[float] = set()

    def check(strategy: Any) -> None:
        old = 2 * strategy.clock.train_exp_counter
        lam = old / (old + 2)
        lams.add(lam)
        expected = 0.0
        for image, label, output in zip(strategy.mb_x, strategy.mb_y, strategy.mb_output.tolist(), strict=True):
            term = -(1 - lam) * log_softmax(output)[int(label)]
            if old:
                with torch.no_grad():
                    taught = log_softmax(teachers[-1](image[None])[0, :old].tolist(), temperature)
                mine = log_softmax(output[:old], temperature)
                term += lam * sum(math.exp(t) * (t - m) for t, m in zip(taught, mine, strict=True))
            expected += term / len(strategy.mb_y)
        assert strategy.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)

    strategy = wa(
        small(stream, dropout=0.3),
        temperature=temperature,
        plugins=[
            watch(
                before_backward=check, after_training_exp=lambda s: teachers.append(copy.deepcopy(s.model).eval())
            )
        ],
    )
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    assert lams == {0.0, 0.5, 4 / 6} and len(teachers) == 3


def test_the_teacher_is_the_aligned_model(stream, small) -> None:
    strategy = wa(small(stream))
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    norms = strategy.model.head.weight.norm(dim=1)
    assert norms[2:].mean().item() == pytest.approx(norms[:2].mean().item(), rel=1e-5) and strategy.gamma != 1.0
    teacher = strategy.plugins[0].teacher.model
    assert torch.equal(teacher.head.weight, strategy.model.head.weight) and not teacher.training


def test_rows_that_are_neither_old_nor_new_stay_and_nothing_to_align_is_no_mistake() -> None:
    head = torch.nn.Linear(3, 5)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 4, 0], [0, 0, 1], [1, 2, 2], [0, 0, 2], [6, 8, 0]]))
    before = head.weight.detach().clone()
    assert align_rows(head, [0, 2], [4]) == pytest.approx((5 + 3) / 2 / 10)
    assert head.weight[4].tolist() == pytest.approx([2.4, 3.2, 0.0]) and torch.equal(head.weight[:4], before[:4])
    assert align_rows(head, [], [1]) == align_rows(head, [0], []) == 1.0


def test_the_step_distils_by_its_masks(stream, small) -> None:
    """With classes 0 to 3 old and two new ones, lam is 4/6; with none old, the loss is the cross-entropy."""
    strategy = wa(small(stream), epochs=1)
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    step = strategy.declare_step(batch_size=4, input_shape=(1, 4, 4), classes=6)
    assert step.memory.policy == "balanced" and any(name.startswith("method.0.teacher.") for name in step.state)
    assert set(step.copies) >= {"method.0.teacher.head.weight"}
    with torch.no_grad():  # a student that has moved on
        step.state["head.weight"] += 0.3 * torch.rand(6, 8, generator=torch.Generator().manual_seed(2))
    given = step.examples()
    given["y"], given["y_memory"] = torch.tensor([4, 5, 4, 5]), torch.tensor([0, 1, 2, 3, 0])
    given["class_mask"] = torch.ones(6)
    losses = []
    for old in (0, 4):
        given["old_class_mask"] = torch.tensor([1.0] * old + [0.0] * (6 - old))
        losses.append(float(step.compute(step.state, given)[0]["loss"]))
    student, teacher = copy.deepcopy(strategy.model).train(), strategy.plugins[0].teacher.model
    with torch.no_grad():
        student.head.weight.copy_(step.state["head.weight"])
        x = torch.cat([given["x"], given["x_memory"]])
        y = [*given["y"].tolist(), *given["y_memory"].tolist()]
        mine, taught = student(x).tolist(), teacher(x).tolist()
    plain = -sum(log_softmax(row)[label] for row, label in zip(mine, y, strict=True)) / len(y)
    distilled = 0.0
    for row, other in zip(mine, taught, strict=True):
        t, m = log_softmax(other[:4], 2.0), log_softmax(row[:4], 2.0)
        distilled += sum(math.exp(a) * (a - b) for a, b in zip(t, m, strict=True)) / len(y)
    assert losses == [pytest.approx(plain, rel=1e-4), pytest.approx(plain / 3 + 2 / 3 * distilled, rel=1e-4)]


def test_a_wrong_temperature_is_named(stream, small) -> None:
    with pytest.raises(ContlearnError, match="temperature: expected more than 0, got 0"):
        wa(small(stream), temperature=0)
