"""The ``contlearn`` command. Heavy imports happen inside the sub-command that needs them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contlearn.errors import ContlearnError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

# Whether this process has not run anything yet: its high-water mark then belongs to the run.
FRESH = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 success, 2 bad input, 128 + signal when stopped by one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        _top().print_help()
        return 0
    if arguments[0] in ("-V", "--version"):
        from contlearn import __version__

        print(f"contlearn {__version__}")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise unknown_name("command", arguments[0], COMMANDS)
        return COMMANDS[arguments[0]][0](arguments[1:])
    except ContlearnError as error:
        print(f"contlearn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except SystemExit as stop:  # argparse, after it has printed a help text
        return int(stop.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _stopped(stop: KeyboardInterrupt) -> int:
    number = int(getattr(stop, "signum", signal.SIGINT))
    folder = getattr(stop, "folder", None)
    where = f"; continue with the same command and --resume (position stored in {folder})" if folder else ""
    print(f"contlearn: stopped by {signal.Signals(number).name}{where}", file=sys.stderr)
    return 128 + number


class _Parser(argparse.ArgumentParser):
    """Errors become one line and exit code 2, like every other bad input."""

    def error(self, message: str) -> Any:
        raise ContlearnError(f"{self.prog.removeprefix('contlearn ')}: {message}")


def _top() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="contlearn",
        description="Continual learning and on-device adaptation with a byte-exact memory account.",
        epilog="contlearn COMMAND --help documents the options of a command.",
    )
    parser.add_argument("-V", "--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (_, description) in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    return parser


# ---------------------------------------------------------------------- run


def _run(arguments: list[str]) -> int:
    parser = _Parser(
        prog="contlearn run",
        description="Train a strategy on a stream and evaluate after every experience, or adapt a source model to a "
        "stream at test time.",
        epilog="Every option of the scenario, the model and the strategy can be given as --SECTION.OPTION=VALUE; "
        "with --help, those of the configuration (or of --strategy.name=NAME and so on) are listed.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; without one, defaults and overrides")
    parser.add_argument(
        "--out", help="run folder (default: runs/ and the name of CONFIG); an earlier run is kept aside"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the folder's checkpoint, or start without one"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress display and no summary")
    parser.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    from contlearn import config as configuration

    options, rest = parser.parse_known_args(configuration.join_values(arguments))
    content = configuration.load(options.config) if options.config is not None else {}
    quiet_libraries()
    if options.help:
        names, _ = configuration.section_names(content, rest)
        details, _ = configuration.parser_for(names, usage="", add_help=False)
        parser.print_help()
        print("\n" + details.format_help().split("\n", 2)[-1].strip())
        return 0
    resolved = configuration.resolve(content, rest)
    folder = (
        Path(options.out) if options.out else Path("runs") / (Path(options.config).stem if options.config else "run")
    )
    stream = configuration.make_stream(resolved)
    from contlearn import models
    from contlearn.memory import process
    from contlearn.results import TEST_TIME
    from contlearn.running import run

    models.describe(resolved["model"]["name"]).load_factory()
    # Only in a process of its own: what an earlier run left behind would hide what this one needs.
    resident = process.mark() if FRESH else None
    globals()["FRESH"] = False
    strategy = configuration.build_on(stream, resolved)

    result = run(
        strategy,
        stream,
        out=folder,
        resume=options.resume,
        seed=resolved["seed"],
        loggers=resolved["loggers"],
        quiet=options.quiet,
        config=resolved,
        resident_before=resident,
    )
    from contlearn import plots

    runs = [(resolved["strategy"]["name"], result.results)]
    test_time = result.results.get("kind") == TEST_TIME
    if test_time:
        plots.error_over_stream(runs, folder / "error_over_stream.png")
    else:
        plots.accuracy_per_experience(runs, folder / "accuracy.png")
        plots.accuracy_matrix(result.results, folder / "accuracy_matrix.png")
    if not options.quiet:
        from contlearn.memory.show import render

        console = _console()
        console.print(plots.domain_table(result.results) if test_time else plots.table(runs))
        if result.results.get("worse_than_source"):
            console.print(plots.worse_than_source(result.results), style="bold red", highlight=False)
        if result.memory:
            console.print()
            console.print(render(result.memory))
        print(f"run folder: {folder}")
    return 0


def _console() -> Console:
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:  # rich would exit with 1
            raise BrokenPipeError

    return Terminal()


def quiet_libraries() -> None:
    """Keep third parties' deprecation notices from the user, whose business they are not."""
    import warnings

    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(avalanche|torch|timm|torchvision|qpsolvers)\b.*")


