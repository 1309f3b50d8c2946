"""Tiny runs on the digits, and the ways a run is stopped: by a signal it can answer, and by one it cannot."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., Any]
Killed = Callable[[Callable[[], object]], None]


def _at_iteration(at: int, act: Callable[[], object]) -> Any:
    """A plug-in that acts in the training iteration ``at``, counted over the whole run from 0."""
    from avalanche.core import SupervisedPlugin  # late: most tests of this folder need no Avalanche

    class AtIteration(SupervisedPlugin):  # type: ignore[type-arg]
        checkpoint_exclude = ("act", "at")  # they are no state of the run

        def __init__(self) -> None:
            super().__init__()
            self.act, self.at = act, at

        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_iterations == self.at:
                self.act()

    return AtIteration()


@pytest.fixture
def train() -> Train:
    """``train(strategy_name, out=...)``: a fresh strategy on a fresh stream of three experiences, two epochs each.

    ``at=k`` with ``act`` (default: SIGTERM to this process) acts in iteration ``k``; ``plugins`` are added in front.
    ``scenario``, ``model`` and ``options`` (of the strategy) are specs; the rest goes to ``run``.
    """

    def go(
        name: str = "naive",
        out: Path | None = None,
        *,
        at: int = -1,
        act: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM),
        scenario: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        plugins: tuple[Any, ...] = (),
        **arguments: Any,
    ) -> Any:
        from contlearn import models, run, scenarios, strategies

        stream = scenarios.create(
            **{"name": "class_incremental", "dataset": "digits", "n_experiences": 3, **(scenario or {})}
        )
        net = models.create(**{"name": "mlp", "stream": stream, "seed": 0, **(model or {})})
        strategy = strategies.create(name, net, **{"lr": 0.05, "epochs": 2, "device": "cpu", **(options or {})})
        strategy.plugins[:0] = [*plugins, _at_iteration(at, act)]
        return run(strategy, stream, **{"out": out, "quiet": True, **arguments})

    return go


@pytest.fixture
def killed() -> Killed:
    """``killed(work)``: do ``work`` in a copy of this process, which must die of SIGKILL on the way."""

    def go(work: Callable[[], object]) -> None:
        child = os.fork()
        if child == 0:
            try:
                work()
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child finished its work"
        assert os.WTERMSIG(status) == signal.SIGKILL

    return go


def kill_me() -> None:
    """SIGKILL to this process: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def kill() -> Callable[[], None]:
    """SIGKILL to the process that calls it."""
    return kill_me


@pytest.fixture
def events() -> Callable[..., list[dict[str, Any]]]:
    """``events(folder, kind)``: the records of one kind, in order, without what a clock decides."""

    def read(folder: Path, *kinds: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        clocks = ("time", "seconds", "train_s", "eval_s", "environment")
        return [{k: v for k, v in r.items() if k not in clocks} for r in records if r["event"] in kinds]

    return read
