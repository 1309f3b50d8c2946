"""Pulls towards earlier weights on the encoder: plain L2 and online EWC (Smith et al., arXiv 2203.17269, section 4).

The classifier is never pulled. Sums, not means, over parameters: coefficients depend on the size of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiTaskModule
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from contlearn.errors import ContlearnError, nearest
from contlearn.strategies.loader import BatchLoader, BatchSource
from contlearn.strategies.step import exporting
from contlearn.strategies.step_part import PlainStep
from contlearn.strategies.teacher import classifier_name

# Numbers of per-sample gradients held at once.
_CHUNK_NUMBERS = 1 << 24


def encoder_parameters(
    model: nn.Module, patterns: Sequence[str] | None = None
) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters outside the classifier, by name in ``model``.

    Args:
        model: any model; what its classifier is, ``contlearn.strategies.teacher.classifier_name`` says.
        patterns: shell-style patterns; only parameters whose name matches one.

    Raises:
        ContlearnError: a pattern that matches no parameter of the encoder.
    """
    inside = f"{classifier_name(model)}."
    encoder = [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(inside)]
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name, _ in encoder):
            names = [name for name, _ in encoder]
            close = nearest(pattern, names)
            raise ContlearnError(
                f"parameters: {pattern!r} matches no parameter of the encoder"
                f"{f'; did you mean {close!r}?' if close else ''} (expected shell-style patterns over its "
                f"{len(names)} parameters{f', such as {names[0]!r}' if names else ''})"
            )
    for name, parameter in encoder:
        if parameter.requires_grad and (
            patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)
        ):
            yield name, parameter


