"""How near the static peak of the memory account comes to what a process really needs.

    python benchmarks/memory_accuracy.py [--quick]

For every model and batch size a fresh process builds the model on made-up images, trains a few steps (SGD with
momentum, every weight) and reports the growth of its resident high-water mark; beside it, the static peak of the
account for the same steps and their ratio. One thread, freed memory handed back to the system at once (glibc
settings in the JSON). Goal on CPU: median ratio within 0.8-1.25, no row above 50 MB outside 0.6-1.6.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

# model, image side, channels, batch sizes
ROWS: tuple[tuple[str, int, int, tuple[int, ...]], ...] = (
    ("mlp", 32, 3, (64, 1024)),
    ("simple_cnn", 32, 3, (32, 128)),
    ("resnet32", 32, 3, (16, 64, 128)),
    ("slim_resnet18", 32, 3, (16, 64)),
    ("resnet18_cifar", 32, 3, (8, 32)),
    ("wrn40_2", 32, 3, (16, 32)),
    ("mobilenetv2_100", 96, 3, (8, 16)),
    ("efficientnet_lite0", 96, 3, (8, 16)),
    ("vit_tiny_patch16_224", 224, 3, (4, 8)),
)
STRATEGY = {"name": "naive", "lr": 0.01, "momentum": 0.9, "epochs": 4, "device": "cpu"}


def folder_of_images(where: Path, side: int, count: int) -> str:
    """A folder data set of two classes of random images, ``count`` each."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    target = where / f"images{side}"
    if not target.exists():
        for label in ("a", "b"):
            (target / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / label / f"{number}.png")
    return f"folder:{target}"


def main() -> int:
    """Run, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest batch of each model only")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/memory_accuracy.json)")
    arguments = parser.parse_args()
    from contlearn import config
    from contlearn.memory import in_words
    from contlearn.memory.process import ALLOCATOR, measure

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, side, _, batches in ROWS:
            for batch in batches[:1] if arguments.quick else batches:
                count = 2 * max(batches) if side < 200 else 40
                resolved = config.resolve(
                    {
                        "scenario": {
                            "name": "class_incremental",
                            "dataset": folder_of_images(Path(folder), side, max(count, 2 * batch)),
                            "n_experiences": 1,
                        },
                        "model": {"name": model},
                        "strategy": {**STRATEGY, "batch_size": batch},
                        "threads": 1,
                    }
                )
                row = {"model": model, "side": side, "batch": batch, **measure(resolved)}
                rows.append(row)
                print(
                    f"{model:24} {side:3} px  batch {batch:4}   static {in_words(row['peak_static']):>9}   "
                    f"measured {in_words(row['peak_measured']):>9}   ratio {row['ratio']:.2f}",
                    flush=True,
                )
    ratios = [row["ratio"] for row in rows]
    large = [row["ratio"] for row in rows if row["peak_measured"] > 50e6]
    median = statistics.median(ratios)
    met = 0.8 <= median <= 1.25 and all(0.6 <= ratio <= 1.6 for ratio in large)
    spread = f"above 50 MB {min(large):.2f}-{max(large):.2f}"
    print(f"\nmedian ratio {median:.2f}; {spread}; goal {'met' if met else 'MISSED'}")
    content = {"rows": rows, "median_ratio": median, "goal_met": met, "allocator": ALLOCATOR}
    print(f"written to {common.write('memory_accuracy', content, arguments.out)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
