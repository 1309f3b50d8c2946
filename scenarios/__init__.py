"""Streams of experiences and the data sets behind them.

``class_incremental``, ``domain_incremental``, ``corruptions`` and the others each return an Avalanche ``CLScenario``;
``create(name, ...)`` does the same by name, ``list()`` and ``describe(name)`` tell what there is.
Importing this package loads neither PyTorch nor Avalanche: a scenario's module is imported when it is first used.
"""

from __future__ import annotations

import builtins
import fnmatch
from typing import TYPE_CHECKING, Any

from contlearn.scenarios.registry import SCENARIOS, ScenarioInfo, describe

if TYPE_CHECKING:
    from contlearn.scenarios.blurry_stream import blurry
    from contlearn.scenarios.corruptions_stream import corruptions
    from contlearn.scenarios.domains import domain_incremental
    from contlearn.scenarios.incremental import class_incremental, task_incremental
    from contlearn.scenarios.online_stream import online
    from contlearn.scenarios.plasticity import input_permutation, label_reshuffle
    from contlearn.scenarios.stream import Scenario
    from contlearn.scenarios.transfer_stream import transfer

__all__ = [
    "ScenarioInfo",
    "blurry",
    "class_incremental",
    "corruptions",
    "create",
    "describe",
    "domain_incremental",
    "input_permutation",
    "label_reshuffle",
    "list",
    "online",
    "task_incremental",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name in SCENARIOS:
        function = SCENARIOS[name].load()
        globals()[name] = function
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def list(pattern: str = "*") -> builtins.list[str]:
    """Names of the scenarios that match a shell-style pattern."""
    return fnmatch.filter(SCENARIOS, pattern)


def create(name: str, **options: Any) -> Scenario:
    """Build a scenario by name.

    Raises:
        ContlearnError: unknown name or option, or data that is missing or damaged.
    """
    scenario: Scenario = describe(name).load()(**options)
    return scenario
