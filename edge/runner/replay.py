"""The replay memory: past frames and labels within a fixed number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class ReplayMemory:
    """Past frames and labels within a fixed number of bytes.

    ``reservoir``: a uniform sample of everything seen. ``balanced``: class-balancing reservoir sampling (Chrysakis and
    Moens, ICML 2020, algorithm 1), which also keeps each class's share a uniform sample of that class.
    """

    LABEL_BYTES = 4

    def __init__(self, spec: Mapping[str, Any], classes: int) -> None:
        self.policy, self.capacity = spec["policy"], int(spec["capacity"])
        self.frames = np.zeros((self.capacity, *spec["shape"]), spec["dtype"])
        self.labels = np.full(self.capacity, -1, np.int32)
        self.classes = classes
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.size = self.seen = 0
        self.seen_of = np.zeros(self.classes, np.int64)
        self.full = np.zeros(self.classes, bool)
        self.order = np.empty(0, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of frames and labels at capacity."""
        return self.frames.nbytes + self.labels.nbytes

    def draw(self, rows: int, rng: np.random.Generator) -> np.ndarray:
        """Places of ``rows`` stored frames; each at most once where there are enough.

        Shuffled passes over the memory, one after another: drawing each batch anew would leave some frames out for
        long, which costs accuracy where epochs are few.
        """
        if len(self.order) < rows:
            passes = -(-rows // self.size)
            self.order = np.concatenate([rng.permutation(self.size) for _ in range(passes)])
        drawn, self.order = self.order[:rows], self.order[rows:]
        return drawn

    def take(self, frame: np.ndarray, label: int, rng: np.random.Generator) -> None:
        """Offer one frame; ``label`` -1 for none."""
        self.seen += 1
        if label >= 0:
            self.seen_of[label] += 1
        if self.size < self.capacity:
            place, self.size = self.size, self.size + 1
        elif self.policy == "reservoir":
            place = int(rng.integers(self.seen))
            if place >= self.capacity:
                return
        else:
            place = self._balanced_place(label, rng)
            if place < 0:
                return
        self.frames[place], self.labels[place] = frame, label

    def _balanced_place(self, label: int, rng: np.random.Generator) -> int:
        counts = np.bincount(self.labels, minlength=self.classes)
        self.full |= counts == counts.max()
        if not self.full[label]:
            return int(rng.choice(np.flatnonzero(self.labels == counts.argmax())))
        if rng.random() >= counts[label] / self.seen_of[label]:
            return -1
        return int(rng.choice(np.flatnonzero(self.labels == label)))

    def tensors(self) -> dict[str, np.ndarray]:
        """What is to be saved."""
        seen = np.array([self.seen], np.int64)
        held = {"frames": self.frames[: self.size], "labels": self.labels[: self.size], "seen": seen}
        return {**held, "seen_of": self.seen_of, "full": self.full, "order": self.order}

    def check(self, saved: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError for tensors that :meth:`load` could not take."""
        mine = self.tensors()
        if saved.keys() != mine.keys():
            raise ValueError(f"memory: expected {', '.join(mine)}, got {', '.join(saved)}")
        for name, array in saved.items():
            if array.dtype != mine[name].dtype or array.shape[1:] != mine[name].shape[1:]:
                raise ValueError(f"memory/{name} has another shape or dtype")
        size, labels = len(saved["frames"]), saved["labels"]
        fits = size <= self.capacity and labels.shape == (size,) and (saved["seen"] >= size).all()
        lowest = 0 if self.policy == "balanced" else -1
        known = ((labels >= lowest) & (labels < self.classes)).all()
        known &= ((saved["order"] >= 0) & (saved["order"] < size)).all()
        sizes = [len(saved[name]) for name in ("seen", "seen_of", "full")]
        if not (fits and known) or sizes != [1, self.classes, self.classes]:
            raise ValueError("the replay memory does not fit")

    def load(self, saved: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`tensors` gave."""
        self.size, self.seen = len(saved["frames"]), int(saved["seen"][0])
        self.frames[: self.size], self.labels[: self.size] = saved["frames"], saved["labels"]
        self.seen_of, self.full = np.array(saved["seen_of"]), np.array(saved["full"])
        self.order = np.array(saved["order"])
