"""A plug-in that turns what a strategy does into raw records: epochs, experiences, evaluated pairs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from contlearn.events import EventLog
from contlearn.progress import Progress
from contlearn.results import environment

_COUNTS = ("correct", "correct_local", "correct_upto")


class Recorder(SupervisedPlugin):
    """Counts correct answers per test experience under three sets of competing classes, and times the run.

    Args:
        test_stream: the test experiences, in order.
        progress: what to tell.

    Attributes:
        seen: labels of the classes trained on so far.
        records: every record of this process.
    """

    memory_exempt = True

    def __init__(self, test_stream: list[Any], progress: Progress) -> None:
        super().__init__()
        self.progress = progress
        self.records: list[dict[str, Any]] = []
        self.seen: set[int] = set()
        self.row = 0
        self._log: EventLog | None = None
        self._local: list[set[int]] = []
        self._sizes = [len(experience.dataset) for experience in test_stream]
        self._counts: dict[int, dict[str, float]] = {}
        self._columns: dict[tuple[str, int, int], Tensor] = {}
        self._clock = {"experience": 0.0, "epoch": 0.0, "train": 0.0}
        self._samples = self._iterations = 0
        self._diverged = False

    # ------------------------------------------------------------------ records

    def open(self, path: Path) -> None:
        """Append records to a file from now on."""
        self._log = EventLog(path)

    @contextlib.contextmanager
    def log_closed(self) -> Iterator[None]:
        """Close the file at the end, whatever happens."""
        try:
            yield
        finally:
            if self._log is not None:
                self._log.close()

    def append(self, event: str, **fields: Any) -> None:
        """Add one record."""
        self.records.append({"event": event, **fields})
        if self._log is not None:
            self._log.append(event, **fields)

    def begin(
        self,
        *,
        strategy: str,
        scenario: str,
        seed: int,
        classes: list[list[int]],
        class_names: list[str],
        joint: bool,
        experiences: int,
        resumed_at: int | None,
        seen: list[set[int]],
    ) -> None:
        """Head of the run."""
        self._local = [set(labels) for labels in classes]
        self.seen = set().union(*seen)
        if resumed_at is not None:
            self.append("resume", experience=resumed_at)
            return
        self.append(
            "run",
            schema=1,
            strategy=strategy,
            scenario=scenario,
            seed=seed,
            classes_per_experience=classes,
            class_names=class_names,
            environment=environment(),
            joint=joint,
            experiences=experiences,
        )

    # ------------------------------------------------------------------ training

    def start_experience(self, row: int, experiences: list[Any], *, first: bool) -> None:
        """Training on row ``row`` of the accuracy matrix begins, or goes on with the next piece of an online stream."""
        self.row = row
        if first:
            self._samples = self._iterations = 0
            self._clock["train"] = 0.0
            self.progress.experience(row)
        self._samples += sum(len(experience.dataset) for experience in experiences)
        self._clock["experience"] = self._clock["epoch"] = time.perf_counter()

    def stopped(self) -> None:
        """Training on these experiences is over, for now at least."""
        self._clock["train"] += time.perf_counter() - self._clock["experience"]

    def counters(self) -> dict[str, float]:
        """What was counted and timed of the experience so far, for a checkpoint inside it."""
        return {
            "samples": self._samples,
            "iterations": self._iterations,
            "train_s": self._clock["train"],
            "epoch_s": time.perf_counter() - self._clock["epoch"],
        }

    def restore(self, counters: Mapping[str, float]) -> None:
        """Go on counting from what :meth:`counters` gave."""
        self._samples, self._iterations = int(counters.get("samples", 0)), int(counters.get("iterations", 0))
        self._clock["train"] = float(counters.get("train_s", 0.0))
        self._clock["epoch"] = time.perf_counter() - float(counters.get("epoch_s", 0.0))

    def trained(self, experiences: list[Any]) -> None:
        """Training on these experiences is complete."""
        self.stopped()
        for experience in experiences:
            self.seen |= classes_of(experience)

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Start the clock of an epoch."""
        self._clock["epoch"] = time.perf_counter()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Tell how far the epoch is."""
        self._iterations += 1
        self.progress.iteration(strategy.clock.train_epoch_iterations, len(strategy.dataloader))

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Record the epoch."""
        losses = getattr(strategy, "epoch_losses", None)
        loss = losses[-1] if losses else None
        if loss is not None and not math.isfinite(loss) and not self._diverged:
            self._diverged = True
            where = f"experience {self.row + 1}, epoch {int(strategy.clock.train_exp_epochs) + 1}"
            self.progress.message(f"the loss is {loss} in {where}: training has diverged (a smaller lr may help)")
        epoch = int(strategy.clock.train_exp_epochs)
        self.append(
            "epoch",
            experience=int(strategy.experience.logging().current_experience),
            epoch=epoch,
            loss=loss if loss is None or math.isfinite(loss) else None,
            iterations=int(strategy.clock.train_epoch_iterations),
            lr=float(strategy.optimizer.param_groups[0]["lr"]),
            seconds=time.perf_counter() - self._clock["epoch"],
        )
        self.progress.epoch(epoch, int(strategy.train_epochs), loss)

    # ------------------------------------------------------------------ evaluation

    def start_evaluation(self, row: int) -> None:
        """Evaluation after row ``row`` begins."""
        self.row = row
        self._counts = {}
        self._columns = {}

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count the batch."""
        on = int(strategy.experience.logging().current_experience)
        output, target = strategy.mb_output, strategy.mb_y
        counts = self._counts.setdefault(on, {"n": 0, "correct": 0, "correct_local": 0, "correct_upto": 0, "loss": 0.0})
        counts["n"] += len(target)
        counts["loss"] += float(strategy.loss) * len(target)
        for name in _COUNTS:
            columns = self._competing(name, on, output)
            if len(columns):
                answer = columns[output[:, columns].argmax(dim=1)]
                counts[name] += int((answer == target).sum())
        # A method with two classifiers answers with the other one beside (``correct_nme``, say).
        for name, other in getattr(strategy, "other_outputs", {}).items():
            columns = self._competing("correct", on, other)
            if len(columns):
                answer = columns[other[:, columns].argmax(dim=1)]
                counts[f"correct_{name}"] = counts.get(f"correct_{name}", 0) + int((answer == target).sum())

    def _competing(self, name: str, on: int, output: Tensor) -> Tensor:
        """Labels whose outputs compete, ``(k,)``; labels the model has no output for cannot."""
        width = output.shape[1]  # may differ between batches: a nearest-mean classifier answers for the labels it meets
        if (name, on, width) not in self._columns:
            labels = {
                "correct": self.seen,
                "correct_local": self._local[on],
                "correct_upto": set().union(*self._local[: on + 1]),
            }[name]
            present = sorted(label for label in labels if label < width)
            self._columns[name, on, width] = torch.tensor(present, dtype=torch.int64, device=output.device)
        return self._columns[name, on, width]

    def evaluated(self, seconds: float) -> None:
        """Evaluation of this row is over: record every pair."""
        for on, size in enumerate(self._sizes):
            counts = self._counts.get(
                on, {"n": size, "correct": 0, "correct_local": 0, "correct_upto": 0, "loss": math.nan}
            )
            loss = counts["loss"] / counts["n"] if counts["n"] else math.nan
            self.append(
                "evaluation",
                after=self.row,
                on=on,
                n=int(counts["n"]),
                correct=int(counts["correct"]),
                correct_local=int(counts["correct_local"]),
                correct_upto=int(counts["correct_upto"]),
                loss=loss if math.isfinite(loss) else None,
                **{name: int(count) for name, count in counts.items() if name not in (*_COUNTS, "n", "loss")},
            )
        known = [c for on, c in self._counts.items() if self._local[on] & self.seen]
        total = sum(c["n"] for c in known)
        accuracy = sum(c["correct"] for c in known) / total if total else None
        if self.row >= 0:
            self.append(
                "experience",
                experience=self.row,
                train_s=self._clock["train"],
                eval_s=seconds,
                samples=self._samples,
                iterations=self._iterations,
            )
        self.progress.evaluated(self.row, accuracy)


def classes_of(experience: Any) -> set[int]:
    """The labels of an experience; benchmarks made of ready data sets do not list them."""
    found = getattr(experience, "classes_in_this_experience", None)
    return {int(label) for label in (found if found is not None else experience.dataset.targets.uniques)}
