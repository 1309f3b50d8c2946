"""Methods that rehearse, against plain loops: replay, DER and DER++, ER-ACE, iCaRL, GDumb."""

from __future__ import annotations

import collections
import copy
import math

import pytest
import torch
from avalanche.training.regularization import ACECriterion
from hypothesis import given
from hypothesis import strategies as st

from contlearn import strategies
from contlearn.strategies.er_ace import asymmetric_cross_entropy

SOON = {"lr": 0.1, "epochs": 2, "batch_size": 5}


def train(strategy, stream):
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
    return strategy


def cross_entropy(logits, labels, classes=None) -> float:
    """Mean over samples of log(sum of exponentials) - logit of the label, among ``classes``."""
    total = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        among = [row[c] for c in (classes if classes is not None else range(len(row)))]
        total += max(among) + math.log(sum(math.exp(value - max(among)) for value in among)) - row[label]
    return total / len(labels)


# ---------------------------------------------------------------- replay


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "experience_balanced", "herding"])
def test_replay_joins_each_batch_with_exemplars_of_past_experiences(stream, small, watch, identify, policy) -> None:
    places, batches = identify(stream, "train"), collections.defaultdict(list)

    def note(strategy) -> None:
        found = places(strategy.mb_x)
        assert strategy.mb_y.tolist() == [stream.train_stream[index].dataset.targets[place] for index, place in found]
        batches[strategy.clock.train_exp_counter].append(found)

    options = {"memory_size": 12, "policy": policy, "batch_size_memory": 3, **SOON}
    strategy = strategies.create("replay", small(stream), plugins=[watch(before_forward=note)], **options)
    kept: list[set[tuple[int, int]]] = [set()]
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        kept.append(set(places(torch.stack([x for x, *_ in strategy.replay.storage_policy.buffer.train()]))))
    for index, found in batches.items():
        joined = 3 if index else 0
        assert [len(batch) for batch in found] == [5 + joined, 5 + joined, 5 + joined, 1 + joined] * 2
        current = [place for batch in found for place in batch[: len(batch) - joined]]
        rehearsed = [place for batch in found for place in batch[len(batch) - joined :] if joined]
        assert collections.Counter(current) == {(index, position): 2 for position in range(16)}
        # Eight batches of three are two passes over the twelve exemplars.
        assert collections.Counter(rehearsed) == dict.fromkeys(kept[index], 2)


# ---------------------------------------------------------------- dark experience replay


@pytest.mark.parametrize("head", ["growing", "fixed"])
@pytest.mark.parametrize(("name", "beta"), [("der", 0.0), ("derpp", 0.7)])
def test_the_loss_of_der_is_the_plain_loops(stream, small, watch, identify, name, beta, head) -> None:
    places, teachers, widths, checked = identify(stream, "train"), [], [], set()

    def check(strategy) -> None:
        index = strategy.clock.train_exp_counter
        output, labels = strategy.mb_output.detach(), strategy.mb_y
        if index == 0:
            assert strategy.loss.item() == pytest.approx(cross_entropy(output, labels), rel=1e-4)
            return
        count = len(labels) - (1 if strategy.clock.train_epoch_iterations == 3 else 5)
        assert count == 6
        squares = []
        for row, (origin, position) in zip(output, places(strategy.mb_x[:count]), strict=False):
            assert origin < index
            image = stream.train_stream[origin].dataset.eval()[position][0]
            with torch.no_grad():
                stored = teachers[origin](image[None])[0, : widths[origin]]
            squares += [(float(row[c]) - float(stored[c])) ** 2 for c in range(len(stored))]
            checked.add((index, origin))
        expected = cross_entropy(output[count:], labels[count:]) + 0.3 * sum(squares) / len(squares)
        expected += beta * cross_entropy(output[:count], labels[:count])
        assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)

    def keep(strategy) -> None:
        teachers.append(copy.deepcopy(strategy.model).eval())
        widths.append(strategy.mb_output.shape[1])

    options = {"beta": beta} if name == "derpp" else {}
    strategy = strategies.create(
        name,
        small(stream, head=head, dropout=0.2),
        alpha=0.3,
        memory_size=12,
        batch_size_memory=6,
        plugins=[watch(before_backward=check, after_training_exp=keep)],
        **options,
        **SOON,
    )
    train(strategy, stream)
    assert checked == {(1, 0), (2, 0), (2, 1)}
    assert widths == ([2, 4, 6] if head == "growing" else [6, 6, 6])


