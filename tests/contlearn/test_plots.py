"""The figures show the numbers of the results, and the table their mean and spread."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from contlearn import plots
from contlearn.errors import ContlearnError


def make(
    seen: list[float | None], *, joint: bool = False, length: int | None = None, forgetting: float | None = 0.2
) -> dict[str, Any]:
    length = len(seen) if length is None else length
    rows = 1 if joint else len(seen)
    return {
        "joint": joint,
        "classes_per_experience": [[i] for i in range(length)],
        "accuracy_seen": seen,
        "accuracy_matrix": [[0.25 if j <= i or joint else None for j in range(length)] for i in range(rows)],
        "metrics": {"final_accuracy": seen[-1], "average_accuracy": seen[0], "forgetting": forgetting},
        "time": {"train_s": 12.0},
    }


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is written."""
    kept: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: Any) -> None:
        kept.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return kept


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_line_per_run_at_full_size(tmp_path: Path, figures: list[Any]) -> None:
    path = tmp_path / "accuracy.png"
    plots.accuracy_per_experience([("ewc", make([1.0, 0.5, 0.25])), ("lwf", make([0.9, 0.8, 0.7]))], path)
    assert png_size(path) == (1200, 800)
    first, second = figures[0].axes[0].lines
    assert list(first.get_xdata()) == [1, 2, 3]
    assert list(first.get_ydata()) == [1.0, 0.5, 0.25]
    assert first.get_color() != second.get_color()
    assert first.get_marker() != second.get_marker()
    assert legend(figures[0]) == ["ewc", "lwf"]
    assert not figures[0].axes[0].collections  # no spread where there is one seed


def test_seeds_become_their_mean_and_a_band_of_one_standard_deviation(tmp_path: Path, figures: list[Any]) -> None:
    runs = [("ewc", make([0.9, 0.5])), ("ewc", make([0.7, 0.5])), ("ewc", make([0.8, 0.2]))]
    plots.accuracy_per_experience(runs, tmp_path / "x.png")
    (line,), (band,) = figures[0].axes[0].lines, figures[0].axes[0].collections
    assert list(line.get_ydata()) == pytest.approx([0.8, 0.4])
    corners = band.get_paths()[0].vertices
    deviations = [0.1, math.sqrt((0.01 + 0.01 + 0.04) / 2)]
    for x, mean, deviation in zip((1, 2), (0.8, 0.4), deviations, strict=True):
        heights = [y for at, y in corners if at == x]
        assert (min(heights), max(heights)) == pytest.approx((mean - deviation, mean + deviation))


def test_only_experiences_that_every_seed_reached_are_averaged(tmp_path: Path, figures: list[Any]) -> None:
    runs = [("ewc", make([0.9, None, 0.5, 0.4])), ("ewc", make([0.7, 0.6, 0.5], length=4))]
    plots.accuracy_per_experience(runs, tmp_path / "x.png")
    (line,) = figures[0].axes[0].lines
    assert list(line.get_xdata()) == [1, 3]
    assert list(line.get_ydata()) == pytest.approx([0.8, 0.5])


def test_a_joint_run_is_a_level_over_the_whole_stream(tmp_path: Path, figures: list[Any]) -> None:
    runs = [("ewc", make([0.9, 0.5, 0.4])), ("joint", make([0.95], joint=True, length=3))]
    plots.accuracy_per_experience(runs, tmp_path / "x.png")
    level = figures[0].axes[0].lines[1]
    assert list(level.get_xdata()) == [1, 3]
    assert list(level.get_ydata()) == [0.95, 0.95]
    assert level.get_linestyle() == "--"


def test_labels_are_shown_as_they_are(tmp_path: Path, figures: list[Any]) -> None:
    labels = ["_private", "$x$", "a$b", "lr=0.1"]
    plots.accuracy_per_experience([(label, make([0.5, 0.5])) for label in labels], tmp_path / "x.png")
    assert legend(figures[0]) == labels
    assert not any(text.get_parse_math() for text in figures[0].legends[0].get_texts())


def test_long_labels_stay_inside_the_figure_and_keep_both_ends(tmp_path: Path, figures: list[Any]) -> None:
    labels = [f"replay with a very long name of {'many ' * 20}words, buffer {i}" for i in range(16)]
    plots.accuracy_per_experience([(label, make([0.5] * 20)) for label in labels], tmp_path / "x.png")
    figure = figures[0]
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= 1200
    assert figure.axes[0].get_window_extent().height > 300
    for i, text in enumerate(legend(figure)):
        assert text.startswith("replay")
        assert text.endswith(f"buffer {i}")


