"""The one shape every created model has: a backbone that gives features, and a head that gives logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Classifier(nn.Module):
    """A backbone and its head.

    Attributes:
        backbone: Maps (batch, channels, height, width) to (batch, feature_dim).
        head: Maps (batch, feature_dim) to (batch, outputs); output ``i`` is class label ``i``.
        feature_dim: Number of features.
        input_shape: (channels, height, width) of the images it was made for; ``None`` when put together by hand.
        spec: The arguments that ``contlearn.models.create`` was given, defaults filled in; plain data for a run's
            config. Empty for a model that was put together by hand.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, feature_dim: int, spec: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_dim = feature_dim
        self.input_shape: tuple[int, int, int] | None = None
        self.spec = dict(spec or {})

    def features(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim) of images (batch, channels, height, width)."""
        features: Tensor = self.backbone(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, outputs) of images (batch, channels, height, width)."""
        logits: Tensor = self.head(self.features(x))
        return logits
