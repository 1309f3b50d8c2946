"""MEMO: shared layers, one copy of the last stages per task, exemplars for the bytes that saves (arXiv 2205.13218).

Not the method of the same name for test-time adaptation (marginal entropy minimisation, arXiv 2110.09506).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from contlearn.errors import ContlearnError
from contlearn.strategies.expandable import Expandable
from contlearn.strategies.memo_network import ExpandableBackbone, expand
from contlearn.strategies.memo_split import split_backbone


class MEMO(Expandable):
    """Memory-efficient expandable model.

    The last stages of the backbone are specialised: every task appends a copy of the newest, trains it and freezes the
    older ones; a linear head reads the features of all. Trained on new data and herded exemplars together, with an
    auxiliary head on the newest part; then the head's new rows are aligned.

    Args:
        model: a model of ``contlearn.models`` with stages.
        specialised: how many of its last stages (of a transformer: blocks) every task gets a copy of.
        train_base: the shared layers train on after the first task, and their BatchNorm statistics move on, under older
            parts that stay as they were. Frozen is the released code's own default and needs the least memory to
            train; its commands for CIFAR-100 train them.
        kwargs: options of the auxiliary loss, the exemplars and the training loop.

    Raises:
        ContlearnError: a network without stages, or with fewer than ``specialised``.
    """

    def __init__(self, *, model: nn.Module, specialised: int = 1, train_base: bool = False, **kwargs: Any) -> None:
        backbone = getattr(model, "backbone", None)
        if backbone is None or not hasattr(model, "head"):
            raise ContlearnError(
                f"memo: expected a model of contlearn.models, with a backbone and a head, got {type(model).__name__}"
            )
        if not isinstance(backbone, ExpandableBackbone):
            general, part = split_backbone(backbone, specialised, input_shape=getattr(model, "input_shape", None))
            expand(model, general, part, train_base=train_base)
        super().__init__(model=model, **kwargs)
        self.specialised = specialised
