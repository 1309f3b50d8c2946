"""What a manifest must say for the runner to follow it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contlearn.edge.runner.errors import RunnerError, unknown
from contlearn.edge.runner.fields import field, same_form, shape_of, single, tensor_specs, whole
from contlearn.edge.runner.frames import Frames
from contlearn.edge.runner.options import checked_options
from contlearn.edge.runner.sections import checked_end, checked_guards, checked_memory, checked_preprocessing
from contlearn.edge.runner.tensors import CODES, unique_names

SCHEMA = 1
MANIFEST = "manifest.json"
# Not verified before a run: nothing is read from them.
UNREAD = ("README.md", "runner.py")

INPUT_MEANINGS = (
    *("frames", "labels", "memory_frames", "memory_labels"),
    *("learning_rate", "hyperparameter", "class_mask", "old_class_mask", "uniform", "state"),
)
OUTPUT_MEANINGS = ("loss", "logits", "metric", "state")
PREDICT_MEANINGS = ("frames", "class_mask", "hyperparameter", "state")
ROLES = ("weight", "optimizer", "statistic", "method")


def load_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of an artifact.

    Raises:
        RunnerError: no such file, no JSON, or not a manifest that this runner can follow.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_names)
    except OSError as error:
        reason = error.strerror or error
        raise RunnerError(f"cannot read {str(path)!r}: {reason}; expected an artifact folder") from error
    except (ValueError, RecursionError) as error:
        raise RunnerError(f"{str(path)!r} is damaged: {error}") from error
    return check_manifest(manifest, str(path))


def check_manifest(manifest: Any, where: str = MANIFEST) -> dict[str, Any]:
    """The manifest with its optional entries filled in, if all that a runner relies on is there and consistent.

    Args:
        manifest: the content of ``manifest.json``.
        where: its path, for messages.

    Raises:
        RunnerError: the first thing that is wrong.
    """
    try:
        return checked(manifest)
    except RunnerError as error:
        raise RunnerError(f"{where}: {error}") from error


def checked(manifest: Any) -> dict[str, Any]:
    schema = field(manifest, "schema", int)
    if schema > SCHEMA:
        raise RunnerError(f"schema {schema} is newer than this runner ({SCHEMA}); use the artifact's own runner.py")
    if schema < 1:
        raise RunnerError(f"schema: expected {SCHEMA}, got {schema}")
    for key in ("method", "model", "target"):
        field(manifest, key, str)
    whole(manifest, "opset", 1)
    batch = whole(manifest, "batch_size", 1)
    files = field(manifest, "files", dict)
    for name, entry in files.items():
        if name in (".", MANIFEST) or Path(name).is_absolute() or not {"..", ""}.isdisjoint(re.split(r"[/\\]", name)):
            raise RunnerError(f"files: {name!r} is no file inside the artifact")
        if not re.fullmatch("[0-9a-f]{64}", field(entry, "sha256", str, at=f"files.{name}")):
            raise RunnerError(f"files.{name}.sha256: expected 64 hexadecimal digits")
        whole(entry, "bytes", 0, at=f"files.{name}")
    graphs = field(manifest, "graphs", dict)
    for role in ("adapt", "predict"):
        for name in field(graphs, role, list, at="graphs") or [None]:
            # A package of several files (Core ML) stands in `files` with what it holds.
            if not any(file == name or str(file).startswith(f"{name}/") for file in files):
                raise RunnerError(f"graphs.{role}: {name!r} is not among files")

    state = field(manifest, "state", dict)
    if field(state, "file", str, at="state") not in files:
        raise RunnerError(f"state.file: {state['file']!r} is not among files")
    tensors = field(state, "tensors", dict, at="state")
    for name, entry in tensors.items():
        shape_of(entry, f"state.tensors.{name}")
        for key, valid in (("dtype", tuple(CODES)), ("role", ROLES)):
            if field(entry, key, str, at=f"state.tensors.{name}") not in valid:
                raise unknown(f"{key} of state tensor {name!r}", entry[key], valid)

    inputs = tensor_specs(field(manifest, "inputs", list), "input", INPUT_MEANINGS)
    outputs = tensor_specs(field(manifest, "outputs", list), "output", OUTPUT_MEANINGS)
    predict = field(manifest, "predict", dict)
    known = {spec["name"]: spec for spec in [*inputs, *outputs]}
    parts = {}
    for part, meanings in (("inputs", PREDICT_MEANINGS), ("outputs", ("logits",))):
        given = field(predict, part, list, at="predict")
        named = [known.get(item, item) if isinstance(item, str) else item for item in given]
        parts[part] = tensor_specs(named, f"predict {part[:-1]}", meanings)
    frames, logits = single(inputs, "frames", "inputs"), single(outputs, "logits", "outputs")
    single(outputs, "loss", "outputs")
    seen = single(parts["inputs"], "frames", "predict inputs")
    answer = single(parts["outputs"], "logits", "predict outputs")
    labels = single(inputs, "labels", "inputs", optional=True)
    assert frames and logits and seen and answer
    for spec in (frames, seen, logits, answer, labels):
        if spec and spec["shape"][:1] != [batch]:
            raise RunnerError(f"{spec['name']!r}: expected batch_size ({batch}) rows, got the shape {spec['shape']}")
    if len(logits["shape"]) != 2 or not same_form(logits, answer) or not same_form(frames, seen):
        raise RunnerError("predict: expected frames and logits as in the adapt graph, logits (batch, classes)")
    classes = field(manifest, "classes", list, default=[])
    if classes and len(classes) != logits["shape"][1]:
        raise RunnerError(f"classes: expected {logits['shape'][1]} names, one per logit, got {len(classes)}")
    for spec in [*inputs, *parts["inputs"]]:
        if spec["meaning"] == "state" and not (spec["name"] in tensors and same_form(spec, tensors[spec["name"]])):
            raise RunnerError(f"input {spec['name']!r}: state.tensors holds none of that name, shape and dtype")
        if spec["meaning"] == "uniform" and spec["dtype"] not in ("float32", "float64"):
            raise RunnerError(f"input {spec['name']!r}: expected float32 or float64, got {spec['dtype']}")
        if spec["meaning"] in ("class_mask", "old_class_mask") and spec["shape"] != logits["shape"][1:]:
            raise RunnerError(f"input {spec['name']!r}: expected the shape {logits['shape'][1:]}, got {spec['shape']}")
    updated = [spec for spec in outputs if spec["meaning"] == "state"]
    for spec in updated:
        of = field(spec, "of", str, at=f"output {spec['name']!r}")
        if of not in tensors or not same_form(spec, tensors[of]):
            raise RunnerError(f"output {spec['name']!r}: state.tensors holds no {of!r} of that shape and dtype")
    if len({spec["of"] for spec in updated}) < len(updated):
        raise RunnerError("outputs: two of them replace the same state")
    values = field(manifest, "hyperparameters", dict, default={})
    rate = single(inputs, "learning_rate", "inputs", optional=True)
    for key in [*(["lr"] if rate else []), *(s["name"] for s in inputs if s["meaning"] == "hyperparameter")]:
        field(values, key, float, at="hyperparameters")
    for key in ("open_classes", "old_classes"):
        for label in field(manifest, key, list, default=[]):
            if type(label) is not int or not 0 <= label < logits["shape"][1]:
                raise RunnerError(f"{key}: expected whole numbers from 0 to {logits['shape'][1] - 1}, got {label!r}")
    preprocessing = checked_preprocessing(manifest, frames)
    memory = checked_memory(manifest, inputs, labels, batch)
    if memory and memory.get("file") is not None and memory["file"] not in files:
        raise RunnerError(f"memory.file: {memory['file']!r} is not among files")
    if memory:
        Frames(frames, preprocessing).keeps_raw(memory["shape"], memory["dtype"])
        past = single(inputs, "memory_frames", "inputs")
        assert past
        if (past["shape"][1:], past["dtype"]) != (frames["shape"][1:], frames["dtype"]):
            raise RunnerError(f"input {past['name']!r}: expected rows like those of {frames['name']!r}")
    return {
        **manifest,
        "inputs": inputs,
        "outputs": outputs,
        "predict": {**predict, **parts},
        "classes": classes,
        "hyperparameters": values,
        "memory": memory,
        **checked_end(manifest, tensors),
        "guards": checked_guards(manifest),
        "preprocessing": preprocessing,
        "session_options": checked_options(field(manifest, "session_options", dict, default={}), "session_options"),
    }


def verify_files(folder: Path, manifest: Mapping[str, Any], *, unread: bool = False) -> None:
    """Check size and SHA-256 of an artifact's files; those a runner never reads only with ``unread``.

    Raises:
        RunnerError: a file that is missing, cut short or altered.
    """
    for name, entry in manifest["files"].items():
        if name in UNREAD and not unread:
            continue
        path, digest = folder / name, hashlib.sha256()
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            reason = error.strerror or error
            raise RunnerError(f"cannot read {str(path)!r}: {reason}; the artifact is incomplete") from error
        if size != entry["bytes"]:
            raise RunnerError(f"{str(path)!r} has {size} bytes, expected {entry['bytes']}; copy the artifact again")
        if digest.hexdigest() != entry["sha256"]:
            raise RunnerError(f"{str(path)!r} was altered (checksum mismatch); copy the artifact again")
