"""A run folder: what is in it, that it says the truth about the model, and that nobody's files are overwritten."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from avalanche.benchmarks import benchmark_from_datasets, class_incremental_benchmark
from avalanche.benchmarks.utils import DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from contlearn import events as event_log
from contlearn import models, results, run, scenarios, strategies

Train = Callable[..., Any]
Events = Callable[..., list[dict[str, Any]]]


class Snapshots(SupervisedPlugin):  # type: ignore[type-arg]
    """Keeps a copy of the model as it was after each experience."""

    checkpoint_exclude = ("models",)

    def __init__(self) -> None:
        super().__init__()
        self.models: list[nn.Module] = []

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.models.append(copy.deepcopy(strategy.model).eval())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Replay on three experiences with all ten outputs there from the start, so that which classes compete matters."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    stream = scenarios.class_incremental("digits", n_experiences=3, class_order="random", seed=5)
    model = models.create("mlp", stream, seed=0, head="fixed", hidden=20)
    strategy = strategies.create("replay", model, lr=0.05, epochs=3, memory_size=30, device="cpu", eval_batch_size=50)
    snapshots = Snapshots()
    strategy.plugins.insert(0, snapshots)
    result = run(strategy, stream, out=folder, quiet=True)
    return SimpleNamespace(folder=folder, stream=stream, strategy=strategy, result=result, models=snapshots.models)


def counted(model: nn.Module, dataset: Any, competing: set[int]) -> int:
    """Right answers when only these classes compete, sample by sample."""
    right = 0
    for position in range(len(dataset)):
        x, y, _ = dataset[position]
        with torch.no_grad():
            logits = model(x.unsqueeze(0))[0].tolist()
        right += max((c for c in competing if c < len(logits)), key=lambda c: logits[c]) == int(y)
    return right


# ---------------------------------------------------------------------- the folder


def test_the_folder_holds_what_the_design_names(finished: Any) -> None:
    assert {path.name for path in finished.folder.iterdir()} == {
        "config.yaml", "events.jsonl", "results.json", "checkpoint", "model.safetensors",
    }  # fmt: skip
    assert finished.result.folder == finished.folder


def test_the_configuration_is_resolved_and_plain(finished: Any) -> None:
    config = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert config["scenario"]["name"] == "class_incremental"
    assert (config["scenario"]["n_experiences"], config["scenario"]["class_order"]) == (3, "random")
    assert (config["model"]["name"], config["model"]["hidden"], config["model"]["head"]) == ("mlp", 20, "fixed")
    assert (config["strategy"]["name"], config["strategy"]["memory_size"]) == ("replay", 30)
    assert config["strategy"]["momentum"] == 0.0  # a default
    assert config["seed"] == 0


def test_results_follow_from_the_events(finished: Any) -> None:
    records = event_log.read(finished.folder / "events.jsonl")
    stored = json.loads((finished.folder / "results.json").read_text())
    assert results.build(records) == stored == finished.result.results
    assert (finished.result.accuracy_matrix, finished.result.metrics) == (stored["accuracy_matrix"], stored["metrics"])
    assert (stored["schema"], stored["status"], stored["strategy"], stored["scenario"], stored["seed"]) == (
        1, "complete", "replay", "class_incremental", 0,
    )  # fmt: skip
    assert set(stored["time"]) == {"train_s", "eval_s"}
    assert stored["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]


def test_the_accuracy_matrix_is_what_the_models_answer_with_all_seen_classes_competing(finished: Any) -> None:
    tests = finished.stream.streams["test"]
    seen: set[int] = set()
    expected = []
    for model, experience in zip(finished.models, finished.stream.streams["train"], strict=True):
        seen |= set(experience.classes_in_this_experience)
        expected.append([counted(model, test.dataset, seen) / len(test.dataset) for test in tests])
    assert finished.result.accuracy_matrix == expected
    assert expected[0][1] == expected[0][2] == 0  # a class that was not seen yet is no answer
    total = sum(len(test.dataset) for test in tests)
    assert finished.result.metrics["final_accuracy"] == pytest.approx(
        sum(a * len(test.dataset) for a, test in zip(expected[-1], tests, strict=True)) / total
    )


def test_a_class_that_is_still_to_come_does_not_compete() -> None:
    # At a learning rate of 0 the ten outputs keep their first weights, under which any of them may win.
    stream = scenarios.class_incremental("digits", n_experiences=3)
    model = models.create("mlp", stream, seed=0, head="fixed")
    strategy = strategies.create("naive", model, lr=0.0, device="cpu")
    found = run(strategy, stream, quiet=True).accuracy_matrix
    model.eval()
    tests = [test.dataset for test in stream.streams["test"]]
    seen: set[int] = set()
    for row, experience in zip(found, stream.streams["train"], strict=True):
        seen |= set(experience.classes_in_this_experience)
        assert row == [counted(model, test, seen) / len(test) for test in tests]
    assert found[0][0] != counted(model, tests[0], set(range(10))) / len(tests[0])


def test_the_narrower_counts_are_what_the_models_answer(finished: Any, events: Events) -> None:
    tests = finished.stream.streams["test"]
    classes = [set(test.classes_in_this_experience) for test in tests]
    for record in events(finished.folder, "evaluation"):
        if record["on"] > record["after"]:
            continue  # not evaluated: none of its classes has been trained
        model, dataset = finished.models[record["after"]], tests[record["on"]].dataset
        assert record["n"] == len(dataset)
        assert record["correct_local"] == counted(model, dataset, classes[record["on"]])
        assert record["correct_upto"] == counted(model, dataset, set().union(*classes[: record["on"] + 1]))


def test_the_loss_is_the_mean_over_the_samples(finished: Any, events: Events) -> None:
    dataset = finished.stream.streams["test"][0].dataset
    x = torch.stack([dataset[i][0] for i in range(len(dataset))])
    y = torch.tensor([dataset[i][1] for i in range(len(dataset))])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(finished.models[2](x), y).item()
    record = next(r for r in events(finished.folder, "evaluation") if (r["after"], r["on"]) == (2, 0))
    assert record["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_stored_weights_give_the_final_model(finished: Any) -> None:
    fresh = models.create("mlp", finished.stream, seed=1, head="fixed", hidden=20).eval()
    fresh.load_state_dict(load_file(finished.folder / "model.safetensors"))
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(fresh(x), finished.models[-1](x))


def test_the_strategy_is_as_it_was_handed_over(finished: Any) -> None:
    assert not any(type(plugin).__module__.startswith("contlearn.recorder") for plugin in finished.strategy.plugins)


# ---------------------------------------------------------------------- determinism


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(train: Train, tmp_path: Path) -> None:
    spec: dict[str, Any] = {"scenario": {"augment": "flip"}, "model": {"dropout": 0.5, "seed": None}}
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(seed)  # the weights of a model without a seed of its own
        result = train("replay", out=tmp_path / name, seed=seed, **spec)
        runs[name] = (result.accuracy_matrix, (tmp_path / name / "model.safetensors").read_bytes())
    assert runs["a"] == runs["b"]
    assert runs["a"][1] != runs["c"][1]
    assert runs["a"][0] != runs["c"][0]


def test_the_seed_of_a_run_alone_changes_its_order(train: Train, tmp_path: Path) -> None:
    bits = []
    for seed in (0, 0, 1):
        train(out=tmp_path / "run", seed=seed)
        bits.append((tmp_path / "run" / "model.safetensors").read_bytes())
    assert bits[0] == bits[1] != bits[2]


# ---------------------------------------------------------------------- kinds of streams


def test_transfer_forward_is_known_where_the_classes_are(train: Train, tmp_path: Path, events: Events) -> None:
    domains = train(out=tmp_path / "run", scenario={"name": "domain_incremental", "n_experiences": 2})
    assert domains.metrics["forward_transfer"] is not None
    before = {r["on"]: r["correct"] / r["n"] for r in events(tmp_path / "run", "evaluation") if r["after"] == -1}
    assert domains.metrics["forward_transfer"] == pytest.approx(domains.accuracy_matrix[0][1] - before[1])
    assert train().metrics["forward_transfer"] is None


def test_joint_training_has_one_row(train: Train) -> None:
    joint = train("joint")
    assert len(joint.accuracy_matrix) == 1
    assert len(joint.accuracy_matrix[0]) == 3
    assert joint.results["joint"] is True
    assert joint.metrics["forgetting"] is None


def test_an_online_stream_is_evaluated_after_the_last_piece_of_an_experience(
    train: Train, tmp_path: Path, events: Events
) -> None:
    scenario = {"name": "online", "n_experiences": 2, "experience_size": 60}
    result = train(out=tmp_path / "run", scenario=scenario, options={"epochs": 1})
    assert [(r["after"], r["on"]) for r in events(tmp_path / "run", "evaluation")] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert result.accuracy_matrix[0][1] == 0 < result.accuracy_matrix[0][0]
    whole = scenarios.class_incremental("digits", n_experiences=2).streams["train"]
    assert [r["samples"] for r in events(tmp_path / "run", "experience")] == [len(e.dataset) for e in whole]
    pieces = [-(-len(e.dataset) // 60) for e in whole]
    assert [r["experience"] for r in events(tmp_path / "run", "epoch")] == list(range(sum(pieces)))


def test_a_test_stream_cut_otherwise_than_training_has_its_own_columns(train: Train) -> None:
    blurry = train(scenario={"name": "blurry"})
    assert len(blurry.accuracy_matrix) == 3
    assert {len(row) for row in blurry.accuracy_matrix} == {len(blurry.results["classes_per_experience"])}


def test_a_nearest_mean_classifier_may_answer_for_more_classes_in_one_batch_than_in_the_next(train: Train) -> None:
    # Its scores are as wide as the labels of the batch: one test experience holds classes that were never seen.
    train("icarl", scenario={"name": "blurry"}, options={"epochs": 1, "eval_batch_size": 3})


# ---------------------------------------------------------------------- Avalanche's own parts


def avalanche_naive(model: nn.Module) -> Any:
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=16,
        train_epochs=3,
        eval_mb_size=64,
        evaluator=EvaluationPlugin(loggers=[]),
    )


def _with_tasks(data: TensorDataset) -> Any:
    targets = data.tensors[1].tolist()
    return TaskAwareSupervisedClassificationDataset(
        [data], data_attributes=[DataAttribute(targets, "targets"), TaskLabels(ConstantSequence(0, len(targets)))]
    )


def made_up() -> tuple[Any, Any]:
    """Four classes that lie apart, in two dimensions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat(20)
    centres = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [-3.0, -3.0], [3.0, -3.0]])
    x = centres[y] + torch.randn(80, 2, generator=generator) / 4
    return TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:])


