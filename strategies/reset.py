"""Start over at every experience: the control that a method against loss of plasticity is measured with.

A network that is re-initialised has all its plasticity and has forgotten everything; one that learns the n-th task as
well as it does has lost none.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.teacher import classifier_name


class ResetPlugin(SupervisedPlugin):
    """Re-initialises the encoder and the optimizer's state at the start of each experience but the first.

    The first experience starts from the weights the model has; a copy of them is kept. Frozen parameters stay as they
    are. In an online stream, an experience is reset once, not at each of its pieces.

    Args:
        to: ``initial``: the very weights the first experience started from. ``fresh``: each tensor's initial values in
            a new random order (torch's global generator), which keeps the distribution and the norm of any
            initialisation and needs to know none; BatchNorm statistics go back to their initial values.
        head: whether the classifier starts over too; of one that grew, each row as it was when it appeared.
        moments: whether momenta and moments of the optimizer are forgotten.

    Attributes:
        initial: the copies, by name; rows that the classifier gained are added.
    """

    memory_names = {"initial": "initial_weights"}

    def __init__(
        self, to: Literal["initial", "fresh"] = "initial", *, head: bool = False, moments: bool = True
    ) -> None:
        super().__init__()
        if to not in ("initial", "fresh"):
            raise ContlearnError(f"to: expected initial or fresh, got {to!r}")
        self.to = to
        self.head = head
        self.moments = moments
        self.initial: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Keep the initial values the first time, put them back after that."""
        first = not self.initial
        held = self._tensors(strategy.model)
        for name, tensor in held.items():
            self.initial[name] = _extended(self.initial.get(name), tensor)
        if first or not getattr(strategy.experience, "is_first_subexp", True):
            return
        parameters = dict(strategy.model.named_parameters())
        for name, tensor in held.items():
            value = self.initial[name].to(tensor.device)
            if self.to == "fresh" and name in parameters:
                order = torch.randperm(value.numel()).to(value.device)
                value = value.flatten()[order].view_as(value)
            tensor.copy_(value)
        if self.moments:
            strategy.optimizer.state.clear()

    def kept_bytes(self, model: nn.Module, *, experiences: int, head_rows: int) -> int:
        """Bytes held between experiences beside the model: the initial values; ``head_rows`` is what the head gains."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors(model).values())
        return held + head_rows * self.head

    def _tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Trainable parameters and buffers that start over."""
        inside = f"{classifier_name(model)}."
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad] + list(model.named_buffers())
        return {name: tensor for name, tensor in named if self.head or not name.startswith(inside)}


def _extended(initial: Tensor | None, current: Tensor) -> Tensor:
    """Initial values in the shape of today: what has been added since is as it is now, before it was trained."""
    if initial is not None and initial.shape == current.shape:
        return initial
    extended = current.detach().clone()
    if initial is not None:
        extended[tuple(slice(size) for size in initial.shape)] = initial.to(current.device)
    return extended
