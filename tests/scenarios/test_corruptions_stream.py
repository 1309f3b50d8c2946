"""Test-time streams: which domain comes when, in what order its samples come, and what is kept in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contlearn import scenarios
from contlearn.errors import ContlearnError
from contlearn.flatdata import leaf_ids
from contlearn.scenarios import corruptions_stream
from contlearn.scenarios.corruption import CORRUPTIONS, corrupt
from contlearn.scenarios.temporal import correlated
from contlearn.strategies.loader import BatchSource

FEW = ["fog", "contrast", "gaussian_noise"]


def pixels(experience) -> torch.Tensor:
    """The samples of an experience in order, as stored."""
    source = BatchSource(experience.dataset.eval())
    assert source.batched
    return source.raw(torch.arange(len(source)))[0]


def places(experience, data, name: str, severity: int = 5, seed: int = 0) -> list[int]:
    """Which test image each sample of an experience is, by the pixels of the corrupted image."""
    whole = corrupt(data.test_images, name, severity=severity, seed=seed, scale=data.scale)
    table = {bytes(image.flatten().tolist()): row for row, image in enumerate(whole)}
    assert len(table) == len(whole)
    return [table[bytes(image.flatten().tolist())] for image in pixels(experience)]


def test_all_corruptions_come_once_in_the_official_order(made_up) -> None:
    data = made_up(classes=5, side=8)
    stream = scenarios.corruptions(data)
    assert stream.domains == stream.domain_names == [f"{name}:5" for name in CORRUPTIONS]
    assert len(stream.train_stream) == 1 and len(stream.test_stream) == 15
    train = stream.train_stream[0].dataset
    assert torch.equal(pixels(stream.train_stream[0]), data.train_images)
    assert list(train.targets) == data.train_targets.tolist()
    for number, (experience, name) in enumerate(zip(stream.test_stream, CORRUPTIONS, strict=True)):
        order = places(experience, data, name)
        assert sorted(order) == list(range(15)) and order != list(range(15))
        assert list(experience.dataset.targets) == data.test_targets[order].tolist()
        assert list(experience.dataset.targets_domain) == [number] * 15
        assert experience.classes_in_this_experience == set(range(5)) and experience.task_labels == [0]
    assert stream.original_classes == tuple(range(5)) and stream.kind == "corruptions"
    assert len({tuple(e.dataset.targets) for e in stream.test_stream}) > 10  # every domain has an order of its own


def test_samples_reach_avalanche_one_by_one_as_they_reach_batches(made_up) -> None:
    data = made_up(classes=3, side=8, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    experience = scenarios.corruptions(data, corruptions=["snow"], severity=2).test_stream[0]
    batch = BatchSource(experience.dataset.eval()).batch(torch.arange(9))
    assert len(batch) == 3  # the domain stays out of batches
    for number in range(9):
        image, target, task = experience.dataset[number]
        torch.testing.assert_close(image, batch[0][number])
        assert (target, task) == (int(batch[1][number]), 0)
    torch.testing.assert_close(batch[0], (pixels(experience) / 255 - 0.5) / 0.25)


def test_gradual_rises_to_the_severity_and_falls(made_up) -> None:
    data = made_up(classes=3, side=8)
    stream = scenarios.corruptions(data, corruptions=["fog", "snow"], schedule="gradual", severity=3)
    ramp = ["1", "2", "3", "2#2", "1#2"]
    assert stream.domains == [f"{name}:{level}" for name in ("fog", "snow") for level in ramp]
    assert stream.domain_names == [f"{name}:{level}" for name in ("fog", "snow") for level in (1, 2, 3)]
    levels = [1, 2, 3, 2, 1]
    for experience, name, level in zip(stream.test_stream, ["fog"] * 5 + ["snow"] * 5, levels * 2, strict=True):
        assert sorted(places(experience, data, name, level)) == list(range(9))
        assert {stream.domain_names[d] for d in experience.dataset.targets_domain} == {f"{name}:{level}"}
    full = scenarios.corruptions(data, schedule="gradual")
    assert len(full.test_stream) == 15 * 9 and len(full.domain_names) == 75


def test_recurring_comes_back_to_the_same_images_in_another_order(made_up) -> None:
    data = made_up(classes=6, side=8)
    stream = scenarios.corruptions(data, corruptions=FEW, schedule="recurring", rounds=3)
    once = [f"{name}:5" for name in FEW]
    assert stream.domains == [f"{domain}{again}" for again in ("", "#2", "#3") for domain in once]
    assert stream.domain_names == once
    orders = [places(stream.test_stream[visit], data, "contrast") for visit in (1, 4, 7)]
    assert all(sorted(order) == list(range(18)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert list(stream.test_stream[4].dataset.targets_domain) == [1] * 18


def test_mixed_holds_every_image_under_every_corruption(made_up) -> None:
    data = made_up(classes=4, side=8)
    stream = scenarios.corruptions(data, corruptions=FEW, schedule="mixed", seed=2)
    assert stream.domains == ["mixed"] and stream.domain_names == [f"{name}:5" for name in FEW]
    (experience,) = stream.test_stream
    images, domain = pixels(experience), torch.tensor(list(experience.dataset.targets_domain))
    targets = torch.tensor(list(experience.dataset.targets))
    for number, name in enumerate(FEW):
        expected = corrupt(data.test_images, name, seed=2)
        mine = images[domain == number]
        found = [next(row for row, image in enumerate(expected) if torch.equal(image, one)) for one in mine]
        assert sorted(found) == list(range(12))
        assert torch.equal(targets[domain == number], data.test_targets[found])
    changes = int((domain[1:] != domain[:-1]).sum())
    assert changes > 12  # mixed, not one after another


def test_samples_picks_the_same_images_in_every_domain(made_up) -> None:
    data = made_up(classes=8, side=8)
    stream = scenarios.corruptions(data, corruptions=FEW, samples=7)
    chosen = [sorted(places(e, data, name)) for e, name in zip(stream.test_stream, FEW, strict=True)]
    assert chosen[0] == chosen[1] == chosen[2] and len(set(chosen[0])) == 7
    other = scenarios.corruptions(data, corruptions=FEW[:1], samples=7, seed=1)
    assert sorted(places(other.test_stream[0], data, "fog", seed=1)) != chosen[0]


def repeats(targets) -> float:
    """Share of samples of the same class as the one before."""
    labels = np.asarray(targets)
    return float((labels[1:] == labels[:-1]).mean())


def test_dirichlet_orders_correlate_classes_in_time() -> None:
    options = {"corruptions": ["contrast", "fog"], "seed": 4}
    plain, tight, loose = (
        scenarios.corruptions("digits", order=order, concentration=concentration, **options)
        for order, concentration in (("iid", 0.1), ("dirichlet", 0.1), ("dirichlet", 100.0))
    )
    for experience in (*plain.test_stream, *tight.test_stream, *loose.test_stream):
        assert len(experience.dataset) == 360
        assert sorted(experience.dataset.targets) == sorted(plain.test_stream[0].dataset.targets)
    assert repeats(plain.test_stream[0].dataset.targets) < 0.2
    assert repeats(tight.test_stream[0].dataset.targets) > 0.7
    # Windows of 36: few classes under a small concentration, nearly all ten under a large one.
    kinds = [
        np.mean([len(set(part)) for part in np.array(list(s.test_stream[0].dataset.targets)).reshape(10, 36)])
        for s in (tight, loose)
    ]
    assert kinds[0] < 5 < 8 < kinds[1]
    assert list(tight.test_stream[0].dataset.targets) != list(tight.test_stream[1].dataset.targets)


@pytest.mark.parametrize("concentration", [1e-4, 0.1, 10.0])
def test_a_correlated_order_is_a_permutation(concentration: float) -> None:
    random = np.random.default_rng(0)
    targets = random.integers(0, 130, 1000)  # more classes than slots
    order = correlated(targets, concentration, random)
    assert sorted(order.tolist()) == list(range(1000))
    assert (repeats(targets[order]) > 0.7) == (concentration < 0.01)  # a class in one slot comes in one piece


def test_the_seed_decides_everything() -> None:
    def content(**options):
        made = scenarios.corruptions("digits", corruptions=FEW, samples=30, order="dirichlet", **options)
        return torch.cat([pixels(experience) for experience in made.test_stream])

    first, again, other = content(seed=5), content(seed=5), content(seed=6)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_spec_makes_the_same_stream_again() -> None:
    made = scenarios.corruptions("digits", corruptions=("snow", "frost"), samples=9, schedule="mixed", seed=3)
    stored = json.loads(json.dumps(made.spec))
    assert stored["corruptions"] == ["snow", "frost"]
    again = scenarios.create(**stored)
    assert again.spec == made.spec
    assert torch.equal(pixels(again.test_stream[0]), pixels(made.test_stream[0]))


def test_your_own_images_are_corrupted_too(tmp_path: Path) -> None:
    for kind, value in (("cat", 40), ("dog", 120)):
        for number in range(5):
            path = tmp_path / kind / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (20, 12), (value, value + number, value)).save(path)
    stream = scenarios.corruptions(f"folder:{tmp_path}", corruptions=["brightness"], severity=1, test_share=0.4)
    assert stream.class_names == ("cat", "dog") and stream.input_shape == (3, 12, 20)
    (experience,) = stream.test_stream
    for image, label in zip(pixels(experience), experience.dataset.targets, strict=True):
        # Red is raised with the value, green: by 5 % of white, in proportion to it.
        red, green = image[0].unique().tolist()[0], image[1].unique().tolist()[0]
        clean = (40, 120)[label]
        number = next(n for n in range(5) if round(clean + n + 0.05 * 255 + 1e-6) == green)
        assert red == pytest.approx(clean * (clean + number + 12.75) / (clean + number), abs=0.51)


# ---------------------------------------------------------------------- memory


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The corruptions made, in order."""
    made: list[tuple[str, int]] = []

    def count(images, name, **options):
        made.append((name, options["severity"]))
        return corrupt(images, name, **options)

    monkeypatch.setattr(corruptions_stream, "corrupt", count)
    return made


