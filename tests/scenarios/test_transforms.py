"""Batch transforms: each image draws its own randomness, and one image is a batch of one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from contlearn.errors import ContlearnError
from contlearn.scenarios.transforms import (
    AUGMENTATIONS,
    BatchTransform,
    Normalise,
    PerSample,
    RandomCrop,
    RandomFlip,
    augmentation,
)


def pictures(count: int, channels: int = 2, height: int = 5, width: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


@given(padding=st.integers(0, 3), seed=st.integers(0, 99))
def test_a_crop_is_one_of_the_shifts_of_the_padded_image(padding, seed) -> None:
    torch.manual_seed(seed)
    images = pictures(6, seed=seed)
    cropped = RandomCrop(padding)(images)
    assert cropped.shape == images.shape and cropped.dtype == torch.uint8
    padded = torch.zeros(6, 2, 5 + 2 * padding, 7 + 2 * padding, dtype=torch.uint8)
    padded[:, :, padding : padding + 5, padding : padding + 7] = images
    places = range(2 * padding + 1)
    for image, result in zip(padded, cropped, strict=True):
        shifts = [image[:, top : top + 5, left : left + 7] for top in places for left in places]
        assert sum(torch.equal(shift, result) for shift in shifts) == 1


def test_crops_reach_every_shift_and_differ_within_a_batch() -> None:
    torch.manual_seed(0)
    image = pictures(1)
    found = {bytes(crop.flatten().tolist()) for crop in RandomCrop(1)(image.expand(300, -1, -1, -1))}
    assert len(found) == 9  # each of 9 places is missed by 300 draws once in 10**15 runs


def test_flips_are_drawn_per_image() -> None:
    torch.manual_seed(0)
    images = pictures(200)
    flipped = RandomFlip()(images)
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert bool((mirrored ^ same).all()) and flipped.dtype == torch.uint8
    assert 60 < int(mirrored.sum()) < 140


@given(
    channels=st.integers(1, 3),
    scale=st.sampled_from([16.0, 255.0]),
    mean=st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3),
    std=st.lists(st.floats(0.05, 1.0), min_size=3, max_size=3),
)
def test_normalise_is_torchvisions(channels, scale, mean, std) -> None:
    images = (pictures(4, channels).float() * scale / 255).to(torch.uint8)
    expected = v2.functional.normalize(images / scale, mean[:channels], std[:channels])
    result = Normalise(scale, mean[:channels], std[:channels])(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_normalise_without_statistics_divides_by_the_scale_and_keeps_the_input() -> None:
    images = pictures(3)
    before = images.clone()
    assert torch.equal(Normalise(16.0)(images), before / 16)
    Normalise(255.0, (0.5, 0.5), (0.2, 0.2))(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_one_image_is_a_batch_of_one_and_pixels_stay_uint8_until_normalised(name) -> None:
    steps = augmentation(name, (6, 6))
    images = pictures(5, 3, 6, 6)
    for step in steps:
        images = step(images)
        assert images.dtype == torch.uint8 and images.shape == (5, 3, 6, 6)
    transform = BatchTransform(*steps, Normalise(255.0, (0.5,) * 3, (0.2,) * 3))
    image = pictures(1, 3, 6, 6)
    torch.manual_seed(1)
    alone = transform(image[0])
    torch.manual_seed(1)
    batch = transform(image)
    assert alone.dtype == torch.float32 and alone.shape == (3, 6, 6) and torch.equal(alone, batch[0])


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_every_augmentation_draws_per_image(name) -> None:
    torch.manual_seed(0)
    transform = BatchTransform(*augmentation(name, (6, 6)))
    results = transform(pictures(1, 3, 6, 6).expand(16, -1, -1, -1))
    assert len({bytes(image.flatten().tolist()) for image in results}) > 1


def test_per_sample_calls_the_transform_for_each_image_alone() -> None:
    shapes = []

    def dim(image: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(image.shape))
        return image // len(shapes)

    images = pictures(3)
    result = PerSample(dim)(images)
    assert shapes == [(2, 5, 7)] * 3
    assert torch.equal(result, torch.stack([images[0], images[1] // 2, images[2] // 3]))


def test_an_unknown_augmentation_gets_the_nearest() -> None:
    with pytest.raises(ContlearnError, match="did you mean 'crop_flip'"):
        augmentation("cropflip", (8, 8))
