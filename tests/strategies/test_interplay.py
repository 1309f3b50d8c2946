"""Avalanche's strategies on our streams, our plug-ins in Avalanche's, our strategies on Avalanche's benchmarks."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark, with_task_labels
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import supervised
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins import LwFPlugin as AvalancheLwFPlugin
from torch import nn
from torch.utils.data import TensorDataset

from contlearn import models, scenarios, strategies
from contlearn.strategies.agem import AGEMPlugin
from contlearn.strategies.ewc import EWCPlugin
from contlearn.strategies.gdumb import GDumbPlugin
from contlearn.strategies.lwf import LwFPlugin
from contlearn.strategies.replay import ReplayPlugin
from contlearn.strategies.si import SIPlugin

SUPERVISED = strategies.list(kind=("class-incremental", "plug-in"))

AVALANCHES = {
    "Naive": {},
    "LwF": {"alpha": 1.0, "temperature": 2.0},
    "EWC": {"ewc_lambda": 0.1},
    "SynapticIntelligence": {"si_lambda": 0.1},
    "Replay": {"mem_size": 12},
    "DER": {"mem_size": 12, "batch_size_mem": 4},
    "ER_ACE": {"mem_size": 12, "batch_size_mem": 4},
    "GDumb": {"mem_size": 48},
    "AGEM": {"patterns_per_exp": 8, "sample_size": 8},
    "Cumulative": {},
}
PLUGINS = {
    "replay, reservoir": lambda: ReplayPlugin(12, policy="reservoir"),
    "replay, balanced": lambda: ReplayPlugin(12, policy="class_balanced", batch_size_memory=4),
    "replay, herding": lambda: ReplayPlugin(12, policy="herding"),
    "ewc": lambda: EWCPlugin(0.1),
    "ewc, online": lambda: EWCPlugin(0.1, mode="online", decay_factor=0.5),
    "si": lambda: SIPlugin(0.1),
    "lwf": lambda: LwFPlugin(1.0, 2.0),
    "agem": lambda: AGEMPlugin(8, 8),
    "gdumb": lambda: GDumbPlugin(48),
}
REHEARSING = ("replay, reservoir", "replay, balanced", "replay, herding", "gdumb")


@pytest.fixture
def plain(made_up):
    """A stream whose training images are as its test images."""
    return scenarios.class_incremental(made_up(), n_experiences=3)


@pytest.fixture
def benchmark(made_up):
    """The same data as a benchmark of Avalanche's own making."""
    data = made_up()

    def aware(images: torch.Tensor, targets: torch.Tensor):
        samples = TensorDataset(images / 255, targets)
        return _make_taskaware_classification_dataset(samples, targets=targets.tolist(), task_labels=0)

    parts = {
        "train": aware(data.train_images, data.train_targets),
        "test": aware(data.test_images, data.test_targets),
    }
    return with_task_labels(class_incremental_benchmark(parts, num_experiences=3, class_order=[0, 1, 2, 3, 4, 5]))


def run(strategy, stream, watch) -> list[float]:
    """Train on every experience; after each, accuracy on its own test data, and all test data evaluated once."""
    hits: list[bool] = []
    strategy.plugins.insert(
        0, watch(after_eval_iteration=lambda s: hits.extend((s.mb_output.argmax(1) == s.mb_y).tolist()))
    )
    own = []
    for index, experience in enumerate(stream.train_stream):
        strategy.train(experience, eval_streams=[])
        hits.clear()
        strategy.eval(stream.test_stream[index])
        own.append(sum(hits) / len(hits))
        hits.clear()
        strategy.eval(stream.test_stream)
        assert len(hits) == 18
    assert all(parameter.isfinite().all() for parameter in strategy.model.parameters())
    return own


def options_of(model, evaluator) -> dict:
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 4,
        "train_epochs": 8,
        "eval_mb_size": 7,
        "evaluator": evaluator,
    }


@pytest.mark.parametrize("name", AVALANCHES)
def test_avalanches_strategies_train_on_our_stream(plain, small, quiet, watch, name) -> None:
    # Avalanche's DER stacks stored logits, which must be equally many.
    model = small(plain, hidden=16, head="fixed" if name == "DER" else "auto")
    own = run(getattr(supervised, name)(**options_of(model, quiet()), **AVALANCHES[name]), plain, watch)
    assert own[0] == 1.0 and min(own) >= 1 / 2  # chance: one in six