def test_colours_are_okabe_and_itos_and_no_two_lines_look_alike(tmp_path: Path, figures: list[Any]) -> None:
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(plots.COLOURS) <= okabe_ito
    plots.accuracy_per_experience([(str(i), make([0.5, 0.5])) for i in range(20)], tmp_path / "x.png")
    looks = [(line.get_color(), line.get_marker()) for line in figures[0].axes[0].lines]
    assert len(set(looks)) == 20


@pytest.mark.parametrize("seen", [[0.0, 0.0], [1.0, 1.0], [0.97], [0.99, 0.05]])
def test_every_point_lies_inside_the_axes(tmp_path: Path, figures: list[Any], seen: list[float]) -> None:
    plots.accuracy_per_experience([("a", make(list(seen)))], tmp_path / "x.png")
    low, high = figures[0].axes[0].get_ylim()
    assert 0 <= low <= min(seen)
    assert high == 1


def test_a_run_that_was_stopped_before_its_first_evaluation_is_drawn_empty(tmp_path: Path, figures: list[Any]) -> None:
    empty = make([0.5, 0.5]) | {"accuracy_seen": [], "accuracy_matrix": []}
    plots.accuracy_per_experience([("started", empty)], tmp_path / "x.png")
    assert legend(figures[0]) == ["started"]
    with pytest.raises(ContlearnError, match="no evaluation"):
        plots.accuracy_matrix(empty, tmp_path / "y.png")


@pytest.mark.parametrize("length", [1, 2, 5, 20])
def test_the_matrix_has_a_number_in_every_evaluated_cell(tmp_path: Path, figures: list[Any], length: int) -> None:
    path = tmp_path / "matrix.png"
    plots.accuracy_matrix(make([0.5] * length), path)
    texts = figures[0].axes[0].texts
    assert len(texts) == length * (length + 1) // 2
    assert {text.get_text() for text in texts} <= {"0.25", ".25"}
    width, height = png_size(path)
    assert min(width, height) >= 280
    assert max(width, height) <= 1400
    for text in texts:  # the number fits its cell
        cell = figures[0].axes[0].get_window_extent().width / length
        assert text.get_window_extent().width < cell


def test_the_matrix_of_a_joint_run_has_one_row(tmp_path: Path, figures: list[Any]) -> None:
    plots.accuracy_matrix(make([0.9], joint=True, length=5), tmp_path / "matrix.png")
    assert len(figures[0].axes[0].texts) == 5
    assert not list(figures[0].axes[0].get_yticks())


def test_no_run_and_unwritable_targets_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match="no run"):
        plots.accuracy_per_experience([], tmp_path / "x.png")
    with pytest.raises(ContlearnError, match="no run"):
        plots.table([])
    with pytest.raises(ContlearnError, match=r"absent/x\.png"):
        plots.accuracy_per_experience([("a", make([0.5]))], tmp_path / "absent" / "x.png")


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    code = """
import sys
from contlearn import plots
results = {"joint": False, "classes_per_experience": [[0]], "accuracy_seen": [0.5], "accuracy_matrix": [[0.5]]}
plots.accuracy_per_experience([("a", results)], sys.argv[1])
plots.accuracy_matrix(results, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path / "x.png")], check=True)


def rendered(runs: Any, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(plots.table(runs))
    return stream.getvalue()


def test_the_table_gives_mean_and_spread_over_seeds() -> None:
    text = rendered(
        [("ewc", make([0.9, 0.5])), ("[b]", make([0.25, 0.75], forgetting=None)), ("ewc", make([0.7, 0.7]))]
    )
    _, ewc, other = text.splitlines()
    assert " ".join(ewc.split()) == "ewc 2 0.600 ± 0.141 0.800 ± 0.141 0.200 ± 0.000 12.0 ± 0.0"
    assert " ".join(other.split()) == "[b] 1 0.750 0.250 - 12.0"
    assert "\x1b" not in text


def test_a_seed_without_a_number_is_not_left_out_of_a_mean_in_silence() -> None:
    unfinished = make([0.9, 0.5])
    unfinished["metrics"]["final_accuracy"] = None
    assert rendered([("a", make([0.9, 0.5])), ("a", unfinished)]).splitlines()[1].split()[:3] == ["a", "2", "-"]
