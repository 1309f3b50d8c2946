"""What the residual networks share: stem, stages of blocks in order, tail; and the post-activation block."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class ResidualBackbone(nn.Module):
    """A network that is ``tail(blocks(stem(x)))``, so that it can be cut between any two blocks.

    Attributes:
        stem: The module before the first block (input scaling included, where there is any).
        feature_dim: Number of features.
        published_names: (pattern, replacement) pairs that turn the parameter names of the usual published
            implementation into ours; used when weights are loaded.
    """

    published_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    stem: nn.Module
    feature_dim: int

    @property
    def stages(self) -> list[nn.Sequential]:
        """``stage1``, ``stage2``, ...: blocks of equal resolution and width."""
        return [
            child
            for name, child in self.named_children()
            if name.startswith("stage") and isinstance(child, nn.Sequential)
        ]

    @property
    def blocks(self) -> list[nn.Module]:
        """All residual blocks in the order they run."""
        return [block for stage in self.stages for block in stage]

    def tail(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim) of the last block's output (batch, feature_dim, height, width)."""
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim) of images (batch, channels, height, width)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.tail(x)


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), He et al. (arXiv 1512.03385), figure 2.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of both convolutions.
        stride: Stride of the first convolution.
        shortcut: Maps the input to the output's shape.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, out_channels, height / stride, width / stride), sizes rounded up."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + self.shortcut(x))
        return out


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size, divided by ``stride``."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def init_convolutions(network: nn.Module) -> None:
    """He's normal initialisation over the outgoing connections (arXiv 1502.01852), which the papers train with."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
