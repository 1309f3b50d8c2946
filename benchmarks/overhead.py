"""What the training template costs on top of a bare PyTorch loop, and whether long streams slow down.

    python benchmarks/overhead.py [--repeats 7]

Naive with the MLP (one hidden layer of 100, dropout 0.5), batch 32, SGD, one thread. The bare loop indexes float
tensors that are pre-loaded and normalised, the strictest baseline; ours starts from uint8 images and runs every hook;
Avalanche's Naive reads the same stream through its own loader. The three take turns within one process, and ratios
are formed turn by turn. Then: seconds per experience of replay on a stream of 10 experiences of equal size, and of
online replay and ER-ACE on hundreds of experiences of 10 samples; first and last third compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import common

common.use_threads(1)


def epochs_per_second(dataset: str, repeats: int) -> dict[str, Any]:
    """Median seconds per epoch of the three loops on one experience, and their ratios to the bare one."""
    import torch

    from contlearn import models, scenarios, strategies

    torch.set_num_threads(1)
    stream = scenarios.class_incremental(dataset, n_experiences=2)
    experience = stream.train_stream[0]
    size = len(experience.dataset)
    epochs = max(2, 6000 // size)
    samples = [experience.dataset[index] for index in range(size)]
    images = torch.stack([sample[0] for sample in samples])
    targets = torch.tensor([sample[1] for sample in samples])

    def fresh() -> torch.nn.Module:
        return models.create("mlp", stream, seed=0, head="fixed")

    def bare() -> None:
        model = fresh().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        criterion = torch.nn.CrossEntropyLoss()
        for _ in range(epochs):
            order = torch.randperm(size)
            for start in range(0, size, 32):
                rows = order[start : start + 32]
                optimizer.zero_grad()
                loss = criterion(model(images[rows]), targets[rows])
                loss.backward()
                optimizer.step()

    def ours() -> None:
        strategy = strategies.create("naive", fresh(), lr=0.1, epochs=epochs, batch_size=32, device="cpu")
        strategy.train(experience, eval_streams=[])

    def theirs() -> None:
        from avalanche.training import Naive
        from avalanche.training.plugins import EvaluationPlugin

        model = fresh()
        strategy = Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=32,
            train_epochs=epochs,
            evaluator=EvaluationPlugin(loggers=[]),
        )
        strategy.train(experience, eval_streams=[])

    loops: dict[str, Callable[[], None]] = {"bare": bare, "contlearn": ours, "avalanche": theirs}
    for loop in loops.values():
        loop()
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            started = time.perf_counter()
            loop()
            seconds[name].append((time.perf_counter() - started) / epochs)
    ratios = {
        name: [own / base for own, base in zip(values, seconds["bare"], strict=True)]
        for name, values in seconds.items()
    }
    return {
        "samples": size,
        "iterations_per_epoch": -(-size // 32),
        "seconds_per_epoch": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
    }


def seconds_per_experience(name: str, scenario: str, **options: Any) -> dict[str, Any]:
    """Training seconds of every experience of a stream in turn."""
    import torch

    from contlearn import models, scenarios, strategies

    torch.manual_seed(0)
    stream = scenarios.create(scenario, **options.pop("stream"))
    model = models.create("mlp", stream, seed=0)
    strategy = strategies.create(name, model, lr=0.1, batch_size=options.pop("batch_size", 32), device="cpu", **options)
    seconds = []
    for experience in stream.train_stream:
        started = time.perf_counter()
        strategy.train(experience, eval_streams=[])
        seconds.append(time.perf_counter() - started)
    # The first experience has no memory to replay yet; comparing starts once there is one.
    third = len(seconds) // 3
    head, tail = statistics.median(seconds[third : 2 * third]), statistics.median(seconds[-third:])
    return {"seconds": seconds, "middle_third": head, "last_third": tail, "slowdown": tail / head}


def main() -> int:
    """Run, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/overhead.json)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    content: dict[str, Any] = {"loops": {}, "streams": {}}
    for dataset in ("digits", "mnist5k"):
        found = content["loops"][dataset] = epochs_per_second(dataset, arguments.repeats)
        print(f"\n{dataset}: {found['samples']} samples, {found['iterations_per_epoch']} iterations per epoch")
        for name, seconds in found["seconds_per_epoch"].items():
            low, high = found["ratio_range"][name]
            ratio = f"{found['ratio'][name]:.2f}x ({low:.2f}-{high:.2f})"
            print(f"  {name:10} {1000 * seconds:8.2f} ms per epoch   {ratio}")
    streams: dict[str, tuple[str, str, dict[str, Any]]] = {
        "replay, 10 domains": (
            "replay",
            "domain_incremental",
            {"stream": {"dataset": "digits", "domains": "permutation", "n_experiences": 10}, "epochs": 5},
        ),
        "replay, online": (
            "replay",
            "online",
            {"stream": {"dataset": "mnist5k", "experience_size": 10}, "batch_size": 10, "memory_size": 500},
        ),
        "er_ace, online": (
            "er_ace",
            "online",
            {"stream": {"dataset": "mnist5k", "experience_size": 10}, "batch_size": 10, "memory_size": 500},
        ),
    }
    for label, (name, scenario, options) in streams.items():
        found = content["streams"][label] = seconds_per_experience(name, scenario, **options)
        shown = found["seconds"] if len(found["seconds"]) <= 12 else found["seconds"][:: len(found["seconds"]) // 10]
        print(f"\n{label}: {len(found['seconds'])} experiences, last third / middle third {found['slowdown']:.2f}x")
        print("  ms per experience: " + " ".join(f"{1000 * seconds:.1f}" for seconds in shown))
    print(f"\nwritten to {common.write('overhead', content, arguments.out)}")
    worst = max(content["loops"][dataset]["ratio"]["contlearn"] for dataset in content["loops"])
    return 0 if worst <= 1.3 else 1


if __name__ == "__main__":
    sys.exit(main())
