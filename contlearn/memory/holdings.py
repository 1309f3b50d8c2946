"""What a strategy holds between and during steps, by name: the object graph walked for tensors, modules and exemplars.

A strategy or plug-in says what its attributes are with one class attribute, ``memory_names``: attribute (dotted where
it sits deeper) -> the name its bytes are reported under, such as ``{"importances": "fisher"}``. What is not named is
reported under its class and attribute; nothing that is held is left out. A plug-in that only watches a run says so
with ``memory_exempt = True``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Generator, Tensor, nn

from contlearn.flatdata import leaf_ids
from contlearn.memory.saved import unique_bytes

# The stream's own data and loaders over it, the current batch, and what evaluation tools keep are not the method's.
NOT_HELD = frozenset(
    {
        *("mbatch", "mb_output", "loss", "_loss_sum", "dataloader", "adapted_dataset", "experience"),
        *("current_eval_stream", "_eval_streams", "evaluator", "plugins", "_hooks", "resume_from"),
        *("model", "optimizer", "optimized_param_id"),
    }
)
LABEL_BYTES = 8  # int64, as held
INDEX_BYTES = 8
_OPAQUE = (str, bytes, int, float, bool, complex, type(None), Generator, type)


class Holdings:
    """Everything a strategy holds beside its model, optimizer and gradients.

    Attributes:
        state: component name -> tensors.
        exemplars: data sets whose samples are kept for rehearsal.
    """

    def __init__(self, strategy: Any) -> None:
        self.state: dict[str, list[Tensor]] = {}
        self.exemplars: list[Any] = []
        self._seen: set[int] = {id(strategy), id(strategy.model), id(strategy.optimizer)}
        self._seen |= {id(module) for module in strategy.model.modules()}
        self._seen |= {id(plugin) for plugin in strategy.plugins}
        self._model = {id(tensor) for tensor in model_tensors(strategy.model)}
        tools = {id(strategy.evaluator)} | {id(p) for p in strategy.plugins if getattr(type(p), "memory_exempt", False)}
        owners = [strategy, *(plugin for plugin in strategy.plugins if id(plugin) not in tools)]
        for owner in owners:
            names = _names(owner)
            for attribute, value in vars(owner).items():
                if attribute not in NOT_HELD and attribute not in getattr(type(owner), "memory_exclude", ()):
                    self._walk(value, attribute, names, type(owner).__name__)

    def _walk(self, value: Any, path: str, names: dict[str, str], owner: str) -> None:
        if isinstance(value, _OPAQUE):
            return
        if isinstance(value, Tensor):
            if id(value) not in self._model:
                self._add(path, names, owner, [value])
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._add(path, names, owner, list(model_tensors(value)))
        elif _is_dataset(value):
            self.exemplars.append(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._walk(item, f"{path}.{key}" if isinstance(key, str) else path, names, owner)
        elif isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
            for item in value:
                self._walk(item, path, names, owner)
        elif isinstance(value, np.ndarray):
            import torch

            self._add(path, names, owner, [torch.from_numpy(value)] if value.dtype != object else [])
        elif f"{type(value).__module__}.".startswith(("avalanche.", "contlearn.")) and hasattr(value, "__dict__"):
            for attribute, item in vars(value).items():
                self._walk(item, f"{path}.{attribute}", names, owner)

    def _add(self, path: str, names: dict[str, str], owner: str, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        name = next((names[key] for key in _prefixes(path) if key in names), None)
        self.state.setdefault(name or f"{owner}.{path.split('.')[0]}", []).extend(tensors)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the method's state."""
        for tensors in self.state.values():
            yield from tensors

    def state_bytes(self) -> dict[str, int]:
        """Bytes by component; a storage that two components share counts for the first."""
        counted: set[int] = set()
        found = {}
        for name, tensors in self.state.items():
            fresh = [t for t in tensors if t.untyped_storage()._cdata not in counted]
            counted |= {t.untyped_storage()._cdata for t in fresh}
            found[name] = unique_bytes(fresh)
        return {name: size for name, size in sorted(found.items()) if size}

    def exemplar_count(self) -> int:
        """Number of distinct samples kept."""
        return sum(len(places) for _, places in self._exemplars_by_leaf())

    def replay_bytes(self) -> int:
        """Bytes of the exemplars at the precision they are held: pixels, labels, indices, logits."""
        total = 0
        for leaf, places in self._exemplars_by_leaf():
            total += len(places) * (sample_bytes(leaf) + LABEL_BYTES + INDEX_BYTES)
        for dataset in self.exemplars:
            total += sum(_added_bytes(dataset))
        return total

    def _exemplars_by_leaf(self) -> list[tuple[Any, np.ndarray]]:
        places: dict[int, tuple[Any, list[np.ndarray]]] = {}
        for dataset in self.exemplars:
            leaves, leaf_of, place_of = leaf_ids(dataset)
            for number, leaf in enumerate(leaves):
                places.setdefault(id(leaf), (leaf, []))[1].append(place_of[leaf_of == number])
        return [(leaf, np.unique(np.concatenate(parts))) for leaf, parts in places.values()]


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def sample_bytes(leaf: Any) -> int:
    """Bytes of one stored input of a leaf data set."""
    images = getattr(leaf, "images", None)
    if isinstance(images, Tensor):
        return int(images[0].numel() * images.element_size())
    first = leaf[0][0]
    return int(first.numel() * first.element_size()) if isinstance(first, Tensor) else 0


def _added_bytes(dataset: Any) -> Iterable[int]:
    """Bytes of attributes stored per sample beside label and task (logits, say)."""
    for name, attribute in dataset._data_attributes.items():
        if name not in ("targets", "targets_task_labels"):
            for value in attribute:
                yield int(value.numel() * value.element_size()) if isinstance(value, Tensor) else 8


def _is_dataset(value: Any) -> bool:
    return hasattr(value, "_flat_data") and hasattr(value, "_data_attributes")


def _names(owner: Any) -> dict[str, str]:
    names: dict[str, str] = {}
    for cls in reversed(type(owner).__mro__):
        names.update(vars(cls).get("memory_names", {}))
    # Avalanche's own plug-ins, which cannot say so themselves.
    names.update(_AVALANCHE.get(type(owner).__name__, {}) if not names else {})
    return names


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end])


_AVALANCHE: dict[str, dict[str, str]] = {
    "EWCPlugin": {"saved_params": "anchor", "importances": "fisher"},
    "LwFPlugin": {"lwf.prev_model": "teacher"},
    "SynapticIntelligencePlugin": {"ewc_data": "importance", "syn_data": "path"},
    "AGEMPlugin": {"reference_gradients": "reference_gradient"},
    "GDumbPlugin": {"init_model": "initial_model"},
    "MASPlugin": {"params": "anchor", "importance": "importance"},
}
