"""Depthwise convolutions by weights that train, as products of matrices where the runtime's own is slow.

ONNX Runtime has a fast depthwise kernel for weights that are constants. With weights as inputs it copies windows,
channel by channel; docs/edge_rules.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from contlearn.edge.rules.convolution_weight import SMALL_MAPS, Geometry, meets, pixel_picks
from contlearn.edge.rules.registry import Profile
from contlearn.edge.rules.shapes import constant, numbers, padded, strided

aten = torch.ops.aten

# Columns in times columns out up to which a product per kernel row is faster, by the length of the kernel.
_COLUMNS = {3: 150, 5: 300, 7: 300}


def by_pixels(x: Tensor, weight: Tensor, how: Geometry) -> Tensor:
    """On small maps: the weights laid out as a matrix of all pixels by all pixels, per channel."""
    batch, channels, *size = x.shape
    out = _out(size, how)
    kernel, into, outof = math.prod(how.kernel), math.prod(size), math.prod(out)
    laid = pixel_picks(size, out, how, weight.dtype).permute(2, 0, 1).reshape(kernel, into * outof)
    matrix = torch.matmul(weight.reshape(channels, kernel), laid).reshape(channels, into, outof)
    passed = x.transpose(0, 1).reshape(channels, batch, into)
    return torch.matmul(passed, matrix).transpose(0, 1).reshape([batch, channels, *out])


def by_rows(x: Tensor, weight: Tensor, how: Geometry) -> Tensor:
    """Per kernel row, a product with a band matrix of all columns by all columns."""
    batch, channels, height, width = x.shape
    out = _out([height, width], how)
    columns = meets(width, out[1], how.kernel[1], how.stride[1], how.padding[1], how.dilation[1])
    laid = constant(columns, weight.dtype).permute(2, 0, 1).reshape(how.kernel[1], width * out[1])
    bands = torch.matmul(weight.reshape(-1, how.kernel[1]), laid)
    bands = bands.reshape(channels, how.kernel[0], width, out[1])
    reach = (out[0] - 1) * how.stride[0] + how.dilation[0] * (how.kernel[0] - 1) + 1
    whole = padded(x.transpose(0, 1), [0, 0, how.padding[0], max(reach - how.padding[0] - height, 0)])
    total: Tensor | None = None
    for row in range(how.kernel[0]):
        part = strided(whole, 2, row * how.dilation[0], out[0], how.stride[0])
        product = torch.matmul(part.reshape(channels, batch * out[0], width), bands.select(1, row))
        total = product if total is None else total + product
    assert total is not None
    return total.reshape(channels, batch, *out).transpose(0, 1)


FORMS: dict[str, Callable[[Tensor, Tensor, Geometry], Tensor]] = {"pixels": by_pixels, "rows": by_rows}


def choose(target: Profile, x: Sequence[int], weight: Sequence[int], how: Geometry) -> str:
    """The name of the form for these shapes; empty where the operator itself is best."""
    depthwise = how.groups == x[1] == weight[0] > 1
    if not (target.slow_depthwise and depthwise and len(how.kernel) == 2):
        return ""
    out = _out(x[2:], how)
    if math.prod(x[2:]) * math.prod(out) <= SMALL_MAPS:
        return "pixels"
    return "rows" if x[3] * out[1] <= _COLUMNS.get(how.kernel[1], 0) else ""


def _out(size: Sequence[int], how: Geometry) -> list[int]:
    return [
        (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for n, padding, dilation, kernel, stride in zip(
            size, how.padding, how.dilation, how.kernel, how.stride, strict=True
        )
    ]


class Chosen(fx.Interpreter):
    """Runs a traced graph with the chosen form in place of each convolution by a weight that is no constant.

    Args:
        graph: its last inputs are the constants.
        target: profile.
        frozen: how many constants.
    """

    def __init__(self, graph: fx.GraphModule, target: Profile, *, frozen: int) -> None:
        super().__init__(graph)
        self.target = target
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.fixed = set(placeholders[len(placeholders) - frozen :])

    def run_node(self, n: fx.Node) -> Any:
        """As the base class, but for those convolutions."""
        if n.target is not aten.convolution.default or n.args[6] or n.args[1] in self.fixed:
            return super().run_node(n)
        (x, weight, bias, stride, padding, dilation, _, _, groups), _ = self.fetch_args_kwargs_from_env(n)
        axes = weight.ndim - 2
        how = Geometry(
            tuple(weight.shape[2:]), tuple(numbers(stride, axes)), tuple(numbers(padding, axes)),
            tuple(numbers(dilation, axes)), groups,
        )  # fmt: skip
        form = choose(self.target, x.shape, weight.shape, how)
        if not form:
            return super().run_node(n)
        out = FORMS[form](x, weight, how)
        return out if bias is None else out + bias.reshape(1, -1, 1, 1)
