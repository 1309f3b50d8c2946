"""Tensors on disk: safetensors files, written with a checksum and read with every bound checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
CODES = {name: code for code, name in DTYPES.items()}
_SEAL = b'{"__metadata__":{"sha256":"'
_MAX_HEADER = 100_000_000


def encode_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> list[Any]:
    """A safetensors file as the pieces to be written one after the other; the arrays are not copied.

    The first metadata entry, ``sha256``, is the checksum of the whole file with that entry's digits as zeros.
    """
    header: dict[str, Any] = {"__metadata__": {"sha256": "0" * 64, **(metadata or {})}}
    payload, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # keeps every one aligned
        array = np.asarray(tensors[name])
        if array.dtype.name not in CODES:
            raise RunnerError(f"tensor {name!r}: dtype {array.dtype} has no stored form")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        header[name] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + data.nbytes],
        }
        payload.append(data)
        end += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    start = 8 + len(_SEAL)
    digest = hashlib.sha256(head)
    for data in payload:
        digest.update(data.data)
    return [head[:start] + digest.hexdigest().encode() + head[start + 64 :], *payload]


def read_tensors(path: Path, *, sealed: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file; the tensors are read-only views of the mapped file.

    Args:
        path: the file.
        sealed: the checksum of :func:`encode_tensors` must be there and right.

    Raises:
        RunnerError: the file cannot be read, is cut short, altered, or no safetensors file.
    """
    try:
        raw = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        reason = "the file is empty" if isinstance(error, ValueError) else error.strerror or str(error)
        raise RunnerError(f"cannot read {str(path)!r}: {reason}") from error
    try:
        return _parse_tensors(raw, sealed)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunnerError(f"{str(path)!r} is damaged: {error}") from error


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ: for ``object_pairs_hook``."""
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return dict(pairs)


def _parse_tensors(raw: np.ndarray, sealed: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if raw.size < 8 or length > min(raw.size - 8, _MAX_HEADER):
        raise ValueError("it is cut short, or no safetensors file")
    text = raw[8 : 8 + length].tobytes()
    if sealed:
        start = len(_SEAL)
        digest = hashlib.sha256(raw[:8].tobytes())
        digest.update(text[:start] + b"0" * 64 + text[start + 64 :])
        digest.update(raw[8 + length :].data)
        if not text.startswith(_SEAL) or text[start : start + 64] != digest.hexdigest().encode():
            raise ValueError("checksum mismatch")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_names)
    metadata = header.pop("__metadata__", {})
    payload = raw[8 + length :]
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        shape, (begin, stop), dtype = entry["shape"], entry["data_offsets"], np.dtype(DTYPES[entry["dtype"]])
        if any(type(value) is not int or value < 0 for value in [*shape, begin, stop]) or len(shape) > 32:
            raise ValueError(f"tensor {name!r} has an impossible shape or place")
        # Tensors follow one another without holes or overlaps: the format's own rule.
        if begin != end or stop > payload.size or stop - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} lies outside the file, or beside its place")
        data = payload[begin:stop]
        if dtype.kind == "b" and data.size and data.max() > 1:
            raise ValueError(f"tensor {name!r} holds bytes that are no truth values")
        tensors[name], end = data.view(dtype).reshape(shape), stop
    if end != payload.size:
        raise ValueError("it has more bytes than its tensors")
    return tensors, {str(key): str(value) for key, value in metadata.items()}
