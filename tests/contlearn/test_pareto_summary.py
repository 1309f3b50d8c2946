"""What a sweep comes to: groups, fronts, areas, pairs, the table and the figure, from records made up here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_text
from contlearn.pareto import figure
from contlearn.pareto.folder import SweepFolder, write_record
from contlearn.pareto.plan import Cell
from contlearn.pareto.summary import flat, rebuild

Finish = Callable[..., None]
LEVELS = {None: 0.2, 8000: 0.6, 16000: 0.8}


@pytest.fixture
def cells() -> list[Cell]:
    """Naive, replay and der; two budgets; three seeds."""
    return [
        Cell(f"{label}-{budget}-{seed}", label, label, budget, None, seed, {}, {"strategy": {"name": label}})
        for seed in range(3)
        for label, budgets in (("naive", [None]), ("replay", [8000, 16000]), ("der", [8000, 16000]))
        for budget in budgets
    ]


@pytest.fixture
def place(tmp_path: Path, cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> SweepFolder:
    """A planned sweep without a finished cell; pages are written elsewhere."""
    monkeypatch.setattr("contlearn.pareto.summary._page", lambda folder: None)
    folder = SweepFolder(tmp_path / "sweep")
    with folder.locked():
        folder.write_plan({"budgets": [8000, 16000], "seeds": [0, 1, 2]}, cells, environment={"python": "3"})
    return folder


@pytest.fixture
def finish(place: SweepFolder) -> Finish:
    """``finish(cell, accuracy)``: make up the results of a cell."""

    def go(cell: Cell, accuracy: float, memory: Mapping[str, Any] | None = None) -> None:
        folder = place.cell(cell.id)
        folder.mkdir()
        results = {
            "schema": 1,
            "status": "complete",
            "metrics": {"final_accuracy": accuracy, "average_accuracy": accuracy / 2, "forward_transfer": None},
            "accuracy_matrix": [[accuracy]],
            "accuracy_seen": [accuracy],
            "time": {"train_s": 1.0, "eval_s": 0.1},
            **({"memory": dict(memory)} if memory else {}),
        }
        (folder / "results.json").write_text(json.dumps(results))
        write_record(folder, {"schema": 1, "id": cell.id, "status": "complete", "error": None, "seconds": 2.0})

    return go


@pytest.fixture
def finished(place: SweepFolder, cells: list[Cell], finish: Finish) -> SweepFolder:
    """Every cell finished but one, which failed; der is worse than replay and stores more."""
    for cell in cells:
        if cell.id == "der-16000-2":
            write_record(place.cell(cell.id), {"schema": 1, "id": cell.id, "status": "failed", "error": "no luck"})
            continue
        worse, stored = (0.1, 500) if cell.label == "der" else (0.0, 0)
        memory = {"weights": 1000, "persistent": 1000 + (cell.budget or 0) + stored, "peak_ratio": 1.1, "by": "x"}
        finish(cell, LEVELS[cell.budget] - worse + cell.seed / 100, {**memory, "method_state": {"logits": stored}})
    return place


# ---------------------------------------------------------------------- numbers


def test_cells_say_what_came_of_them(finished: SweepFolder) -> None:
    content = rebuild(finished.path)
    assert content["schema"] == 1 and content["environment"] == {"python": "3"}
    assert content["axes"] == [{"name": "budget", "values": [8000, 16000]}]
    by_id = {cell["id"]: cell for cell in content["cells"]}
    assert len(by_id) == 15
    good, bad = by_id["replay-8000-1"], by_id["der-16000-2"]
    assert {key: good[key] for key in ("label", "strategy", "budget", "memory_size", "seed", "status", "error")} == {
        "label": "replay", "strategy": "replay", "budget": 8000, "memory_size": None, "seed": 1, "status": "complete",
        "error": None,
    }  # fmt: skip
    assert good["folder"] == "cells/replay-8000-1" and good["accuracy_matrix"] == [[0.61]]
    assert good["time"] == {"train_s": 1.0, "eval_s": 0.1, "cell_s": 2.0}
    assert good["memory"] == {
        "weights": 1000, "persistent": 9000, "peak_ratio": 1.1, "method_state": 0, "method_state.logits": 0,
    }  # fmt: skip
    assert (bad["status"], bad["error"], bad["metrics"]) == ("failed", "no luck", {})


def test_groups_spread_over_the_seeds_that_finished(finished: SweepFolder) -> None:
    groups = {group["id"]: group for group in rebuild(finished.path)["groups"]}
    assert list(groups) == ["naive", "replay @ 8000 B", "replay @ 16000 B", "der @ 8000 B", "der @ 16000 B"]
    accuracy = groups["replay @ 16000 B"]["metrics"]["final_accuracy"]
    assert (accuracy["mean"], accuracy["sd"], accuracy["n"]) == (pytest.approx(0.81), pytest.approx(0.01), 3)
    assert 0.8 <= accuracy["low"] < 0.81 < accuracy["high"] <= 0.82
    assert groups["der @ 16000 B"]["seeds"] == [0, 1]
    assert "forward_transfer" not in groups["naive"]["metrics"]


def test_fronts_areas_and_volumes_follow_the_memory_that_is_asked_for(finished: SweepFolder) -> None:
    content = rebuild(finished.path)
    assert set(content["fronts"]) == {"weights", "persistent", "method_state", "budget"}  # no parts, no ratios
    best = ["naive", "replay @ 8000 B", "replay @ 16000 B"]
    assert content["fronts"]["persistent"]["final_accuracy"] == best
    assert content["fronts"]["budget"]["final_accuracy"] == best
    assert content["fronts"]["weights"]["final_accuracy"] == ["replay @ 16000 B"]
    largest = 17500
    assert content["hypervolume"]["persistent"]["final_accuracy"] == pytest.approx(
        (8000 * 0.21 + 8000 * 0.61 + 500 * 0.81) / largest
    )
    assert content["hypervolume"]["weights"]["final_accuracy"] == 0
    area = content["auc"]["replay"]["persistent"]
    assert area == {"auc_l": pytest.approx(8000 * 0.71 / 2**20), "auc_a": pytest.approx(8000 * 0.355 / 2**20),
                    "from": 9000, "to": 17000}  # fmt: skip
    assert "naive" not in content["auc"] and "weights" not in content["auc"]["replay"]


def test_methods_are_paired_at_equal_budgets(finished: SweepFolder) -> None:
    pairs = [pair for pair in rebuild(finished.path)["paired"] if pair["metric"] == "final_accuracy"]
    assert [(pair["a"], pair["b"], pair["budget"], pair["n"]) for pair in pairs] == [
        ("naive", "replay", 8000, 3), ("naive", "replay", 16000, 3), ("naive", "der", 8000, 3),
        ("naive", "der", 16000, 2), ("replay", "der", 8000, 3), ("replay", "der", 16000, 2),
    ]  # fmt: skip
    assert pairs[4]["difference"] == pytest.approx(0.1) and pairs[4]["p_value"] == 0.25
    assert pairs[4]["memory_size"] is None


def test_nested_memory_becomes_a_total_and_its_parts() -> None:
    nested = {"replay": 5, "method_state": {"fisher": 2, "deep": {"a": 1, "b": 3}}, "how": "static", "exact": True}
    assert flat(nested) == {
        "replay": 5, "method_state": 6, "method_state.fisher": 2, "method_state.deep": 4, "method_state.deep.a": 1,
        "method_state.deep.b": 3,
    }  # fmt: skip


# ---------------------------------------------------------------------- files


def test_the_table_has_a_row_per_cell(finished: SweepFolder) -> None:
    content = rebuild(finished.path)
    rows = list(csv.DictReader(io.StringIO((finished.path / "pareto.csv").read_text())))
    assert [row["id"] for row in rows] == [cell["id"] for cell in content["cells"]]
    assert list(rows[0])[:6] == ["id", "label", "strategy", "budget", "memory_size", "seed"]
    assert list(rows[0])[-1] == "folder"
    assert (rows[1]["budget"], rows[1]["final_accuracy"], rows[1]["memory.persistent"]) == ("8000", "0.6", "9000")
    assert (rows[-1]["status"], rows[-1]["error"], rows[-1]["final_accuracy"]) == ("failed", "no luck", "")


def test_rebuilding_gives_the_same_bytes(finished: SweepFolder) -> None:
    names = ("pareto.json", "pareto.csv", "pareto.png")
    content = rebuild(finished.path)
    before = [(finished.path / name).read_bytes() for name in names]
    rebuild(finished.path)
    assert [(finished.path / name).read_bytes() for name in names] == before
    assert json.loads(before[0]) == content


def test_the_figure_has_the_field_that_tells_the_groups_apart(finished: SweepFolder) -> None:
    content = rebuild(finished.path)
    assert figure.axis(content["groups"]) == "persistent"
    image = Image.open(finished.path / "pareto.png")
    assert image.size == (1280, 880)
    assert len(image.convert("RGB").getcolors(2**24) or ()) > 50
    for group in content["groups"]:
        group["memory"] = {}
    assert figure.axis(content["groups"]) == "budget"


def test_a_sweep_with_nothing_finished_has_no_figure(place: SweepFolder) -> None:
    atomic_write_text(place.path / "pareto.png", "of another time")
    content = rebuild(place.path)
    assert {cell["status"] for cell in content["cells"]} == {"missing"}
    assert content["groups"] == content["paired"] == [] and content["fronts"] == {}
    assert not (place.path / "pareto.png").exists()
    assert (place.path / "pareto.csv").read_text().count("\n") == 16


def test_damaged_results_count_as_missing(finished: SweepFolder) -> None:
    (finished.cell("replay-8000-0") / "results.json").write_text("{")
    (finished.cell("replay-8000-1") / "cell.json").write_text("[]")
    found = {cell["id"]: cell for cell in rebuild(finished.path)["cells"]}
    assert found["replay-8000-0"]["status"] == found["replay-8000-1"]["status"] == "missing"
    assert "damaged" in found["replay-8000-0"]["error"]


# ---------------------------------------------------------------------- the folder


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ContlearnError, match="is not the folder of a sweep"), SweepFolder(tmp_path).locked():
        pass
    with pytest.raises(ContlearnError, match="is a file"), SweepFolder(tmp_path / "thesis.tex").locked():
        pass
    with pytest.raises(ContlearnError, match=r"no sweep's folder: it has no sweep\.json"):
        rebuild(tmp_path)


def test_one_sweep_at_a_time(place: SweepFolder) -> None:
    with place.locked(), pytest.raises(ContlearnError, match="another sweep is at work"), place.locked(patience=0.1):
        pass


def test_a_damaged_plan_says_so(place: SweepFolder) -> None:
    (place.path / "sweep.json").write_text('{"schema": 1, "cells": [{}]}')
    with pytest.raises(ContlearnError, match=r"sweep\.json: damaged"):
        rebuild(place.path)
