"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2) with parameter-free shortcuts (option A)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.models._checks import Shape, image_shape
from contlearn.models._residual import BasicBlock, ResidualBackbone, conv3x3, init_convolutions


class SubsamplingShortcut(nn.Module):
    """Option A: every second pixel, and zeros for the channels that are new."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels + new_channels, height / 2, width / 2), sizes rounded up."""
        # The zeros follow the old channels, as in the class-incremental code bases (PyCIL, MEMO); others split
        # them to both sides, which permutes channels and changes nothing for a network trained from scratch.
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(ResidualBackbone):
    """``stem`` (16 channels), ``stage1`` (16), ``stage2`` (32), ``stage3`` (64), global average; 64 features."""

    def __init__(self, in_channels: int, blocks_per_stage: int) -> None:
        super().__init__()
        self.feature_dim = 64
        self.stem = nn.Sequential(conv3x3(in_channels, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.stage1 = _stage(16, 16, blocks_per_stage)
        self.stage2 = _stage(16, 32, blocks_per_stage)
        self.stage3 = _stage(32, 64, blocks_per_stage)
        init_convolutions(self)


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    if in_channels == out_channels:
        first = BasicBlock(in_channels, out_channels, 1, nn.Identity())
    else:
        first = BasicBlock(in_channels, out_channels, 2, SubsamplingShortcut(out_channels - in_channels))
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(blocks - 1)))


def cifar_resnet(input_shape: Shape, depth: int) -> CifarResNet:
    """CIFAR ResNet of ``depth`` = 6n + 2 weighted layers, the classifier's included; 64 features.

    Args:
        input_shape: (channels, height, width) of one image, at least 8x8 pixels.
        depth: 8, 14, 20, 26, 32, ...

    Raises:
        ContlearnError: The images are too small.
        ValueError: ``depth`` is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth is {depth}, a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...)")
    channels, _, _ = image_shape(f"resnet{depth}", input_shape, least=8)
    return CifarResNet(channels, (depth - 2) // 6)


def resnet14(input_shape: Shape) -> CifarResNet:
    """CIFAR ResNet-14: 171,856 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image.
    """
    return cifar_resnet(input_shape, 14)


def resnet20(input_shape: Shape) -> CifarResNet:
    """CIFAR ResNet-20: 269,072 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image.
    """
    return cifar_resnet(input_shape, 20)


def resnet26(input_shape: Shape) -> CifarResNet:
    """CIFAR ResNet-26: 366,288 parameters without the classifier at 3 channels.

    Args:
        input_shape: (channels, height, width) of one image.
    """
    return cifar_resnet(input_shape, 26)


def resnet32(input_shape: Shape) -> CifarResNet:
    """CIFAR ResNet-32: 463,504 parameters without the classifier at 3 channels, 351,488 of them in ``stage3``.

    Args:
        input_shape: (channels, height, width) of one image.
    """
    return cifar_resnet(input_shape, 32)
