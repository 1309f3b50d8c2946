"""Final accuracy on class-incremental digits: every strategy through our template, beside Avalanche's own.

    python benchmarks/digits_table.py [--seeds 5] [--jobs 2]

scikit-learn digits, x/16, 1437 train / 360 test, 5 experiences of 2 classes in order, one head of 10 outputs, MLP
64-100-10 with dropout 0.5, SGD 0.1, batch 32, 30 epochs per experience. Both columns train the same network from the
same initial weights; they differ in loader, order of samples and, where named in the registry, in the method's code. A
row
agrees when the means differ by at most two standard errors of their difference.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import common

common.use_threads(1)

# row: (our strategy, our options, Avalanche's class, Avalanche's options)
ROWS: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any]]] = {
    "Naive": ("naive", {}, "Naive", {}),
    "EWC(1)": ("ewc", {"ewc_lambda": 1.0}, "EWC", {"ewc_lambda": 1.0}),
    "LwF(1, T=2)": ("lwf", {"alpha": 1.0, "temperature": 2.0}, "LwF", {"alpha": 1.0, "temperature": 2.0}),
    "SI(1)": ("si", {"si_lambda": 1.0, "damping": 1e-7}, "SynapticIntelligence", {"si_lambda": 1.0}),
    "A-GEM(50/exp)": (
        "agem", {"patterns_per_experience": 50, "sample_size": 64, "partial_batches": True},
        "AGEM", {"patterns_per_exp": 50, "sample_size": 64},
    ),
    "GDumb(200)": ("gdumb", {"memory_size": 200}, "GDumb", {"mem_size": 200}),
    "Replay(200)": ("replay", {"memory_size": 200, "policy": "experience_balanced"}, "Replay", {"mem_size": 200}),
    "DER++(200)": ("derpp", {"memory_size": 200}, "DER", {"mem_size": 200}),
    "ER-ACE(200)": ("er_ace", {"memory_size": 200}, "ER_ACE", {"mem_size": 200}),
    "A-GEM, full samples": ("agem", {"patterns_per_experience": 50, "sample_size": 64}, None, {}),
    "iCaRL(200)": ("icarl", {"memory_size": 200}, None, {}),
    "Replay(200), herding": ("replay", {"memory_size": 200, "policy": "herding"}, None, {}),
    "DER(200), no labels": ("der", {"memory_size": 200}, None, {}),
    "SI(1), uncapped": ("si", {"si_lambda": 1.0, "max_importance": None}, None, {}),
    "Cumulative": ("cumulative", {}, "Cumulative", {}),
    "Joint": ("joint", {}, "JointTraining", {}),
}  # fmt: skip
REFERENCE = {  # Avalanche 0.6.0, population standard deviation in brackets; measured earlier at the same settings
    "Naive": 0.207, "EWC(1)": 0.206, "LwF(1, T=2)": 0.205, "SI(1)": 0.207, "A-GEM(50/exp)": 0.261,
    "GDumb(200)": 0.904, "Replay(200)": 0.919, "DER++(200)": 0.926, "ER-ACE(200)": 0.931,
}  # fmt: skip


def one(job: tuple[str, str, int]) -> tuple[str, str, int, float, float]:
    """Train one cell: row, side (ours or Avalanche's), seed -> final accuracy and seconds of training."""
    warnings.filterwarnings("ignore")
    row, side, seed = job
    import torch

    from contlearn import models, run, scenarios, strategies

    torch.set_num_threads(1)
    name, options, theirs, their_options = ROWS[row]
    stream = scenarios.class_incremental("digits", n_experiences=5)
    model = models.create("mlp", stream, seed=seed, head="fixed", hidden=100, dropout=0.5)
    started = time.perf_counter()
    if side == "contlearn":
        strategy = strategies.create(name, model, lr=0.1, epochs=30, batch_size=32, device="cpu", **options)
        result = run(strategy, stream, seed=seed, quiet=True).results
        return row, side, seed, result["metrics"]["final_accuracy"], result["time"]["train_s"]
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    assert theirs is not None
    torch.manual_seed(seed)
    __import__("random").seed(seed)
    strategy = getattr(supervised, theirs)(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=32, train_epochs=30, eval_mb_size=512, evaluator=EvaluationPlugin(loggers=[]), **their_options,
    )  # fmt: skip
    if theirs == "JointTraining":
        strategy.train(stream.train_stream, eval_streams=[])
    else:
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
    seconds = time.perf_counter() - started
    # GDumb replaces the strategy's model.
    trained = strategy.model.eval()
    correct = total = 0
    with torch.no_grad():
        for experience in stream.test_stream:
            samples = [experience.dataset[i] for i in range(len(experience.dataset))]
            answer = trained(torch.stack([sample[0] for sample in samples])).argmax(1)
            correct += int((answer == torch.tensor([sample[1] for sample in samples])).sum())
            total += len(samples)
    return row, side, seed, correct / total, seconds


def main() -> int:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="only these rows")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/digits_table.json)")
    arguments = parser.parse_args()
    jobs = [
        (row, side, seed)
        for row in arguments.rows
        for side in ("contlearn", "avalanche")
        if side == "contlearn" or ROWS[row][2] is not None
        for seed in range(arguments.seeds)
    ]
    from rich.progress import track

    cells: dict[str, dict[str, list[float]]] = {row: {} for row in arguments.rows}
    seconds: dict[str, dict[str, list[float]]] = {row: {} for row in arguments.rows}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for row, side, _, accuracy, elapsed in track(pool.map(one, jobs), total=len(jobs), description="digits table"):
            cells[row].setdefault(side, []).append(accuracy)
            seconds[row].setdefault(side, []).append(elapsed)
    content: dict[str, Any] = {"rows": {}, "seeds": arguments.seeds, "setting": (__doc__ or "").split("\n\n")[2]}
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "contlearn", "Avalanche 0.6.0", "difference", "2 SE", "agrees", "train s (ours / theirs)", box=None
    )
    for row in arguments.rows:
        record = compare(cells[row], seconds[row])
        content["rows"][row] = {**record, "reference": REFERENCE.get(row)}
        table.add_row(row, *in_words(record))
    Console().print(table)
    where = common.write("digits_table", content, arguments.out)
    print(f"mean (sample standard deviation) over {arguments.seeds} seeds; written to {where}")
    return 0 if all(record.get("agrees", True) for record in content["rows"].values()) else 1


