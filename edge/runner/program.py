"""The runner as a program: an artifact over a stream of frames."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError
from contlearn.edge.runner.options import PROVIDERS
from contlearn.edge.runner.session import Session


def _load_array(path: str, what: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise ValueError("it holds no array with rows")
        return array
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunnerError(f"{what}: cannot read {path!r}: {reason}; expected an .npy file") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="runner.py",
        description="Run an artifact over a stream of frames: each batch is predicted, then learned from. A last batch "
        "that is not full is only predicted. Prints one line of JSON.",
    )
    add = parser.add_argument
    add("--artifact", default=str(Path(__file__).resolve().parent), metavar="DIR", help="default: this file's folder")
    add("--frames", required=True, metavar="NPY", help="frames (rows, ...), raw or prepared")
    add("--labels", metavar="NPY", help="labels (rows,): learned from by methods with labels, and for the accuracy")
    add("--predictions", metavar="NPY", help="where the predicted classes (rows,) go")
    add("--finish", action="store_true", help="the stream is a whole experience: finish it at the end")
    add("--frozen", action="store_true", help="predict only")
    add("--state-dir", metavar="DIR", help="default: state in the artifact")
    add("--reset", action="store_true", help="start from the shipped state")
    add("--save-every", type=int, default=0, metavar="N", help="save after every N steps; always at the end")
    add("--provider", default="cpu", help=f"one of {', '.join(PROVIDERS)}")
    add("--threads", type=int, help="threads within an operator")
    add("--seed", type=int, default=0)
    add("--lr", type=float, help="learning rate instead of the artifact's")
    return parser


def run_stream(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the program does; the summary that it prints.

    Methods with labels are asked before they learn from a batch; those without answer with the step's own logits.
    """
    frames = _load_array(arguments.frames, "--frames")
    labels = _load_array(arguments.labels, "--labels") if arguments.labels else None
    if labels is not None and labels.shape != frames.shape[:1]:
        raise RunnerError(f"--labels: expected the shape ({len(frames)},), got {labels.shape}")
    session = Session(
        arguments.artifact, arguments.provider, arguments.threads, arguments.state_dir, seed=arguments.seed
    )
    if arguments.reset:
        session.reset()
    if arguments.lr is not None:
        session.lr = arguments.lr
    supervised = session.inputs.labelled
    if supervised and labels is None and not arguments.frozen:
        raise RunnerError(f"--labels: {session.manifest['method']!r} learns from labels; expected them, or --frozen")
    answers, batch, saved = np.zeros(len(frames), np.int64), session.batch_size, None
    for start in range(0, len(frames), batch):
        x = np.asarray(frames[start : start + batch])
        whole = len(x) == batch and not arguments.frozen
        if supervised or not whole:
            answers[start : start + batch] = session.predict(x).argmax(1)
        if whole:
            result = session.step(x, labels[start : start + batch] if supervised and labels is not None else None)
            if not supervised:
                answers[start : start + batch] = result["logits"].argmax(1)
            if arguments.save_every > 0 and session.steps % arguments.save_every == 0:
                saved = session.save()
    if arguments.finish and not arguments.frozen:
        session.finish_experience()
    if not arguments.frozen:
        saved = session.save()
    if arguments.predictions:
        try:
            with open(arguments.predictions, "wb") as file:
                np.save(file, answers, allow_pickle=False)
        except OSError as error:
            raise RunnerError(f"--predictions: cannot write {arguments.predictions!r}: {error.strerror}") from error
    accuracy = None if labels is None or not len(labels) else float((answers == labels).mean())
    return {
        "frames": len(frames),
        "steps": session.steps,
        "trips": session.trips,
        "accuracy": accuracy,
        "opened": session.opened,
        "saved": str(saved) if saved else None,
        "skipped": session.skipped,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run :func:`run_stream`; 2 and one line on standard error for bad input."""
    try:
        print(json.dumps(run_stream(_parser().parse_args(argv))))
    except RunnerError as error:
        print(f"runner.py: {error}", file=sys.stderr)
        return 2
    return 0
