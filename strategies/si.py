"""Synaptic intelligence: importance from each parameter's share in the fall of the loss (arXiv 1703.04200)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.strategies.template import SupervisedTemplate


class SIPlugin(SupervisedPlugin):
    """Synaptic intelligence as a plug-in.

    Along the path of training, omega accumulates -gradient * step per parameter; at the end of an experience the
    importance grows by omega / (total change squared + damping), clipped below at 0, and the loss of later experiences
    gets ``si_lambda / 2 * sum(importance * (theta - theta_end)^2)``.

    Ours, because Avalanche 0.6.0's version does nothing on the CPU: it stores the weights before a step as a view of
    the parameter itself, so every step it sees is zero. Its cap of the importance, 0.001 as in the Caffe code of
    arXiv 1806.08568, stays the default: the path integral of noisy gradients overestimates, and without a cap plain SGD
    at common learning rates diverges. ``max_importance=None`` is the published method.

    Args:
        si_lambda: weight of the penalty.
        damping: xi of equation 5.
        max_importance: cap of the importance of a parameter; ``None`` for none.
    """

    not_exportable = "its importance follows every step of every weight, beside the graph; export l2 or ewc"

    memory_names = {
        "importance": "importance",
        "anchor": "anchor",
        "_path": "path",
        "_start": "path_start",
        "_before": "weights_before_step",
    }

    def __init__(self, si_lambda: float = 1.0, *, damping: float = 1e-3, max_importance: float | None = 1e-3) -> None:
        super().__init__()
        if not damping > 0:
            raise ContlearnError(f"damping: expected more than 0, got {damping}")
        self.si_lambda = si_lambda
        self.damping = damping
        self.max_importance = max_importance
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self._path: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Start a path at the current weights; importances of a parameter that grew are padded with zeros."""
        self._start = _copies(strategy.model)
        self._path = {name: torch.zeros_like(weight) for name, weight in self._start.items()}
        for held in (self.importance, self.anchor):
            for name, value in held.items():
                if name in self._start:  # not what was frozen since
                    held[name] = _padded(value, self._start[name])

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty."""
        if not self.importance:
            return
        # Equation 4: the quadratic pull towards the anchor.
        penalty = sum(
            (self.importance[name] * (parameter - self.anchor[name]).pow(2)).sum()
            for name, parameter in _trainable(strategy.model)
            if name in self.importance
        )
        strategy.loss += self.si_lambda / 2 * penalty

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        """Remember the weights in front of the step."""
        self._before = _copies(strategy.model)

    @torch.no_grad()
    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        """Add -gradient * step to each parameter's path integral (equation 3), the gradient being the task's."""
        for name, parameter in _trainable(strategy.model):
            if parameter.grad is None:
                continue
            gradient, before = parameter.grad, self._before[name]
            if name in self.importance:  # take the penalty's own gradient out again
                gradient = gradient - self.si_lambda * self.importance[name] * (before - self.anchor[name])
            self._path[name] -= gradient * (parameter.detach() - before)

    @torch.no_grad()
    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Turn the path into importance (equation 5) and move the anchor."""
        for name, weight in _copies(strategy.model).items():
            change = weight - self._start[name]
            gained = (self._path[name] / (change.pow(2) + self.damping)).clamp(min=0)
            total = self.importance.get(name, torch.zeros_like(gained)) + gained
            self.importance[name] = total if self.max_importance is None else total.clamp(max=self.max_importance)
            self.anchor[name] = weight
        self._path, self._start, self._before = {}, {}, {}


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _trainable(model)}


def _padded(value: Tensor, like: Tensor) -> Tensor:
    if value.shape == like.shape:
        return value
    padded = torch.zeros_like(like)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


class SI(SupervisedTemplate):
    """Synaptic intelligence.

    Args:
        si_lambda: weight of the penalty.
        damping: xi of equation 5.
        max_importance: cap of the importance of a parameter; ``null`` for none, as published.
        kwargs: options of the training loop.
    """

    def __init__(
        self, *, si_lambda: float = 1.0, damping: float = 1e-3, max_importance: float | None = 1e-3, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.plugins.insert(0, SIPlugin(si_lambda, damping=damping, max_importance=max_importance))
