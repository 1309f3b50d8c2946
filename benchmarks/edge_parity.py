"""Does every exportable method compute on every network, in ONNX Runtime, what it computes in PyTorch?

    python benchmarks/edge_parity.py [--whole] [--networks mlp ...] [--strategies ewc ...] [--jobs 2] [--limit 900]
                                     [--again] [--table] [--out FILE]

One cell per network and method, each in a process of its own and for at most LIMIT seconds. The method trains for two
small experiences (or adapts to one batch), declares its step, and the step's graph in ONNX Runtime (default session
options, one thread) is compared with the step in PyTorch by `contlearn.edge.verify`: one step at two states, and 20
steps against controls whose weights were perturbed by 1e-6. A pair that makes no sense holds the reason that the code
gives. By default fine-tuning on every network and each other method on one that suits it; `--whole` takes all pairs.
Then the gates of the three target profiles on small networks. The JSON file is written after every cell, and a run goes
on where the file ends; `--again` measures anew, `--table` prints the file as Markdown and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common

common.use_threads(1)

BATCH, CLASSES, EXPERIENCES, PER_CLASS = 4, 6, 3, 4
NETWORKS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "mlp": ((1, 28, 28), {"dropout": 0.0}),
    "simple_cnn": ((3, 32, 32), {"dropout": 0.0}),
    "resnet18_cifar": ((3, 32, 32), {}),
    "mobilenetv2_100": ((3, 96, 96), {}),
    "mobilenetv3_small_100": ((3, 96, 96), {}),
    "efficientnet_lite0": ((3, 96, 96), {}),
    "vit_tiny_patch16_224": ((3, 96, 96), {}),
}
FINE_TUNING: dict[str, list[str] | None] = {
    "naive, all": None, "naive, last layer": ["head"], "naive, norms": ["norms"],
    "naive, last 3 blocks": ["last_blocks:3"],
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"memory_size": 16, "batch_size_memory": 4},
    "er_ace": {"memory_size": 16, "batch_size_memory": 4},
    "ewc": {"ewc_lambda": 10.0},
    "rehearsal_free": {"feat_kd": 2.0, "l2": 0.05, "ewc": 3.0},
    "sherl": {"dropout": 0.0},
    "nap": {"every": 2, "rate": "linear", "total_steps": 30},
    "bn_stats": {"prior": 8.0, "carry": True},
    "eata": {"margin": 1.0, "d_margin": 1.0},
    "prd": {"views": 1},
    "ecotta": {"warmup_epochs": 0, "margin": 1.0},
}
# Where a method is measured by default: a network that it was made for; all others on the small ones.
HOMES: dict[str, tuple[str, ...]] = {
    "mobiletl": ("mobilenetv2_100", "efficientnet_lite0"),
    "tinytl": ("mobilenetv2_100",),
    "lean": ("mobilenetv3_small_100",),
    "sherl": ("resnet18_cifar", "vit_tiny_patch16_224"),
    "unipt": ("resnet18_cifar",),
    "lst": ("vit_tiny_patch16_224",),
    "adab2n": ("mobilenetv2_100",),
    "bn_stats": ("resnet18_cifar", "efficientnet_lite0"),
    "tent": ("efficientnet_lite0", "vit_tiny_patch16_224"),
    "eata": ("resnet18_cifar",),
    "ecotta": ("resnet18_cifar",),
}
SMALL = ("mlp", "simple_cnn")
GATES = ("simple_cnn", "test_efficientnet", "test_vit2")
Cell = tuple[str, str]
KEY = " | "


def methods() -> list[str]:
    """Ways to fine-tune, and every other exportable method."""
    from contlearn import strategies

    others = [name for name in strategies.list() if strategies.describe(name).exportable and name != "naive"]
    return [*FINE_TUNING, *others]


def step_of(network: str, method: str) -> Any:
    """The step of a method on a network, with training under way: teachers, anchors, momenta and averages are there.

    Raises:
        ContlearnError: they do not fit each other.
    """
    import torch

    from contlearn import models, scenarios, strategies
    from contlearn.scenarios.datasets import ImageData

    shape, options = NETWORKS[network]
    name = method.partition(",")[0]
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    images = torch.randint(0, 256, (len(labels), *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageData(
        name="made_up", train_images=images, test_images=images[:6], train_targets=labels, test_targets=labels[:6],
        class_names=tuple("abcdef"),
    )  # fmt: skip
    stream = scenarios.class_incremental(data, n_experiences=EXPERIENCES)
    adapts = strategies.describe(name).kind == "test-time"
    torch.manual_seed(0)
    model = models.create(
        network, stream, seed=0, head="fixed" if adapts else "growing", trainable=FINE_TUNING.get(method), **options
    )
    if adapts:
        adapter = strategies.create(name, model, guard="off", device="cpu", **OPTIONS.get(name, {})).start()
        adapter(torch.rand(BATCH, *shape, generator=torch.Generator().manual_seed(0)))
        return adapter.declare_step(batch_size=BATCH, input_shape=shape)
    strategy = strategies.create(
        name, model, lr=0.01, momentum=0.9, epochs=1, batch_size=BATCH, device="cpu", **OPTIONS.get(name, {})
    )
    for experience in list(stream.train_stream)[:2]:
        strategy.train(experience, eval_streams=[])
    return strategy.declare_step(batch_size=BATCH, input_shape=shape, classes=CLASSES)


def session_options() -> Any:
    """ONNX Runtime's defaults on one thread; what it says goes nowhere."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return options


