"""A test-time stream on an artifact with NumPy and ONNX Runtime alone: no contlearn, no PyTorch.

    python two_worlds_tta_device.py ARTIFACT FRAMES.npz

FRAMES.npz holds prepared frames and labels by domain: x00, y00, x01, ... Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from_here = Path(__file__).parent
sys.path.insert(0, str(from_here))


def main() -> None:
    """Adapt to every batch of every domain, then report."""
    from two_worlds_device import Blocked

    folder, frames = Path(sys.argv[1]), Path(sys.argv[2])
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    sys.path.insert(0, str(folder))
    import numpy as np
    from runner import Session  # type: ignore[import-not-found]

    data = np.load(frames, allow_pickle=False)
    session = Session(folder, threads=1)
    errors = []
    for index in range(sum(name.startswith("x") for name in data.files)):
        x, y = data[f"x{index:02}"], data[f"y{index:02}"]
        wrong = 0
        for start in range(0, len(x), session.batch_size):
            rows = x[start : start + session.batch_size]
            whole = len(rows) == session.batch_size
            logits = session.step(rows)["logits"] if whole else session.predict(rows)
            wrong += int((logits.argmax(1) != y[start : start + session.batch_size]).sum())
        errors.append(wrong / len(x))
    foreign = sorted({name.split(".")[0] for name in sys.modules} & set(Blocked.NAMES))
    found = {"error_by_domain": errors, "mean_error": float(np.mean(errors)), "steps": session.steps}
    print(json.dumps({**found, "trips": session.trips, "foreign_modules": foreign}))


if __name__ == "__main__":
    main()
