"""The folder that goes to a device: written whole or not at all, read back with every checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from contlearn.edge.manifest import check
from contlearn.edge.runner.contract import MANIFEST, load_manifest, verify_files
from contlearn.edge.runner.errors import RunnerError
from contlearn.edge.runner.tensors import encode_tensors, read_tensors
from contlearn.edge.runtime import runner_source
from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_text, unwritable

MUTABLE = ("budget", "peak_measured", "peak_measured_how", "peak_static", "tiers")


@dataclass(frozen=True)
class Artifact:
    """An artifact that was read and found whole.

    Args:
        folder: where it lies.
        manifest: checked, optional entries filled in.
    """

    folder: Path
    manifest: dict[str, Any]

    def state(self) -> dict[str, np.ndarray]:
        """The shipped state, read-only views of the file."""
        return read_tensors(self.folder / self.manifest["state"]["file"])[0]

    def graphs(self, role: str) -> list[Path]:
        """The files of ``adapt`` or ``predict``, in the order they run."""
        return [self.folder / name for name in self.manifest["graphs"][role]]


def write(
    folder: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    graphs: Mapping[str, bytes | Path],
    state: Mapping[str, np.ndarray],
    *,
    overwrite: bool = False,
) -> Artifact:
    """Write an artifact; ``folder`` appears when all of it is there.

    Args:
        folder: where; its parent must exist.
        manifest: from :func:`contlearn.edge.manifest.build`; ``files`` is filled in here.
        graphs: content, or a file or folder to copy, by the name it gets in the artifact; side files (external data)
            too.
        state: the shipped state by name.
        overwrite: replace an artifact that is there, and what it learned; anything else is never replaced.

    Raises:
        ContlearnError: something is there already, the manifest does not hold, or the folder cannot be written.
    """
    target = Path(folder)
    if target.exists() and not (overwrite and (target / MANIFEST).is_file()):
        expected = "an artifact" if overwrite else "a new folder, or overwrite"
        raise ContlearnError(f"cannot write the artifact: {str(target)!r} exists; expected {expected}")
    temporary = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        for name, graph in graphs.items():
            _place(temporary, name, graph)
        with open(temporary / manifest["state"]["file"], "wb") as file:
            for piece in encode_tensors(state):
                file.write(piece)
        (temporary / "runner.py").write_text(runner_source(), encoding="utf-8")
        check({**manifest, "files": _files(temporary)}, str(target / MANIFEST))
        (temporary / "README.md").write_text(readme(manifest), encoding="utf-8")
        content = {**manifest, "files": _files(temporary)}
        (temporary / MANIFEST).write_text(_dump(content), encoding="utf-8")
        read(temporary)
        _sync(temporary)
        if target.exists():
            aside = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
            os.replace(target, aside)
            os.replace(temporary, target)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
    except RunnerError as error:
        raise ContlearnError(str(error)) from error
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
    return read(target)


def read(folder: str | os.PathLike[str]) -> Artifact:
    """Read and check an artifact: manifest, every checksum, and that the state is what the manifest says.

    Raises:
        ContlearnError: it is incomplete, altered, too new, or no artifact.
    """
    where = Path(folder)
    try:
        content = load_manifest(where)
        verify_files(where, content, unread=True)
        tensors = read_tensors(where / content["state"]["file"])[0]
    except RunnerError as error:
        raise ContlearnError(str(error)) from error
    manifest = check(content, str(where / MANIFEST))
    found = {name: [array.dtype.name, list(array.shape)] for name, array in tensors.items()}
    expected = {name: [e["dtype"], e["shape"]] for name, e in manifest["state"]["tensors"].items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            got = found.get(name, "nothing")
            raise ContlearnError(f"{where}: state tensor {name!r}: expected {expected.get(name, 'nothing')}, got {got}")
    return Artifact(where, manifest)


def update(folder: str | os.PathLike[str], **entries: Any) -> Artifact:
    """Change what is known only after writing: ``peak_measured`` with ``peak_measured_how``, ``tiers``, ``budget``.

    Raises:
        ContlearnError: another entry, a value that does not hold, or the file cannot be written.
    """
    artifact = read(folder)
    for key in entries:
        if key not in MUTABLE:
            raise ContlearnError(f"cannot change {key!r} of an artifact; expected one of: {', '.join(MUTABLE)}")
    path = artifact.folder / MANIFEST
    content = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    text = readme(content)
    # The guide first, with its checksum in the manifest: a runner reads neither it nor its checksum.
    data = text.encode("utf-8")
    content["files"] = {**content["files"], "README.md": _entry(data)}
    check(content, str(path))
    atomic_write_text(artifact.folder / "README.md", text)
    atomic_write_text(path, _dump(content))
    return read(folder)


def readme(manifest: Mapping[str, Any]) -> str:
    """The guide that lies in an artifact."""
    specs = {spec["meaning"]: spec for spec in manifest["inputs"]}
    labels, frames = "labels" in specs, specs["frames"]
    tensors = manifest["state"]["tensors"]
    rule, memory = manifest.get("preprocessing"), manifest.get("memory")
    sizes = [int(np.prod(e["shape"], dtype=np.int64)) * np.dtype(e["dtype"]).itemsize for e in tensors.values()]
    graphs = [f"`{name}`" for role in ("adapt", "predict") for name in manifest["graphs"][role]]
    measured, how = manifest.get("peak_measured"), manifest.get("peak_measured_how")
    coreml = manifest["target"] == "coreml"
    names = manifest.get("classes") or []
    return Template(resources.files("contlearn.edge").joinpath("readme.md").read_text(encoding="utf-8")).substitute(
        model=manifest["model"],
        method=manifest["method"],
        runtime="Core ML ML Programs" if coreml else f"ONNX (opset {manifest['opset']})",
        batch_size=manifest["batch_size"],
        frames=frames["shape"][1:],
        frames_dtype=frames["dtype"],
        labels="needed in every step" if labels else "none",
        classes=", ".join(map(str, names[:20])) + (f", ... ({len(names)})" if len(names) > 20 else "") or "not named",
        state_bytes=sum(sizes),
        state_count=len(tensors),
        updated_count=sum(spec["meaning"] == "state" for spec in manifest["outputs"]),
        memory=f"{memory['capacity']} frames, {memory['policy']}, {memory['dtype']}" if memory else "none",
        lr=manifest.get("hyperparameters", {}).get("lr", "none"),
        peak_static=_bytes(manifest.get("peak_static") or None),
        peak_measured=_bytes(measured) + (f" ({how})" if measured is not None else ""),
        budget=_bytes(manifest.get("budget")),
        tiers=", ".join(manifest.get("tiers") or []) or "not verified",
        graphs=f"{', '.join(graphs)}: the step and the prediction.",
        step_labels=", labels" if labels else "",
        cli_labels=" --labels labels.npy" if labels else "",
        raw=f"raw {rule['input']} or prepared float32" if rule else frames["dtype"],
        coreml="The packages here are Core ML's; `runner.py` does not run them. " if coreml else "",
    )


def _bytes(count: int | None) -> str:
    return "not given" if count is None else f"{count} bytes"


def _place(folder: Path, name: str, content: bytes | Path) -> None:
    target = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or target.exists():
        raise ContlearnError(f"graphs: {name!r} is no free name inside an artifact")
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    elif content.is_dir():
        shutil.copytree(content, target)
    else:
        shutil.copyfile(content, target)


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _files(folder: Path) -> dict[str, Any]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _entry(path.read_bytes()) for path in found}


def _dump(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ContlearnError(f"manifest: expected plain JSON values ({error})") from error


def _sync(folder: Path) -> None:
    """Bring every file of a new folder to the disk, before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
