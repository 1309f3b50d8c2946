"""A page says what its records say, holds everything it needs, and lets no text out of its place."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from contlearn import report
from contlearn.errors import ContlearnError
from contlearn.report import _content, _markup, _tables, command
from contlearn.report._page import read

EVIL = "</script><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "input", "wbr"}

Sweep = dict[str, Any]
Write = Callable[[Sweep], Path]
Make = Callable[..., Sweep]


class Document(HTMLParser):
    """The elements of a page: tags must close in order, ids must be unique."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page gives its scripts."""
        (found,) = [script for attributes, script in self.scripts if attributes.get("id") == "data"]
        loaded: dict[str, Any] = json.loads(found)
        return loaded

    def ids(self, tag: str) -> list[str | None]:
        return [attributes.get("id") for name, attributes in self.elements if name == tag]

    def rows(self, table: str) -> int:
        """Number of rows below the heading of a table."""
        start = next(i for i, (tag, attributes) in enumerate(self.elements) if attributes.get("id") == table)
        rows = itertools.takewhile(lambda element: element[0] not in ("table", "section"), self.elements[start + 1 :])
        return sum(tag == "tr" for tag, _ in rows) - 1


def page(folder: Path) -> Document:
    return Document(report.write_page(folder))


# ---------------------------------------------------------------------- a sweep


def test_a_sweep_has_every_section_and_a_row_for_every_group_and_cell(sweep: Write, sweep_of: Make) -> None:
    found = page(sweep(sweep_of()))
    assert found.ids("section") == [
        *("headline", "front", "memory", "curves", "matrix", "table", "comparisons", "summaries", "setup", "glossary")
    ]
    assert found.rows("groups") == 30
    assert found.rows("cells") == 90
    assert found.rows("paired") == 75
    assert len(found.data["groups"]) == 30
    assert found.data["series"] == ["naive", "replay", "er_ace", "derpp", "icarl", "memo"]
    links = {attributes["href"] for tag, attributes in found.elements if tag == "a"}
    assert {f"#{one}" for one in found.ids("section")} <= links
    assert "6 methods, 5 memory budgets, 30 settings and 3 seeds on class-incremental digits" in found.text
    assert "2.15.0" in found.text
    assert "n_experiences: 5" in found.text


