"""Tensors that took long to make, kept between runs: one checked safetensors file per key under ``CONTLEARN_CACHE``.

A key is a hash of everything that decides the tensors; an entry appears whole or not at all, and one that does not
match its checksum is made again. Everything in the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from contlearn import results
from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_bytes

try:
    import fcntl
except ImportError:  # Windows has no such locks: two processes may then both do the work
    fcntl = None  # type: ignore[assignment]

Tensors = dict[str, Tensor]
FOLDER = "source"
VERSION = 1  # of what the entries mean; another one makes all of them again
_CHUNK = 4096  # images hashed at a time


class Undescribable(Exception):
    """Something that decides the tensors has no description that tells it from another of its kind."""


def entry(key: str) -> Path:
    """The file of a key."""
    from contlearn.scenarios.datasets.locate import cache_directory

    return cache_directory() / FOLDER / f"{key}.safetensors"


def load(key: str, say: Callable[[str], None]) -> Tensors | None:
    """The tensors of a key; ``None`` where there is no whole entry. A damaged one is told of and counts as none."""
    path = entry(key)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            wanted = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        say(f"{path}: damaged ({' '.join(str(error).split())}); making it again")
        return None
    if digest(tensors) != wanted:
        say(f"{path}: damaged (checksum mismatch); making it again")
        return None
    return tensors


def store(key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors under a key.

    Raises:
        ContlearnError: the folder cannot be written.
    """
    path = entry(key)
    # Tied weights share storage, which the format refuses: each name gets its own copy.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, save_tensors(copies, metadata={"sha256": digest(copies)}))
    except OSError as error:
        raise _unwritable(path.parent, error.strerror or str(error)) from error
    except ContlearnError as error:
        raise _unwritable(path.parent, str(error)) from error


@contextlib.contextmanager
def locked(key: str, waiting: Callable[[], None], patience: Callable[[], bool]) -> Iterator[None]:
    """Hold a key, so that of several processes one does the work and the others find its result.

    Args:
        key: what is about to be made.
        waiting: called once where another process holds it.
        patience: asked twice a second while waiting; ``False`` stops waiting.

    Raises:
        ContlearnError: the folder cannot be written, which is better known before the work than after it.
    """
    path = entry(key).with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path.parent, error.strerror or str(error)) from error
    told = False
    try:
        while fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    waiting()
                told = True
                if not patience():
                    break
                time.sleep(0.5)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)


def key_of(**parts: Any) -> str:
    """A key of plain values, and of the versions of the libraries that make the numbers."""
    packages = results.environment()["packages"]
    content = {"version": VERSION, "packages": packages, "threads": torch.get_num_threads(), **parts}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in hex: names, types, shapes and bytes, in order of name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def fingerprint(dataset: AvalancheDataset[Any], spec: Mapping[str, Any]) -> list[Any]:
    """What tells the samples of a data set, as they are served now, from others: plain values for :func:`key_of`.

    Images in memory count by content, images in files by the options of their stream and their labels.

    Raises:
        Undescribable: a transform of the user's own.
    """
    from contlearn.strategies.loader import BatchSource, _transforms

    found = hashlib.sha256()
    source = BatchSource(dataset)
    if not source.batched:
        if spec.get("transform") is not None:
            raise Undescribable
        found.update(json.dumps([int(label) for label in dataset.targets]).encode())
        return ["files", _plain(dict(spec)), len(dataset), found.hexdigest()]
    for positions in torch.arange(len(source)).split(_CHUNK):
        images, targets, *_ = source.raw(positions)
        found.update(json.dumps([str(images.dtype), list(images.shape)]).encode())
        found.update(images.contiguous().numpy().tobytes())
        found.update(targets.contiguous().numpy().tobytes())
    return ["tensors", found.hexdigest(), _plain(_transforms(dataset._flat_data))]


def _plain(value: Any) -> Any:
    """A transform, or an option, as plain values."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, nn.Module):  # torchvision's transforms say what they are
        return [kind, repr(value)]
    if kind.startswith("contlearn.") and hasattr(value, "__dict__"):
        return [kind, {name: _plain(item) for name, item in sorted(vars(value).items())}]
    raise Undescribable


def _unwritable(folder: Path, reason: str) -> ContlearnError:
    return ContlearnError(
        f"cache: cannot write {str(folder)!r} ({reason}); CONTLEARN_CACHE names another folder, or strategy.source the "
        "weights"
    )
