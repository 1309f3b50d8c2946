"""Properties of the stratified split."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.splits import stratified_split, take

LABELS = st.lists(st.integers(2, 12), min_size=1, max_size=8).flatmap(
    lambda sizes: st.permutations([label for label, size in enumerate(sizes) for _ in range(size)])
)
SHARES = st.floats(0.01, 0.99)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, test_share=SHARES, seed=st.integers(0, 2**32))
def test_a_split_is_disjoint_complete_ordered_and_leaves_no_class_out(
    labels: list[int], test_share: float, seed: int
) -> None:
    train, test = (side.tolist() for side in stratified_split(labels, test_share=test_share, seed=seed))
    assert sorted(train + test) == list(range(len(labels)))
    assert train == sorted(train) and test == sorted(test)
    in_test = Counter(labels[position] for position in test)
    for label, size in Counter(labels).items():
        assert 1 <= in_test[label] <= size - 1
        assert abs(in_test[label] - size * test_share) < 1 or in_test[label] in (1, size - 1)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(20, 60), min_size=1, max_size=20), test_share=st.floats(0.1, 0.9))
def test_the_test_set_has_the_share_exactly_when_classes_are_large(sizes: list[int], test_share: float) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    _, test = stratified_split(labels, test_share=test_share, seed=0)
    assert len(test) == round(sum(sizes) * test_share)


def test_the_seed_decides() -> None:
    labels = [0] * 30 + [1] * 30
    first, again, other = (stratified_split(labels, test_share=0.3, seed=seed)[1].tolist() for seed in (4, 4, 5))
    assert first == again != other


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    stratified_split([0, 0, 1, 1], test_share=0.5, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_a_class_with_one_image_cannot_be_split() -> None:
    with pytest.raises(ContlearnError, match="class 7 has a single image"):
        stratified_split([1, 7, 1], test_share=0.2, seed=0)


def test_consecutive_positions_are_taken_without_a_copy() -> None:
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1)
    view = take(images, torch.tensor([2, 3, 4]))
    assert view.flatten().tolist() == [2, 3, 4] and view.data_ptr() == images[2].data_ptr()
    assert take(images, torch.tensor([0, 2, 5])).flatten().tolist() == [0, 2, 5]
