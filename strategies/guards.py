"""The guard of a test-time adapter: sees that adaptation broke the model, and puts the last good state back.

Entropy minimisation without labels can end in one class for every input (arXiv 2302.12400), or in weights that are no
numbers; on a device nobody is there to restart it.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError, unknown_name

if TYPE_CHECKING:
    from contlearn.strategies.adapter import Adapter

Mode = Literal["off", "report", "restore"]


class Finding(NamedTuple):
    """Why a guard trips: ``figure`` counts non-finite values, or is the drift, or the share of one class."""

    reason: Literal["non_finite_logits", "non_finite_loss", "non_finite_state", "drift", "collapse"]
    figure: float
    label: int = -1
    """The class of a collapse."""


class Guard:
    """Looks at an adapter after every batch.

    *Non-finite*: a value that is not finite in the logits, the loss of a step, or any tensor that lives on to the next
    batch (weights, statistics, optimizer, method state). *Drift*: the adapted parameters are farther from their start
    than ``max_drift`` times the start's length (L2). *Collapse*: one class makes up ``collapse_share`` of the latest
    ``window`` predictions. That alone happens in any stream whose classes come in runs, so it only raises a suspicion:
    from then on the source model is asked about the same samples, too, and when it gives that class to less than half
    as many of another ``window`` samples, it is collapse. Nothing is computed twice before a suspicion, and no sample
    is stored. A stream of one class alone trips it only if it lasts longer than two windows *and* the source model
    misses more than half of that class.

    A state is good, and copied every ``every`` batches, without a suspicion and with at most half of the drift allowed.
    The state put back is the latest copy. It is the start instead if that copy was put back already and none was made
    since, or if the copy turns out to have collapsed, too: a suspicion takes most of a window to arise. For two windows
    after a collapse nothing is copied. Where the start itself answered with that one class (batches of one image and
    their statistics), going back helps nothing: the adapter gives up, and the source model answers until ``reset()``.

    Args:
        mode: ``off``, ``report`` (only note it in ``adapter.trips``) or ``restore``.
        every: batches between two copies.
        window: samples.
        collapse_share: 0..1, more than one half.
        max_drift: 0 for none.

    Attributes:
        state: the latest good state, copied in place; empty while the start is the latest.
        suspected: samples the source model was asked about since the suspicion arose.

    Raises:
        ContlearnError: a value out of range.
    """

    def __init__(
        self,
        mode: Mode = "restore",
        *,
        every: int = 10,
        window: int = 512,
        collapse_share: float = 0.9,
        max_drift: float = 1.0,
    ) -> None:
        if mode not in get_args(Mode):
            raise unknown_name("guard", mode, get_args(Mode))
        for name, value in (("guard_every", every), ("guard_window", window)):
            if not value >= 1:
                raise ContlearnError(f"{name}: expected at least 1, got {value}")
        # Two classes cannot both have more than half.
        if not 0.5 < collapse_share <= 1:
            raise ContlearnError(f"collapse_share: expected more than 0.5 and at most 1, got {collapse_share}")
        if not max_drift >= 0:
            raise ContlearnError(f"max_drift: expected at least 0, got {max_drift}")
        self.mode = mode
        self.every, self.window = every, window
        self.collapse_share, self.max_drift = collapse_share, max_drift
        self.state: dict[str, Tensor] = {}
        self.recent: deque[int] = deque(maxlen=window)
        self.begin()

    def begin(self) -> None:
        """Forget everything: the adapter is at its start."""
        self.state = {}
        self._put_back = self._start_is_no_better = False
        self._wait = 0
        self._standing = ""
        self._trust()

    def _trust(self) -> None:
        self.recent.clear()
        self.suspected = self.shared = self.shared_by_start = 0

    def look(self, adapter: Adapter, x: Tensor, logits: Tensor) -> Tensor:
        """The logits ``(batch, classes)`` to answer a batch with, after adapting to it.

        Args:
            adapter: its ``trips`` get a record when the guard trips.
            x: the batch.
            logits: what adaptation gave for it.
        """
        if self.mode == "off":
            return logits
        finding, drift = self._judge(adapter, x, logits)
        if finding is None:
            self._standing = ""
            self._wait = max(0, self._wait - len(x))
            good = not (self.suspected or self._wait) and (not self.max_drift or drift <= self.max_drift / 2)
            if self.mode == "restore" and good and adapter.batches % self.every == 0:
                self._copy(adapter)
            return logits
        record: dict[str, Any] = {"batch": adapter.batches, "reason": finding.reason, "figure": finding.figure}
        if self.mode == "report":
            if finding.reason != self._standing:  # a lasting state is one trip, not one per batch
                adapter.trips.append(record)
            self._standing = finding.reason
            return logits
        adapter.trips.append(record)
        self._wait = 2 * self.window if finding.reason == "collapse" else self._wait
        if finding.reason == "collapse" and self._start_is_no_better:
            adapter.gave_up = True
            record["restored"] = "source"
            self.state = {}
            self._trust()
            adapter.back_to_start()
            return adapter.source_logits(x)
        record["restored"] = self._restore(adapter)
        logits = adapter.predict(x)
        if self.state and not self._helps(adapter, finding, x, logits):
            record["restored"] = self._restore(adapter)
            # A batch that overflows even the initial weights keeps its logits: there is no better answer to it.
            logits = adapter.predict(x)
        return logits

    def _helps(self, adapter: Adapter, finding: Finding, x: Tensor, logits: Tensor) -> bool:
        """Whether the copy that was put back is any better than what tripped."""
        if finding.reason != "collapse":
            return bool(torch.isfinite(logits).all())
        share = float((logits.argmax(1) == finding.label).float().mean())
        source = float((adapter.source_logits(x).argmax(1) == finding.label).float().mean())
        return share < self.collapse_share or source >= share / 2

    @torch.no_grad()
    def _judge(self, adapter: Adapter, x: Tensor, logits: Tensor) -> tuple[Finding | None, float]:
        if count := _non_finite([logits]):
            return Finding("non_finite_logits", count), 0.0
        if adapter.stepped and not math.isfinite(adapter.last_loss):
            return Finding("non_finite_loss", 1), 0.0
        if count := _non_finite([tensor for _, tensor in adapter.moving()]):
            return Finding("non_finite_state", count), 0.0
        drift = drift_of(adapter) if self.max_drift else 0.0
        if self.max_drift and drift > self.max_drift:
            return Finding("drift", drift), drift
        return self._collapse(adapter, x, logits), drift

    def _collapse(self, adapter: Adapter, x: Tensor, logits: Tensor) -> Finding | None:
        if not adapter.watched_for_collapse:
            return None
        self.recent.extend(logits.argmax(1).tolist())
        label, count = Counter(self.recent).most_common(1)[0]
        share = count / self.window
        if len(self.recent) < self.window or share < self.collapse_share:
            self.suspected = self.shared = self.shared_by_start = 0
            return None
        self.shared += int((adapter.source_logits(x).argmax(1) == label).sum())
        self.shared_by_start += int((adapter.start_logits(x).argmax(1) == label).sum())
        self.suspected += len(x)
        if self.suspected < self.window:
            return None
        collapsed = self.shared / self.suspected < share / 2
        self._start_is_no_better = self.shared_by_start / self.suspected >= self.collapse_share
        self.suspected = self.shared = self.shared_by_start = 0
        return Finding("collapse", share, label) if collapsed else None

    @torch.no_grad()
    def _copy(self, adapter: Adapter) -> None:
        before, self.state = self.state, {}
        for name, tensor in adapter.moving():
            held = before.get(name)
            # Into the old copy: two of them never exist at once.
            same = held is not None and held.shape == tensor.shape
            self.state[name] = held.copy_(tensor) if held is not None and same else tensor.detach().clone()
        self._put_back = False

    def _restore(self, adapter: Adapter) -> str:
        again = self._put_back
        self._trust()
        if self.state and not again:
            adapter.restore(self.state)
            self._put_back = True
            return "snapshot"
        self.state, self._put_back = {}, False
        adapter.back_to_start()
        return "start"


@torch.no_grad()
def drift_of(adapter: Adapter) -> float:
    """L2 distance of the adapted parameters from their start over the L2 norm of the start; 0 where nothing adapts."""
    moved, length = [], []
    for name, tensor in adapter.adapted():
        if isinstance(tensor, nn.Parameter):
            start = adapter._initial[name]
            moved.append((tensor - start).norm())
            length.append(start.norm())
    if not moved:
        return 0.0
    distance, norm = float(torch.stack(moved).norm()), float(torch.stack(length).norm())
    return distance / norm if norm else 0.0


def _non_finite(tensors: list[Tensor]) -> int:
    floating = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    device = floating[0].device if floating else None
    fine = [torch.isfinite(tensor).all().to(device) for tensor in floating]
    if not fine or bool(torch.stack(fine).all()):  # one synchronisation in the usual case
        return 0
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in floating)
