"""Does a lowered step compute what its strategy computes? One step tightly, many steps against a perturbation control.

Training is chaotic: after some steps two correct programs differ. What counts is that the graph strays no farther from
PyTorch than PyTorch strays from itself when its weights are off by a millionth. A gradient that is 0 but for rounding
(of a bias in front of BatchNorm) differs between correct programs at once: float64 tells what is rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contlearn.edge.capture import NEW
from contlearn.edge.precision import OtherRounding, doubled, in_float64, weights_off
from contlearn.errors import ContlearnError
from contlearn.strategies.step import Step, Tensors

if TYPE_CHECKING:
    from onnx import ModelProto

RULES, ONE_STEP, MANY_STEPS = "rules", "one_step", "many_steps"
LOSS, UPDATE, LOGITS = 1e-5, 1e-3, 1e-4
"""Largest relative errors of one step."""
ROUNDING = 3.0
"""A larger error of an update is rounding where the graph is at most this many times as far from float64 as PyTorch in
float32 is."""
_ROUNDINGS = tuple((units, seed) for units, seeds in ((1.0, 4), (8.0, 8)) for seed in range(seeds))
"""One float32 result of a few numbers may be near by luck, so PyTorch's is also looked at under other roundings, of so
many units in the last place. A kink (of a ReLU, of an absolute value) that one of them crosses changes a gradient."""
STEPS, PERTURBATION, FACTOR = 20, 1e-6, 2.0
"""Many steps: how many, the perturbation of the controls, and how much farther than they the graph may be."""
FLOOR = STEPS * float(torch.finfo(torch.float32).eps)
"""Nothing is said below one unit in the last place per step."""

Advance = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]


class ParityError(ContlearnError):
    """The graph does not compute what the strategy does."""


class Rounding(NamedTuple):
    """How far an update (or the loss) is from float64's, relative to it.

    Attributes:
        graph: the graph's.
        pytorch: PyTorch's in float32.
        other: the farthest of PyTorch's in float32, under other roundings too.
    """

    graph: float
    pytorch: float
    other: float


@dataclass
class Report:
    """What was found.

    Attributes:
        tiers: those reached.
        figures: largest errors seen, by name: ``loss``, ``logits``, ``update`` (of tensors that are more than rounding)
            and, after many steps, ``drift`` and ``control_drift``.
        rounding: tensors whose update is rounding, by name; ``loss`` among them where it is.
        faults: what is wrong, one line each.
    """

    tiers: tuple[str, ...] = (RULES,)
    figures: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, Rounding] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def largest(self, name: str, error: float) -> None:
        """Keep the largest error by this name; NaN is kept as infinite."""
        self.figures[name] = max(self.figures.get(name, 0.0), error if error == error else float("inf"))


class _Graph:
    """An ONNX model as a function of named tensors."""

    def __init__(self, model: ModelProto, options: Any) -> None:
        import onnxruntime as ort

        from contlearn.edge.runner.options import open_options

        self.session = ort.InferenceSession(
            model.SerializeToString(), options or open_options(ort, {}, None), providers=["CPUExecutionProvider"]
        )
        self.takes = [node.name for node in self.session.get_inputs()]
        self.gives = [node.name for node in self.session.get_outputs()]

    def __call__(self, tensors: Tensors) -> Tensors:
        given = {name: tensors[name].numpy().copy() for name in self.takes}
        found = self.session.run(self.gives, given)
        for name, array in given.items():
            # ONNX Runtime lets BatchNormalization write new statistics over the old ones, the caller's own included.
            if not np.array_equal(array, tensors[name].numpy(), equal_nan=array.dtype.kind == "f"):
                raise ParityError(f"verify: the graph writes to its input {name!r}; expected it to leave inputs alone")
        return {name: torch.from_numpy(np.array(array)) for name, array in zip(self.gives, found, strict=True)}


def verify(step: Step, adapt: ModelProto, predict: ModelProto | None = None, *, many: bool = True) -> Report:
    """Compare a step's graphs, run by ONNX Runtime on the CPU, with the step itself.

    Args:
        step: as the strategy declares it.
        adapt: its lowered update.
        predict: its lowered prediction; ``None``: not looked at.
        many: take the many steps as well.

    Raises:
        ParityError: a loss, an update or logits that differ by more than they may; the message names the worst tensor.
            Or a graph that writes to its inputs.
    """
    report = examine(step, adapt, predict, many=many)
    if report.faults:
        raise ParityError(f"verify: {report.faults[0]}")
    return report


def examine(
    step: Step, adapt: ModelProto, predict: ModelProto | None = None, *, many: bool = True, options: Any = None
) -> Report:
    """The same, with what is wrong in the report's ``faults``.

    Args:
        step: as in :func:`verify`, and so are the others.
        adapt: see there.
        predict: see there.
        many: see there; many steps are taken where one holds.
        options: ``onnxruntime.SessionOptions``; default: those of the runner.

    Raises:
        ParityError: a graph that writes to its inputs: nothing that it computes can then be trusted.
    """
    graph, asked = _Graph(adapt, options), None if predict is None else _Graph(predict, options)

    def device(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        found = graph({**state, **given})
        moved = {name.removeprefix(NEW): value for name, value in found.items() if name.startswith(NEW)}
        return {name: value for name, value in found.items() if not name.startswith(NEW)}, {**state, **moved}

    def reference(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        outputs, moved = step.compute(state, given)
        return outputs, {**state, **{name: value.detach() for name, value in moved.items()}}

    report = Report(figures={"loss": 0.0, "update": 0.0, "logits": 0.0})
    apart = _perturbed(step.roles, step.state, 0.05, torch.Generator().manual_seed(0))
    # As shipped; and with teachers, anchors and weights apart and half of the classes old, so that every term acts.
    for state, given in ((step.state, step.examples(0)), (apart, inputs_of(step, 1))):
        _one_step(state, given, device, reference, report)
        if asked is not None:
            with torch.no_grad():
                wanted = step.predict(state, given)
            report.largest("logits", _relative(asked({**state, **given})["logits"], wanted))
    if not report.figures["logits"] <= LOGITS:
        found = report.figures["logits"]
        report.faults.append(f"logits of the prediction differ by {found:.1e}; expected {LOGITS:.0e}")
    if report.faults:
        return report
    report.tiers += (ONE_STEP,)
    if many and _many_steps(step, device, reference, report):
        report.tiers += (MANY_STEPS,)
    return report


def inputs_of(step: Step, seed: int) -> Tensors:
    """Made-up inputs for a stream in its middle: all classes met, the first half of them in earlier experiences."""
    made = step.examples(seed)
    generator = torch.Generator().manual_seed(seed)
    half = step.classes // 2
    for name, one in step.inputs.items():
        if one.meaning == "class_mask":
            made[name] = torch.ones(one.shape)
        elif one.meaning == "old_class_mask":
            made[name] = (torch.arange(step.classes) < half).float()
        elif one.meaning in ("labels", "memory_labels"):
            low = half if one.meaning == "labels" else 0
            made[name] = torch.randint(low, step.classes, one.shape, generator=generator)
    return made


def _perturbed(
    names: Mapping[str, str], state: Tensors, share: float, generator: torch.Generator,
    roles: tuple[str, ...] = ("weight",),
) -> Tensors:  # fmt: skip
    """A state with noise on what has one of ``roles``, ``share`` of each tensor's root mean square, or per value.

    Statistics are scaled one by one: a variance stays positive.
    """
    made = dict(state)
    for name, role in names.items():
        if role in roles:
            held = state[name]
            noise = torch.randn(held.shape, generator=generator, dtype=held.dtype)
            scale = held.square().mean().sqrt() if role == "weight" else held
            made[name] = held + share * scale * noise
    return made


class _Roundings:
    """One step of PyTorch in float64, and in float32 with its own rounding and others; computed once, if asked for."""

    def __init__(self, reference: Advance, state: Tensors, given: Tensors, own: tuple[Tensors, Tensors]) -> None:
        self.reference, self.state, self.given, self.own = reference, state, given, own
        self.kept: list[Tensors] = []

    def _runs(self) -> list[Tensors]:
        if not self.kept:
            with in_float64():
                runs = [self.reference(doubled(self.state), doubled(self.given)), self.own]
            for units, seed in _ROUNDINGS:
                with OtherRounding(seed, units):
                    runs.append(self.reference(self.state, self.given))
            self.kept = [{**moved, "loss": outputs["loss"]} for outputs, moved in runs]
        return self.kept

    def explain(self, name: str, found: Tensor) -> Rounding | None:
        """How far the graph's value is from float64's, where that is rounding; else ``None``."""
        exact, *in_float32 = (run[name].double() for run in self._runs())
        # Lengths, not shares of the update: PyTorch's may be 0 where the graph's is one unit in the last place.
        off = float((found.double() - exact).norm())
        offs = [float((one - exact).norm()) for one in in_float32]
        if not off <= ROUNDING * max(offs) < float("inf"):
            return None
        start = self.state[name].double() if name in self.state else torch.zeros(())
        moved = max(float((exact - start).norm()), torch.finfo(torch.float32).tiny)
        return Rounding(off / moved, offs[0] / moved, max(offs) / moved)


def _one_step(state: Tensors, given: Tensors, device: Advance, reference: Advance, report: Report) -> None:
    found, mine = device(state, given)
    wanted, theirs = reference(state, given)
    roundings = _Roundings(reference, state, given, (wanted, theirs))

    def is_rounding(name: str, value: Tensor) -> bool:
        explained = roundings.explain(name, value)
        if explained is not None:
            report.rounding[name] = max(report.rounding.get(name, explained), explained)
        return explained is not None

    loss, expected = float(found["loss"]), float(wanted["loss"])
    error = abs(loss - expected) / max(abs(expected), 1e-2)
    if error <= LOSS or not is_rounding("loss", torch.as_tensor(found["loss"])):
        report.largest("loss", error)
        if not error <= LOSS:
            report.faults.append(f"the loss of one step is {loss:.7g}, in PyTorch {expected:.7g}; expected {LOSS:.0e}")
    report.largest("logits", _relative(found["logits"], wanted["logits"]))
    errors = {name: _of_update(mine[name], theirs[name], state[name], theirs[name]) for name in state}
    for name in [name for name, error in errors.items() if not error <= UPDATE]:
        if is_rounding(name, mine[name]):
            del errors[name]
    worst = max(errors, key=lambda name: errors[name], default=None)
    if worst is not None:
        report.largest("update", errors[worst])
        if not errors[worst] <= UPDATE:
            report.faults.append(
                f"one step moves {worst!r} otherwise than PyTorch does, by {errors[worst]:.1e} of its update; "
                f"expected {UPDATE:.0e}"
            )


def _of_update(found: Tensor, wanted: Tensor, before: Tensor, after: Tensor) -> float:
    """L2 distance over the length of the update ``after - before``; infinite for NaN, and for what should not move."""
    off = float((found.double() - wanted.double()).norm())
    moved = float((after.double() - before.double()).norm())
    if off != off:
        return float("inf")
    return off / moved if moved else (0.0 if off == 0 else float("inf"))


def _many_steps(step: Step, device: Advance, reference: Advance, report: Report) -> bool:
    """Whether the tier is reached; not so where training diverges in PyTorch as well."""
    names = [name for name, role in step.roles.items() if role in ("weight", "statistic")]
    if not names:
        return True
    def end(advance: Advance, state: Tensors) -> Tensors:
        for number in range(STEPS):
            state = advance(state, inputs_of(step, 100 + number))[1]
        return state

    ends = {"device": end(device, dict(step.state)), "PyTorch": end(reference, dict(step.state))}
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        near = _perturbed(step.roles, step.state, PERTURBATION, generator, roles=("weight", "statistic"))
        # Frozen weights stand in no state; with a head alone to train, theirs is all the perturbation there is.
        with weights_off(step.model, PERTURBATION, generator):
            ends[f"control{seed}"] = end(reference, near)
    whole = {path: _joined(state, names) for path, state in ends.items()}
    if not all(bool(torch.isfinite(whole[path]).all()) for path in whole if path != "device"):
        return False
    drift = _relative(whole["device"], whole["PyTorch"])
    control = max(_relative(whole[path], whole["PyTorch"]) for path in ("control1", "control2"))
    report.figures["drift"], report.figures["control_drift"] = drift, control
    if drift <= max(FACTOR * control, FLOOR):
        return True
    worst = max(names, key=lambda name: _relative(ends["device"][name], ends["PyTorch"][name]))
    report.faults.append(
        f"after {STEPS} steps the weights are {drift:.1e} away from PyTorch's, those of a control perturbed by "
        f"{PERTURBATION:.0e} are {control:.1e} away; expected at most {FACTOR:g} times that (farthest: {worst!r})"
    )
    return False


def _joined(state: Tensors, names: list[str]) -> Tensor:
    return torch.cat([state[name].reshape(-1).double() for name in names])


def _relative(found: Any, wanted: Any) -> float:
    """L2 distance over the length of what was wanted; infinite for NaN."""
    length = float(wanted.double().norm())
    off = float((found.double() - wanted.double()).norm())
    return float("inf") if off != off else off / max(length, 1e-12)