def measured(network: str, method: str) -> dict[str, Any]:
    """One cell: errors of one step and drift of many, or why there is no such pair."""
    from contlearn.edge.capture import capture, capture_predict
    from contlearn.edge.onnx import lower
    from contlearn.edge.verify import ROUNDING, examine
    from contlearn.errors import ContlearnError

    try:
        step = step_of(network, method)
        captured, asked = capture(step), capture_predict(step)
    except ContlearnError as reason:
        return {"reason": str(reason)}
    adapt = lower(captured)
    report = examine(step, adapt, lower(asked), options=session_options())
    ratios = {name: one.graph / max(one.other, 1e-300) for name, one in report.rounding.items()}
    strict = [one.graph > ROUNDING * one.pytorch for one in report.rounding.values()]
    worst = sorted(ratios, key=lambda name: -ratios[name])[:3]
    return {
        **report.figures,
        "faults": report.faults,
        "nodes": len(adapt.graph.node),
        "tensors": len(step.state),
        "rounding": len(ratios),
        "rounding_ratio": max(ratios.values(), default=0.0),
        "rounding_by_other": sum(strict),
        "rounding_worst": {name: report.rounding[name] for name in worst},
        "tiers": list(report.tiers),
    }


def gates(network: str, profile: str) -> dict[str, Any]:
    """What a profile promises, looked for in the graph that fine-tunes a network; and one step in ONNX Runtime."""
    import onnx
    from onnx import shape_inference

    from contlearn.edge.capture import capture
    from contlearn.edge.onnx import lower
    from contlearn.edge.verify import examine

    NETWORKS.setdefault(network, ((3, 32, 32), {}))
    step = step_of(network, "naive, all")
    model = lower(capture(step, profile=profile))
    onnx.checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    places = [*inferred.input, *inferred.output, *inferred.value_info]
    constants = {place.name for place in model.graph.initializer}
    constants |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    open_axes, reducing, indices = 0, 0, 0
    for node in model.graph.node:
        indices += node.op_type == "MaxPool" and len(node.output) > 1
        reducing += node.op_type.startswith("Scatter") and any(
            one.name == "reduction" and one.s not in (b"", b"none") for one in node.attribute
        )
        if node.op_type in ("Slice", "Pad") or node.op_type.startswith("Reduce"):
            open_axes += any(name and name not in constants for name in node.input[1:])
    report = examine(step, model, many=False, options=session_options())
    return {
        "domains": sorted({node.domain for node in model.graph.node} | {one.domain for one in model.opset_import}),
        "opset": model.opset_import[0].version,
        "nodes": len(model.graph.node),
        "places": len(places),
        "places_without_fixed_shape": sum(not _fixed(place) for place in places),
        "pooling_with_indices": indices,
        "reducing_scatters": reducing,
        "axes_at_run_time": open_axes,
        "fixed_by_checker": True,
        **report.figures,
        "faults": report.faults,
    }


