"""What a run shows on stderr while it works: a live line on a terminal, one plain line per experience elsewhere."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

INTERVAL = 0.1  # seconds between two updates of the live line, at least
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Progress:
    """The progress of a run; use it as a context manager, which gives the terminal back whatever happens.

    Experiences, epochs and iterations count from 0, as in the events; what is shown counts from 1. Without a terminal
    (or with ``TERM=dumb``) nothing but plain lines is written. A stream that fails silences the progress, not the run.

    Args:
        quiet: show nothing.
        stream: where to write; ``None`` for stderr.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._stream = sys.stderr if stream is None else stream
        self._silent = quiet or self._stream is None  # stderr is None when a process starts with it closed
        self._live: Live | None = None
        self._console: Console | None = None
        self._total = 0
        self._epochs = 0
        self._started = self._clock()
        self._first: tuple[float, float] | None = None  # time and fraction done when the first experience began
        self._entered = False
        self._shown = float("-inf")
        self._forget_experience()

    def _forget_experience(self) -> None:
        self._index = 0
        self._name = ""
        self._epoch = 0  # finished
        self._iteration = (0, 0)  # finished, of
        self._loss: float | None = None
        self._accuracy: float | None = None
        self._due = False  # an experience has begun and its line is not written yet
        self._skip = 1  # iterations until the clock is read again
        self._stride = 1
        self._read = self._started

    def __enter__(self) -> Progress:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write_line(stopped=kind is not None)
        self._entered = False
        if self._live is not None:
            with self._guard():
                self._live.stop()
        self._live = None

    def start(self, total_experiences: int, epochs_per_experience: int) -> None:
        """A run of so many experiences begins (or is resumed)."""
        self._started = self._clock()
        self._first = None
        self._forget_experience()
        self._total, self._epochs = total_experiences, epochs_per_experience
        if self._live is None and self._entered and not self._silent and _is_terminal(self._stream):
            self._go_live()

    def experience(self, i: int, name: str = "") -> None:
        """Training on experience ``i`` begins."""
        self._write_line()
        self._forget_experience()
        self._index, self._name, self._due = i, _clean(name), True
        if self._first is None:
            self._first = (self._clock(), self._fraction())
        self._refresh()

    def epoch(self, e: int, n_epochs: int, loss: float | None) -> None:
        """Epoch ``e`` of ``n_epochs`` has ended with this mean loss."""
        self._epoch, self._epochs, self._loss = e + 1, n_epochs, loss
        self._iteration = (0, 0)
        self._skip = self._stride = 1
        self._refresh()

    def iteration(self, k: int, n: int) -> None:
        """Iteration ``k`` of ``n`` of the current epoch has ended. Cheap: most calls do not even read the clock."""
        self._skip -= 1
        if self._skip > 0 or self._live is None:
            return
        self._iteration = (k + 1, n)
        now = self._clock()
        # Read the clock about twice per interval, and let a stride grow slowly: one fast iteration proves little.
        pace = self._stride / max(now - self._read, 1e-9)
        self._stride = max(1, min(int(pace * INTERVAL / 2), self._stride * 2))
        self._skip, self._read = self._stride, now
        if now - self._shown >= INTERVAL:
            self._show(now)

    def evaluated(self, i: int, accuracy_so_far: float | None) -> None:
        """Experience ``i`` is learned and evaluated (-1: the model before any training)."""
        if i < 0:
            if accuracy_so_far is not None:
                self._print(f"before training  accuracy {accuracy_so_far:.2f}")
            return
        self._index, self._accuracy, self._due = i, accuracy_so_far, True
        self._write_line()
        self._refresh()

    def message(self, text: str) -> None:
        """Write a line of its own."""
        self._print(_clean(text))

    def elapsed(self) -> float:
        """Seconds since :meth:`start`."""
        return self._clock() - self._started

    def remaining(self) -> float | None:
        """Seconds left at the pace so far, or ``None`` while there is none to judge by."""
        if self._first is None:
            return None
        began, before = self._first
        done = self._fraction()
        if done <= before:
            return None
        return (self._clock() - began) / (done - before) * (1 - done)

    def _fraction(self) -> float:
        """Part of the run that is done, 0..1, every experience counting the same."""
        finished, of = self._iteration
        epochs = self._epoch + (finished / of if of else 0.0)
        learned = 1.0 if self._accuracy is not None else min(epochs / max(self._epochs, 1), 1.0)
        return min((self._index + learned) / max(self._total, 1), 1.0)

    def _parts(self, epoch: int) -> list[str]:
        """What is known of the current experience; ``epoch`` counts from 1, 0 for none."""
        of = f"/{self._total}" if self._total else ""
        parts = [f"experience {self._index + 1}{of}"]
        if epoch:
            parts.append(f"epoch {epoch}/{self._epochs}")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self._accuracy is not None:
            parts.append(f"accuracy so far {self._accuracy:.2f}")
        return parts

    def _times(self) -> list[str]:
        left = self.remaining()
        return [duration(self.elapsed()), *([f"{duration(left)} left"] if left is not None and left >= 0.5 else [])]

    def _write_line(self, *, stopped: bool = False) -> None:
        """The lasting line of an experience, once."""
        if not self._due:
            return
        self._due = False
        first, *rest = self._parts(self._epoch)
        times = [duration(self.elapsed()), "stopped"] if stopped else self._times()
        self._print("  ".join([f"{first} {self._name}".rstrip(), *rest, *times]))

    def _print(self, text: str) -> None:
        if self._silent:
            return
        with self._guard():
            if self._live is not None and self._console is not None:
                self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
            else:
                self._stream.write(f"{text}\n")
                self._stream.flush()

    def _refresh(self) -> None:
        if self._live is not None and (now := self._clock()) - self._shown >= INTERVAL:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown = now
        if self._live is not None:
            with self._guard():
                self._live.refresh()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """A terminal that went away must not end a run of hours."""
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

        ours = self._stream is sys.stderr
        self._console = Console(file=self._stream, force_terminal=True)
        self._live = Live(
            console=self._console,
            get_renderable=self._line,
            auto_refresh=False,  # no thread beside the training, and no lock held across a fork
            transient=True,
            redirect_stderr=ours,  # warnings appear above the line
            redirect_stdout=ours and sys.stdout is not None and sys.stdout.isatty(),  # never from a pipe to stderr
        )
        with self._guard():
            self._live.start()

    def _line(self) -> RenderableType:
        """The live line, cut to the terminal's width: name, accuracy, loss, times and epoch go in this order."""
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width - 1 if self._console is not None else 79
        first, *rest = self._parts(min(self._epoch + 1, self._epochs))
        elapsed, *left = self._times()
        parts = [first, *([self._name] if self._name else []), *rest, elapsed, *left]

        def needed() -> int:
            return sum(cell_len(part) + 2 for part in parts) - 2

        for part in [self._name, *reversed(rest[1:]), *left, elapsed, *rest[:1]]:
            if needed() > width and part in parts:
                parts.remove(part)
        grid = Table.grid(padding=(0, 2, 0, 0))
        cells: list[RenderableType] = [Text(part, no_wrap=True, overflow="ellipsis") for part in parts]
        space = min(width - needed() - 2, 40)
        if space >= 8:
            cells.insert(1, ProgressBar(total=1.0, completed=self._fraction(), width=space))
        for _ in cells:
            grid.add_column(no_wrap=True)
        grid.add_row(*cells)
        return grid


def duration(seconds: float) -> str:
    """Seconds in words: ``12 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _clean(text: str) -> str:
    """``text`` without control characters but line ends and tabs: names come from data sets and folders."""
    return _CONTROL.sub("", str(text))


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
    except ValueError:  # closed
        return False
