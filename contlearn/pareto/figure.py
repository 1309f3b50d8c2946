"""``pareto.png``: accuracy (of test-time runs, error) over memory, one line per strategy, and the front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contlearn import plots
from contlearn.pareto import summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The axis is the first of these that tells the groups apart.
FIELDS = ("persistent", "peak_static", "replay", "budget", "memory_size")
# A device that adapts must hold the step, and what it keeps differs little from one adapter to the next.
TEST_TIME_FIELDS = ("peak_static", "persistent")
NAMES = {
    "persistent": "persistent memory: weights, state and replay",
    "peak_static": "peak memory of training or adapting",
    "replay": "replay memory",
    "budget": "memory budget",
    "memory_size": "exemplars in memory",
}
FRONT = "#8C8C8C"
GAP = 0.3  # accuracies this far apart, with nothing between them, get panels of their own


def draw(content: Mapping[str, Any], path: Path) -> bool:
    """Write a PNG of 1280x880 pixels: means with one standard deviation of the seeds, and the front as a staircase.

    A strategy without memory, on an axis of what it was given, is a dashed level.

    Args:
        content: of ``pareto.json``.
        path: the PNG to write.

    Returns:
        Whether there was anything to draw; where not, an earlier file is removed.

    Raises:
        ContlearnError: the file cannot be written.
    """
    metric = summary.headline(content["groups"])
    groups: Sequence[Mapping[str, Any]] = [group for group in content["groups"] if metric in group["metrics"]]
    field = axis(groups)
    if field is None:
        path.unlink(missing_ok=True)
        return False
    figure = plots._figure(1280, 880)
    memory = {group["id"]: summary.memory_of(group, field) for group in groups}
    known = [group for group in groups if memory[group["id"]] is not None]
    factor, unit = _unit([float(memory[group["id"]] or 0) for group in known], field)
    scaled = {group["id"]: float(memory[group["id"]] or 0) / factor for group in known}
    amounts = sorted({amount for amount in scaled.values() if amount > 0})
    logarithmic = amounts[-1] / amounts[0] > 8
    panels = _panels(figure, [group["metrics"][metric] for group in known], from_zero=not summary.METRICS[metric])
    labels = list(dict.fromkeys(group["label"] for group in known))
    levels = [label for label in labels if all(scaled[g["id"]] == 0 for g in known if g["label"] == label)]
    for axes in panels:
        if logarithmic:
            axes.set_xscale("log", base=2)
        handles = []
        for index, label in enumerate(labels):
            members = sorted((g for g in known if g["label"] == label), key=lambda group: scaled[group["id"]])
            if logarithmic and label in levels:
                handles.append(_level(axes, members, metric, index, levels.index(label), len(levels)))
            else:
                handles.append(_curve(axes, members, metric, scaled, index))
        front = [group_id for group_id in content["fronts"][field][metric] if scaled[group_id] > 0 or not logarithmic]
        means = {group["id"]: group["metrics"][metric]["mean"] for group in known}
        if len(front) > 1:
            (line,) = axes.step(
                [scaled[group_id] for group_id in front],
                [means[group_id] for group_id in front],
                where="post", color=FRONT, linewidth=7, alpha=0.35, solid_capstyle="round", zorder=1,
            )  # fmt: skip
            handles.append(line)
        axes.grid(color="#D9D9D9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if logarithmic:
            _ticks(axes, amounts)
    panels[-1].set_xlabel(f"{NAMES.get(field, field.replace('_', ' '))}{f' ({unit})' if unit else ''}")
    panels[0].set_ylabel(metric.replace("_", " "))
    seeds = max(len(group["seeds"]) for group in known)
    if seeds > 1:
        text = f"mean of up to {seeds} seeds, bars: one standard deviation"
        panels[0].set_title(text, fontsize=9, color="#555555", loc="left")
    plots._legend(figure, handles, [*labels, "the front: no other mean is better with less"][: len(handles)])
    plots._save(figure, path)
    return True


def axis(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The field of memory to draw over; ``None`` where none tells the groups apart."""
    available = summary.memory_fields(groups)
    first = TEST_TIME_FIELDS if summary.headline(groups) == "mean_error" else ()
    candidates: list[str] = [*first, *FIELDS, *available]
    for field in candidates:
        if field in available and len({summary.memory_of(group, field) for group in groups} - {0.0, None}) > 1:
            return field
    return None


