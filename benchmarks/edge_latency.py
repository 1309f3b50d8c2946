"""Latency of an exported training step in ONNX Runtime against the same step in PyTorch eager, in one run.

    python benchmarks/edge_latency.py [--models mobilenetv2_100 efficientnet_lite0] [--train last_blocks:3 all]
                                      [--batches 1 8 32] [--threads 2] [--repeats 15] [--out FILE]

Fine-tuning with SGD (momentum 0.9) at 96 pixels, 10 classes. `last_blocks:3` trains the last three blocks, what follows
them and the classifier, `all` everything; BatchNorm is in training mode throughout, in both worlds. Both use the same
number of threads; runs alternate, and the ratio is the median of paired ratios. ONNX Runtime is used as the artifact's
runner uses it, weights held by the runner. Rows that are not run keep their figures in the JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

SIDE, CLASSES = 96, 10


def main() -> int:
    """Measure each row, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mobilenetv2_100", "efficientnet_lite0"])
    parser.add_argument("--train", nargs="*", default=["last_blocks:3", "all"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/edge_latency.json)")
    arguments = parser.parse_args()
    common.use_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    path = Path(arguments.out) if arguments.out else common.RESULTS / "edge_latency.json"
    content: dict[str, Any] = {"setting": __doc__, "rows": {}}
    if path.exists():
        content["rows"] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for model in arguments.models:
        for train in arguments.train:
            for batch in arguments.batches:
                row = measured(model, train, batch, threads=arguments.threads, repeats=arguments.repeats)
                content["rows"][f"{model}, {train}, batch {batch}"] = row
                common.write("edge_latency", content, arguments.out)
                print(
                    f"{model:20} {train:14} batch {batch:3}: {row['onnxruntime_ms']:8.1f} ms, eager "
                    f"{row['eager_ms']:8.1f} ms, ratio {row['ratio']:.2f}, {row['nodes']} nodes",
                    flush=True,
                )
    return 0


def measured(model: str, train: str, batch: int, *, threads: int, repeats: int) -> dict[str, Any]:
    """One row: milliseconds of a step in both worlds, and the median of paired ratios."""
    import numpy as np
    import torch

    from contlearn import models, strategies
    from contlearn.edge.capture import capture
    from contlearn.edge.onnx import lower

    torch.set_num_threads(threads)
    stream: Any = SimpleNamespace(input_shape=(3, SIDE, SIDE), n_classes=CLASSES, task_labels=False)
    chosen = None if train == "all" else [train]
    made = models.create(model, stream, head="fixed", seed=0, trainable=chosen)
    strategy = strategies.create("naive", made, lr=0.01, momentum=0.9, device="cpu")
    step = strategy.declare_step(batch_size=batch, input_shape=(3, SIDE, SIDE))
    adapt = lower(capture(step))

    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapt.onnx"
        file.write_bytes(adapt.SerializeToString())
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {**step.state, **step.examples()}
    binding, values = session.io_binding(), {}
    for place in session.get_inputs():
        values[place.name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given[place.name].numpy()))
        binding.bind_ortvalue_input(place.name, values[place.name])
    for place in session.get_outputs():
        name = place.name.removeprefix("new.")
        like = given[name].numpy() if place.name.startswith("new.") else np.zeros(place.shape, np.float32)
        values[f"out {place.name}"] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(like))
        binding.bind_ortvalue_output(place.name, values[f"out {place.name}"])

    x, y, loss = given["x"], given["y"], torch.nn.CrossEntropyLoss()
    made.train()

    def eager() -> None:
        strategy.optimizer.zero_grad()
        loss(made(x), y).backward()
        strategy.optimizer.step()

    def runtime() -> None:
        session.run_with_iobinding(binding)

    pairs = []
    for index in range(repeats + 3):
        times = []
        for function in (eager, runtime) if index % 2 else (runtime, eager):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        pairs.append(times if index % 2 else times[::-1])
    pairs = pairs[3:]
    return {
        "eager_ms": statistics.median(a for a, _ in pairs),
        "onnxruntime_ms": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
        "nodes": len(adapt.graph.node),
        "threads": threads,
        "repeats": repeats,
    }


if __name__ == "__main__":
    sys.exit(main())
