"""What comes when in a test-time stream: the domains of each experience, and the order of the samples inside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.corruption import CORRUPTIONS, describe

Schedule = Literal["continual", "gradual", "recurring", "mixed"]
Order = Literal["iid", "dirichlet"]
Domain = tuple[str, int]  # corruption and severity
Visit = tuple[Domain, ...]  # the domains of one test experience

_MOST_SLOTS = 100  # of a correlated order; RoTTA's released sampler stops there


def chosen_corruptions(names: Sequence[str] | None) -> list[str]:
    """The corruptions asked for, checked; all in the official order for ``None``."""
    if names is None:
        return list(CORRUPTIONS)
    if isinstance(names, str) or not len(names):
        raise ContlearnError(f"corruptions: expected a list of names such as [fog, snow], got {names!r}")
    known = [describe(name).name for name in names]
    twice = [name for name, count in Counter(known).items() if count > 1]
    if twice:
        raise ContlearnError(f"corruptions: {twice[0]!r} is listed twice; schedule='recurring' visits the list again")
    return known


def visits_of(names: Sequence[str], severity: int, schedule: str, rounds: int) -> list[Visit]:
    """The domains of each test experience, in order.

    Raises:
        ContlearnError: unknown schedule, or rounds that do not fit it.
    """
    if schedule not in ("continual", "gradual", "recurring", "mixed"):
        raise ContlearnError(f"schedule: expected continual, gradual, recurring or mixed, got {schedule!r}")
    if (rounds < 2) if schedule == "recurring" else (rounds != 1):
        expected = "at least 2" if schedule == "recurring" else "1, or schedule='recurring'"
        raise ContlearnError(f"rounds: expected {expected} with schedule {schedule!r}, got {rounds}")
    if schedule == "gradual":
        ramp = [*range(1, severity + 1), *range(severity - 1, 0, -1)]
        return [((name, level),) for name in names for level in ramp]
    if schedule == "mixed":
        return [tuple((name, severity) for name in names)]
    return [((name, severity),) for _ in range(rounds) for name in names]


def domain_name(domain: Domain) -> str:
    """``fog:5``."""
    return f"{domain[0]}:{domain[1]}"


def visit_names(visits: Sequence[Visit]) -> list[str]:
    """A name for each test experience, numbered from the second visit on: ``fog:5``, ``fog:5#2``; or ``mixed``."""
    seen: Counter[str] = Counter()
    names = []
    for visit in visits:
        name = domain_name(visit[0]) if len(visit) == 1 else "mixed"
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def chosen_samples(count: int, samples: int | None, seed: int) -> Tensor:
    """Positions of the test images that are used, ascending: all, or ``samples`` of them drawn from the seed."""
    if samples is None:
        return torch.arange(count)
    if not 1 <= samples <= count:
        raise ContlearnError(f"samples: expected 1..{count}, the number of test images, got {samples}")
    drawn = np.random.default_rng((seed, 0)).permutation(count)[:samples]
    return torch.from_numpy(np.sort(drawn))


def temporal_order(targets: Tensor, order: str, concentration: float, random: np.random.Generator) -> Tensor:
    """Positions of the samples of one test experience ``(n,)`` in the order they come.

    Raises:
        ContlearnError: unknown order, or a concentration that is not positive.
    """
    if order not in ("iid", "dirichlet"):
        raise ContlearnError(f"order: expected iid or dirichlet, got {order!r}")
    if not concentration > 0:
        raise ContlearnError(f"concentration: expected a number above 0, got {concentration}")
    if order == "iid":
        return torch.from_numpy(random.permutation(len(targets)))
    return torch.from_numpy(correlated(targets.numpy(), concentration, random))


def correlated(targets: np.ndarray, concentration: float, random: np.random.Generator) -> np.ndarray:
    """An order in which samples of a class come close together (NOTE, arXiv 2208.05117), as in RoTTA's sampler.

    Each class is cut into as many pieces as there are time slots (the number of classes, at most 100) with sizes drawn
    from a Dirichlet distribution; inside a slot the pieces follow each other in random order.

    Args:
        targets: class of each sample ``(n,)``.
        concentration: of the Dirichlet distribution; smaller is more correlated.
        random: source of every draw.

    Returns:
        The positions 0..n-1 in temporal order.
    """
    classes = np.unique(targets)
    slots: list[list[np.ndarray]] = [[] for _ in range(min(len(classes), _MOST_SLOTS))]
    for label in classes:
        members = random.permutation(np.flatnonzero(targets == label))
        shares = random.dirichlet([concentration] * len(slots))
        cuts = (np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for slot, piece in zip(slots, np.split(members, cuts), strict=True):
            slot.append(piece)
    return np.concatenate([slot[place] for slot in slots for place in random.permutation(len(slot))])
