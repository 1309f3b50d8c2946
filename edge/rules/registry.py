"""Records of backward rules and target profiles, and the error for what no rule can treat.

A rule is a pure function over ATen operators: ``rule(profile, *arguments of the operator)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from contlearn.errors import ContlearnError, unknown_name

Decomposition = Callable[..., Any]


@dataclass(frozen=True)
class Profile:
    """What a target's runtime can execute; rules choose their form by it.

    Attributes:
        name: of the target.
        opset: of ONNX that its graphs are written in.
        allows_indices_pooling: MaxPool may give its Indices output.
        allows_scatter_reduce: ScatterElements and ScatterND may add.
        allows_dilated_dynamic_conv: Conv with run-time weights may be dilated.
        allows_batch_norm_op: BatchNormalization may take run-time statistics.
        allows_layer_norm_statistics: LayerNormalization may give its mean and inverse deviation.
        slow_depthwise: depthwise Conv with run-time weights is slower than products of matrices on small maps.
    """

    name: str
    opset: int
    allows_indices_pooling: bool
    allows_scatter_reduce: bool
    allows_dilated_dynamic_conv: bool
    allows_batch_norm_op: bool
    allows_layer_norm_statistics: bool
    slow_depthwise: bool


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("onnxruntime", 18, True, True, True, True, True, True),
        Profile("coreml", 18, False, True, False, False, False, False),
        Profile("tensorrt", 18, False, False, True, False, False, False),
    )
}


def profile(name: str) -> Profile:
    """The profile of a target.

    Raises:
        ContlearnError: no profile has this name.
    """
    if name not in PROFILES:
        raise unknown_name("target profile", name, PROFILES)
    return PROFILES[name]


class Gap(ContlearnError):
    """An operator that no rule can bring to a target, for the attributes it has here.

    Args:
        op: name of the ATen operator.
        attributes: those that are in the way.
        reason: why it cannot be done.
        way_out: what to change in the model or step.
    """

    def __init__(self, op: str, attributes: Mapping[str, object], reason: str, way_out: str) -> None:
        self.op, self.attributes, self.reason, self.way_out = op, dict(attributes), reason, way_out
        shown = ", ".join(f"{key}={value}" for key, value in attributes.items())
        super().__init__(f"aten.{op}({shown}): {reason}; {way_out}")


@dataclass(frozen=True)
class RuleInfo:
    """One rule as listed: operator (``aten.name.overload``), family, variants, profiles and what it does."""

    op: str
    family: str
    variant: str
    profiles: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Rule:
    """A function that replaces ``op``; it may return ``NotImplemented`` where the operator itself is the best form.

    Args:
        op: the ATen overload.
        function: called with the profile and then as ``op`` is called.
        variant: names of the forms it chooses from.
        description: what it computes, in a line.
        profiles: where it holds.
    """

    op: Any
    function: Decomposition
    variant: str
    description: str
    profiles: tuple[str, ...] = tuple(PROFILES)


class Registry(dict[tuple[Any, str], Rule]):
    """Rules of one family by operator and profile.

    Raises:
        ValueError: two rules for one operator under one profile (a programming error, found at import).
    """

    def __init__(self, family: str, rules: list[Rule]) -> None:
        super().__init__()
        self.family = family
        for rule in rules:
            for name in rule.profiles:
                if (rule.op, name) in self:
                    raise ValueError(f"two rules for {rule.op} under {name} in {family}")
                self[rule.op, name] = rule

    def infos(self) -> list[RuleInfo]:
        """One record per rule, in the order they were given."""
        unique = {id(rule): rule for rule in self.values()}.values()
        return [RuleInfo(str(rule.op), self.family, rule.variant, rule.profiles, rule.description) for rule in unique]


def merged(registries: tuple[Registry, ...]) -> dict[tuple[Any, str], Rule]:
    """All families in one.

    Raises:
        ValueError: two families claim one operator under one profile.
    """
    whole: dict[tuple[Any, str], Rule] = {}
    for registry in registries:
        for key, rule in registry.items():
            if key in whole:
                raise ValueError(f"two families have a rule for {key[0]} under {key[1]}")
            whole[key] = rule
    return whole


def bound(rule: Rule, target: Profile, gaps: list[Gap] | None) -> Decomposition:
    """The rule as a decomposition for ``make_fx``; gaps are raised, or collected where a list is given.

    A collected gap leaves its operator in the graph, so that the trace goes on to the next.
    """
    plain = partial(rule.function, target)
    if gaps is None:
        return plain

    def collecting(*args: Any, **kwargs: Any) -> Any:
        try:
            return plain(*args, **kwargs)
        except Gap as gap:
            gaps.append(gap)
            return NotImplemented

    return collecting


def refuse(op: Any, reason: str, way_out: str, *shown: str) -> Rule:
    """A rule that is a gap whatever the target; ``shown`` names the arguments to print."""
    names = [argument.name for argument in op._schema.arguments]

    def function(target: Profile, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        raise Gap(str(op).removeprefix("aten."), {key: given[key] for key in shown if key in given}, reason, way_out)

    return Rule(op, function, "refused", reason)

