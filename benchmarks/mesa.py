"""Accuracy, saved activations and step time with and without Mesa's copies in 8 bits.

    python benchmarks/mesa.py [--seeds 3] [--out FILE]

Class-incremental digits, five experiences, replay of 200 exemplars (16 beside each batch of 32): ResNet-14 (four epochs
per experience, SGD 0.05) and a network of two hidden layers of 256 (ten epochs, SGD 0.1). Without compression, with the
range of each batch (the default), with averaged ranges as in the paper, and with rounding to the nearest. Activations:
the most bytes autograd held at once, measured at two steps of each experience. Step time: median of forward and
backward on one batch of 48 on one thread, the variants in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from typing import Any

import common

common.use_threads(1)

VARIANTS: dict[str, dict[str, Any] | None] = {
    "exact": None,
    "Mesa": {},
    "Mesa, averaged ranges": {"ranges": "ema"},
    "Mesa, nearest": {"rounding": "nearest"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ResNet-14": {"model": ("resnet14", {}), "options": {"lr": 0.05, "epochs": 4}},
    "MLP": {"model": ("mlp", {"hidden": 256, "hidden_layers": 2}), "options": {"lr": 0.1, "epochs": 10}},
}


def one(setting: str, variant: str, seed: int) -> dict[str, Any]:
    """A run: accuracy on all test data after the last experience, and bytes of the activations."""
    import torch

    from contlearn import models, scenarios, strategies
    from contlearn.memory.account import MemoryAccount
    from contlearn.state import seed_everything
    from contlearn.strategies.memories import outputs_of
    from contlearn.strategies.mesa import MesaPlugin

    what = SETTINGS[setting]
    stream = scenarios.class_incremental("digits", n_experiences=5, class_order="random", seed=seed)
    name, options = what["model"]
    model = models.create(name, stream, seed=seed, **options)
    account, mesa = MemoryAccount(), VARIANTS[variant]
    strategy = strategies.create(
        "replay", model, memory_size=200, batch_size_memory=16, batch_size=32, device="cpu", **what["options"],
        plugins=[account, *([] if mesa is None else [MesaPlugin(**mesa)])],
    )  # fmt: skip
    seed_everything(seed)
    strategy.generator.manual_seed(seed)
    for experience in stream.train_stream:
        strategy.train(experience, eval_streams=[])
        account.close_experience(strategy)
    right = total = 0
    for test in stream.test_stream:
        answers = outputs_of(strategy.model, test.dataset, device=strategy.device).argmax(1)
        right += int((answers == torch.tensor(list(test.dataset.targets))).sum())
        total += len(answers)
    return {"accuracy": right / total, "activations": max(report.activations for report in account.reports)}


def step_times(setting: str, rounds: int) -> dict[str, float]:
    """Median seconds of a forward and backward, by variant."""
    import torch
    from torch.nn import functional as F

    from contlearn import models, scenarios
    from contlearn.strategies.mesa import MesaPlugin

    what = SETTINGS[setting]
    stream = scenarios.class_incremental("digits", n_experiences=5)
    name, options = what["model"]
    model = models.create(name, stream, seed=0, **options).train()
    model.head.grow(10)
    x, y = torch.rand(48, *stream.input_shape), torch.arange(48) % 10
    plugins = {key: None if given is None else MesaPlugin(**given) for key, given in VARIANTS.items()}
    seconds: dict[str, list[float]] = {key: [] for key in VARIANTS}
    for _ in range(rounds):
        for key, plugin in plugins.items():
            with contextlib.nullcontext() if plugin is None else plugin.operations.over(model):
                started = time.perf_counter()
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                seconds[key].append(time.perf_counter() - started)
    return {key: statistics.median(values[2:]) for key, values in seconds.items()}


def main() -> int:
    """Run all cells and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/mesa.json)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch
    from rich.progress import track

    torch.set_num_threads(1)
    jobs = [(n, v, s) for s in range(arguments.seeds) for n in SETTINGS for v in VARIANTS]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name, variant, seed in track(jobs, description="mesa"):
        runs.setdefault((name, variant), []).append(one(name, variant, seed))
    cells: dict[str, dict[str, Any]] = {}
    for name in SETTINGS:
        seconds = step_times(name, 15)
        cells[name] = {}
        for variant in VARIANTS:
            mean, sd = common.mean_sd([run["accuracy"] for run in runs[name, variant]])
            cells[name][variant] = {
                "accuracy": [run["accuracy"] for run in runs[name, variant]],
                "accuracy_mean": mean,
                "accuracy_sd": sd,
                "activations": runs[name, variant][0]["activations"],
                "step_s": seconds[variant],
            }
    content = {"setting": (__doc__ or "").split("\n\n")[2], "seeds": arguments.seeds, "cells": cells}
    where = common.write("mesa", content, arguments.out)
    print_table(cells)
    print(f"written to {where}")
    return 0


def print_table(cells: dict[str, Any]) -> None:
    """Every variant beside the exact one."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", "accuracy", "activations", "of exact", "step", box=None)
    for name, variants in cells.items():
        for variant, cell in variants.items():
            share = cell["activations"] / variants["exact"]["activations"]
            table.add_row(
                name, variant, f"{cell['accuracy_mean']:.3f} ({cell['accuracy_sd']:.3f})",
                f"{cell['activations'] / 1e6:.2f} MB", f"{share:.3f}", f"{1000 * cell['step_s']:.0f} ms",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