def quadratic(factor: float, parameters: list[Tensor], anchors: list[Tensor], weights: list[Tensor]) -> Tensor:
    """``factor * sum weight * (parameter - anchor)^2`` over lists of tensors; without ``weights``, all are 1.

    One node of the graph with its gradient written out: nothing of the size of the model is kept for the backward pass.
    """
    if exporting():  # one node per parameter: a portable graph has no lists of tensors
        gaps = [(now - then).pow(2) for now, then in zip(parameters, anchors, strict=True)]
        parts = [gap * weight for gap, weight in zip(gaps, weights, strict=True)] if weights else gaps
        return factor * torch.stack([part.sum() for part in parts]).sum()
    total: Tensor = _Quadratic.apply(factor, len(parameters), *parameters, *anchors, *weights)
    return total


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, factor: float, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.factor, ctx.count = factor, count
        pulls = _pulls(tensors, count)
        gaps = torch._foreach_sub(list(tensors[:count]), list(tensors[count : 2 * count]))
        torch._foreach_mul_(gaps, pulls)
        # Nothing here is negative: the 1-norm is the sum.
        return factor * torch.stack(torch._foreach_norm(gaps, 1)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pulls = _pulls(ctx.saved_tensors, ctx.count)
        torch._foreach_mul_(pulls, 2 * ctx.factor * gradient)
        return (None, None, *pulls, *[None] * (len(ctx.saved_tensors) - ctx.count))


def _pulls(tensors: tuple[Tensor, ...], count: int) -> list[Tensor]:
    """``weight * (parameter - anchor)`` of each parameter."""
    pulls: list[Tensor] = list(torch._foreach_sub(list(tensors[:count]), list(tensors[count : 2 * count])))
    weights = list(tensors[2 * count :])
    if weights:
        torch._foreach_mul_(pulls, weights)
    return pulls


class _Anchored(PlainStep, SupervisedPlugin):
    """What both penalties share: which parameters, where their anchors are, and the pull towards them."""

    def __init__(self, coefficient: float, parameters: Sequence[str] | None) -> None:
        super().__init__()
        if not coefficient >= 0:
            raise ContlearnError(f"coefficient: expected at least 0, got {coefficient}")
        if isinstance(parameters, str):
            raise ContlearnError(f"parameters: expected a list of patterns, got {parameters!r}")
        self.coefficient = coefficient
        self.parameters = None if parameters is None else list(parameters)
        self.anchors: dict[str, Tensor] = {}

    def _weights(self) -> dict[str, Tensor] | None:
        """Weight of each squared distance by name; ``None`` where all are 1."""
        return None

    def prepare_model(self, model: nn.Module) -> None:
        """Refuse a pattern that matches nothing before a run writes anything; the model stays as it is."""
        for _ in encoder_parameters(model, self.parameters):
            break

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the penalty."""
        weights = self._weights()
        now: list[Tensor] = []
        then: list[Tensor] = []
        pull: list[Tensor] = []
        for name, parameter in encoder_parameters(strategy.model, self.parameters):
            anchor = self.anchors.get(name)
            if anchor is None or parameter.dim() != anchor.dim() or not anchor.numel():
                continue
            # Of a parameter that has grown since, the part that was there is pulled and the rest is free.
            part = tuple(slice(size) for size in anchor.shape)
            now.append(parameter if parameter.shape == anchor.shape else parameter[part])
            then.append(anchor)
            if weights is not None:
                pull.append(weights[name])
        if now:
            strategy.loss += quadratic(self._factor(), now, then, pull)

    @contextlib.contextmanager
    def step_bound(self, strategy: Any, tensors: dict[str, Tensor], masks: Any) -> Iterator[None]:
        """While open, the anchors are these tensors."""
        kept, anchors = self.anchors, {name.removeprefix("anchor."): held for name, held in tensors.items()}
        self.anchors = anchors or kept
        try:
            yield
        finally:
            self.anchors = kept

    def _factor(self) -> float:
        return self.coefficient

    def _copies(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in encoder_parameters(model, self.parameters)}


class L2Plugin(_Anchored):
    """L2 towards earlier weights: ``coefficient * sum (theta - theta*)^2`` over trainable encoder parameters.

    Active from the first experience on, when the anchor is the initial (random or pre-trained) weights; the anchor
    follows after every experience. ``anchor="initial"`` never moves it: a control against loss of plasticity (L2
    towards the initial weights, arXiv 2308.11958), here without the classifier, too. A parameter that appears during
    the stream, or grows, is free until the next move of the anchor; with ``initial``, one that appears is anchored
    where it is first met.

    The step of plain SGD multiplies the distance by ``1 - 2 * lr * coefficient``: keep that above 0 (a coefficient of
    999999, as in the authors' script, diverges). To freeze weights, use ``trainable`` of ``models.create``.

    Args:
        coefficient: weight of the sum. The default is the authors' for a ResNet-18: a sum depends on the model's size.
        anchor: ``previous`` (the weights after the last experience) or ``initial``.
        parameters: shell-style patterns over parameter names (``backbone.stage4.*``) that restrict the penalty;
            default: the whole encoder.

    Raises:
        ContlearnError: a value out of range, or (in training) a pattern that matches nothing.
    """

    memory_names = {"anchors": "anchor"}

    def __init__(
        self,
        *,
        coefficient: float = 0.05,
        anchor: Literal["previous", "initial"] = "previous",
        parameters: Sequence[str] | None = None,
    ) -> None:
        super().__init__(coefficient, parameters)
        if anchor not in ("previous", "initial"):
            raise ContlearnError(f"anchor: expected previous or initial, got {anchor!r}")
        self.anchor = anchor

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Anchor the initial weights."""
        if not self.anchors:
            self.anchors = self._copies(strategy.model)
        elif self.anchor == "initial":
            for name, value in encoder_parameters(strategy.model, self.parameters):
                if name not in self.anchors:
                    self.anchors[name] = value.detach().clone()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Move the anchor to the weights as they are now."""
        if self.anchor == "previous":
            self.anchors = self._copies(strategy.model)

    def step_tensors(self, strategy: Any) -> dict[str, Tensor]:
        """The anchors; those of the weights as they are, before any."""
        return {f"anchor.{name}": held for name, held in (self.anchors or self._copies(strategy.model)).items()}

    def step_copies(self, strategy: Any) -> dict[str, str]:
        """The anchors follow after every experience."""
        if self.anchor == "initial":
            return {}
        return {f"anchor.{name}": name for name in self.anchors or self._copies(strategy.model)}


class OnlineEWCPlugin(_Anchored):
    """Online EWC on the encoder: ``1/2 * coefficient * sum F (theta - theta*)^2``, from the second experience on.

    After each experience the Fisher diagonal of its training data is added to what there is, in evaluation mode and
    with the labels, from the loss over the current classes alone (the strategy's ``local_loss`` where it has one, else
    its criterion on the columns of these classes); the anchor is the latest weights. The data pass in an order drawn
    from a generator of their own, seeded with the number of experiences before: the training order stays as it is.

    Args:
        coefficient: weight of the penalty. The default is the authors', tied to their batch of 256 and loss times 5.
        fisher: ``batch`` sums ``g^2 * B / batches`` over mini-batches of B samples with gradient ``g`` of the batch
            mean, as in the authors' code; ``sample`` is the mean of per-sample squared gradients, the empirical Fisher.
        half: multiply by 1/2 as in the code; the paper has no 1/2.
        parameters: shell-style patterns over parameter names that restrict the penalty; default: the whole encoder.

    Raises:
        ContlearnError: a value out of range, or (in training) a pattern that matches nothing.
    """

    memory_names = {"anchors": "anchor", "importance": "fisher"}

    def __init__(
        self,
        *,
        coefficient: float = 10.0,
        fisher: Literal["batch", "sample"] = "batch",
        half: bool = True,
        parameters: Sequence[str] | None = None,
    ) -> None:
        super().__init__(coefficient, parameters)
        if fisher not in ("batch", "sample"):
            raise ContlearnError(f"fisher: expected batch or sample, got {fisher!r}")
        self.fisher = fisher
        self.half = half
        self.importance: dict[str, Tensor] = {}
        self.consolidated = 0

    def _weights(self) -> dict[str, Tensor]:
        return self.importance

    def _factor(self) -> float:
        return self.coefficient / 2 if self.half else self.coefficient

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Add this experience's Fisher diagonal and move the anchor."""
        found = fisher_diagonal(
            strategy, dict(encoder_parameters(strategy.model, self.parameters)), self.fisher, seed=self.consolidated
        )
        for name, gained in found.items():
            older = self.importance.get(name)
            if older is not None and older.dim() == gained.dim():
                gained[tuple(slice(size) for size in older.shape)] += older
        self.importance = found
        self.anchors = self._copies(strategy.model)
        self.consolidated += 1


def fisher_diagonal(
    strategy: Any, parameters: dict[str, nn.Parameter], form: Literal["batch", "sample"], *, seed: int = 0
) -> dict[str, Tensor]:
    """Squared gradients of the loss over the current experience's classes, by parameter name.

    Args:
        strategy: gives the model, the data of its current experience, the batch size and the loss.
        parameters: of the model, by name.
        form: ``batch`` or ``sample``, see :class:`OnlineEWCPlugin`.
        seed: of the order of the samples.
    """
    model = strategy.model
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    if not found:
        return found
    loader = BatchLoader(
        BatchSource(strategy.experience.dataset.train(), strategy.device),
        batch_size=strategy.train_mb_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for x, y, *rest in loader:
            t = rest[-1] if rest else torch.zeros_like(y)  # benchmarks without task labels
            if form == "batch":
                _add_batch(found, strategy, parameters, x, y, t, len(loader))
            else:
                _add_samples(found, strategy, parameters, x, y, t, len(loader.source))
    finally:
        for module, training in modes.items():
            module.training = training
    return found


def _add_batch(
    found: dict[str, Tensor], strategy: Any, named: dict[str, nn.Parameter], x: Tensor, y: Tensor, t: Tensor, count: int
) -> None:
    model = strategy.model
    output = model(x, t) if isinstance(model, MultiTaskModule) else model(x)
    gradients = torch.autograd.grad(_loss(strategy, output, y, t), list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            found[name] += gradient.detach().pow(2) * (len(x) / count)


def _add_samples(
    found: dict[str, Tensor], strategy: Any, named: dict[str, nn.Parameter], x: Tensor, y: Tensor, t: Tensor, count: int
) -> None:
    model = strategy.model

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor, task: Tensor) -> Tensor:
        arguments = (image[None], task[None]) if isinstance(model, MultiTaskModule) else (image[None],)
        return _loss(strategy, functional_call(model, weights, arguments), label[None], task[None])

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0))
    weights = {name: parameter.detach() for name, parameter in named.items()}
    chunk = max(1, min(64, _CHUNK_NUMBERS // sum(weight.numel() for weight in weights.values())))
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        for name, gradients in per_sample(weights, x[part], y[part], t[part]).items():
            found[name] += gradients.pow(2).sum(0) / count


def _loss(strategy: Any, output: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Loss over the columns of the current experience's classes."""
    local = getattr(strategy, "local_loss", None)
    if local is not None:
        return local(output, y, t)  # type: ignore[no-any-return]
    new = sorted(int(label) for label in strategy.experience.classes_in_this_experience)
    columns = torch.tensor(new, device=output.device)
    positions = (y[:, None] == columns).long().argmax(1)
    return strategy._criterion(output[:, columns], positions)  # type: ignore[no-any-return]