def test_avalanches_metrics_agree_with_the_answers(plain, small, watch) -> None:
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[])
    answers: dict[int, list[bool]] = {}

    def note(strategy) -> None:
        hits = (strategy.mb_output.argmax(1) == strategy.mb_y).tolist()
        answers.setdefault(strategy.experience.current_experience, []).extend(hits)

    strategy = strategies.create(
        "naive",
        small(plain),
        lr=0.5,
        epochs=4,
        eval_batch_size=4,
        evaluator=evaluator,
        plugins=[watch(after_eval_iteration=note)],
    )
    strategy.train(plain.train_stream, eval_streams=[])
    found = strategy.eval(plain.test_stream)
    for index, hits in answers.items():
        key = f"Top1_Acc_Exp/eval_phase/test_stream/Task000/Exp{index:03d}"
        assert found[key] == pytest.approx(sum(hits) / len(hits))
    everything = [hit for hits in answers.values() for hit in hits]
    assert found["Top1_Acc_Stream/eval_phase/test_stream/Task000"] == pytest.approx(sum(everything) / 18)


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("host", ["Avalanche's benchmark", "our stream"])
def test_our_plugins_work_in_avalanches_naive(plain, benchmark, small, quiet, watch, name, host) -> None:
    model = small(plain, hidden=16)
    strategy = supervised.Naive(plugins=[PLUGINS[name]()], **options_of(model, quiet()))
    own = run(strategy, benchmark if host.startswith("Avalanche") else plain, watch)
    assert own[0] == 1.0 and min(own) >= 1 / 2  # chance: one in six


@pytest.mark.parametrize("name", REHEARSING)
def test_our_memories_prevent_forgetting_in_avalanches_naive(plain, benchmark, small, quiet, watch, name) -> None:
    scores = []
    for plugins in ([], [PLUGINS[name]()]):
        strategy = supervised.Naive(plugins=plugins, **options_of(small(plain, hidden=16), quiet()))
        hits: list[bool] = []
        strategy.train(benchmark.train_stream, eval_streams=[])
        strategy.plugins.insert(
            0,
            watch(after_eval_iteration=lambda s, hits=hits: hits.extend((s.mb_output.argmax(1) == s.mb_y).tolist())),
        )
        strategy.eval(benchmark.test_stream[0])
        scores.append(sum(hits) / len(hits))
    assert scores[1] > scores[0] + 0.3


@pytest.mark.parametrize("name", [name for name in SUPERVISED if name != "joint"])
def test_our_strategies_train_on_avalanches_benchmark(plain, benchmark, small, normed, watch, name) -> None:
    # The first two pull towards the initial, random network; at the others' rate PRD's projections become one.
    apt = {
        "l2": {"coefficient": 1e-3}, "feat_kd": {"mu": 0.1},
        "prd": {"lr": 0.05, "prototypes_lr": 1.0, "crop": 0, "flip": False},
    }  # fmt: skip
    model = normed(plain) if name == "adab2n" else small(plain, hidden=16)
    options = {"lr": 0.5, "momentum": 0.5, "epochs": 8, "batch_size": 4, **apt.get(name, {})}
    strategy = strategies.create(name, model, **options)
    # Running statistics of sixteen images in batches of four leave one test image in six in doubt.
    assert run(strategy, benchmark, watch)[0] >= (5 / 6 if name == "adab2n" else 1.0)


def test_avalanches_plugins_work_in_our_template(plain, small, watch) -> None:
    model = models.create("mlp", plain, seed=0, hidden=16, dropout=0.0)
    strategy = strategies.create(
        "replay",
        model,
        memory_size=12,
        lr=0.5,
        momentum=0.5,
        epochs=8,
        batch_size=4,
        plugins=[AvalancheLwFPlugin(1.0, 2.0)],
    )
    assert run(strategy, plain, watch)[0] == 1.0
    assert strategy.plugins[2].lwf.prev_classes_by_task == {0: set(range(6))}
