"""Domain-incremental streams: rotation, permutation, instances, and the sessions a data set comes with."""

from __future__ import annotations

import pytest
import torch

from contlearn import scenarios
from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import ImageData
from contlearn.scenarios.domains import permute_pixels, rotate


def raw(experience) -> torch.Tensor:
    return torch.stack([(x * 255).round().to(torch.uint8) for x, *_ in experience.dataset.eval()])


def test_rotation_turns_counter_clockwise_and_half_a_turn_flips_both_axes(made_up) -> None:
    images = made_up(channels=3).train_images
    assert rotate(images, 0.0) is images
    assert torch.equal(rotate(images, 180.0), images.flip(-1, -2))
    assert torch.equal(rotate(images, 90.0), images.rot90(1, (-2, -1)))
    turned = rotate(images, 45.0)
    assert turned.dtype == torch.uint8 and int(turned[..., 0, 0].max()) == 0  # the corners come from outside


def test_rotation_goes_in_even_steps_to_the_largest_angle(made_up) -> None:
    data = made_up()
    stream = scenarios.domain_incremental(data, n_experiences=3, domains="rotation", max_rotation=180.0)
    for part, images, targets in (
        (stream.train_stream, data.train_images, data.train_targets),
        (stream.test_stream, data.test_images, data.test_targets),
    ):
        for experience, turns in zip(part, (0, 1, 2), strict=True):
            assert torch.equal(raw(experience), images.rot90(turns, (-2, -1)))
            assert list(experience.dataset.targets) == targets.tolist()
            assert experience.classes_in_this_experience == set(range(6))
    only = scenarios.domain_incremental(data, n_experiences=1, domains="rotation", max_rotation=90.0)
    assert torch.equal(raw(only.train_stream[0]), data.train_images)


def test_permutation_moves_the_pixels_of_all_images_alike(made_up) -> None:
    made = made_up(channels=2)
    counted = torch.arange(36, dtype=torch.uint8).view(1, 6, 6).expand(2, 6, 6)  # each pixel says where it was
    data = ImageData(
        name="counted",
        train_images=torch.cat([counted[None], made.train_images[1:]]),
        test_images=made.test_images,
        train_targets=made.train_targets,
        test_targets=made.test_targets,
        class_names=made.class_names,
    )
    stream = scenarios.domain_incremental(data, n_experiences=4, domains="permutation", seed=7)
    orders = []
    for train, test in zip(stream.train_stream, stream.test_stream, strict=True):
        order = raw(train)[0, 0].flatten().tolist()
        assert sorted(order) == list(range(36))
        for experience, images in ((train, data.train_images), (test, data.test_images)):
            assert torch.equal(raw(experience).flatten(2), images.flatten(2)[:, :, order])
        orders.append(tuple(order))
    assert orders[0] == tuple(range(36)) and len(set(orders)) == 4
    again = scenarios.domain_incremental(data, n_experiences=4, domains="permutation", seed=7)
    assert torch.equal(raw(again.train_stream[3]), raw(stream.train_stream[3]))


def test_permuting_back_gives_the_image(made_up) -> None:
    images = made_up(channels=3).train_images
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permute_pixels(permute_pixels(images, order), order.argsort()), images)


def test_instances_are_shared_out_evenly_and_tested_on_all_data(made_up, rows) -> None:
    data = made_up(classes=5, per_class=7)
    stream = scenarios.domain_incremental(data, n_experiences=4, domains="instances", seed=3)
    assert sorted(len(experience.dataset) for experience in stream.train_stream) == [8, 9, 9, 9]
    for experience in stream.test_stream:
        assert rows(data, "test", experience.dataset) == list(range(15))
    parts = [rows(data, "train", experience.dataset) for experience in stream.train_stream]
    again = scenarios.domain_incremental(data, n_experiences=4, domains="instances", seed=3)
    assert parts == [rows(data, "train", experience.dataset) for experience in again.train_stream]


def with_domains(made_up, train: list[int], test: list[int]) -> ImageData:
    """Four classes; sample ``i`` of each part is in domain ``i % len(...)`` of the given list."""
    counts = 32, 12
    ids = [torch.tensor([part[i % len(part)] for i in range(n)]) for part, n in zip((train, test), counts, strict=True)]
    return made_up(
        classes=4,
        train_domains=ids[0],
        test_domains=ids[1],
        domain_names=tuple(f"session {number}" for number in range(4)),
    )


def test_sessions_are_the_data_sets_own_domains(made_up, rows) -> None:
    data = with_domains(made_up, [0, 1, 2], [0, 1, 2])
    stream = scenarios.domain_incremental(data, domains="auto", n_experiences=99)
    assert len(stream.train_stream) == len(stream.test_stream) == 3
    for number, (train, test) in enumerate(zip(stream.train_stream, stream.test_stream, strict=True)):
        assert rows(data, "train", train.dataset) == [i for i in range(32) if i % 3 == number]
        assert rows(data, "test", test.dataset) == [i for i in range(12) if i % 3 == number]


def test_sessions_held_out_for_testing_test_every_experience(made_up, rows) -> None:
    data = with_domains(made_up, [0, 2], [1, 3])
    stream = scenarios.domain_incremental(data, domains="sessions")
    assert [len(experience.dataset) for experience in stream.train_stream] == [16, 16]
    for experience in stream.test_stream:
        assert rows(data, "test", experience.dataset) == list(range(12))


def test_classes_missing_from_the_first_session_get_the_later_labels(made_up, rows) -> None:
    made = made_up(classes=4)
    late = made.train_targets < 2
    data = made_up(
        classes=4,
        train_domains=late.long(),
        test_domains=(made.test_targets < 2).long(),
        domain_names=("first", "second"),
    )
    stream = scenarios.domain_incremental(data)
    assert stream.original_classes == (2, 3, 0, 1) and stream.class_names[0] == "class 2"
    assert [sorted(e.classes_in_this_experience) for e in stream.train_stream] == [[0, 1], [2, 3]]
    for part, name, targets in (
        (stream.train_stream, "train", data.train_targets),
        (stream.test_stream, "test", data.test_targets),
    ):
        for experience in part:
            mine = rows(data, name, experience.dataset)
            assert [stream.original_classes[y] for y in experience.dataset.targets] == targets[mine].tolist()


def test_auto_is_rotation_for_a_data_set_without_domains(made_up) -> None:
    data = made_up()
    stream = scenarios.domain_incremental(data, n_experiences=2)
    assert torch.equal(raw(stream.train_stream[1]), data.train_images.flip(-1, -2))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"domains": "sessions"}, "'made_up' has no domains"),
        ({"domains": "rotations"}, "got 'rotations'"),
        ({"domains": "instances", "n_experiences": 50}, "only 48 training images"),
        ({"n_experiences": 0}, "n_experiences: expected at least 1, got 0"),
        ({"max_rotations": 90.0}, "did you mean 'max_rotation'"),
    ],
)
def test_domain_mistakes_get_one_line(made_up, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        scenarios.domain_incremental(made_up(), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
