"""Side tuning of frozen networks: what SHERL, UniPT and LST take in memory, and what they reach.

    python benchmarks/sherl.py [--parts memory accuracy] [--seeds 3] [--quick]

memory: one training step of ViT-tiny and ViT-small, batch 64, AdamW, each method in a process of its own. Peak: growth
of the resident high-water mark from before the model is built, over two steps; saved: storages kept for backward. LoRA
is the ``peft`` library's, rank 8 on the query, key and value projections.

accuracy: EfficientNet-Lite0 with ImageNet weights at 96 pixels on subsets of MNIST and of scikit-learn's digits, all
ten classes at once, Adam. The learning rate of each method comes from one grid, by accuracy on validation images that
are neither trained nor tested on, at a seed of its own. Full fine-tuning trains BatchNorm too; all others keep it
fixed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

common.use_threads(1)

NETWORKS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
MEMORY_METHODS = ("full", "lora", "last layer", "sherl", "unipt", "lst")
DATASETS = ("mnist5k", "digits")
ACCURACY_METHODS = ("full", "last layer", "sherl", "unipt", "lst")
RATES = (0.001, 0.003, 0.01)
PER_CLASS = {"train": 20, "validation": 15, "test": 50}
EPOCHS, BATCH, GRID_SEED = 4, 10, 1000


def side_plugins(method: str) -> list[Any]:
    """The plug-in of a method that keeps the backbone frozen."""
    import torch

    from contlearn.strategies.lst import LSTPlugin
    from contlearn.strategies.sherl import SHERLPlugin, SidePlugin, SideTuned
    from contlearn.strategies.unipt import UniPTPlugin

    class LastLayer(SideTuned):
        """The backbone alone."""

        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                return self.trunk(x)

    class LastLayerPlugin(SidePlugin):
        """Nothing but the head trains."""

        method = "last layer"
        network = LastLayer

        def build(self, trunk: Any, host: Any) -> Any:
            return LastLayer(trunk, host)

    made = {"sherl": SHERLPlugin, "unipt": UniPTPlugin, "lst": LSTPlugin, "last layer": LastLayerPlugin}
    return [made[method]()] if method in made else []


# ---------------------------------------------------------------------- memory


def child(request: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process does: two steps, their peak and what they save."""
    import torch

    from contlearn import models
    from contlearn.memory import process
    from contlearn.memory.saved import SavedForBackward

    torch.set_num_threads(1)
    side = request["side"]

    def built(side: int, depth: int | None) -> Any:
        stream = SimpleNamespace(input_shape=(3, side, side), n_classes=10, task_labels=False)
        options = {} if depth is None else {"depth": depth, "embed_dim": 24, "num_heads": 3}
        model: Any = models.create(request["network"], stream, head="fixed", seed=0, **options)
        if request["method"] == "lora":
            import peft

            config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["qkv"])
            model.backbone = peft.get_peft_model(model.backbone, config)
        for plugin in side_plugins(request["method"]):
            plugin.prepare_model(model)
        return model.train()

    def steps(model: Any, x: Any, y: Any, count: int) -> int:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        watch = SavedForBackward([*model.parameters(), *model.buffers(), x])
        for _ in range(count):
            optimizer.zero_grad()
            with watch.watching():
                torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return watch.peak

    # Once in vain, small: what is imported and set up on the way is code, not memory of the step.
    steps(built(32, 3), torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), 1)
    batch = request["batch"]
    x, y = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
    before = process.mark()
    model = built(side, None)
    started = time.perf_counter()
    saved = steps(model, x, y, 2)
    seconds = (time.perf_counter() - started) / 2
    peak = None if before is None else process.resident_bytes("VmHWM") - before
    parameters = list(model.parameters())
    return {
        "peak_measured": peak, "saved": saved, "step_s": seconds,
        "weights": 4 * sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
    }  # fmt: skip


