"""A sweep's progress: plain lines away from a terminal, a table on one."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from contlearn.pareto.display import SweepProgress
from contlearn.pareto.plan import Cell
from contlearn.pareto.tasks import Ended, Started, Waiting


class Clock:
    """Seconds that pass only when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


CELLS = [
    Cell(f"{label}-{seed}", label, label, None, None, seed, {}, {}) for seed in range(3) for label in ("naive", "slow")
]


def complete(seconds: float, accuracy: float | None = 0.5) -> dict[str, Any]:
    return {"status": "complete", "error": None, "seconds": seconds, "final_accuracy": accuracy}


FAILED = {"status": "failed", "error": "no \x1b[31mluck\x07", "seconds": 0.5, "final_accuracy": None}


def test_plain_output_is_a_line_per_ended_cell() -> None:
    stream, clock = io.StringIO(), Clock()
    finished = {CELLS[0].id: complete(2.0)}
    with SweepProgress(CELLS, finished=finished, jobs=2, stream=stream, clock=clock) as progress:
        progress.update(Started(CELLS[1]))
        progress.update(Waiting())
        clock.now += 10
        progress.update(Ended(CELLS[1], complete(10.0, 0.25)))
        progress.update(Started(CELLS[2]))
        progress.update(Ended(CELLS[2], FAILED))
        progress.update(Ended(CELLS[3], complete(10.0, None)))
    assert stream.getvalue().splitlines() == [
        "1 of 6 cells were finished before",
        "2/6  slow, seed 0  accuracy 0.250  10.0 s  12 s left",  # 2 + 10 + 2 + 10 on two workers
        "3/6  naive, seed 1  FAILED: no [31mluck  0.5 s  11 s left",
        "4/6  slow, seed 1  10.0 s  6 s left",
    ]


def test_what_runs_already_counts_as_far_as_it_has_come() -> None:
    clock = Clock()
    finished = {"naive-0": complete(4.0), "slow-0": complete(10.0), "naive-1": complete(4.0), "slow-1": complete(10.0)}
    progress = SweepProgress(CELLS, finished=finished, jobs=8, quiet=True, clock=clock)
    progress.update(Started(CELLS[5]))
    clock.now += 6
    assert progress.remaining() == pytest.approx((4 + (10 - 6)) / 2)
    assert SweepProgress(CELLS, finished={}, jobs=8, quiet=True).remaining() is None
    assert SweepProgress(CELLS, finished=finished, jobs=None, quiet=True).remaining() is None


def test_a_terminal_shows_a_table_and_keeps_failures_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    with SweepProgress(CELLS, finished={}, jobs=2, stream=stream, clock=clock) as progress:
        for cell in CELLS[:4]:
            progress.update(Started(cell))
            clock.now += 3
            progress.update(Ended(cell, FAILED if cell is CELLS[3] else complete(3.0, 0.875)))
        progress.message("a word")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "slow, seed 1  FAILED: no" in shown and "a word" in shown
    last = shown[shown.rindex("4/6 cells") :]
    assert last.startswith("4/6 cells  0 running  1 failed  12 s  3 s left")
    rows = [line.split() for line in last.splitlines() if line.startswith(("naive", "slow"))]
    assert [row[0] for row in rows] == ["naive", "slow"]
    assert rows[0][-3:] == ["2/3", "0.875", "3.0"] and rows[1][-4:] == ["2/3", "1", "0.875", "3.0"]


def test_a_terminal_that_goes_away_does_not_end_the_sweep() -> None:
    stream = io.StringIO()
    with SweepProgress(CELLS, finished={}, jobs=2, stream=stream) as progress:
        stream.close()
        progress.update(Ended(CELLS[0], complete(1.0)))
        progress.update(Ended(CELLS[1], complete(1.0)))
