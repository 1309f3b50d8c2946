"""Online streams (pieces of a class-incremental stream) and Si-blurry streams (classes that leak)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contlearn import scenarios
from contlearn.errors import ContlearnError

# The fixtures make or search data sets and keep nothing from one example to the next.
TWENTY = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


# ---------------------------------------------------------------- online


@TWENTY
@given(size=st.integers(1, 40), boundaries=st.booleans(), seed=st.integers(0, 9))
def test_online_pieces_partition_their_origin_in_turn(made_up, rows, size, boundaries, seed) -> None:
    data = made_up(classes=6, per_class=5)
    stream = scenarios.online(data, n_experiences=3, experience_size=size, access_task_boundaries=boundaries, seed=seed)
    pieces = list(stream.train_stream)
    origins = []
    for piece in pieces:
        if not any(piece.origin_experience is origin for origin in origins):
            origins.append(piece.origin_experience)
    assert len(origins) == 3 and [piece.current_experience for piece in pieces] == list(range(len(pieces)))
    position = 0
    for origin in origins:
        count = -(-10 // size)
        mine, position = pieces[position : position + count], position + count
        assert all(piece.origin_experience is origin for piece in mine)
        assert [len(piece.dataset) for piece in mine] == [*[size] * (count - 1), 10 - size * (count - 1)]
        assert [piece.is_first_subexp for piece in mine] == [True, *[False] * (count - 1)]
        assert [piece.is_last_subexp for piece in mine] == [*[False] * (count - 1), True]
        assert {piece.sub_stream_length for piece in mine} == {count}
        assert {piece.access_task_boundaries for piece in mine} == {boundaries}
        found = [row for piece in mine for row in rows(data, "train", piece.dataset)]
        assert sorted(found) == sorted(rows(data, "train", origin.dataset))
    assert position == len(pieces)


def test_online_pieces_know_their_own_classes_and_those_before(made_up) -> None:
    stream = scenarios.online(made_up(classes=6, per_class=5), n_experiences=2, experience_size=4)
    seen: set[int] = set()
    for piece in stream.train_stream:
        assert piece.classes_in_this_experience == set(piece.dataset.targets)
        assert piece.previous_classes == seen
        seen |= piece.classes_in_this_experience
        assert piece.classes_seen_so_far == seen and piece.future_classes == set(range(6)) - seen
    assert stream.classes_per_experience == [[0, 1, 2], [3, 4, 5]]


def test_online_pieces_are_shuffled_by_the_seed(made_up, rows) -> None:
    data = made_up(classes=4, per_class=10)
    orders = [
        [
            row
            for piece in scenarios.online(data, n_experiences=1, experience_size=4, seed=seed).train_stream
            for row in rows(data, "train", piece.dataset)
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2] and orders[0] != sorted(orders[0])


# ---------------------------------------------------------------- blurry


def homes(stream) -> dict[int, int]:
    """Home experience of each label: where it is tested."""
    return {label: index for index, classes in enumerate(stream.classes_per_experience) for label in classes}


@TWENTY
@given(
    experiences=st.integers(1, 6),
    disjoint=st.floats(0, 1),
    leaking=st.floats(0, 1),
    stochastic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blurry_experiences_partition_the_data_and_none_is_left_empty(
    made_up, rows, experiences, disjoint, leaking, stochastic, seed
) -> None:
    data = made_up(classes=6, per_class=5)
    stream = scenarios.blurry(
        data,
        n_experiences=experiences,
        disjoint_ratio=disjoint,
        blurry_ratio=leaking,
        stochastic=stochastic,
        seed=seed,
    )
    parts = [rows(data, "train", experience.dataset) for experience in stream.train_stream]
    assert sorted(itertools.chain(*parts)) == list(range(30)) and all(parts)
    assert len(stream.classes_per_experience) == experiences and all(stream.classes_per_experience)
    home = homes(stream)
    spread = {label for i, e in enumerate(stream.train_stream) for label in e.dataset.targets if home[label] != i}
    assert len(spread) <= 6 - round(6 * disjoint)
    if leaking < 0.1:  # less than half a sample of the five
        assert not spread


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("disjoint_ratio", "n_disjoint"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_disjoint_classes_stay_home_and_a_share_of_the_others_leaks(
    made_up, disjoint_ratio, n_disjoint, stochastic
) -> None:
    data = made_up(classes=8, per_class=40)
    stream = scenarios.blurry(
        data, n_experiences=4, disjoint_ratio=disjoint_ratio, blurry_ratio=0.3, stochastic=stochastic, seed=1
    )
    home = homes(stream)
    away = torch.zeros(8, dtype=torch.int64)
    for index, experience in enumerate(stream.train_stream):
        for label in experience.dataset.targets:
            away[label] += home[label] != index
    assert int((away > 0).sum()) == 8 - n_disjoint
    # Of a blurry class 0.3 * 40 = 12 samples are pooled; those that chance sends home again do not leak.
    assert int(away.max()) <= 12
    pooled = 12 * (8 - n_disjoint)
    if not stochastic:  # even shares: three quarters of the pool go elsewhere
        assert pooled / 2 <= int(away.sum()) <= pooled


def test_even_shares_give_every_experience_as_much_of_the_pool(made_up, rows) -> None:
    data = made_up(classes=8, per_class=40)
    options = {"n_experiences": 4, "disjoint_ratio": 0.0, "stochastic": False, "seed": 2}
    sizes = [
        [len(experience.dataset) for experience in scenarios.blurry(data, blurry_ratio=ratio, **options).train_stream]
        for ratio in (0.0, 0.5)
    ]
    at_home = [size // 2 for size in sizes[0]]
    assert [size - home for size, home in zip(sizes[1], at_home, strict=True)] == [40] * 4


def test_a_class_with_all_samples_leaking_keeps_one(made_up) -> None:
    stream = scenarios.blurry(
        made_up(classes=3, per_class=1), n_experiences=3, disjoint_ratio=0.0, blurry_ratio=1.0, seed=0
    )
    assert [list(experience.dataset.targets) for experience in stream.train_stream] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"disjoint_ratio": 1.1}, "disjoint_ratio: expected a share in 0..1, got 1.1"),
        ({"blurry_ratio": -0.1}, "blurry_ratio: expected a share in 0..1, got -0.1"),
        ({"blurry_ratio": float("nan")}, "blurry_ratio"),
        ({"n_experiences": 7}, "n_experiences: expected 1..6"),
        ({"n_experiences": 0}, "n_experiences: expected 1..6"),
    ],
)
def test_blurry_mistakes_get_one_line(made_up, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        scenarios.blurry(made_up(classes=6), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
