"""What strategies hold: every tensor that a walk of the garbage collector's graph finds is in the account, once."""

from __future__ import annotations

import collections
import copy
import gc
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import avalanche.training.supervised as avalanche_strategies
import numpy as np
import pytest
import torch
from avalanche.benchmarks import CLScenario, CLStream
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from contlearn import models, scenarios, strategies
from contlearn.flatdata import flatten, leaf_ids
from contlearn.memory.holdings import NOT_HELD, Holdings, sample_bytes
from contlearn.scenarios.datasets import ImageData

FLOAT, LONG = 4, 8
SIDE, CLASSES, PER_CLASS, HIDDEN = 4, 6, 8, 8
PIXELS = SIDE * SIDE
EXEMPLAR = PIXELS + 2 * LONG  # uint8 pixels, an int64 label, an int64 index
TRUNK = (PIXELS * HIDDEN + HIDDEN) * FLOAT
MODEL = TRUNK + (HIDDEN * CLASSES + CLASSES) * FLOAT  # with the outputs of all classes


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(scope="module")
def stream() -> Any:
    """Three experiences of two classes with eight images each."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    data = ImageData(
        name="made_up",
        train_images=torch.randint(0, 256, (len(targets), 1, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        test_images=torch.randint(0, 256, (2 * CLASSES, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        train_targets=targets,
        test_targets=torch.arange(CLASSES).repeat(2),
        class_names=tuple(f"class {label}" for label in range(CLASSES)),
    )
    return scenarios.class_incremental(data, n_experiences=3)


def network(stream: Any, head: str = "growing") -> nn.Module:
    return models.create("mlp", stream, seed=0, hidden=HIDDEN, dropout=0.0, head=head)


def ours(name: str, stream: Any, *, head: str = "growing", **options: Any) -> Any:
    model = network(stream, head)
    if name == "adab2n":  # which replaces BatchNorm
        model.backbone = nn.Sequential(model.backbone, nn.BatchNorm1d(HIDDEN))
    return strategies.create(name, model, **{"lr": 0.05, "momentum": 0.9, "batch_size": 6, **options})


def avalanches(cls: type, stream: Any, *, head: str = "growing", **options: Any) -> Any:
    model = network(stream, head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(loggers=[])
    return cls(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=6,
        eval_mb_size=64,
        evaluator=evaluator,
        **options,
    )


def fit(strategy: Any, stream: Any, experiences: int = 3) -> None:
    if getattr(strategy, "trains_jointly", False) or type(strategy).__name__ == "JointTraining":
        strategy.train(stream.train_stream, eval_streams=[])
        return
    for experience in list(stream.train_stream)[:experiences]:
        strategy.train(experience, eval_streams=[])


class InStep(SupervisedPlugin):
    """Calls a function at the end of the second iteration of the last experience trained on."""

    memory_exempt = True

    def __init__(self, look: Callable[[Any], None], last: int = 2) -> None:
        super().__init__()
        self.look, self.last, self.looked = look, last, 0

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_exp_counter == self.last and strategy.clock.train_exp_iterations == 1:
            self.looked += 1
            self.look(strategy)


# ---------------------------------------------------------------- nothing is missing


def reachable(roots: Iterable[Any], stop: set[int], kinds: tuple[type, ...] = ()) -> list[tuple[Tensor, str]]:
    """Every tensor the garbage collector can get to from ``roots``, and the types of the objects on the way.

    Code leads to all there is, so of functions only what they close over is followed, and neither classes, modules and
    their dictionaries nor the stream that everything was cut from.
    """
    globals_ = {id(vars(module)) for module in list(sys.modules.values()) if hasattr(module, "__dict__")}
    opaque = (type, types.ModuleType, types.CodeType, CLScenario, CLStream, *kinds)
    found: list[tuple[Tensor, str]] = []
    seen: dict[int, Any] = {}
    todo = [(root, "") for root in roots]
    while todo:
        value, path = todo.pop()
        if id(value) in seen or id(value) in globals_ or id(value) in stop or isinstance(value, opaque):
            continue
        seen[id(value)] = value
        path = f"{path}/{type(value).__name__}"
        if isinstance(value, Tensor):
            found.append((value, path))
            following = [value.grad] if value.is_leaf else []
        elif isinstance(value, types.FunctionType):
            following = [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)]
        else:
            following = gc.get_referents(value)
        todo += [(item, path) for item in following]
    return found


def unaccounted(strategy: Any, kinds: tuple[type, ...] = ()) -> list[str]:
    """Tensors that a strategy holds beside what is documented as not its own, and that its account does not have."""
    transient = NOT_HELD - {"plugins", "model", "optimizer"}
    stop = {id(value) for name, value in vars(strategy).items() if name in transient}
    stop |= {id(plugin) for plugin in strategy.plugins if getattr(type(plugin), "memory_exempt", False)}
    stop -= {id(None)}
    held = Holdings(strategy)
    known = [*strategy.model.parameters(), *strategy.model.buffers(), *held.tensors()]
    known += [parameter.grad for parameter in strategy.model.parameters() if parameter.grad is not None]
    known += [t for state in strategy.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    for dataset in held.exemplars:
        known += [value for leaf in leaf_ids(dataset)[0] for value in vars(leaf).values() if isinstance(value, Tensor)]
        for attribute in dataset._data_attributes.values():
            for leaf in flatten(attribute.data)[0]:
                known += (
                    [leaf.tensor] if hasattr(leaf, "tensor") else [item for item in leaf if isinstance(item, Tensor)]
                )
    storages = {tensor.untyped_storage()._cdata for tensor in known}
    return [
        f"{tuple(tensor.shape)} {tensor.dtype} at {path}"
        for tensor, path in reachable([strategy], stop, kinds)
        if tensor.untyped_storage().nbytes() and tensor.untyped_storage()._cdata not in storages
    ]


@pytest.mark.parametrize("name", strategies.list(kind=("class-incremental", "plug-in")))
def test_nothing_that_our_strategies_hold_is_missing(stream: Any, name: str) -> None:
    missing: list[str] = []
    strategy = ours(name, stream)
    look = InStep(lambda strategy: missing.extend(unaccounted(strategy)), last=0 if name == "joint" else 2)
    strategy.plugins.append(look)
    fit(strategy, stream)
    assert look.looked == 1
    missing += unaccounted(strategy)
    strategy.eval(stream.test_stream)
    missing += unaccounted(strategy)
    assert missing == []


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("Naive", {}),
        ("EWC", {"ewc_lambda": 1.0}),
        ("EWC", {"ewc_lambda": 1.0, "mode": "online", "decay_factor": 0.9}),
        ("LwF", {"alpha": 1.0, "temperature": 2.0}),
        ("SynapticIntelligence", {"si_lambda": 1.0}),
        ("GDumb", {"mem_size": 10}),
        ("AGEM", {"patterns_per_exp": 5, "sample_size": 6}),
        ("Replay", {"mem_size": 10}),
        ("DER", {"mem_size": 10, "batch_size_mem": 4, "head": "fixed"}),
        ("MAS", {"verbose": False}),
        ("ER_ACE", {"mem_size": 10, "batch_size_mem": 4}),
        ("MIR", {"mem_size": 10, "subsample": 4, "batch_size_mem": 4}),
        ("FromScratchTraining", {}),
        ("Cumulative", {}),
        ("JointTraining", {"head": "fixed"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("mode", ""),
)
def test_nothing_that_avalanches_strategies_hold_is_missing(stream: Any, cls: str, options: dict[str, Any]) -> None:
    # A generator that waits in the middle of a loader still has its last batch, which is a loader's and not held.
    strategy = avalanches(getattr(avalanche_strategies, cls), stream, **options)
    missing: list[str] = []
    look = InStep(
        lambda strategy: missing.extend(unaccounted(strategy, (types.GeneratorType,))),
        last=0 if cls == "JointTraining" else 2,
    )
    strategy.plugins.append(look)
    fit(strategy, stream)
    assert look.looked == 1
    missing += unaccounted(strategy, (types.GeneratorType,))
    assert missing == []


@pytest.mark.parametrize("place", ["closure", "default", "partial", "generator"])
def test_the_walk_finds_what_the_account_cannot_see(stream: Any, place: str) -> None:
    """The tests above can fail: a tensor that only code holds is found, and it is in no account."""
    hidden = torch.zeros(123)
    strategy = ours("naive", stream)
    fit(strategy, stream, 1)
    assert unaccounted(strategy) == []

    def default(kept: Tensor = hidden) -> None: ...

    def generator() -> Any:
        yield hidden.sum()

    waiting = generator()
    next(waiting)
    holder: Any = {
        "closure": lambda: hidden,
        "default": default,
        "partial": collections.namedtuple("Holder", "inner")(lambda: hidden),
        "generator": waiting,
    }[place]
    strategy.plugins.append(SupervisedPlugin())
    strategy.plugins[-1].holder = holder
    assert [found.split(" at ")[0] for found in unaccounted(strategy)] == ["(123,) torch.float32"]


# ---------------------------------------------------------------- exemplars


def test_replay_is_pixels_labels_and_indices(stream: Any) -> None:
    strategy = ours("replay", stream, memory_size=10)
    counts = []
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        counts.append((Holdings(strategy).exemplar_count(), Holdings(strategy).replay_bytes()))
    assert counts == [(10, 10 * EXEMPLAR)] * 3
    roomy = ours("replay", stream, memory_size=1000)
    fit(roomy, stream, 2)
    assert Holdings(roomy).exemplar_count() == 4 * PER_CLASS
    assert Holdings(roomy).replay_bytes() == 4 * PER_CLASS * EXEMPLAR


@pytest.mark.parametrize("name", ["joint", "cumulative"])
def test_the_bounds_hold_all_training_data_and_no_test_data(stream: Any, name: str) -> None:
    strategy = ours(name, stream)
    fit(strategy, stream)
    strategy.eval(stream.test_stream)
    held = Holdings(strategy)
    assert held.exemplar_count() == CLASSES * PER_CLASS
    assert held.replay_bytes() == CLASSES * PER_CLASS * EXEMPLAR
    assert held.state_bytes() == {}


@pytest.mark.parametrize("name", ["der", "derpp"])
@pytest.mark.parametrize("memory_size", [12, 1000])
def test_der_keeps_each_exemplars_logits_once_at_the_width_they_had(stream: Any, name: str, memory_size: int) -> None:
    strategy = ours(name, stream, memory_size=memory_size)
    found: dict[str, tuple[int, int]] = {}

    def look(strategy: Any) -> None:
        # The batches come from a view of the same memory: nothing is kept twice for that.
        found["in step"] = (Holdings(strategy).exemplar_count(), Holdings(strategy).replay_bytes())

    strategy.plugins.append(InStep(look))
    fit(strategy, stream)
    found["after"] = (Holdings(strategy).exemplar_count(), Holdings(strategy).replay_bytes())

    def expected(experiences: int) -> tuple[int, int]:
        each = min(PER_CLASS, memory_size // (2 * experiences))
        logits = sum(2 * each * 2 * (done + 1) * FLOAT for done in range(experiences))
        return 2 * experiences * each, 2 * experiences * each * EXEMPLAR + logits

    assert found == {"in step": expected(2), "after": expected(3)}


def test_avalanches_der_keeps_logits_too(stream: Any) -> None:
    strategy = avalanches(avalanche_strategies.DER, stream, mem_size=12, batch_size_mem=4, head="fixed")
    fit(strategy, stream)
    assert Holdings(strategy).replay_bytes() == 12 * (EXEMPLAR + CLASSES * FLOAT)


def test_an_exemplar_of_two_buffers_counts_once(stream: Any) -> None:
    first, second = (experience.dataset for experience in list(stream.train_stream)[:2])
    one, two = SupervisedPlugin(), SupervisedPlugin()
    one.memory = first.subset([0, 1, 2])
    two.memory = [first.subset([2, 3]), second.subset([0]), first.subset([2, 2]), first.subset([])]
    strategy = ours("naive", stream, plugins=[one, two])
    held = Holdings(strategy)
    assert held.exemplar_count() == 5
    assert held.replay_bytes() == 5 * EXEMPLAR


def test_values_stored_with_exemplars_count_once_at_their_size(stream: Any) -> None:
    data = next(iter(stream.train_stream)).dataset.subset([0, 1, 2])
    rows = torch.rand(3, 5)
    plugin = SupervisedPlugin()
    plugin.memory = type(data)(
        [data],
        data_attributes=[
            DataAttribute([row for row in rows], "features", use_in_getitem=True),  # noqa: C416 - rows, not a tensor
            DataAttribute([7, 8, 9], "scores", use_in_getitem=True),
        ],
    )
    plugin.view = plugin.memory.subset([0, 2])
    strategy = ours("naive", stream, plugins=[plugin])
    assert Holdings(strategy).replay_bytes() == 3 * (EXEMPLAR + 5 * FLOAT + 8)


def test_exemplars_weigh_what_their_data_set_stores() -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    values = torch.rand(5, 3, 2, 2)
    picture = Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8))
    assert sample_bytes(TensorDataset(values, labels)) == 12 * FLOAT
    assert sample_bytes(TensorDataset(values.half(), labels)) == 12 * 2
    assert sample_bytes([(picture, 0)]) == 4 * 6 * 3
    assert sample_bytes([(picture.convert("L"), 0)]) == 4 * 6
    assert sample_bytes([(np.zeros((2, 5)), 0)]) == 80
    plugin = SupervisedPlugin()
    plugin.memory = AvalancheDataset([TensorDataset(values, labels)]).subset([4, 0])
    assert Holdings(fake(plugins=[plugin])).replay_bytes() == 2 * (12 * FLOAT + 2 * LONG)


# ---------------------------------------------------------------- method state, to the byte


def state_after(strategy: Any, stream: Any, experiences: int = 3) -> dict[str, int]:
    fit(strategy, stream, experiences)
    return Holdings(strategy).state_bytes()


def state_in_step(strategy: Any, stream: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    strategy.plugins.append(InStep(lambda strategy: found.update(Holdings(strategy).state_bytes())))
    fit(strategy, stream)
    return found


@pytest.mark.parametrize("experiences", [1, 2, 3])
def test_ewc_keeps_one_fisher_and_one_anchor_per_experience(stream: Any, experiences: int) -> None:
    expected = {"anchor": experiences * MODEL, "fisher": experiences * MODEL}
    assert state_after(ours("ewc", stream, head="fixed"), stream, experiences) == expected
    theirs = avalanches(avalanche_strategies.EWC, stream, head="fixed", ewc_lambda=1.0)
    assert state_after(theirs, stream, experiences) == expected


def test_online_ewc_keeps_one_of_each(stream: Any) -> None:
    strategy = ours("ewc", stream, head="fixed", mode="online", decay_factor=0.9)
    assert state_after(strategy, stream) == {"anchor": MODEL, "fisher": MODEL}


def test_lwf_keeps_one_teacher(stream: Any) -> None:
    assert state_after(ours("lwf", stream), stream, 1) == {"teacher": TRUNK + (HIDDEN * 2 + 2) * FLOAT}
    assert state_after(ours("lwf", stream), stream) == {"teacher": MODEL}
    theirs = avalanches(avalanche_strategies.LwF, stream, alpha=1.0, temperature=2.0)
    assert state_after(theirs, stream) == {"teacher": MODEL}


def test_si_keeps_importance_and_anchor_and_a_path_while_it_trains(stream: Any) -> None:
    def by_kind(state: dict[str, int]) -> dict[str, int]:
        return {name.rpartition(".")[2]: size for name, size in state.items()}

    assert by_kind(state_after(ours("si", stream), stream)) == {"importance": MODEL, "anchor": MODEL}
    assert by_kind(state_in_step(ours("si", stream), stream)) == {
        "importance": MODEL, "anchor": MODEL, "path": MODEL, "path_start": MODEL, "weights_before_step": MODEL,
    }  # fmt: skip


def test_agem_keeps_a_reference_gradient(stream: Any) -> None:
    strategy = ours("agem", stream, patterns_per_experience=5, sample_size=6, head="fixed")
    state = state_in_step(strategy, stream)
    # Two memories of five exemplars: a shuffled order, place and leaf of each exemplar, and its task label.
    assert state == {"reference_gradient": MODEL, "memory_loader": 2 * 5 * 4 * LONG}
    assert Holdings(strategy).replay_bytes() == 3 * 5 * EXEMPLAR


def test_gdumb_keeps_the_initial_model(stream: Any) -> None:
    state = state_after(ours("gdumb", stream, memory_size=12, head="fixed"), stream)
    # Reservoirs keep the weights that drew their twelve exemplars, and not those of every candidate.
    assert state == {"initial_model": MODEL, "reservoir_weights": 12 * FLOAT}


def test_icarl_keeps_a_teacher_and_class_means_once_they_are_used(stream: Any) -> None:
    strategy = ours("icarl", stream, memory_size=12)
    assert state_after(strategy, stream) == {"teacher": MODEL}
    strategy.eval(stream.test_stream)
    assert Holdings(strategy).state_bytes() == {"teacher": MODEL, "class_means": CLASSES * HIDDEN * FLOAT}


def test_a_memory_served_in_batches_is_not_the_stream(stream: Any) -> None:
    """Samplers point into the stream's images; these are neither copied nor counted."""
    state = state_in_step(ours("er_ace", stream, memory_size=12, batch_size_memory=4), stream)
    whole = CLASSES * PER_CLASS * (PIXELS + LONG)
    assert state["memory_loader"] == 12 * 4 * LONG < whole  # order, leaf, place, task label
    # One batch: four float images, labels, task labels (two storages), and its outputs.
    assert state["memory_batch"] == 4 * (PIXELS * FLOAT + 2 * LONG) + 4 * CLASSES * FLOAT


