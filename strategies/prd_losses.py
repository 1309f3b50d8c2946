"""The three losses of PRD as functions of tensors (Asadi et al., arXiv 2303.14771, section 3).

Comparisons and masks instead of indexing, so that each lowers to standard operators of fixed shape.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import UNSEEN

Relation = Literal["samples", "classes"]
RELATIONS: tuple[str, ...] = ("samples", "classes")
BASE_TEMPERATURE = 0.07
"""The contrastive loss is scaled by the temperature over this, as in the authors' code (and in SupCon's)."""


def check_relation(relation: str) -> None:
    """Check a name.

    Raises:
        ContlearnError: neither ``samples`` nor ``classes``.
    """
    if relation not in RELATIONS:
        raise ContlearnError(f"relation: expected samples or classes, got {relation!r}")


def supervised_contrastive(projections: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """L_SC: each row against all others, rows of its label being positives (SupCon, arXiv 2004.11362, equation 2).

    ``-(tau / 0.07) * mean over anchors i of mean over positives p of log softmax over a != i of (z_i z_a / tau)[p]``;
    an anchor without a positive adds 0.

    Args:
        projections: ``(rows, d)``; normalised here.
        labels: ``(rows,)``.
        temperature: tau.
    """
    z = F.normalize(projections, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_share = F.log_softmax(torch.where(itself, UNSEEN, z @ z.t() / temperature), dim=1)
    positive = (labels.unsqueeze(1) == labels.unsqueeze(0)) & ~itself
    count = positive.to(z.dtype).sum(1).clamp(min=1)
    chosen = torch.where(positive, log_share, 0.0).sum(1)
    return -(temperature / BASE_TEMPERATURE) * (chosen / count).mean()


def attraction(scores: Tensor, labels: Tensor) -> Tensor:
    """L_p: mean of ``1 - cos(f_i, p_{y_i})``; who calls it takes the encoder's gradient off the features first.

    Args:
        scores: cosines ``(rows, classes)`` of features and prototypes.
        labels: ``(rows,)``.
    """
    own = labels.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)
    return 1 - torch.where(own, scores, 0.0).sum(1).mean()


def prototype_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """``f p / |p|`` ``(rows, classes)``: the prototype is normalised, the feature is not.

    Args:
        features: ``(rows, d)``.
        prototypes: ``(classes, d)``.
    """
    return features @ F.normalize(prototypes, dim=1).t()


def relation_distillation(now: Tensor, before: Tensor, relation: Relation, temperature: float = 1.0) -> Tensor:
    """L_d of one old task: ``KL(softmax(before / T) || softmax(now / T))``.

    Args:
        now: scores ``(rows, classes of the task)`` of the student.
        before: the same of the teacher.
        relation: ``samples``: a distribution over the batch for each prototype, mean over prototypes (the paper's
            text); ``classes``: one over the task's classes for each sample, mean over samples (the released code).
        temperature: T.
    """
    if relation == "samples":
        now, before = now.t(), before.t()
    return F.kl_div(
        F.log_softmax(now / temperature, 1), F.log_softmax(before / temperature, 1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip


def masked_relation_distillation(
    now: Tensor, before: Tensor, tasks: Tensor, old: Tensor, relation: Relation, temperature: float = 1.0
) -> Tensor:
    """The sum of L_d over all old tasks, where masks say which classes are old; 0 where none are.

    Args:
        now: scores ``(rows, classes)`` of the student, for every class there is room for.
        before: the same of the teacher.
        tasks: number of each class's task ``(classes,)``.
        old: 1 where a class is of an old task ``(classes,)``.
        relation: as of :func:`relation_distillation`.
        temperature: T.
    """
    together = (tasks.unsqueeze(0) == tasks.unsqueeze(1)) & (old > 0).unsqueeze(0) & (old > 0).unsqueeze(1)
    if relation == "samples":
        p, q = (F.log_softmax(scores / temperature, 0) for scores in (before, now))
        each = (p.exp() * (p - q)).sum(0)  # by prototype
        return (each * old / together.to(now.dtype).sum(1).clamp(min=1)).sum()
    p, q = (_log_softmax_by_task(scores / temperature, together) for scores in (before, now))
    return (p.exp() * (p - q)).sum() / len(now)


def _log_softmax_by_task(scores: Tensor, together: Tensor) -> Tensor:
    """``(rows, classes)``: scores less the log of the sum of exponentials over the class's own task."""
    rivals = torch.where(together, scores.unsqueeze(1), UNSEEN)  # (rows, classes, classes)
    # A class of no old task has no rivals, itself not even; its value is not used, but its exponential must be finite.
    return torch.where(together.any(1), scores - torch.logsumexp(rivals, 2), 0.0)
