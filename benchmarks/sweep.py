"""Wall time of a sweep against the least it could take: its cells' training times, shared out evenly.

    python benchmarks/sweep.py [CONFIG] [--jobs N] [--seeds N] [--engine local|ray] [--target 1.3]

Runs `contlearn pareto CONFIG` (default: configs/pareto_digits.yaml) once in a folder of its own, from a cold start of
its processes, and prints wall seconds / (sum of train_s / workers) with where the rest went: start-up, building,
evaluation and files. Exit code 1 above the target.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).parent
COMMAND = "import sys; from contlearn.pareto.command import main; sys.exit(main(sys.argv[1:]))"


def measure(config: Path, jobs: int, options: list[str], out: Path) -> dict[str, Any]:
    """Run the sweep and account for its wall time."""
    started = time.time()
    arguments = [str(config), "--out", str(out), "--jobs", str(jobs), *options]
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True)
    wall = time.time() - started
    content = json.loads((out / "pareto.json").read_text())
    records = [json.loads((out / cell["folder"] / "cell.json").read_text()) for cell in content["cells"]]
    times = [cell["time"] for cell in content["cells"]]
    train, evaluate, whole = (math.fsum(t[name] for t in times) for name in ("train_s", "eval_s", "cell_s"))
    ends = [record["started"] + record["seconds"] for record in records]
    first = min(record["started"] for record in records)
    return {
        "cells": len(times),
        "jobs": jobs,
        "wall_s": wall,
        "train_s": train,
        "ideal_s": train / jobs,
        "ratio": wall / (train / jobs),
        "parts_s": {
            "until the first cell": first - started,
            "evaluation, per worker": evaluate / jobs,
            "building and files, per worker": (whole - train - evaluate) / jobs,
            "workers without a cell": (max(ends) - first) - whole / jobs,
            "summing up": started + wall - max(ends),
        },
    }


def main() -> int:
    """Measure one sweep and print it."""
    from contlearn.pareto.engine import usable_cores

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=HERE.parent / "configs" / "pareto_digits.yaml")
    parser.add_argument("--jobs", type=int, default=usable_cores())
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--target", type=float, default=1.3, help="largest ratio that passes")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/sweep.json)")
    arguments = parser.parse_args()
    options = ["--engine", arguments.engine, *(["--seeds", str(arguments.seeds)] if arguments.seeds else [])]
    with tempfile.TemporaryDirectory(prefix="contlearn-sweep-") as folder:
        measured = measure(arguments.config, arguments.jobs, options, Path(folder) / "sweep")
    print(f"\n{measured['cells']} cells on {measured['jobs']} workers ({arguments.engine})")
    print(f"wall {measured['wall_s']:.1f} s, training {measured['train_s']:.1f} s, ideal {measured['ideal_s']:.1f} s")
    for name, seconds in measured["parts_s"].items():
        print(f"  {seconds:6.1f} s  {name}")
    print(f"ratio {measured['ratio']:.3f}, target {arguments.target}")
    content = {**measured, "engine": arguments.engine, "target": arguments.target, "config": arguments.config.name}
    where = common.write("sweep", content, arguments.out)
    print(f"written to {where}")
    return 0 if measured["ratio"] <= arguments.target else 1


if __name__ == "__main__":
    sys.exit(main())