def _fixed(place: Any) -> bool:
    kind = place.type.tensor_type
    return kind.HasField("shape") and all(size.HasField("dim_value") for size in kind.shape.dim)


def _isolated(function: Any, cell: Cell, pipe: Any) -> None:
    """In a process of its own: send what was found."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    try:
        found = function(*cell)
    except Exception as error:  # the table shows it, and the run goes on
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    pipe.send_bytes(json.dumps({**found, "seconds": round(time.perf_counter() - started, 1)}).encode())


def results(function: Any, cells: Sequence[Cell], jobs: int, limit: float) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cells with what ``function`` found, as they end; at most ``jobs`` at a time and ``limit`` seconds each."""
    context = multiprocessing.get_context("fork")
    waiting = list(cells)
    running: dict[Any, tuple[Cell, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_isolated, args=(function, cell, theirs), daemon=True)
                process.start()
                theirs.close()
                running[mine] = (cell, process, time.monotonic())
            ready = multiprocessing.connection.wait(list(running), timeout=1.0)
            for pipe, (cell, process, started) in list(running.items()):
                if pipe in ready:
                    try:
                        found = json.loads(pipe.recv_bytes())
                    except EOFError:
                        process.join()
                        found = {"error": f"the process ended with exit code {process.exitcode}"}
                elif time.monotonic() - started > limit:
                    process.kill()
                    found = {"error": f"not done after {limit:g} s"}
                else:
                    continue
                process.join()
                del running[pipe]
                yield cell, found
    finally:
        for _, process, _ in running.values():
            process.kill()


def main() -> None:
    """Measure what is missing and write benchmarks/results/edge_parity.json after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--strategies", nargs="*", help="naive: all ways to fine-tune; no name: the gates alone")
    parser.add_argument("--whole", action="store_true", help="every method on every network")
    parser.add_argument("--no-gates", action="store_true", help="leave the target profiles out")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per cell")
    parser.add_argument("--again", action="store_true", help="measure cells that the file holds already")
    parser.add_argument("--table", action="store_true", help="print the file's tables as Markdown")
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/edge_parity.json)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cells end with it
    path = Path(given.out) if given.out else common.RESULTS / "edge_parity.json"
    content: dict[str, Any] = {"setting": __doc__, "cells": {}, "gates": {}}
    if path.exists():
        content.update({key: json.loads(path.read_text(encoding="utf-8"))[key] for key in ("cells", "gates")})
    if given.table:
        print("\n".join(tables(content)))
        return
    _measure(given, content)


def _measure(given: argparse.Namespace, content: dict[str, Any]) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from contlearn import strategies
    from contlearn.edge.rules.registry import PROFILES
    from contlearn.errors import unknown_name

    records = [strategies.describe(name) for name in strategies.list()]
    content["not_exportable"] = {
        record.name: (record.load_plugin() if record.plugin else record.load()).not_exportable
        for record in records if not record.exportable
    }  # fmt: skip
    known = {method: method.partition(",")[0] for method in methods()}
    for name in given.strategies or ():
        if name not in known.values():
            raise SystemExit(str(unknown_name("exportable strategy", name, set(known.values()))))
    chosen = [method for method, name in known.items() if given.strategies is None or name in given.strategies]
    whole = given.whole or given.strategies is not None
    wanted = [(n, m) for m in chosen for n in given.networks if whole or m in FINE_TUNING or n in HOMES.get(m, SMALL)]
    profiles = [] if given.no_gates else [(network, profile) for network in GATES for profile in PROFILES]
    tasks = [("cells", measured, wanted), ("gates", gates, profiles)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, auto_refresh=False) as bar:  # no thread of its own: cells are forked
        shown = bar.add_task("parity", total=sum(len(cells) for *_, cells in tasks))
        for kind, function, cells in tasks:
            held = content[kind]
            missing = [cell for cell in cells if given.again or "error" in held.get(KEY.join(cell), {"error": ""})]
            bar.update(shown, advance=len(cells) - len(missing), refresh=True)
            for cell, found in results(function, missing, given.jobs, given.limit):
                held[KEY.join(cell)] = found
                common.write("edge_parity", content, given.out)
                bar.console.print(f"{KEY.join(cell):45} {_line(found)}", highlight=False, soft_wrap=True)
                bar.update(shown, advance=1, refresh=True)


def _line(found: dict[str, Any]) -> str:
    """What a cell found, in a line."""
    if "reason" in found or "error" in found:
        return str(found.get("reason") or f"ERROR {found['error']}")
    shown = f"loss {found['loss']:.0e}, update {found['update']:.0e}"
    if "rounding" in found:
        shown += f", rounding {found['rounding']} (x{found['rounding_ratio']:.1f})"
    if "drift" in found:
        shown += f", drift {found['drift']:.0e} of {found['control_drift']:.0e}"
    return f"{shown}; {'; '.join(found['faults']) or 'ok'} ({found['seconds']} s)"


def tables(content: dict[str, Any]) -> Iterator[str]:
    """Markdown: the cells by network, the pairs that make no sense, the gates."""
    yield "| network | method | loss | update | rounding only | drift after 20 steps | of the control | |"
    yield "|---|---|---|---|---|---|---|---|"
    order = {name: index for index, name in enumerate([*NETWORKS, *methods()])}
    cells = {tuple(key.split(KEY)): found for key, found in content["cells"].items()}
    for (network, method), found in sorted(cells.items(), key=lambda item: [order.get(part, 99) for part in item[0]]):
        if "loss" not in found:
            continue
        few = f"{found['rounding']} of {found['tensors']}"
        few += f", x{found['rounding_ratio']:.1f}" if found["rounding"] else ""
        drift = f"{found['drift']:.1e} | {found['control_drift']:.1e}" if "drift" in found else "- | -"
        verdict = "; ".join(found["faults"]) or "holds"
        yield f"| {network} | {method} | {found['loss']:.1e} | {found['update']:.1e} | {few} | {drift} | {verdict} |"
    yield ""
    yield "| network | method | why there is no such pair |"
    yield "|---|---|---|"
    for (network, method), found in cells.items():
        if "loss" not in found:
            yield f"| {network} | {method} | {_line(found)} |"
    yield ""
    heads = ("network", "profile", "nodes", "domains", "no fixed shape", "pooling with indices", "reducing scatters",
             "axes at run time", "loss", "update", "")  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for key, found in content["gates"].items():
        network, profile = key.split(KEY)
        if "loss" not in found:
            yield f"| {network} | {profile} | {_line(found)} |"
            continue
        domains = ", ".join(domain or "default" for domain in found["domains"])
        open_shapes = f"{found['places_without_fixed_shape']} of {found['places']}"
        names = ("pooling_with_indices", "reducing_scatters", "axes_at_run_time")
        counts = " | ".join(str(found[name]) for name in names)
        yield (
            f"| {network} | {profile} | {found['nodes']} | {domains} | {open_shapes} | {counts} | {found['loss']:.1e} "
            f"| {found['update']:.1e} | {'; '.join(found['faults']) or 'holds'} |"
        )


if __name__ == "__main__":
    main()
