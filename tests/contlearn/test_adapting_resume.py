"""A test-time run that is stopped or killed goes on and ends with the same bits, wherever it stood."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contlearn import models, run, scenarios
from contlearn.errors import ContlearnError
from contlearn.running import RunInterrupted
from contlearn.scenarios import datasets
from contlearn.strategies.cotta import CoTTA
from contlearn.strategies.eata import EATA
from contlearn.strategies.ecotta import EcoTTA
from contlearn.strategies.sar import SAR
from contlearn.strategies.source import Source
from contlearn.strategies.tent import Tent

Act = Callable[[], object]
SMALL: dict[str, Any] = {"device": "cpu", "batch_size": 16, "source_epochs": 1, "source_lr": 0.05}
WARM: dict[str, Any] = {"k": 3, "warmup_epochs": 2, "warmup_augment": False, "warmup_lr": 0.01}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def digits() -> Any:
    """The digits with 320 training images."""
    data = datasets.load("digits")
    return dataclasses.replace(data, train_images=data.train_images[:320], train_targets=data.train_targets[:320])


@pytest.fixture
def adapt(cache: Path, digits: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``adapt(Tent, out, at=k)``: a run over two domains of 40 samples, 3 batches each, stopped in batch ``k``.

    ``act`` acts in place of SIGTERM. ``forwards=k`` acts in the k-th forward pass of the model instead, whatever it is
    for.
    """
    monkeypatch.setenv("CONTLEARN_CACHE", str(cache))

    def go(
        kind: type[Any], out: Path, *, at: int = -1, forwards: int = -1, act: Act = terminate, resume: bool = False,
        scenario: dict[str, Any] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        stream = scenarios.create(
            **{"name": "corruptions", "dataset": digits, "corruptions": ["fog", "contrast"], "samples": 40,
               "augment": "crop_flip", **(scenario or {})}
        )  # fmt: skip
        model = models.create("slim_resnet18", stream, seed=0, head="fixed", width=2)
        adapter = kind(model=model, **{**SMALL, **options})
        counted = 0

        def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal counted
            counted += 1
            if counted == forwards:
                act()

        model.backbone.stem.register_forward_pre_hook(count)
        go.passes = lambda: counted  # type: ignore[attr-defined]
        plain = kind.adapt

        def adapt_and_act(self: Any, x: Tensor) -> Tensor:
            logits: Tensor = plain(self, x)
            if self.batches == at:
                act()
            return logits

        monkeypatch.setattr(kind, "adapt", adapt_and_act)
        try:
            return run(adapter, stream, out=out, resume=resume, quiet=True)
        finally:
            monkeypatch.setattr(kind, "adapt", plain)

    return go


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def same_end(whole: Path, pieces: Path) -> None:
    assert (whole / "model.safetensors").read_bytes() == (pieces / "model.safetensors").read_bytes()
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (whole, pieces))
    for found in (mine, theirs):
        del found["time"], found["environment"]
    assert mine == theirs


