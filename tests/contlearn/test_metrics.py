"""The metrics against the papers' formulas in plain loops of exact fractions, hand-worked cases and properties."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contlearn import metrics
from contlearn.errors import ContlearnError

Records = list[dict[str, Any]]
FIELDS = ("correct", "correct_local", "correct_upto")


def run_record(classes: list[list[int]], *, joint: bool = False) -> dict[str, Any]:
    return {"event": "run", "schema": 1, "classes_per_experience": classes, "joint": joint}


def evaluation(i: int, j: int, n: int, correct: int, local: int | None = None, upto: int | None = None) -> Any:
    found = {"event": "evaluation", "after": i, "on": j, "n": n, "correct": correct, "loss": None}
    return found | {
        "correct_local": correct if local is None else local,
        "correct_upto": correct if upto is None else upto,
    }


@dataclass
class Stream:
    """A finished run: ``counts[field][i + 1][j]`` of ``samples[j]`` are right after experience ``i``."""

    classes: list[list[int]]
    samples: list[int]
    counts: dict[str, list[list[int]]]

    @property
    def length(self) -> int:
        return len(self.classes)

    def events(self) -> Records:
        found = [run_record(self.classes)]
        for row in range(self.length + 1):
            for j, n in enumerate(self.samples):
                found.append(evaluation(row - 1, j, n, *(self.counts[name][row][j] for name in FIELDS)))
        return found

    def accuracy(self, i: int, j: int, name: str = "correct") -> Fraction:
        return Fraction(self.counts[name][i + 1][j], self.samples[j])


@st.composite
def streams(draw: st.DrawFn, *, min_length: int = 1, shared_classes: bool = False) -> Stream:
    length = draw(st.integers(min_length, 6))
    sizes = draw(st.lists(st.integers(1, 4), min_size=length, max_size=length))
    classes, first = [], 0
    for size in sizes:
        classes.append([0, 1] if shared_classes else list(range(first, first + size)))
        first += size
    samples = draw(st.lists(st.integers(1, 40), min_size=length, max_size=length))
    counts = {name: [[draw(st.integers(0, n)) for n in samples] for _ in range(length + 1)] for name in FIELDS}
    return Stream(classes, samples, counts)


def close(value: Fraction | None) -> Any:
    return None if value is None else pytest.approx(float(value), abs=1e-12)


@given(streams())
def test_accuracies_follow_their_definitions(stream: Stream) -> None:
    events, T = stream.events(), stream.length
    matrix = metrics.accuracy_matrix(events)
    seen = []
    for i in range(T):
        right = total = 0
        for j in range(T):
            assert matrix[i][j] == close(stream.accuracy(i, j))
            if j <= i:
                right += stream.counts["correct"][i + 1][j]
                total += stream.samples[j]
        seen.append(Fraction(right, total))
    assert len(matrix) == T
    assert metrics.accuracy_seen(events) == [close(value) for value in seen]
    assert metrics.final_accuracy(events) == close(seen[-1])
    assert metrics.average_accuracy(events) == close(sum(seen, Fraction(0)) / T)
    assert metrics.learning_accuracy(events) == close(sum((stream.accuracy(j, j) for j in range(T)), Fraction(0)) / T)


@given(streams(min_length=2))
def test_forgetting_and_backward_transfer_follow_their_formulas(stream: Stream) -> None:
    events, T = stream.events(), stream.length
    forgotten = transferred = Fraction(0)
    for j in range(T - 1):
        best = Fraction(0)
        for i in range(j, T - 1):
            best = max(best, stream.accuracy(i, j))
        forgotten += best - stream.accuracy(T - 1, j)
        transferred += stream.accuracy(T - 1, j) - stream.accuracy(j, j)
    assert metrics.forgetting(events) == close(forgotten / (T - 1))
    assert metrics.backward_transfer(events) == close(transferred / (T - 1))
    # The maximum includes the diagonal, so there is at least as much forgetting as negative transfer.
    assert metrics.forgetting(events) >= -metrics.backward_transfer(events) - 1e-12  # type: ignore[operator]


@given(streams(min_length=2), st.sampled_from([("correct_upto", "global"), ("correct_local", "local")]))
def test_weighted_forgetting_follows_its_formula(stream: Stream, kind: tuple[str, str]) -> None:
    name, which = kind
    outer = Fraction(0)
    for i in range(2, stream.length + 1):  # the paper counts from 1
        for n in range(1, i):
            weight = Fraction(len(stream.classes[n - 1]), sum(len(stream.classes[k - 1]) for k in range(1, i + 1)))
            outer += weight * (stream.accuracy(n - 1, n - 1, name) - stream.accuracy(i - 1, n - 1, name))
    value = metrics.global_forgetting if which == "global" else metrics.local_forgetting
    assert value(stream.events()) == close(outer / (stream.length - 1))


@given(streams(min_length=2, shared_classes=True))
def test_forward_transfer_follows_its_formula_where_classes_recur(stream: Stream) -> None:
    total = Fraction(0)
    for j in range(1, stream.length):
        total += stream.accuracy(j - 1, j) - stream.accuracy(-1, j)
    events = stream.events()
    assert metrics.forward_transfer(events) == close(total / (stream.length - 1))
    untrained = [record for record in events if record.get("after") != -1]
    assert metrics.forward_transfer(untrained) is None


@given(streams(min_length=2))
def test_forward_transfer_is_undefined_where_experiences_bring_new_classes(stream: Stream) -> None:
    assert metrics.forward_transfer(stream.events()) is None


@given(streams(min_length=2))
def test_a_model_that_never_changes_on_what_it_learned_forgets_nothing(stream: Stream) -> None:
    for table in stream.counts.values():
        for j in range(stream.length):
            for i in range(j, stream.length):
                table[i + 1][j] = table[j + 1][j]
    summary = metrics.summary(stream.events())
    for name in ("forgetting", "backward_transfer", "global_forgetting", "local_forgetting"):
        assert summary[name] == 0


@given(streams(min_length=2))
def test_backward_transfer_is_minus_forgetting_where_each_experience_was_best_when_learned(stream: Stream) -> None:
    table = stream.counts["correct"]
    for j in range(stream.length):
        table[j + 1][j] = max(table[i + 1][j] for i in range(j, stream.length))
    events = stream.events()
    assert metrics.backward_transfer(events) == pytest.approx(-metrics.forgetting(events), abs=1e-12)  # type: ignore[operator]


@given(streams(), st.randoms(use_true_random=False))
def test_records_repeated_by_a_resumed_run_change_nothing_but_what_they_replace(stream: Stream, random: Any) -> None:
    events = stream.events()
    run, pairs = events[0], events[1:]
    stale = [record | {"correct": 0, "correct_local": 0, "correct_upto": 0} for record in pairs]
    random.shuffle(stale)
    assert metrics.summary([run, *stale, *pairs]) == metrics.summary(events)


def hand_worked() -> Records:
    """Two, one and one classes; 10, 10 and 20 samples."""
    rows = [
        [(9, 9, 9), (0, 5, 4), (0, 10, 0)],
        [(6, 8, 7), (8, 10, 8), (0, 10, 0)],
        [(3, 7, 6), (5, 10, 7), (18, 20, 18)],
    ]
    found = [run_record([[0, 1], [2], [3]])]
    for i, row in enumerate(rows):
        for j, counts in enumerate(row):
            found.append(evaluation(i, j, (10, 10, 20)[j], *counts))
    return found


def test_a_case_worked_by_hand() -> None:
    summary = metrics.summary(hand_worked())
    assert summary == {
        "final_accuracy": pytest.approx((3 + 5 + 18) / 40),
        "average_accuracy": pytest.approx((0.9 + 14 / 20 + 26 / 40) / 3),
        "learning_accuracy": pytest.approx((0.9 + 0.8 + 0.9) / 3),
        "forgetting": pytest.approx((0.6 + 0.3) / 2),
        "backward_transfer": pytest.approx((-0.6 - 0.3) / 2),
        # i=1: 2/3 (0.9-0.7); i=2: 2/4 (0.9-0.6) + 1/4 (0.8-0.7)
        "global_forgetting": pytest.approx((2 / 3 * 0.2 + 0.15 + 0.025) / 2),
        # i=1: 2/3 (0.9-0.8); i=2: 2/4 (0.9-0.7) + 1/4 (1-1)
        "local_forgetting": pytest.approx((2 / 3 * 0.1 + 0.1) / 2),
        "forward_transfer": None,
    }


def test_forgetting_counts_from_the_best_moment_and_not_from_the_first() -> None:
    column = [5, 9, 4]  # rises, then falls
    events = [run_record([[0], [1], [2]])]
    for i in range(3):
        events += [evaluation(i, 0, 10, column[i]), evaluation(i, 1, 10, 6), evaluation(i, 2, 10, 6)]
    assert metrics.forgetting(events) == pytest.approx((0.5 + 0) / 2)
    assert metrics.backward_transfer(events) == pytest.approx((-0.1 + 0) / 2)


def test_one_experience_has_accuracy_but_nothing_to_forget_or_transfer() -> None:
    summary = metrics.summary([run_record([[0, 1]]), evaluation(-1, 0, 8, 4), evaluation(0, 0, 8, 6)])
    accuracies = {name: summary.pop(name) for name in ("final_accuracy", "average_accuracy", "learning_accuracy")}
    assert set(accuracies.values()) == {0.75}
    assert set(summary.values()) == {None}


def test_a_joint_run_has_one_row_and_its_average_is_its_final_accuracy() -> None:
    events = [run_record([[0], [1]], joint=True), evaluation(0, 0, 10, 9), evaluation(0, 1, 30, 15)]
    assert metrics.accuracy_matrix(events) == [[0.9, 0.5]]
    summary = metrics.summary(events)
    assert summary.pop("final_accuracy") == summary.pop("average_accuracy") == 24 / 40
    assert set(summary.values()) == {None}


def test_an_unfinished_run_has_its_rows_so_far_and_no_final_numbers() -> None:
    events = [record for record in hand_worked() if record.get("after") != 2]
    assert metrics.accuracy_matrix(events) == [[0.9, 0.0, 0.0], [0.6, 0.8, 0.0]]
    assert metrics.accuracy_seen(events) == [0.9, 0.7]
    assert set(metrics.summary(events).values()) == {None}
    assert metrics.accuracy_matrix(events[:1]) == []


def test_one_missing_pair_undoes_only_the_metrics_that_need_it() -> None:
    without = [record for record in hand_worked() if (record.get("after"), record.get("on")) != (1, 0)]
    summary, whole = metrics.summary(without), metrics.summary(hand_worked())
    assert metrics.accuracy_matrix(without)[1] == [None, 0.8, 0.0]
    for name in ("average_accuracy", "forgetting", "global_forgetting", "local_forgetting"):
        assert summary[name] is None
    for name in ("final_accuracy", "learning_accuracy", "backward_transfer"):
        assert summary[name] == whole[name]


def test_the_pairs_of_experiences_not_yet_learned_are_not_needed() -> None:
    lower = [record for record in hand_worked() if record["event"] == "run" or record["on"] <= record["after"]]
    assert metrics.summary(lower) == metrics.summary(hand_worked())


def test_a_test_experience_without_samples_has_no_accuracy_but_spoils_no_sum() -> None:
    events = [run_record([[0], [1]]), evaluation(0, 0, 10, 8), evaluation(0, 1, 0, 0)]
    events += [evaluation(1, 0, 10, 6), evaluation(1, 1, 0, 0)]
    assert metrics.accuracy_matrix(events) == [[0.8, None], [0.6, None]]
    assert metrics.final_accuracy(events) == 0.6
    assert metrics.forgetting(events) == pytest.approx(0.2)


def test_only_local_forgetting_needs_local_counts() -> None:
    events = hand_worked()
    for record in events:
        record.pop("correct_local", None)
    assert metrics.local_forgetting(events) is None
    assert metrics.global_forgetting(events) == metrics.global_forgetting(hand_worked())


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "no record 'run'"),
        ([evaluation(0, 0, 1, 1)], "no record 'run'"),
        ([{"event": "run"}], "classes_per_experience"),
        ([run_record([[0]]), {"event": "evaluation", "after": 0, "on": 0, "correct": 1}], "'n'"),
        ([run_record([[0]]), evaluation(0, 0, 10, 5) | {"correct": "5"}], "'correct' = '5'"),
        ([run_record([[0]]), evaluation(1, 0, 10, 5)], "after experience 1"),
        ([run_record([[0]]), evaluation(0, 1, 10, 5)], "on experience 1"),
    ],
)
def test_damaged_records_are_named(events: Records, message: str) -> None:
    with pytest.raises(ContlearnError, match=message):
        metrics.summary(events)