def test_what_the_next_experience_makes_anew_does_not_last(stream: Any) -> None:
    strategy = ours("agem", stream, patterns_per_experience=5, sample_size=6)
    fit(strategy, stream)
    assert set(Holdings(strategy).state) == {"memory_loader", "reference_gradient"}
    assert Holdings(strategy, lasting=True).state_bytes() == {}
    assert Holdings(strategy, lasting=True).replay_bytes() == Holdings(strategy).replay_bytes() == 15 * EXEMPLAR


# ---------------------------------------------------------------- any strategy, any plug-in


class Fake:
    """The least that a strategy has."""


def fake(model: nn.Module | None = None, plugins: Iterable[Any] = (), **attributes: Any) -> Any:
    strategy = Fake()
    model = model or nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vars(strategy).update(model=model, optimizer=optimizer, plugins=list(plugins), evaluator=None, **attributes)
    return strategy


def floats(count: int) -> Tensor:
    return torch.zeros(count)


class Bank:
    """A helper of a user's plug-in."""

    def __init__(self, size: int) -> None:
        self.features = floats(size)
        self.more = {"a": [floats(size)], 3: (floats(size), {"b": collections.deque([floats(size)])})}


class Slotted:
    __slots__ = ("features",)

    def __init__(self, size: int) -> None:
        self.features = floats(size)


