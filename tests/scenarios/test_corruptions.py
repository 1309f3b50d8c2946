"""The 15 corruptions: what each one does to pixels, checked against independent computations."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchvision.transforms.v2 import functional as v2

from contlearn.errors import ContlearnError
from contlearn.scenarios.corruption import CORRUPTIONS, corrupt, grid
from contlearn.scenarios.corruption.__main__ import main
from contlearn.scenarios.corruption.blur import copied_from, disc
from contlearn.scenarios.corruption.draws import Draws
from contlearn.scenarios.corruption.filters import shrunk, smooth
from contlearn.scenarios.corruption.weather import plasma

NAMES = tuple(CORRUPTIONS)
DRAWN_ONCE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}  # nothing random
SEVERITIES = range(1, 6)


def pictures(count: int, channels: int, side: int, *, seed: int = 0, brightest: float = 0.7) -> torch.Tensor:
    """Smooth random pictures with some sharp edges, values 0..brightest."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    fine[..., side // 3 : side // 2, side // 4 : side // 2] *= 0.2
    fine[..., side // 2 : side // 2 + side // 4, side // 2 :] = 1.0
    return (fine * brightest * 255).round().to(torch.uint8)


def flat(value: int, *, count: int = 4, channels: int = 1, side: int = 32) -> torch.Tensor:
    return torch.full((count, channels, side, side), value, dtype=torch.uint8)


def draws(count: int = 1, key: str = "test") -> Draws:
    return Draws(key, range(count), torch.device("cpu"))


# ---------------------------------------------------------------------- all of them


def test_the_table_is_the_official_one() -> None:
    groups = {
        "noise": "gaussian_noise shot_noise impulse_noise",
        "blur": "defocus_blur glass_blur motion_blur zoom_blur",
        "weather": "snow frost fog brightness",
        "digital": "contrast elastic_transform pixelate jpeg_compression",
    }
    assert list(NAMES) == " ".join(groups.values()).split()
    for group, names in groups.items():
        assert [record.name for record in CORRUPTIONS.values() if record.group == group] == names.split()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 32, 64, 70])
def test_an_image_is_corrupted_alike_in_any_batch(name: str, channels: int, side: int) -> None:
    images = pictures(4, channels, side)
    before = images.clone()
    for severity in SEVERITIES if side <= 32 else (1, 5):
        whole = corrupt(images, name, severity=severity, seed=3)
        assert whole.shape == images.shape and whole.dtype == torch.uint8
        assert torch.equal(images, before)
        changed = (whole != images).flatten(1).any(dim=1)
        assert changed.all() or (name == "impulse_noise" and side == 8 and changed.any())  # 1 % of 64 may be none
        some = torch.tensor([3, 1])
        assert torch.equal(corrupt(images[some], name, severity=severity, seed=3, indices=some), whole[some])
        alone = corrupt(images[2:3], name, severity=severity, seed=3, indices=torch.tensor([2]))
        assert torch.equal(alone, whole[2:3])


