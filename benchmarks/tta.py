"""Test-time adaptation under the 15 corruptions: error, time and memory of every adapter, on MNIST (5,000 images).

    python benchmarks/tta.py [--parts table memory rounds batches] [--seeds 3] [--jobs 2] [--out FILE]

`table`: WRN-16-2 trained on clean images (4,000, 16x16 pixels, 5 epochs, seeded, cached), then the 15 corruptions at
severity 5 one after another without a reset, all 1,000 test images each in batches of 64; EcoTTA's meta parts are
warmed up for 3 epochs. CoTTA averages 4 augmented copies instead of 32. All else are the adapters' defaults.
`memory`: WRN-40-2 at 32x32, batch 64, first batches only, median of three fresh processes: measured and static peak.
`rounds`: the 15 corruptions ten times over, 128 images each. `batches`: batch sizes 1, 4, 16, 64 with samples in random
order, and with classes correlated in time (Dirichlet 0.1), 64 images per corruption, one seed, guards that look at
windows of 128 samples instead of 512.
Errors are means over domain visits. A part that is not run keeps its figures in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

IMAGES = Path(__file__).parents[1] / "docs" / "methods" / "img"
PARTS = ("memory", "table", "rounds", "batches")
WARMUP: dict[str, Any] = {"warmup_epochs": 3, "warmup_augment": False}
ADAPTERS: dict[str, dict[str, Any]] = {
    "source": {"name": "source"},
    "BN": {"name": "bn_stats"},
    "TENT": {"name": "tent"},
    "EATA": {"name": "eata"},
    "CoTTA": {"name": "cotta", "augmentations": 4, "flip": 0.0},
    "SAR": {"name": "sar"},
    "EcoTTA K=4": {"name": "ecotta", "k": 4, **WARMUP},
    "EcoTTA K=5": {"name": "ecotta", "k": 5, **WARMUP},
    "EcoTTA K=4, source BN": {"name": "ecotta", "k": 4, "frozen_batchnorm": "source", **WARMUP},
}
STREAM = {"name": "corruptions", "dataset": "mnist5k", "severity": 5, "normalise": False}
SOURCE = {"source_epochs": 5, "source_lr": 0.05}
SIZES = (1, 4, 16, 64)


def configuration(
    adapter: str, seed: int, *, model: str = "wrn16_2", batch_size: int = 64, guard_window: int = 512, **stream: Any
) -> Any:
    """One cell as a run's configuration."""
    from contlearn import config

    return config.resolve(
        {
            "scenario": {**STREAM, "seed": seed, **stream},
            "model": {"name": model, "head": "fixed"},
            "strategy": {
                **ADAPTERS[adapter],
                "batch_size": batch_size,
                "guard_window": guard_window,
                "device": "cpu",
                **SOURCE,
            },
            "seed": seed,
            "threads": 1,
        }
    )


def one(job: tuple[str, str, int, dict[str, Any]]) -> tuple[str, str, int, dict[str, Any]]:
    """Train and adapt one cell."""
    warnings.filterwarnings("ignore")
    part, adapter, seed, options = job
    from contlearn import config, run

    strategy, stream = config.build(configuration(adapter, seed, **options))
    found = run(strategy, stream, seed=seed, quiet=True).results
    kept = {key: found[key] for key in ("error_by_domain", "mean_error", "source_mean_error", "worse_than_source")}
    return part, adapter, seed, {**kept, "time": found["time"], "trips": found.get("trips", []), "options": options}


def measured(adapter: str) -> dict[str, Any]:
    """Peak of the first batches, the median of three fresh processes: what the allocator keeps varies by some MB."""
    from contlearn.memory import process

    resolved = configuration(adapter, 0, model="wrn40_2", image_size=32, samples=128)
    found = [process.measure(resolved, steps=2, timeout=1200.0) for _ in range(3)]
    peaks = sorted(one["peak_measured"] for one in found)
    return {**found[0], "peak_measured": peaks[1], "peaks_measured": peaks, "ratio": peaks[1] / found[0]["peak_static"]}


def jobs_of(parts: list[str], seeds: int) -> list[tuple[str, str, int, dict[str, Any]]]:
    """Every cell; those of one source model follow each other, which is trained once."""
    small: dict[str, Any] = {"image_size": 16}
    jobs: list[tuple[str, str, int, dict[str, Any]]] = []
    for seed in range(seeds):
        if "table" in parts:
            jobs += [("table", adapter, seed, {**small, "samples": 1000}) for adapter in ADAPTERS]
        if "rounds" in parts:
            recurring = {**small, "samples": 128, "schedule": "recurring", "rounds": 10}
            jobs += [("rounds", adapter, seed, recurring) for adapter in ("TENT", "EcoTTA K=4")]
    if "batches" in parts:
        jobs += [
            ("batches", adapter, 0, {**small, "samples": 64, "order": order, "batch_size": size, "guard_window": 128})
            for size in SIZES
            for order in ("iid", "dirichlet")
            for adapter in ADAPTERS
            if adapter not in ("EcoTTA K=5", "EcoTTA K=4, source BN")
        ]
    return jobs


