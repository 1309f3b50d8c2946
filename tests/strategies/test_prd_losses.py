"""PRD's losses against loops over pairs, prototypes and samples, and the properties the paper states."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contlearn.errors import ContlearnError
from contlearn.strategies.prd_losses import (
    attraction,
    check_relation,
    masked_relation_distillation,
    prototype_scores,
    relation_distillation,
    supervised_contrastive,
)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, rows: int, classes: int) -> torch.Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


# ---------------------------------------------------------------- contrastive


def contrastive_by_hand(rows: list[list[float]], y: list[int], tau: float) -> float:
    total = 0.0
    for i, anchor in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        denominator = sum(math.exp(cosine(anchor, rows[a]) / tau) for a in others)
        positives = [p for p in others if y[p] == y[i]]
        if positives:
            shares = [math.log(math.exp(cosine(anchor, rows[p]) / tau) / denominator) for p in positives]
            total += -(tau / 0.07) * sum(shares) / len(positives)
    return total / len(rows)


@given(
    seed=st.integers(0, 10**6), rows=st.integers(2, 9), classes=st.integers(1, 4), tau=st.sampled_from([0.07, 0.1, 0.5])
)
def test_the_contrastive_loss_is_the_formula(seed, rows, classes, tau) -> None:
    z, y = drawn(seed, rows, 5), labels(seed, rows, classes)
    found = supervised_contrastive(z, y, tau)
    assert found.item() == pytest.approx(contrastive_by_hand(z.tolist(), y.tolist(), tau), rel=1e-9, abs=1e-12)


def test_the_contrastive_loss_knows_no_scale_and_no_order() -> None:
    z, y, order = drawn(0, 8, 5), labels(1, 8, 3), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    loss = supervised_contrastive(z, y, 0.1)
    assert supervised_contrastive(z * drawn(2, 8, 1).abs(), y, 0.1).item() == pytest.approx(loss.item())
    assert supervised_contrastive(z[order], y[order], 0.1).item() == pytest.approx(loss.item())


def test_anchors_without_a_positive_add_nothing() -> None:
    z = drawn(0, 4, 5).requires_grad_()
    loss = supervised_contrastive(z, torch.arange(4), 0.1)
    assert loss.item() == 0.0
    loss.backward()
    assert z.grad is not None and torch.equal(z.grad, torch.zeros_like(z))


# ---------------------------------------------------------------- attraction


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 7), classes=st.integers(1, 5))
def test_the_attraction_is_the_formula(seed, rows, classes) -> None:
    f, p, y = drawn(seed, rows, 4), drawn(seed + 1, classes, 4), labels(seed, rows, classes)
    scores = torch.nn.functional.normalize(f, dim=1) @ torch.nn.functional.normalize(p, dim=1).t()
    expected = sum(1 - cosine(f[i].tolist(), p[int(y[i])].tolist()) for i in range(rows)) / rows
    assert attraction(scores, y).item() == pytest.approx(expected, abs=1e-12)


def test_only_the_own_prototype_is_attracted() -> None:
    scores = torch.tensor([[0.2, -0.1, 0.4], [0.3, -1e4, 0.0]], requires_grad=True)
    attraction(scores, torch.tensor([2, 0])).backward()
    assert scores.grad is not None
    assert torch.equal(scores.grad, torch.tensor([[0.0, 0.0, -0.5], [-0.5, 0.0, 0.0]]))


# ---------------------------------------------------------------- relations


def test_scores_normalise_the_prototype_and_not_the_feature() -> None:
    f, p = drawn(0, 3, 4), drawn(1, 2, 4)
    scores = prototype_scores(f, p)
    for i in range(3):
        for c in range(2):
            assert scores[i, c].item() == pytest.approx(float(f[i] @ p[c]) / float(p[c].norm()))
    assert torch.allclose(prototype_scores(f, 7 * p), scores)
    assert torch.allclose(prototype_scores(7 * f, p), 7 * scores)


def relation_by_hand(now: torch.Tensor, before: torch.Tensor, relation: str, temperature: float) -> float:
    """A distribution for each prototype over samples, or for each sample over classes; the mean of divergences."""
    if relation == "samples":
        pairs = [(now[:, c].tolist(), before[:, c].tolist()) for c in range(now.shape[1])]
    else:
        pairs = [(now[i].tolist(), before[i].tolist()) for i in range(now.shape[0])]
    found = [
        divergence(softmax([v / temperature for v in old]), softmax([v / temperature for v in new]))
        for new, old in pairs
    ]
    return sum(found) / len(found)


GRID = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 6),
    "relation": st.sampled_from(["samples", "classes"]),
    "temperature": st.sampled_from([0.5, 1.0, 3.0]),
}


@given(classes=st.integers(1, 5), **GRID)
def test_the_distillation_is_the_formula(seed, rows, classes, relation, temperature) -> None:
    now, before = drawn(seed, rows, classes), 3 * drawn(seed + 1, rows, classes)
    found = relation_distillation(now, before, relation, temperature)
    assert found.item() == pytest.approx(relation_by_hand(now, before, relation, temperature), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("relation", ["samples", "classes"])
def test_equal_relations_cost_nothing_and_pull_nowhere(relation) -> None:
    before = drawn(0, 6, 3)
    now = before.clone().requires_grad_()
    loss = relation_distillation(now, before, relation)
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert now.grad is not None and now.grad.abs().max() < 1e-15


def test_each_relation_is_blind_to_what_the_other_sees() -> None:
    before, over_samples, over_classes = drawn(0, 6, 3), drawn(1, 1, 3), drawn(2, 6, 1)
    # One number added to a prototype's scores of all samples leaves its order of them; likewise the other way round.
    assert relation_distillation(before + over_samples, before, "samples").item() == pytest.approx(0, abs=1e-12)
    assert relation_distillation(before + over_samples, before, "classes").item() > 1e-3
    assert relation_distillation(before + over_classes, before, "classes").item() == pytest.approx(0, abs=1e-12)
    assert relation_distillation(before + over_classes, before, "samples").item() > 1e-3


@given(data=st.data(), classes=st.integers(1, 7), **GRID)
def test_the_masked_form_is_the_sum_over_old_tasks(data, seed, rows, classes, relation, temperature) -> None:
    """Classes in any order among tasks, some of none that is old."""
    tasks = data.draw(st.lists(st.integers(0, 3), min_size=classes, max_size=classes))
    old = data.draw(st.lists(st.booleans(), min_size=classes, max_size=classes))
    now, before = drawn(seed, rows, classes).requires_grad_(), 3 * drawn(seed + 1, rows, classes)
    found = masked_relation_distillation(
        now, before, torch.tensor(tasks).double(), torch.tensor(old).double(), relation, temperature
    )
    expected = now.new_zeros(())
    for task in range(4):
        columns = [c for c in range(classes) if tasks[c] == task and old[c]]
        if columns:
            expected = expected + relation_distillation(now[:, columns], before[:, columns], relation, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    if any(old):
        mine, theirs = torch.autograd.grad(found, now)[0], torch.autograd.grad(expected, now)[0]
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_masks_hold_in_single_precision_far_from_zero() -> None:
    """A task whose scores lie a thousand below another's has relations all the same."""
    now, before = drawn(0, 4, 4).float(), drawn(1, 4, 4).float()
    far = torch.tensor([0.0, 0.0, -1000.0, -1000.0])
    tasks, old = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.ones(4)
    near = masked_relation_distillation(now, before, tasks, old, "classes")
    apart = masked_relation_distillation(now + far, before + far, tasks, old, "classes")
    assert apart.item() == pytest.approx(near.item(), rel=1e-3) and near.item() > 0.1


def test_an_unknown_relation_is_named() -> None:
    with pytest.raises(ContlearnError, match="relation: expected samples or classes, got 'sample'"):
        check_relation("sample")
