"""Test-time adaptation in two worlds: PyTorch with contlearn, and an artifact with NumPy and ONNX Runtime alone.

    python benchmarks/two_worlds_tta.py [--config configs/mnist5k_c_ecotta.yaml] [--seeds 3] [--python PYTHON]

Both see the same frames in the same batches: the 15 corruptions one after the other. PYTHON is that of an environment
with numpy and onnxruntime only; without one, this interpreter runs the device's side with everything else blocked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

ROOT = Path(__file__).parent.parent
DEVICE = Path(__file__).with_name("two_worlds_tta_device.py")


def both(config: Path, seed: int, python: str) -> dict[str, Any]:
    """Errors of both worlds, each by domain and in all.

    Args:
        config: of a test-time run.
        seed: of source weights and stream.
        python: interpreter of the device's world.
    """
    import numpy as np
    import torch

    from contlearn import run
    from contlearn.adapting import visits_of
    from contlearn.edge.export import export
    from contlearn.edge.from_run import ready
    from contlearn.strategies.loader import BatchLoader, BatchSource

    torch.set_num_threads(1)
    made = ready(config, [f"--seed={seed}"])
    batch = made.strategy.batch_size
    with tempfile.TemporaryDirectory() as place:
        shipped = export(
            made.strategy, Path(place) / "artifact", batch_size=batch, input_shape=made.stream.input_shape,
            measure=False,
        )  # fmt: skip
        frames = {}
        for index, visit in enumerate(visits_of(made.stream)):
            source = BatchSource(visit.dataset, torch.device("cpu"))
            x, y, *_ = next(iter(BatchLoader(source, batch_size=len(source))))
            frames[f"x{index:02}"], frames[f"y{index:02}"] = x.numpy(), y.numpy()
        np.savez(Path(place) / "frames.npz", **frames)
        command = [python, "-I", str(DEVICE), str(shipped.folder), str(Path(place) / "frames.npz")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        device = json.loads(done.stdout)
    fresh = ready(config, [f"--seed={seed}"])
    here = run(fresh.strategy, fresh.stream, seed=seed, quiet=True).results
    return {
        "seed": seed, "source": here["source_mean_error"], "pytorch": here["mean_error"],
        "device": device["mean_error"], "pytorch_by_domain": here["error_by_domain"],
        "device_by_domain": device["error_by_domain"], "trips": device["trips"], "steps": device["steps"],
        "foreign_modules": device["foreign_modules"], "tiers": shipped.manifest["tiers"],
    }  # fmt: skip


def main() -> None:
    """Run both worlds and write benchmarks/results/two_worlds_tta.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mnist5k_c_ecotta.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment without PyTorch")
    parser.add_argument("--out")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = []
    for seed in range(given.seeds):
        rows.append(both(given.config, seed, given.python))
        print({key: rows[-1][key] for key in ("seed", "source", "pytorch", "device", "trips", "tiers")}, flush=True)
    gaps = [row["device"] - row["pytorch"] for row in rows]
    found = {
        **{side: statistics.fmean(row[side] for row in rows) for side in ("source", "pytorch", "device")},
        "difference": statistics.fmean(gaps), "largest_difference": max(map(abs, gaps)), "runs": rows,
    }  # fmt: skip
    print({key: value for key, value in found.items() if key != "runs"})
    content = {"config": given.config.name, "separate_environment": given.python != sys.executable, **found}
    common.write("two_worlds_tta", content, given.out)


if __name__ == "__main__":
    main()
