"""The command line on bad input: exit code 2 and one line that names what is wrong; nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from contlearn import cli

ROOT = Path(__file__).parents[2]
FILE = """\
scenario: {name: class_incremental, dataset: digits, n_experiences: 2}
model: {name: mlp, hidden: 8}
strategy: {name: naive, epochs: 1, device: cpu}
"""
Refused = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in, with one good configuration file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(FILE)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(arguments, *said)``: exit code 2, one line that says these things, no file made or changed."""

    def check(arguments: list[str], *said: str) -> None:
        before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
        assert cli.main(arguments) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1, output.err
        assert output.err.startswith("contlearn: error: ")
        for text in said:
            assert text in output.err, output.err
        assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
        assert not (here / "runs").exists()

    return check


# ---------------------------------------------------------------------- on the command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rum"], ["unknown command 'rum'", "did you mean 'run'?", "expected one of: "]),
        (["--resume"], ["unknown command '--resume'"]),
        (["list", "strategy"], ["unknown kind 'strategy'", "did you mean 'strategies'?", "models"]),
        (["list"], ["list: expected one of strategies, scenarios, models, datasets after it"]),
        (["list", "strategies", "evc"], ["unknown strategy 'evc'", "did you mean 'ewc'?"]),
        (["list", "scenarios", "onlin"], ["unknown scenario 'onlin'", "did you mean 'online'?"]),
        (["list", "models", "mlpp"], ["unknown model 'mlpp'", "did you mean 'mlp'?"]),
        (["list", "datasets", "digit"], ["unknown data set 'digit'", "did you mean 'digits'?"]),
        (["list", "strategies", "z*"], ["'z*'", "expected one of: adab2n"]),
        (["list", "strategies", "ewc", "lwf"], ["list: unrecognized arguments: lwf"]),
        (["doctor", "--fast"], ["doctor", "'--fast'"]),
        (["run", "god.yaml"], ["config 'god.yaml': no such file", "did you mean 'good.yaml'?"]),
        (["run", "nowhere/good.yaml"], ["config 'nowhere/good.yaml': no such file"]),
        (["run", "."], ["config '.': cannot be read"]),
        (["run", "good.yaml", "other.yaml"], ["unexpected argument 'other.yaml'", "--strategy.lr=0.1"]),
        (["run", "good.yaml", "-x"], ["unexpected argument '-x'"]),
        (["run", "good.yaml", "--out"], ["--out", "expected one argument"]),
        (["run", "good.yaml", "--output", "x"], ["unknown key 'output'", "did you mean 'out'?"]),
        (["run", "good.yaml", "--resum"], ["unknown key 'resum'", "did you mean 'resume'?"]),
        (["run", "--help", "--strategy.name=evc"], ["unknown strategy 'evc'"]),
    ],
)
def test_commands(arguments: list[str], said: list[str], refused: Refused) -> None:
    refused(arguments, *said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--strategy.name=evc"], ["unknown strategy 'evc'", "did you mean 'ewc'?", "expected one of: adab2n, "]),
        (["--strategy.name", "evc"], ["unknown strategy 'evc'", "did you mean 'ewc'?"]),
        (["--scenario.name=class_incrementl"], ["unknown scenario", "did you mean 'class_incremental'?"]),
        (["--model.name=mpl"], ["unknown model 'mpl'", "did you mean 'mlp'?"]),
        (["--model.name=resnet18d_"], ["unknown model 'resnet18d_'", "did you mean 'resnet18d'?"]),
        (["--scenario.dataset=digts"], ["unknown data set 'digts'", "did you mean 'digits'?"]),
        (["--strategy.name"], ["--strategy.name: expected a name after it"]),
        (["--strategy.name", "--strategy.lr=1"], ["--strategy.name: expected a name after it"]),
        (["--strategy.lrr=0.1"], ["unknown key 'strategy.lrr'", "did you mean 'strategy.lr'?", "strategy.epochs"]),
        (["--strategi.lr=0.1"], ["unknown key 'strategi.lr'", "did you mean 'strategy.lr'?"]),
        (["--strategy.plugins=ewc"], ["strategy.plugins: expected a list of names or mappings with a name"]),
        (["--strategy.plugins=[ewcc]"], ["unknown plug-in 'ewcc'; did you mean 'ewc'?"]),
        (["--strategy.plugins=[gdumb]"], ["unknown plug-in 'gdumb'", "expected one of: adab2n"]),
        (["--strategy.plugins=[{ewc: 1}]"], ["strategy.plugins[0]: expected a name, or a mapping with one"]),
        (["--strategy.plugins=[si, {name: lwf, temperature: x}]"], ["strategy.plugins[1].temperature: expected a num"]),
        (["--strategy.plugins=[{name: ewc, lambda: 1}]"], ["strategy.plugins[0] 'ewc': unknown key 'lambda'"]),
        (["--strategy.plugins=[ewc, ewc]"], ["EWCPlugin is given twice"]),
        (["--model.trainable=[conv9.*]"], ["trainable: 'conv9.*' matches no parameter of model 'mlp'"]),
        (["--strategy=naive"], ["unknown key 'strategy'"]),
        (["--strategy.lr+=1"], ["unknown key 'strategy.lr+'", "did you mean 'strategy.lr'?"]),
        (["--strategy.lr"], ["--strategy.lr: expected a number after it"]),
        (["--strategy.lr="], ["strategy.lr: expected a number, got ''"]),
        (["--strategy.lr=fast"], ["strategy.lr: expected a number, got 'fast'"]),
        (["--strategy.lr", "fast"], ["strategy.lr: expected a number, got 'fast'"]),
        (["--strategy.lr=null"], ["strategy.lr: expected a number, got"]),
        (["--strategy.lr=1e999"], ["strategy.lr: expected a finite number"]),
        (["--strategy.lr=-0.1"], ["lr: expected at least 0", "got -0.1"]),
        (["--strategy.lr", "-0.1"], ["lr: expected at least 0", "got -0.1"]),
        (["--strategy.epochs=1.5"], ["strategy.epochs: expected a whole number, got '1.5'"]),
        (["--strategy.epochs=0"], ["epochs: expected at least 1, got 0"]),
        (["--strategy.batch_size=" + "9" * 30], ["strategy.batch_size: expected a finite number below 2**63"]),
        (["--strategy.reset_optimizer=maybe"], ["strategy.reset_optimizer: expected true or false, got 'maybe'"]),
        (["--strategy.optimizer=sdg"], ["expected one of sgd, adam, adamw, sinkgd, got 'sdg'; did you mean 'sgd'?"]),
        (["--strategy.momentum=0.9", "--strategy.optimizer=adam"], ["momentum", "adam", "got 0.9"]),
        (["--strategy.milestones=[a]"], ["strategy.milestones: expected a list of whole numbers, got '[a]'"]),
        (["--strategy.lr_schedule=multistep"], ["milestones"]),
        (["--strategy.device=gpu"], ["device: expected auto, cpu or cuda, got 'gpu'"]),
        (["--strategy.name=replay", "--strategy.memory_size=0"], ["memory_size: expected at least 1", "got 0"]),
        (["--strategy.name=ewc", "--strategy.memory_size=9"], ["unknown key 'strategy.memory_size'"]),
        (["--scenario.n_experiences=11"], ["n_experiences: 11", "10 classes", "expected at most 10"]),
        (["--scenario.class_order=[1,2]"], ["class_order: expected each class 0..9 exactly once, got [1, 2]"]),
        (["--scenario.class_order=[1,"], ["scenario.class_order: expected one of natural, random or a list of whole"]),
        (["--scenario.class_order=natral"], ["got 'natral'; did you mean 'natural'?"]),
        (["--scenario.augment=crop"], ["scenario.augment: expected one of none, ", "did you mean 'crop_flip'?"]),
        (["--scenario.dataset=folder:/nope"], ["folder:/nope", "does not exist"]),
        (["--scenario.dataset=folder:"], ["folder:PATH"]),
        (["--scenario.dataset=cifar10", "--scenario.root=/nope"], ["cifar10", "/nope", "cifar-10-batches-py"]),
        (["--scenario.seed=-1"], ["seed", "got -1"]),
        (["--model.hidden=0"], ["hidden is 0, expected a whole number of at least 1"]),
        (["--model.width=3"], ["unknown key 'model.width'"]),
        (["--model.weights=/nope.pth"], ["/nope.pth", "no such file"]),
        (["--model.weights=good.yaml"], ["good.yaml", "expected"]),
        (["--seed=x"], ["seed: expected a whole number, got 'x'"]),
        (["--seed=-1"], ["seed: expected 0..2**63-1, got -1"]),
        (["--threads=0"], ["threads: expected at least 1, got 0"]),
        (["--loggers=[cvs]"], ["loggers: expected a list of tensorboard, csv, got '[cvs]'; did you mean 'csv'?"]),
        (["--loggers=csv"], ["loggers: expected a list of tensorboard, csv, got 'csv'"]),
    ],
)
def test_overrides(overrides: list[str], said: list[str], refused: Refused) -> None:
    refused(["run", "good.yaml", *overrides], *said)


