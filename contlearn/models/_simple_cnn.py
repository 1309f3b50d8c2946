"""A small convolutional network for small images, after Avalanche's SimpleCNN."""

from __future__ import annotations

from torch import Tensor, nn

from contlearn.models._checks import Shape, fraction, image_shape


class SimpleCNN(nn.Module):
    """Two pairs of 3x3 convolutions with pooling, a 1x1 convolution, and the maximum over all positions."""

    feature_dim = 64

    def __init__(self, in_channels: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_pair(in_channels, 32, dropout),
            *_pair(32, 64, dropout),
            nn.Conv2d(64, 64, 1),
            nn.ReLU(inplace=True),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, 64) of images (batch, channels, height, width)."""
        features: Tensor = self.layers(x)
        return features


def _pair(in_channels: int, out_channels: int, dropout: float) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(dropout),
    ]


def simple_cnn(input_shape: Shape, *, dropout: float = 0.25) -> SimpleCNN:
    """Small convolutional network for images of at least 8x8 pixels; 64 features, 69,728 parameters at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image.
        dropout: Probability that an activation is zeroed in training, after each pair and before the head.

    Raises:
        ContlearnError: The images are smaller than 8x8, or an option is out of range.
    """
    channels, _, _ = image_shape("simple_cnn", input_shape, least=8)
    return SimpleCNN(channels, fraction("dropout", dropout))
