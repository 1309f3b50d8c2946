"""EATA: TENT on reliable, non-redundant samples, with a penalty against forgetting (arXiv 2204.02610)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from contlearn.errors import ContlearnError
from contlearn.strategies.adapter import Batches, entropy
from contlearn.strategies.adapter_step import Adaptation
from contlearn.strategies.tent import Tent


class EATA(Tent):
    """EATA: the entropy of the samples worth learning from, each weighted by how certain it is.

    Of a batch, samples with entropy below ``E0 = margin * ln(classes)`` are reliable (equation 3), and of these the
    ones whose softmax has a cosine similarity below ``d_margin`` to the moving average ``m`` are not redundant
    (equation 5). The loss is the mean of ``exp(E0 - entropy) * entropy`` over what is left, the weight without
    gradient; ``m`` then moves to ``0.9 m + 0.1 * mean softmax`` of the same samples. If nothing is left, there is no
    step and nothing moves.

    With ``fisher_samples`` the penalty ``fisher_alpha * sum(fisher * (theta - theta_start)^2)`` is added (equation 8),
    where ``fisher`` is the mean over batches of source data of the squared gradient of the batch's cross-entropy with
    the model's own predictions as labels, and the start is the one that every adapter can go back to.

    Args:
        margin: E0 over the entropy of a uniform prediction.
        d_margin: largest cosine similarity to ``m``; ``null``: 0.4 up to 10 classes, 0.1 up to 100, 0.05 beyond
            (settings for CIFAR-10, CIFAR-100 and ImageNet: it has to grow with the similarity of a certain prediction
            to a uniform average, ``1 / sqrt(classes)``).
        fisher_samples: source samples for the penalty, 2000 in the paper; 0 leaves it out (ETA), and no source data is
            needed.
        fisher_alpha: its weight; 1 for CIFAR, 2000 for ImageNet.
        lr: learning rate, 0.005 for CIFAR-10, 0.00025 for ImageNet.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: momentum of ``sgd``.
        kwargs: options every adapter has.

    Attributes:
        average: ``m`` ``(classes,)``; ``None`` before the first sample that counts.
        kept: samples of the latest step that counted.

    Raises:
        ContlearnError: a value out of range, or a model without normalisation layers (at :meth:`start`).
    """

    memory_names = {"average": "class_average", "fisher": "fisher"}

    def __init__(
        self,
        *,
        margin: float = 0.4,
        d_margin: float | None = None,
        fisher_samples: int = 0,
        fisher_alpha: float = 1.0,
        lr: float = 5e-3,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, optimizer=optimizer, momentum=momentum, **kwargs)
        for name, value in (("margin", margin), ("fisher_samples", fisher_samples), ("fisher_alpha", fisher_alpha)):
            if not value >= 0:
                raise ContlearnError(f"{name}: expected at least 0, got {value}")
        if d_margin is not None and not 0 <= d_margin <= 1:
            raise ContlearnError(f"d_margin: expected 0..1, got {d_margin}")
        self.margin, self.d_margin = margin, d_margin
        self.fisher_samples, self.fisher_alpha = fisher_samples, fisher_alpha
        self.needs_source_data = fisher_samples > 0
        self.fisher: dict[str, Tensor] = {}
        self.average: Tensor | None = None
        self.kept = 0
        self._classes = 0

    def prepare_with(self, batches: Batches) -> None:
        """The Fisher diagonal of the parameters that adapt, from the first ``fisher_samples`` source images.

        Raises:
            ContlearnError: no source data although a penalty is asked for.
        """
        if not self.fisher_samples:
            return
        self._make_ready()
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        seen = passes = 0
        for x, _ in batches() if callable(batches) else batches:
            x = x[: self.fisher_samples - seen].to(self.device)
            with torch.enable_grad():
                logits = self.model(x)
                # Pseudo-labels, as in the paper: the labels of the source data are not looked at.
                loss = F.cross_entropy(logits, logits.detach().argmax(1))
                gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.pow(2)
            seen, passes = seen + len(x), passes + 1
            if seen >= self.fisher_samples:
                break
        if not passes:
            raise ContlearnError("eata: fisher_samples needs source data, expected at least one batch")
        self.fisher = {name: total / passes for name, total in sums.items()}

    def start(self) -> EATA:
        """Make ready.

        Raises:
            ContlearnError: ``fisher_samples`` is set, but :meth:`prepare_with` was not called.
        """
        if self.fisher_samples and not self.fisher:
            raise ContlearnError("eata: fisher_samples is set; expected prepare_with(source batches) before start()")
        super().start()
        return self

    def method_state(self) -> dict[str, Tensor]:
        """The moving average."""
        return {} if self.average is None else {"average": self.average}

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """The moving average again."""
        self.average = state["average"].detach().to(self.device, copy=True) if "average" in state else None

    def declare_step(self, *, batch_size: int, input_shape: Sequence[int], **options: Any) -> Any:
        """See :meth:`Adapter.declare_step`."""
        if self.started and self.average is None:
            # The average has a place per class; only the model's answer says for certain how many there are.
            self._classes = self.predict(torch.zeros(batch_size, *input_shape, device=self.device)).shape[1]
        return super().declare_step(batch_size=batch_size, input_shape=input_shape, **options)

    def step_tensors(self) -> dict[str, Tensor]:
        """The moving average, and whether there is one."""
        if self.average is not None:
            return {"average": self.average, "begun": torch.ones(1)}
        return {"average": torch.zeros(self._classes), "begun": torch.zeros(1)}

    def step_adaptation(self, x: Tensor, method: dict[str, Tensor]) -> Adaptation:
        """As :meth:`adapt`, with sums over masks where that takes parts of the batch."""
        logits: Tensor = self.model(x)
        classes = logits.shape[1]
        uncertain, bound = entropy(logits), self.margin * math.log(classes)
        p = logits.detach().softmax(1)
        # The similarity to an average that is not there yet, all zeros, is 0.
        similar = F.cosine_similarity(method["average"][None], p, dim=1)
        keep = ((uncertain.detach() < bound) & (similar < self._allowed(classes))).to(logits.dtype)
        count = keep.sum()
        share = keep / count.clamp(min=1.0)
        mean = (p * share[:, None]).sum(0)
        average = torch.where(method["begun"] > 0, 0.9 * method["average"] + 0.1 * mean, mean)
        loss = ((bound - uncertain.detach()).exp() * uncertain * share).sum()
        if self.fisher:
            loss = loss + self.fisher_alpha * self._penalty()
        return Adaptation(logits, loss, count > 0, {"average": average, "begun": torch.ones_like(method["begun"])})

    def adapt(self, x: Tensor) -> Tensor:
        """Predict, then step; the logits are those in front of the (last) step."""
        if not self.steps:
            return self.predict(x)
        for _ in range(self.steps):
            logits: Tensor = self.model(x)
            loss = self._loss(logits)
            if loss is not None:
                self.descend(loss)
        return logits

    def _loss(self, logits: Tensor) -> Tensor | None:
        classes = logits.shape[1]
        uncertain = entropy(logits)
        bound = self.margin * math.log(classes)
        keep = uncertain.detach() < bound
        p = logits.detach().softmax(1)
        if self.average is not None:
            # The absolute value of the released code changes nothing: neither vector has a negative entry.
            keep &= F.cosine_similarity(self.average[None], p, dim=1) < self._allowed(classes)
        self.kept = int(keep.sum())
        if not self.kept:
            # The released code's loss is then the mean of nothing, and it takes no step either.
            return None
        mean = p[keep].mean(0)
        self.average = mean if self.average is None else 0.9 * self.average + 0.1 * mean
        kept = uncertain[keep]
        loss = ((bound - kept.detach()).exp() * kept).mean()
        if self.fisher:
            loss = loss + self.fisher_alpha * self._penalty()
        return loss

    def _allowed(self, classes: int) -> float:
        if self.d_margin is not None:
            return self.d_margin
        return 0.4 if classes <= 10 else 0.1 if classes <= 100 else 0.05

    def _penalty(self) -> Tensor:
        parameters = dict(self.model.named_parameters())
        terms = [
            (fisher * (parameters[name] - self._initial[name]).pow(2)).sum() for name, fisher in self.fisher.items()
        ]
        return torch.stack(terms).sum()
