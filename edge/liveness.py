"""Planned memory of an ONNX graph: constants, inputs and outputs, and what is live at its worst moment.

The order is the file's own, which a runtime may change; scratch space of kernels is not in it. A bound to plan with,
always reported beside a measured peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from contlearn.errors import ContlearnError

if TYPE_CHECKING:
    from onnx import ModelProto

# These give their first input under another shape or name.
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclass(frozen=True)
class Plan:
    """Bytes of one graph.

    Attributes:
        constants: initializers.
        inputs: of the graph.
        outputs: of the graph; a runner holds them all the time (its second set of the state).
        activations: the largest sum of other values that are live at once.
    """

    constants: int
    inputs: int
    outputs: int
    activations: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.constants + self.inputs + self.outputs + self.activations


def plan(model: ModelProto) -> Plan:
    """The memory of a graph with fixed shapes.

    Raises:
        ContlearnError: a value whose shape is not fixed.
    """
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    sizes = {value.name: _bytes(value) for value in [*graph.input, *graph.output, *graph.value_info]}
    constants = {tensor.name: _size(tensor.data_type, tensor.dims) for tensor in graph.initializer}
    given, wanted = {value.name for value in graph.input}, {value.name for value in graph.output}
    owner: dict[str, str] = {}
    """Value -> the value whose memory it is."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.input):
            last[owner.get(name, name)] = index
        if node.op_type in _VIEWS and node.output[0] not in wanted:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    held = {*given, *wanted, *constants}
    live = most = 0
    alive: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name not in held and name not in owner:
                if name not in sizes:
                    raise ContlearnError(f"memory plan: {name!r} of {node.op_type} has no fixed shape; expected one")
                alive[name] = sizes[name]
                live += sizes[name]
        most = max(most, live)
        # What nobody reads is let go at once.
        for name in [name for name in alive if last.get(name, index) <= index]:
            live -= alive.pop(name)
    return Plan(
        constants=sum(constants.values()),
        inputs=sum(sizes[name] for name in given if name not in constants),
        outputs=sum(sizes[name] for name in wanted),
        activations=most,
    )


def _bytes(value: Any) -> int:
    kind = value.type.tensor_type
    if any(not d.HasField("dim_value") for d in kind.shape.dim):
        raise ContlearnError(f"memory plan: {value.name!r} has no fixed shape; expected one")
    return _size(kind.elem_type, [d.dim_value for d in kind.shape.dim])


def _size(kind: int, shape: Sequence[int]) -> int:
    from onnx import helper

    return math.prod(shape) * int(helper.tensor_dtype_to_np_dtype(kind).itemsize)
