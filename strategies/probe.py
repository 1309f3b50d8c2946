"""One forward that tells where a network's non-linearities are and what feeds them.

Every operator is seen as it is dispatched, with the module it runs in; what a tensor comes from is kept per storage,
so that views, reshapes and permutations do not count as anything in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contlearn.errors import ContlearnError
from contlearn.strategies.norm_layers import is_activation, is_norm

_FUNCTIONS = frozenset((
    "relu", "leaky_relu", "rrelu_with_noise", "elu", "celu", "selu", "gelu", "silu", "hardswish", "hardsigmoid",
    "hardtanh", "mish", "softplus", "sigmoid", "log_sigmoid_forward", "tanh", "_prelu_kernel", "threshold",
    "softsign", "softshrink", "hardshrink",
))  # fmt: skip
# Operators that normalise their first argument, and where their offset stands.
_NORMS = {
    "native_layer_norm": 3, "native_group_norm": 2, "native_batch_norm": 2, "_native_batch_norm_legit": 2,
    "_native_batch_norm_legit_no_training": 2, "cudnn_batch_norm": 2, "miopen_batch_norm": 2,
    "_batch_norm_with_update": 2, "_batch_norm_no_update": 2, "_fused_rms_norm": None,
}  # fmt: skip
_COPIES = frozenset(("clone", "_to_copy", "contiguous", "_reshape_copy"))


class Features(nn.Module):
    """The part of a model that is looked at: its ``features(x)``, or all of it where it has no such method."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """What the model's head is given."""
        features = getattr(self.model, "features", None)
        # torchvision has networks with a *module* of this name, which is not all there is before the output layer.
        return features(x) if callable(features) and not isinstance(features, nn.Module) else self.model(x)


