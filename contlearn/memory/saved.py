"""Activations: bytes of the storages that autograd keeps for the backward pass, and what else a step allocates."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROWS = ("crow_indices", "col_indices", "values")
_COLUMNS = ("ccol_indices", "row_indices", "values")
_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _ROWS,
    torch.sparse_bsr: _ROWS,
    torch.sparse_csc: _COLUMNS,
    torch.sparse_bsc: _COLUMNS,
}


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages behind a tensor: one, or those of the indices and values of a sparse one."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    return [getattr(tensor, part)().untyped_storage() for part in _PARTS.get(tensor.layout, ())]


def key_of(storage: torch.UntypedStorage) -> int:
    """Identity of a storage while it is alive."""
    return int(storage._cdata)


def by_key(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages behind tensors by identity: each once, whole, since a view keeps all of its storage alive."""
    return {key_of(storage): storage for tensor in tensors for storage in storages(tensor)}


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once."""
    return sum(int(storage.nbytes()) for storage in by_key(tensors).values())


def _weakly(tensors: Iterable[Tensor]) -> weakref.WeakValueDictionary[int, torch.UntypedStorage]:
    """Storages by identity for as long as they live: what is freed may leave its identity to another."""
    return weakref.WeakValueDictionary(by_key(tensors))


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
        self._excluded = _weakly(exclude)
        self._uses: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
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
        for key, storage in by_key([tensor]).items():
            if key in self._excluded:
                continue
            if key not in self._uses:
                self._uses[key], self._sizes[key] = 0, int(storage.nbytes())
                self.live += self._sizes[key]
                self.peak = max(self.peak, self.live)
            self._uses[key] += 1
            weakref.finalize(held, self._release, key)
        return held

    def _unpack(self, held: _Held) -> Tensor:
        return held.tensor

    def _release(self, key: int) -> None:
        self._uses[key] -= 1
        if self._uses[key] == 0:
            del self._uses[key]
            self.live -= self._sizes.pop(key)


class LiveStorages(TorchDispatchMode):
    """Bytes of every storage that operators allocate, from birth to death: what is live at the worst moment of a step.

    Args:
        known: tensors that exist already and are accounted for elsewhere.
        tracked: tensors that exist already and count as live until they are freed.

    Attributes:
        live: bytes alive now.
        peak: largest ``live`` so far.
    """

    def __init__(self, known: Iterable[Tensor] = (), tracked: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = _weakly(known)
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
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
        for key, storage in by_key([tensor]).items():
            if key in self._known:
                continue
            if key not in self._references:
                # Not ``self``: its weak references would keep it alive, and they go when it goes.
                died = functools.partial(_died, weakref.ref(self), key)
                self._references[key] = weakref.ref(storage, died)
            size = int(storage.nbytes())  # another than before where an operator resized it
            self.live += size - self._sizes.get(key, 0)
            self._sizes[key] = size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self.live -= self._sizes.pop(key)


def _died(owner: weakref.ref[LiveStorages], key: int, _: Any) -> None:
    live = owner()
    if live is not None:
        live._forget(key)
