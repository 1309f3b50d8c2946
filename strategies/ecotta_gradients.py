"""Gradients of EcoTTA's loss in the meta parts, with the graph of one partition at a time (arXiv 2303.01904, 3.2).

One forward keeps the input of every partition. From the last to the first, each is run again with its graph, and the
entropy's gradient is carried to the partition in front; the regulariser joins where the graph is there anyway. The same
number of forwards as in the public code, which runs one for each of the two losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from contlearn.strategies.adapter import entropy
from contlearn.strategies.ecotta_network import EcoTTANetwork


@dataclass(frozen=True)
class Gradients:
    """What a pass found; the gradients themselves are in the parameters of the meta parts.

    Attributes:
        logits: (batch, classes).
        loss: value of the loss that was differentiated.
        kept: samples that passed the filter; with none, there are no gradients to step on.
    """

    logits: Tensor
    loss: float
    kept: int


def passing(logits: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Entropy of each sample, and which are below ``margin * ln(classes)``; both ``(batch,)``."""
    h = entropy(logits)
    return h, h < margin * math.log(logits.shape[1])


def loss_gradients(
    network: EcoTTANetwork, x: Tensor, *, lam: float, margin: float, recompute: bool = True
) -> Gradients:
    """Of L = mean entropy of the samples that pass + lam sum_k R_k.

    Args:
        network: its meta parts get their gradients.
        x: images (batch, channels, height, width).
        lam: weight of the regulariser; 0 leaves the entropy.
        margin: of the filter.
        recompute: run each partition again for its graph; else the first forward keeps all graphs.
    """
    held: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        bound = network.stem(x)
        for k in range(len(network.meta)):
            if recompute:
                held.append((bound,))
                bound = network.partition(k, bound)
            else:
                held.append(_graph(network, k, bound))
                bound = held[-1][-1].detach()
    with torch.enable_grad():
        logits = network.tail(bound.requires_grad_())
        h, passes = passing(logits, margin)
        kept = int(passes.sum())
        if not kept:
            return Gradients(logits.detach(), math.nan, 0)
        loss = h[passes].mean()
    (gradient,) = torch.autograd.grad(loss, bound)
    total, logits = float(loss.detach()), logits.detach()
    del bound, h, loss
    while held:
        penalty, gradient = _backward(network, len(held) - 1, held.pop(), gradient, lam)
        total += penalty
    return Gradients(logits, total, kept)


def regulariser_gradients(network: EcoTTANetwork, x: Tensor, *, lam: float, margin: float) -> Gradients:
    """Of lam sum_k R_k alone, whose graph never reaches over a partition.

    Arguments as for :func:`loss_gradients`; without a sample that passes, the gradients are taken away again.
    """
    total = 0.0
    with torch.no_grad():
        bound = network.stem(x)
        for k in range(len(network.meta)):
            u = network.frozen(k, bound)
            with torch.enable_grad():
                out = network.meta[k](u, bound)
            penalty, towards = _penalty(out.detach().clone(), u, lam)
            _keep(network, k, torch.autograd.grad(out, _weights(network, k), towards))
            total += penalty
            bound = out.detach()
        logits = network.tail(bound)
        kept = int(passing(logits, margin)[1].sum())
    if not kept:
        network.meta.zero_grad()
    return Gradients(logits, total, kept)


def _graph(network: EcoTTANetwork, k: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Input, frozen output and output of partition ``k``, with the graph between them."""
    # Nothing in front of the first partition trains, so its frozen blocks need no graph.
    leaf = x.detach().requires_grad_(k > 0)
    with torch.enable_grad():
        u = network.frozen(k, leaf)
        return leaf, u, network.meta[k](u, leaf)


def _backward(
    network: EcoTTANetwork, k: int, held: tuple[Tensor, ...], gradient: Tensor, lam: float
) -> tuple[float, Tensor]:
    """lam R_k, and the entropy's gradient in front of partition ``k``, given the one behind it.

    Both losses meet in the partition's output, so the meta part gets the gradient of the sum in one pass; the input,
    which the regulariser must not reach, gets the entropy's share in another.
    """
    leaf, u, out = held if len(held) == 3 else _graph(network, k, held[0])
    del held
    # The graph has saved neither the output nor its gradient, so its memory is free for the regulariser's.
    end = get_gradient_edge(out)
    penalty, towards = 0.0, gradient
    if lam:
        penalty, towards = _penalty(out.detach(), u.detach(), lam)
        towards += gradient
    del u, out
    _keep(network, k, torch.autograd.grad(end, _weights(network, k), towards, retain_graph=k > 0))
    del towards
    if k > 0:
        (gradient,) = torch.autograd.grad(end, leaf, gradient)
    return penalty, gradient


@torch.no_grad()
def _penalty(out: Tensor, u: Tensor, lam: float) -> tuple[float, Tensor]:
    """lam R_k = lam mean |x_k - u_k|, and its gradient with respect to x_k, written over ``out``."""
    difference = out.sub_(u)
    share = lam / difference.numel()
    return share * float(torch.linalg.vector_norm(difference, 1)), difference.sign_().mul_(share)


def _weights(network: EcoTTANetwork, k: int) -> list[nn.Parameter]:
    return list(network.meta[k].parameters())


def _keep(network: EcoTTANetwork, k: int, gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(_weights(network, k), gradients, strict=True):
        parameter.grad = gradient
