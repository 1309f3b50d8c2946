"""What PRD adds to a network: a projector in front of the contrastive loss, and prototypes instead of a classifier.

Asadi et al., arXiv 2303.14771, section 3: h is an MLP d -> d -> d -> 128, P one bias-free row of d per class.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._classifier import Classifier
from contlearn.models._growing_head import UNSEEN, GrowingHead
from contlearn.models._task_head import TaskClassifier, TaskHead

OUTPUTS = 128
"""Of the projector."""


class Projector(nn.Sequential):
    """Linear, ReLU, Linear, ReLU, Linear: ``(batch, d)`` to ``(batch, 128)``; no norm, nothing behind the last.

    Args:
        features: d.
        seed: of the initial weights; torch's global generator is left alone.
    """

    def __init__(self, features: int, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(
                nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features), nn.ReLU(),
                nn.Linear(features, OUTPUTS),
            )  # fmt: skip


class Prototypes(GrowingHead):
    """A growing head without biases whose outputs are cosines: row ``i`` is the prototype of class ``i``.

    New rows get ``nn.Linear``'s initialisation, as the authors' heads do.
    """

    def __init__(self, in_features: int, out_features: int = 0) -> None:
        super().__init__(in_features)
        self.bias = None  # type: ignore[assignment]
        self.grow(out_features)

    def grow(self, out_features: int) -> None:
        """Append rows until there are ``out_features``; see ``GrowingHead.grow``."""
        added = out_features - self.out_features
        if added > 0:
            fresh = nn.Linear(self.in_features, added, bias=False).weight
            rows = torch.cat([self.weight.detach(), fresh.detach().to(self.weight)])
            self.weight = nn.Parameter(rows, requires_grad=self.weight.requires_grad)

    def forward(self, features: Tensor) -> Tensor:
        """Cosines ``(batch, outputs)`` of features ``(batch, in_features)``; ``UNSEEN`` for classes never trained."""
        scores = F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))
        if self.training or self.reported <= self.out_features:
            return scores
        return F.pad(scores, (0, self.reported - self.out_features), value=UNSEEN)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "weight")
        if stored is not None and stored.ndim == 2 and stored.shape[0] != self.out_features:
            blank = self.weight.detach().new_zeros(stored.shape[0], self.in_features)
            self.weight = nn.Parameter(blank, requires_grad=self.weight.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)


class TaskPrototypes(TaskHead, Prototypes):
    """Prototypes under the mask of each sample's task: ``TaskHead`` with cosines for logits."""


def add_prototypes(model: nn.Module, *, seed: int = 0) -> None:
    """Give a model a ``projector``, and prototypes for a ``head``; in place. What has both already is left alone.

    A head of fixed size becomes a growing one: prototypes of classes to come would be nothing but noise.

    Args:
        model: a classifier of ``contlearn.models``.
        seed: of the projector's weights.

    Raises:
        ContlearnError: another model, which does not say what its features are.
    """
    if not isinstance(model, Classifier):
        raise ContlearnError(
            f"model: prd needs a backbone and a head apart, expected a model of contlearn.models, "
            f"got {type(model).__name__}"
        )
    device = next(model.parameters()).device
    if not isinstance(model.head, Prototypes):
        kind: type[Prototypes] = TaskPrototypes if isinstance(model, TaskClassifier) else Prototypes
        model.head = kind(model.feature_dim).to(device)
    if not isinstance(getattr(model, "projector", None), Projector):
        model.projector = Projector(model.feature_dim, seed=seed).to(device)
