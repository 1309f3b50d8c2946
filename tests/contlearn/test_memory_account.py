"""The account of a run: each figure against arithmetic by hand, and training that does not notice it."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive as AvalancheNaive
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from contlearn import models, scenarios, strategies
from contlearn.memory import MemoryAccount, MemoryReport, account, snapshot
from contlearn.memory.account import StopAfter
from contlearn.memory.holdings import Holdings, optimizer_tensors
from contlearn.memory.saved import unique_bytes
from contlearn.scenarios.datasets import ImageData

FLOAT, LONG = 4, 8
SIDE, CLASSES, HIDDEN = 8, 6, 32
PIXELS = SIDE * SIDE
MODEL = (PIXELS * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES) * FLOAT


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)


def images(per_class: int = 8) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(CLASSES).repeat_interleave(per_class)
    return ImageData(
        name="made_up",
        train_images=torch.randint(0, 256, (len(targets), 1, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        test_images=torch.randint(0, 256, (CLASSES, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        train_targets=targets,
        test_targets=torch.arange(CLASSES),
        class_names=tuple(f"class {label}" for label in range(CLASSES)),
    )


@pytest.fixture(scope="module")
def stream() -> Any:
    """Three experiences of two classes with eight images each."""
    return scenarios.class_incremental(images(), n_experiences=3)


@pytest.fixture(scope="module")
def single() -> Any:
    """One experience of twelve images: a batch of twelve is all that its loader ever holds."""
    return scenarios.class_incremental(images(per_class=2), n_experiences=1)


def two_layers(hidden: int = HIDDEN) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))


def watched(name: str, model: nn.Module, **options: Any) -> tuple[Any, MemoryAccount]:
    strategy = strategies.create(name, model, **{"lr": 0.05, "batch_size": 12, **options})
    memory = MemoryAccount()
    strategy.plugins.insert(0, memory)
    return strategy, memory


def fit(strategy: Any, memory: MemoryAccount, stream: Any) -> list[MemoryReport]:
    if getattr(strategy, "trains_jointly", False):
        strategy.train(stream.train_stream, eval_streams=[])
        memory.close_experience(strategy)
    else:
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
            memory.close_experience(strategy)
    return memory.reports


def calls(**hooks: Callable[[Any], Any]) -> SupervisedPlugin:
    """A plug-in whose hooks call functions with the strategy."""
    plugin = type("Calls", (SupervisedPlugin,), {"memory_exempt": True})()
    for event, function in hooks.items():
        setattr(plugin, event, lambda strategy, function=function, **kwargs: function(strategy))
    return plugin


def nothing_watches() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None and not _get_current_dispatch_mode_stack()


# ---------------------------------------------------------------- by hand

BATCH = 12
INPUTS = BATCH * PIXELS * FLOAT
LABELS = BATCH * LONG  # of classes; as many again of tasks
OUTPUTS = BATCH * CLASSES * FLOAT
HIDDENS = BATCH * HIDDEN * FLOAT
NUMBER = FLOAT  # the loss, say
# Linear keeps its input, ReLU its output, cross-entropy the log-probabilities, the labels and the sum of weights.
SAVED = INPUTS + HIDDENS + OUTPUTS + LABELS + NUMBER


@pytest.mark.parametrize(
    ("options", "optimizer", "temporaries"),
    [
        # The last operator of the backward pass makes the first layer's gradients out of those of the hidden layer,
        # while backward() still has the gradient of the loss.
        ({}, 0, HIDDENS + NUMBER),
        ({"momentum": 0.9}, MODEL, HIDDENS + NUMBER),
        # Adam's step makes two temporaries of a weight's size; the backward pass is over. A step count per parameter.
        ({"optimizer": "adam"}, 2 * MODEL + 4 * FLOAT, 2 * PIXELS * HIDDEN * FLOAT),
        ({"optimizer": "adamw"}, 2 * MODEL + 4 * FLOAT, 2 * PIXELS * HIDDEN * FLOAT),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_an_mlp_to_the_byte(single: Any, options: dict[str, Any], optimizer: int, temporaries: int) -> None:
    strategy, memory = watched("naive", two_layers(), epochs=2, **options)
    (report,) = fit(strategy, memory, single)
    batch = INPUTS + 2 * LABELS
    peak = MODEL + optimizer + MODEL + batch + OUTPUTS + NUMBER + temporaries
    assert report == MemoryReport(
        weights=MODEL,
        trainable_weights=MODEL,
        gradients=MODEL,
        optimizer=optimizer,
        activations=SAVED,
        replay=0,
        persistent=MODEL + optimizer,
        peak_static=peak,
    )


def test_a_network_with_wide_activations_to_the_byte(single: Any) -> None:
    """With activations larger than weights, the peak is in the backward pass of the widest layer."""
    wide = 4096
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 1), nn.ReLU(), Widen(wide), nn.GELU(), Narrow())
    strategy, memory = watched("naive", model, epochs=2)
    (report,) = fit(strategy, memory, single)
    parameters = (PIXELS + 1) * FLOAT
    layer = BATCH * wide * FLOAT
    narrow = BATCH * FLOAT  # the output of ReLU
    assert report.weights == report.gradients == parameters
    # GELU keeps its input.
    assert report.activations == INPUTS + narrow + layer + OUTPUTS + LABELS + NUMBER
    # GELU's backward pass: its input, the gradient of its output and that of its input; the loss and its gradient.
    batch = INPUTS + 2 * LABELS
    assert report.peak_static == 3 * layer + batch + narrow + OUTPUTS + 2 * NUMBER + parameters


class Widen(nn.Module):
    """Every row's first value times 1..n: wide activations without weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, self.width).clone()