# ---------------------------------------------------------------------- in the file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["'bad.yaml'", "expected a mapping of options, got nothing"]),
        ("# nothing but a remark\n", ["expected a mapping of options, got nothing"]),
        ("- a\n- b\n", ["expected a mapping of options, got the list ['a', 'b']"]),
        ("just words", ["expected a mapping of options, got the text 'just words'"]),
        ("strategy: [unclosed\nmodel: }", ["'bad.yaml': not valid YAML", "line 2"]),
        ("strategy:\n\tname: ewc", ["not valid YAML"]),
        (b"\xff\xfe\x00", ["'bad.yaml': cannot be read"]),
        ("!!python/object/apply:os.system ['touch pwned']", ["not valid YAML", "python/object"]),
        ("strategy: !!python/name:os.system ''", ["not valid YAML"]),
        ("1: 2", ["expected text as key, got 1"]),
        ("sed: 3", ["unknown key 'sed'", "did you mean 'seed'?", "expected one of: scenario, model, strategy"]),
        ("seed: 1\nseed: 2", ["the key 'seed' is given twice"]),
        ("strategy: {lr: 1, lr: 2}", ["the key 'lr' is given twice"]),
        ("seed: one", ["seed: expected a whole number, got 'one'"]),
        ("seed: null", ["seed: expected a whole number, got null"]),
        ("strategy: ewc", ["strategy: expected a mapping with a name, as in 'strategy: {name: ewc}'"]),
        ("strategy: [ewc]", ["strategy: expected a mapping of options, got the list ['ewc']"]),
        ("strategy: 3", ["strategy: expected a mapping of options, got the number 3"]),
        ("strategy: {name: 3}", ["strategy.name: expected text, got 3"]),
        ("strategy: {name: evc}", ["unknown strategy 'evc'", "did you mean 'ewc'?"]),
        ("strategy: {epoch: 3}", ["unknown key 'strategy.epoch'", "did you mean 'strategy.epochs'?", "lr, epochs"]),
        ("strategy: {name: ewc, ewc_lamda: 3}", ["did you mean 'strategy.ewc_lambda'?"]),
        ("strategy: {1: 2}", ["strategy: expected text as key, got 1"]),
        ("strategy: {epochs: many}", ["strategy.epochs: expected a whole number, got 'many'"]),
        ("strategy: {epochs: 1.0}", ["strategy.epochs: expected a whole number, got 1.0"]),
        ("strategy: {epochs: true}", ["strategy.epochs: expected a whole number, got True"]),
        ("strategy: {lr: [0.1]}", ["strategy.lr: expected a number, got [0.1]"]),
        ("strategy: {lr: {a: 1}}", ["strategy.lr: expected a number, got {'a': 1}"]),
        ("strategy: {lr: null}", ["strategy.lr: expected a number, got null"]),
        ("strategy: {lr: .inf}", ["strategy.lr: expected a finite number"]),
        ("strategy: {lr: .nan}", ["strategy.lr: expected a finite number"]),
        ("strategy: {lr: -1}", ["lr: expected at least 0", "got -1"]),
        ("model: {name: mlp, hiden: 3}", ["unknown key 'model.hiden'", "did you mean 'model.hidden'?"]),
        ("model: {name: mlp, dropout: 2}", ["dropout is 2", "expected"]),
        ("scenario: {name: blurry, disjoint_ratio: 2}", ["disjoint_ratio", "got 2"]),
        ("scenario: {dataset: 12}", ["scenario.dataset: expected text, got 12"]),
        ("loggers: csv", ["loggers: expected a list of tensorboard, csv, got 'csv'"]),
        ("loggers: [tensorbord]", ["loggers: ", "did you mean 'tensorboard'?"]),
    ],
)
def test_files(text: str | bytes, said: list[str], refused: Refused, here: Path) -> None:
    (here / "bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(["run", "bad.yaml"], *said)
    assert not (here / "pwned").exists()


# ---------------------------------------------------------------------- data and places


def images(folder: Path, **classes: int) -> None:
    for label, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), 40 * label + number).save(folder / name / f"{number}.png")


