"""MobileTL (arXiv 2212.03246) against other cheap fine-tuning: accuracy, saved activations, measured peak, step time.

    python benchmarks/mobiletl.py [--parts cost accuracy draw] [--data mnist5k digits] [--sizes 96 160] [--quick]
    python benchmarks/mobiletl.py --parts accuracy draw --data folder:PATH --sizes 96

EfficientNet-Lite0 with ImageNet weights (extra demo), batch 8, Adam with a rate that falls as a cosine, one thread.
`cost`: first steps of each method as the library runs it, by image size: bytes saved for backward, peak of a fresh
process (median of --repeats), median seconds of a step, the trunk's forward pass included. `accuracy`: mean and
spread over seeds. Each seed draws its training images from a pool. The rate of each method (of k=3 where blocks are
counted) is the best of one grid on another seed's draw, by accuracy on images of the pool that it did not draw, at
the smallest size; larger ones take the rates over. Images, epochs and grid are the same for all methods of a size.
Methods that train the top k blocks alone share the outputs of the frozen trunk, computed once.

In "top-k", "last layer" and MobileTL the trunk uses running statistics; so do the frozen norms of "biases, lean" and
TinyTL. "lean" keeps of frozen layers only what the derivative needs and changes no result; "biases" and "BatchNorm"
alone are PyTorch in training mode, for their bytes. `draw`: figure, table and the goal: MobileTL (sign) within one
point of top-k at no more than 60 % of its activation bytes. Parts that are not run keep their figures in the JSON
file.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

IMAGES = Path(__file__).parents[1] / "docs" / "methods" / "img"
PARTS = ("cost", "accuracy", "draw")
BLOCKS = (1, 2, 3, 4, 5)
SIZES = {96: (400, 2), 160: (160, 2)}  # side in pixels -> training images, epochs
TEST = 400
BATCH, GRID, GRID_SEED = 8, (5e-4, 2e-3, 8e-3), 1000
MODEL = {"name": "efficientnet_lite0", "weights": "imagenet", "head": "fixed"}
RUNNING = {"name": "lean", "frozen_norms": "running"}
PLAIN = {**RUNNING, "packed": False}  # PyTorch as it is, but for the frozen trunk's statistics


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        family: methods that share a learning rate and a line in the figure.
        strategy: name and options, and ``trainable``: what of the backbone trains.
        blocks: trained blocks whose input comes from the shared trunk; 0 for none (last layer), None for all layers.
        accuracy_of: the row that computes the same, bit for bit; ``None``: no row, only the costs are of interest.
    """

    family: str
    strategy: dict[str, Any]
    trainable: tuple[str, ...] | None = None
    blocks: int | None = None
    accuracy_of: str | None = "itself"


def _methods() -> dict[str, Method]:
    rows = {"last layer": Method("last layer", PLAIN, ("head",), 0)}
    for k in BLOCKS:
        rows[f"top-{k}"] = Method("top-k", PLAIN, (f"last_blocks:{k}",), k)
        rows[f"top-{k}, lean"] = Method("top-k, lean", RUNNING, (f"last_blocks:{k}",), k, f"top-{k}")
        rows[f"MobileTL-{k}"] = Method("MobileTL", {"name": "mobiletl", "blocks": k}, None, k)
        rows[f"MobileTL-{k}, exact"] = Method(
            "MobileTL, exact", {"name": "mobiletl", "blocks": k, "activation_backward": "exact"}, None, k
        )
    rows["biases"] = Method("biases", {"name": "naive"}, ("biases",), accuracy_of=None)
    rows["biases, lean"] = Method("biases, lean", RUNNING, ("biases",))
    rows["BatchNorm"] = Method("BatchNorm", {"name": "naive"}, ("norms",), accuracy_of="BatchNorm, lean")
    rows["BatchNorm, lean"] = Method("BatchNorm, lean", {"name": "lean"}, ("norms",))
    rows["TinyTL"] = Method("TinyTL", {"name": "tinytl"})
    rows["full"] = Method("full", {"name": "naive"})
    return rows


METHODS = _methods()
FAMILIES = {m.family: [n for n, other in METHODS.items() if other.family == m.family] for m in METHODS.values()}


