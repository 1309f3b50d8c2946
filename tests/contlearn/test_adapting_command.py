"""``contlearn run`` and ``contlearn pareto`` of test-time adapters, as a user would call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from contlearn import cli, config

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "--scenario.name=corruptions", "--scenario.dataset=digits", "--scenario.corruptions=[fog,contrast]",
    "--scenario.samples=40", "--model.name=slim_resnet18", "--model.width=2", "--strategy.batch_size=16",
    "--strategy.source_epochs=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTLEARN_CACHE", str(cache))


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("contlearn: error: ")
    return error


def test_the_documented_run_beats_its_source_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(CONFIGS / "tta_digits.yaml"), "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["mean_error"] < found["source_mean_error"]
    assert found["memory"]["peak_static"] > found["memory"]["weights"]
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made >= {"config.yaml", "events.jsonl", "results.json", "model.safetensors", "error_over_stream.png"}
    assert "accuracy.png" not in made
    assert (tmp_path / "run" / "error_over_stream.png").read_bytes().startswith(b"\x89PNG")
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["model"]["head"] == "fixed"
    printed = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in printed.out.splitlines() if line.strip()}
    for name in found["domains"]:
        mine, source = found["error_by_domain"][name], found["source_error_by_domain"][name]
        assert rows[name][:2] == [f"{mine:.3f}", f"{source:.3f}"]
    assert rows["mean"][0] == f"{found['mean_error']:.3f}"
    assert "is worse than the source" not in printed.out
    assert "domain 4/4 contrast:4  error" in printed.err


def test_harm_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--strategy.name=tent", "--strategy.lr=0.5", "--strategy.guard=off"]
    assert cli.main(["run", *arguments, "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["worse_than_source"] is True
    assert "tent is worse than the source model it started from: mean error" in capsys.readouterr().out


def test_a_run_folder_is_a_source(tmp_path: Path) -> None:
    first = [*SMALL, "--strategy.name=source", "--quiet"]
    assert cli.main(["run", *first, "--out", str(tmp_path / "one")]) == 0
    assert cli.main(["run", *first, f"--strategy.source={tmp_path / 'one'}", "--out", str(tmp_path / "two")]) == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["error_by_domain"] == two["error_by_domain"]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'run'}"
    tent = [*SMALL, "--strategy.name=tent", out]
    assert "lacks classes that are tested" in failure(
        capsys, "--strategy.name=tent", "--scenario.name=class_incremental", "--model.name=resnet14", out
    )
    assert "no such file or folder" in failure(capsys, *tent, "--strategy.source=nowhere.pth")
    assert "memory_budget: a test-time strategy" in failure(capsys, *tent, "--memory_budget=1MB")
    assert "loggers" in failure(capsys, *tent, "--loggers=[csv]")
    assert "did you mean 'strategy.lr'" in failure(capsys, *tent, "--strategy.lrr=1")
    assert "no normalisation layer" in failure(capsys, *tent[:4], "--strategy.name=tent", "--model.name=mlp", out)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*tta*.yaml")), ids=lambda path: path.stem)
def test_every_documented_configuration_resolves(path: Path) -> None:
    if path.name.startswith("pareto"):
        from contlearn.pareto import plan, specification

        cells = plan.expand(specification.check(specification.load(path)))
        assert {cell.config["model"]["head"] for cell in cells} == {"fixed"}
    else:
        assert config.resolve(config.load(path))["model"]["head"] == "fixed"


def test_a_sweep_draws_error_over_peak_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {
        "scenario": {"name": "corruptions", "dataset": "digits", "corruptions": ["fog"], "samples": 40},
        "model": {"name": "slim_resnet18", "width": 2},
        "strategy": {"source_epochs": 1},
    }
    content = {"base": base, "strategies": {"source": {}, "tent": {}}, "axes": {"strategy.batch_size": [8, 32]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    assert cli.main(["pareto", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "sweep"), "--jobs", "1"]) == 0
    found = json.loads((tmp_path / "sweep" / "pareto.json").read_text())
    by_memory = sorted(found["groups"], key=lambda group: group["memory"]["peak_static"]["mean"])
    best, front = 2.0, []
    for group in by_memory:
        if group["metrics"]["mean_error"]["mean"] < best:
            best = group["metrics"]["mean_error"]["mean"]
            front.append(group["id"])
    assert found["fronts"]["peak_static"]["mean_error"] == front
    assert 0 < found["hypervolume"]["peak_static"]["mean_error"] < 1
    assert (tmp_path / "sweep" / "pareto.png").exists()
    printed = capsys.readouterr()
    assert "mean error" in printed.out
    assert "error 0." in printed.err
    assert all(set(cell["domains"]) == {"fog:5"} for cell in found["cells"])
