"""AdaB2N (arXiv 2310.08855) in its two hosts: BatchNorm in separate passes, in one joint pass, and balanced.

    python benchmarks/adab2n.py [--seeds 5] [--jobs 2] [--quick] [--out FILE]

Online class-incremental MNIST (mnist5k, extra demo: 4,000 train / 1,000 test), 5 experiences of 2 classes, seen once,
10 samples and 10 exemplars per step (DER++: 10 for each of its two terms), 200 exemplars, ResNet-18 of width 8, one
head of 10 outputs, SGD 0.03. kappa, lam and start_task are chosen per host on two other seeds, on the first third of
each experience's training samples, by the accuracy on the other two; no test sample takes part. Accuracy is that of all
classes after the last experience, over the whole test set.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import common

common.use_threads(1)

HOSTS: dict[str, dict[str, Any]] = {
    "er_ace": {"policy": "reservoir"},
    "derpp": {"alpha": 0.2, "beta": 0.5, "second_batch": True},
}
LOOP: dict[str, Any] = {
    "lr": 0.03, "epochs": 1, "batch_size": 10, "batch_size_memory": 10, "memory_size": 200, "device": "cpu",
}  # fmt: skip
GRID = [
    {"kappa": kappa, "lam": lam, "start_task": start}
    for kappa, lam, start in itertools.product((0.1, 0.4, 0.7, 1.0), (0.01, 0.1, 1.0, 10.0), (0, 1))
]
CHOICE_SEEDS = (100, 101)
SEPARATE, JOINT, BALANCED, RENORMALISED = "BN, separate passes", "BN, joint pass", "AdaB2N", "AdaB2N, renormalised"
Job = tuple[str, str, dict[str, Any] | None, bool, int, float]


def trained(
    host: str, options: dict[str, Any] | None, pieces: list[Any], stream: Any, *, joint: bool, seed: int,
    watch: Any = None,
) -> Any:  # fmt: skip
    """A strategy trained on ``pieces``; ``options`` are AdaB2N's, ``None`` leaves BatchNorm."""
    from contlearn import models, strategies
    from contlearn.state import seed_everything
    from contlearn.strategies.adab2n import AdaB2NPlugin

    seed_everything(seed)
    model = models.create("slim_resnet18", stream, seed=seed, head="fixed", width=8)
    plugins: list[Any] = [] if watch is None else [watch]
    if options is not None:
        plugins.append(AdaB2NPlugin(**options))
        plugins[-1].prepare_model(model)
    strategy = strategies.create(host, model, joint_forward=joint, plugins=plugins, **HOSTS[host], **LOOP)
    strategy.generator.manual_seed(seed)
    for piece in pieces:
        strategy.train(piece, eval_streams=[])
    return strategy


def accuracy(strategy: Any, datasets: list[Any]) -> float:
    """Share of right answers over data sets, all classes competing."""
    import torch

    strategy.model.eval()
    batches = [
        batch for dataset in datasets for batch in strategy.loader(dataset.eval(), batch_size=500, shuffle=False)
    ]
    x, y = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    with torch.no_grad():
        parts = zip(x.split(500), y.split(500), strict=True)
        right = [(strategy.model(x).argmax(1) == labels).sum() for x, labels in parts]
    return int(sum(right)) / len(y)


@functools.cache
def images() -> Any:
    """The data set, split by seed 0; reading it takes seconds."""
    from contlearn.scenarios import datasets

    return datasets.load("mnist5k", seed=0)


def one(job: Job) -> float:
    """Train one cell: host, variant, AdaB2N's options, whether to choose, seed, share of the pieces -> accuracy."""
    warnings.filterwarnings("ignore")
    import torch

    from contlearn import scenarios

    torch.set_num_threads(1)
    host, variant, options, choosing, seed, share = job
    stream = scenarios.online(images(), n_experiences=5, experience_size=10, seed=seed)
    by_experience: dict[int, list[Any]] = {}
    for piece in stream.train_stream:
        by_experience.setdefault(piece.logging().origin_experience.current_experience, []).append(piece)
    used, unseen = [], []
    for pieces in by_experience.values():
        count = max(2, round(len(pieces) * share))
        used += pieces[:count]
        unseen += pieces[count:]
    strategy = trained(host, options, used, stream, joint=variant != SEPARATE, seed=seed)
    if not choosing:
        return accuracy(strategy, [experience.dataset for experience in stream.test_stream])
    return accuracy(strategy, [piece.dataset for piece in unseen])


