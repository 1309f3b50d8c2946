"""Single values take the rank of what they meet: ONNX Runtime's loops are a hundred times slower where they do not.

Seen with onnxruntime 1.32 on a CPU: a weight (960, 160, 1, 1) times a value of shape () or (1,) takes 2 ms, times one
of shape (1, 1, 1, 1) 0.03 ms. Only shapes that end in 1 suffer, which every pointwise convolution's weight does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from contlearn.edge.operators import replace_nodes

if TYPE_CHECKING:
    from onnx import ModelProto

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Equal", "Greater", "Less",
                          "GreaterOrEqual", "LessOrEqual", "Where"})  # fmt: skip


def give_full_rank(model: ModelProto) -> None:
    """Reshape, in place, single values that meet a tensor of higher rank whose last axis has length 1."""
    import numpy as np
    from onnx import helper, numpy_helper, shape_inference

    shapes = _shapes(shape_inference.infer_shapes(model).graph)
    held = {value.name: value for value in model.graph.initializer}
    made: set[str] = set()
    nodes: list[Any] = []
    for node in model.graph.node:
        known = [shapes.get(name) for name in node.input]
        if node.op_type in _ELEMENTWISE and all(shape is not None for shape in known):
            rank = max(len(shape) for shape in known if shape is not None)
            long = any(shape and len(shape) == rank and shape[-1] == 1 and math.prod(shape) > 1 for shape in known)
            for index, (name, shape) in enumerate(zip(list(node.input), known, strict=True)):
                if not long or shape is None or math.prod(shape) != 1 or len(shape) == rank:
                    continue
                wide = f"{name}.rank{rank}"
                if wide not in made and name in held:
                    value = numpy_helper.to_array(held[name]).reshape([1] * rank)
                    model.graph.initializer.append(numpy_helper.from_array(value, wide))
                elif wide not in made:
                    to = f"ones.rank{rank}"
                    if to not in made:
                        made.add(to)
                        ones = numpy_helper.from_array(np.ones(rank, np.int64), to)
                        model.graph.initializer.append(ones)
                    nodes.append(helper.make_node("Reshape", [name, to], [wide]))
                made.add(wide)
                node.input[index] = wide
        nodes.append(node)
    replace_nodes(model, nodes)
    _drop_unread(model)


def _drop_unread(model: ModelProto) -> None:
    """Initialisers that no node reads any more."""
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [value for value in model.graph.initializer if value.name in read]
    if len(kept) < len(model.graph.initializer):
        copied = [type(value).FromString(value.SerializeToString()) for value in kept]
        del model.graph.initializer[:]
        model.graph.initializer.extend(copied)


def _shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of what has a fixed one."""
    found = {value.name: tuple(value.dims) for value in graph.initializer}
    for place in (*graph.input, *graph.output, *graph.value_info):
        kind = place.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[place.name] = tuple(d.dim_value for d in kind.shape.dim)
    return found
