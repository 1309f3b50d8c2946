"""SinkGD (arXiv 2502.06742): gradient descent whose matrices are normalised over rows and columns, and keep no state.

Rows are scaled to the norm sqrt(n) and columns to sqrt(m) in turn, a square-root Sinkhorn iteration; vectors,
embeddings and the output layer are left to Adam.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from contlearn.errors import ContlearnError
from contlearn.strategies.teacher import classifier_name


def sinkgd_direction(gradient: Tensor, steps: int = 5) -> Tensor:
    """The gradient of a matrix, normalised: every column has the norm sqrt(m), every row nearly sqrt(n).

    A pure function without branches on values, so that it can be traced. It does not depend on the gradient's scale; a
    row or column of zeros stays one.

    Args:
        gradient: (m, ...), with n elements for each of the m outputs.
        steps: times that rows and then columns are normalised; L in the paper.

    Returns:
        The shape of ``gradient``; the mean square of its elements is 1, unless columns are zero.
    """
    g = gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
    m, n = g.shape
    tiny = torch.finfo(g.dtype).tiny
    g = g / g.abs().amax().clamp_min(tiny)  # else the squares of small gradients are zero
    least = tiny**0.5  # squares below are zero, and what is divided by it stays finite
    for _ in range(steps):
        g = g * (n**0.5 / torch.linalg.vector_norm(g, dim=1, keepdim=True).clamp_min(least))
        g = g * (m**0.5 / torch.linalg.vector_norm(g, dim=0, keepdim=True).clamp_min(least))
    return g.view(gradient.shape).to(gradient.dtype)


def is_matrix(parameter: Tensor) -> bool:
    """Whether it is ``(m, ...)`` with m and n above 1; a position embedding ``(1, tokens, width)`` is none."""
    return parameter.ndim >= 2 and min(len(parameter), parameter.numel() // max(1, len(parameter))) > 1


def parameter_groups(model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups for :class:`SinkGD`: the encoder, and the output layer with the embeddings, which go to Adam.

    Avalanche puts what a model gains later into the group of its neighbours, so that rows and heads added to the output
    layer stay with Adam.

    Args:
        model: whose output layer is told by :func:`classifier_name`; a model with none has an empty second group.
        parameters: those to be optimised.
    """
    apart = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    with contextlib.suppress(ContlearnError):  # a model without an output layer
        apart |= {id(p) for p in model.get_submodule(classifier_name(model)).parameters()}
    given = list(parameters)
    return [
        {"params": [p for p in given if id(p) not in apart], "adam": False},
        {"params": [p for p in given if id(p) in apart], "adam": True},
    ]


class SinkGD(Optimizer):
    """Matrices W <- W - lr lr_scale G', G' by :func:`sinkgd_direction`, without state; all else by Adam.

    The length of a matrix's step does not depend on its gradient's, so the learning rate has to fall for it to settle.

    Args:
        params: parameters or groups; in a group with ``adam: True`` matrices are left to Adam, too
            (:func:`parameter_groups` makes groups of a model).
        lr: learning rate of Adam.
        steps: normalisations of rows and columns.
        lr_scale: learning rate of matrices, relative to ``lr``.
        adam_lr: learning rate of Adam where it is not ``lr``; schedules move both.
        betas: of Adam.
        eps: of Adam.
        weight_decay: decoupled, as a fraction of the learning rate of each step.

    Raises:
        ContlearnError: a value out of range, or a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        steps: int = 5,
        lr_scale: float = 0.05,
        adam_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value, least in (
            ("lr", lr, 0.0), ("steps", steps, 1), ("lr_scale", lr_scale, 0.0), ("adam_lr", adam_lr or 0.0, 0.0),
            ("eps", eps, 0.0), ("weight_decay", weight_decay, 0.0),
        ):  # fmt: skip
            if not value >= least:
                raise ContlearnError(f"{name}: expected at least {least}, got {value}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ContlearnError(f"betas: expected two numbers of at least 0 and below 1, got {betas}")
        if adam_lr is not None and not lr:
            raise ContlearnError(f"adam_lr: expected none with lr 0, which it is held relative to, got {adam_lr}")
        adam_scale = 1.0 if adam_lr is None else adam_lr / lr
        defaults = {
            "lr": lr, "steps": steps, "lr_scale": lr_scale, "adam_scale": adam_scale, "betas": tuple(betas), "eps": eps,
            "weight_decay": weight_decay, "adam": False,
        }  # fmt: skip
        super().__init__(params, defaults)

    def moment_bytes(self) -> int:
        """Bytes of Adam's moments once every parameter that can train has had a step; matrices have none."""
        return sum(
            2 * p.numel() * p.element_size()
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad and (group["adam"] or not is_matrix(p))
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure`` computes the loss again and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter, gradient in _with_gradient(group["params"]):
                if group["adam"] or not is_matrix(parameter):
                    rate = group["lr"] * group["adam_scale"]
                    parameter.mul_(1 - rate * group["weight_decay"])
                    self._adam(parameter, gradient, rate, group["betas"], group["eps"])
                else:
                    rate = group["lr"] * group["lr_scale"]
                    parameter.mul_(1 - rate * group["weight_decay"])
                    parameter.add_(sinkgd_direction(gradient, group["steps"]), alpha=-rate)
        return loss

    def _adam(
        self, parameter: Tensor, gradient: Tensor, rate: float, betas: tuple[float, float], eps: float
    ) -> None:
        beta1, beta2 = betas
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(eps)
        parameter.addcdiv_(mean, root, value=-rate / (1 - beta1 ** state["step"]))


def _with_gradient(parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.layout is not torch.strided:
            raise ContlearnError(
                f"sinkgd: expected dense gradients, got {parameter.grad.layout} of shape {tuple(parameter.shape)}"
            )
        yield parameter, parameter.grad
