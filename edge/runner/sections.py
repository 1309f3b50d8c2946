"""The sections of a manifest that have rules of their own: memory, guards and preprocessing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError, unknown
from contlearn.edge.runner.fields import field, number, same_form, shape_of, single, whole
from contlearn.edge.runner.guards import GUARDS
from contlearn.edge.runner.replay import ReplayMemory


def checked_memory(manifest: Any, inputs: list[Any], labels: Any, batch: int) -> dict[str, Any] | None:
    """The entry ``memory``, its capacity cut to what fits into ``bytes``."""
    memory: dict[str, Any] | None = field(manifest, "memory", (dict, type(None)), default=None)
    frames = single(inputs, "memory_frames", "inputs", optional=memory is None)
    targets = single(inputs, "memory_labels", "inputs", optional=True)
    if memory is None:
        if frames or targets:
            raise RunnerError("memory is missing, and an input is fed from it")
        return None
    if targets and not labels:
        raise RunnerError("inputs: memory_labels need an input with the meaning 'labels'")
    rows = whole(memory, "batch", 1, at="memory", default=batch)
    capacity = whole(memory, "capacity", 1, at="memory")
    policy, dtype = field(memory, "policy", str, at="memory"), field(memory, "dtype", str, at="memory")
    if policy not in ("reservoir", "balanced"):
        raise unknown("memory.policy", policy, ("reservoir", "balanced"))
    if policy == "balanced" and not labels:
        raise RunnerError("memory.policy: 'balanced' needs an input with the meaning 'labels'")
    if dtype not in ("uint8", "float32"):
        raise unknown("memory.dtype", dtype, ("uint8", "float32"))
    shape = shape_of(memory, "memory")
    field(memory, "file", (str, type(None)), at="memory", default=None)
    size = math.prod(shape) * np.dtype(dtype).itemsize + ReplayMemory.LABEL_BYTES
    limit = whole(memory, "bytes", 0, at="memory", default=0) or capacity * size
    if limit < size:
        raise RunnerError(f"memory.bytes: expected room for one frame ({size} bytes), got {limit}")
    assert frames
    for spec in [frames, *([targets] if targets else [])]:
        if spec["shape"][:1] != [rows]:
            raise RunnerError(f"input {spec['name']!r}: expected memory.batch ({rows}) rows, got {spec['shape']}")
    return {**memory, "batch": rows, "capacity": min(capacity, limit // size), "bytes": limit}


def checked_end(manifest: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """What the end of an experience does to the state: ``copies`` (``{target: source}``) and ``resets`` (to 0)."""
    copies = field(manifest, "copies", dict, default={})
    resets = field(manifest, "resets", list, default=[])
    for target, source in copies.items():
        for name in (target, source):
            if name not in tensors:
                raise unknown("state tensor in copies", name, tensors)
        if source in copies:
            raise RunnerError(f"copies: {source!r} is both copied and replaced; expected one of the two")
        if not same_form(tensors[target], tensors[source]):
            raise RunnerError(f"copies: {target!r} and {source!r} differ in shape or dtype")
    for name in resets:
        if name not in tensors:
            raise unknown("state tensor in resets", name, tensors)
        if name in copies or name in copies.values():
            raise RunnerError(f"resets: {name!r} stands in copies, too")
    return {"copies": copies, "resets": resets}


def checked_guards(manifest: Any) -> dict[str, Any]:
    """The entry ``guards`` with defaults filled in."""
    guards = field(manifest, "guards", (dict, type(None)), default=None) or {}
    for key in guards:
        if key not in GUARDS:
            raise unknown("guard", key, GUARDS)
    guards = {**GUARDS, **guards}
    field(guards, "non_finite", bool, at="guards")
    whole(guards, "collapse_window", 0, at="guards")
    if not number(guards, "collapse_share", 0, at="guards", high=1) > 0.5:
        raise RunnerError(f"guards.collapse_share: expected more than 0.5, got {guards['collapse_share']}")
    number(guards, "max_drift", 0, at="guards")
    whole(guards, "snapshot_every", 1, at="guards")
    return guards


def checked_preprocessing(manifest: Any, frames: dict[str, Any]) -> dict[str, Any] | None:
    """The entry ``preprocessing`` with defaults filled in."""
    given: dict[str, Any] | None = field(manifest, "preprocessing", (dict, type(None)), default=None)
    if given is None:
        return None
    layout = field(given, "layout", str, at="preprocessing", default="NCHW")
    kind = field(given, "input", str, at="preprocessing", default="uint8")
    if layout not in ("NCHW", "NHWC") or (layout == "NHWC" and len(frames["shape"]) != 4):
        raise RunnerError(f"preprocessing.layout: expected NCHW, or NHWC for frames of four axes, got {layout!r}")
    if kind not in ("uint8", "float32"):
        raise unknown("preprocessing.input", kind, ("uint8", "float32"))
    channels = frames["shape"][1] if len(frames["shape"]) > 1 else 1
    for key in ("mean", "std"):
        values = field(given, key, list, at="preprocessing", default=[])
        bad = any(isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in values)
        if bad or len(values) not in (0, 1, channels) or (key == "std" and 0 in values):
            expected = f"expected 1 or {channels} finite numbers, std without 0"
            raise RunnerError(f"preprocessing.{key}: {expected}, got {values!r:.60}")
    if frames["dtype"] != "float32":
        raise RunnerError(f"preprocessing: expected frames of dtype float32, got {frames['dtype']}; leave it out")
    return {
        "scale": field(given, "scale", float, at="preprocessing", default=1.0),
        "layout": layout,
        "input": kind,
        "mean": given.get("mean", []),
        "std": given.get("std", []),
    }
