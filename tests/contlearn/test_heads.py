"""Heads that follow the stream: what they keep, what they add, and what they refuse to learn at test time."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline, with_task_labels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
from avalanche.models.utils import avalanche_model_adaptation
from avalanche.training.supervised import LwF, Naive
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.models import Classifier, GrowingHead, TaskClassifier, TaskHead
from contlearn.models._task_head import MASKED


def experience(*classes, task=0):
    return SimpleNamespace(classes_in_this_experience=list(classes), task_labels=[task])


def stream_spec(task_labels=False):
    return SimpleNamespace(input_shape=(1, 2, 3), n_classes=6, task_labels=task_labels)


def toy_benchmark(task_labels=False):
    """Six classes of 1x2x3 images, two per experience, each class bright at its own pixel."""
    y = torch.arange(6).repeat_interleave(8)
    x = F.one_hot(y, 6).float().view(-1, 1, 2, 3) + 0.05 * torch.randn(48, 1, 2, 3)
    data_sets = []
    for step in range(3):
        mine = slice(16 * step, 16 * step + 16)
        tasks = TaskLabels([step * task_labels] * 16)
        targets = DataAttribute(y[mine].tolist(), "targets")
        samples = torch.utils.data.TensorDataset(x[mine], y[mine])
        data_sets.append(TaskAwareSupervisedClassificationDataset([samples], data_attributes=[targets, tasks]))
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(train=data_sets, test=data_sets)))


def strategy(kind, model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return kind(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=5,
        eval_mb_size=48,
        evaluator=None,
        **options,
    )


# GrowingHead


def test_a_head_without_classes_gives_empty_logits():
    assert GrowingHead(5)(torch.randn(3, 5)).shape == (3, 0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, 11), min_size=1), min_size=1, max_size=5), st.integers(1, 7))
def test_growth_follows_the_highest_label_and_keeps_old_rows_bit_for_bit(experiences, in_features):
    head, features, highest = GrowingHead(in_features), torch.randn(4, in_features), -1
    for classes in experiences:
        weight, bias, logits = head.weight.clone(), head.bias.clone(), head(features)
        head.adaptation(experience(*classes))
        highest = max(highest, *classes)
        assert head.out_features == highest + 1 == head(features).shape[1]
        assert torch.equal(head.weight[: len(weight)], weight)
        assert torch.equal(head.bias[: len(bias)], bias)
        torch.testing.assert_close(head(features)[:, : logits.shape[1]], logits)


def test_new_rows_start_like_a_linear_layer():
    head = GrowingHead(100)
    torch.manual_seed(3)
    head.grow(50)
    torch.manual_seed(3)
    reference = nn.Linear(100, 50)
    assert torch.equal(head.weight, reference.weight)
    assert torch.equal(head.bias, reference.bias)


def test_growth_keeps_dtype_and_frozen_rows_frozen():
    head = GrowingHead(3, 2).to(torch.float64)
    head.weight.requires_grad_(False)
    head.grow(4)
    assert head.weight.dtype == head.bias.dtype == torch.float64
    assert not head.weight.requires_grad
    assert head.bias.requires_grad


def test_evaluation_does_not_grow_a_head():
    head = GrowingHead(3, 2).eval()
    before = head.weight
    head.adaptation(experience(7))
    assert head.weight is before


def test_avalanche_grows_the_head_and_trains_the_new_rows():
    torch.manual_seed(0)
    model = models.create("mlp", stream_spec(), seed=0, hidden=32, dropout=0.0)
    runner, benchmark = strategy(Naive, model), toy_benchmark()
    for step, train in enumerate(benchmark.train_stream):
        runner.train(train)
        assert model.head.out_features == 2 * step + 2
        x, y = next(iter(torch.utils.data.DataLoader(train.dataset, batch_size=16)))[:2]
        model.eval()
        assert (model(x).argmax(1) == y).all()
        runner.eval(benchmark.test_stream[: step + 1])
        assert model.head.out_features == 2 * step + 2


def test_an_optimizer_moves_rows_that_came_later():
    model = models.create("mlp", stream_spec(), seed=0)
    runner, benchmark = strategy(Naive, model), toy_benchmark()
    runner.train(benchmark.train_stream[0])
    avalanche_model_adaptation(model.train(), benchmark.train_stream[1])
    grown = model.head.weight.detach().clone()
    runner.train(benchmark.train_stream[1])
    assert not torch.equal(model.head.weight[2:], grown[2:])
    assert any(model.head.weight is p for group in runner.optimizer.param_groups for p in group["params"])


def test_a_new_model_takes_up_a_checkpoint_of_any_size(tmp_path):
    old = models.create("mlp", stream_spec(), seed=0).eval()
    old.head.grow(5)
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    new = models.create("mlp", stream_spec(), seed=1).eval()
    new.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(4, 1, 2, 3)
    assert torch.equal(new(x), old(x))


def test_a_checkpoint_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        GrowingHead(4).load_state_dict(GrowingHead(5, 2).state_dict())


# TaskHead and TaskClassifier


def two_task_head():
    head = TaskHead(4)
    head.adaptation(experience(0, 1, task=0))
    head.adaptation(experience(2, 3, task=1))
    return head


def test_logits_outside_the_samples_task_are_masked_and_the_others_are_linear():
    head, features = two_task_head(), torch.randn(3, 4)
    logits = head(features, torch.tensor([0, 1, 0]))
    plain = F.linear(features, head.weight, head.bias)
    expected = torch.full((3, 4), MASKED)
    expected[0, :2], expected[1, 2:], expected[2, :2] = plain[0, :2], plain[1, 2:], plain[2, :2]
    assert torch.equal(logits, expected)
    assert torch.equal(head(features, 1), head(features, torch.tensor([1, 1, 1])))
    assert torch.equal(head(features), plain)


@pytest.mark.parametrize("task", [5, torch.tensor([5, 5, 5])], ids=["int", "tensor"])
def test_a_task_never_trained_has_no_classes(task):
    assert (two_task_head()(torch.randn(3, 4), task) == MASKED).all()
    assert TaskHead(4)(torch.randn(3, 4), task).shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masked_classes_stay_finite_and_take_no_part_in_a_softmax(dtype):
    logits = two_task_head().to(dtype)(torch.randn(3, 4, dtype=dtype), 1)
    assert logits.isfinite().all()
    assert torch.equal(torch.softmax(logits.float() / 4, 1)[:, :2], torch.zeros(3, 2))
    assert F.cross_entropy(logits.float(), torch.zeros(3, dtype=torch.long)).isfinite()


def test_no_gradient_reaches_rows_of_another_task():
    head = two_task_head()
    F.cross_entropy(head(torch.randn(3, 4), 1), torch.tensor([2, 3, 2])).backward()
    assert head.weight.grad is not None
    assert (head.weight.grad[:2] == 0).all()
    assert (head.weight.grad[2:] != 0).any()


def test_a_class_may_belong_to_several_tasks():
    head = TaskHead(4)
    for task in (0, 1):
        head.adaptation(experience(0, 1, task=task))
    features = torch.randn(3, 4)
    assert torch.equal(head(features, 0), head(features, 1))
    assert head.known_tasks == [0, 1]


def test_evaluation_teaches_neither_classes_nor_tasks():
    model = models.create("mlp", stream_spec(task_labels=True))
    avalanche_model_adaptation(model, experience(0, 1, task=0))
    avalanche_model_adaptation(model.eval(), experience(4, 5, task=2))
    assert model.head.out_features == model.max_class_label == 2
    assert model.known_train_tasks_labels == {0} == set(model.head.known_tasks)


def test_an_experience_that_mixes_tasks_needs_a_data_set():
    mixed = SimpleNamespace(classes_in_this_experience=[0, 1], task_labels=[0, 1])
    with pytest.raises(ContlearnError, match="mixes the tasks"):
        TaskHead(4).adaptation(mixed)


def test_a_data_set_of_mixed_tasks_enters_each_class_under_its_own():
    first, second, _ = (e.dataset for e in toy_benchmark(task_labels=True).train_stream)
    joint = SimpleNamespace(classes_in_this_experience=[0, 1, 2, 3], task_labels=[0, 1], dataset=first.concat(second))
    head = TaskHead(4)
    head.adaptation(joint)
    assert head.task_classes.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_without_task_labels_a_task_classifier_gives_every_known_task():
    model = models.create("mlp", stream_spec(task_labels=True)).eval()
    assert isinstance(model, TaskClassifier)
    x = torch.randn(3, 1, 2, 3)
    assert model(x) == {}
    for classes, task in (((0, 1), 0), ((2, 3), 4)):
        avalanche_model_adaptation(model.train(), experience(*classes, task=task))
    outputs = model.eval()(x)
    assert sorted(outputs) == [0, 4]
    for task, logits in outputs.items():
        assert torch.equal(logits, model(x, torch.full((3,), task)))
        assert torch.equal(logits, model.forward_single_task(x, task))


def test_avalanches_lwf_runs_on_a_task_classifier():
    torch.manual_seed(0)
    model = models.create("mlp", stream_spec(task_labels=True), seed=0, hidden=32, dropout=0.0)
    runner, benchmark = strategy(LwF, model, alpha=1.0, temperature=2.0), toy_benchmark(task_labels=True)
    for train in benchmark.train_stream:
        runner.train(train)
    assert runner.loss.isfinite()
    model.eval()
    for task, test in enumerate(benchmark.test_stream):
        x, y = next(iter(torch.utils.data.DataLoader(test.dataset, batch_size=16)))[:2]
        assert (model(x, task).argmax(1) == y).all()


def test_a_task_classifier_is_restored_from_its_tensors_alone(tmp_path):
    old = models.create("mlp", stream_spec(task_labels=True), seed=0).eval()
    for classes, task in (((0, 1), 0), ((2, 3), 3)):
        avalanche_model_adaptation(old.train(), experience(*classes, task=task))
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    new = models.create("mlp", stream_spec(task_labels=True), seed=1)
    new.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x, tasks = torch.randn(3, 1, 2, 3), torch.tensor([0, 3, 3])
    assert torch.equal(new.eval()(x, tasks), old.eval()(x, tasks))
    assert new.known_train_tasks_labels == old.known_train_tasks_labels == {0, 3}
    assert new.max_class_label == old.max_class_label == 4


def test_a_teacher_copy_does_not_grow_with_the_student():
    student = models.create("mlp", stream_spec(task_labels=True))
    avalanche_model_adaptation(student, experience(0, 1, task=0))
    teacher = copy.deepcopy(student).eval()
    avalanche_model_adaptation(student, experience(2, 3, task=1))
    assert (teacher.head.out_features, student.head.out_features) == (2, 4)
    assert teacher.known_train_tasks_labels == {0}


# The choice of a head


@pytest.mark.parametrize(
    ("head", "task_labels", "model_type", "head_type", "outputs"),
    [
        ("auto", False, Classifier, GrowingHead, 0),
        ("auto", True, TaskClassifier, TaskHead, 0),
        ("growing", True, Classifier, GrowingHead, 0),
        ("task", False, TaskClassifier, TaskHead, 0),
        ("fixed", True, Classifier, nn.Linear, 6),
    ],
)
def test_the_head_follows_the_stream_unless_asked_for(head, task_labels, model_type, head_type, outputs):
    model = models.create("mlp", stream_spec(task_labels), head=head)
    assert type(model) is model_type
    assert type(model.head) is head_type
    assert model.head.out_features == outputs


def test_an_unknown_head_is_refused_with_the_nearest():
    with pytest.raises(ContlearnError, match=r"unknown head 'fixd'; did you mean 'fixed'\?"):
        models.create("mlp", stream_spec(), head="fixd")
