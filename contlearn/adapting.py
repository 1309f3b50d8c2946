"""The run of a test-time adapter: source weights, then every domain of the stream in order, batch by batch, once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks import CLScenario, EagerCLStream
from torch import Tensor

from contlearn import results as results_module
from contlearn import weight_cache
from contlearn.checkpoint import CheckpointFolder, Position
from contlearn.domain_progress import DomainProgress
from contlearn.errors import ContlearnError, Interrupted
from contlearn.memory.account import AdapterAccount, snapshot
from contlearn.memory.process import release_freed, reset_high_water_mark, resident_bytes
from contlearn.session import Result, Session
from contlearn.source_model import SourceTraining, weights_file
from contlearn.state import Samples, Unstorable, seed_everything
from contlearn.strategies.loader import BatchLoader, BatchSource, column

MIXED = "targets_domain"


def run(
    adapter: Any,
    stream: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    loggers: Sequence[str] = (),
    quiet: bool = False,
    config: dict[str, Any],
    checkpoint_every: float = 0.0,
    resident_before: int | None = None,
) -> Result:
    """Adapt to every test experience of a stream in turn; :func:`contlearn.run` calls this for an adapter.

    Args:
        adapter: a :class:`contlearn.strategies.adapter.Adapter` that was not started.
        stream: its test experiences are the domain visits, in order of time; its first training experience is the
            clean source data.
        out: run folder; ``None`` writes nothing.
        resume: go on from the folder's checkpoint; with none, start.
        seed: seeds the source training and the adapter.
        loggers: none: a test-time run keeps its own records only.
        quiet: no progress display.
        config: what ``config.yaml`` shall say.
        checkpoint_every: seconds between two checkpoints, at least; 0 stores one after every domain.
        resident_before: as :func:`contlearn.run`.

    Raises:
        ContlearnError: as :func:`contlearn.run`, and source weights that cannot be had.
        RunInterrupted: SIGINT or SIGTERM; the position is stored where that is possible.
    """
    if loggers:
        raise ContlearnError(f"loggers: a test-time run keeps its own records only; expected none, got {list(loggers)}")
    if getattr(stream, "task_labels", False):
        raise ContlearnError(
            f"strategy {adapter.spec['name']!r}: test-time adapters are told no task; expected a stream without task "
            f"labels, got {stream.kind!r}"
        )
    if adapter.source is not None:
        weights_file(adapter.source)  # before anything is written
    session = _Adapting(adapter, stream, config, Path(out) if out is not None else None, int(seed), quiet)
    session.checkpoint_every = checkpoint_every
    session.resident_before = resident_before
    done = session.open(resume)
    if done is not None:
        return done
    with session.recorder.log_closed(), session.signals(), session.progress:
        return session.adapt(resume)


@dataclass(frozen=True)
class Visit:
    """A domain visit: a test experience, its name, and the domain ``(n,)`` of each sample where it mixes several."""

    name: str
    dataset: Any
    domain_of: Tensor | None = None


def visits_of(stream: Any) -> list[Visit]:
    """The domain visits of a stream, in order of time; names are told apart by a number where two are alike."""
    experiences = list(stream.streams["test"])
    given = getattr(stream, "domains", None)
    names = [str(name) for name in given or (f"domain {index + 1}" for index in range(len(experiences)))]
    visits = []
    for index, (name, experience) in enumerate(zip(names, experiences, strict=True)):
        times = names[:index].count(name)
        dataset = experience.dataset.eval()
        attribute = dataset._data_attributes.get(MIXED)
        domain_of = column(attribute) if attribute is not None else None
        mixed = domain_of if isinstance(domain_of, Tensor) and len(domain_of.unique()) > 1 else None
        visits.append(Visit(f"{name}#{times + 1}" if times else name, dataset, mixed))
    return visits


@dataclass
class Tally:
    """What was counted of a visit so far."""

    n: int = 0
    errors: int = 0
    batches: int = 0
    seconds: float = 0.0
    watched: int = 0
    watched_s: float = 0.0
    trips: int = 0
    by_domain: dict[int, list[int]] = field(default_factory=dict)

    def add(self, wrong: Tensor, domains: Tensor | None) -> None:
        """Count a batch: which samples ``(batch,)`` were wrong, and the domain of each in a mixed visit."""
        self.n += len(wrong)
        self.errors += int(wrong.sum())
        self.batches += 1
        for domain in [] if domains is None else domains.unique().tolist():
            mine = wrong[domains == domain]
            counts = self.by_domain.setdefault(int(domain), [0, 0])
            counts[0] += len(mine)
            counts[1] += int(mine.sum())

    def counters(self) -> dict[str, float]:
        """The same as plain numbers, for a checkpoint."""
        plain: dict[str, float] = {k: v for k, v in vars(self).items() if k != "by_domain"}
        for domain, (n, errors) in self.by_domain.items():
            plain[f"domain.{domain}.n"], plain[f"domain.{domain}.errors"] = n, errors
        return plain

    @classmethod
    def of(cls, counters: Mapping[str, float]) -> Tally:
        """The tally that gave these counters."""
        made = cls(seconds=counters.get("seconds", 0.0), watched_s=counters.get("watched_s", 0.0))
        for name in ("n", "errors", "batches", "watched", "trips"):
            setattr(made, name, int(counters.get(name, 0)))
        for key, value in counters.items():
            if key.startswith("domain.") and key.endswith(".n"):
                domain = key.split(".")[1]
                made.by_domain[int(domain)] = [int(value), int(counters[f"domain.{domain}.errors"])]
        return made


class _Adapting(Session):
    """One call of :func:`run`."""

    progress: DomainProgress

    def __init__(
        self, adapter: Any, stream: Any, config: dict[str, Any], folder: Path | None, seed: int, quiet: bool
    ) -> None:
        super().__init__(adapter, stream, config, folder, seed, DomainProgress(quiet=quiet))
        self.adapter = adapter
        self.visits = visits_of(stream)
        if self.folder is not None:
            # An adapter keeps no samples of the stream, which may have none for training anyway.
            none = Samples(CLScenario([EagerCLStream("train", [])]))
            self.checkpoints = CheckpointFolder(self.folder / "checkpoint", none, steps=len(self.visits))
        self.figures = AdapterAccount()
        self.source = SourceTraining(
            adapter,
            stream,
            seed=seed,
            progress=self.progress,
            checkpoint=self.folder / "checkpoint" / "source" if self.folder is not None else None,
            stopped=lambda: self.stopped_by is not None,
        )
        self.wrong: list[Tensor] = []

    def _interrupt(self) -> None:
        self.source.interrupt()

    # ------------------------------------------------------------------ the run

    def adapt(self, resume: bool) -> Result:
        """Adapt from the position that is stored, or from the start."""
        position = self.checkpoints.position() if resume and self.checkpoints is not None else None
        self._head(position)
        try:
            origin = self.source.provide()
            self.recorder.append("source", origin=origin)
            self.adapter.model.eval()
            self.wrong = self._source_errors()
            self.source.prepare()
        except Interrupted:
            self._stop()
        self._fresh(self.seed)
        self.adapter.start()
        counters: Mapping[str, float] = {}
        done = 0
        if position is not None and self.checkpoints is not None:
            self.checkpoints.load_boundary(self.adapter, [])
            done, counters = position.experiences_done, position.counters
            self.figures.restore(counters)
        self._forget_the_past()
        self.progress.stage("domain", len(self.visits))
        for index in range(done, len(self.visits)):
            self._visit(index, Tally.of(counters))
            counters = {}
        return self._finish()

    def _head(self, position: Position | None) -> None:
        if position is not None:
            self.recorder.append("resume", visit=position.experiences_done)
            return
        self.recorder.append(
            "run",
            schema=results_module.SCHEMA,
            kind="test-time",
            strategy=str(self.config["strategy"]["name"]),
            scenario=str(self.config["scenario"]["name"]),
            seed=self.seed,
            domains=[visit.name for visit in self.visits],
            class_names=list(getattr(self.stream, "class_names", ())),
            environment=results_module.environment(),
        )

    def _fresh(self, seed: int) -> None:
        """Random sources as they are whether the source model was trained now or before."""
        seed_everything(seed)
        self.adapter.generator.manual_seed(seed)

    def _forget_the_past(self) -> None:
        """The measured peak shall be that of adapting, not of training the source model."""
        if self.adapter.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.adapter.device)
        elif self.resident_before is not None:
            release_freed()
            with contextlib.suppress(ContlearnError):
                reset_high_water_mark()

    def _visit(self, index: int, tally: Tally) -> None:
        visit = self.visits[index]
        self.progress.experience(index, visit.name)
        if tally.batches == 0:
            tally.trips = len(self._trips())
        loader = self._loader(visit, tally.batches)
        for x, y, *_ in loader:
            started = time.perf_counter()
            watched = self.figures.wanted
            with self.figures.watching(self.adapter, x) if watched else contextlib.nullcontext():
                logits = self.adapter(x)
            wrong = (logits.argmax(1) != y).cpu()  # waits for the device
            seconds = time.perf_counter() - started
            tally.seconds += seconds
            if watched:  # being watched takes time of its own
                tally.watched, tally.watched_s = tally.watched + 1, tally.watched_s + seconds
            before = tally.n
            tally.add(wrong, None if visit.domain_of is None else visit.domain_of[before : before + len(wrong)])
            source = float(self.wrong[index][: tally.n].float().mean())
            self.progress.batch(tally.batches - 1, len(loader), tally.errors / tally.n, source)
            if self.stopped_by is not None and tally.batches < len(loader):
                self._store_at(index, tally)
                self._stop()
        self._record(index, visit, tally)
        if self.stopped_by is not None:
            self._store_at(index + 1)
            self._stop()
        self._store_at(index + 1)

    def _loader(self, visit: Visit, served: int = 0) -> BatchLoader:
        """Batches of a visit in order of time, without the first ``served`` ones."""
        source = BatchSource(visit.dataset, self.adapter.device)
        loader = BatchLoader(source, batch_size=self.adapter.batch_size)
        if served:
            loader.load_state_dict({"served": served, "order": torch.arange(len(source))})
        return loader

    def _record(self, index: int, visit: Visit, tally: Tally) -> None:
        wrong = self.wrong[index]
        fields: dict[str, Any] = {
            "n": tally.n,
            "errors": tally.errors,
            "source_errors": int(wrong.sum()),
        }
        if visit.domain_of is not None:
            names = [str(name) for name in self.stream.domain_names]
            fields["by_domain"] = {
                names[domain]: {"n": n, "errors": errors, "source_errors": int(wrong[visit.domain_of == domain].sum())}
                for domain, (n, errors) in sorted(tally.by_domain.items())
            }
        self.recorder.append(
            "domain", visit=index, name=visit.name, **fields,
            batches=tally.batches, seconds=tally.seconds, watched=tally.watched, watched_s=tally.watched_s,
            trips=[dict(trip) for trip in self._trips()[tally.trips :]],
        )  # fmt: skip
        self._record_memory(index)
        self.progress.visited(index, tally.errors / tally.n, int(wrong.sum()) / tally.n)

    def _record_memory(self, row: int) -> None:
        record = snapshot(self.adapter, self.figures.sampled).as_record()
        record.pop("replay"), record.pop("exemplars")
        if self.adapter.device.type == "cuda":
            record["peak_measured"] = torch.cuda.max_memory_allocated(self.adapter.device)
        elif self.resident_before is not None:
            record["peak_measured"] = resident_bytes("VmHWM") - self.resident_before
        self.recorder.append("memory", after=row, **record)

    def _trips(self) -> list[Mapping[str, Any]]:
        """What the adapter's guards did so far."""
        return list(getattr(self.adapter, "trips", ()))

    def _store_at(self, done: int, tally: Tally | None = None) -> None:
        if self.checkpoints is None:
            return
        if self.stopped_by is None and time.monotonic() - self.stored_at < self.checkpoint_every:
            return
        inside = tally.counters() if tally is not None else {}
        try:
            self.checkpoints.save(self.adapter, done, counters={**inside, **self.figures.counters()})
            self.stored_at = time.monotonic()
        except Unstorable as error:
            self.progress.message(f"this run cannot be resumed: {error}")
            self.checkpoints = None

    # ------------------------------------------------------------------ the source model on the same samples

    def _source_errors(self) -> list[Tensor]:
        """Per visit, whether the source model is wrong on each sample ``(n,)``; it is asked before anything adapts.

        So no second model is ever held beside the adapter's.
        """
        weights = weight_cache.digest(self.adapter.model.state_dict())
        self.progress.stage("source model on the stream", 1)
        self.progress.experience(0)
        found: list[Tensor] = []
        for index, visit in enumerate(self.visits):
            if self.stopped_by is not None:
                raise Interrupted
            key = self._source_key(visit, weights)
            stored = weight_cache.load(key, lambda text: None) if key is not None else None
            if stored is None:
                stored = {"wrong": torch.cat(list(self._source_wrong(visit))).to(torch.uint8)}
                if key is not None:
                    with contextlib.suppress(ContlearnError):  # a cache that cannot be written costs time, no more
                        weight_cache.store(key, stored)
            found.append(stored["wrong"].bool())
            error = float(torch.cat(found).float().mean())
            self.progress.batch(index, len(self.visits), error)
        self.progress.visited(0, error)
        return found

    @torch.no_grad()
    def _source_wrong(self, visit: Visit) -> Iterator[Tensor]:
        # In the adapter's batches, so that an adapter that does nothing gives the very same answers.
        for x, y, *_ in self._loader(visit):
            if self.stopped_by is not None:
                raise Interrupted
            yield (self.adapter.model(x).argmax(1) != y).cpu()

    def _source_key(self, visit: Visit, weights: str) -> str | None:
        try:
            return weight_cache.key_of(
                errors_of=weights,
                model=repr(self.adapter.model),
                data=weight_cache.fingerprint(visit.dataset, {**getattr(self.stream, "spec", {}), "visit": visit.name}),
                batch_size=self.adapter.batch_size,
                device=self.adapter.device.type,
            )
        except weight_cache.Undescribable:
            return None
