"""From a strategy, or its step, to an artifact: capture, lower, verify, measure, write.

The folder appears once everything holds; a graph that computes something else, or a step that does not fit the budget,
is an error and leaves nothing behind.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from contlearn.edge import artifact, manifest
from contlearn.edge.capture import NEW, Captured, capture, capture_predict
from contlearn.edge.manifest import TensorSpec
from contlearn.edge.rules.registry import profile as find_profile
from contlearn.errors import ContlearnError, unknown_name
from contlearn.strategies.step import Step

if TYPE_CHECKING:
    from onnx import ModelProto

TARGETS = ("onnxruntime", "coreml")
MEMORY_FILE = "memory.safetensors"


def export(
    source: Any,
    folder: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    profile: str | None = None,
    batch_size: int | None = None,
    input_shape: Sequence[int] | None = None,
    classes: int | None = None,
    open_classes: Sequence[int] | None = None,
    old_classes: Sequence[int] = (),
    preprocessing: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    exemplars: Mapping[str, np.ndarray] | None = None,
    guards: Mapping[str, Any] | None = None,
    budget: int | str | None = None,
    verify: bool = True,
    measure: bool = True,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> artifact.Artifact:
    """Write the artifact of a step.

    Args:
        source: a :class:`contlearn.strategies.step.Step`, or a strategy or started adapter that declares one.
        folder: a new folder; its parent must exist.
        target: ``onnxruntime``.
        profile: of the backward rules; default: that of the target.
        batch_size: samples per step; of a strategy only, default: its own.
        input_shape: (channels, height, width); of a strategy only.
        classes: outputs to make room for; of a strategy only, see ``declare_step``.
        open_classes: labels met so far; of a strategy only, default: those its head has outputs for.
        old_classes: labels of finished experiences.
        preprocessing: how raw frames become the graph's input (``scale``, ``mean``, ``std``, ``input``); default:
            frames come prepared, as float32.
        class_names: by label.
        exemplars: what the replay memory starts with: ``frames``, ``labels``, ``seen``, ``seen_of``, ``full`` and
            ``order``, as the runner saves them.
        guards: of the runner; default: against values that are not finite, and against collapse for methods without
            labels (those that learn a new experience from labels do answer with few classes for a while).
        budget: bytes (``16MB``) that a step may take.
        verify: compare the graphs with PyTorch.
        measure: measure the peak in a fresh process.
        overwrite: replace an artifact that is there.
        tell: called with a line when a stage begins.

    Raises:
        NotExportable: the strategy has no step for a device; the message says why.
        Gaps: operators that the target does not have.
        ParityError: the graphs do not compute what the strategy does.
        ContlearnError: an unknown target, options that do not fit each other, a step over the budget, a folder that
            cannot be written.
    """
    check_target(target)
    check_place(folder, overwrite)
    limit = None
    if budget is not None:
        from contlearn.memory import parse_bytes

        limit = parse_bytes(budget, "budget")
    resets: list[str] = []
    if not isinstance(source, Step):
        tell("step")
        step = _declared(source, batch_size, input_shape, classes, open_classes)
        if getattr(source, "reset_optimizer", False):
            resets = [name for name, role in step.roles.items() if role == "optimizer"]
    else:
        step = source
    chosen = find_profile(profile or target).name
    tell("capture")
    captured, asked = capture(step, profile=chosen), capture_predict(step, profile=chosen)
    from contlearn.edge.onnx import lower

    tell("lower")
    adapt, predict = lower(captured), lower(asked)
    tiers: tuple[str, ...] = ("rules",)
    if verify:
        from contlearn.edge import verify as checks

        tell("verify")
        tiers = checks.verify(step, adapt, predict).tiers
    graphs: dict[str, bytes | Path] = {
        "adapt.onnx": adapt.SerializeToString(), "predict.onnx": predict.SerializeToString(),
    }  # fmt: skip
    content, state = describe(
        step, captured, asked, old_classes=old_classes, preprocessing=preprocessing, class_names=class_names,
        resets=resets, guards=guards, opset=adapt.opset_import[0].version, target=target, profile=chosen,
    )  # fmt: skip
    if exemplars is not None and content["memory"]:
        from contlearn.edge.runner.tensors import encode_tensors

        content["memory"]["file"] = MEMORY_FILE
        graphs[MEMORY_FILE] = b"".join(bytes(piece) for piece in encode_tensors(exemplars))
    content.update(peak_static=planned(adapt, predict, content), tiers=list(tiers), budget=limit)
    if measure:
        tell("measure")
        content.update(_measured(content, graphs, state))
    _fits(limit, content["peak_measured"], content["peak_static"])
    tell("write")
    return artifact.write(folder, content, graphs, state, overwrite=overwrite)


def check_target(target: str) -> None:
    """Refuse what cannot be exported to.

    Raises:
        ContlearnError: an unknown target, or one that is not there yet.
    """
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    if target == "coreml":
        raise ContlearnError("target: coreml is not available yet; expected onnxruntime")


def check_place(folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written to before any work is done.

    Raises:
        ContlearnError: it is there already, or its parent is not.
    """
    where = Path(folder)
    if where.exists() and not overwrite:
        raise ContlearnError(f"out: {str(where)!r} exists; expected a new folder")
    parent = where.absolute().parent
    if not parent.is_dir():
        raise ContlearnError(f"out: the folder {str(parent)!r} does not exist; expected it to be there")


