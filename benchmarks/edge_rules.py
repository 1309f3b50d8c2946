"""Latency of alternative forms of backward rules in onnxruntime, as ratios to PyTorch's own operators.

    python benchmarks/edge_rules.py [--threads 1] [--repeats 9] [--clock cpu] [--only depthwise]

Each form is traced, lowered to ONNX and run in turns with PyTorch's eager operator in one process; the figure is the
median of milliseconds over the median of PyTorch's. ``--clock cpu`` counts this thread's processor time (one thread
only), which other load on the machine hardly moves; ``--clock wall`` is for a quiet machine and any number of threads.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import common

# channels in, channels out, groups, kernel, stride, size
DEPTHWISE = [
    (96, 96, 96, 3, 1, 48), (96, 96, 96, 3, 2, 48), (144, 144, 144, 3, 1, 24), (144, 144, 144, 3, 2, 24),
    (192, 192, 192, 3, 1, 12), (240, 240, 240, 5, 1, 12), (384, 384, 384, 3, 1, 6), (576, 576, 576, 5, 1, 6),
    (960, 960, 960, 3, 1, 3),
]  # fmt: skip
DENSE = [
    (64, 64, 1, 3, 1, 32), (32, 64, 1, 3, 2, 24), (3, 32, 1, 3, 2, 96), (96, 24, 1, 1, 1, 56), (24, 144, 1, 1, 1, 24),
    (384, 64, 1, 1, 1, 12), (960, 160, 1, 1, 1, 3), (64, 64, 4, 3, 1, 12),
]  # fmt: skip
SHAPES = {"depthwise": DEPTHWISE, "dense": DENSE}


def session(function: Callable[..., Any], inputs: tuple[Any, ...], threads: int) -> Callable[[], Any]:
    """The function in onnxruntime, with the inputs bound."""
    import onnxruntime
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(*inputs)
    content = torch.onnx.export(graph, inputs, dynamo=True, opset_version=18, verbose=False).model_proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    made = onnxruntime.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {value.name: tensor.numpy() for value, tensor in zip(made.get_inputs(), inputs, strict=True)}
    return lambda: made.run(None, feed)


def with_rest(form: Callable[..., Any], *rest: Any) -> Callable[[Any, Any], Any]:
    """A function of two tensors: a tracer would count defaults as inputs."""
    return lambda gradient, other: form(gradient, other, *rest)


def medians(runs: dict[str, Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each, in turns; the first two turns are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            start = clock()
            run()
            if turn >= 2:
                taken[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def convolution(shape: tuple[int, ...], batch: int, threads: int, repeats: int, clock: Any) -> list[dict[str, Any]]:
    """One record per gradient, and per output of a depthwise one: PyTorch's ms, ratios to it, the choice."""
    import torch

    from contlearn.edge.rules import PROFILES
    from contlearn.edge.rules import convolution_forward as forward
    from contlearn.edge.rules.convolution import INPUT_FORMS, choose_input
    from contlearn.edge.rules.convolution_weight import FORMS, Geometry, choose

    inner, outer, groups, kernel, stride, size = shape
    padding = kernel // 2
    how = Geometry((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), groups)
    x, weight = torch.randn(batch, inner, size, size), torch.randn(outer, inner // groups, kernel, kernel)
    gradient = torch.randn_like(torch.conv2d(x, weight, None, stride, padding, 1, groups))
    rest = ([0], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
    depthwise = groups == inner == outer

    def eager(mask: list[bool]) -> Callable[[], Any]:
        if not any(mask):
            return lambda: torch.conv2d(x, weight, None, stride, padding, 1, groups)
        return lambda: torch.ops.aten.convolution_backward(gradient, x, weight, *rest, mask)

    records = []
    usable = {
        name: with_rest(form, how)
        for name, form in FORMS.items()
        if (name not in ("rows", "pixels", "products") or depthwise)
        and (name != "pixels" or size**4 <= 40_000)
        and (name != "folded shifts" or groups == 1)
    }
    wholes = {
        "dX": (
            {
                name: with_rest(form, [size] * 2, how)
                for name, form in INPUT_FORMS.items()
                if (name != "pixels" or (depthwise and size**4 <= 40_000))
                and (name != "product" or (groups == 1 and kernel == stride == 1))
            },
            (gradient, weight), [True, False, False], choose_input(gradient.shape, x.shape, how),
        ),
        "dW": (
            usable, (gradient, x), [False, True, False],
            choose(PROFILES["onnxruntime"], gradient.shape, x.shape, how),
        ),
    }  # fmt: skip
    if depthwise:
        products = {name: form for name, form in forward.FORMS.items() if name != "pixels" or size**4 <= 40_000}
        operator = {"operator": lambda given, by: torch.conv2d(given, by, None, stride, padding, 1, groups)}
        wholes["y"] = (
            {**operator, **{name: with_rest(form, how) for name, form in products.items()}}, (x, weight), [False] * 3,
            forward.choose(PROFILES["onnxruntime"], x.shape, weight.shape, how) or "operator",
        )  # fmt: skip
    for which, (forms, inputs, mask, chosen) in wholes.items():
        runs = {name: session(form, inputs, threads) for name, form in forms.items()}
        found = medians({"eager": eager(mask), **runs}, repeats, clock)
        own = found.pop("eager")
        ratios = {name: round(value / own, 2) for name, value in found.items()}
        record = {
            "gradient": which, "in": inner, "out": outer, "groups": groups, "kernel": kernel, "stride": stride,
            "size": size, "eager_ms": round(own, 3), "ratios": ratios, "chosen": chosen,
        }  # fmt: skip
        print(record, flush=True)
        records.append(record)
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table; the chosen form is bold."""
    lines = ["| shape | gradient | eager, ms | ratio by form |", "|---|---|---|---|"]
    for r in records:
        kind = "depthwise" if r["groups"] == r["in"] else f"{r['groups']} groups" if r["groups"] > 1 else "dense"
        shape = f"{r['in']}->{r['out']} {kind}, {r['kernel']}x{r['kernel']}/{r['stride']}, {r['size']} px"
        forms = ", ".join(
            f"**{name} {ratio}**" if name == r["chosen"] else f"{name} {ratio}"
            for name, ratio in sorted(r["ratios"].items(), key=lambda item: item[1])
        )
        lines.append(f"| {shape} | {r['gradient']} | {r['eager_ms']} | {forms} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu")
    parser.add_argument("--only", choices=list(SHAPES), default=None)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads > 1:
        parser.error("--clock cpu counts one thread: use --clock wall with more")
    common.use_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    shapes = [shape for name, members in SHAPES.items() if options.only in (None, name) for shape in members]
    records = [
        record
        for shape in shapes
        for record in convolution(shape, options.batch, options.threads, options.repeats, clock)
    ]
    print(table(records))
    print(common.write("edge_rules", {"records": records, "batch": options.batch}, options.out))


if __name__ == "__main__":
    main()
