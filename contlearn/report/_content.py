"""What a page shows: cells (one run each), groups (the seeds of one setting) and what was derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, Literal

from contlearn.memory.units import in_words

Matrix = Sequence[Sequence[float | None]]

# Bytes (but for exemplars), in the order the page offers them as axis. Parts have a dot, as ``method_state.fisher``.
MEMORY = {
    "persistent": "persistent",
    "peak_static": "peak (static)",
    "peak_measured": "peak (measured)",
    "activations": "activations",
    "replay": "replay",
    "method_state": "method state",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "weights": "weights",
    "trainable_weights": "trainable weights",
    "budget": "budget given",
    "memory_size": "exemplars given",
}
# Not part of an account: what a strategy was given, nothing to those that remember nothing.
GIVEN = ("budget", "memory_size")
# What the stacked bars show.
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "replay", "method_state")
METRICS = {
    "final_accuracy": "final accuracy",
    "average_accuracy": "average accuracy",
    "forgetting": "forgetting",
    "mean_error": "mean error",
    "source_mean_error": "mean error of the source model",
    "learning_accuracy": "learning accuracy",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "global_forgetting": "global forgetting",
    "local_forgetting": "local forgetting",
}
MAIN_METRICS = ("final_accuracy", "average_accuracy", "forgetting", "mean_error")
MAIN_MEMORY = ("persistent", "peak_static", "peak_measured", "replay")


@dataclass(frozen=True)
class Spread:
    """A number over the seeds: mean, standard deviation, bootstrap interval (``None`` where not known), count."""

    mean: float | None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        """Mean and sample standard deviation (n - 1); no mean where a seed lacks the number."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return cls(None, n=len(known))
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, n=len(known))


@dataclass(frozen=True)
class Setting:
    """What was run, apart from the seed.

    Attributes:
        label: name of the curve it belongs to; several budgets may share it.
        strategy: registry name.
        budget: bytes, or ``None``.
        memory_size: exemplars, or ``None``.
        options: further parameters that were varied.
    """

    label: str
    strategy: str
    budget: float | None = None
    memory_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What cells of one group have in common."""
        return (self.label, self.strategy, self.budget, self.memory_size, option_words(self.options))

    @property
    def level(self) -> tuple[str, float] | None:
        """The budget as something to compare at: bytes, else exemplars, else ``None``."""
        return level_of(self.budget, self.memory_size)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. ``matrix`` and ``seen`` are as in ``contlearn.metrics``; ``seconds`` is training time.

    ``domains`` holds a test-time run's error by domain and that of the source model, in order of time.
    """

    id: str
    setting: Setting
    seed: int | None
    status: Literal["complete", "failed", "missing", "incomplete"]
    error: str | None = None
    folder: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    matrix: Matrix = ()
    seen: Sequence[float | None] = ()
    seconds: float | None = None
    domains: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)

    @property
    def joint(self) -> bool:
        """Whether it was trained on everything at once: one row for several test experiences."""
        return len(self.matrix) == 1 and len(self.matrix[0]) > 1 and self.status == "complete"


@dataclass(frozen=True)
class Group:
    """The seeds of one setting. ``cells`` are those that ran to their end."""

    id: str
    setting: Setting
    seeds: Sequence[int | None]
    metrics: Mapping[str, Spread]
    memory: Mapping[str, Spread]
    cells: Sequence[Cell]

    @property
    def seconds(self) -> Spread:
        """Training time."""
        return Spread.of([cell.seconds for cell in self.cells])


@dataclass(frozen=True)
class Paired:
    """Two labels at equal memory, seed by seed: ``difference`` is the mean of a - b."""

    a: str
    b: str
    level: tuple[str, float] | None
    metric: str
    n: int
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None


@dataclass(frozen=True)
class Area:
    """Area under accuracy over memory of one label, between two amounts of memory (bytes)."""

    label: str
    memory: str
    average: float | None
    last: float | None
    start: float | None
    end: float | None


