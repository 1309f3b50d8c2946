"""Checkpoints are data, and damaged or foreign ones are refused in one line: nothing is run, nothing is lost."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contlearn import cli
from contlearn.errors import ContlearnError

Train = Callable[..., Any]
Edit = Callable[[dict[str, Any]], object]

COMMAND = [
    "run",
    "--scenario.n_experiences=3",
    "--strategy.name=replay",
    "--strategy.epochs=1",
    "--strategy.memory_size=20",
    "--model.hidden=8",
    "--strategy.device=cpu",
    "--quiet",
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped inside its second experience."""
    from contlearn.strategies.template import SupervisedTemplate

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        step = SupervisedTemplate.optimizer_step

        def stopping(strategy: Any) -> None:
            strategy.interrupt = strategy.clock.train_iterations == 20
            step(strategy)

        patch.setattr(SupervisedTemplate, "optimizer_step", stopping)
        assert cli.main([*COMMAND, "--out", str(folder)]) == 130
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def refused(run: Path, capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    """Resuming gives one line that says these things, and leaves every file as it was."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main([*COMMAND, "--out", str(run), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("contlearn: error: ")
    for text in expected:
        assert text in said, said
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before


def tensors_file(run: Path, kind: str = "state") -> Path:
    description = json.loads((run / "checkpoint" / f"{kind}.json").read_text())
    return run / "checkpoint" / str(description["tensors"]["file"])


def forge(run: Path, kind: str, edit: Edit) -> None:
    """Change a description and give it the checksum that goes with it, as a stranger would."""
    path = run / "checkpoint" / f"{kind}.json"
    content = json.loads(path.read_text())
    edit(content)
    content.pop("sha256", None)
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def test_the_untouched_copy_resumes(run: Path, tmp_path: Path) -> None:
    assert cli.main([*COMMAND, "--out", str(run), "--resume"]) == 0
    assert cli.main([*COMMAND, "--out", str(tmp_path / "whole")]) == 0
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not (run / "checkpoint" / "interrupted.json").exists()


def test_no_file_of_a_run_is_a_pickle(run: Path) -> None:
    for path in (path for path in run.rglob("*") if path.is_file()):
        assert path.suffix in (".json", ".jsonl", ".yaml", ".safetensors", ".png"), path
        assert not zipfile.is_zipfile(path), path  # what torch.save writes
        assert path.read_bytes()[:1] != b"\x80", path  # the head of a pickle


@pytest.mark.parametrize("kind", ["state", "interrupted"])
def test_truncated_tensors(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tensors_file(run, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(run, capsys, str(path), "damaged", f"{len(whole) // 2} bytes, expected {len(whole)}")


@pytest.mark.parametrize("kind", ["state", "interrupted"])
def test_missing_tensors(kind: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tensors_file(run, kind)
    path.unlink()
    refused(run, capsys, str(path), "damaged", "No such file")


def test_truncated_description(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoint" / "state.json"
    path.write_text(path.read_text()[:-100])
    refused(run, capsys, str(path), "damaged")


def test_empty_description(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint" / "state.json").write_text("")
    refused(run, capsys, "state.json", "damaged")


def test_description_nested_beyond_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoint" / "state.json").write_text("[" * 100_000)
    refused(run, capsys, "state.json", "damaged")


def test_newer_schema(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forge(run, "state", lambda content: content.update(schema=2))
    refused(run, capsys, "state.json", "expected schema 1, got 2")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_noticed(data: st.DataObject, stopped: Path, tmp_path: Path) -> None:
    from contlearn import scenarios
    from contlearn.checkpoint import CheckpointFolder
    from contlearn.state import Samples

    name = data.draw(st.sampled_from(sorted(path.name for path in (stopped / "checkpoint").iterdir())))
    content = bytearray((stopped / "checkpoint" / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    copy = tmp_path / "checkpoint"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(stopped / "checkpoint", copy)
    (copy / name).write_bytes(content)
    folder = CheckpointFolder(copy, Samples(scenarios.class_incremental("digits", n_experiences=3)))
    kind = name.removesuffix(".json") if name.endswith(".json") else name.split("-")[0]
    try:
        description = folder._read(kind)
        assert description is not None
        folder._tensors(kind, description)
    except ContlearnError:
        return
    # JSON spells some things in two ways: 1e-05 is 1E-05.
    whole = json.loads((stopped / "checkpoint" / name).read_text())
    assert {**description, "sha256": whole["sha256"]} == whole


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """Every stored object of a description."""
    if isinstance(node, dict):
        if "$object" in node:
            yield node
        for value in node.values():
            yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


FOREIGN = [
    "os:system",
    "os:_wrap_close",
    "subprocess:Popen",
    "builtins:eval",
    "builtins:object",
    "contlearn.files:os.system",
    "contlearn.state:random.Random",
    "contlearn.cli:main",
    "torch.nn.modules.linear:Linear",
    "no.such.module:Thing",
    "avalanche:NoSuchThing",
    "contlearn.state:",
    ":",
    "no colon",
    "too:many:colons",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_an_object_of_a_foreign_class_is_refused(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(content: dict[str, Any]) -> None:
        plugin = next(objects(content["strategy"]["plugins"]))
        plugin["$object"] = name
        plugin["state"] = {"args": {"$id": 10**6, "$list": [f"touch {run}/pwned"]}}

    forge(run, "state", edit)
    refused(run, capsys, "state.json" if name.count(":") != 1 else name)
    assert not (run / "pwned").exists()


def test_an_object_where_the_run_has_none_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = {"$id": 10**6, "$object": "subprocess:Popen", "state": {"args": f"touch {run}/pwned"}}
    forge(run, "state", lambda content: content["strategy"]["attributes"].update(surprise=attack))
    refused(run, capsys, "cannot re-create an object of class subprocess:Popen")
    assert not (run / "pwned").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "", "a\0b", "x" * 5000])
def test_tensors_are_read_from_the_folder_alone(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors_file(run).rename(run / "secret")  # what ../secret would find, checksum and all
    forge(run, "state", lambda content: content["tensors"].update(file=name))
    refused(run, capsys, "damaged")


def test_a_link_out_of_the_folder_with_other_bytes_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tensors_file(run)
    path.unlink()
    path.symlink_to("/etc/hostname")
    refused(run, capsys, "damaged")


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.clear() or c.update(schema=1),
        lambda c: c.pop("strategy"),
        lambda c: c.pop("rng"),
        lambda c: c.pop("tensors"),
        lambda c: c.pop("counters"),
        lambda c: c.update(experiences_done=-1),
        lambda c: c.update(experiences_done=99),
        lambda c: c.update(experiences_done="1"),
        lambda c: c.update(experiences_done=True),
        lambda c: c.update(counters={"samples": "many"}),
        lambda c: c.update(tensors={"file": 3, "bytes": 1, "sha256": "x"}),
        lambda c: c.update(strategy=[]),
        lambda c: c["strategy"].update(plugins=[]),
        lambda c: c["strategy"].update(plugins=None),
        lambda c: c["strategy"]["model"].update(tensors={}),
        lambda c: c["strategy"]["model"].update(attributes={"no.such.module": {}}),
        lambda c: c["strategy"]["optimizer"].update(groups=[]),
        lambda c: c["strategy"]["optimizer"].update(state={"no.such.weight": {"$id": 10**6, "$dict": []}}),
        lambda c: c["strategy"]["attributes"].update(x={"$same": 10**6}),
        lambda c: c["strategy"]["attributes"].update(x={"$tensor": "no such tensor", "$id": 10**6}),
        lambda c: c["strategy"]["attributes"].update(x={"$generator": "rng.numpy.1", "$id": 10**6}),
        lambda c: c["strategy"]["attributes"].update(x={"$submodule": "no.such.module"}),
        lambda c: c["strategy"]["attributes"].update(x={"$plugin": 99}),
        lambda c: c["strategy"]["attributes"].update(x={"$experience": ["train", 99]}),
        lambda c: c["strategy"]["attributes"].update(x={"$experience": "train"}),
        lambda c: c["strategy"]["attributes"].update(x={"$unknown": 1, "$id": 10**6}),
        lambda c: c["strategy"]["attributes"].update(x={"$dict": [[{"$id": 10**6, "$list": []}, 1]], "$id": 10**6 + 1}),
        lambda c: c["strategy"]["attributes"].update(x={"$random": [3, [1], None], "$id": 10**6}),
        lambda c: c.update(rng={"$id": 10**6, "$dict": []}),
    ],
)  # fmt: skip
def test_a_description_that_makes_no_sense_is_refused(
    edit: Edit, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoint" / "interrupted.json").unlink()
    forge(run, "state", edit)
    refused(run, capsys, "checkpoint")


def test_a_run_of_the_cpu_is_not_taken_to_an_accelerator(stopped: Path) -> None:
    from contlearn import scenarios
    from contlearn.checkpoint import CheckpointFolder
    from contlearn.state import Samples

    folder = CheckpointFolder(stopped / "checkpoint", Samples(scenarios.class_incremental("digits", n_experiences=3)))
    elsewhere = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    with pytest.raises(ContlearnError, match=r"written on the CPU and strategy\.device is now .*; expected cpu"):
        folder.load_boundary(elsewhere, [])


def test_a_weight_of_another_shape_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save

    path = tensors_file(run)
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.startswith("model.backbone"))
    tensors[name] = tensors[name][..., :-1].copy()
    data = save(tensors)
    path.write_bytes(data)
    (run / "checkpoint" / "interrupted.json").unlink()
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(run, "state", lambda content: content["tensors"].update(digest))
    refused(run, capsys, "checkpoint", f"{name.removeprefix('model.')!r}: its shape was")


def test_bytes_that_are_no_safetensors_file_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = b"\x80\x04cos\nsystem\n"
    tensors_file(run).write_bytes(data)
    digest = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(run, "state", lambda content: content["tensors"].update(digest))
    refused(run, capsys, "damaged")


def test_a_damaged_run_can_be_started_again_and_is_kept(run: Path) -> None:
    tensors_file(run).unlink()
    assert cli.main([*COMMAND, "--out", str(run)]) == 0
    assert (run / "model.safetensors").exists()
    assert (run.with_name("run.1") / "checkpoint" / "state.json").exists()


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (tmp_path / "run" / "events.jsonl").touch()

    def block() -> None:
        (tmp_path / "run" / "checkpoint").write_text("in the way")

    with pytest.raises(ContlearnError, match=r"cannot write .*checkpoint"):
        train(out=tmp_path / "run", at=3, act=block)
