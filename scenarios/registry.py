"""The scenarios by name: frozen records that point at their functions without importing them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from contlearn.errors import unknown_name


@dataclass(frozen=True)
class ScenarioInfo:
    """One scenario: where its function lives and what it is."""

    name: str
    factory: str
    description: str
    source: str

    def load(self) -> Callable[..., Any]:
        """The scenario's function."""
        module, attribute = self.factory.split(":")
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


# No module may bear the name of its function: importing it would hide the function in the package.
_RECORDS = (
    ScenarioInfo(
        "class_incremental",
        "contlearn.scenarios.incremental:class_incremental",
        "New classes in every experience, no task id at test time.",
        "van de Ven et al., Nature Machine Intelligence 2022",
    ),
    ScenarioInfo(
        "task_incremental",
        "contlearn.scenarios.incremental:task_incremental",
        "New classes in every experience, task id given at test time.",
        "van de Ven et al., Nature Machine Intelligence 2022",
    ),
    ScenarioInfo(
        "domain_incremental",
        "contlearn.scenarios.domains:domain_incremental",
        "The same classes under a new input distribution: rotation, permutation, instances or sessions.",
        "van de Ven et al., Nature Machine Intelligence 2022",
    ),
    ScenarioInfo(
        "online",
        "contlearn.scenarios.online_stream:online",
        "A class-incremental stream seen once, a few samples at a time.",
        "arXiv 1902.10486",
    ),
    ScenarioInfo(
        "blurry",
        "contlearn.scenarios.blurry_stream:blurry",
        "Si-blurry: some classes in one experience only, the others leak everywhere.",
        "arXiv 2308.09303",
    ),
    ScenarioInfo(
        "label_reshuffle",
        "contlearn.scenarios.plasticity:label_reshuffle",
        "The same images under new labels in every experience: can the network still learn?",
        "arXiv 2303.01486",
    ),
    ScenarioInfo(
        "input_permutation",
        "contlearn.scenarios.plasticity:input_permutation",
        "All classes under a new permutation of the pixels in every experience.",
        "arXiv 1312.6211",
    ),
    ScenarioInfo(
        "transfer",
        "contlearn.scenarios.transfer_stream:transfer",
        "One experience with all classes: plain transfer learning, on few images if asked for.",
        "-",
    ),
    ScenarioInfo(
        "corruptions",
        "contlearn.scenarios.corruptions_stream:corruptions",
        "Clean training data, then test data under one corruption after another, in temporal order.",
        "arXiv 1903.12261, 2203.13591",
    ),
)
SCENARIOS: dict[str, ScenarioInfo] = {record.name: record for record in _RECORDS}


def describe(name: str) -> ScenarioInfo:
    """The record of a scenario.

    Raises:
        ContlearnError: unknown name; the message gives the nearest.
    """
    if name not in SCENARIOS:
        raise unknown_name("scenario", name, SCENARIOS)
    return SCENARIOS[name]
