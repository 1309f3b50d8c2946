"""A training plan of its own for the first experience, which papers with a large base task train longer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from contlearn.errors import ContlearnError, nearest
from contlearn.strategies import schedule

OPTIONS = ("epochs", "lr", "weight_decay", "lr_schedule", "milestones", "gamma", "warmup_epochs")
"""What may differ."""


@dataclass(frozen=True)
class Plan:
    """How long an experience is trained, and at which rates.

    Attributes:
        epochs: passes over the experience.
        factor: multiplier of the rates at each epoch.
        rates: learning rate of each of the optimizer's groups.
        decays: weight decay of each group; empty: as it is.
    """

    epochs: int
    factor: Callable[[int], float]
    rates: Sequence[float]
    decays: Sequence[float] = ()

    def start(self, optimizer: Optimizer) -> LambdaLR:
        """Set the groups' rates and decays, and give a scheduler at epoch 0."""
        for group, decay in zip(optimizer.param_groups, self.decays, strict=False):  # no decays: none is set
            group["weight_decay"] = decay
        return schedule.start(optimizer, self.rates, self.factor)


def plans(optimizer: Optimizer, usual: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[Plan, Plan]:
    """The plans of the first experience and of the later ones.

    A rate or decay of the first experience goes to the groups that have the rate and decay of the optimizer's first
    group; others, such as PRD's prototypes, keep theirs.

    Args:
        optimizer: with its usual rates.
        usual: ``epochs`` and the options of the schedule.
        own: what the first experience has instead, of :data:`OPTIONS`.

    Raises:
        ContlearnError: an unknown option, or a value out of range.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    later = Plan(int(usual["epochs"]), _factor(usual), rates)
    if not own:
        return later, later
    _check(own)
    try:
        factor = _factor({**usual, **own})
    except ContlearnError as error:
        raise ContlearnError(f"first_experience.{error}") from None
    decays = [float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
    main = [pair == (rates[0], decays[0]) for pair in zip(rates, decays, strict=True)]
    first = Plan(
        int(own.get("epochs", usual["epochs"])),
        factor,
        [float(own.get("lr", rate)) if mine else rate for rate, mine in zip(rates, main, strict=True)],
        [float(own.get("weight_decay", decay)) if mine else decay for decay, mine in zip(decays, main, strict=True)],
    )
    return first, Plan(later.epochs, later.factor, rates, decays)


def _check(own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if name not in OPTIONS:
            close = nearest(name, OPTIONS)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ContlearnError(f"first_experience: no option {name!r}{hint} (expected one of: {', '.join(OPTIONS)})")
        if name == "lr_schedule":
            continue
        if name == "milestones":
            if not isinstance(value, Sequence) or not all(type(epoch) is int for epoch in value):
                raise ContlearnError(f"first_experience.milestones: expected whole numbers, got {value!r}")
            continue
        kinds = (int,) if name.endswith("epochs") else (int, float)
        least = 1 if name == "epochs" else 0
        if type(value) not in kinds or not value >= least:
            what = "a whole number" if kinds == (int,) else "a number"
            raise ContlearnError(f"first_experience.{name}: expected {what} of at least {least}, got {value!r}")


def _factor(options: Mapping[str, Any]) -> Callable[[int], float]:
    return schedule.factor(
        options["lr_schedule"], epochs=options["epochs"], milestones=options["milestones"], gamma=options["gamma"],
        warmup_epochs=options["warmup_epochs"],
    )  # fmt: skip
