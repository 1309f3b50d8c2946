"""Class- and task-incremental streams: who gets which sample, under which label, and what Avalanche is told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contlearn import scenarios
from contlearn.errors import ContlearnError
from contlearn.scenarios.source import order_of_appearance, relabel, split_classes

CLASSWISE = ("class_incremental", "task_incremental")
SPLITTING = (*CLASSWISE, "online", "blurry", "instances")


def create(name, data, **options):
    if name == "instances":
        return scenarios.domain_incremental(data, domains="instances", **options)
    return scenarios.create(name, dataset=data, **options)


@pytest.mark.parametrize("name", SPLITTING)
def test_every_training_sample_is_in_exactly_one_experience_under_its_own_class(made_up, rows, name) -> None:
    data = made_up(classes=7)
    stream = create(name, data, n_experiences=3, seed=5)
    found = []
    for experience in stream.train_stream:
        mine = rows(data, "train", experience.dataset)
        labels = list(experience.dataset.targets)
        assert [stream.original_classes[label] for label in labels] == data.train_targets[mine].tolist()
        assert [y for _, y, *_ in experience.dataset] == labels
        found += mine
    assert sorted(found) == list(range(len(data.train_targets)))


@pytest.mark.parametrize("name", [*CLASSWISE, "online", "blurry"])
def test_test_experiences_share_out_the_test_data_by_class(made_up, rows, name) -> None:
    data = made_up(classes=7)
    stream = create(name, data, n_experiences=3, seed=5)
    found = []
    for experience, classes in zip(stream.test_stream, stream.classes_per_experience, strict=True):
        mine = rows(data, "test", experience.dataset)
        labels = list(experience.dataset.targets)
        assert [stream.original_classes[label] for label in labels] == data.test_targets[mine].tolist()
        assert sorted(set(labels)) == classes == sorted(experience.classes_in_this_experience)
        found += mine
    assert sorted(found) == list(range(len(data.test_targets)))
    assert sorted(itertools.chain(*stream.classes_per_experience)) == list(range(7))


@pytest.mark.parametrize("name", SPLITTING)
@pytest.mark.parametrize("seed", range(3))
def test_labels_count_up_in_order_of_first_appearance(made_up, name, seed) -> None:
    data = made_up(classes=7, per_class=3)
    options = {} if name in ("blurry", "instances") else {"class_order": "random"}
    stream = create(name, data, n_experiences=4, seed=seed, **options)
    highest = -1
    for experience in stream.train_stream:
        labels = sorted(set(experience.dataset.targets))
        new = [label for label in labels if label > highest]
        assert new == list(range(highest + 1, highest + 1 + len(new)))
        highest = max(highest, *labels)
    assert highest + 1 == stream.n_classes == 7
    assert sorted(stream.original_classes) == list(range(7))
    assert stream.class_names == tuple(f"class {original}" for original in stream.original_classes)


@given(st.integers(1, 40), st.integers(1, 40), st.none() | st.integers(-1, 41))
def test_classes_are_shared_out_as_evenly_as_can_be(classes, experiences, initial) -> None:
    try:
        sizes = split_classes(classes, experiences, initial)
    except ContlearnError:
        possible = experiences <= classes and (
            initial is None or (initial == classes if experiences == 1 else 1 <= initial <= classes - (experiences - 1))
        )
        assert not possible
        return
    assert sum(sizes) == classes and len(sizes) == experiences and min(sizes) >= 1
    even = sizes if initial is None else sizes[1:]
    assert initial is None or sizes[0] == initial
    assert even == sorted(even, reverse=True) and (not even or max(even) - min(even) <= 1)


def test_initial_classes_make_the_first_experience_larger(made_up) -> None:
    stream = scenarios.class_incremental(made_up(classes=7), n_experiences=3, initial_classes=4)
    assert stream.classes_per_experience == [[0, 1, 2, 3], [4, 5], [6]]


def test_class_order_can_be_natural_random_or_given(made_up) -> None:
    data = made_up(classes=6)
    orders = [
        scenarios.class_incremental(data, n_experiences=3, class_order=order, seed=seed).original_classes
        for order, seed in (("natural", 3), ("random", 3), ("random", 3), ("random", 4), ([5, 3, 1, 0, 2, 4], 3))
    ]
    assert orders[0] == (0, 1, 2, 3, 4, 5)
    assert orders[1] == orders[2] and len({orders[0], orders[1], orders[3]}) == 3
    assert orders[4] == (5, 3, 1, 0, 2, 4)
    array = scenarios.class_incremental(data, n_experiences=3, class_order=np.array([5, 3, 1, 0, 2, 4]))
    assert array.original_classes == orders[4] and array.spec["class_order"] == [5, 3, 1, 0, 2, 4]


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=30))
def test_relabelling_gives_each_class_its_place_in_the_order(order, targets) -> None:
    assert relabel(torch.tensor(targets, dtype=torch.int64), order).tolist() == [order.index(c) for c in targets]


def test_order_of_appearance_is_by_experience_then_home_then_class() -> None:
    targets = torch.tensor([4, 0, 4, 2, 3, 0, 1])
    parts = [torch.tensor([0, 3]), torch.tensor([1, 2, 4]), torch.tensor([5, 6])]
    assert order_of_appearance(targets, parts) == [2, 4, 0, 3, 1]
    assert order_of_appearance(targets, parts, home=torch.tensor([2, 2, 1, 1, 0])) == [4, 2, 3, 0, 1]


def test_avalanche_reads_classes_and_tasks_off_the_experiences(made_up) -> None:
    stream = scenarios.task_incremental(made_up(classes=6), n_experiences=3)
    for part, name in ((stream.train_stream, "train"), (stream.test_stream, "test")):
        for index, experience in enumerate(part):
            now, before = {2 * index, 2 * index + 1}, set(range(2 * index))
            assert set(experience.classes_in_this_experience) == now
            assert experience.previous_classes == before
            assert experience.classes_seen_so_far == before | now
            assert experience.future_classes == set(range(6)) - before - now
            assert (experience.task_labels, experience.task_label) == ([index], index)
            assert set(experience.dataset.targets_task_labels) == {index}
            assert {t for _, _, t in experience.dataset} == {index}
            assert (experience.current_experience, experience.origin_stream.name) == (index, name)
    assert stream.task_labels and (stream.kind, stream.input_shape) == ("task_incremental", (1, 6, 6))


def test_without_task_ids_all_samples_belong_to_task_0(made_up) -> None:
    for name in SPLITTING:
        if name == "task_incremental":
            continue
        stream = create(name, made_up(), n_experiences=3)
        assert not stream.task_labels
        for experience in [*stream.train_stream, *stream.test_stream]:
            assert experience.task_labels == [0] and set(experience.dataset.targets_task_labels) == {0}


def test_only_training_batches_are_augmented(made_up) -> None:
    data = made_up(mean=(0.5,), std=(0.25,))
    stream = scenarios.class_incremental(data, n_experiences=2, transform=lambda image: 255 - image)
    train, test = stream.train_stream[0].dataset, stream.test_stream[0].dataset
    plain = (data.train_images[data.train_targets < 3] / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.stack([x for x, *_ in train.eval()]), plain)
    torch.testing.assert_close(torch.stack([x for x, *_ in train.train()]), -plain)
    for group in (test.train(), test.eval()):
        expected = (data.test_images[data.test_targets < 3] / 255 - 0.5) / 0.25
        torch.testing.assert_close(torch.stack([x for x, *_ in group]), expected)


def test_normalisation_can_be_left_out(made_up) -> None:
    data = made_up(mean=(0.5,), std=(0.25,))
    stream = scenarios.class_incremental(data, n_experiences=1, normalise=False)
    assert torch.equal(stream.train_stream[0].dataset.eval()[3][0], data.train_images[3] / 255)


OPTIONS = {
    "class_incremental": {"n_experiences": 4, "initial_classes": 4, "class_order": "random", "seed": 3},
    "task_incremental": {"class_order": (9, 8, 7, 6, 5, 4, 3, 2, 1, 0), "augment": "flip"},
    "domain_incremental": {"domains": "permutation", "n_experiences": 2, "seed": 1},
    "online": {"experience_size": 200, "n_experiences": 2, "access_task_boundaries": True},
    "blurry": {"disjoint_ratio": 0.3, "blurry_ratio": 0.2, "stochastic": False, "seed": 2},
    "label_reshuffle": {"n_experiences": 3, "samples": 40, "labels": "permuted", "seed": 2},
    "input_permutation": {"n_experiences": 2, "samples": 40, "seed": 1},
    "transfer": {"samples": 60, "test_samples": 30, "seed": 2},
    "corruptions": {
        "dataset": "digits", "corruptions": ("fog", "snow"), "order": "dirichlet", "samples": 50, "seed": 4,
    },
}


@pytest.mark.parametrize("name", scenarios.list())
def test_the_spec_is_plain_data_and_makes_the_same_stream_again(contents, name) -> None:
    stream = scenarios.create(name, **OPTIONS[name])
    stored = json.loads(json.dumps(stream.spec))
    assert stored["name"] == name and {key: stored[key] for key in ("dataset", "seed")}.items() <= stored.items()
    again = scenarios.create(**stored)
    assert again.spec == stream.spec and again.original_classes == stream.original_classes
    for first, second in zip(contents(stream), contents(again), strict=True):
        assert torch.equal(first[0], second[0]) and first[1:] == second[1:]


def test_another_seed_makes_another_stream(contents) -> None:
    for name, options in (("blurry", {}), ("online", {}), ("domain_incremental", {"domains": "permutation"})):
        first, second = (
            contents(scenarios.create(name, n_experiences=2, seed=seed, **options))[0][0] for seed in (0, 1)
        )
        assert first.shape != second.shape or not torch.equal(first, second)


def test_the_spec_keeps_whole_paths(tmp_path: Path) -> None:
    stream = scenarios.class_incremental("digits", root=tmp_path / "data")
    assert stream.spec["root"] == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("class_incremental", {"n_experiences": 7}, "at most 6"),
        ("task_incremental", {"n_experiences": 0}, "n_experiences: expected at least 1, got 0"),
        ("class_incremental", {"n_experiences": 3, "initial_classes": 5}, "initial_classes: expected 1..4"),
        ("class_incremental", {"n_experiences": 1, "initial_classes": 5}, "initial_classes: expected 6..6"),
        ("class_incremental", {"class_order": [0, 1, 2]}, "class_order"),
        ("class_incremental", {"class_order": [0, 1, 2, 3, 4, 4]}, "each class 0..5 exactly once"),
        ("class_incremental", {"class_order": [1, 2, 3, 4, 5, 6]}, "each class 0..5 exactly once"),
        ("class_incremental", {"class_order": "alphabetical"}, "'alphabetical'"),
        ("class_incremental", {"augment": "flop"}, "did you mean 'flip'"),
        ("class_incremental", {"n_experience": 3}, "did you mean 'n_experiences'"),
        ("online", {"experience_sise": 3}, "did you mean 'experience_size'"),
        ("online", {"experience_size": 0}, "experience_size: expected at least 1"),
        ("online", {"n_experiences": 7}, "at most 6"),
    ],
)
def test_mistakes_get_one_line_that_names_what_was_expected(made_up, name, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        scenarios.create(name, dataset=made_up(classes=6), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ContlearnError, match="did you mean 'class_incremental'"):
        scenarios.create("class_incrmental")
    with pytest.raises(ContlearnError, match="did you mean 'digits'"):
        scenarios.class_incremental("digit")
    with pytest.raises(AttributeError, match="no attribute 'class_incrmental'"):
        scenarios.class_incrmental  # noqa: B018


def test_the_list_tells_every_scenario_and_its_source() -> None:
    assert scenarios.list() == list(OPTIONS) and scenarios.list("*_incremental") == scenarios.list()[:3]
    for name in scenarios.list():
        record = scenarios.describe(name)
        assert record.name == name and record.description and record.source


def test_functions_stay_reachable_after_their_modules_were_imported() -> None:
    for name in scenarios.list():
        function = scenarios.describe(name).load()
        assert getattr(scenarios, name) is function