def test_a_damaged_image_is_named(here: Path, refused: Refused) -> None:
    images(here / "photos", cat=4, dog=4)
    whole = (here / "photos" / "dog" / "2.png").read_bytes()
    (here / "photos" / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    refused(["run", "good.yaml", "--scenario.dataset=folder:photos"], "dog/2.png")


def test_a_class_with_one_image_cannot_be_split(here: Path, refused: Refused) -> None:
    images(here / "photos", cat=4, dog=1)
    refused(["run", "good.yaml", "--scenario.dataset=folder:photos"], "dog", "1")


def test_more_experiences_than_classes_of_the_users_own(here: Path, refused: Refused) -> None:
    images(here / "photos", cat=4, dog=4)
    refused(
        ["run", "good.yaml", "--scenario.dataset=folder:photos", "--scenario.n_experiences=3"],
        "n_experiences: 3", "2 classes", "expected at most 2",
    )  # fmt: skip


@pytest.mark.parametrize("out", ["file/run", "file", "x" * 300, "mine", "."])
def test_an_output_that_cannot_be(out: str, here: Path, refused: Refused) -> None:
    (here / "file").write_text("in the way")
    (here / "mine").mkdir()
    (here / "mine" / "data.csv").write_text("1")
    refused(["run", "good.yaml", "--out", out], str(here) if out == "." else out)
    assert sorted(path.name for path in here.iterdir()) == ["file", "good.yaml", "mine"]


def test_resuming_with_a_changed_option_names_it_with_both_values(here: Path, refused: Refused) -> None:
    assert cli.main(["run", "good.yaml", "--out", "r", "--quiet"]) == 0
    again = ["run", "good.yaml", "--out", "r", "--resume"]
    refused([*again, "--strategy.lr=0.2"], "r/config.yaml", "strategy.lr was 0.1 and is now 0.2")
    refused([*again, "--strategy.name=joint"], "strategy.name was 'naive' and is now 'joint'")
    refused([*again, "--seed=4"], "seed was 0 and is now 4")
    refused([*again, "--loggers=[csv]"], "loggers was [] and is now ['csv']")


def test_a_damaged_configuration_in_the_run_folder(here: Path, refused: Refused) -> None:
    assert cli.main(["run", "good.yaml", "--out", "r", "--quiet"]) == 0
    (here / "r" / "config.yaml").write_text("{")
    refused(["run", "good.yaml", "--out", "r", "--resume"], "r/config.yaml", "damaged")
    assert cli.main(["run", "good.yaml", "--out", "r", "--quiet"]) == 0  # a new run needs nothing of the old
    assert (here / "r.1" / "config.yaml").read_text() == "{"


def test_damaged_records_in_the_run_folder(here: Path, refused: Refused) -> None:
    assert cli.main(["run", "good.yaml", "--out", "r", "--quiet"]) == 0
    (here / "r" / "model.safetensors").unlink()
    records = (here / "r" / "events.jsonl").read_text().splitlines()
    (here / "r" / "events.jsonl").write_text("\n".join([records[0], "{torn", *records[2:]]) + "\n")
    refused(["run", "good.yaml", "--out", "r", "--resume"], "r/events.jsonl, line 2")


# ---------------------------------------------------------------------- a real process


def test_a_real_process_prints_one_line_and_no_traceback(here: Path) -> None:
    # Importing Avalanche prints warnings of its own; looking for the nearest of timm's names prints more.
    done = subprocess.run(
        [sys.executable, "-m", "contlearn.cli", "run", "good.yaml", "--model.name=mpl", "--out", "r"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("contlearn: error: unknown model 'mpl'; did you mean 'mlp'?")
    assert done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in here.iterdir()] == ["good.yaml"]
