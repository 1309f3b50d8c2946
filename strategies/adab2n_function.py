"""Batch normalisation with statistics balanced between tasks, and its regulariser, as one autograd function.

arXiv 2310.08855 (AdaB2N). Saved for the backward pass is the input, and two vectors of one number per channel where the
regulariser is computed: at most what batch normalisation saves. Written operation by operation, autograd keeps several
copies of the activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TaskRows:
    """Which task each row of a batch belongs to; made once per step and shared by all layers.

    Attributes:
        index: task of each row, ``(batch,)`` int64.
        counts: rows of each task known so far, ``(tasks,)`` float32, 0 for a task that is absent.
        divisors: the same, and 1 where the task is absent.
    """

    index: Tensor
    counts: Tensor
    divisors: Tensor

    @staticmethod
    def of(index: Tensor, tasks: int) -> TaskRows:
        """The record of rows ``index`` ``(batch,)`` among ``tasks`` tasks."""
        counts = (index.unsqueeze(1) == torch.arange(tasks, device=index.device)).sum(0).float()
        return TaskRows(index, counts, counts.clamp(min=1))

    def __len__(self) -> int:
        return len(self.index)


def task_weights(psi: Tensor, rows: TaskRows, *, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Weight of each task ``(tasks,)``, summing to 1, and the sum that was divided by.

    A pseudo-count exp(psi) joins the rows of each task, also of one that the batch has none of; its weight then is on
    no row, and the weights of the rows sum to less than 1. ``renormalise`` leaves absent tasks out.
    """
    counts = psi.exp() + rows.counts
    if renormalise:
        counts = counts * (rows.counts > 0)
    total = counts.sum()
    return counts / total, total


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(batch, channels)`` of each sample over its positions, at least in float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if x.dim() == 2:
        return wide, torch.zeros_like(wide)
    positions = list(range(2, x.dim()))
    if x.is_cuda:
        variance, mean = torch.var_mean(wide, dim=positions, correction=0)
        return mean, variance
    # One kernel on a GPU, but on a CPU several times slower than two vectorised passes. The temporary is gone before
    # the output is made.
    mean = wide.mean(positions, keepdim=True)
    return mean.flatten(1), (wide - mean).square_().mean(positions)


def combine(mean: Tensor, variance: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Statistics ``(channels,)`` of a batch from those of its samples ``(batch, channels)``.

    Args:
        mean: of each sample.
        variance: of each sample.
        weights: of the samples ``(batch,)``; ``None``: all the same, summing to 1.
    """
    if weights is None:
        mu = mean.mean(0)
        return mu, (variance + (mean - mu).square()).mean(0)
    s = weights.unsqueeze(1)  # not a matrix product, which autocast would take in half precision
    mu = (s * mean).sum(0)
    return mu, (s * (variance + (mean - mu).square())).sum(0)


def distance(batch: Tensor, running: Tensor) -> Tensor:
    """Mean squared difference, a scalar; the running statistic is a constant."""
    return F.mse_loss(batch, running.detach())


def track(running_mean: Tensor, running_var: Tensor, mu: Tensor, var: Tensor, eta: Tensor) -> None:
    """Move the running statistics by ``eta`` towards the batch's; the variance is biased, BatchNorm's is not."""
    with torch.no_grad():
        running_mean.lerp_(mu.detach().to(running_mean.dtype), eta)
        running_var.lerp_(var.detach().to(running_var.dtype), eta)


class BalancedNorm(torch.autograd.Function):
    """``(y, penalty)`` of one layer; moves the running statistics.

    Arguments of ``apply``: x ``(batch, channels, ...)``, weight and bias ``(channels,)`` or None, psi ``(tasks,)`` or
    None, running_mean and running_var ``(channels,)``, eta (a scalar tensor), rows (:class:`TaskRows` or None: all
    samples weigh the same), eps, renormalise, penalise (else ``penalty`` is None).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        psi: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eta: Tensor,
        rows: TaskRows | None,
        eps: float,
        renormalise: bool,
        penalise: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output, and its regulariser (equation (e) of ``AdaB2N``)."""
        ctx.set_materialize_grads(False)
        # Neither is saved: the rows are one object for all layers of the step.
        ctx.rows, ctx.eps, ctx.renormalise = rows, eps, renormalise
        mu, var = combine(*moments(x), _row_weights(psi, rows, renormalise))
        track(running_mean, running_var, mu, var, eta)
        y = F.batch_norm(x, mu, var, weight, bias, training=False, eps=eps)
        if not penalise:
            ctx.save_for_backward(x, weight, psi)
            return y, None
        off_mean, off_var = mu - running_mean, var - running_var
        ctx.save_for_backward(x, weight, psi, off_mean, off_var)
        return y, off_mean.square().mean() + off_var.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_penalty: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, bias and psi."""
        x, weight, psi, *offsets = ctx.saved_tensors
        rows: TaskRows | None = ctx.rows
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        # The same sums over the same input as in the forward pass: bit for bit the same statistics.
        mean, variance = moments(x)
        s = _row_weights(psi, rows, ctx.renormalise)
        mu, var = combine(mean, variance, s)
        invstd = (var + ctx.eps).rsqrt()
        needs_x, needs_weight, needs_bias, needs_psi = ctx.needs_input_grad[:4]
        # Through the output with the statistics held fixed; sums over samples and positions.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, torch.ones_like(mu) if weight is None else weight, mu, var, None, None, False, ctx.eps,
            [needs_x, True, True],
        )  # fmt: skip
        if needs_x or needs_psi:
            scale = invstd if weight is None else weight * invstd
            d_mu = -scale * grad_bias
            d_var = -0.5 * scale * invstd * grad_weight
            if grad_penalty is not None:
                off_mean, off_var = offsets
                d_mu = d_mu + grad_penalty * 2 / len(mu) * off_mean
                d_var = d_var + grad_penalty * 2 / len(mu) * off_var
            if s is not None:  # d var / d mu = -2 mu (1 - sum of s); 0 where the weights sum to 1
                d_mu = d_mu - 2 * mu * (1 - s.sum()) * d_var
            if needs_x:
                _add_through_statistics(grad_x, x, mu, d_mu, d_var, s)
        grad_psi = None
        if needs_psi and rows is not None and psi is not None:
            d_s = (d_mu * mean + d_var * (variance + (mean - mu).square())).sum(1)
            grad_psi = _psi_gradient(d_s, psi, rows, ctx.renormalise)
        out = (grad_x, grad_weight if needs_weight else None, grad_bias if needs_bias else None, grad_psi)
        return (*out, *([None] * 7))


