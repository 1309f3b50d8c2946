"""Every method that exports, lowered to ONNX and run by stock ONNX Runtime: one step as PyTorch's, many no farther."""

from __future__ import annotations

from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from torch import nn

from contlearn import models, scenarios, strategies
from contlearn.edge.capture import capture, capture_predict, trace
from contlearn.edge.export import export
from contlearn.edge.onnx import lower
from contlearn.edge.runtime import Session
from contlearn.edge.verify import verify
from contlearn.models import Classifier, GrowingHead
from contlearn.models._resnet18 import SmallImageResNet18
from contlearn.scenarios.datasets import ImageData

NAMES = [name for name in strategies.list() if strategies.describe(name).exportable]
OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"memory_size": 16, "batch_size_memory": 4},
    "er_ace": {"memory_size": 16, "batch_size_memory": 4},
    "ewc": {"ewc_lambda": 10.0},
    "rehearsal_free": {"feat_kd": 2.0, "l2": 0.05, "ewc": 3.0, "update_mode": "train"},
    "sherl": {"dropout": 0.0},
    "lst": {"dropped": [1, 2, 3]},
    "nap": {"every": 2, "rate": "linear", "total_steps": 30},
    "bn_stats": {"prior": 8.0, "carry": True},
    # Adam makes whole steps of gradients that are zero but for rounding, as those in front of a BatchNorm are.
    "tent": {"optimizer": "sgd", "lr": 0.05},
    "eata": {"margin": 1.0, "d_margin": 1.0},
    "ecotta": {"warmup_epochs": 0, "margin": 1.0, "k": 2},
}
SHAPE, BATCH = (1, 12, 12), 4


@pytest.fixture(scope="module")
def stream() -> Any:
    """Six classes in three experiences of noisy images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat(8)
    noise = torch.randint(0, 128, (48, *SHAPE), generator=generator, dtype=torch.uint8)
    noise[torch.arange(48), 0, labels] += 100
    data = ImageData(
        name="made_up", train_images=noise, test_images=noise[:12], train_targets=labels, test_targets=labels[:12],
        class_names=tuple("abcdef"),
    )  # fmt: skip
    return scenarios.class_incremental(data, n_experiences=3)


class Tiny(nn.Module):
    """Strided, depthwise and pointwise convolutions, BatchNorm, ReLU6 and h-swish."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.Hardswish(),
            nn.Conv2d(width, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.layers(x)
        return features


def network(name: str, stream: Any) -> nn.Module:
    if name in ("mobiletl", "tinytl"):
        return models.create("test_efficientnet", stream, seed=0)
    if name in ("l2", "ewc", "online_ewc", "pred_kd", "nap", "lwf"):
        return models.create("mlp", stream, seed=0, hidden=16, dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(16, 6) if strategies.describe(name).kind == "test-time" else GrowingHead(16)
        staged = name in ("sherl", "unipt", "lst", "ecotta")
        model = Classifier(SmallImageResNet18(1, 2) if staged else Tiny(), head, feature_dim=16)
    model.input_shape = SHAPE
    return model


def step_of(name: str, stream: Any) -> Any:
    """Its step, with training under way: teachers, anchors, momenta and averages are there."""
    options = {"batch_size": 8, "device": "cpu", **OPTIONS.get(name, {})}
    if strategies.describe(name).kind == "test-time":
        adapter = strategies.create(name, network(name, stream), guard="off", **options).start()
        adapter(torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0)))
        return adapter.declare_step(batch_size=BATCH, input_shape=SHAPE)
    strategy = strategies.create(name, network(name, stream), lr=0.02, momentum=0.9, epochs=1, **options)
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    return strategy.declare_step(batch_size=BATCH, input_shape=SHAPE, classes=6)


@pytest.mark.parametrize("name", NAMES)
def test_a_lowered_step_computes_what_the_method_does(stream, name) -> None:
    torch.manual_seed(0)
    step = step_of(name, stream)
    adapt = lower(capture(step))
    report = verify(step, adapt, many=False)
    assert report.figures["loss"] <= 1e-5 and report.figures["update"] <= 1e-3, report
    assert {node.domain for node in adapt.graph.node} <= {"", "ai.onnx"}
    given, found = {place.name for place in adapt.graph.input}, {place.name for place in adapt.graph.output}
    moving = {state for state, role in step.roles.items() if role != "method"}
    assert {f"new.{state}" for state in given & moving} <= found


@pytest.mark.parametrize("name", ["replay", "rehearsal_free", "tent"])
def test_many_steps_stray_no_farther_than_pytorch_from_itself(stream, name) -> None:
    step = step_of(name, stream)
    report = verify(step, lower(capture(step)), lower(capture_predict(step)))
    assert report.tiers == ("rules", "one_step", "many_steps"), report


