"""Which weights of a network may be rescaled without changing what it computes, read off its graph (arXiv 2407.01800).

The features (or the output, of a model that has none) are traced in training mode to a functional ATen graph, and each
weight's degree of homogeneity is followed to its end: a weight is scale-invariant when it reaches it with degree 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from contlearn.errors import ContlearnError
from contlearn.strategies.homogeneity import BatchNormCall, Degrees, Interpreter
from contlearn.strategies.homogeneity_rules import RULES
from contlearn.strategies.norm_layers import norm_pairs
from contlearn.strategies.probe import Features, place_of, shape_of


@dataclass(frozen=True)
class Statistic:
    """A BatchNorm that sees a scaled input: scale its mean by c^degree and its variance by c^(2 degree)."""

    mean: str
    variance: str
    degree: float


@dataclass(frozen=True)
class Group:
    """Parameters that are scaled together.

    Attributes:
        parameters: their names, as ``model.named_parameters()`` gives them.
        invariant: whether scaling all of them by one c > 0 leaves the output as it is.
        statistics: the BatchNorms whose running statistics must follow, so that evaluation mode agrees too.
    """

    parameters: tuple[str, ...]
    invariant: bool
    statistics: tuple[Statistic, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """Every weight matrix and every scale/offset pair of a normalisation, in the order of the model's parameters.

    Attributes:
        matrices: one group per parameter of at least two dimensions.
        pairs: one group per normalisation with a learnable scale (and offset).
    """

    matrices: tuple[Group, ...]
    pairs: tuple[Group, ...]


def analyse(model: nn.Module, *, input_shape: Sequence[int] | None = None) -> Analysis:
    """Find the scale-invariant weights and pairs of ``model``, which is left as it is.

    Args:
        model: any network; of one with a method ``features(x)`` only that part is looked at.
        input_shape: ``(channels, height, width)``; default: the model's own.

    Raises:
        ContlearnError: a model that cannot be traced, or whose input shape is not known.
    """
    shared = dict(model.named_parameters())
    matrices = [(name,) for name, parameter in shared.items() if parameter.ndim >= 2]
    pairs = norm_pairs(model)
    found = degrees(model, [*matrices, *pairs], input_shape=input_shape)
    return Analysis(found[: len(matrices)], found[len(matrices) :])


def degrees(
    model: nn.Module, groups: Sequence[Sequence[str]], *, input_shape: Sequence[int] | None = None
) -> tuple[Group, ...]:
    """The same for any groups of parameters, each scaled by one common factor.

    Raises:
        ContlearnError: as :func:`analyse`.
    """
    names, traced = _traced(model, shape_of(model, input_shape))
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    name_of = dict(zip(placeholders, names, strict=False))  # the last one is the input
    member = {name: [i for i, group in enumerate(groups) if name in group] for name in names}
    known = {}
    for node, name in name_of.items():
        of = np.zeros(len(groups))
        of[member[name]] = 1.0
        known[node] = Degrees(of, of > 0)
    interpreter = Interpreter(len(groups), known, RULES)
    outputs = interpreter.run(traced.graph)
    invariant = np.ones(len(groups), dtype=bool)
    reached = np.zeros(len(groups), dtype=bool)
    for value in outputs:
        invariant &= value.of == 0
        reached |= value.reached
    result = []
    for index, group in enumerate(groups):
        free = bool(invariant[index] and reached[index])
        statistics = _statistics(interpreter.batch_norms, index, name_of) if free else ()
        # Statistics that would have to follow in two ways at once cannot follow.
        result.append(Group(tuple(group), free and statistics is not None, statistics or ()))
    return tuple(result)


def _statistics(
    calls: Sequence[BatchNormCall], group: int, name_of: dict[Node, str]
) -> tuple[Statistic, ...] | None:
    found: dict[str, Statistic] = {}
    for call in calls:
        degree = float(call.degrees[group])
        mean, variance = (_buffer(node, name_of) for node in (call.mean, call.variance))
        if mean is None or variance is None:
            continue
        if np.isnan(degree):
            return None
        statistic = Statistic(mean, variance, degree)
        if found.setdefault(mean, statistic) != statistic:
            return None  # one BatchNorm called on inputs of different degrees
    return tuple(statistic for statistic in found.values() if statistic.degree)


def _buffer(node: Node, name_of: dict[Node, str]) -> str | None:
    """The buffer a running statistic is, also when an earlier call has updated it."""
    seen = 0
    while node not in name_of and seen < 100:
        seen += 1
        if not node.args or not isinstance(node.args[0], Node):
            return None
        source = node.args[0]
        index = node.args[1] if len(node.args) > 1 else None
        if index in (3, 4) and len(source.args) > 4:  # getitem of a functional BatchNorm
            source = source.args[index]  # type: ignore[index, assignment]
        node = source
    return name_of.get(node)


def _traced(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[list[str], GraphModule]:
    """The model's graph over fake tensors, and the names of its first inputs: parameters, then buffers."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call, functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    wrapper = Features(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = list(tensors)

    def call(values: list[Tensor], x: Tensor) -> Any:
        held = {f"model.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(wrapper, held, (x,))

    modes = {module: module.training for module in model.modules()}
    # Layers with statistics of their own kind scale as BatchNorm does, and are looked at as such.
    special = [module for module in model.modules() if getattr(module, "analysed", None) is False]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _, dtype = place_of(model)
    model.train()
    for module in special:
        module.analysed = True  # type: ignore[assignment]
    try:
        with torch.no_grad(), fake:
            # On the CPU whatever the model's device: the graph, and with it the result, is then the same everywhere.
            values = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors.values()]
            x = torch.empty(2, *input_shape, dtype=dtype, device="cpu")
            traced = make_fx(functionalize(call), tracing_mode="real", _allow_non_fake_inputs=True)(values, x)
    except Exception as error:  # a foreign forward may fail in any way
        raise ContlearnError(
            f"nap: {type(model).__name__} cannot be traced on inputs of shape {tuple(input_shape)} "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
        for module in special:
            module.analysed = False  # type: ignore[assignment]
    return names, traced