def main() -> int:
    """Run the parts asked for, merge them into the JSON file, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/tta.json)")
    arguments = parser.parse_args()
    from rich.progress import track

    path = Path(arguments.out) if arguments.out else common.RESULTS / "tta.json"
    content: dict[str, Any] = {"setting": __doc__}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        content.update({part: before[part] for part in PARTS if part in before})
    if "memory" in arguments.parts:
        content["memory"] = {name: measured(name) for name in track(list(ADAPTERS), description="memory")}
        common.write("tta", content, arguments.out)
    jobs = jobs_of(arguments.parts, arguments.seeds)
    cells: dict[str, list[Any]] = {part: [] for part in arguments.parts if part != "memory"}
    if jobs:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            for part, adapter, seed, found in track(pool.map(one, jobs), total=len(jobs), description="adapting"):
                cells[part].append({"adapter": adapter, "seed": seed, **found})
    if cells.get("table"):
        content["table"] = table_of(cells["table"], content.get("memory", {}))
    if cells.get("rounds"):
        content["rounds"] = rounds_of(cells["rounds"])
    if cells.get("batches"):
        content["batches"] = [{k: v for k, v in c.items() if k != "error_by_domain"} for c in cells["batches"]]
    where = common.write("tta", content, arguments.out)
    draw(content, where.parent if arguments.out else IMAGES)
    show(content)
    print(f"written to {where}")
    return 0


def table_of(cells: list[Any], memory: dict[str, Any]) -> dict[str, Any]:
    """Mean and spread over seeds of each adapter."""
    rows: dict[str, Any] = {}
    for adapter in dict.fromkeys(cell["adapter"] for cell in cells):
        mine = [cell for cell in cells if cell["adapter"] == adapter]
        errors = [cell["mean_error"] for cell in mine]
        mean, sd = common.mean_sd(errors)
        by_domain = {
            name: common.mean_sd([cell["error_by_domain"][name] for cell in mine])[0]
            for name in mine[0]["error_by_domain"]
        }
        rows[adapter] = {
            "errors": errors,
            "mean": mean,
            "sd": sd,
            "source_errors": [cell["source_mean_error"] for cell in mine],
            "by_domain": by_domain,
            "per_batch_s": common.mean_sd([cell["time"]["per_batch_s"] for cell in mine])[0],
            "trips": [len(cell["trips"]) for cell in mine],
        }
    return rows


def rounds_of(cells: list[Any]) -> dict[str, Any]:
    """Error of each round, mean over the 15 domains, by seed."""
    found: dict[str, Any] = {}
    for cell in cells:
        by_round: dict[int, list[float]] = {}
        for name, error in cell["error_by_domain"].items():
            by_round.setdefault(int(name.partition("#")[2] or 1), []).append(error)
        curve = [common.mean_sd(by_round[index])[0] for index in sorted(by_round)]
        run_ = {"seed": cell["seed"], "error_by_round": curve, "source": cell["source_mean_error"]}
        found.setdefault(cell["adapter"], []).append({**run_, "trips": len(cell["trips"])})
    return found


def draw(content: dict[str, Any], folder: Path) -> None:
    """Error by round, and error by batch size for both orders of samples."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    if "rounds" in content:
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, (name, runs) in enumerate(content["rounds"].items()):
            curves = [run_["error_by_round"] for run_ in runs]
            sums = [common.mean_sd(values) for values in zip(*curves, strict=True)]
            rounds = range(1, len(sums) + 1)
            axes.plot(rounds, [mean for mean, _ in sums], label=name, color=f"C{index}")
            low, high = ([mean + sign * sd for mean, sd in sums] for sign in (-1, 1))
            axes.fill_between(rounds, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        axes.set(xlabel="round over the 15 corruptions", ylabel="mean error", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(folder / "tta_rounds.png", dpi=130)
    if "batches" in content:
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        orders = ("iid", "dirichlet")
        for axes, order in zip(figure.subplots(1, 2, sharey=True), orders, strict=True):
            cells = [cell for cell in content["batches"] if cell["options"]["order"] == order]
            for index, name in enumerate(dict.fromkeys(cell["adapter"] for cell in cells)):
                mine = sorted((c["options"]["batch_size"], c["mean_error"]) for c in cells if c["adapter"] == name)
                axes.plot([size for size, _ in mine], [e for _, e in mine], "o-", label=name, color=f"C{index}")
            axes.set(title=order, xlabel="batch size", xscale="log", xticks=SIZES, xticklabels=SIZES, ylim=(0, 1))
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        figure.axes[0].set_ylabel("mean error")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(folder / "tta_batches.png", dpi=130)


def show(content: dict[str, Any]) -> None:
    """Print what there is."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if "memory" in content:
        table = Table("WRN-40-2, batch 64", "measured MB", "static MB", "of CoTTA", "of TENT", box=None)
        peak = {name: row["peak_measured"] for name, row in content["memory"].items()}
        for name, row in content["memory"].items():
            table.add_row(
                name, f"{peak[name] / 1e6:.1f}", f"{row['peak_static'] / 1e6:.1f}",
                f"{peak[name] / peak['CoTTA']:.2f}", f"{peak[name] / peak['TENT']:.2f}",
            )  # fmt: skip
        console.print(table)
    if "table" in content:
        table = Table("15 corruptions", "mean error", "s per batch", "guard trips", box=None)
        for name, row in content["table"].items():
            table.add_row(name, f"{row['mean']:.3f} ({row['sd']:.3f})", f"{row['per_batch_s']:.3f}", str(row["trips"]))
        console.print(table)
    for name, runs in content.get("rounds", {}).items():
        for run_ in runs:
            curve = " ".join(f"{error:.3f}" for error in run_["error_by_round"])
            console.print(f"rounds, {name}, seed {run_['seed']}: {curve}")
    for cell in content.get("batches", []):
        options = cell["options"]
        console.print(
            f"batch {options['batch_size']:3} {options['order']:10} {cell['adapter']:12} {cell['mean_error']:.3f} "
            f"(source {cell['source_mean_error']:.3f}), trips {len(cell['trips'])}"
        )


if __name__ == "__main__":
    sys.exit(main())
