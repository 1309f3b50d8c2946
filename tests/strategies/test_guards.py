"""The guard: what it finds, what it puts back, and the streams that must not trip it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.state import Decoder, Encoder
from contlearn.strategies.adapter import Adapter
from contlearn.strategies.bn_stats import BNStats
from contlearn.strategies.cotta import CoTTA
from contlearn.strategies.eata import EATA
from contlearn.strategies.guards import drift_of
from contlearn.strategies.sar import SAR
from contlearn.strategies.source import Source
from contlearn.strategies.tent import Tent

CLASSES, FEATURES = 4, 16
MOVING = (BNStats, Tent, EATA, SAR, CoTTA)
BUSY: dict[type[Adapter], dict[str, Any]] = {
    BNStats: {"prior": 32.0, "carry": True},
    Tent: {"lr": 0.01},
    EATA: {"lr": 0.01, "margin": 1.0, "d_margin": 1.0},
    SAR: {"lr": 0.01, "margin": 1.0, "reset_below": 0.0},
    CoTTA: {"lr": 0.001, "augmentations": 0},
}


class Net(nn.Module):
    """Solves the task of :func:`batch` by construction: class ``c`` is bright at pixel ``c``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head = nn.Linear(FEATURES, CLASSES)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[:, :CLASSES] = 2 * torch.eye(CLASSES)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x.flatten(1)))
        return logits


