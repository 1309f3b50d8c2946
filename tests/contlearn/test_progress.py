"""Plain lines away from a terminal, a live line on one, and a terminal that is given back whatever happens."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest

from contlearn.progress import Progress, duration

ESCAPE = "\x1b"


class Clock:
    """Seconds that pass only when told to, and how often they were read."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def frames(self) -> int:
        return self.getvalue().count(f"{ESCAPE}[2K")


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def train(progress: Progress, clock: Clock, *, experiences: range = range(3), name: str = "") -> None:
    for i in experiences:
        progress.experience(i, name)
        for e in range(2):
            for k in range(3):
                clock.now += 1.0
                progress.iteration(k, 3)
            progress.epoch(e, 2, 1 / (e + 2))
        progress.evaluated(i, 0.9 - 0.1 * i)


def test_plain_output_is_one_line_per_experience() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(3, 2)
        progress.evaluated(-1, 0.1)
        train(progress, clock)
    assert stream.getvalue().splitlines() == [
        "before training  accuracy 0.10",
        "experience 1/3  epoch 2/2  loss 0.333  accuracy so far 0.90  6 s  12 s left",
        "experience 2/3  epoch 2/2  loss 0.333  accuracy so far 0.80  12 s  6 s left",
        "experience 3/3  epoch 2/2  loss 0.333  accuracy so far 0.70  18 s",
    ]


def test_the_time_left_of_a_resumed_run_counts_from_where_it_resumed() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(5, 2)
        train(progress, clock, experiences=range(3, 5))
    assert stream.getvalue().splitlines()[0].endswith("6 s  6 s left")


def test_an_experience_that_was_not_evaluated_still_gets_its_line() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(2, 1)
        progress.experience(0)
        progress.epoch(0, 1, 0.5)
        progress.experience(1)
        progress.epoch(0, 1, None)
    assert stream.getvalue().splitlines() == [
        "experience 1/2  epoch 1/1  loss 0.500  0 s",
        "experience 2/2  epoch 1/1  0 s",  # no loss of the experience before
    ]


def test_names_and_messages_reach_a_log_without_control_characters() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(1, 1)
        progress.message(f"budget [red]16 MB[/red]{ESCAPE}[31m\r\x07\nnext")
        progress.experience(0, f"classes {ESCAPE}[2J0, 1")
        progress.evaluated(0, None)
    assert stream.getvalue() == "budget [red]16 MB[/red][31m\nnext\nexperience 1/1 classes [2J0, 1  0 s\n"


def test_quiet_writes_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        with Progress(quiet=True, stream=stream, clock=clock) as progress:
            progress.start(3, 2)
            progress.message("text")
            train(progress, clock)
        assert stream.getvalue() == ""


def test_an_exception_passes_and_the_line_says_where_it_stopped() -> None:
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(RuntimeError, match="boom"), Progress(stream=stream, clock=clock) as progress:
        progress.start(3, 2)
        progress.experience(0)
        progress.epoch(0, 2, 0.25)
        raise RuntimeError("boom")
    assert stream.getvalue() == "experience 1/3  epoch 1/2  loss 0.250  0 s  stopped\n"


