"""Accuracy at equal bytes, weights and exemplars together: replay, iCaRL, WA, DER (expandable) and MEMO.

    python benchmarks/memo.py [--data folder:PATH] [--seeds 3] [--jobs 2] [--epochs 8] [--out FILE]

MNIST images (extra demo) in five tasks of two classes, one head, no task ids; or the images of a folder, two classes a
task. At every budget the expanding methods run a ResNet-8 (stem of 3x3 with stride 2 and max-pooling, three stages of
one block) whose width lets DER have one whole network per task and 100 exemplars; MEMO has the same width and spends
what it saves on exemplars; replay, iCaRL and WA keep one network of the largest width and spend all the rest on
exemplars (protocol of arXiv 2205.13218: 4 bytes a parameter, 1 a pixel, no classifier and no teacher). Same
optimizer, epochs and batch size for all. AUC-A and AUC-L are the areas under average and last accuracy over MiB. Means
over seeds.
"""

from __future__ import annotations

import argparse
import functools
import math
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
WIDTHS = (6, 8, 10, 12)
REFERENCE_EXEMPLARS = 100
METHODS: dict[str, dict[str, Any]] = {
    "replay": {},
    "icarl": {},
    "wa": {},
    "der_expand": {},
    "memo": {"train_base": True},
    "memo, frozen base": {"train_base": False},
}
EXPANDING = ("der_expand", "memo", "memo, frozen base")
LOOP = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "lr_schedule": "cosine", "batch_size": 64}