def test_many_images_are_cut_into_chunks_without_a_trace() -> None:
    images = pictures(9, 3, 224)
    whole = corrupt(images, "impulse_noise")  # more values than are corrupted at once
    alone = corrupt(images[8:], "impulse_noise", indices=torch.tensor([8]))
    assert torch.equal(whole[8:], alone)


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_seed_and_index(name: str) -> None:
    image = pictures(1, 3, 32).expand(3, -1, -1, -1)
    first, other = corrupt(image, name, seed=0), corrupt(image, name, seed=1)
    alike = torch.equal(first, other) and torch.equal(first[0], first[1]) and torch.equal(first[1], first[2])
    assert alike == (name in DRAWN_ONCE)
    if name not in DRAWN_ONCE:
        assert not any(torch.equal(first[i], first[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
        assert not torch.equal(first, other)


# Elastic transforms trade a smaller affine map for stronger local noise; see the test of their own.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "elastic_transform"])
@pytest.mark.parametrize(("side", "scale"), [(32, 255.0), (96, 255.0), (8, 16.0)])
def test_severity_raises_the_mean_distortion(name: str, side: int, scale: float) -> None:
    images = pictures(24 if side < 96 else 10, 3, side, brightest=0.5 * scale / 255)
    if name == "pixelate":  # of smooth pictures, what counts most is where the blocks happen to lie
        images = torch.randint(0, int(scale) + 1, images.shape, generator=torch.Generator().manual_seed(0)).byte()
    distortion = [
        float(((corrupt(images, name, severity=s, scale=scale).float() - images.float()) / scale).square().mean())
        for s in SEVERITIES
    ]
    assert distortion[4] > distortion[0]
    assert np.corrcoef(distortion, SEVERITIES)[0, 1] > (0.2 if name == "glass_blur" else 0.5), distortion


@pytest.mark.parametrize("name", NAMES)
def test_pixel_values_of_another_range_are_corrupted_alike(name: str) -> None:
    images = pictures(4, 1, 8, brightest=16 / 255)
    assert int(images.max()) == 16
    low, high = corrupt(images, name, scale=16.0), corrupt(images * 15, name, scale=240.0)
    assert int(low.max()) <= 16
    # The same result, once rounded to 17 levels and once to 241.
    assert int((low.int() * 15 - high.int()).abs().max()) <= 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "gausian_noise"}, "did you mean 'gaussian_noise'"),
        ({"severity": 0}, "severity: expected a whole number from 1 to 5, got 0"),
        ({"severity": 6}, "got 6"),
        ({"images": torch.zeros(2, 2, 8, 8, dtype=torch.uint8)}, "1 or 3 channels"),
        ({"images": torch.zeros(2, 1, 7, 8, dtype=torch.uint8)}, "at least 8 pixels"),
        ({"images": torch.zeros(2, 1, 8, 8)}, "torch.float32"),
        ({"indices": torch.tensor([1])}, "indices: expected one per image, 2, got 1"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, object], said: str) -> None:
    given = {"images": flat(9, count=2, side=8), "name": "fog", **change}
    with pytest.raises(ContlearnError) as caught:
        corrupt(**given)  # type: ignore[arg-type]
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("side", "severity", "deviation"), [(64, 1, 0.04), (64, 5, 0.10), (96, 1, 0.08), (96, 2, 0.12)]
)
def test_gaussian_noise_has_the_official_deviation(side: int, severity: int, deviation: float) -> None:
    values = corrupt(flat(128, channels=3, side=side), "gaussian_noise", severity=severity).double() / 255
    assert float(values.mean()) == pytest.approx(128 / 255, abs=0.003)
    assert float(values.std()) == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize(("side", "severity", "photons"), [(64, 1, 500), (64, 5, 50), (96, 1, 60)])
def test_shot_noise_has_the_variance_of_a_poisson_count(side: int, severity: int, photons: int) -> None:
    for value in (51, 102):
        values = corrupt(flat(value, channels=3, side=side), "shot_noise", severity=severity).double() / 255
        assert float(values.mean()) == pytest.approx(value / 255, abs=0.003)
        assert float(values.var()) == pytest.approx(value / 255 / photons, rel=0.05)
    assert not corrupt(flat(0), "shot_noise").any()


@pytest.mark.parametrize(("side", "severity", "share"), [(64, 2, 0.02), (64, 5, 0.07), (96, 5, 0.27)])
def test_impulse_noise_turns_a_share_black_or_white(side: int, severity: int, share: float) -> None:
    values = corrupt(flat(100, channels=3, side=side), "impulse_noise", severity=severity)
    assert set(values.unique().tolist()) == {0, 100, 255}
    black, white = (float((values == end).double().mean()) for end in (0, 255))
    assert black == pytest.approx(share / 2, rel=0.12) and white == pytest.approx(share / 2, rel=0.12)


# ---------------------------------------------------------------------- blur


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
@pytest.mark.parametrize("side", [8, 32, 96])
def test_nothing_to_blur_stays(name: str, side: int) -> None:
    for severity in SEVERITIES:
        images = flat(77, count=2, channels=3, side=side)
        assert torch.equal(corrupt(images, name, severity=severity), images)


@pytest.mark.parametrize(
    ("radius", "softness"), [(0.3, 0.4), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1), (3.0, 0.1), (8.0, 0.5), (10.0, 0.5)]
)
def test_a_disc_sums_to_1_and_looks_alike_from_all_sides(radius: float, softness: float) -> None:
    kernel = disc(radius, softness)
    assert float(kernel.sum()) == pytest.approx(1.0, abs=1e-12) and float(kernel.min()) >= 0
    for turned in (kernel.T, kernel.flip(0), kernel.flip(1)):
        torch.testing.assert_close(kernel, turned)
    for factor in (0.25, 0.3, 0.7, 0.875):
        assert float(shrunk(kernel, factor).sum()) == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(shrunk(kernel, 1.0), kernel)


