"""Training of networks that grow by a part per task: what MEMO (arXiv 2205.13218) and DER (arXiv 2103.16788) share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from avalanche.models.dynamic_optimizers import update_optimizer
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.herded import HerdedRehearsal, read_features
from contlearn.strategies.memo_network import ExpandableBackbone


class Expandable(HerdedRehearsal):
    """Base of methods that append a part of the network at every task.

    Loss: cross-entropy of the head over all features + ``alpha_aux`` * cross-entropy of an auxiliary head on the newest
    part's features alone, which tells new classes from each other and from all old ones; from the second task on.

    Args:
        model: a model of ``contlearn.models``; its backbone and heads are replaced, in place, by ones that grow.
        alpha_aux: weight of the auxiliary loss.
        kwargs: options of the exemplars and of the training loop.
    """

    checkpoint_exclude: tuple[str, ...] = (*HerdedRehearsal.checkpoint_exclude, "_auxiliary")
    memory_names = {"_auxiliary": "auxiliary_output"}

    def __init__(self, *, model: nn.Module, alpha_aux: float = 1.0, **kwargs: Any) -> None:
        if not alpha_aux >= 0:
            raise ContlearnError(f"alpha_aux: expected at least 0, got {alpha_aux}")
        super().__init__(model=model, **kwargs)
        self.alpha_aux = alpha_aux
        self._auxiliary: Tensor | None = None
        moments = 0
        if not self.reset_optimizer:
            group = self.optimizer.param_groups[0]
            moments = 2 if "betas" in group else int(bool(group.get("momentum")))
        self.plugins.append(FutureParts(moments))

    @property
    def network(self) -> ExpandableBackbone:
        """The backbone."""
        backbone: ExpandableBackbone = self.model.backbone
        return backbone

    def backbone_parameters(self, tasks: int) -> int:
        """Parameters of the general layers and of one part per task."""
        general, part = self.network.sizes
        return general + tasks * part

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow, and let the optimizer go of what is frozen."""
        super().check_model_and_optimizer(**kwargs)
        self._drop_frozen()

    def _drop_frozen(self) -> None:
        """Frozen parameters have no gradient and would not move, but their momenta would stay in memory."""
        for group in self.optimizer.param_groups:
            for parameter in [p for p in group["params"] if not p.requires_grad]:
                self.optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if p.requires_grad]

    def forward(self) -> Tensor:
        """Outputs ``(batch, classes)``; while training, the auxiliary ones are kept for the loss."""
        if not self.is_training or not self.model.aux.classes:
            return super().forward()
        with read_features(self.model) as read:
            output = super().forward()
        self._auxiliary = self.model.aux(read[0])
        return output

    def criterion(self) -> Tensor:
        """The loss above; without the auxiliary term when evaluating."""
        loss: Tensor = super().criterion()
        if not self.is_training or self._auxiliary is None:
            return loss
        auxiliary, self._auxiliary = self._auxiliary, None
        return loss + self.alpha_aux * F.cross_entropy(auxiliary, self.model.aux.targets(self.mb_y))

    def declare_step(self, *, batch_size: int, input_shape: Sequence[int], **options: Any) -> Any:
        """The step of the task as it stands; with room for more classes than the head has, that of a task with these.

        Args:
            batch_size: samples of the current experience per step.
            input_shape: (channels, height, width).
            options: ``classes``, ``open_classes``.
        """
        rows, classes = self.model.head.out_features, options.get("classes")
        if self.network.new and classes is not None and classes > rows:
            options.setdefault("open_classes", sorted([*self.network.old, *self.network.new]))
            before = dict(self.model.named_parameters())
            self.model.train()
            self.network.begin(range(rows, classes))
            self.model.head.widen(classes)
            self.model.aux.renew()
            now = dict(self.model.named_parameters())
            update_optimizer(self.optimizer, now, before, reset_state=False)
            self.optimized_param_id = now
        step = super().declare_step(batch_size=batch_size, input_shape=input_shape, **options)
        self._drop_frozen()
        return step


class FutureParts(SupervisedPlugin):
    """Tells a budget how the network will have grown at the end of the stream; does nothing else.

    Args:
        moments: tensors the optimizer keeps per parameter between experiences.
    """

    memory_exempt = True

    def __init__(self, moments: int) -> None:
        super().__init__()
        self.moments = moments

    def kept_bytes(self, model: Any, *, experiences: int, head_rows: int) -> int:
        """Bytes of parts, columns and auxiliary rows that are still to come.

        Args:
            model: expanded, not trained yet.
            experiences: of the stream.
            head_rows: bytes of the head's missing rows at its present width.
        """
        part = model.backbone.specialised[0]
        buffers = sum(b.numel() * b.element_size() for b in part.buffers())
        weights = sum(p.numel() * p.element_size() for p in part.parameters())
        missing = head_rows // (4 * (model.feature_dim + 1))
        rows = missing + model.head.out_features
        columns = 4 * rows * model.backbone.part_features * (experiences - 1)
        auxiliary = 4 * (model.backbone.part_features + 1) * (-(-max(rows, 1) // experiences) + 1)
        extra = columns + (auxiliary if experiences > 1 else 0)
        # The momenta of one part are counted with the model: those of earlier parts are dropped.
        return int((experiences - 1) * (weights + buffers) + extra * (1 + self.moments))