def compare(accuracy: dict[str, list[float]], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Means, spreads and whether the two sides agree within two standard errors of the difference."""
    record: dict[str, Any] = {}
    for side, values in accuracy.items():
        mean, sd = common.mean_sd(values)
        train = common.mean_sd(seconds[side])[0]
        record[side] = {"accuracies": values, "mean": mean, "sd": sd, "train_s": train}
    if "avalanche" in record:
        record["difference"] = record["contlearn"]["mean"] - record["avalanche"]["mean"]
        bound = 2 * common.standard_error_of_difference(accuracy["contlearn"], accuracy["avalanche"])
        record["two_standard_errors"] = bound
        record["agrees"] = abs(record["difference"]) <= bound
    return record


def in_words(record: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    ours, theirs = record["contlearn"], record.get("avalanche")
    cells = [f"{ours['mean']:.3f} ({ours['sd']:.3f})"]
    if theirs is None:
        return [*cells, "-", "", "", "", f"{ours['train_s']:.1f}"]
    return [
        *cells,
        f"{theirs['mean']:.3f} ({theirs['sd']:.3f})",
        f"{record['difference']:+.4f}",
        f"{record['two_standard_errors']:.4f}",
        "yes" if record["agrees"] else "NO",
        f"{ours['train_s']:.1f} / {theirs['train_s']:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
