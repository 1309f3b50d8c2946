"""Normalize-and-project: weights keep their initial norm, so that the effective learning rate is the one you set.

NaP, arXiv 2407.01800: a normalisation before every non-linearity, and after the optimizer's step
W <- rho W / |W| for every weight matrix whose scale the normalisations make irrelevant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.norm_log import NormLog, Reference
from contlearn.strategies.normalise import Norm, insert_norms
from contlearn.strategies.scale_invariance import Group, analyse
from contlearn.strategies.step import NotExportable
from contlearn.strategies.step_part import PlainStep
from contlearn.strategies.teacher import classifier_name


@dataclass
class _Held:
    """A model's tensors behind the names of a plan; groups that train alone.

    Attributes:
        groups: places in the plan.
        parameters: per group.
        statistics: per BatchNorm, its module, and which groups (by position in ``groups``) scale its input and how.
            Not its buffers: moving a model, or putting a checkpoint back, replaces those.
        pulled: parameters with an anchor, and its name.
    """

    model: nn.Module
    groups: list[int]
    parameters: list[list[nn.Parameter]]
    statistics: list[tuple[nn.Module, str, str, list[tuple[int, float]]]]
    pulled: list[tuple[nn.Parameter, str]]


class NaPPlugin(PlainStep, SupervisedPlugin):
    """Normalize-and-project as a plug-in.

    ``prepare_model`` puts the normalisations in and finds the scale-invariant weights in the network's graph; a
    strategy of ours calls it, in front of an Avalanche strategy call it yourself before the optimizer is made. The
    output layer is never projected, nor is what the graph does not prove to be scale-invariant. Moments of the
    optimizer are left as they are.

    Args:
        every: project after every n-th optimizer step; 0 never does: normalisation alone, the usual control.
        norm: kind of the inserted normalisations: ``layer`` or ``rms``.
        affine: scale and offset of all normalisations: ``rescale`` keeps the joint norm of a pair where the network is
            positively homogeneous behind it, and pulls the others towards their initial values; ``fixed`` does not
            learn them; ``free`` lets them go.
        affine_decay: strength of that pull, decoupled from the gradient: a -= lr * affine_decay * (a - a_0).
        rate: what projecting takes away, the fall of the effective learning rate, put back as a factor of the
            learning rate over the whole run: ``constant`` (none), ``linear``, or ``reference`` (the norm growth of
            another run).
        total_steps: optimizer steps until ``linear`` has reached ``final_factor``; then it stays there.
        final_factor: last factor of ``linear``.
        reference: norm log of the other run, a JSON file written with ``record``.
        reference_scale: one factor for all weights (``global``), or one for each projected matrix (``layer``).
        reference_power: power of the norm in the effective learning rate: 1 for Adam and its kin, 2 for SGD.
        record: write this run's norm log to this JSON file at the end of each training.
        log_size: entries the norm log has at most; 0 for none.
        input_shape: channels, height and width of one input, for a network that does not say it itself.

    Attributes:
        steps: optimizer steps done.
        rho: target norms of the projected groups (groups,), matrices first.
        log: norms of the projectable matrices and learning rates, see ``NormLog``.
    """

    memory_names = {
        "rho": "target_norms",
        "anchors": "affine_anchor",
        "log": "norm_log",
        "_before": "weights_before_step",
    }
    checkpoint_exclude = ("_plan", "_held", "_before", "_schedule")

    def __init__(
        self,
        every: int = 1,
        *,
        norm: Norm = "layer",
        affine: Literal["rescale", "fixed", "free"] = "rescale",
        affine_decay: float = 0.01,
        rate: Literal["constant", "linear", "reference"] = "constant",
        total_steps: int | None = None,
        final_factor: float = 0.0,
        reference: str | None = None,
        reference_scale: Literal["global", "layer"] = "global",
        reference_power: Literal[1, 2] = 1,
        record: str | None = None,
        log_size: int = 512,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("norm", norm, ("layer", "rms")), ("affine", affine, ("rescale", "fixed", "free")),
            ("rate", rate, ("constant", "linear", "reference")),
            ("reference_scale", reference_scale, ("global", "layer")), ("reference_power", reference_power, (1, 2)),
        ):  # fmt: skip
            if value not in choices:
                raise ContlearnError(f"{option}: expected {' or '.join(map(str, choices))}, got {value!r}")
        for option, number, least in (
            ("every", every, 0), ("affine_decay", affine_decay, 0), ("final_factor", final_factor, 0),
            ("log_size", log_size, 0), ("total_steps", 1 if total_steps is None else total_steps, 1),
        ):  # fmt: skip
            if not number >= least:
                raise ContlearnError(f"{option}: expected at least {least}, got {number}")
        if (rate == "linear") != (total_steps is not None):
            raise ContlearnError(
                f"total_steps: belongs to rate linear and to it alone, got {total_steps} with {rate!r}"
            )
        if (rate == "reference") != (reference is not None):
            raise ContlearnError(
                f"reference: belongs to rate reference and to it alone, got {reference!r} with {rate!r}"
            )
        if log_size in (1, 2, 3) or (record is not None and log_size == 0):
            raise ContlearnError(f"log_size: expected at least 4, or 0 without record, got {log_size}")
        self.every = every
        self.norm: Norm = norm
        self.affine = affine
        self.affine_decay = affine_decay
        self.rate = rate
        self.total_steps = total_steps
        self.final_factor = final_factor
        self.reference_scale = reference_scale
        self.reference_power = reference_power
        self.record = record
        self.log_size = log_size
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.steps = 0
        self.rho = torch.empty(0)
        self.anchors: dict[str, Tensor] = {}
        self.log = NormLog([], size=0)
        self._schedule = None if reference is None else Reference(reference)
        self._plan: list[Group] | None = None
        self._held: _Held | None = None
        self._before: list[Tensor] = []
        self._rates: list[float] = []
        self._columns: list[int] = []

    # ------------------------------------------------------------------ preparation

    def prepare_model(self, model: nn.Module) -> None:
        """Insert the normalisations in place, find what may be projected, and take its norms as targets.

        Call it before the optimizer is made: parameters are added and removed.

        Raises:
            ContlearnError: a non-linearity called as a function, a model that cannot be traced, or a ``reference`` of
                another network.
        """
        insert_norms(model, norm=self.norm, input_shape=self.input_shape)
        found = analyse(model, input_shape=self.input_shape)
        parameters = dict(model.named_parameters())
        inside = _classifier(model)

        def zero(group: Group) -> bool:
            return not any(bool(parameters[name].detach().any()) for name in group.parameters)

        def touchable(group: Group) -> bool:
            return inside is None or not any(name.startswith(inside) for name in group.parameters)

        # A matrix that starts at zero has no norm to keep.
        matrices = [group for group in found.matrices if group.invariant and touchable(group) and not zero(group)]
        pairs = [group for group in found.pairs if touchable(group)]
        kept = [group for group in pairs if group.invariant and not zero(group)] if self.affine == "rescale" else []
        plan = matrices + kept
        self.anchors = {}
        if self.affine == "rescale":
            pulled = {name for g in pairs for name in g.parameters} - {name for g in kept for name in g.parameters}
            self.anchors = {name: p.detach().clone() for name, p in parameters.items() if name in pulled}
        elif self.affine == "fixed":
            for name in (name for group in pairs for name in group.parameters):
                parameters[name].requires_grad_(False)
        self._plan, self._held = plan, None
        self.rho = torch.stack([_norm([parameters[n] for n in g.parameters]) for g in plan]) if plan else torch.empty(0)
        self.log = NormLog([group.parameters[0] for group in matrices], size=self.log_size)
        if self._schedule is not None and self.reference_scale == "layer":
            self._columns = self._schedule.column_of(self.log.names)

    def kept_bytes(self, model: nn.Module, *, experiences: int, head_rows: int) -> int:
        """Bytes held between experiences beside the model: target norms, anchors and the norm log."""
        log = (self.log.steps, self.log.rates, self.log.norms)
        return sum(t.numel() * t.element_size() for t in (self.rho, *self.anchors.values(), *log))

    @property
    def projected(self) -> list[str]:
        """Names of the weight matrices that are projected (or would be, with ``every=0``)."""
        return list(self.log.names)

    @property
    def rescaled(self) -> list[tuple[str, ...]]:
        """Names of the scale/offset pairs that keep their joint norm."""
        return [group.parameters for group in (self._plan or [])[len(self.log.names) :]]

    def _tensors(self, model: nn.Module) -> _Held:
        if self._held is not None and self._held.model is model:
            return self._held
        if self._plan is None:
            raise ContlearnError(
                "nap: the model was not prepared; call plugin.prepare_model(model) before the optimizer is made"
            )
        parameters = dict(model.named_parameters())
        for name in (name for group in self._plan for name in group.parameters):
            if name not in parameters:
                raise ContlearnError(f"nap: the model lost {name!r} after it was prepared; expected the same network")
        groups = [i for i, g in enumerate(self._plan) if all(parameters[n].requires_grad for n in g.parameters)]
        statistics: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for place, index in enumerate(groups):
            for one in self._plan[index].statistics:
                statistics.setdefault((one.mean, one.variance), []).append((place, one.degree))
        self._held = _Held(
            model,
            groups,
            [[parameters[name] for name in self._plan[index].parameters] for index in groups],
            [(*_owner(model, mean), variance.rpartition(".")[2], by) for (mean, variance), by in statistics.items()],
            [(parameters[name], name) for name in self.anchors if parameters[name].requires_grad],
        )
        return self._held

    # ------------------------------------------------------------------ hooks

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check that the model was prepared, and start the log."""
        self._held = None
        held = self._tensors(strategy.model)
        if self.log.size and not self.log.count:
            self._enter(held, strategy.optimizer.param_groups[0]["lr"])

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Look the tensors up again: they may have moved to a device, been frozen or been made anew."""
        self._held = None

    @torch.no_grad()
    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Apply the schedule's factor to the learning rates, for this one step."""
        factor = self.factor()
        self._rates = [group["lr"] for group in strategy.optimizer.param_groups]
        for group in strategy.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        if self._columns:
            self._before = [weight.detach().clone() for weight, _ in self._scaled_by_layer(strategy.model)]

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Put the learning rates back, pull what is pulled, project."""
        held = self._tensors(strategy.model)
        rate = strategy.optimizer.param_groups[0]["lr"]  # the one this step was made with
        for group, before in zip(strategy.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = before
        self._rates = []
        if self._before:
            assert self._schedule is not None
            factors = self._schedule.factors(self.steps, self._columns, power=self.reference_power)
            for (weight, index), old in zip(self._scaled_by_layer(strategy.model), self._before, strict=True):
                weight.copy_(old + factors[index] * (weight - old))
            self._before = []
        for parameter, name in held.pulled:
            self.anchors[name] = self.anchors[name].to(parameter.device)
            parameter.lerp_(self.anchors[name], min(1.0, rate * self.affine_decay))
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.project(strategy.model)
        if self.log.due(self.steps):
            self._enter(held, rate)

    def after_training(self, strategy: Any, **kwargs: Any) -> None:
        """Write the norm log."""
        if self.record is not None:
            self.log.write(self.record)

    # ------------------------------------------------------------------ export

    def step_ready(self, strategy: Any) -> None:
        """Refuse what needs another run's log.

        Raises:
            NotExportable: ``rate: reference``.
        """
        if self._schedule is not None:
            raise NotExportable("nap: rate reference reads another run's log; expected constant or linear")
        self._held = None

    def step_tensors(self, strategy: Any) -> dict[str, Tensor]:
        """Number of steps (1,), where something depends on it."""
        counted = self.every > 1 or self.rate == "linear"
        return {"steps": torch.tensor([float(self.steps)])} if counted else {}

    def step_rate(self, lr: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The falling rate."""
        if self.rate != "linear":
            return lr
        assert self.total_steps is not None
        return lr * (1.0 + (self.final_factor - 1.0) * torch.clamp(tensors["steps"] / self.total_steps, max=1.0))

    def step_after(
        self, weights: dict[str, Tensor], statistics: dict[str, Tensor], tensors: dict[str, Tensor], lr: Tensor
    ) -> dict[str, Tensor]:
        """Pull what is pulled, project."""
        for name, anchor in self.anchors.items():
            if name in weights:
                share = torch.clamp(lr * self.affine_decay, max=1.0)
                weights[name] = weights[name] + share * (anchor - weights[name])
        moved = {name: count + 1 for name, count in tensors.items()}
        if not self.every:
            return moved
        due = None if self.every == 1 else torch.remainder(moved["steps"], self.every) == 0
        factors: dict[int, Tensor] = {}
        for index, group in enumerate(self._plan or []):
            if all(name in weights for name in group.parameters):
                norm = torch.sqrt(sum((weights[n] * weights[n]).sum() for n in group.parameters))  # type: ignore[arg-type]
                factor = torch.where(norm > 0, self.rho[index] / norm, 1.0)
                factors[index] = factor if due is None else torch.where(due, factor, 1.0)
        for index, factor in factors.items():
            for name in (self._plan or [])[index].parameters:
                weights[name] = weights[name] * factor
            for one in (self._plan or [])[index].statistics:
                follow = factor**one.degree
                statistics[one.mean] = statistics[one.mean] * follow
                statistics[one.variance] = statistics[one.variance] * follow * follow
        return moved

    # ------------------------------------------------------------------ the method

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        """Give every projected matrix, and every rescaled pair, its initial norm; the function stays the same."""
        held = self._tensors(model)
        if not held.groups:
            return
        norms = torch.stack([_norm(group) for group in held.parameters])
        if self.rho.device != norms.device:
            self.rho = self.rho.to(norms.device)
        # Of a weight that became zero no direction is left.
        factors = torch.where(norms > 0, self.rho[held.groups] / norms, 1.0).unbind()
        for group, factor in zip(held.parameters, factors, strict=True):
            for parameter in group:
                parameter.mul_(factor)
        for module, mean, variance, scaled_by in held.statistics:
            follow = torch.stack([factors[place] ** degree for place, degree in scaled_by]).prod()
            getattr(module, mean).mul_(follow)
            getattr(module, variance).mul_(follow * follow)

    def factor(self) -> float:
        """Factor of the learning rate of the next step; 1 where each matrix has its own."""
        if self.rate == "linear":
            assert self.total_steps is not None
            return 1.0 + (self.final_factor - 1.0) * min(1.0, self.steps / self.total_steps)
        if self._schedule is not None and self.reference_scale == "global":
            return self._schedule.global_factor(self.steps, power=self.reference_power)
        return 1.0

    def _scaled_by_layer(self, model: nn.Module) -> list[tuple[nn.Parameter, int]]:
        """Projected matrices that train, and where each stands in the log."""
        held = self._tensors(model)
        count = len(self.log.names)
        return [(held.parameters[i][0], index) for i, index in enumerate(held.groups) if index < count]

    def _enter(self, held: _Held, rate: float) -> None:
        parameters = dict(held.model.named_parameters())
        if self.log.names:
            self.log.add(self.steps, rate, torch.stack([_norm([parameters[name]]) for name in self.log.names]))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Frobenius norm over all ``tensors`` together, at least in single precision."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms: list[Tensor] = [torch.linalg.vector_norm(tensor.detach(), dtype=dtype) for tensor in tensors]
    if len(norms) == 1:
        return norms[0]
    joint: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return joint


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module a buffer belongs to, and the buffer's name there."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _classifier(model: nn.Module) -> str | None:
    """Prefix of the names of the output layer's parameters; ``None`` for a network without one."""
    try:
        return f"{classifier_name(model)}."
    except ContlearnError:
        return None
