"""The command line when all is well: runs, summaries, lists and help, and signals that stop a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from contlearn import cli, config, models, scenarios, strategies
from contlearn.options import model_options, scenario_options, strategy_options
from contlearn.scenarios import datasets

ROOT = Path(__file__).parents[2]
SMALL = ["--scenario.n_experiences=2", "--strategy.epochs=1", "--model.hidden=8", "--strategy.device=cpu"]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``said(arguments)``: what a successful command prints, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


# ---------------------------------------------------------------------- run


def test_a_run_prints_its_summary_and_where_it_is(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("description: small\nstrategy: {name: replay, memory_size: 20}\n")
    out = said("run", "mine.yaml", *SMALL)
    assert "replay" in out
    assert out.endswith("run folder: runs/mine\n")
    folder = tmp_path / "runs" / "mine"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "events.jsonl", "results.json", "checkpoint", "model.safetensors",
        "accuracy.png", "accuracy_matrix.png",
    }  # fmt: skip
    # What it says it ran can be run: the same configuration, the same bits.
    assert said("run", "runs/mine/config.yaml", "--out", "again", "--quiet") == ""
    for name in ("config.yaml", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved == config.resolve({"strategy": {"name": "replay", "memory_size": 20}}, SMALL)


def test_a_run_without_a_file(said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said("run", "--strategy.lr", "0.2", *SMALL, "--quiet") == ""  # 0.2 is no configuration file
    assert yaml.safe_load((tmp_path / "runs" / "run" / "config.yaml").read_text())["strategy"]["lr"] == 0.2


def test_resuming_a_finished_run_changes_no_result(said: Callable[..., str], tmp_path: Path) -> None:
    command = ["run", *SMALL, "--quiet", "--out", str(tmp_path / "r")]
    said(*command)
    kept = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    said(*command, "--resume")
    assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_its_exit_code_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from contlearn.strategies.template import SupervisedTemplate

    step = SupervisedTemplate.optimizer_step

    def stepping(strategy: Any) -> None:
        if strategy.clock.train_iterations == 30:
            os.kill(os.getpid(), number)
        step(strategy)

    command = ["run", *SMALL, "--quiet", "--strategy.lr_schedule=linear", "--strategy.epochs=2", "--resume", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTemplate, "optimizer_step", stepping)
        assert cli.main([*command, str(tmp_path / "r")]) == 128 + number
    stopped = capsys.readouterr()
    assert (stopped.out, stopped.err) == (
        "",
        f"contlearn: stopped by {number.name}; continue with the same command and --resume "
        f"(position stored in {tmp_path / 'r'})\n",
    )
    assert cli.main([*command, str(tmp_path / "r")]) == 0
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("r", "whole")]
    assert files[0] == files[1]


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "contlearn.cli", "list", "strategies"],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# ---------------------------------------------------------------------- help


def documented(text: str) -> dict[str, str]:
    """The help text of each option of a help page."""
    entries = re.split(r"\n  (?=--?\w)", text)
    found = {}
    for entry in entries[1:]:
        head, _, tail = entry.partition("\n") if "\n" in entry else entry.partition("  ")
        name = re.match(r"-h, --\w+|--[\w.]+", head)
        if name is not None:
            inline = head.split("  ", 1)[1:] if "  " in head else []
            found[name.group().split(", ")[-1]] = " ".join(" ".join([*inline, tail]).split())
    return found


def chosen() -> list[Any]:
    return [
        *(pytest.param("strategy", name, strategy_options, id=f"strategy-{name}") for name in strategies.list()),
        *(pytest.param("scenario", name, scenario_options, id=f"scenario-{name}") for name in scenarios.list()),
        *(pytest.param("model", name, model_options, id=f"model-{name}") for name in models.list()),
    ]


@pytest.mark.parametrize(("section", "name", "options"), chosen())
def test_help_documents_every_option_of_what_was_chosen(
    section: str, name: str, options: Callable[[str], Any], said: Callable[..., str]
) -> None:
    page = documented(said("run", "--help", f"--{section}.name={name}"))
    known = options(name)
    if known is None:  # the library that owns the model knows them
        common = ("head", "weights", "trainable", "seed")
        known = [option for option in model_options("mlp") or [] if option.name in common]
    for option in known:
        text = page[f"--{section}.{option.name}"]
        assert text.startswith(option.help.split("%")[0][:40]), option.name
        assert "(type: " in text
        assert "default: " in text
    assert {key for key in page if key.startswith(f"--{section}.")} == {
        f"--{section}.{option.name}" for option in known
    }
    for key in ("--out", "--resume", "--quiet", "--seed", "--threads", "--loggers"):
        assert page[key], key


def test_help_follows_the_file(said: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("strategy: {name: ewc}\nscenario: {name: online}\n")
    page = documented(said("run", str(tmp_path / "mine.yaml"), "--help"))
    assert {"--strategy.ewc_lambda", "--scenario.experience_size", "--model.hidden"} <= set(page)
    assert "--strategy.memory_size" not in page


def test_the_top_page_lists_every_command(said: Callable[..., str]) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        page = said(*arguments)
        for command, (_, description) in cli.COMMANDS.items():
            assert re.search(rf"^ +{command} +{re.escape(description)}$", page, flags=re.MULTILINE)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_a_page(command: str, said: Callable[..., str]) -> None:
    assert f"usage: contlearn {command}" in said(command, "--help")


def test_the_version(said: Callable[..., str]) -> None:
    from contlearn import __version__

    assert said("--version") == said("-V") == f"contlearn {__version__}\n"


# ---------------------------------------------------------------------- list


@pytest.mark.parametrize(
    ("kind", "names", "describe"),
    [
        ("strategies", strategies.list(), strategies.describe),
        ("scenarios", scenarios.list(), scenarios.describe),
        ("models", models.list(), models.describe),
        ("datasets", datasets.list_datasets(), datasets.describe),
    ],
)
def test_lists_name_everything_and_each_entry_has_a_page(
    kind: str, names: list[str], describe: Callable[[str], Any], said: Callable[..., str]
) -> None:
    rows = said("list", kind).splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(names)
    for name, row in zip(names, rows, strict=True):
        assert describe(name).description in row
        assert describe(name).description in said("list", kind, name)


def test_an_entry_is_shown_in_full(said: Callable[..., str]) -> None:
    page = said("list", "strategies", "derpp")
    assert "paper: arXiv 2004.07211" in page
    assert "'beta': 0.5" in page


def test_lists_take_patterns(said: Callable[..., str]) -> None:
    rows = said("list", "strategies", "der*").splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["der", "derpp", "der_expand"]
    assert [row.split()[0] for row in said("list", "datasets", "cifar*0").splitlines()[1:]] == ["cifar10", "cifar100"]
    assert "timm/resnet10t" in said("list", "models", "timm/resnet1?t")
    assert "timm's resnet10t" in said("list", "models", "resnet10t")


# ---------------------------------------------------------------------- what is imported

LIGHT = """
import contextlib, io, sys
import contlearn
from contlearn import cli
for arguments in ([], ["--help"], ["--version"], ["nonsense"], ["list", "strategies"], ["list", "strategies", "ewc"],
                  ["list", "scenarios"], ["list", "models"], ["list", "datasets"], ["doctor"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.main(arguments)
    heavy = {"torch", "avalanche", "torchvision", "timm", "numpy", "pandas", "matplotlib", "jsonargparse"}
    print(arguments, sorted(heavy & set(sys.modules)))
print("rich" in sys.modules)
"""


def test_commands_that_train_nothing_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 10
    for line in lines:
        assert line.endswith(" []"), line
    assert last == "True"  # the lists were drawn, and the check can tell


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(cli.main(["run", *SMALL, "--quiet", "--out", str(tmp_path / "r")]))
    )
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGINT) is before