def stopped(adapt: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with pytest.raises(RunInterrupted) as stop:
        adapt(*arguments, **options)
    assert stop.value.signum == signal.SIGTERM


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Source, {}),
        (EATA, {"fisher_samples": 40, "d_margin": 1.0, "margin": 0.9}),
        (CoTTA, {"augmentations": 2}),
        (SAR, {"margin": 0.9}),
        (EcoTTA, {**WARM, "margin": 0.9}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_adapter_resumes_inside_a_domain_bit_for_bit(
    kind: type[Any], options: dict[str, Any], adapt: Callable[..., Any], tmp_path: Path
) -> None:
    adapt(kind, tmp_path / "whole", **options)
    stopped(adapt, kind, tmp_path / "pieces", at=5, **options)
    adapt(kind, tmp_path / "pieces", resume=True, **options)
    same_end(tmp_path / "whole", tmp_path / "pieces")


def test_stopped_again_and_again_it_goes_on(adapt: Callable[..., Any], tmp_path: Path) -> None:
    adapt(Tent, tmp_path / "whole", lr=0.01)
    stopped(adapt, Tent, tmp_path / "pieces", at=2, lr=0.01)
    assert records(tmp_path / "pieces", "domain") == []
    stopped(adapt, Tent, tmp_path / "pieces", at=4, resume=True, lr=0.01)
    adapt(Tent, tmp_path / "pieces", resume=True, lr=0.01)
    same_end(tmp_path / "whole", tmp_path / "pieces")
    assert [record["visit"] for record in records(tmp_path / "pieces", "resume")] == [0, 1]
    assert len(records(tmp_path / "pieces", "domain")) == 2  # it did not start over


@pytest.mark.parametrize("at", [3, 6])
def test_stopped_in_the_last_batch_of_a_domain(at: int, adapt: Callable[..., Any], tmp_path: Path) -> None:
    adapt(Tent, tmp_path / "whole", lr=0.01)
    stopped(adapt, Tent, tmp_path / "pieces", at=at, lr=0.01)
    assert json.loads((tmp_path / "pieces" / "results.json").read_text())["status"] == "incomplete"
    adapt(Tent, tmp_path / "pieces", resume=True, lr=0.01)
    same_end(tmp_path / "whole", tmp_path / "pieces")


def test_stopped_inside_a_mixed_domain(adapt: Callable[..., Any], tmp_path: Path) -> None:
    mixed = {"scenario": {"schedule": "mixed"}, "lr": 0.01}
    adapt(Tent, tmp_path / "whole", **mixed)
    stopped(adapt, Tent, tmp_path / "pieces", at=2, **mixed)
    adapt(Tent, tmp_path / "pieces", resume=True, **mixed)
    same_end(tmp_path / "whole", tmp_path / "pieces")


def test_killed_after_a_domain(
    adapt: Callable[..., Any], killed: Callable[[Act], None], kill: Act, tmp_path: Path
) -> None:
    adapt(Tent, tmp_path / "whole", lr=0.01)
    killed(lambda: adapt(Tent, tmp_path / "pieces", at=5, act=kill, lr=0.01))
    assert len(records(tmp_path / "pieces", "domain")) == 1
    adapt(Tent, tmp_path / "pieces", resume=True, lr=0.01)
    same_end(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("forwards", [3, 20])
def test_stopped_while_the_source_model_trains(
    forwards: int, adapt: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of 320 images by 16 has 20 iterations."""
    options = {"source_batch_size": 16}
    monkeypatch.setenv("CONTLEARN_CACHE", str(tmp_path / "one"))
    adapt(Tent, tmp_path / "whole", **options)
    in_all = adapt.passes()  # type: ignore[attr-defined]
    monkeypatch.setenv("CONTLEARN_CACHE", str(tmp_path / "another"))
    stopped(adapt, Tent, tmp_path / "pieces", forwards=forwards, **options)
    assert not list((tmp_path / "another").rglob("*.safetensors"))
    assert (tmp_path / "pieces" / "checkpoint" / "source" / "interrupted.json").exists()
    adapt(Tent, tmp_path / "pieces", resume=True, **options)
    assert adapt.passes() == in_all - forwards  # type: ignore[attr-defined]
    same_end(tmp_path / "whole", tmp_path / "pieces")
    assert not (tmp_path / "pieces" / "checkpoint" / "source").exists()


def test_stopped_in_the_warm_up(adapt: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt(EcoTTA, tmp_path / "first", warmup_epochs=0, k=3)  # the source model is in the cache from now on
    options = {**WARM, "warmup_batch_size": 32}
    warmed = EcoTTA.prepare_with
    epochs: list[int] = []

    def watched(self: Any, batches: Any, *, on_epoch: Any, resume: Any) -> None:
        def after(epoch: int, state: Any) -> None:
            on_epoch(epoch, state)
            epochs.append(epoch)
            if len(epochs) == 1:
                terminate()

        warmed(self, batches, on_epoch=after, resume=resume)

    monkeypatch.setattr(EcoTTA, "prepare_with", watched)
    stopped(adapt, EcoTTA, tmp_path / "pieces", **options)
    adapt(EcoTTA, tmp_path / "pieces", resume=True, **options)
    assert epochs == [1, 2]
    for entry in Path(os.environ["CONTLEARN_CACHE"]).rglob("*.safetensors"):
        if any(name.startswith("meta.") for name in _names(entry)):
            entry.unlink()
    adapt(EcoTTA, tmp_path / "whole", **options)
    assert epochs == [1, 2, 1, 2]
    same_end(tmp_path / "whole", tmp_path / "pieces")
    adapt(EcoTTA, tmp_path / "again", **options)
    assert epochs == [1, 2, 1, 2]  # from the cache
    same_end(tmp_path / "whole", tmp_path / "again")


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_a_finished_run_is_not_run_again(adapt: Callable[..., Any], tmp_path: Path) -> None:
    first = adapt(Tent, tmp_path / "run")
    again = adapt(Tent, tmp_path / "run", resume=True, act=pytest.fail, forwards=1)
    assert again.results == first.results


def test_another_configuration_is_refused(adapt: Callable[..., Any], tmp_path: Path) -> None:
    stopped(adapt, Tent, tmp_path / "run", at=4)
    with pytest.raises(ContlearnError, match="cannot resume, scenario"):
        adapt(Tent, tmp_path / "run", resume=True, scenario={"samples": 50})


def test_a_damaged_checkpoint_is_named(adapt: Callable[..., Any], tmp_path: Path) -> None:
    stopped(adapt, Tent, tmp_path / "run", at=4)
    (tensors,) = (tmp_path / "run" / "checkpoint").glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ContlearnError, match="checksum mismatch"):
        adapt(Tent, tmp_path / "run", resume=True)


def test_the_same_seed_gives_the_same_bits(adapt: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)
        adapt(CoTTA, tmp_path / name, augmentations=2)
    same_end(tmp_path / "one", tmp_path / "two")