def test_the_points_are_the_means_of_the_groups(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    drawn = {group["id"]: group for group in page(sweep(content)).data["groups"]}
    for group in content["groups"]:
        for section, digits in (("metrics", 6), ("memory", 1)):
            for name, spread in group[section].items():
                expected = [spread[key] and round(spread[key], digits) for key in ("mean", "sd", "low", "high")]
                assert drawn[group["id"]][section][name] == [*expected, spread["n"]]
        matrices = [c["accuracy_matrix"] for c in content["cells"] if c["label"] == group["label"]]
        assert len(drawn[group["id"]]["matrix"]) == len(matrices[0])
        assert [run["seed"] for run in drawn[group["id"]]["runs"]] == group["seeds"]


def test_curves_and_matrices_are_means_over_the_seeds(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    group = page(sweep(content)).data["groups"][7]
    cells = [c for c in content["cells"] if c["label"] == group["label"] and c["budget"] == 200_000]
    for i, (mean, sd) in enumerate(group["curve"]):
        values = [cell["accuracy_seen"][i] for cell in cells]
        assert mean == pytest.approx(statistics.fmean(values), abs=1e-4)
        assert sd == pytest.approx(statistics.stdev(values), abs=1e-4)
    for i, j in itertools.product(range(5), range(5)):
        expected = statistics.fmean(cell["accuracy_matrix"][i][j] for cell in cells)
        assert group["matrix"][i][j] == pytest.approx(expected, abs=1e-4)


def test_the_headline_names_the_best_at_each_budget_and_whether_the_seeds_can_tell(
    sweep: Write, sweep_of: Make
) -> None:
    content = sweep_of()
    for pair in content["paired"]:
        if {pair["a"], pair["b"]} == {"icarl", "memo"} and pair["budget"] == 50_000:
            pair.update(low=-0.2, high=0.1)
    found = page(sweep(content)).text
    tiles = found[found.index("Best final accuracy at each budget") : found.index("The front of")]
    values = {(g["label"], g["budget"]): g["metrics"]["final_accuracy"] for g in content["groups"]}
    for budget, words in ((50_000, "50 kB"), (1_000_000, "1 MB")):
        best, second = values["memo", budget], values["icarl", budget]
        assert f"{words}memo{best['mean']:.3f} ± {best['sd']:.3f}" in tiles
        gap = f"{best['mean'] - second['mean']:.3f}"
        assert (f"not told apart from icarl by 3 seeds ({gap}" if budget == 50_000 else f"{gap} above icarl") in tiles


def test_less_is_better_where_the_metric_is_an_error(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    for entry in content["cells"] + content["groups"]:
        entry["metrics"] = {"mean_error": entry["metrics"]["forgetting"]}
    found = page(sweep(content))
    assert "Lowest mean error at each budget" in found.text
    assert re.search(r"50 kBmemo0\.\d+ ± 0\.\d+0\.\d+ below icarl", found.text)
    assert found.data["metrics"] == [{"key": "mean_error", "label": "mean error", "lower": True}]


def test_fronts_are_the_sweep_s_own_and_computed_where_it_has_none(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    ids = [group["id"] for group in content["groups"]]
    content["fronts"] = {"persistent": {"final_accuracy": [ids[3], ids[8], "gone"]}}
    fronts = page(sweep(content)).data["fronts"]
    assert fronts["persistent"]["final_accuracy"] == [3, 8]
    assert fronts["activations"]["forgetting"]
    assert fronts["method_state.fisher"]["average_accuracy"]


@pytest.mark.parametrize("metric", ["final_accuracy", "forgetting"])
def test_a_computed_front_holds_what_nothing_beats(metric: str) -> None:
    source = random.Random(3)
    groups = [
        _content.Group(
            id=str(i),
            setting=_content.Setting("a", "a", budget=i),
            seeds=[0],
            metrics={metric: _content.Spread(source.randrange(12) / 12)},
            memory={"replay": _content.Spread(source.randrange(15))},
            cells=[],
        )
        for i in range(60)
    ]
    sign = -1 if metric == "forgetting" else 1

    def point(group: _content.Group) -> tuple[float, float]:
        bytes_, value = group.memory["replay"].mean, group.metrics[metric].mean
        assert bytes_ is not None and value is not None
        return bytes_, -sign * value

    front = {group.id: point(group) for group in groups if group.id in _content.front(groups, "replay", metric)}
    beaten = {
        group.id
        for group in groups
        if any(a <= point(group)[0] and b <= point(group)[1] and (a, b) != point(group) for a, b in map(point, groups))
    }
    assert not beaten & front.keys()
    assert set(front.values()) == {point(group) for group in groups if group.id not in beaten}
    assert len(set(front.values())) == len(front)


def test_failed_and_missing_cells_are_told_and_their_errors_shown(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    empty: dict[str, Any] = {"metrics": {}, "memory": {}, "accuracy_matrix": [], "accuracy_seen": [], "time": {}}
    content["cells"][4].update(status="failed", error="ValueError: the loss is nan\n  in line 3", **empty)
    content["cells"][50].update(status="missing", **empty)
    found = page(sweep(content))
    assert "1 of 90 cells failed" in found.text
    assert "1 of 90 cells have not run yet" in found.text
    assert "ValueError: the loss is nan\n  in line 3" in found.text
    assert "cells/naive-100000-1" in found.text
    assert found.rows("groups") == 30
    assert [run["seed"] for run in found.data["groups"][1]["runs"]] == [0, 2]


@pytest.mark.parametrize("lost", ["all", "null", "some", "absent"])
def test_a_sweep_without_some_or_all_of_its_memory_is_shown(sweep: Write, sweep_of: Make, lost: str) -> None:
    content = sweep_of()
    for number, entry in enumerate(content["cells"] + content["groups"]):
        if lost == "all":
            entry["memory"] = {}
        elif lost == "null":
            entry["memory"] = dict.fromkeys(entry["memory"])
        elif lost == "absent":
            del entry["memory"]
        elif number % 2:
            entry["memory"] = {name: entry["memory"][name] for name in ("weights", "peak_static")}
    found = page(sweep(content))
    keys = [one["key"] for one in found.data["memory"]]
    if lost == "some":
        assert keys[0] == "persistent"
        assert found.rows("groups") == 30
    else:
        assert keys == ["budget"]  # what was given is known without an account
        assert "No memory was recorded" in found.text


def test_a_sweep_of_an_older_version_has_cells_alone(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    found = page(sweep({"schema": 1, "cells": content["cells"]}))
    assert len(found.data["groups"]) == 30
    for drawn, group in zip(found.data["groups"], content["groups"], strict=True):
        expected = group["metrics"]["final_accuracy"]
        assert drawn["metrics"]["final_accuracy"][:2] == pytest.approx([expected["mean"], expected["sd"]], abs=1e-6)
    assert "comparisons" not in found.ids("section")
    assert "Neither configuration nor environment" in found.text


def test_one_cell_is_enough(sweep: Write, sweep_of: Make) -> None:
    found = page(sweep(sweep_of(strategies=("replay",), budgets=(50_000,), seeds=(0,))))
    assert "1 method, 1 memory budget and 1 seed on class-incremental digits, 5 experiences: 1 cell." in found.text
    assert len(found.data["groups"]) == 1
    assert found.data["groups"][0]["metrics"]["final_accuracy"][1] is None
    assert "±" not in found.text[found.text.index("Best final") : found.text.index("Accuracy over memory")]


def test_a_sweep_in_which_nothing_has_finished_says_how_it_goes_on(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    for cell in content["cells"]:
        cell.update(status="missing", metrics={}, memory={}, accuracy_matrix=[], accuracy_seen=[])
    found = page(sweep({**content, "groups": [], "fronts": {}, "paired": [], "auc": {}, "hypervolume": {}}))
    assert "contlearn pareto" in found.text
    assert found.ids("section") == ["front", "setup", "glossary"]


def test_tables_that_would_be_too_long_end_with_a_note(
    sweep: Write, sweep_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tables, "ROWS", 40)
    found = page(sweep(sweep_of()))
    assert found.rows("cells") == found.rows("paired") == 40
    assert found.rows("groups") == 30
    assert "The first 40 of 90; pareto.csv" in found.text
    assert "The first 40 of 75; pareto.json" in found.text


def test_exemplars_stand_for_the_budget_where_there_are_no_bytes(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    for entry in content["cells"] + content["groups"]:
        entry.update(budget=None, memory_size=entry["budget"] // 1000 if entry["label"] != "naive" else None)
    content["groups"] = content["groups"][4:]  # naive remembers nothing: one group
    found = page(sweep(content))
    assert "50 exemplars" in found.text
    sizes = [one for one in found.data["memory"] if one["key"] == "memory_size"]
    assert sizes == [{"key": "memory_size", "label": "exemplars given", "unit": "exemplars"}]
    assert found.data["groups"][0]["memory"]["memory_size"][0] == 0


def test_curves_follow_labels_and_without_shared_labels_strategies() -> None:
    def group(label: str, strategy: str, budget: int) -> _content.Group:
        return _content.Group(f"{label}{budget}", _content.Setting(label, strategy, budget=budget), [0], {}, {}, [])

    shared = [group("er lr=1", "er", 1), group("er lr=1", "er", 2), group("er lr=2", "er", 1)]
    assert _content.Content("sweep", "x", groups=shared).series == ["er lr=1", "er lr=2"]
    alone = [group("er 1 kB", "er", 1), group("er 2 kB", "er", 2)]
    assert _content.Content("sweep", "x", groups=alone).series == ["er"]


@pytest.mark.parametrize(
    ("metric", "difference", "words"),
    [
        ("final_accuracy", 0.1, "a better"),
        ("final_accuracy", -0.1, "b better"),
        ("forgetting", 0.1, "b better"),
        ("forgetting", 0.0, "no difference shown"),
    ],
)
def test_a_comparison_is_read_by_its_interval_and_the_metric_s_direction(
    metric: str, difference: float, words: str
) -> None:
    pair = _content.Paired("a", "b", None, metric, 5, difference, difference - 0.05, difference + 0.05, 0.06)
    assert _tables.reading(pair) == words
    assert _tables.reading(replace(pair, low=None)) == "–"


# ---------------------------------------------------------------------- safety


def test_the_page_needs_nothing_from_outside_and_runs_its_own_scripts_alone(sweep: Write, sweep_of: Make) -> None:
    path = report.write_page(sweep(sweep_of()))
    found = Document(path)
    assert path.name == "report.html"
    assert path.stat().st_size < 6_000_000
    for tag, attributes in found.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "style") and not name.startswith("on"), (tag, name)
            assert name != "href" or (value or "").startswith("#") or value == "data:,"
    (policy,) = [a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    run = [script for attributes, script in found.scripts if "type" not in attributes]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in run]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert len(hashes) == 3


def test_text_of_strangers_stays_text_wherever_it_stands(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of(strategies=(EVIL, "replay"))
    content["cells"][0].update(status="failed", error=EVIL, folder=EVIL, axes={EVIL: EVIL})
    content["config"].update(description=EVIL, scenario={"name": EVIL, "dataset": EVIL})
    content["config"][EVIL] = [EVIL]
    content["environment"] = {EVIL: {EVIL: EVIL}}
    for entry in content["cells"] + content["groups"]:
        entry["metrics"][EVIL] = 0.5 if "status" in entry else {"mean": 0.5, "n": 1}
        if "status" in entry:
            entry["memory"][f"method_state.{EVIL}"] = 5
        else:
            entry["memory"][f"method_state.{EVIL}"] = {"mean": 5, "n": 1}
    content["auc"][EVIL] = content["auc"]["replay"]
    path = report.write_page(sweep(content))
    found = Document(path)
    assert "img" not in {tag for tag, _ in found.elements}
    assert len(found.ids("script")) == 4
    assert found.data["series"][0] == EVIL
    assert found.text.count(EVIL) > 20
    assert "<img" not in path.read_text(encoding="utf-8").split("<script", 1)[0]
    (data,) = [script for attributes, script in found.scripts if attributes.get("id") == "data"]
    assert not set("<>&\u2028\u2029") & set(data)


@pytest.mark.parametrize("value", [EVIL, '" onload="x', "a&b", "\u2028\ud800\x00", "<!--", "]]>", "$title ${x} %{y}"])
def test_markup_escapes_text_in_both_of_its_places(value: str) -> None:
    element = _markup.element("p", value, title=value)
    assert re.fullmatch(r'<p title="[^"<>]*">[^<>]*</p>', element)
    assert element.encode("utf-8")
    assert json.loads(_markup.json_in_script([value])) == [value]


@pytest.mark.parametrize("attributes", [{"onclick": "x"}, {"href": "javascript:x"}, {"src": "http://x"}, {"a b": "x"}])
def test_markup_refuses_what_has_no_place_on_a_page(attributes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"place|name"):
        _markup.element("a", **attributes)


def test_plotly_s_text_cannot_end_its_script() -> None:
    from contlearn.report._page import _plotly

    assert "</script" not in _plotly().lower()
    assert "<!--" not in _plotly()
    assert "\r" not in _plotly()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "damaged"),
        ("[]", "expected an object"),
        ("[" * 200_000, "damaged"),
        ('{"schema": 2}', "schema 2, expected 1"),
        ('{"schema": 1, "cells": {}}', "cells: expected a list"),
        ('{"schema": 1, "cells": [3]}', r"cells\[0\]: expected an object, got 3"),
        ('{"schema": 1, "cells": [{"label": 3}]}', r"cells\[0\]\.label: expected text, got 3"),
        ('{"schema": 1, "cells": [{"metrics": {"a": "b"}}]}', r"metrics\.a: expected a number, got 'b'"),
        ('{"schema": 1, "cells": [{"accuracy_matrix": [0.5]}]}', r"accuracy_matrix\[0\]: expected a list"),
        ('{"schema": 1, "groups": [{"memory": {"weights": 7}}]}', "memory.weights: expected an object, got 7"),
    ],
)
def test_a_damaged_sweep_is_one_line_that_names_the_place(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "pareto.json").write_text(content)
    with pytest.raises(ContlearnError, match=words) as caught:
        report.write_page(tmp_path)
    assert "pareto.json" in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_numbers_that_are_none_are_left_out(sweep: Write, sweep_of: Make) -> None:
    content = sweep_of()
    content["cells"][0]["metrics"].update(final_accuracy=float("nan"), average_accuracy=float("inf"))
    content["groups"][0]["metrics"]["final_accuracy"].update(mean=10**400, sd=float("nan"))
    found = page(sweep(content))
    assert found.data["groups"][0]["metrics"]["final_accuracy"][:2] == [None, None]


# ---------------------------------------------------------------------- rebuilding


def test_a_page_made_again_has_the_same_bytes(sweep: Write, sweep_of: Make, run_folder: Path) -> None:
    for folder in (sweep(sweep_of()), run_folder, run_folder.parent):
        path = report.write_page(folder)
        first = path.read_bytes()
        path.unlink()
        assert report.write_page(folder).read_bytes() == first
        assert [left.name for left in folder.iterdir() if left.name.startswith(".tmp-")] == []


def test_a_run_is_shown_from_its_raw_events(run_folder: Path, tmp_path: Path) -> None:
    found = page(run_folder)
    results = json.loads((run_folder / "results.json").read_text())
    (group,) = found.data["groups"]
    for row, expected in zip(group["matrix"], results["accuracy_matrix"], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    assert [mean for mean, _ in group["curve"]] == pytest.approx(results["accuracy_seen"], abs=1e-4)
    assert [epoch[:2] for epoch in found.data["epochs"]] == [[i, j] for i in range(5) for j in range(2)]
    assert all(loss > 0 and rate == 0.1 for _, _, loss, rate in found.data["epochs"])
    assert found.ids("section")[:4] == ["headline", "curves", "matrix", "loss"]
    assert "memory_size: 100" in found.text
    assert f"final accuracy{results['metrics']['final_accuracy']:.4f}" in found.text
    for name, amount in results.get("memory", {}).items():
        if name in ("weights", "replay", "persistent"):
            assert f"({amount:,} B)" in found.text

    copy = tmp_path / run_folder.name
    shutil.copytree(run_folder, copy)
    (copy / "results.json").unlink()
    assert report.write_page(copy).read_bytes() == (run_folder / "report.html").read_bytes()


def test_a_run_that_has_not_finished_says_so(run_folder: Path, tmp_path: Path) -> None:
    lines = (run_folder / "events.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"after":4' not in line and '"event":"end"' not in line]
    (tmp_path / "events.jsonl").write_text("".join(kept))
    found = page(tmp_path)
    assert "has not finished" in found.text
    assert len(found.data["groups"][0]["curve"]) == 4


def test_a_folder_of_runs_groups_seeds_and_lists_what_it_cannot_read(run_folder: Path, tmp_path: Path) -> None:
    for name, seed, size in (("a", 0, 100), ("b", 1, 100), ("deep/c", 0, 50), ("deep/d", 1, 50)):
        folder = tmp_path / name
        shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("checkpoint", "results.json", "report.html"))
        events = (folder / "events.jsonl").read_text().replace('"seed":0', f'"seed":{seed}', 1)
        (folder / "events.jsonl").write_text(events)
        config = (folder / "config.yaml").read_text()
        config = config.replace("memory_size: 100", f"memory_size: {size}").replace("\nseed: 0", f"\nseed: {seed}")
        (folder / "config.yaml").write_text(config)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "events.jsonl").write_text("nothing\nof this\n")
    found = page(tmp_path)
    assert [group["seeds"] for group in found.data["groups"]] == [[0, 1], [0, 1]]
    assert found.data["series"] == ["replay"]
    assert found.data["levels"] == ["50 exemplars", "100 exemplars"]
    assert "1 of 5 runs could not be read" in found.text
    assert "not a record of a run" in found.text
    assert found.rows("cells") == 5


def test_the_same_run_twice_is_not_two_seeds(run_folder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(run_folder, tmp_path / name)
    found = page(tmp_path)
    assert [group["label"] for group in found.data["groups"]] == ["replay (first)", "replay (second)"]


def test_runs_on_different_streams_are_told_apart(run_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(run_folder, tmp_path / name)
    config = tmp_path / "b" / "config.yaml"
    config.write_text(config.read_text().replace("dataset: digits", "dataset: mnist5k"))
    found = page(tmp_path)
    assert "different streams" in found.text
    assert found.data["series"] == ["replay"]
    assert {group["label"] for group in found.data["groups"]} == {"replay dataset=digits", "replay dataset=mnist5k"}


def test_a_test_time_run_shows_its_error_by_domain(run_folder: Path, tmp_path: Path) -> None:
    results = json.loads((run_folder / "results.json").read_text())
    results.update(error_by_domain={"fog": 0.2, "snow": 0.31}, mean_error=0.255, source_mean_error=0.2)
    (tmp_path / "results.json").write_text(json.dumps(results | {"worse_than_source": True}))
    found = page(tmp_path)
    lines = [{"group": 0, "errors": [0.2, 0.31]}]
    assert found.data["domains"] == {"names": ["fog", "snow"], "lines": lines, "source": []}
    assert "worse than the source model" in found.text
    assert "domains" in found.ids("section")


def test_a_configuration_that_unfolds_without_end_is_no_trouble(run_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(run_folder / "events.jsonl", tmp_path / name)
        levels = ["a0: &a0 {x: 1}"] + [
            f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}" for i in range(1, 12)
        ]
        (tmp_path / name / "config.yaml").write_text("\n".join([*levels, "scenario: *a11", "strategy: *a11"]))
    assert len(page(tmp_path).data["groups"]) == 2
    assert len(page(tmp_path / "a").data["groups"]) == 1


# ---------------------------------------------------------------------- the command


def test_the_command_writes_a_page_per_folder(
    sweep: Write, sweep_of: Make, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sweep(sweep_of())
    assert command.main([str(folder), str(run_folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\nreport: {run_folder / 'report.html'}\n"


def test_a_sweep_that_kept_its_cells_is_summed_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contlearn import pareto

    rebuilt: list[Path] = []

    def rebuild(folder: Path) -> None:
        rebuilt.append(folder)
        (folder / "pareto.json").write_text('{"schema": 1}')

    monkeypatch.setattr(pareto, "rebuild", rebuild)
    (tmp_path / "sweep.json").write_text("{}")
    command.main([str(tmp_path)])
    assert rebuilt == [tmp_path]
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: DIR"),
        (["--nonsense", "x"], "unrecognized arguments: --nonsense"),
        (["absent"], "'.*absent' is no folder"),
        (["file"], "'.*file' is no folder"),
        (["empty"], "nothing to report in '.*empty'"),
    ],
)
def test_a_wrong_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ContlearnError, match=words) as caught:
        command.main(arguments)
    assert "\n" not in str(caught.value)


def test_a_page_that_cannot_be_written_leaves_the_old_one(sweep: Write, sweep_of: Make) -> None:
    folder = sweep(sweep_of())
    (folder / "report.html").mkdir()
    with pytest.raises(ContlearnError, match=r"report\.html"):
        report.write_page(folder)


def test_the_kind_of_a_folder_follows_from_what_is_in_it(sweep: Write, sweep_of: Make, run_folder: Path) -> None:
    assert read(sweep(sweep_of())).kind == "sweep"
    assert read(run_folder).kind == "run"
    assert read(run_folder.parent).kind == "runs"
