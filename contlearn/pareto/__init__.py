"""Sweeps over methods, memory budgets and seeds, and the memory-accuracy front they draw.

``sweep`` runs the cells that a folder lacks and sums all of them up, ``rebuild`` sums up again what is there:

    from contlearn import pareto

    found = pareto.sweep("configs/pareto_digits.yaml", out="runs/pareto_digits", jobs=2)
    found["fronts"]["persistent"]["final_accuracy"]

Importing this package loads neither PyTorch nor Avalanche.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contlearn.pareto.engine import SweepInterrupted, sweep
    from contlearn.pareto.summary import rebuild

__all__ = ["SweepInterrupted", "rebuild", "sweep"]

_FROM = {
    "SweepInterrupted": "contlearn.pareto.engine",
    "rebuild": "contlearn.pareto.summary",
    "sweep": "contlearn.pareto.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)
