"""Optimizers as pure functions of weights, gradients and state: what a training graph can hold.

The same arithmetic as ``torch.optim.SGD``, ``Adam``, ``AdamW`` and :class:`contlearn.strategies.sinkgd.SinkGD`, in the
same order, so that one step agrees with the optimizer's to the last bits of the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from contlearn.errors import ContlearnError
from contlearn.strategies.sinkgd import SinkGD, is_matrix, sinkgd_direction

Tensors = dict[str, Tensor]
_REFUSED = ("nesterov", "amsgrad", "maximize")


@dataclass(frozen=True)
class Rule:
    """How one parameter moves.

    Attributes:
        kind: ``sgd``, ``adam`` (L2 penalty), ``adamw`` (decoupled decay) or ``sinkgd``.
        scale: its learning rate over the step's.
        options: of its group in the optimizer.
    """

    kind: str
    scale: float
    options: Mapping[str, Any]

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors it keeps."""
        if self.kind == "sgd":
            return ("momentum_buffer",) if self.options["momentum"] else ()
        return ("exp_avg", "exp_avg_sq") if self.kind in ("adam", "adamw") else ()


class Update:
    """An optimizer's step over named parameters.

    Args:
        optimizer: gives kinds, options and the state that training left.
        parameters: those that train, by name.

    Attributes:
        rules: by parameter name.
        state: starting values of what is kept, by name: ``optimizer.PARAMETER.SLOT`` and, with Adam,
            ``optimizer.step`` ``(1,)`` or one per parameter.
        lr: the first group's learning rate now.

    Raises:
        ContlearnError: an optimizer, or an option of one, that has no rule here.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.lr = float(optimizer.param_groups[0]["lr"])
        self.rules: dict[str, Rule] = {}
        self.state: Tensors = {}
        for group in optimizer.param_groups:
            for option in _REFUSED:
                if group.get(option):
                    raise ContlearnError(f"optimizer: {option} has no exportable update; expected it off")
            if group.get("dampening"):
                raise ContlearnError("optimizer: dampening has no exportable update; expected 0")
            scale = float(group["lr"]) / self.lr if self.lr else 1.0
            for parameter in group["params"]:
                if id(parameter) in names:
                    self.rules[names[id(parameter)]] = _rule(optimizer, group, parameter, scale)
        for name in set(parameters) - set(self.rules):
            raise ContlearnError(f"optimizer: parameter {name!r} trains but is in none of its groups")
        self._keep(optimizer, parameters)

    def _keep(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        steps: dict[str, float] = {}
        for name, rule in self.rules.items():
            held = optimizer.state.get(parameters[name], {})
            for slot in rule.slots:
                value = held.get(slot)
                kept = torch.zeros_like(parameters[name]) if value is None else value.detach().clone()
                self.state[f"optimizer.{name}.{slot}"] = kept.contiguous()
            if "exp_avg" in rule.slots:
                steps[name] = float(held.get("step", 0.0))
        self._common = len(set(steps.values())) == 1
        if self._common:
            self.state["optimizer.step"] = torch.tensor([next(iter(steps.values()))])
        else:
            self.state.update({f"optimizer.{name}.step": torch.tensor([value]) for name, value in steps.items()})

    def apply(self, weights: Tensors, gradients: Tensors, state: Tensors, lr: Tensor) -> tuple[Tensors, Tensors]:
        """New weights and new state; a parameter without a gradient stays, and so does what is kept for it.

        Args:
            weights: by name.
            gradients: by name.
            state: as :attr:`state`.
            lr: learning rate (1,).
        """
        new, kept = dict(weights), {name: state[name] for name in self.state}
        if self._common:
            kept["optimizer.step"] = state["optimizer.step"] + 1
        for name, g in gradients.items():
            rule = self.rules[name]
            rate = lr if rule.scale == 1 else lr * rule.scale
            new[name] = _STEPS[rule.kind](self, name, weights[name], g, rule.options, state, kept, rate)
        return new, kept

    def clock(self, name: str, state: Tensors, kept: Tensors) -> Tensor:
        """Number of this step (1,), from 1."""
        if self._common:
            return kept["optimizer.step"]
        kept[f"optimizer.{name}.step"] = state[f"optimizer.{name}.step"] + 1
        return kept[f"optimizer.{name}.step"]


def _rule(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, scale: float) -> Rule:
    if isinstance(optimizer, torch.optim.SGD):
        return Rule("sgd", scale, group)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
        return Rule("adamw" if decoupled else "adam", scale, group)
    if isinstance(optimizer, SinkGD):
        if group["adam"] or not is_matrix(parameter):
            return Rule("adamw", scale * group["adam_scale"], group)
        return Rule("sinkgd", scale * group["lr_scale"], group)
    raise ContlearnError(
        f"optimizer: {type(optimizer).__name__} has no exportable update; expected SGD, Adam, AdamW or SinkGD"
    )


def _sgd(
    update: Update, name: str, w: Tensor, g: Tensor, options: Any, state: Tensors, kept: Tensors, rate: Tensor
) -> Tensor:
    if options["weight_decay"]:
        g = g + options["weight_decay"] * w
    if options["momentum"]:
        slot = f"optimizer.{name}.momentum_buffer"
        g = kept[slot] = options["momentum"] * state[slot] + g
    return w - rate * g


def _adam(
    update: Update, name: str, w: Tensor, g: Tensor, options: Any, state: Tensors, kept: Tensors, rate: Tensor,
    *, decoupled: bool = False,
) -> Tensor:  # fmt: skip
    beta1, beta2 = options["betas"]
    decay = options["weight_decay"]
    if decay and decoupled:
        w = w * (1 - rate * decay)
    elif decay:
        g = g + decay * w
    first, second = f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"
    m = kept[first] = beta1 * state[first] + (1 - beta1) * g
    v = kept[second] = beta2 * state[second] + (1 - beta2) * g * g
    step = update.clock(name, state, kept)
    # beta^step: a constant base, so that the exponent alone is a run-time value
    correction1, correction2 = 1 - torch.pow(beta1, step), 1 - torch.pow(beta2, step)
    moved: Tensor = w - (rate / correction1) * m / (torch.sqrt(v) / torch.sqrt(correction2) + options["eps"])
    return moved


def _adamw(
    update: Update, name: str, w: Tensor, g: Tensor, options: Any, state: Tensors, kept: Tensors, rate: Tensor
) -> Tensor:
    return _adam(update, name, w, g, options, state, kept, rate, decoupled=True)


def _sinkgd(
    update: Update, name: str, w: Tensor, g: Tensor, options: Any, state: Tensors, kept: Tensors, rate: Tensor
) -> Tensor:
    if options["weight_decay"]:
        w = w * (1 - rate * options["weight_decay"])
    return w - rate * sinkgd_direction(g, options["steps"])


_STEPS = {"sgd": _sgd, "adam": _adam, "adamw": _adamw, "sinkgd": _sinkgd}