def backbone(channels: int, width: int) -> Any:
    """ResNet-8: stem (a quarter of the sides), then a residual block of 1, 2 and 4 times ``width`` channels each."""
    from torch import nn

    from contlearn.models._residual import BasicBlock, ResidualBackbone, conv3x3, init_convolutions

    class ResNet8(ResidualBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.feature_dim = 4 * width
            self.stem = nn.Sequential(
                conv3x3(channels, width, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
            )
            for number, factor in enumerate((1, 2, 4), start=1):
                before = width * max(1, factor // 2)
                stride = 1 if factor == 1 else 2
                shortcut: nn.Module = nn.Identity()
                if stride == 2:
                    shortcut = nn.Sequential(
                        nn.Conv2d(before, factor * width, 1, stride=2, bias=False), nn.BatchNorm2d(factor * width)
                    )
                block = BasicBlock(before, factor * width, stride, shortcut)
                self.add_module(f"stage{number}", nn.Sequential(block))
            init_convolutions(self)

    return ResNet8()


def network(stream: Any, width: int, seed: int) -> Any:
    """The backbone with a head that grows."""
    import torch

    from contlearn.models import Classifier, GrowingHead

    torch.manual_seed(seed)
    body = backbone(stream.input_shape[0], width)
    model = Classifier(body, GrowingHead(body.feature_dim), feature_dim=body.feature_dim)
    model.input_shape = stream.input_shape
    return model


def stream_of(data: str, seed: int) -> Any:
    """Two classes a task, in an order drawn by ``seed``."""
    from contlearn import scenarios

    images = loaded(data)
    return scenarios.class_incremental(images, n_experiences=images.n_classes // 2, class_order="random", seed=seed)


@functools.cache
def loaded(data: str) -> Any:
    """The data set, read once per process."""
    from contlearn.scenarios.datasets import load

    return load(data)


def parameters(stream: Any, width: int) -> int:
    """Of one backbone."""
    return sum(p.numel() for p in backbone(stream.input_shape[0], width).parameters())


def strategy_of(method: str, stream: Any, width: int, budget: int, *, seed: int, epochs: int) -> Any:
    """A strategy that holds ``budget`` bytes at the end of the stream, and not a whole exemplar less."""
    from contlearn import strategies

    name = method.partition(",")[0]
    chosen = width if method in EXPANDING else max(WIDTHS)
    options = {**LOOP, **METHODS[method], "epochs": epochs, "device": "cpu", "reset_optimizer": True}
    if name in ("replay", "icarl"):
        options["memory_size"] = (budget - 4 * parameters(stream, chosen)) // math.prod(stream.input_shape)
    else:
        options.update(memory_budget=budget, budget_covers="model")
    return strategies.create(name, network(stream, chosen, seed), **options)


def one(job: tuple[str, str, int, int, int]) -> dict[str, Any]:
    """One cell: method, data, width of the expanding methods, seed, epochs."""
    warnings.filterwarnings("ignore")
    method, data, width, seed, epochs = job
    import torch

    from contlearn import run

    torch.set_num_threads(1)
    stream = stream_of(data, seed)
    tasks = len(stream.train_stream)
    image = stream.input_shape[0] * stream.input_shape[1] * stream.input_shape[2]
    budget = 4 * tasks * parameters(stream, width) + REFERENCE_EXEMPLARS * image
    strategy = strategy_of(method, stream, width, budget, seed=seed, epochs=epochs)
    started = time.perf_counter()
    result = run(strategy, stream, seed=seed, quiet=True)
    weights = 4 * sum(p.numel() for p in strategy.model.backbone.parameters())
    return {
        "method": method, "seed": seed, "budget": budget, "weights": weights, "exemplars": result.memory["exemplars"],
        "bytes": weights + result.memory["exemplars"] * image, "final_accuracy": result.metrics["final_accuracy"],
        "average_accuracy": result.metrics["average_accuracy"], "forgetting": result.metrics["forgetting"],
        "persistent": result.memory["persistent"], "peak_static": result.memory["peak_static"],
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def main() -> int:
    """Run all cells, write the figure and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist5k", help="mnist5k, digits or folder:PATH")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="one budget per width")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/memo.json); the figure then goes there")
    arguments = parser.parse_args()
    jobs = [
        (method, arguments.data, width, seed, arguments.epochs)
        for seed in range(arguments.seeds)
        for width in arguments.widths
        for method in METHODS
    ]
    from rich.progress import track

    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        cells = list(track(pool.map(one, jobs), total=len(jobs), description="equal bytes"))
    content = {
        "setting": (__doc__ or "").split("\n\n")[2],
        "data": arguments.data,
        "options": {**LOOP, "epochs": arguments.epochs},
        "widths": arguments.widths,
        "seeds": arguments.seeds,
        "cells": cells,
        "methods": {method: summary([cell for cell in cells if cell["method"] == method]) for method in METHODS},
    }
    where = common.write("memo", content, arguments.out)
    folder = where.parent if arguments.out else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    draw(content["methods"], folder / "memo_equal_bytes.png")
    print_table(content["methods"])
    print(f"written to {where} and {folder}")
    return 0


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread over seeds at every budget, and the areas under the curves (one per seed)."""
    from contlearn.pareto.statistics import area_under_curve

    points = []
    for budget in sorted({cell["budget"] for cell in cells}):
        found = [cell for cell in cells if cell["budget"] == budget]
        point: dict[str, Any] = {"budget": budget, "bytes": found[0]["bytes"], "exemplars": found[0]["exemplars"]}
        for metric in ("final_accuracy", "average_accuracy", "forgetting", "seconds", "persistent", "peak_static"):
            mean, sd = common.mean_sd([cell[metric] for cell in found])
            point[metric] = {"mean": mean, "sd": sd}
        points.append(point)
    areas: dict[str, Any] = {}
    for name, metric in (("auc_a", "average_accuracy"), ("auc_l", "final_accuracy")):
        by_seed = []
        for seed in sorted({cell["seed"] for cell in cells}):
            mine = [cell for cell in cells if cell["seed"] == seed]
            by_seed.append(area_under_curve([cell["budget"] for cell in mine], [cell[metric] for cell in mine]))
        if None not in by_seed:
            mean, sd = common.mean_sd(by_seed)  # type: ignore[arg-type]
            areas[name] = {"mean": mean, "sd": sd, "by_seed": by_seed}
    return {"points": points, **areas}


def draw(methods: dict[str, Any], path: Path) -> None:
    """Average and last accuracy over bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    panels = (("average_accuracy", "average accuracy"), ("final_accuracy", "last accuracy"))
    for axes, (metric, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for index, (method, found) in enumerate(methods.items()):
            memory = [point["budget"] / 2**10 for point in found["points"]]
            means, spreads = ([point[metric][key] for point in found["points"]] for key in ("mean", "sd"))
            axes.errorbar(
                memory, means, spreads, label=method, color=f"C{index}", marker="o", markersize=3.5, linewidth=1.4,
                capsize=2,
            )  # fmt: skip
        axes.set(title=title, xlabel="weights and exemplars, KiB")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)


def print_table(methods: dict[str, Any]) -> None:
    """Last accuracy at every budget, and the areas."""
    from rich.console import Console
    from rich.table import Table

    budgets = [point["budget"] for point in next(iter(methods.values()))["points"]]
    table = Table("", *(f"{budget / 2**10:.0f} KiB" for budget in budgets), "AUC-A", "AUC-L", "s", box=None)
    for method, found in methods.items():
        points = found["points"]
        last = [f"{p['final_accuracy']['mean']:.3f}±{p['final_accuracy']['sd']:.3f} ({p['exemplars']})" for p in points]
        areas = [f"{found[key]['mean']:.4f}" if key in found else "-" for key in ("auc_a", "auc_l")]
        table.add_row(method, *last, *areas, f"{sum(p['seconds']['mean'] for p in points):.0f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    sys.exit(main())
