"""Where an adapter's source weights come from: a file, the training, or what an earlier training left in the cache."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from contlearn import models, scenarios, weight_cache
from contlearn.domain_progress import DomainProgress
from contlearn.errors import ContlearnError
from contlearn.scenarios import datasets
from contlearn.source_model import SourceTraining, load_classifier
from contlearn.strategies.source import Source


@pytest.fixture(scope="module")
def digits() -> Any:
    """The digits with 200 training images."""
    data = datasets.load("digits")
    return dataclasses.replace(data, train_images=data.train_images[:200], train_targets=data.train_targets[:200])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONTLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "source"


@pytest.fixture
def provide(digits: Any) -> Callable[..., tuple[str, dict[str, Tensor]]]:
    """``provide(seed=0, **options)``: where the weights came from, and the weights."""

    def go(
        *, seed: int = 0, scenario: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **options: Any
    ) -> tuple[str, dict[str, Tensor]]:
        stream = scenarios.create(**{"name": "corruptions", "dataset": digits, "augment": "crop_flip",
                                     **(scenario or {})})  # fmt: skip
        spec = {"name": "slim_resnet18", "width": 2, "seed": seed, "head": "fixed", **(model or {})}
        net = models.create(stream=stream, **spec)
        torch.manual_seed(os.getpid() + seed)  # whatever was drawn before must not matter
        adapter = Source(model=net, device="cpu", **{"source_epochs": 1, "source_lr": 0.05, **options})
        training = SourceTraining(adapter, stream, seed=seed, progress=DomainProgress(quiet=True))
        origin = training.provide()
        return origin, {name: tensor.clone() for name, tensor in adapter.model.state_dict().items()}

    return go


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---------------------------------------------------------------------- the cache


@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_the_cache_gives_the_bits_of_the_training(head: str, provide: Callable[..., Any], cache: Path) -> None:
    origin, trained = provide(model={"head": head})
    assert origin == "training"
    again, cached = provide(model={"head": head})
    assert again == "cache"
    assert same(trained, cached)
    for entry in cache.glob("*.safetensors"):
        entry.unlink()
    assert provide(model={"head": head})[0] == "training"
    assert len(trained["head.weight"]) == 10


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"source_epochs": 2},
        {"source_lr": 0.1},
        {"source_batch_size": 32},
        {"model": {"width": 3}},
        {"scenario": {"augment": "flip"}},
    ],
    ids=str,
)
def test_whatever_decides_the_weights_decides_the_entry(change: dict[str, Any], provide: Callable[..., Any]) -> None:
    _, before = provide()
    origin, after = provide(**change)
    assert origin == "training"
    assert not same(before, after)


def test_what_comes_after_the_training_does_not(provide: Callable[..., Any]) -> None:
    provide()
    assert provide(scenario={"severity": 1, "corruptions": ["fog"]}, batch_size=7, lr=0.5)[0] == "cache"


def test_other_training_images_are_other_data(provide: Callable[..., Any], digits: Any) -> None:
    provide()
    images = digits.train_images.clone()
    images[3, 0, 2, 2] += 1
    assert provide(scenario={"dataset": dataclasses.replace(digits, train_images=images)})[0] == "training"
    assert provide(scenario={"dataset": dataclasses.replace(digits, scale=32.0)})[0] == "training"


def test_a_transform_of_the_users_own_is_not_cached(provide: Callable[..., Any], cache: Path) -> None:
    scenario = {"transform": lambda image: image, "augment": "none"}
    assert provide(scenario=scenario)[0] == provide(scenario=scenario)[0] == "training"
    assert not cache.exists()


def test_a_transform_of_torchvision_is_known_by_its_parameters(provide: Callable[..., Any]) -> None:
    from torchvision.transforms import v2

    def scenario(degrees: float) -> dict[str, Any]:
        return {"scenario": {"transform": v2.RandomRotation(degrees), "augment": "none"}}

    assert [provide(**scenario(d))[0] for d in (5, 5, 9)] == ["training", "cache", "training"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_entry_is_made_again(damage: str, provide: Callable[..., Any], cache: Path) -> None:
    _, trained = provide()
    (entry,) = cache.glob("*.safetensors")
    data = bytearray(entry.read_bytes())
    data[-5] ^= 0x40
    wrong = {"cut": data[: len(data) // 2], "flip": data, "empty": b""}
    if damage == "other":
        save_file({"x": torch.zeros(1)}, entry)
    else:
        entry.write_bytes(bytes(wrong[damage]))
    origin, weights = provide()
    assert origin == "training"
    assert same(trained, weights)
    assert provide()[0] == "cache"


def test_a_cache_that_cannot_be_written_is_named_before_the_training(
    provide: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CONTLEARN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(SourceTraining, "_train", lambda self: pytest.fail("it was trained"))
    with pytest.raises(ContlearnError, match=r"cache: cannot write .* CONTLEARN_CACHE names another folder"):
        provide()


def test_who_comes_second_waits_and_takes_what_the_first_made(provide: Callable[..., Any], cache: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if provide()[0] in ("training", "cache") else 1
        finally:
            os._exit(code)
    origin, _ = provide()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert origin in ("training", "cache")
    assert len(list(cache.glob("*.safetensors"))) == 1


def test_no_epochs_are_the_initial_weights(provide: Callable[..., Any], digits: Any, cache: Path) -> None:
    _, weights = provide(source_epochs=0)
    stream = scenarios.corruptions(digits)
    model = models.create("slim_resnet18", stream, width=2, seed=0, head="fixed")
    assert same(weights, model.state_dict())
    assert not cache.exists()


def test_a_digest_tells_names_shapes_and_values_apart() -> None:
    one = {"a": torch.arange(6.0), "b": torch.tensor(True)}
    others = [
        {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True)},
        {"c": torch.arange(6.0), "b": torch.tensor(True)},
        {"a": torch.arange(6.0), "b": torch.tensor(False)},
        {"a": torch.arange(6.0).double(), "b": torch.tensor(True)},
    ]
    assert weight_cache.digest(dict(reversed(one.items()))) == weight_cache.digest(one)
    assert all(weight_cache.digest(other) != weight_cache.digest(one) for other in others)


# ---------------------------------------------------------------------- files


class Spec:
    input_shape = (3, 32, 32)
    n_classes = 5
    task_labels = False


def wide(**options: Any) -> nn.Module:
    return models.create("wrn40_2", Spec(), **{"seed": 0, "head": "fixed", **options})


def published(model: Any) -> dict[str, Tensor]:
    """The weights under RobustBench's names, as a file of it holds them."""
    names = (
        (r"^backbone\.stem\.", "module.conv1."),
        (r"^backbone\.stage(\d)\.", r"module.block\1.layer."),
        (r"\.shortcut\.", ".convShortcut."),
        (r"^backbone\.norm\.", "module.bn1."),
        (r"^head\.", "module.fc."),
    )
    tensors = dict(model.state_dict())
    for pattern, replacement in names:
        tensors = {re.sub(pattern, replacement, name): value for name, value in tensors.items()}
    return tensors


