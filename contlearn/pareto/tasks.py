"""What the sweep and its engines say to each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from contlearn.pareto.folder import SweepFolder
from contlearn.pareto.plan import Cell
from contlearn.pareto.specification import Specification


@dataclass(frozen=True)
class Started:
    """A cell has been handed to a worker."""

    cell: Cell


@dataclass(frozen=True)
class Ended:
    """A cell has ended; ``record`` is its ``cell.json``, already on the disk."""

    cell: Cell
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Waiting:
    """Nothing has happened for a moment; time to refresh what is shown."""


Event = Started | Ended | Waiting


class Engine(Protocol):
    """Runs cells on workers; a context manager that leaves no process behind."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def plan(self, specification: Specification) -> list[Cell]:
        """The cells of a sweep, checked (:func:`contlearn.pareto.plan.expand`)."""
        ...

    def run(self, cells: Sequence[Cell], folder: SweepFolder) -> Iterator[Event]:
        """Run the cells, each ending in a record in its folder."""
        ...
