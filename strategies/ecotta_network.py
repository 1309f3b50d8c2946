"""EcoTTA's network: a frozen net in K partitions, each with a small part that trains (arXiv 2303.01904, 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.models._classifier import Classifier
from contlearn.strategies.ecotta_partitions import Cut, conv_stride
from contlearn.strategies.frozen_operations import FrozenOperations, several_values
from contlearn.strategies.packed import PartedConv2d, packed_relu
from contlearn.strategies.step import exporting


class MetaNorm(nn.BatchNorm2d):
    """BatchNorm of a meta part: its running statistics move only when :meth:`commit` says that the batch counted.

    In training mode it normalises with the batch's statistics; a batch of one value per channel has no variance and is
    normalised with the running ones.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.seen: tuple[Tensor, Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width), same shape out."""
        self.seen = None
        if not self.training or not several_values(x):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        # The function behind F.batch_norm, which also tells the statistics.
        out, mean, inverse = torch.native_batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps)
        if torch.is_grad_enabled():  # a prediction leaves nothing behind
            self.seen = (mean.detach(), inverse.detach(), x.numel() // x.shape[1])
        return out

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running statistics towards the last batch's."""
        if self.seen is not None and self.running_mean is not None and self.running_var is not None:
            mean, inverse, count = self.seen
            variance = (inverse.pow(-2) - self.eps) * (count / (count - 1))
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(variance, self.momentum or 0.0)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        self.seen = None


class MetaPart(nn.Module):
    """The trained part g_k of a partition.

    Args:
        in_channels: of the partition's input.
        out_channels: of its output.
        stride: of the convolution, H_in / H_out and W_in / W_out.
        packed: keep bits of the ReLU for backward.
        generator: source of the convolution's initial weights.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: tuple[int, int], *, packed: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.norm = MetaNorm(out_channels)
        self.conv = PartedConv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.conv_norm = MetaNorm(out_channels)
        self.packed = packed
        # nn.Conv2d's own initialisation, from an explicit generator.
        nn.init.kaiming_uniform_(self.conv.weight, a=math.sqrt(5), generator=generator)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        """BN_k(u) + ReLU(BN'(Conv(x))) for the partition's input x and its frozen output u (the shape returned)."""
        side: Tensor = self.conv_norm(self.conv(x))
        # In place: BatchNorm's backward looks at its input, not its output.
        packed = self.packed and side.requires_grad and not exporting()
        side = packed_relu(side, inplace=True) if packed else F.relu_(side)
        replaced: Tensor = self.norm(u)
        return replaced.add_(side)


class EcoTTANetwork(Classifier):
    """A classifier with meta parts: ``backbone`` and ``head`` are the source model's own, ``meta`` is added.

    x_k = BN_k(f_k(x_{k-1})) + ReLU(BN'_k(Conv_k(x_{k-1}))), x_0 the stem's output; logits = head(tail(x_K)). The stem
    is the backbone's with any input scaling in it (the authors' sample drops AugMix' (x - 0.5) / 0.5). BN_k replaces
    the frozen output instead of adding to it, so the network must be warmed up before it computes anything useful.

    Args:
        source: the model trained on source data; its modules are shared, not copied.
        cut: where its backbone is cut.
        generator: source of the initial weights.
        batch_statistics: the frozen BatchNorms use the statistics of the batch.
        packed: ReLUs keep bits for backward.
    """

    def __init__(
        self, source: nn.Module, cut: Cut, *, generator: torch.Generator, batch_statistics: bool, packed: bool
    ) -> None:
        backbone, head = source.backbone, source.head
        assert isinstance(backbone, nn.Module) and isinstance(head, nn.Module)
        super().__init__(backbone, head, feature_dim=source.feature_dim, spec=source.spec)  # type: ignore[arg-type]
        self.input_shape = source.input_shape  # type: ignore[assignment]
        self.cut = cut
        self.batch_statistics = batch_statistics
        self.packed = packed
        parts = []
        for before, after in zip(cut.shapes, cut.shapes[1:], strict=False):
            stride = conv_stride(before, after)
            parts.append(MetaPart(before[0], after[0], stride, packed=packed, generator=generator))
        self.meta = nn.ModuleList(parts).to(next(backbone.parameters()).device)

    @property
    def parts(self) -> list[MetaPart]:
        """The meta parts in order."""
        return [part for part in self.meta if isinstance(part, MetaPart)]

    def stem(self, x: Tensor) -> Tensor:
        """x_0 (batch, channels, height, width) of images."""
        return self._run(self.cut.stem, x)

    def frozen(self, k: int, x: Tensor) -> Tensor:
        """u_k = f_k(x): what the frozen blocks of partition ``k`` (from 0) make of its input."""
        return self._run(self.cut.partitions[k], x)

    def partition(self, k: int, x: Tensor) -> Tensor:
        """The output x_k of partition ``k`` (from 0), meta part included."""
        out: Tensor = self.meta[k](self.frozen(k, x), x)
        return out

    def tail(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of the last partition's output."""
        return self._logits(self._features(x))

    def features(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim) of images (batch, channels, height, width)."""
        x = self.stem(x)
        for k in range(len(self.meta)):
            x = self.partition(k, x)
        return self._features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        return self._logits(self.features(x))

    def source_features(self, x: Tensor) -> Tensor:
        """Features of the frozen net alone: the same partitions without meta parts."""
        x = self.stem(x)
        for k in range(len(self.meta)):
            x = self.frozen(k, x)
        return self._features(x)

    def commit(self) -> None:
        """The batch counted: move the meta parts' running statistics. Those of the frozen net never move."""
        for part in self.parts:
            part.norm.commit()
            part.conv_norm.commit()

    def forget(self) -> None:
        """The batch did not count."""
        for part in self.parts:
            part.norm.seen = part.conv_norm.seen = None

    def _operations(self) -> FrozenOperations:
        return FrozenOperations(batch_statistics=self.batch_statistics, packed=self.packed)

    def _run(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        with self._operations():
            for name in names:
                x = self.backbone.get_submodule(name)(x)
        return x

    def _features(self, x: Tensor) -> Tensor:
        if self.cut.tail is not None:
            return self._run(self.cut.tail, x)
        with self._operations():
            features: Tensor = self.backbone.tail(x)  # type: ignore[operator]
            return features

    def _logits(self, features: Tensor) -> Tensor:
        with self._operations():
            logits: Tensor = self.head(features)
            return logits