@dataclass(frozen=True)
class Content:
    """Everything on a page.

    Attributes:
        kind: what the folder is.
        name: heading.
        description: one sentence by the user, or empty.
        scenario: the stream in words, or empty.
        config: the configuration as YAML text.
        environment: versions and machine.
        fronts: group ids by memory field and metric.
        epochs: loss records of a single run.
        memory_steps: (experience, bytes by component) of a single run.
        notices: what the reader must know first.
    """

    kind: Literal["sweep", "run", "runs"]
    name: str
    description: str = ""
    scenario: str = ""
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    cells: Sequence[Cell] = ()
    groups: Sequence[Group] = ()
    fronts: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    hypervolume: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    areas: Sequence[Area] = ()
    paired: Sequence[Paired] = ()
    epochs: Sequence[Mapping[str, Any]] = ()
    memory_steps: Sequence[tuple[int, Mapping[str, float]]] = ()
    notices: Sequence[str] = ()

    @property
    def test_time(self) -> bool:
        """Whether these are test-time runs and nothing else."""
        return any(cell.domains for cell in self.cells) and not any(cell.seen for cell in self.cells)

    @property
    def metrics(self) -> list[str]:
        """Metrics that some group has, the usual ones first."""
        present = {name for group in self.groups for name, spread in group.metrics.items() if spread.mean is not None}
        return [name for name in METRICS if name in present] + sorted(present - METRICS.keys())

    @property
    def memory(self) -> list[str]:
        """Memory fields that some group has, parts of a field after it; of test-time runs, the peak first."""
        present = {name for group in self.groups for name, spread in group.memory.items() if spread.mean is not None}
        order = ["peak_static", *MEMORY] if self.test_time else list(MEMORY)
        return sorted(present, key=lambda name: (order.index(name.split(".")[0]), name))

    @property
    def account(self) -> list[str]:
        """:attr:`memory` without what was merely given."""
        return [name for name in self.memory if name not in GIVEN]

    @cached_property
    def series(self) -> list[str]:
        """Names of the curves: labels where a label has several settings, else strategies."""
        return list(dict.fromkeys(self.series_of.values()))

    @cached_property
    def series_of(self) -> dict[str, str]:
        """The curve that each group belongs to, by group id."""
        settings = {group.id: group.setting for group in self.groups}
        by_label = len({setting.label for setting in settings.values()}) < len(settings)
        return {one: setting.label if by_label else setting.strategy for one, setting in settings.items()}

    @cached_property
    def levels(self) -> list[tuple[str, float]]:
        """Budgets that were compared, smallest first."""
        return sorted({group.setting.level for group in self.groups if group.setting.level is not None})


def metric_name(metric: str) -> str:
    """A metric as text, such as ``final accuracy``."""
    return METRICS.get(metric, metric.replace("_", " "))


def memory_name(name: str) -> str:
    """A memory field as text, such as ``method state: fisher``."""
    first, _, part = name.partition(".")
    return f"{MEMORY.get(first, first.replace('_', ' '))}: {part.replace('_', ' ')}" if part else MEMORY.get(name, name)


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better: errors and forgetting."""
    return "error" in metric or "forgetting" in metric


def level_of(budget: float | None, memory_size: int | None) -> tuple[str, float] | None:
    """A budget in bytes, else in exemplars, else ``None``."""
    if budget is not None:
        return ("bytes", budget)
    return ("exemplars", memory_size) if memory_size is not None else None


def level_words(level: tuple[str, float] | None) -> str:
    """A budget as text."""
    if level is None:
        return "no budget"
    return in_words(level[1]) if level[0] == "bytes" else f"{level[1]:.0f} exemplars"


def option_words(options: Mapping[str, Any]) -> str:
    """Varied parameters as text: ``lr=0.1, policy=ring``."""
    return ", ".join(f"{name}={value}" for name, value in sorted(options.items()))


def group_cells(cells: Sequence[Cell]) -> list[Group]:
    """The cells' settings in order of appearance, with mean and spread over the seeds that ran to their end."""
    members: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        if cell.status in ("complete", "incomplete"):
            members.setdefault(cell.setting.key, []).append(cell)
    groups = []
    for number, group in enumerate(members.values()):
        metrics = dict.fromkeys(name for cell in group for name in cell.metrics)
        memory = dict.fromkeys(name for cell in group for name in cell.memory)
        groups.append(
            Group(
                id=f"group-{number}",
                setting=group[0].setting,
                seeds=[cell.seed for cell in group],
                metrics={name: Spread.of([cell.metrics.get(name) for cell in group]) for name in metrics},
                memory={name: Spread.of([cell.memory.get(name) for cell in group]) for name in memory},
                cells=group,
            )
        )
    return groups


def with_given(groups: Sequence[Group]) -> list[Group]:
    """The groups with what they were given as further memory fields, where any was given something."""
    found = list(groups)
    for name in GIVEN:
        if any(getattr(group.setting, name) is not None for group in found):
            found = [
                replace(
                    group,
                    memory={**group.memory, name: Spread(getattr(group.setting, name) or 0, n=len(group.seeds))},
                )
                for group in found
            ]
    return found


def complete_fronts(
    groups: Sequence[Group], given: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, dict[str, list[str]]]:
    """Group ids on the front, cheapest first, for every memory field and metric: the given ones, else computed."""
    known = {group.id for group in groups}
    fields = {name for group in groups for name in group.memory}
    metrics = {name for group in groups for name in group.metrics}
    fronts: dict[str, dict[str, list[str]]] = {}
    for memory in sorted(fields):
        for metric in sorted(metrics):
            found = given.get(memory, {}).get(metric)
            ids = front(groups, memory, metric) if found is None else [one for one in found if one in known]
            if ids:
                fronts.setdefault(memory, {})[metric] = ids
    return fronts


def front(groups: Sequence[Group], memory: str, metric: str) -> list[str]:
    """Ids of the groups that no other group beats in memory without losing in the metric, cheapest first."""
    points = []
    for group in groups:
        bytes_, value = group.memory.get(memory), group.metrics.get(metric)
        if bytes_ and value and bytes_.mean is not None and value.mean is not None:
            points.append((bytes_.mean, value.mean if lower_is_better(metric) else -value.mean, group.id))
    best: float | None = None
    ids = []
    for _, loss, one in sorted(points, key=lambda point: point[:2]):
        if best is None or loss < best:
            best = loss
            ids.append(one)
    return ids