# ---------------------------------------------------------------------- list


def _list(arguments: list[str]) -> int:
    parser = _Parser(prog="contlearn list", description="List what can be named in a configuration.")
    kinds = ("strategies", "scenarios", "models", "datasets")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"what to list: {', '.join(kinds)}")
    parser.add_argument("name", nargs="?", help="one entry (in full), or a shell-style pattern")
    options = parser.parse_args(arguments)
    if options.kind is None:
        raise ContlearnError(f"list: expected one of {', '.join(kinds)} after it")
    if options.kind not in kinds:
        raise unknown_name("kind", options.kind, kinds)
    rows, details = _registry(options.kind, options.name)
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    if options.name and not set("*?[") & set(options.name):
        for key, value in details(options.name).items():
            if value not in ("", None, {}, ()):
                console.print(f"[bold]{key}[/bold]: {escape(str(value))}", highlight=False)
        return 0
    if not rows:
        raise unknown_name(f"{options.kind} matching", options.name, _registry(options.kind, None)[0])
    joins = ["plug-in", "exports to"] if options.kind == "strategies" else []
    table = Table("name", *joins, "description", "source", box=None, pad_edge=False)
    for name in rows:
        record = details(name)
        source = str(record.get("paper") or record.get("source") or "")
        marks = ["yes" * bool(record["plugin"]), "onnxruntime" * bool(record["exportable"])] if joins else []
        table.add_row(name, *marks, str(record.get("description", "")), source)
    console.print(table)
    return 0


def _registry(kind: str, pattern: str | None) -> tuple[list[str], Callable[[str], dict[str, Any]]]:
    """Names of a registry that match a shell-style pattern, and the record of each as a dictionary."""
    import fnmatch
    import importlib
    from dataclasses import fields

    module = importlib.import_module("contlearn.scenarios.datasets" if kind == "datasets" else f"contlearn.{kind}")
    if kind == "datasets":
        names = fnmatch.filter(module.list_datasets(), pattern or "*")
    else:
        names = module.list(pattern or "*")

    def details(name: str) -> dict[str, Any]:
        record = module.describe(name)
        found = {field.name: getattr(record, field.name) for field in fields(record)}
        if hasattr(record, "composes_with"):
            found["composes_with"] = ", ".join(record.composes_with)
        return {key: dict(value) if hasattr(value, "items") else value for key, value in found.items()}

    return list(names), details


# ---------------------------------------------------------------------- doctor


def _doctor(arguments: list[str]) -> int:
    from contlearn import doctor

    if arguments and arguments[0] not in ("-h", "--help"):
        raise ContlearnError(f"doctor: unexpected argument {arguments[0]!r}; expected none")
    return doctor.main(arguments)


def _pareto(arguments: list[str]) -> int:
    from contlearn.pareto import command

    quiet_libraries()
    return command.main(arguments)


def _report(arguments: list[str]) -> int:
    from contlearn.report import command

    return command.main(arguments)


def _export(arguments: list[str]) -> int:
    from contlearn.edge import commands

    quiet_libraries()
    return commands.export_main(arguments)


def _adapt(arguments: list[str]) -> int:
    from contlearn.edge import commands

    quiet_libraries()
    return commands.adapt_main(arguments)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "run": (_run, "train a strategy on a stream and evaluate it"),
    "pareto": (_pareto, "sweep methods, memory budgets and seeds; find the memory-accuracy front"),
    "export": (_export, "write the step of a strategy as an artifact for a device"),
    "adapt": (_adapt, "run an artifact over a stream as a device would"),
    "report": (_report, "rebuild the pages of a sweep, a run or a folder of runs"),
    "list": (_list, "list strategies, scenarios, models or datasets"),
    "doctor": (_doctor, "check versions, devices, threads and data"),
}

if __name__ == "__main__":
    sys.exit(main())
