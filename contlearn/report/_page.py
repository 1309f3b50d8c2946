"""``report.html``: one self-contained file. Its policy forbids every network request and every script but its own."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import lru_cache
from importlib import resources
from pathlib import Path
from string import Template

from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_text
from contlearn.report import _runs, _sections, _sweep
from contlearn.report._content import Content
from contlearn.report._data import page_data
from contlearn.report._markup import join, json_in_script, text

FILE_NAME = "report.html"
TITLES = {
    "headline": "Summary",
    "front": "Front",
    "memory": "Memory",
    "domains": "Domains",
    "curves": "Curves",
    "loss": "Loss",
    "matrix": "Matrix",
    "table": "Table",
    "comparisons": "Pairs",
    "summaries": "Areas",
    "failures": "Failures",
    "setup": "Set-up",
    "glossary": "Meaning",
}


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` in a sweep folder, a run folder or a folder of runs, atomically, and return its path.

    The same records give the same bytes.

    Raises:
        ContlearnError: nothing to report, damaged records, or the folder cannot be written.
    """
    path = Path(folder) / FILE_NAME
    atomic_write_text(path, render(read(Path(folder))))
    return path


def read(folder: Path) -> Content:
    """The content of a folder: a sweep where ``pareto.json`` is, a run where its records are, else the runs below.

    Raises:
        ContlearnError: no such folder, nothing to report, or damaged records.
    """
    if not folder.is_dir():
        raise ContlearnError(f"{str(folder)!r} is no folder; expected one of contlearn run or contlearn pareto")
    if (folder / _sweep.FILE_NAME).is_file():
        return _sweep.read(folder)
    return _runs.read_run(folder) if _runs.is_run(folder) else _runs.read_runs(folder)


def render(content: Content) -> str:
    """The page as text."""
    if content.kind == "run":
        parts = [
            _sections.headline(content),
            _sections.domains(content),
            _sections.curves(content),
            _sections.matrices(content),
            _sections.losses(content),
            _sections.memory(content),
            _sections.all_numbers(content),
        ]
    elif not content.groups:
        parts = [_sections.pareto(content)]
    else:
        parts = [
            _sections.headline(content),
            _sections.pareto(content),
            _sections.memory(content),
            _sections.domains(content),
            _sections.curves(content),
            _sections.matrices(content),
            _sections.all_numbers(content),
            _sections.comparisons(content),
            _sections.summaries(content),
        ]
    parts += [_sections.failed(content), _sections.setup(content), _sections.glossary()]
    plotly, plots, page = _plotly(), _file("plots.js"), _file("page.js")
    scripts = " ".join(f"'sha256-{_sha256(script)}'" for script in (plotly, plots, page))
    return Template(_file("page.html")).substitute(
        policy=f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'",
        title=text(f"{content.name} · contlearn"),
        style=_file("page.css"),
        header=_sections.header(content),
        navigation=_sections.navigation(parts, TITLES),
        main=join(*parts),
        version=text(_version()),
        data=json_in_script(page_data(content)),
        plotly=plotly,
        plots=plots,
        page=page,
    )


def _file(name: str) -> str:
    return _lines(resources.files("contlearn.report").joinpath(name).read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def _plotly() -> str:
    """plotly.js of the installed package, such that nothing in it ends the script element it stands in."""
    from plotly.offline import get_plotlyjs

    return _lines(get_plotlyjs()).replace("</script", r"<\/script").replace("<!--", r"\x3c!--")


def _lines(script: str) -> str:
    # A browser makes every line end "\n" before it hashes a script.
    return script.replace("\r\n", "\n").replace("\r", "\n")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _version() -> str:
    from plotly.offline import get_plotlyjs_version

    from contlearn import __version__

    return f"contlearn {__version__}, plotly.js {get_plotlyjs_version()}"
