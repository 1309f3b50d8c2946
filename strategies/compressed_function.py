"""One autograd function for every operation whose saved activations Mesa compresses (arXiv 2111.11124).

A rule says what an operation keeps, exact or in bytes, and how its gradients are computed from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from contlearn.strategies.compressed_copies import Compressor, Form, restore

Gradients = Sequence[Tensor | None]


class Keeper:
    """What one call keeps for backward.

    Args:
        compressor: makes the copies.
        place: name of the call, for averaged ranges; empty where it has none.
        needs: which of the inputs need a gradient.
    """

    def __init__(self, compressor: Compressor, place: str, needs: Sequence[bool]) -> None:
        self.needs = needs
        self.tensors: list[Tensor | None] = []
        self.forms: list[tuple[int, Form | None]] = []
        self.dirty: Tensor | None = None
        self._compressor = compressor
        self._place = place

    def exact(self, *tensors: Tensor | None) -> None:
        """Keep tensors as they are."""
        for tensor in tensors:
            self.tensors.append(tensor)
            self.forms.append((1, None))

    def copy(self, x: Tensor, axis: int, *, groups: int | None = None) -> None:
        """Keep ``x`` in bytes, in groups along ``axis``."""
        place = self._place and f"{self._place}.{len(self.forms)}"
        tensors, form = self._compressor.keep(x, axis, groups, place)
        self.tensors += tensors
        self.forms.append((len(tensors), form))


@dataclass(frozen=True)
class Rule:
    """An operation.

    Attributes:
        forward: of a keeper, the call and the input tensors; the result.
        backward: of what was kept, the gradient of the result, which inputs need one, and the call; their gradients.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Gradients]


@dataclass
class Call:
    """One call of a function.

    Attributes:
        function: takes the input tensors alone.
        how: its other arguments, for backward.
        found: what forward notes for backward beside tensors.
    """

    function: Callable[..., Any]
    how: dict[str, Any] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


class Compressed(torch.autograd.Function):
    """``Compressed.apply(rule, call, compressor, place, *tensors)``: the result of a rule's forward."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, call: Call, compressor: Compressor, place: str, *inputs: Tensor | None) -> Tensor:
        keeper = Keeper(compressor, place, ctx.needs_input_grad[4:])
        out = rule.forward(keeper, call, *inputs)
        if keeper.dirty is not None:
            ctx.mark_dirty(keeper.dirty)
        ctx.save_for_backward(*keeper.tensors)
        ctx.forms, ctx.rule, ctx.call = keeper.forms, rule, call
        ctx.kinds = [None if x is None else x.dtype for x in inputs]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        saved, kept = list(ctx.saved_tensors), []
        # What takes functions over in the forward may do so here still: a function run again would be compressed again.
        with torch._C.DisableTorchFunction():
            for count, form in ctx.forms:
                kept.append(restore(saved[:count], form, gradient.dtype))
                del saved[:count]
            found = ctx.rule.backward(kept, gradient, ctx.needs_input_grad[4:], ctx.call)
        gradients = [None if g is None else g.to(kind) for g, kind in zip(found, ctx.kinds, strict=True)]
        return None, None, None, None, *gradients
