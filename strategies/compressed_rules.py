"""Forward and backward of the operations whose saved activations Mesa compresses (arXiv 2111.11124).

A rule's forward calls PyTorch's own function, so that results keep their bits, and says what is to be kept; its
backward gets that back, the copies in bytes as floats again. Where a gradient does not depend on a copy it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contlearn.strategies.compressed_function import Call, Gradients, Keeper, Rule

_aten = torch.ops.aten


# ---------------------------------------------------------------------- products


def _conv_forward(keeper: Keeper, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    call.found["shape"] = x.shape
    keeper.exact(weight)
    if keeper.needs[1]:
        keeper.copy(x, 1)
    return call.function(x, weight, bias)  # type: ignore[no-any-return]


def _conv_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    weight, how = kept[0].to(gradient.dtype), call.how
    # Without its weight's gradient, only the input's shape is looked at.
    x = kept[1] if needs[1] else gradient.new_empty(1).expand(call.found["shape"])
    return _aten.convolution_backward(  # type: ignore[no-any-return]
        gradient, x, weight, [len(weight)], how["stride"], how["padding"], how["dilation"], False, [0, 0],
        how["groups"], list(needs),
    )  # fmt: skip


def _linear_forward(keeper: Keeper, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    keeper.exact(weight)
    if keeper.needs[1]:
        keeper.copy(x, -1)
    return call.function(x, weight, bias)  # type: ignore[no-any-return]


def _linear_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    rows = gradient.reshape(-1, gradient.shape[-1])
    dx = gradient @ kept[0].to(gradient.dtype) if needs[0] else None
    dw = rows.t() @ kept[1].reshape(-1, kept[1].shape[-1]) if needs[1] else None
    return dx, dw, rows.sum(0) if needs[2] else None


def _matmul_forward(keeper: Keeper, call: Call, a: Tensor, b: Tensor) -> Tensor:
    call.found["shapes"] = a.shape, b.shape
    for needed, x in ((keeper.needs[1], a), (keeper.needs[0], b)):
        if needed:
            axis, groups = head_axis(x)
            keeper.copy(x, axis, groups=groups)
    return call.function(a, b)  # type: ignore[no-any-return]


def _matmul_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    shape_a, shape_b = call.found["shapes"]
    da = db = None
    if needs[1]:
        a = kept.pop(0).to(gradient.dtype)
        if len(shape_b) == 2:
            db = a.reshape(-1, shape_a[-1]).t() @ gradient.reshape(-1, shape_b[-1])
        else:
            db = (a.transpose(-2, -1) @ gradient).sum_to_size(shape_b)
    if needs[0]:
        da = (gradient @ kept.pop(0).to(gradient.dtype).transpose(-2, -1)).sum_to_size(shape_a)
    return da, db


def _product_forward(keeper: Keeper, call: Call, a: Tensor, b: Tensor) -> Tensor:
    call.found["shapes"] = a.shape, b.shape
    for needed, x in ((keeper.needs[1], a), (keeper.needs[0], b)):
        if needed:
            keeper.copy(x, channel_axis(x))
    return call.function(a, b)  # type: ignore[no-any-return]


def _product_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    shape_a, shape_b = call.found["shapes"]
    db = (gradient * kept.pop(0)).sum_to_size(shape_b) if needs[1] else None
    da = (gradient * kept.pop(0)).sum_to_size(shape_a) if needs[0] else None
    return da, db


# ---------------------------------------------------------------------- normalisations


def _batch_norm_forward(keeper: Keeper, call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mean, variance, training, momentum, eps = call.how["settings"]
    keeper.copy(x, 1)
    # What torch.batch_norm calls; it also gives the statistics of the batch.
    out, *saved, chosen = torch._batch_norm_impl_index(
        x, weight, bias, mean, variance, training, momentum, eps, torch.backends.cudnn.enabled
    )
    call.found["chosen"] = chosen
    keeper.exact(weight, *((None, None) if training else (mean, variance)), *saved)
    return out  # type: ignore[no-any-return]


def _batch_norm_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    x, weight, mean, variance, saved_mean, saved_deviation, reserve = kept
    _, _, training, _, eps = call.how["settings"]
    return _aten._batch_norm_impl_index_backward(  # type: ignore[no-any-return]
        call.found["chosen"], x, gradient, weight, mean, variance, saved_mean, saved_deviation, training, eps,
        list(needs), reserve,
    )  # fmt: skip


def _layer_norm_forward(keeper: Keeper, call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    keeper.copy(x, -1)
    out, mean, deviation = torch.native_layer_norm(x, call.how["shape"], weight, bias, call.how["eps"])
    keeper.exact(weight, bias, mean, deviation)
    return out


def _layer_norm_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    x, weight, bias, mean, deviation = kept
    return _aten.native_layer_norm_backward(  # type: ignore[no-any-return]
        gradient, x, call.how["shape"], mean, deviation, weight, bias, list(needs)
    )


def _group_norm_forward(keeper: Keeper, call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    batch, channels = x.shape[:2]
    places, groups = x[0, 0].numel(), call.how["groups"]
    call.found["sizes"] = (batch, channels, places, groups)
    keeper.copy(x, 1, groups=groups)
    out, mean, deviation = torch.native_group_norm(
        x, weight, bias, batch, channels, places, groups, call.how["eps"]
    )
    keeper.exact(weight, mean, deviation)
    return out


def _group_norm_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    x, weight, mean, deviation = kept
    return _aten.native_group_norm_backward(  # type: ignore[no-any-return]
        gradient.contiguous(), x, mean, deviation, weight, *call.found["sizes"], list(needs)
    )


# ---------------------------------------------------------------------- activations


def _input_forward(keeper: Keeper, call: Call, x: Tensor) -> Tensor:
    keeper.copy(x, channel_axis(x))
    if call.how.get("inplace"):
        keeper.dirty = x
    return call.function(x)  # type: ignore[no-any-return]


def _gelu_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    return (_aten.gelu_backward(gradient, kept[0], approximate=call.how["approximate"]),)


def _silu_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    return (_aten.silu_backward(gradient, kept[0]),)


def _hardswish_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    return (_aten.hardswish_backward(gradient, kept[0]),)


def _softmax_forward(keeper: Keeper, call: Call, x: Tensor) -> Tensor:
    out: Tensor = call.function(x)
    axis, groups = head_axis(out)
    keeper.copy(out, axis, groups=groups)
    return out


def _softmax_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    return (_aten._softmax_backward_data(gradient, kept[0], call.how["dim"], gradient.dtype),)


# ---------------------------------------------------------------------- attention


def _attention_forward(keeper: Keeper, call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    for x in (q, k, v):
        axis, groups = head_axis(x)
        keeper.copy(x, axis, groups=groups)
    keeper.exact(mask)
    return call.function(q, k, v, mask)  # type: ignore[no-any-return]


def _attention_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    """Of the fused function on the copies, run again: its output and the weights of attention need not be kept."""
    *operands, mask = kept
    kind = gradient.dtype
    with torch.enable_grad():
        leaves = [x.detach().to(kind).requires_grad_(need) for x, need in zip(operands, needs[:3], strict=True)]
        mask = mask.to(kind) if mask is not None and mask.is_floating_point() else mask
        out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], mask, **call.how)
    found = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], gradient))
    return *(next(found) if leaf.requires_grad else None for leaf in leaves), None


# ---------------------------------------------------------------------- pooling


def _max_pool_forward(keeper: Keeper, call: Call, x: Tensor) -> Tensor:
    how = call.how
    (_, width), (across, _) = how["kernel"], how["dilation"]
    out, places = _aten.max_pool2d_with_indices(
        x, how["kernel"], how["stride"], how["padding"], how["dilation"], how["ceil"]
    )
    call.found["shape"] = x.shape
    # Of a place in the plane, the place in the window is left: one byte for eight.
    places = places.int()
    row, column = places // x.shape[-1], places % x.shape[-1]
    top, left = _corners(out, how)
    down = (row - top) // across * width
    keeper.exact(((column - left) // how["dilation"][1] + down).to(torch.uint8))
    return out  # type: ignore[no-any-return]


def _max_pool_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    how, shape = call.how, call.found["shape"]
    places = kept[0].long()
    width = how["kernel"][1]
    top, left = _corners(gradient, how)
    row, column = top + places // width * how["dilation"][0], left + places % width * how["dilation"][1]
    dx = gradient.new_zeros(shape).flatten(-2)
    return (dx.scatter_add_(-1, (row * shape[-1] + column).flatten(-2), gradient.flatten(-2)).view(shape),)


def _corners(out: Tensor, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """First row (height, 1) and column (width,) of each window."""
    (down, across), (above, before) = how["stride"], how["padding"]
    top = torch.arange(out.shape[-2], device=out.device) * down - above
    return top.unsqueeze(1), torch.arange(out.shape[-1], device=out.device) * across - before


def _avg_pool_forward(keeper: Keeper, call: Call, x: Tensor) -> Tensor:
    call.found["shape"] = x.shape
    return call.function(x)  # type: ignore[no-any-return]


def _avg_pool_backward(kept: list[Tensor], gradient: Tensor, needs: Sequence[bool], call: Call) -> Gradients:
    x = gradient.new_empty(1).expand(call.found["shape"])  # its shape is all that is looked at
    return (_aten.avg_pool2d_backward(gradient, x, *call.how["settings"]),)


# ----------------------------------------------------------------------


def channel_axis(x: Tensor) -> int:
    """Maps have their channels behind the batch, tokens and vectors at the end."""
    return 1 if x.ndim == 4 else x.ndim - 1


def head_axis(x: Tensor) -> tuple[int, int | None]:
    """``(batch, heads, tokens, ...)`` has a range for each head, ``(batch * heads, ...)`` for groups of them."""
    return (1, x.shape[1]) if x.ndim == 4 else (0 if x.ndim == 3 else x.ndim - 1, None)


CONV = Rule(_conv_forward, _conv_backward)
LINEAR = Rule(_linear_forward, _linear_backward)
MATMUL = Rule(_matmul_forward, _matmul_backward)
PRODUCT = Rule(_product_forward, _product_backward)
BATCH_NORM = Rule(_batch_norm_forward, _batch_norm_backward)
LAYER_NORM = Rule(_layer_norm_forward, _layer_norm_backward)
GROUP_NORM = Rule(_group_norm_forward, _group_norm_backward)
GELU = Rule(_input_forward, _gelu_backward)
SILU = Rule(_input_forward, _silu_backward)
HARDSWISH = Rule(_input_forward, _hardswish_backward)
SOFTMAX = Rule(_softmax_forward, _softmax_backward)
ATTENTION = Rule(_attention_forward, _attention_backward)
MAX_POOL = Rule(_max_pool_forward, _max_pool_backward)
AVG_POOL = Rule(_avg_pool_forward, _avg_pool_backward)
