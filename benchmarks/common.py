"""What the benchmarks share: where results go, how a machine is described, how numbers are summed up."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def use_threads(count: int) -> None:
    """Fix the number of compute threads; call it before PyTorch is imported."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(count)


def write(name: str, content: dict[str, Any], out: str | None = None) -> Path:
    """Keep a benchmark's figures with the command and the environment they come from."""
    from contlearn.results import environment

    path = Path(out) if out else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    whole = {"benchmark": name, "command": command, "environment": environment(), **content}
    path.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def standard_error_of_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Of the means of two independent samples: sqrt(s1^2/n1 + s2^2/n2)."""
    return math.sqrt(mean_sd(left)[1] ** 2 / len(left) + mean_sd(right)[1] ** 2 / len(right))
