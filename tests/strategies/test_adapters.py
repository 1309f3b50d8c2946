"""The test-time adapters against independent loops, and what every one of them has to keep."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.memory.holdings import Holdings
from contlearn.options import options_of
from contlearn.strategies.adapter import Adapter, entropy
from contlearn.strategies.bn_stats import BNStats
from contlearn.strategies.cotta import CoTTA, augment
from contlearn.strategies.eata import EATA
from contlearn.strategies.sar import SAR, top_of
from contlearn.strategies.source import Source
from contlearn.strategies.tent import Tent

CLASSES = 5
GREY: Any = SimpleNamespace(input_shape=(1, 8, 8), n_classes=3, task_labels=False)
ALL = (Source, BNStats, Tent, EATA, SAR, CoTTA)
# Filters wide open, so that every batch has a step; small nets need large steps to show any.
BUSY: dict[type[Adapter], dict[str, Any]] = {
    Source: {},
    BNStats: {"prior": 8.0, "carry": True},
    Tent: {"lr": 0.05},
    EATA: {"lr": 0.05, "margin": 1.0, "d_margin": 1.0},
    SAR: {"lr": 0.05, "margin": 1.0, "reset_below": 0.0, "freeze_top": False},
    CoTTA: {"lr": 0.01, "augmentations": 2, "confidence": 1.0, "decay": 0.9, "restoration": 0.1},
}


class Flat(nn.Module):
    """``head(norm(x))`` of vectors: gradients on scale and offset have a closed form."""

    def __init__(self, norm: nn.Module, features: int = 6) -> None:
        super().__init__()
        self.norm = norm
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x.flatten(1)))
        return logits


def images(labels: Tensor, seed: int, *, noise: float = 0.25, contrast: float = 1.0) -> Tensor:
    """8x8 images of grey noise with a bright block whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    x = noise * torch.rand(len(labels), 1, 8, 8, generator=generator)
    for image, label in zip(x, labels.tolist(), strict=True):
        image[0, label : label + 3, label : label + 3] += 0.7
    return (contrast * x).clamp(0, 1)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small convolutional net with BatchNorm, trained to solve the clean task."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(40):
        labels = torch.randint(CLASSES, (32,))
        optimizer.zero_grad()
        F.cross_entropy(model(images(labels, step)), labels).backward()
        optimizer.step()
    labels = torch.arange(CLASSES).repeat(20)
    assert (model.eval()(images(labels, 99)).argmax(1) == labels).float().mean() > 0.9
    return model


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return copy.deepcopy(trained)


def shifted(batches: int = 6, size: int = 16, seed: int = 0) -> Iterator[Tensor]:
    """Batches of another domain: low contrast, more noise."""
    for batch in range(batches):
        labels = torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(seed + batch))
        yield images(labels, seed + 100 + batch, noise=0.6, contrast=0.4)


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def flat(seed: int = 0) -> tuple[Flat, Tensor]:
    torch.manual_seed(seed)
    model = Flat(nn.BatchNorm1d(6, eps=1e-14)).double()
    nn.init.normal_(model.norm.weight, 1.0, 0.2)
    nn.init.normal_(model.head.weight, 0.0, 1.5)
    return model, torch.randn(7, 6, dtype=torch.float64)


