"""Views: every image its own crop, mirror and colours, against torchvision's functions; draws from one generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from contlearn.errors import ContlearnError
from contlearn.scenarios.augment import Views, jittered
from contlearn.scenarios.transforms import RandomCrop, RandomFlip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, height: int = 8, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=generator(seed))


PLAIN = {"crop": 0, "flip": False, "jitter": 0.0, "grayscale": 0.0}


def test_without_steps_views_are_repetitions_in_order() -> None:
    images = pictures(3)
    assert torch.equal(Views(3, generator=generator(), **PLAIN)(images), torch.cat([images] * 3))


def test_views_of_an_image_differ_and_images_are_left_alone() -> None:
    images = pictures(6)
    before = images.clone()
    views = Views(2, generator=generator())(images)
    assert views.shape == (12, 3, 8, 8) and torch.equal(images, before)
    assert not any(torch.equal(views[i], views[6 + i]) for i in range(6))


def test_draws_come_from_the_generator_alone() -> None:
    images = pictures(5)
    torch.manual_seed(1)
    held = torch.get_rng_state()
    first = Views(2, generator=generator(3))(images)
    assert torch.equal(torch.get_rng_state(), held)
    torch.manual_seed(2)
    assert torch.equal(Views(2, generator=generator(3))(images), first)
    assert not torch.equal(Views(2, generator=generator(4))(images), first)


@given(seed=st.integers(0, 99), channels=st.integers(1, 3))
def test_crops_fill_with_black_of_each_channel(seed, channels) -> None:
    views = Views(1, generator=generator(seed), **{**PLAIN, "crop": 2})
    views.black = tuple(-1.5 - channel for channel in range(channels))
    images = pictures(4, channels, 5, 7, seed)
    found = views(images)
    padded = torch.tensor(views.black).view(-1, 1, 1).expand(channels, 9, 11)
    for image, result in zip(images, found, strict=True):
        whole = padded.clone()
        whole[:, 2:7, 2:9] = image
        assert sum(torch.equal(whole[:, t : t + 5, x : x + 7], result) for t in range(5) for x in range(5)) == 1


@pytest.mark.parametrize(("side", "padding"), [(32, 4), (84, 10), (8, 1), (4, 0)])
def test_a_crop_moves_by_an_eighth_of_the_side(side, padding) -> None:
    count = 400
    image = torch.zeros(1, 1, side, side)
    image[..., side // 2, side // 2] = 1.0
    found = Views(1, generator=generator(), flip=False)(image.expand(count, -1, -1, -1))
    rows = found.sum((1, 3)).argmax(1) - side // 2
    assert (int(rows.min()), int(rows.max())) == (-padding, padding)


def test_flips_are_drawn_per_image_from_a_generator() -> None:
    images = pictures(200, 1)
    found = RandomFlip(generator())(images)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(found, images, strict=True)]
    assert 60 < sum(mirrored) < 140
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, found, images, strict=True))


def test_a_crop_of_bytes_pads_with_zero_as_before() -> None:
    images = torch.randint(1, 256, (3, 2, 4, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    first = RandomCrop(2)(images)
    torch.manual_seed(0)
    assert torch.equal(RandomCrop(2, fill=(0.0, 0.0))(images), first) and first.dtype == torch.uint8


@given(seed=st.integers(0, 10**4), order=st.permutations([0, 1, 2]))
def test_jitter_is_torchvisions_with_each_images_own_factors(seed, order) -> None:
    images = pictures(4, seed=seed)
    factors = 0.6 + 0.8 * torch.rand(3, 4, 1, 1, 1, generator=generator(seed + 1))
    steps = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    found = jittered(images, factors, order)
    for i, image in enumerate(images):
        for which in order:
            image = steps[which](image, float(factors[which, i]))
        torch.testing.assert_close(found[i], image, rtol=1e-4, atol=1e-5)


def test_normalised_images_are_coloured_as_their_pixels_are() -> None:
    pixels = pictures(16)
    black, white = torch.tensor([-2.0, -1.8, -1.5]), torch.tensor([2.2, 2.4, 2.6])
    scale = (white - black).view(-1, 1, 1)
    plain, normalised = (Views(2, generator=generator(5), crop=0) for _ in range(2))
    normalised.black, normalised.white = tuple(black.tolist()), tuple(white.tolist())
    expected = plain(pixels) * scale + black.view(-1, 1, 1)
    torch.testing.assert_close(normalised(pixels * scale + black.view(-1, 1, 1)), expected, rtol=1e-4, atol=1e-5)


def test_probabilities_of_colour_are_kept() -> None:
    images = pictures(500)
    gray = Views(1, generator=generator(), **{**PLAIN, "grayscale": 0.2})(images)
    share = torch.tensor([torch.equal(g[0], g[1]) and torch.equal(g[1], g[2]) for g in gray]).float().mean()
    assert 0.14 < share < 0.26
    changed = Views(1, generator=generator(), **{**PLAIN, "jitter": 0.8})(images)
    share = ((changed - images).abs().amax((1, 2, 3)) > 1e-3).float().mean()
    assert 0.74 < share < 0.86
    assert changed.min() >= -1e-6 and changed.max() <= 1 + 1e-6


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_colours_are_of_three_channels_only(channels) -> None:
    images = pictures(4, channels)
    found = Views(1, generator=generator(), crop=0, flip=False, jitter=1.0, grayscale=1.0)(images)
    assert torch.equal(found, images)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": 0}, "views: expected at least 1, got 0"),
        ({"crop": -1}, "crop: expected at least 0 pixels, got -1"),
        ({"jitter": 1.5}, "jitter: expected a probability from 0 to 1, got 1.5"),
        ({"grayscale": float("nan")}, "grayscale: expected a probability from 0 to 1, got nan"),
    ],
)
def test_mistakes_get_one_line(options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        Views(generator=generator(), **options)
    assert said in str(caught.value)
