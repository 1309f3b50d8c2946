"""ResNet-18 for small images: 3x3 stem, no max-pooling (Lopez-Paz and Ranzato, GEM, arXiv 1706.08840).

Avalanche's SlimResNet18 is this network for 3x32x32 images only; here the pooling is global and the channels are free.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from contlearn.models._checks import Shape, image_shape, whole
from contlearn.models._residual import BasicBlock, ResidualBackbone, conv3x3


class SmallImageResNet18(ResidualBackbone):
    """``stem``, then ``stage1`` to ``stage4`` of two blocks with 1, 2, 4, 8 times ``width`` channels."""

    published_names: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^conv1\.", "stem.0."),
        (r"^bn1\.", "stem.1."),
        (r"^layer(\d)\.", r"stage\1."),
    )

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.feature_dim = 8 * width
        self.stem = nn.Sequential(conv3x3(in_channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stage1 = _stage(width, width, 1)
        self.stage2 = _stage(width, 2 * width, 2)
        self.stage3 = _stage(2 * width, 4 * width, 2)
        self.stage4 = _stage(4 * width, 8 * width, 2)


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    shortcut: nn.Module = nn.Identity()
    if in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride, shortcut),
        BasicBlock(out_channels, out_channels, 1, nn.Identity()),
    )


def resnet18_cifar(input_shape: Shape, *, width: int = 64) -> SmallImageResNet18:
    """ResNet-18 for small images: 8 * ``width`` features; 11,168,832 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image, at least 8x8 pixels.
        width: Channels of the first stage; each later stage doubles them.

    Raises:
        ContlearnError: The images are too small, or an option is out of range.
    """
    channels, _, _ = image_shape("resnet18_cifar", input_shape, least=8)
    return SmallImageResNet18(channels, whole("width", width, least=1))


def slim_resnet18(input_shape: Shape, *, width: int = 20) -> SmallImageResNet18:
    """The slim ResNet-18 of GEM: 8 * ``width`` features; 1,093,140 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image, at least 8x8 pixels.
        width: Channels of the first stage; each later stage doubles them.

    Raises:
        ContlearnError: The images are too small, or an option is out of range.
    """
    channels, _, _ = image_shape("slim_resnet18", input_shape, least=8)
    return SmallImageResNet18(channels, whole("width", width, least=1))
