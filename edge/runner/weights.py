"""The state of an artifact: two sets of tensors that a step reads from and writes to in turn.

Teachers and anchors, which only the end of an experience moves, exist once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from contlearn.edge.runner.frames import all_finite
from contlearn.edge.runner.graph import Buffer


class Weights:
    """Weights, optimizer state, statistics and method state; what no step replaces exists once.

    A snapshot holds what steps replace: teachers and anchors stay when it is put back.

    Args:
        ort: the onnxruntime module.
        shipped: the tensors that came with the artifact, read-only.
        manifest: the checked manifest.
        device: ``cpu`` or ``cuda``.

    Attributes:
        updates: name of the output that replaces a tensor, by the tensor's name.
        moves: names of all tensors that ever change, be it at the end of an experience.
        front: which set is the state; the other is what the next step writes to.
        snapshot: copies that the guards found good.
        snapshot_is_state: nothing has changed since the snapshot was taken or put back.
        snapshot_used: it was put back, and none was taken since.
    """

    def __init__(self, ort: Any, shipped: Mapping[str, np.ndarray], manifest: Mapping[str, Any], device: str) -> None:
        self.shipped = shipped
        self.updates = {spec["of"]: spec["name"] for spec in manifest["outputs"] if spec["meaning"] == "state"}
        self._trained = [n for n in self.updates if manifest["state"]["tensors"][n]["role"] == "weight"]
        self._copies, self._resets = dict(manifest["copies"]), list(manifest["resets"])
        self.moves = [*self.updates, *(n for n in [*self._copies, *self._resets] if n not in self.updates)]
        self._fixed = {n: Buffer(ort, np.array(a), device) for n, a in shipped.items() if n not in self.updates}
        self._sets = [{n: Buffer(ort, np.array(shipped[n]), device) for n in self.updates} for _ in range(2)]
        self.front = 0
        self.forget()

    def feeds(self) -> dict[str, Buffer]:
        """The state by name."""
        return {**self._fixed, **self._sets[self.front]}

    def targets(self) -> dict[str, Buffer]:
        """Where a step's new state goes, by the name of the output."""
        return {output: self._sets[1 - self.front][name] for name, output in self.updates.items()}

    def new_is_finite(self) -> bool:
        """Whether what the last step wrote has no NaN and no infinite value."""
        return all(all_finite(buffer.read()) for buffer in self._sets[1 - self.front].values())

    def swap(self) -> None:
        """What the last step wrote becomes the state."""
        self.front, self.snapshot_is_state = 1 - self.front, False

    def finish_experience(self) -> None:
        """Copy and reset what the manifest says; sources are never targets, so the order does not matter."""
        now = self.feeds()
        for target, source in self._copies.items():
            now[target].write(now[source].read())
        for name in self._resets:
            now[name].write(0)
        self.snapshot_is_state = False

    def moving(self) -> dict[str, np.ndarray]:
        """The tensors that change at all; on the CPU not copies."""
        now = self.feeds()
        return {name: now[name].read() for name in self.moves}

    def copies(self) -> dict[str, np.ndarray]:
        """A copy of every tensor."""
        return {name: np.array(buffer.read()) for name, buffer in self.feeds().items()}

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the state, as far as ``arrays`` has it."""
        now = self.feeds()
        for name in self.moves:
            if name in arrays:
                now[name].write(arrays[name])
        self.snapshot_is_state = False

    def drift(self) -> float:
        """L2 distance of the trained weights from the shipped ones, over the length of those."""
        moved = length = 0.0
        for name in self._trained:
            start = self.shipped[name].astype(np.float64)
            moved += float(((self._sets[self.front][name].read() - start) ** 2).sum())
            length += float((start**2).sum())
        return math.sqrt(moved / length) if length else 0.0

    def take_snapshot(self) -> None:
        """Copy the state, into the old copy if there is one."""
        for name, buffer in self._sets[self.front].items():
            array = buffer.read()
            self.snapshot.setdefault(name, np.empty_like(array))[...] = array
        self.snapshot_is_state, self.snapshot_used = True, False

    def forget(self) -> None:
        """Drop the snapshot."""
        self.snapshot: dict[str, np.ndarray] = {}
        self.snapshot_is_state = self.snapshot_used = False

    def put_back(self) -> str:
        """The snapshot, or what was shipped if there is none or it was put back before; returns which."""
        if self.snapshot and not self.snapshot_used:
            self.write(self.snapshot)
            self.snapshot_is_state = self.snapshot_used = True
            return "snapshot"
        self.forget()
        self.write(self.shipped)
        return "shipped"

    def account(self) -> dict[str, int]:
        """Bytes of the state, of the second set and of the snapshot."""
        second = sum(self.shipped[name].nbytes for name in self.updates)
        state = sum(array.nbytes for array in self.shipped.values())
        snapshot = sum(array.nbytes for array in self.snapshot.values())
        return {"state": state, "second_buffer": second, "snapshot": snapshot}
