"""Batched loading: the samples Avalanche's per-sample indexing gives, each once, from a position that can be kept."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings

import pytest
import torch
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute, TaskLabels
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.transform_groups import DefaultTransformGroups, TransformGroups
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from contlearn import scenarios
from contlearn.flatdata import leaf_ids
from contlearn.scenarios.datasets import ImageData
from contlearn.scenarios.stream import ImageTensors
from contlearn.scenarios.transforms import BatchTransform, Normalise
from contlearn.strategies import loader as module
from contlearn.strategies.loader import BatchLoader, BatchSource, CyclingSampler, ReplayLoader

FORTY = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FORTY, max_examples=150)


# ---------------------------------------------------------------- batches against samples


@functools.cache
def bases() -> list[AvalancheDataset]:
    """Experiences of two streams of different images; the training transforms differ, also from that of evaluation."""
    found = []
    for seed, invert in ((0, lambda image: 255 - image), (1, lambda image: image // 2)):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (24, 1, 2, 2), generator=generator, dtype=torch.uint8)
        data = ImageData(
            name=f"data {seed}",
            train_images=images,
            test_images=images[:8].clone(),
            train_targets=torch.arange(24) % 4,
            test_targets=torch.arange(8) % 4,
            class_names=("a", "b", "c", "d"),
        )
        stream = scenarios.task_incremental(data, n_experiences=2, transform=invert)
        found += [experience.dataset for experience in [*stream.train_stream, *stream.test_stream]]
        found += [e.dataset for e in scenarios.domain_incremental(data, n_experiences=2).train_stream]
    return found


TREES = st.recursive(
    st.integers(0, 11).map(lambda index: ("base", index)),
    lambda below: st.one_of(
        st.tuples(st.just("subset"), below, st.lists(st.integers(0, 999), max_size=12)),
        st.tuples(st.just("concat"), below, below),
        st.tuples(st.just("train"), below),
        st.tuples(st.just("eval"), below),
    ),
    max_leaves=6,
)


def build(tree) -> AvalancheDataset:
    kind, first, *rest = tree
    if kind == "base":
        return bases()[first]
    data = build(first)
    if kind == "subset":
        return data.subset([index % len(data) for index in rest[0]] if len(data) else [])
    if kind == "concat":
        return data.concat(build(rest[0]))
    return data.train() if kind == "train" else data.eval()


def assert_batch_is(batch, samples) -> None:
    """A batch holds the samples' parts in order; rows that are shorter than their column end in NaN."""
    for column, values in zip(batch, zip(*samples, strict=True), strict=True):
        for row, value in zip(column, values, strict=True):
            value = torch.as_tensor(value)
            if value.dim() == 1 and len(value) < len(row):
                assert row[len(value) :].isnan().all()
                row = row[: len(value)]
            assert torch.equal(row, value)


@MANY
@given(tree=TREES, order=st.randoms(use_true_random=False))
def test_any_nest_of_data_sets_gives_the_samples_avalanche_gives(tree, order) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Avalanche's, about groups that differ
        data = build(tree)
    source = BatchSource(data)
    positions = list(range(len(data)))
    order.shuffle(positions)
    if positions:
        assert_batch_is(source.batch(torch.tensor(positions)), [data[position] for position in positions])
    assert len(source) == len(data)


def test_data_sets_of_one_stream_are_gathered_as_tensors(stream) -> None:
    data = stream.train_stream[0].dataset
    later = stream.train_stream[1].dataset
    for one in (data, data.eval(), data.subset([3, 1]), data.concat(later), data.subset([1]).concat(later).eval()):
        assert BatchSource(one).batched


@FORTY
@given(st.lists(st.integers(0, 47), min_size=1, max_size=20), st.sampled_from(["train", "eval"]))
def test_experiences_with_images_of_their_own_are_gathered_together(positions, group) -> None:
    first, second = bases()[4:6]  # two rotations of the same images
    both = first.concat(second).with_transforms(group)
    source = BatchSource(both)
    assert source.batched and len(leaf_ids(both)[0]) == 2 and not torch.equal(first[0][0], second[0][0])
    assert_batch_is(source.batch(torch.tensor(positions)), [both[position] for position in positions])


