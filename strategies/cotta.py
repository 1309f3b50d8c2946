"""CoTTA: continual adaptation with an averaged teacher and random restoration of source weights (arXiv 2203.13591)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torchvision.transforms.v2 import functional as T

from contlearn.errors import ContlearnError, unknown_name
from contlearn.strategies.adapter import Adapter
from contlearn.strategies.bn_stats import use_batch_statistics
from contlearn.strategies.norm_layers import is_norm
from contlearn.strategies.tent import affine


class CoTTA(Adapter):
    """CoTTA: a student learns the predictions of a teacher, which is the moving average of the student.

    1. The teacher predicts the batch. Where the source model's mean confidence on the batch (largest softmax) is below
       ``confidence``, the mean of its logits over ``augmentations`` augmented copies of the batch takes the place of
       that prediction.
    2. The student takes a step on the cross-entropy with the teacher's softmax.
    3. ``teacher = decay * teacher + (1 - decay) * student``.
    4. Each weight of the student goes back to the source's with probability ``restoration``.

    The answer is the teacher's prediction of step 1. The source model, which the paper's method keeps for steps 1 and
    4, is the start that every adapter can go back to; released code holds it twice. BatchNorm uses the batch's
    statistics in all three models. Of the two released versions the symmetric loss for ImageNet is not the paper's.

    Args:
        decay: of the teacher.
        restoration: probability of step 4; 0.01 for CIFAR, 0.001 for ImageNet.
        augmentations: copies; 0 never augments.
        confidence: p_th; 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet.
        flip: probability that a copy is mirrored; 0 for data such as digits.
        train: ``all`` weights, or scale and offset of the normalisation layers (``norms``).
        kwargs: options every adapter has.

    Attributes:
        teacher: its weights, as far as they differ from the model's.
        augmented: whether the latest prediction was averaged over augmented copies.

    Raises:
        ContlearnError: a value out of range, or ``norms`` with a model that has none (at :meth:`start`).
    """

    not_exportable = "its augmentations and restored weights are drawn at random inside the step"
    memory_names = {"teacher": "teacher"}

    def __init__(
        self,
        *,
        decay: float = 0.999,
        restoration: float = 0.01,
        augmentations: int = 32,
        confidence: float = 0.92,
        flip: float = 0.5,
        train: Literal["all", "norms"] = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (
            ("decay", decay), ("restoration", restoration), ("confidence", confidence), ("flip", flip),
        ):  # fmt: skip
            if not 0 <= value <= 1:
                raise ContlearnError(f"{name}: expected 0..1, got {value}")
        if not augmentations >= 0:
            raise ContlearnError(f"augmentations: expected at least 0, got {augmentations}")
        if train not in ("all", "norms"):
            raise unknown_name("train", train, ("all", "norms"))
        self.decay, self.restoration, self.confidence, self.flip = decay, restoration, confidence, flip
        self.augmentations = augmentations
        self.train = train
        self.teacher: dict[str, Tensor] = {}
        self.augmented = False

    def configure(self) -> None:
        """Batch statistics; the weights that adapt."""
        self._hooks += use_batch_statistics(self.model)
        if self.train == "all":
            self.model.requires_grad_(True)
            return
        parameters = [one for module in self.model.modules() if is_norm(module) for one in affine(module)]
        if not parameters:
            raise ContlearnError(
                f"cotta: the model {type(self.model).__name__} has no normalisation layer with scale and offset; "
                "expected train: all, or a model such as resnet14"
            )
        for parameter in parameters:
            parameter.requires_grad_(True)

    def method_state(self) -> dict[str, Tensor]:
        """The teacher, and the state of the generator that masks and augmentations are drawn from."""
        state = {f"teacher.{name}": tensor for name, tensor in self.teacher.items()}
        return {**state, "generator": self.generator.get_state()}

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """Teacher and generator again.

        Raises:
            ContlearnError: weights of the teacher are missing.
        """
        missing = [name for name in self._initial if state and f"teacher.{name}" not in state]
        if missing or (state and "generator" not in state):
            raise ContlearnError(f"adapter state: the teacher's {', '.join(missing[:1]) or 'generator'!r} is missing")
        for name, start in self._initial.items():
            held = state[f"teacher.{name}"] if state else start
            if name in self.teacher:
                self.teacher[name].copy_(held)
            else:
                self.teacher[name] = held.detach().to(start.device, copy=True)
        if state:
            self.generator.set_state(state["generator"].cpu())
        else:
            self.generator.manual_seed(self.generator.initial_seed())

    def start(self) -> CoTTA:
        """Make ready."""
        self.teacher = {}
        super().start()
        return self

    def predict(self, x: Tensor) -> Tensor:
        """The teacher's logits ``(batch, classes)``, without augmentation; nothing changes."""
        with torch.no_grad():
            logits: Tensor = functional_call(self.model, self.teacher, (x,))
        return logits

    def adapt(self, x: Tensor) -> Tensor:
        """Predict with the teacher, then step."""
        if not self.steps:
            return self.predict(x)
        for _ in range(self.steps):
            target = self.target(x)
            loss = -(target.softmax(1) * self.model(x).log_softmax(1)).sum(1).mean()
            self.descend(loss)
            self._average()
            self._restore_some()
        return target

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """The teacher's logits ``(batch, classes)``, averaged over augmented copies where the source is unsure.

        The paper writes the mean of predictions; as in the released code, whose figures are the published ones, it is
        that of logits. There, too, one confidence is taken over the batch.
        """
        self.augmented = bool(
            self.augmentations and self.start_logits(x).softmax(1).amax(1).mean() < self.confidence
        )
        if not self.augmented:
            return self.predict(x)
        # One copy at a time: the network never holds more than a batch.
        total = self.predict(augment(x, self.generator, flip=self.flip))
        for _ in range(self.augmentations - 1):
            total += self.predict(augment(x, self.generator, flip=self.flip))
        return total / self.augmentations

    @torch.no_grad()
    def _average(self) -> None:
        for name, student in self.adapted():
            self.teacher[name].lerp_(student, 1 - self.decay)

    @torch.no_grad()
    def _restore_some(self) -> None:
        if not self.restoration:
            return
        for name, student in self.adapted():
            # Drawn on the CPU: a seed gives the same mask on every device.
            mask = torch.rand(student.shape, generator=self.generator) < self.restoration
            student.copy_(torch.where(mask.to(student.device), self._initial[name], student))