def batch(labels: Tensor, seed: int, signal: float = 4.0) -> Tensor:
    x = torch.randn(len(labels), 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    x.flatten(1)[torch.arange(len(labels)), labels] += signal
    return x


def mixed(batches: int = 8, size: int = 16, seed: int = 0, signal: float = 4.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [batch(torch.randint(CLASSES, (size,), generator=generator), seed + k, signal) for k in range(batches)]


def adapter(cls: type[Adapter] = Tent, norm: nn.Module | None = None, **options: Any) -> Adapter:
    torch.manual_seed(0)
    net = Net(norm or nn.BatchNorm1d(FEATURES))
    return cls(model=net, **{**BUSY[cls], "guard_window": 32, **options}).start()


def tensors(one: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def weight_of(one: Adapter) -> Tensor:
    """A tensor that adapts."""
    return next(iter(dict(one.adapted()).values()))


@pytest.mark.parametrize("cls", MOVING)
def test_non_finite_weights_never_reach_the_next_batch(cls: type[Adapter]) -> None:
    guarded, twin = adapter(cls, guard_every=3), adapter(cls, guard_every=3)
    for x in mixed(4):
        guarded(x), twin(x)
    copied = {name: held.clone() for name, held in guarded.guard.state.items()}  # after the third batch
    with torch.no_grad():
        weight_of(guarded).view(-1)[0] = math.nan
    x = mixed(1, seed=9)[0]
    answer = guarded(x)
    assert [trip["batch"] for trip in guarded.trips] == [5] and guarded.trips[0]["restored"] == "snapshot"
    assert guarded.trips[0]["reason"].startswith("non_finite") and guarded.trips[0]["figure"] >= 1
    twin.restore(copied)
    assert torch.equal(answer, twin.predict(x)) and bool(torch.isfinite(answer).all())
    assert same(guarded.state_dict(), twin.state_dict())  # weights, statistics, optimizer and method state
    for x in mixed(3, seed=20):
        assert torch.equal(guarded(x), twin(x))  # and it goes on as if the batch had never come
    assert len(guarded.trips) == 1


@pytest.mark.parametrize("cls", MOVING)
def test_before_the_first_copy_it_goes_back_to_the_start(cls: type[Adapter]) -> None:
    guarded = adapter(cls, guard_every=100)
    start = tensors(guarded)
    for x in mixed(3):
        guarded(x)
    with torch.no_grad():
        weight_of(guarded).fill_(math.inf)
    guarded(x)
    assert guarded.trips[0]["restored"] == "start" and same(guarded.state_dict(), start)
    assert guarded.guard.state == {}


def test_a_poisoned_optimizer_is_found_while_the_weights_are_still_fine() -> None:
    guarded = adapter(guard_every=1)
    x = mixed(1)[0]
    guarded(x)
    assert guarded.optimizer is not None
    for held in guarded.optimizer.state.values():
        held["exp_avg_sq"].fill_(math.inf)
    guarded(x)
    assert guarded.trips == [
        {"batch": 2, "reason": "non_finite_state", "figure": 2 * FEATURES, "restored": "snapshot"}
    ]
    assert all(bool(torch.isfinite(tensor).all()) for _, tensor in guarded.moving())


def test_a_loss_that_is_no_number() -> None:
    guarded = adapter(guard_every=1)
    x = mixed(1)[0]
    guarded(x)
    before, descend = tensors(guarded), guarded.descend

    def broken(loss: Tensor) -> None:
        descend(loss)
        guarded.last_loss = math.nan

    guarded.descend = broken  # type: ignore[method-assign]
    guarded(x)
    assert guarded.trips[0]["reason"] == "non_finite_loss" and same(guarded.state_dict(), before)


@pytest.mark.parametrize("cls", MOVING)
def test_an_input_that_overflows_leaves_nothing_behind(cls: type[Adapter]) -> None:
    guarded, twin = adapter(cls, guard_every=1), adapter(cls, guard_every=1)
    x, extreme = mixed(1)[0], torch.full((4, 1, 4, 4), 3e38) * torch.tensor([1.0, -1, 1, -1]).view(-1, 1, 1, 1)
    guarded(x), twin(x)
    guarded(extreme)
    if not guarded.trips:  # a layer that divides by an infinite deviation gives zeros
        twin(extreme)
    elif guarded.trips[0]["restored"] == "start":  # the copy overflows, too
        twin.back_to_start()
    assert guarded.trips or cls is not BNStats
    assert all(bool(torch.isfinite(tensor).all()) for _, tensor in guarded.moving())
    assert torch.equal(guarded(x), twin(x))


def test_a_copy_can_be_put_back_again_once_it_was_renewed() -> None:
    guarded = adapter(guard_every=1)
    for _ in range(3):
        guarded(mixed(1)[0])
        with torch.no_grad():
            weight_of(guarded)[0] = math.nan
        guarded(mixed(1)[0])
    assert [trip["restored"] for trip in guarded.trips] == ["snapshot"] * 3


class Tracking(Tent):
    """An adapter whose statistics are written by each forward pass."""

    def configure(self) -> None:
        super().configure()
        self.model.norm.track_running_stats = True  # type: ignore[union-attr]


def test_predictions_beside_adaptation_write_nothing() -> None:
    torch.manual_seed(0)
    one = Tracking(model=Net(nn.BatchNorm1d(FEATURES)), lr=0.01).start()
    assert "norm.running_mean" in dict(one.adapted())
    x = mixed(1)[0]
    start, expected = {name: held.clone() for name, held in one._initial.items()}, one.predict(x)
    one(x)
    moved = tensors(one)
    torch.testing.assert_close(one.start_logits(x), expected)
    one.predict(x)
    assert same(one.state_dict(), moved) and same(one._initial, start)
    assert not torch.equal(one.model.norm.running_mean, start["norm.running_mean"])  # type: ignore[union-attr, arg-type]


def test_drift_is_measured_and_stopped() -> None:
    guarded = adapter(lr=0.02, guard_every=1, max_drift=0.1)
    start = {name: tensor.detach().clone() for name, tensor in guarded.adapted()}
    drifts = []
    for x in mixed(30):
        guarded(x)
        moved = math.sqrt(sum(float((t.detach() - start[n]).pow(2).sum()) for n, t in guarded.adapted()))
        length = math.sqrt(sum(float(t.pow(2).sum()) for t in start.values()))
        assert drift_of(guarded) == pytest.approx(moved / length, rel=1e-4)
        drifts.append(moved / length)
    assert max(drifts) <= 0.1
    assert {trip["reason"] for trip in guarded.trips} == {"drift"}
    assert all(trip["figure"] > 0.1 for trip in guarded.trips)
    # What is put back has half of the way left.
    assert all(drifts[trip["batch"] - 1] <= 0.05 for trip in guarded.trips)
    free = adapter(lr=0.02, max_drift=0.0)
    for x in mixed(30):
        free(x)
    assert drift_of(free) > 0.1 and free.trips == []


def collapsed(one: Adapter, label: int = 2) -> None:
    """Offsets that make every image look like ``label``."""
    with torch.no_grad():
        one.model.norm.bias.zero_()  # type: ignore[union-attr, operator]
        one.model.norm.bias[label] = 50.0  # type: ignore[union-attr, index, operator]


@pytest.mark.parametrize(("every", "restored"), [(4, "snapshot"), (1, "start")])
def test_collapse_is_found_after_two_windows_and_undone(every: int, restored: str) -> None:
    guarded = adapter(guard_every=every, max_drift=0.0)
    start = guarded.snapshot()
    for x in mixed(4):
        guarded(x)
    good = {name: held.clone() for name, held in guarded.guard.state.items()}
    collapsed(guarded)
    stream = mixed(10, seed=5)
    for x in stream:
        answer = guarded(x)
        if guarded.trips:
            break
    # 32 samples of one class raise the suspicion, the next 32 (the 16 that raised it count) confirm it. A copy made
    # after every batch was made of the collapsed state, too, and is not the one put back.
    assert guarded.trips == [
        {"batch": 7, "reason": "collapse", "figure": pytest.approx(1.0), "restored": restored}
    ]
    assert len(answer.argmax(1).unique()) > 1
    assert same(guarded.snapshot(), good if restored == "snapshot" else start)
    for x in stream:
        guarded(x)
    assert len(guarded.trips) == 1


def test_a_copy_that_did_not_help_is_not_put_back_twice() -> None:
    guarded = adapter(guard_every=1, max_drift=0.0)
    start = tensors(guarded)
    guarded(mixed(1)[0])
    for expected in ("snapshot", "start"):
        with torch.no_grad():
            weight_of(guarded)[0] = math.nan
        guarded(mixed(1)[0])
        assert guarded.trips[-1]["restored"] == expected
    assert same(guarded.state_dict(), start)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_learning_without_labels_collapses_and_is_caught(norm: Any) -> None:
    """No tampering: a learning rate far too large, with and without the guard."""
    stream = mixed(80, seed=3, signal=1.5)
    shares = {}
    for guard in ("off", "restore"):
        one = adapter(Tent, norm(FEATURES), guard=guard, guard_every=2, max_drift=0.0, lr=3.0)
        with torch.no_grad():
            one.model.head.weight.mul_(0.25)  # type: ignore[union-attr, operator]
        seen = torch.cat([one(x).argmax(1) for x in stream][-20:])
        shares[guard] = float(seen.bincount(minlength=CLASSES).max() / len(seen))
        assert {trip["reason"] for trip in one.trips} == ({"collapse"} if guard == "restore" else set())
    assert shares["off"] > 0.95 and shares["restore"] < 0.85


def ordered(order: str) -> list[Tensor]:
    """400 images whose classes come in runs: sorted, or by Dirichlet proportions per slot of time."""
    if order == "sorted":
        labels = torch.arange(CLASSES).repeat_interleave(100)
    else:
        torch.manual_seed(4)
        shares = torch.distributions.Dirichlet(torch.full((10,), 0.1)).sample((CLASSES,))
        counts = (shares * 100).round().long().T.tolist()
        runs = [torch.full((n,), label) for slot in counts for label, n in enumerate(slot)]
        labels = torch.cat(runs)
    return [batch(part, 1000 + k) for k, part in enumerate(labels.split(8))]


@pytest.mark.parametrize("order", ["iid", "sorted", "dirichlet"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
@pytest.mark.parametrize("cls", [Tent, EATA, SAR, CoTTA])
def test_healthy_streams_do_not_trip(cls: type[Adapter], norm: Any, order: str) -> None:
    options = {"lr": 1e-3} if cls is not CoTTA else {"lr": 1e-4}
    one = adapter(cls, norm(FEATURES), **options)
    suspected = 0
    for x in mixed(50, size=8) if order == "iid" else ordered(order):
        one(x)
        suspected = max(suspected, one.guard.suspected)
    assert one.trips == []
    if norm is nn.LayerNorm:  # runs of 100 do look like collapse to a window of 32: the source model clears them
        assert bool(suspected) == (order != "iid")


@pytest.mark.parametrize("cls", [BNStats, Tent])
def test_where_the_start_is_no_better_the_source_model_answers(cls: type[Adapter]) -> None:
    """Batches of one image: normalised by its own pixels, the start answers with one class; the source does not."""

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1, affine=True)
            self.head = nn.Linear(1, CLASSES)
            with torch.no_grad():  # class by mean brightness
                self.head.weight.copy_(torch.tensor([[-4.0], [-1.0], [1.0], [4.0]]))
                self.head.bias.copy_(torch.tensor([-4.5, 0.0, 0.0, -4.5]) + torch.tensor([0.0, 0.1, 0.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(x).mean((2, 3)))
            return logits

    options: dict[str, Any] = {"lr": 0.0} if cls is Tent else {}
    one = cls(model=Image(), guard_window=20, **options).start()
    source = Source(model=Image()).start()
    generator = torch.Generator().manual_seed(0)
    stream = [torch.randn(1, 1, 4, 4, generator=generator) * 0.1 + 4 * (k % 4 - 1.5) / 1.5 for k in range(60)]
    assert len({int(source(x).argmax()) for x in stream}) == CLASSES
    answers = [one(x) for x in stream]
    assert {int(answer.argmax()) for answer in answers[:30]} == {1}
    assert [(trip["batch"], trip["reason"], trip["restored"]) for trip in one.trips] == [(39, "collapse", "source")]
    assert one.gave_up and one.guard.state == {}
    assert all(torch.equal(answer, source(x)) for answer, x in zip(answers[38:], stream[38:], strict=True))
    one.reset()
    assert not one.gave_up and torch.equal(one(stream[0]), answers[0])


def test_no_copy_while_collapse_is_suspected() -> None:
    one = adapter(Tent, nn.LayerNorm(FEATURES), guard_every=1, lr=1e-3)
    for x in ordered("sorted"):
        before = {name: held.clone() for name, held in one.guard.state.items()}
        one(x)
        if one.guard.suspected:
            assert all(torch.equal(held, before[name]) for name, held in one.guard.state.items())


def test_report_notes_and_leaves_alone() -> None:
    one = adapter(guard="report", guard_every=1, max_drift=0.0)
    x = mixed(1)[0]
    one(x)
    with torch.no_grad():
        weight_of(one)[0] = math.nan
    for _ in range(3):
        assert not bool(torch.isfinite(one(x)).all())
    assert [(trip["batch"], trip["reason"]) for trip in one.trips] == [(2, "non_finite_logits")]
    assert "restored" not in one.trips[0] and one.guard.state == {}
    off = adapter(guard="off")
    with torch.no_grad():
        weight_of(off)[0] = math.nan
    off(x)
    assert off.trips == []


def test_what_does_not_adapt_is_not_watched_for_collapse() -> None:
    torch.manual_seed(0)
    one = Source(model=Net(nn.BatchNorm1d(FEATURES)), guard_window=8).start()
    for _ in range(10):
        one(batch(torch.zeros(8, dtype=torch.long), 0))
    assert one.trips == [] and one.guard.state == {} and not one.guard.recent


def test_reset_forgets_and_start_clears() -> None:
    guarded = adapter(guard_every=1)
    x = mixed(1)[0]
    guarded(x)
    with torch.no_grad():
        weight_of(guarded)[0] = math.nan
    guarded(x)
    guarded(x)
    assert guarded.guard.state and guarded.guard.recent
    guarded.reset()
    assert not guarded.guard.state and not guarded.guard.recent and len(guarded.trips) == 1
    guarded.start()
    assert guarded.trips == []


@pytest.mark.parametrize("cls", MOVING)
def test_checkpoints_hold_the_guard(cls: type[Adapter]) -> None:
    one = adapter(cls, guard_every=2)
    for x in mixed(3):
        one(x)
    with torch.no_grad():
        weight_of(one).view(-1)[0] = math.nan
    one(x)
    one.generator.manual_seed(3)
    encoder = Encoder(one, None)  # type: ignore[arg-type]
    state = encoder.strategy_state()
    other = adapter(cls, guard_every=2)
    Decoder(other, None, encoder.tensors).strategy_state(state)  # type: ignore[arg-type]
    assert other.trips == one.trips and other.guard.recent == one.guard.recent
    assert same(other.guard.state, one.guard.state) and same(other.state_dict(), one.state_dict())
    for x in mixed(5, seed=7):
        assert torch.equal(one(x), other(x))
    for both in (one, other):
        with torch.no_grad():
            weight_of(both).view(-1)[0] = math.nan
    assert torch.equal(one(x), other(x)) and one.trips == other.trips


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guard_every": 0}, "guard_every: expected at least 1, got 0"),
        ({"guard_window": 0}, "guard_window: expected at least 1, got 0"),
        ({"collapse_share": 0.5}, "collapse_share: expected more than 0.5"),
        ({"max_drift": -1.0}, "max_drift: expected at least 0"),
        ({"guard": "on"}, "unknown guard 'on'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ContlearnError, match=message):
        adapter(**options)
