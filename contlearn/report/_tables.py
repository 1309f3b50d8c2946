"""The tables of a page. Every column sorts: a cell carries the number it is sorted by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from contlearn.memory.units import in_words
from contlearn.report._content import (
    MAIN_MEMORY,
    MAIN_METRICS,
    Area,
    Cell,
    Content,
    Group,
    Paired,
    Setting,
    Spread,
    level_words,
    lower_is_better,
    memory_name,
    metric_name,
    option_words,
)
from contlearn.report._markup import Markup, element, join, text
from contlearn.report._words import DASH, fixed, plus_minus

SHAPES = 8  # markers
COLOURS = 7
ROWS = 3000  # of cells or of pairs; a browser is slow with more, and the tables beside the page have them all
TALL = 60  # rows that a table may have before it scrolls by itself

# The markers of plots.js, in the same order, in a box of 16 by 16.
_PATHS = (
    "M8 2.5a5.5 5.5 0 1 0 0 11a5.5 5.5 0 1 0 0-11z",
    "M3 3h10v10h-10z",
    "M8 2.2L14.4 13.2H1.6z",
    "M8 1.4L14.6 8L8 14.6L1.4 8z",
    "M8 13.8L1.6 2.8H14.4z",
    "M6 2h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "M4.8 2L8 5.2L11.2 2L14 4.8L10.8 8L14 11.2L11.2 14L8 10.8L4.8 14L2 11.2L5.2 8L2 4.8z",
    "M8 1.2L9.9 6H15L10.9 9.1L12.4 14.2L8 11.2L3.6 14.2L5.1 9.1L1 6H6.1z",
)


# The patterns of plots.js for the components of memory, on a tile of 18 by 12, and their colours.
_PATTERNS = (
    "",
    "M-2 8L8 -2M3 13L16 0M12 14L22 4",
    "M3 3h2v2h-2zM9 3h2v2h-2zM15 3h2v2h-2zM3 8h2v2h-2zM9 8h2v2h-2zM15 8h2v2h-2z",
    "M-2 4L8 14M2 -2L16 12M10 -2L22 10",
    "M-2 8L8 -2M3 13L16 0M12 14L22 4M-2 4L8 14M2 -2L16 12M10 -2L22 10",
    "M0 3h18M0 9h18",
)
_PATTERN_COLOURS = (0, 6, 2, 5, 1, 3)


@dataclass(frozen=True)
class Column:
    """A heading; ``extra`` columns are shown on request, ``number`` ones stand on the right."""

    name: str
    number: bool = True
    extra: bool = False
    note: str | None = None


@dataclass(frozen=True)
class Value:
    """What stands in a cell of a table, and what it sorts by (``None`` sorts last)."""

    shown: str
    sort: float | str | None = None
    exact: str | None = None


def swatch(index: int) -> Markup:
    """The marker of the series with this index, in its colour."""
    return element(
        "svg",
        element("path", d=_PATHS[index % SHAPES]),
        class_=f"swatch series-{index % COLOURS}",
        viewBox="0 0 16 16",
        width=14,
        height=14,
        aria_hidden="true",
        focusable="false",
    )


def named(index: int, words: str) -> Markup:
    """A marker and the name it stands for, which may break after an underscore."""
    breaking = Markup(text(words).replace("_", "_<wbr>"))
    return element("span", swatch(index), element("span", breaking, class_="label"), class_="named")


def components_key(names: Sequence[str]) -> Markup:
    """What the colours and patterns of the stacked bars stand for."""
    items = []
    for index, name in enumerate(names):
        colour = _PATTERN_COLOURS[index % len(_PATTERN_COLOURS)]
        drawing = element(
            "svg",
            element("rect", width=18, height=12, class_=f"series-{colour}"),
            element("path", d=_PATTERNS[index % len(_PATTERNS)]),
            viewBox="0 0 18 12",
            width=18,
            height=12,
            aria_hidden="true",
            focusable="false",
        )
        items.append(element("li", drawing, memory_name(name)))
    return element("ul", *items, class_="key")


def table(
    identifier: str,
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[tuple[Sequence[Value], str | None]],
    shape: str = "",
) -> Markup:
    """A table that sorts by its headings, in a box that scrolls by itself.

    Args:
        identifier: id of the table.
        caption: what it holds, for those who cannot see where it stands.
        columns: its headings; the first column names the row.
        rows: the values of each row, and the id of its group (or ``None``).
        shape: ``tall`` scrolls after a screen of rows, ``slim`` leaves the page's width unused.
    """
    heads = [
        element(
            "th",
            element("button", element("span", class_="arrow", aria_hidden="true"), column.name, type="button"),
            scope="col",
            aria_sort="none",
            class_=_classes(column),
            title=column.note,
        )
        for column in columns
    ]
    body = []
    for values, group in rows:
        cells = [
            element(
                "th" if index == 0 else "td",
                _shown(value),
                scope="row" if index == 0 else None,
                class_=_classes(column),
                data_value=value.sort,
            )
            for index, (column, value) in enumerate(zip(columns, values, strict=True))
        ]
        body.append(element("tr", *cells, data_group=group))
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", element("tr", *heads)),
            element("tbody", *body),
            id=identifier,
            class_="sortable",
        ),
        class_=f"scroll {shape}".strip(),
        role="region",
        aria_label=caption,
        tabindex=0,
    )


def groups_table(content: Content) -> Markup:
    """A row per group: every metric and every memory field, the usual ones first."""
    columns = [Column("setting", number=False), Column("budget"), Column("seeds")]
    columns += [Column(metric_name(name), extra=name not in MAIN_METRICS) for name in content.metrics]
    columns += [Column(memory_name(name), extra=name not in MAIN_MEMORY) for name in content.account]
    columns.append(Column("adapting s" if content.test_time else "training s"))
    if len(content.groups) > 1 and content.memory:
        note = "of the memory and the metric chosen in the first plot"
        columns.insert(1, Column("on front", number=False, note=note))
    rows = []
    for group in content.groups:
        values = [_name(content, group), _level(group.setting.level), Value(str(len(group.seeds)), len(group.seeds))]
        values += [_spread(group.metrics.get(name)) for name in content.metrics]
        values += [_bytes(group.memory.get(name)) for name in content.account]
        values.append(Value(plus_minus(group.seconds, 1), group.seconds.mean))
        if len(columns) > len(values):
            values.insert(1, Value(element("span", class_="on-front"), 1))
        rows.append((values, group.id))
    caption = "Every setting: mean ± standard deviation over its seeds"
    return table("groups", caption, columns, rows, "tall" if len(rows) > TALL else "")


def cells_table(content: Content) -> Markup:
    """A row per cell: one seed of one setting."""
    metrics = [name for name in content.metrics if name in MAIN_METRICS]
    memory = [name for name in content.memory if name in MAIN_MEMORY]
    columns = [Column("setting", number=False), Column("budget"), Column("seed"), Column("status", number=False)]
    columns += [Column(metric_name(name)) for name in metrics] + [Column(memory_name(name)) for name in memory]
    columns += [Column("adapting s" if content.test_time else "training s"), Column("folder", number=False)]
    rows = []
    for cell in content.cells[:ROWS]:
        values = [
            Value(setting_words(cell.setting), setting_words(cell.setting).lower()),
            _level(cell.setting.level),
            Value(DASH if cell.seed is None else str(cell.seed), cell.seed),
            Value(cell.status, cell.status),
        ]
        values += [Value(fixed(cell.metrics.get(name)), cell.metrics.get(name)) for name in metrics]
        values += [_bytes(Spread(cell.memory.get(name))) for name in memory]
        values += [Value(fixed(cell.seconds, 1), cell.seconds), Value(cell.folder or DASH, cell.folder)]
        rows.append((values, None))
    return table("cells", "Every cell: one seed of one setting", columns, rows, "tall")


def paired_table(content: Content) -> Markup:
    """A row per comparison of two labels at equal bytes."""
    columns = [
        Column("metric", number=False),
        Column("budget"),
        Column("a", number=False),
        Column("b", number=False),
        Column("a \u2212 b"),
        Column("interval"),
        Column("p"),
        Column("seeds"),
        Column("reading", number=False),
    ]
    rows = []
    for pair in content.paired[:ROWS]:
        known = pair.low is not None and pair.high is not None
        interval = f"{fixed(pair.low)} to {fixed(pair.high)}" if known else DASH
        values = [
            Value(metric_name(pair.metric), pair.metric),
            _level(pair.level),
            Value(pair.a, pair.a.lower()),
            Value(pair.b, pair.b.lower()),
            Value(fixed(pair.difference), pair.difference),
            Value(interval, pair.low),
            Value(fixed(pair.p_value), pair.p_value),
            Value(str(pair.n), pair.n),
            Value(reading(pair), reading(pair)),
        ]
        rows.append((values, None))
    return table("paired", "Two methods at equal bytes, compared seed by seed", columns, rows, "tall")


def reading(pair: Paired) -> str:
    """What a comparison says: who is better, if the interval leaves zero out."""
    if pair.low is None or pair.high is None or pair.difference is None:
        return DASH
    if pair.low <= 0 <= pair.high:
        return "no difference shown"
    return f"{pair.a if (pair.difference > 0) != lower_is_better(pair.metric) else pair.b} better"


def areas_table(areas: Sequence[Area]) -> Markup:
    """A row per label and memory field: the areas under accuracy over memory."""
    columns = [
        Column("method", number=False),
        Column("memory", number=False),
        Column("AUC-A", note="area under average accuracy"),
        Column("AUC-L", note="area under accuracy after the last experience"),
        Column("from"),
        Column("to"),
    ]
    rows = [
        (
            [
                Value(area.label, area.label.lower()),
                Value(memory_name(area.memory), area.memory),
                Value(_significant(area.average), area.average),
                Value(_significant(area.last), area.last),
                _bytes(Spread(area.start)),
                _bytes(Spread(area.end)),
            ],
            None,
        )
        for area in areas
    ]
    return table("areas", "Areas under accuracy over memory", columns, rows, "tall")


def hypervolume_table(content: Content) -> Markup:
    """A row per memory field, a column per metric: the hypervolume of the front."""
    volumes = {name: content.hypervolume.get(name, {}) for name in content.memory}
    metrics = list(dict.fromkeys(name for found in volumes.values() for name in found))
    columns = [Column("memory", number=False), *(Column(metric_name(name)) for name in metrics)]
    rows = [
        (
            [Value(memory_name(memory), memory)]
            + [Value(_significant(found.get(name)), found.get(name)) for name in metrics],
            None,
        )
        for memory, found in volumes.items()
        if any(found.values())  # nothing lies between settings that all take the same memory
    ]
    return table("hypervolume", "Hypervolume of the front", columns, rows)


def failures(cells: Sequence[Cell]) -> Markup:
    """Every failed cell with its error."""
    return element(
        "ul",
        *(
            element(
                "li",
                element("strong", setting_words(cell.setting), class_="label"),
                f" · {level_words(cell.setting.level)}" if cell.setting.level else None,
                f" · seed {cell.seed}" if cell.seed is not None else None,
                element("span", f" · {cell.folder}", class_="muted") if cell.folder else None,
                element("pre", cell.error or "no error was recorded", tabindex=0),
            )
            for cell in cells
            if cell.status == "failed"
        ),
        class_="failures",
    )


def _shown(value: Value) -> Markup:
    if value.exact is None:
        return join(value.shown)
    return join(element("span", value.shown, class_="rounded"), element("span", value.exact, class_="exact"))


def _classes(column: Column) -> str | None:
    return " ".join(name for name, on in (("number", column.number), ("extra", column.extra)) if on) or None


def _name(content: Content, group: Group) -> Value:
    words = setting_words(group.setting)
    index = content.series.index(content.series_of[group.id])
    return Value(named(index, words), words.lower())


def setting_words(setting: Setting) -> str:
    """The label, and the options that it does not spell out already."""
    options = option_words({name: value for name, value in setting.options.items() if str(value) not in setting.label})
    return f"{setting.label} · {options}" if options else setting.label


def _level(level: tuple[str, float] | None) -> Value:
    if level is None:
        return Value(DASH, None)
    exact = f"{level[1]:,.0f} B" if level[0] == "bytes" else None
    return Value(level_words(level), level[1], exact)


def _spread(spread: Spread | None) -> Value:
    return Value(plus_minus(spread), None if spread is None else spread.mean)


def _bytes(spread: Spread | None) -> Value:
    if spread is None or spread.mean is None:
        return Value(DASH, None)
    return Value(in_words(spread.mean), spread.mean, f"{spread.mean:,.0f} B")


def _significant(value: float | None) -> str:
    if value is None:
        return DASH
    return (f"{value:,.3f}" if 1 <= abs(value) < 1e6 else f"{value:.3g}").replace("-", "\u2212")
