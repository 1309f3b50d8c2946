"""PRD: prototype-sample relation distillation, class- and task-incremental without exemplars (arXiv 2303.14771).

A supervised contrastive loss trains the encoder, prototypes follow it, and their relation to new samples is distilled.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import UNSEEN
from contlearn.models._task_head import TaskClassifier
from contlearn.scenarios.augment import Views, check_views
from contlearn.strategies.loader import BatchSource
from contlearn.strategies.prd_losses import Relation, attraction, supervised_contrastive
from contlearn.strategies.prd_network import add_prototypes
from contlearn.strategies.prd_teacher import RelationTeacher, TeacherMode
from contlearn.strategies.template import SupervisedTemplate

_OWN = "prototypes"  # key of their group in the optimizer


class PRD(SupervisedTemplate):
    """Prototype-sample relation distillation (section 3): ``L_SC + beta * L_p + alpha * L_d``.

    L_SC is the supervised contrastive loss of a projector behind the features. L_p pulls each prototype towards the
    features of its class; features get no gradient from it. L_d, from the second experience on, keeps what the
    prototypes of old tasks said of each sample of the batch; it moves features and old prototypes. The prediction is
    the prototype with the largest cosine, among classes seen so far (and of the sample's task, where that is given).

    The model's classifier is replaced by prototypes without biases, and it gains a ``projector``. Every batch is
    doubled: the step sees two augmented views of each sample. A ``criterion`` is used in evaluation only.

    Args:
        alpha: weight of L_d.
        beta: weight of L_p.
        temperature: tau of L_SC, which is scaled by tau / 0.07 as in the authors' code.
        prototypes_lr: learning rate of the prototypes, a parameter group of their own without momentum and decay; it
            follows ``lr_schedule``. (In the released code the encoder's rate overwrites it.)
        relation: what L_d keeps of a prototype: ``samples``, its order of the batch's samples, as the paper says;
            ``classes``, its share among the classes of its task for each sample, as released.
        distil_temperature: T of L_d's softmax.
        teacher_mode: ``eval``, or ``train`` as released: the teacher's BatchNorm then uses the batch's statistics.
        views: augmented views of each sample; with 1, positives are the other samples of the class.
        crop: pixels of padding that a random crop moves over; default: an eighth of the shorter side.
        flip: mirror half of the views; off for digits and letters.
        jitter: probability of a change of brightness, contrast and saturation, of images with three channels.
        grayscale: probability of a loss of colour, likewise.
        seed: of the projector's initial weights.
        kwargs: options of the training loop.

    Raises:
        ContlearnError: a value out of range, a model that is not one of contlearn's, or an optimizer object that does
            not hold the prototypes.
    """

    checkpoint_exclude = ("_features",)

    def __init__(
        self,
        *,
        alpha: float = 4.0,
        beta: float = 2.0,
        temperature: float = 0.1,
        prototypes_lr: float = 0.01,
        relation: Relation = "samples",
        distil_temperature: float = 1.0,
        teacher_mode: TeacherMode = "eval",
        views: int = 2,
        crop: int | None = None,
        flip: bool = True,
        jitter: float = 0.8,
        grayscale: float = 0.2,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        for name, value in (
            ("alpha", alpha), ("beta", beta), ("prototypes_lr", prototypes_lr), ("seed", seed),
        ):  # fmt: skip
            if not value >= 0:
                raise ContlearnError(f"{name}: expected at least 0, got {value}")
        if not temperature > 0:
            raise ContlearnError(f"temperature: expected more than 0, got {temperature}")
        check_views(views, crop, jitter, grayscale)
        relations = RelationTeacher(relation=relation, temperature=distil_temperature, mode=teacher_mode)
        add_prototypes(kwargs["model"], seed=seed)
        super().__init__(**kwargs)
        give_own_rate(self.optimizer, self.model.head.weight, lr=prototypes_lr)
        self.plan_training()
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.relations = relations
        self.plugins.insert(0, relations)
        self.augment = Views(
            views, crop=crop, flip=flip, jitter=jitter, grayscale=grayscale, generator=self.generator
        )
        self._features: Tensor | None = None

    # ------------------------------------------------------------------ experiences

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow the prototypes, and keep them in their group."""
        super().check_model_and_optimizer(**kwargs)
        keep_apart(self.optimizer, self.model.head.weight)

    def _before_training_exp(self, **kwargs: Any) -> None:
        self.augment.black, self.augment.white = pixel_range(self.experience.dataset, self.device)
        super()._before_training_exp(**kwargs)

    # ------------------------------------------------------------------ iterations

    def _before_training_iteration(self, **kwargs: Any) -> None:
        images, *rest = self.mbatch
        # New tensors: whoever holds the batch's labels keeps them as they were.
        self.mbatch = [self.augment(images), *(torch.cat([part] * self.augment.views) for part in rest)]
        super()._before_training_iteration(**kwargs)

    def forward(self) -> Tensor:
        """Cosines ``(rows, outputs)``; in evaluation, classes not seen yet have no chance.

        In training the rows are the views, all first ones in front.
        """
        if not self.is_training:
            return self._among_seen(super().forward())
        features = self.model.features(self.mb_x)
        self._features = features
        arguments = (features, self.mb_task_id) if isinstance(self.model, TaskClassifier) else (features,)
        scores: Tensor = self.model.head(*arguments)
        return scores

    def _among_seen(self, scores: Tensor) -> Tensor:
        seen = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        seen[self.relations.classes.seen] = True
        return scores.masked_fill(~seen, UNSEEN)

    def criterion(self) -> Tensor:
        """The three losses while training; in evaluation the plain criterion (cross-entropy of the cosines)."""
        if not self.is_training:
            return super().criterion()  # type: ignore[no-any-return]
        features, self._features = self._features, None
        assert features is not None
        projections, prototypes = self.model.projector(features), self.model.head.weight
        with self._full_precision():
            loss = supervised_contrastive(projections.float(), self.mb_y, self.temperature)
            if self.beta:
                ahead = F.normalize(features.detach().float(), dim=1)
                loss = loss + self.beta * attraction(ahead @ F.normalize(prototypes, dim=1).t(), self.mb_y)
        if self.alpha:
            loss = loss + self.alpha * self.relations.loss(self.model, self.mb_x, features)
        return loss

    def _full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Similarities over a small temperature need more than 8 bits."""
        return contextlib.nullcontext() if self.amp == "none" else torch.autocast("cuda", enabled=False)


def give_own_rate(optimizer: Optimizer, prototypes: Tensor, *, lr: float) -> None:
    """Move the prototypes to a parameter group of their own, without momentum and weight decay.

    Raises:
        ContlearnError: an optimizer that does not hold them.
    """
    for group in optimizer.param_groups:
        if any(parameter is prototypes for parameter in group["params"]):
            own = {**group, "params": [], "lr": lr, "weight_decay": 0.0, _OWN: True}
            if "momentum" in group:
                own["momentum"] = 0.0
            optimizer.add_param_group(own)
            keep_apart(optimizer, prototypes)
            return
    raise ContlearnError(
        "optimizer: it does not hold the prototypes; expected a name, or an optimizer made after "
        "contlearn.strategies.prd_network.add_prototypes(model)"
    )


def keep_apart(optimizer: Optimizer, prototypes: Tensor) -> None:
    """Leave the prototypes in their own group alone: Avalanche adds a head that grew unseen to the first group."""
    for group in optimizer.param_groups:
        others = [parameter for parameter in group["params"] if parameter is not prototypes]
        group["params"] = [prototypes] if group.get(_OWN) else others


def pixel_range(dataset: Any, device: torch.device) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Values per channel of a black and a white pixel, as the network sees them.

    Images of data sets that hold no 8-bit pixels are taken to be from 0 to 1.

    Args:
        dataset: an ``AvalancheDataset``.
        device: where its transform runs.
    """
    source = BatchSource(dataset.eval(), device)
    first = source.raw(torch.zeros(1, dtype=torch.int64))[0]
    if first.dtype != torch.uint8:
        return (0.0,), (1.0,)
    black, white = (
        source.finish([torch.full_like(first, value)])[0].float().amin((0, 2, 3)).tolist() for value in (0, 255)
    )
    return tuple(black), tuple(white)
