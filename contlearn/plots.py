"""Figures and the table of finished runs, from their ``results.json`` (``contlearn.results``)."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from rich.table import Table

Runs = Sequence[tuple[str, Mapping[str, Any]]]

# Okabe & Ito (2008), told apart with any colour vision; the faint ones come last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # 8 beside 7 colours: the pair repeats after 56 lines
DPI = 160
NAMED_DOMAINS = 40  # domain visits with a legible name each
NUMBERS_UP_TO = 40  # columns of a matrix whose cells still hold a legible number


def accuracy_per_experience(runs: Runs, path: str | os.PathLike[str]) -> None:
    """A PNG of 1200x800 pixels: accuracy on everything seen so far, after each experience, one line per label.

    Runs with the same label (seeds) become their mean with a band of one standard deviation (of the sample, n - 1),
    over the experiences that all of them reached. A joint run, trained on everything at once, is a dashed level.

    Args:
        runs: pairs of label and results.
        path: the PNG to write.

    Raises:
        ContlearnError: no run, or the file cannot be written.
    """
    groups = _groups(runs)
    figure = _figure(1200, 800)
    axes = figure.add_subplot()
    longest = max(len(results["classes_per_experience"]) for _, results in runs)
    several = any(len(group) > 1 for group in groups.values())
    lows: list[float] = []
    handles = []
    for index, group in enumerate(groups.values()):
        curve = _curve(group)
        x = [float(i) for i, _, _ in curve]
        mean = [value for _, value, _ in curve]
        low, high = [m - sd for _, m, sd in curve], [m + sd for _, m, sd in curve]
        joint = all(results["joint"] for results in group)
        if joint and curve:  # one value, drawn as a level over the whole stream
            x, mean, low, high = [1.0, float(longest)], mean * 2, low * 2, high * 2
        colour = COLOURS[index % len(COLOURS)]
        (line,) = axes.plot(
            x,
            mean,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            linestyle="--" if joint else "-",
            linewidth=1.8,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.7,
            clip_on=False,
            zorder=3,
        )
        if len(group) > 1:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
        handles.append(line)
        lows += [min(pair) for pair in zip(mean, low, strict=True)]

    axes.set_xlabel("experiences learned")
    axes.set_ylabel("accuracy on everything seen so far")
    _whole_ticks(axes, longest)
    axes.set_xlim(1 - 0.02 * max(longest - 1, 1), longest + 0.02 * max(longest - 1, 1))
    axes.set_ylim(_floor(lows), 1.0)
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, handles, list(groups))
    if several:
        axes.set_title("mean of the seeds, band: one standard deviation", fontsize=9, color="#555555", loc="left")
    _save(figure, path)


def accuracy_matrix(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """A PNG heat map of ``accuracy_matrix``, the number in each cell; a pair that was not evaluated is grey.

    Raises:
        ContlearnError: the matrix is empty (nothing was evaluated yet), or the file cannot be written.
    """
    from matplotlib import colormaps

    matrix: Sequence[Sequence[float | None]] = results["accuracy_matrix"]
    if not matrix or not matrix[0]:
        raise ContlearnError("nothing to draw: the run has no evaluation yet")
    rows, columns = len(matrix), len(matrix[0])
    cell = max(22, min(80, 900 // columns))  # pixels
    figure = _figure(max(560, cell * columns + 260), max(280, cell * rows + 150))
    figure.set_layout_engine("compressed")  # keeps the bar as tall as the square cells
    axes = figure.add_subplot()
    colours = colormaps["cividis"].with_extremes(bad="#DDDDDD")
    image = axes.imshow(
        [[float("nan") if value is None else value for value in row] for row in matrix], cmap=colours, vmin=0, vmax=1
    )
    size = min(10.0, cell * 72 / DPI * 0.40)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is None or columns > NUMBERS_UP_TO:
                continue
            text = f"{value:.2f}" if columns <= 12 else f"{value:.2f}".removeprefix("0")
            colour = "black" if value > 0.55 else "white"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
    axes.set_xlabel("on test experience")
    axes.set_ylabel("after everything" if results["joint"] else "after experience")
    _whole_ticks(axes, columns, start=0)
    axes.set_yticks([] if results["joint"] else [tick for tick in axes.get_xticks() if tick < rows])
    axes.set_yticklabels([f"{int(tick) + 1}" for tick in axes.get_yticks()])
    axes.set_xticklabels([f"{int(tick) + 1}" for tick in axes.get_xticks()])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="accuracy")
    bar.outline.set_visible(False)
    _save(figure, path)


def error_over_stream(runs: Runs, path: str | os.PathLike[str]) -> None:
    """A PNG of 1200x800 pixels: error on each domain of test-time runs in order of time, the source model dashed.

    Runs with the same label (seeds) become their mean with a band of one standard deviation, over the domains that all
    of them visited. The source model is that of the runs of the first label.

    Args:
        runs: pairs of label and results.
        path: the PNG to write.

    Raises:
        ContlearnError: no run, none that visited a domain, or the file cannot be written.
    """
    groups = _groups(runs)
    names = list(dict.fromkeys(name for _, results in runs for name in results["domains"]))
    if not names:
        raise ContlearnError("nothing to draw: the run has visited no domain yet")
    figure = _figure(1200, 800)
    axes = figure.add_subplot()
    first = next(iter(groups.values()))
    lines = [(group, "error_by_domain", COLOURS[i % len(COLOURS)], "-") for i, group in enumerate(groups.values())]
    handles = []
    for index, (group, key, colour, style) in enumerate([*lines, (first, "source_error_by_domain", "#777777", "--")]):
        known = [name for name in names if all(name in results[key] for results in group)]
        values = [[results[key][name] for results in group] for name in known]
        x, mean = [names.index(name) + 1 for name in known], [fmean(seeds) for seeds in values]
        source = style == "--"
        (line,) = axes.plot(
            x, mean, color=colour, linestyle=style, linewidth=1.8, markersize=6, markeredgecolor="white",
            markeredgewidth=0.7, marker=None if source and len(x) > 1 else MARKERS[index % len(MARKERS)],
            clip_on=False, zorder=3.5 if source else 3,
        )  # fmt: skip
        if len(group) > 1 and not source:
            spread = [stdev(seeds) for seeds in values]
            low = [max(0.0, m - sd) for m, sd in zip(mean, spread, strict=True)]
            axes.fill_between(x, low, [m + sd for m, sd in zip(mean, spread, strict=True)], color=colour, alpha=0.18,
                              linewidth=0, zorder=2)  # fmt: skip
        handles.append(line)
    axes.set_ylabel("error")
    axes.set_ylim(0.0, None)
    axes.set_xlim(1 - 0.02 * max(len(names) - 1, 1), len(names) + 0.02 * max(len(names) - 1, 1))
    if len(names) <= NAMED_DOMAINS:
        longest = max(map(len, names))
        upright = len(names) * longest > 90
        axes.set_xticks(range(1, len(names) + 1), [_short(name, 24) for name in names], rotation=40 if upright else 0,
                        ha="right" if upright else "center", rotation_mode="anchor", fontsize=8,
                        parse_math=False)  # fmt: skip
    else:
        _whole_ticks(axes, len(names))
        axes.set_xlabel("domain visits")
    axes.grid(axis="y", color="#D9D9D9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, handles, [*groups, "source model, not adapted"])
    if any(len(group) > 1 for group in groups.values()):
        axes.set_title("mean of the seeds, band: one standard deviation", fontsize=9, color="#555555", loc="left")
    _save(figure, path)


def domain_table(results: Mapping[str, Any]) -> Table:
    """A rich table of a test-time run with a row per domain: error of the adapter, of the source model, difference."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_footer=True)
    found.add_column("domain", "mean", overflow="fold")
    mean, source = results["mean_error"], results["source_mean_error"]
    for heading, footer in ((results["strategy"], mean), ("source", source)):
        found.add_column(Text(heading), "-" if footer is None else f"{footer:.3f}", justify="right", min_width=5)
    found.add_column("difference", "-" if mean is None else f"{mean - source:+.3f}", justify="right", min_width=6)
    for name in results["domains"]:
        error, other = results["error_by_domain"][name], results["source_error_by_domain"][name]
        worse = "red" if error > other else ""
        found.add_row(Text(name), f"{error:.3f}", f"{other:.3f}", Text(f"{error - other:+.3f}", style=worse))
    return found