def test_a_domain_is_made_when_first_used_and_shared_between_rounds(made_up, counted) -> None:
    stream = scenarios.corruptions(made_up(side=8), corruptions=FEW, schedule="recurring", rounds=2)
    assert counted == []
    pixels(stream.test_stream[1])
    assert counted == [("contrast", 5)]
    for experience in stream.test_stream:
        pixels(experience)
    assert sorted(counted) == sorted((name, 5) for name in FEW)


def test_beyond_the_budget_the_domain_used_longest_ago_goes(made_up, counted, monkeypatch) -> None:
    data = made_up(side=8)
    monkeypatch.setattr(corruptions_stream, "KEPT_BYTES", 2 * data.test_images.nbytes)
    stream = scenarios.corruptions(data, corruptions=FEW, schedule="recurring", rounds=2)
    store = leaf_ids(stream.test_stream[0].dataset)[0][0]._store
    for experience in stream.test_stream:
        pixels(experience)
        assert store.nbytes <= 2 * data.test_images.nbytes
    assert [name for name, _ in counted] == FEW * 2
    pixels(stream.test_stream[5])
    assert len(counted) == 6  # the last one is still there
    counted.clear()
    mixed = scenarios.corruptions(data, corruptions=FEW, schedule="mixed")
    pixels(mixed.test_stream[0])
    pixels(mixed.test_stream[0])
    assert [name for name, _ in counted] == FEW  # kept: a mixed batch needs them all


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"corruptions": ["fog", "rain"]}, "unknown corruption 'rain'"),
        ({"corruptions": "fog"}, "expected a list of names"),
        ({"corruptions": []}, "expected a list of names"),
        ({"corruptions": ["fog", "fog"]}, "'fog' is listed twice"),
        ({"severity": 0}, "severity: expected a whole number from 1 to 5, got 0"),
        ({"severity": True}, "severity"),
        ({"schedule": "sudden"}, "schedule: expected continual, gradual, recurring or mixed, got 'sudden'"),
        ({"schedule": "recurring"}, "rounds: expected at least 2"),
        ({"rounds": 3}, "rounds: expected 1, or schedule='recurring'"),
        ({"order": "sorted"}, "order: expected iid or dirichlet, got 'sorted'"),
        ({"order": "dirichlet", "concentration": 0.0}, "concentration: expected a number above 0"),
        ({"samples": 19}, "samples: expected 1..18"),
        ({"samples": 0}, "samples: expected 1..18"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"severities": 3}, "did you mean 'severity'"),
    ],
)
def test_mistakes_get_one_line(made_up, options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        scenarios.create("corruptions", dataset=made_up(side=8), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_images_that_cannot_be_corrupted_are_refused(made_up) -> None:
    for data in (made_up(side=6), made_up(side=8, channels=2)):
        with pytest.raises(ContlearnError, match="1 or 3 channels and sides of at least 8 pixels"):
            scenarios.corruptions(data)
