"""PRD beside other methods without exemplars, class- and task-incremental (Asadi et al., arXiv 2303.14771).

    python benchmarks/prd.py --search [--jobs 2]             # choose options
    python benchmarks/prd.py [--seeds 3] [--jobs 2]          # compare with the options chosen

mnist5k at 14 pixels, 5 experiences of 2 classes in a random order per seed, 100 training and 60 test images per class;
ResNet-18 of width 8 from random weights, 100 epochs per experience, batches of 32, SGD with momentum 0.9. No method
keeps exemplars. Every method, not PRD alone, trains on two views of each image (a random crop over one pixel of
padding, no mirroring), so that a step has 64 rows for all. Options come from the grids below: a seed of its own
(other images, another order of classes), task-incremental, by final accuracy, one option after the other in the order
they stand, the first value of each until its turn comes. Both streams use what was chosen.

Each training is stored as soon as it is over, and a second call goes on from there (``--again`` starts over).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

STREAMS = ("task_incremental", "class_incremental")
PER_CLASS = {"train": 100, "test": 60}
SIZE, EPOCHS, BATCH, GRID_SEED = 14, 100, 32, 1000
MODEL = {"name": "slim_resnet18", "width": 8}
CLIPS = (None, 1.0)
SMALL_RATES, RATES, WEIGHTS = (0.01, 0.003, 0.03), (0.03, 0.01, 0.1), (1.0, 4.0, 0.25)
RELATION_GRIDS: dict[str, tuple[Any, ...]] = {
    "lr": RATES, "alpha": WEIGHTS, "teacher_mode": ("train", "eval"), "prototypes_lr": (0.03, 0.1),
    "clip_grad_norm": CLIPS,
}  # fmt: skip
LAMBDAS = (1000.0, 100.0, 10000.0, 100000.0)
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[Any, ...]]]] = {  # strategy, fixed, grids
    "Naive": ("naive", {}, {"lr": SMALL_RATES, "clip_grad_norm": CLIPS}),
    "LwF": ("lwf", {}, {"lr": RATES, "alpha": WEIGHTS, "clip_grad_norm": CLIPS}),
    "EWC": ("ewc", {}, {"lr": SMALL_RATES, "ewc_lambda": LAMBDAS, "clip_grad_norm": CLIPS}),
    "PRD, samples": ("prd", {"flip": False, "relation": "samples"}, RELATION_GRIDS),
    "PRD, classes": ("prd", {"flip": False, "relation": "classes"}, RELATION_GRIDS),
}
SETTINGS = {
    "dataset": "mnist5k", "image_size": SIZE, "images_per_class": PER_CLASS, "model": MODEL, "epochs": EPOCHS,
    "batch_size": BATCH, "momentum": 0.9, "grid_seed": GRID_SEED,
}  # fmt: skip
FIGURES = ("final_accuracy", "average_accuracy", "learning_accuracy", "forgetting")
BYTES = ("persistent", "peak_static", "method_state", "weights", "optimizer", "activations")


@dataclass(frozen=True)
class Job:
    """One training: method's row, options, stream, seed, and whether it is only to see it run."""

    row: str
    options: tuple[tuple[str, Any], ...]
    stream: str
    seed: int
    quick: bool = False

    @property
    def key(self) -> str:
        """What its figures are stored under."""
        return json.dumps([self.row, dict(self.options), self.stream, self.seed, self.quick], sort_keys=True)


@functools.cache
def _images() -> Any:
    from contlearn.scenarios import datasets

    return datasets.load("mnist5k", image_size=SIZE)


def stream_of(job: Job) -> Any:
    """The job's stream: its images and the order of classes follow the seed."""
    import torch

    from contlearn import scenarios

    data = _images()
    draw = torch.Generator().manual_seed(job.seed)
    order = torch.randperm(10, generator=draw).tolist()
    parts: dict[str, Any] = {}
    for side, limit in PER_CLASS.items():
        targets = getattr(data, f"{side}_targets")
        mine = [torch.nonzero(targets == label).flatten() for label in order]
        mine = [rows[torch.randperm(len(rows), generator=draw)][: 20 if job.quick else limit] for rows in mine]
        parts[f"{side}_images"] = getattr(data, f"{side}_images")[torch.cat(mine)]
        parts[f"{side}_targets"] = torch.cat([torch.full((len(m),), label) for label, m in enumerate(mine)])
    data = replace(data, **parts, class_names=tuple(data.class_names[label] for label in order))
    return scenarios.create(name=job.stream, dataset=data, n_experiences=5)


def with_views() -> Any:
    """A plug-in that gives a method the views that PRD makes."""
    import torch
    from avalanche.core import SupervisedPlugin

    from contlearn.scenarios.augment import Views
    from contlearn.strategies.prd import pixel_range

    class TwoViews(SupervisedPlugin):  # type: ignore[type-arg]
        memory_exempt = True

        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            self.augment = Views(2, generator=strategy.generator, flip=False)
            self.augment.black, self.augment.white = pixel_range(strategy.experience.dataset, strategy.device)

        def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            images, *rest = strategy.mbatch
            strategy.mbatch = [self.augment(images), *(torch.cat([part, part]) for part in rest)]

    return TwoViews()


def one(job: Job) -> dict[str, Any]:
    """Train one job and give its figures."""
    warnings.filterwarnings("ignore")
    from contlearn import models, run, strategies

    stream = stream_of(job)
    name, fixed, _ = METHODS[job.row]
    strategy = strategies.create(
        name, models.create(stream=stream, seed=job.seed, **MODEL), momentum=0.9,
        epochs=1 if job.quick else EPOCHS, batch_size=BATCH, device="cpu",
        plugins=[] if name == "prd" else [with_views()], **{**fixed, **dict(job.options)},
    )  # fmt: skip
    started = time.process_time()
    found = run(strategy, stream, seed=job.seed, quiet=True).results
    return {
        **{figure: found["metrics"][figure] for figure in FIGURES},
        **{figure: found["memory"][figure] for figure in BYTES},
        "processor_s": time.process_time() - started,
    }


