"""Batched tensor indexing over Avalanche data sets: what replaces the per-sample loader.

``BatchSource`` flattens any ``AvalancheDataset`` (subsets and concatenations of subsets, replay buffers) into index
arrays over the tensors it ends in, so that a batch is one gather and one call of the transform. Data sets that end in
something else, or carry per-sample transforms, are read sample by sample, as Avalanche would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.flat_data import ConstantSequence, FlatData
from torch import Tensor

from contlearn.flatdata import flatten, leaf_ids
from contlearn.scenarios.stream import ImageTensors

Batch = list[Tensor]

# Raw bytes gathered at once: large enough to amortise the gather of small images, small enough to stay in cache.
CHUNK_BYTES = 1 << 20
# Samples that sit in several tensors (a memory of many domains) are copied into one up to this size.
COMPACT_BYTES = 64 << 20


def column(attribute: Any) -> Tensor | list[Any]:
    """A data attribute as one tensor ``(n, ...)``, or as a list where its values differ in shape or are not numbers."""
    data = attribute.data
    if isinstance(data, ConstantSequence):
        return torch.full((len(data),), int(data[0])) if len(data) else torch.empty(0, dtype=torch.int64)
    leaves, leaf_of, place_of = flatten(data)
    tensors = [_as_tensor(leaf) for leaf in leaves]
    stacked = [tensor for tensor in tensors if tensor is not None]
    if len(stacked) < len(tensors) or len({tensor.shape[1:] for tensor in stacked}) > 1:
        return [leaves[leaf][place] for leaf, place in zip(leaf_of, place_of, strict=True)]
    if not stacked:
        return torch.empty(0, dtype=torch.int64)
    offsets = np.cumsum([0, *(len(tensor) for tensor in stacked[:-1])])
    rows = torch.from_numpy(offsets[leaf_of] + place_of)
    whole = stacked[0] if len(stacked) == 1 else torch.cat(stacked)
    return whole[rows]


def _as_tensor(leaf: Any) -> Tensor | None:
    """The tensor form of an attribute's leaf, or ``None`` when it has none."""
    kept = getattr(leaf, "tensor", None)
    if isinstance(kept, Tensor):
        return kept
    if isinstance(leaf, ConstantSequence):
        return torch.full((len(leaf),), int(leaf[0]))
    values = list(leaf)
    if all(isinstance(value, Tensor) for value in values):
        return torch.stack(values) if values and len({value.shape for value in values}) == 1 else None
    try:
        return torch.tensor(values)
    except (TypeError, ValueError):
        return None


def _transforms(data: FlatData[Any], group: str | None = None) -> list[Any] | None:
    """The transforms all of ``data`` passes through, in order; ``None`` when they differ or are per sample.

    As in Avalanche, the group of the outermost data set holds for everything it is made of.
    """
    if group is None:
        group = getattr(getattr(data, "_transform_groups", None), "current_group", "train")
    below: list[list[Any] | None] = []
    for child in data._datasets:
        below.append(_transforms(child, group) if isinstance(child, FlatData) else [])
    if any(chain is None for chain in below):
        return None
    chains = [chain for chain in below if chain is not None]
    if any([id(step) for step in chain] != [id(step) for step in chains[0]] for chain in chains[1:]):
        return None
    chain = list(chains[0]) if chains else []
    for groups in (getattr(data, "_frozen_transform_groups", None), getattr(data, "_transform_groups", None)):
        transform = groups[group] if groups is not None else None
        if transform is None:
            continue
        steps = getattr(transform, "transforms", None)
        if steps is None or any(step is not None for step in steps[1:]) or not getattr(steps[0], "batched", False):
            return None
        chain.append(steps[0])
    return chain


@dataclass
class _Fast:
    """Index arrays over tensors: ``images[leaf]`` and ``targets[leaf]`` at ``place``."""

    leaves: list[Any]
    leaf_of: Tensor
    place_of: Tensor
    chain: list[Any]


@dataclass
class _Copied:
    """Samples of several leaves, copied into one."""

    images: Tensor
    targets: Tensor


