"""Memories: herding by brute force, shares and sizes, uniform reservoirs, logits beside exemplars."""

from __future__ import annotations

import collections
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from contlearn import scenarios
from contlearn.errors import ContlearnError
from contlearn.flatdata import flatten
from contlearn.strategies.loader import BatchSource
from contlearn.strategies.memories import (
    HerdingBuffer,
    LogitMemory,
    feature_extractor,
    herd,
    outputs_of,
    storage_policy,
)

POLICIES = ("reservoir", "class_balanced", "experience_balanced", "herding")


def agent(model, **more) -> SimpleNamespace:
    return SimpleNamespace(model=model, device=torch.device("cpu"), **more)


def greedy(features: torch.Tensor, count: int) -> list[int]:
    """Algorithm 4 word by word: each time the sample that brings the mean of the chosen nearest to the mean of all."""
    features = features.double()
    chosen: list[int] = []
    while len(chosen) < min(count, len(features)):
        distances = {
            candidate: float((features.mean(0) - features[[*chosen, candidate]].mean(0)).norm())
            for candidate in range(len(features))
            if candidate not in chosen
        }
        chosen.append(min(distances, key=distances.__getitem__))
    return chosen


# ---------------------------------------------------------------- herding


@given(st.integers(3, 12), st.integers(2, 5), st.integers(0, 15), st.integers(0, 10_000))
def test_herding_is_the_greedy_choice(samples, dimensions, count, seed) -> None:
    features = torch.randn(samples, dimensions, generator=torch.Generator().manual_seed(seed))
    chosen = herd(features, count)
    assert chosen == greedy(features, count)
    assert chosen == herd(features, samples)[: len(chosen)]


def test_herding_takes_equal_samples_one_after_the_other() -> None:
    assert herd(torch.ones(4, 3), 3) == [0, 1, 2]
    assert herd(torch.tensor([[1.0], [-1.0]]), 5) == [0, 1]


def of_class(experience, label: int) -> list[int]:
    return [position for position, target in enumerate(experience.dataset.targets) if target == label]


def evaluated_features(model, dataset) -> torch.Tensor:
    """L2-normalised features in evaluation mode, computed one image at a time."""
    training = model.training
    model.eval()
    with torch.no_grad():
        rows = torch.cat([model.features(image[None]) for image, *_ in dataset.eval()])
    model.train(training)
    return rows / rows.norm(dim=1, keepdim=True)


