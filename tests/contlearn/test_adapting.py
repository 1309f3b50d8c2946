"""The run of a test-time adapter: what it counts, derives, measures and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contlearn import models, results, run, scenarios
from contlearn.errors import ContlearnError
from contlearn.strategies.adapter import Adapter, entropy

CORRUPTIONS = ["gaussian_noise", "fog", "contrast"]


class Still(Adapter):
    """Predicts and adapts nothing."""

    def configure(self) -> None:
        pass

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]


class Entropy(Adapter):
    """Scale and offset of every BatchNorm descend on the entropy, by the batch's own statistics."""

    def configure(self) -> None:
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(True)
                module.train()

    def adapt(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.descend(entropy(logits).mean())
        return logits


class Contrary(Still):
    """Answers what the model finds least likely."""

    def adapt(self, x: Tensor) -> Tensor:
        return -super().adapt(x)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def adapt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``adapt(Entropy, out=..., scenario={...}, **options)``: a run on three small corrupted domains of the digits."""
    monkeypatch.setenv("CONTLEARN_CACHE", str(cache))

    def go(kind: type[Adapter], *, scenario: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Any:
        arguments = {key: options.pop(key) for key in ("out", "resume", "loggers") if key in options}
        stream = stream_of(**(scenario or {}))
        return run(adapter_of(kind, stream, **options), stream, seed=seed, quiet=True, **arguments)

    return go


def stream_of(**options: Any) -> Any:
    spec = {"name": "corruptions", "dataset": "digits", "corruptions": CORRUPTIONS, "samples": 90, **options}
    return scenarios.create(**spec)


def adapter_of(kind: type[Adapter], stream: Any, **options: Any) -> Adapter:
    model = models.create("slim_resnet18", stream, width=2, seed=0, head="fixed")
    defaults = {"device": "cpu", "batch_size": 32, "lr": 0.01, "source_epochs": 2, "source_lr": 0.05}
    return kind(model=model, **{**defaults, **options})


def errors_by_hand(kind: type[Adapter], weights: dict[str, Tensor], stream: Any, **options: Any) -> list[list[int]]:
    """Per visit, which samples an adapter with these source weights is wrong on, without the run's own loop."""
    adapter = adapter_of(kind, stream, **options)
    adapter.model.load_state_dict(weights)
    adapter.start()
    wrong = []
    for experience in stream.test_stream:
        samples = [experience.dataset.eval()[i] for i in range(len(experience.dataset))]
        images, labels = torch.stack([s[0] for s in samples]), torch.tensor([int(s[1]) for s in samples])
        answers = [adapter(batch).argmax(1) for batch in images.split(adapter.batch_size)]
        wrong.append((torch.cat(answers) != labels).int().tolist())
    return wrong


@pytest.fixture
def source_weights(adapt: Callable[..., Any], tmp_path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(adapt(Still, out=tmp_path / "source").folder / "model.safetensors")


# ---------------------------------------------------------------------- what is counted


def test_errors_are_those_of_an_independent_loop(
    adapt: Callable[..., Any], source_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    found = adapt(Entropy, out=tmp_path / "run").results
    stream = stream_of()
    ours, source = (errors_by_hand(kind, source_weights, stream) for kind in (Entropy, Still))
    assert found["domains"] == [f"{name}:5" for name in CORRUPTIONS]
    for name, mine, theirs in zip(found["domains"], ours, source, strict=True):
        assert found["error_by_domain"][name] == pytest.approx(sum(mine) / 90)
        assert found["source_error_by_domain"][name] == pytest.approx(sum(theirs) / 90)
    assert found["mean_error"] == pytest.approx(sum(map(sum, ours)) / 270)
    assert found["source_mean_error"] == pytest.approx(sum(map(sum, source)) / 270)
    assert (found["samples"], found["batches"]) == (270, 9)
    assert found == json.loads((tmp_path / "run" / "results.json").read_text())


def test_a_mixed_stream_is_counted_by_domain(adapt: Callable[..., Any], source_weights: dict[str, Tensor]) -> None:
    found = adapt(Entropy, scenario={"schedule": "mixed", "samples": 40}).results
    stream = stream_of(schedule="mixed", samples=40)
    (wrong,) = errors_by_hand(Entropy, source_weights, stream)
    domain = list(stream.test_stream[0].dataset.targets_domain)
    assert found["domains"] == [f"{name}:5" for name in CORRUPTIONS]
    for index, name in enumerate(found["domains"]):
        mine = [one for one, of in zip(wrong, domain, strict=True) if of == index]
        assert len(mine) == 40
        assert found["error_by_domain"][name] == pytest.approx(sum(mine) / 40)


def test_an_adapter_that_does_nothing_is_the_source_model(adapt: Callable[..., Any]) -> None:
    found = adapt(Still).results
    assert found["error_by_domain"] == found["source_error_by_domain"]
    assert found["worse_than_source"] is False


def test_an_adapter_that_does_harm_is_flagged(adapt: Callable[..., Any]) -> None:
    found = adapt(Contrary).results
    assert found["mean_error"] > found["source_mean_error"]
    assert found["worse_than_source"] is True


def test_visits_of_one_domain_keep_names_of_their_own(adapt: Callable[..., Any]) -> None:
    found = adapt(Still, scenario={"corruptions": ["fog"], "schedule": "recurring", "rounds": 2, "samples": 20}).results
    assert found["domains"] == ["fog:5", "fog:5#2"]


def test_a_domain_incremental_stream_is_a_test_time_stream(adapt: Callable[..., Any]) -> None:
    stream = scenarios.domain_incremental("digits", n_experiences=3, max_rotation=60)
    found = run(adapter_of(Still, stream), stream, quiet=True).results
    assert found["domains"] == ["domain 1", "domain 2", "domain 3"]
    errors = list(found["error_by_domain"].values())
    assert errors[0] < errors[1] < errors[2]  # unturned, as the source model was trained; 30; 60 degrees


# ---------------------------------------------------------------------- what is derived


def domain(visit: int, name: str, n: int, errors: int, source: int, **more: Any) -> dict[str, Any]:
    record = {"event": "domain", "visit": visit, "name": name, "n": n, "errors": errors, "source_errors": source}
    return {**record, "batches": 2, "seconds": 1.0, "watched": 0, "watched_s": 0.0, "trips": [], **more}


HEAD = {
    "event": "run", "schema": 1, "kind": "test-time", "strategy": "tent", "scenario": "corruptions", "seed": 0,
    "domains": ["a", "b"], "environment": {},
}  # fmt: skip


def test_the_mean_counts_every_visit_the_same() -> None:
    found = results.build([HEAD, domain(0, "a", 10, 5, 1), domain(1, "b", 1000, 100, 300), {"event": "end"}])
    assert found["mean_error"] == pytest.approx((0.5 + 0.1) / 2)
    assert found["source_mean_error"] == pytest.approx((0.1 + 0.3) / 2)
    assert found["worse_than_source"] is True
    assert found["metrics"] == {"mean_error": found["mean_error"], "source_mean_error": found["source_mean_error"]}
    assert found["status"] == "complete"


def test_a_visit_that_was_repeated_counts_once() -> None:
    trip = {"batch": 3, "reason": "collapse", "figure": 0.99}
    records = [HEAD, domain(0, "a", 10, 5, 1, trips=[trip]), {"event": "resume", "visit": 0}]
    found = results.build([*records, domain(0, "a", 10, 4, 1, trips=[trip])])
    assert (found["error_by_domain"], found["samples"], found["status"]) == ({"a": 0.4}, 10, "incomplete")
    assert found["trips"] == [{"domain": "a", **trip}]


def test_a_mixed_visit_gives_every_domain_and_adds_up_over_visits() -> None:
    parts = {"a": {"n": 4, "errors": 1, "source_errors": 2}, "b": {"n": 6, "errors": 3, "source_errors": 3}}
    mixed = [domain(visit, "mixed", 10, 4, 5, by_domain=parts) for visit in (0, 1)]
    found = results.build([HEAD, *mixed])
    assert found["error_by_domain"] == {"a": 0.25, "b": 0.5}
    assert found["mean_error"] == pytest.approx(0.375)


def test_batches_that_were_watched_do_not_count_in_the_time_of_a_batch() -> None:
    found = results.build([HEAD, domain(0, "a", 10, 5, 1, batches=4, seconds=7.0, watched=2, watched_s=6.0)])
    assert found["time"] == {"adapt_s": 7.0, "per_batch_s": pytest.approx(0.5)}
    all_watched = results.build([HEAD, domain(0, "a", 10, 5, 1, batches=2, seconds=7.0, watched=2, watched_s=7.0)])
    assert all_watched["time"]["per_batch_s"] == pytest.approx(3.5)


def test_a_run_without_a_visit_has_no_error() -> None:
    found = results.build([HEAD])
    assert (found["mean_error"], found["worse_than_source"], found["error_by_domain"]) == (None, False, {})


@pytest.mark.parametrize("broken", [{"n": 0}, {"errors": "many"}, {"source_errors": None}])
def test_a_damaged_record_is_named(broken: dict[str, Any]) -> None:
    with pytest.raises(ContlearnError, match=f"'domain' of 'a' has '{next(iter(broken))}'"):
        results.build([HEAD, {**domain(0, "a", 10, 5, 1), **broken}])


# ---------------------------------------------------------------------- what is measured


def test_memory_is_that_of_the_adapter(adapt: Callable[..., Any]) -> None:
    memory = adapt(Entropy, guard="off").memory
    adapter = adapter_of(Entropy, stream_of())
    adapter.start()
    norms = [p for p in adapter.model.parameters() if p.requires_grad]
    weights = 4 * sum(p.numel() for p in adapter.model.parameters())
    weights += sum(b.numel() * b.element_size() for b in adapter.model.buffers())
    trained = 4 * sum(p.numel() for p in norms)
    buffers = sum(b.numel() * b.element_size() for b in adapter.model.buffers())
    assert (memory["weights"], memory["trainable_weights"], memory["gradients"]) == (weights, trained, trained)
    assert memory["optimizer"] == 2 * trained + 4 * len(norms)  # Adam's moments, and a step counter each
    assert memory["method_state.initial_state"] == memory["method_state"] == trained + buffers
    assert memory["persistent"] == weights + memory["optimizer"] + memory["method_state"]
    # Every BatchNorm keeps its input, the activations (batch, channels, height, width) of 4 bytes each.
    kept = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal kept
        kept += 4 * inputs[0].numel()

    for module in adapter.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count)
    adapter.model(torch.zeros(32, *adapter.model.input_shape))
    assert kept < memory["activations"] < 3 * kept
    assert memory["peak_static"] > weights + memory["optimizer"] + memory["activations"]
    assert "replay" not in memory


def test_an_adapter_that_trains_nothing_saves_nothing(adapt: Callable[..., Any]) -> None:
    memory = adapt(Still).memory
    assert all(memory[name] == 0 for name in ("activations", "gradients", "optimizer", "trainable_weights"))
    assert memory["peak_static"] > memory["weights"] == memory["persistent"]


def test_batches_that_a_filter_passes_over_do_not_hide_the_step(adapt: Callable[..., Any]) -> None:
    class Late(Entropy):
        """Takes no step in the first two batches."""

        def adapt(self, x: Tensor) -> Tensor:
            if self.batches <= 2:
                with torch.no_grad():
                    return self.model(x)  # type: ignore[no-any-return]
            return super().adapt(x)

    late, usual = adapt(Late).memory, adapt(Entropy).memory
    assert late["gradients"] == usual["gradients"] > 0
    assert late["activations"] == usual["activations"]


def test_a_trip_is_recorded_with_its_domain(adapt: Callable[..., Any], tmp_path: Path) -> None:
    class Breaks(Entropy):
        """Breaks its own weights in the fifth batch, the second of the second domain."""

        def adapt(self, x: Tensor) -> Tensor:
            logits = super().adapt(x)
            if self.batches == 5:
                with torch.no_grad():
                    next(p for p in self.model.parameters() if p.requires_grad).fill_(float("nan"))
            return logits

    found = adapt(Breaks, out=tmp_path / "run").results
    assert [(trip["domain"], trip["batch"]) for trip in found["trips"]] == [("fog:5", 5)]
    assert found["error_by_domain"]["contrast:5"] < 0.9  # it went on with good weights


# ---------------------------------------------------------------------- what is refused


def test_a_stream_whose_classes_come_later_is_explained(adapt: Callable[..., Any]) -> None:
    stream = scenarios.class_incremental("digits", n_experiences=5)
    with pytest.raises(ContlearnError, match=r"'Still' adapts at test time .* 'class_incremental' lacks classes"):
        run(adapter_of(Still, stream), stream, quiet=True)


def test_task_labels_are_refused(adapt: Callable[..., Any]) -> None:
    stream = scenarios.task_incremental("digits", n_experiences=5)
    with pytest.raises(ContlearnError, match="told no task"):
        run(adapter_of(Still, stream), stream, quiet=True)


def test_loggers_are_refused(adapt: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match="loggers"):
        adapt(Still, loggers=["csv"], out=tmp_path / "run")


def test_training_on_the_clean_part_of_a_test_time_stream_is_a_run(tmp_path: Path) -> None:
    """Fine-tuning on ``corruptions`` is the training of a source model: its run folder serves as one."""
    from contlearn import strategies

    stream = stream_of()
    model = models.create("slim_resnet18", stream, width=2, seed=0, head="fixed")
    naive = strategies.create("naive", model, lr=0.05, epochs=2, device="cpu")
    trained = run(naive, stream, out=tmp_path / "naive", quiet=True)
    assert len(trained.accuracy_matrix[-1]) == len(CORRUPTIONS)
    found = run(adapter_of(Still, stream, source=str(tmp_path / "naive")), stream, quiet=True).results
    accuracies = [1 - found["error_by_domain"][name] for name in found["domains"]]
    assert accuracies == pytest.approx(trained.accuracy_matrix[-1])