class Narrow(nn.Module):
    """The mean of each row, as often as there are classes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True).repeat(1, CLASSES)


def test_avalanches_naive_has_the_same_account(single: Any) -> None:
    ours, memory = watched("naive", two_layers(), epochs=2, momentum=0.9)
    (expected,) = fit(ours, memory, single)
    model, theirs = two_layers(), MemoryAccount()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(loggers=[])
    strategy = AvalancheNaive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        train_mb_size=12,
        train_epochs=2,
        plugins=[theirs],
        evaluator=evaluator,
    )
    (report,) = fit(strategy, theirs, single)
    assert report == expected
    assert nothing_watches()


def test_the_first_step_of_all_to_the_byte(single: Any) -> None:
    """It finds neither gradients nor momenta at its start; both are there at its end."""
    strategy, memory = watched("naive", two_layers(), epochs=1, momentum=0.9)
    (report,) = fit(strategy, memory, single)
    assert (report.gradients, report.optimizer, report.activations) == (MODEL, MODEL, SAVED)
    # Momenta are cloned from the gradients after the backward pass; the loop adds the loss to its sum last.
    assert report.peak_static == 3 * MODEL + INPUTS + 2 * LABELS + OUTPUTS + 2 * NUMBER


# ---------------------------------------------------------------- weights, gradients, optimizer


class Cast(nn.Module):
    """A network at another precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = two_layers().to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_is_that_of_the_stored_tensors(single: Any, dtype: torch.dtype) -> None:
    strategy, memory = watched("naive", Cast(dtype), epochs=2, momentum=0.9)
    (report,) = fit(strategy, memory, single)
    size = MODEL // FLOAT * dtype.itemsize
    assert (report.weights, report.gradients, report.optimizer) == (size, size, size)
    assert report.persistent == 2 * size
    # The cast input is what the first layer keeps; the batch it was made of stays in single precision.
    values = BATCH * (PIXELS + HIDDEN + CLASSES) + 1
    assert report.activations == values * dtype.itemsize + LABELS