def worse_than_source(results: Mapping[str, Any]) -> str:
    """The line that says that adaptation did harm."""
    return (
        f"{results['strategy']} is worse than the source model it started from: mean error "
        f"{results['mean_error']:.3f} instead of {results['source_mean_error']:.3f}"
    )


def table(runs: Runs) -> Table:
    """A rich table with a row per label: final and average accuracy, forgetting, training seconds.

    Several runs of one label give mean ± standard deviation (of the sample, n - 1); a value that some run of the label
    lacks is shown as "-".

    Raises:
        ContlearnError: no run.
    """
    from rich.table import Table  # late: importing rich costs more than reading results
    from rich.text import Text

    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    found.add_column("run", overflow="fold")
    for heading in ("seeds", "final accuracy", "average accuracy", "forgetting", "train s"):
        found.add_column(heading, justify="right", overflow="fold", min_width=5)  # no digit lost to an ellipsis
    for label, group in _groups(runs).items():
        row = [
            _spread([results["metrics"][name] for results in group], ".3f")
            for name in ("final_accuracy", "average_accuracy", "forgetting")
        ]
        seconds = _spread([results["time"]["train_s"] for results in group], ".1f")
        found.add_row(Text(label), str(len(group)), *row, seconds)
    return found


def _groups(runs: Runs) -> dict[str, list[Mapping[str, Any]]]:
    if not runs:
        raise ContlearnError("nothing to show: no run was given")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for label, results in runs:
        groups.setdefault(label, []).append(results)
    return groups


