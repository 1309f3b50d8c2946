"""The "GB" of SHERL (Diao et al., arXiv 2407.07523) and UniPT (arXiv 2308.14316).

Their code prints ``torch.cuda.max_memory_allocated() / 1024**2 / 1000``: 1,048,576,000 bytes, neither 10^9 nor 2^30.
"""

from __future__ import annotations

from contlearn.errors import ContlearnError

SHERL_GB = 1024**2 * 1000
"""Bytes in one of their "GB"."""


def sherl_gb(size: int) -> float:
    """``size`` bytes in their "GB"."""
    return _not_negative("size", size) / SHERL_GB


def sherl_bytes(gigabytes: float) -> int:
    """Bytes of so many of their "GB", to the nearest whole one."""
    return round(_not_negative("gigabytes", gigabytes) * SHERL_GB)


def _not_negative(option: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ContlearnError(f"{option} is {value!r}, expected a number of at least 0")
    return value
