"""The sections of a page: headings, controls, places for the plots, tables, and what to do where there is nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from contlearn.memory.units import in_words
from contlearn.report import _tables as tables
from contlearn.report._content import (
    COMPONENTS,
    Content,
    Group,
    Spread,
    level_words,
    lower_is_better,
    memory_name,
    metric_name,
)
from contlearn.report._markup import Child, Markup, element
from contlearn.report._words import (
    compared,
    counted,
    default_memory,
    default_metric,
    front_sentence,
    plus_minus,
    ranking,
    winners,
)

Option = tuple[str, str]  # value and what is shown
BARS = 40  # so many at a time are shown unasked


def header(content: Content) -> Markup:
    """Heading, what was compared, and what the reader must know first."""
    kind = {"sweep": "Memory sweep", "run": "Run", "runs": "Runs"}[content.kind]
    return element(
        "header",
        element("p", kind, class_="kind"),
        element("h1", content.name, class_="label"),
        element("p", content.description, class_="description") if content.description else None,
        element("p", compared(content), class_="lead"),
        *(element("p", notice, class_="notice", role="note") for notice in content.notices),
    )


def headline(content: Content) -> Markup | None:
    """The best at each budget, in words."""
    metric, memory = default_metric(content), default_memory(content)
    if metric is None:
        return None
    if content.kind == "run":
        return _run_headline(content)
    sentence = front_sentence(content, memory, metric) if memory else ""
    tiles = []
    for winner in winners(content, metric):
        index = content.series.index(content.series_of[winner.group.id])
        tiles.append(
            element(
                "li",
                element("span", winner.level, class_="tile-level"),
                element("span", tables.named(index, winner.group.setting.label), class_="tile-name"),
                element("span", plus_minus(winner.value), class_="tile-value"),
                element("span", winner.verdict, class_="tile-note"),
            )
        )
    title = f"Best {metric_name(metric)} at each budget" if content.levels else f"Best {metric_name(metric)}"
    if lower_is_better(metric):
        title = title.replace("Best", "Lowest")
    return section(
        "headline",
        title,
        element("ol", *tiles, class_="tiles"),
        element("p", sentence, class_="note") if sentence else None,
    )


def pareto(content: Content) -> Markup:
    """The plot of accuracy (or error) over memory, with its controls."""
    title = "Error over memory" if content.test_time else "Accuracy over memory"
    if not content.metrics or not content.memory:
        what = "no memory" if content.metrics else "no result"
        return section("front", title, empty(f"There is {what} to draw yet. {_next_step(content)}"))
    controls = element(
        "div",
        choice("memory-axis", "Memory", [(name, memory_name(name)) for name in content.memory]),
        choice("metric-axis", "Metric", [(name, metric_name(name)) for name in content.metrics]),
        radios("scale", "Memory scale", [("log", "log"), ("linear", "linear")]),
        choice(
            "bars", "Error bars", [("sd", "± standard deviation"), ("interval", "bootstrap interval"), ("none", "none")]
        ),
        class_="controls",
    )
    return section(
        "front",
        title,
        controls,
        legend(content),
        plot("plot-front", "Every setting as a point: memory against the chosen metric, the front as a step line."),
        element("p", "", id="front-note", class_="note", aria_live="polite"),
    )


def memory(content: Content) -> Markup:
    """Where the bytes go: components stacked, a bar per group or per experience of a run."""
    title = "Where the bytes go"
    if not content.account:
        return section("memory", title, empty(f"No memory was recorded. {_next_step(content)}"))
    levels = _level_choice(content, "memory-level", every=True, all_first=len(content.groups) <= BARS)
    note = (
        "The largest of each component over the run. The static peak counts what is live at one moment, the batch and "
    )
    note += "temporaries included, so it differs a little from their sum."
    if content.kind == "run" and len(content.memory_steps) > 1:
        note = "A bar per experience. " + note.replace("over the run", "of its steps")
    return section(
        "memory",
        title,
        element("div", levels, class_="controls") if levels else None,
        tables.components_key([name for name in COMPONENTS if name in content.memory]),
        plot("plot-memory", "Stacked bars: bytes of weights, gradients, optimizer, activations, replay, method state."),
        element("p", note, class_="note"),
    )


def curves(content: Content) -> Markup | None:
    """Accuracy on everything seen, after each experience; test-time runs have none."""
    if content.test_time:
        return None
    title = "Accuracy after each experience"
    if not any(cell.seen for group in content.groups for cell in group.cells):
        return section("curves", title, empty(f"Nothing was evaluated yet. {_next_step(content)}"))
    levels = _level_choice(content, "curves-level", every=False)
    several = any(len(group.cells) > 1 for group in content.groups)
    return section(
        "curves",
        title,
        element("div", levels, class_="controls") if levels else None,
        legend(content),
        plot("plot-curves", "Lines: accuracy on all classes seen so far, after each experience."),
        element("p", "Mean of the seeds; the band is one standard deviation.", class_="note") if several else None,
    )


def matrices(content: Content) -> Markup | None:
    """The accuracy matrix of a group, as heat map and as table; test-time runs have none."""
    if content.test_time:
        return None
    title = "Accuracy matrix"
    known = [(index, group) for index, group in enumerate(content.groups) if any(cell.matrix for cell in group.cells)]
    if not known:
        return section("matrix", title, empty(f"Nothing was evaluated yet. {_next_step(content)}"))
    controls = None
    metric = default_metric(content)
    best = [group.id for group in ranking(content.groups, metric)] if metric else []
    first = next((index for index, (_, group) in enumerate(known) if group.id in best[:1]), 0)
    if len(content.groups) > 1 or any(len(group.cells) > 1 for group in content.groups):
        controls = element(
            "div",
            choice("matrix-group", "Setting", [(str(index), group_words(group)) for index, group in known], first),
            choice("matrix-seed", "Seed", [("mean", "mean of the seeds")]),
            class_="controls",
        )
    return section(
        "matrix",
        title,
        controls,
        plot("plot-matrix", "Heat map: accuracy after each experience on each test experience.", narrow=True),
        element(
            "p",
            "Row: after training that experience. Column: tested on that one, all classes seen so far competing. ",
            element("span", id="matrix-note"),
            class_="note",
        ),
        details("The same as a table", element("div", id="matrix-table", class_="scroll", tabindex=0)),
    )


def losses(content: Content) -> Markup | None:
    """Loss per epoch of a single run."""
    if not any(epoch["loss"] is not None for epoch in content.epochs):
        return None
    return section(
        "loss",
        "Training loss per epoch",
        plot("plot-loss", "Line: mean training loss of each epoch, experience after experience."),
    )


def domains(content: Content) -> Markup | None:
    """Error per domain of test-time runs, beside that of the source model."""
    known = [cell for group in content.groups for cell in group.cells if cell.domains]
    if not known:
        return None
    several = any(len(group.cells) > 1 for group in content.groups)
    sourced = any(source is not None for cell in known for _, source in cell.domains.values())
    note = ("Mean of the seeds. " if several else "") + (
        "Dashed: the source model on the same samples, never adapted." if sourced else ""
    )
    return section(
        "domains",
        "Error by domain",
        legend(content),
        plot("plot-domains", "Lines: error on each domain, in order of time, and that of the source model."),
        element("p", note, class_="note") if note else None,
    )


def all_numbers(content: Content) -> Markup:
    """The full table, and the cells behind it."""
    if content.kind == "run":
        return _run_numbers(content)
    if not content.groups:
        return section("table", "All settings", empty(f"No result yet. {_next_step(content)}"))
    options = element(
        "div",
        checkbox("all-columns", "all columns"),
        checkbox("exact-bytes", "exact bytes"),
        element("span", "Sort by clicking a heading.", class_="muted"),
        class_="controls",
    )
    cells = details(
        f"Every cell ({len(content.cells):,})", tables.cells_table(content), _cut(len(content.cells), "pareto.csv")
    )
    return section("table", "All settings", options, tables.groups_table(content), cells)


def comparisons(content: Content) -> Markup | None:
    """Paired comparisons at equal bytes."""
    if not content.paired:
        return None
    metrics = dict.fromkeys(pair.metric for pair in content.paired)
    levels = sorted({pair.level for pair in content.paired if pair.level})
    controls = element(
        "div",
        choice("paired-metric", "Metric", [("", "all"), *((name, metric_name(name)) for name in metrics)], 1),
        choice("paired-budget", "Budget", [("", "all"), *((str(level[1]), level_words(level)) for level in levels)]),
        class_="controls",
    )
    seeds = max(pair.n for pair in content.paired)
    note = (
        "a \u2212 b is the mean over the seeds both ran. The reading follows the interval; p values are not corrected "
        f"for the {counted(len(content.paired), 'comparison')} made, and {counted(seeds, 'seed')} can give none below "
        f"{2 / 2**seeds:.2g}."
    )
    return section(
        "comparisons",
        "Pairs at equal memory",
        controls,
        tables.paired_table(content),
        element("p", note, class_="note"),
        _cut(len(content.paired), "pareto.json"),
    )


def summaries(content: Content) -> Markup | None:
    """Areas under the curves and hypervolumes."""
    parts: list[Child] = []
    if content.areas:
        note = (
            "AUC-A integrates average accuracy, AUC-L accuracy after the last experience, over memory in MiB (MEMO, "
            "arXiv 2205.13218). Larger is better; compare only equal ranges."
        )
        fields = [name for name in content.memory if any(area.memory == name for area in content.areas)]
        options = [("", "all"), *((name, memory_name(name)) for name in fields)]
        parts += [
            element("h3", "Area under accuracy over memory"),
            element("div", choice("areas-memory", "Memory", options, min(1, len(fields))), class_="controls"),
            tables.areas_table(content.areas),
            element("p", note, class_="note"),
        ]
    if content.hypervolume:
        parts += [
            element("h3", "Hypervolume"),
            tables.hypervolume_table(content),
            element(
                "p",
                "Area under the front, memory divided by the largest of the sweep: 0 to 1, larger is better.",
                class_="note",
            ),
        ]
    return section("summaries", "Fronts as numbers", *parts) if parts else None


def failed(content: Content) -> Markup | None:
    """Failed cells with their errors."""
    count = sum(cell.status == "failed" for cell in content.cells)
    if not count:
        return None
    what = "cell" if content.kind == "sweep" else "run"
    return section("failures", f"{counted(count, what)} failed", tables.failures(content.cells))


def setup(content: Content) -> Markup:
    """Configuration and environment."""
    parts: list[Child] = []
    if content.config:
        parts.append(details("Configuration", element("pre", content.config, tabindex=0), opened=True))
    if content.environment:
        rows = [(element("dt", key), element("dd", value)) for key, value in _flat(content.environment)]
        parts.append(details("Environment", element("dl", *(part for row in rows for part in row)), opened=True))
    if not parts:
        parts.append(empty("Neither configuration nor environment was recorded."))
    return section("setup", "Set-up", element("div", *parts, class_="columns"))


def glossary() -> Markup:
    """What the numbers mean."""
    entries = (
        ("persistent", "what must survive a power cut: weights at stored precision, state, replay"),
        ("peak (static)", "the components that are live at the worst moment of training, added up"),
        ("peak (measured)", "growth of the process' resident memory on a CPU; the allocator's peak on CUDA"),
        ("activations", "bytes of storages saved for the backward pass, each counted once"),
        ("final accuracy", "on all test data after the last experience"),
        ("average accuracy", "mean over the experiences of the accuracy on everything seen so far"),
        ("forgetting", "mean drop from the best accuracy on an experience to the last one; lower is better"),
        ("mean error", "of a test-time run: mean over the domains, each counting the same; lower is better"),
        ("kB, MB, GB", "powers of ten; exact bytes are in the tables"),
    )
    rows = [part for name, meaning in entries for part in (element("dt", name), element("dd", meaning))]
    return section("glossary", "What the numbers mean", element("dl", *rows))


# ---------------------------------------------------------------------- parts


def section(identifier: str, title: str, *children: Child) -> Markup:
    """A section with a heading that can be linked to."""
    heading = f"{identifier}-title"
    return element("section", element("h2", title, id=heading), *children, id=identifier, aria_labelledby=heading)


def choice(identifier: str, label: str, options: Sequence[Option], selected: int = 0) -> Markup:
    """A labelled drop-down list."""
    items = [
        element("option", shown, value=value, selected=index == selected)
        for index, (value, shown) in enumerate(options)
    ]
    return element("label", element("span", label), element("select", *items, id=identifier, autocomplete="off"))


def radios(name: str, label: str, options: Sequence[Option]) -> Markup:
    """A few choices side by side, the first one taken."""
    items = [
        element(
            "label",
            element("input", type="radio", name=name, value=value, checked=index == 0, autocomplete="off"),
            element("span", shown),
        )
        for index, (value, shown) in enumerate(options)
    ]
    return element("fieldset", element("legend", label), element("div", *items, class_="segments"), class_="radios")


def checkbox(identifier: str, label: str) -> Markup:
    """A box to tick."""
    return element(
        "label", element("input", type="checkbox", id=identifier, autocomplete="off"), f" {label}", class_="check"
    )


def legend(content: Content) -> Markup | None:
    """The series as buttons that show and hide them, in every plot."""
    if len(content.series) < 2:
        return None
    chips = [
        element(
            "button",
            tables.swatch(index),
            element("span", name, class_="label"),
            type="button",
            class_="chip",
            aria_pressed="true",
            data_series=index,
        )
        for index, name in enumerate(content.series)
    ]
    return element("div", *chips, class_="legend", role="group", aria_label="Show or hide methods")


def plot(identifier: str, label: str, *, narrow: bool = False) -> Markup:
    """The place of a plot; the label says what it shows to those who cannot see it."""
    wanting = element("noscript", element("p", "Plots need JavaScript; the tables hold the same numbers."))
    return element(
        "figure",
        element("div", id=identifier, class_="plot", role="img", aria_label=label),
        wanting,
        class_="narrow" if narrow else None,
    )


def details(summary: str, *children: Child, opened: bool = False) -> Markup:
    """Something to unfold."""
    return element("details", element("summary", summary), *children, open=opened)


def empty(words: str) -> Markup:
    """What to do where there is nothing to show."""
    return element("p", words, class_="empty")


def group_words(group: Group) -> str:
    """A group in a list of choices: its label, options and budget."""
    level = group.setting.level
    words = tables.setting_words(group.setting)
    return f"{words} · {level_words(level)}" if level is not None else words


def navigation(sections: Sequence[Markup | None], titles: Mapping[str, str]) -> Markup:
    """Links to the sections that are there."""
    links = [
        element("a", title, href=f"#{identifier}")
        for identifier, title in titles.items()
        if any(part is not None and f'id="{identifier}"' in part for part in sections)
    ]
    return element("nav", *links, aria_label="Sections")


def _level_choice(content: Content, identifier: str, *, every: bool, all_first: bool = False) -> Markup | None:
    if len(content.levels) < 2:
        return None
    options = [(str(index), level_words(level)) for index, level in enumerate(content.levels)]
    if every:
        options = [("", "all budgets"), *options]
    return choice(identifier, "Budget", options, selected=0 if all_first else len(options) - 1)


def _cut(count: int, file: str) -> Markup | None:
    """A note under a table that does not hold everything."""
    if count <= tables.ROWS:
        return None
    return element("p", f"The first {tables.ROWS:,} of {count:,}; {file} beside this page has them all.", class_="note")


def _next_step(content: Content) -> str:
    if content.kind == "sweep" and not content.groups:
        return "Run contlearn pareto CONFIG.yaml with the same --out: it goes on where the sweep stopped."
    if content.kind == "sweep":
        return "Sweeps of this version record it: run contlearn pareto CONFIG.yaml with another --out."
    return "Runs of this version record it: contlearn run CONFIG.yaml --out DIR, then contlearn report DIR."


def _run_headline(content: Content) -> Markup:
    group = content.groups[0]
    tiles = []
    for name in content.metrics[:3]:
        tiles.append((metric_name(name), plus_minus(group.metrics[name])))
    for name in [name for name in ("persistent", "peak_static", "peak_measured") if name in content.memory][:2]:
        tiles.append((f"{memory_name(name)} memory", in_words(group.memory[name].mean)))
    items = [
        element("li", element("span", name, class_="tile-level"), element("span", value, class_="tile-value"))
        for name, value in tiles
    ]
    return section("headline", "At a glance", element("ol", *items, class_="tiles"))


def _run_numbers(content: Content) -> Markup:
    columns = [tables.Column("quantity", number=False), tables.Column("value")]
    rows = []
    group = content.groups[0] if content.groups else None
    for name in content.metrics:
        spread = group.metrics[name] if group else Spread(None)
        rows.append(([tables.Value(metric_name(name), name), tables.Value(plus_minus(spread, 4), spread.mean)], None))
    for name in content.account:
        mean = group.memory[name].mean if group else None
        shown = tables.Value(f"{in_words(mean)} ({mean:,.0f} B)" if mean is not None else "", mean)
        rows.append(([tables.Value(f"{memory_name(name)} memory", name), shown], None))
    if group and group.seconds.mean is not None:
        what = "adapting seconds" if content.test_time else "training seconds"
        rows.append(([tables.Value(what), tables.Value(plus_minus(group.seconds, 1), None)], None))
    if not rows:
        return section("table", "All numbers", empty(f"No result yet. {_next_step(content)}"))
    return section("table", "All numbers", tables.table("numbers", "Every number of this run", columns, rows, "slim"))


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value)  # versions need no "packages." before their name
        else:
            found.append((key, "not installed" if value is None else str(value)))
    return found
