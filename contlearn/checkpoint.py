"""Checkpoints of a run: a JSON description and one safetensors file, replaced in one step.

``checkpoint/state.json`` names its tensors file and carries its SHA-256 and its own; replacing that one small file is
what commits a checkpoint, so a kill at any moment leaves the previous one whole. ``checkpoint/interrupted.json`` is a
second one beside it, written when a run is stopped in the middle of an experience.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_bytes, atomic_write_text, unwritable
from contlearn.state import Decoder, Encoder, Samples, rng_state, set_rng_state

SCHEMA = 1
BOUNDARY = "state"
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Position:
    """Where a run stands: training experiences finished, whether it is inside the next one, what it counted there."""

    experiences_done: int
    inside: bool
    counters: Mapping[str, float] = field(default_factory=dict)


class CheckpointFolder:
    """The ``checkpoint`` folder of a run.

    Args:
        folder: path of the folder; made when first written to.
        samples: where the stream's samples sit.
        steps: experiences (or domain visits) of the run; default: the training experiences.
    """

    def __init__(self, folder: Path, samples: Samples, *, steps: int | None = None) -> None:
        self.folder = folder
        self.samples = samples
        self.steps = len(samples.experiences) if steps is None else steps

    def save(
        self, strategy: Any, experiences_done: int, *, inside: bool = False, counters: Mapping[str, float] | None = None
    ) -> None:
        """Store everything needed to go on from here.

        Args:
            strategy: the strategy to store.
            experiences_done: training experiences finished.
            inside: in the middle of the next experience (only strategies on our template can be resumed there).
            counters: what was counted of the experience so far, given back in :meth:`position`.

        Raises:
            Unstorable: the strategy holds something that has no stored form.
            ContlearnError: the folder cannot be written.
        """
        encoder = Encoder(strategy, self.samples)
        content = {
            "schema": SCHEMA,
            "experiences_done": experiences_done,
            "inside": inside,
            "device": strategy.device.type,
            "counters": dict(counters or {}),
            "strategy": encoder.strategy_state(),
            "rng": encoder.value(rng_state(), "rng"),
        }
        if inside:
            content["training"] = encoder.value(strategy.training_state(), "training")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        data = save_tensors(encoder.tensors)
        digest = hashlib.sha256(data).hexdigest()
        kind = INTERRUPTED if inside else BOUNDARY
        content["tensors"] = {"file": f"{kind}-{digest[:16]}.safetensors", "bytes": len(data), "sha256": digest}
        atomic_write_bytes(self.folder / content["tensors"]["file"], data)
        content["sha256"] = _digest(content)
        atomic_write_text(self.folder / f"{kind}.json", json.dumps(content, allow_nan=False))
        if not inside:
            (self.folder / f"{INTERRUPTED}.json").unlink(missing_ok=True)
        self._tidy()

    def position(self) -> Position | None:
        """Where the newest checkpoint stands, or ``None`` without one.

        Raises:
            ContlearnError: a damaged checkpoint.
        """
        boundary = self._read(BOUNDARY)
        inside = self._read(INTERRUPTED)
        done = boundary["experiences_done"] if boundary else 0
        if inside and inside["experiences_done"] == done:
            return Position(done, True, inside["counters"])
        return Position(done, False, boundary["counters"]) if boundary else None

    def load_boundary(self, strategy: Any, experiences: list[Any]) -> None:
        """Put the checkpoint between two experiences back into ``strategy``, global random sources included."""
        self._load(BOUNDARY, strategy, experiences)

    def check_inside(self) -> None:
        """Read the checkpoint inside an experience, so that a damaged one is refused before anything is trained.

        Raises:
            ContlearnError: a damaged checkpoint.
        """
        content = self._read(INTERRUPTED)
        if content is not None:
            self._tensors(INTERRUPTED, content)

    def load_inside(self, strategy: Any) -> None:
        """Put the checkpoint inside an experience back; the strategy's loop must have begun that experience."""
        self._load(INTERRUPTED, strategy, [])

    def _load(self, kind: str, strategy: Any, experiences: list[Any]) -> None:
        content = self._read(kind)
        if content is None:
            return
        if content["device"] == "cpu" != strategy.device.type:
            raise ContlearnError(
                f"checkpoint {str(self.folder / f'{kind}.json')!r} was written on the CPU and strategy.device is now "
                f"{strategy.device}; expected cpu"
            )
        tensors = self._tensors(kind, content)
        decoder = Decoder(strategy, self.samples, tensors)
        try:
            decoder.strategy_state(content["strategy"], experiences_done=experiences[: content["experiences_done"]])
            if kind == INTERRUPTED:
                restored = decoder.value(content["training"], strategy.training_state())
                strategy.epoch_losses, strategy._loss_sum = restored["epoch_losses"], restored["loss_sum"]
                # Where an epoch was over but for its scheduler, PyTorch would warn that no step came before it.
                strategy.optimizer._opt_called = True
            set_rng_state(decoder.value(content["rng"]))
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise ContlearnError(
                f"checkpoint {str(self.folder / f'{kind}.json')!r} does not fit this configuration "
                f"({type(error).__name__}: {error}); expected the one it was written with"
            ) from error

    def _read(self, kind: str) -> dict[str, Any] | None:
        path = self.folder / f"{kind}.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ContlearnError(f"checkpoint {str(path)!r}: expected schema {SCHEMA}, got {content['schema']!r}")
            if content.pop("sha256") != _digest(content):
                raise ValueError("checksum mismatch")
            self._check(content)
            return dict(content)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(path, f"{type(error).__name__}: {error}") from error

    def _check(self, content: dict[str, Any]) -> None:
        """What is read before a decoder looks at it has the types it should."""
        counters, tensors = content["counters"], content["tensors"]
        whole = type(content["experiences_done"]) is int and type(tensors["bytes"]) is int
        if not whole or not 0 <= content["experiences_done"] <= self.steps:
            raise ValueError(f"experiences_done is {content['experiences_done']!r}")
        if any(type(value) not in (int, float) for value in counters.values()) or not isinstance(tensors["file"], str):
            raise TypeError("counters or tensors of the wrong type")

    def _tensors(self, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        expected = content["tensors"]
        path = self.folder / Path(expected["file"]).name  # beside the description, whatever folder it names
        try:
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            raise self._damaged(path, getattr(error, "strerror", None) or str(error)) from error
        if len(data) != expected["bytes"]:
            raise self._damaged(path, f"{len(data)} bytes, expected {expected['bytes']}")
        if hashlib.sha256(data).hexdigest() != expected.get("sha256"):
            raise self._damaged(path, "checksum mismatch")
        try:
            return dict(load_tensors(data))
        except (SafetensorError, LookupError, ValueError, RuntimeError) as error:
            raise self._damaged(path, str(error)) from error

    def _damaged(self, path: Path, reason: str) -> ContlearnError:
        return ContlearnError(
            f"checkpoint file {str(path)!r} is damaged ({reason}); restore it from a copy, or run without --resume to "
            "start again (the folder is kept aside)"
        )

    def _tidy(self) -> None:
        """Remove tensors files that no description names any more, and what a killed process left half written."""
        named = set()
        for kind in (BOUNDARY, INTERRUPTED):
            content = self._read(kind)
            if content is not None:
                named.add(content["tensors"]["file"])
        for path in [*self.folder.glob("*.safetensors"), *self.folder.glob(".tmp-*")]:
            if path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a description without its own checksum."""
    return hashlib.sha256(json.dumps(content, allow_nan=False, sort_keys=True).encode("ascii")).hexdigest()
