"""The command ``contlearn pareto``: mistakes end with 2 and one line, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from contlearn import cli
from contlearn.pareto import command

SWEEP = {"strategies": {"naive": {}, "replay": {}}, "budgets": ["2KB"], "seeds": 2}


@pytest.mark.parametrize(
    ("change", "options", "parts"),
    [
        ({"strategies": {"replya": {}}}, [], ["unknown strategy 'replya'", "did you mean 'replay'"]),
        ({"axes": {}}, [], ["axes: expected at least one"]),
        ({"budgets": ["8 kilos"]}, [], ["budgets: expected whole bytes", "'8 kilos'", "did you mean '8KB'"]),
        ({}, ["--jobs", "0"], ["jobs: expected at least 1, got 0"]),
        ({}, ["--seeds", "0"], ["seeds: expected a whole number of at least 1, got 0"]),
        ({}, ["--engine", "spark"], ["pareto: argument --engine", "'spark'"]),
        ({}, ["--address", "auto"], ["address: only the engine ray takes one"]),
        ({}, ["--out", "/proc/none/here"], ["cannot write '/proc/none/here'"]),
        ({}, ["--job"], ["pareto:"]),
    ],
)
def test_a_mistake_ends_with_2_and_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    options: list[str],
    parts: list[str],
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, **change}))
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    monkeypatch.setitem(cli.COMMANDS, "pareto", (command.main, ""))
    assert cli.main(["pareto", str(path), *out, *options]) == 2
    line = capsys.readouterr().err
    assert line.startswith("contlearn: error: ") and line.count("\n") == 1
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()
