"""The run: train a strategy on a stream, evaluate after every experience, keep records and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch
from avalanche.benchmarks import OnlineCLExperience

from contlearn.checkpoint import CheckpointFolder, Position
from contlearn.errors import ContlearnError, Interrupted
from contlearn.memory.account import MemoryAccount
from contlearn.memory.process import resident_bytes
from contlearn.progress import Progress
from contlearn.recorder import classes_of
from contlearn.session import CONFIG, MODEL, Result, RunInterrupted, Session, first_difference
from contlearn.state import Samples, Unstorable, seed_everything

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

__all__ = ["CONFIG", "MODEL", "Logger", "Result", "RunInterrupted", "device_summary", "first_difference", "run"]

Logger = Literal["tensorboard", "csv"]


def run(
    strategy: Any,
    stream: CLScenario[Any],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    loggers: Sequence[Logger] = (),
    quiet: bool = False,
    config: dict[str, Any] | None = None,
    checkpoint_every: float = 0.0,
    resident_before: int | None = None,
) -> Result:
    """Train on every experience of a stream in turn and evaluate after each; an adapter: see ``contlearn.adapting``.

    Args:
        strategy: a contlearn strategy or adapter, or any Avalanche strategy (that one can only be stopped and resumed
            between experiences, and only if all it holds has a stored form).
        stream: a contlearn scenario, or any Avalanche ``CLScenario`` with a ``train`` and a ``test`` stream.
        out: run folder; ``None`` writes nothing. A run that is already there is kept aside, never overwritten.
        resume: go on from the folder's checkpoint; with none, start.
        seed: seeds every random source of training. The same seed gives the same bits on a CPU.
        loggers: ``tensorboard`` and ``csv`` logs through Avalanche's loggers, in the run folder.
        quiet: no progress display.
        config: what ``config.yaml`` shall say; default: the specs of scenario, model and strategy.
        checkpoint_every: seconds between two checkpoints, at least; 0 stores one after every experience.
        resident_before: resident bytes of this process before the model was made, in a process that has done nothing
            else (``contlearn.memory.process.mark``): the measured peak is then recorded too. On CUDA it always is.

    Returns:
        Metrics, accuracy matrix and the folder.

    Raises:
        ContlearnError: an unwritable folder, a damaged checkpoint, or a configuration that differs from the stored one.
        RunInterrupted: SIGINT or SIGTERM; the position is stored where that is possible.
    """
    if config is None:
        config = {
            "scenario": getattr(stream, "spec", {"name": type(stream).__name__}),
            "model": getattr(strategy.model, "spec", {"name": type(strategy.model).__name__}),
            "strategy": getattr(strategy, "spec", {"name": type(strategy).__name__}),
            "seed": seed,
        }
    if getattr(strategy, "adapts", False):
        from contlearn import adapting

        return adapting.run(
            strategy, stream, out=out, resume=resume, seed=seed, loggers=loggers, quiet=quiet, config=config,
            checkpoint_every=checkpoint_every, resident_before=resident_before,
        )  # fmt: skip
    _check_loggers(loggers, out)
    session = _Session(strategy, stream, config, Path(out) if out is not None else None, int(seed), quiet)
    session.checkpoint_every = checkpoint_every
    session.resident_before = resident_before
    done = session.open(resume)
    if done is not None:
        return done
    with session.recorder.log_closed(), session.logging(loggers), session.signals(), session.progress:
        return session.train(resume)


class _Session(Session):
    """One call of :func:`run`."""

    def __init__(
        self, strategy: Any, stream: Any, config: dict[str, Any], folder: Path | None, seed: int, quiet: bool
    ) -> None:
        super().__init__(strategy, stream, config, folder, seed, Progress(quiet=quiet))
        self.train_stream = list(stream.streams["train"])
        self.online = any(isinstance(experience, OnlineCLExperience) for experience in self.train_stream)
        self.joint = bool(getattr(strategy, "trains_jointly", False)) or type(strategy).__name__ == "JointTraining"
        self.samples = Samples(stream)
        if self.folder is not None:
            self.checkpoints = CheckpointFolder(self.folder / "checkpoint", self.samples)
        self.account = MemoryAccount()
        self.index = 0
        self.stored_done = 0  # experiences finished at the last checkpoint between two; none is needed before the first

    # ------------------------------------------------------------------ surroundings

    @contextlib.contextmanager
    def logging(self, loggers: Sequence[Logger]) -> Iterator[None]:
        """Avalanche's metrics and loggers, and our recorder, on the strategy for the time of the run."""
        plugins = list(self.strategy.plugins)
        opened = _open_loggers(loggers, self.folder)
        if opened:
            from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
            from avalanche.training.plugins import EvaluationPlugin

            evaluator = EvaluationPlugin(
                accuracy_metrics(epoch=True, experience=True, stream=True),
                loss_metrics(epoch=True, experience=True, stream=True),
                loggers=opened,
            )
            self.strategy.plugins = [evaluator if p is self.strategy.evaluator else p for p in plugins]
            original, self.strategy.evaluator = self.strategy.evaluator, evaluator
        self.strategy.plugins[:0] = [self.account, self.recorder]
        try:
            yield
        finally:
            self.strategy.plugins = plugins
            if opened:
                self.strategy.evaluator = original
                for logger in opened:
                    close = getattr(logger, "close", None) or getattr(getattr(logger, "writer", None), "close", None)
                    if close is not None:
                        close()

    def _interrupt(self) -> None:
        """Stop training after this iteration, if the run can be resumed there; else it stops after the experience.

        A position inside an experience needs the one in front of it. The small experiences of an online stream are soon
        over, and so are those that end before the next checkpoint is due: of these not every one is stored.
        """
        if hasattr(self.strategy, "interrupt"):
            self.strategy.interrupt = not self.online and self.stored_done == self.index

    # ------------------------------------------------------------------ training

    def train(self, resume: bool) -> Result:
        """Train and evaluate from the position that is stored, or from the start."""
        seed_everything(self.seed)
        if hasattr(self.strategy, "generator"):
            self.strategy.generator.manual_seed(self.seed)
        position = self._restore() if resume else None
        done = position.experiences_done if position is not None else 0
        boundaries = [index for index, experience in enumerate(self.train_stream) if _is_last_piece(experience)]
        self.recorder.begin(
            strategy=str(self.config["strategy"]["name"]),
            scenario=str(self.config["scenario"]["name"]),
            seed=self.seed,
            classes=[sorted(classes_of(experience)) for experience in self.test_stream],
            class_names=list(getattr(self.stream, "class_names", ())),
            joint=self.joint,
            experiences=len(boundaries),
            resumed_at=done if position is not None else None,
            seen=[classes_of(experience) for experience in self.train_stream[:done]],
        )
        self.progress.start(1 if self.joint else len(boundaries), int(self.strategy.train_epochs))
        if position is None:
            self._evaluate_untrained()
        if self.joint:
            if done == 0:
                self._experience(0, len(self.train_stream), self.train_stream, row=0)
        else:
            for index in range(done, len(self.train_stream)):
                row = sum(boundary < index for boundary in boundaries)
                self._experience(index, index + 1, [self.train_stream[index]], row=row)
        return self._finish()

    def _restore(self) -> Position | None:
        assert self.checkpoints is not None or self.folder is None
        position = self.checkpoints.position() if self.checkpoints is not None else None
        if position is None or self.checkpoints is None:
            return None
        with self._recorder_apart():
            self.checkpoints.load_boundary(self.strategy, self.train_stream)
        self.stored_done = position.experiences_done
        if position.inside:
            self.checkpoints.check_inside()
            self.strategy.resume_from = lambda: self._restore_inside(position)
        else:
            self.recorder.restore(position.counters)
        return position

    def _restore_inside(self, position: Position) -> None:
        assert self.checkpoints is not None
        with self._recorder_apart():
            self.checkpoints.load_inside(self.strategy)
        self.recorder.restore(position.counters)

    @contextlib.contextmanager
    def _recorder_apart(self) -> Iterator[None]:
        """The strategy's plug-ins without our recorder: those a checkpoint describes."""
        plugins = self.strategy.plugins
        self.strategy.plugins = [plugin for plugin in plugins if plugin is not self.recorder]
        try:
            yield
        finally:
            self.strategy.plugins = plugins

    def _experience(self, index: int, done: int, experiences: list[Any], *, row: int) -> None:
        """Train on one experience (or all, jointly), evaluate, store."""
        boundary = self.joint or _is_last_piece(experiences[-1])
        self.index = index
        if self.stopped_by is not None:
            self._interrupt()
        self.recorder.start_experience(row, experiences, first=index == 0 or _is_first_piece(experiences[0]))
        try:
            self.strategy.train(experiences if self.joint else experiences[0], eval_streams=[])
        except Interrupted:
            self.recorder.stopped()
            self._store(index, inside=True)
            self._stop()
        self.recorder.trained(experiences)
        if boundary:
            self._record_memory(row)
            self._evaluate(row)
        if boundary or self.stopped_by is not None:
            self._store(done)
        if self.stopped_by is not None:
            self._stop()

    def _record_memory(self, row: int) -> None:
        """The account of the experience, with the measured peak where this process can tell."""
        report = self.account.close_experience(self.strategy)
        record = report.as_record()
        if self.strategy.device.type == "cuda":
            record["peak_measured"] = torch.cuda.max_memory_allocated(self.strategy.device)
        elif self.resident_before is not None:
            record["peak_measured"] = resident_bytes("VmHWM") - self.resident_before
        self.recorder.append("memory", after=row, **record)

    def _evaluate(self, row: int) -> None:
        """Evaluate on every test experience; one whose classes were all never seen has no correct answer."""
        started = time.perf_counter()
        reachable = [e for e in self.test_stream if classes_of(e) & self.recorder.seen]
        self.recorder.start_evaluation(row)
        if reachable:
            self.strategy.eval(reachable)
        self.recorder.evaluated(time.perf_counter() - started)

    def _evaluate_untrained(self) -> None:
        """The row before any training, where it can mean something: all classes are there from the first experience."""
        first = classes_of(self.train_stream[0])
        if self.joint or len(self.test_stream) < 2 or not all(classes_of(e) <= first for e in self.test_stream):
            return
        self.strategy.experience, self.strategy.is_training = self.train_stream[0], True
        self.strategy.model.train()
        self.strategy.model = self.strategy.model_adaptation()
        self.recorder.seen = set(first)
        self._evaluate(-1)
        self.recorder.seen = set()

    def _store(self, done: int, *, inside: bool = False) -> None:
        if self.checkpoints is None:
            return
        if self.stopped_by is None and time.monotonic() - self.stored_at < self.checkpoint_every:
            return
        try:
            with self._recorder_apart():
                self.checkpoints.save(self.strategy, done, inside=inside, counters=self.recorder.counters())
            self.stored_at = time.monotonic()
            self.stored_done = self.stored_done if inside else done
        except Unstorable as error:
            self.progress.message(f"this run cannot be resumed: {error}")
            self.checkpoints = None

    def _stop(self) -> NoReturn:
        if hasattr(self.strategy, "interrupt"):
            self.strategy.interrupt = False
        super()._stop()


