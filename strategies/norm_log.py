"""The norms of a run's weight matrices over time: a log of bounded size, its JSON file, and the schedule read off one.

An unprojected network's effective learning rate falls as its weights grow; the growth of a reference run gives the
learning-rate schedule that puts the same fall into a projected one (arXiv 2407.01800).
"""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contlearn.errors import ContlearnError, nearest
from contlearn.files import atomic_write_text

FORMAT = "contlearn norm log"
_LARGEST_FILE = 64 << 20


class NormLog:
    """Steps, learning rate and norms, at most ``size`` entries: when it is full, every second one is dropped.

    Args:
        names: the matrices.
        size: entries kept; 0 keeps none.

    Attributes:
        stride: distance between two entries in optimizer steps.
        count: entries there are.
        steps: optimizer steps done ``(size,)``, the first ``count`` of them in use; so below.
        rates: learning rate of the step that led there ``(size,)``.
        norms: Frobenius norms ``(size, matrices)``.
    """

    def __init__(self, names: Sequence[str], *, size: int) -> None:
        self.names = list(names)
        self.size = size
        self.stride = 1
        self.count = 0
        self.steps = torch.zeros(size, dtype=torch.int64)
        self.rates = torch.zeros(size)
        self.norms = torch.zeros(size, len(self.names))

    def due(self, step: int) -> bool:
        """Whether an entry is wanted after ``step`` optimizer steps."""
        return self.size > 0 and step % self.stride == 0

    def add(self, step: int, rate: float, norms: Tensor) -> None:
        """Enter ``norms`` ``(matrices,)`` after ``step`` optimizer steps."""
        while self.count == self.size:
            self._thin()
        if not self.due(step):
            return
        self.steps[self.count] = step
        self.rates[self.count] = rate
        self.norms[self.count] = norms.to("cpu", torch.float32)
        self.count += 1

    def _thin(self) -> None:
        self.stride *= 2
        kept = torch.nonzero(self.steps[: self.count] % self.stride == 0).squeeze(1)
        for held in (self.steps, self.rates, self.norms):
            held[: len(kept)] = held[kept]
        self.count = len(kept)

    def effective_rates(self, power: int = 1) -> Tensor:
        """Learning rate over norm^power ``(count, matrices)``: 1 fits Adam and its kin, 2 fits SGD."""
        return self.rates[: self.count, None] / self.norms[: self.count].pow(power)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Keep the log as a JSON file, replaced in one step.

        Raises:
            ContlearnError: the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "schema": 1,
            "matrices": self.names,
            "steps": self.steps[: self.count].tolist(),
            "rates": self.rates[: self.count].tolist(),
            "norms": self.norms[: self.count].tolist(),
        }
        atomic_write_text(path, json.dumps(content) + "\n")


class Reference:
    """Norm growth of another run, as factors of the learning rate.

    Args:
        path: a file that :meth:`NormLog.write` made.

    Raises:
        ContlearnError: no such file, or not what it should hold.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        content = _read(Path(path))
        self.names: list[str] = content["matrices"]
        self.steps: list[int] = content["steps"]
        self.norms: list[list[float]] = content["norms"]

    def column_of(self, names: Sequence[str]) -> list[int]:
        """Where each of ``names`` stands in the reference.

        Raises:
            ContlearnError: one that is not there.
        """
        columns = []
        for name in names:
            if name not in self.names:
                close = nearest(name, self.names)
                hint = f"; the nearest is {close!r}" if close else ""
                raise ContlearnError(
                    f"reference: {self.path!r} has no norms of {name!r}{hint}; expected the log of a run of the same "
                    f"network, or reference_scale global"
                )
            columns.append(self.names.index(name))
        return columns

    def global_factor(self, step: int, *, power: int) -> float:
        """(|W_0| / |W_t|)^power with the norm over all matrices together, for the update after ``step`` updates."""
        now = self._at(step)
        return (math.hypot(*self.norms[0]) / math.hypot(*now)) ** power

    def factors(self, step: int, columns: Sequence[int], *, power: int) -> list[float]:
        """The same per matrix."""
        now = self._at(step)
        return [(self.norms[0][column] / now[column]) ** power for column in columns]

    def _at(self, step: int) -> list[float]:
        """Norms after ``step`` updates, linear in between; the last ones stay."""
        after = bisect_right(self.steps, step)
        if after == 0 or after == len(self.steps):
            return self.norms[max(after - 1, 0)]
        left, right = self.steps[after - 1], self.steps[after]
        share = (step - left) / (right - left)
        before, behind = self.norms[after - 1], self.norms[after]
        return [a + share * (b - a) for a, b in zip(before, behind, strict=True)]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ContlearnError(f"reference: {str(path)!r} is larger than {_LARGEST_FILE >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ContlearnError(
            f"reference: cannot read {str(path)!r} ({error.strerror}); expected a file written with record=PATH"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ContlearnError(f"reference: {str(path)!r} is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ContlearnError(f"reference: {str(path)!r} is not a norm log; expected a file written with record=PATH")
    if content.get("schema") != 1:
        raise ContlearnError(f"reference: {str(path)!r} has schema {content.get('schema')!r}, expected 1")
    _check(path, content)
    return content


def _check(path: Path, content: dict[str, Any]) -> None:
    names, steps, norms = (content.get(key) for key in ("matrices", "steps", "norms"))
    sound = (
        isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        and isinstance(steps, list) and all(type(step) is int and step >= 0 for step in steps)
        and all(a < b for a, b in pairwise(steps))
        and isinstance(norms, list) and 0 < len(norms) == len(steps)
        and all(isinstance(row, list) and len(row) == len(names) for row in norms)
        and all(_positive(norm) for row in norms for norm in row)
    )  # fmt: skip
    if not sound:
        raise ContlearnError(
            f"reference: {str(path)!r} is damaged; expected rising steps and one positive norm per matrix and step"
        )


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