def test_a_class_is_herded_once_and_then_loses_its_last_exemplars(stream, small, identify) -> None:
    model = small(stream, dropout=0.5)
    places = identify(stream, "eval")
    memory = HerdingBuffer(13)
    order: dict[int, list[tuple[int, int]]] = {}
    for index, experience in enumerate(stream.train_stream):
        for label in sorted(experience.classes_in_this_experience):
            mine = of_class(experience, label)
            chosen = greedy(evaluated_features(model, experience.dataset.subset(mine)), len(mine))
            order[label] = [(index, mine[position]) for position in chosen]
        model.train()
        memory.post_adapt(agent(model), experience)
        assert all(module.training for module in model.modules())
        with torch.no_grad():  # the model moves on; what was chosen stays
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        shares = [13 // len(order) + (rank < 13 % len(order)) for rank in range(len(order))]
        for (label, group), share in zip(memory.buffer_groups.items(), shares, strict=True):
            found = places(torch.stack([image for image, *_ in group.buffer.eval()]))
            assert found == order[label][:share]


def test_a_class_that_returns_is_herded_from_old_exemplars_and_new_data(made_up, small, identify) -> None:
    stream = scenarios.domain_incremental(made_up(classes=3), n_experiences=2, domains="instances")
    model, places, memory = small(stream), identify(stream, "eval"), HerdingBuffer(7)
    first, second = stream.train_stream
    memory.post_adapt(agent(model), first)
    kept = {label: group.buffer for label, group in memory.buffer_groups.items()}
    memory.post_adapt(agent(model), second)
    for (label, group), share in zip(memory.buffer_groups.items(), (3, 2, 2), strict=True):
        candidates = kept[label].concat(second.dataset.subset(of_class(second, label)))
        chosen = greedy(evaluated_features(model, candidates), share)
        expected = places(torch.stack([candidates.eval()[position][0] for position in chosen]))
        assert places(torch.stack([image for image, *_ in group.buffer.eval()])) == expected


def test_features_come_from_the_model_in_evaluation_mode(stream, small) -> None:
    model = small(stream, dropout=0.5)
    model.head.eval()
    modes = [module.training for module in model.modules()]
    data = stream.train_stream[0].dataset
    outputs = outputs_of(model.features, data, device=torch.device("cpu"), batch_size=5)
    assert not outputs.requires_grad and [module.training for module in model.modules()] == modes
    torch.testing.assert_close(nn.functional.normalize(outputs, dim=1), evaluated_features(model, data))


def test_a_model_without_features_is_refused() -> None:
    with pytest.raises(ContlearnError, match=r"features\(x\) method .*, got Linear"):
        feature_extractor(nn.Linear(2, 2))


# ---------------------------------------------------------------- shares and sizes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("memory_size", [1, 5, 14, 30, 1000])
def test_a_memory_never_exceeds_its_size_and_fills_it(stream, small, policy, memory_size) -> None:
    memory, model = storage_policy(policy, memory_size), small(stream)
    for count, experience in enumerate(stream.train_stream, start=1):
        memory.post_adapt(agent(model), experience)
        assert len(memory.buffer) == min(memory_size, 16 * count)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_shares_are_equal(stream, small, policy) -> None:
    memory, model = storage_policy(policy, 16), small(stream)
    for count, experience in enumerate(stream.train_stream, start=1):
        memory.post_adapt(agent(model), experience)
        labels = collections.Counter(memory.buffer.targets)
        if policy == "experience_balanced":
            found = collections.Counter(label // 2 for label in memory.buffer.targets)
            assert len(found) == count
        else:
            found = labels
            assert len(found) == 2 * count
        assert max(found.values()) - min(found.values()) <= 1


def test_the_reservoir_is_a_uniform_sample_of_all_seen(made_up, identify) -> None:
    stream = scenarios.class_incremental(made_up(classes=4, per_class=5), n_experiences=4)
    places = identify(stream, "eval")
    torch.manual_seed(0)
    runs, counts = 200, collections.Counter()
    for _ in range(runs):
        memory = storage_policy("reservoir", 5)
        for experience in stream.train_stream:
            memory.post_adapt(None, experience)
        found = places(BatchSource(memory.buffer.eval()).batch(torch.arange(5))[0])
        assert len(set(found)) == 5
        counts.update(found)
    # Each of 20 samples is kept with probability 1/4: 50 times, standard deviation 6.1; five of them around it.
    assert len(counts) == 20 and all(50 - 31 < count < 50 + 31 for count in counts.values())
    by_experience = collections.Counter(index for index, _ in counts.elements())
    assert all(250 - 70 < count < 250 + 70 for count in by_experience.values())


@pytest.mark.parametrize(
    ("policy", "memory_size", "said"),
    [
        ("reservoir", 0, "memory_size: expected at least 1, got 0"),
        ("herding", -3, "memory_size: expected at least 1, got -3"),
        ("balanced", 9, "policy: expected reservoir, class_balanced, experience_balanced or herding, got 'balanced'"),
    ],
)
def test_memories_that_cannot_be_get_one_line(policy, memory_size, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        storage_policy(policy, memory_size)
    assert str(caught.value) == said


# ---------------------------------------------------------------- logits


def test_exemplars_keep_the_logits_of_the_model_that_stored_them(stream, small) -> None:
    model = small(stream, head="fixed", dropout=0.5)
    memory, table = LogitMemory(10), {}
    for width, experience in zip((2, 4, 6), stream.train_stream, strict=True):
        model.eval()
        with torch.no_grad():
            for image, *_ in experience.dataset.eval():
                table[bytes(image.numpy().tobytes())] = model(image[None])[0, :width]
        model.train()
        memory.post_adapt(agent(model, output_width=width), experience)
        with torch.no_grad():
            model.head.weight.mul_(-1.5)
    assert [len(group.buffer) for group in memory.buffer_groups.values()] == [2, 2, 2, 2, 1, 1]
    buffer = memory.buffer.eval()
    batch = BatchSource(buffer).batch(torch.arange(10))
    assert len(batch) == 4 and batch[3].shape == (10, 6)
    for image, label, logits in zip(batch[0], batch[1], batch[3], strict=True):
        stored = table[bytes(image.numpy().tobytes())]
        assert len(stored) == 2 * (int(label) // 2 + 1)
        torch.testing.assert_close(logits[: len(stored)], stored)
        assert logits[len(stored) :].isnan().all()


def test_logits_of_samples_that_were_not_kept_are_not_kept_either(stream, small) -> None:
    memory, model = LogitMemory(7), small(stream, head="fixed")
    for experience in stream.train_stream:
        memory.post_adapt(agent(model, output_width=6), experience)
    for group in memory.buffer_groups.values():
        leaves, *_ = flatten(group.buffer.logits.data)
        assert sum(len(leaf) for leaf in leaves) == len(group.buffer)