@dataclass(frozen=True)
class Job:
    """One training: which data and size, method, rate, seed; ``grid``: on the grid's draw and its own test images."""

    data: str
    size: int
    method: str
    rate: float
    seed: int
    images: int
    epochs: int
    grid: bool = False


# ---------------------------------------------------------------------- cost


def configuration(method: str, size: int, data: str) -> dict[str, Any]:
    """The first steps of a method as a run's configuration."""
    from contlearn import config

    row = METHODS[method]
    model = {**MODEL, **({"trainable": list(row.trainable)} if row.trainable else {})}
    loop = {"batch_size": BATCH, "optimizer": "adam", "lr": 1e-3, "device": "cpu"}
    scenario = {"name": "transfer", "dataset": data, "image_size": size, "samples": 10 * BATCH, "test_samples": 10}
    return config.resolve(
        {"scenario": scenario, "model": model, "strategy": {**row.strategy, **loop}, "seed": 0, "threads": 1}
    )


def cost(job: tuple[str, int, str, int]) -> tuple[str, int, dict[str, Any]]:
    """Bytes and seconds of one method at one size."""
    warnings.filterwarnings("ignore")
    method, size, data, repeats = job
    from contlearn import config
    from contlearn.memory import MemoryAccount, process

    resolved = configuration(method, size, data)
    strategy, stream = config.build(resolved)
    account, times = MemoryAccount(), []
    strategy.plugins[:0] = [account]
    strategy.plugins.append(_clock(times))
    strategy.train(stream.train_stream[0], eval_streams=[])
    report = account.reports[-1] if account.reports else account.close_experience(strategy)
    peaks = [process.measure(resolved, steps=3, timeout=1200.0)["peak_measured"] for _ in range(repeats)]
    return method, size, {
        "activations": report.activations, "peak_static": report.peak_static,
        "peak_measured": statistics.median(peaks), "peaks_measured": peaks,
        "trainable_weights": report.trainable_weights,
        "seconds_per_step": statistics.median(times[2:]),  # the account watches the first two
    }  # fmt: skip


def _clock(times: list[float]) -> Any:
    """A plug-in that notes the seconds of each step."""
    from avalanche.core import SupervisedPlugin

    class Clock(SupervisedPlugin):
        memory_exempt = True

        def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def after_update(self, strategy: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.started)

    return Clock()


# ---------------------------------------------------------------------- accuracy


@functools.cache
def pool(data: str, size: int, images: int) -> tuple[Any, Any]:
    """Twice the training images of a run, and the test images, as the network reads them: ``(x, y)`` each."""
    import torch

    from contlearn import scenarios
    from contlearn.scenarios import datasets

    found = datasets.load(data, image_size=size)
    # The pixels the pre-trained network knows: (x - 0.5) / 0.5.
    found = replace(found, mean=(0.5,) * found.input_shape[0], std=(0.5,) * found.input_shape[0])
    train, test = (min(n, len(y)) for n, y in ((2 * images, found.train_targets), (TEST, found.test_targets)))
    stream = scenarios.transfer(found, samples=train, test_samples=test)
    whole = [[*zip(*part[0].dataset.eval(), strict=True)] for part in (stream.train_stream, stream.test_stream)]
    first, second = ((torch.stack(x), torch.tensor(y)) for x, y, *_ in whole)
    return first, second


@functools.cache
def inputs(data: str, size: int, images: int, blocks: int | None) -> tuple[Any, Any]:
    """The pool's and the test images as a method's trained part reads them: images, or outputs of the frozen trunk."""
    pooled, tested = pool(data, size, images)
    if blocks is None:
        return pooled[0], tested[0]
    return tuple(_trunk(data, size, images)[blocks])  # type: ignore[return-value]


