"""The headline of a page: what was compared and what came out, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from contlearn.report._content import (
    Content,
    Group,
    Paired,
    Spread,
    level_words,
    lower_is_better,
    memory_name,
    metric_name,
)

DASH = "–"


@dataclass(frozen=True)
class Winner:
    """The best group at one budget: ``verdict`` sets it against the next one."""

    level: str
    group: Group
    value: Spread
    verdict: str


def fixed(value: float | None, digits: int = 3) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None:
        return DASH
    shown = f"{value:.{digits}f}"
    return shown.replace("-", "\u2212") if float(shown) else f"{0:.{digits}f}"


def plus_minus(spread: Spread | None, digits: int = 3) -> str:
    """``0.912 ± 0.010``: mean and standard deviation over the seeds."""
    if spread is None or spread.mean is None:
        return DASH
    return fixed(spread.mean, digits) + (f" ± {fixed(spread.sd, digits)}" if spread.sd is not None else "")


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def default_metric(content: Content) -> str | None:
    """The metric a page opens with."""
    return content.metrics[0] if content.metrics else None


def default_memory(content: Content) -> str | None:
    """The memory field a page opens with."""
    return content.memory[0] if content.memory else None


def compared(content: Content) -> str:
    """What was compared, as one sentence."""
    if content.kind == "run":
        cell = content.cells[0]
        seed = "" if cell.seed is None else f", seed {cell.seed}"
        return f"One run of {cell.setting.strategy}{on_stream(content)}{seed}."
    # A run that could not be read says nothing of itself; a cell that failed was planned.
    known = [cell for cell in content.cells if content.kind == "sweep" or cell.status != "failed"]
    settings = len({cell.setting.key for cell in known})
    methods = len({cell.setting.label for cell in known})
    if methods == settings:
        methods = len({cell.setting.strategy for cell in known})
    levels = {cell.setting.level for cell in known if cell.setting.level is not None}
    seeds = {cell.seed for cell in known}
    parts = [counted(methods, "method")]
    if levels:
        parts.append(counted(len(levels), "memory budget"))
    if settings > max(methods, len(levels)):
        parts.append(counted(settings, "setting"))
    parts.append(counted(len(seeds), "seed"))
    cells = counted(len(content.cells), "cell" if content.kind == "sweep" else "run")
    return f"{listed(parts)}{on_stream(content)}: {cells}."


def on_stream(content: Content) -> str:
    """`` on SCENARIO``, where it is known."""
    return f" on {content.scenario}" if content.scenario else ""


def front_sentence(content: Content, memory: str, metric: str) -> str:
    """Who holds the front, as one sentence; empty where there is no front."""
    ids = content.fronts.get(memory, {}).get(metric, ())
    if len(content.groups) < 2 or not ids:
        return ""
    points = Counter(content.series_of[one] for one in ids)
    shares = [f"{name} ({counted(number, 'point')})" for name, number in points.most_common()]
    return f"The front of {metric_name(metric)} over memory ({memory_name(memory)}) is held by {listed(shares)}."


def winners(content: Content, metric: str) -> list[Winner]:
    """The best group at every budget, then the best of those without one."""
    found = []
    for level in [*content.levels, None]:
        ranked = ranking([group for group in content.groups if group.setting.level == level], metric)
        if ranked:
            found.append(
                Winner(
                    level=level_words(level) if content.levels else "all runs",
                    group=ranked[0],
                    value=ranked[0].metrics[metric],
                    verdict=_verdict(content, ranked, metric),
                )
            )
    return found


def ranking(groups: Sequence[Group], metric: str) -> list[Group]:
    """Groups that have the metric, best first."""

    def loss(group: Group) -> float:
        mean = group.metrics[metric].mean
        assert mean is not None
        return mean if lower_is_better(metric) else -mean

    known = [group for group in groups if metric in group.metrics and group.metrics[metric].mean is not None]
    return sorted(known, key=loss)


def _verdict(content: Content, ranked: Sequence[Group], metric: str) -> str:
    if len(ranked) == 1:
        return "the only one" if len(content.groups) > 1 else ""
    best, second = ranked[0], ranked[1]
    mine, theirs = best.metrics[metric].mean, second.metrics[metric].mean
    assert mine is not None and theirs is not None
    gap = abs(mine - theirs)
    name = second.setting.label
    pair = _pair(content.paired, best, second, metric)
    if fixed(gap) == fixed(0):
        return f"level with {name}"
    if pair is not None and pair.low is not None and pair.high is not None and pair.low <= 0 <= pair.high:
        return f"not told apart from {name} by {counted(pair.n, 'seed')} ({fixed(gap)} between them)"
    return f"{fixed(gap)} {'below' if lower_is_better(metric) else 'above'} {name}"


def _pair(paired: Sequence[Paired], best: Group, second: Group, metric: str) -> Paired | None:
    labels = {best.setting.label, second.setting.label}
    for pair in paired:
        if {pair.a, pair.b} == labels and pair.metric == metric and pair.level == best.setting.level:
            return pair
    return None
