"""What every run has: a folder that is opened, continued or kept aside, records, signals that stop it, an end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from safetensors.torch import save as save_tensors

from contlearn import results as results_module
from contlearn.checkpoint import CheckpointFolder
from contlearn.errors import ContlearnError
from contlearn.events import FILE_NAME as EVENTS
from contlearn.files import atomic_write_bytes, atomic_write_text, unwritable
from contlearn.progress import Progress
from contlearn.recorder import Recorder

CONFIG = "config.yaml"
MODEL = "model.safetensors"


class RunInterrupted(KeyboardInterrupt):
    """A run was stopped by SIGINT or SIGTERM, after it had stored where it stood if it could.

    Attributes:
        signum: the signal.
        folder: the run folder with the position, or ``None`` when none was stored.
    """

    def __init__(self, signum: int, folder: Path | None) -> None:
        super().__init__(signum)
        self.signum = signum
        self.folder = folder


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
        results: the content of ``results.json``.
        folder: the run folder, or ``None`` when nothing was written.
    """

    results: dict[str, Any]
    folder: Path | None

    @property
    def accuracy_matrix(self) -> list[list[float | None]]:
        """``[i][j]``: accuracy on test experience ``j`` after experience ``i``, all classes seen so far competing.

        Empty for a test-time run.
        """
        return self.results.get("accuracy_matrix", [])  # type: ignore[no-any-return]

    @property
    def metrics(self) -> dict[str, float | None]:
        """Final and average accuracy, forgetting and transfer, or mean errors (0..1; ``None`` where undefined)."""
        return self.results["metrics"]  # type: ignore[no-any-return]

    @property
    def memory(self) -> dict[str, Any]:
        """Bytes by component; empty when the run kept no memory account."""
        return self.results.get("memory", {})  # type: ignore[no-any-return]


class Session:
    """One run: of a strategy that is trained (``contlearn.running``) or of an adapter (``contlearn.adapting``).

    Args:
        strategy: what is run.
        stream: what it is run on.
        config: what ``config.yaml`` shall say.
        folder: the run folder, or ``None``.
        seed: seed of the run.
        progress: what to tell.
    """

    def __init__(
        self, strategy: Any, stream: Any, config: dict[str, Any], folder: Path | None, seed: int, progress: Progress
    ) -> None:
        self.strategy = strategy
        self.stream = stream
        # As YAML and JSON hold it, NumPy's numbers and tuples included: what a resumed run will read back.
        self.config = json.loads(json.dumps(config, default=_as_plain))
        if folder is not None and folder.name in ("", ".."):  # "." has no name that a kept copy could be called after
            folder = folder.resolve()
        self.folder = folder
        self.seed = seed
        self.progress = progress
        self.test_stream = list(stream.streams["test"])
        self.recorder = Recorder(self.test_stream, self.progress)
        self.checkpoints: CheckpointFolder | None = None
        self.checkpoint_every = 0.0
        self.stored_at = time.monotonic()
        self.resident_before: int | None = None
        self.stopped_by: int | None = None

    # ------------------------------------------------------------------ folder

    def open(self, resume: bool) -> Result | None:
        """Make the folder ready; a finished run that is resumed gives its result at once."""
        if self.folder is None:
            return None
        try:
            return self._open(self.folder, resume)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def _open(self, folder: Path, resume: bool) -> Result | None:
        stored = self._stored_config(folder) if resume else None
        if stored is not None:
            difference = first_difference(stored, self.config)
            if difference is not None:
                key, before, now = difference
                raise ContlearnError(
                    f"{folder / CONFIG}: cannot resume, {key} was {before!r} and is now {now!r}; expected the "
                    "configuration the run was started with"
                )
            if (folder / MODEL).exists():
                self.progress.message(f"{folder}: already complete, nothing to resume")
                return Result(results_module.write(folder), folder)
        elif folder.exists():
            # A killed process may have left temporary files and nothing else.
            content = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
            content = {name for name in content if not name.startswith(".tmp-")}
            if EVENTS in content or content == {CONFIG}:
                kept = _set_aside(folder)
                self.progress.message(f"kept the earlier run as {kept} (--resume continues one instead)")
            elif content:
                raise ContlearnError(f"out: {str(folder)!r} exists and is not a run folder; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / CONFIG, yaml.safe_dump(self.config, sort_keys=False))
        self.recorder.open(folder / EVENTS)
        return None

    @staticmethod
    def _stored_config(folder: Path) -> dict[str, Any] | None:
        path = folder / CONFIG
        if not path.exists():
            return None
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ContlearnError(f"{path}: damaged ({error}); expected YAML") from error
        return stored if isinstance(stored, dict) else {}

    # ------------------------------------------------------------------ signals and end

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks the run to store its position and stop; a second one stops it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            if self.stopped_by is not None or self.folder is None:
                raise RunInterrupted(number, None)
            self.stopped_by = number
            self._interrupt()
            self.progress.message("stopping as soon as the position is stored; once more stops at once")

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self) -> None:
        """Stop as soon as the position can be stored."""

    def _stop(self) -> NoReturn:
        self.recorder.append("interrupted", signal=int(self.stopped_by or signal.SIGINT))
        if self.folder is not None:
            results_module.write(self.folder)
        stored = self.folder if self.checkpoints is not None else None
        raise RunInterrupted(int(self.stopped_by or signal.SIGINT), stored)

    def _finish(self) -> Result:
        self.recorder.append("end")
        if self.folder is None:
            return Result(results_module.build(self.recorder.records), None)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.strategy.model.state_dict().items()}
        # Tied weights share storage, which the format refuses: write each name's own copy.
        written = results_module.write(self.folder)
        atomic_write_bytes(self.folder / MODEL, save_tensors({name: t.clone() for name, t in tensors.items()}))
        return Result(written, self.folder)


def first_difference(stored: Any, given: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key at which two configurations differ, with both values."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *(key for key in given if key not in stored)]:
            found = first_difference(stored.get(key), given.get(key), f"{path}.{key}" if path else str(key))
            if found is not None:
                return found
        return None
    return None if stored == given else (path, stored, given)


def _set_aside(folder: Path) -> Path:
    """Rename a run folder to the next free ``NAME.N``."""
    numbered = re.compile(re.escape(folder.name) + r"\.(\d+)")
    taken = [int(m.group(1)) for p in folder.parent.iterdir() if (m := numbered.fullmatch(p.name))]
    kept = folder.with_name(f"{folder.name}.{max(taken, default=0) + 1}")
    try:
        folder.rename(kept)
    except OSError as error:
        raise unwritable(kept, error) from error
    return kept


def _as_plain(value: Any) -> Any:
    """What JSON does not know: numbers of NumPy and PyTorch, and anything else as text."""
    return value.item() if getattr(value, "shape", None) == () else str(value)