@pytest.mark.parametrize("stream_class", [io.StringIO, Terminal])
def test_a_stream_that_fails_does_not_end_the_run(stream_class: Any) -> None:
    class Broken(stream_class):  # type: ignore[misc]
        broken = False

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(5, "Input/output error")
            return int(super().write(text))

        def flush(self) -> None:
            if self.broken:
                raise OSError(5, "Input/output error")

    stream, clock = Broken(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(3, 2)
        stream.broken = True
        train(progress, clock)
        progress.message("text")


def test_a_closed_stderr_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    clock = Clock()
    with Progress(clock=clock) as progress:
        progress.start(3, 2)
        train(progress, clock)


def iterate(progress: Progress, clock: Clock, *, seconds: float, count: int) -> None:
    for k in range(count):
        clock.now += seconds
        progress.iteration(k, count)


@pytest.mark.parametrize("seconds", [1e-5, 1e-3, 0.02])
def test_fast_iterations_update_at_most_ten_times_a_second_and_rarely_read_the_clock(seconds: float) -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(1, 1)
        progress.experience(0)
        frames, reads, count = stream.frames(), clock.reads, round(5 / seconds)
        iterate(progress, clock, seconds=seconds, count=count)
        updates = stream.frames() - frames
        # Every update reads the clock twice more, for the times it shows.
        asked = clock.reads - reads - 2 * updates
    assert 25 <= updates <= 50
    assert asked <= 30 * 5


def test_slow_iterations_are_shown_one_by_one() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(1, 1)
        progress.experience(0)
        frames = stream.frames()
        iterate(progress, clock, seconds=0.5, count=20)
        assert stream.frames() - frames == 20


def test_iterations_that_grow_slow_in_the_next_epoch_are_shown_at_once() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(1, 2)
        progress.experience(0)
        iterate(progress, clock, seconds=1e-5, count=100_000)
        progress.epoch(0, 2, 0.5)
        frames = stream.frames()
        iterate(progress, clock, seconds=1.0, count=3)
        assert stream.frames() - frames == 3


def test_epochs_and_experiences_are_throttled_too() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.start(1, 10_000)
        progress.experience(0)
        frames = stream.frames()
        for e in range(10_000):
            clock.now += 1e-4
            progress.epoch(e, 10_000, 0.5)
        assert stream.frames() - frames <= 10


def test_away_from_a_terminal_iterations_cost_no_clock() -> None:
    clock = Clock()
    with Progress(stream=io.StringIO(), clock=clock) as progress:
        progress.start(1, 1)
        progress.experience(0)
        reads = clock.reads
        iterate(progress, clock, seconds=0.1, count=1000)
        assert clock.reads == reads


PROGRAM = """
import sys
from contlearn.progress import Progress
with Progress(clock=iter(range(10**6)).__next__) as progress:
    progress.start(2, 2)
    for i in range(2):
        progress.experience(i, "digits")
        for e in range(2):
            progress.iteration(0, 1)
            progress.epoch(e, 2, 0.125)
        progress.message("[1, 2] a message")
        print("printed")
        print("warned", file=sys.stderr)
        if "fail" in sys.argv and i == 1:
            raise RuntimeError("boom")
        progress.evaluated(i, 0.75)
"""


def on_terminal(*arguments: str, columns: int = 100, piped_stdout: bool = False, **environment: str) -> tuple[str, str]:
    """What a terminal of that width receives from PROGRAM, and what went into the pipe."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=theirs,
        stdout=subprocess.PIPE if piped_stdout else theirs,
        stderr=theirs,
        env=inherited | environment,
    ) as process:
        os.close(theirs)
        received = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            received += part
        piped = process.stdout.read() if process.stdout is not None else b""
    os.close(ours)
    return received.decode(), piped.decode()


def screen(received: str) -> str:
    """The lines that stay on the terminal (the live line has one line at most)."""
    kept: list[str] = [""]
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", received):
        if token == "\n":
            kept.append("")
        elif token == f"{ESCAPE}[2K":
            kept[-1] = ""
        elif token == f"{ESCAPE}[1A":
            kept.pop()
        elif not token.startswith((ESCAPE, "\r")):
            kept[-1] += token
    return "\n".join(kept)


def test_a_terminal_shows_a_live_line_and_keeps_the_lasting_ones() -> None:
    received, _ = on_terminal()
    assert f"{ESCAPE}[2K" in received
    lines = screen(received).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("[1, 2] a message", "printed", "warned", "experience 1/2 digits"),
        *("[1, 2] a message", "printed", "warned", "experience 2/2 digits"),
    ]
    assert "epoch 2/2  loss 0.125  accuracy so far 0.75" in lines[-1]
    assert received.rindex(f"{ESCAPE}[?25h") > received.rindex(f"{ESCAPE}[?25l")


def test_the_cursor_comes_back_before_the_traceback() -> None:
    received, _ = on_terminal("fail")
    assert received.rindex(f"{ESCAPE}[?25l") < received.rindex(f"{ESCAPE}[?25h") < received.rindex("Traceback")
    lines = screen(received).splitlines()
    assert lines[-1] == "RuntimeError: boom"
    assert any(line.startswith("experience 2/2 digits  epoch 2/2  loss 0.125") and "stopped" in line for line in lines)


def test_what_goes_into_a_pipe_stays_in_the_pipe() -> None:
    received, piped = on_terminal(piped_stdout=True)
    assert piped == "printed\nprinted\n"
    assert "printed" not in received


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_terminal_that_can_do_nothing_gets_plain_lines(term: str) -> None:
    received, _ = on_terminal(TERM=term)
    assert ESCAPE not in received
    assert "experience 2/2 digits  epoch 2/2  loss 0.125  accuracy so far 0.75" in received


def test_no_color_is_respected() -> None:
    coloured, _ = on_terminal()
    plain, _ = on_terminal(NO_COLOR="1")
    colour = re.compile(r"\x1b\[[0-9;]*m")
    assert colour.search(coloured)
    assert not colour.search(plain)


@pytest.mark.parametrize("columns", [100, 60, 40, 25, 12])
def test_the_live_line_fits_the_terminal(columns: int) -> None:
    received, _ = on_terminal(columns=columns)
    frames = re.findall(r"\x1b\[2K([^\r\n]*)", re.sub(r"\x1b\[[0-9;]*m", "", received))
    live = [frame for frame in frames if re.match(r"experience(?! \d/\d digits)", frame)]
    assert live
    assert all(len(frame) <= columns for frame in live)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (3600, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
