"""Fused attention, forward and backward, as products and a softmax; the backward recomputes the probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Gap, Profile, Registry, Rule
from contlearn.edge.rules.shapes import constant

aten = torch.ops.aten


def _checked(op: str, query: Tensor, key: Tensor, dropout_p: float) -> None:
    if dropout_p:
        raise Gap(op, {"dropout_p": dropout_p}, "a graph holds no random numbers", "set the dropout to 0")
    if query.shape[1] != key.shape[1]:
        raise Gap(
            op, {"query_heads": query.shape[1], "key_heads": key.shape[1]}, "heads share keys",
            "repeat keys and values to the query's heads",
        )  # fmt: skip


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """``(batch, heads, queries, keys)`` before the softmax."""
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if is_causal:
        rows, columns = query.shape[-2], key.shape[-2]
        ahead = [[-math.inf if column > row else 0.0 for column in range(columns)] for row in range(rows)]
        scores = scores + constant(ahead, query.dtype)
    return scores if mask is None else scores + mask


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, key, mask, is_causal, _scale(query, scale))
    return torch.matmul(torch.softmax(scores, -1), value), torch.logsumexp(scores, -1)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, mask: Tensor | None, is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """To query, key, value and scores."""
    factor = _scale(query, scale)
    probabilities = torch.softmax(_scores(query, key, mask, is_causal, factor), -1)
    drift = (gradient * out).sum(-1, keepdim=True)
    scores = probabilities * (torch.matmul(gradient, value.transpose(-2, -1)) - drift)
    return (
        torch.matmul(scores, key) * factor,
        torch.matmul(scores.transpose(-2, -1), query * factor),
        torch.matmul(probabilities.transpose(-2, -1), gradient),
        scores,
    )


def flash_for_cpu(
    target: Profile, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output ``(batch, heads, queries, size)`` and log-sum of exponentials ``(batch, heads, queries)``."""
    _checked("_scaled_dot_product_flash_attention_for_cpu", query, key, dropout_p)
    return _forward(query, key, value, attn_mask, is_causal, scale)


def flash_for_cpu_backward(
    target: Profile, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    dropout_p: float, is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """To query, key and value."""
    _checked("_scaled_dot_product_flash_attention_for_cpu_backward", query, key, dropout_p)
    return _backward(gradient, query, key, value, out, attn_mask, is_causal, scale)[:3]


def efficient(
    target: Profile, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`flash_for_cpu`, with two empty random states."""
    _checked("_scaled_dot_product_efficient_attention", query, key, dropout_p)
    out, logsumexp = _forward(query, key, value, attn_bias, is_causal, scale)
    return out, logsumexp, query.new_zeros([], dtype=torch.int64), query.new_zeros([], dtype=torch.int64)


def efficient_backward(
    target: Profile, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None,
    out: Tensor, logsumexp: Tensor, philox_seed: Tensor, philox_offset: Tensor, dropout_p: float,
    grad_input_mask: Sequence[bool], is_causal: bool = False, *, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """To query, key, value and bias."""
    _checked("_scaled_dot_product_efficient_attention_backward", query, key, dropout_p)
    found = _backward(gradient, query, key, value, out, attn_bias, is_causal, scale)
    bias = found[3].sum_to_size(attn_bias.shape) if attn_bias is not None and grad_input_mask[3] else None
    return found[0], found[1], found[2], bias


REGISTRY = Registry(
    "attention",
    [
        Rule(aten._scaled_dot_product_flash_attention_for_cpu.default, flash_for_cpu, "products", "fused attention"),
        Rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default, flash_for_cpu_backward, "products",
             "its gradients"),
        Rule(aten._scaled_dot_product_efficient_attention.default, efficient, "products", "the same on accelerators"),
        Rule(aten._scaled_dot_product_efficient_attention_backward.default, efficient_backward, "products",
             "its gradients"),
    ],
)  # fmt: skip