def balanced_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    psi: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eta: Tensor,
    rows: TaskRows | None,
    eps: float,
    renormalise: bool,
    penalise: bool,
) -> tuple[Tensor, Tensor | None]:
    """What :class:`BalancedNorm` computes, operation by operation as the paper writes it; autograd does the rest."""
    positions = tuple(range(2, x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    def over_positions(values: Tensor) -> Tensor:
        return values.mean(positions) if positions else values

    def of_channel(values: Tensor) -> Tensor:
        return values.view(-1, *(1 for _ in positions))

    s = _row_weights(psi, rows, renormalise)
    s = torch.full((len(x),), 1 / len(x), dtype=wide.dtype, device=x.device) if s is None else s
    mu = (s.unsqueeze(1) * over_positions(wide)).sum(0)
    centred = wide - of_channel(mu)
    var = (s.unsqueeze(1) * over_positions(centred.square())).sum(0)
    y = centred / of_channel((var + eps).sqrt())
    if weight is not None:
        y = y * of_channel(weight)
    if bias is not None:
        y = y + of_channel(bias)
    track(running_mean, running_var, mu, var, eta)
    penalty = distance(mu, running_mean.clone()) + distance(var, running_var.clone()) if penalise else None
    return y.to(x.dtype), penalty


def _row_weights(psi: Tensor | None, rows: TaskRows | None, renormalise: bool) -> Tensor | None:
    """Weight ``(batch,)`` of each sample: its task's, shared equally among the task's rows."""
    if psi is None or rows is None:
        return None
    weights, _ = task_weights(psi, rows, renormalise=renormalise)
    return (weights / rows.divisors)[rows.index]


def _psi_gradient(d_s: Tensor, psi: Tensor, rows: TaskRows, renormalise: bool) -> Tensor:
    """From the gradient of the row weights ``(batch,)`` to that of psi ``(tasks,)``."""
    weights, total = task_weights(psi, rows, renormalise=renormalise)
    own = rows.index.unsqueeze(1) == torch.arange(len(psi), device=psi.device)
    d_w = (d_s.unsqueeze(1) * own).sum(0) / rows.divisors  # an ordered sum: index_add is not deterministic on a GPU
    d_c = (d_w - (weights * d_w).sum()) / total
    if renormalise:
        d_c = d_c * (rows.counts > 0)
    return (d_c * psi.exp()).to(psi.dtype)


def _add_through_statistics(
    grad_x: Tensor, x: Tensor, mu: Tensor, d_mu: Tensor, d_var: Tensor, s: Tensor | None
) -> None:
    """Add to ``grad_x`` what reaches x through mean and variance: s / positions * (d_mu + 2 d_var (x - mu))."""
    positions = max(1, x[0, 0].numel())
    share = (1 / len(x) if s is None else s.unsqueeze(1)) / positions
    slope = share * (2 * d_var)
    offset = share * (d_mu - 2 * d_var * mu)
    shape = (-1, x.shape[1], *(1 for _ in range(x.dim() - 2)))
    grad_x.addcmul_(x, slope.view(shape)).add_(offset.view(shape))
