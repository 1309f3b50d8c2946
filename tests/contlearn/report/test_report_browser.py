"""The pages in Chromium: quiet, offline, legible at every width, and answering to their controls."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from contlearn import report

pytestmark = pytest.mark.browser

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 380, "height": 800}
SIZES = [pytest.param(DESKTOP, id="desktop"), pytest.param(PHONE, id="phone")]
EVIL = "</script><img src=x onerror=alert(1)>"
OKABE_ITO = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]  # and black, of six methods
POINTS = "#plot-front .scatterlayer path.point"

Open = Callable[..., Any]
Sweep = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sweep_of: Callable[..., Sweep]) -> Path:
    """A sweep of 6 methods x 5 budgets x 3 seeds, one of them with no budget's worth of replay."""
    found = tmp_path_factory.mktemp("browser") / "pareto_digits"
    found.mkdir()
    (found / "pareto.json").write_text(json.dumps(sweep_of()))
    return found


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return report.write_page(folder)


def written(folder: Path, content: Sweep) -> Path:
    (folder / "pareto.json").write_text(json.dumps(content))
    return report.write_page(folder)


def count(page: Any, selector: str) -> int:
    return int(page.value(f"document.querySelectorAll({json.dumps(selector)}).length"))


def text(page: Any, selector: str) -> str:
    return str(page.value(f"document.querySelector({json.dumps(selector)}).textContent"))


def positions(page: Any) -> list[Any]:
    found: list[Any] = page.value(f"[...document.querySelectorAll('{POINTS}')].map(p => p.getAttribute('transform'))")
    return found


def picture(page: Any, tmp_path: Path, selector: str = "html") -> Image.Image:
    page.screenshot(tmp_path / "page.png", selector)
    return Image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB")


