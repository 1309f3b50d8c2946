"""Learning-rate schedules that start anew in every experience."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from contlearn.errors import ContlearnError

ScheduleName = Literal["constant", "linear", "cosine", "multistep"]


def factor(
    name: ScheduleName, *, epochs: int, milestones: Sequence[int] = (), gamma: float = 0.1, warmup_epochs: int = 0
) -> Callable[[int], float]:
    """The multiplier of the base learning rate at each epoch (0-based) of one experience.

    Args:
        name: ``constant``; ``linear`` decay to 0 after the last epoch; ``cosine`` decay to 0 after the last epoch
            (arXiv 1608.03983 without restarts inside the experience); ``multistep``: times ``gamma`` at each milestone.
        epochs: epochs per experience.
        milestones: epochs at which ``multistep`` decays, in increasing order.
        gamma: factor of ``multistep``.
        warmup_epochs: epochs of linear warm-up from ``1 / (warmup_epochs + 1)`` of the rate; decays count from its end.

    Raises:
        ContlearnError: unknown name, milestones that do not increase, or a warm-up longer than the experience.
    """
    if name not in ("constant", "linear", "cosine", "multistep"):
        raise ContlearnError(f"lr_schedule: expected constant, linear, cosine or multistep, got {name!r}")
    if gamma <= 0:
        raise ContlearnError(f"gamma: expected more than 0, got {gamma}")
    if warmup_epochs and warmup_epochs >= epochs:
        raise ContlearnError(
            f"warmup_epochs: expected fewer than the {epochs} epochs of an experience, got {warmup_epochs}"
        )
    steps = [int(m) for m in milestones]
    if name == "multistep" and (not steps or steps != sorted(set(steps))):
        raise ContlearnError(f"milestones: lr_schedule multistep needs epochs in increasing order, got {steps}")

    def multiplier(epoch: int) -> float:
        if epoch < warmup_epochs:
            return (epoch + 1) / (warmup_epochs + 1)
        progress = (epoch - warmup_epochs) / max(1, epochs - warmup_epochs)
        if name == "linear":
            return max(0.0, 1.0 - progress)
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        if name == "multistep":
            return float(gamma ** sum(epoch >= milestone for milestone in steps))
        return 1.0

    return multiplier


def start(optimizer: Optimizer, base_rates: Sequence[float], multiplier: Callable[[int], float]) -> LambdaLR:
    """A fresh scheduler at epoch 0 of an experience, whatever the optimizer's rates were before."""
    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = group["initial_lr"] = rate
    return LambdaLR(optimizer, multiplier)