@pytest.mark.parametrize("ours", [True, False])
def test_an_avalanche_benchmark_of_made_up_tensors(ours: bool, tmp_path: Path) -> None:
    train_data, test_data = made_up()
    benchmark = class_incremental_benchmark(
        {"train": _with_tasks(train_data), "test": _with_tasks(test_data)}, num_experiences=2
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
    strategy = strategies.create("naive", net, epochs=3, batch_size=16, device="cpu") if ours else avalanche_naive(net)
    result = run(strategy, benchmark, out=tmp_path / "run", quiet=True)
    classes = [sorted(e.classes_in_this_experience) for e in benchmark.streams["train"]]
    assert result.results["classes_per_experience"] == classes
    x, y = test_data.tensors
    with torch.no_grad():
        answers = net.eval()(x).argmax(1)
    expected = [float((answers == y)[torch.isin(y, torch.tensor(c))].float().mean()) for c in classes]
    assert result.accuracy_matrix[1] == pytest.approx(expected)
    assert result.accuracy_matrix[0] == [1.0, 0.0]
    assert (tmp_path / "run" / "checkpoint" / "state.json").exists()


def test_a_benchmark_of_ready_made_experiences() -> None:
    train_data, test_data = made_up()
    parts = {
        name: [_with_tasks(TensorDataset(*(t[i::2] for t in data.tensors))) for i in range(2)]
        for name, data in (("train", train_data), ("test", test_data))
    }
    result = run(avalanche_naive(nn.Linear(2, 4)), benchmark_from_datasets(**parts), quiet=True)
    assert result.results["classes_per_experience"] == [[0, 2], [1, 3]]
    assert len(result.accuracy_matrix) == 2