def memory() -> dict[str, dict[str, int]]:
    """Bytes of a step of ER-ACE with 10 samples and 10 exemplars of two tasks, by variant."""
    warnings.filterwarnings("ignore")
    from contlearn import scenarios
    from contlearn.memory import MemoryAccount

    stream = scenarios.online(images(), n_experiences=5, experience_size=10)
    pieces = [e for e in stream.train_stream if e.logging().origin_experience.current_experience < 2]
    firsts = [index for index, piece in enumerate(pieces) if piece.logging().is_first_subexp]
    pieces = [*pieces[:10], *pieces[firsts[1] : firsts[1] + 2], pieces[-1]]  # full batches, the last one of two tasks
    cases = {
        "BN, joint pass": None,
        "AdaB2N, fused": {},
        "AdaB2N, operation by operation": {"fused": False},
        "AdaB2N, fused, no regulariser": {"lam": 0.0},
    }
    found = {}
    for name, options in cases.items():
        account = MemoryAccount()
        strategy = trained("er_ace", options, pieces, stream, joint=True, seed=0, watch=account)
        report = account.close_experience(strategy)
        found[name] = {
            "activations": report.activations, "peak_static": report.peak_static, "weights": report.weights,
            "method_state": sum(report.method_state.values()),
        }  # fmt: skip
    return found


def main() -> int:
    """Choose the options, run the seeds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, four cells of the grid, one seed")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/adab2n.json)")
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    grid, seeds, choice_seeds, share = GRID, arguments.seeds, CHOICE_SEEDS, 1.0
    if arguments.quick:
        grid, seeds, choice_seeds, share = GRID[2::9], 1, CHOICE_SEEDS[:1], 0.1
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        cells = [(host, options, seed) for host in HOSTS for options in grid for seed in choice_seeds]
        jobs: list[Job] = [(host, BALANCED, options, True, seed, share / 3) for host, options, seed in cells]
        found = list(track(pool.map(one, jobs), total=len(jobs), description="choosing"))
        choice: dict[str, list[dict[str, Any]]] = {}
        for host in HOSTS:
            mine = [(options, value) for (name, options, _), value in zip(cells, found, strict=True) if name == host]
            rows = [{**options, "accuracies": [v for other, v in mine if other is options]} for options in grid]
            choice[host] = sorted(rows, key=lambda row: -sum(row["accuracies"]))
        best = {host: {k: v for k, v in rows[0].items() if k != "accuracies"} for host, rows in choice.items()}
        finals: list[tuple[str, str, int]] = list(
            itertools.product(HOSTS, (SEPARATE, JOINT, BALANCED, RENORMALISED), range(seeds))
        )
        jobs = []
        for host, variant, seed in finals:
            chosen = {BALANCED: best[host], RENORMALISED: {**best[host], "renormalise": True}}.get(variant)
            jobs.append((host, variant, chosen, False, seed, share))
        found = list(track(pool.map(one, jobs), total=len(jobs), description="comparing"))
    results: dict[str, dict[str, Any]] = {host: {} for host in HOSTS}
    table = Table("", *HOSTS, box=None)
    for variant in dict.fromkeys(variant for _, variant, _ in finals):
        words = []
        for host in HOSTS:
            values = [v for (h, w, _), v in zip(finals, found, strict=True) if (h, w) == (host, variant)]
            mean, sd = common.mean_sd(values)
            results[host][variant] = {"accuracies": values, "mean": mean, "sd": sd}
            words.append(f"{mean:.3f} ({sd:.3f})")
        table.add_row(variant, *words)
    Console().print(table)
    step = memory()
    for name, sizes in step.items():
        print(f"{name}: {sizes['activations']:,} bytes saved for backward, peak {sizes['peak_static']:,}")
    content = {
        "setting": (__doc__ or "").split("\n\n")[2], "quick": arguments.quick, "seeds": seeds, "results": results,
        "chosen": best, "choice": choice, "choice_seeds": list(choice_seeds), "step_memory": step,
        "host_options": HOSTS, "loop": LOOP,
    }  # fmt: skip
    where = common.write("adab2n", content, arguments.out)
    print(f"mean (sample standard deviation) over {seeds} seeds; chosen: {best}; written to {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
