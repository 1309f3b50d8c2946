"""A class-incremental run on an artifact with NumPy and ONNX Runtime alone: no contlearn, no PyTorch.

    python two_worlds_device.py ARTIFACT DATA.npz --epochs 20 --experiences '[[0, 1], [2, 3]]' [--seed 0]

DATA.npz holds raw frames and labels: train_x, train_y, test_x, test_y. Prints one line of JSON. Batches have a fixed
size: what an epoch leaves over is carried into the next one. With --full-updates there are as many updates as PyTorch
takes, which trains on what is left over as a smaller batch: ceil(rows / batch) per epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


class Blocked:
    """Refuses every import of what a device does not have."""

    NAMES = ("torch", "contlearn", "onnx", "avalanche", "safetensors")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Say that a blocked module is not there."""
        if name.split(".")[0] in self.NAMES:
            raise ImportError(f"{name} is not there")


def main() -> None:
    """Train on every experience in turn, then report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--experiences", type=json.loads, required=True)
    parser.add_argument("--full-updates", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    sys.path.insert(0, str(given.artifact))
    import numpy as np
    from runner import Session  # type: ignore[import-not-found]

    data = np.load(given.data, allow_pickle=False)
    train_x, train_y, test_x, test_y = (data[name] for name in ("train_x", "train_y", "test_x", "test_y"))
    session = Session(given.artifact, threads=1, seed=given.seed)
    rng = np.random.default_rng(given.seed)
    batch, accuracies = session.batch_size, []
    for index, labels in enumerate(given.experiences):
        mine = np.flatnonzero(np.isin(train_y, labels))
        left = np.empty(0, np.int64)
        full = given.epochs * -(-len(mine) // batch)
        for _ in range(full if given.full_updates else given.epochs * len(mine) // batch):
            while len(left) < batch:
                left = np.concatenate([left, rng.permutation(mine)])
            rows, left = left[:batch], left[batch:]
            session.step(train_x[rows], train_y[rows], remember=False)
        if session.learned.replay:
            rows = rng.permutation(mine)
            session.remember(train_x[rows], train_y[rows])
        session.finish_experience()
        seen = np.isin(test_y, [label for part in given.experiences[: index + 1] for label in part])
        answers = session.predict(test_x[seen]).argmax(1)
        accuracies.append(float((answers == test_y[seen]).mean()))
    foreign = sorted({name.split(".")[0] for name in sys.modules} & set(Blocked.NAMES))
    found = {"final_accuracy": accuracies[-1], "accuracy_seen": accuracies, "steps": session.steps}
    print(json.dumps({**found, "trips": session.trips, "foreign_modules": foreign}))


if __name__ == "__main__":
    main()
