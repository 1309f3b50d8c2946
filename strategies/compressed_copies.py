"""Copies of activations in 8 bits: a byte per number, and per group of channels the range that the bytes divide.

Mesa, arXiv 2111.11124: q = round((x - beta) 255 / alpha), with alpha = max - min and beta = min of a group, rounded up
or down by chance, so that the copy is right on average; x^ = q alpha / 255 + beta.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from contlearn.memory.saved import key_of

LEVELS = 255
Rounding = Literal["stochastic", "nearest"]
Ranges = Literal["batch", "ema"]


@dataclass(frozen=True)
class Form:
    """How the tensors of a copy are read: they alone are saved, and nothing that changes later has a part in them.

    Attributes:
        shape: of the tensor that was kept.
        axis: whose neighbouring elements form groups.
    """

    shape: torch.Size
    axis: int


@dataclass
class _Entry:
    """A copy that more than one layer may save, for as long as both it and what it was made from are alive."""

    source: weakref.ref[torch.UntypedStorage]
    codes: weakref.ref[torch.UntypedStorage]
    geometry: tuple[Any, ...]
    contiguous: bool
    version: int
    made: tuple[torch.Size, tuple[int, ...]]
    ranges: Tensor
    axis: int


class Compressor:
    """Makes the copies; the same tensor gets one, however many layers save it.

    Args:
        groups: at most so many groups along the axis of a tensor, where the caller says no other number.
        rounding: ``stochastic`` or ``nearest``.
        ranges: ``batch``, each copy has the range of its own numbers, or ``ema``, that of the paper: averaged over
            steps, so that numbers outside it are clipped.
        decay: of the average.
        min_elements: smaller tensors are kept as they are.
        generator: on the CPU, source of the stochastic rounding.
        averages: ranges by place (2, groups), moved in place under ``ema``.
    """

    def __init__(
        self, *, groups: int, rounding: Rounding, ranges: Ranges, decay: float, min_elements: int,
        generator: torch.Generator, averages: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self.groups = groups
        self.rounding = rounding
        self.ranges = ranges
        self.decay = decay
        self.min_elements = min_elements
        self.generator = generator
        self.averages = averages
        self._copies: dict[tuple[Any, ...], _Entry] = {}
        self._elsewhere: dict[torch.device, torch.Generator] = {}

    def takes(self, x: Tensor) -> bool:
        """Whether a copy of ``x`` is worth it: weights stay as they are, since they are in memory anyway."""
        base = x._base if x._is_view() and x._base is not None else x
        # An expanded tensor may have many more elements than numbers.
        return (
            not isinstance(base, nn.Parameter)
            and x.is_floating_point()
            and x.ndim > 0
            and x.numel() >= self.min_elements
            and x.numel() < x.untyped_storage().nbytes()
        )

    def keep(self, x: Tensor, axis: int, groups: int | None, place: str) -> tuple[list[Tensor], Form | None]:
        """What to save of ``x``: bytes (shape of x) and ranges (2, groups) with their form; or itself and ``None``.

        Args:
            x: any shape.
            axis: along which groups are formed.
            groups: at most so many; ``None`` for the usual number.
            place: name under which ``ema`` averages the range; without one, the range is that of ``x``.
        """
        if not self.takes(x):
            return [x], None
        key = (key_of(x.untyped_storage()), x.storage_offset(), x.numel(), x.dtype)
        shared = self._shared(key, x)
        if shared is not None:
            return shared
        form = Form(x.shape, axis % x.ndim)
        ranges = self._range(x, form, _divisor(x.shape[axis], groups or self.groups), place)
        codes = self._codes(x, form, ranges)
        self._note(key, x, codes, ranges, form)
        return [codes, ranges], form

    # ------------------------------------------------------------------ one copy per tensor

    def _shared(self, key: tuple[Any, ...], x: Tensor) -> tuple[list[Tensor], Form] | None:
        entry = self._copies.get(key)
        if entry is None or entry.version != x._version:
            return None
        storage = entry.codes()
        same = entry.geometry == (x.shape, x.stride())
        if storage is None or entry.source() is None or not (same or (entry.contiguous and x.is_contiguous())):
            return None
        codes = torch.empty(0, dtype=torch.uint8, device=x.device)
        codes.set_(storage, 0, *entry.made)  # type: ignore[call-overload]
        return [codes, entry.ranges], Form(x.shape, entry.axis)

    def _note(self, key: tuple[Any, ...], x: Tensor, codes: Tensor, ranges: Tensor, form: Form) -> None:
        def forget(_: Any, owner: weakref.ref[Compressor] = weakref.ref(self)) -> None:  # noqa: B008
            alive = owner()
            if alive is not None and alive._copies.get(key) is entry:
                del alive._copies[key]

        entry = _Entry(
            weakref.ref(x.untyped_storage(), forget),
            weakref.ref(codes.untyped_storage(), forget),
            (x.shape, x.stride()),
            x.is_contiguous(),
            x._version,
            (codes.shape, codes.stride()),
            ranges,
            form.axis,
        )
        self._copies[key] = entry

    # ------------------------------------------------------------------ numbers

    def _range(self, x: Tensor, form: Form, groups: int, place: str) -> Tensor:
        """Minimum and extent (2, groups), at least of single precision."""
        others = [axis for axis in range(x.ndim) if axis != form.axis]
        low, high = (x.amin(others), x.amax(others)) if others else (x, x)
        low, high = low.view(groups, -1).amin(1), high.view(groups, -1).amax(1)
        kind = torch.promote_types(x.dtype, torch.float32)
        found = torch.stack([low.to(kind), high.to(kind).sub_(low)])
        if self.ranges == "batch" or not place:
            return found
        held = self.averages.get(place)
        if held is None or held.shape != found.shape:
            self.averages[place] = found
        else:
            self.averages[place] = held.to(found).mul(self.decay).add_(found, alpha=1 - self.decay)
        # Never moved in place: copies that were saved before keep the range they were made with.
        return self.averages[place]

    def _codes(self, x: Tensor, form: Form, ranges: Tensor) -> Tensor:
        low, extent = ranges
        # A group without extent is all offset; the reciprocal of a denormal one would be infinite.
        factor = torch.where(extent > torch.finfo(extent.dtype).tiny * LEVELS, LEVELS / extent, 0)
        low = low - extent * (0.5 / LEVELS)  # what is cut off below is then rounded to the nearest
        scaled = torch.sub(x, _along(low, form, x.shape)).mul_(_along(factor, form, x.shape))
        if self.rounding == "stochastic":
            # 16 bits of chance per number, from -1/2 to 1/2: as fine as single precision is here.
            noise = self._noise(x.numel(), x.device).as_strided(scaled.shape, scaled.stride())
            scaled.add_(noise, alpha=2**-16)
        return scaled.clamp_(0, LEVELS).to(torch.uint8)

    def _noise(self, count: int, device: torch.device) -> Tensor:
        """``(count,)`` int16, uniform."""
        generator = self.generator
        if device.type != "cpu":
            # One number of the generator that checkpoints hold starts the device's own.
            seed = int(torch.randint(2**62, (), generator=generator))
            if device not in self._elsewhere:
                self._elsewhere[device] = torch.Generator(device)
            generator = self._elsewhere[device].manual_seed(seed)
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
        return words.random_(-(2**63), None, generator=generator).view(torch.int16)


def restore(tensors: list[Tensor], form: Form | None, dtype: torch.dtype) -> Tensor:
    """The tensor that was kept, as ``dtype`` where it is a copy in bytes."""
    if form is None:
        return tensors[0]
    codes, (low, extent) = tensors
    numbers = codes.to(torch.promote_types(dtype, torch.float32))
    numbers.mul_(_along(extent / LEVELS, form, codes.shape)).add_(_along(low, form, codes.shape))
    numbers = numbers.to(dtype)
    return numbers if numbers.shape == form.shape else numbers.view(form.shape)


def _along(values: Tensor, form: Form, shape: torch.Size) -> Tensor:
    """``(groups,)`` spread over the axis, in a shape that broadcasts."""
    if len(values) > 1:
        values = values.unsqueeze(1).expand(-1, shape[form.axis] // len(values)).reshape(-1)
    return values.view(-1, *[1] * (len(shape) - form.axis - 1))


def _divisor(size: int, most: int) -> int:
    """The largest number of equal groups up to ``most``."""
    return next(count for count in range(min(size, most), 0, -1) if size % count == 0)