def shape_of(model: nn.Module, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """The shape of one input.

    Raises:
        ContlearnError: neither given nor known to the model.
    """
    shape = given if given is not None else getattr(model, "input_shape", None)
    if shape is None:
        raise ContlearnError(
            f"input_shape: {type(model).__name__} does not say what it takes; expected (channels, height, width)"
        )
    return tuple(int(size) for size in shape)


def place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating type of a model's parameters."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


@dataclass
class Call:
    """One call of an activation module.

    Attributes:
        normalised: whether its input comes straight from a normalisation.
        shape: of its input, the batch in front.
        last: whether the features lie in the last dimension.
    """

    normalised: bool
    shape: tuple[int, ...]
    last: bool


@dataclass
class Activation:
    """An activation module and its calls in one forward."""

    name: str
    module: nn.Module
    calls: list[Call] = field(default_factory=list)


@dataclass
class Sites:
    """What a probe found.

    Attributes:
        activations: in the order of their first call.
        redundant_biases: Linear and convolution layers with a bias that feed normalisations with an offset alone.
    """

    activations: list[Activation]
    redundant_biases: list[nn.Module]


@dataclass(eq=False)
class _Origin:
    """What a tensor comes from, and who reads it."""

    normalised: bool = False
    module: nn.Module | None = None
    reads: int = 0
    reads_by_norms: int = 0


def probe(model: nn.Module, input_shape: Sequence[int]) -> Sites:
    """Run ``model`` once in evaluation mode on two blank inputs; it is left as it was.

    Raises:
        ContlearnError: a non-linearity called as a function on an input that is not normalised, or a model that does
            not take inputs of this shape.
    """
    device, dtype = place_of(model)
    modes = {module: module.training for module in model.modules()}
    watch = _Watch(model)
    model.eval()
    try:
        # With gradients: without them torch's transformer layers take a path that hides their operators.
        with torch.enable_grad(), watch:
            outputs = Features(model)(torch.zeros(2, *input_shape, device=device, dtype=dtype))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                watch.origin(output).reads += 1
    except ContlearnError:
        raise
    except Exception as error:  # a foreign forward may fail in any way
        raise ContlearnError(
            f"input_shape: {type(model).__name__} does not take inputs of shape {tuple(input_shape)} ({error})"
        ) from error
    finally:
        watch.remove()
        for module, training in modes.items():
            module.training = training
    return Sites(list(watch.activations.values()), watch.redundant_biases())


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.activations: dict[int, Activation] = {}
        self._origins: dict[int, _Origin] = {}
        self._alive: list[Any] = []  # a storage's address is only unique while it lives
        self._made: dict[nn.Module, list[_Origin]] = {}
        self._stack: list[tuple[str, nn.Module]] = []
        self._opaque = 0
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def origin(self, tensor: Tensor) -> _Origin:
        """What ``tensor`` comes from."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._origins:
            self._alive.append(storage)
            self._origins[storage._cdata] = _Origin()
        return self._origins[storage._cdata]

    def _new(self, tensor: Tensor, origin: _Origin) -> None:
        self.origin(tensor)
        self._origins[tensor.untyped_storage()._cdata] = origin

    def redundant_biases(self) -> list[nn.Module]:
        """Layers every output of which is read by normalisations alone."""
        return [
            module
            for module, outputs in self._made.items()
            if all(one.reads and one.reads == one.reads_by_norms for one in outputs)
        ]

    # ------------------------------------------------------------------ modules

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._stack.append((name, module))
            x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
            if x is None:
                return
            if self._is_leaf_norm(module):
                if not self._opaque:
                    self._read(x, by_norm=isinstance(getattr(module, "bias", None), Tensor))
                self._opaque += 1
            elif is_activation(module):
                if not self._opaque:
                    self._activate(name, module, x)
                self._opaque += 1

        return enter

    def _leaving(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._stack.pop()
        if not inputs or not isinstance(inputs[0], Tensor):
            return
        if self._is_leaf_norm(module) or is_activation(module):
            self._opaque -= 1
            if not self._opaque:
                self._new(output, _Origin(normalised=not is_activation(module)))
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and isinstance(output, Tensor):
            made = self.origin(output)
            made.module = module
            if module.bias is not None and not self._opaque:
                self._made.setdefault(module, []).append(made)

    @staticmethod
    def _is_leaf_norm(module: nn.Module) -> bool:
        """A normalisation and nothing else: timm has some that end in an activation."""
        return is_norm(module) and not any(True for _ in module.children())

    def _activate(self, name: str, module: nn.Module, x: Tensor) -> None:
        origin = self.origin(x)
        last = x.ndim == 2 or isinstance(origin.module, nn.Linear) or (
            x.ndim == 3 and not isinstance(origin.module, nn.Conv1d)
        )  # fmt: skip
        single = x[0].numel() == 1 or (last and x.shape[-1] == 1)
        # The norm that will stand here has an offset; a single number gets none.
        self._read(x, by_norm=not origin.normalised and not single)
        site = self.activations.setdefault(id(module), Activation(name, module))
        site.calls.append(Call(origin.normalised, tuple(x.shape), last))

    # ------------------------------------------------------------------ operators

    def _read(self, tensor: Tensor, *, by_norm: bool) -> None:
        origin = self.origin(tensor)
        origin.reads += 1
        origin.reads_by_norms += by_norm

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._opaque:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        plain = name.rstrip("_") if not name.startswith("_") else name
        if plain in _FUNCTIONS and not self.origin(args[0]).normalised:
            self._refuse(plain)
        keys = {tensor.untyped_storage()._cdata for tensor in inputs}
        outputs = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        changed = func._schema.is_mutable
        if not changed and made and all(one.untyped_storage()._cdata in keys for one in made):
            return outputs  # a view
        if plain in _COPIES and inputs:
            self._new(made[0], self.origin(inputs[0]))
            return outputs
        norm = plain in _NORMS
        for number, tensor in enumerate(inputs):
            offset = _NORMS.get(plain)
            by_norm = norm and number == 0 and offset is not None and args[offset] is not None
            self._read(tensor, by_norm=by_norm)
        for number, tensor in enumerate(made):
            self._new(tensor, _Origin(normalised=norm and number == 0))
        return outputs

    def _refuse(self, function: str) -> None:
        name, module = self._stack[-1] if self._stack else ("", None)
        where = f"{name or 'the model'} ({type(module).__name__})" if module is not None else "the model"
        function = {"_prelu_kernel": "prelu", "log_sigmoid_forward": "logsigmoid"}.get(function, function)
        raise ContlearnError(
            f"nap: {where} calls {function} as a function, and its input is not normalised; expected an activation "
            f"module (such as torch.nn.ReLU) in its place, or a normalisation right in front of it"
        )
