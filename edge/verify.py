"""Does a lowered step compute what its strategy computes? One step tightly, many steps against a perturbation control.

Training is chaotic: after some steps two correct programs differ. What counts is that the graph strays no farther from
PyTorch than PyTorch strays from itself when its weights are off by a millionth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from contlearn.edge.capture import NEW
from contlearn.errors import ContlearnError
from contlearn.strategies.step import Step, Tensors

if TYPE_CHECKING:
    from onnx import ModelProto

RULES, ONE_STEP, MANY_STEPS = "rules", "one_step", "many_steps"
LOSS, UPDATE, LOGITS = 1e-5, 1e-3, 1e-4
"""Largest relative errors of one step."""
STEPS, PERTURBATION, FACTOR, FLOOR = 20, 1e-6, 2.0, 1e-6
"""Many steps: how many, the control's perturbation, how much farther than it, and below what nothing is said."""

Advance = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]


class ParityError(ContlearnError):
    """The graph does not compute what the strategy does."""


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        tiers: those reached.
        figures: largest errors seen, by name.
    """

    tiers: tuple[str, ...]
    figures: dict[str, float]


class _Graph:
    """An ONNX model as a function of named tensors."""

    def __init__(self, model: ModelProto) -> None:
        import onnxruntime as ort

        from contlearn.edge.runner.options import open_options

        self.session = ort.InferenceSession(
            model.SerializeToString(), open_options(ort, {}, None), providers=["CPUExecutionProvider"]
        )
        self.takes = [node.name for node in self.session.get_inputs()]
        self.gives = [node.name for node in self.session.get_outputs()]

    def __call__(self, tensors: Tensors) -> Tensors:
        found = self.session.run(self.gives, {name: tensors[name].numpy() for name in self.takes})
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
    """
    graph, asked = _Graph(adapt), None if predict is None else _Graph(predict)

    def device(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        found = graph({**state, **given})
        moved = {name.removeprefix(NEW): value for name, value in found.items() if name.startswith(NEW)}
        return {name: value for name, value in found.items() if not name.startswith(NEW)}, {**state, **moved}

    def reference(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        outputs, moved = step.compute(state, given)
        return outputs, {**state, **{name: value.detach() for name, value in moved.items()}}

    figures = {"loss": 0.0, "update": 0.0, "logits": 0.0}
    apart = _perturbed(step.roles, step.state, 0.05, torch.Generator().manual_seed(0))
    # As shipped; and with teachers, anchors and weights apart and half of the classes old, so that every term acts.
    for state, given in ((step.state, step.examples(0)), (apart, inputs_of(step, 1))):
        _one_step(step, state, given, device, reference, figures)
        if asked is None:
            continue
        with torch.no_grad():
            wanted = step.predict(state, given)
        figures["logits"] = max(figures["logits"], _relative(asked({**state, **given})["logits"], wanted))
    if not figures["logits"] <= LOGITS:
        raise ParityError(f"verify: logits of the prediction differ by {figures['logits']:.1e}; expected {LOGITS:.0e}")
    tiers: tuple[str, ...] = (RULES, ONE_STEP)
    if many and _many_steps(step, device, reference, figures):
        tiers += (MANY_STEPS,)
    return Report(tiers, figures)


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


def _perturbed(roles: Mapping[str, str], state: Tensors, share: float, generator: torch.Generator) -> Tensors:
    """A state with noise on its weights, ``share`` of each tensor's root mean square."""
    made = dict(state)
    for name, role in roles.items():
        if role == "weight":
            held = state[name]
            noise = torch.randn(held.shape, generator=generator, dtype=held.dtype)
            made[name] = held + share * held.square().mean().sqrt() * noise
    return made


def _one_step(
    step: Step, state: Tensors, given: Tensors, device: Advance, reference: Advance, figures: dict[str, float]
) -> None:
    found, mine = device(state, given)
    wanted, theirs = reference(state, given)
    loss, expected = float(found["loss"]), float(wanted["loss"])
    error = abs(loss - expected) / max(abs(expected), 1e-2)
    figures["loss"] = max(figures["loss"], error)
    if not error <= LOSS:
        raise ParityError(f"verify: the loss of one step is {loss:.7g}, in PyTorch {expected:.7g}; expected {LOSS:.0e}")
    figures["logits"] = max(figures["logits"], _relative(found["logits"], wanted["logits"]))
    worst, worst_name = 0.0, ""
    for name in step.state:
        off = float((mine[name] - theirs[name]).double().norm())
        # Where the update is smaller than what float32 can add to the value, there is nothing to compare.
        moved = float((theirs[name] - state[name]).double().norm())
        off = max(0.0, off - 5e-7 * float(state[name].double().norm())) if off == off else float("inf")
        error = off / moved if moved else (0.0 if off == 0 else float("inf"))
        if error > worst:
            worst, worst_name = error, name
    if worst > UPDATE and _noise(step, state, given, reference, theirs, mine, worst_name):
        worst = UPDATE
    figures["update"] = max(figures["update"], worst)
    if not worst <= UPDATE:
        raise ParityError(
            f"verify: one step moves {worst_name!r} otherwise than PyTorch does, by {worst:.1e} of its update; "
            f"expected {UPDATE:.0e}"
        )


def _noise(
    step: Step, state: Tensors, given: Tensors, reference: Advance, theirs: Tensors, mine: Tensors, name: str
) -> bool:
    """Whether PyTorch itself moves this tensor as differently when weights and frames are off by a millionth.

    So it is where a gradient is 0 but for rounding (a bias in front of BatchNorm) and Adam divides by its size.
    """
    off = float((mine[name] - theirs[name]).double().norm())
    control = 0.0
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        near = _perturbed({**step.roles, "x": "weight"}, {**state, "x": given["x"]}, PERTURBATION, generator)
        other = reference({key: near[key] for key in state}, {**given, "x": near["x"]})[1]
        control = max(control, float((other[name] - theirs[name]).double().norm()))
    return off <= FACTOR * control


def _many_steps(step: Step, device: Advance, reference: Advance, figures: dict[str, float]) -> bool:
    """Whether the tier is reached; not so where training diverges in PyTorch as well."""
    names = [name for name, role in step.roles.items() if role in ("weight", "statistic")]
    if not names:
        return True
    paths = {
        "device": (device, dict(step.state)),
        "PyTorch": (reference, dict(step.state)),
    }
    for seed in (1, 2):
        near = _perturbed(step.roles, step.state, PERTURBATION, torch.Generator().manual_seed(seed))
        paths[f"control{seed}"] = (reference, near)
    ends = {}
    for path, (advance, state) in paths.items():
        for number in range(STEPS):
            state = advance(state, inputs_of(step, 100 + number))[1]
        ends[path] = state
    whole = {path: _joined(state, names) for path, state in ends.items()}
    if not all(bool(torch.isfinite(whole[path]).all()) for path in whole if path != "device"):
        return False
    drift = _relative(whole["device"], whole["PyTorch"])
    control = max(_relative(whole[path], whole["PyTorch"]) for path in ("control1", "control2"))
    figures["drift"], figures["control_drift"] = drift, control
    if drift <= max(FACTOR * control, FLOOR):
        return True
    worst = max(names, key=lambda name: _relative(ends["device"][name], ends["PyTorch"][name]))
    raise ParityError(
        f"verify: after {STEPS} steps the weights are {drift:.1e} away from PyTorch's, those of a control perturbed by "
        f"{PERTURBATION:.0e} are {control:.1e} away; expected at most {FACTOR:g} times that (farthest: {worst!r})"
    )


def _joined(state: Tensors, names: list[str]) -> Tensor:
    return torch.cat([state[name].reshape(-1).double() for name in names])


def _relative(found: Any, wanted: Any) -> float:
    """L2 distance over the length of what was wanted; infinite for NaN."""
    length = float(wanted.double().norm())
    off = float((found.double() - wanted.double()).norm())
    return float("inf") if off != off else off / max(length, 1e-12)