def test_buffers_are_weights_that_are_not_trained(single: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
    parameters = (PIXELS * 5 + 5 + 2 * 5 + 5 * CLASSES + CLASSES) * FLOAT
    strategy, memory = watched("naive", model)
    (report,) = fit(strategy, memory, single)
    assert report.trainable_weights == report.gradients == parameters
    assert report.weights == parameters + 2 * 5 * FLOAT + LONG  # mean, variance and a count of batches


def test_frozen_layers_have_neither_gradients_nor_momenta(single: Any) -> None:
    model = two_layers()
    model[1].requires_grad_(False)
    head = (HIDDEN * CLASSES + CLASSES) * FLOAT
    strategy, memory = watched("naive", model, epochs=2, momentum=0.9)
    (report,) = fit(strategy, memory, single)
    assert report.weights == MODEL
    assert report.trainable_weights == report.gradients == report.optimizer == head
    assert report.activations == SAVED - INPUTS  # what the head needs and what follows
    assert report.persistent == MODEL + head


def test_tied_weights_count_once(single: Any) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(PIXELS, PIXELS), nn.Linear(PIXELS, PIXELS), nn.Linear(PIXELS, CLASSES)
    )
    model[2].weight = model[1].weight
    strategy, memory = watched("naive", model, momentum=0.9)
    (report,) = fit(strategy, memory, single)
    expected = (PIXELS * PIXELS + 2 * PIXELS + PIXELS * CLASSES + CLASSES) * FLOAT
    assert report.weights == report.trainable_weights == report.gradients == report.optimizer == expected


