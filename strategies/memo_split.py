"""A backbone cut in two: general layers that all tasks share, and the last stages, of which every task gets a copy.

MEMO, arXiv 2205.13218. Both halves run the backbone's own forward pass, and what they compute together is
compared with the whole network before the cut is used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError

KNOWN = (
    "contlearn's residual networks (stages)",
    "timm ResNet, RegNet, EfficientNet, MobileNet, ConvNeXt (stages)",
    "timm VisionTransformer (blocks)",
    "plain chains of layers such as mlp and simple_cnn (layers with weights)",
)


@dataclass(frozen=True)
class _Layout:
    """Children in the order they run: ``front``, then stages, each a child (``stages``) or all inside ``container``."""

    front: tuple[str, ...]
    stages: tuple[str, ...] = ()
    container: str = ""


_LAYOUTS = (
    _Layout(("stem",), tuple(f"stage{number}" for number in range(1, 5))),
    _Layout(("stem",), tuple(f"stage{number}" for number in range(1, 4))),
    _Layout(("conv1", "bn1", "act1", "maxpool"), tuple(f"layer{number}" for number in range(1, 5))),
    _Layout(("conv_stem", "bn1"), container="blocks"),
    _Layout(("stem",), tuple(f"s{number}" for number in range(1, 5))),
    _Layout(("stem",), container="stages"),
)


def split_backbone(
    backbone: nn.Module, count: int, *, input_shape: Sequence[int] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Cut ``backbone`` in front of its last ``count`` stages; the halves share no parameter and leave none out.

    Args:
        backbone: a network without classifier; its modules move into the two halves.
        count: stages (blocks of a transformer) of the second half, with all that follows them.
        input_shape: (channels, height, width) of the images; with it the halves are checked on one.

    Returns:
        The general half and the specialised one; the latter maps what the former gives to (batch, features).

    Raises:
        ContlearnError: a network of another structure, or a number of stages that it does not have.
    """
    name = type(backbone).__name__
    found = _cut(backbone, count)
    if found is None:
        raise ContlearnError(
            f"specialised: backbone {name} has no stages that are known; expected one of: {'; '.join(KNOWN)}"
        )
    general, last = found
    whole, halves = (sorted(id(p) for p in part) for part in (backbone.parameters(), _parameters(general, last)))
    if whole != halves or (input_shape is not None and not _same(backbone, general, last, tuple(input_shape))):
        raise ContlearnError(
            f"specialised: backbone {name} is no chain of its stages; expected one of: {'; '.join(KNOWN)}"
        )
    return general, last


def _cut(backbone: nn.Module, count: int) -> tuple[nn.Module, nn.Module] | None:
    if _is_transformer(backbone):
        return _cut_transformer(backbone, count)
    children = dict(backbone.named_children())
    for layout in _LAYOUTS:
        names = {*layout.front, *layout.stages, *([layout.container] if layout.container else [])}
        later = sum(name.startswith(("stage", "layer")) and name[-1:].isdigit() for name in children)
        if names <= set(children) and (not layout.stages or later <= len(layout.stages)):
            return _cut_stages(backbone, layout, count)
    return _cut_chain(backbone, count)


def _cut_stages(backbone: nn.Module, layout: _Layout, count: int) -> tuple[nn.Module, nn.Module]:
    children = dict(backbone.named_children())
    stages = [children[name] for name in layout.stages] or list(children[layout.container].children())
    kept = _first(backbone, len(stages), count)
    general = nn.Sequential(*(children[name] for name in layout.front), *stages[:kept])
    passed: dict[str, nn.Module] = {name: nn.Identity() for name in (*layout.front, *layout.stages[:kept])}
    if layout.container:
        passed[layout.container] = nn.Sequential(*stages[kept:])
    return general, _replaced(backbone, passed)


