"""The declared step of every strategy against one iteration of its own training loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import nn

from contlearn import models, strategies
from contlearn.errors import ContlearnError
from contlearn.models import Classifier, GrowingHead
from contlearn.models._resnet18 import SmallImageResNet18
from contlearn.strategies.drawn import Drawn
from contlearn.strategies.step import NotExportable

SUPERVISED = strategies.list(kind=("class-incremental", "plug-in", "transfer"))
WITHOUT = {
    "joint": "Joint: ", "cumulative": "Cumulative: ", "der": "DER: ", "derpp": "DER: ", "si": "SIPlugin: ",
    "agem": "AGEMPlugin: ", "gdumb": "GDumb: ", "icarl": "ICaRL: ", "mesa": "MesaPlugin: ",
}  # fmt: skip
EXPORTABLE = [name for name in SUPERVISED if name not in WITHOUT]
BATCH = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"memory_size": 16, "batch_size_memory": 8},
    "er_ace": {"memory_size": 16, "batch_size_memory": 8},
    # New data and exemplars in one batch.
    **{name: {"memory_size": 8, "batch_size": BATCH + 8} for name in ("wa", "memo", "der_expand")},
    "ewc": {"ewc_lambda": 10.0},
    "rehearsal_free": {"feat_kd": 2.0, "l2": 0.05, "ewc": 3.0},
    "sherl": {"dropout": 0.0},
    "prd": {"views": 1},
}


def network(name: str, stream: Any, small: Any, normed: Any) -> nn.Module:
    if name in ("mobiletl", "tinytl"):
        return models.create("test_efficientnet", stream, seed=0)
    if name in ("sherl", "unipt", "lst"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Classifier(SmallImageResNet18(1, 2), GrowingHead(16), feature_dim=16)
        model.input_shape = stream.input_shape
        return model
    return normed(stream) if name in ("adab2n", "rehearsal_free", "naive") else small(stream)


class Recorder(SupervisedPlugin):
    """Declares the step in front of the second experience's only iteration, and notes what the loop does then."""

    def __init__(self) -> None:
        super().__init__()
        self.step: Any = None

    def before_training_iteration(self, strategy: Any, **_: Any) -> None:
        if strategy.clock.train_exp_counter != 1 or self.step is not None:
            return
        strategy.plugins.remove(self)
        twin = copy.deepcopy(strategy)
        strategy.plugins.append(self)
        self.step = twin.declare_step(batch_size=BATCH, input_shape=strategy.model.input_shape or (1, 4, 4))
        self.state = {name: held.clone() for name, held in self.step.state.items()}
        self.before = {name: held.detach().clone() for name, held in strategy.model.state_dict().items()}

    def after_forward(self, strategy: Any, **_: Any) -> None:
        if self.step is not None:
            self.x, self.y = strategy.mb_x, strategy.mb_y
            self.exemplars = list(getattr(strategy, "_exemplars", []))

    def after_backward(self, strategy: Any, **_: Any) -> None:
        if self.step is not None:
            self.loss = float(strategy.loss.detach())

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        if self.step is not None:
            self.after = {name: held.detach().clone() for name, held in strategy.model.state_dict().items()}


def recorded(name: str, stream: Any, small: Any, normed: Any, **options: Any) -> tuple[Recorder, Any]:
    recorder = Recorder()
    given = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, **OPTIONS.get(name, {}), **options}
    if given.get("optimizer", "sgd") != "sgd":
        given["momentum"] = 0.0
    strategy = strategies.create(
        name, network(name, stream, small, normed), epochs=1, batch_size=given.pop("batch_size", BATCH), device="cpu",
        plugins=[*given.pop("plugins", []), recorder], **given,
    )  # fmt: skip
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    return recorder, strategy


def inputs(recorder: Recorder) -> dict[str, torch.Tensor]:
    step = recorder.step
    given = {"x": recorder.x[:BATCH], "y": recorder.y[:BATCH], "lr": torch.tensor([step.rates["lr"]])}
    if recorder.exemplars:
        given["x_memory"], given["y_memory"] = recorder.exemplars[0], recorder.exemplars[1]
    elif step.memory is not None:
        given["x_memory"], given["y_memory"] = recorder.x[BATCH:], recorder.y[BATCH:]
    given["class_mask"] = torch.ones(step.classes)
    given["old_class_mask"] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    return given