def test_everything_an_optimizer_nests_is_found() -> None:
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=10)
    inputs = torch.rand(5, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(inputs).pow(4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    def nested(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            yield from nested(item)

    expected = {id(tensor) for tensor in nested(dict(optimizer.state))}
    assert {id(tensor) for tensor in optimizer_tensors(optimizer)} == expected
    directions = next(state["old_dirs"] for state in optimizer.state.values())
    assert len(directions) > 1 and {id(tensor) for tensor in directions} <= expected


def test_what_outlives_an_experience_is_persistent(stream: Any) -> None:
    strategy, memory = watched("naive", two_layers(), momentum=0.9, reset_optimizer=True)
    reports = fit(strategy, memory, stream)
    assert [report.persistent for report in reports] == [MODEL] * 3
    assert [report.optimizer for report in reports] == [MODEL] * 3
    strategy, memory = watched("ewc", two_layers(), optimizer="adam")
    reports = fit(strategy, memory, stream)
    adam = 2 * MODEL + 4 * FLOAT
    assert [report.persistent for report in reports] == [MODEL + adam + 2 * k * MODEL for k in (1, 2, 3)]
    strategy, memory = watched("agem", two_layers(), patterns_per_experience=5, sample_size=6)
    reports = fit(strategy, memory, stream)
    # The reference gradient and the loaders of the memory are made anew.
    assert [report.persistent for report in reports] == [MODEL + 5 * k * (PIXELS + 2 * LONG) for k in (1, 2, 3)]
    assert "reference_gradient" in reports[-1].method_state


# ---------------------------------------------------------------- reports


def test_one_report_per_experience_reaches_the_record(stream: Any) -> None:
    found: list[MemoryReport] = []
    strategy = strategies.create("replay", two_layers(), batch_size=6, memory_size=10)
    memory = MemoryAccount(found.append)
    strategy.plugins.insert(0, memory)
    assert fit(strategy, memory, stream) == found
    assert len(found) == 3
    # The memory is filled after training: the report has it, the first step did not.
    assert [(report.exemplars, report.replay) for report in found] == [(10, 10 * (PIXELS + 2 * LONG))] * 3
    assert found[0].peak_static < found[1].peak_static


def test_a_record_is_flat_and_sums_the_methods_state() -> None:
    report = MemoryReport(1, 2, 3, 4, 5, 6, {"fisher": 70, "anchor": 8}, exemplars=9, persistent=10, peak_static=50)
    assert report.as_record() == {
        "weights": 1, "trainable_weights": 2, "gradients": 3, "optimizer": 4, "activations": 5, "replay": 6,
        "method_state": 78, "method_state.fisher": 70, "method_state.anchor": 8,
        "exemplars": 9, "persistent": 10, "peak_static": 50,
    }  # fmt: skip
    assert report.ratio is None
    assert MemoryReport(0, 0, 0, 0, 0, 0, peak_static=50, peak_measured=60).ratio == 1.2
    assert MemoryReport(0, 0, 0, 0, 0, 0, peak_static=50, peak_measured=60).as_record()["peak_measured"] == 60
    assert MemoryReport(0, 0, 0, 0, 0, 0, peak_measured=60).ratio is None


def test_state_that_lives_during_training_only_is_named_too(stream: Any) -> None:
    strategy, memory = watched("si", two_layers())
    reports = fit(strategy, memory, stream)
    during = {name.rpartition(".")[2] for name in reports[-1].method_state}
    assert during == {"importance", "anchor", "path", "path_start", "weights_before_step"}
    assert set(reports[-1].method_state.values()) == {MODEL}
    assert reports[-1].persistent == MODEL + 2 * MODEL


@pytest.mark.parametrize(("name", "penalties"), [("naive", [0, 0, 0]), ("ewc", [0, 1, 2]), ("si", [0, 1, 1])])
def test_what_the_method_holds_is_no_activation_as_well(stream: Any, name: str, penalties: list[int]) -> None:
    """A penalty ``fisher * (weights - anchor)^2`` saves the difference, which is new, and the Fisher, which is held."""
    strategy, memory = watched(name, two_layers(), batch_size=16)
    reports = fit(strategy, memory, stream)
    plain = (SAVED - NUMBER) // 12 * 16 + NUMBER
    assert [report.activations for report in reports] == [plain + count * MODEL for count in penalties]


def test_a_smaller_last_batch_does_not_hide_the_full_ones(stream: Any) -> None:
    """Sixteen images in batches of twelve: the second step sees four."""
    strategy, memory = watched("naive", two_layers(), epochs=1)
    reports = fit(strategy, memory, stream)
    # Labels are views of what the loader gathered at once, here all sixteen.
    assert [report.activations - SAVED for report in reports] in ([0] * 3, [(16 - 12) * LONG] * 3)


def test_an_experience_of_one_step_is_measured(stream: Any) -> None:
    strategy, memory = watched("naive", two_layers(), epochs=1, batch_size=16)
    reports = fit(strategy, memory, stream)
    assert [report.activations for report in reports] == [(SAVED - NUMBER) // 12 * 16 + NUMBER] * 3
    assert all(report.gradients == MODEL for report in reports)


@pytest.mark.parametrize("name", strategies.list(kind=("class-incremental", "plug-in")))
def test_the_peak_has_room_for_all_that_is_there_at_once(stream: Any, name: str) -> None:
    options = {"memory_size": 12} if "memory_size" in strategies.parameters(name) else {}
    model = models.create("mlp", stream, seed=0, hidden=HIDDEN)
    if name == "adab2n":  # which replaces BatchNorm
        model.backbone = nn.Sequential(model.backbone, nn.BatchNorm1d(HIDDEN))
    strategy, memory = watched(name, model, epochs=2, momentum=0.9, **options)
    at_once: list[list[int]] = []

    def add(strategy: Any) -> None:
        held = Holdings(strategy)
        parts = [*model.parameters(), *model.buffers(), *optimizer_tensors(strategy.optimizer), *held.tensors()]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        at_once[-1].append(unique_bytes([*parts, *gradients, *strategy.mbatch]) + held.replay_bytes())

    strategy.plugins.append(
        calls(before_training_exp=lambda strategy: at_once.append([]), after_training_iteration=add)
    )
    reports = fit(strategy, memory, stream)
    assert len(reports) == len(at_once) == (1 if name == "joint" else 3)
    for report, steps in zip(reports, at_once, strict=True):
        assert report.peak_static >= max(steps[:2]) > report.weights + report.optimizer
        assert report.peak_static >= report.weights + report.optimizer + report.activations > report.weights
        assert report.peak_static >= report.persistent


# ---------------------------------------------------------------- online streams


def test_an_online_stream_is_measured_on_two_pieces_of_each_experience(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = scenarios.online(images(), n_experiences=3, experience_size=5)
    steps: list[int] = []

    class Counting(account.LiveStorages):
        def __enter__(self) -> Any:
            steps.append(len(strategy.mbatch[0]))
            return super().__enter__()

    monkeypatch.setattr(account, "LiveStorages", Counting)
    strategy, memory = watched("naive", two_layers(), batch_size=5)
    for experience in pieces.train_stream:
        strategy.train(experience, eval_streams=[])
        if experience.logging().is_last_subexp:
            memory.close_experience(strategy)
    assert steps == [5, 1] * 3  # sixteen images are pieces of five, five, five and one
    full = (SAVED - NUMBER) // 12 * 5 + NUMBER
    assert [report.activations for report in memory.reports] == [full] * 3
    assert [report.gradients for report in memory.reports] == [MODEL] * 3


def test_two_steps_of_an_experience_are_watched(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    class Counting(account.LiveStorages):
        def __enter__(self) -> Any:
            entered.append(strategy.clock.train_exp_iterations)
            return super().__enter__()

    monkeypatch.setattr(account, "LiveStorages", Counting)
    strategy, memory = watched("naive", two_layers(), batch_size=4, epochs=2)
    fit(strategy, memory, stream)
    assert entered == [0, 1] * 3


# ---------------------------------------------------------------- training does not notice


class Normed(nn.Module):
    """BatchNorm, dropout, attention and a recurrent layer: all that draws numbers or keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x)).relu().flatten(2).transpose(1, 2)
        return self.dropout(self.recurrent(self.attention(x))[0].mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("naive", {"momentum": 0.9}),
        ("naive", {"optimizer": "adam", "clip_grad_norm": 0.5, "lr": 0.01}),
        ("derpp", {"memory_size": 12}),
        ("agem", {"patterns_per_experience": 5, "sample_size": 6}),
        ("icarl", {"memory_size": 12}),
        ("si", {}),
        ("lwf", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("optimizer", ""),
)
def test_weights_are_the_same_bits_with_and_without(stream: Any, name: str, options: dict[str, Any]) -> None:
    def train(with_account: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        strategy = strategies.create(name, Normed(), **{"lr": 0.05, "batch_size": 6, "epochs": 2, **options})
        if with_account:
            strategy.plugins.insert(0, MemoryAccount())
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
            if with_account:
                strategy.plugins[0].close_experience(strategy)
        if with_account:
            assert len(strategy.plugins[0].reports) == 3 and strategy.plugins[0].reports[-1].activations > 0
        return strategy.model.state_dict(), torch.get_rng_state()

    (plain, numbers), (accounted, drawn) = train(False), train(True)
    assert all(tensor.isfinite().all() for tensor in plain.values())
    assert [key for key, tensor in plain.items() if not tensor.equal(accounted[key])] == []
    assert numbers.equal(drawn)


def test_sparse_gradients_do_not_stop_it(single: Any) -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(256, CLASSES, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.table((x * 255).long().flatten(1)).mean(1)

    strategy, memory = watched("naive", Looked(), epochs=2)
    (report,) = fit(strategy, memory, single)
    rows = BATCH * PIXELS
    assert report.weights == 256 * CLASSES * FLOAT
    assert report.gradients == rows * (LONG + CLASSES * FLOAT)  # the row of every pixel and its gradient


# ---------------------------------------------------------------- nothing stays behind


class Failure(Exception):
    """What a step of these tests fails with."""


def fail(strategy: Any) -> None:
    assert not nothing_watches(), "the step is not watched"
    raise Failure


@pytest.mark.parametrize("hook", ["criterion", "before_forward", "after_backward", "after_update"])
@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
def test_a_step_that_fails_leaves_nothing_behind(stream: Any, hook: str, error: type[BaseException]) -> None:
    strategy, memory = watched("naive", two_layers(), momentum=0.9)

    def act(strategy: Any) -> None:
        assert not nothing_watches(), "the step is not watched"
        raise error

    if hook == "criterion":
        strategy.criterion = lambda: act(strategy)
    else:
        strategy.plugins.append(calls(**{hook: act}))
    first, second, _ = stream.train_stream
    with pytest.raises(error):
        strategy.train(first, eval_streams=[])
    assert nothing_watches()
    value = torch.rand(3, requires_grad=True)
    assert (value * value).grad_fn._saved_self is value

    if hook == "criterion":
        del strategy.criterion
    else:
        strategy.plugins.pop()
    strategy.train(second, eval_streams=[])
    report = memory.close_experience(strategy)
    assert (report.gradients, report.optimizer) == (MODEL, MODEL)
    assert report.activations >= SAVED
    assert "_train_exp" not in vars(strategy)


def test_a_plug_in_that_fails_before_training_leaves_nothing_behind(stream: Any) -> None:
    strategy, memory = watched("naive", two_layers())

    def act(strategy: Any) -> None:
        raise Failure

    strategy.plugins.append(calls(before_training_exp=act))
    for _ in range(2):
        with pytest.raises(Failure):
            strategy.train(stream.train_stream[0], eval_streams=[])
    strategy.plugins.pop()
    (report, *_) = fit(strategy, memory, stream)
    assert report.gradients == MODEL
    assert nothing_watches() and "_train_exp" not in vars(strategy)


def test_a_failure_in_avalanches_own_loop_leaves_nothing_behind(stream: Any) -> None:
    model = two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(loggers=[])
    plugins = [MemoryAccount(), calls(after_forward=fail)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = AvalancheNaive(model=model, optimizer=optimizer, train_mb_size=12, plugins=plugins, evaluator=evaluator)
    with pytest.raises(Failure):
        strategy.train(stream.train_stream[0], eval_streams=[])
    assert nothing_watches()


def test_training_that_stops_early_leaves_nothing_behind(stream: Any) -> None:
    strategy, memory = watched("naive", two_layers(), batch_size=4, epochs=5)
    strategy.plugins.insert(1, StopAfter(1))
    strategy.train(stream.train_stream[0], eval_streams=[])
    assert strategy.clock.train_iterations == 1
    report = memory.close_experience(strategy)
    assert report.gradients == MODEL
    assert nothing_watches()


def test_an_experience_without_a_step_has_what_rests(stream: Any) -> None:
    strategy, memory = watched("naive", two_layers(), momentum=0.9)
    fit(strategy, memory, stream)
    strategy.plugins.append(calls(before_training_epoch=lambda strategy: strategy.stop_training()))
    strategy.train(stream.train_stream[0], eval_streams=[])
    report = memory.close_experience(strategy)
    assert (report.gradients, report.activations) == (0, 0)
    assert report.peak_static == report.persistent == 2 * MODEL
    assert report == snapshot(strategy)


@pytest.mark.parametrize("name", ["naive", "derpp", "er_ace", "si"])
def test_the_account_keeps_no_tensor_alive(stream: Any, name: str) -> None:
    """Batches, old copies and the memory's batches go when their owner lets them go, collector or not."""
    options = {"memory_size": 12} if "memory_size" in strategies.parameters(name) else {}
    strategy, memory = watched(name, two_layers(), batch_size=4, momentum=0.9, **options)
    batches: list[Any] = []
    replaced: list[bool] = []

    def at_start(strategy: Any) -> None:
        batches.append(weakref.ref(strategy.mbatch[0].untyped_storage()))

    def at_loss(strategy: Any) -> None:
        # DER joins the batch and one of memory in a new tensor.
        replaced.append(batches[-1]() is None)

    strategy.plugins.insert(1, calls(before_training_iteration=at_start, before_backward=at_loss))
    gc.disable()
    try:
        fit(strategy, memory, stream)
        assert [batch() for batch in batches] == [None] * len(batches)
        assert any(replaced) == (name == "derpp")
        if name == "derpp":  # from the second experience on, watched steps (the first two) and others alike
            assert replaced == [False] * 4 + [True] * 8
    finally:
        gc.enable()
