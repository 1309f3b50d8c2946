"""Statistics of a sweep as pure functions: spreads over seeds, paired comparisons, fronts, hypervolumes, areas.

Memory is in bytes and always to be small; every random draw comes from a generator with a fixed seed, so that the same
numbers give the same intervals.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
EXACT_UP_TO = 20  # 2^20 sign patterns; more differences are sampled
MIB = 2**20


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and how far it can be trusted.

    Attributes:
        mean: arithmetic mean.
        sd: standard deviation of the sample (n - 1); ``None`` for a single value.
        low, high: bootstrap interval of the mean; ``None`` for a single value.
        n: number of values.
    """

    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same seeds.

    Attributes:
        n: seeds that both have.
        difference: mean of first minus second.
        low, high: bootstrap interval of the difference; ``None`` for a single seed.
        p_value: two-sided, of the exact sign-flip test; at least ``2 / 2**n``, so 0.25 for three seeds.
    """

    n: int
    difference: float
    low: float | None
    high: float | None
    p_value: float


def spread(values: Sequence[float], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Spread:
    """Mean, sample standard deviation and percentile bootstrap interval of the mean.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    known = _finite(values)
    n = len(known)
    mean = math.fsum(known) / n
    if n == 1:
        return Spread(mean, None, None, None, 1)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1))
    low, high = bootstrap_interval(known, resamples=resamples, level=level, seed=seed)
    return Spread(mean, sd, low, high, n)


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979): quantiles of the means of samples with replacement.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    known = np.asarray(_finite(values), dtype=np.float64)
    if bool((known == known[0]).all()):
        return float(known[0]), float(known[0])
    means = known[_resampled(len(known), resamples, seed)].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(
    first: Mapping[Hashable, float], second: Mapping[Hashable, float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison | None:
    """A paired comparison over the keys (seeds) that both have; ``None`` where they share none."""
    common = [key for key in first if key in second]
    if not common:
        return None
    differences = [first[key] - second[key] for key in common]
    found = spread(differences, resamples=resamples, seed=seed)
    return Comparison(found.n, found.mean, found.low, found.high, sign_flip_p_value(differences, seed=seed))


def sign_flip_p_value(differences: Sequence[float], *, samples: int = 100_000, seed: int = 0) -> float:
    """Two-sided sign-flip permutation test of paired differences: is their mean zero?

    The share of the ``2**n`` sign patterns whose mean is at least as far from zero as the one observed. Exact up to 20
    differences; beyond, of ``samples`` random patterns and the observed one.

    Raises:
        ValueError: no difference, or one that is not finite.
    """
    size = np.abs(np.asarray(_finite(differences), dtype=np.float64))
    # Sums that are equal on paper may differ in their last bits.
    bound = abs(math.fsum(differences)) - 1e-12 * float(size.sum())
    n = len(size)
    if n > EXACT_UP_TO:
        generator = np.random.default_rng(seed)
        sums = np.concatenate(
            [generator.choice((-1.0, 1.0), (min(10_000, samples - at), n)) @ size for at in range(0, samples, 10_000)]
        )
        return float((1 + int((np.abs(sums) >= bound).sum())) / (1 + samples))
    sums = np.zeros(1)
    for value in size:
        sums = np.concatenate([sums - value, sums + value])
    return float((np.abs(sums) >= bound).mean())


def pareto_front(memory: Sequence[float], value: Sequence[float], *, maximise: bool = True) -> list[int]:
    """Positions of the points that no other point beats, in order of memory.

    A point is beaten by one that needs no more memory and is no worse, and is better in one of the two. Equal points do
    not beat each other: both are on the front.

    Raises:
        ValueError: not as many values as memories, or one that is not finite.
    """
    points = _points(memory, value, 1.0 if maximise else -1.0)
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i))
    front: list[int] = []
    best = -math.inf  # of the points that need less memory
    for i in order:
        last = points[front[-1]] if front else None
        if points[i][1] > best or points[i] == last:
            front.append(i)
            best = points[i][1]
    return front


def hypervolume(memory: Sequence[float], value: Sequence[float], *, reference: tuple[float, float]) -> float:
    """Area that the points dominate up to a reference point (Zitzler & Thiele 1999), memory small and value large.

    Args:
        memory: one number per point, on the scale that the area shall be measured in.
        value: one number per point.
        reference: memory and value of the worst corner; points beyond it add nothing.

    Raises:
        ValueError: not as many values as memories, or one that is not finite.
    """
    worst_memory, worst_value = _finite(reference)
    front = pareto_front(memory, value)
    inside = [(memory[i], value[i]) for i in front if memory[i] < worst_memory and value[i] > worst_value]
    ends = [*(x for x, _ in inside[1:]), worst_memory][: len(inside)]
    return math.fsum((end - x) * (y - worst_value) for (x, y), end in zip(inside, ends, strict=True))


def area_under_curve(memory: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Area under accuracy over memory by the trapezoid rule, in MiB as MEMO's AUC-A and AUC-L (arXiv 2205.13218).

    AUC-A is this area of the average accuracy, AUC-L of the last one. Points of equal memory count as their mean;
    ``None`` with fewer than two different memories.

    Args:
        memory: bytes, in any order.
        accuracy: one per memory, 0..1.

    Raises:
        ValueError: not as many accuracies as memories, or one that is not finite.
    """
    levels: dict[float, list[float]] = {}
    for x, y in _points(memory, accuracy, 1.0):
        levels.setdefault(x, []).append(y)
    if len(levels) < 2:
        return None
    curve = [(x, math.fsum(ys) / len(ys)) for x, ys in sorted(levels.items())]
    return math.fsum((right - left) * (a + b) / 2 for (left, a), (right, b) in itertools.pairwise(curve)) / MIB


def _points(memory: Sequence[float], value: Sequence[float], sign: float) -> list[tuple[float, float]]:
    if len(memory) != len(value):
        raise ValueError(f"{len(memory)} memories but {len(value)} values")
    if not memory:
        return []
    return [(x, sign * y) for x, y in zip(_finite(memory), _finite(value), strict=True)]


def _finite(values: Sequence[float]) -> list[float]:
    found = [float(value) for value in values]
    if not found:
        raise ValueError("no value")
    if not all(math.isfinite(value) for value in found):
        raise ValueError(f"values that are not finite: {found}")
    return found


@functools.lru_cache(maxsize=8)
def _resampled(n: int, resamples: int, seed: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Positions ``(resamples, n)`` of samples with replacement; shared by all values of one sweep."""
    return np.random.default_rng(seed).integers(n, size=(resamples, n))
