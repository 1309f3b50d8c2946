"""BatchNorm statistics of the test batch instead of the source data's, or a mixture of both (arXiv 2006.16971).

Also here: how every gradient-based adapter makes BatchNorm use the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from contlearn.errors import ContlearnError
from contlearn.strategies.adapter import Adapter
from contlearn.strategies.adapter_step import Adaptation


class BNStats(Adapter):
    """BatchNorm normalises with ``N / (N + n) * source + n / (N + n) * batch``; nothing is trained.

    The formula holds for mean and variance alike (arXiv 2006.16971), ``n`` being the images in the batch.
    The batch's variance is the biased one, which BatchNorm normalises with in training, too.

    A layer that sees one value per channel (one image, 1x1 pixels) has no variance: with ``prior`` 0 it keeps the
    source's statistics for that batch.

    Args:
        prior: N, how many images the source's statistics count for; 0 uses the batch alone.
        carry: the mixture replaces the source's statistics for the next batch: an exponential moving average over
            batches with weight ``n / (N + n)`` on the latest.
        kwargs: options every adapter has; those of the optimizer are not used.

    Raises:
        ContlearnError: a value out of range, or a model without BatchNorm (at :meth:`start`).
    """

    def __init__(self, *, prior: float = 0.0, carry: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not prior >= 0:
            raise ContlearnError(f"prior: expected at least 0, got {prior}")
        self.prior, self.carry = prior, carry
        self.mixture = Mixture(prior)

    def configure(self) -> None:
        """Every BatchNorm takes the mixture; its own buffers stay the source's."""
        layers = list(batchnorms(self.model))
        if not layers:
            raise ContlearnError(
                f"bn_stats: the model {type(self.model).__name__} has no BatchNorm with running statistics; "
                "expected one that has, such as resnet14 or wrn40_2"
            )
        for _, layer in layers:
            self._hooks.append(layer.register_forward_pre_hook(self.mixture.before))
            self._hooks.append(layer.register_forward_hook(self.mixture.after, always_call=True))

    def adapted(self) -> Iterator[tuple[str, Tensor]]:
        """The statistics, if they are carried on."""
        if self.carry:
            for name, layer in batchnorms(self.model):
                prefix = f"{name}." if name else ""
                yield f"{prefix}running_mean", layer.running_mean  # type: ignore[misc]
                yield f"{prefix}running_var", layer.running_var  # type: ignore[misc]

    not_exportable = ""

    def step_adaptation(self, x: Tensor, method: dict[str, Tensor]) -> Adaptation:
        """The answer; statistics are carried on if they should be."""
        self.mixture.keep = self.carry
        try:
            return Adaptation(self.model(x))
        finally:
            self.mixture.keep = False

    def adapt(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)``."""
        self.mixture.keep = self.carry
        try:
            return self.predict(x)
        finally:
            self.mixture.keep = False

    def source_logits(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` with the source's statistics."""
        self.mixture.lends = False
        try:
            return super().source_logits(x)
        finally:
            self.mixture.lends = True

    def predict(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)``; the carried statistics do not move."""
        with torch.no_grad():
            logits: Tensor = self.model(x)
        return logits


class Mixture:
    """Lends a BatchNorm layer other statistics for one forward pass.

    Args:
        prior: N of the formula.

    Attributes:
        keep: whether the layer keeps them.
        lends: whether it does anything.
    """

    # What is lent comes back before a forward pass ends.
    checkpoint_exclude = ("_own",)

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.keep, self.lends = False, True
        self._own: tuple[Tensor, Tensor] | None = None

    def before(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook: mix."""
        x = inputs[0]
        if not self.lends or (not self.prior and values_per_channel(x) < 2):
            return
        dims = [dim for dim in range(x.ndim) if dim != 1]
        variance, mean = torch.var_mean(x.detach(), dims, correction=0)
        share = self.prior / (self.prior + len(x))
        self._own = layer.running_mean, layer.running_var
        layer.running_mean = share * layer.running_mean + (1 - share) * mean
        layer.running_var = share * layer.running_var + (1 - share) * variance

    def after(self, layer: Any, inputs: Any, output: Any) -> None:
        """Forward hook: give the layer its own tensors back, with the mixture in them if that is kept."""
        if self._own is None:
            return
        mean, variance = self._own
        if self.keep:
            mean.copy_(layer.running_mean)
            variance.copy_(layer.running_var)
        layer.running_mean, layer.running_var = mean, variance
        self._own = None


def batchnorms(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every BatchNorm layer that has source statistics, by name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            yield name, module


def use_batch_statistics(model: nn.Module) -> list[RemovableHandle]:
    """Make every BatchNorm normalise with the batch's own statistics, through which gradients flow.

    The running statistics are neither used nor changed: the source's stay in the model, and ``model.eval()`` goes back
    to them. Where a layer sees one value per channel (one image, 1x1 pixels), it uses them for that batch, since such a
    batch has no variance.

    Returns:
        Handles of the hooks that see to the last.
    """
    handles, one_value = [], _OneValue()
    for _, layer in batchnorms(model):
        layer.track_running_stats = False
        layer.training = True
        handles.append(layer.register_forward_pre_hook(one_value.before))
        handles.append(layer.register_forward_hook(one_value.after, always_call=True))
    return handles


class _OneValue:
    """Puts a layer into evaluation mode for one forward pass."""

    def __init__(self) -> None:
        self.lowered = False

    def before(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.lowered = layer.training and values_per_channel(inputs[0]) < 2
        if self.lowered:
            layer.training = False

    def after(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self.lowered:
            layer.training, self.lowered = True, False


def values_per_channel(x: Tensor) -> int:
    """Values that one channel of ``(batch, channels, ...)`` is normalised over."""
    return x.numel() // max(x.shape[1], 1)
