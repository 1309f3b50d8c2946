"""TinyTL (arXiv 2007.11622): frozen weights, biases that train, and a small trained branch beside each inverted block.

The branch works at half the resolution (section 3.2); frozen layers keep no inputs for backward (``lean``).
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.errors import ContlearnError
from contlearn.models._selection import select_trainable
from contlearn.strategies.lean import run_lean

GROUP_CHANNELS = 8  # per group of GroupNorm, as released


class TinyTLPlugin(SupervisedPlugin):
    """TinyTL-L+B: lite residual branches, biases and the classifier train; BatchNorm uses running statistics.

    The model must have been prepared before its optimizer is made: strategies of contlearn do so, elsewhere call
    :meth:`prepare_model` first. Its function is unchanged until the first step. The authors start from branches that
    were trained on ImageNet along with a network with GroupNorm; here they start at random behind a scale of zero
    (their ``random_init_lite_residual``), and the network keeps its BatchNorm.

    Args:
        blocks: inverted residual blocks that get a branch, counted from the top; 0: all.
        biases: train every bias of the network, offsets of norms included.
        kernel: side of the branch's grouped convolution; smaller where the halved feature map is.
        groups: groups of that convolution.
        seed: seeds the branches' weights.

    Raises:
        ContlearnError: a value out of range.
    """

    def __init__(
        self, *, blocks: int = 0, biases: bool = True, kernel: int = 5, groups: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (("blocks", blocks, 0), ("kernel", kernel, 1), ("groups", groups, 1)):
            if value < least:
                raise ContlearnError(f"{name}: expected at least {least}, got {value}")
        if kernel % 2 == 0:
            raise ContlearnError(f"kernel: expected an odd number, got {kernel}")
        self.blocks = blocks
        self.biases = biases
        self.kernel = kernel
        self.groups = groups
        self.seed = seed

    def prepare_model(self, model: nn.Module) -> None:
        """Freeze the model in place, and put the branches beside its blocks.

        Raises:
            ContlearnError: no backbone and head, no inverted residual blocks, fewer than asked for, or an input shape
                that is not known.
        """
        backbone, shape = getattr(model, "backbone", None), getattr(model, "input_shape", None)
        if backbone is None or shape is None:
            raise ContlearnError(
                f"tinytl: {type(model).__name__} is no classifier with a known input_shape; expected one that "
                "contlearn.models.create made"
            )
        found = {name: module for name, module in backbone.named_modules() if _is_block(module)}
        if not found:
            raise ContlearnError(
                f"tinytl: {type(backbone).__name__} has no inverted residual blocks; expected a model that has, such "
                "as mobilenetv2_100, mobilenetv3_small_100 or efficientnet_lite0"
            )
        if self.blocks > len(found):
            raise ContlearnError(f"blocks: expected at most {len(found)} for this model, got {self.blocks}")
        chosen = dict(list(found.items())[-self.blocks or None :])
        shapes = _shapes(backbone, chosen, shape)
        select_trainable(backbone, ["biases"] if self.biases else [], model=type(backbone).__name__)
        generator = torch.Generator().manual_seed(self.seed)
        for name, block in chosen.items():
            branch = lite_residual(*shapes[name], kernel=self.kernel, groups=self.groups, generator=generator)
            if self.biases:  # the block's own last offset does the same
                branch[-1].bias.requires_grad_(False)
            owner, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(owner), leaf, LiteResidual(block, branch.to(_device(block))))
        run_lean(model, frozen_norms="running")

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check that the model was prepared."""
        if not any(isinstance(module, LiteResidual) for module in strategy.model.modules()):
            raise ContlearnError(
                "tinytl: the model has no branches; call the plug-in's prepare_model(model) before the optimizer"
            )


class LiteResidual(nn.Module):
    """``block(x) + upsampled(branch(pooled(x)))``.

    Args:
        block: maps ``(batch, in, height, width)`` to ``(batch, out, height / stride, width / stride)``.
        branch: does the same for half the height and width.
    """

    def __init__(self, block: nn.Module, branch: nn.Sequential) -> None:
        super().__init__()
        self.block = block
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """The shape of the block's output."""
        y: Tensor = self.block(x)
        lite: Tensor = self.branch(halved(x))
        lite = F.interpolate(lite, size=y.shape[2:], mode="bilinear", align_corners=False)
        return y + lite


def halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels of ``(batch, channels, height, width)``; a last odd row or column stands for itself twice.

    Unlike ``F.avg_pool2d``, it saves nothing for backward.
    """
    if x.shape[2] % 2:
        x = torch.cat((x, x[:, :, -1:]), 2)
    if x.shape[3] % 2:
        x = torch.cat((x, x[:, :, :, -1:]), 3)
    pairs: Tensor = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return pairs.mean((3, 5))


def lite_residual(
    source: tuple[int, int], target: tuple[int, int], *, kernel: int, groups: int, generator: torch.Generator
) -> nn.Sequential:
    """Grouped convolution, norm, ReLU, 1x1 convolution, norm with a scale of zero.

    Args:
        source: channels and smaller side of the block's input.
        target: the same of its output.
        kernel: side of the grouped convolution, at most that of the halved input.
        groups: as many as divide the channels, at most.
        generator: source of the weights.
    """
    (channels, side), (outputs, out_side) = source, target
    half = -(-side // 2)
    kernel = min(kernel, half if half % 2 else half - 1) if half > 1 else 1
    first = nn.Conv2d(
        channels, channels, kernel, stride=max(1, round(side / out_side)), padding=kernel // 2,
        groups=max(g for g in range(1, groups + 1) if channels % g == 0), bias=False,
    )  # fmt: skip
    second = nn.Conv2d(channels, outputs, 1, bias=False)
    for conv in (first, second):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    branch = nn.Sequential(first, _group_norm(channels), nn.ReLU(inplace=True), second, _group_norm(outputs))
    nn.init.zeros_(branch[-1].weight)  # type: ignore[arg-type]
    return branch


def _group_norm(channels: int) -> nn.GroupNorm:
    size = next((size for size in range(GROUP_CHANNELS, channels + 1) if channels % size == 0), channels)
    return nn.GroupNorm(channels // size, channels)


def _is_block(module: nn.Module) -> bool:
    from timm.models import _efficientnet_blocks as kinds

    # The first block of these networks has nothing to expand and is of a class of its own; it gets a branch, too.
    return isinstance(module, kinds.InvertedResidual | kinds.DepthwiseSeparableConv | kinds.EdgeResidual)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _shapes(
    backbone: nn.Module, blocks: dict[str, nn.Module], input_shape: tuple[int, int, int]
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Channels and smaller side of what each block is given and gives, from one blank image."""
    shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            (_, c, h, w), (_, c2, h2, w2) = inputs[0].shape, output.shape
            shapes[name] = (c, min(h, w)), (c2, min(h2, w2))

        return hook

    hooks = [block.register_forward_hook(note(name)) for name, block in blocks.items()]
    modes = {module: module.training for module in backbone.modules()}
    try:
        with torch.no_grad():
            backbone.eval()(torch.zeros(1, *input_shape, device=_device(backbone)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return shapes
