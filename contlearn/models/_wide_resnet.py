"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146) in the layout of RobustBench and AugMix."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from contlearn.models._checks import Shape, fraction, image_shape
from contlearn.models._residual import ResidualBackbone, conv3x3, init_convolutions


class PreActivationBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); where the width changes, a 1x1 convolution of relu(bn(x)) replaces x."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv3x3(out_channels, out_channels)
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, out_channels, height / stride, width / stride), sizes rounded up."""
        activated = self.relu1(self.bn1(x))
        carried = x if self.shortcut is None else self.shortcut(activated)
        hidden = self.relu2(self.bn2(self.conv1(activated)))
        out: Tensor = carried + self.conv2(self.dropout(hidden))
        return out


class CentringConv(nn.Conv2d):
    """A convolution of (x - 0.5) / 0.5: the input scaling that AugMix' networks carry inside."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``; the padding stays 0 after the scaling, which is grey and not black."""
        return super().forward((x - 0.5) / 0.5)


class WideResNet(ResidualBackbone):
    """``stem`` (16 channels), ``stage1`` to ``stage3`` (16, 32, 64 times ``width``), ``norm``, global average.

    Args:
        in_channels: Channels of the images.
        depth: 6n + 4 layers, n blocks per stage.
        width: Factor on the channels.
        dropout: Dropout between the two convolutions of a block.
        normalise_input: Whether the stem scales its input by (x - 0.5) / 0.5.
    """

    published_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^conv1\.", "stem."),
        (r"^block(\d)\.layer\.", r"stage\1."),
        (r"\.convShortcut\.", ".shortcut."),
        (r"^bn1\.", "norm."),
    )

    def __init__(self, in_channels: int, *, depth: int, width: int, dropout: float, normalise_input: bool) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.feature_dim = 64 * width
        stem = CentringConv if normalise_input else nn.Conv2d
        self.stem = stem(in_channels, 16, 3, padding=1, bias=False)
        self.stage1 = _stage(16, 16 * width, 1, blocks, dropout)
        self.stage2 = _stage(16 * width, 32 * width, 2, blocks, dropout)
        self.stage3 = _stage(32 * width, 64 * width, 2, blocks, dropout)
        self.norm = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        init_convolutions(self)

    def tail(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim) of the last block's output (batch, feature_dim, height, width)."""
        return super().tail(self.relu(self.norm(x)))


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        PreActivationBlock(in_channels, out_channels, stride, dropout),
        *(PreActivationBlock(out_channels, out_channels, 1, dropout) for _ in range(blocks - 1)),
    )


def wrn16_2(input_shape: Shape, *, dropout: float = 0.0, normalise_input: bool = False) -> WideResNet:
    """WideResNet-16-2: 6 blocks, 128 features; 690,384 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image, at least 8x8 pixels.
        dropout: Dropout between the two convolutions of a block.
        normalise_input: Scale the input by (x - 0.5) / 0.5 inside the network, for images in 0..1.

    Raises:
        ContlearnError: The images are too small, or an option is out of range.
    """
    channels, _, _ = image_shape("wrn16_2", input_shape, least=8)
    dropout = fraction("dropout", dropout)
    return WideResNet(channels, depth=16, width=2, dropout=dropout, normalise_input=normalise_input)


def wrn40_2(input_shape: Shape, *, dropout: float = 0.0, normalise_input: bool = False) -> WideResNet:
    """WideResNet-40-2: 18 blocks, 128 features; 2,242,256 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image, at least 8x8 pixels.
        dropout: Dropout between the two convolutions of a block.
        normalise_input: Scale the input by (x - 0.5) / 0.5 inside the network. AugMix' weights need it with images
            in 0..1; leave it off where the stream normalises.

    Raises:
        ContlearnError: The images are too small, or an option is out of range.
    """
    channels, _, _ = image_shape("wrn40_2", input_shape, least=8)
    dropout = fraction("dropout", dropout)
    return WideResNet(channels, depth=40, width=2, dropout=dropout, normalise_input=normalise_input)


def wrn28_10(input_shape: Shape, *, dropout: float = 0.0, normalise_input: bool = False) -> WideResNet:
    """WideResNet-28-10: 12 blocks, 640 features; 36,472,784 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image, at least 8x8 pixels.
        dropout: Dropout between the two convolutions of a block.
        normalise_input: Scale the input by (x - 0.5) / 0.5 inside the network; RobustBench's Standard weights take
            images in 0..1 without it.

    Raises:
        ContlearnError: The images are too small, or an option is out of range.
    """
    channels, _, _ = image_shape("wrn28_10", input_shape, least=8)
    dropout = fraction("dropout", dropout)
    return WideResNet(channels, depth=28, width=10, dropout=dropout, normalise_input=normalise_input)
