"""What a strategy holds, as JSON and tensors: the codec behind checkpoints.

No pickle: objects are walked attribute by attribute. Tensors go to one safetensors file; modules, optimizers, replay
buffers and plugins are described in JSON and put back *into* a freshly built strategy, so that configuration,
functions and classes never travel. Samples in a buffer are stored as positions in the stream.
"""

from __future__ import annotations

import collections
import copy
import functools
import math
import random
import sys
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks import CLExperience, CLScenario
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.models.dynamic_modules import DynamicModule
from avalanche.models.utils import avalanche_model_adaptation
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.optim import Optimizer

from contlearn.errors import ContlearnError
from contlearn.flatdata import leaf_ids

# Instances of classes from these packages may be re-created from a checkpoint, without running their constructors.
TRUSTED_PACKAGES = ("avalanche.", "contlearn.")
# Attributes of a template that live for one batch or one experience, or that the constructor alone decides.
TRANSIENT = frozenset(
    [
        "spec",
        "plugins",
        "model",
        "optimizer",
        "optimized_param_id",
        "experience",
        "is_training",
        "mbatch",
        "mb_output",
        "loss",
        "dataloader",
        "adapted_dataset",
        "evaluator",
        "current_eval_stream",
        "device",
        "interrupt",
        "resume_from",
        "_hooks",
        "_eval_streams",
        "_criterion",
        "_distributed_check",
        "_stop_training",
        "epoch_losses",
        "_loss_sum",
        "scheduler",
        "train_epochs",
        "plans",
        "_usual_plan",
        "_first_plan",
        "train_mb_size",
        "eval_mb_size",
        "eval_every",
    ]
)
KEPT = {"$kept": True}
_PLAIN = (bool, int, float, str, Tensor)
_SEQUENCES: dict[str, Any] = {
    "$list": list,
    "$tuple": tuple,
    "$deque": collections.deque,
    "$set": set,
    "$frozenset": frozenset,
}
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
    type,
    types.ModuleType,
)


class Unstorable(ContlearnError):
    """Something a strategy holds has no stored form; the message names where it sits."""


class Samples:
    """Where each stored sample of a stream sits: ``(experience, position)`` of the training stream."""

    def __init__(self, stream: CLScenario[Any]) -> None:
        self.stream = stream
        self.experiences = list(stream.streams["train"])
        self._tables: dict[int, tuple[Any, np.ndarray, np.ndarray]] = {}
        for index, experience in enumerate(self.experiences):
            leaves, leaf_of, place_of = leaf_ids(experience.dataset)
            for number, leaf in enumerate(leaves):
                if id(leaf) not in self._tables:
                    empty = np.full(len(leaf), -1, dtype=np.int64)
                    self._tables[id(leaf)] = (leaf, empty, empty.copy())
                mine = np.nonzero(leaf_of == number)[0]
                _, owner, position = self._tables[id(leaf)]
                owner[place_of[mine]], position[place_of[mine]] = index, mine

    def locate(self, dataset: AvalancheDataset[Any], path: str) -> tuple[np.ndarray, np.ndarray]:
        """Experience ``(n,)`` and position ``(n,)`` of each sample of ``dataset``.

        Raises:
            Unstorable: a sample that is not part of the training stream.
        """
        leaves, leaf_of, place_of = leaf_ids(dataset)
        experience = np.full(len(leaf_of), -1, dtype=np.int64)
        position = experience.copy()
        for number, leaf in enumerate(leaves):
            if id(leaf) not in self._tables:
                raise Unstorable(f"{path}: holds samples that are not in the training stream")
            _, owner, place = self._tables[id(leaf)]
            mine = leaf_of == number
            experience[mine], position[mine] = owner[place_of[mine]], place[place_of[mine]]
        if (experience < 0).any():
            raise Unstorable(f"{path}: holds samples that are not in the training stream")
        return experience, position

    def gather(self, experience: np.ndarray, position: np.ndarray) -> AvalancheDataset[Any]:
        """The data set of the samples at ``(experience, position)``, in that order."""
        parts, order = [], []
        for index in np.unique(experience).tolist():
            mine = np.nonzero(experience == index)[0]
            parts.append(self.experiences[index].dataset.subset(position[mine].tolist()))
            order.append(mine)
        whole = functools.reduce(lambda left, right: left.concat(right), parts)
        if len(parts) == 1:
            return whole
        inverse = np.argsort(np.concatenate(order), kind="stable")
        return whole.subset(inverse.tolist())