def test_a_constant_that_is_nearly_neutral_stays() -> None:
    """1e-8 is not 0 and 1 - 1e-6 is not 1, whatever the exporter's optimiser makes of them."""
    x = torch.tensor([0.0, 1e-9, 1.0, 3.0])
    near = torch.tensor(1 + 1e-6)

    def function(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = given["x"]
        return {
            "added": x / (x + 1e-8), "taken": x / (x - 1e-8), "times": (x * (1 - 1e-6) - x) * 1e6,
            "over": (x / near - x) * 1e6, "one": x.sum() + 1e-9, "neutral": x + 0.0,
        }  # fmt: skip

    captured = trace(function, {"x": x}, profile="onnxruntime")
    model = lower(captured)
    assert [place.name for place in model.graph.input] == ["x"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = dict(zip(captured.outputs, session.run(list(captured.outputs), {"x": x.numpy()}), strict=True))
    for name, wanted in function({"x": x}).items():
        torch.testing.assert_close(torch.from_numpy(found[name]), wanted, rtol=1e-6, atol=0.0, msg=name)


def test_adam_in_a_graph_leaves_what_has_no_gradient(stream) -> None:
    """Rows of closed classes: 0 / (0 + eps)."""
    strategy = strategies.create("naive", network("l2", stream), lr=0.01, optimizer="adam", epochs=1, batch_size=8)
    strategy.train(stream.train_stream[0], eval_streams=[])
    step = strategy.declare_step(batch_size=BATCH, input_shape=SHAPE, classes=6)
    report = verify(step, lower(capture(step)), many=False)
    assert report.figures["update"] <= 1e-3, report


@pytest.mark.parametrize("profile", ["onnxruntime", "tensorrt"])
def test_the_gradient_of_a_diagonal_runs(profile) -> None:
    def function(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for place, (offset, first, second) in enumerate([(0, -2, -1), (1, 1, 2), (-2, 0, 2), (3, 2, 0)]):
            x = given["x"].detach().requires_grad_()
            out = x.diagonal(offset, first, second)
            weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).sin()
            found[f"dx{place}"] = torch.autograd.grad((out * out * weights).sum(), x)[0]
        return found

    x = torch.rand(5, 3, 4)
    captured = trace(function, {"x": x}, profile=profile)
    model = lower(captured)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for name, out in zip(captured.outputs, session.run(list(captured.outputs), {"x": x.numpy()}), strict=True):
        torch.testing.assert_close(torch.from_numpy(out), function({"x": x})[name], rtol=1e-6, atol=1e-6)


def test_a_runner_draws_the_numbers_of_dropout_from_its_seed(stream, tmp_path) -> None:
    model = models.create("mlp", stream, seed=0, hidden=16, dropout=0.5)
    strategy = strategies.create("naive", model, lr=0.1, batch_size=BATCH, device="cpu")
    step = strategy.declare_step(batch_size=BATCH, input_shape=SHAPE, classes=6, open_classes=range(6))
    export(step, tmp_path / "artifact", measure=False)
    given = step.examples(1)
    x, y = given["x"].numpy(), given["y"].numpy()
    runs = [Session(tmp_path / "artifact", seed=seed) for seed in (5, 5, 6)]
    losses = [[float(run.step(x, y, remember=False)["loss"]) for _ in range(3)] for run in runs]
    assert losses[0] == losses[1] != losses[2]
    generator, state, expected = numpy.random.default_rng(5), step.state, []
    for _ in range(3):  # the session's own numbers, in PyTorch
        drawn = generator.random(step.inputs["uniform_0"].shape, dtype=numpy.float32)
        given |= {"uniform_0": torch.from_numpy(drawn), "class_mask": torch.ones(6), "old_class_mask": torch.zeros(6)}
        outputs, new = step.compute(state, given)
        state, expected = {**state, **new}, [*expected, float(outputs["loss"])]
    assert losses[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("profile", ["tensorrt", "coreml"])
def test_other_targets_take_their_own_forms(stream, profile) -> None:
    """A network with max pooling, strided and depthwise convolutions."""

    torch.manual_seed(0)
    body = Tiny()
    body.layers.insert(3, nn.MaxPool2d(3, 2, 1))
    model = Classifier(body, nn.Linear(16, 6), feature_dim=16)
    model.input_shape = SHAPE
    step = strategies.create("naive", model, lr=0.05).declare_step(batch_size=BATCH, input_shape=SHAPE)
    adapt = lower(capture(step, profile=profile))
    report = verify(step, adapt, many=False)
    assert report.figures["loss"] <= 1e-5 and report.figures["update"] <= 1e-3, report
    kinds = [node.op_type for node in adapt.graph.node]
    assert not any(kind.startswith("Scatter") for kind in kinds)
    assert not any(node.op_type == "MaxPool" and len(node.output) > 1 for node in adapt.graph.node)
