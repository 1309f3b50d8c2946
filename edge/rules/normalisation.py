"""Batch normalisation in training and evaluation, and its gradients.

The variance is taken over centred values (two passes), and the running one is unbiased as in PyTorch; ONNX's is not.
Where the target has the operator, it is the fastest way to anything that is linear per channel: on maps of a few pixels
ONNX Runtime's element-wise operators take twice its time, since their inner loop is as long as a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from contlearn.edge.operators import batch_norm_with_statistics
from contlearn.edge.rules.registry import Gap, Profile, Registry, Rule
from contlearn.edge.rules.shapes import per_channel

aten = torch.ops.aten

Triple = tuple[Tensor, Tensor, Tensor]


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _count(x: Tensor) -> int:
    return math.prod(x.shape) // x.shape[1]


def _affine(target: Profile, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * scale + shift`` per channel: one operator where it may take run-time values, else two."""
    if target.allows_batch_norm_op and x.ndim > 2:
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        return aten._native_batch_norm_legit_no_training.default(x, scale, shift, zeros, ones, 0.0, 0.0)[0]  # type: ignore[no-any-return]
    return x * per_channel(scale, x.ndim) + per_channel(shift, x.ndim)


def _by_batch(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, mean, biased variance and inverse deviation of the batch."""
    if target.allows_batch_norm_op and running_mean is not None and running_var is not None:
        ones = torch.ones_like(running_var) if weight is None else weight
        zeros = torch.zeros_like(running_mean) if bias is None else bias
        out, mean, variance = batch_norm_with_statistics(x, ones, zeros, running_mean, running_var, eps)
        return out, mean, variance, torch.rsqrt(variance + eps)
    mean = x.mean(_axes(x))
    centred = x - per_channel(mean, x.ndim)
    variance = (centred * centred).mean(_axes(x))
    invstd = torch.rsqrt(variance + eps)
    scale = invstd if weight is None else weight * invstd
    out = _affine(target, centred, scale, torch.zeros_like(scale) if bias is None else bias)
    return out, mean, variance, invstd


def _moved(running: Tensor, value: Tensor, momentum: float) -> Tensor:
    return running * (1 - momentum) + value * momentum


def functional(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, saved mean and inverse deviation, new running mean and variance."""
    if not training:
        given = evaluation(target, x, weight, bias, running_mean, running_var, momentum, eps)
        if given is NotImplemented:
            given = aten._native_batch_norm_legit_no_training.default(
                x, weight, bias, running_mean, running_var, momentum, eps
            )
        return given[0], x.new_empty(0), x.new_empty(0), running_mean, running_var
    count = _count(x)
    if count < 2:
        raise Gap(
            "native_batch_norm", {"values_per_channel": count}, "one value has no variance",
            "use a larger batch or evaluation mode",
        )  # fmt: skip
    out, mean, variance, invstd = _by_batch(target, x, weight, bias, running_mean, running_var, eps)
    new_mean, new_var = running_mean, running_var
    if running_mean is not None:
        new_mean = _moved(running_mean, mean, momentum)
        new_var = _moved(running_var, variance * (count / (count - 1)), momentum)
    return out, mean, invstd, new_mean, new_var


def mutating(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    training: bool, momentum: float, eps: float,
) -> Triple:  # fmt: skip
    """As :func:`functional`, the running statistics written in place."""
    out, mean, invstd, new_mean, new_var = functional(
        target, x, weight, bias, running_mean, running_var, training, momentum, eps
    )
    if training and running_mean is not None:
        running_mean.copy_(new_mean)
        running_var.copy_(new_var)
    return out, mean, invstd


def without_statistics(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> Triple:
    """Output, mean and inverse deviation of the batch."""
    out, mean, _, invstd = _by_batch(target, x, weight, bias, None, None, eps)
    return out, mean, invstd


def evaluation(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> Triple:  # fmt: skip
    """By given statistics: the operator, or two element-wise ones with the constants folded into them."""
    if target.allows_batch_norm_op:
        return NotImplemented  # type: ignore[no-any-return]
    scale = torch.rsqrt(running_var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return _affine(target, x, scale, shift), x.new_empty(0), x.new_empty(0)


def with_update(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Training form that returns a reserve too (empty here)."""
    out = mutating(target, x, weight, bias, running_mean, running_var, True, momentum, eps)
    return *out, x.new_empty(0, dtype=torch.uint8)


def with_update_functional(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, mean, inverse deviation, reserve, new running mean and variance."""
    out, mean, invstd, new_mean, new_var = functional(
        target, x, weight, bias, running_mean, running_var, True, momentum, eps
    )
    return out, mean, invstd, x.new_empty(0, dtype=torch.uint8), new_mean, new_var


def no_update(
    target: Profile, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Evaluation form that returns a reserve too (empty here)."""
    out = functional(target, x, weight, bias, running_mean, running_var, False, momentum, eps)
    return out[0], out[1], out[2], x.new_empty(0, dtype=torch.uint8)


def backward(
    target: Profile, gradient: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, save_mean: Tensor | None, save_invstd: Tensor | None, train: bool, eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients to input ``(batch, channels, ...)``, weight and bias ``(channels,)``."""
    if train:
        assert save_mean is not None and save_invstd is not None
        mean, invstd = save_mean, save_invstd
    else:
        assert running_mean is not None and running_var is not None
        mean, invstd = running_mean, torch.rsqrt(running_var + eps)
    scale = invstd if weight is None else weight * invstd
    wanted_dx, wanted_dw, wanted_db = output_mask
    axes, count = _axes(x), _count(x)
    through_statistics = train and wanted_dx
    total = gradient.sum(axes) if through_statistics or wanted_db else None
    dot: Tensor | None = None
    centred: Tensor | None = None
    if through_statistics or wanted_dw:
        centred = _affine(target, x, torch.ones_like(mean), -mean)
        dot = (gradient * centred).sum(axes)
    dx: Tensor | None = None
    if wanted_dx and not train:
        dx = _affine(target, gradient, scale, torch.zeros_like(scale))
    elif wanted_dx:
        assert centred is not None and dot is not None and total is not None
        slope = dot * invstd * invstd / count
        first = _affine(target, gradient, scale, total * scale / -count)
        dx = first - _affine(target, centred, slope * scale, torch.zeros_like(scale))
    dw = dot * invstd if wanted_dw and dot is not None else None
    return dx, dw, total if wanted_db else None


def backward_reserved(
    target: Profile, gradient: Tensor, x: Tensor, weight: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, save_mean: Tensor | None, save_var: Tensor | None, update: bool, eps: float,
    output_mask: Sequence[bool], reserve: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As :func:`backward`, for the operators with a reserve; ``save_var`` is the inverse deviation."""
    return backward(
        target, gradient, x, weight, running_mean, running_var, save_mean, save_var, update, eps, output_mask
    )


REGISTRY = Registry(
    "normalisation",
    [
        Rule(aten.native_batch_norm.default, mutating, "operator, two passes", "running statistics in place"),
        Rule(aten._native_batch_norm_legit.default, mutating, "operator, two passes", "the same"),
        Rule(aten._native_batch_norm_legit.no_stats, without_statistics, "two passes", "by the batch, none kept"),
        Rule(aten._native_batch_norm_legit_functional.default, functional, "operator, two passes",
             "new running statistics as outputs"),
        Rule(aten._native_batch_norm_legit_no_training.default, evaluation, "operator, primitives",
             "by given statistics"),
        Rule(aten._batch_norm_with_update.default, with_update, "operator, two passes", "training form with a reserve"),
        Rule(aten._batch_norm_with_update_functional.default, with_update_functional, "operator, two passes",
             "the same without mutation"),
        Rule(aten._batch_norm_no_update.default, no_update, "operator, primitives", "evaluation form with a reserve"),
        Rule(aten.native_batch_norm_backward.default, backward, "operator, primitives",
             "gradients in training and evaluation"),
        Rule(aten.batch_norm_backward.default, backward_reserved, "operator, primitives", "the same with a reserve"),
    ],
)  # fmt: skip
