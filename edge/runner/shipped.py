"""What an artifact ships: the state that a session starts from, exemplars, and the files a saved state belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError
from contlearn.edge.runner.tensors import read_tensors


def read_shipped(folder: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state by name, read-only views of the file.

    Raises:
        RunnerError: it is not what the manifest says.
    """
    path, expected = folder / manifest["state"]["file"], manifest["state"]["tensors"]
    tensors = read_tensors(path)[0]
    for name, entry in expected.items():
        if name not in tensors:
            raise RunnerError(f"{str(path)!r}: tensor {name!r} is missing")
        if [tensors[name].dtype.name, list(tensors[name].shape)] != [entry["dtype"], entry["shape"]]:
            raise RunnerError(f"{str(path)!r}: tensor {name!r} has not the dtype and shape that the manifest says")
    return {name: tensors[name] for name in expected}


def read_memory(folder: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """The exemplars that came with the artifact."""
    memory = manifest["memory"]
    return read_tensors(folder / memory["file"])[0] if memory and memory.get("file") else None


def identity_of(manifest: Mapping[str, Any]) -> str:
    """A checksum of the files that a saved state depends on."""
    graphs = [name for role in ("adapt", "predict") for name in manifest["graphs"][role]]
    sums = {name: manifest["files"][name]["sha256"] for name in [*graphs, manifest["state"]["file"]]}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
