"""Which stored samples an Avalanche data set is made of, as index arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.flat_data import FlatData


def flatten(data: Any) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """The leaves of a tree of Avalanche ``FlatData``, and for each element its leaf and place in it, both ``(n,)``."""
    if not isinstance(data, FlatData):
        size = len(data)
        return [data], np.zeros(size, dtype=np.int64), np.arange(size, dtype=np.int64)
    leaves: list[Any] = []
    known: dict[int, int] = {}
    leaf_parts, place_parts = [], []
    for child in data._datasets:
        child_leaves, child_leaf, child_place = flatten(child)
        renumber = np.empty(max(1, len(child_leaves)), dtype=np.int64)
        for position, leaf in enumerate(child_leaves):
            if id(leaf) not in known:
                known[id(leaf)] = len(leaves)
                leaves.append(leaf)
            renumber[position] = known[id(leaf)]
        leaf_parts.append(renumber[child_leaf])
        place_parts.append(child_place)
    leaf_of = np.concatenate(leaf_parts) if leaf_parts else np.empty(0, dtype=np.int64)
    place_of = np.concatenate(place_parts) if place_parts else np.empty(0, dtype=np.int64)
    if data._indices is not None:
        indices = _index_array(data._indices)
        leaf_of, place_of = leaf_of[indices], place_of[indices]
    return leaves, leaf_of, place_of


def _index_array(indices: Any) -> np.ndarray:
    """Indices as an array ``(n,)``; Avalanche's lazy sequences hold one already, once they are asked to."""
    if hasattr(indices, "_to_eager"):
        indices._to_eager()
        if isinstance(indices._eager_list, np.ndarray):
            return indices._eager_list
    return np.fromiter(indices, dtype=np.int64, count=len(indices))


def leaf_ids(dataset: AvalancheDataset[Any]) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Which stored samples an Avalanche data set is made of (see :func:`flatten`)."""
    return flatten(dataset._flat_data)
