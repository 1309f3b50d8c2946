"""Pages of test-time runs: errors by domain, beside those of the source model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from contlearn import report

DOMAINS = ["gaussian_noise:5", "shot_noise:5", "fog:5", "jpeg_compression:5"]
SOURCE = [50, 40, 30, 20]


def write_run(folder: Path, strategy: str, errors: list[int], *, seed: int = 0) -> Path:
    """A run folder of 100 samples per domain with so many errors."""
    head = {
        "event": "run", "schema": 1, "kind": "test-time", "strategy": strategy, "scenario": "corruptions", "seed": seed,
        "domains": DOMAINS, "environment": {"python": "3.11"},
    }  # fmt: skip
    records: list[dict[str, Any]] = [head]
    for visit, (name, wrong, source) in enumerate(zip(DOMAINS, errors, SOURCE, strict=True)):
        trips = [{"batch": 2, "reason": "collapse", "figure": 1.0}] if strategy == "tent" and visit == 1 else []
        records.append({
            "event": "domain", "visit": visit, "name": name, "n": 100, "errors": wrong, "source_errors": source,
            "batches": 2, "seconds": 0.5, "watched": 0, "watched_s": 0.0, "trips": trips,
        })  # fmt: skip
        peak = 9_000_000 if strategy == "tent" else 3_000_000
        records.append({"event": "memory", "after": visit, "weights": 1_000_000, "activations": 5_000_000,
                        "persistent": 1_000_000, "peak_static": peak})  # fmt: skip
    folder.mkdir(parents=True)
    lines = [json.dumps({"time": 0.0, **record}) for record in [*records, {"event": "end"}]]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    config = {"scenario": {"name": "corruptions", "dataset": "digits"}, "strategy": {"name": strategy}, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of one adapter and one run of another."""
    write_run(tmp_path / "runs" / "tent-0", "tent", [20, 30, 10, 40])
    write_run(tmp_path / "runs" / "tent-1", "tent", [30, 30, 20, 40], seed=1)
    write_run(tmp_path / "runs" / "bn", "bn_stats", [40, 50, 60, 70])
    return tmp_path / "runs"


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))  # type: ignore[no-any-return]


def test_a_run_shows_its_domains_in_order_of_time(runs: Path) -> None:
    page = report.write_page(runs / "tent-0")
    domains = data_of(page)["domains"]
    assert domains["names"] == DOMAINS
    assert domains["lines"] == [{"group": 0, "errors": [0.2, 0.3, 0.1, 0.4]}]
    assert domains["source"] == [0.5, 0.4, 0.3, 0.2]
    text = page.read_text()
    assert "guard tripped once" in text
    assert "worse than the source model" not in text
    for absent in ('id="curves"', 'id="matrix"'):
        assert absent not in text
    assert "worse than the source model" in report.write_page(runs / "bn").read_text()


def test_the_order_outlives_the_events(runs: Path) -> None:
    from contlearn import results

    results.write(runs / "tent-0")
    (runs / "tent-0" / "events.jsonl").unlink()
    assert data_of(report.write_page(runs / "tent-0"))["domains"]["names"] == DOMAINS


def test_runs_are_compared_by_domain_as_means_over_their_seeds(runs: Path) -> None:
    data = data_of(report.write_page(runs))
    lines = {data["groups"][line["group"]]["strategy"]: line["errors"] for line in data["domains"]["lines"]}
    assert lines == {"bn_stats": [0.4, 0.5, 0.6, 0.7], "tent": [0.25, 0.3, 0.15, 0.4]}
    assert data["domains"]["source"] == [0.5, 0.4, 0.3, 0.2]
    assert {"key": "mean_error", "label": "mean error", "lower": True} in data["metrics"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("what", ["", "tent-0"], ids=["runs", "run"])
def test_the_page_draws_them(runs: Path, open_page: Callable[..., Any], what: str, width: int) -> None:
    page = open_page(report.write_page(runs / what), width=width)
    assert page.overflow() <= 0
    traces = page.value("document.getElementById('plot-domains').data.map(t => [t.name, t.y])")
    names = ["tent"] if what else ["bn_stats", "tent"]
    assert [name for name, _ in traces] == [*names, "source model, not adapted"]
    assert traces[-1][1] == [0.5, 0.4, 0.3, 0.2]


@pytest.mark.browser
def test_an_adapter_can_be_hidden(runs: Path, open_page: Callable[..., Any]) -> None:
    page = open_page(report.write_page(runs))
    page.click('#domains .chip[data-series="0"]')
    assert page.value("document.getElementById('plot-domains').data.length") == 2
