"""Execution providers and session options of ONNX Runtime."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from typing import Any

from contlearn.edge.runner.errors import RunnerError, unknown
from contlearn.edge.runner.fields import field

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
# Without the arena a step's peak is 1.3x the static plan instead of 2.5x; it costs some speed in allocations.
MEMORY_OPTIONS: dict[str, Any] = {
    "enable_cpu_mem_arena": False,
    "enable_mem_pattern": True,
    "enable_mem_reuse": True,
    "graph_optimization_level": "all",
    "malloc_mmap_threshold": 0,
    "config": {},
}
LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def checked_options(given: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Session options by the names of :data:`MEMORY_OPTIONS`."""
    for key in given:
        if key not in MEMORY_OPTIONS:
            raise unknown(f"entry of {at}", key, MEMORY_OPTIONS)
    options = dict(given)
    for key in options:
        field(options, key, type(MEMORY_OPTIONS[key]), at=at)
    if options.get("graph_optimization_level", "all") not in LEVELS:
        raise unknown(f"{at}.graph_optimization_level", options["graph_optimization_level"], LEVELS)
    return options


def open_providers(ort: Any, wanted: Any) -> list[tuple[str, dict[str, Any]]]:
    """Execution providers by short or full name, each with its options; the CPU comes last in any case.

    Raises:
        RunnerError: an unknown one, or one that this build of ONNX Runtime does not have.
    """
    chosen: list[tuple[str, dict[str, Any]]] = []
    for item in ["cpu"] if wanted is None else [wanted] if isinstance(wanted, str) else wanted:
        name, options = (item, {}) if isinstance(item, str) else item
        full = PROVIDERS.get(str(name).lower(), name)
        if full not in (available := ort.get_available_providers()):
            if full not in PROVIDERS.values():
                raise unknown("execution provider", name, PROVIDERS)
            raise RunnerError(f"providers: onnxruntime {ort.__version__} has no {full}; it has {', '.join(available)}")
        chosen.append((full, dict(options)))
    if PROVIDERS["cpu"] not in [name for name, _ in chosen]:
        chosen.append((PROVIDERS["cpu"], {}))
    return chosen


def open_options(ort: Any, given: Mapping[str, Any], threads: int | None) -> Any:
    """ONNX Runtime's session options from :data:`MEMORY_OPTIONS` overlaid with ``given``.

    ``malloc_mmap_threshold`` (bytes; 0 leaves it alone) makes glibc give larger blocks back to the system as soon as
    they are free, for the whole process; ``config`` holds ONNX Runtime's own string keys.
    """
    if threads is not None and (type(threads) is not int or threads < 1):
        raise RunnerError(f"threads: expected a whole number from 1, got {threads!r}")
    rules = {**MEMORY_OPTIONS, **given}
    options = ort.SessionOptions()
    options.log_severity_level = 3  # what is wrong comes as an exception
    for key in ("enable_cpu_mem_arena", "enable_mem_pattern", "enable_mem_reuse"):
        setattr(options, key, rules[key])
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[rules["graph_optimization_level"]])
    options.intra_op_num_threads = threads or 0
    for key, value in rules["config"].items():
        options.add_session_config_entry(str(key), str(value))
    if rules["malloc_mmap_threshold"] > 0:
        with contextlib.suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).mallopt(-3, int(rules["malloc_mmap_threshold"]))  # M_MMAP_THRESHOLD
    return options
