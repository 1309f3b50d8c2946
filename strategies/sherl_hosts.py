"""Frozen networks cut for side tuning: which features are collected, which last block is run again, how it ends.

Transformers give the embedding and every layer but the last, staged CNNs the end of each stage, the last stage without
its last block (SHERL, arXiv 2407.07523, as released; UniPT and LST collect the same way).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.errors import ContlearnError
from contlearn.models._residual import ResidualBackbone

KNOWN = (
    "timm VisionTransformer (vit_*, deit_*)",
    "timm ResNet (resnet*, resnext*)",
    "timm EfficientNet and MobileNet, efficientnet_lite0",
    "contlearn residual networks (slim_resnet18, resnet32, wrn40_2, ...)",
    "Hugging Face encoders with embeddings and encoder.layer (BertModel)",
)
STAGES = 4  # of a CNN, counted from its end

Reduce = Callable[[int, Tensor], Tensor]


class Host:
    """How one kind of backbone is run in pieces; it holds numbers and no tensor, the backbone is passed in.

    ``pool(finish(late(shallow(x)[-1])))`` is the backbone itself.

    Attributes:
        kind: ``tokens``: features are (batch, tokens, width); ``maps``: (batch, width, height, width).
        widths: of the collected features F_0 .. F_{N-1}, in order.
        last_width: of what the withheld block gives.
        final_width: of what ``finish`` gives.
        windows: side of the pooling window that brings each map to the size of the last; 1 for tokens.
        late_windows: likewise to the size of what the withheld block gives.
        heads: attention heads, 0 for maps.
    """

    kind: ClassVar[str]
    widths: tuple[int, ...]
    last_width: int
    final_width: int
    windows: tuple[int, ...]
    late_windows: tuple[int, ...]
    heads: int = 0

    @classmethod
    def matches(cls, trunk: nn.Module) -> bool:
        """Whether this is the kind of ``trunk``."""
        raise NotImplementedError

    def shallow(self, trunk: nn.Module, x: Tensor, reduce: Reduce | None = None) -> tuple[list[Tensor], Any]:
        """Collected features of a batch, and what later layers need beside them (a mask).

        Args:
            trunk: the backbone.
            x: its input, (batch, channels, height, width) or token ids (batch, tokens).
            reduce: called with position and map as soon as a feature but the last is there; its result is kept instead.
        """
        raise NotImplementedError

    def late(self, trunk: nn.Module, x: Tensor, context: Any) -> Tensor:
        """The withheld last block on its input, in the shape of the last collected feature."""
        raise NotImplementedError

    def finish(self, trunk: nn.Module, x: Tensor) -> Tensor:
        """What follows the last block at full resolution: a final norm, a head convolution."""
        return x

    def pool(self, trunk: nn.Module, x: Tensor) -> Tensor:
        """The backbone's ordinary features (batch, feature_dim)."""
        raise NotImplementedError

    def padding(self, context: Any) -> Tensor | None:
        """(batch, tokens) booleans, true for tokens that count; ``None`` where all do."""
        return None


class ViTHost(Host):
    """timm's VisionTransformer: pre-norm blocks, class token or average pooling."""

    kind = "tokens"

    def __init__(self, trunk: Any, input_shape: tuple[int, ...] | None = None) -> None:
        depth, width = len(trunk.blocks), int(trunk.embed_dim)
        self.widths = (width,) * depth
        self.windows = self.late_windows = (1,) * depth
        self.last_width = self.final_width = width
        self.heads = int(trunk.blocks[-1].attn.num_heads) if hasattr(trunk.blocks[-1], "attn") else 1

    @classmethod
    def matches(cls, trunk: nn.Module) -> bool:
        """timm's class and its kin that change no step of the forward pass."""
        from timm.models.vision_transformer import VisionTransformer

        return _unchanged(trunk, VisionTransformer) and len(trunk.blocks) > 0  # type: ignore[arg-type]

    def shallow(self, trunk: Any, x: Tensor, reduce: Reduce | None = None) -> tuple[list[Tensor], Any]:
        """Embedding, then every block but the last."""
        x = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x))))
        found = [x]
        for block in trunk.blocks[:-1]:
            found.append(block(found[-1]))
        return found, None

    def late(self, trunk: Any, x: Tensor, context: Any) -> Tensor:
        """The last block."""
        return trunk.blocks[-1](x)  # type: ignore[no-any-return]

    def finish(self, trunk: Any, x: Tensor) -> Tensor:
        """The final norm, where it stands in front of the pooling."""
        return trunk.norm(x)  # type: ignore[no-any-return]

    def pool(self, trunk: Any, x: Tensor) -> Tensor:
        """Class token or average."""
        return trunk.head(trunk.forward_head(x, pre_logits=True))  # type: ignore[no-any-return]


