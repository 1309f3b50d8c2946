"""How scaling a weight scales each tensor of a traced network: degrees of homogeneity, operator by operator.

A tensor has degree k in a group of parameters when multiplying all of them by c > 0 multiplies it by c^k. NaN marks
"mixed" (no such k); an operator without a rule makes every dependence mixed, which errs on the safe side.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.fx import Graph, Node


@dataclass
class Degrees:
    """What is known of one tensor.

    Attributes:
        of: degree in each group ``(groups,)``; NaN where it is mixed.
        reached: whether the tensor depends on each group ``(groups,)``.
        zero: whether it is all zeros, and so of every degree at once.
    """

    of: np.ndarray
    reached: np.ndarray
    zero: bool = False

    def scaled(self, factor: float) -> Degrees:
        """The same dependence at ``factor`` times the degree."""
        return Degrees(self.of * factor, self.reached, self.zero)


Rule = Callable[["Interpreter", Node], Any]
"""Degrees of a node's result: of one tensor, or a list of several."""


@dataclass
class BatchNormCall:
    """One call of a BatchNorm in training mode: the nodes of its running statistics, and its input's degrees."""

    mean: Node
    variance: Node
    degrees: np.ndarray


@dataclass
class Interpreter:
    """Walks a functional ATen graph and gives every node its degrees.

    Args:
        groups: number of groups of parameters.
        known: degrees of the graph's inputs.
        rules: by the operator's name; without one, all tensor arguments must have degree 0.

    Attributes:
        values: degrees by node; a list where an operator gives several tensors.
        batch_norms: the BatchNorms met that keep running statistics.
    """

    groups: int
    known: dict[Node, Degrees]
    rules: Mapping[str, Rule]
    values: dict[Node, Any] = field(default_factory=dict)
    batch_norms: list[BatchNormCall] = field(default_factory=list)

    def constant(self, *, zero: bool = False) -> Degrees:
        """A tensor that depends on no group."""
        return Degrees(np.zeros(self.groups), np.zeros(self.groups, dtype=bool), zero)

    def run(self, graph: Graph) -> list[Degrees]:
        """Degrees of the tensors the graph returns, in order."""
        outputs: list[Degrees] = []
        for node in graph.nodes:
            if node.op == "output":
                outputs = [self.of(argument) for argument in node.all_input_nodes]
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            else:
                self.values[node] = self.known.get(node, self.constant())
        return outputs

    def of(self, argument: Any) -> Degrees:
        """Degrees of an argument; of a number, or of nothing, those of a constant."""
        value = self.values.get(argument) if isinstance(argument, Node) else None
        if isinstance(value, list):
            return value[0]  # type: ignore[no-any-return]
        if value is None:
            number = isinstance(argument, bool | int | float)
            return self.constant(zero=number and argument == 0)
        return value  # type: ignore[no-any-return]

    def _call(self, node: Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            held = self.values.get(source) if isinstance(source, Node) else None
            if not isinstance(held, list):
                return held
            return held[min(index, len(held) - 1)] if isinstance(index, int) else held[0]
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        rule = self.rules.get(name.rstrip("_") if not name.startswith("_") else name)
        return self.invariant(*self.tensors(node)) if rule is None else rule(self, node)

    # -------------------------------------------------------------- ways to combine

    def tensors(self, node: Node, *but: Any) -> list[Degrees]:
        """Degrees of all tensor arguments except those given."""
        return [self.of(argument) for argument in node.all_input_nodes if argument not in but]

    def equal(self, *values: Degrees) -> Degrees:
        """A sum: of one degree where all summands have it, mixed elsewhere."""
        summands = [value for value in values if not value.zero]
        if not summands:
            return values[0]
        of = summands[0].of
        for other in summands[1:]:
            of = np.where(of == other.of, of, np.nan)
        return Degrees(of, union(values))

    def product(self, *values: Degrees) -> Degrees:
        """A product: degrees add."""
        of = sum((value.of for value in values), np.zeros(self.groups))
        return Degrees(of, union(values), any(value.zero for value in values))

    def invariant(self, *values: Degrees) -> Degrees:
        """Any function: degree 0 where all arguments have it, mixed elsewhere."""
        of = np.zeros(self.groups)
        for value in values:
            if not value.zero:
                of = np.where(value.of == 0, of, np.nan)
        return Degrees(of, union(values) if values else self.constant().reached)


def union(values: Sequence[Degrees]) -> np.ndarray:
    """The groups any of ``values`` depends on ``(groups,)``."""
    reached: np.ndarray = np.logical_or.reduce([value.reached for value in values])
    return reached
