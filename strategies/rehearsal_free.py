"""Rehearsal-free regularisation: binary cross-entropy with distillation and parameter penalties, in any combination.

Smith et al., "A Closer Look at Rehearsal-Free Continual Learning" (arXiv 2203.17269), section 4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import UNSEEN
from contlearn.models._task_head import TaskHead
from contlearn.strategies.distillation import FeatKDPlugin, PredKDPlugin, SeenClasses
from contlearn.strategies.penalties import L2Plugin, OnlineEWCPlugin
from contlearn.strategies.step_part import Masks
from contlearn.strategies.teacher import classifier_name
from contlearn.strategies.template import SupervisedTemplate

ClassLoss = Literal["bce", "bce_local", "ce", "ce_local", "ce_kd"]
_CLASS_LOSSES = ("bce", "bce_local", "ce", "ce_local", "ce_kd")


class RehearsalFree(SupervisedTemplate):
    """Regularisation without exemplars, as compared by Smith et al.

    The class loss sees the columns of classes met so far and no others. A ``criterion`` is used in evaluation only. On
    a ``TaskHead`` the class loss takes the columns of each sample's task; see ``PredKDPlugin`` for its old columns.

    Args:
        class_loss: ``bce`` (binary cross-entropy, mean over batch and all classes seen), ``bce_local`` (over the
            current experience's classes), ``ce`` (softmax over the classes seen), ``ce_local`` (softmax over the
            current classes: FT++), ``ce_kd`` (``ce`` with distillation of the old classes' softmax).
        loss_scale: factor of the binary cross-entropies, distillation included; 5 in the authors' code.
        pred_kd: distil predictions on old classes: with ``bce`` the one binary cross-entropy of LwF.MC, whose targets
            are the teacher's sigmoids on old columns; with ``ce`` and ``ce_local`` in the form of ``ce_kd``.
        feat_kd: weight mu of feature distillation (5 in the paper's code); 0 for none.
        l2: coefficient of L2 towards the previous weights (0.05 there); 0 for none.
        ewc: coefficient of online EWC (10 there); 0 for none.
        fisher: Fisher diagonal of EWC from gradients of batches, as coded there, or of single samples.
        temperature: of the softmax distillation.
        update_mode: ``eval`` runs the network (all but its classifier) in evaluation mode inside the update: BatchNorm
            statistics never change and dropout is off, from the first experience and from random weights, too. So the
            authors' code does in all regularised learners, though the paper does not say it. ``train`` is as
            fine-tuning does.
        kwargs: options of the training loop.

    Raises:
        ContlearnError: a value out of range, or a plug-in that an option has brought already.
    """

    checkpoint_exclude = ("_masks",)

    def __init__(
        self,
        *,
        class_loss: ClassLoss = "bce",
        loss_scale: float = 5.0,
        pred_kd: bool = False,
        feat_kd: float = 0.0,
        l2: float = 0.0,
        ewc: float = 0.0,
        fisher: Literal["batch", "sample"] = "batch",
        temperature: float = 2.0,
        update_mode: Literal["eval", "train"] = "eval",
        **kwargs: Any,
    ) -> None:
        if class_loss not in _CLASS_LOSSES:
            raise ContlearnError(f"class_loss: expected {', '.join(_CLASS_LOSSES)}, got {class_loss!r}")
        if update_mode not in ("eval", "train"):
            raise ContlearnError(f"update_mode: expected eval or train, got {update_mode!r}")
        if not loss_scale > 0:
            raise ContlearnError(f"loss_scale: expected more than 0, got {loss_scale}")
        for name, value in (("feat_kd", feat_kd), ("l2", l2), ("ewc", ewc)):
            if not value >= 0:
                raise ContlearnError(f"{name}: expected at least 0, got {value}")
        super().__init__(**kwargs)
        self.class_loss = class_loss
        self.loss_scale = loss_scale
        self.update_mode = update_mode
        self.classes = SeenClasses()
        self._masks: Masks | None = None
        binary = class_loss in ("bce", "bce_local")
        self.pred_kd = pred_kd or class_loss == "ce_kd"
        terms: list[Any] = []
        if self.pred_kd:
            kind: Literal["sigmoid", "softmax"] = "sigmoid" if binary else "softmax"
            terms.append(PredKDPlugin(scale=loss_scale if binary else 1.0, kind=kind, temperature=temperature))
        if feat_kd:
            terms.append(FeatKDPlugin(mu=feat_kd))
        if l2:
            terms.append(L2Plugin(coefficient=l2))
        if ewc:
            terms.append(OnlineEWCPlugin(coefficient=ewc, fisher=fisher))
        for term in terms:
            if any(type(given) is type(term) for given in self.plugins):
                raise ContlearnError(
                    f"plugins: {type(term).__name__} is given twice; expected the strategy's own option or the plug-in"
                )
        self.plugins[:0] = terms

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.classes.start(self.experience)
        super()._before_training_exp(**kwargs)

    def _after_training_exp(self, **kwargs: Any) -> None:
        super()._after_training_exp(**kwargs)
        self.classes.finish()

    def _before_forward(self, **kwargs: Any) -> None:
        if self.update_mode == "eval":
            set_encoder_to_eval(self.model)
        super()._before_forward(**kwargs)

    def criterion(self) -> Tensor:
        """The class loss while training; in evaluation the plain criterion (cross-entropy)."""
        if not self.is_training:
            return super().criterion()  # type: ignore[no-any-return]
        if self._masks is not None:
            return self._masked_loss(self._masks)
        output, target, seen = self.mb_output, self.mb_y, self.classes.seen
        tasks = self.mb_task_id if isinstance(getattr(self.model, "head", None), TaskHead) else None
        if self.class_loss == "bce" and self.pred_kd and self.classes.old:
            # The new columns' share of the one mixed-target loss; PredKDPlugin adds the old columns'.
            return self._binary(output, target, tasks, self.classes.new, count=len(target) * len(seen))
        if self.class_loss == "bce":
            return self._binary(output, target, tasks, seen)
        if self.class_loss in ("bce_local", "ce_local"):
            return self.local_loss(output, target, tasks)
        return softmax_loss(output, target, seen)

    @contextlib.contextmanager
    def step_bound(self, masks: Masks, given: dict[str, Tensor]) -> Iterator[None]:
        """While open, the classes are given by masks."""
        self._masks = masks
        if self.update_mode == "eval":
            set_encoder_to_eval(self.model)
        try:
            yield
        finally:
            self._masks = None
            self.model.train()

    def _masked_loss(self, masks: Masks) -> Tensor:
        """The class loss with the classes given by masks."""
        output, target = self.mb_output, self.mb_y
        local = self.class_loss in ("bce_local", "ce_local")
        columns = masks.new if local or (self.class_loss == "bce" and self.pred_kd) else masks.seen
        if self.class_loss not in ("bce", "bce_local"):
            columns = masks.new if local else masks.seen
            return F.cross_entropy(torch.where(columns > 0, output, UNSEEN), target)
        one_hot = (target[:, None] == torch.arange(output.shape[1])).to(output.dtype)
        each = F.binary_cross_entropy_with_logits(output, one_hot, reduction="none") * columns
        count = len(target) * (masks.new if local else masks.seen).sum()
        return self.loss_scale * each.sum() / count

    def local_loss(self, output: Tensor, target: Tensor, task_labels: Tensor | None) -> Tensor:
        """The class loss over the columns of the current experience alone; EWC takes its Fisher from it.

        Args:
            output: logits ``(batch, outputs)``.
            target: labels ``(batch,)``.
            task_labels: task ids ``(batch,)``; only a ``TaskHead`` asks for them.
        """
        if self.class_loss in ("bce", "bce_local"):
            return self._binary(output, target, task_labels, self.classes.new)
        return softmax_loss(output, target, self.classes.new)

    def _binary(
        self, output: Tensor, target: Tensor, tasks: Tensor | None, labels: list[int], *, count: int | None = None
    ) -> Tensor:
        head = getattr(self.model, "head", None)
        admitted = head.task_classes[tasks] if isinstance(head, TaskHead) else None
        return self.loss_scale * binary_loss(output, target, labels, admitted=admitted, count=count)


def binary_loss(
    output: Tensor,
    target: Tensor,
    labels: list[int],
    *,
    admitted: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """Binary cross-entropy against one-hot targets over the columns of ``labels``.

    Args:
        output: logits ``(batch, outputs)``.
        target: class labels ``(batch,)``; one outside ``labels`` is a negative of all of them.
        labels: class labels whose columns take part.
        admitted: ``(batch, outputs)``, true where a column belongs to the sample's task; the mean is over these.
        count: what the sum is divided by, instead of the number of terms.
    """
    columns = torch.tensor(labels, device=output.device)
    logits = output[:, columns]
    losses = F.binary_cross_entropy_with_logits(logits, _one_hot(target, columns).to(logits.dtype), reduction="none")
    if admitted is None:
        return losses.sum() / (count or losses.numel())
    inside = admitted[:, columns].to(losses.dtype)
    return (losses * inside).sum() / (count or inside.sum().clamp(min=1))


def softmax_loss(output: Tensor, target: Tensor, labels: list[int]) -> Tensor:
    """Cross-entropy among the classes ``labels`` alone, mean over the samples whose class is one of them.

    Args:
        output: logits ``(batch, outputs)``.
        target: class labels ``(batch,)``; exemplars of other classes take no part.
        labels: class labels that compete.
    """
    columns = torch.tensor(labels, device=output.device)
    hot = _one_hot(target, columns)
    log_p = F.log_softmax(output[:, columns], 1)
    return -(log_p * hot.to(log_p.dtype)).sum() / hot.sum().clamp(min=1)


def _one_hot(target: Tensor, columns: Tensor) -> Tensor:
    return target[:, None] == columns


def set_encoder_to_eval(model: nn.Module) -> None:
    """Put all of ``model`` but its classifier in evaluation mode; the classifier must still grow with new classes."""
    name = classifier_name(model)
    if "." in name:
        model.eval()
        model.get_submodule(name).train()
        return
    for child, module in model.named_children():
        if child != name and module.training:
            module.eval()
