"""``contlearn report DIR``: rebuild the report pages of folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from contlearn.errors import ContlearnError

PLAN = "sweep.json"  # of a sweep that can be summed up again from its cells


def main(arguments: list[str]) -> int:
    """Write ``report.html`` in every folder named and print where it is; returns 0.

    Raises:
        ContlearnError: a bad option, or a folder that holds nothing to report or cannot be written.
    """
    parser = _Parser(
        prog="contlearn report",
        description="Rebuild report.html of a sweep, of a run or of a folder of runs, from the records in the folder. "
        "The page needs no network and no other file. Of a sweep, pareto.json, .csv and .png are rebuilt too.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="sweep folder, run folder or folder of runs")
    for folder in parser.parse_args(arguments).folders:
        print(f"report: {rebuild(Path(folder))}")
    return 0


def rebuild(folder: Path) -> Path:
    """Write the page of a folder, a sweep summed up from its cells first where they are there; returns its path.

    Raises:
        ContlearnError: nothing to report, damaged records, or the folder cannot be written.
    """
    if (folder / PLAN).is_file():
        from contlearn import pareto  # late: draws with Matplotlib

        pareto.rebuild(folder)
    from contlearn.report import write_page

    return write_page(folder)


class _Parser(argparse.ArgumentParser):
    """Errors become one line and exit code 2, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ContlearnError(f"report: {message}")