def test_whatever_holds_a_tensor_is_walked() -> None:
    teacher = nn.BatchNorm1d(3)  # parameters, statistics and a counter of 8 bytes
    strategy = fake(
        tensor=floats(1),
        listed=[floats(2), (floats(3),)],
        named={"x": floats(4)},
        bank=Bank(10),
        slotted=Slotted(20),
        array=np.zeros((3, 5), dtype=np.int16),
        arrays=np.array([np.zeros(2), floats(7), None], dtype=object),
        words=np.array(["abc", "d"]),
        teacher=teacher,
        batches=TensorDataset(floats(6)),
        loader=DataLoader(TensorDataset(floats(8))),
    )
    assert Holdings(strategy).state_bytes() == {
        "Fake.tensor": 4,
        "Fake.listed": 20,
        "Fake.named": 16,
        "Fake.bank": 4 * 10 * FLOAT,
        "Fake.slotted": 80,
        "Fake.array": 30,
        "Fake.arrays": 16 + 28,
        "Fake.words": 2 * 3 * 4,
        "Fake.teacher": 4 * 3 * FLOAT + 8,
        "Fake.batches": 24,
        "Fake.loader": 32,
    }


def test_a_second_optimizers_momenta_are_held() -> None:
    meta = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(meta.parameters())
    meta(torch.rand(1, 3)).sum().backward()
    optimizer.step()
    held = Holdings(fake(meta=meta, meta_optimizer=optimizer)).state_bytes()
    assert held == {"Fake.meta": 12 * FLOAT, "Fake.meta_optimizer": 2 * 12 * FLOAT + 2 * FLOAT}


