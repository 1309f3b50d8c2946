"""DER, dynamically expandable representation: a whole backbone per task (arXiv 2103.16788), without its pruning masks.

Called ``der_expand`` here: ``der`` is dark experience replay.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from contlearn.errors import ContlearnError
from contlearn.strategies.expandable import Expandable
from contlearn.strategies.memo_network import ExpandableBackbone, expand


class DERExpand(Expandable):
    """Dynamically expandable representation, as the comparisons of MEMO run it.

    Every task appends a copy of the newest backbone, trains it and freezes the older ones; a linear head reads the
    features of all. The paper prunes each backbone with learned masks and finetunes the head on balanced data; neither
    is done here, nor in the comparisons whose memory account has it as reference.

    Args:
        model: a model of ``contlearn.models``.
        align: align the rows of new classes as MEMO does; no part of the method.
        kwargs: options of the auxiliary loss, the exemplars and the training loop.
    """

    def __init__(self, *, model: nn.Module, align: bool = False, **kwargs: Any) -> None:
        backbone = getattr(model, "backbone", None)
        if backbone is None or not hasattr(model, "head"):
            raise ContlearnError(
                f"der_expand: expected a model of contlearn.models, with a backbone and a head, got "
                f"{type(model).__name__}"
            )
        if not isinstance(backbone, ExpandableBackbone):
            expand(model, nn.Sequential(), backbone, train_base=False)
        super().__init__(model=model, align=align, **kwargs)
