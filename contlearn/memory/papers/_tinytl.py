"""TinyTL's static memory profiler (Cai et al., arXiv 2007.11622), the one behind the MB of EcoTTA.

Rules of mit-han-lab/tinyml, ``tinytl/utils/memory_cost_profiler.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._checks import whole

_FLOAT_BITS = 32
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WEIGHTED = (*_CONVOLUTIONS, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_MASKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_SMOOTH = (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish)
# Blocks whose input the profiler holds beside the running layer, by name so that nothing need be imported. Wide
# residual blocks are not among them.
_RESIDUAL = {"torchvision.models.resnet": ("BasicBlock", "Bottleneck"), "ofa.utils.layers": ("ResidualBlock",)}


@dataclass(frozen=True)
class TinyTLLayer:
    """One call of one layer, for one sample.

    Attributes:
        name: Name of the module in the network.
        kind: Name of its class.
        stored_bits: What backward needs of it.
        working_bits: What the layer itself holds while it runs.
    """

    name: str
    kind: str
    stored_bits: int
    working_bits: int


@dataclass(frozen=True)
class TinyTLAccount:
    """Training memory under TinyTL's rules. All sizes are bytes; TinyTL and EcoTTA print MB of 10^6 bytes.

    Attributes:
        batch_size: Samples per step.
        trainable_parameters: Number of trained weights.
        frozen_parameters: Number of the others.
        parameter_bytes: Both at their precision.
        activation_bytes: What backward needs of the whole batch: the sum over the layers.
        peak_activation_bytes: The largest of "stored so far + the running layer's own", for the whole batch. A layer's
            own is its input, for convolutions and linear layers its output too (divided by the groups).
        layers: Every call of a layer that has a rule, in order.
        without_rule: Classes of the other layers that ran; they count nothing, as functional operations do.
    """

    batch_size: int
    trainable_parameters: int
    frozen_parameters: int
    parameter_bytes: int
    activation_bytes: int
    peak_activation_bytes: int
    layers: tuple[TinyTLLayer, ...]
    without_rule: tuple[str, ...]

    @property
    def stored(self) -> int:
        """Parameters and stored activations: the figures in EcoTTA's tables."""
        return self.parameter_bytes + self.activation_bytes

    @property
    def profiler_peak(self) -> int:
        """Parameters and peak activations: what the released profiler returns. Never in one table with ``stored``."""
        return self.parameter_bytes + self.peak_activation_bytes


def tinytl(
    network: nn.Module,
    input_shape: Sequence[int],
    *,
    batch_size: int = 8,
    trainable: Iterable[nn.Parameter] | None = None,
    frozen_bytes: int = 1,
) -> TinyTLAccount:
    """Training memory of ``network`` under TinyTL's rules.

    A convolution, linear layer, BatchNorm or GroupNorm stores its input (4 bytes a number) if its weight trains, a
    ReLU 1 bit per number always, a sigmoid, tanh, h-sigmoid or h-swish its input (4 bytes a number) always; everything
    else is invisible: functional operations, residual sums, pooling, LayerNorm, gradients, momentum. Subclasses count
    as what they are, where the released code compares types exactly.

    The forward runs once for one sample, in eval mode and without gradients, on the device the network is on: build it
    under ``torch.device("meta")`` and nothing is computed. Modes are restored afterwards.

    Args:
        network: Any module that maps one batch of images to anything.
        input_shape: Shape of one sample, such as (channels, height, width).
        batch_size: Samples per step.
        trainable: The parameters that train; None for those with ``requires_grad``.
        frozen_bytes: Bytes of one frozen weight: 1 (8-bit, TinyTL's and EcoTTA's) or 4.

    Raises:
        ContlearnError: A value out of range, a trainable parameter that is not the network's, or images it cannot take.
    """
    batch_size = whole("batch_size", batch_size, least=1)
    if frozen_bytes not in (1, 4):
        raise ContlearnError(f"frozen_bytes is {frozen_bytes!r}, expected 1 or 4")
    shape = tuple(whole("input_shape", size, least=1) for size in input_shape)
    parameters = list(network.parameters())
    trained = {id(p) for p in parameters if p.requires_grad} if trainable is None else {id(p) for p in trainable}
    if not trained <= {id(p) for p in parameters}:
        raise ContlearnError(f"a trainable parameter is not one of {type(network).__name__}'s")

    trace = _Trace(trained)
    with _observed(network, trace):
        _run_once(network, shape)
    numbers = sum(p.numel() for p in parameters if id(p) in trained)
    frozen = sum(p.numel() for p in parameters) - numbers
    return TinyTLAccount(
        batch_size=batch_size,
        trainable_parameters=numbers,
        frozen_parameters=frozen,
        parameter_bytes=4 * numbers + frozen_bytes * frozen,
        activation_bytes=_whole_bytes(batch_size * trace.stored_bits),
        peak_activation_bytes=_whole_bytes(batch_size * trace.peak_bits),
        layers=tuple(trace.layers),
        without_rule=tuple(sorted(trace.without_rule)),
    )


