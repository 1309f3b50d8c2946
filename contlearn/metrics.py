"""Continual-learning metrics as pure functions of a run's records (``contlearn.events``).

Notation: ``a[i][j]`` is the accuracy after training experience ``i`` on test experience ``j`` with all classes seen so
far competing, ``T`` the number of experiences, both counted from 0. A joint run has one row. Where a metric is
undefined (one experience, a pair not evaluated, a run not finished) it is ``None``, never zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from contlearn.errors import ContlearnError
from contlearn.events import Event, field, latest, run_record


def accuracy_matrix(events: Sequence[Event]) -> list[list[float | None]]:
    """``a[i][j]``, 0..1: a row per training experience evaluated so far, a column per test experience."""
    return _Evaluations.of(events).matrix()


def accuracy_seen(events: Sequence[Event]) -> list[float | None]:
    """Accuracy after each experience ``i`` on all test samples of experiences 0..``i`` (of all, for a joint run)."""
    return _Evaluations.of(events).seen()


def final_accuracy(events: Sequence[Event]) -> float | None:
    """Accuracy on all test samples after the last experience: ``sum_j correct[T-1][j] / sum_j n[T-1][j]``.

    A_{1:N} of Smith et al. (arXiv 2203.17269). ``None`` until every test experience is evaluated after the last one.
    """
    run = _Evaluations.of(events)
    return run.pooled(run.rows - 1, range(run.columns))


def average_accuracy(events: Sequence[Event]) -> float | None:
    """Mean over ``i`` of the accuracy on everything seen up to ``i``: ``(1/T) sum_i acc_i``.

    ``acc_i = sum_{j<=i} correct[i][j] / sum_{j<=i} n[i][j]``: the average incremental accuracy of iCaRL (arXiv
    1611.07725, section 4). Equals the final accuracy for a joint run.
    """
    run = _Evaluations.of(events)
    return _mean(run.seen()) if run.finished else None


def forgetting(events: Sequence[Event]) -> float | None:
    """``F = 1/(T-1) sum_{j<T-1} ( max_{j<=i<=T-2} a[i][j] - a[T-1][j] )``, Chaudhry et al. (arXiv 1801.10112).

    Their maximum starts at the first experience; here at ``j``, since before experience ``j`` there was nothing of it
    to forget. Negative when later experiences helped.
    """
    run = _Evaluations.of(events)
    if run.joint:
        return None
    last = run.rows - 1
    return _mean(
        _minus(_maximum(run.accuracy(i, j) for i in range(j, last)), run.accuracy(last, j)) for j in range(last)
    )


def backward_transfer(events: Sequence[Event]) -> float | None:
    """``BWT = 1/(T-1) sum_{j<T-1} ( a[T-1][j] - a[j][j] )``, Lopez-Paz & Ranzato (arXiv 1706.08840, eq. 3)."""
    run = _Evaluations.of(events)
    if run.joint:
        return None
    last = run.rows - 1
    return _mean(_minus(run.accuracy(last, j), run.accuracy(j, j)) for j in range(last))


def forward_transfer(events: Sequence[Event]) -> float | None:
    """``FWT = 1/(T-1) sum_{j>=1} ( a[j-1][j] - b[j] )``, Lopez-Paz & Ranzato (arXiv 1706.08840, eq. 4).

    ``b[j]`` is the accuracy on test experience ``j`` before any training (records with ``after`` -1). ``None`` without
    them, and where a test experience brings a class that no earlier one has (a class-incremental stream): that class
    cannot be predicted before it is learned, so the number would be zero by construction.
    """
    run = _Evaluations.of(events)
    if run.joint or any(not run.classes[j] <= frozenset().union(*run.classes[:j]) for j in range(1, run.columns)):
        return None
    return _mean(_minus(run.accuracy(j - 1, j), run.accuracy(-1, j)) for j in range(1, run.rows))


def global_forgetting(events: Sequence[Event]) -> float | None:
    """``F^G = 1/(T-1) sum_{i=1..T-1} sum_{n<i} |T_n|/|T_{1:i}| ( R[n][n] - R[i][n] )``, Smith et al. (2203.17269).

    ``R[i][n]`` is the accuracy after experience ``i`` on test experience ``n`` with the classes of experiences 0..``n``
    competing (``correct_upto``), ``|T_n|`` the number of classes of experience ``n`` and ``|T_{1:i}|`` that of
    experiences 0..``i``. The paper's experiences share no class; where they do, ``|T_{1:i}|`` is the sum of the counts,
    so that the weights of one ``i`` still add up to less than 1.
    """
    return _weighted_forgetting(_Evaluations.of(events), "correct_upto")


def local_forgetting(events: Sequence[Event]) -> float | None:
    """:func:`global_forgetting` with only the test experience's own classes competing (``correct_local``)."""
    return _weighted_forgetting(_Evaluations.of(events), "correct_local")


