"""The commands ``contlearn export`` and ``contlearn adapt``."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from contlearn.errors import ContlearnError

STAGES = {
    "step": "declare the step", "capture": "capture forward, backward and update", "lower": "lower to ONNX",
    "verify": "verify against PyTorch", "measure": "measure in a fresh process", "write": "write",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Errors become one line and exit code 2, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ContlearnError(f"{self.prog.removeprefix('contlearn ')}: {message}")


def _at_least_one(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return value


# ---------------------------------------------------------------------- export


def _export_parser() -> _Parser:
    parser = _Parser(
        prog="contlearn export",
        description="Write the training or adaptation step of a strategy, and its state, as a folder for a device that "
        "has a stock inference runtime.",
        epilog="A configuration is exported untrained, a run folder as training left it. Options of the configuration "
        "can be given as --SECTION.OPTION=VALUE.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="CONFIG|RUN_DIR", help="YAML file, or the folder of a run")
    add("--out", required=True, metavar="DIR", help="the artifact: a new folder")
    add("--target", default="onnxruntime", help="onnxruntime (default); coreml is not available yet")
    add("--profile", help="whose operators the graphs keep to: onnxruntime (default), tensorrt or coreml")
    add("--budget", metavar="BYTES", help="what a step may take, as in 16MB; an error if it takes more")
    add("--batch-size", type=_at_least_one, metavar="N", help="samples per step; default: the strategy's")
    add("--classes", type=_at_least_one, metavar="N", help="outputs to make room for; default: all of the stream's")
    add("--no-verify", action="store_true", help="do not compare the graphs with PyTorch")
    add("--quiet", action="store_true", help="no progress display and no summary")
    return parser


def export_main(arguments: Sequence[str]) -> int:
    """Run ``contlearn export``; 0 on success.

    Raises:
        ContlearnError: bad input; nothing is written then.
    """
    options, overrides = _export_parser().parse_known_args(list(arguments))
    from contlearn.edge import export as exporting

    exporting.check_target(options.target)
    exporting.check_place(options.out)
    if options.budget is not None:
        from contlearn.memory import parse_bytes

        parse_bytes(options.budget, "--budget")
    from contlearn.domain_progress import DomainProgress
    from contlearn.edge.from_run import exemplars_of, preprocessing_of, ready
    from contlearn.edge.rules.registry import profile

    profile(options.profile or options.target)
    made = ready(options.source, overrides, quiet=options.quiet)
    stream = made.stream
    if made.adapts and options.classes:
        raise ContlearnError("--classes: a test-time adapter has its source model's classes; expected it left out")
    preprocessing = preprocessing_of(stream)
    learns = {} if made.adapts else _learning(made, options.classes or stream.n_classes)
    exemplars = None if made.adapts else exemplars_of(made, learns["classes"], raw=preprocessing is not None)
    done = 0
    progress = DomainProgress(quiet=options.quiet)
    with progress:
        progress.stage("stage", len(STAGES))

        def tell(stage: str) -> None:
            nonlocal done
            if done:
                progress.evaluated(done - 1, None)
            progress.experience(list(STAGES).index(stage), STAGES[stage])
            done = list(STAGES).index(stage) + 1

        artifact = exporting.export(
            made.strategy,
            options.out,
            target=options.target,
            profile=options.profile,
            batch_size=options.batch_size,
            input_shape=stream.input_shape,
            preprocessing=preprocessing,
            class_names=stream.class_names,
            exemplars=exemplars,
            budget=options.budget,
            verify=not options.no_verify,
            tell=tell,
            **learns,
        )
        progress.evaluated(done - 1, None)
    if not options.quiet:
        _show_artifact(artifact)
    return 0


def _learning(made: Any, classes: int) -> dict[str, Any]:
    return {"classes": classes, "open_classes": made.seen, "old_classes": made.seen}


def _show_artifact(artifact: Any) -> None:
    from contlearn.memory import in_words

    manifest, files = artifact.manifest, artifact.manifest["files"]
    sizes = sum(entry["bytes"] for entry in files.values())
    measured = manifest["peak_measured"]
    print(f"artifact: {artifact.folder} ({in_words(sizes)}; {manifest['method']}, {manifest['model']})")
    print(f"peak of a step: {in_words(manifest['peak_static'])} planned, "
          f"{'not measured' if measured is None else in_words(measured) + ' measured'}")  # fmt: skip
    print(f"verified: {', '.join(manifest['tiers'])}")


# ---------------------------------------------------------------------- adapt


def _adapt_parser() -> _Parser:
    parser = _Parser(
        prog="contlearn adapt",
        description="Run an artifact as a device would, over a stream in order, with its runner. Methods that learn "
        "from labels get class-incremental experiences, the others the test frames of the data.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="folder of contlearn export")
    add("--data", required=True, help="digits, mnist5k, another data set, or folder:PATH")
    add("--corruption", metavar="NAME:SEVERITY", help="put on all frames, as in gaussian_noise:5")
    add("--experiences", type=_at_least_one, metavar="N", help="experiences (default: 5, or one per class)")
    add("--epochs", type=_at_least_one, default=1, metavar="N", help="passes over each experience, or the stream")
    add("--steps", type=_at_least_one, metavar="N", help="stop after so many steps")
    add("--lr", type=float, help="learning rate instead of the artifact's")
    add("--state", metavar="DIR", help="where what is learned is kept, and gone on from; default: nowhere")
    add("--provider", default="cpu", help="execution provider: cpu (default), cuda, tensorrt, coreml, qnn, xnnpack")
    add("--threads", type=_at_least_one, help="threads within an operator")
    add("--seed", type=int, default=0, help="of the order of frames, the split and the runner's random numbers")
    add("--out", metavar="FILE", help="where the result goes as JSON")
    add("--quiet", action="store_true", help="no progress display and no summary")
    return parser


def adapt_main(arguments: Sequence[str]) -> int:
    """Run ``contlearn adapt``; 0 on success.

    Raises:
        ContlearnError: bad input.
    """
    options = _adapt_parser().parse_args(list(arguments))
    from contlearn.edge.runner.errors import RunnerError

    if options.seed < 0:
        raise ContlearnError(f"--seed: expected a whole number from 0, got {options.seed}")
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        raise ContlearnError(f"--out: the folder of {options.out!r} does not exist; expected it to be there")
    try:
        with tempfile.TemporaryDirectory() as place:
            result = _adapt(options, Path(options.state) if options.state else Path(place) / "state")
    except RunnerError as error:
        raise ContlearnError(str(error)) from error
    if options.out is not None:
        from contlearn.files import atomic_write_text

        atomic_write_text(options.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    if not options.quiet:
        _show_result(result)
    return 0


def _adapt(options: argparse.Namespace, state: Path) -> dict[str, Any]:
    from contlearn.domain_progress import DomainProgress
    from contlearn.edge import adapt, artifact, device_data
    from contlearn.edge.measure import warm_up
    from contlearn.edge.runner.options import open_options
    from contlearn.edge.runner.session import Session
    from contlearn.memory.process import mark, resident_bytes

    manifest = artifact.read(options.artifact).manifest
    data = device_data.load(manifest, options.data, corruption=options.corruption, seed=options.seed)
    import onnxruntime as ort

    warm_up(ort, open_options(ort, {}, options.threads))
    before = mark()
    session = Session(options.artifact, options.provider, options.threads, state, seed=options.seed)
    if options.lr is not None:
        session.lr = options.lr
    plain = {"epochs": options.epochs, "steps": options.steps, "seed": options.seed}
    progress = DomainProgress(quiet=options.quiet)
    with progress:
        if session.inputs.labelled:
            experiences = options.experiences or min(5, len(data.order))
            found = adapt.learn(session, data, experiences=experiences, progress=progress, **plain)
        elif options.experiences:
            raise ContlearnError(f"--experiences: {manifest['method']!r} adapts without labels; expected it left out")
        else:
            found = adapt.watch(session, data, progress=progress, **plain)
    return {
        "schema": 1,
        "method": manifest["method"],
        "model": manifest["model"],
        "data": options.data,
        "corruption": options.corruption,
        "batch_size": session.batch_size,
        "epochs": options.epochs,
        "seed": options.seed,
        **found,
        "steps": session.steps,
        "trips": session.trips,
        "account": session.account(),
        "peak_static": manifest["peak_static"],
        "peak_measured": None if before is None else resident_bytes("VmHWM") - before,
        "provider": options.provider,
    }


def _show_result(result: dict[str, Any]) -> None:
    from contlearn.memory import in_words

    if "error" in result:
        print(f"error {result['error']:.3f}, {result['error_before']:.3f} without adaptation")
    else:
        for row in result["accuracy_matrix"]:
            print("  ".join("   -" if value is None else f"{value:.2f}" for value in row))
        shown = {key: value for key, value in result["metrics"].items() if value is not None}
        print(", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in shown.items()))
    pace = result["seconds_per_step"]
    took = "" if pace is None else f", {pace * 1000:.3g} ms each"
    print(f"{result['steps']} steps{took}; peak {in_words(result['peak_measured'])} measured")
    for guard, count in result["trips"].items():
        print(f"guard {guard}: tripped {count} times")