def check(recorder: Recorder, *, tolerance: float = 1e-5) -> None:
    step, given = recorder.step, inputs(recorder)
    assert set(given) == set(step.inputs)
    outputs, new = step.compute(recorder.state, given)
    assert float(outputs["loss"]) == pytest.approx(recorder.loss, rel=1e-5)
    assert outputs["logits"].shape == (BATCH, step.classes)
    moved = {n for n, role in step.roles.items() if role in ("weight", "statistic")}
    assert moved <= set(new) and moved <= set(recorder.after)
    for name in moved:
        change = (recorder.after[name] - recorder.state[name]).norm()
        assert (new[name] - recorder.after[name]).norm() <= tolerance * change + 1e-7, name
    for name, held in recorder.after.items():  # and nothing else moved in the loop
        if name not in moved and held.is_floating_point():
            assert torch.equal(held, recorder.before[name]), name


@pytest.mark.parametrize("name", EXPORTABLE)
def test_the_step_is_one_iteration_of_the_training_loop(stream, small, normed, name) -> None:
    recorder, _ = recorded(name, stream, small, normed)
    check(recorder)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "sinkgd"])
def test_every_update_rule_is_the_optimizers(stream, small, normed, optimizer) -> None:
    check(recorded("naive", stream, small, normed, optimizer=optimizer, clip_grad_norm=0.3)[0], tolerance=2e-4)


@pytest.mark.parametrize(
    "plugins",
    [
        ["l2", "pred_kd"],
        [{"name": "pred_kd", "kind": "softmax"}, "feat_kd", "ewc"],
        ["adab2n", {"name": "nap", "every": 1}],
    ],
)
def test_methods_that_are_joined_share_one_step(stream, small, normed, plugins) -> None:
    name = "replay" if "adab2n" in plugins else "naive"
    recorder, _ = recorded(name, stream, small, lambda s: normed(s), plugins=plugins) if name == "naive" else (
        recorded_replay(stream, normed, plugins), None
    )  # fmt: skip
    check(recorder, tolerance=1e-4)


def recorded_replay(stream: Any, normed: Any, plugins: list[Any]) -> Recorder:
    recorder = Recorder()
    strategy = strategies.create(
        "replay", normed(stream), epochs=1, batch_size=BATCH, lr=0.05, memory_size=16, batch_size_memory=8,
        plugins=[*plugins, recorder], device="cpu",
    )  # fmt: skip
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    return recorder


@pytest.mark.parametrize(("rate", "every"), [("linear", 2), ("constant", 3)])
def test_projection_keeps_its_own_count(stream, small, normed, rate, every) -> None:
    options = {"rate": rate, "every": every, **({"total_steps": 4} if rate == "linear" else {})}
    recorder, _ = recorded("nap", stream, small, normed, **options)
    check(recorder)
    new = recorder.step.compute(recorder.state, inputs(recorder))[1]
    assert float(new["method.0.steps"]) == float(recorder.state["method.0.steps"]) + 1 == 2


def test_closed_classes_take_no_part_and_can_be_opened_later(stream, small) -> None:
    strategy = strategies.create("naive", small(stream), epochs=1, batch_size=BATCH, lr=0.1, device="cpu")
    strategy.train(stream.train_stream[0], eval_streams=[])
    rows = strategy.model.head.weight.detach().clone()
    step = strategy.declare_step(batch_size=4, input_shape=(1, 4, 4), classes=6)
    assert step.classes == 6 and step.open_classes == (0, 1)
    assert torch.equal(step.state["head.weight"][:2], rows)
    given = step.examples()
    new = step.compute(step.state, given)[1]
    assert torch.equal(new["head.weight"][2:], step.state["head.weight"][2:])
    assert not torch.equal(new["head.weight"][:2], rows)
    assert (step.predict(step.state, given)[:, 2:] == -1e4).all()
    given["class_mask"][4], given["y"] = 1.0, torch.tensor([0, 1, 4, 4])
    new = step.compute(step.state, given)[1]
    assert not torch.equal(new["head.weight"][4], step.state["head.weight"][4])
    assert torch.equal(new["head.weight"][5], step.state["head.weight"][5])