def test_the_leaves_of_a_nest_are_its_stored_samples(stream) -> None:
    first, second = (experience.dataset for experience in list(stream.train_stream)[:2])
    leaves, leaf_of, place_of = leaf_ids(second.subset([5, 0]).concat(first).subset([0, 2, 1]))
    assert len(leaves) == 1 and leaf_of.tolist() == [0, 0, 0]
    expected = torch.stack([second[5][0], first[0][0], second[0][0]])
    torch.testing.assert_close(1 - leaves[0].images[place_of] / 255, expected)


@pytest.mark.parametrize("group", ["train", "eval"])
def test_extra_attributes_follow_their_samples(stream, group) -> None:
    data = stream.train_stream[0].dataset.with_transforms(group)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2 + index % 3, generator=generator) for index in range(len(data))]
    weights = [index / 4 for index in range(len(data))]
    flags = [index % 2 == 0 for index in range(len(data))]
    annotated = type(data)(
        [data],
        data_attributes=[
            DataAttribute(rows, "logits", use_in_getitem=True),
            DataAttribute(weights, "weight", use_in_getitem=True),
            DataAttribute(flags, "flag", use_in_getitem=True),
            DataAttribute(["kept out of batches"] * len(data), "note"),
        ],
    )
    nested = annotated.subset([7, 2, 3]).concat(annotated.subset([0, 15])).subset([4, 0, 3, 2, 1])
    source = BatchSource(nested)
    positions = torch.tensor([3, 0, 4, 1])
    batch = source.batch(positions)
    assert source.batched and len(batch) == 6
    assert_batch_is(batch, [nested[int(position)] for position in positions])


def per_sample(image: torch.Tensor) -> torch.Tensor:
    return image * 2 - 1