class Runner:
    """Runs jobs side by side, and keeps what each gave in the results file at once."""

    def __init__(self, out: str | None, *, jobs: int, again: bool) -> None:
        self.out = out
        self.jobs = jobs
        path = Path(out) if out else common.RESULTS / "prd.json"
        stored = {} if again or not path.exists() else json.loads(path.read_text(encoding="utf-8"))
        mine = stored.get("settings") == SETTINGS
        self.content: dict[str, Any] = {"trainings": stored.get("trainings", {}) if mine else {}, "settings": SETTINGS}
        self.content["setting"] = " ".join((__doc__ or "").split("\n\n")[2].split())

    def __call__(self, asked: Sequence[Job], described: str) -> list[dict[str, Any]]:
        """Figures of each job."""
        from rich.progress import track

        trainings: dict[str, Any] = self.content["trainings"]
        missing = [job for job in dict.fromkeys(asked) if job.key not in trainings]
        if missing:
            with ProcessPoolExecutor(min(self.jobs, len(missing)), mp_context=get_context("spawn")) as pool:
                waiting = {pool.submit(one, job): job for job in missing}
                for done in track(as_completed(waiting), total=len(missing), description=described):
                    trainings[waiting[done].key] = done.result()
                    self.write()
        return [trainings[job.key] for job in asked]

    def write(self) -> Path:
        """Keep everything so far."""
        return common.write("prd", self.content, self.out)


def said(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The options in order, without those that are not set."""
    return tuple(sorted((name, value) for name, value in options.items() if value is not None))


def search(runner: Runner, quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of each row, one after the other, and everything that was tried."""
    chosen = {row: {option: values[0] for option, values in grids.items()} for row, (_, _, grids) in METHODS.items()}
    tried: dict[str, Any] = {row: [] for row in METHODS}
    for turn in range(max(len(grids) for _, _, grids in METHODS.values())):
        asked: list[tuple[str, str, dict[str, Any]]] = []
        for row, (_, _, grids) in METHODS.items():
            for option, values in list(grids.items())[turn : turn + 1]:
                asked += [(row, option, {**chosen[row], option: value}) for value in values]
        jobs = [Job(row, said(options), STREAMS[0], GRID_SEED, quick) for row, _, options in asked]
        best: dict[str, float] = {}
        for (row, option, options), found in zip(asked, runner(jobs, f"search {turn + 1}"), strict=True):
            tried[row].append({**options, "final_accuracy": found["final_accuracy"]})
            if found["final_accuracy"] > best.get(row, -1.0):  # the first of equals
                best[row] = found["final_accuracy"]
                chosen[row][option] = options[option]
    return chosen, tried


def summed(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread of every figure over seeds, and the values."""
    row: dict[str, Any] = {}
    for figure in (*FIGURES, *BYTES, "processor_s"):
        values = [one[figure] for one in found]
        mean, sd = common.mean_sd(values)
        row[figure] = {"mean": mean, "sd": sd, "values": values}
    return row


def compared(rows: dict[str, Any]) -> dict[str, Any]:
    """The better reading of PRD against every baseline: difference of final accuracies and its standard error."""
    best = max((row for row in rows if row.startswith("PRD")), key=lambda row: rows[row]["final_accuracy"]["mean"])
    mine = rows[best]["final_accuracy"]["values"]
    against = {
        row: {
            "difference": common.mean_sd(mine)[0] - common.mean_sd(rows[row]["final_accuracy"]["values"])[0],
            "standard_error": common.standard_error_of_difference(mine, rows[row]["final_accuracy"]["values"]),
            "larger_spread": max(rows[best]["final_accuracy"]["sd"], rows[row]["final_accuracy"]["sd"]),
        }
        for row in rows
        if not row.startswith("PRD")
    }
    clear = all(item["difference"] > item["larger_spread"] for item in against.values())
    return {"best": best, "against": against, "beats_all_by_more_than_the_spread": clear}


def main() -> int:
    """Search, run, print the tables and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", action="store_true", help="choose the options and stop")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="start over")
    parser.add_argument("--quick", action="store_true", help="20 images per class and one epoch: only to see it run")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/prd.json)")
    given = parser.parse_args()
    runner = Runner(given.out, jobs=given.jobs, again=given.again)
    chosen, runner.content["search"] = search(runner, given.quick)
    runner.content["chosen"] = chosen
    print(f"chosen: {chosen}")
    if not given.search:
        cells = [(stream, row, seed) for stream in STREAMS for row in METHODS for seed in range(given.seeds)]
        jobs = [Job(row, said(chosen[row]), stream, seed, given.quick) for stream, row, seed in cells]
        figures = dict(zip(cells, runner(jobs, "comparison"), strict=True))
        runner.content["streams"] = {}
        for stream in STREAMS:
            found = {row: summed([figures[stream, row, seed] for seed in range(given.seeds)]) for row in METHODS}
            runner.content["streams"][stream] = {"rows": found, "comparison": compared(found)}
            print(stream)
            for row, summary in found.items():
                shown = {name: f"{summary[name]['mean']:.3f} ({summary[name]['sd']:.3f})" for name in FIGURES}
                shown |= {name: f"{summary[name]['mean']:.0f}" for name in BYTES[:3]}
                print(f"  {row}: {shown}")
    print(f"kept in {runner.write()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
