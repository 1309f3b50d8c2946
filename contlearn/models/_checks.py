"""Checks of what a user asks of a model, each with a one-line error that names model, option and valid range."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from contlearn.errors import ContlearnError

Shape = tuple[int, int, int]
"""(channels, height, width) of one image."""


def whole(option: str, value: Any, *, least: int, most: int | None = None) -> int:
    """``value`` if it is a whole number from ``least`` to ``most``."""
    if not _is(Integral, value) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ContlearnError(f"{option} is {value!r}, expected a whole number {span}")
    return int(value)


def fraction(option: str, value: Any) -> float:
    """``value`` if it is a number in [0, 1)."""
    if not _is(Real, value) or not 0 <= value < 1:
        raise ContlearnError(f"{option} is {value!r}, expected a number from 0 to below 1")
    return float(value)


def image_shape(model: str, input_shape: Shape, *, least: int = 1) -> Shape:
    """``input_shape`` if it has a channel and at least ``least`` pixels along height and width."""
    channels, height, width = input_shape
    if channels < 1 or min(height, width) < least:
        raise ContlearnError(
            f"model {model!r} takes images of at least {least}x{least} pixels with at least 1 channel,"
            f" the stream's have shape {tuple(input_shape)} (channels, height, width)"
        )
    return input_shape


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
