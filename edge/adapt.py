"""An artifact over a stream, as a device runs it: experiences in order, then on; or frames as they come, once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from contlearn import metrics
from contlearn.domain_progress import DomainProgress
from contlearn.edge.device_data import DeviceData
from contlearn.edge.runner.session import Session
from contlearn.errors import ContlearnError


def batches(count: int, batch: int, epochs: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Places (batch,) of full batches over several epochs in random order; what is left of one begins the next.

    Fewer samples than one batch in all epochs together still give one, in which samples repeat.
    """
    left = np.empty(0, np.int64)
    given = False
    for _ in range(epochs):
        left = np.concatenate([left, rng.permutation(count)])
        while len(left) >= batch:
            yield left[:batch]
            left, given = left[batch:], True
    if not given and count:
        yield np.resize(left, batch)


def learn(
    session: Session,
    data: DeviceData,
    *,
    experiences: int,
    epochs: int = 1,
    steps: int | None = None,
    seed: int = 0,
    progress: DomainProgress | None = None,
) -> dict[str, Any]:
    """Class-incremental experiences with labels: train, finish, save, evaluate on everything met so far.

    Args:
        session: of an artifact that learns from labels.
        data: frames and labels.
        experiences: number of experiences; classes are shared out as evenly as can be.
        epochs: passes over each experience.
        steps: stop training after so many.
        seed: of the order of frames.
        progress: what to tell.

    Returns:
        ``accuracy_matrix``, ``metrics``, ``seconds_per_step``, ``losses`` (mean of each experience).
    """
    parts = _split(data.order, experiences)
    rng, shown = np.random.default_rng(seed), progress or DomainProgress(quiet=True)
    events: list[dict[str, Any]] = [{"event": "run", "classes_per_experience": [sorted(part) for part in parts]}]
    shown.stage("experience", len(parts), epochs)
    times: list[float] = []
    losses: list[float | None] = []
    for index, part in enumerate(parts):
        shown.experience(index)
        mine = np.flatnonzero(np.isin(data.train_y, part))
        total = max(1, len(mine) * epochs // session.batch_size)
        found: list[float] = []
        for number, places in enumerate(batches(len(mine), session.batch_size, epochs, rng)):
            if steps is not None and len(times) >= steps:
                break
            rows, started = mine[places], time.perf_counter()
            found.append(session.step(data.train_x[rows], data.train_y[rows], remember=False)["loss"])
            times.append(time.perf_counter() - started)
            shown.iteration(number, total)
        if session.learned.replay:
            mine = rng.permutation(mine)
            session.remember(data.train_x[mine], data.train_y[mine])
        session.finish_experience()
        session.save()
        losses.append(float(np.mean(found)) if found else None)
        seen = [label for part in parts[: index + 1] for label in part]
        for on, tested in enumerate(parts[: index + 1]):
            rows = np.flatnonzero(np.isin(data.test_y, tested))
            logits = session.predict(data.test_x[rows])
            answers = np.asarray(seen)[logits[:, seen].argmax(1)]
            correct = int((answers == data.test_y[rows]).sum())
            events.append({"event": "evaluation", "after": index, "on": on, "n": len(rows), "correct": correct})
        so_far = metrics.accuracy_seen(events)[-1]
        shown.evaluated(index, so_far)
    return {
        "accuracy_matrix": metrics.accuracy_matrix(events),
        "metrics": {
            name: getattr(metrics, name)(events)
            for name in ("final_accuracy", "average_accuracy", "forgetting", "backward_transfer")
        },
        "losses": losses,
        "seconds_per_step": float(np.median(times)) if times else None,
    }


def watch(
    session: Session,
    data: DeviceData,
    *,
    epochs: int = 1,
    steps: int | None = None,
    seed: int = 0,
    progress: DomainProgress | None = None,
) -> dict[str, Any]:
    """Frames without labels: each batch is adapted to and answered; labels are looked at for the error only.

    Args:
        session: of an artifact that adapts without labels.
        data: frames and labels; the test part is the stream.
        epochs: passes over the stream.
        steps: stop after so many.
        seed: of the order of frames.
        progress: what to tell.

    Returns:
        ``error``, ``error_before`` (the state at the start, adapting to nothing), ``seconds_per_step``.
    """
    shown, batch = progress or DomainProgress(quiet=True), session.batch_size
    if not len(data.test_y):
        raise ContlearnError("--data: expected test frames, found none")
    before = (session.predict(data.test_x).argmax(1) != data.test_y).astype(np.float64)
    shown.stage("pass", epochs)
    rng = np.random.default_rng(seed)
    times: list[float] = []
    wrong: list[np.ndarray] = []
    looked: list[np.ndarray] = []
    for epoch in range(epochs):
        shown.experience(epoch)
        order = rng.permutation(len(data.test_y))
        for number in range(0, len(order), batch):
            if steps is not None and len(times) >= steps:
                break
            rows = order[number : number + batch]
            if len(rows) == batch:
                started = time.perf_counter()
                logits = session.step(data.test_x[rows])["logits"]
                times.append(time.perf_counter() - started)
            else:  # too few to adapt to
                logits = session.predict(data.test_x[rows])
            wrong.append(logits.argmax(1) != data.test_y[rows])
            looked.append(rows)
            shown.batch(number // batch, -(-len(order) // batch), float(np.concatenate(wrong).mean()))
        shown.visited(epoch, float(np.concatenate(wrong).mean()))
    session.save()
    return {
        "error": float(np.concatenate(wrong).mean()),
        "error_before": float(before[np.concatenate(looked)].mean()),
        "seconds_per_step": float(np.median(times)) if times else None,
    }


def _split(order: list[int], experiences: int) -> list[list[int]]:
    from contlearn.scenarios.source import split_classes

    sizes = split_classes(len(order), experiences)
    starts = np.cumsum([0, *sizes])
    return [order[start : start + size] for start, size in zip(starts, sizes, strict=False)]
