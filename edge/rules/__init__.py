"""Portable backward rules: what ``make_fx`` takes as its decomposition table, chosen for a target's runtime.

Each family has a file that ends in a ``REGISTRY``; forms and their measured speed are in docs/edge_rules.md.
"""

from __future__ import annotations

from typing import Any

from contlearn.edge.rules import (
    activation,
    attention,
    convolution,
    indexing,
    layer_norm,
    losses,
    normalisation,
    pooling,
    randomness,
    resize,
    statistics,
)
from contlearn.edge.rules.registry import PROFILES, Decomposition, Gap, Profile, RuleInfo, bound, merged, profile

_FAMILIES = (
    convolution.REGISTRY, pooling.REGISTRY, normalisation.REGISTRY, layer_norm.REGISTRY, activation.REGISTRY,
    losses.REGISTRY, attention.REGISTRY, resize.REGISTRY, indexing.REGISTRY, statistics.REGISTRY, randomness.REGISTRY,
)  # fmt: skip
_RULES = merged(_FAMILIES)


def table(target: str, *, gaps: list[Gap] | None = None) -> dict[Any, Decomposition]:
    """The decomposition table for a target.

    Args:
        target: name of a profile.
        gaps: where given, a gap is added to it and its operator stays in the graph, so that one trace finds all;
            else the first one is raised.

    Raises:
        ContlearnError: no profile has this name.
    """
    chosen = profile(target)
    return {op: bound(rule, chosen, gaps) for (op, name), rule in _RULES.items() if name == target}


def list_rules() -> tuple[RuleInfo, ...]:
    """A record of every rule, family by family."""
    return tuple(info for registry in _FAMILIES for info in registry.infos())


__all__ = ["PROFILES", "Gap", "Profile", "RuleInfo", "list_rules", "table"]