def test_each_storage_counts_once() -> None:
    whole = floats(100)
    teacher = nn.Linear(5, 5)
    plugin = SupervisedPlugin()
    plugin.same, plugin.teacher = whole[50:], teacher
    strategy = fake(a=whole, b=[whole[:10], floats(1)], teacher=teacher, plugins=[plugin])
    assert Holdings(strategy).state_bytes() == {"Fake.a": 400, "Fake.b": 4, "Fake.teacher": 30 * FLOAT}


def test_a_view_keeps_all_of_its_storage() -> None:
    assert Holdings(fake(row=floats(1000).view(10, 100)[3])).state_bytes() == {"Fake.row": 4000}


def test_weights_and_momenta_are_not_counted_again() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    strategy = fake(model)
    strategy.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(4, 3)).sum().backward()
    strategy.optimizer.step()
    momentum = strategy.optimizer.state[model[0].weight]["momentum_buffer"]
    vars(strategy).update(
        trunk=model[0],
        head=nn.Sequential(model[1], nn.Linear(3, 2)),  # shares a layer
        weights={name: parameter.data.view(-1) for name, parameter in model.named_parameters()},
        statistics=model[1].running_mean,
        momentum=momentum[0],
    )
    assert Holdings(strategy).state_bytes() == {"Fake.head": 8 * FLOAT}