def test_an_experience_ends_by_copying_teacher_and_anchors(stream, small) -> None:
    strategy = strategies.create(
        "rehearsal_free", small(stream), l2=0.1, epochs=1, batch_size=BATCH, lr=0.1, device="cpu"
    )
    step = strategy.declare_step(batch_size=4, input_shape=(1, 4, 4), classes=6)
    assert step.copies and set(step.copies) <= set(step.state) and set(step.copies.values()) <= set(step.state)
    assert all(step.roles[name] == "method" for name in step.copies)
    assert all(step.state[t].shape == step.state[s].shape for t, s in step.copies.items())
    weights = {name for name, role in step.roles.items() if role == "weight"}
    anchored = {source for target, source in step.copies.items() if ".anchor." in target}
    assert anchored == {name for name in weights if name.startswith("backbone.")}


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_method_without_a_step_says_why_in_one_line(stream, small, normed, name) -> None:
    strategy = strategies.create(name, network(name, stream, small, normed), epochs=1, batch_size=BATCH)
    with pytest.raises(NotExportable, match=WITHOUT[name]) as caught:
        strategy.declare_step(batch_size=4, input_shape=(1, 4, 4))
    assert "\n" not in str(caught.value) and len(str(caught.value)) > len(WITHOUT[name]) + 10


def test_the_registry_says_what_exports() -> None:
    assert {name for name in SUPERVISED if strategies.describe(name).exportable} == set(EXPORTABLE)


def test_what_cannot_be_exported_for_the_model_or_the_options_is_named(stream, small) -> None:
    strategy = strategies.create("naive", small(stream), epochs=1)
    with pytest.raises(NotExportable, match="its head has no outputs yet"):
        strategy.declare_step(batch_size=4, input_shape=(1, 4, 4))
    with pytest.raises(ContlearnError, match="policy: HerdingBuffer cannot be kept on a device"):
        strategies.create("replay", small(stream), policy="herding").declare_step(
            batch_size=4, input_shape=(1, 4, 4), classes=6
        )


# ---------------------------------------------------------------------- dropout


