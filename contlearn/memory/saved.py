"""Activations: bytes of the storages that autograd keeps for the backward pass, and what else a step allocates."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_key(tensor: Tensor) -> int:
    """Identity of a tensor's storage while it is alive."""
    return int(tensor.untyped_storage()._cdata)


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's whole storage: a saved view keeps all of it alive."""
    return int(tensor.untyped_storage().nbytes())


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once."""
    return sum({storage_key(tensor): storage_bytes(tensor) for tensor in tensors}.values())


class _Held:
    """What autograd holds in place of a saved tensor; it goes when the graph lets go of it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedForBackward:
    """Counts storages saved for backward, deduplicated, through saved-tensor hooks.

    Storages of parameters and buffers are weights and not counted; an input that is saved (the first trained layer
    needs it) is counted once, however many layers save it or a view of it.

    Args:
        exclude: tensors whose storages are accounted for elsewhere.

    Attributes:
        live: bytes saved at this moment.
        peak: largest ``live`` so far.
    """

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        # Keep them alive: a key is only unique while its storage is.
        self._excluded_tensors = list(exclude)
        self._excluded = {storage_key(tensor) for tensor in self._excluded_tensors}
        self._uses: dict[int, int] = {}
        self.live = 0
        self.peak = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[SavedForBackward]:
        """Count what is saved inside the block."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield self

    def _pack(self, tensor: Tensor) -> _Held:
        # Detached: an output that held its own graph through this object would never be freed.
        held = _Held(tensor.detach())
        key = storage_key(tensor)
        if key not in self._excluded:
            if key not in self._uses:
                self._uses[key] = 0
                self.live += storage_bytes(tensor)
                self.peak = max(self.peak, self.live)
            self._uses[key] += 1
            weakref.finalize(held, self._release, key, storage_bytes(tensor))
        return held

    def _unpack(self, held: _Held) -> Tensor:
        return held.tensor

    def _release(self, key: int, size: int) -> None:
        self._uses[key] -= 1
        if self._uses[key] == 0:
            del self._uses[key]
            self.live -= size


class LiveStorages(TorchDispatchMode):
    """Bytes of every storage that operators allocate, from birth to death: what is live at the worst moment of a step.

    Args:
        known: tensors that exist already and are accounted for elsewhere.
        tracked: tensors that exist already and may be freed inside (gradients of the last step); they count as live.

    Attributes:
        live: bytes alive now.
        peak: largest ``live`` so far.
    """

    def __init__(self, known: Iterable[Tensor], tracked: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known_tensors = list(known)
        self._known = {storage_key(tensor) for tensor in self._known_tensors}
        self._references: dict[int, weakref.ref[Any]] = {}
        self.live = 0
        self.peak = 0
        for tensor in tracked:
            self._track(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and note the storages of its results."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._track(leaf)
        return out

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = int(storage._cdata), int(storage.nbytes())
        if key in self._known or key in self._references or size == 0:
            return

        def died(_: Any) -> None:
            self._references.pop(key, None)
            self.live -= size

        self._references[key] = weakref.ref(storage, died)
        self.live += size
        self.peak = max(self.peak, self.live)
