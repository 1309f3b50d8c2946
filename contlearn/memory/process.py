"""Resident memory of this process, and the step of a configuration measured in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contlearn.errors import ContlearnError

if TYPE_CHECKING:
    from contlearn.memory.account import AdapterAccount

# Freed blocks go back to the system at once, so that the high-water mark is what was live and not what glibc kept.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes(field: str = "VmRSS") -> int:
    """``VmRSS`` (resident now) or ``VmHWM`` (its high-water mark) of this process, in bytes.

    Raises:
        ContlearnError: a system without ``/proc``.
    """
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError as error:
        raise ContlearnError(f"memory: resident size needs Linux's {STATUS} ({error})") from error
    raise ContlearnError(f"memory: no {field} in {STATUS}")


def reset_high_water_mark() -> None:
    """Let ``VmHWM`` start again at the resident size of now.

    Raises:
        ContlearnError: the system does not allow it.
    """
    try:
        CLEAR_REFS.write_text("5")
    except OSError as error:
        raise ContlearnError(f"memory: cannot reset the high-water mark through {CLEAR_REFS} ({error})") from error


def mark() -> int | None:
    """Resident bytes of now, with the high-water mark set back to it; ``None`` where the system cannot tell.

    Call it once the data is there and libraries are warm (:func:`warm_up`), before the model is made.
    """
    warm_up()
    release_freed()
    try:
        reset_high_water_mark()
        return resident_bytes()
    except ContlearnError:
        return None


def release_freed() -> None:
    """Collect garbage and hand freed memory back to the system, where the allocator can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(config: dict[str, Any], *, steps: int = 4, timeout: float = 600.0) -> dict[str, Any]:
    """Run a few steps of a resolved configuration in a fresh process and read its peak.

    Args:
        config: as :func:`contlearn.config.resolve` gives it.
        steps: training steps on the first experience, or batches of the first domain.
        timeout: seconds to wait.

    Returns:
        ``peak_measured``, ``peak_static`` of the same steps, their ``ratio``, ``device`` and ``allocator``; bytes.

    Raises:
        ContlearnError: the process failed; the message ends with its last line.
    """
    return finish(start(config, steps=steps), timeout=timeout)


def start(config: dict[str, Any], *, steps: int = 4) -> subprocess.Popen[str]:
    """Start :func:`measure` in the background."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "contlearn.memory.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ALLOCATOR},
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps({"config": config, "steps": steps}))
        process.stdin.close()
        process.stdin = None
    return process


def finish(process: subprocess.Popen[str], *, timeout: float = 600.0) -> dict[str, Any]:
    """The result of :func:`start`.

    Raises:
        ContlearnError: the process failed or took too long.
    """
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ContlearnError(f"memory: the measuring process took more than {timeout:g} s") from None
    lines = output.strip().splitlines()
    if process.returncode != 0 or not lines:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        raise ContlearnError(f"memory: the measuring process ended with code {process.returncode}: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _child(request: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does: warm the libraries up, take the resident size, build, step, read the peak."""
    import torch

    from contlearn import config as configuration
    from contlearn.memory.account import AdapterAccount, MemoryAccount, StopAfter, snapshot

    resolved = request["config"]
    stream = configuration.make_stream(resolved)
    warm_up()
    # Once in vain: what is imported on the way (timm, plug-ins) is code, not memory of the step.
    configuration.build_on(stream, resolved)
    release_freed()
    cuda = resolved["strategy"].get("device", "auto") != "cpu" and torch.cuda.is_available()
    before = resident_bytes()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_high_water_mark()
    strategy = configuration.build_on(stream, resolved)
    account: MemoryAccount | AdapterAccount
    if getattr(strategy, "adapts", False):
        account = AdapterAccount()
        _adapt(strategy, stream, account, int(request["steps"]))
    else:
        account = MemoryAccount()
        strategy.plugins[:0] = [account, StopAfter(int(request["steps"]))]
        joint = getattr(strategy, "trains_jointly", False)
        strategy.train(stream.train_stream if joint else stream.train_stream[0], eval_streams=[])
    peak = torch.cuda.max_memory_allocated() if cuda else resident_bytes("VmHWM") - before
    resting = snapshot(strategy)
    # Exemplars are indices into the stream here; a device would hold the pixels.
    static = max(account.working, resting.peak_static - resting.replay)
    return {
        "peak_measured": peak,
        "peak_static": static,
        "ratio": peak / static if static else None,
        "device": "cuda" if cuda else "cpu",
        "allocator": {} if cuda else ALLOCATOR,
    }


def _adapt(adapter: Any, stream: Any, account: AdapterAccount, steps: int) -> None:
    """The first batches of a stream, on weights that were not trained: what a step takes does not depend on them."""
    import itertools

    from contlearn.strategies.loader import BatchLoader, BatchSource

    adapter.needs_source_data = False
    if hasattr(adapter, "margin"):
        adapter.margin = 2.0  # an untrained network is certain of nothing: without this no sample would pass the filter
    adapter.start()
    source = BatchSource(stream.test_stream[0].dataset.eval(), adapter.device)
    for x, *_ in itertools.islice(BatchLoader(source, batch_size=adapter.batch_size), steps):
        with account.watching(adapter, x) if account.wanted else contextlib.nullcontext():
            adapter(x)


def warm_up() -> None:
    """Let kernels and thread pools make what they keep for good, on a network too small to matter."""
    import torch

    with torch.random.fork_rng(devices=[]):  # what is trained next shall draw the numbers it would have drawn
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1),
            torch.nn.BatchNorm2d(4),
            torch.nn.ReLU(),
            torch.nn.Conv2d(4, 4, 3, padding=1, groups=4),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(4, 2),
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(torch.rand(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
            optimizer.step()


if __name__ == "__main__":
    try:
        print(json.dumps(_child(json.load(sys.stdin))))
    except ContlearnError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
