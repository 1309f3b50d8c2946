"""Guards: see that adaptation broke the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

GUARDS: dict[str, Any] = {
    "non_finite": True,
    "collapse_window": 256,
    "collapse_share": 0.95,
    "max_drift": 0.0,
    "snapshot_every": 10,
}


class Guards:
    """Sees that adaptation broke the model; the session then puts a good state back.

    *Collapse*: one class makes up ``collapse_share`` of the latest ``collapse_window`` predictions. As a stream whose
    classes come in runs does that too, it only raises a suspicion: from then on the predictions are compared with the
    labels, or, where the method has none, with what the shipped state says about the same frames. Only when those
    name the class less than half as often in another ``collapse_window`` frames is it collapse. *Drift*: the trained
    weights are farther from the shipped ones than ``max_drift`` times the length of those (L2).
    """

    def __init__(self, rules: Mapping[str, Any]) -> None:
        self.rules, self.window = rules, int(rules["collapse_window"])
        self.copies = bool(self.window or rules["max_drift"])
        self.wait = 0
        self.forget()

    def forget(self) -> None:
        """Forget past predictions: another state is in place."""
        self.recent = np.zeros(0, np.int32)
        self.suspected = self.shared = 0

    def trusts(self) -> bool:
        """No suspicion, and the last collapse is two windows away: the state may be copied."""
        return not (self.suspected or self.wait)

    def collapsed(self, predicted: np.ndarray, truth: Callable[[], np.ndarray]) -> int:
        """The class that predictions collapsed to, or -1.

        Args:
            predicted: classes ``(rows,)`` of the latest step.
            truth: gives the classes to compare with; called under suspicion only.
        """
        if not self.window:
            return -1
        self.wait = max(0, self.wait - len(predicted))
        self.recent = np.concatenate([self.recent, predicted.astype(np.int32)])[-self.window :]
        counts = np.bincount(self.recent)
        label = int(counts.argmax())
        share = counts[label] / self.window
        if len(self.recent) < self.window or share < self.rules["collapse_share"]:
            self.suspected = self.shared = 0
            return -1
        self.shared += int((truth() == label).sum())
        self.suspected += len(predicted)
        if self.suspected < self.window:
            return -1
        broken = self.shared / self.suspected < share / 2
        self.suspected = self.shared = 0
        if not broken:
            return -1
        self.wait = 2 * self.window
        return label

    def is_collapse(self, label: int, predicted: np.ndarray, truth: np.ndarray) -> bool:
        """Whether one batch by itself looks collapsed to ``label``."""
        share = float((predicted == label).mean())
        return share >= self.rules["collapse_share"] and float((truth == label).mean()) < share / 2

    def record(self) -> dict[str, Any]:
        """The counters, for JSON."""
        return {"wait": self.wait, "suspected": self.suspected, "shared": self.shared}

    def load(self, record: Mapping[str, Any], recent: np.ndarray) -> None:
        """Take over what was saved."""
        self.wait, self.suspected, self.shared = (int(record[key]) for key in ("wait", "suspected", "shared"))
        if recent.dtype != np.int32 or recent.ndim != 1 or recent.min(initial=0) < 0:
            raise ValueError("guard/recent holds no classes")
        self.recent = np.array(recent)[-self.window :] if self.window else np.zeros(0, np.int32)
