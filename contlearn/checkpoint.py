"""Checkpoints of a run: a JSON description and one safetensors file, replaced in one step.

``checkpoint/state.json`` names its tensors file and carries its SHA-256; replacing that one small file is what commits
a checkpoint, so a kill at any moment leaves the previous one whole. ``checkpoint/interrupted.json`` is a second one
beside it, written when a run is stopped in the middle of an experience.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_bytes, atomic_write_text
from contlearn.state import Decoder, Encoder, Samples, rng_state, set_rng_state

SCHEMA = 1
BOUNDARY = "state"
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Position:
    """Where a run stands: training experiences finished, and whether it is inside the next one."""

    experiences_done: int
    inside: bool


class CheckpointFolder:
    """The ``checkpoint`` folder of a run.

    Args:
        folder: path of the folder; made when first written to.
        samples: where the stream's samples sit.
    """

    def __init__(self, folder: Path, samples: Samples) -> None:
        self.folder = folder
        self.samples = samples

    def save(self, strategy: Any, experiences_done: int, *, inside: bool = False) -> None:
        """Store everything needed to go on from here.

        Args:
            strategy: the strategy to store.
            experiences_done: training experiences finished.
            inside: in the middle of the next experience (only strategies on our template can be resumed there).

        Raises:
            Unstorable: the strategy holds something that has no stored form.
            ContlearnError: the folder cannot be written.
        """
        encoder = Encoder(strategy, self.samples)
        content = {
            "schema": SCHEMA,
            "experiences_done": experiences_done,
            "inside": inside,
            "strategy": encoder.strategy_state(),
            "rng": encoder.value(rng_state(), "rng"),
        }
        if inside:
            content["training"] = encoder.value(strategy.training_state(), "training")
        self.folder.mkdir(parents=True, exist_ok=True)
        data = save_tensors(encoder.tensors)
        digest = hashlib.sha256(data).hexdigest()
        kind = INTERRUPTED if inside else BOUNDARY
        content["tensors"] = {"file": f"{kind}-{digest[:16]}.safetensors", "bytes": len(data), "sha256": digest}
        atomic_write_bytes(self.folder / content["tensors"]["file"], data)
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
            return Position(done, True)
        return Position(done, False) if boundary else None

    def load_boundary(self, strategy: Any, experiences: list[Any]) -> None:
        """Put the checkpoint between two experiences back into ``strategy``, global random sources included."""
        self._load(BOUNDARY, strategy, experiences)

    def load_inside(self, strategy: Any) -> None:
        """Put the checkpoint inside an experience back; the strategy's loop must have begun that experience."""
        self._load(INTERRUPTED, strategy, [])

    def _load(self, kind: str, strategy: Any, experiences: list[Any]) -> None:
        content = self._read(kind)
        if content is None:
            return
        tensors = self._tensors(kind, content)
        decoder = Decoder(strategy, self.samples, tensors)
        try:
            decoder.strategy_state(content["strategy"], experiences_done=experiences[: content["experiences_done"]])
            if kind == INTERRUPTED:
                restored = decoder.value(content["training"], strategy.training_state())
                strategy.epoch_losses, strategy._loss_sum = restored["epoch_losses"], restored["loss_sum"]
            set_rng_state(decoder.value(content["rng"]))
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise ContlearnError(
                f"checkpoint {str(self.folder / kind)!r}.json does not fit this configuration ({error}); "
                "expected the one it was written with"
            ) from error

    def _read(self, kind: str) -> dict[str, Any] | None:
        path = self.folder / f"{kind}.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ContlearnError(f"checkpoint {str(path)!r}: expected schema {SCHEMA}, got {content['schema']}")
            return dict(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, str(error)) from error

    def _tensors(self, kind: str, content: dict[str, Any]) -> dict[str, Any]:
        expected = content["tensors"]
        path = self.folder / Path(str(expected["file"])).name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise self._damaged(path, error.strerror or str(error)) from error
        if len(data) != expected["bytes"]:
            raise self._damaged(path, f"{len(data)} bytes, expected {expected['bytes']}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise self._damaged(path, "checksum mismatch")
        return dict(load_tensors(data))

    def _damaged(self, path: Path, reason: str) -> ContlearnError:
        return ContlearnError(
            f"checkpoint file {str(path)!r} is damaged ({reason}); restore it from a copy, or run without --resume to "
            "start again (the folder is kept aside)"
        )

    def _tidy(self) -> None:
        """Remove tensors files that no description names any more."""
        named = set()
        for kind in (BOUNDARY, INTERRUPTED):
            content = self._read(kind)
            if content is not None:
                named.add(content["tensors"]["file"])
        for path in self.folder.glob("*.safetensors"):
            if path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()
