"""Everything that lives from one step to the next, and how it becomes a file and comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError
from contlearn.edge.runner.guards import Guards
from contlearn.edge.runner.replay import ReplayMemory
from contlearn.edge.runner.weights import Weights


class Learned:
    """Weights, replay memory, guards, random generator, open and old classes, and counters.

    Args:
        weights: the tensors.
        manifest: the checked manifest.
        classes: size of the head.
        seed: of the random numbers.
        memory: what the replay memory starts with (:meth:`ReplayMemory.tensors`); empty for nothing.

    Raises:
        ValueError: a memory that does not fit.
    """

    def __init__(
        self,
        weights: Weights,
        manifest: Mapping[str, Any],
        *,
        classes: int,
        seed: int,
        memory: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.weights, self.manifest, self.classes, self.seed = weights, manifest, classes, seed
        self._first_memory = memory
        self.replay = ReplayMemory(manifest["memory"], classes) if manifest["memory"] else None
        self.reset()

    def reset(self) -> None:
        """As shipped."""
        self.weights.forget()
        self.weights.write(self.weights.shipped)
        self.guards = Guards(self.manifest["guards"])
        self.rng = np.random.default_rng(self.seed)
        self.opened = np.zeros(self.classes, bool)
        self.opened[self.manifest.get("open_classes", [])] = True
        self.old = np.zeros(self.classes, bool)
        self.old[self.manifest.get("old_classes", [])] = True
        self.set_lr(self.manifest["hyperparameters"].get("lr", 0.0))
        self.steps = 0
        self.trips: dict[str, int] = {}
        if self.replay:
            self.replay.clear()
            if self._first_memory:
                self.replay.check(self._first_memory)
                self.replay.load(self._first_memory)

    def finish_experience(self) -> None:
        """Teachers and anchors follow, and every class met so far is an old one."""
        self.weights.finish_experience()
        self.old = self.opened.copy()

    def set_lr(self, value: Any) -> None:
        """The learning rate of the next steps.

        Raises:
            RunnerError: not a finite number from 0.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise RunnerError(f"lr: expected a finite number from 0, got {value!r}")
        self.lr = float(value)

    def tensors(self) -> dict[str, np.ndarray]:
        """What is saved as tensors; what never changes is not among them."""
        tensors = {f"state/{name}": array for name, array in self.weights.moving().items()}
        tensors["guard/recent"] = self.guards.recent
        tensors["classes/open"], tensors["classes/old"] = self.opened, self.old
        if not self.weights.snapshot_is_state:
            tensors.update({f"snapshot/{name}": array for name, array in self.weights.snapshot.items()})
        if self.replay:
            tensors.update({f"memory/{name}": array for name, array in self.replay.tensors().items()})
        return tensors

    def record(self) -> str:
        """What is saved as JSON."""
        content = {
            "steps": self.steps,
            "trips": self.trips,
            "lr": self.lr,
            "rng": self.rng.bit_generator.state,
            "guard": self.guards.record(),
            "snapshot": bool(self.weights.snapshot),
            "snapshot_used": self.weights.snapshot_used,
        }
        return json.dumps(content, separators=(",", ":"))

    def take_over(self, tensors: Mapping[str, np.ndarray], text: str) -> None:
        """Go on from :meth:`tensors` and :meth:`record`; nothing is changed before all of it was checked.

        Raises:
            ValueError, LookupError, TypeError: they do not fit.
        """
        record = json.loads(text)
        groups: dict[str, dict[str, np.ndarray]] = {"state": {}, "snapshot": {}, "memory": {}}
        for name, array in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = array
        for part, names in (("state", self.weights.moves), ("snapshot", self.weights.updates)):
            for name in names if groups[part] or part == "state" else ():
                _expect(f"{part}/{name}", groups[part][name], self.weights.shipped[name])
        for name in ("open", "old"):
            _expect(f"classes/{name}", groups["classes"][name], self.opened)
        rng = np.random.default_rng(self.seed)
        rng.bit_generator.state = record["rng"]
        guards = Guards(self.manifest["guards"])
        guards.load(record["guard"], groups["guard"]["recent"])
        steps, trips = int(record["steps"]), {str(key): int(value) for key, value in record["trips"].items()}
        has_snapshot, used = bool(record["snapshot"]), bool(record["snapshot_used"])
        if self.replay:
            self.replay.check({name: groups["memory"][name] for name in self.replay.tensors()})
        self.set_lr(record["lr"])

        self.weights.forget()
        self.weights.write(groups["state"])
        if groups["snapshot"]:
            self.weights.snapshot = {name: np.array(groups["snapshot"][name]) for name in self.weights.updates}
        elif has_snapshot:
            self.weights.take_snapshot()
        self.weights.snapshot_used = used
        if self.replay:
            self.replay.load(groups["memory"])
        self.rng, self.guards, self.steps, self.trips = rng, guards, steps, trips
        self.opened, self.old = np.array(groups["classes"]["open"]), np.array(groups["classes"]["old"])


def _expect(name: str, found: np.ndarray, like: np.ndarray) -> None:
    if found.dtype != like.dtype or found.shape != like.shape:
        raise ValueError(f"{name} has another shape or dtype")