class EncoderHost(Host):
    """Hugging Face's BERT and its kin: post-norm layers on token ids (or pixels); the first token is the feature."""

    kind = "tokens"

    def __init__(self, trunk: Any, input_shape: tuple[int, ...] | None = None) -> None:
        depth, width = len(trunk.encoder.layer), int(trunk.config.hidden_size)
        self.widths = (width,) * depth
        self.windows = self.late_windows = (1,) * depth
        self.last_width = self.final_width = width
        self.heads = int(getattr(trunk.config, "num_attention_heads", 1))

    @classmethod
    def matches(cls, trunk: nn.Module) -> bool:
        """By structure: ``transformers`` need not be installed."""
        layers = getattr(getattr(trunk, "encoder", None), "layer", None)
        sized = hasattr(getattr(trunk, "config", None), "hidden_size")
        return isinstance(layers, nn.ModuleList) and len(layers) > 0 and sized and hasattr(trunk, "embeddings")

    def shallow(self, trunk: Any, x: Tensor, reduce: Reduce | None = None) -> tuple[list[Tensor], Any]:
        """Embedding, then every layer but the last; padding tokens are masked."""
        mask = None
        pad = getattr(trunk.config, "pad_token_id", None)
        if not x.is_floating_point() and pad is not None:
            mask = x != pad
        found = [trunk.embeddings(x)]
        for layer in trunk.encoder.layer[:-1]:
            found.append(self._layer(layer, found[-1], mask))
        return found, mask

    def late(self, trunk: Any, x: Tensor, context: Any) -> Tensor:
        """The last layer."""
        return self._layer(trunk.encoder.layer[-1], x, context)

    def finish(self, trunk: Any, x: Tensor) -> Tensor:
        """The final norm of encoders with pre-norm layers."""
        norm = getattr(trunk, "layernorm", None)
        return x if norm is None else norm(x)  # type: ignore[no-any-return]

    def pool(self, trunk: Any, x: Tensor) -> Tensor:
        """First token."""
        return x[:, 0]

    def padding(self, context: Any) -> Tensor | None:
        """The tokens that are not padding."""
        return context  # type: ignore[no-any-return]

    @staticmethod
    def _layer(layer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            out = layer(x)
        else:
            added = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
            added = added.masked_fill_(~mask, torch.finfo(x.dtype).min)[:, None, None]
            out = layer(x, attention_mask=added)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden


class StagedHost(Host):
    """A CNN of blocks in stages: what its kinds share.

    Raises:
        ContlearnError: the shape of the images is not known, or the sizes of the maps do not divide into windows.
    """

    kind = "maps"

    def __init__(self, trunk: nn.Module, input_shape: tuple[int, ...] | None = None) -> None:
        if input_shape is None:
            raise ContlearnError(
                f"{type(trunk).__name__}: the model does not say the shape of its images, expected model.input_shape ="
                " (channels, height, width); contlearn.models.create sets it"
            )
        weight = next(trunk.parameters())
        modes = {module: module.training for module in trunk.modules()}
        trunk.eval()
        try:
            with torch.no_grad():
                blank = torch.zeros(1, *input_shape, device=weight.device, dtype=weight.dtype)
                maps, _ = self.shallow(trunk, blank)
                late = self.late(trunk, maps[-1], None)
                final = self.finish(trunk, late)
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.widths = tuple(one.shape[1] for one in maps)
        self.last_width, self.final_width = late.shape[1], final.shape[1]
        self.windows = tuple(_window(one.shape[2:], maps[-1].shape[2:]) for one in maps)
        self.late_windows = tuple(_window(one.shape[2:], late.shape[2:]) for one in maps)

    def stem(self, trunk: Any, x: Tensor) -> Tensor:
        """What runs before the first block."""
        raise NotImplementedError

    def stages(self, trunk: Any) -> list[list[nn.Module]]:
        """All blocks, by stage, in the order they run."""
        raise NotImplementedError

    def cut(self, trunk: Any) -> list[list[nn.Module]]:
        """Stages without the withheld block; a last stage that has no other block is withheld as a whole."""
        stages = self.stages(trunk)
        return [stage for stage in (*stages[:-1], stages[-1][:-1]) if stage]

    def shallow(self, trunk: nn.Module, x: Tensor, reduce: Reduce | None = None) -> tuple[list[Tensor], Any]:
        """The end of each of the last four stages."""
        x = self.stem(trunk, x)
        stages = self.cut(trunk)
        skipped = max(0, len(stages) - STAGES)
        found: list[Tensor] = []
        for number, stage in enumerate(stages):
            for block in stage:
                x = block(x)
            place = number - skipped
            if place >= 0:
                last = number + 1 == len(stages)
                found.append(x if last or reduce is None else reduce(place, x))
        return found, None

    def late(self, trunk: Any, x: Tensor, context: Any) -> Tensor:
        """The last block of the last stage."""
        return self.stages(trunk)[-1][-1](x)  # type: ignore[no-any-return]


class ResidualHost(StagedHost):
    """contlearn's residual networks."""

    @classmethod
    def matches(cls, trunk: nn.Module) -> bool:
        """Any of them."""
        return isinstance(trunk, ResidualBackbone)

    def stem(self, trunk: Any, x: Tensor) -> Tensor:
        """The stem."""
        return trunk.stem(x)  # type: ignore[no-any-return]

    def stages(self, trunk: Any) -> list[list[nn.Module]]:
        """``stage1``, ``stage2``, ..."""
        return [list(stage) for stage in trunk.stages]

    def pool(self, trunk: Any, x: Tensor) -> Tensor:
        """The tail: a norm where there is one, global average."""
        return trunk.tail(x)  # type: ignore[no-any-return]


class TimmResNetHost(StagedHost):
    """timm's ResNet and ResNeXt."""

    @classmethod
    def matches(cls, trunk: nn.Module) -> bool:
        """timm's class and its kin that change no step of the forward pass."""
        from timm.models.resnet import ResNet

        return _unchanged(trunk, ResNet)

    def stem(self, trunk: Any, x: Tensor) -> Tensor:
        """Convolution and pooling."""
        return trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))  # type: ignore[no-any-return]

    def stages(self, trunk: Any) -> list[list[nn.Module]]:
        """``layer1`` to ``layer4``."""
        return [list(stage) for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)]

    def pool(self, trunk: Any, x: Tensor) -> Tensor:
        """Global average."""
        return trunk.forward_head(x, pre_logits=True)  # type: ignore[no-any-return]