def memory(quick: bool) -> dict[str, Any]:
    """Figures by network and method."""
    from contlearn.memory.process import ALLOCATOR

    side, batch = (64, 8) if quick else (224, 64)
    rows: dict[str, Any] = {}
    for network in NETWORKS[:1] if quick else NETWORKS:
        rows[network] = {}
        for method in MEMORY_METHODS:
            request = {"network": network, "method": method, "side": side, "batch": batch}
            done = subprocess.run(
                [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--child", json.dumps(request)],
                capture_output=True, text=True, env={**os.environ, **ALLOCATOR}, check=False,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{network}, {method}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
            rows[network][method] = json.loads(done.stdout.strip().splitlines()[-1])
            print(network, method, rows[network][method], file=sys.stderr)
        full = rows[network]["full"]
        for row in rows[network].values():
            row["share_of_full"] = {key: row[key] / full[key] for key in ("peak_measured", "saved") if row[key]}
    return {"image_size": side, "batch_size": batch, "optimizer": "adamw", "dtype": "float32", "rows": rows}


# ---------------------------------------------------------------------- accuracy


@functools.cache
def images(dataset: str) -> Any:
    """The data set at 96 pixels."""
    from contlearn.scenarios import datasets

    return datasets.load(dataset, image_size=96)


def stream_of(dataset: str, seed: int, *, grid: bool, quick: bool) -> Any:
    """One experience of all classes; the test part of a grid run is its validation part, cut from training images."""
    import torch

    from contlearn import scenarios

    data = images(dataset)
    draw = torch.Generator().manual_seed(seed)
    chosen: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    counts = {name: min(count, 5) if quick else count for name, count in PER_CLASS.items()}
    for label in range(10):
        mine = torch.nonzero(data.train_targets == label).flatten()
        mine = mine[torch.randperm(len(mine), generator=draw)]
        chosen["train"].append(mine[: counts["train"]])
        chosen["validation"].append(mine[counts["train"] :][: counts["validation"]])
        mine = torch.nonzero(data.test_targets == label).flatten()
        chosen["test"].append(mine[torch.randperm(len(mine), generator=draw)][: counts["test"]])
    rows = {name: torch.cat(parts) for name, parts in chosen.items()}
    side, held = ("train", rows["validation"]) if grid else ("test", rows["test"])
    data = replace(
        data, train_images=data.train_images[rows["train"]], train_targets=data.train_targets[rows["train"]],
        test_images=getattr(data, f"{side}_images")[held], test_targets=getattr(data, f"{side}_targets")[held],
        mean=(0.5,), std=(0.5,),
    )  # fmt: skip
    return scenarios.class_incremental(data, n_experiences=1)


def trained(dataset: str, method: str, rate: float, seed: int, *, grid: bool, quick: bool) -> dict[str, Any]:
    """Train once and give the figures."""
    from contlearn import models, run, strategies

    stream = stream_of(dataset, seed, grid=grid, quick=quick)
    model = models.create("efficientnet_lite0", stream, weights="imagenet", seed=seed)
    strategy = strategies.create(
        "naive", model, lr=rate, optimizer="adam", epochs=1 if quick else EPOCHS, batch_size=BATCH, device="cpu",
        plugins=side_plugins(method),
    )  # fmt: skip
    found = run(strategy, stream, seed=seed, quiet=True).results
    return {
        "accuracy": found["metrics"]["final_accuracy"],
        "train_s": found["time"]["train_s"],
        "activations": found["memory"]["activations"],
        "trainable_weights": found["memory"]["trainable_weights"],
        "peak_static": found["memory"]["peak_static"],
    }


def accuracy(seeds: int, quick: bool) -> dict[str, Any]:
    """Figures by data set and method."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows: dict[str, Any] = {}
    for dataset in DATASETS:
        rows[dataset] = {}
        for method in ACCURACY_METHODS:
            scores = {
                rate: trained(dataset, method, rate, GRID_SEED, grid=True, quick=quick)["accuracy"]
                for rate in (RATES[:2] if quick else RATES)
            }
            rate = max(scores, key=lambda one: scores[one])  # the first of equals
            found = [trained(dataset, method, rate, seed, grid=False, quick=quick) for seed in range(seeds)]
            values = {key: [one[key] for one in found] for key in found[0]}
            mean, sd = common.mean_sd(values["accuracy"])
            rows[dataset][method] = {
                "lr": rate, "grid": scores, "accuracy": {"mean": mean, "sd": sd, "values": values["accuracy"]},
                "train_s": common.mean_sd(values["train_s"])[0],
                **{key: max(values[key]) for key in ("activations", "trainable_weights", "peak_static")},
            }  # fmt: skip
            print(dataset, method, rows[dataset][method], file=sys.stderr)
    return {
        "model": "efficientnet_lite0", "weights": "imagenet", "image_size": 96, "images_per_class": PER_CLASS,
        "epochs": EPOCHS, "batch_size": BATCH, "optimizer": "adam", "rates": RATES, "grid_seed": GRID_SEED,
        "seeds": seeds, "rows": rows,
    }  # fmt: skip


def main() -> int:
    """Run the parts asked for; parts that are in the file and were not asked for stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("memory", "accuracy"), default=["memory", "accuracy"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="minutes: sizes that say nothing about the method")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/sherl.json)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return 0
    path = Path(arguments.out) if arguments.out else common.RESULTS / "sherl.json"
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    for name in arguments.parts:
        started = time.perf_counter()
        part = memory(arguments.quick) if name == "memory" else accuracy(arguments.seeds, arguments.quick)
        parts[name] = {**part, "quick": arguments.quick, "wall_s": time.perf_counter() - started}
        common.write("sherl", {"parts": parts}, arguments.out)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
