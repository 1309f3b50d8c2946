"""Which parameters of a backbone train: by shell-style patterns over their names, or by a preset."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from contlearn.errors import ContlearnError, nearest

PRESETS: dict[str, tuple[str, ...]] = {
    "qkv": ("*attn.qkv.*",),  # query, key and value projections of every self-attention block (timm's ViT and DeiT)
    "head": (),  # nothing of the backbone
    "norms": (),  # filled in from the modules, see below
}
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def select_trainable(backbone: nn.Module, wanted: Sequence[str], *, model: str) -> None:
    """Freeze every parameter of ``backbone`` whose name matches none of ``wanted``.

    Args:
        backbone: changed in place (``requires_grad``).
        wanted: patterns over parameter names (``stage3.*``, ``*attn.qkv.*``) or presets: ``qkv``, ``norms`` (scale and
            offset of every normalisation), ``head`` (nothing of the backbone).
        model: its name, for errors.

    Raises:
        ContlearnError: a pattern that matches no parameter.
    """
    names = [name for name, _ in backbone.named_parameters()]
    chosen: set[str] = set()
    for entry in wanted:
        if entry == "head":
            continue
        if entry == "norms":
            found = _parameters_of_norms(backbone)
        else:
            patterns = PRESETS.get(entry, (entry,))
            found = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
        if not found:
            close = nearest(entry, [name for name in (*PRESETS, *names) if name != entry])
            hint = f"; did you mean {close!r}?" if close else ""
            raise ContlearnError(
                f"trainable: {entry!r} matches no parameter of model {model!r}{hint} (expected patterns over its "
                f"{len(names)} parameter names, such as {names[0] if names else ''!r}, or {', '.join(PRESETS)})"
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