class Halved(Dataset):
    """A user's data set with the same attributes as ours and work of its own in ``__getitem__``."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index] / 2, int(self.targets[index])


def foreign(kind: str) -> AvalancheDataset:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(9, 1, 2, 2, generator=generator), torch.arange(9) % 3
    attributes = [DataAttribute(targets.tolist(), "targets"), TaskLabels([0] * 9)]
    if kind == "tensors":
        leaf: Dataset = TensorDataset(images, targets)
        groups = TransformGroups({"train": (per_sample, None), "eval": None})
    elif kind == "same attributes":
        leaf, groups = Halved(images, targets), None
    elif kind == "one transform for all groups":
        leaf, groups = ImageTensors(images, targets), DefaultTransformGroups(per_sample)
    else:
        leaf = ImageTensors(images, targets)
        groups = TransformGroups({"train": (BatchTransform(Normalise(2.0)), lambda label: 2 - label), "eval": None})
    return TaskAwareSupervisedClassificationDataset([leaf], data_attributes=attributes, transform_groups=groups)


@pytest.mark.parametrize(
    "kind", ["tensors", "same attributes", "one transform for all groups", "a transform of the labels"]
)
def test_other_data_sets_and_transforms_are_read_sample_by_sample(kind) -> None:
    data = foreign(kind)
    assert not BatchSource(data).batched
    for group in (data, data.eval(), data.subset([4, 2, 8]), data.subset([1]).concat(data)):
        positions = torch.arange(len(group)).flip(0)
        assert_batch_is(BatchSource(group).batch(positions), [group[int(position)] for position in positions])
        served = list(BatchLoader(BatchSource(group), batch_size=4))
        assert torch.equal(torch.cat([x for x, *_ in served]), torch.stack([x for x, *_ in group]))


# ---------------------------------------------------------------- passes


class Positions:
    """A source whose batches are the positions themselves."""

    def __init__(self, count: int) -> None:
        self.count, self.sample_bytes = count, 8

    def __len__(self) -> int:
        return self.count

    def raw(self, positions: torch.Tensor) -> list[torch.Tensor]:
        return [positions.clone(), positions * 10]

    def finish(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
        return batch

    def batch(self, positions: torch.Tensor) -> list[torch.Tensor]:
        return self.finish(self.raw(positions))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def served(batches) -> list[list[int]]:
    return [x.tolist() for x, *_ in batches]


def chained(lists) -> list[int]:
    return list(itertools.chain(*lists))


@FORTY
@given(
    count=st.integers(0, 40),
    size=st.integers(1, 50),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    chunk=st.integers(1, 400),
)
def test_a_pass_serves_every_sample_once(monkeypatch, count, size, shuffle, drop_last, chunk) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    batches = BatchLoader(
        Positions(count), batch_size=size, shuffle=shuffle, drop_last=drop_last, generator=seeded(count)
    )
    for _ in range(2):
        found = list(batches)
        assert len(found) == len(batches)
        assert all(torch.equal(y, x * 10) for x, y in found)
        sizes, flat = [len(x) for x, _ in found], chained(served(found))
        whole, rest = divmod(count, size)
        assert sizes == [size] * whole + ([rest] if rest and not drop_last else [])
        assert len(set(flat)) == len(flat) and set(flat) <= set(range(count))
        if not shuffle:
            assert flat == list(range(len(flat)))


def test_the_generator_alone_decides_the_order() -> None:
    first, second = (BatchLoader(Positions(30), batch_size=7, shuffle=True, generator=seeded(3)) for _ in range(2))
    torch.manual_seed(1)
    passes = [served(first), served(first)]
    torch.manual_seed(2)
    assert passes == [served(second), served(second)]
    assert passes[0] != passes[1] and chained(passes[0]) != list(range(30))


@FORTY
@given(stop=st.integers(0, 8), chunk=st.integers(1, 400))
def test_a_stored_position_continues_with_the_batches_that_were_left(monkeypatch, stop, chunk) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    original = BatchLoader(Positions(30), batch_size=4, shuffle=True, generator=seeded(5))
    running = iter(original)
    before = [next(running) for _ in range(stop)]
    state = copy.deepcopy(original.state_dict())
    generator_state = original.generator.get_state()
    resumed = BatchLoader(Positions(30), batch_size=4, shuffle=True, generator=seeded(99))
    resumed.load_state_dict(state)
    resumed.generator.set_state(generator_state)
    rest = served(running)
    assert served(resumed) == rest
    assert sorted(chained(served(before) + rest)) == list(range(30))
    assert served(resumed) == served(original)  # and so the next pass


def test_leaving_a_pass_early_starts_a_new_one() -> None:
    batches = BatchLoader(Positions(10), batch_size=3, shuffle=False)
    next(iter(batches))
    assert served(batches) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


@FORTY
@given(count=st.integers(1, 20), size=st.integers(1, 30), partial=st.booleans())
def test_the_memory_is_served_in_shuffled_passes_without_end(count, size, partial) -> None:
    sampler = CyclingSampler(Positions(count), batch_size=size, generator=seeded(1), partial=partial)
    per_pass = -(-count // sampler.batch_size) if partial else count // sampler.batch_size
    orders = []
    for _ in range(3):
        batches = served(sampler.next() for _ in range(per_pass))
        flat = chained(batches)
        assert {len(batch) for batch in batches[:-1]} <= {min(size, count)}
        assert partial or len(batches[-1]) == min(size, count)
        assert len(set(flat)) == len(flat) and (not partial or len(flat) == count)
        orders.append(flat)
    if count > 10:
        assert orders[0] != orders[1]


def test_a_stored_sampler_continues_its_pass() -> None:
    sampler = CyclingSampler(Positions(10), batch_size=3, generator=seeded(1))
    sampler.next(), sampler.next()
    other = CyclingSampler(Positions(10), batch_size=3, generator=seeded(8))
    other.load_state_dict(copy.deepcopy(sampler.state_dict()))
    other.generator.set_state(sampler.generator.get_state())
    expected = served(sampler.next() for _ in range(5))
    assert served(other.next() for _ in range(5)) == expected


def replaying() -> ReplayLoader:
    current = BatchLoader(Positions(8), batch_size=3, shuffle=True, generator=seeded(1))
    return ReplayLoader(current, CyclingSampler(Positions(5), batch_size=2, generator=seeded(2)))


def test_each_batch_is_followed_by_one_from_memory() -> None:
    found = served(replaying())
    apart = replaying()
    memory = served(apart.memory.next() for _ in range(3))
    assert found == [now + old for now, old in zip(served(apart.current), memory, strict=True)]
    assert len(apart) == 3 and sorted(found[0][:3] + found[1][:3] + found[2][:2]) == list(range(8))


def test_a_stored_replay_loader_continues_both_parts() -> None:
    original, resumed = replaying(), replaying()
    running = iter(original)
    next(running)
    resumed.load_state_dict(copy.deepcopy(original.state_dict()))
    resumed.memory.generator.set_state(original.memory.generator.get_state())
    assert served(resumed) == served(running)
