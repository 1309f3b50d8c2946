"""The memory account on a terminal: a table of components and one stacked bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from contlearn.memory.units import in_words

if TYPE_CHECKING:
    from rich.console import RenderableType

# component, colour (Okabe-Ito) and letter: the bar is read without colour too
COMPONENTS = (
    ("weights", "#0072B2", "w"),
    ("gradients", "#56B4E9", "g"),
    ("optimizer", "#009E73", "o"),
    ("activations", "#E69F00", "a"),
    ("method_state", "#CC79A7", "m"),
    ("replay", "#D55E00", "r"),
)
WIDTH = 60
INTERPRETER = 20e6  # bytes a training loop's Python objects and caches take whatever the model


def render(memory: Mapping[str, Any]) -> RenderableType:
    """Components, totals and a stacked bar of the ``memory`` part of ``results.json``."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("memory", "", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, colour, letter in COMPONENTS:
        if memory.get(name) is None:
            continue
        parts = {
            key.removeprefix(f"{name}."): value for key, value in memory.items() if key.startswith(f"{name}.") and value
        }
        note = ", ".join(f"{part} {in_words(size)}" for part, size in parts.items())
        if name == "weights" and memory.get("trainable_weights") is not None:
            note = f"{in_words(memory['trainable_weights'])} trainable"
        elif name == "replay" and memory.get("exemplars"):
            note = f"{memory['exemplars']} exemplars"
        table.add_row(Text(f"{letter} {name}", style=colour), in_words(memory[name]), note)
    table.add_section()
    table.add_row("persistent", in_words(memory.get("persistent")), "survives a power cut")
    measured, ratio = memory.get("peak_measured"), memory.get("peak_ratio")
    table.add_row(
        "peak, static", in_words(memory.get("peak_static")), "all storages live at a step's worst moment"
    )
    if measured is not None:
        note = f"of this process; {ratio:.2f} x static" if ratio else "of this process"
        small = (memory.get("peak_static") or 0) < INTERPRETER
        table.add_row("peak, measured", in_words(measured), "mostly the interpreter" if small else note)
    return Group(table, bar(memory))


def bar(memory: Mapping[str, Any]) -> RenderableType:
    """The components side by side, to scale."""
    from rich.text import Text

    sizes = {name: int(memory.get(name) or 0) for name, _, _ in COMPONENTS}
    total = sum(sizes.values())
    line = Text()
    if not total:
        return line
    done = drawn = 0
    for name, colour, letter in COMPONENTS:
        done += sizes[name]
        cells = round(WIDTH * done / total) - drawn
        drawn += cells
        line.append(letter * cells, style=f"black on {colour}")
    return line
