"""A step as one functional ATen graph: forward, backward and update, without mutation.

``make_fx`` traces what the step's function computes; backward operators are replaced by the rules of the target's
profile while it traces.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from contlearn.edge import rules
from contlearn.edge.gaps import Gaps
from contlearn.edge.rules import convolution_forward
from contlearn.strategies.step import Step, Tensors, tracing

NEW = "new."
"""What the name of a state is prefixed with as an output."""


@dataclass(frozen=True)
class Captured:
    """A traced function of named tensors.

    Attributes:
        graph: takes the inputs in order and returns the outputs in order.
        inputs: names in order: states first.
        outputs: names in order.
        examples: inputs it was traced with, by name.
        profile: of the rules.
    """

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: Tensors
    profile: str

    def __call__(self, tensors: Tensors) -> Tensors:
        """Run it in PyTorch: outputs by name."""
        found = self.graph(*(tensors[name] for name in self.inputs))
        return dict(zip(self.outputs, found, strict=True))


def capture(step: Step, *, profile: str = "onnxruntime") -> Captured:
    """The whole step: states and inputs to ``loss``, ``logits`` and ``new.STATE`` of every state that moves.

    Args:
        step: as a strategy declares it.
        profile: target whose rules are used.

    Raises:
        Gaps: operators that have no rule for this target, all of them.
    """

    def function(named: Tensors) -> Tensors:
        outputs, moved = step.compute({n: named[n] for n in step.state}, {n: named[n] for n in step.inputs})
        return {**outputs, **{NEW + name: value for name, value in moved.items() if value is not named[name]}}

    return trace(function, {**step.state, **step.examples()}, profile=profile)


def capture_predict(step: Step, *, profile: str = "onnxruntime") -> Captured:
    """The prediction of a step: the states it reads and ``x`` (and ``class_mask``) to ``logits``."""
    given = {name: held for name, held in step.examples().items() if name in ("x", "class_mask")}

    def function(named: Tensors) -> Tensors:
        with torch.no_grad():
            return {"logits": step.predict({n: named[n] for n in step.state}, {n: named[n] for n in given})}

    return trace(function, {**step.state, **given}, profile=profile)


def trace(function: Callable[[Tensors], Tensors], examples: Tensors, *, profile: str) -> Captured:
    """Trace a function of named tensors and drop the inputs that it does not read.

    Args:
        function: from named tensors to named tensors; pure, but may mutate what it made itself.
        examples: inputs by name.
        profile: of the rules.
    """
    names = list(examples)
    outputs: list[str] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(dict(zip(names, tensors, strict=True)))
        outputs[:] = list(found)
        return tuple(found.values())

    held = [examples[name].detach().clone() for name in names]
    gaps: list[rules.Gap] = []
    with tracing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of make_fx about what it is itself
        # Twice: autograd first, since functionalize does not allow it inside; then mutation goes and rules come in.
        # BatchNorm's moving of its statistics stands in no schema: only its rule, applied at once, shows it.
        table = rules.table(profile, gaps=gaps)
        differentiated = make_fx(flat, decomposition_table=table)(*held)
        constants = _lift_constants(differentiated)
        chosen = convolution_forward.Chosen(differentiated, rules.PROFILES[profile], frozen=len(constants))
        pure = functionalize(chosen.run, remove="mutations")
        graph = make_fx(pure, decomposition_table=table)(*held, *constants)
    if gaps:
        raise Gaps([str(gap) for gap in dict.fromkeys(map(str, gaps))], profile)
    _tidy(graph)
    _lower_constants(graph, len(names), constants)
    read = [name for name, node in zip(names, _placeholders(graph), strict=True) if node.users]
    for node in _placeholders(graph):
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return Captured(graph, tuple(read), tuple(outputs), {name: examples[name] for name in read}, profile)


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make inputs of a graph's constants: functionalize follows what happens to its inputs alone."""
    found: dict[str, tuple[fx.Node, Tensor]] = {}
    last = next(node for node in graph.graph.nodes if node.op != "placeholder")
    lifted = []
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(value := attribute(graph, node.target), Tensor):
            if node.target not in found:
                with graph.graph.inserting_before(last):
                    found[node.target] = (graph.graph.placeholder(f"constant_{len(found)}"), value.detach())
            node.replace_all_uses_with(found[node.target][0])
            lifted.append(node)
    for node in lifted:  # at the end: the first of them may be `last`
        graph.graph.erase_node(node)
    graph.recompile()
    return [value for _, value in found.values()]


def attribute(graph: fx.GraphModule, path: str) -> object:
    """What a ``get_attr`` node stands for."""
    owner: object = graph
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


def _lower_constants(graph: fx.GraphModule, inputs: int, constants: list[Tensor]) -> None:
    """The other way round, for those that are still read."""
    for index, (node, value) in enumerate(zip(_placeholders(graph)[inputs:], constants, strict=True)):
        if node.users:
            name = f"constant_{index}"
            graph.register_buffer(name, value.clone())
            with graph.graph.inserting_after(_placeholders(graph)[-1]):
                node.replace_all_uses_with(graph.graph.get_attr(name))
        graph.graph.erase_node(node)
    graph.recompile()


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


_ALIASES = {
    torch.ops.aten.detach.default, torch.ops.aten.detach_.default, torch.ops.aten.alias.default,
    torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default,
}  # fmt: skip


def _tidy(graph: fx.GraphModule) -> None:
    """Drop what computes nothing and what nobody reads."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
