"""Models for streams: ``create`` one by name, ``list`` the names, ``describe`` one.

Importing this package loads neither torch, Avalanche nor timm; the classes below are fetched on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from contlearn.models._create import HeadKind, StreamSpec, create
from contlearn.models._registry import ModelInfo, describe
from contlearn.models._registry import list_models as list

if TYPE_CHECKING:
    from contlearn.models._classifier import Classifier
    from contlearn.models._growing_head import GrowingHead
    from contlearn.models._residual import ResidualBackbone
    from contlearn.models._task_head import TaskClassifier, TaskHead

__all__ = [
    "Classifier",
    "GrowingHead",
    "HeadKind",
    "ModelInfo",
    "ResidualBackbone",
    "StreamSpec",
    "TaskClassifier",
    "TaskHead",
    "create",
    "describe",
    "list",
]

_LATE = {
    "Classifier": "contlearn.models._classifier",
    "GrowingHead": "contlearn.models._growing_head",
    "ResidualBackbone": "contlearn.models._residual",
    "TaskClassifier": "contlearn.models._task_head",
    "TaskHead": "contlearn.models._task_head",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATE[name]), name)
