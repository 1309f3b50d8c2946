"""Rehearsal-free regularisation, from scratch and from pre-trained weights (Smith et al., arXiv 2203.17269).

    python benchmarks/rehearsal_free.py [--parts digits mnist5k pretrained] [--seeds 5] [--jobs 2] [--quick]
    python benchmarks/rehearsal_free.py --references     # fine-tuning, replay and joint alone, into the file there is

Class-incremental, 5 experiences of 2 classes in a random order per seed, growing head, no task id at test time; SGD
with momentum 0.9, optimizer reset in each experience.
Regularised methods use the binary cross-entropy over all classes seen, times 5, and keep the network in evaluation mode
inside the update, as in the authors' code; fine-tuning, replay and joint training use softmax cross-entropy in training
mode. Rates and coefficients come from a small grid on a seed of its own and on the first 3 experiences only: first the
rate, with PredKD alone (all regularised methods share it); then 3 values of the coefficient of every method that has
one. Fine-tuning, replay and joint training choose their own rate, each from 4.

The paper's finding that is looked for: from scratch no penalty improves on PredKD alone; from pre-trained weights
PredKD+L2 is the best.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common

common.use_threads(1)


@dataclass(frozen=True)
class Part:
    """One setting.

    Attributes:
        dataset: data set's name, and ``size``: side in pixels to resize to.
        model: name and options of the model.
        per_class: training images per class; ``None`` takes all.
        test_per_class: likewise for evaluation.
        epochs: per experience, and ``batch``: samples per iteration.
        seeds: at most this many.
        rates: learning rates of the grid of regularised methods, and ``reference_rates``: of the others.
        coefficients: values of the grid by option.
        pretrained: whether the paper's pre-trained ordering is the one to look for.
        extra: whether rows with BatchNorm in training mode are added.
    """

    dataset: str
    model: dict[str, Any]
    epochs: int
    rates: tuple[float, ...]
    reference_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    size: int | None = None
    batch: int = 32
    per_class: int | None = None
    test_per_class: int | None = None
    seeds: int = 5
    coefficients: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("feat_kd", (0.5, 5.0, 50.0)),
        ("ewc", (1.0, 10.0, 100.0)),
        ("l2", (0.005, 0.05, 0.5)),
    )
    pretrained: bool = False
    extra: bool = False


PARTS = {
    "digits": Part("digits", {"name": "mlp", "hidden": 100, "dropout": 0.0}, epochs=20, rates=(0.003, 0.01, 0.03)),
    "mnist5k": Part(
        "mnist5k", {"name": "slim_resnet18", "width": 8}, epochs=10, rates=(0.0015, 0.003, 0.006),
        size=16, per_class=80, test_per_class=50, batch=16, extra=True,
    ),
    "pretrained": Part(
        "mnist5k", {"name": "efficientnet_lite0", "weights": "imagenet"}, epochs=2, rates=(0.0001, 0.0003, 0.001),
        reference_rates=(0.001, 0.003, 0.01, 0.03), size=96, per_class=50, test_per_class=30, batch=10, seeds=3,
        pretrained=True,
    ),
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {  # options of RehearsalFree; an empty coefficient is filled in from the grid
    "PredKD": {"pred_kd": True},
    "PredKD+FeatKD": {"pred_kd": True, "feat_kd": None},
    "PredKD+EWC": {"pred_kd": True, "ewc": None},
    "PredKD+L2": {"pred_kd": True, "l2": None},
    "L2": {"l2": None},
    "EWC": {"ewc": None},
}
EXTRA = {
    "PredKD, train mode": ("PredKD", {"update_mode": "train"}),
    "PredKD+L2, train mode": ("PredKD+L2", {"update_mode": "train"}),
}
REFERENCES = {"Naive": ("naive", {}), "Replay(200)": ("replay", {"memory_size": 200}), "Joint": ("joint", {})}
GRID_SEED = 1000
GRID_EXPERIENCES = 3
KEPT = ("final_accuracy", "average_accuracy", "learning_accuracy", "forgetting", "global_forgetting")


@dataclass(frozen=True)
class Job:
    """One training: its part, what it is called, strategy and options, seed, and whether it belongs to the grid."""

    part: str
    row: str
    strategy: str
    options: dict[str, Any]
    rate: float
    seed: int
    grid: bool = False
    quick: bool = False


@functools.cache
def _images(dataset: str, size: int | None) -> Any:
    from contlearn.scenarios import datasets

    return datasets.load(dataset, image_size=size)


def stream_of(job: Job) -> Any:
    """The job's stream: images and order of classes follow its seed; a grid run has only the first classes."""
    import torch

    from contlearn import scenarios

    part = PARTS[job.part]
    data = _images(part.dataset, part.size)
    draw = torch.Generator().manual_seed(job.seed)
    order = torch.randperm(10, generator=draw)[: 2 * GRID_EXPERIENCES if job.grid else 10]
    limits = (30, 20) if job.quick else (part.per_class, part.test_per_class)
    parts: dict[str, Any] = {}
    for side, limit in zip(("train", "test"), limits, strict=True):
        targets = getattr(data, f"{side}_targets")
        mine = [torch.nonzero(targets == label).flatten() for label in order.tolist()]
        mine = [rows[torch.randperm(len(rows), generator=draw)][:limit] for rows in mine]
        rows = torch.cat(mine)
        parts[f"{side}_images"] = getattr(data, f"{side}_images")[rows]
        parts[f"{side}_targets"] = torch.cat([torch.full((len(m),), label) for label, m in enumerate(mine)])
    if part.pretrained:  # the pixels the pre-trained network knows: (x - 0.5) / 0.5
        parts.update(mean=(0.5,), std=(0.5,))
    names = tuple(data.class_names[label] for label in order.tolist())
    data = replace(data, **parts, class_names=names)
    return scenarios.class_incremental(data, n_experiences=len(order) // 2)


def one(job: Job) -> tuple[Job, dict[str, Any]]:
    """Train one job and give its figures."""
    warnings.filterwarnings("ignore")
    import torch

    from contlearn import models, run, strategies
    from contlearn.strategies.rehearsal_free import RehearsalFree

    torch.set_num_threads(1)
    part = PARTS[job.part]
    stream = stream_of(job)
    model = models.create(stream=stream, seed=job.seed, **part.model)
    common_options = {
        "lr": job.rate, "momentum": 0.9, "epochs": 1 if job.quick else part.epochs, "batch_size": part.batch,
        "reset_optimizer": True, "device": "cpu",
    }  # fmt: skip
    if job.strategy == "rehearsal_free":
        strategy = RehearsalFree(model=model, **job.options, **common_options)
    else:
        strategy = strategies.create(job.strategy, model, **job.options, **common_options)
    started = time.perf_counter()
    found = run(strategy, stream, seed=job.seed, quiet=True).results
    figures = {name: found["metrics"].get(name) for name in KEPT}
    return job, {
        **figures,
        "method_state": found["memory"]["method_state"],
        "train_s": found["time"]["train_s"],
        "wall_s": time.perf_counter() - started,
    }


class Runner:
    """Runs jobs on worker processes and shows how far they are."""

    def __init__(self, pool: ProcessPoolExecutor, progress: Any) -> None:
        self.pool = pool
        self.progress = progress

    def run(self, title: str, jobs: Iterable[Job]) -> list[tuple[Job, dict[str, Any]]]:
        """The figures of every job."""
        listed = list(jobs)
        task = self.progress.add_task(title, total=len(listed))
        found = []
        for result in self.pool.map(one, listed):
            found.append(result)
            self.progress.advance(task)
        return found


def choose(runner: Runner, name: str, quick: bool) -> tuple[float, dict[str, dict[str, float]], list[dict[str, Any]]]:
    """Learning rate and coefficients by final accuracy on the grid's short stream, and the grid itself."""
    part = PARTS[name]

    def best(results: list[tuple[Job, dict[str, Any]]], keys: dict[str, Any]) -> Any:
        scores = {key: next(r["final_accuracy"] for j, r in results if j is job) for key, job in keys.items()}
        return max(scores, key=lambda key: scores[key])  # the first of equals

    base = {"part": name, "strategy": "rehearsal_free", "seed": GRID_SEED, "grid": True, "quick": quick}
    rates = {rate: Job(row="PredKD", options=ROWS["PredKD"], rate=rate, **base) for rate in part.rates}
    found = _paired(runner.run(f"{name}: rates", rates.values()), rates)
    rate = best(found, rates)
    jobs: dict[tuple[str, str, float], Job] = {}
    for row, options in ROWS.items():
        for option, values in part.coefficients:
            if options.get(option, 0) is None:
                for value in values:
                    jobs[row, option, value] = Job(row=row, options={**options, option: value}, rate=rate, **base)
    tried = _paired(runner.run(f"{name}: coefficients", jobs.values()), jobs)
    chosen: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    for row in ROWS:
        mine = {key: job for key, job in jobs.items() if key[0] == row}
        if mine:
            _, option, value = best(tried, mine)
            chosen[row] = {option: value}
    grid = [
        {"row": job.row, "rate": job.rate, "options": job.options, "final_accuracy": figures["final_accuracy"]}
        for job, figures in [*found, *tried]
    ]
    return rate, chosen, grid


def choose_references(runner: Runner, name: str, quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Learning rate of fine-tuning, replay and joint training, each by itself, and the grid."""
    part = PARTS[name]
    jobs = {
        (row, rate): Job(
            part=name, row=row, strategy=strategy, options=options, rate=rate, seed=GRID_SEED, grid=True, quick=quick
        )
        for row, (strategy, options) in REFERENCES.items()
        for rate in part.reference_rates
    }
    found = _paired(runner.run(f"{name}: rates of references", jobs.values()), jobs)
    score = {(job.row, job.rate): figures["final_accuracy"] for job, figures in found}
    rates = {row: max(part.reference_rates, key=lambda rate: score[row, rate]) for row in REFERENCES}
    return rates, [{"row": row, "rate": rate, "final_accuracy": value} for (row, rate), value in score.items()]


def references(name: str, rates: dict[str, float], seeds: int, quick: bool) -> list[Job]:
    """The jobs of a part that regularise nothing."""
    return [
        Job(part=name, row=row, strategy=strategy, options=options, rate=rates[row], seed=seed, quick=quick)
        for seed in range(min(seeds, PARTS[name].seeds))
        for row, (strategy, options) in REFERENCES.items()
    ]


def _paired(results: list[tuple[Job, dict[str, Any]]], jobs: dict[Any, Job]) -> list[tuple[Job, dict[str, Any]]]:
    """Results beside the very jobs that were asked for; what comes from a worker is a copy."""
    return [(job, figures) for job, (_, figures) in zip(jobs.values(), results, strict=True)]


def cells(name: str, rate: float, chosen: dict[str, dict[str, float]], seeds: int, quick: bool) -> list[Job]:
    """Every job of a part that regularises."""
    part = PARTS[name]
    base = {"part": name, "rate": rate, "quick": quick}
    jobs = []
    for seed in range(min(seeds, part.seeds)):
        jobs += [
            Job(row=row, strategy="rehearsal_free", options={**options, **chosen[row]}, seed=seed, **base)
            for row, options in ROWS.items()
        ]
        for row, (like, more) in (EXTRA if part.extra else {}).items():
            options = {**ROWS[like], **chosen[like], **more}
            jobs.append(Job(row=row, strategy="rehearsal_free", options=options, seed=seed, **base))
    return jobs


def summed(results: list[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    """Rows with mean and spread of every figure."""
    rows: dict[str, Any] = {}
    for job, figures in results:
        row = rows.setdefault(job.row, {"options": job.options, "seeds": [], "values": {}})
        row["seeds"].append(job.seed)
        for key, value in figures.items():
            row["values"].setdefault(key, []).append(value)
    for row in rows.values():
        for key, values in row["values"].items():
            known = [value for value in values if value is not None]
            if known:
                mean, sd = common.mean_sd(known)
                row[key] = {"mean": mean, "sd": sd}
    return rows


def ordering(rows: dict[str, Any], pretrained: bool) -> dict[str, Any]:
    """Whether the published order of final accuracies is seen, with each difference and its standard error."""
    best = "PredKD+L2" if pretrained else "PredKD"
    others = [row for row in ROWS if row != best]
    accuracy = {row: rows[row]["values"]["final_accuracy"] for row in ROWS}
    means = {row: common.mean_sd(values)[0] for row, values in accuracy.items()}
    compared = {
        row: {
            "difference": means[best] - means[row],
            "standard_error": common.standard_error_of_difference(accuracy[best], accuracy[row]),
        }
        for row in others
    }
    return {
        "published_best": best,
        "best_here": max(means, key=lambda row: means[row]),
        "published_best_is_best": all(item["difference"] >= 0 for item in compared.values()),
        "clearly": all(item["difference"] > 2 * item["standard_error"] for item in compared.values()),
        "l2_improves_predkd": means["PredKD+L2"] > means["PredKD"],
        "ewc_improves_predkd": means["PredKD+EWC"] > means["PredKD"],
        "featkd_improves_predkd": means["PredKD+FeatKD"] > means["PredKD"],
        "l2_above_ewc_with_predkd": means["PredKD+L2"] > means["PredKD+EWC"],
        "against": compared,
    }


def main() -> int:
    """Run the parts, print their tables and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5, help="at most; the pre-trained part has 3")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="30 images per class and one epoch: only to see it run")
    parser.add_argument("--references", action="store_true", help="only these rows, into the file that is there")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/rehearsal_free.json)")
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn

    console = Console(stderr=True)
    started = time.perf_counter()
    content: dict[str, Any] = {
        "setting": " ".join((__doc__ or "").split("\n\n")[2].split()), "quick": arguments.quick, "parts": {},
    }  # fmt: skip
    with (
        ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool,
        Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress,
    ):
        runner = Runner(pool, progress)
        if arguments.references:
            path = Path(arguments.out) if arguments.out else common.RESULTS / "rehearsal_free.json"
            content["parts"] = json.loads(path.read_text(encoding="utf-8"))["parts"]
        for name in arguments.parts:
            reference_rates, reference_grid = choose_references(runner, name, arguments.quick)
            jobs = references(name, reference_rates, arguments.seeds, arguments.quick)
            compared = summed(runner.run(f"{name}: references", jobs))
            chosen_references = {"reference_rates": reference_rates, "reference_grid": reference_grid}
            if arguments.references:
                content["parts"][name]["rows"].update(compared)
                content["parts"][name].update(chosen_references)
                continue
            rate, chosen, grid = choose(runner, name, arguments.quick)
            jobs = cells(name, rate, chosen, arguments.seeds, arguments.quick)
            rows = summed(runner.run(f"{name}: cells", jobs))
            part = PARTS[name]
            content["parts"][name] = {
                "dataset": part.dataset, "image_size": part.size, "model": part.model, "epochs": part.epochs,
                "batch_size": part.batch,
                "images_per_class": part.per_class, "test_images_per_class": part.test_per_class,
                "reduced": part.per_class is not None, "seeds": min(arguments.seeds, part.seeds), "lr": rate,
                "grid_seed": GRID_SEED, "grid_experiences": GRID_EXPERIENCES, "grid": grid, "chosen": chosen,
                "rows": {**rows, **compared}, **chosen_references, "ordering": ordering(rows, part.pretrained),
            }  # fmt: skip
    content["wall_s"] = time.perf_counter() - started
    for name, found in content["parts"].items():
        Console().print(table(name, found))
    where = common.write("rehearsal_free", content, arguments.out)
    print(f"mean (sample standard deviation) over seeds; {content['wall_s']:.0f} s in all; written to {where}")
    return 0


def table(name: str, found: dict[str, Any]) -> Any:
    """A part as a table."""
    from rich.table import Table

    shown = Table("", "final", "average", "just learned", "F^G", "state bytes", "train s", title=name, box=None)
    for row, record in sorted(found["rows"].items(), key=lambda item: -item[1]["final_accuracy"]["mean"]):
        figures = [
            f"{record[key]['mean']:.3f} ({record[key]['sd']:.3f})" if key in record else "-"
            for key in ("final_accuracy", "average_accuracy", "learning_accuracy", "global_forgetting")
        ]
        state, seconds = record["method_state"]["mean"], record["train_s"]["mean"]
        shown.add_row(row, *figures, f"{state:,.0f}", f"{seconds:.1f}")
    seen = found["ordering"]
    others = ", ".join(map(str, found["reference_rates"].values()))
    shown.caption = (
        f"lr {found['lr']} (references {others}); published best {seen['published_best']}, here {seen['best_here']}"
        f" ({'seen' if seen['published_best_is_best'] else 'NOT seen'})"
    )
    return shown


if __name__ == "__main__":
    sys.exit(main())