class _Trace:
    """The layers that one sample passes, with what the profiler holds beside each."""

    def __init__(self, trained: set[int]) -> None:
        self.trained = trained
        self.residual_bits = 0
        self.layers: list[TinyTLLayer] = []
        self.residuals: list[int] = []
        self.without_rule: set[str] = set()

    @property
    def stored_bits(self) -> int:
        """What backward needs."""
        return sum(layer.stored_bits for layer in self.layers)

    @property
    def peak_bits(self) -> int:
        """The largest of "stored by the layers before + held beside + the layer's own".

        The released code looks a layer's sizes up before the layer has run: a module that is called several times is
        taken at the sizes of its call before, the first at those of the last. Sums do not notice; peaks may.
        """
        before = {layer.name: layer for layer in self.layers}
        stored = peak = 0
        for layer, residual in zip(self.layers, self.residuals, strict=True):
            sizes = before[layer.name]
            before[layer.name] = layer
            peak = max(peak, stored + residual + sizes.working_bits)
            stored += sizes.stored_bits
        return peak

    def layer(self, name: str, module: nn.Module, numbers_in: int, numbers_out: int) -> None:
        """Count a call of ``module``, which took and gave so many numbers."""
        stored = 0
        working = _FLOAT_BITS * numbers_in
        if isinstance(module, _WEIGHTED):
            stored = _FLOAT_BITS * numbers_in if self._trains(module) else 0
            if isinstance(module, nn.Linear):
                working += _FLOAT_BITS * numbers_out
            elif isinstance(module, _CONVOLUTIONS):
                working += 8 * (_FLOAT_BITS // 8 * numbers_out // module.groups)
        elif isinstance(module, _MASKED):
            stored = numbers_in
        elif isinstance(module, _SMOOTH):
            stored = _FLOAT_BITS * numbers_in
        else:
            if next(module.children(), None) is None:
                self.without_rule.add(type(module).__name__)
            return
        self.layers.append(TinyTLLayer(name, type(module).__name__, stored, working))
        self.residuals.append(self.residual_bits)

    def _trains(self, module: nn.Module) -> bool:
        # A parametrized weight is computed from parameters of a child.
        sources = (p for n, p in module.named_parameters() if n == "weight" or n.startswith("parametrizations.weight."))
        return any(id(p) in self.trained for p in sources)


@contextmanager
def _observed(network: nn.Module, trace: _Trace) -> Iterator[None]:
    """``network`` in eval mode and telling ``trace`` of every call; as it was afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    handles = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.residual_bits = _FLOAT_BITS * _numbers((*args, *kwargs.values()))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trace.residual_bits = 0

    try:
        for name, module in network.named_modules():

            def called(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
            ) -> None:
                trace.layer(name, module, _numbers((*args, *kwargs.values())), _numbers((output,)))

            handles.append(module.register_forward_hook(called, with_kwargs=True))
            if _holds_its_input(module):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave))
        network.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def _run_once(network: nn.Module, shape: tuple[int, ...]) -> None:
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    sample = torch.zeros(1, *shape, device=like.device, dtype=like.dtype)
    try:
        with torch.no_grad():
            network(sample)
    except Exception as error:  # whatever the network's own layers raise
        raise ContlearnError(f"{type(network).__name__} cannot run one sample of shape {shape}: {error}") from error


def _holds_its_input(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__name__ == "InvertedResidual" and kind.__module__.startswith("torchvision.models.mobilenet"):
        return bool(getattr(module, "use_res_connect", False))
    if kind.__name__ not in _RESIDUAL.get(kind.__module__, ()):
        return False
    return getattr(module, "shortcut", True) is not None


def _numbers(values: Iterable[Any]) -> int:
    """Elements of the first tensor among ``values``."""
    return next((value.numel() for value in values if isinstance(value, Tensor)), 0)


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8)
