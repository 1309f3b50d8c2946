"""Losses and their gradients: class labels become comparisons with 0..C-1, so nothing gathers or scatters."""

from __future__ import annotations

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Profile, Registry, Rule
from contlearn.edge.rules.shapes import masked, one_hot

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    if reduction == MEAN:
        return losses.mean()
    return losses.sum() if reduction == SUM else losses


def _passed(gradient: Tensor, count: int, reduction: int) -> Tensor:
    """The gradient per element before reduction (broadcast)."""
    return gradient / count if reduction == MEAN else gradient


def _weights(x: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which class each label is, of the scores' shape, and the weight of each label; a label to ignore has none."""
    axis = 0 if x.ndim == 1 else 1
    classes = x.shape[axis]
    picks = one_hot(labels, classes)
    if 0 <= ignore_index < classes:
        picks = picks & (labels != ignore_index).unsqueeze(-1)
    if picks.ndim > 2:
        picks = picks.movedim(-1, 1)
    numbers = picks.to(x.dtype)
    if weight is not None:
        numbers = numbers * weight.reshape([-1] + [1] * (x.ndim - 1 - axis))
    return picks, numbers.sum(axis)


def nll_loss_forward(
    target: Profile, x: Tensor, labels: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and total weight; ``x`` log-probabilities ``(batch, classes, ...)`` or ``(classes,)``."""
    picks, weights = _weights(x, labels, weight, ignore_index)
    # Selected, not multiplied: a masked class may have the log-probability -inf.
    chosen = torch.where(picks, x, torch.zeros_like(x)).sum(0 if x.ndim == 1 else 1)
    losses, total = -chosen * weights, weights.sum()
    if reduction == NONE:
        return losses, torch.zeros_like(total)
    return (losses.sum() / total if reduction == MEAN else losses.sum()), total


def nll_loss_backward(
    target: Profile, gradient: Tensor, x: Tensor, labels: Tensor, weight: Tensor | None, reduction: int,
    ignore_index: int, total_weight: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient to the log-probabilities, of their shape."""
    picks, weights = _weights(x, labels, weight, ignore_index)
    per_label = -gradient * weights
    if reduction == MEAN:
        per_label = per_label / total_weight
    return masked(per_label.unsqueeze(0 if x.ndim == 1 else 1), picks)


def bce_with_logits(
    target: Profile, x: Tensor, y: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:  # fmt: skip
    """``(1 - y) x + (1 + (p - 1) y) (max(-x, 0) + log(1 + exp(-|x|)))``."""
    softplus = torch.clamp(-x, min=0) + torch.log(1 + torch.exp(-x.abs()))
    if pos_weight is not None:
        softplus = softplus * (1 + (pos_weight - 1) * y)
    losses = (1 - y) * x + softplus
    return _reduced(losses if weight is None else losses * weight, reduction)


def binary_cross_entropy(
    target: Profile, x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    """Of probabilities; logarithms end at -100, as in PyTorch."""
    losses = -(y * torch.clamp(torch.log(x), min=-100) + (1 - y) * torch.clamp(torch.log(1 - x), min=-100))
    return _reduced(losses if weight is None else losses * weight, reduction)


def binary_cross_entropy_backward(
    target: Profile, gradient: Tensor, x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    """Gradient to the probabilities."""
    slope = (x - y) / torch.clamp(x * (1 - x), min=1e-12)
    if weight is not None:
        slope = slope * weight
    return _passed(gradient, x.numel(), reduction) * slope


def mse_loss(target: Profile, x: Tensor, y: Tensor, reduction: int = MEAN) -> Tensor:
    """Squared differences."""
    return _reduced((x - y) * (x - y), reduction)


def mse_loss_backward(target: Profile, gradient: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    """Twice the difference."""
    return (x - y) * (_passed(gradient, x.numel(), reduction) * 2)


def huber_loss(target: Profile, x: Tensor, y: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    """``c (|d| - c / 2)`` with ``c = min(|d|, delta)``: the parabola inside, the line outside."""
    distance = (x - y).abs()
    near = torch.clamp(distance, max=delta)
    return _reduced(near * (distance - near * 0.5), reduction)


def huber_loss_backward(
    target: Profile, gradient: Tensor, x: Tensor, y: Tensor, reduction: int, delta: float
) -> Tensor:
    """The difference, cut off at ``delta``."""
    return torch.clamp(x - y, -delta, delta) * _passed(gradient, x.numel(), reduction)


def smooth_l1_loss(target: Profile, x: Tensor, y: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    """Huber's loss by ``beta``; absolute differences for 0."""
    if beta == 0:
        return _reduced((x - y).abs(), reduction)
    return huber_loss(target, x, y, reduction, beta) / beta


def smooth_l1_loss_backward(
    target: Profile, gradient: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float
) -> Tensor:
    """The difference over ``beta``, cut off at 1."""
    if beta == 0:
        return torch.sign(x - y) * _passed(gradient, x.numel(), reduction)
    return torch.clamp((x - y) / beta, -1.0, 1.0) * _passed(gradient, x.numel(), reduction)


REGISTRY = Registry(
    "losses",
    [
        Rule(aten.nll_loss_forward.default, nll_loss_forward, "comparison", "negative log-likelihood"),
        Rule(aten.nll_loss_backward.default, nll_loss_backward, "comparison", "its gradient"),
        Rule(aten.nll_loss2d_forward.default, nll_loss_forward, "comparison", "per pixel"),
        Rule(aten.nll_loss2d_backward.default, nll_loss_backward, "comparison", "its gradient"),
        Rule(aten.binary_cross_entropy_with_logits.default, bce_with_logits, "primitives", "of logits"),
        Rule(aten.binary_cross_entropy.default, binary_cross_entropy, "primitives", "of probabilities"),
        Rule(aten.binary_cross_entropy_backward.default, binary_cross_entropy_backward, "primitives", "its gradient"),
        Rule(aten.mse_loss.default, mse_loss, "primitives", "squared error"),
        Rule(aten.mse_loss_backward.default, mse_loss_backward, "primitives", "its gradient"),
        Rule(aten.huber_loss.default, huber_loss, "primitives", "Huber"),
        Rule(aten.huber_loss_backward.default, huber_loss_backward, "primitives", "its gradient"),
        Rule(aten.smooth_l1_loss.default, smooth_l1_loss, "primitives", "smooth absolute error"),
        Rule(aten.smooth_l1_loss_backward.default, smooth_l1_loss_backward, "primitives", "its gradient"),
    ],
)
