"""The same run in two worlds: PyTorch with contlearn, and an artifact with NumPy and ONNX Runtime alone.

    python benchmarks/two_worlds.py [--seeds 40] [--python PYTHON]

Class-incremental digits, 5 experiences of 2 classes, MLP 64-100-10 without dropout, batch 32, 20 epochs. The artifact
is exported before any training, with the initial weights of the PyTorch run; the device then runs every step itself.
Orders of samples and choices of exemplars differ, so accuracies are compared as means over seeds, each with initial
weights, orders and exemplars of its own. PYTHON is that of an environment with numpy and onnxruntime only; without one,
this interpreter runs the device's side with everything else blocked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

DEVICE = Path(__file__).with_name("two_worlds_device.py")
EPOCHS, EXPERIENCES = 20, 5
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "replay": ("replay", {"lr": 0.1, "memory_size": 200}),
    "pred_kd + l2": ("rehearsal_free", {"lr": 0.01, "momentum": 0.9, "pred_kd": True, "l2": 0.01}),
}


def both(method: str, seeds: int, python: str) -> Iterator[dict[str, Any]]:
    """One run per seed in both worlds: accuracies, steps and seconds.

    Args:
        method: one of ``METHODS``.
        seeds: how many.
        python: interpreter of the device's world.
    """
    import numpy as np
    import torch

    from contlearn import models, run, scenarios, strategies
    from contlearn.edge import artifact
    from contlearn.edge.device_data import load
    from contlearn.edge.export import export
    from contlearn.edge.from_run import preprocessing_of

    torch.set_num_threads(1)
    name, options = METHODS[method]
    stream = scenarios.class_incremental("digits", n_experiences=EXPERIENCES)
    fresh: dict[str, Any] = {"input_shape": stream.input_shape, "classes": stream.n_classes, "open_classes": ()}

    def made(seed: int) -> Any:
        model = models.create("mlp", stream, seed=seed, hidden=100, dropout=0.0)
        return strategies.create(name, model, epochs=EPOCHS, batch_size=32, device="cpu", **options)

    with tempfile.TemporaryDirectory() as place:
        first = export(
            made(0), Path(place) / "artifact", preprocessing=preprocessing_of(stream), class_names=stream.class_names,
            measure=False, **fresh,
        )  # fmt: skip
        data = load(first.manifest, "digits")
        arrays = {key: getattr(data, key) for key in ("train_x", "train_y", "test_x", "test_y")}
        np.savez(Path(place) / "data.npz", **arrays)
        for seed in range(seeds):
            # The same graphs with the initial weights of this seed.
            step = made(seed).declare_step(batch_size=32, **fresh)
            state = {key: step.state[key].numpy() for key in first.manifest["state"]["tensors"]}
            graphs: dict[str, bytes | Path] = {path.name: path for path in first.folder.glob("*.onnx")}
            shipped = artifact.write(Path(place) / f"seed{seed}", first.manifest, graphs, state)
            command = [python, "-I", str(DEVICE), str(shipped.folder), str(Path(place) / "data.npz")]
            command += ["--epochs", str(EPOCHS), "--experiences", json.dumps(stream.classes_per_experience)]
            device, device_s = _device([*command, "--seed", str(seed)])
            full, _ = _device([*command, "--seed", str(seed), "--full-updates"])
            started = time.perf_counter()
            here = run(made(seed), stream, seed=seed, quiet=True).results["metrics"]["final_accuracy"]
            yield {
                "seed": seed, "pytorch": here, "device": device["final_accuracy"],
                "device_full_updates": full["final_accuracy"], "steps": device["steps"], "steps_full": full["steps"],
                "trips": {**device["trips"], **full["trips"]}, "foreign_modules": device["foreign_modules"],
                "pytorch_s": time.perf_counter() - started, "device_s": device_s,
            }  # fmt: skip


def _device(command: list[str]) -> tuple[dict[str, Any], float]:
    """What the device's side found, and seconds."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - started


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the worlds, and how far the device's are from PyTorch's, with standard errors."""
    found: dict[str, Any] = {"pytorch": statistics.fmean(row["pytorch"] for row in rows)}
    for side in ("device", "device_full_updates"):
        gaps = [row[side] - row["pytorch"] for row in rows]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
        found[side] = statistics.fmean(row[side] for row in rows)
        found[f"{side}_difference"], found[f"{side}_standard_error"] = statistics.fmean(gaps), error
    return {**found, "runs": rows}


def main() -> None:
    """Run both worlds and write benchmarks/results/two_worlds.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment without PyTorch")
    parser.add_argument("--out")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}
    for method in given.methods:
        rows = []
        for row in both(method, given.seeds, given.python):
            rows.append(row)
            shown = ("seed", "pytorch", "device", "device_full_updates", "trips")
            print(method, {key: row[key] for key in shown}, flush=True)
        found[method] = summary(rows)
        print({key: value for key, value in found[method].items() if key != "runs"}, flush=True)
    alone = given.python != sys.executable
    common.write("two_worlds", {"epochs": EPOCHS, "separate_environment": alone, "methods": found}, given.out)


if __name__ == "__main__":
    main()
