"""Operators of our own in a traced graph, each one node of standard ONNX.

ATen has no operator for what some ONNX nodes give. A rule writes the operator here, PyTorch computes it as below, and
:data:`TRANSLATIONS` tells ``torch.onnx`` the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from contlearn.errors import ContlearnError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


@torch.library.custom_op("contlearn::batch_norm_with_statistics", mutates_args=())
def batch_norm_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise ``x`` (batch, channels, ...) by its batch; also its mean and biased variance, each (channels,).

    The running statistics are not used, and must not be constants (see :func:`protect_statistics`).
    """
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    return torch.ops.aten.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0], mean, variance


@batch_norm_with_statistics.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _batch_normalization(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: float) -> Any:
    from onnxscript import opset18 as op

    # With a momentum of 0 the running statistics that come out are the batch's own, whatever finite ones go in.
    return op.BatchNormalization(
        x, weight, bias, running_mean, running_var, epsilon=eps, momentum=0.0, training_mode=1
    )


def protect_statistics(model: ModelProto, expected: int) -> None:
    """Give each BatchNormalization in training mode, in place, running statistics that it may write to.

    ONNX Runtime computes the new ones in the memory of the old ones, even where these are the caller's inputs. A
    product by a number that occurs once is an intermediate that no other node can share.

    Args:
        model: straight from ``torch.onnx``.
        expected: how many such nodes there must be.

    Raises:
        ContlearnError: ``torch.onnx``'s optimizer took some for evaluation mode and folded them into a convolution, as
            it does where the statistics are constants.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    nodes = list(model.graph.node)
    training = [node for node in nodes if any(a.name == "training_mode" and a.i for a in node.attribute)]
    if len(training) != expected:
        folded = expected - len(training)
        raise ContlearnError(f"export: {folded} of {expected} BatchNormalization in training mode were folded away")
    for number, node in enumerate(training, 1):
        factor = f"statistics.factor{number}"
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(1 + number / 4096, np.float32), factor))
        for place, name in ((3, "mean"), (4, "var")):
            own = f"statistics.{name}{number}"
            nodes.insert(nodes.index(node), helper.make_node("Mul", [node.input[place], factor], [own]))
            node.input[place] = own
    replace_nodes(model, nodes)


def replace_nodes(model: ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Put ``nodes``, some of which may be the model's own, in place of its nodes."""
    copied = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copied)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.contlearn.batch_norm_with_statistics.default: _batch_normalization,
}
"""ONNX forms by operator, for ``torch.onnx.export``."""