def share(image: Image.Image, colour: str) -> float:
    """Share of the pixels that have exactly this colour."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    found = image.getcolors(1 << 24) or []
    return sum(number for number, one in found if one == wanted) / (image.width * image.height)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_sweep_is_drawn_whole_without_spilling_over(
    path: Path, open_page: Open, tmp_path: Path, size: dict[str, int], dark: bool
) -> None:
    page = open_page(path, **size, dark=dark)
    assert page.overflow() <= 0
    assert page.value("window.innerWidth") == size["width"]
    assert count(page, POINTS) == 30
    assert count(page, "#plot-memory .bars .point") == 6 * 30
    assert count(page, "#plot-curves .scatterlayer path.point") == 6 * 5
    assert count(page, "#plot-matrix .textpoint") == 15
    assert count(page, "#groups tbody tr") == 30
    image = picture(page, tmp_path, "#front")
    for colour in OKABE_ITO:
        assert share(image, colour) > 5e-5, colour
    background = "#1a1e23" if dark else "#ffffff"
    assert 0.3 < share(image, background) < 0.97
    whole = picture(page, tmp_path)
    assert whole.width == size["width"]
    assert whole.height > 4000


def test_every_method_has_its_own_colour_and_marker(path: Path, open_page: Open) -> None:
    page = open_page(path)
    traces = page.value(
        "document.getElementById('plot-front').data.slice(1).map(t => [t.name, t.marker.symbol, t.marker.color])"
    )
    assert [name for name, _, _ in traces] == ["naive", "replay", "er_ace", "derpp", "icarl", "memo"]
    assert len({symbol for _, symbol, _ in traces}) == 6
    assert len({colour for _, _, colour in traces}) == 6
    assert {colour.lower() for _, _, colour in traces} <= {*OKABE_ITO, "#000000"}
    patterns = page.value("document.getElementById('plot-memory').data.map(t => t.marker.pattern.shape)")
    assert len(set(patterns)) == len(patterns) == 6
    front = page.value("document.getElementById('plot-front').data[0]")
    assert front["line"]["shape"] == "hv"
    assert front["y"] == sorted(front["y"])


def test_the_axes_can_be_chosen(path: Path, open_page: Open) -> None:
    page = open_page(path)
    offered = page.value("[...document.getElementById('memory-axis').options].map(o => o.value)")
    assert offered[:3] == ["persistent", "peak_static", "peak_measured"]
    assert {"activations", "replay", "method_state", "method_state.fisher", "optimizer"} <= set(offered)
    before = positions(page)
    page.choose("memory-axis", "peak_measured")
    assert text(page, "#plot-front .xtitle").startswith("peak (measured), bytes")
    assert positions(page) != before
    page.choose("metric-axis", "forgetting")
    assert "forgetting (lower is better)" in text(page, "#plot-front .ytitle")
    assert "left and down" in text(page, "#front-note")
    front = page.value("document.getElementById('plot-front').data[0].y")
    assert front == sorted(front, reverse=True)
    log = positions(page)
    page.click('input[name="scale"][value="linear"]')
    assert positions(page) != log
    assert page.value("document.getElementById('plot-front').layout.xaxis.type") == "linear"
    assert count(page, POINTS) == 30


def test_error_bars_can_be_deviations_intervals_or_none(path: Path, open_page: Open) -> None:
    page = open_page(path)
    lengths = "JSON.stringify(document.getElementById('plot-front').data.slice(1).map(t => t.error_y.array))"
    assert count(page, "#plot-front .yerror") == 30
    assert count(page, "#plot-front .xerror") == 30
    before = page.value(lengths)
    page.choose("bars", "interval")
    assert page.value(lengths) != before
    page.choose("bars", "none")
    assert count(page, "#plot-front .yerror") == count(page, "#plot-front .xerror") == 0


def test_what_takes_no_memory_stays_on_a_log_axis(path: Path, open_page: Open) -> None:
    page = open_page(path)
    page.choose("memory-axis", "replay")
    assert count(page, POINTS) == 30
    assert "5 settings at 0 stand left of the dotted line" in text(page, "#front-note")
    ticks = page.value("[...document.querySelectorAll('#plot-front .xtick text')].map(t => t.textContent)")
    assert ticks[0] == "0"
    assert all(tick.endswith("B") for tick in ticks[1:])
    page.choose("memory-axis", "optimizer")
    assert "so the scale is linear" in text(page, "#front-note")
    assert count(page, POINTS) == 30


def test_the_table_marks_the_front_that_is_drawn(path: Path, open_page: Open) -> None:
    page = open_page(path)
    marked = "[...document.querySelectorAll('#groups tr:has(.on-front.yes)')].map(r => r.dataset.group)"
    for memory in ("persistent", "activations"):
        page.choose("memory-axis", memory)
        front = page.value(
            f"(() => {{ const d = JSON.parse(document.getElementById('data').textContent);"
            f" return d.fronts.{memory}.final_accuracy.map(i => d.groups[i].id); }})()"
        )
        assert sorted(page.value(marked)) == sorted(front)


def test_hovering_tells_everything_about_a_point(path: Path, open_page: Open) -> None:
    page = open_page(path)
    page.hover("#plot-front .scatterlayer .trace:nth-child(7) path.point")
    told = text(page, "#plot-front .hoverlayer")
    for words in ("memo", "budget 50 kB", "final accuracy 0.7", "±", "interval", "3 seeds (0, 1, 2)", "persistent 10"):
        assert words in told.replace("\xa0", " "), told
    assert " B)" in told


def test_a_method_can_be_hidden_with_the_keyboard(path: Path, open_page: Open) -> None:
    page = open_page(path)
    page.value("document.querySelector('.chip').focus()")
    page.press("Enter", 13)
    pressed = page.value("[...document.querySelectorAll('.chip')].map(c => c.getAttribute('aria-pressed'))")
    assert pressed == (["false"] + ["true"] * 5) * 2  # above both plots that it rules
    assert count(page, POINTS) == 25
    assert count(page, "#plot-memory .bars .point") == 6 * 25
    page.press("Enter", 13)
    assert count(page, POINTS) == 30


def test_tables_sort_by_their_headings_and_say_so(path: Path, open_page: Open) -> None:
    page = open_page(path)
    heads = page.value("[...document.querySelectorAll('#groups thead th')].map(t => t.textContent)")
    column = heads.index("final accuracy") + 1
    values = f"[...document.querySelectorAll('#groups tbody tr > :nth-child({column})')].map(c => +c.dataset.value)"
    page.click(f"#groups thead th:nth-child({column}) button")
    assert page.value(values) == sorted(page.value(values), reverse=True)
    sorts = "[...document.querySelectorAll('#groups thead th')].map(t => t.getAttribute('aria-sort'))"
    assert page.value(sorts).count("descending") == 1
    page.value(f"document.querySelector('#groups thead th:nth-child({column}) button').focus()")
    page.press("Enter", 13)
    assert page.value(values) == sorted(page.value(values))
    assert page.value(sorts)[column - 1] == "ascending"
    page.click("#groups thead th:first-child button")
    names = page.value("[...document.querySelectorAll('#groups tbody th')].map(c => c.textContent)")
    assert names == sorted(names)


def test_tables_show_more_columns_and_exact_bytes_on_request(path: Path, open_page: Open) -> None:
    page = open_page(path)
    assert "backward transfer" not in page.value("document.getElementById('groups').innerText")
    page.click("#all-columns")
    page.click("#exact-bytes")
    shown = page.value("document.getElementById('groups').innerText")
    assert "backward transfer" in shown
    assert "50,000 B" in shown
    assert page.overflow() <= 0


def test_pairs_are_filtered(path: Path, open_page: Open) -> None:
    page = open_page(path)
    visible = "[...document.querySelectorAll('#paired tbody tr')].filter(r => !r.hidden).length"
    assert page.value(visible) == 75
    page.choose("paired-budget", "200000")
    assert page.value(visible) == 15


def test_matrices_are_chosen_by_setting_and_seed(path: Path, open_page: Open) -> None:
    page = open_page(path)
    numbers = "[...document.querySelectorAll('#plot-matrix .textpoint')].map(t => t.textContent)"
    best = page.value(numbers)
    assert page.value("document.getElementById('matrix-group').selectedOptions[0].text") == "memo · 1 MB"
    page.choose("matrix-group", "0")
    naive = page.value(numbers)
    assert naive != best
    page.choose("matrix-seed", "2")
    assert page.value(numbers) != naive
    page.click("#matrix details summary")
    cells = page.value("[...document.querySelectorAll('#matrix-table td')].map(t => t.textContent)")
    assert len(cells) == 25
    assert {value[:4] for value in page.value(numbers)} & {value[:4] for value in cells}


def test_the_colours_follow_the_desktop_while_the_page_is_open(path: Path, open_page: Open) -> None:
    page = open_page(path)
    colours = (
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        " document.querySelector('#plot-front .xtitle').style.fill]"
    )
    light = page.value(colours)
    page.dark(True)
    page.settle()
    dark = page.value(colours)
    for background, ink, title in (light, dark):
        assert contrast(background, ink) > 10
        assert contrast(background, title) > 10
    assert luminance(light[0]) > 0.9
    assert luminance(dark[0]) < 0.02


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it, of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("size", SIZES)
def test_text_of_strangers_stays_text(
    tmp_path: Path, sweep_of: Callable[..., Sweep], open_page: Open, size: dict[str, int]
) -> None:
    content = sweep_of(strategies=(EVIL, "x" * 300, "a _b_ $c$ %{x} &lt;b&gt; <b>bold</b>"))
    content["cells"][0].update(status="failed", error=EVIL * 30)
    page = open_page(written(tmp_path, content), **size)
    assert page.overflow() <= 0
    assert count(page, "img, .chip b, .plot a") == 0
    assert text(page, ".chip .label") == EVIL
    page.hover("#plot-front .scatterlayer .trace:nth-child(2) path.point")
    assert EVIL in text(page, "#plot-front .hoverlayer").replace("\xa0", " ")
    page.hover("#plot-front .scatterlayer .trace:nth-child(4) path.point")
    assert "&lt;b&gt; <b>bold</b>" in text(page, "#plot-front .hoverlayer").replace("\xa0", " ")
    assert not any(event["method"] == "Page.javascriptDialogOpening" for event in page.browser.events)


@pytest.mark.parametrize("size", SIZES)
def test_a_run_is_drawn_whole(run_folder: Path, open_page: Open, tmp_path: Path, size: dict[str, int]) -> None:
    page = open_page(report.write_page(run_folder), **size)
    assert page.overflow() <= 0
    assert count(page, "#plot-curves path.point") == 5
    assert count(page, "#plot-loss path.point") == 10
    assert count(page, "#plot-matrix .textpoint") == 15
    assert picture(page, tmp_path).height > 1500


@pytest.mark.parametrize("size", SIZES)
def test_a_folder_of_runs_is_drawn_whole(run_folder: Path, open_page: Open, size: dict[str, int]) -> None:
    page = open_page(report.write_page(run_folder.parent), **size)
    assert page.overflow() <= 0
    assert count(page, "#plot-curves path.point") == 5


@pytest.mark.parametrize("kind", ["one cell", "no memory", "nothing finished", "one experience", "many experiences"])
def test_odd_sweeps_are_drawn_too(tmp_path: Path, sweep_of: Callable[..., Sweep], open_page: Open, kind: str) -> None:
    content = sweep_of(strategies=("replay",), budgets=(50_000,), seeds=(0,)) if kind == "one cell" else sweep_of()
    entries = content["cells"] + content["groups"]
    if kind == "no memory":
        for entry in entries:
            entry.update(memory={}, budget=None)
    if kind == "nothing finished":
        content.update(groups=[], auc={}, paired=[], hypervolume={})
        for cell in content["cells"]:
            cell.update(status="missing", metrics={}, memory={}, accuracy_matrix=[], accuracy_seen=[])
    if kind.endswith(("experience", "experiences")):
        length = 1 if kind == "one experience" else 60
        for cell in content["cells"]:
            cell.update(accuracy_matrix=[[0.5] * length] * length, accuracy_seen=[0.5] * length)
    page = open_page(written(tmp_path, content), **PHONE)
    assert page.overflow() <= 0
    assert count(page, POINTS) == {"one cell": 1, "no memory": 0, "nothing finished": 0}.get(kind, 30)


def test_no_button_would_send_a_chart_away(path: Path, open_page: Open) -> None:
    page = open_page(path)
    titles = page.value("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert set(titles) == {"Save as SVG", "Reset axes"}
    assert page.value("document.getElementById('plot-front')._context.plotlyServerURL") == ""


def test_a_saved_picture_carries_its_key(path: Path, open_page: Open) -> None:
    page = open_page(path)
    page.value(
        "window.saved = null; Plotly.downloadImage = (figure, options) => { window.saved = [figure.layout, options]; }"
    )
    page.click("#plot-front .modebar-btn")
    layout, options = page.value("window.saved.map(part => JSON.parse(JSON.stringify(part)))")
    assert layout["showlegend"] is True
    assert layout["paper_bgcolor"] == "#ffffff"
    assert options["format"] == "svg"


def test_a_page_prints_light_and_comes_back(tmp_path: Path, sweep_of: Callable[..., Sweep], open_page: Open) -> None:
    page = open_page(written(tmp_path, sweep_of(strategies=("naive", "replay"))), dark=True)
    before = page.value("document.getElementById('plot-front').clientWidth")
    page.value("window.dispatchEvent(new Event('beforeprint'))")
    assert page.value("document.getElementById('plot-front').layout.width") == 660
    assert luminance(page.value("document.querySelector('#plot-front .xtitle').style.fill")) < 0.05
    page.value("window.dispatchEvent(new Event('afterprint'))")
    page.settle()
    assert page.value("document.getElementById('plot-front')._fullLayout.width") == before
    assert luminance(page.value("document.querySelector('#plot-front .xtitle').style.fill")) > 0.5
    answer = page.call("Page.printToPDF")
    assert answer["data"].startswith("JVBERi0")  # %PDF-


def test_zooming_keeps_the_ticks_in_whole_units(path: Path, open_page: Open) -> None:
    page = open_page(path)
    page.value("Plotly.relayout('plot-front', {'xaxis.range[0]': 5.0, 'xaxis.range[1]': 5.2}).then(() => 1)")
    page.settle()
    ticks = page.value("[...document.querySelectorAll('#plot-front .xtick text')].map(t => t.textContent)")
    assert len(ticks) >= 3
    assert all(tick.endswith(" kB") and 99 < float(tick.split()[0]) < 160 for tick in ticks)


def test_bytes_read_the_same_in_plots_and_in_tables(path: Path, open_page: Open) -> None:
    from contlearn.memory.units import in_words

    page = open_page(path)
    amounts = [0, 1, 999, 1000, 1049, 12_345, 99_950, 999_499, 999_600, 1_048_576, 123_456_789, 5_000_000_000]
    assert page.value(f"{amounts}.map(plots.inWords)") == [in_words(amount) for amount in amounts]


def test_controls_can_be_reached_and_are_named(path: Path, open_page: Open) -> None:
    page = open_page(path)
    unnamed = page.value(
        "[...document.querySelectorAll('select, input')].filter(c => !c.closest('label')?.textContent.trim()).length"
    )
    assert unnamed == 0
    assert count(page, "thead th:not([scope]), tbody th:not([scope])") == 0
    assert count(page, ".plot:not([aria-label])") == 0
    assert count(page, ".scroll:not([tabindex])") == 0
    assert page.value("document.documentElement.lang") == "en"
    assert count(page, "h1") == 1
