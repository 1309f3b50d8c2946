"""Which parameters of a backbone train: by shell-style patterns over their names, or by a preset."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from contlearn.errors import ContlearnError, nearest

PRESETS: dict[str, tuple[str, ...]] = {
    "qkv": ("*attn.qkv.*",),  # query, key and value projections of every self-attention block (timm's ViT and DeiT)
    "all": ("*",),
    "head": (),  # nothing of the backbone
    "norms": (),  # filled in from the modules, see below
    "biases": (),  # likewise
}
LAST_BLOCKS = "last_blocks"
_CHOICES = (*PRESETS, f"{LAST_BLOCKS}:K")
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def select_trainable(backbone: nn.Module, wanted: Sequence[str], *, model: str) -> None:
    """Freeze every parameter of ``backbone`` whose name matches none of ``wanted``.

    Args:
        backbone: changed in place (``requires_grad``).
        wanted: patterns over parameter names (``stage3.*``, ``*attn.qkv.*``) or presets: ``qkv``, ``norms`` (scale and
            offset of every normalisation), ``biases`` (every additive term, the offsets of norms included),
            ``last_blocks:K`` (the last K blocks and all that lies behind them), ``all``, ``head`` (nothing of it).
        model: its name, for errors.

    Raises:
        ContlearnError: a pattern that matches no parameter, or a number of blocks that the network does not have.
    """
    names = [name for name, _ in backbone.named_parameters()]
    chosen: set[str] = set()
    for entry in wanted:
        if entry == "head":
            continue
        if entry == "norms":
            found = _parameters_of_norms(backbone)
        elif entry == "biases":
            found = {name for name in names if _is_bias(name)}
        elif entry.partition(":")[0] == LAST_BLOCKS:
            found = _last_blocks(backbone, entry, model)
        else:
            patterns = PRESETS.get(entry, (entry,))
            found = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
        if not found:
            close = nearest(entry, [name for name in (*_CHOICES, *names) if name != entry])
            hint = f"; did you mean {close!r}?" if close else ""
            raise ContlearnError(
                f"trainable: {entry!r} matches no parameter of model {model!r}{hint} (expected patterns over its "
                f"{len(names)} parameter names, such as {names[0] if names else ''!r}, or {', '.join(_CHOICES)})"
            )
        chosen |= found
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in chosen)


def _parameters_of_norms(backbone: nn.Module) -> set[str]:
    return {
        f"{path}.{name}" if path else name
        for path, module in backbone.named_modules()
        # timm's norms with a fused activation derive from these classes, too
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }


def _is_bias(name: str) -> bool:
    """``bias``, and the separate ones of attention (``q_bias``, ``in_proj_bias``); position tables are none."""
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")


def _last_blocks(backbone: nn.Module, entry: str, model: str) -> set[str]:
    """Names of the parameters of the last K blocks and of what follows them."""
    groups = block_groups(backbone)
    places = [place for place, (_, is_block) in enumerate(groups) if is_block]
    if not places:
        raise ContlearnError(
            f"trainable: the blocks of model {model!r} are not known; expected patterns over its parameter names in "
            f"the place of {entry!r}"
        )
    count = entry.partition(":")[2]
    if not (count.isascii() and count.isdecimal() and 1 <= int(count) <= len(places)):
        raise ContlearnError(
            f"trainable: {entry!r} for model {model!r}, expected {LAST_BLOCKS}:K with K from 1 to {len(places)}"
        )
    first = places[-int(count)]
    return {name for names, _ in groups[first:] for name in names}


def block_groups(backbone: nn.Module) -> list[tuple[list[str], bool]]:
    """Parameter names in the order layers run, as stem, blocks and what follows; and whether a group is a block.

    Blocks are those of our residual networks, and of timm's networks what timm groups as one (its layer groups for
    layer-wise rates), but for single convolutions that stand among the blocks. No groups: the order is not known.
    """
    from contlearn.models._residual import ResidualBackbone

    names = [name for name, _ in backbone.named_parameters()]
    if isinstance(backbone, ResidualBackbone):
        paths = {id(module): path for path, module in backbone.named_modules()}
        blocks = [f"{paths[id(block)]}." for block in backbone.blocks]
        inside = [[name for name in names if name.startswith(block)] for block in blocks]
        stem = [name for name in names if name.startswith("stem.")]
        rest = [name for name in names if not name.startswith(("stem.", *blocks))]
        return [(stem, False), *((group, True) for group in inside), (rest, False)]
    matcher = getattr(backbone, "group_matcher", None)
    return [] if matcher is None else _timm_groups(backbone, matcher(coarse=False))


def _timm_groups(backbone: nn.Module, matcher: object) -> list[tuple[list[str], bool]]:
    import re

    from timm.models import group_parameters
    from timm.models._efficientnet_blocks import ConvBnAct

    if not isinstance(matcher, dict):
        return []
    listed = [entry for spec in matcher.values() for entry in (spec if isinstance(spec, list | tuple) else [spec])]
    expressions = [re.compile(entry[0] if isinstance(entry, tuple) else entry) for entry in listed if entry]
    # timm numbers blocks in their names: the expressions of all else take no number out of a name.
    numbered = [expression for expression in expressions if expression.groups]
    single = [f"{path}." for path, module in backbone.named_modules() if type(module) is ConvBnAct]

    def is_block(names: list[str]) -> bool:
        return any(
            any(expression.match(name) for expression in numbered) and not name.startswith(tuple(single))
            for name in names
        )

    groups = group_parameters(backbone, matcher)
    return [(groups[number], is_block(groups[number])) for number in sorted(groups)]
