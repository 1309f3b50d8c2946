"""Small hand-made artifacts: softmax regression whose SGD step is written out as ONNX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contlearn.edge import artifact, manifest
from contlearn.edge.manifest import TensorSpec

BATCH, FEATURES, CLASSES = 4, 6, 3

Linear = Callable[..., Path]


def _model(inputs: str, outputs: str, constants: str, body: str, opset: int = 20) -> bytes:
    import onnx.parser

    text = f'<ir_version: 10, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}'
    content: bytes = onnx.parser.parse_model(text).SerializeToString()
    return content


CONSTANTS = (
    "int64[3] classes = {0, 1, 2}, int64[1] axis0 = {0}, int64[1] axis1 = {1}, int64[1] rows = {4}, "
    "float momentum = {0.9}, float one = {1.0}, float closed = {10000.0}, float kept = {0.25}, int64[1] flat = {1}"
)
UPDATE = (
    "onehot_bool = Equal(ys_column, classes)  onehot = Cast<to=1>(onehot_bool)"
    "logp = LogSoftmax<axis=1>(all)  p = Exp(logp)"
    "picked = Mul(onehot, logp)  per_row = ReduceSum<keepdims=0>(picked, axis1)  mean = ReduceMean<keepdims=0>(per_row)"
    "negative = Neg(mean)  loss = Reshape(negative, flat)"
    "difference = Sub(p, onehot)  count_int = Shape<start=0, end=1>(xs)  count = Cast<to=1>(count_int)"
    "delta = Div(difference, count)  xt = Transpose<perm=[1, 0]>(xs)  gw = MatMul(xt, delta)"
    "gb = ReduceSum<keepdims=0>(delta, axis0)  old_v = Mul(momentum, v)  new_v = Add(old_v, gw)"
    "step_w = Mul(lr, new_v)  new_w = Sub(w, step_w)  step_b = Mul(lr, gb)  new_b = Sub(b, step_b)"
)


def _specs(options: dict[str, Any]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    rows = options["memory_batch"]
    inputs = [TensorSpec("x", [BATCH, FEATURES], "float32", "frames")]
    if options["labelled"]:
        inputs.append(TensorSpec("y", [BATCH], "int64", "labels"))
    if options["memory"]:
        inputs.append(TensorSpec("x_memory", [rows, FEATURES], "float32", "memory_frames"))
        inputs.append(TensorSpec("y_memory", [rows], "int64", "memory_labels"))
    if options["mask"]:
        inputs.append(TensorSpec("mask", [CLASSES], "float32", "class_mask"))
    if options["uniform"]:
        inputs.append(TensorSpec("noise", [BATCH, FEATURES], "float32", "uniform"))
    inputs.append(TensorSpec("lr", [1], "float32", "learning_rate"))
    states = {"w": [FEATURES, CLASSES], "b": [CLASSES], "v": [FEATURES, CLASSES]}
    inputs += [TensorSpec(name, shape, "float32", "state") for name, shape in states.items()]
    outputs = [TensorSpec("loss", [1], "float32", "loss"), TensorSpec("logits", [BATCH, CLASSES], "float32", "logits")]
    outputs += [TensorSpec(f"new_{name}", shape, "float32", "state", of=name) for name, shape in states.items()]
    return inputs, outputs


def _text(specs: list[TensorSpec]) -> str:
    kinds = {"float32": "float", "int64": "int64"}
    return ", ".join(f"{kinds[s.dtype]}[{','.join(map(str, s.shape))}] {s.name}" for s in specs)


def _graphs(options: dict[str, Any], inputs: list[TensorSpec], outputs: list[TensorSpec]) -> dict[str, bytes]:
    opset = options["opset"]
    masked = (
        "hidden = Sub(mask, one)  low = Mul(hidden, closed)  all = Add(open, low)"
        if options["mask"]
        else "all = Identity(open)"
    )
    dropped = "keep_bool = Greater(noise, kept)  keep = Cast<to=1>(keep_bool)  x_used = Mul(x, keep)"
    used = dropped if options["uniform"] else "x_used = Identity(x)"
    joined = "xs = Concat<axis=0>(x_used, x_memory)  ys = Concat<axis=0>(y, y_memory)"
    rows = joined if options["memory"] else "xs = Identity(x_used)  ys = Identity(y)"
    forward = (
        f"{used} {rows} scores = MatMul(xs, w)  open = Add(scores, b) {masked}"
        "logits = Slice(all, axis0, rows, axis0)  ys_column = Unsqueeze(ys, axis1)"
    )
    if not options["labelled"]:  # pulls everything into class 0, by the learning rate in every step
        body = (
            "xw = MatMul(x, w)  logits = Add(xw, b)  m = ReduceMean<keepdims=0>(logits)  loss = Reshape(m, flat)"
            "pull = Mul(lr, push)  new_b = Add(b, pull)  new_w = Identity(w)  new_v = Identity(v)"
        )
        constants = "float[3] push = {1, 0, 0}, int64[1] flat = {1}"
        adapt = {"adapt.onnx": _model(_text(inputs), _text(outputs), constants, body, opset)}
    elif options["segments"] == 2:
        total = BATCH + (options["memory_batch"] if options["memory"] else 0)
        passed = f"float[{total},{FEATURES}] xs, float[{total},{CLASSES}] all, int64[{total},1] ys_column"
        late = [s for s in inputs if s.name in ("lr", "w", "b", "v")]
        early = [s for s in inputs if s.name not in ("lr", "v")]
        adapt = {
            "adapt-0.onnx": _model(_text(early), f"float[4,3] logits, {passed}", CONSTANTS, forward, opset),
            "adapt-1.onnx": _model(
                f"{_text(late)}, {passed}", _text([s for s in outputs if s.name != "logits"]), CONSTANTS, UPDATE, opset
            ),
        }
    else:
        adapt = {"adapt.onnx": _model(_text(inputs), _text(outputs), CONSTANTS, f"{forward} {UPDATE}", opset)}
    predict = (
        f"scores = MatMul(x, w)  open = Add(scores, b) {masked.replace('all =', 'logits =').replace('all,', 'logits,')}"
    )
    taken = [s for s in inputs if s.name in ("x", "mask", "w", "b")]
    return {**adapt, "predict.onnx": _model(_text(taken), _text(outputs[1:2]), CONSTANTS, predict, opset)}


def write_linear(folder: Path, *, change: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Path:
    """Write an artifact of softmax regression with momentum: 4 frames of 6 features, 3 classes.

    Options: ``labelled`` (otherwise each step pulls towards class 0), ``memory`` (the manifest's entry), ``mask``,
    ``uniform`` (dropout), ``segments`` 1 or 2, ``seed``, ``entries`` of the manifest; ``change`` edits the manifest.
    """
    defaults = {"labelled": True, "memory": None, "memory_batch": BATCH, "mask": False, "uniform": False, "segments": 1}
    options = {**defaults, "opset": 20, "seed": 0, "entries": {}, **options}
    inputs, outputs = _specs(options)
    graphs = _graphs(options, inputs, outputs)
    rng = np.random.default_rng(options["seed"])
    state = {
        "w": rng.normal(size=(FEATURES, CLASSES)).astype(np.float32),
        "b": rng.normal(size=CLASSES).astype(np.float32),
        "v": np.zeros((FEATURES, CLASSES), np.float32),
    }
    content = manifest.build(
        method="replay" if options["memory"] else "naive",
        model="linear",
        opset=20,
        batch_size=BATCH,
        inputs=inputs,
        outputs=outputs,
        predict_inputs=[s for s in inputs if s.name in ("x", "mask", "w", "b")],
        predict_outputs=outputs[1:2],
        state=state,
        roles={"v": "optimizer"},
        adapt=sorted(name for name in graphs if name.startswith("adapt")),
        memory=options["memory"],
        **{"hyperparameters": {"lr": 0.1}, **options["entries"]},
    )
    if change:
        change(content)
    return artifact.write(folder, content, graphs, state).folder


@pytest.fixture
def linear(tmp_path: Path) -> Linear:
    """``linear(name="artifact", **options)``: the folder of a new artifact, see :func:`write_linear`."""
    return lambda name="artifact", **options: write_linear(tmp_path / name, **options)