class Encoder:
    """Describes a strategy as JSON; tensors collect in ``tensors`` by path."""

    def __init__(self, strategy: Any, samples: Samples) -> None:
        self.strategy = strategy
        self.samples = samples
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []
        self._modules = {id(module): name for name, module in strategy.model.named_modules()}
        self._weights = {id(tensor): name for name, tensor in _named_tensors(strategy.model)}
        self._plugins = {id(plugin): index for index, plugin in enumerate(strategy.plugins)}

    def strategy_state(self) -> dict[str, Any]:
        """Model, optimizer, plugins and every other attribute of the strategy that outlives an experience."""
        strategy = self.strategy
        attributes = {k: v for k, v in vars(strategy).items() if k not in TRANSIENT and k not in _excluded(strategy)}
        return {
            "model": self._module(strategy.model, "model"),
            "optimizer": self._optimizer(strategy.optimizer),
            "plugins": [
                self.value(plugin, f"plugins.{index}", top=True) if plugin is not strategy.evaluator else KEPT
                for index, plugin in enumerate(strategy.plugins)
            ],
            "attributes": {key: self.value(value, key) for key, value in attributes.items()},
        }

    def value(self, value: Any, path: str, *, top: bool = False) -> Any:
        """One value as JSON."""
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
            return self.value(value.item(), path)
        if isinstance(value, torch.device):
            return {"$device": self._place(value)}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, _FUNCTIONS):
            return KEPT
        if value is self.strategy:
            return {"$strategy": True}
        if id(value) in self._modules:
            return {"$submodule": self._modules[id(value)]}
        if id(value) in self._weights:
            return {"$weight": self._weights[id(value)]}
        if id(value) in self._plugins and not top:
            return {"$plugin": self._plugins[id(value)]}
        if value is self.strategy.optimizer:
            return {"$optimizer": True}
        if isinstance(value, CLExperience):
            return {"$experience": [value.origin_stream.name, value.logging().current_experience]}
        if isinstance(value, CLScenario):
            return KEPT
        if id(value) in self._seen:
            return {"$same": self._seen[id(value)]}
        number = self._seen[id(value)] = len(self._seen)
        self._alive.append(value)  # an id is only unique while its object lives
        return {"$id": number, **self._composite(value, path, top=top)}

    def _composite(self, value: Any, path: str, *, top: bool) -> dict[str, Any]:
        if isinstance(value, Tensor):
            leaf = value.requires_grad and value.is_leaf
            return {"$tensor": self._tensor(value, path), "on": self._place(value.device), "requires_grad": leaf}
        if isinstance(value, np.ndarray):
            return {"$array": self._tensor(_from_array(value, path), path)}
        if isinstance(value, torch.Generator):
            return {"$generator": self._tensor(value.get_state(), path)}
        if isinstance(value, random.Random):
            return {"$random": _listed(value.getstate())}
        if isinstance(value, dict):
            pairs = [[self.value(k, f"{path}.key"), self.value(v, f"{path}.{k}")] for k, v in value.items()]
            return {"$dict": pairs}
        for tag, kind in _SEQUENCES.items():
            if isinstance(value, kind):
                return {tag: [self.value(item, f"{path}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, AvalancheDataset):
            return self._dataset(value, path)
        if isinstance(value, nn.Module):
            return {"$module": self._module(value, path)}
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            return {"$stateful": self.value(value.state_dict(), path)}
        # A plug-in is there again when the run resumes, whoever wrote it; anything below may have to be re-created.
        if not hasattr(value, "__dict__") or not (top or _trusted(type(value))):
            raise Unstorable(f"{path}: a {type(value).__module__}.{type(value).__qualname__} has no stored form")
        state = {k: v for k, v in vars(value).items() if k not in _excluded(value)}
        return {
            "$object": f"{type(value).__module__}:{type(value).__qualname__}",
            "state": {key: self.value(item, f"{path}.{key}") for key, item in state.items()},
        }

    def _place(self, device: torch.device) -> str:
        """``cpu`` for what stays there though the strategy computes elsewhere (Avalanche's reservoir weights, say)."""
        return "cpu" if device.type == "cpu" != self.strategy.device.type else "strategy"

    def _tensor(self, tensor: Tensor, path: str) -> str:
        if tensor.layout is not torch.strided or not _has_stored_form(tensor.dtype):
            raise Unstorable(f"{path}: a tensor of {tensor.layout}, {tensor.dtype} has no stored form")
        plain = key = path.encode("ascii", "backslashreplace").decode()
        count = 0
        while key in self.tensors:
            count += 1
            key = f"{plain}#{count}"
        self.tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
        return key

    def _module(self, module: nn.Module, path: str) -> dict[str, Any]:
        attributes: dict[str, dict[str, Any]] = {}
        for name, child in module.named_modules():
            plain = {k: v for k, v in vars(child).items() if k not in _MODULE_INTERNALS and _is_plain(v)}
            attributes[name] = {key: self.value(value, f"{path}.{name}.{key}") for key, value in plain.items()}
        return {
            "tensors": {name: self._tensor(tensor, f"{path}.{name}") for name, tensor in _named_tensors(module)},
            "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
            "attributes": attributes,
        }

    def _optimizer(self, optimizer: Optimizer | None) -> dict[str, Any] | None:
        if optimizer is None:  # an adapter that trains nothing
            return None
        names = {id(parameter): name for name, parameter in self.strategy.model.named_parameters()}
        groups = [
            {
                **{key: self.value(item, f"optimizer.{key}") for key, item in group.items() if key != "params"},
                "params": [names.get(id(parameter)) for parameter in group["params"]],
            }
            for group in optimizer.param_groups
        ]
        state = {
            names[id(parameter)]: self.value(dict(held), f"optimizer.{names[id(parameter)]}")
            for parameter, held in optimizer.state.items()
            if id(parameter) in names
        }
        return {"groups": groups, "state": state}

    def _dataset(self, dataset: AvalancheDataset[Any], path: str) -> dict[str, Any]:
        experience, position = self.samples.locate(dataset, path) if len(dataset) else (np.empty(0), np.empty(0))
        known = set(self.samples.experiences[0].dataset._data_attributes) if len(dataset) else set()
        added = {k: list(v) for k, v in dataset._data_attributes.items() if k not in known} if len(dataset) else {}
        return {
            "$dataset": {
                "experience": self._tensor(torch.from_numpy(experience), f"{path}.experience"),
                "position": self._tensor(torch.from_numpy(position), f"{path}.position"),
                "group": dataset._flat_data._transform_groups.current_group,
                "added": {
                    name: {
                        "values": self.value(values, f"{path}.{name}"),
                        "in_batch": dataset._data_attributes[name].use_in_getitem,
                    }
                    for name, values in added.items()
                },
            }
        }


class Decoder:
    """Puts a stored state back into a freshly built strategy of the same configuration."""

    def __init__(self, strategy: Any, samples: Samples, tensors: dict[str, Tensor]) -> None:
        self.strategy = strategy
        self.samples = samples
        self.tensors = tensors
        self._made: dict[int, Any] = {}
        self._filled: dict[int, Any] = {}

    def strategy_state(self, state: dict[str, Any], *, experiences_done: Iterable[Any] = ()) -> None:
        """Restore everything :meth:`Encoder.strategy_state` described.

        Args:
            state: the stored description.
            experiences_done: experiences trained so far; a model that grew structure is grown again by them.
        """
        strategy = self.strategy
        strategy.model.to(strategy.device)
        self._grow(strategy.model, state["model"]["tensors"], experiences_done)
        self._load_module(strategy.model, state["model"])
        self._load_optimizer(state["optimizer"])
        for plugin, stored in zip(strategy.plugins, state["plugins"], strict=True):
            self.value(stored, plugin)
        self._fill(vars(strategy), state["attributes"])

    def _fill(self, attributes: dict[str, Any], stored: dict[str, Any]) -> None:
        """Restore attributes; one that was left out and that this object never had (a function, say) stays absent."""
        for key, item in stored.items():
            if item != KEPT or key in attributes:
                attributes[key] = self.value(item, attributes.get(key))

    def value(self, stored: Any, current: Any = None) -> Any:
        """The stored value, written into ``current`` where that is possible."""
        if not isinstance(stored, dict):
            return stored
        if "$kept" in stored:
            return current
        if "$same" in stored:
            return self._made[stored["$same"]]
        simple = self._simple(stored, current)
        if simple is NotImplemented:
            return self._restore(stored, current)
        if "$id" in stored:
            self._made[stored["$id"]] = simple
        return simple

    def _simple(self, stored: dict[str, Any], current: Any) -> Any:
        if "$float" in stored:
            return float(stored["$float"])
        if "$tensor" in stored:
            return self._tensor(stored, current)
        if "$device" in stored:
            return current if isinstance(current, torch.device) else self._device(stored["$device"])
        if "$dtype" in stored and isinstance(getattr(torch, stored["$dtype"]), torch.dtype):
            return getattr(torch, stored["$dtype"])
        if "$array" in stored:
            return self.tensors[stored["$array"]].numpy().copy()
        if "$generator" in stored:
            generator = current if isinstance(current, torch.Generator) else torch.Generator()
            generator.set_state(self.tensors[stored["$generator"]])
            return generator
        if "$random" in stored:
            source = current if isinstance(current, random.Random) else random.Random()
            source.setstate(_tupled(stored["$random"]))
            return source
        if "$strategy" in stored:
            return self.strategy
        if "$submodule" in stored:
            return self.strategy.model.get_submodule(stored["$submodule"])
        if "$weight" in stored:
            owner, _, name = stored["$weight"].rpartition(".")
            return getattr(self.strategy.model.get_submodule(owner), name)
        if "$plugin" in stored:
            return self.strategy.plugins[stored["$plugin"]]
        if "$optimizer" in stored:
            return self.strategy.optimizer
        if "$experience" in stored:
            name, index = stored["$experience"]
            return self.samples.stream.streams[name][index]
        return NotImplemented

    def _restore(self, stored: dict[str, Any], current: Any) -> Any:
        number = stored["$id"]
        if "$dict" in stored:
            target = self._once(current) if isinstance(current, dict) else {}
            self._made[number] = target
            before = dict(target)
            target.clear()
            for key, item in stored["$dict"]:
                plain_key = self.value(key)
                target[plain_key] = self.value(item, before.get(plain_key))
            return target
        for tag in _SEQUENCES:
            if tag in stored:
                return self._sequence(number, tag, stored[tag], current)
        if "$dataset" in stored:
            self._made[number] = self._dataset(stored["$dataset"], current)
        elif "$module" in stored:
            self._made[number] = self._standalone_module(stored["$module"], current)
        elif "$stateful" in stored:
            if current is None:
                raise ContlearnError("checkpoint: holds the state of an object that this configuration does not make")
            self._made[number] = current
            current.load_state_dict(self.value(stored["$stateful"], None))
        else:
            self._object(number, stored, current)
        return self._made[number]

    def _tensor(self, stored: dict[str, Any], current: Any) -> Tensor:
        tensor = self.tensors[stored["$tensor"]]
        if isinstance(current, nn.Parameter) and current.shape == tensor.shape:
            with torch.no_grad():  # in place: an optimizer may hold it
                return current.copy_(tensor)
        device = current.device if isinstance(current, Tensor) else self._device(stored["on"])
        made = tensor.clone().to(device)
        return made.requires_grad_() if stored["requires_grad"] else made

    def _device(self, place: str) -> torch.device:
        return torch.device("cpu") if place == "cpu" else self.strategy.device  # type: ignore[no-any-return]

    def _sequence(self, number: int, tag: str, stored: list[Any], current: Any) -> Any:
        old = list(current) if isinstance(current, list | tuple) and len(current) == len(stored) else []
        items = (self.value(item, old[place] if old else None) for place, item in enumerate(stored))
        if tag in ("$list", "$deque"):  # these may hold themselves, so they exist before their items do
            made: Any = collections.deque(maxlen=getattr(current, "maxlen", None)) if tag == "$deque" else []
            self._made[number] = made
            for item in items:
                made.append(item)
            return made
        made = torch.Size(items) if isinstance(current, torch.Size) else _SEQUENCES[tag](items)
        self._made[number] = made
        return made

    def _once(self, current: Any) -> Any:
        """``current``, or a copy when another stored object was put into it: they had parted when they were stored."""
        if id(current) in self._filled:
            current = copy.deepcopy(current) if isinstance(current, nn.Module) else copy.copy(current)
        self._filled[id(current)] = current
        return current

    def _object(self, number: int, stored: dict[str, Any], current: Any) -> None:
        module, name = stored["$object"].split(":")
        if f"{type(current).__module__}:{type(current).__qualname__}" != stored["$object"]:
            kind: Any = sys.modules.get(module)
            for part in name.split("."):
                kind = getattr(kind, part, None)
            if not isinstance(kind, type) or not _trusted(kind):
                raise ContlearnError(f"checkpoint: cannot re-create an object of class {stored['$object']}")
            current = object.__new__(kind)
        current = self._made[number] = self._once(current)
        self._fill(vars(current), stored["state"])

    def _dataset(self, stored: dict[str, Any], current: Any) -> AvalancheDataset[Any]:
        experience = self.tensors[stored["experience"]].numpy()
        position = self.tensors[stored["position"]].numpy()
        if not len(experience):
            return current if isinstance(current, AvalancheDataset) and not len(current) else AvalancheDataset([])
        dataset = self.samples.gather(experience, position).with_transforms(stored["group"])
        attributes = [
            DataAttribute(self.value(added["values"]), name, use_in_getitem=added["in_batch"])
            for name, added in stored["added"].items()
        ]
        return type(dataset)([dataset], data_attributes=attributes) if attributes else dataset

    def _standalone_module(self, stored: dict[str, Any], current: Any) -> nn.Module:
        """A module beside the model (a teacher, an initial copy): a copy of the model until its weights are put in."""
        module: nn.Module = (
            self._once(current) if isinstance(current, nn.Module) else copy.deepcopy(self.strategy.model)
        )
        self._load_module(module, stored)
        return module

    def _grow(self, model: nn.Module, names: Iterable[str], experiences_done: Iterable[Any]) -> None:
        if set(names) == {name for name, _ in _named_tensors(model)}:
            return
        model.train()
        with torch.random.fork_rng(devices=[]):
            for experience in experiences_done:
                avalanche_model_adaptation(model, experience)

    def _load_module(self, module: nn.Module, stored: dict[str, Any]) -> None:
        present = {name for name, _ in _named_tensors(module)}
        missing = sorted(set(stored["tensors"]) ^ present)
        if missing:
            raise ContlearnError(f"checkpoint: the stored model and this one differ in {missing[0]!r}")
        frozen = set(stored["frozen"])
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        growing = [name for name, child in module.named_modules() if name and isinstance(child, DynamicModule)]
        for name, key in stored["tensors"].items():
            parent_name, _, leaf = name.rpartition(".")
            parent = module.get_submodule(parent_name)
            held = getattr(parent, leaf)
            tensor = self.tensors[key].to(held.device)
            if name in parameters:
                if held.shape == tensor.shape:
                    with torch.no_grad():
                        held.copy_(tensor)
                elif not any(name.startswith(f"{head}.") for head in growing):
                    raise ContlearnError(
                        f"checkpoint: the stored model and this one differ in {name!r}: its shape was "
                        f"{tuple(tensor.shape)} and is now {tuple(held.shape)}"
                    )
                else:
                    parent._parameters[leaf] = nn.Parameter(tensor.clone())
                parent._parameters[leaf].requires_grad_(name not in frozen)  # type: ignore[union-attr]
            else:
                parent._buffers[leaf] = tensor.clone()
        for name, attributes in stored["attributes"].items():
            child = module.get_submodule(name)
            self._fill(vars(child), attributes)

    def _load_optimizer(self, stored: dict[str, Any] | None) -> None:
        if stored is None:
            return
        strategy = self.strategy
        named = dict(strategy.model.named_parameters())
        optimizer = strategy.optimizer
        optimizer.state = collections.defaultdict(dict)
        for group, saved in zip(optimizer.param_groups, stored["groups"], strict=True):
            group.update({key: self.value(item, group.get(key)) for key, item in saved.items() if key != "params"})
            group["params"] = [named[name] for name in saved["params"] if name is not None]
        for name, item in stored["state"].items():
            # A step counter stays on the CPU, moments go with their weight.
            held = self.value(item)
            weight = named[name]
            optimizer.state[weight] = {
                key: value.to(weight.device) if isinstance(value, Tensor) and value.dim() else value
                for key, value in held.items()
            }
        if hasattr(strategy, "optimized_param_id"):
            strategy.optimized_param_id = named


def rng_state() -> dict[str, Any]:
    """The state of every global random source, as JSON and tensors under ``$tensor``-free keys."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "python": _listed(random.getstate()),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate(_tupled(state["python"]))


def seed_everything(seed: int) -> None:
    """Seed PyTorch (all devices), NumPy and Python's ``random``.

    Raises:
        ContlearnError: a seed outside 0..2**63-1.
    """
    if not 0 <= seed < 2**63:
        raise ContlearnError(f"seed: expected 0..2**63-1, got {seed}")
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *((name, buffer) for name, buffer in module.named_buffers(remove_duplicate=False)),
    ]


def _excluded(value: Any) -> tuple[str, ...]:
    """Attributes an object says need not be stored (``checkpoint_exclude`` on its class)."""
    return tuple(getattr(type(value), "checkpoint_exclude", ()))


def _trusted(kind: type) -> bool:
    return f"{kind.__module__}.".startswith(TRUSTED_PACKAGES) and hasattr(kind, "__dict__")


@functools.cache
def _has_stored_form(dtype: torch.dtype) -> bool:
    try:
        save_tensors({"": torch.empty(0, dtype=dtype)})
    except (LookupError, ValueError, TypeError, RuntimeError, SafetensorError):
        return False
    return True


def _from_array(array: np.ndarray, path: str) -> Tensor:
    try:
        if type(array) is np.ndarray:
            return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError):
        pass
    raise Unstorable(f"{path}: a {type(array).__qualname__} of {array.dtype} has no stored form")


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, _PLAIN):
        return True
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    return isinstance(value, list | tuple | set | frozenset) and all(_is_plain(item) for item in value)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value
