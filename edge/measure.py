"""The peak of an artifact's step, measured: resident memory in a fresh process that has nothing but the runner.

    python -m contlearn.edge.measure ARTIFACT
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contlearn.errors import ContlearnError
from contlearn.memory.process import (
    ALLOCATOR,
    STATUS,
    release_freed,
    reset_high_water_mark,
    resident_bytes,
)

STEPS = 4
HOW = (
    f"growth of the resident high-water mark over opening the artifact and {STEPS} steps in a fresh process, "
    f"{platform.machine()} CPU, 1 thread, arena off, glibc returning freed blocks"
)


def measure(folder: str | os.PathLike[str], *, timeout: float = 600.0) -> int | None:
    """Bytes that opening an artifact and a few steps take; ``None`` where the system cannot tell (no ``/proc``).

    Raises:
        ContlearnError: the process failed; the message ends with its last line.
    """
    if not STATUS.exists():
        return None
    command = [sys.executable, "-W", "ignore", "-m", "contlearn.edge.measure", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **ALLOCATOR}
        )
    except subprocess.TimeoutExpired:
        raise ContlearnError(f"memory: the measuring process took more than {timeout:g} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ContlearnError(f"memory: the measuring process ended with code {done.returncode}: {last}")
    return int(json.loads(lines[-1]))


def frames_for(session: Any, seed: int = 0) -> tuple[Any, Any]:
    """Made-up frames and labels for one step of a session."""
    import numpy as np

    rng = np.random.default_rng(seed)
    frames = session.inputs.frames
    shape = (session.batch_size, *frames.raw_shape)
    x = rng.integers(0, 17, shape).astype(frames.raw_dtype)
    return x, (rng.integers(0, session.classes, session.batch_size) if session.inputs.labelled else None)


def _child(folder: str) -> int:
    """What the fresh process does: warm the libraries up, take the resident size, open, step, read the peak."""
    import onnxruntime as ort

    from contlearn.edge.runner.options import open_options
    from contlearn.edge.runner.session import Session

    warm_up(ort, open_options(ort, {}, 1))
    release_freed()
    before = resident_bytes()
    reset_high_water_mark()
    with tempfile.TemporaryDirectory() as states:
        session = Session(folder, threads=1, state_dir=Path(states) / "state")
        for number in range(STEPS):
            session.step(*frames_for(session, number))
        session.predict(frames_for(session)[0])
    return resident_bytes("VmHWM") - before


def warm_up(ort: Any, options: Any) -> None:
    """Let the library load what it keeps for good, with a graph too small to matter."""
    import numpy as np
    import onnx.parser

    text = """<ir_version: 9, opset_import: ["": 18]> g (float[2,3,8,8] x, float[4,3,3,3] w) => (float[2,4] y) {
        c = Conv<pads=[1,1,1,1]>(x, w)  r = Relu(c)  m = GlobalAveragePool(r)  f = Flatten(m)  y = Softmax(f) }"""
    session = ort.InferenceSession(onnx.parser.parse_model(text).SerializeToString(), options)
    feeds = {"x": np.ones((2, 3, 8, 8), np.float32), "w": np.ones((4, 3, 3, 3), np.float32)}
    for _ in range(2):
        session.run(None, feeds)


if __name__ == "__main__":
    try:
        print(json.dumps(_child(sys.argv[1])))
    except (ContlearnError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
