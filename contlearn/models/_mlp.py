"""The fully connected network of the small benchmarks; the same layers as Avalanche's SimpleMLP."""

from __future__ import annotations

import math

from torch import Tensor, nn

from contlearn.models._checks import Shape, fraction, image_shape, whole


class MLP(nn.Module):
    """Flatten, then Linear-ReLU-Dropout per hidden layer."""

    def __init__(self, in_features: int, hidden: int, hidden_layers: int, dropout: float) -> None:
        super().__init__()
        self.feature_dim = hidden
        sizes = [in_features] + [hidden] * (hidden_layers - 1)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(size, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)) for size in sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, hidden) of images (batch, channels, height, width)."""
        features: Tensor = self.layers(x.flatten(1))
        return features


def mlp(input_shape: Shape, *, hidden: int = 100, hidden_layers: int = 1, dropout: float = 0.5) -> MLP:
    """Fully connected network for images of any size; features: ``hidden``.

    Args:
        input_shape: (channels, height, width) of one image.
        hidden: Units per hidden layer.
        hidden_layers: Number of hidden layers.
        dropout: Probability that a hidden unit is zeroed in training.

    Raises:
        ContlearnError: An option is out of range.
    """
    return MLP(
        math.prod(image_shape("mlp", input_shape)),
        whole("hidden", hidden, least=1),
        whole("hidden_layers", hidden_layers, least=1),
        fraction("dropout", dropout),
    )