def _cut_chain(backbone: nn.Module, count: int) -> tuple[nn.Module, nn.Module] | None:
    """A ``Sequential``, or a module that is one Sequential named ``layers``."""
    chain = backbone if isinstance(backbone, nn.Sequential) else getattr(backbone, "layers", None)
    if not isinstance(chain, nn.Sequential) or (chain is not backbone and len(dict(backbone.named_children())) != 1):
        return None
    layers = list(chain.children())
    starts = [place for place, layer in enumerate(layers) if _has_weights(layer)]
    if not starts:
        return None
    place = starts[_first(backbone, len(starts), count)]
    first, last = nn.Sequential(*layers[:place]), nn.Sequential(*layers[place:])
    if chain is backbone:
        return first, last
    return (_replaced(backbone, {"layers": first}) if place else nn.Sequential()), _replaced(backbone, {"layers": last})


class TransformerTrunk(nn.Module):
    """timm's VisionTransformer up to a block: tokens (batch, tokens, width) of images."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) of (batch, channels, height, width)."""
        trunk: Any = self.trunk
        tokens = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x))))
        out: Tensor = trunk.blocks(tokens)
        return out


class TransformerEnd(nn.Module):
    """Its last blocks, final norm and pooling: features (batch, width) of tokens."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, width) of (batch, tokens, width)."""
        trunk: Any = self.trunk
        out: Tensor = trunk.forward_head(trunk.norm(trunk.blocks(tokens)))
        return out


def _is_transformer(backbone: nn.Module) -> bool:
    if not type(backbone).__module__.startswith("timm."):
        return False
    from timm.models.vision_transformer import VisionTransformer

    return isinstance(backbone, VisionTransformer)


def _cut_transformer(backbone: Any, count: int) -> tuple[nn.Module, nn.Module]:
    """The first half keeps embeddings, the second norm and pooling: no parameter is in both, or in a half for nothing.

    The one public port for transformers builds a whole network per task and starts the block it uses at random.
    """
    blocks = list(backbone.blocks)
    kept = _first(backbone, len(blocks), count, "blocks")
    behind = {name: nn.Identity() for name in ("norm", "fc_norm", "head", "attn_pool") if _module(backbone, name)}
    front = {name: nn.Identity() for name in ("patch_embed", "patch_drop", "norm_pre") if _module(backbone, name)}
    first = _replaced(backbone, {**behind, "blocks": nn.Sequential(*blocks[:kept])})
    last = _replaced(backbone, {**front, "blocks": nn.Sequential(*blocks[kept:])})
    last._parameters = dict.fromkeys(last._parameters)  # class token and position table
    return TransformerTrunk(first), TransformerEnd(last)


def _first(backbone: nn.Module, stages: int, count: int, kind: str = "stages") -> int:
    """Number of stages in front of the last ``count``."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= stages:
        raise ContlearnError(
            f"specialised: expected 1 to {stages} of the {stages} {kind} of {type(backbone).__name__}, got {count!r}"
        )
    return stages - count


def _replaced(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """``module`` with some children exchanged; the others are shared with it."""
    made = copy.copy(module)
    made._modules = {name: children.get(name, child) for name, child in module._modules.items()}
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    return made


def _module(owner: nn.Module, name: str) -> bool:
    return isinstance(getattr(owner, name, None), nn.Module)


def _has_weights(layer: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear | nn.modules.conv._ConvNd) for part in layer.modules())


def _parameters(*parts: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for part in parts for parameter in part.parameters())


@torch.no_grad()
def _same(whole: nn.Module, general: nn.Module, last: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the halves in turn compute what the whole does, and the second leaves its input alone."""
    modes = {module: module.training for part in (whole, general, last) for module in part.modules()}
    like = next(whole.parameters(), torch.empty(0))
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        for part in (whole, general, last):
            part.eval()
        expected, shared = whole(x.clone()), general(x.clone())
        kept = shared.clone()
        out = last(shared)
        # Several copies will read what the general half gives.
        return bool(torch.allclose(out, expected, rtol=1e-4, atol=1e-5)) and torch.equal(kept, shared)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    finally:
        for module, training in modes.items():
            module.training = training
