"""SAR: sharpness-aware entropy minimisation on reliable samples, with recovery (arXiv 2302.12400)."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.adapter import entropy
from contlearn.strategies.norm_layers import is_norm
from contlearn.strategies.tent import Tent


class SAR(Tent):
    """SAR: minima of the entropy that are flat, found with samples whose gradients can be trusted.

    1. Samples with entropy below ``E0 = margin * ln(classes)`` count (equation 2); ``g`` is the gradient of their mean.
    2. The weights move to ``theta + rho * g / |g|`` (equation 4); of the samples of step 1, those whose entropy is
       below E0 there, too, give the gradient that the optimizer applies to ``theta``.
    3. ``ema`` follows the loss of step 2 (0.9 old, 0.1 new); below ``reset_below`` the model has become certain of
       everything, and goes back to its start.

    Without a sample in step 1 or 2 there is no step.

    Args:
        margin: E0 over the entropy of a uniform prediction.
        rho: radius of the neighbourhood.
        reset_below: e_m; 0 never goes back.
        freeze_top: leave the normalisation layers of the last quarter of the network's stages or blocks, and all after
            them, as they are, since they are the more sensitive ones: ``layer4`` of a ResNet and blocks 9 to 11 of a
            ViT-B as published, the last stage of a WideResNet. Without effect where a network has neither.
        lr: learning rate, 0.00025 for ResNets, 0.001 for ViTs at batch 64.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: momentum of ``sgd``.
        kwargs: options every adapter has.

    Attributes:
        ema: moving average of the loss; ``None`` before the first step and after going back.
        recoveries: batches after which the model went back to its start.

    Raises:
        ContlearnError: a value out of range, or a model without normalisation layers to adapt (at :meth:`start`).
    """

    def __init__(
        self,
        *,
        margin: float = 0.4,
        rho: float = 0.05,
        reset_below: float = 0.2,
        freeze_top: bool = True,
        lr: float = 2.5e-4,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, optimizer=optimizer, momentum=momentum, **kwargs)
        for name, value in (("margin", margin), ("rho", rho), ("reset_below", reset_below)):
            if not value >= 0:
                raise ContlearnError(f"{name}: expected at least 0, got {value}")
        self.margin, self.rho, self.reset_below, self.freeze_top = margin, rho, reset_below, freeze_top
        self.ema: float | None = None
        self.recoveries: list[int] = []

    not_exportable = "it goes back to its start by what it sees over time; export tent, which the runner guards"

    def layers(self) -> Iterator[nn.Module]:
        """The normalisation layers that adapt: all, or those below the top."""
        top = top_of(self.model) if self.freeze_top else None
        for name, module in self.model.named_modules():
            if top is not None and (name == top or name.startswith(f"{top}.")):
                return
            if is_norm(module):
                yield module

    def start(self) -> SAR:
        """Make ready."""
        self.recoveries = []
        super().start()
        return self

    def method_state(self) -> dict[str, Tensor]:
        """The moving average."""
        return {} if self.ema is None else {"ema": torch.tensor(self.ema, dtype=torch.float64)}

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """The moving average again."""
        self.ema = float(state["ema"]) if "ema" in state else None

    def adapt(self, x: Tensor) -> Tensor:
        """Predict, then step; the logits are those of the first forward pass of the (last) step."""
        if not self.steps:
            return self.predict(x)
        for _ in range(self.steps):
            logits: Tensor = self.model(x)
            self._step(x, logits)
            if self.ema is not None and self.ema < self.reset_below:
                # In the released code the low average outlives the reset, and resets the model after every batch until
                # it has risen; the paper starts it anew.
                self.back_to_start()
                self.recoveries.append(self.batches)
        return logits

    def _step(self, x: Tensor, logits: Tensor) -> None:
        assert self.optimizer is not None
        bound = self.margin * math.log(logits.shape[1])
        uncertain = entropy(logits)
        reliable = uncertain.detach() < bound
        if not bool(reliable.any()):
            return
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(uncertain[reliable].mean(), trained, materialize_grads=True)
        # Copies, and no subtraction afterwards: the weights have to come back bit by bit.
        before = [parameter.detach().clone() for parameter in trained]
        self._climb(trained, gradients)
        uncertain = entropy(self.model(x))[reliable]
        uncertain = uncertain[uncertain.detach() < bound]
        loss = uncertain.mean() if len(uncertain) else None
        found = torch.autograd.grad(loss, trained, materialize_grads=True) if loss is not None else ()
        with torch.no_grad():
            for parameter, held in zip(trained, before, strict=True):
                parameter.copy_(held)
        if loss is None:
            return
        for parameter, gradient in zip(trained, found, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last_loss = float(loss.detach())
        self.stepped += 1
        self.ema = self.last_loss if self.ema is None else 0.9 * self.ema + 0.1 * self.last_loss

    @torch.no_grad()
    def _climb(self, trained: list[nn.Parameter], gradients: tuple[Tensor, ...]) -> None:
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.add_(gradient * (self.rho / (length + 1e-12)))


def top_of(model: nn.Module) -> str | None:
    """Name of the first module of the last quarter of a network's stages or blocks, at least one; ``None`` without."""
    rows: dict[str, list[str]] = defaultdict(list)
    for name, _ in model.named_modules():
        match = re.fullmatch(r"((?:.*\.)?(?:stages?|layers?|blocks)\.?)\d+", name)
        if match:
            rows[match[1]].append(name)
    if not rows:
        return None
    outermost = min(rows.values(), key=lambda names: names[0].count("."))
    return outermost[-max(1, len(outermost) // 4)]