@functools.cache
def _trunk(data: str, size: int, images: int) -> dict[int, list[Any]]:
    """Outputs of the trunk in front of the last k blocks by k, in one pass; 0: the features."""
    import torch

    from contlearn.strategies.inverted_residual import split_of

    pooled, tested = pool(data, size, images)
    backbone = network(data, size, images, None, seed=0).backbone.eval()
    split = split_of(backbone, max(BLOCKS), model=MODEL["name"])
    segments = [split.trunk, *((name,) for name in split.blocks[:-1]), (split.blocks[-1], *split.head)]
    kept: dict[int, list[Any]] = {k: [] for k in (*BLOCKS, 0)}
    with torch.no_grad():
        for x in (pooled[0], tested[0]):
            parts: dict[int, list[Any]] = {k: [] for k in kept}
            for z in x.split(50):
                for k, names in zip(sorted(kept, reverse=True), segments, strict=True):
                    for name in names:
                        z = backbone.get_submodule(name)(z)
                    parts[k].append(z)
            for k, some in parts.items():
                kept[k].append(torch.cat(some))
    return kept


def network(data: str, size: int, images: int, trainable: tuple[str, ...] | None, *, seed: int) -> Any:
    """The pre-trained network with a new classifier."""
    from types import SimpleNamespace

    from contlearn import models

    (x, y), _ = pool(data, size, images)
    stream = SimpleNamespace(input_shape=tuple(x.shape[1:]), n_classes=int(y.max()) + 1, task_labels=False)
    return models.create(stream=stream, seed=seed, trainable=trainable, **MODEL)


def prepared(job: Job) -> tuple[Any, Callable[[Any], Any]]:
    """A method's model, and the function of its inputs that trains."""
    from torch import nn

    from contlearn import strategies
    from contlearn.strategies.inverted_residual import SplitBackbone, split_of

    row = METHODS[job.method]
    model = network(job.data, job.size, job.images, row.trainable, seed=job.seed)
    if row.strategy["name"] != "naive":
        options = {key: value for key, value in row.strategy.items() if key != "name"}
        strategies.plugin(row.strategy["name"], **options).prepare_model(model)
    if row.blocks is None:
        return model, model
    if row.blocks == 0:
        model.backbone = nn.Identity()
        return model, model.head
    if not isinstance(model.backbone, SplitBackbone):
        split = split_of(model.backbone, row.blocks, model=MODEL["name"])
        model.backbone = SplitBackbone(model.backbone, split, frozen_head=False, trunk_batch=0)
    return model, lambda z: model.head(model.backbone.tail(z))


