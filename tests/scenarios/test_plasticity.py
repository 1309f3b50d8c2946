"""Streams of relabelled and permuted images: what changes, what stays, and that nothing is copied."""

from __future__ import annotations

import pytest
import torch

from contlearn import models, run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.scenarios.domains import permute_pixels
from contlearn.strategies.loader import BatchLoader, BatchSource


def labels_of(experience) -> list[int]:
    return [y for _, y, _ in experience.dataset]


def batch_of(dataset) -> list[torch.Tensor]:
    source = BatchSource(dataset)
    assert source.batched
    return source.batch(torch.arange(len(source)))


def test_random_labels_are_drawn_anew_for_the_same_images(made_up, rows) -> None:
    data = made_up(classes=5, per_class=60)
    stream = scenarios.label_reshuffle(data, n_experiences=3, seed=4)
    drawn = []
    for train, test in zip(stream.train_stream, stream.test_stream, strict=True):
        assert rows(data, "train", train.dataset) == rows(data, "train", test.dataset) == list(range(300))
        assert labels_of(train) == labels_of(test) == list(train.dataset.targets)
        assert train.classes_in_this_experience == test.classes_in_this_experience == set(range(5))
        drawn.append(torch.tensor(labels_of(train)))
    for left, right in ((drawn[0], drawn[1]), (drawn[1], drawn[2]), (drawn[0], data.train_targets)):
        assert 0.1 < float((left == right).float().mean()) < 0.3  # chance is 0.2
    assert all(int(one.bincount(minlength=5).min()) > 35 for one in drawn)
    again = scenarios.label_reshuffle(data, n_experiences=3, seed=4)
    assert [labels_of(e) for e in again.train_stream] == [one.tolist() for one in drawn]
    other = scenarios.label_reshuffle(data, n_experiences=3, seed=5)
    assert labels_of(other.train_stream[0]) != drawn[0].tolist()


def test_permuted_classes_change_places_on_both_parts_alike(made_up, rows) -> None:
    data = made_up(classes=6)
    stream = scenarios.label_reshuffle(data, n_experiences=4, labels="permuted", seed=1)
    orders = []
    for train, test in zip(stream.train_stream, stream.test_stream, strict=True):
        found = rows(data, "train", train.dataset)
        order = {int(data.train_targets[row]): label for row, label in zip(found, labels_of(train), strict=True)}
        assert sorted(order.values()) == list(range(6))
        for experience, part, targets in ((train, "train", data.train_targets), (test, "test", data.test_targets)):
            mine = rows(data, part, experience.dataset)
            assert sorted(mine) == list(range(len(targets)))
            assert labels_of(experience) == [order[int(targets[row])] for row in mine]
        orders.append(tuple(order[c] for c in range(6)))
    assert len(set(orders)) == 4


def test_all_classes_are_there_from_the_start_even_those_no_image_was_given(made_up) -> None:
    stream = scenarios.label_reshuffle(made_up(classes=20), n_experiences=2, samples=4)
    for experience in (*stream.train_stream, *stream.test_stream):
        assert len(experience.dataset) == 4 and len(set(labels_of(experience))) < 20
        assert experience.classes_in_this_experience == set(range(20)) and experience.future_classes == set()
    first, second = (experience.dataset for experience in stream.train_stream)
    assert torch.equal(batch_of(first)[0], batch_of(second)[0])


@pytest.mark.parametrize("name", ["label_reshuffle", "input_permutation"])
def test_the_images_are_held_once(made_up, name) -> None:
    data = made_up(channels=3)
    stream = scenarios.create(name, dataset=data, n_experiences=5)
    storages = set()
    for experience in stream.train_stream:
        (leaf,) = BatchSource(experience.dataset)._fast.leaves
        images = getattr(leaf.images, "images", leaf.images)
        storages.add(images.untyped_storage().data_ptr())
    assert storages == {data.train_images.untyped_storage().data_ptr()}


def test_pixels_are_permuted_alike_in_batches_and_sample_by_sample(made_up) -> None:
    data = made_up(channels=2, mean=(0.4, 0.5), std=(0.2, 0.3))
    stream = scenarios.input_permutation(data, n_experiences=3, seed=2)
    plain = scenarios.domain_incremental(data, n_experiences=1, domains="instances")
    generator = torch.Generator().manual_seed(2)
    orders = [torch.randperm(36, generator=generator) for _ in range(3)]
    assert not any(torch.equal(order, torch.arange(36)) for order in orders)  # the first one included
    for part, raw, targets in (
        ("train", data.train_images, data.train_targets), ("test", data.test_images, data.test_targets),
    ):  # fmt: skip
        unpermuted = torch.stack([x for x, *_ in plain.streams[part][0].dataset.eval()])
        if part == "train":
            assert len(unpermuted) == len(raw)
        for experience, order in zip(stream.streams[part], orders, strict=True):
            x, y, t = batch_of(experience.dataset)
            assert torch.equal(y, targets) and not t.any()
            one_by_one = torch.stack([x for x, *_ in experience.dataset])
            assert torch.equal(x, one_by_one)
            expected = permute_pixels(raw, order) / 255
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
            torch.testing.assert_close(x, (expected - mean) / std)


def test_a_memory_of_many_permutations_is_still_read_in_batches(made_up) -> None:
    """Exemplars of several experiences: each keeps its own permutation, also in the copy the loader makes."""
    data = made_up()
    stream = scenarios.input_permutation(data, n_experiences=3, seed=2, augment="none")
    parts = [experience.dataset.subset([4 * i, 4 * i + 1]) for i, experience in enumerate(stream.train_stream)]
    memory = parts[0].concat(parts[1]).concat(parts[2])
    x, y, _ = batch_of(memory)
    one_by_one = [memory[i] for i in range(6)]
    assert torch.equal(x, torch.stack([sample[0] for sample in one_by_one]))
    assert y.tolist() == [sample[1] for sample in one_by_one] == data.train_targets[[0, 1, 4, 5, 8, 9]].tolist()
    loader = BatchLoader(BatchSource(memory), batch_size=4)
    assert torch.equal(torch.cat([batch[0] for batch in loader]), x)


def test_whole_runs_with_a_memory_on_either_stream(made_up) -> None:
    for name in ("label_reshuffle", "input_permutation"):
        stream = scenarios.create(name, dataset=made_up(per_class=4), n_experiences=3)
        model = models.create("mlp", stream, seed=0, hidden=8)
        strategy = strategies.create("replay", model, memory_size=6, lr=0.1, batch_size=8, device="cpu")
        results = run(strategy, stream, quiet=True).results
        assert len(results["accuracy_matrix"]) == 3 and model.head.out_features == 6
        assert results["memory"]["replay"] > 0


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("label_reshuffle", {"labels": "shuffled"}, "labels: expected random or permuted, got 'shuffled'"),
        ("label_reshuffle", {"n_experiences": 0}, "n_experiences: expected at least 1, got 0"),
        ("label_reshuffle", {"samples": 0}, "samples: expected at least 1, got 0"),
        ("input_permutation", {"samples": 49}, "samples: expected at most the 48 training images, got 49"),
        ("input_permutation", {"sample": 4}, "did you mean 'samples'"),
    ],
)
def test_mistakes_get_one_line(made_up, name, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        scenarios.create(name, dataset=made_up(), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
