"""``runner.py`` as it lies in an artifact: one file, NumPy and ONNX Runtime, nothing else; and as a program."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from contlearn.edge import runtime
from contlearn.edge.runner import program
from contlearn.edge.runtime import Session, runner_source

Linear = Callable[..., Path]


def test_it_imports_numpy_and_onnxruntime_only() -> None:
    tree = ast.parse(runner_source())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
    # ONNX Runtime is loaded by the first session, so that reading a manifest needs none.
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("onnxruntime" in ast.unparse(node) for node in top)


def test_no_name_of_one_part_hides_that_of_another() -> None:
    tree = ast.parse(runner_source())
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        defined += [target.id for target in targets if isinstance(target, ast.Name)]
    assert [name for name, count in Counter(defined).items() if count > 1] == []
    folder = Path(runtime.__file__).parent / "runner"
    assert sorted(runtime.PARTS) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "contlearn", "onnx", "safetensors", "timm", "avalanche"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
import numpy as np
from runner import RunnerError, Session
session = Session(".", threads=1, seed=1)
x, y = np.load("x.npy"), np.load("y.npy")
for start in range(0, len(x), 4):
    print(repr(session.step(x[start : start + 4], y[start : start + 4])["loss"]))
session.save()
try:
    session.step(x, y)
except RunnerError as error:
    print(error)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "contlearn", "onnx", "safetensors"}))
"""


def test_it_runs_where_contlearn_is_not(linear: Linear) -> None:
    memory = {"capacity": 5, "policy": "balanced", "dtype": "float32", "shape": [6]}
    folder = linear(memory=memory, mask=True, uniform=True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype(np.float32), rng.integers(0, 3, 20)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    # -I: no user packages, no environment; the folder of the artifact is put on the path by hand.
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'){ALONE}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *losses, refused, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert refused == "frames: expected the shape (4, 6), got (20, 6)"
    # The same steps through the package give the same bits, and it opens what the file saved.
    here = Session(folder, threads=1, state_dir=folder / "elsewhere", seed=1)
    assert [repr(here.step(x[s : s + 4], y[s : s + 4])["loss"]) for s in range(0, 20, 4)] == losses
    there = Session(folder, threads=1)
    assert all(np.array_equal(there.state()[name], array) for name, array in here.state().items())
    assert there.learned.record() == here.learned.record()


# --- as a program -----------------------------------------------------------------------------------------------------


def stream(folder: Path, rows: int = 22) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 6)).astype(np.float32), rng.integers(0, 3, rows)
    np.save(folder / "frames.npy", x)
    np.save(folder / "labels.npy", y)
    return x, y


def command(folder: Path, *options: str) -> list[str]:
    return ["--artifact", str(folder), "--frames", str(folder / "frames.npy"), "--threads", "1", *options]


def test_a_stream_is_predicted_and_then_learned(linear: Linear, tmp_path: Path) -> None:
    folder = linear()
    x, y = stream(folder)
    out = tmp_path / "out.npy"
    done = subprocess.run(
        [sys.executable, "runner.py", *command(folder, "--labels", "labels.npy", "--predictions", str(out))],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    session, expected = Session(folder, threads=1, state_dir=tmp_path / "state"), np.zeros(22, np.int64)
    for start in range(0, 22, 4):
        expected[start : start + 4] = session.predict(x[start : start + 4]).argmax(1)
        if start < 20:  # the last batch is not full
            session.step(x[start : start + 4], y[start : start + 4])
    assert np.array_equal(np.load(out), expected)
    summary = json.loads(done.stdout)
    assert (summary["frames"], summary["steps"], summary["trips"]) == (22, 5, {})
    assert summary["accuracy"] == float((expected == y).mean())
    assert Path(summary["saved"]).name == "state-000001.safetensors" and summary["opened"] == "state.safetensors"
    assert all(np.array_equal(Session(folder, threads=1).state()[n], a) for n, a in session.state().items())


def test_frozen_changes_nothing_and_reset_starts_over(linear: Linear, capsys: pytest.CaptureFixture[str]) -> None:
    folder = linear()
    x, _ = stream(folder)
    labels = ("--labels", str(folder / "labels.npy"))
    assert program.main(command(folder, "--frozen", "--predictions", str(folder / "out.npy"))) == 0
    assert not (folder / "state").exists()
    state = Session(folder, threads=1).state()
    assert np.array_equal(np.load(folder / "out.npy"), (x @ state["w"] + state["b"]).argmax(1))
    assert program.main(command(folder, *labels, "--save-every", "2")) == 0
    assert program.main(command(folder, *labels, "--reset", "--lr", "0")) == 0
    opened = Session(folder, threads=1)
    assert opened.steps == 5 and opened.lr == 0 and np.array_equal(opened.state()["w"], state["w"])
    summaries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [summary["saved"] and Path(summary["saved"]).name for summary in summaries] == [
        *(None, "state-000003.safetensors", "state-000004.safetensors")
    ]


def test_a_method_without_labels_answers_with_its_steps(linear: Linear, capsys: pytest.CaptureFixture[str]) -> None:
    folder = linear(labelled=False)
    x, y = stream(folder)
    options = ("--labels", str(folder / "labels.npy"), "--predictions", str(folder / "out.npy"))
    assert program.main(command(folder, *options)) == 0
    session = Session(folder, threads=1, state_dir=folder / "elsewhere")
    expected = [session.step(x[start : start + 4])["logits"].argmax(1) for start in range(0, 20, 4)]
    expected.append(session.predict(x[20:]).argmax(1))
    assert np.array_equal(np.load(folder / "out.npy"), np.concatenate(expected))
    assert json.loads(capsys.readouterr().out)["accuracy"] == float((np.concatenate(expected) == y).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--labels: 'naive' learns from labels; expected them, or --frozen"),
        (["--labels", "{folder}/missing.npy"], "--labels: cannot read"),
        (["--labels", "{folder}/text.npy"], "expected an .npy file"),
        (["--labels", "{folder}/pickled.npy"], "expected an .npy file"),
        (["--labels", "{folder}/frames.npy"], "--labels: expected the shape (22,), got (22, 6)"),
        (["--labels", "{folder}/labels.npy", "--lr", "nan"], "lr: expected a finite number from 0, got nan"),
        (["--frozen", "--predictions", "{folder}/no/out.npy"], "--predictions: cannot write"),
        (["--frozen", "--provider", "cuda"], "has no CUDAExecutionProvider"),
        (["--frozen", "--artifact", "{folder}/no"], "expected an artifact folder"),
    ],
)
def test_mistakes_give_one_line_and_2(
    options: list[str], message: str, linear: Linear, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = linear()
    stream(folder)
    (folder / "text.npy").write_text("no array")
    np.save(folder / "pickled.npy", np.array([{}], object), allow_pickle=True)
    assert program.main(command(folder, *(option.format(folder=folder) for option in options))) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("runner.py: ") and error.count("\n") == 1 and message in error
    assert not (folder / "state").exists()
