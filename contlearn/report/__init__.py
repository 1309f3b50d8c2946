"""Report pages: one self-contained ``report.html`` for a sweep, a run, or a folder of runs.

:func:`write_page` reads ``pareto.json`` or the raw ``events.jsonl`` and writes the page beside them;
``contlearn.report.command`` is the command ``contlearn report``. Nothing is fetched when a page is opened.
"""

from __future__ import annotations

from contlearn.report._page import FILE_NAME, write_page

__all__ = ["FILE_NAME", "write_page"]
