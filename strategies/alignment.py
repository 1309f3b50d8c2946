"""Weight alignment: rows of new classes shrunk to the mean norm of the old ones' (WA, arXiv 1911.07053)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def align_rows(head: Any, old: Sequence[int], new: Sequence[int]) -> float:
    """Multiply the weights of ``new`` rows by the mean norm of the ``old`` rows over theirs; biases stay.

    Args:
        head: a linear layer, ``weight`` (classes, features).
        old: labels of earlier classes.
        new: labels of the classes just learned.

    Returns:
        The factor gamma; 1 where there are no old or no new rows.
    """
    if not old or not new:
        return 1.0
    weight = head.weight
    norms = weight.norm(dim=1)
    before, now = (torch.tensor(list(rows), device=weight.device) for rows in (old, new))
    gamma = norms[before].mean() / norms[now].mean()
    weight[now] *= gamma
    return float(gamma)