def _panels(figure: Figure, spreads: Sequence[Mapping[str, Any]], *, from_zero: bool) -> list[Axes]:
    """One set of axes, or two where a gap would leave most of one empty: the upper, with most of the room, first."""
    ends = sorted((s["mean"] - (s["sd"] or 0.0), s["mean"] + (s["sd"] or 0.0)) for s in spreads)
    if from_zero:
        axes = figure.add_subplot()
        axes.set_ylim(0.0, min(1.0, 1.1 * max(high for _, high in ends)) or 1.0)
        return [axes]
    highest = list(itertools.accumulate((high for _, high in ends), max))
    gaps = [(low - before, before, low) for before, (low, _) in zip(highest, ends[1:], strict=False)]
    width, below, above = max(gaps, default=(0.0, 0.0, 0.0))
    top = min(1.0, highest[-1] + 0.03)
    if width < GAP or width < top - above:
        axes = figure.add_subplot()
        axes.set_ylim(plots._floor([low for low, _ in ends]), 1.0)
        return [axes]
    bottom = max(0.0, ends[0][0] - 0.04)
    limits = [(above - 0.04, top), (bottom, below + 0.04)]
    share = min(0.25, max(0.1, (limits[1][1] - bottom) / (top - limits[0][0])))
    grid = figure.add_gridspec(2, 1, height_ratios=[1.0, share], hspace=0.04)
    upper = figure.add_subplot(grid[0])
    lower = figure.add_subplot(grid[1], sharex=upper)
    for axes, limit in zip((upper, lower), limits, strict=True):
        axes.set_ylim(*limit)
    upper.tick_params(axis="x", length=0, labelbottom=False)
    upper.spines["bottom"].set_visible(False)
    for axes, y in ((upper, 0.0), (lower, 1.0)):  # the cut
        axes.plot([0], [y], transform=axes.transAxes, marker=[(-1, -0.5), (1, 0.5)], markersize=9, color="black",
                  clip_on=False, linestyle="none")  # fmt: skip
    return [upper, lower]


def _curve(
    axes: Axes, members: Sequence[Mapping[str, Any]], metric: str, scaled: Mapping[str, float], index: int
) -> Any:
    """A label's means with error bars."""
    spreads = [group["metrics"][metric] for group in members]
    style: dict[str, Any] = {
        "color": plots.COLOURS[index % len(plots.COLOURS)],
        "marker": plots.MARKERS[index % len(plots.MARKERS)],
        "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.7, "linewidth": 1.8, "zorder": 3,
    }  # fmt: skip
    bars = axes.errorbar(
        [scaled[group["id"]] for group in members],
        [spread["mean"] for spread in spreads],
        yerr=[spread["sd"] or 0.0 for spread in spreads],
        capsize=3, elinewidth=1.2, **style,
    )  # fmt: skip
    return bars.lines[0]


def _level(
    axes: Axes, members: Sequence[Mapping[str, Any]], metric: str, index: int, position: int, count: int
) -> Any:
    """A dashed level; dashes of several levels fall into each other's gaps, so that equal ones can be told apart."""
    mean, colour = members[0]["metrics"][metric]["mean"], plots.COLOURS[index % len(plots.COLOURS)]
    dashes = (-4.0 * position, (4.0, 4.0 * max(1, count - 1)))
    return axes.axhline(mean, color=colour, linestyle=dashes, linewidth=1.8, zorder=2)


def _unit(amounts: Sequence[float], field: str) -> tuple[float, str]:
    """What to divide by, and its name."""
    if field in summary.NOT_BYTES:
        return 1.0, ""
    largest = max(amounts)
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((factor, unit) for factor, unit in units if largest >= 2 * factor), (1.0, "bytes"))


def _ticks(axes: Axes, amounts: Sequence[float]) -> None:
    """On a logarithmic axis, the amounts themselves where they are few, else powers of two."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    if len(amounts) <= 8:
        axes.set_xticks(amounts)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