def _curve(group: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, float]]:
    """(experiences learned, mean, standard deviation) wherever every run of the group has a value."""
    curve = []
    for i, values in enumerate(zip(*(results["accuracy_seen"] for results in group), strict=False), start=1):
        if all(value is not None for value in values):
            curve.append((i, fmean(values), stdev(values) if len(values) > 1 else 0.0))
    return curve


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = format(fmean(known), form)
    return f"{mean} ± {stdev(known):{form}}" if len(known) > 1 else mean


def _floor(values: Sequence[float]) -> float:
    """Lower end of the accuracy axis: 0, or a tenth below the lowest value where all are high."""
    lowest = min(values, default=0.0)
    return max(0.0, int(lowest * 10 - 0.5) / 10) if lowest > 0.5 else 0.0


def _legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """A legend below the axes, in as many columns as the labels leave room for, at most seven rows."""
    room = {columns: 108 // columns - 9 for columns in (3, 2, 1)}  # characters per label, at 9 points
    fits = [columns for columns in room if columns <= len(labels) and max(map(len, labels)) <= room[columns]]
    columns = max(fits[0] if fits else 1, min(3, -(-len(labels) // 7)))
    legend = figure.legend(
        handles,
        [str(i) for i in range(len(handles))],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        # Set here, not above: a legend drops labels that begin with "_", and "$" is no mathematics in a label.
        text.set_parse_math(False)
        text.set_text(_short(label, room[columns]))


def _short(text: str, length: int) -> str:
    """``text`` in one line with its middle left out where it is too long: labels of a sweep differ at their ends."""
    text = " ".join(text.split())
    head = length // 3
    return text if len(text) <= length else f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def _whole_ticks(axes: Axes, count: int, start: int = 1) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if count / step <= 20)
    first = start if step == 1 else start - 1 + step
    axes.set_xticks(range(first, start + count, step))


def _figure(width: int, height: int) -> Figure:
    """A figure of so many pixels, free of pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained", facecolor="white")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)  # Agg, whatever the surrounding program draws with
    atomic_write_bytes(path, image.getvalue())
