"""Degrees of homogeneity through each ATen operator: one rule per operator, in a table by name."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from contlearn.strategies.homogeneity import BatchNormCall, Degrees, Interpreter, Rule, union

EPSILON = 1e-3
"""Largest constant that counts as the epsilon of a normalisation (EfficientNet-Lite's BatchNorms have 1e-3)."""


def _argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _opaque(it: Interpreter, node: Node) -> Any:
    return it.invariant(*it.tensors(node))


def _keep(it: Interpreter, node: Node) -> Any:
    """Linear or positively homogeneous in the first argument; every other one must not scale."""
    main = node.args[0]
    other = it.tensors(node, main)
    value = it.of(main)
    if not other:
        return value
    return Degrees(it.product(value, it.invariant(*other)).of, union([value, *other]), value.zero)


def _pool(it: Interpreter, node: Node) -> Any:
    value = _keep(it, node)
    return [value, it.product(value, value.scaled(-1.0))]  # where the maximum sits does not scale


def _power(factor: float) -> Rule:
    return lambda it, node: it.of(node.args[0]).scaled(factor)


def _pow(it: Interpreter, node: Node) -> Any:
    base, exponent = node.args[0], node.args[1]
    if isinstance(base, Node) and isinstance(exponent, int | float):
        return it.of(base).scaled(float(exponent))
    return _opaque(it, node)


def _sum(it: Interpreter, node: Node) -> Any:
    left, right = node.args[0], node.args[1]
    if isinstance(right, int | float) and 0 < right <= EPSILON and _second_moment(left) and _is_divided_by(node):
        return it.of(left)  # the epsilon of a normalisation written out
    return it.equal(it.of(left), it.of(right))


def _multiply(it: Interpreter, node: Node) -> Any:
    return it.product(*(it.of(a) if isinstance(a, Node) else it.constant() for a in node.args[:2]))


def _divide(it: Interpreter, node: Node) -> Any:
    left, right = (it.of(a) if isinstance(a, Node) else it.constant() for a in node.args[:2])
    rounding = node.kwargs.get("rounding_mode")
    return it.product(left, right.scaled(-1.0)) if rounding is None else _opaque(it, node)


def _affine_product(it: Interpreter, node: Node) -> Any:
    bias, left, right = node.args[:3]
    return it.equal(it.of(bias), it.product(it.of(left), it.of(right)))


def _matrix_product(it: Interpreter, node: Node) -> Any:
    return it.product(it.of(node.args[0]), it.of(node.args[1]))


def _convolution(it: Interpreter, node: Node) -> Any:
    product = _matrix_product(it, node)
    bias = _argument(node, 2, "bias")
    return product if bias is None else it.equal(product, it.of(bias))


def _joined(it: Interpreter, node: Node) -> Any:
    return it.equal(*(it.of(part) for part in node.args[0]))  # type: ignore[union-attr]


def _same(it: Interpreter, node: Node) -> Any:
    return it.equal(it.of(node.args[0]), it.of(node.args[1]))


def _extreme(it: Interpreter, node: Node) -> Any:
    return _pool(it, node) if len(node.all_input_nodes) == 1 else _same(it, node)


def _where(it: Interpreter, node: Node) -> Any:
    condition, left, right = node.args[:3]
    return it.product(it.invariant(it.of(condition)), it.equal(it.of(left), it.of(right)))


def _padded(it: Interpreter, node: Node) -> Any:
    return _keep(it, node) if _argument(node, 2, "value", 0) == 0 else _opaque(it, node)


def _threshold(it: Interpreter, node: Node) -> Any:
    return _keep(it, node) if tuple(node.args[1:3]) == (0, 0) else _opaque(it, node)


def _clamp(it: Interpreter, node: Node) -> Any:
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    if high is None and isinstance(low, int | float):
        if low == 0:
            return _keep(it, node)
        if 0 < low <= EPSILON and _second_moment(node.args[0]):
            return it.of(node.args[0])
    return _opaque(it, node)


def _filled(it: Interpreter, node: Node) -> Any:
    value = _argument(node, 2 if "new" in str(node.target) else 1, "fill_value")
    return it.constant(zero=value == 0)


def _zeros(it: Interpreter, node: Node) -> Any:
    return it.constant(zero=True)


def _independent(it: Interpreter, node: Node) -> Any:
    return it.constant()


def _variance(it: Interpreter, node: Node) -> Any:
    return it.of(node.args[0]).scaled(2.0)


def _variance_and_mean(it: Interpreter, node: Node) -> Any:
    return [_variance(it, node), it.of(node.args[0])]


def _normalised(it: Interpreter, source: Any, scale: Any, offset: Any) -> list[Degrees]:
    """A normalisation takes a known degree k to 0; its mean has degree k and its inverse deviation -k."""
    value = it.of(source)
    result = it.product(value, value.scaled(-1.0))
    if scale is not None:
        result = it.product(result, it.of(scale))
    if offset is not None:
        result = it.equal(result, it.of(offset))
    return [result, value, value.scaled(-1.0)]


def _layer_norm(it: Interpreter, node: Node) -> Any:
    return _normalised(it, node.args[0], _argument(node, 2, "weight"), _argument(node, 3, "bias"))


def _group_norm(it: Interpreter, node: Node) -> Any:
    return _normalised(it, node.args[0], _argument(node, 1, "weight"), _argument(node, 2, "bias"))


def _rms_norm(it: Interpreter, node: Node) -> Any:
    return _normalised(it, node.args[0], _argument(node, 2, "weight"), None)


def _batch_norm(it: Interpreter, node: Node) -> Any:
    source, scale, offset = node.args[:3]
    statistics = [a for a in node.args[3:5] if isinstance(a, Node)]
    training = next((a for a in node.args[3:] if isinstance(a, bool)), True)
    if not training:  # fixed statistics do not follow the input
        shifted = it.equal(it.of(source), it.constant())
        scaled = it.product(shifted, it.of(scale)) if scale is not None else shifted
        return [it.equal(scaled, it.of(offset)) if offset is not None else scaled, it.constant()]
    if len(statistics) == 2:
        it.batch_norms.append(BatchNormCall(statistics[0], statistics[1], it.of(source).of))
    y, mean, deviation = _normalised(it, source, scale, offset)
    # The functional form also returns the new running statistics.
    return [y, mean, deviation, mean, mean.scaled(2.0)]


def _attention(it: Interpreter, node: Node) -> Any:
    query, key, value = node.args[:3]
    weights = it.invariant(it.of(query), it.of(key), *it.tensors(node, query, key, value))
    return [it.product(weights, it.of(value)), it.invariant(weights)]


def _prelu(it: Interpreter, node: Node) -> Any:
    return it.product(it.of(node.args[0]), it.invariant(it.of(node.args[1])))


_OF_PLACES = frozenset((
    "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "mean", "sum", "clone", "detach", "alias",
    "permute", "transpose", "t", "_to_copy", "amax", "slice", "select",
))  # fmt: skip


def _second_moment(source: Any) -> bool:
    """Whether a node is a variance, a mean of squares or a norm: what an epsilon may be added to."""
    while isinstance(source, Node):
        if source.target is operator.getitem:
            source = source.args[0] if source.args[1] == 0 else None
            continue
        name = getattr(getattr(source.target, "overloadpacket", None), "__name__", "")
        if name in ("var", "var_mean", "square", "linalg_vector_norm", "norm", "std"):
            return True
        if name == "pow":
            return bool(source.args[1] == 2)
        if name == "mul":
            return source.args[0] is source.args[1]
        if name not in _OF_PLACES:
            return False
        source = source.args[0]
    return False


def _is_divided_by(node: Node) -> bool:
    """Whether a node is only ever a divisor or under a root."""
    for user in node.users:
        name = getattr(getattr(user.target, "overloadpacket", None), "__name__", "")
        divisor = name == "div" and user.args[1] is node and user.args[0] is not node
        if not (divisor or name in ("rsqrt", "sqrt", "reciprocal")):
            return False
    return bool(node.users)


_KEEPING = (
    "view", "_unsafe_view", "_reshape_alias", "reshape", "t", "transpose", "permute", "expand", "slice", "select",
    "unsqueeze", "squeeze", "clone", "detach", "alias", "contiguous", "relu", "leaky_relu", "mean", "sum",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "abs", "neg", "amax", "amin", "roll", "flip", "unbind",
    "split", "split_with_sizes", "chunk", "_to_copy", "as_strided", "lift_fresh", "lift_fresh_copy", "pixel_shuffle",
    "pixel_unshuffle", "cumsum", "index_select", "gather", "index", "repeat", "native_dropout", "copy", "unfold",
    "im2col", "col2im", "diagonal", "tril", "triu", "embedding", "std", "linalg_vector_norm", "view_as_real",
    "unsafe_split", "unsafe_chunk",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_KEEPING, _keep),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d"), _pool),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("maximum", "minimum"), _same),
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _affine_product),
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "matmul"), _matrix_product),
    **dict.fromkeys(("convolution", "linear", "conv2d"), _convolution),
    **dict.fromkeys(("clamp", "clamp_min"), _clamp),
    **dict.fromkeys(("full", "full_like", "new_full"), _filled),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _zeros),
    **dict.fromkeys(
        ("ones", "ones_like", "new_ones", "empty", "empty_like", "rand", "rand_like", "randn"), _independent
    ),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "cudnn_batch_norm",
         "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_with_update_functional"),
        _batch_norm,
    ),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_attention_math", "scaled_dot_product_attention"),
        _attention,
    ),
    "mul": _multiply,
    "div": _divide,
    "pow": _pow,
    "square": _power(2.0),
    "sqrt": _power(0.5),
    "rsqrt": _power(-0.5),
    "reciprocal": _power(-1.0),
    "var": _variance,
    "var_mean": _variance_and_mean,
    "where": _where,
    "constant_pad_nd": _padded,
    "threshold": _threshold,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_fused_rms_norm": _rms_norm,
    "_prelu_kernel": _prelu,
}  # fmt: skip