def test_what_a_model_holds_beside_parameters_and_buffers_is_held() -> None:
    """Avalanche's nearest-class-mean classifier keeps its means in a plain dictionary."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].class_means = {0: floats(10), 1: floats(10)}
    teacher = copy.deepcopy(model)
    assert Holdings(fake(model, teacher=teacher)).state_bytes() == {
        "Fake.teacher": 6 * FLOAT + 80,
        "Linear.class_means": 80,
    }


def test_names_are_the_owners_own_and_the_longest_that_fits() -> None:
    class Plugin(SupervisedPlugin):
        memory_names = {"bank": "bank", "bank.features": "features"}

    class Derived(Plugin):
        memory_names = {"bank.more.a": "more", "extra": "extra"}

    plugin = Derived()
    plugin.bank, plugin.extra, plugin.rest = Bank(10), floats(1), {"deep": floats(2)}
    held = Holdings(fake(plugins=[plugin])).state_bytes()
    assert held == {"bank": 80, "features": 40, "more": 40, "extra": 4, "Derived.rest": 8}


def test_watching_plug_ins_and_excluded_attributes_are_left_out() -> None:
    class Watcher(SupervisedPlugin):
        memory_exempt = True

    class Method(SupervisedPlugin):
        memory_exclude = ("cache",)
        checkpoint_exclude = ("scratch",)

    watcher, method = Watcher(), Method()
    watcher.history, method.cache, method.scratch, method.kept = (floats(n) for n in (1, 2, 3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(loggers=[])
    evaluator.kept = floats(9)
    strategy = fake(plugins=[watcher, method, evaluator])
    strategy.evaluator = evaluator
    vars(strategy).update(mbatch=[floats(5)], mb_output=floats(6), loss=floats(7), dataloader=[floats(8)])
    assert Holdings(strategy).state_bytes() == {"Method.kept": 16, "Method.scratch": 12}
    assert Holdings(strategy, lasting=True).state_bytes() == {"Method.kept": 16}


def test_a_stream_is_not_held_and_an_experience_is(stream: Any) -> None:
    plugin = SupervisedPlugin()
    plugin.benchmark, plugin.stream = stream, stream.train_stream
    assert Holdings(fake(plugins=[plugin])).replay_bytes() == 0
    plugin.last = list(stream.train_stream)[1]
    held = Holdings(fake(plugins=[plugin]))
    assert (held.exemplar_count(), held.replay_bytes()) == (2 * PER_CLASS, 2 * PER_CLASS * EXEMPLAR)
    assert held.state_bytes() == {}


def test_what_holds_itself_ends() -> None:
    ring: list[Any] = [floats(3)]
    ring.append(ring)
    bank = Bank(1)
    bank.owner = bank
    strategy = fake(ring=ring, bank=bank)
    strategy.me = strategy
    assert Holdings(strategy).state_bytes() == {"Fake.ring": 12, "Fake.bank": 16}


def test_a_long_chain_is_walked_to_its_end() -> None:
    chain: list[Any] = []
    for _ in range(5000):
        chain = [chain, floats(1)]
    assert Holdings(fake(chain=chain)).state_bytes() == {"Fake.chain": 5000 * FLOAT}
    while chain:  # let go of it link by link: the interpreter frees a chain by recursion
        chain = chain[0]
