"""Continual learning and on-device adaptation with a byte-exact memory account.

``scenarios`` makes streams, ``models`` networks, ``strategies`` methods, and ``run`` trains one on the other:

    from contlearn import models, run, scenarios, strategies

    stream = scenarios.class_incremental("digits", n_experiences=5)
    model = models.create("mlp", stream, seed=0)
    result = run(strategies.create("replay", model, lr=0.1, epochs=30), stream, out="runs/digits_replay")

Importing this package loads nothing heavy; PyTorch and Avalanche come with first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contlearn import models, scenarios, strategies
    from contlearn.errors import ContlearnError
    from contlearn.running import Result, run

__version__ = "0.1.0"
__all__ = ["ContlearnError", "Result", "__version__", "models", "run", "scenarios", "strategies"]

_FROM = {"run": "contlearn.running", "Result": "contlearn.running", "ContlearnError": "contlearn.errors"}


def __getattr__(name: str) -> Any:
    if name in _FROM:
        value = getattr(importlib.import_module(_FROM[name]), name)
    elif name in ("models", "scenarios", "strategies", "edge"):
        value = importlib.import_module(f"contlearn.{name}")
    else:
        raise AttributeError(f"module 'contlearn' has no attribute {name!r}")
    globals()[name] = value
    return value
