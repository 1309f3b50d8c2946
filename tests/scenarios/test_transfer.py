"""Transfer: one experience with all classes, or with a few images of each."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contlearn import config, models, run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.scenarios.transfer_stream import evenly


def test_one_experience_holds_every_image_under_its_own_class(made_up, rows) -> None:
    data = made_up(classes=5)
    stream = scenarios.transfer(data)
    assert (len(stream.train_stream), len(stream.test_stream)) == (1, 1)
    assert (stream.kind, stream.n_classes, stream.task_labels) == ("transfer", 5, False)
    assert stream.original_classes == (0, 1, 2, 3, 4) and stream.classes_per_experience == [[0, 1, 2, 3, 4]]
    for part, experience in (("train", stream.train_stream[0]), ("test", stream.test_stream[0])):
        mine = rows(data, part, experience.dataset)
        assert mine == list(range(len(mine))) and len(mine) == len(getattr(data, f"{part}_targets"))
        assert list(experience.dataset.targets) == getattr(data, f"{part}_targets").tolist()


def test_fewer_images_are_drawn_evenly_and_by_seed(made_up, rows) -> None:
    data = made_up(classes=4, per_class=10)
    drawn = []
    for seed in (0, 0, 1):
        stream = scenarios.transfer(data, samples=14, test_samples=4, seed=seed)
        mine = rows(data, "train", stream.train_stream[0].dataset)
        assert len(set(mine)) == 14
        assert sorted(collections.Counter(data.train_targets[mine].tolist()).values()) == [3, 3, 4, 4]
        assert sorted(stream.test_stream[0].dataset.targets) == [0, 1, 2, 3]
        drawn.append(mine)
    assert drawn[0] == drawn[1] != drawn[2]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_no_class_is_two_images_behind_another_that_it_could_match(targets, data) -> None:
    labels = torch.tensor(targets)
    count = data.draw(st.integers(len(set(targets)), len(targets)))
    taken = evenly(labels, count, torch.Generator().manual_seed(0), name="samples")
    assert len(set(taken.tolist())) == count and taken.tolist() == sorted(taken.tolist())
    have, mine = collections.Counter(targets), collections.Counter(labels[taken].tolist())
    most = max(mine.values())
    assert all(mine[label] >= min(size, most - 1) for label, size in have.items())


def test_domains_follow_their_images(made_up) -> None:
    data = made_up(classes=3, per_class=4)
    domains = {
        "train_domains": torch.arange(12) % 2, "test_domains": torch.zeros(9, dtype=torch.int64),
        "domain_names": ("a", "b"),
    }  # fmt: skip
    stream = scenarios.transfer(dataclasses.replace(data, **domains), samples=6)
    assert len(stream.train_stream[0].dataset) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": 3}, "samples: expected 4 (the number of classes) to 32 (that of images), got 3"),
        ({"samples": 33}, "to 32 (that of images), got 33"),
        ({"test_samples": 13}, "test_samples: expected 4 (the number of classes) to 12"),
        ({"sample": 8}, "did you mean 'samples'"),
        ({"n_experiences": 2}, "unknown option of scenario 'transfer' 'n_experiences'"),
    ],
)
def test_mistakes_get_one_line(made_up, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        scenarios.create("transfer", dataset=made_up(classes=4), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_reports_accuracy_and_leaves_comparisons_of_experiences_open(made_up) -> None:
    stream = scenarios.transfer(made_up(classes=4, per_class=6))
    model = models.create("mlp", stream, hidden=8, seed=0)
    result = run(strategies.create("naive", model, epochs=2, lr=0.1, device="cpu"), stream, quiet=True)
    metrics = result.metrics
    assert metrics["final_accuracy"] == metrics["average_accuracy"] == metrics["learning_accuracy"]
    assert metrics["final_accuracy"] == result.accuracy_matrix[0][0]
    for name in ("forgetting", "backward_transfer", "forward_transfer", "global_forgetting"):
        assert metrics[name] is None
    assert model.head.weight.shape == (4, 8)


def test_a_configuration_names_it() -> None:
    scenario = {"name": "transfer", "dataset": "digits", "samples": 30, "test_samples": 20, "augment": "flip"}
    resolved = config.resolve({"scenario": scenario}, ["--scenario.samples=40"])
    stream = config.make_stream(resolved)
    assert len(stream.train_stream[0].dataset) == 40 and len(stream.test_stream[0].dataset) == 20
    assert stream.spec["augment"] == "flip"
