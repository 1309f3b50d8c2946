"""MEMO: its loss, exemplars and budgets against independent computations; what is frozen, resumed and exported."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin

from contlearn import models, run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.memory.account import MemoryAccount
from contlearn.memory.papers import memo_alignment, memo_split
from contlearn.running import RunInterrupted
from contlearn.scenarios.datasets import ImageData

SOON = {"lr": 0.1, "epochs": 2, "batch_size": 5, "device": "cpu"}


def memo(stream: Any, network: str = "resnet14", **options: Any) -> Any:
    torch.manual_seed(0)
    return strategies.create("memo", models.create(network, stream, seed=0), **{"memory_size": 12, **SOON, **options})


@pytest.fixture
def stream(made_up) -> Any:
    """Six classes in three experiences of sixteen 8x8 images; training images are inverted."""
    return scenarios.class_incremental(made_up(side=8), n_experiences=3, transform=lambda image: 255 - image)


def train(strategy: Any, stream: Any, upto: int = 3) -> Any:
    for experience in list(stream.train_stream)[:upto]:
        strategy.train(experience, eval_streams=[])
    return strategy


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_loss_is_that_of_the_head_and_of_the_auxiliary_head_on_the_newest_part(stream, watch, alpha) -> None:
    checked: list[int] = []

    def check(strategy: Any) -> None:
        task = strategy.clock.train_exp_counter
        with torch.no_grad():
            twin = copy.deepcopy(strategy.model).train()
            shared = twin.backbone.general(strategy.mb_x)
            parts = [part(shared) for part in twin.backbone.specialised]
            logits = F.linear(torch.cat(parts, 1), strategy.model.head.weight, strategy.model.head.bias)
            expected = 0.0
            for row, label in zip(logits, strategy.mb_y.tolist(), strict=True):
                expected -= float(row[label] - row.logsumexp(0)) / len(logits)
            if task:
                auxiliary = F.linear(parts[-1], strategy.model.aux.weight, strategy.model.aux.bias)
                assert auxiliary.shape[1] == 2 + 1
                for row, label in zip(auxiliary, strategy.mb_y.tolist(), strict=True):
                    place = max(0, label - 2 * task + 1)  # old: 0; the two new ones: 1 and 2
                    expected -= alpha * float(row[place] - row.logsumexp(0)) / len(logits)
        assert strategy.loss.item() == pytest.approx(expected, rel=1e-4)
        checked.append(task)

    train(memo(stream, alpha_aux=alpha, plugins=[watch(before_backward=check)]), stream)
    assert set(checked) == {0, 1, 2}


def test_new_data_and_all_exemplars_are_trained_on_together(stream, watch, identify) -> None:
    places, seen = identify(stream, "train"), []
    strategy = memo(stream, "mlp", epochs=1, plugins=[watch(before_forward=lambda s: seen.extend(places(s.mb_x)))])
    exemplars: set[tuple[int, int]] = set()
    for index, experience in enumerate(stream.train_stream):
        seen.clear()
        strategy.train(experience, eval_streams=[])
        assert sorted(seen) == sorted({(index, p) for p in range(16)} | exemplars)
        exemplars = set(places(torch.stack([x for x, *_ in strategy.storage_policy.buffer.train()])))
        assert len(exemplars) == 12


@pytest.mark.parametrize("train_base", [False, True])
def test_frozen_blocks_are_bit_identical_after_training_batchnorm_included(stream, train_base) -> None:
    strategy = train(memo(stream, train_base=train_base, momentum=0.9, weight_decay=0.1), stream, 2)
    before = copy.deepcopy(strategy.model.backbone.state_dict())
    strategy.train(stream.train_stream[2], eval_streams=[])
    after = strategy.model.backbone.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    old = {key for key in before if key.startswith(("specialised.0.", "specialised.1."))}
    general = {key for key in before if key.startswith("general.")}
    assert old <= same and any("running_mean" in key for key in old)
    moved = {key for key in general if not key.endswith("num_batches_tracked")} - same
    assert bool(moved) == train_base
    assert any(not torch.equal(after[key.replace("specialised.1", "specialised.2")], before[key]) for key in old)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sinkgd"])
def test_the_optimizer_hears_of_new_parameters_and_lets_go_of_frozen_ones(stream, watch, optimizer) -> None:
    found: list[tuple[set[int], set[int], set[int]]] = []

    def look(strategy: Any) -> None:
        held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
        wanted = {id(p) for p in strategy.model.parameters() if p.requires_grad}
        found.append((held, wanted, {id(p) for p in strategy.optimizer.state}))

    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    strategy = memo(
        stream, optimizer=optimizer, reset_optimizer=False, plugins=[watch(after_training_epoch=look)], **options
    )
    train(strategy, stream)
    assert len(found) == 6 and all(held == wanted and state <= wanted for held, wanted, state in found)
    # Frozen weights have no gradient either: nothing of theirs is in memory beside themselves.
    assert all(p.grad is None for p in strategy.model.parameters() if not p.requires_grad)


def test_new_rows_are_aligned_after_every_task_but_the_first(stream) -> None:
    plain, aligned = (train(memo(stream, align=flag), stream, 1) for flag in (False, True))
    assert torch.equal(plain.model.head.weight, aligned.model.head.weight) and aligned.gamma == 1.0
    for strategy in (plain, aligned):
        torch.manual_seed(1)  # of the new head
        strategy.train(stream.train_stream[1], eval_streams=[])
    before, after = plain.model.head, aligned.model.head
    norms = [math.sqrt(sum(float(w) ** 2 for w in row)) for row in before.weight.tolist()]  # the random columns count
    gamma = (norms[0] + norms[1]) / (norms[2] + norms[3])
    assert aligned.gamma == pytest.approx(gamma, rel=1e-5) and plain.gamma == 1.0 and abs(gamma - 1) > 1e-3
    torch.testing.assert_close(after.weight[2:], before.weight[2:] * gamma)
    assert torch.equal(after.weight[:2], before.weight[:2]) and torch.equal(after.bias, before.bias)


# ---------------------------------------------------------------- exemplars and predictions


def herded(features: torch.Tensor, count: int) -> list[int]:
    """One candidate at a time: what brings the running mean nearest to the class mean."""
    features = features.double()
    mean, chosen = features.mean(0), []
    for _ in range(count):
        free = [i for i in range(len(features)) if i not in chosen]
        chosen.append(min(free, key=lambda i: float((mean - features[[*chosen, i]].mean(0)).norm())))
    return chosen


def test_exemplars_are_herded_on_normalised_concatenated_features_and_the_first_are_kept(stream, identify) -> None:
    strategy = memo(stream, memory_size=12)
    places = identify(stream, "eval")
    chosen: dict[int, list[tuple[int, int]]] = {}
    for index, experience in enumerate(stream.train_stream):
        strategy.train(experience, eval_streams=[])
        model, share = copy.deepcopy(strategy.model).eval(), 12 // (2 * index + 2)
        for label in (2 * index, 2 * index + 1):
            rows = [p for p, target in enumerate(experience.dataset.targets) if target == label]
            images = torch.stack([experience.dataset.eval()[p][0] for p in rows])
            with torch.no_grad():
                features = F.normalize(model.features(images), dim=1)
            assert features.shape[1] == 64 * (index + 1)
            chosen[label] = [(index, rows[p]) for p in herded(features, share)]
        chosen = {label: positions[:share] for label, positions in chosen.items()}
        groups = strategy.storage_policy.buffer_groups
        held = {k: places(torch.stack([x for x, *_ in g.buffer.eval()])) for k, g in groups.items()}
        assert held == chosen


def test_a_fixed_number_per_class_lets_the_memory_grow(stream) -> None:
    strategy = memo(stream, "mlp", per_class=3)
    sizes = []
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        sizes.append({label: len(group.buffer) for label, group in strategy.storage_policy.buffer_groups.items()})
    assert sizes == [dict.fromkeys(range(n), 3) for n in (2, 4, 6)]


@pytest.mark.parametrize("classifier", ["head", "nme"])
def test_both_classifiers_answer_in_one_pass(stream, watch, classifier) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    other = "nme" if classifier == "head" else "head"
    note = watch(after_eval_iteration=lambda s: seen.append((s.mb_x, s.mb_output, s.other_outputs[other])))
    strategy = train(memo(stream, classifier=classifier, plugins=[note]), stream)
    strategy.eval(stream.test_stream[1])
    x, chosen, beside = seen[0]
    model = strategy.model.eval()
    with torch.no_grad():
        unit = F.normalize(model.features(x), dim=1)
        means = []
        for label in range(6):
            images = torch.stack([x for x, *_ in strategy.storage_policy.buffer_groups[label].buffer.eval()])
            means.append(F.normalize(F.normalize(model.features(images), dim=1).mean(0), dim=0))
        nearest = -torch.stack([(unit - mean).pow(2).sum(1) for mean in means], 1)
        answers = {"head": model(x), "nme": nearest}
    torch.testing.assert_close(chosen, answers[classifier], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(beside, answers[other], rtol=1e-3, atol=1e-4)
    assert strategy.other_outputs == {}


# ---------------------------------------------------------------- memory at equal bytes


def stand_in(classes: int, shape: tuple[int, int, int], n_experiences: int, initial: int | None) -> Any:
    images = torch.zeros(classes, *shape, dtype=torch.uint8)
    data = ImageData(
        name="stand_in", train_images=images, test_images=images[:classes], train_targets=torch.arange(classes),
        test_targets=torch.arange(classes), class_names=tuple(map(str, range(classes))),
    )  # fmt: skip
    return scenarios.class_incremental(data, n_experiences=n_experiences, initial_classes=initial)


CIFAR, IMAGENET = ("resnet32", (3, 32, 32)), ("timm/resnet18", (3, 224, 224))


@pytest.mark.parametrize(
    ("network", "initial", "tasks", "memo_exemplars", "single_exemplars", "budget", "at_2000"),
    [
        (CIFAR, None, 10, 3312, 7431, 23.54, 19.69),
        (CIFAR, None, 20, 4771, 13466, 41.22, 33.10),
        (CIFAR, None, 5, 2583, 4414, 14.70, 12.99),
        (CIFAR, 50, 6, 2729, 5017, 16.47, 14.33),
        (CIFAR, 50, 11, 3458, 8035, 25.31, 21.04),
        (IMAGENET, None, 10, 2665, None, 713.4, None),
        (IMAGENET, 50, 11, 2739, None, 756.0, None),
    ],
)
def test_the_papers_table_of_equal_memory_comes_out_of_strategies_on_streams(
    network, initial, tasks, memo_exemplars, single_exemplars, budget, at_2000
) -> None:
    name, shape = network
    stream = stand_in(100, shape, tasks, initial)
    first = stream.train_stream[0]

    def exemplars(method: str, **options: Any) -> tuple[Any, int | None]:
        strategy = strategies.create(method, models.create(name, stream, seed=0), device="cpu", **options)
        return strategy, strategy.fit_memory(first)

    aligned, count = exemplars("memo", budget_reference="der")
    assert count == memo_exemplars == aligned.storage_policy.max_size
    der, none = exemplars("der_expand")
    assert none is None and der.storage_policy.max_size == 2000
    assert exemplars("der_expand", budget_reference="der")[1] == 2000
    whole = der.aligned_bytes(first)
    assert whole / 2**20 == pytest.approx(budget, abs=0.11 if network is IMAGENET else 0.005)
    assert whole - math.prod(shape) < aligned.aligned_bytes(first) <= whole
    if at_2000 is not None:
        # The same from the other side: a budget in bytes over weights and exemplars.
        assert exemplars("memo", memory_budget=whole, budget_covers="model")[1] == memo_exemplars
        assert exemplars("memo")[0].aligned_bytes(first) / 2**20 == pytest.approx(at_2000, abs=0.005)
        assert exemplars("wa", budget_reference="der")[1] == single_exemplars
        assert exemplars("wa")[0].aligned_bytes(first) / 2**20 == pytest.approx(7.63, abs=0.005)
        split = memo_split(models.create(name, stream, seed=0).backbone, "stage3")
        assert memo_alignment(split, tasks).budget == whole


def test_a_budget_of_exemplars_alone_counts_as_everywhere(stream) -> None:
    each = 64 + 8 + 8  # pixels, label, place in the stream
    strategy = train(memo(stream, "mlp", memory_budget=10 * each - 1), stream, 1)
    assert len(strategy.storage_policy.buffer) == 9
    with pytest.raises(ContlearnError, match=f"memory_budget: .* expected at least {each}$"):
        train(memo(stream, "mlp", memory_budget=each - 1), stream, 1)


def test_what_the_account_finds_at_the_end_is_what_the_budget_counts(stream) -> None:
    budget = 4 * (16 * 65 * 3) + 64 * 20  # three parts of one layer each (65 inputs with the bias, 16 units), 20 images
    torch.manual_seed(0)
    model = models.create("mlp", stream, seed=0, hidden=16)
    strategy = strategies.create("memo", model, memory_budget=budget, budget_covers="model", **SOON)
    account = MemoryAccount()
    strategy.plugins.insert(0, account)
    train(strategy, stream)
    report = account.close_experience(strategy)
    assert report.exemplars == 20
    # Beside these: head (6 x 48 and 6 biases), auxiliary head (3 x 16 and 3), labels and indices.
    assert report.weights == 4 * (16 * 65 * 3 + 6 * 48 + 6 + 3 * 16 + 3) and report.replay == 20 * (64 + 16)
    with pytest.raises(ContlearnError, match=r"beside the backbones of 3 tasks; expected at least 12544 bytes"):
        train(strategies.create("memo", models.create("mlp", stream, hidden=16), memory_budget="1KB",
                                budget_covers="model", **SOON), stream, 1)  # fmt: skip


# ---------------------------------------------------------------- runs


class _Stop(SupervisedPlugin):  # type: ignore[type-arg]
    """SIGTERM to this process in one iteration."""

    checkpoint_exclude = ("at",)

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_iterations == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("network", "options"),
    [("mlp", {}), ("resnet14", {"train_base": True, "momentum": 0.9, "reset_optimizer": False})],
)
def test_a_run_stopped_inside_any_task_ends_with_the_same_bits(made_up, tmp_path: Path, network, options) -> None:
    def go(folder: str, at: int = -1, **more: Any) -> None:
        stream = scenarios.class_incremental(made_up(side=8), n_experiences=3)
        strategy = memo(stream, network, epochs=1, batch_size=8, **options)
        strategy.plugins.insert(0, _Stop(at))
        run(strategy, stream, out=tmp_path / folder, quiet=True, seed=3, **more)

    go("whole")
    iterations = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert [r["iterations"] for r in iterations if r["event"] == "epoch"] == [2, 4, 4]
    for at in (0, 3, 7):  # in the first, second and third task
        with pytest.raises(RunInterrupted):
            go("pieces", at, resume=True)
    go("pieces", resume=True)
    whole, pieces = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces"))
    assert whole == pieces
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "pieces")]
    for key in ("accuracy_matrix", "metrics", "memory"):
        assert results[0][key] == results[1][key]


def test_task_ids_pieces_of_experiences_and_streams_without_new_classes(made_up) -> None:
    data = made_up(side=8)
    tasks = scenarios.task_incremental(data, n_experiences=3)
    strategy = memo(tasks, "mlp", epochs=6, lr=0.2)
    result = run(strategy, tasks, quiet=True)
    assert len(strategy.model.backbone.specialised) == 3 and result.metrics["final_accuracy"] > 0.6
    online = scenarios.online(data, n_experiences=2, experience_size=8, access_task_boundaries=True)
    strategy = memo(online, "mlp", epochs=1)
    strategy.train(online.train_stream, eval_streams=[])
    assert len(strategy.model.backbone.specialised) == 2  # by experience, not by piece
    domains = scenarios.domain_incremental("digits", n_experiences=3)
    strategy = memo(domains, "mlp", epochs=1, batch_size=200)
    strategy.train(domains.train_stream, eval_streams=[])
    assert len(strategy.model.backbone.specialised) == 1 and strategy.model.aux.classes == []


# ---------------------------------------------------------------- export


def test_the_step_is_one_iteration_of_the_training_loop(stream, watch) -> None:
    noted: dict[str, Any] = {}

    def declare(strategy: Any) -> None:
        if strategy.clock.train_exp_counter == 1 and not noted:
            plugin = strategy.plugins.pop(0)
            twin = copy.deepcopy(strategy)
            strategy.plugins.insert(0, plugin)
            noted["step"] = twin.declare_step(batch_size=8, input_shape=(1, 8, 8))
            noted["state"] = {name: held.clone() for name, held in noted["step"].state.items()}

    def note(strategy: Any) -> None:
        if noted and "after" not in noted:
            noted.update(x=strategy.mb_x, y=strategy.mb_y, loss=float(strategy.loss.detach()))
            noted["after"] = {name: held.detach().clone() for name, held in strategy.model.state_dict().items()}

    plugin = watch(before_training_iteration=declare, after_training_iteration=note)
    strategy = memo(stream, epochs=1, batch_size=16, momentum=0.9, weight_decay=0.01, plugins=[plugin])
    train(strategy, stream, 2)
    step, after = noted["step"], noted["after"]
    assert set(step.inputs) == {"x", "y", "x_memory", "y_memory", "lr", "class_mask", "old_class_mask"}
    assert step.memory.policy == "balanced" and step.memory.capacity == 12
    trained = {name for name, role in step.roles.items() if role == "weight"}
    assert trained == {n for n, p in strategy.model.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("backbone.general.", "backbone.specialised.0.")) for name in step.state)
    outputs, new = step.compute(noted["state"], {
        "x": noted["x"][:8], "y": noted["y"][:8], "x_memory": noted["x"][8:], "y_memory": noted["y"][8:],
        "lr": torch.tensor([0.1]), "class_mask": torch.ones(4), "old_class_mask": torch.tensor([1.0, 1.0, 0.0, 0.0]),
    })  # fmt: skip
    assert float(outputs["loss"]) == pytest.approx(noted["loss"], rel=1e-5)
    for name in (name for name, role in step.roles.items() if role in ("weight", "statistic")):
        change = (after[name] - noted["state"][name]).norm()
        assert (new[name] - after[name]).norm() <= 1e-5 * change + 1e-7, name


def test_room_for_more_classes_is_the_step_of_a_new_task(stream) -> None:
    strategy = train(memo(stream), stream, 2)
    head = strategy.model.head.weight.detach().clone()
    step = strategy.declare_step(batch_size=4, input_shape=(1, 8, 8), classes=6)
    assert step.classes == 6 and step.open_classes == (0, 1, 2, 3)
    assert step.state["head.weight"].shape == (6, 192) and torch.equal(step.state["head.weight"][:4, :128], head)
    assert step.state["aux.weight"].shape == (3, 64)
    assert {name.split(".")[2] for name in step.state if name.startswith("backbone.")} == {"2"}
    held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in strategy.model.parameters() if p.requires_grad}


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"specialised": 4}, "specialised: expected 1 to 3 of the 3 stages"),
        ({"alpha_aux": -1.0}, "alpha_aux: expected at least 0, got -1.0"),
        ({"per_class": 0}, "per_class: expected at least 1, got 0"),
        ({"memory_size": 0}, "memory_size: expected at least 1, got 0"),
        ({"classifier": "ncm"}, "classifier: expected head or nme, got 'ncm'"),
        ({"budget_reference": "wa"}, "budget_reference: expected none or der, got 'wa'"),
        ({"budget_covers": "all"}, "budget_covers: expected exemplars or model, got 'all'"),
        ({"budget_covers": "model"}, "budget_covers: 'model' needs a memory_budget, got none"),
        ({"per_class": 3, "memory_budget": "1MB"}, "memory_budget, per_class and budget_reference: expected at most"),
        ({"per_class": 3, "budget_reference": "der"}, "expected at most one, got several"),
        ({"memory_budget": "64 sheep"}, "memory_budget: expected bytes such as"),
        ({"specialized": 1}, "did you mean 'specialised'"),
    ],
)
def test_mistakes_get_one_line(stream, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        memo(stream, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_a_backbone_is_refused() -> None:
    for name in ("memo", "der_expand"):
        with pytest.raises(ContlearnError, match=f"{name}: expected a model of contlearn.models"):
            strategies.create(name, torch.nn.Linear(3, 3))
