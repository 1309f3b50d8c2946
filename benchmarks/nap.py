"""Loss of plasticity on reshuffled labels, and what NaP does about it.

    python benchmarks/nap.py [--seeds 5] [--tasks 50] [--jobs 2] [--out FILE]

MNIST images (extra demo) under random labels that are drawn anew in every task; Adam, one output layer, nothing reset.
After each task: accuracy on that task alone, the share of its images whose random label was memorised. Six ways: the
plain network, LayerNorm before every activation, LayerNorm with projection (NaP), NaP with a learning rate that falls
linearly over the whole run to a tenth, the plain network pulled to its initial weights (L2), and the plain network
re-initialised before every task, which cannot lose plasticity. Means over seeds, bands of one standard deviation.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

IMAGES = Path(__file__).parents[1] / "docs" / "methods" / "img"
SAMPLES, BATCH, EPOCHS, RATE = 500, 50, 12, 2e-3
NETWORKS = ("MLP", "CNN")
METHODS = ("plain", "LayerNorm", "NaP", "NaP, falling rate", "L2 to init", "reset")
LOG_SIZE = 128


def network(name: str, seed: int) -> Any:
    """MLP 784-100-100-10, or two strided 3x3 convolutions (8 and 16 channels) and a hidden layer of 64."""
    import torch
    from torch import nn

    from contlearn import models

    torch.manual_seed(seed)
    if name == "MLP":
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
        width = 100
    else:
        layers = [nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
                  nn.ReLU(), nn.Flatten(), nn.Linear(784, 64), nn.ReLU()]  # fmt: skip
        width = 64
    model = models.Classifier(nn.Sequential(*layers), nn.Linear(width, 10), feature_dim=width)
    model.input_shape = (1, 28, 28)
    return model


def plugin_for(method: str, tasks: int) -> Any:
    """The method as a plug-in; none for the plain network."""
    from contlearn.strategies.nap import NaPPlugin
    from contlearn.strategies.reset import ResetPlugin

    if method == "L2 to init":
        from contlearn.strategies.penalties import L2Plugin

        return L2Plugin(coefficient=1e-3, anchor="initial")
    if method == "reset":
        return ResetPlugin(head=True)
    if method == "LayerNorm":
        return NaPPlugin(every=0, affine="free", log_size=LOG_SIZE)
    if method == "NaP":
        return NaPPlugin(log_size=LOG_SIZE)
    if method == "NaP, falling rate":
        steps = tasks * EPOCHS * -(-SAMPLES // BATCH)
        return NaPPlugin(rate="linear", total_steps=steps, final_factor=0.1, log_size=LOG_SIZE)
    return None


def one(job: tuple[str, str, int, int]) -> tuple[str, str, int, dict[str, Any]]:
    """One cell: network, method, seed, tasks -> accuracy after each task, and the effective learning rate."""
    warnings.filterwarnings("ignore")
    name, method, seed, tasks = job
    import torch

    from contlearn import scenarios
    from contlearn.strategies.memories import outputs_of
    from contlearn.strategies.naive import Naive

    torch.set_num_threads(1)
    stream = scenarios.label_reshuffle("mnist5k", n_experiences=tasks, samples=SAMPLES, seed=seed)
    plugin = plugin_for(method, tasks)
    strategy = Naive(
        model=network(name, seed), lr=RATE, optimizer="adam", epochs=EPOCHS, batch_size=BATCH, device="cpu",
        plugins=[] if plugin is None else [plugin],
    )  # fmt: skip
    strategy.generator.manual_seed(seed)
    started = time.perf_counter()
    accuracies = []
    for train, test in zip(stream.train_stream, stream.test_stream, strict=True):
        strategy.train(train, eval_streams=[])
        answers = outputs_of(strategy.model, test.dataset, device=strategy.device).argmax(1)
        accuracies.append(float((answers == torch.tensor(list(test.dataset.targets))).float().mean()))
    found: dict[str, Any] = {"accuracy": accuracies, "seconds": time.perf_counter() - started}
    log = getattr(plugin, "log", None)
    if log is not None:
        rates = log.effective_rates(1)  # Adam: the learning rate over the norm
        found["steps"] = log.steps[: log.count].tolist()
        found["effective_lr"] = rates.log().mean(1).exp().tolist()
    return name, method, seed, found


def main() -> int:
    """Run all cells, write the figures and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/nap.json); figures then go beside it")
    arguments = parser.parse_args()
    jobs = [(n, m, s, arguments.tasks) for s in range(arguments.seeds) for n in NETWORKS for m in METHODS]
    from rich.progress import track

    cells: dict[str, dict[str, list[dict[str, Any]]]] = {n: {m: [] for m in METHODS} for n in NETWORKS}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for name, method, _, found in track(pool.map(one, jobs), total=len(jobs), description="plasticity"):
            cells[name][method].append(found)
    content = {
        "setting": (__doc__ or "").split("\n\n")[2],
        "options": {"samples": SAMPLES, "batch_size": BATCH, "epochs": EPOCHS, "lr": RATE, "optimizer": "adam"},
        "seeds": arguments.seeds,
        "tasks": arguments.tasks,
        "cells": {name: {method: summary(cells[name][method]) for method in METHODS} for name in NETWORKS},
    }
    where = common.write("nap", content, arguments.out)
    folder = where.parent if arguments.out else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    draw(content["cells"], folder)
    print_table(content["cells"], arguments.tasks)
    print(f"written to {where} and {folder}")
    return 0


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread by task over seeds; the mean effective learning rate by step."""
    by_task = [common.mean_sd(values) for values in zip(*(run["accuracy"] for run in runs), strict=True)]
    found: dict[str, Any] = {
        "accuracy": [run["accuracy"] for run in runs],
        "mean": [mean for mean, _ in by_task],
        "sd": [sd for _, sd in by_task],
        "train_s": common.mean_sd([run["seconds"] for run in runs])[0],
    }
    if "steps" in runs[0]:
        found["steps"] = runs[0]["steps"]
        rates = zip(*(run["effective_lr"] for run in runs), strict=True)
        found["effective_lr"] = [common.mean_sd(values)[0] for values in rates]
    return found


def draw(cells: dict[str, Any], folder: Path) -> None:
    """Accuracy by task, and the effective learning rate of the normalised networks over time."""
    from matplotlib.figure import Figure

    colours = {method: f"C{index}" for index, method in enumerate(METHODS)}
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(NETWORKS), sharey=True), NETWORKS, strict=True):
        for method in METHODS:
            cell = cells[name][method]
            tasks = range(1, len(cell["mean"]) + 1)
            axes.plot(tasks, cell["mean"], label=method, color=colours[method], linewidth=1.4)
            low, high = ([m + sign * s for m, s in zip(cell["mean"], cell["sd"], strict=True)] for sign in (-1, 1))
            axes.fill_between(tasks, low, high, color=colours[method], alpha=0.15, linewidth=0)
        axes.set(title=name, xlabel="task", ylim=(0.0, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("accuracy on the task just learned")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(folder / "nap_plasticity.png", dpi=130)
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(NETWORKS), sharey=True), NETWORKS, strict=True):
        for method in METHODS:
            cell = cells[name][method]
            if "steps" in cell:
                axes.plot(cell["steps"], cell["effective_lr"], label=method, color=colours[method], linewidth=1.4)
        axes.set(title=name, xlabel="optimizer step", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, which="both")
    figure.axes[0].set_ylabel("effective learning rate η / |W|")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(folder / "nap_effective_lr.png", dpi=130)


def print_table(cells: dict[str, Any], tasks: int) -> None:
    """First and last tasks of every method."""
    from rich.console import Console
    from rich.table import Table

    tenth = max(1, tasks // 10)
    table = Table("", "", f"tasks 1-{tenth}", f"last {tenth}", "s per task", box=None)
    for name in NETWORKS:
        for method in METHODS:
            cell = cells[name][method]
            first, last = (sum(part) / tenth for part in (cell["mean"][:tenth], cell["mean"][-tenth:]))
            table.add_row(name, method, f"{first:.3f}", f"{last:.3f}", f"{cell['train_s'] / tasks:.2f}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
