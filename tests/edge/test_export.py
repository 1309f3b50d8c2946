"""From a step to an artifact: what is written, what is verified, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from contlearn import models, scenarios, strategies
from contlearn.edge import export as exporting
from contlearn.edge.export import export
from contlearn.edge.from_run import preprocessing_of
from contlearn.edge.liveness import plan
from contlearn.edge.runtime import Session
from contlearn.edge.verify import ParityError, verify
from contlearn.errors import ContlearnError
from contlearn.strategies.step import Input, NotExportable, Step

Tensors = dict[str, Tensor]


def small_step(**options: Any) -> Step:
    """Least squares of a linear layer towards one-hot labels."""

    def compute(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        w = state["w"].detach().requires_grad_()
        logits = given["x"] @ w
        hot = (given["y"][:, None] == torch.arange(3)).float()
        loss = (logits - hot).square().mean()
        (g,) = torch.autograd.grad(loss, [w])
        with torch.no_grad():
            new = {"w": state["w"] - given["lr"] * g}
        return {"loss": loss.detach().reshape(1), "logits": logits.detach()}, new

    inputs = {
        "x": Input((4, 5), torch.float32, "frames"), "y": Input((4,), torch.int64, "labels"),
        "lr": Input((1,), torch.float32, "learning_rate"),
    }  # fmt: skip
    w = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    state = {"w": w, "kept": torch.ones(7), "teacher": w.clone()}
    roles = {"w": "weight", "kept": "method", "teacher": "method"}
    return Step(
        "least_squares", nn.Identity(), inputs, state, roles, compute, lambda state, given: given["x"] @ state["w"],
        classes=3, rates={"lr": 0.5}, hyperparameters={"lr": 0.5}, **options,
    )  # fmt: skip


def graph_of_it(update: float = 1.0, *, loss: float = 1.0, grown: float = 1.0) -> Any:
    """The small step written by hand as ONNX, with its update, its loss or its new weights multiplied."""
    import onnx.parser
    from onnx import numpy_helper

    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 18]>
        g (float[5,3] w, float[4,5] x, int64[4] y, float[1] lr) => (float[1] loss, float[4,3] logits, float[5,3] new)
        <int64[3] labels = {0, 1, 2}, int64[1] one = {1}> {
        logits = MatMul(x, w)  column = Unsqueeze(y, one)  equal = Equal(column, labels)
        hot = Cast<to=1>(equal)  off = Sub(logits, hot)  square = Mul(off, off)  mean = ReduceMean<keepdims=0>(square)
        flat = Reshape(mean, one)  loss = Mul(flat, by)  xt = Transpose<perm=[1, 0]>(x)  sum = MatMul(xt, off)
        g = Mul(sum, sixth)  d = Mul(g, lr)  moved = Sub(w, d)  new = Mul(moved, grow) }"""
    )
    model.graph.node[-1].output[0] = model.graph.output[2].name = "new.w"
    for name, value in (("by", loss), ("sixth", update / 6), ("grow", grown)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    return model


def answer_of_it(added: float = 0.0) -> Any:
    """Its prediction, and something added."""
    import onnx.parser

    return onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]> g (float[5,3] w, float[4,5] x) => (float[4,3] logits)
        <float more = {{{added}}}> {{ plain = MatMul(x, w)  logits = Add(plain, more) }}"""
    )


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """``lowered(adapt)``: exports take this graph for what the step was lowered to (which takes seconds)."""
    import contlearn.edge.onnx as lowering

    def take(adapt: Any) -> None:
        monkeypatch.setattr(lowering, "lower", lambda made: adapt if "loss" in made.outputs else answer_of_it())

    return take


def test_a_step_of_ones_own(tmp_path: Path) -> None:
    step = small_step(open_classes=(0, 2), copies={"teacher": "w"})
    told: list[str] = []
    artifact = export(step, tmp_path / "a", class_names=["a", "b"], tell=told.append)
    manifest = artifact.manifest
    # `kept` and `teacher` are read by no graph: they are not shipped, and nothing is copied to them.
    assert list(artifact.state()) == ["w"] and manifest["copies"] == {}
    assert manifest["tiers"] == ["rules", "one_step", "many_steps"]
    assert manifest["classes"] == ["a", "b", "class 2"] and manifest["open_classes"] == [0, 2]
    assert manifest["hyperparameters"] == {"lr": 0.5} and manifest["method"] == "least_squares"
    assert told == ["capture", "lower", "verify", "measure", "write"]
    x, y = np.ones((4, 5), np.float32), np.array([0, 1, 2, 2])
    session = Session(artifact.folder, threads=1)
    result = session.step(x, y)
    given = {"x": torch.from_numpy(x), "y": torch.from_numpy(y), "lr": torch.tensor([0.5])}
    outputs, new = step.compute(step.state, given)
    assert result["loss"] == pytest.approx(float(outputs["loss"]), rel=1e-6)
    np.testing.assert_allclose(session.state()["w"], new["w"].numpy(), rtol=1e-6)


def test_the_measured_peak_is_that_of_a_process_of_its_own(tmp_path: Path, lowered: Callable[[Any], None]) -> None:
    lowered(graph_of_it())
    manifest = export(small_step(), tmp_path / "a", verify=False).manifest
    assert manifest["tiers"] == ["rules"]
    # A session of ONNX Runtime takes a few megabytes by itself; the libraries, over 100, are not in it.
    assert manifest["peak_static"] < manifest["peak_measured"] < 60e6
    assert "fresh process" in manifest["peak_measured_how"]


def test_the_graph_that_was_written_by_hand_is_right() -> None:
    report = verify(small_step(), graph_of_it(), answer_of_it())
    assert report.tiers == ("rules", "one_step", "many_steps")
    assert report.figures["update"] < 1e-6 and report.figures["drift"] < 2 * report.figures["control_drift"]
    assert verify(small_step(), graph_of_it(), answer_of_it(), many=False).tiers == ("rules", "one_step")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"update": 1.01}, r"one step moves 'w' otherwise than PyTorch does, by 1.0e-02 of its update"),
        ({"grown": 1.01}, "one step moves 'w' otherwise"),
        ({"grown": float("nan")}, "one step moves 'w' otherwise"),
        ({"loss": 1.001}, "the loss of one step is .*, in PyTorch"),
        ({"loss": float("nan")}, "the loss of one step is nan"),
        # Within what one step may be off, but it adds up.
        ({"update": 1.0009}, r"after 20 steps the weights are .* \(farthest: 'w'\)"),
    ],
)
def test_a_graph_that_computes_something_else(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        verify(small_step(), graph_of_it(**wrong), answer_of_it())


def test_a_prediction_that_is_something_else() -> None:
    with pytest.raises(ParityError, match="logits of the prediction differ"):
        verify(small_step(), graph_of_it(), answer_of_it(0.01))


def test_a_gradient_of_rounding_errors_is_judged_by_pytorchs_own() -> None:
    step = small_step()
    right = step.compute

    def compute(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        outputs, new = right(state, given)
        # What Adam makes of a gradient that is 0 but for rounding: a step by its sign.
        noise = (given["x"].sum(0) - given["x"].flip(0).cumsum(0)[-1]) * 1e3 + (state["w"] - state["w"]).sum(1)
        return outputs, {**new, "kept": state["kept"] + 0.1 * torch.sign(torch.cat([noise, noise[:2]]))}

    step.compute = compute
    # The graph leaves `kept` alone: as far from PyTorch as PyTorch is from itself, or nearer.
    assert "one_step" in verify(step, graph_of_it(), answer_of_it(), many=False).tiers


def test_no_artifact_of_a_graph_that_computes_something_else(tmp_path: Path, lowered: Callable[[Any], None]) -> None:
    lowered(graph_of_it(update=1.01))
    with pytest.raises(ParityError):
        export(small_step(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_budget(tmp_path: Path, lowered: Callable[[Any], None]) -> None:
    lowered(graph_of_it())
    with pytest.raises(ContlearnError, match=r"budget: a step takes .* MB measured, .* planned; expected at most 2 kB"):
        export(small_step(), tmp_path / "a", budget="2kB", verify=False)
    with pytest.raises(ContlearnError, match=r"budget: a step takes .* planned; expected at most 100 B"):
        export(small_step(), tmp_path / "a", budget=100, verify=False, measure=False)
    assert not list(tmp_path.iterdir())
    assert export(small_step(), tmp_path / "a", budget="100MB", verify=False).manifest["budget"] == 100_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "coreml"}, "target: coreml is not available yet"),
        ({"target": "onnxrutime"}, "unknown target 'onnxrutime'; did you mean 'onnxruntime'?"),
        ({"profile": "tensorflow"}, "unknown target profile 'tensorflow'"),
        ({"budget": "much"}, "budget: expected bytes such as"),
    ],
)
def test_options_that_do_not_hold(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ContlearnError, match=re.escape(message)):
        export(small_step(), tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_or_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ContlearnError, match=r"out: .*a' exists; expected a new folder"):
        export(small_step(), tmp_path / "a")
    with pytest.raises(ContlearnError, match=r"out: the folder .*b' does not exist"):
        export(small_step(), tmp_path / "b" / "c")


def test_what_has_no_step(tmp_path: Path) -> None:
    stream = scenarios.class_incremental("digits", n_experiences=5)
    with pytest.raises(ContlearnError, match="Linear declares no step"):
        export(nn.Linear(1, 1), tmp_path / "a")
    agem = strategies.create("agem", models.create("mlp", stream, hidden=4, dropout=0.0), batch_size=4)
    with pytest.raises(NotExportable, match="AGEMPlugin"):
        export(agem, tmp_path / "a", input_shape=stream.input_shape, classes=10)
    with pytest.raises(ContlearnError, match="input_shape: expected"):
        export(agem, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- the plan of a graph ----------------------------------------------------------------------------------------------


def planned(body: str, *, inputs: str = "float[10] x", outputs: str = "float[10] y", constants: str = "") -> Any:
    import onnx.parser

    text = f'<ir_version: 9, opset_import: ["": 18]> g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}'
    return plan(onnx.parser.parse_model(text))


def test_live_values_are_counted_at_the_worst_moment() -> None:
    # a (40), then a and b (80), then b and c (80): a is free once b and c have read it; y is an output.
    found = planned("a = Relu(x)  b = Exp(a)  c = Neg(b)  y = Add(b, c)")
    assert (found.constants, found.inputs, found.outputs, found.activations) == (0, 40, 40, 80)
    assert found.peak == 160
    longer = planned("a = Relu(x)  b = Exp(a)  c = Neg(b)  d = Add(b, c)  y = Add(a, d)")
    assert longer.activations == 4 * 40  # a waits for the end: a, b, c and d are live when d is made


def test_views_take_nothing_and_keep_what_they_look_at() -> None:
    shape = "int64[2] s = {2, 5}, int64[1] f = {10}"
    found = planned("a = Relu(x)  v = Reshape(a, s)  b = Exp(v)  w = Reshape(b, f)  y = Neg(w)", constants=shape)
    assert found.activations == 80 and found.constants == 24
    # The view of a is read last: a stays although nobody reads it by its own name.
    kept = planned("a = Relu(x)  v = Reshape(a, s)  b = Exp(x)  w = Reshape(v, f)  y = Add(w, b)", constants=shape)
    assert kept.activations == 80


def test_a_shape_that_is_not_fixed() -> None:
    with pytest.raises(ContlearnError, match="memory plan: 'x' has no fixed shape"):
        planned("y = Relu(x)", inputs="float[n] x", outputs="float[n] y")


def test_the_planned_peak_counts_both_graphs_the_memory_and_the_snapshot(
    tmp_path: Path, lowered: Callable[[Any], None]
) -> None:
    import onnx

    lowered(graph_of_it())
    artifact = export(small_step(), tmp_path / "a", verify=False, measure=False)
    adapt, predict = (onnx.load(artifact.graphs(role)[0]) for role in ("adapt", "predict"))
    w = 5 * 3 * 4
    step, asked = plan(adapt), plan(predict)
    assert step.inputs == 4 * 5 * 4 + 4 * 8 + 4 + w and step.outputs == w + 4 + 4 * 3 * 4
    assert artifact.manifest["peak_static"] == step.peak + asked.constants  # no guard that keeps a copy of the state
    content = {**artifact.manifest, "memory": {"bytes": 1000}, "guards": {"collapse_window": 9}}
    assert exporting.planned(adapt, predict, content) == step.peak + asked.constants + 1000 + w


# --- a strategy -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal_free(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Step, Path]:
    """Distillation and L2 with momentum, exported before any training, with raw frames and a memory of exemplars."""
    stream = scenarios.class_incremental("digits", n_experiences=5)
    model = models.create("mlp", stream, seed=0, hidden=8, dropout=0.0)
    strategy = strategies.create(
        "rehearsal_free", model, lr=0.02, momentum=0.9, batch_size=8, l2=0.05, plugins=["replay"], device="cpu"
    )
    folder = tmp_path_factory.mktemp("export") / "artifact"
    export(
        strategy, folder, input_shape=stream.input_shape, classes=10, open_classes=(), measure=False,
        preprocessing=preprocessing_of(stream), class_names=stream.class_names,
    )  # fmt: skip
    step = strategy.declare_step(batch_size=8, input_shape=stream.input_shape, classes=10, open_classes=())
    return stream, step, folder


def test_the_manifest_says_what_a_runner_must_do(rehearsal_free: tuple[Any, Step, Path]) -> None:
    from contlearn.edge import artifact

    _, _, folder = rehearsal_free
    manifest = artifact.read(folder).manifest
    meanings = {spec["meaning"] for spec in manifest["inputs"]}
    assert {"class_mask", "old_class_mask", "memory_frames", "memory_labels", "learning_rate"} <= meanings
    kinds = {name.split(".")[2]: source for name, source in manifest["copies"].items()}
    assert kinds.keys() == {"teacher", "anchor"}
    assert all(target.endswith(source) for target, source in manifest["copies"].items())
    assert len(manifest["resets"]) == 4 and all(name.endswith("momentum_buffer") for name in manifest["resets"])
    assert manifest["memory"]["dtype"] == "uint8" and manifest["memory"]["shape"] == [1, 8, 8]
    assert manifest["memory"]["bytes"] == 200 * (64 + 4)
    assert manifest["preprocessing"]["scale"] == pytest.approx(1 / 16)
    assert manifest["open_classes"] == manifest["old_classes"] == [] and len(manifest["classes"]) == 10
    assert "many_steps" in manifest["tiers"]
    assert manifest["guards"]["collapse_window"] == 0  # two classes at a time look like a collapse


def test_raw_frames_and_masks_give_what_the_strategy_computes(rehearsal_free: tuple[Any, Step, Path]) -> None:
    stream, step, folder = rehearsal_free
    dataset = stream.test_stream[0].dataset
    session = Session(folder, threads=1)
    state = dict(step.state)
    for number, classes in enumerate(((0, 1), (2, 3))):
        rng = np.random.default_rng(number)
        raw = rng.integers(0, 17, (8, 1, 8, 8)).astype(np.uint8)
        y = np.array(classes)[np.arange(8) % 2]
        seen = torch.zeros(10)
        seen[: 2 * number + 2] = 1
        old = torch.zeros(10)
        old[: 2 * number] = 1
        x = torch.from_numpy(raw).div(16)
        # No memory yet: the batch stands in for it.
        given = {
            "x": x, "y": torch.from_numpy(y), "x_memory": x, "y_memory": torch.from_numpy(y),
            "lr": torch.tensor([0.02]), "class_mask": seen, "old_class_mask": old,
        }  # fmt: skip
        outputs, new = step.compute(state, given)
        result = session.step(raw, y, remember=False)
        assert result["loss"] == pytest.approx(float(outputs["loss"]), rel=1e-5)
        state.update({name: value.detach() for name, value in new.items()})
        for name, value in session.state().items():
            np.testing.assert_allclose(value, state[name].numpy(), rtol=1e-4, atol=1e-6, err_msg=name)
        session.finish_experience()
        state.update({target: state[source] for target, source in step.copies.items()})
        state.update({name: torch.zeros_like(state[name]) for name in session.manifest["resets"]})
    assert float(dataset[0][0].max()) <= 1.0  # what the stream gives is scaled as the artifact scales