def augment(x: Tensor, generator: torch.Generator, *, flip: float = 0.5) -> Tensor:
    """A copy of a batch ``(batch, channels, height, width)`` with one random change of colours and position for all.

    The released code's chain for one set of parameters per batch: brightness, contrast, saturation, hue and gamma in
    random order; rotation, shift and scale; blur; mirror; noise. Grey images have neither saturation nor hue; of the
    colours of images with other than one or three channels, only gamma changes.

    Args:
        x: values in 0..1; other ranges are mapped there and back.
        generator: on the CPU; everything random is drawn from it.
        flip: probability of the mirror.
    """
    low, high = x.amin(), x.amax()
    if low >= 0 and high <= 1:
        low, high = torch.zeros_like(low), torch.ones_like(high)
    span = (high - low).clamp_min(1e-12)
    return _jittered(((x - low) / span).clamp(0, 1), generator, flip) * span + low


def _jittered(x: Tensor, generator: torch.Generator, flip: float) -> Tensor:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    changes = {
        "brightness": (T.adjust_brightness, uniform(0.6, 1.4)),
        "contrast": (T.adjust_contrast, uniform(0.7, 1.3)),
        "saturation": (T.adjust_saturation, uniform(0.5, 1.5)),
        "hue": (T.adjust_hue, uniform(-0.06, 0.06)),
        "gamma": (T.adjust_gamma, uniform(0.7, 1.3)),
    }
    names = list(changes)
    for place in torch.randperm(len(names), generator=generator).tolist():
        name = names[place]
        if name not in {1: ("brightness", "contrast", "gamma"), 3: names}.get(x.shape[1], ("gamma",)):
            continue
        change, amount = changes[name]
        x = change(x.clamp(1e-8, 1), amount)  # type: ignore[operator]
    height, width = x.shape[-2:]
    # Padded by half of the image before it turns, so that no border comes into view.
    x = T.pad(x, [width // 2, height // 2, width // 2, height // 2], padding_mode="edge")
    shift = [round(side * 2 * uniform(-1 / 16, 1 / 16)) for side in (width, height)]
    x = T.affine(
        x, angle=uniform(-15, 15), translate=shift, scale=uniform(0.9, 1.1), shear=[0.0, 0.0],
        interpolation=T.InterpolationMode.BILINEAR,
    )  # fmt: skip
    x = T.center_crop(T.gaussian_blur(x, [5, 5], [uniform(0.001, 0.5)] * 2), [height, width])
    if uniform(0, 1) < flip:
        x = T.horizontal_flip(x)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32)
    return (x + 0.005 * noise.to(x)).clamp(0, 1)
