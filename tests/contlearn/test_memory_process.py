"""The measured peak: a step in a process of its own, and the resident sizes it is read from."""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from contlearn import config, models, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory import process
from contlearn.memory.process import (
    ALLOCATOR,
    finish,
    mark,
    measure,
    release_freed,
    reset_high_water_mark,
    resident_bytes,
    start,
)

BLOCK = 50_000_000


def resolved(strategy: str = "naive", model: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return config.resolve(
        {
            "scenario": {"name": "class_incremental", "dataset": "digits", "n_experiences": 5},
            "model": model or {"name": "mlp"},
            "strategy": {"name": strategy, "momentum": 0.9, "batch_size": 4, "device": "cpu", **options},
            "threads": 1,
        }
    )


@contextlib.contextmanager
def ended(child: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield child
    finally:
        child.kill()
        child.wait()


# ---------------------------------------------------------------- a process of its own


def test_a_few_steps_of_a_network_of_17_mb() -> None:
    spec = {"name": "resnet18_cifar", "width": 40}
    found = measure(resolved(model=spec), steps=3)
    model = models.create(**spec, stream=scenarios.class_incremental("digits", n_experiences=5), head="fixed")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert weights > 17e6
    # Weights, momenta and gradients, but for the outputs of classes that come later; four images of 8x8 add little.
    assert 3 * weights * 0.99 < found["peak_static"] < 3.3 * weights
    assert found["peak_measured"] > weights
    assert math.isfinite(found["ratio"])
    assert found["ratio"] == found["peak_measured"] / found["peak_static"]
    assert 0.5 < found["ratio"] < 2
    assert (found["device"], found["allocator"]) == ("cpu", ALLOCATOR)


def test_a_configuration_that_cannot_be_built_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the process does as a program; that the parent reads its exit code and last line, the tests below show."""
    broken = resolved()
    broken["model"]["hidden"] = -3
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"config": broken, "steps": 1})))
    with pytest.raises(SystemExit) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module is there already
        runpy.run_module("contlearn.memory.process", run_name="__main__")
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert output.err == "hidden is -3, expected a whole number of at least 1\n"


def test_exemplars_are_no_part_of_the_step() -> None:
    """A memory of indices weighs nothing here, and what is remembered after the steps is not taken off them."""

    def static(strategy: str, **options: Any) -> int:
        return int(process._child({"config": resolved(strategy, **options), "steps": 3})["peak_static"])

    plain = static("naive")
    assert plain > 0
    assert static("replay", memory_size=2000) == plain
    # The union of all training data, of 80 bytes an image, is in memory throughout.
    assert static("cumulative") == plain


def test_a_killed_process_is_one_line() -> None:
    with ended(start(resolved())) as child:
        child.kill()
        with pytest.raises(ContlearnError) as caught:
            finish(child)
    assert str(caught.value) == "memory: the measuring process ended with code -9: no output"


def test_a_process_that_never_reads_its_configuration_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")  # the interpreter does not even start
    with ended(start({"much": "x" * 10**6})) as child, pytest.raises(ContlearnError) as caught:
        finish(child)
    assert str(caught.value).startswith("memory: the measuring process ended with code 1: ")
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_process_said_last_is_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\ncat > /dev/null\necho before >&2\necho 'lr: expected more' >&2\nexit 2\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ContlearnError) as caught:
        measure(resolved())
    assert str(caught.value) == "memory: the measuring process ended with code 2: lr: expected more"


def test_a_process_that_takes_too_long_is_ended() -> None:
    with ended(start(resolved())) as child:
        with pytest.raises(ContlearnError, match=r"^memory: the measuring process took more than 0\.05 s$"):
            finish(child, timeout=0.05)
        assert child.poll() == -9


# ---------------------------------------------------------------- resident sizes


def test_the_high_water_mark_grows_stays_and_is_reset() -> None:
    release_freed()
    reset_high_water_mark()
    before = resident_bytes("VmHWM")
    assert abs(before - resident_bytes()) < BLOCK / 10
    block = b"\x01" * BLOCK
    assert resident_bytes() - before > 0.95 * BLOCK
    assert 0.95 * BLOCK < resident_bytes("VmHWM") - before < 1.2 * BLOCK
    del block
    assert resident_bytes() - before < 0.1 * BLOCK
    assert resident_bytes("VmHWM") - before > 0.95 * BLOCK
    reset_high_water_mark()
    assert resident_bytes("VmHWM") - before < 0.1 * BLOCK


def test_sizes_are_bytes() -> None:
    import resource

    # The kernel's own maximum, in kilobytes, cannot be reset: the mark is at most that.
    assert 10e6 < resident_bytes("VmHWM") <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 1.01


def test_freed_tensors_go_back_to_the_system() -> None:
    release_freed()
    before = resident_bytes()
    cycle: list[Any] = [torch.ones(BLOCK // 4)]
    cycle.append(cycle)  # only the collector frees it
    del cycle
    assert resident_bytes() - before > 0.9 * BLOCK
    release_freed()
    assert resident_bytes() - before < 0.1 * BLOCK


def test_a_mark_is_where_growth_is_counted_from() -> None:
    block = b"\x01" * BLOCK
    del block
    numbers = torch.get_rng_state()
    before = mark()
    assert before is not None
    assert abs(resident_bytes("VmHWM") - before) < 0.1 * BLOCK
    block = b"\x01" * BLOCK
    assert 0.9 * BLOCK < resident_bytes("VmHWM") - before < 1.2 * BLOCK
    del block
    assert torch.get_rng_state().equal(numbers), "the weights made next would be others"


@pytest.mark.parametrize("file", ["STATUS", "CLEAR_REFS"])
def test_there_is_no_mark_where_the_system_cannot_tell(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, file, tmp_path / "missing" / "too")
    assert mark() is None


def test_a_system_without_these_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContlearnError, match=r"^memory: no VmNothing in /proc/self/status$"):
        resident_bytes("VmNothing")
    monkeypatch.setattr(process, "STATUS", tmp_path / "missing")
    monkeypatch.setattr(process, "CLEAR_REFS", tmp_path / "missing" / "too")
    with pytest.raises(ContlearnError, match=r"^memory: resident size needs Linux's .*missing"):
        resident_bytes()
    with pytest.raises(ContlearnError, match=r"^memory: cannot reset the high-water mark through .*too"):
        reset_high_water_mark()


def test_a_filter_on_entropy_does_not_hide_what_a_step_takes() -> None:
    peaks = {}
    for name in ("tent", "eata"):  # of which the second only uses samples that the network is certain of
        resolved = config.resolve(
            {
                "scenario": {"name": "corruptions", "dataset": "digits", "corruptions": ["fog"], "samples": 64},
                "model": {"name": "resnet14"},
                "strategy": {"name": name, "batch_size": 32, "device": "cpu"},
                "threads": 1,
            }
        )
        peaks[name] = process.measure(resolved, steps=2)["peak_static"]
    assert peaks["eata"] > 0.9 * peaks["tent"]