@pytest.mark.parametrize("wrapped", [False, True])
def test_robustbench_files_fill_backbone_and_head(wrapped: bool, tmp_path: Path) -> None:
    theirs, ours = wide(seed=1), wide(seed=2)
    content = published(theirs)
    torch.save({"state_dict": content} if wrapped else content, tmp_path / "file.pth")
    load_classifier(ours, str(tmp_path / "file.pth"))
    assert same(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.parametrize("head", ["fixed", "growing"])
def test_a_run_folder_fills_the_whole_classifier(head: str, tmp_path: Path) -> None:
    theirs, ours = wide(seed=1), wide(seed=2, head=head)
    save_file(dict(theirs.state_dict()), tmp_path / "model.safetensors")
    load_classifier(ours, str(tmp_path))
    assert same(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_a_file_without_batch_counters_fits(tmp_path: Path) -> None:
    theirs, ours = wide(seed=1), wide(seed=2)
    kept = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, tmp_path / "old.safetensors")
    load_classifier(ours, str(tmp_path / "old.safetensors"))
    assert torch.equal(ours.head.weight, theirs.head.weight)  # type: ignore[union-attr]


def test_timm_names_fill_backbone_and_head(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=5)
    save_file(dict(theirs.state_dict()), tmp_path / "timm.safetensors")
    ours = models.create("resnet18", Spec(), seed=1, head="fixed").eval()
    load_classifier(ours, str(tmp_path / "timm.safetensors"))
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        ("folder", "the folder has no model.safetensors"),
        ("classes", r"head.weight \(7, 128\) instead of \(5, 128\)"),
        ("backbone", "missing .*head.weight"),
        ("other", "do not fit"),
        ("damaged", "damaged, or not plain tensors"),
        ("suffix", "expected a local .safetensors"),
    ],
)
def test_weights_that_cannot_be_used_are_explained_in_one_line(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / ("file.txt" if content == "suffix" else "file.safetensors")
    model = wide()
    if content == "folder":
        path.mkdir()
    elif content == "classes":
        save_file(dict(models.create("wrn40_2", _seven(), seed=0, head="fixed").state_dict()), path)
    elif content == "backbone":
        save_file({name: value for name, value in model.state_dict().items() if not name.startswith("head")}, path)
    elif content == "other":
        save_file({"x": torch.zeros(2)}, path)
    elif content is not None:
        path.write_bytes(b"nothing of the kind")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ContlearnError, match=message) as error:
        load_classifier(model, str(path))
    assert "\n" not in str(error.value)
    assert same(before, dict(model.state_dict()))


def _seven() -> Any:
    spec = Spec()
    spec.n_classes = 7
    return spec
