"""The main job on embedded data: a few strategies on class-incremental digits, a table, a picture, the run folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contlearn.errors import ContlearnError

STRATEGIES = ("naive", "ewc", "lwf", "gdumb", "icarl", "replay", "derpp", "er_ace", "joint")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m contlearn.demo", description=__doc__)
    parser.add_argument("--out", default="runs/demo", help="folder for the runs and the picture (default: runs/demo)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs per experience (default: 10)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds per strategy (default: 2)")
    options = parser.parse_args(argv)
    print("Loading PyTorch and Avalanche ...", flush=True)
    try:
        return _demo(Path(options.out), options.epochs, options.seeds)
    except ContlearnError as error:
        print(f"contlearn demo: error: {error}", file=sys.stderr)
        return 2


def _demo(out: Path, epochs: int, seeds: int) -> int:
    import torch
    from rich.console import Console

    from contlearn import models, plots, run, scenarios, strategies
    from contlearn.cli import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)  # a net of this size is slower on two
    stream = scenarios.class_incremental("digits", n_experiences=5)
    print(
        f"Class-incremental digits: {len(stream.train_stream)} experiences, classes "
        f"{stream.classes_per_experience}, an MLP whose head grows, {epochs} epochs each, memory of 200 exemplars.\n"
    )
    finished = []
    for name in STRATEGIES:
        for seed in range(seeds):
            model = models.create("mlp", stream, seed=seed)
            strategy = strategies.create(name, model, lr=0.1, epochs=epochs, batch_size=32, device="cpu")
            result = run(strategy, stream, out=out / f"{name}-seed{seed}", seed=seed, quiet=True)
            finished.append((name, result.results))
        accuracy = sum(r["metrics"]["final_accuracy"] for label, r in finished if label == name) / seeds
        print(f"  {name:8} final accuracy {accuracy:.3f}   {strategies.describe(name).description}", flush=True)
    picture = out / "accuracy_per_experience.png"
    plots.accuracy_per_experience(finished, picture)
    console = Console()
    console.print()
    console.print(plots.table(finished))
    print(f"\npicture:     {picture}")
    print(
        f"run folders: {out}/STRATEGY-seedN (config.yaml, events.jsonl, results.json, checkpoint/, model.safetensors)"
    )
    print("next:        contlearn run configs/digits_replay.yaml --strategy.name=er_ace")
    return 0


if __name__ == "__main__":
    sys.exit(main())