def test_defocus_spreads_a_point_over_the_disc() -> None:
    point = flat(0, count=1)
    point[..., 16, 16] = 255
    widest = corrupt(point, "defocus_blur", severity=5)[0, 0]  # radius 1.5: the nine pixels around
    assert (widest[15:18, 15:18] == round(255 / 9)).all() and int((widest > 0).sum()) == 9
    cross = corrupt(point, "defocus_blur", severity=4)[0, 0]  # radius 1: five pixels
    assert int((cross > 0).sum()) == 5 and cross[16, 15:18].tolist() == [51, 51, 51]


def test_a_shrunk_kernel_shares_weights_between_pixels() -> None:
    line = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    expected = torch.tensor([0.125, 0.75, 0.125], dtype=torch.float64)
    torch.testing.assert_close(shrunk(torch.outer(line, line), 0.5), torch.outer(expected, expected))


@pytest.mark.parametrize(
    ("sigma", "edge", "truncate"), [(0.6, "nearest", 4.0), (2.5, "reflect", 3.0), (30.0, "reflect", 3.0)]
)
def test_smoothing_is_scipys(sigma: float, edge: str, truncate: float) -> None:
    x = torch.rand(2, 3, 9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.stack([[gaussian_filter(c, sigma, mode=edge, truncate=truncate) for c in i] for i in x.numpy()])
    torch.testing.assert_close(smooth(x, sigma, edge=edge, truncate=truncate), torch.from_numpy(expected))
    assert torch.equal(smooth(x, 0.05), x)


@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_glass_copies_pixel_after_pixel_as_the_official_loop(distance: int) -> None:
    height, width = 14, 17
    offsets = draws(2).integers(-distance, distance, 2, height, width)
    found = copied_from(offsets, distance)
    for image, result in zip(offsets.numpy(), found.numpy(), strict=True):
        pixels = np.arange(height * width).reshape(height, width)
        for row in range(height - distance, distance, -1):
            for column in range(width - distance, distance, -1):
                down, across = image[:, row, column]
                pixels[row, column] = pixels[row + down, column + across]
        assert np.array_equal(pixels, result)


def test_glass_without_smoothing_only_moves_values() -> None:
    images = torch.arange(0, 200, dtype=torch.uint8)[:196].view(1, 1, 14, 14).repeat(1, 3, 1, 1)
    images[:, 1] = 255 - images[:, 0]
    result = corrupt(images, "glass_blur", severity=1)
    assert torch.equal(result[:, 1], 255 - result[:, 0])  # channels move together
    row, column = result[0, 0] // 14, result[0, 0] % 14
    assert (torch.arange(14).view(-1, 1) - row.int()).unique().tolist() == [0, 1]
    assert (torch.arange(14) - column.int()).unique().tolist() == [0, 1]
    assert torch.equal(result[..., :2, :], images[..., :2, :])  # the border stays


@pytest.mark.parametrize(("side", "severity", "radius", "sigma"), [(64, 3, 6, 2.0), (64, 5, 9, 2.5), (224, 1, 10, 3.0)])
def test_motion_blur_trails_half_a_gaussian(side: int, severity: int, radius: int, sigma: float) -> None:
    middle = side // 2
    points = flat(0, count=6, side=side)
    points[..., middle - 1 : middle + 2, middle - 1 : middle + 2] = 255
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    expected = (steps * weights).sum() / weights.sum()
    angles = []
    for image in corrupt(points, "motion_blur", severity=severity)[:, 0].double():
        assert float(image.sum()) == pytest.approx(9 * 255, rel=0.02)
        places = torch.arange(side, dtype=torch.float64)
        across = float((image.sum(0) * places).sum() / image.sum()) - middle
        down = float((image.sum(1) * places).sum() / image.sum()) - middle
        assert math.hypot(across, down) == pytest.approx(expected, rel=0.05)
        angles.append(math.degrees(math.atan2(down, across)) % 180)
    assert all(angle <= 46 or angle >= 134 for angle in angles) and max(angles) - min(angles) > 10


def test_zoom_blur_flattens_a_slope_about_the_centre() -> None:
    slope = (torch.arange(33).float() * 6).to(torch.uint8).expand(1, 1, 33, 33).contiguous()
    result = corrupt(slope, "zoom_blur", severity=5)[0, 0].double()
    factors = [1 + 0.01 * step for step in range(26)]  # 1.00 to 1.25
    flatter = (1 + sum(1 / factor for factor in factors)) / (1 + len(factors))
    expected = 96 + (torch.arange(33).double() - 16) * 6 * flatter
    assert float((result - expected).abs().max()) < 0.6
    upright = corrupt(slope.transpose(2, 3).contiguous(), "zoom_blur", severity=5)
    assert torch.equal(upright[0, 0].T.double(), result)


# ---------------------------------------------------------------------- weather


@pytest.mark.parametrize("side", [8, 32, 96])
def test_snow_only_adds_light(side: int) -> None:
    images = pictures(6, 3, side)
    for severity in SEVERITIES:
        assert (corrupt(images, "snow", severity=severity).int() >= images.int()).all()
    on_black = corrupt(flat(0, count=6, side=side), "snow", severity=1).float()
    ground = 0.5 * (0.05 if side <= 64 else 0.2) * 255  # black bleached to a half, of which 1 - keep shows
    assert float(on_black.min()) == pytest.approx(ground, abs=0.51)
    assert torch.equal(on_black, on_black.flip(-1, -2))  # the flakes lie there twice, turned by 180 degrees


@pytest.mark.parametrize(
    ("side", "severity", "keep", "weight"), [(32, 1, 1.0, 0.2), (32, 5, 0.75, 0.45), (96, 1, 1.0, 0.4)]
)
def test_frost_is_a_weighted_sum_with_one_texture(side: int, severity: int, keep: float, weight: float) -> None:
    on_black = corrupt(flat(0, count=8, side=side), "frost", severity=severity).float() / 255 / weight
    assert 0.3 < float(on_black.mean()) < 0.7 and float(on_black.std()) > 0.05
    assert float(on_black.max()) <= 1.01
    on_grey = corrupt(flat(60, count=8, side=side), "frost", severity=severity).float() / 255
    texture = (on_grey - keep * 60 / 255) / weight
    unclipped = on_grey < 1
    assert float((texture - on_black)[unclipped].abs().max()) < 1.01 / 255 / weight
    tinted = corrupt(flat(0, channels=3, side=side), "frost", severity=severity).float().mean(dim=(0, 2, 3)).tolist()
    assert tinted == sorted(tinted) and tinted[0] < tinted[2]  # bluish


@pytest.mark.parametrize(("severity", "amount"), [(1, 0.2), (5, 1.5)])
def test_fog_keeps_the_brightest_and_lifts_the_rest(severity: int, amount: float) -> None:
    white = corrupt(flat(255), "fog", severity=severity)
    assert int(white.amax()) == 255 and white.flatten(1).amin(dim=1).tolist() == [round(255 / (1 + amount))] * 4
    images = pictures(4, 3, 32)
    assert (corrupt(images, "fog", severity=severity).amax(dim=(1, 2, 3)) <= images.amax(dim=(1, 2, 3))).all()
    assert not corrupt(flat(0), "fog", severity=severity).any()  # as officially: a black image has no light to scatter


def test_plasma_is_the_diamond_square_algorithm() -> None:
    decay, size = 2.0, 8
    found = plasma(7, decay, draws(2))
    same = draws(2)
    for number in range(2):
        assert float(found[number].min()) == 0.0 and float(found[number].max()) == 1.0
    cloud = np.zeros((2, size, size))
    step, spread = size, 1.0
    while step > 1:
        half = step // 2
        noises = [same.uniform(size // step, size // step, low=-spread, high=spread).numpy() for _ in range(3)]
        # First all middles of squares, then the points between corners to the right of and below each corner.
        for (row_shift, column_shift), noise in zip(((half, half), (0, half), (half, 0)), noises, strict=True):
            reach = [(-half, -half), (-half, half), (half, -half), (half, half)]
            if 0 in (row_shift, column_shift):
                reach = [(0, -half), (0, half), (-half, 0), (half, 0)]
            for i in range(size // step):
                for j in range(size // step):
                    row, column = i * step + row_shift, j * step + column_shift
                    around = [cloud[:, (row + a) % size, (column + b) % size] for a, b in reach]
                    cloud[:, row, column] = np.mean(around, axis=0) + noise[:, i, j]
        step, spread = half, spread / decay**2
    low, high = cloud.min(axis=(1, 2), keepdims=True), cloud.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found.numpy(), (cloud - low) / (high - low), atol=1e-5)


@pytest.mark.parametrize(("side", "added"), [(8, 0.3), (66, 0.5)])
def test_brightness_raises_the_value_of_hsv(side: int, added: float) -> None:
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[0, :, 0, 0] = 0
    result = corrupt(images, "brightness")
    for row, column in [(0, 0), (1, 2), (5, 7), (7, 7), (3, 0), (6, 1)]:
        hue, saturation, value = colorsys.rgb_to_hsv(*(images[0, :, row, column].double() / 255).tolist())
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + added))
        assert result[0, :, row, column].tolist() == pytest.approx([255 * e for e in expected], abs=0.51)
    assert float(result.float().mean()) > float(images.float().mean())
    dark = corrupt(flat(50), "brightness", severity=1)  # grey: simply added
    assert dark.unique().tolist() == [round(50 + 0.05 * 255)]


# ---------------------------------------------------------------------- digital


@pytest.mark.parametrize(("side", "severity", "kept"), [(32, 1, 0.75), (32, 5, 0.15), (96, 1, 0.4)])
def test_contrast_shrinks_towards_the_mean_of_each_channel(side: int, severity: int, kept: float) -> None:
    images = pictures(3, 3, side, brightest=1.0)
    result, before = corrupt(images, "contrast", severity=severity).double(), images.double()
    torch.testing.assert_close(result.mean((2, 3)), before.mean((2, 3)), atol=0.2, rtol=0)
    torch.testing.assert_close(result.std((2, 3)), kept * before.std((2, 3)), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("side", "bending"), [(32, [1, 2, 3, 4, 5]), (96, [3, 4, 5])])
def test_elastic_transforms_bend_more_and_more(side: int, bending: list[int]) -> None:
    rows, columns = torch.arange(side)[:, None], torch.arange(side)
    slope = ((rows * 2 + columns * 5) * 32 // side).to(torch.uint8).expand(8, 1, side, side).contiguous()
    bends = []
    for severity in bending:
        middle = corrupt(slope, "elastic_transform", severity=severity)[:, 0].double()
        middle = middle[:, side // 4 : -side // 4, side // 4 : -side // 4]
        down = middle[:, 2:] - 2 * middle[:, 1:-1] + middle[:, :-2]
        across = middle[..., 2:] - 2 * middle[..., 1:-1] + middle[..., :-2]
        bends.append(float(down.abs().mean() + across.abs().mean()))
        if severity == 1:  # a small image is only mapped affinely: a slope stays one, but for rounding
            assert float(torch.maximum(down.abs().amax(), across.abs().amax())) <= 2.0
            assert float((middle - slope[:, 0, 8:24, 8:24]).abs().amax(dim=(1, 2)).min()) > 2
    bent = bends[1:] if side == 32 else bends  # the affine one bends by rounding alone
    assert bent == sorted(bent) and bent[-1] > 1.5 * bent[0] and bends[-1] > 1.5 * bends[0]


@pytest.mark.parametrize(("side", "severity", "blocks"), [(32, 1, 30), (32, 5, 20), (8, 5, 5), (224, 5, 56)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixelate_makes_blocks(side: int, severity: int, blocks: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8, generator=generator)
    result = corrupt(images, "pixelate", severity=severity)
    assert len(result[0, 0].unique(dim=0)) == blocks and len(result[0, 0].unique(dim=1).T) == blocks
    for before, after in zip(images, result, strict=True):
        picture = Image.fromarray(before.permute(1, 2, 0).squeeze(-1).numpy())
        small = picture.resize((blocks, blocks), Image.Resampling.BOX).resize((side, side), Image.Resampling.BOX)
        assert np.array_equal(np.asarray(small), after.permute(1, 2, 0).squeeze(-1).numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("side", "qualities"), [(32, (80, 65, 58, 50, 40)), (64, (80, 65, 58, 50, 40)), (96, (25, 18, 15, 10, 7))]
)
def test_jpeg_is_torchvisions(side: int, qualities: tuple[int, ...], channels: int) -> None:
    images = pictures(3, channels, side)
    for severity, quality in zip(SEVERITIES, qualities, strict=True):
        assert torch.equal(corrupt(images, "jpeg_compression", severity=severity), v2.jpeg(images, quality))


# ---------------------------------------------------------------------- the sheet


def test_the_sheet_shows_every_corruption(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    grid(flat(128, count=2, channels=3, side=16), tmp_path / "flat.png")
    with Image.open(tmp_path / "flat.png") as sheet:
        wide, high = sheet.size
        pixels = np.asarray(sheet.convert("RGB"))
    assert 2 * wide < high
    assert (pixels == 128).all(axis=2).mean() > 0.15  # the clean column, and all that cannot be seen on one grey
    assert main([str(tmp_path / "x.png"), "--dataset", "digit"]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'digits'" in said and len(said.splitlines()) == 1
