"""From a captured step to ONNX: standard operators of the default domain, fixed shapes, any gap named at once."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from contlearn.edge import rules
from contlearn.edge.capture import Captured
from contlearn.edge.gaps import Gaps
from contlearn.errors import ContlearnError

if TYPE_CHECKING:
    from onnx import ModelProto

_NEAR = 4
"""Nodes between an operator and the state that tells its layer, at most."""


def lower(captured: Captured) -> ModelProto:
    """The ONNX model of a captured step, inputs and outputs by their names.

    Raises:
        Gaps: operators that ``torch.onnx`` has no form for, all of them at once; or a node that the profile forbids.
    """
    import onnx

    _refuse_unknown(captured)
    examples = tuple(captured.examples[name].detach().clone() for name in captured.inputs)
    with _quiet():
        program = torch.onnx.export(
            captured.graph,
            examples,
            input_names=list(captured.inputs),
            output_names=list(captured.outputs),
            opset_version=rules.PROFILES[captured.profile].opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    _named(model, captured)
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]  # names of files on the exporting machine
        node.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    check(model, captured.profile)
    return model


def _named(model: ModelProto, captured: Captured) -> None:
    """Give inputs and outputs the names asked for: an output that is also another, or an input, gets a node."""
    from onnx import helper

    for place, name in zip(model.graph.output, captured.outputs, strict=True):
        if place.name != name:
            model.graph.node.append(helper.make_node("Identity", [place.name], [name]))
            place.name = name
    given = [place.name for place in model.graph.input]
    if given != list(captured.inputs):
        raise ContlearnError(f"export: torch.onnx renamed inputs: expected {captured.inputs}, got {given}")


def check(model: ModelProto, profile: str) -> None:
    """Look at a finished model: default domain, fixed shapes, and what the profile rules out.

    Raises:
        Gaps: what is wrong, all at once.
    """
    allowed = rules.PROFILES[profile]
    found: list[str] = []
    for node in model.graph.node:
        where = f"{node.op_type} ({node.name or node.output[0]})"
        if node.domain not in ("", "ai.onnx"):
            found.append(f"{where} is of domain {node.domain!r}")
        if node.op_type == "MaxPool" and len(node.output) > 1 and not allowed.allows_indices_pooling:
            found.append(f"{where} gives indices")
        reduces = any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute)
        if node.op_type.startswith("Scatter") and reduces and not allowed.allows_scatter_reduce:
            found.append(f"{where} reduces")
    for place in [*model.graph.input, *model.graph.output]:
        if any(not d.HasField("dim_value") for d in place.type.tensor_type.shape.dim):
            found.append(f"{place.name} has no fixed shape")
    if model.functions:
        found.append(f"functions of its own: {', '.join(f.name for f in model.functions)}")
    if found:
        raise Gaps(found, profile)


def _refuse_unknown(captured: Captured) -> None:
    """All operators without an ONNX form, before the exporter stops at the first."""
    known = _registered()
    if known is None:
        return
    unknown: Counter[Any] = Counter()
    layers: dict[Any, str] = {}
    for node in captured.graph.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not known(node.target):
            unknown[node.target] += 1
            layers.setdefault(node.target, layer_of(node, captured))
    if unknown:
        lines = [
            f"{op} ({count} times{f', first in {layers[op]}' if layers[op] else ''}): replace the layer, or add a rule "
            "to contlearn.edge.rules"
            for op, count in unknown.items()
        ]
        raise Gaps(lines, captured.profile)


def layer_of(node: fx.Node, captured: Captured) -> str:
    """Name of the layer a node belongs to: of the nearest state it is computed from; empty where none is near."""
    names = dict(zip((n for n in captured.graph.graph.nodes if n.op == "placeholder"), captured.inputs, strict=True))
    seen, front = {node}, [node]
    for _ in range(_NEAR):
        front = [one for behind in front for one in behind.all_input_nodes if one not in seen]
        seen.update(front)
        for one in front:
            name: str = names.get(one, "")
            if "." in name:
                return name.rpartition(".")[0]
    return ""


def _registered() -> Any:
    """Whether ``torch.onnx`` knows an operator; ``None`` where this release of torch does not tell."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        registry = ONNXRegistry.from_torchlib()
    except (ImportError, AttributeError):
        return None
    decomposed = set(torch.export.default_decompositions())

    def known(op: Any) -> bool:
        return registry.is_registered(op) or op in decomposed

    return known


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks to standard output and its logger."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