class EfficientNetHost(StagedHost):
    """timm's EfficientNet and MobileNet: inverted residual blocks; a stage is what has one resolution."""

    @classmethod
    def matches(cls, trunk: nn.Module) -> bool:
        """timm's classes and their kin that change no step of the forward pass."""
        from timm.models.efficientnet import EfficientNet
        from timm.models.mobilenetv3 import MobileNetV3

        return any(_unchanged(trunk, known) for known in (EfficientNet, MobileNetV3))

    def stem(self, trunk: Any, x: Tensor) -> Tensor:
        """The first convolution."""
        return trunk.bn1(trunk.conv_stem(x))  # type: ignore[no-any-return]

    def stages(self, trunk: Any) -> list[list[nn.Module]]:
        """Blocks; one with a stride begins a stage."""
        found: list[list[nn.Module]] = [[]]
        for block in (block for part in trunk.blocks for block in part):
            strided = any(max(m.stride) > 1 for m in block.modules() if isinstance(m, nn.Conv2d))
            if strided and found[-1]:
                found.append([])
            found[-1].append(block)
        return found

    def finish(self, trunk: Any, x: Tensor) -> Tensor:
        """EfficientNet's head convolution; MobileNetV3 and V4 pool in front of theirs."""
        return trunk.bn2(trunk.conv_head(x)) if hasattr(trunk, "bn2") else x

    def pool(self, trunk: Any, x: Tensor) -> Tensor:
        """Global average, and MobileNet's head convolution."""
        return trunk.forward_head(x, pre_logits=True)  # type: ignore[no-any-return]


def find_host(trunk: nn.Module, *, method: str, input_shape: Sequence[int] | None = None) -> Host:
    """The host of a backbone.

    Args:
        trunk: the backbone.
        method: who asks, for the message.
        input_shape: (channels, height, width); CNNs need it.

    Raises:
        ContlearnError: no known structure, or fewer than two features; the message names what has one.
    """
    for kind in (ResidualHost, EncoderHost, ViTHost, TimmResNetHost, EfficientNetHost):
        if kind.matches(trunk):
            host = kind(trunk, None if input_shape is None else tuple(input_shape))
            if len(host.widths) < 2:
                raise ContlearnError(
                    f"{method}: {type(trunk).__name__} gives {len(host.widths)} feature in front of its last block,"
                    " expected at least 2; choose a deeper model"
                )
            return host
    raise ContlearnError(
        f"{method}: backbone {type(trunk).__name__} has no structure known to side tuning; expected one of:"
        f" {'; '.join(KNOWN)}"
    )


def pool_map(x: Tensor, window: int, *, largest: bool) -> Tensor:
    """(batch, width, height / window, width / window), rounded up: averages, with ``largest`` plus the maxima."""
    if window == 1:
        return x + x if largest else x
    average = F.avg_pool2d(x, window, ceil_mode=True)
    return average + F.max_pool2d(x, window, ceil_mode=True) if largest else average


def _unchanged(trunk: Any, kind: Any) -> bool:
    """Whether it is of this class, or of one that overrides nothing of its forward pass up to the pooling."""
    return isinstance(trunk, kind) and type(trunk).forward_features is kind.forward_features


def _window(size: Sequence[int], last: Sequence[int]) -> int:
    """The power of 2 that divides maps of ``size`` into ``last`` windows."""
    window = 1 << math.ceil(math.log2(max(size[0] / last[0], size[1] / last[1])))
    if any(math.ceil(one / window) != other for one, other in zip(size, last, strict=True)):
        raise ContlearnError(
            f"side tuning: a map of {tuple(size)} does not divide into the {tuple(last)} windows of the last one;"
            " choose images of another size"
        )
    return window
