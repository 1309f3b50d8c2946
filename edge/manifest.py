"""``manifest.json`` of an artifact: what a writer gives, checked more strictly than the runner needs to.

The runner's own check (:func:`contlearn.edge.runtime.check_manifest`) is the contract; here misspelt entries are found,
and what only tools read (peaks, tiers, roles) is checked as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contlearn.edge.runner.contract import SCHEMA, check_manifest
from contlearn.edge.runner.errors import RunnerError
from contlearn.errors import ContlearnError, nearest, unknown_name

TARGETS = ("onnxruntime", "coreml")
# Key, and what it holds where the writer leaves it out; `...` for those that must be given.
ENTRIES: dict[str, Any] = {
    "schema": SCHEMA,
    "method": ...,
    "model": ...,
    "target": "onnxruntime",
    "profile": "onnxruntime",
    "opset": ...,
    "batch_size": ...,
    "graphs": ...,
    "inputs": ...,
    "outputs": ...,
    "predict": ...,
    "state": ...,
    "hyperparameters": {},
    "classes": [],
    "open_classes": [],
    "old_classes": [],
    "copies": {},
    "resets": [],
    "preprocessing": None,
    "memory": None,
    "guards": {},
    "budget": None,
    "peak_static": 0,
    "peak_measured": None,
    "peak_measured_how": "",
    "tiers": [],
    "session_options": {},
    "files": {},
}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Args:
        name: its name in the graph.
        shape: fixed.
        dtype: NumPy's name.
        meaning: ``frames``, ``labels``, ``memory_frames``, ``memory_labels``, ``learning_rate``, ``hyperparameter``,
            ``class_mask``, ``old_class_mask``, ``uniform``, ``state``; of outputs ``loss``, ``logits``, ``metric``,
            ``state``.
        of: the state that an output with the meaning ``state`` replaces.
    """

    name: str
    shape: Sequence[int]
    dtype: str
    meaning: str
    of: str | None = None

    def entry(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        content = {
            "name": self.name,
            "shape": [int(n) for n in self.shape],
            "dtype": self.dtype,
            "meaning": self.meaning,
        }
        return content if self.of is None else {**content, "of": self.of}


def build(
    *,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
    predict_inputs: Iterable[TensorSpec],
    predict_outputs: Iterable[TensorSpec],
    state: Mapping[str, np.ndarray],
    roles: Mapping[str, str] | None = None,
    adapt: Sequence[str] = ("adapt.onnx",),
    predict: Sequence[str] = ("predict.onnx",),
    **entries: Any,
) -> dict[str, Any]:
    """A manifest without its ``files``, which :func:`contlearn.edge.artifact.write` adds.

    Args:
        inputs: of the adapt graph.
        outputs: of the adapt graph.
        predict_inputs: of the predict graph.
        predict_outputs: of the predict graph.
        state: every state tensor as shipped, by name.
        roles: ``weight`` (default), ``optimizer``, ``statistic`` or ``method`` by state tensor.
        adapt: the graph's files, run in turn.
        predict: the graph's files, run in turn.
        entries: the other entries by name: ``method``, ``model``, ``opset``, ``batch_size``, ...

    Raises:
        ContlearnError: an entry that does not exist, or one that is missing.
    """
    for name in set(roles or {}) - set(state):
        raise unknown_name("state tensor in roles", name, state)
    tensors = {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "role": (roles or {}).get(name, "weight")}
        for name, array in state.items()
    }
    given = {
        **entries,
        "graphs": {"adapt": list(adapt), "predict": list(predict)},
        "inputs": [spec.entry() for spec in inputs],
        "outputs": [spec.entry() for spec in outputs],
        "predict": {"inputs": [s.entry() for s in predict_inputs], "outputs": [s.entry() for s in predict_outputs]},
        "state": {"file": "state.safetensors", "tensors": tensors},
    }
    _known(given)
    missing = [key for key, default in ENTRIES.items() if default is ... and key not in given]
    if missing:
        raise ContlearnError(f"manifest: {missing[0]} is missing; expected all of: {', '.join(missing)}")
    return {**{key: default for key, default in ENTRIES.items() if default is not ...}, **given}


def check(manifest: Any, where: str = "manifest.json") -> dict[str, Any]:
    """The manifest with its optional entries filled in.

    Args:
        manifest: the content of ``manifest.json``.
        where: its path, for messages.

    Raises:
        ContlearnError: the first thing that is wrong, misspelt entries included.
    """
    try:
        checked = check_manifest(manifest, where)
    except RunnerError as error:
        raise ContlearnError(str(error)) from error
    _known(checked, f"{where}: ")
    if checked["target"] not in TARGETS:
        raise ContlearnError(f"{where}: target: expected one of {', '.join(TARGETS)}, got {checked['target']!r}")
    for key in ("peak_static", "peak_measured", "budget"):
        value = checked.get(key)
        if not (value is None or (type(value) is int and value >= 0)):
            raise ContlearnError(f"{where}: {key}: expected bytes as a whole number, got {value!r}")
    if checked.get("peak_measured") is not None and not checked.get("peak_measured_how"):
        raise ContlearnError(f"{where}: peak_measured_how: expected how peak_measured was measured, got nothing")
    tiers = checked.get("tiers", [])
    if not isinstance(tiers, list) or not all(isinstance(tier, str) for tier in tiers):
        raise ContlearnError(f"{where}: tiers: expected names of verification tiers, got {tiers!r}")
    _reached(checked, where)
    return checked


def _known(manifest: Mapping[str, Any], where: str = "manifest: ") -> None:
    for key in manifest:
        if key not in ENTRIES:
            close = nearest(key, ENTRIES)
            hint = f"; did you mean {close!r}?" if close else f"; expected one of: {', '.join(ENTRIES)}"
            raise ContlearnError(f"{where}unknown entry {key!r}{hint}")


def _reached(manifest: Mapping[str, Any], where: str) -> None:
    """Every state tensor is read by a graph, and one that belongs to the optimizer or a statistic is replaced."""
    read = {spec["name"] for spec in [*manifest["inputs"], *manifest["predict"]["inputs"]]}
    replaced = {spec.get("of") for spec in manifest["outputs"]}
    for name, entry in manifest["state"]["tensors"].items():
        if name not in read:
            raise ContlearnError(f"{where}: state tensor {name!r} is the input of no graph; leave it out")
        if entry["role"] == "optimizer" and name not in replaced:
            raise ContlearnError(
                f"{where}: optimizer state {name!r} is replaced by no output; expected one with of={name!r}"
            )