def one(job: Job) -> tuple[Job, dict[str, float]]:
    """Train one job and give its accuracy."""
    warnings.filterwarnings("ignore")
    import torch
    from torch.nn import functional as F

    from contlearn.scenarios.transfer_stream import evenly

    torch.set_num_threads(1)
    started = time.perf_counter()
    (_, y), (_, test_y) = pool(job.data, job.size, job.images)
    z, test_z = inputs(job.data, job.size, job.images, METHODS[job.method].blocks)
    draw = torch.Generator().manual_seed(job.seed)
    rows = evenly(y, min(job.images, len(y) // 2), draw, name="images")
    if job.grid:
        others = torch.ones(len(y), dtype=torch.bool)
        others[rows] = False
        test_z, test_y = z[others], y[others]
    torch.manual_seed(job.seed)
    model, trained = prepared(job)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=job.rate)
    steps = job.epochs * (len(rows) // BATCH)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(job.epochs):
        for some in rows[torch.randperm(len(rows), generator=draw)].split(BATCH)[: len(rows) // BATCH]:
            optimizer.zero_grad()
            F.cross_entropy(trained(z[some]), y[some]).backward()
            optimizer.step()
            rate.step()
    model.eval()
    with torch.no_grad():
        answers = torch.cat([trained(part).argmax(1) for part in test_z.split(50)])
    return job, {"accuracy": float((answers == test_y).float().mean()), "wall_s": time.perf_counter() - started}


def accuracy(
    run: Callable[[str, list[Job]], list[tuple[Job, Any]]], data: str, size: int, arguments: Any,
    rates: dict[str, float] | None,
) -> dict[str, Any]:  # fmt: skip
    """Rates by the grid unless they are given, then every method and seed, for one data set and size."""
    images, epochs = (24, 1) if arguments.quick else SIZES.get(size, SIZES[96])
    grid = GRID[:2] if arguments.quick else GRID
    base: dict[str, Any] = {"data": data, "size": size, "images": images, "epochs": epochs}
    told = f"{data} {size} px"
    names = [name for name, row in METHODS.items() if row.accuracy_of == "itself"]
    score: dict[tuple[str, float], float] = {}
    if rates is None:
        looked_at = [name for name in names if METHODS[name].blocks in (None, 0, 3)]
        jobs = [Job(method=name, rate=rate, seed=GRID_SEED, grid=True, **base) for name in looked_at for rate in grid]
        score = {(METHODS[j.method].family, j.rate): found["accuracy"] for j, found in run(f"{told}: rates", jobs)}
        rates = {family: max(grid, key=lambda r: score[family, r]) for family, _ in score}
    jobs = [
        Job(method=name, rate=rates[METHODS[name].family], seed=seed, **base)
        for seed in range(arguments.seeds)
        for name in names
    ]
    rows: dict[str, Any] = {}
    for job, found in run(f"{told}: runs", jobs):
        row = rows.setdefault(job.method, {"rate": job.rate, "accuracies": [], "wall_s": []})
        row["accuracies"].append(found["accuracy"])
        row["wall_s"].append(found["wall_s"])
    for row in rows.values():
        row["mean"], row["sd"] = common.mean_sd(row["accuracies"])
    listed = [{"family": family, "rate": rate, "accuracy": value} for (family, rate), value in score.items()]
    return {
        "data": data.partition(":")[0],  # a folder's path is the user's own affair
        "size": str(size), "images": images, "epochs": epochs, "seeds": arguments.seeds, "quick": arguments.quick,
        "rates": rates, "grid": listed, "rows": rows,
    }  # fmt: skip


def rates_of(content: dict[str, Any], data: str, size: str, quick: bool) -> dict[str, float] | None:
    """Rates that were chosen on the same data set at a smaller size."""
    for cell in content["accuracy"].values():
        if (cell["data"], cell["quick"]) == (data.partition(":")[0], quick) and int(cell["size"]) < int(size):
            return dict(cell["rates"])
    return None


# ---------------------------------------------------------------------- what comes out


def goal(found: dict[str, Any], costs: dict[str, Any]) -> dict[str, Any]:
    """MobileTL against top-k by number of blocks: accuracy lost, share of the activation bytes, whether it is met."""
    judged = {}
    for k in BLOCKS:
        ours, plain = f"MobileTL-{k}", f"top-{k}"
        lost = found["rows"][plain]["mean"] - found["rows"][ours]["mean"]
        share = costs[ours]["activations"] / costs[plain]["activations"]
        error = common.standard_error_of_difference(
            found["rows"][plain]["accuracies"], found["rows"][ours]["accuracies"]
        )
        judged[str(k)] = {
            "lost": lost, "standard_error": error, "activation_share": share, "met": lost <= 0.01 and share <= 0.6,
        }  # fmt: skip
    return judged


def accuracy_of(name: str, cell: dict[str, Any]) -> dict[str, Any] | None:
    """Mean and spread of a row's accuracy."""
    source = METHODS[name].accuracy_of
    return None if source is None else cell["rows"][name if source == "itself" else source]


def draw(content: dict[str, Any], path: Path) -> None:
    """Accuracy against saved activations and against the measured peak, a row of axes per data set and size."""
    from matplotlib.figure import Figure

    found = {key: cell for key, cell in content["accuracy"].items() if cell["size"] in content["cost"]}
    if not found:
        return
    figure = Figure(figsize=(9.6, 3.0 * len(found) + 0.4), layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False, sharey="row")
    for line, cell in zip(grid, found.values(), strict=True):
        costs = content["cost"][cell["size"]]
        for axes, key, label in zip(
            line, ("activations", "peak_measured"), ("saved activations (MB)", "measured peak (MB)"), strict=True
        ):
            for index, (family, names) in enumerate(FAMILIES.items()):
                seen = [(costs[name][key] / 1e6, accuracy_of(name, cell)) for name in names if name in costs]
                points = [(x, 100 * found["mean"], 100 * found["sd"]) for x, found in seen if found]
                if not points:
                    continue
                x, y, spread = zip(*points, strict=True)
                axes.errorbar(x, y, spread, marker="os^vD<>Ph*X"[index % 11], label=family, color=f"C{index % 10}",
                              linewidth=1.2, markersize=5, alpha=0.85)  # fmt: skip
            axes.set(xlabel=f"{label}, batch {BATCH}", title=f"{cell['data']}, {cell['size']} px")
            axes.set_xscale("log" if key == "activations" else "linear")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, which="both")
        line[0].set_ylabel("test accuracy (%)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def show(content: dict[str, Any]) -> None:
    """Print a table per size, and how the goal stands."""
    from rich.console import Console
    from rich.table import Table

    for size, costs in content["cost"].items():
        cells = {key: cell for key, cell in content["accuracy"].items() if cell["size"] == size}
        table = Table("", "saved MB", "peak MB", "s/step", *(cell["data"] for cell in cells.values()), box=None)
        table.title = f"{size} px, batch {BATCH}"
        for name, row in ((name, costs[name]) for name in METHODS if name in costs):
            figures = [f"{row['activations'] / 1e6:.2f}", f"{row['peak_measured'] / 1e6:.1f}"]
            figures.append(f"{row['seconds_per_step']:.3f}")
            for cell in cells.values():
                mine = accuracy_of(name, cell)
                figures.append(f"{100 * mine['mean']:.1f} ({100 * mine['sd']:.1f})" if mine else "-")
            table.add_row(name, *figures)
        Console().print(table)
        for cell in cells.values():
            for k, seen in cell.get("goal", {}).items():
                lost, error, share = (100 * seen[key] for key in ("lost", "standard_error", "activation_share"))
                told = f"{lost:+.1f} points lost (standard error {error:.1f}) at {share:.0f} % of the bytes"
                print(f"{cell['data']} {size} px, k={k}: {told}: {'met' if seen['met'] else 'NOT met'}")


def main() -> int:
    """Run the parts asked for, merge them into the JSON file, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--data", nargs="*", default=["mnist5k", "digits"], help="data sets, or folder:PATH")
    parser.add_argument("--sizes", nargs="*", type=int, default=list(SIZES), help="side of the images in pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes per measured peak")
    parser.add_argument("--quick", action="store_true", help="24 images, one epoch, two rates: only to see it run")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/mobiletl.json), figure beside it")
    arguments = parser.parse_args()
    from rich.progress import Progress, TimeElapsedColumn

    path = Path(arguments.out) if arguments.out else common.RESULTS / "mobiletl.json"
    content: dict[str, Any] = {"setting": __doc__, "quick": arguments.quick, "cost": {}, "accuracy": {}, "wall_s": {}}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        content.update({key: before[key] for key in ("cost", "accuracy", "wall_s") if key in before})
    sizes = [str(size) for size in arguments.sizes]
    with (
        ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as workers,
        Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress,
    ):

        def run(title: str, function: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
            listed = list(jobs)
            return list(progress.track(workers.map(function, listed), total=len(listed), description=title))

        if "cost" in arguments.parts:
            started = time.perf_counter()
            repeats = 1 if arguments.quick else arguments.repeats
            wanted = [(name, int(size), arguments.data[0], repeats) for size in sizes for name in METHODS]
            for name, measured_at, figures in run("cost", cost, wanted):
                content["cost"].setdefault(str(measured_at), {})[name] = figures
            content["wall_s"]["cost"] = time.perf_counter() - started
            common.write("mobiletl", content, str(path))
        if "accuracy" in arguments.parts:
            for size in sizes:
                for data in arguments.data:
                    started = time.perf_counter()
                    rates = rates_of(content, data, size, arguments.quick)
                    cell = accuracy(lambda title, jobs: run(title, one, jobs), data, int(size), arguments, rates)
                    name = f"{cell['data']} {size}"
                    content["accuracy"][name] = cell
                    content["wall_s"][f"accuracy {name}"] = time.perf_counter() - started
                    common.write("mobiletl", content, str(path))
    for cell in content["accuracy"].values():
        if cell["size"] in content["cost"]:
            cell["goal"] = goal(cell, content["cost"][cell["size"]])
    common.write("mobiletl", content, str(path))
    if "draw" in arguments.parts:
        draw(content, (path.parent if arguments.out else IMAGES) / "mobiletl_pareto.png")
    show(content)
    print(f"written to {path}; seconds: {content['wall_s']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
