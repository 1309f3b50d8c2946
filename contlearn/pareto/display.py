"""What a sweep shows on stderr: a live table on a terminal, a plain line per finished cell elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from contlearn.pareto.plan import Cell
from contlearn.pareto.tasks import Ended, Event, Started
from contlearn.progress import _clean, _is_terminal, duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

INTERVAL = 0.25  # seconds between two updates of the live table, at least


class SweepProgress:
    """The progress of a sweep; a context manager that gives the terminal back whatever happens.

    Args:
        cells: every cell.
        finished: records of those that need not run, by id.
        jobs: cells at a time, for the time left; ``None`` where nobody knows.
        quiet: show nothing.
        stream: where to write; ``None`` for stderr.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        *,
        finished: Mapping[str, Mapping[str, Any]],
        jobs: int | None,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cells = {cell.id: cell for cell in cells}
        self._records: dict[str, Mapping[str, Any]] = dict(finished)
        self._running: dict[str, float] = {}
        self._jobs = jobs
        self._stream = sys.stderr if stream is None else stream
        self._silent = quiet or self._stream is None
        self._clock = clock
        self._began = clock()
        self._shown = float("-inf")
        self._live: Live | None = None

    def __enter__(self) -> SweepProgress:
        self._began = self._clock()
        if self._records:
            self._print(f"{len(self._records)} of {len(self._cells)} cells were finished before")
        if not self._silent and _is_terminal(self._stream) and len(self._records) < len(self._cells):
            self._go_live()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            with self._guard():
                live.update(self._table(), refresh=kind is None)
                live.stop()

    def update(self, event: Event) -> None:
        """Take in what an engine says."""
        if isinstance(event, Started):
            self._running[event.cell.id] = self._clock()
        elif isinstance(event, Ended):
            self._running.pop(event.cell.id, None)
            self._records[event.cell.id] = event.record
            if self._live is None or event.record["status"] == "failed":
                self._print(self._line(event.cell, event.record))
        if self._live is not None and self._clock() - self._shown >= INTERVAL:
            self._shown = self._clock()
            with self._guard():
                self._live.update(self._table(), refresh=True)

    def message(self, text: str) -> None:
        """Show a line that lasts."""
        self._print(_clean(text))

    def remaining(self) -> float | None:
        """Seconds left, from the mean duration of the cells of each label; ``None`` before the first has ended."""
        known: dict[str, list[float]] = {}
        for cell_id, record in self._records.items():
            if record["status"] == "complete":
                known.setdefault(self._cells[cell_id].label, []).append(record["seconds"])
        if not known or not self._jobs:
            return None
        overall = fmean(seconds for values in known.values() for seconds in values)
        left = 0.0
        for cell_id, cell in self._cells.items():
            if cell_id not in self._records:
                expected = fmean(known[cell.label]) if cell.label in known else overall
                began = self._running.get(cell_id)
                left += expected if began is None else max(0.0, expected - (self._clock() - began))
        return left / min(self._jobs, max(1, len(self._cells) - len(self._records)))

    def _line(self, cell: Cell, record: Mapping[str, Any]) -> str:
        parts = [f"{len(self._records)}/{len(self._cells)}  {_clean(cell.group)}, seed {cell.seed}"]
        if record["status"] == "failed":
            parts.append(f"FAILED: {_clean(record['error'])}")
        else:
            parts += [f"{name} {value:.3f}" for name, value in _shown(record)]
        parts.append(f"{record['seconds']:.1f} s")
        left = self.remaining()
        return "  ".join([*parts, *([f"{duration(left)} left"] if left else [])])

    def _print(self, text: str) -> None:
        if self._silent:
            return
        with self._guard():
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
            else:
                self._stream.write(f"{text}\n")
                self._stream.flush()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """A terminal that went away must not end a sweep of hours."""
        try:
            yield
        except (OSError, ValueError):
            self._silent = True
            live, self._live = self._live, None
            if live is not None:
                with contextlib.suppress(OSError, ValueError):
                    live.stop()

    def _go_live(self) -> None:
        from rich.console import Console  # late: costs nothing where no terminal is
        from rich.live import Live

        console = Console(file=self._stream, force_terminal=True)
        self._live = Live(
            self._table(), console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        with self._guard():
            self._live.start(refresh=True)

    def _table(self) -> RenderableType:
        """A line on the whole, then a row per label."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        failed = sum(record["status"] == "failed" for record in self._records.values())
        left = self.remaining()
        head = [f"{len(self._records)}/{len(self._cells)} cells", f"{len(self._running)} running"]
        head += [f"{failed} failed"] if failed else []
        head += [duration(self._clock() - self._began)]
        head += [f"{duration(left)} left"] if left and len(self._records) < len(self._cells) else []
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("strategy", overflow="ellipsis", no_wrap=True)
        figure = next((name for record in self._records.values() for name, _ in _shown(record)), "accuracy")
        for heading in ("", "done", "running", "failed", figure, "s/cell"):
            table.add_column(heading, justify="right", no_wrap=True)
        for label in dict.fromkeys(cell.label for cell in self._cells.values()):
            ids = [cell_id for cell_id, cell in self._cells.items() if cell.label == label]
            ended = [self._records[cell_id] for cell_id in ids if cell_id in self._records]
            complete = [record for record in ended if record["status"] == "complete"]
            shown = [value for record in complete for _, value in _shown(record)]
            broken = len(ended) - len(complete)
            table.add_row(
                Text(_clean(label)),
                ProgressBar(total=len(ids), completed=len(ended), width=12),
                f"{len(ended)}/{len(ids)}",
                str(sum(cell_id in self._running for cell_id in ids) or ""),
                Text(str(broken or ""), style="bold red"),
                f"{fmean(shown):.3f}" if shown else "",
                f"{fmean(record['seconds'] for record in complete):.1f}" if complete else "",
            )
        return Group(Text("  ".join(head)), table)


def _shown(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The figure a cell is known by, with its name; none where it has none."""
    figures = (("accuracy", record.get("final_accuracy")), ("error", record.get("mean_error")))
    return [(name, value) for name, value in figures if value is not None]
