"""Statistics of a sweep against brute force, and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
import statistics as stdlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contlearn.memory.papers import memo_auc
from contlearn.pareto.statistics import (
    area_under_curve,
    bootstrap_interval,
    compare,
    hypervolume,
    pareto_front,
    sign_flip_p_value,
    spread,
)

small = st.integers(0, 6)
points = st.lists(st.tuples(small, small), max_size=12)
numbers = st.floats(-10, 10, allow_nan=False)


# ---------------------------------------------------------------------- fronts


@given(points, st.booleans())
def test_the_front_is_what_no_other_point_beats(given_points: list[tuple[int, int]], maximise: bool) -> None:
    sign = 1 if maximise else -1

    def beaten(i: int) -> bool:
        x, y = given_points[i]
        return any(a <= x and sign * b >= sign * y and (a < x or sign * b > sign * y) for a, b in given_points)

    memory, value = [x for x, _ in given_points], [y for _, y in given_points]
    front = pareto_front(memory, value, maximise=maximise)
    assert sorted(front) == [i for i in range(len(given_points)) if not beaten(i)]
    assert [memory[i] for i in front] == sorted(memory[i] for i in front)


def test_equal_points_share_the_front() -> None:
    assert pareto_front([1, 2, 1, 2], [0.5, 0.9, 0.5, 0.8]) == [0, 2, 1]


@given(points)
def test_the_hypervolume_is_the_area_of_the_cells_that_some_point_dominates(
    given_points: list[tuple[int, int]],
) -> None:
    memory, value = [x for x, _ in given_points], [y for _, y in given_points]
    squares = sum(
        any(x <= column and y >= row + 1 for x, y in given_points)
        for column, row in itertools.product(range(5), range(1, 6))
    )
    assert hypervolume(memory, value, reference=(5, 1)) == squares


def test_the_hypervolume_of_two_steps() -> None:
    assert hypervolume([0.2, 0.5, 0.6], [0.5, 0.8, 0.7], reference=(1.0, 0.0)) == pytest.approx(0.3 * 0.5 + 0.5 * 0.8)
    assert hypervolume([1.0, 1.0], [0.5, 0.8], reference=(1.0, 0.0)) == 0
    assert hypervolume([], [], reference=(1.0, 0.0)) == 0


# ---------------------------------------------------------------------- areas


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1)), min_size=2, max_size=8, unique_by=lambda p: p[0]))
def test_the_area_is_that_of_memo_in_any_order(curve: list[tuple[int, float]]) -> None:
    rising = sorted(curve)
    theirs = memo_auc([x for x, _ in rising], [y for _, y in rising], [y for _, y in rising]).average
    assert area_under_curve([x for x, _ in curve], [y for _, y in curve]) == pytest.approx(theirs)


def test_the_area_needs_two_memories_and_averages_equal_ones() -> None:
    assert area_under_curve([], []) is None
    assert area_under_curve([2**20, 2**20], [0.2, 0.4]) is None
    assert area_under_curve([0, 2**20, 2**20], [0.5, 0.6, 0.8]) == pytest.approx(0.6)


# ---------------------------------------------------------------------- spreads


@given(st.lists(numbers, min_size=2, max_size=8))
def test_a_spread_has_the_mean_and_the_sample_deviation(values: list[float]) -> None:
    found = spread(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(stdlib.fmean(values), abs=1e-9)
    assert found.sd == pytest.approx(stdlib.stdev(values), abs=1e-9)
    assert found.low is not None and found.high is not None
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9


def test_one_value_has_no_spread() -> None:
    assert spread([0.5]) == type(spread([0.5]))(0.5, None, None, None, 1)


@given(st.lists(numbers, min_size=1, max_size=4), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_interval_is_near_that_of_every_resample(values: list[float], level: float) -> None:
    means = sorted(stdlib.fmean(sample) for sample in itertools.product(values, repeat=len(values)))
    low, high = bootstrap_interval(values, level=level)
    for end, share in ((low, (1 - level) / 2), (high, (1 + level) / 2)):
        # The quantile of 10,000 draws lies between exact quantiles two percent to either side.
        below = means[max(0, math.floor((share - 0.02) * len(means)) - 1)]
        above = means[min(len(means) - 1, math.ceil((share + 0.02) * len(means)))]
        assert below - 1e-9 <= end <= above + 1e-9


def test_the_same_values_have_the_same_interval() -> None:
    assert bootstrap_interval([0.1, 0.5, 0.7]) == bootstrap_interval([0.1, 0.5, 0.7])
    assert bootstrap_interval([0.1, 0.5, 0.7], seed=1, resamples=50) != bootstrap_interval(
        [0.1, 0.5, 0.7], seed=2, resamples=50
    )
    assert bootstrap_interval([0.3, 0.3]) == (0.3, 0.3)


# ---------------------------------------------------------------------- comparisons


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_the_p_value_is_the_share_of_sign_patterns_at_least_as_far_from_zero(differences: list[int]) -> None:
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    exact = sum(s >= abs(sum(differences)) for s in sums) / len(sums)
    assert sign_flip_p_value(differences) == pytest.approx(exact)
    tenths = [d / 10 for d in differences]  # sums that are equal on paper, not in floating point
    assert sign_flip_p_value(tenths) == pytest.approx(exact)


def test_many_differences_are_sampled() -> None:
    assert sign_flip_p_value([0.1] * 30, samples=1000) == pytest.approx(1 / 1001)
    assert sign_flip_p_value([0.1, -0.1] * 15, samples=1000) == 1.0


def test_methods_are_compared_over_the_seeds_they_share() -> None:
    found = compare({0: 0.9, 1: 0.8, 2: 0.9, 7: 0.0}, {0: 0.8, 1: 0.6, 2: 0.8, 9: 1.0})
    assert found is not None
    assert (found.n, found.difference, found.p_value) == (3, pytest.approx(0.4 / 3), 0.25)
    assert compare({0: 0.9}, {1: 0.8}) is None


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_what_is_no_number_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no value|not finite"):
        spread(values)


def test_memories_and_values_must_pair_up() -> None:
    with pytest.raises(ValueError, match="2 memories but 1 values"):
        pareto_front([1, 2], [1])