def _check_loggers(names: Sequence[Logger], out: str | Path | None) -> None:
    if isinstance(names, str) or not set(names) <= set(get_args(Logger)):
        raise ContlearnError(f"loggers: expected a list of tensorboard and csv, got {names!r}")
    if names and out is None:
        raise ContlearnError("loggers: tensorboard and csv write into the run folder; give out as well")


def _open_loggers(names: Sequence[Logger], folder: Path | None) -> list[Any]:
    if not names or folder is None:
        return []
    from avalanche.logging import CSVLogger, TensorboardLogger

    opened: list[Any] = []
    for name in names:
        if name == "tensorboard":
            opened.append(TensorboardLogger(tb_log_dir=str(folder / "tensorboard")))
        else:
            # Avalanche opens its files anew: a resumed run writes beside what is there.
            target = folder / "csv"
            target = target if not target.exists() else _next_free(target)
            opened.append(CSVLogger(log_folder=str(target)))
    return opened


def _next_free(path: Path) -> Path:
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    return path.with_name(f"{path.name}.{number}")


def _is_last_piece(experience: Any) -> bool:
    return not isinstance(experience, OnlineCLExperience) or bool(experience.logging().is_last_subexp)


def _is_first_piece(experience: Any) -> bool:
    return not isinstance(experience, OnlineCLExperience) or bool(experience.logging().is_first_subexp)


def device_summary() -> str:
    """The device a default run would use, in words."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
