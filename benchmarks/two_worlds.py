"""The same run in two worlds: PyTorch with contlearn, and an artifact with NumPy and ONNX Runtime alone.

    python benchmarks/two_worlds.py [--models 6] [--orders 5] [--python PYTHON]

Class-incremental digits, 5 experiences of 2 classes, MLP 64-100-10 without dropout, batch 32, 20 epochs. The artifact
is exported before any training, with the initial weights of the PyTorch run; the device then runs every step itself.
Orders of samples differ, so accuracies are compared as means over initial weights and orders. PYTHON is that of an
environment with numpy and onnxruntime only; without one, this interpreter runs the device's side with everything else
blocked.
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


def both(method: str, seed: int, orders: int, python: str) -> Iterator[dict[str, Any]]:
    """Runs from one set of initial weights, in both worlds: accuracies, steps and seconds.

    Args:
        method: one of ``METHODS``.
        seed: of the initial weights.
        orders: how many orders of samples each world gets.
        python: interpreter of the device's world.
    """
    import numpy as np
    import torch

    from contlearn import models, run, scenarios, strategies
    from contlearn.edge.device_data import load
    from contlearn.edge.export import export
    from contlearn.edge.from_run import preprocessing_of

    torch.set_num_threads(1)
    name, options = METHODS[method]
    stream = scenarios.class_incremental("digits", n_experiences=EXPERIENCES)

    def made() -> Any:
        model = models.create("mlp", stream, seed=seed, hidden=100, dropout=0.0)
        return strategies.create(name, model, epochs=EPOCHS, batch_size=32, device="cpu", **options)

    with tempfile.TemporaryDirectory() as place:
        artifact = export(
            made(), Path(place) / "artifact", input_shape=stream.input_shape, classes=stream.n_classes, open_classes=(),
            preprocessing=preprocessing_of(stream), class_names=stream.class_names, measure=False, verify=seed == 0,
        )  # fmt: skip
        data = load(artifact.manifest, "digits")
        arrays = {key: getattr(data, key) for key in ("train_x", "train_y", "test_x", "test_y")}
        np.savez(Path(place) / "data.npz", **arrays)
        for order in range(orders):
            command = [python, "-I", str(DEVICE), str(artifact.folder), str(Path(place) / "data.npz")]
            command += ["--epochs", str(EPOCHS), "--experiences", json.dumps(stream.classes_per_experience)]
            started = time.perf_counter()
            done = subprocess.run([*command, "--seed", str(order)], capture_output=True, text=True, check=False)
            device_s = time.perf_counter() - started
            if done.returncode:
                raise SystemExit(done.stderr)
            device = json.loads(done.stdout)
            started = time.perf_counter()
            here = run(made(), stream, seed=order, quiet=True).results["metrics"]["final_accuracy"]
            yield {
                "model": seed, "order": order, "pytorch": here, "device": device["final_accuracy"],
                "steps": device["steps"], "trips": device["trips"], "foreign_modules": device["foreign_modules"],
                "pytorch_s": time.perf_counter() - started, "device_s": device_s,
            }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of both worlds, their difference and its standard error."""
    sides = {side: [row[side] for row in rows] for side in ("pytorch", "device")}
    means = {side: statistics.fmean(values) for side, values in sides.items()}
    error = common.standard_error_of_difference(sides["device"], sides["pytorch"])
    return {**means, "difference": means["device"] - means["pytorch"], "standard_error": error, "runs": rows}


def main() -> None:
    """Run both worlds and write benchmarks/results/two_worlds.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=6, help="sets of initial weights")
    parser.add_argument("--orders", type=int, default=5, help="orders of samples per set")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment without PyTorch")
    parser.add_argument("--out")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    found: dict[str, Any] = {}
    for method in given.methods:
        rows = []
        for seed in range(given.models):
            for row in both(method, seed, given.orders, given.python):
                rows.append(row)
                print(method, {key: row[key] for key in ("model", "order", "pytorch", "device", "trips")}, flush=True)
        found[method] = summary(rows)
        print({key: value for key, value in found[method].items() if key != "runs"}, flush=True)
    alone = given.python != sys.executable
    common.write("two_worlds", {"epochs": EPOCHS, "separate_environment": alone, "methods": found}, given.out)


if __name__ == "__main__":
    main()
