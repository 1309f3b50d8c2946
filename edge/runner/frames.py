"""Frames: what they must look like, and how raw ones become the input of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from contlearn.edge.runner.errors import RunnerError


class Frames:
    """What frames must look like, and how raw ones become the graph's input."""

    def __init__(self, spec: Mapping[str, Any], preprocessing: Mapping[str, Any] | None) -> None:
        self.shape, self.dtype = tuple(spec["shape"][1:]), np.dtype(spec["dtype"])
        self.rule = preprocessing
        self.raw_shape, self.raw_dtype = self.shape, self.dtype
        if preprocessing:
            self.raw_dtype = np.dtype(preprocessing["input"])
            if preprocessing["layout"] == "NHWC":
                self.raw_shape = (*self.shape[1:], self.shape[0])
            self.scale = np.float32(preprocessing["scale"])
            column = (-1, *(1,) * (len(self.shape) - 1))
            self.mean, self.std = (np.array(preprocessing[key], np.float32).reshape(column) for key in ("mean", "std"))

    def check(self, x: Any, rows: int | None, *, prepared: bool) -> tuple[np.ndarray, bool]:
        """``x`` as an array, and whether it is still raw.

        Raises:
            RunnerError: wrong dtype, shape or number of rows; a value that is NaN or infinite.
        """
        x = np.asarray(x)
        raw = self.rule is not None and not prepared and x.dtype == self.raw_dtype
        if not raw and x.dtype != self.dtype:
            valid = sorted({str(self.dtype), str(self.raw_dtype)} if not prepared else {str(self.dtype)})
            raise RunnerError(f"frames: expected dtype {' or '.join(valid)}, got {x.dtype}")
        shape = self.raw_shape if raw else self.shape
        if x.shape[1:] != shape or x.ndim != len(shape) + 1 or rows not in (None, len(x)):
            expected = ", ".join(map(str, ("rows" if rows is None else rows, *shape)))
            raise RunnerError(f"frames: expected the shape ({expected}), got {tuple(x.shape)}")
        if x.dtype.kind == "f" and not all_finite(x):
            bad = int((~np.isfinite(x)).reshape(len(x), -1).any(1).argmax())
            raise RunnerError(f"frames: row {bad} holds NaN or infinite values; nothing was changed")
        return x, raw

    def keeps_raw(self, shape: Sequence[int], dtype: str) -> bool:
        """Whether a memory of frames of this shape and dtype holds raw ones.

        Raises:
            RunnerError: neither raw nor prepared frames look like that.
        """
        if (tuple(shape), np.dtype(dtype)) == (self.shape, self.dtype):
            return False
        if (tuple(shape), np.dtype(dtype)) == (self.raw_shape, self.raw_dtype):
            return True
        raise RunnerError(
            f"memory: expected {self.raw_dtype} {list(self.raw_shape)} or {self.dtype} {list(self.shape)}, as frames "
            f"have, got {dtype} {list(shape)}"
        )

    def prepare(self, x: np.ndarray, raw: bool, out: np.ndarray) -> None:
        """Write the graph's input for ``x`` into ``out``: ``(x * scale - mean) / std`` for raw frames."""
        if not raw or self.rule is None:
            out[...] = x
            return
        if self.rule["layout"] == "NHWC":
            x = np.moveaxis(x, -1, 1)
        np.multiply(x, self.scale, out=out)
        if self.mean.size:
            out -= self.mean
        if self.std.size:
            out /= self.std


def all_finite(array: np.ndarray) -> bool:
    """Whether every value is finite; a sum finds nearly all at once, without a temporary of the array's size."""
    if array.dtype.kind != "f":
        return True
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