@pytest.mark.parametrize("name", ["der", "derpp", "er_ace"])
def test_a_memory_smaller_than_its_batch_is_rehearsed_whole(stream, small, watch, name) -> None:
    counts = []

    def note(strategy) -> None:
        if strategy.clock.train_exp_counter:
            counts.append(len(strategy._stored_logits if name != "er_ace" else strategy._exemplars[1]))

    strategy = strategies.create(
        name, small(stream), memory_size=4, batch_size_memory=32, plugins=[watch(before_backward=note)], **SOON
    )
    train(strategy, stream)
    assert counts == [4] * 2 * 8


# ---------------------------------------------------------------- ER-ACE


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000))
def test_asymmetric_cross_entropy_is_the_plain_loops_and_avalanches(classes, incoming, exemplars, seed) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.randn(count, classes, generator=generator) * 3,
            torch.randint(classes, (count,), generator=generator),
        )

    (output, target), (old_output, old_target) = draw(incoming), draw(exemplars)
    loss = asymmetric_cross_entropy(output, target, old_output, old_target)
    present = sorted(set(target.tolist()))
    expected = (cross_entropy(output, target, present) + cross_entropy(old_output, old_target)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    theirs = ACECriterion()(output, target, old_output, old_target)
    torch.testing.assert_close(loss, theirs, rtol=1e-3, atol=1e-4)


def test_asymmetric_cross_entropy_stays_a_number_where_a_softmax_underflows() -> None:
    output, target = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True), torch.tensor([1, 1])
    both = torch.tensor([0, 1])
    assert ACECriterion()(output, both, output, both).isnan()  # why ours exists
    loss = asymmetric_cross_entropy(output, both, output, target)
    loss.backward()
    assert loss.item() == pytest.approx(50.0) and output.grad.isfinite().all()


def test_er_ace_trains_on_the_asymmetric_loss_of_batch_and_exemplars(stream, small, watch, identify) -> None:
    places, past = identify(stream, "train"), collections.Counter()

    def check(strategy) -> None:
        index = strategy.clock.train_exp_counter
        output, labels = strategy.mb_output.detach(), strategy.mb_y
        if index == 0:
            expected = cross_entropy(output, labels)
        else:
            exemplars, targets = strategy._exemplars[0], strategy._exemplars[1]
            assert len(targets) == 6
            with torch.no_grad():
                old = strategy.model(exemplars)
            expected = (cross_entropy(output, labels, sorted(set(labels.tolist()))) + cross_entropy(old, targets)) / 2
            past.update((index, origin) for origin, _ in places(exemplars))
        assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)

    strategy = strategies.create(
        "er_ace", small(stream), memory_size=12, batch_size_memory=6, plugins=[watch(before_backward=check)], **SOON
    )
    train(strategy, stream)
    # The memory takes an experience in before it is trained on, so each rehearses itself as well.
    assert set(past) == {(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}


# ---------------------------------------------------------------- GDumb


def test_gdumb_trains_from_scratch_on_a_balanced_memory_alone(stream, small, watch, identify) -> None:
    places, used, starts = identify(stream, "train"), collections.defaultdict(collections.Counter), []
    model = small(stream)
    fresh = copy.deepcopy(model.backbone.state_dict())

    def start(strategy) -> None:
        starts.append({name: value.clone() for name, value in strategy.model.backbone.state_dict().items()})

    strategy = strategies.create(
        "gdumb",
        model,
        memory_size=9,
        plugins=[
            watch(
                before_training_exp=start,
                before_forward=lambda s: used[s.clock.train_exp_counter].update(places(s.mb_x)),
            )
        ],
        **SOON,
    )
    for count, experience in enumerate(stream.train_stream, start=1):
        strategy.train(experience, eval_streams=[])
        labels = collections.Counter(
            stream.train_stream[index].dataset.targets[position] for index, position in used[count - 1]
        )
        assert sum(labels.values()) == 9 and set(used[count - 1].values()) == {2}
        assert set(labels) == set(range(2 * count)) and max(labels.values()) - min(labels.values()) <= 1
        assert any(not torch.equal(value, fresh[name]) for name, value in strategy.model.backbone.state_dict().items())
    assert all(torch.equal(begun[name], value) for begun in starts for name, value in fresh.items())


def test_gdumb_does_not_learn_from_the_test_stream_which_classes_come(stream, small) -> None:
    strategy = strategies.create("gdumb", small(stream), memory_size=9, **SOON)
    for count, experience in enumerate(stream.train_stream, start=1):
        strategy.train(experience, eval_streams=[])
        assert strategy.model.head.out_features == 2 * count
        strategy.eval(stream.test_stream)