def by_hand(model: Flat, x: Tensor, weights: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Softmax, entropy, and the gradient of ``sum(weights * entropy)`` on scale and offset, one sample at a time."""
    gamma, beta = (held.detach().numpy() for held in (model.norm.weight, model.norm.bias))
    matrix, bias = (held.detach().numpy() for held in (model.head.weight, model.head.bias))
    values = x.numpy()
    standard = (values - values.mean(0)) / values.std(0)
    d_gamma, d_beta, all_p, all_h = np.zeros(6), np.zeros(6), [], []
    for index, row in enumerate(standard):
        z = matrix @ (gamma * row + beta) + bias
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        h = -sum(q * math.log(q) for q in p)
        d_z = np.array([-q * (math.log(q) + h) for q in p])
        weight = 1 / len(values) if weights is None else weights[index]
        d_gamma += weight * (matrix.T @ d_z) * row
        d_beta += weight * (matrix.T @ d_z)
        all_p.append(p)
        all_h.append(h)
    return np.array(all_p), np.array(all_h), d_gamma, d_beta


# ---------------------------------------------------------------------- the formulas


def test_tent_descends_the_entropy_on_scale_and_offset() -> None:
    model, x = flat()
    _, h, d_gamma, d_beta = by_hand(model, x)
    expected = model.norm.weight.detach().numpy() - 0.3 * d_gamma, model.norm.bias.detach().numpy() - 0.3 * d_beta
    adapter = Tent(model=model, lr=0.3, optimizer="sgd").start()
    adapter(x)
    assert adapter.last_loss == pytest.approx(h.mean())
    for held, wanted in zip((model.norm.weight, model.norm.bias), expected, strict=True):
        np.testing.assert_allclose(held.detach().numpy(), wanted, rtol=1e-9)


def test_tent_predicts_before_it_steps(model: nn.Module) -> None:
    x = next(shifted())
    before = copy.deepcopy(model).train()
    adapter = Tent(model=model, lr=0.5).start()
    torch.testing.assert_close(adapter(x), before(x))
    assert not torch.allclose(adapter.predict(x), before(x))


def test_steps_are_taken_one_after_the_other(model: nn.Module) -> None:
    x = next(shifted())
    one, three = (Tent(model=copy.deepcopy(model), lr=0.05, steps=steps).start() for steps in (1, 3))
    for _ in range(3):
        logits = one(x)
    assert torch.equal(three(x), logits)
    assert same(one.state_dict(), three.state_dict())
    still = Tent(model=model, steps=0).start()
    before = tensors(still)
    still(x)
    assert same(still.state_dict(), before)


def test_eata_weights_filters_and_averages_like_a_loop() -> None:
    model, _ = flat(3)
    margin, allowed, lr = 0.5, 0.8, 0.2
    adapter = EATA(model=model, lr=lr, momentum=0.0, margin=margin, d_margin=allowed, guard="off").start()
    bound, average, counts = margin * math.log(CLASSES), None, []
    for batch in range(6):
        x = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
        p, h, *_ = by_hand(model, x)
        kept = []
        for index in range(len(x)):
            if h[index] >= bound:
                continue
            if average is not None:
                cosine = p[index] @ average / (np.linalg.norm(p[index]) * np.linalg.norm(average))
                if cosine >= allowed:
                    continue
            kept.append(index)
        counts.append(len(kept))
        gamma, beta = model.norm.weight.detach().numpy().copy(), model.norm.bias.detach().numpy().copy()
        if kept:
            weights = np.array(
                [math.exp(bound - h[index]) / len(kept) if index in kept else 0 for index in range(len(x))]
            )
            *_, d_gamma, d_beta = by_hand(model, x, weights)
            gamma, beta = gamma - lr * d_gamma, beta - lr * d_beta
            mean = p[kept].mean(0)
            average = mean if average is None else 0.9 * average + 0.1 * mean
        adapter(x)
        np.testing.assert_allclose(model.norm.weight.detach().numpy(), gamma, rtol=1e-9)
        np.testing.assert_allclose(model.norm.bias.detach().numpy(), beta, rtol=1e-9, atol=1e-12)
        assert average is not None and adapter.average is not None
        np.testing.assert_allclose(adapter.average.numpy(), average, rtol=1e-9)
        assert adapter.kept == len(kept)
    assert len(set(counts)) > 1 and max(counts) < 9  # the filters did filter


def test_eata_asks_for_less_similarity_with_more_classes() -> None:
    adapter = EATA(model=nn.Linear(1, 1))
    assert [adapter._allowed(classes) for classes in (10, 100, 1000)] == [0.4, 0.1, 0.05]
    assert EATA(model=nn.Linear(1, 1), d_margin=0.3)._allowed(10) == 0.3


def test_eata_fisher_and_its_pull(model: nn.Module) -> None:
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x in shifted(3, size=10)]
    adapter = EATA(model=model, fisher_samples=25, fisher_alpha=1e6, lr=0.1, momentum=0.0, margin=1.0)
    assert adapter.needs_source_data and not EATA(model=model).needs_source_data
    adapter.prepare_with(iter(batches))
    expected: dict[str, Tensor] = {}
    for (x, _), count in zip(batches, (10, 10, 5), strict=True):
        net = copy.deepcopy(model).train().requires_grad_(True)
        logits = net(x[:count])
        F.cross_entropy(logits, logits.argmax(1)).backward()
        for name in ("1.weight", "1.bias", "4.weight", "4.bias"):
            expected[name] = expected.get(name, torch.zeros(())) + net.get_parameter(name).grad.pow(2) / 3
    assert adapter.fisher.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(adapter.fisher[name], value)
    adapter.start()
    x = next(shifted())
    logits = model(x)
    without = adapter._loss(logits)
    with torch.no_grad():
        model.get_parameter("1.weight").add_(0.5)
    adapter.average = None
    pulled = adapter._loss(logits)
    assert without is not None and pulled is not None
    pull = float(1e6 * (expected["1.weight"] * 0.25).sum())
    assert float((pulled - without).detach()) == pytest.approx(pull, rel=1e-4)
    with pytest.raises(ContlearnError, match="prepare_with"):
        EATA(model=model, fisher_samples=5).start()
    with pytest.raises(ContlearnError, match="at least one batch"):
        EATA(model=model, fisher_samples=5).prepare_with(iter([]))


def test_sar_climbs_and_descends_from_where_it_was(model: nn.Module) -> None:
    with torch.no_grad():
        model[7].weight.mul_(0.2)  # less certain: gradients that count
    x, reference = next(shifted()), copy.deepcopy(model).train()
    # Half of the samples count.
    margin = float(entropy(reference(x)).detach().median()) / math.log(CLASSES)
    adapter = SAR(
        model=model, lr=0.1, momentum=0.0, margin=margin, rho=0.3, reset_below=0.0, freeze_top=False
    ).start()
    names = [name for name, _ in adapter.adapted()]
    assert names == ["1.weight", "1.bias", "4.weight", "4.bias"]
    bound = margin * math.log(CLASSES)
    h = entropy(reference(x))
    first = [index for index in range(len(x)) if h[index] < bound]
    weights = [reference.get_parameter(name) for name in names]
    gradient = torch.autograd.grad(torch.stack([h[index] for index in first]).mean(), weights)
    length = math.sqrt(sum(float(part.pow(2).sum()) for part in gradient))
    start = [weight.detach().clone() for weight in weights]
    for weight, part in zip(weights, gradient, strict=True):
        weight.data += 0.3 * part / length
    h = entropy(reference(x))
    second = [index for index in first if h[index] < bound]
    loss = torch.stack([h[index] for index in second]).mean()
    expected = [s - 0.1 * part for s, part in zip(start, torch.autograd.grad(loss, weights), strict=True)]
    adapter(x)
    assert 0 < len(first) < len(x)
    assert adapter.last_loss == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, wanted, before in zip(names, expected, start, strict=True):
        torch.testing.assert_close(model.get_parameter(name).data, wanted)
        assert (wanted - before).abs().max() > 1e-3


def test_sar_average_and_recovery(model: nn.Module) -> None:
    adapter = SAR(model=model, lr=0.05, margin=1.0, reset_below=0.0, freeze_top=False).start()
    start, ema = tensors(adapter), None
    for x in shifted():
        adapter(x)
        ema = adapter.last_loss if ema is None else 0.9 * ema + 0.1 * adapter.last_loss
        assert adapter.ema == pytest.approx(ema)
    assert adapter.recoveries == [] and not same(adapter.state_dict(), start)
    adapter.reset_below = 10.0
    adapter(x)
    assert adapter.recoveries == [7] and adapter.ema is None
    assert same(adapter.state_dict(), start)  # weights, and no momentum left


def test_sar_leaves_the_top_alone() -> None:
    net = models.create("resnet14", GREY, head="fixed", seed=0)
    adapted = {name for name, _ in SAR(model=net).start().adapted()}
    assert top_of(net) == "backbone.stage3"
    assert adapted and not any("stage3" in name for name in adapted)
    assert any("stage3" in name for name, _ in SAR(model=net, freeze_top=False).start().adapted())
    transformer = nn.ModuleDict({"blocks": nn.ModuleList(nn.LayerNorm(2) for _ in range(12)), "norm": nn.LayerNorm(2)})
    layers = list(SAR(model=transformer).layers())
    assert len(layers) == 9 and transformer["norm"] not in layers  # blocks 9 to 11 and the norm stay, as published
    assert top_of(nn.Sequential(nn.Linear(1, 1))) is None


def test_cotta_teacher_student_and_answer(model: nn.Module) -> None:
    adapter = CoTTA(
        model=model, lr=0.1, optimizer="sgd", decay=0.8, restoration=0.0, confidence=1.0, augmentations=2
    )
    adapter.generator.manual_seed(2)
    adapter.start()
    generator = torch.Generator().manual_seed(2)
    student, teacher = (copy.deepcopy(model).train().requires_grad_(True) for _ in range(2))
    for x in shifted(3):
        # Without augmentation teacher and student agree at first, and the gradient is zero.
        target = (teacher(augment(x, generator)) + teacher(augment(x, generator))).detach() / 2
        loss = -(target.softmax(1) * student(x).log_softmax(1)).sum(1).mean()
        for parameter, gradient in zip(
            student.parameters(), torch.autograd.grad(loss, list(student.parameters())), strict=True
        ):
            parameter.data -= 0.1 * gradient
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.data = 0.8 * old.data + 0.2 * new.data
        torch.testing.assert_close(adapter(x), target, rtol=1e-4, atol=1e-4)
    source = dict(adapter._initial)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).data, parameter.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.teacher[name], teacher.get_parameter(name).data, rtol=1e-4, atol=1e-5)
        if name != "3.bias":  # BatchNorm takes it out again
            assert (adapter.teacher[name] - source[name]).abs().max() > 1e-4
    assert set(adapter.teacher) == dict(model.named_parameters()).keys()


def test_cotta_restores_the_stated_share(model: nn.Module) -> None:
    x = next(shifted())
    free, some, every = (
        CoTTA(model=copy.deepcopy(model), lr=0.01, restoration=share, confidence=1.0, augmentations=1).start()
        for share in (0, 0.25, 1)
    )
    for adapter in (free, some, every):
        adapter(x)
    restored = total = 0
    for name, source in model.named_parameters():
        moved, mixed = free.model.get_parameter(name), some.model.get_parameter(name)
        back = mixed == source
        assert torch.equal(torch.where(back, moved, mixed), moved)  # each is the source's or the student's own
        changed = moved != source
        restored, total = restored + int((back & changed).sum()), total + int(changed.sum())
        assert torch.equal(every.model.get_parameter(name), source)
        # The teacher follows the student as it was before weights were restored.
        assert torch.equal(every.teacher[name], free.teacher[name])
    assert abs(restored / total - 0.25) < 4 * math.sqrt(0.25 * 0.75 / total)


def test_cotta_augments_where_the_source_is_unsure(model: nn.Module) -> None:
    x = next(shifted())
    confidence = float(copy.deepcopy(model).train()(x).softmax(1).amax(1).mean().detach())
    for threshold, augmented in ((confidence - 1e-4, False), (confidence + 1e-4, True)):
        adapter = CoTTA(model=copy.deepcopy(model), confidence=threshold, augmentations=3, guard="off")
        adapter.generator.manual_seed(5)
        answer = adapter.start()(x)
        assert adapter.augmented is augmented
        generator, teacher = torch.Generator().manual_seed(5), copy.deepcopy(model).train()
        copies = [augment(x, generator) for _ in range(3)] if augmented else [x]
        torch.testing.assert_close(answer, torch.stack([teacher(one) for one in copies]).mean(0))


@pytest.mark.parametrize(("channels", "low", "high"), [(1, 0, 1), (3, 0, 1), (3, -2, 2), (2, 0, 1)])
def test_augmented_copies(channels: int, low: float, high: float) -> None:
    x = low + (high - low) * torch.rand(4, channels, 12, 10, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    made = [augment(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(x, kept) and torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].shape == x.shape
    assert x.min() - 1e-5 <= made[0].min() or low == 0
    assert made[0].min() >= low - 1e-5 and made[0].max() <= high + 1e-5
    mirrored, plain = (augment(x, torch.Generator().manual_seed(3), flip=flip) for flip in (1.0, 0.0))
    assert (mirrored.flip(3) - plain).abs().mean() < 0.02 * (high - low)  # noise apart


@pytest.mark.parametrize("prior", [0.0, 4.0, 1e9])
@pytest.mark.parametrize("carry", [False, True])
def test_bn_stats_mix_source_and_batch(prior: float, carry: bool) -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).double()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    adapter = BNStats(model=layer, prior=prior, carry=carry, guard="off").start()
    mean, variance = layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()
    source = mean.copy(), variance.copy()
    for batch in range(3):
        x = torch.randn(5, 3, 4, 4, dtype=torch.float64) + batch
        share = prior / (prior + 5)
        columns = [x[:, channel].numpy().ravel() for channel in range(3)]
        mixed_mean = np.array([share * mean[c] + (1 - share) * columns[c].mean() for c in range(3)])
        mixed_var = np.array([share * variance[c] + (1 - share) * columns[c].var() for c in range(3)])
        expected = (x.numpy() - mixed_mean[:, None, None]) / np.sqrt(mixed_var + layer.eps)[:, None, None]
        np.testing.assert_allclose(adapter(x).numpy(), expected, rtol=1e-9, atol=1e-9)
        if carry:
            mean, variance = mixed_mean, mixed_var
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-12)
        np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-12)
    adapter.reset()
    assert (layer.running_mean.numpy() == source[0]).all() and (layer.running_var.numpy() == source[1]).all()


def test_bn_stats_lend_nothing_for_good(model: nn.Module) -> None:
    adapter = BNStats(model=model).start()
    running = model[1].running_mean
    before = tensors(adapter)
    torch.testing.assert_close(adapter(next(shifted())), copy.deepcopy(model).train()(next(shifted())))
    with pytest.raises(RuntimeError):
        adapter(torch.zeros(2, 3, 8, 8))  # fails inside a forward pass
    assert model[1].running_mean is running and same(adapter.state_dict(), before)


# ---------------------------------------------------------------------- what all keep


@pytest.mark.parametrize("cls", ALL)
def test_only_what_is_stated_changes(cls: type[Adapter], model: nn.Module) -> None:
    adapter = cls(model=model, **BUSY[cls]).start()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for x in shifted():
        adapter(x)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    norms = {f"{layer}.{name}" for layer in (1, 4) for name in ("weight", "bias")}
    running = {f"{layer}.running_{name}" for layer in (1, 4) for name in ("mean", "var")}
    expected = {Source: set(), BNStats: running, CoTTA: dict(model.named_parameters()).keys()}.get(cls, norms)
    assert changed == set(expected) == {name for name, _ in adapter.adapted()}
    assert adapter.trips == []


@pytest.mark.parametrize("cls", ALL)
def test_one_image_of_one_pixel_per_channel(cls: type[Adapter]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4),
        nn.Linear(4, CLASSES),
    )  # fmt: skip
    options = {**BUSY[cls], "prior": 0.0} if cls is BNStats else BUSY[cls]
    adapter = cls(model=net, **options).start()
    x = torch.rand(1, 1, 3, 3)
    expected = copy.deepcopy(net).eval()(x)  # source statistics: one value has no variance
    logits = adapter(x)
    assert logits.shape == (1, CLASSES) and bool(torch.isfinite(logits).all())
    if cls is not CoTTA:  # its answer is averaged over augmented copies
        torch.testing.assert_close(logits, expected)
    assert torch.isfinite(adapter(torch.rand(6, 1, 3, 3))).all()


@pytest.mark.parametrize("cls", ALL)
def test_reset_is_exact(cls: type[Adapter], model: nn.Module) -> None:
    adapter = cls(model=model, momentum=0.9, **{**BUSY[cls], "optimizer": "sgd"}).start()
    start = tensors(adapter)
    first = [adapter(x) for x in shifted()]
    assert cls in (Source,) or not same(adapter.state_dict(), start)
    adapter.reset()
    assert same(adapter.state_dict(), start) and adapter.batches == 0
    assert all(torch.equal(left, adapter(x)) for left, x in zip(first, shifted(), strict=True))


@pytest.mark.parametrize("cls", ALL)
def test_a_state_continues_identically(cls: type[Adapter], model: nn.Module) -> None:
    original = cls(model=copy.deepcopy(model), **BUSY[cls]).start()
    for x in shifted():
        original(x)
    stored = tensors(original)
    resumed = cls(model=model, **BUSY[cls]).start()
    resumed.load_state_dict(stored)
    for x in shifted(seed=50):
        assert torch.equal(original(x), resumed(x))
    assert same(original.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("cls", ALL)
def test_snapshots_are_copies(cls: type[Adapter], model: nn.Module) -> None:
    adapter = cls(model=model, **BUSY[cls]).start()
    stream = list(shifted(8))
    for x in stream[:4]:
        adapter(x)
    snapshot, there = adapter.snapshot(), tensors(adapter)
    ahead = [adapter(x) for x in stream[4:]]
    for _ in range(2):  # what is put back is a copy, too
        adapter.restore(snapshot)
        assert same(adapter.state_dict(), there)
        assert all(torch.equal(left, adapter(x)) for left, x in zip(ahead, stream[4:], strict=True))


@pytest.mark.parametrize("cls", ALL)
def test_a_seed_decides(cls: type[Adapter], model: nn.Module) -> None:
    def answers(seed: int) -> Tensor:
        adapter = cls(model=copy.deepcopy(model), **BUSY[cls])
        adapter.generator.manual_seed(seed)
        torch.manual_seed(seed + 77)  # the global generator decides nothing
        adapter.start()
        return torch.stack([adapter(x) for x in shifted()])

    assert torch.equal(answers(1), answers(1))
    assert torch.equal(answers(1), answers(2)) is (cls is not CoTTA)


@pytest.mark.parametrize("cls", [EATA, SAR])
def test_nothing_reliable_moves_nothing(cls: type[Adapter], model: nn.Module) -> None:
    adapter = cls(model=model, **BUSY[cls]).start()
    for x in shifted():
        adapter(x)
    before = tensors(adapter)
    assert any(name.startswith("optimizer.") for name in before)
    adapter.margin = 0.0  # type: ignore[attr-defined]
    adapter(x)
    assert same(adapter.state_dict(), before) and adapter.stepped == 0 and math.isnan(adapter.last_loss)


def test_sar_moves_nothing_if_the_neighbourhood_is_unreliable(model: nn.Module) -> None:
    adapter = SAR(model=model, **{**BUSY[SAR], "margin": 0.5, "rho": 100.0}).start()
    x = next(shifted())
    h = entropy(copy.deepcopy(model).train()(x))
    before, climbs = tensors(adapter), []
    original = adapter._climb

    def climb(*args: Any) -> None:
        original(*args)
        with torch.no_grad():
            model[4].weight.zero_()  # the same answer for every image, nearly uniform
            model[4].bias.zero_()
            model[7].bias.zero_()
        climbs.append(1)

    adapter._climb = climb  # type: ignore[method-assign]
    bias = model[7].bias.clone()
    adapter(x)
    with torch.no_grad():
        model[7].bias.copy_(bias)
    assert climbs and bool((h < 0.5 * math.log(CLASSES)).any())
    assert same(adapter.state_dict(), before) and adapter.stepped == 0


def test_the_source_statistics_stay_in_the_model(model: nn.Module) -> None:
    held, x = copy.deepcopy(model), next(shifted())
    adapter = Tent(model=model, lr=0.0).start()
    torch.testing.assert_close(adapter(x), copy.deepcopy(held).train()(x))
    torch.testing.assert_close(model.eval()(x), held.eval()(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6)])
@pytest.mark.parametrize("cls", [Tent, EATA, SAR, CoTTA])
def test_models_without_batchnorm(cls: type[Adapter], norm: nn.Module) -> None:
    torch.manual_seed(0)
    net = Flat(copy.deepcopy(norm))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    adapter = cls(model=net, **{**BUSY[cls], **({"augmentations": 0} if cls is CoTTA else {})}).start()
    adapter(torch.randn(4, 6))
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"norm.weight", "norm.bias"} <= changed
    assert cls is CoTTA or changed == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("cls", [BNStats, Tent, EATA, SAR])
def test_a_model_without_normalisation_is_refused_in_a_line(cls: type[Adapter]) -> None:
    adapter = cls(model=models.create("mlp", GREY, head="fixed"))
    with pytest.raises(ContlearnError, match=r"has no .*resnet14"):
        adapter.start()


def test_cotta_trains_norms_alone_where_asked(model: nn.Module) -> None:
    adapter = CoTTA(model=model, train="norms").start()
    assert set(adapter.teacher) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    adapter(next(shifted()))
    with pytest.raises(ContlearnError, match="train: all"):
        CoTTA(model=nn.Linear(2, 2), train="norms").start()


def test_everything_held_is_named(model: nn.Module) -> None:
    norms = sum(layer.weight.nbytes + layer.bias.nbytes for layer in (model[1], model[4]))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    cases: list[tuple[Adapter, dict[str, int]]] = [
        (Source(model=model), {}),
        (BNStats(model=model), {}),
        (Tent(model=model, guard="off"), {"initial_state": norms}),
        (EATA(model=model, margin=1.0, guard="off"), {"initial_state": norms, "class_average": 4 * CLASSES}),
        (SAR(model=model, guard="report", freeze_top=False), {"initial_state": norms}),
        (CoTTA(model=model, augmentations=0, guard="off"), {"initial_state": weights, "teacher": weights}),
        # Weights, and the two moments and the counter of Adam.
        (Tent(model=model, guard_every=1), {"initial_state": norms, "guard_state": 3 * norms + 4 * 4}),
    ]
    for adapter, expected in cases:
        adapter.start()
        for x in shifted(3):
            adapter(x)
        if adapter.optimizer is None:
            adapter.optimizer = torch.optim.SGD([torch.zeros(1)])  # the account wants one
        assert Holdings(adapter).state_bytes() == expected, type(adapter).__name__


def test_starting_again_hooks_nothing_twice(model: nn.Module) -> None:
    adapter = BNStats(model=model, prior=4.0).start()
    first = adapter(next(shifted()))
    adapter.start()
    assert torch.equal(adapter(next(shifted())), first)
    assert len(model[1]._forward_pre_hooks) == 1


def test_options_are_plain_and_documented() -> None:
    for cls in ALL:
        found = {option.name: option for option in options_of(*[c for c in cls.__mro__ if "__init__" in vars(c)][:-1])}
        assert {"lr", "guard", "max_drift", "batch_size"} <= found.keys()
        assert all(option.help for option in found.values()), [o.name for o in found.values() if not o.help]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: BNStats(model=m, prior=-1.0), "prior: expected at least 0, got -1.0"),
        (lambda m: EATA(model=m, d_margin=2.0), "d_margin: expected 0..1"),
        (lambda m: EATA(model=m, margin=-0.1), "margin: expected at least 0"),
        (lambda m: SAR(model=m, rho=-1.0), "rho: expected at least 0"),
        (lambda m: CoTTA(model=m, restoration=1.5), "restoration: expected 0..1"),
        (lambda m: CoTTA(model=m, augmentations=-1), "augmentations: expected at least 0"),
        (lambda m: CoTTA(model=m, train="norm"), "did you mean 'norms'"),
        (lambda m: Tent(model=m, guard="rstore"), "did you mean 'restore'"),
        (lambda m: Tent(model=m)(torch.zeros(1, 1, 8, 8)), "expected start"),
        (lambda m: Tent(model=m).load_state_dict({}), "expected start"),
        (lambda m: Tent(model=m).start()(torch.full((1, 1, 8, 8), math.nan)), "expected finite inputs"),
        (lambda m: Tent(model=m).start().load_state_dict({"model.x": torch.zeros(1)}), "adapter state"),
    ],
)
def test_mistakes_are_one_line(make: Callable[[nn.Module], Any], message: str, model: nn.Module) -> None:
    with pytest.raises(ContlearnError, match=message):
        make(model)


def test_states_of_other_adapters_are_refused(model: nn.Module) -> None:
    adapter = CoTTA(model=model).start()
    state = tensors(adapter)
    del state["method.teacher.1.weight"]
    with pytest.raises(ContlearnError, match=r"'1\.weight'"):
        adapter.load_state_dict(state)
    state = tensors(adapter) | {"optimizer.no.weight.exp_avg": torch.zeros(1)}
    with pytest.raises(ContlearnError, match="belongs to no parameter"):
        adapter.load_state_dict(state)