def _declared(
    source: Any,
    batch_size: int | None,
    input_shape: Sequence[int] | None,
    classes: int | None,
    open_classes: Sequence[int] | None,
) -> Step:
    if not hasattr(source, "declare_step"):
        name = type(source).__name__
        raise ContlearnError(f"export: {name} declares no step; expected a strategy of contlearn or a Step")
    if input_shape is None:
        raise ContlearnError("input_shape: expected (channels, height, width) with a strategy, got none")
    rows = batch_size or getattr(source, "train_mb_size", None) or source.batch_size
    options = {"classes": classes, "open_classes": open_classes}
    given = {key: value for key, value in options.items() if value is not None}
    made: Step = source.declare_step(batch_size=int(rows), input_shape=tuple(input_shape), **given)
    return made


def describe(
    step: Step,
    captured: Captured,
    asked: Captured,
    *,
    old_classes: Sequence[int] = (),
    preprocessing: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    resets: Sequence[str] = (),
    guards: Mapping[str, Any] | None = None,
    **entries: Any,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest of a captured step (without figures), and the state that its graphs read.

    Args:
        step: what was captured.
        captured: its update.
        asked: its prediction.
        old_classes: labels of finished experiences.
        preprocessing: of raw frames.
        class_names: by label; made up for outputs without.
        resets: states that the end of an experience sets to 0.
        guards: of the runner.
        entries: further entries of the manifest.
    """
    read = {name for name in [*captured.inputs, *asked.inputs] if name in step.state}
    state = {name: step.state[name].detach().cpu().numpy() for name in step.state if name in read}
    frames = step.inputs["x"].shape
    names = [str(name) for name in class_names][: step.classes]
    if names:
        names += [f"class {label}" for label in range(len(names), step.classes)]
    # What never moves need not be copied: a teacher of frozen weights is right for ever.
    copies = {target: source for target, source in step.copies.items() if {target, source} <= read}
    content = manifest.build(
        inputs=[_input(step, name) for name in captured.inputs],
        outputs=[_output(step, name, captured) for name in captured.outputs],
        predict_inputs=[_input(step, name) for name in asked.inputs],
        predict_outputs=[_output(step, "logits", captured)],
        state=state,
        roles={name: step.roles[name] for name in state},
        method=step.method,
        model=str(getattr(step.model, "spec", {}).get("name", type(step.model).__name__)),
        batch_size=frames[0],
        hyperparameters={**step.hyperparameters, **step.rates},
        classes=names,
        open_classes=sorted(int(label) for label in step.open_classes),
        old_classes=sorted(int(label) for label in old_classes),
        copies=copies,
        resets=[name for name in resets if name in read],
        preprocessing=dict(preprocessing) if preprocessing else None,
        memory=_memory(step, preprocessing),
        guards=dict({"collapse_window": 0} if guards is None and "y" in captured.inputs else guards or {}),
        **entries,
    )
    return content, state


def _input(step: Step, name: str) -> TensorSpec:
    if name in step.state:
        held = step.state[name]
        return TensorSpec(name, tuple(held.shape), _dtype(held.dtype), "state")
    one = step.inputs[name]
    return TensorSpec(name, one.shape, _dtype(one.dtype), one.meaning)


def _output(step: Step, name: str, captured: Captured) -> TensorSpec:
    if name.startswith(NEW):
        held = step.state[name.removeprefix(NEW)]
        return TensorSpec(name, tuple(held.shape), _dtype(held.dtype), "state", of=name.removeprefix(NEW))
    if name == "logits":
        return TensorSpec(name, (step.inputs["x"].shape[0], step.classes), "float32", "logits")
    if name == "loss":
        return TensorSpec(name, (1,), "float32", "loss")
    node = next(node for node in captured.graph.graph.nodes if node.op == "output")
    value = node.args[0][captured.outputs.index(name)].meta["val"]
    return TensorSpec(name, tuple(value.shape), _dtype(value.dtype), "metric")


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _memory(step: Step, preprocessing: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if step.memory is None or "x_memory" not in step.inputs:
        return None
    channels, *sides = step.inputs["x"].shape[1:]
    raw = preprocessing is not None
    dtype = str(preprocessing.get("input", "uint8")) if preprocessing is not None else "float32"
    last = raw and preprocessing is not None and preprocessing.get("layout") == "NHWC"
    shape = [*sides, channels] if last else [channels, *sides]
    size = math.prod(shape) * np.dtype(dtype).itemsize + 4
    return {
        "capacity": step.memory.capacity, "bytes": step.memory.capacity * size, "policy": step.memory.policy,
        "batch": step.memory.batch, "dtype": dtype, "shape": shape,
    }  # fmt: skip


def planned(adapt: ModelProto, predict: ModelProto, content: Mapping[str, Any]) -> int:
    """Bytes that a session needs at its worst moment, by plan: both graphs' constants, the state twice, values live in
    a step, the replay memory and the guards' snapshot."""
    from contlearn.edge.liveness import plan

    step, question = plan(adapt), plan(predict)
    memory = content["memory"]["bytes"] if content["memory"] else 0
    outputs = [spec for spec in content["outputs"] if spec["meaning"] == "state"]
    moved = sum(math.prod(spec["shape"]) * np.dtype(spec["dtype"]).itemsize for spec in outputs)
    guarded = content["guards"].get("collapse_window", 1) or content["guards"].get("max_drift", 0)
    return int(step.peak + question.constants + memory + (moved if guarded else 0))


def _measured(
    content: dict[str, Any], graphs: Mapping[str, bytes | Path], state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The measured peak of an artifact that is not at its place yet."""
    from contlearn.edge import measure

    with tempfile.TemporaryDirectory() as place:
        written = artifact.write(Path(place) / "artifact", content, graphs, state)
        peak = measure.measure(written.folder)
    return {"peak_measured": peak, "peak_measured_how": measure.HOW if peak is not None else ""}


def _fits(budget: int | None, measured: int | None, static: int) -> None:
    from contlearn.memory import in_words

    peak = static if measured is None else measured
    if budget is not None and peak > budget:
        known = f"{in_words(static)} planned" if measured is None else f"{in_words(measured)} measured"
        more = "" if measured is None else f", {in_words(static)} planned"
        raise ContlearnError(
            f"budget: a step takes {known}{more}; expected at most {in_words(budget)}: take a smaller model, batch or "
            "memory, or train fewer layers"
        )