def learning_accuracy(events: Sequence[Event]) -> float | None:
    """``LA = (1/T) sum_j a[j][j]``: accuracy on each experience just after learning it (Riemer et al., 1810.11910)."""
    run = _Evaluations.of(events)
    return None if run.joint else _mean(run.accuracy(j, j) for j in range(run.rows))


def summary(events: Sequence[Event]) -> dict[str, float | None]:
    """Every metric of this module by name; where a method has a second classifier, ``NAME_final_accuracy`` and
    ``NAME_average_accuracy`` of its answers, too (``nme``: nearest mean of exemplars).
    """
    return {
        "final_accuracy": final_accuracy(events),
        "average_accuracy": average_accuracy(events),
        "learning_accuracy": learning_accuracy(events),
        "forgetting": forgetting(events),
        "global_forgetting": global_forgetting(events),
        "local_forgetting": local_forgetting(events),
        "backward_transfer": backward_transfer(events),
        "forward_transfer": forward_transfer(events),
        **_second_classifiers(_Evaluations.of(events)),
    }


def _second_classifiers(run: _Evaluations) -> dict[str, float | None]:
    names = {name for record in run.pairs.values() for name in record if name.startswith("correct_")}
    found: dict[str, float | None] = {}
    for key in sorted(names - {"correct_local", "correct_upto"}):
        name = key.removeprefix("correct_")
        found[f"{name}_final_accuracy"] = run.pooled(run.rows - 1, range(run.columns), key)
        found[f"{name}_average_accuracy"] = _mean(run.seen(key)) if run.finished else None
    return found


@dataclass(frozen=True)
class _Evaluations:
    """The evaluation records of a run, the last one of each pair."""

    classes: Sequence[frozenset[int]]
    joint: bool
    experiences: int
    pairs: Mapping[tuple[int, int], Event]

    @classmethod
    def of(cls, events: Sequence[Event]) -> _Evaluations:
        run = run_record(events)
        found = cls(
            classes=[frozenset(classes) for classes in field(run, "classes_per_experience", list)],
            joint=bool(run.get("joint", False)),
            # Streams whose test stream is not cut like the training stream say how many rows to expect.
            experiences=int(run.get("experiences") or len(field(run, "classes_per_experience", list))),
            pairs={(i, j): record for (i, j), record in latest(events, "evaluation", "after", "on").items()},
        )
        for (i, j), record in found.pairs.items():
            for name in ("after", "on", "n", "correct"):
                field(record, name, (int, float))
            if not (-1 <= i < found.rows and 0 <= j < found.columns):
                raise ContlearnError(
                    f"damaged events: an evaluation after experience {i} on experience {j}, but the run has "
                    f"{found.rows} training and {found.columns} test experiences (counted from 0)"
                )
        return found

    @property
    def square(self) -> bool:
        """Whether test experience ``j`` belongs to training experience ``j``."""
        return not self.joint and self.experiences == self.columns

    @property
    def rows(self) -> int:
        return 1 if self.joint else self.experiences

    @property
    def columns(self) -> int:
        return len(self.classes)

    @property
    def reached(self) -> int:
        """Number of rows with an evaluation, or before one."""
        return max((i + 1 for i, _ in self.pairs), default=0)

    @property
    def finished(self) -> bool:
        return self.reached == self.rows

    def accuracy(self, i: int, j: int, field_name: str = "correct") -> float | None:
        record = self.pairs.get((i, j))
        if record is None or record.get(field_name) is None or not record["n"]:
            return None
        return float(record[field_name] / record["n"])

    def pooled(self, i: int, columns: Iterable[int], field_name: str = "correct") -> float | None:
        """Accuracy after ``i`` over the samples of several test experiences together."""
        records = [self.pairs.get((i, j)) for j in columns]
        known = [record for record in records if record is not None]
        samples = sum(record["n"] for record in known)
        if len(known) < len(records) or not samples:
            return None
        # Experiences whose classes were never seen are not evaluated: no answer of theirs is correct.
        return float(sum(record.get(field_name, 0) for record in known) / samples)

    def matrix(self) -> list[list[float | None]]:
        return [[self.accuracy(i, j) for j in range(self.columns)] for i in range(self.reached)]

    def seen(self, field_name: str = "correct") -> list[float | None]:
        return [
            self.pooled(i, range(i + 1 if self.square else self.columns), field_name) for i in range(self.reached)
        ]


def _weighted_forgetting(run: _Evaluations, field_name: str) -> float | None:
    if run.joint:
        return None
    counts = [len(classes) for classes in run.classes]
    sums = []
    for i in range(1, run.rows):
        total = 0.0
        for n in range(i):
            drop = _minus(run.accuracy(n, n, field_name), run.accuracy(i, n, field_name))
            if drop is None:
                return None
            total += counts[n] / sum(counts[: i + 1]) * drop
        sums.append(total)
    return _mean(sums)


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _maximum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return max(known) if known and len(known) == len(found) else None


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or ``None`` when there is no value or one of them is unknown."""
    found = list(values)
    known: list[Any] = [value for value in found if value is not None]
    return fmean(known) if known and len(known) == len(found) else None
