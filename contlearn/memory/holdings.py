"""What a strategy holds between and during steps, by name: the object graph walked for tensors, modules and exemplars.

A strategy or plug-in says what its attributes are with one class attribute, ``memory_names``: attribute (dotted where
it sits deeper) -> the name its bytes are reported under, such as ``{"importances": "fisher"}``. What is not named is
reported under its class and attribute; nothing that is held is left out. A plug-in that only watches a run says so
with ``memory_exempt = True``.
"""

from __future__ import annotations

import collections
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLExperience, CLScenario, CLStream
from avalanche.benchmarks.utils import AvalancheDataset
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from contlearn.flatdata import flatten, leaf_ids
from contlearn.memory.saved import by_key, unique_bytes

# The stream's own data and loaders over it, the current batch, and what evaluation tools keep are not the method's.
NOT_HELD = frozenset(
    [
        "mbatch",
        "mb_output",
        "loss",
        "dataloader",
        "adapted_dataset",
        "experience",
        "current_eval_stream",
        "evaluator",
        "plugins",
        "model",
        "optimizer",
        "_eval_streams",
        "_hooks",
        "optimized_param_id",
        "resume_from",
        "_loss_sum",
    ]
)
LABEL_BYTES = 8  # int64, as held
INDEX_BYTES = 8
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_OPAQUE = (str, bytes, int, float, bool, complex, type(None), Generator, CLScenario, CLStream, *_CODE)
_MODULE_INTERNALS = frozenset(vars(nn.Module()))


class Holdings:
    """Everything a strategy holds beside its model, optimizer and gradients.

    Args:
        strategy: any Avalanche strategy.
        lasting: leave out what every experience makes anew (what its owner lists in ``checkpoint_exclude``).

    Attributes:
        state: component name -> tensors; an array is stood for by a tensor of as many bytes on the ``meta`` device.
        exemplars: data sets whose samples are kept for rehearsal.
    """

    def __init__(self, strategy: Any, *, lasting: bool = False) -> None:
        self.state: dict[str, list[Tensor]] = {}
        self.exemplars: list[AvalancheDataset[Any]] = []
        self._seen: set[int] = {id(strategy), id(strategy.model), id(strategy.optimizer)}
        self._seen |= {id(module) for module in strategy.model.modules()}
        self._seen |= {id(plugin) for plugin in strategy.plugins}
        tools = {id(strategy.evaluator)} | {id(p) for p in strategy.plugins if getattr(type(p), "memory_exempt", False)}
        owners = [strategy, *(plugin for plugin in strategy.plugins if id(plugin) not in tools)]
        for owner in owners:
            kind = type(owner)
            skipped = {*NOT_HELD, *getattr(kind, "memory_exclude", ())}
            if lasting:
                skipped.update(getattr(kind, "checkpoint_exclude", ()))
            for attribute, value in _attributes(owner):
                if attribute not in skipped:
                    self._walk(value, attribute, _names(owner), kind.__name__)
        for module in strategy.model.modules():
            for attribute, value in _beside_weights(module):
                self._walk(value, attribute, {}, type(module).__name__)
        self._places = self._places_by_leaf()
        # Weights are in the account already, and what a memory's indices point into is the stream's.
        elsewhere = by_key([*model_tensors(strategy.model), *optimizer_tensors(strategy.optimizer)])
        elsewhere |= by_key(tensor for leaf, _ in self._places for tensor in _tensors_in(_attributes(leaf)))
        for name, tensors in self.state.items():
            self.state[name] = [tensor for tensor in tensors if not elsewhere.keys() & by_key([tensor]).keys()]

    def _walk(self, value: Any, path: str, names: dict[str, str], owner: str) -> None:
        todo = [(value, path)]
        while todo:  # not by recursion: a linked list may be long
            value, path = todo.pop()
            if isinstance(value, _OPAQUE) or id(value) in self._seen:
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                self._add(path, names, owner, [value])
            elif isinstance(value, np.ndarray) and value.dtype != object:
                self._add(path, names, owner, [torch.empty(value.nbytes, dtype=torch.uint8, device="meta")])
            elif isinstance(value, AvalancheDataset):
                self.exemplars.append(value)
            else:
                if isinstance(value, nn.Module):
                    self._add(path, names, owner, list(model_tensors(value)))
                todo += reversed(list(_inside(value, path)))

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
            fresh = [tensor for tensor in tensors if not counted & by_key([tensor]).keys()]
            counted |= by_key(fresh).keys()
            found[name] = unique_bytes(fresh)
        return {name: size for name, size in sorted(found.items()) if size}

    def exemplar_count(self) -> int:
        """Number of distinct samples kept."""
        return sum(len(places) for _, places in self._places)

    def replay_bytes(self) -> int:
        """Bytes of the exemplars at the precision they are held: pixels, label, index, and what is stored beside."""
        total = _added_bytes(self.exemplars)
        for leaf, places in self._places:
            if len(places):
                total += len(places) * (sample_bytes(leaf) + LABEL_BYTES + INDEX_BYTES)
        return total

    def _places_by_leaf(self) -> list[tuple[Any, np.ndarray]]:
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


def optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Tensors an optimizer keeps per parameter; none without one (an adapter that trains nothing)."""
    return [] if optimizer is None else list(_tensors_in(optimizer.state.values()))


def sample_bytes(leaf: Any) -> int:
    """Bytes of one stored input of a leaf data set."""
    images = getattr(leaf, "images", None)
    first = images[0] if isinstance(images, Tensor) else leaf[0][0]
    if isinstance(first, Tensor):
        return int(first.numel() * first.element_size())
    return int(np.asarray(first).nbytes)  # of a picture, one byte per channel and pixel


def _tensors_in(tree: Iterable[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(list(tree)) if isinstance(leaf, Tensor))


def _added_bytes(datasets: Iterable[AvalancheDataset[Any]]) -> int:
    """Bytes of what is stored with each sample beside label and task (logits, say); what data sets share, once."""
    tensors: dict[int, Tensor] = {}
    others: set[tuple[int, int]] = set()
    for dataset in datasets:
        for name, attribute in dataset._data_attributes.items():
            if name in ("targets", "targets_task_labels"):
                continue
            leaves, leaf_of, place_of = flatten(attribute.data)
            for number, place in zip(leaf_of.tolist(), place_of.tolist(), strict=True):
                value = leaves[number][place]
                if isinstance(value, Tensor):
                    tensors[value.data_ptr()] = value
                else:
                    others.add((id(leaves[number]), place))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + 8 * len(others)


def _inside(value: Any, path: str) -> Iterator[tuple[Any, str]]:
    """What an object holds directly, with the path it is reported under."""
    if isinstance(value, nn.Module):
        yield from ((item, path) for module in value.modules() for _, item in _beside_weights(module))
    elif isinstance(value, CLExperience):
        yield getattr(value, "dataset", None), path
    elif isinstance(value, dict):
        yield from ((item, f"{path}.{key}" if isinstance(key, str) else path) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset | collections.deque | np.ndarray):
        yield from ((item, path) for item in (value.flat if isinstance(value, np.ndarray) else value))
    else:
        yield from ((item, f"{path}.{attribute}") for attribute, item in _attributes(value))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Instance attributes, those in slots included."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot != "__dict__" and slot != "__weakref__" and hasattr(value, slot):
                yield slot, getattr(value, slot)


def _beside_weights(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module that are no parameters, buffers, submodules or hooks."""
    return ((key, value) for key, value in _attributes(module) if key not in _MODULE_INTERNALS)


def _names(owner: Any) -> dict[str, str]:
    names: dict[str, str] = {}
    for kind in reversed(type(owner).__mro__):
        # Avalanche's own plug-ins cannot say it themselves.
        names.update(vars(kind).get("memory_names", _AVALANCHE.get(kind.__name__, {})))
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
    "ReplayPlugin": {"storage_policy": "reservoir_weights"},
    "GDumbPlugin": {"init_model": "initial_model", "storage_policy": "reservoir_weights"},
    "DER": {"batch_logits": "memory_batch", "storage_policy": "reservoir_weights"},
    "MASPlugin": {"params": "anchor", "importance": "importance"},
}
