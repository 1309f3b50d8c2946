"""The inputs of a step besides the state: frames, labels, replay, learning rate, class mask, random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError
from contlearn.edge.runner.frames import Frames
from contlearn.edge.runner.graph import Buffer
from contlearn.edge.runner.replay import ReplayMemory


class Inputs:
    """The buffers that the graphs read, and what goes into them.

    Args:
        ort: the onnxruntime module.
        manifest: the checked manifest.

    Attributes:
        buffers: by input name, of both graphs.
        frames: what frames must look like.
        labelled: the method learns from labels.
    """

    def __init__(self, ort: Any, manifest: Mapping[str, Any]) -> None:
        self.method, self.batch_size = manifest["method"], int(manifest["batch_size"])
        self.classes = next(s["shape"][1] for s in manifest["outputs"] if s["meaning"] == "logits")
        self.buffers: dict[str, Buffer] = {}
        self._slots: dict[str, list[Buffer]] = {}
        for spec in [*manifest["inputs"], *manifest["predict"]["inputs"]]:
            name, meaning = spec["name"], spec["meaning"]
            if meaning == "state" or name in self.buffers:
                continue
            # The predict graph may call the frames or the mask by another name: the buffer is the same.
            shared = self._slots.get(meaning, []) if meaning in ("frames", "class_mask", "old_class_mask") else []
            buffer = shared[0] if shared else Buffer(ort, np.zeros(spec["shape"], spec["dtype"]))
            self.buffers[name] = buffer
            self._slots.setdefault(meaning, []).append(buffer)
            if meaning == "hyperparameter":
                buffer.write(manifest["hyperparameters"][name])
        self.frames = Frames(next(s for s in manifest["inputs"] if s["meaning"] == "frames"), manifest["preprocessing"])
        self.labelled = "labels" in self._slots
        memory = manifest["memory"]
        self.replays_raw = bool(memory) and self.frames.keeps_raw(memory["shape"], memory["dtype"])

    @property
    def prepared(self) -> np.ndarray:
        """The frames as the graphs read them, ``(batch_size, ...)``."""
        return self._slots["frames"][0].array

    def check_labels(self, y: Any, rows: int | None = None) -> np.ndarray | None:
        """Labels as int64 ``(rows,)``, by default ``batch_size`` of them, or ``None`` for a method without.

        Raises:
            RunnerError: they are missing, or not wanted, or of another shape or kind, or outside the head.
        """
        if not self.labelled:
            if y is not None:
                raise RunnerError(f"labels: {self.method!r} adapts without labels; expected none")
            return None
        rows = self.batch_size if rows is None else rows
        if y is None:
            raise RunnerError(f"labels: {self.method!r} learns from labels; expected y of shape ({rows},)")
        y = np.asarray(y)
        if y.dtype.kind not in "iu" or y.shape != (rows,):
            raise RunnerError(f"labels: expected whole numbers of shape ({rows},), got {y.dtype} {y.shape}")
        if rows and not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            bad = int(y.min()) if y.min() < 0 else int(y.max())
            raise RunnerError(f"labels: {bad} is outside the head; expected 0 to {self.classes - 1}")
        labels: np.ndarray = y.astype(np.int64)
        return labels

    def fill_frames(self, x: np.ndarray, raw: bool) -> None:
        """Prepare ``batch_size`` frames."""
        self.frames.prepare(x, raw, self.prepared)
        self._slots["frames"][0].push()

    def fill_mask(self, opened: np.ndarray) -> None:
        """1 for classes that are open, 0 for the others; all are open until one is, and for methods without labels."""
        for buffer in self._slots.get("class_mask", []):
            buffer.write(opened if self.labelled and opened.any() else True)

    def fill(
        self, x: np.ndarray, raw: bool, labels: np.ndarray | None, *, lr: float, opened: np.ndarray, old: np.ndarray
    ) -> None:
        """Everything that needs no random numbers."""
        self.fill_frames(x, raw)
        self.fill_mask(opened)
        for buffer in self._slots.get("old_class_mask", []):
            buffer.write(old)
        if labels is not None:
            self._slots["labels"][0].write(labels)
        for buffer in self._slots.get("learning_rate", []):
            buffer.write(lr)

    def fill_random(self, labels: np.ndarray | None, replay: ReplayMemory | None, rng: np.random.Generator) -> None:
        """Frames and labels from memory, then uniform random numbers in [0, 1).

        As long as the memory is empty the current rows stand in.
        """
        if replay:
            target = self._slots["memory_frames"][0]
            if replay.size:
                places = replay.draw(len(target.array), rng)
                self.frames.prepare(replay.frames[places], self.replays_raw, target.array)
                past: Any = replay.labels[places]
            else:
                places = np.arange(len(target.array)) % self.batch_size
                target.array[...] = self.prepared[places]
                past = None if labels is None else labels[places]
            target.push()
            for buffer in self._slots.get("memory_labels", []):
                buffer.write(past)
        for buffer in self._slots.get("uniform", []):
            buffer.write(rng.random(buffer.array.shape, dtype=buffer.array.dtype))
