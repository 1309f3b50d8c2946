"""A linear head that gains rows when an experience brings new classes (single head, class-incremental)."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.models.dynamic_modules import DynamicModule
from torch import Tensor, nn
from torch.nn import functional as F

UNSEEN = -1e4
"""Logit of a class that was never trained: finite, so that losses stay numbers, and never the largest."""


class GrowingHead(DynamicModule):
    """A linear layer whose row ``i`` is class label ``i``; its rows follow the classes seen in training.

    It never shrinks, and it masks nothing: rows below the highest label that belong to classes not seen yet exist
    and compete, as they do in a head of fixed size.

    Its state dict holds ``weight`` (outputs, in_features) and ``bias`` (outputs,) like ``nn.Linear``'s. Loading one
    resizes the head to the rows stored in it, so a new model takes up a checkpoint of any age; give the optimizer
    the parameters afterwards.

    Args:
        in_features: Number of features.
        out_features: Rows to start with.
    """

    def __init__(self, in_features: int, out_features: int = 0) -> None:
        super().__init__()
        self.in_features = in_features
        self.reported = 0
        # nn.Linear cannot be used for 0 rows: its initialisation warns about empty tensors.
        self.weight = nn.Parameter(torch.empty(0, in_features))
        self.bias = nn.Parameter(torch.empty(0))
        self.grow(out_features)

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.weight.shape[0]

    def grow(self, out_features: int) -> None:
        """Append rows until there are ``out_features``; fewer than now changes nothing.

        Old rows keep their bits, new rows get ``nn.Linear``'s initialisation (its bound depends on ``in_features``
        alone) from torch's CPU generator, so that a seed gives the same rows on every device. The parameters are
        new objects with the old device, dtype and ``requires_grad``.
        """
        added = out_features - self.out_features
        if added > 0:
            fresh = nn.Linear(self.in_features, added)
            self.weight = _appended(self.weight, fresh.weight)
            self.bias = _appended(self.bias, fresh.bias)

    def adaptation(self, experience: Any) -> None:
        """Grow to the highest class label of ``experience``, in training mode only.

        Avalanche also calls this before it evaluates an experience; a head that grew there would learn from the
        test stream which classes are to come. Evaluation then only *reports* outputs for them, see ``forward``.
        """
        highest = 1 + max((int(label) for label in experience.classes_in_this_experience), default=-1)
        if self.training:
            self.grow(highest)
        else:
            self.reported = max(self.reported, highest)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (batch, outputs) of features (batch, in_features).

        In evaluation mode, classes met there but never trained get ``UNSEEN``, so that a criterion over a whole test
        stream (as Avalanche's ``strategy.eval(stream.test_stream)`` takes it) is finite and no answer is one of them.
        """
        logits = F.linear(features, self.weight, self.bias)
        if self.training or self.reported <= self.out_features:
            return logits
        return F.pad(logits, (0, self.reported - self.out_features), value=UNSEEN)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "weight")
        if stored is not None and stored.ndim == 2 and stored.shape[0] != self.out_features:
            rows = stored.shape[0]
            self.weight = _blank(self.weight, rows, self.in_features)
            self.bias = _blank(self.bias, rows)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _appended(old: nn.Parameter, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([old.detach(), rows.detach().to(old)]), requires_grad=old.requires_grad)


def _blank(old: nn.Parameter, *shape: int) -> nn.Parameter:
    return nn.Parameter(old.detach().new_zeros(shape), requires_grad=old.requires_grad)
