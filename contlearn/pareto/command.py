"""``contlearn pareto``: a sweep and its front from the command line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contlearn.errors import ContlearnError

LISTED = 10  # failed cells named one by one


def main(arguments: list[str]) -> int:
    """Run the command; the exit code is 0, 1 when a cell failed, or 128 + signal when one stopped the sweep.

    Raises:
        ContlearnError: a mistake in the command line, the configuration or the folder.
    """
    options = _parser().parse_args(arguments)
    from contlearn.cli import quiet_libraries
    from contlearn.pareto.engine import SweepInterrupted, sweep

    quiet_libraries()

    folder = Path(options.out) if options.out else Path("runs") / Path(options.config).stem
    try:
        content = sweep(
            options.config,
            out=folder,
            jobs=options.jobs,
            engine=options.engine,
            address=options.address,
            seeds=options.seeds,
            quiet=options.quiet,
        )
    except SweepInterrupted as stop:
        name = signal.Signals(stop.signum).name
        print(
            f"contlearn: stopped by {name}; finished cells are kept in {folder}, the same command goes on",
            file=sys.stderr,
        )
        return 128 + stop.signum
    failed = [cell for cell in content["cells"] if cell["status"] != "complete"]
    if not options.quiet:
        _show(content, folder)
    for cell in failed[:LISTED]:
        print(f"contlearn: {cell['group']}, seed {cell['seed']}: {cell['error']} ({cell['folder']})", file=sys.stderr)
    if failed:
        print(f"contlearn: {len(failed)} of {len(content['cells'])} cells failed", file=sys.stderr)
    return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    """Errors become one line and exit code 2, like every other bad input."""

    def error(self, message: str) -> Any:
        raise ContlearnError(f"pareto: {message}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="contlearn pareto",
        description="Run strategies x memory budgets x seeds and draw accuracy over memory. Finished cells are kept: "
        "the same command goes on with a sweep that was stopped, and after a change runs only what is new.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/pareto_digits.yaml")
    parser.add_argument("--out", help="the sweep's folder (default: runs/ and the name of CONFIG)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: as many as there are cores for)")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="processes of this machine, or tasks of a cluster"
    )
    parser.add_argument("--address", help="existing ray cluster (default: a new one on this machine)")
    parser.add_argument("--seeds", type=int, help="this many seeds, whatever CONFIG says")
    parser.add_argument("--quiet", action="store_true", help="no progress display and no summary")
    return parser


def _show(content: Mapping[str, Any], folder: Path) -> None:
    """The groups as a table, and where everything lies."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from contlearn.memory.units import in_words
    from contlearn.pareto.figure import axis
    from contlearn.pareto.summary import NOT_BYTES, headline, memory_of

    field, metric = axis(content["groups"]), headline(content["groups"])
    shown = ("mean_error", "source_mean_error") if metric == "mean_error" else ("final_accuracy", "average_accuracy")
    front = set(content["fronts"].get(field, {}).get(metric, ()))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("strategy", overflow="fold")
    for heading in (field or "memory", *shown, "front"):
        table.add_column(heading.replace("_", " "), justify="right", no_wrap=True)
    for group in content["groups"]:
        memory = memory_of(group, field) if field else None
        amount = "-" if memory is None else f"{memory:g}" if field in NOT_BYTES else in_words(memory)
        metrics = [_spread(group["metrics"].get(name)) for name in shown]
        table.add_row(Text(group["id"]), amount, *metrics, "*" if group["id"] in front else "")
    if content["groups"]:
        Console().print(table)
    written = [name for name in ("pareto.csv", "pareto.json", "pareto.png", "report.html") if (folder / name).exists()]
    print(f"{folder}: {', '.join(written)}")


def _spread(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['mean']:.3f}" + (f" ± {spread['sd']:.3f}" if spread["sd"] is not None else "")