def _compacted(fast: _Fast) -> _Fast:
    """The same samples from a copy of their own: a memory of many domains is then still one gather a batch."""
    everything = torch.arange(len(fast.place_of))
    images, targets = _gather(fast, everything)
    return _Fast([_Copied(images, targets)], torch.zeros_like(everything), everything, fast.chain)


def _gather(fast: _Fast, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Images and targets at ``positions`` from leaves of any number."""
    place = fast.place_of[positions]
    if len(fast.leaves) == 1:
        return fast.leaves[0].images[place], fast.leaves[0].targets[place]
    owner = fast.leaf_of[positions]
    first = fast.leaves[0]
    images = first.images.new_empty((len(positions), *first.images.shape[1:]))
    targets = first.targets.new_empty(len(positions))
    for number, leaf in enumerate(fast.leaves):
        mine = torch.nonzero(owner == number).squeeze(1)
        images[mine] = leaf.images[place[mine]]
        targets[mine] = leaf.targets[place[mine]]
    return images, targets


class BatchSource:
    """Random access to batches of an Avalanche data set.

    Args:
        dataset: any ``AvalancheDataset``. Its current transform group is the one applied.
        device: where batches are placed; images travel as uint8 and are transformed there.
    """

    def __init__(self, dataset: AvalancheDataset[Any], device: torch.device | str = "cpu") -> None:
        self.dataset = dataset
        self.device = torch.device(device)
        self._fast = self._resolve(dataset)
        self._columns: list[Tensor | list[Any]] = []
        if self._fast is not None:
            self._columns = [column(a) for a in dataset._data_attributes.values() if a.use_in_getitem]

    @staticmethod
    def _resolve(dataset: AvalancheDataset[Any]) -> _Fast | None:
        leaves, leaf_of, place_of = leaf_ids(dataset)
        # Other data sets may have ``images`` too, and do something to them when indexed.
        if not leaves or not all(isinstance(leaf, ImageTensors) for leaf in leaves):
            return None
        chain = _transforms(dataset._flat_data)
        kinds = {(leaf.images.shape[1:], leaf.images.dtype) for leaf in leaves}
        if chain is None or len(kinds) > 1:
            return None
        fast = _Fast(leaves, torch.from_numpy(leaf_of), torch.from_numpy(place_of), chain)
        first = leaves[0].images
        if len(leaves) > 1 and len(leaf_of) * first[0].numel() * first.element_size() <= COMPACT_BYTES:
            return _compacted(fast)
        return fast

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def batched(self) -> bool:
        """Whether batches are gathered from tensors rather than read sample by sample."""
        return self._fast is not None

    @property
    def sample_bytes(self) -> int:
        """Bytes of one stored image."""
        if self._fast is None:
            return CHUNK_BYTES
        images = self._fast.leaves[0].images
        return int(images[0].numel() * images.element_size())

    def raw(self, positions: Tensor) -> Batch:
        """Stored images (uint8), targets and attributes at ``positions`` ``(n,)``, not yet transformed or moved."""
        fast = self._fast
        if fast is None:
            return _collate([self.dataset[int(position)] for position in positions])
        images, targets = _gather(fast, positions)
        extra = [
            values[positions] if isinstance(values, Tensor) else _collate_column([values[int(p)] for p in positions])
            for values in self._columns
        ]
        return [images, targets, *extra]

    def finish(self, batch: Batch) -> Batch:
        """Move a raw batch to the device and transform its images there."""
        if self.device.type != "cpu":
            batch = [part.to(self.device, non_blocking=True) for part in batch]
        if self._fast is not None:
            for step in self._fast.chain:
                batch[0] = step(batch[0])
        return batch

    def batch(self, positions: Tensor) -> Batch:
        """``[x, y, ..., t]`` at ``positions`` ``(n,)``, ready for the model."""
        return self.finish(self.raw(positions))


def _collate(samples: Sequence[Sequence[Any]]) -> Batch:
    return [_collate_column([sample[part] for sample in samples]) for part in range(len(samples[0]))]


def _collate_column(values: list[Any]) -> Tensor:
    """Stack values; rows of different length (logits of a head that grew) are padded with NaN."""
    if not isinstance(values[0], Tensor):
        return torch.as_tensor(values)
    width = max(value.shape[0] for value in values) if values[0].dim() == 1 else None
    if width is None or all(value.shape[0] == width for value in values):
        return torch.stack(values)
    padded = values[0].new_full((len(values), width), float("nan"))
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return padded


class BatchLoader:
    """One pass over a data set in mini-batches ``[x, y, ..., t]``, shuffled by an explicit generator.

    Iterating starts a pass; the position inside it can be stored and taken up again (``state_dict``), which is what
    lets a run resume in the middle of an epoch with the same bits.

    Args:
        source: where batches come from.
        batch_size: samples per batch.
        shuffle: draw a new order for every pass.
        drop_last: leave out a last batch that is smaller.
        generator: source of the order; default: torch's global one.
    """

    def __init__(
        self,
        source: BatchSource,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.generator = generator
        self.served = 0
        self._order: Tensor | None = None
        self._resuming = False

    def __len__(self) -> int:
        count = len(self.source)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._resuming:
            self._resuming = False
        else:
            self.served = 0
            self._order = self._draw()
        order = self._order
        assert order is not None
        total = len(self)
        per_chunk = max(1, CHUNK_BYTES // (self.source.sample_bytes * self.batch_size))
        while self.served < total:
            start = self.served * self.batch_size
            raw = self.source.raw(order[start : start + per_chunk * self.batch_size])
            pieces = zip(*(part.split(self.batch_size) for part in raw), strict=True)
            for piece in pieces:
                if self.served >= total:
                    break
                self.served += 1
                images, *labels = piece
                # Copies: a view of the chunk, saved for backward, would keep the whole of it alive.
                yield self.source.finish([images, *(part.clone() for part in labels)])

    def _draw(self) -> Tensor:
        count = len(self.source)
        return torch.randperm(count, generator=self.generator) if self.shuffle else torch.arange(count)

    def state_dict(self) -> dict[str, Any]:
        """Order of the current pass and how many batches of it were served."""
        return {"served": self.served, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stored pass when next iterated."""
        self.served, self._order = state["served"], state["order"]
        self._resuming = self._order is not None


class CyclingSampler:
    """An endless supply of batches from a memory: shuffled passes, one after another.

    Args:
        source: the memory.
        batch_size: samples per batch; a smaller memory gives smaller batches.
        generator: source of the order; default: torch's global one.
        partial: serve what is left at the end of a pass as a smaller batch instead of dropping it.
    """

    def __init__(
        self, source: BatchSource, *, batch_size: int, generator: torch.Generator | None = None, partial: bool = False
    ) -> None:
        self.source = source
        self.batch_size = min(batch_size, len(source))
        self.generator = generator
        self.partial = partial
        self._order = torch.empty(0, dtype=torch.int64)
        self._next = 0

    def next(self) -> Batch:
        """The next batch ``[x, y, ..., t]``."""
        return self.source.batch(self.next_positions())

    def next_positions(self) -> Tensor:
        """Positions ``(batch_size,)`` of the next batch."""
        if self._next + (1 if self.partial else self.batch_size) > len(self._order):
            self._order = torch.randperm(len(self.source), generator=self.generator)
            self._next = 0
        positions = self._order[self._next : self._next + self.batch_size]
        self._next += self.batch_size
        return positions

    def state_dict(self) -> dict[str, Any]:
        """Order of the current pass and the position in it."""
        return {"order": self._order, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stored sampler stood."""
        self._order, self._next = state["order"], state["next"]


class ReplayLoader:
    """Batches of current data, each followed by a batch from memory; as long as one pass over the current data.

    Args:
        current: loader over the current data.
        memory: endless supply from the memory.
    """

    def __init__(self, current: BatchLoader, memory: CyclingSampler) -> None:
        self.current = current
        self.memory = memory

    def __len__(self) -> int:
        return len(self.current)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.current:
            yield [torch.cat(parts) for parts in zip(batch, self.memory.next(), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"current": self.current.state_dict(), "memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stored loader stood."""
        self.current.load_state_dict(state["current"])
        self.memory.load_state_dict(state["memory"])