class Dropping(nn.Module):
    """Every kind of dropout that a step takes numbers for."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p
        self.conv, self.units, self.channels = nn.Conv2d(1, 4, 1), nn.Dropout(p), nn.Dropout2d(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.channels(self.units(self.conv(x)))
        if self.training and self.p:  # stochastic depth, as timm writes it
            h = h * h.new_empty((len(h), 1, 1, 1)).bernoulli_(1 - self.p).div_(1 - self.p)
        return h.mean((2, 3))


def test_dropout_takes_its_numbers_from_inputs(stream) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(Dropping(0.25), nn.Linear(4, 3), feature_dim=4)
    before = torch.random.get_rng_state()
    step = strategies.create("naive", model, lr=0.1).declare_step(batch_size=6, input_shape=(1, 4, 4))
    drawn = {name: one.shape for name, one in step.inputs.items() if one.meaning == "uniform"}
    assert drawn == {"uniform_0": (6, 4, 4, 4), "uniform_1": (6, 4, 1, 1), "uniform_2": (6, 1, 1, 1)}
    given = step.examples(3)
    logits = step.compute(step.state, given)[0]["logits"]
    assert torch.equal(torch.random.get_rng_state(), before)  # nothing is drawn anywhere else
    with torch.no_grad():
        h = model.backbone.conv(given["x"])
        h = h * (given["uniform_0"] >= 0.25) / 0.75 * (given["uniform_1"] >= 0.25) / 0.75
        h = h * (given["uniform_2"] >= 0.25) / 0.75
        expected = model.head(h.mean((2, 3)))
    torch.testing.assert_close(logits, expected)
    other = {**given, "uniform_0": given["uniform_0"].flip(0)}
    assert not torch.allclose(step.compute(step.state, other)[0]["logits"], logits)
    whole = step.predict(step.state, given)
    torch.testing.assert_close(whole, model.eval()(given["x"]))


def test_a_model_that_drops_nothing_asks_for_no_numbers(stream) -> None:
    model = Classifier(Dropping(0.0), nn.Linear(4, 3), feature_dim=4)
    step = strategies.create("naive", model, lr=0.1).declare_step(batch_size=6, input_shape=(1, 4, 4))
    assert not [name for name, one in step.inputs.items() if one.meaning == "uniform"]


@pytest.mark.parametrize(("p", "share"), [(0.3, 0.7), (1.0, 0.0)])
def test_given_numbers_drop_as_many_as_pytorch_drops(p, share) -> None:
    numbers = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    x = torch.ones(20000)
    with Drawn({"uniform_0": numbers}):
        out = nn.functional.dropout(x, p)
        assert nn.functional.dropout(x, p, training=False) is x
    kept = out > 0
    assert abs(float(kept.float().mean()) - share) < 0.02
    assert set(out.unique().tolist()) <= set(nn.functional.dropout(x, p).unique().tolist()) | {0.0}


# ---------------------------------------------------------------------- adapters

ADAPTERS: dict[str, dict[str, Any]] = {
    "bn_stats": {"prior": 8.0, "carry": True},
    "tent": {"lr": 0.01},
    "eata": {"margin": 1.0, "d_margin": 1.0, "momentum": 0.9},
    "ecotta": {"warmup_epochs": 0, "margin": 1.0, "k": 2},
}


def adapter(name: str, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(SmallImageResNet18(1, 4), nn.Linear(32, 4), feature_dim=32)
    model.input_shape = (1, 12, 12)
    return strategies.create(name, model, batch_size=8, guard="off", **{**ADAPTERS[name], **options}).start()


def images(seed: int) -> torch.Tensor:
    return torch.rand(8, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_an_adapters_step_is_what_it_does_with_a_batch(name) -> None:
    one = adapter(name)
    for seed in range(3):  # momenta, averages and statistics are under way
        one(images(seed))
    step = one.declare_step(batch_size=8, input_shape=(1, 12, 12))
    before = {key: held.clone() for key, held in step.state.items()}
    given = {"x": images(7), "lr": torch.tensor([one.lr])}
    outputs, new = step.compute(before, {key: given[key] for key in step.inputs})
    answer = one(images(7))
    torch.testing.assert_close(outputs["logits"], answer, rtol=1e-4, atol=1e-5)
    live = {**dict(one.adapted()), **dict(one._beside_weights())}
    assert {key for key, role in step.roles.items() if role in ("weight", "statistic")} <= set(live)
    for key, value in new.items():
        if key in live:
            change = (live[key] - before[key]).norm()
            assert (value - live[key]).norm() <= 1e-3 * change + 1e-6, key
    if name != "bn_stats":
        assert float(outputs["loss"]) == pytest.approx(one.last_loss, rel=1e-4)
    torch.testing.assert_close(step.predict({**before, **new}, given), one.predict(images(7)), rtol=1e-3, atol=1e-4)


def test_eata_counts_the_classes_of_a_head_that_does_not_tell() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 5))
        model = Classifier(SmallImageResNet18(1, 4), head, feature_dim=32)
    one = strategies.create("eata", model, batch_size=8, guard="off", margin=1.0, d_margin=1.0).start()
    before = {name: held.clone() for name, held in model.state_dict().items()}
    step = one.declare_step(batch_size=8, input_shape=(1, 12, 12))
    assert step.classes == 5 and torch.equal(step.state["method.average"], torch.zeros(5))
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())
    new = step.compute(step.state, {"x": images(3), "lr": torch.tensor([one.lr])})[1]
    one(images(3))
    torch.testing.assert_close(new["method.average"], one.average)


@pytest.mark.parametrize("name", ["eata", "ecotta"])
def test_a_batch_that_does_not_count_moves_nothing(name) -> None:
    one = adapter(name, margin=0.0)
    step = one.declare_step(batch_size=8, input_shape=(1, 12, 12))
    new = step.compute(step.state, step.examples())[1]
    assert new and all(torch.equal(value, step.state[key]) for key, value in new.items())


@pytest.mark.parametrize(("name", "said"), [("source", "adapts nothing"), ("cotta", "random"), ("sar", "over time")])
def test_an_adapter_without_a_step_says_why(name, said) -> None:
    model = Classifier(SmallImageResNet18(1, 4), nn.Linear(32, 4), feature_dim=32)
    one = strategies.create(name, model).start()
    with pytest.raises(NotExportable, match=said):
        one.declare_step(batch_size=8, input_shape=(1, 12, 12))
    assert not strategies.describe(name).exportable


def test_what_a_device_cannot_do_is_refused() -> None:
    with pytest.raises(NotExportable, match="one step per batch"):
        adapter("tent", steps=2).declare_step(batch_size=8, input_shape=(1, 12, 12))
    with pytest.raises(NotExportable, match="two_step"):
        adapter("ecotta", update="two_step").declare_step(batch_size=8, input_shape=(1, 12, 12))
    with pytest.raises(ContlearnError, match="classes: strategy 'tent' takes none"):
        adapter("tent").declare_step(batch_size=8, input_shape=(1, 12, 12), classes=5)


def test_room_for_more_classes_leaves_the_optimizer_with_each_parameter_once(stream, small) -> None:
    strategy = strategies.create("naive", small(stream), lr=0.1, batch_size=BATCH, device="cpu")
    first, second, *_ = stream.train_stream
    strategy.train(first, eval_streams=[])
    strategy.declare_step(batch_size=BATCH, input_shape=stream.input_shape, classes=6)
    strategy.train(second, eval_streams=[])
    held = [id(parameter) for group in strategy.optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in strategy.model.parameters())
