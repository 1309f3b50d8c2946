"""EcoTTA's warm-up (arXiv 2303.01904, section 3.1): the meta parts learn the source task before deployment.

Schedule and augmentation as in the community's completion of the authors' sample (Lily-Le/EcoTTA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as image

from contlearn.errors import ContlearnError
from contlearn.strategies import schedule

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def rate_factors(epochs: int, kind: schedule.ScheduleName) -> list[float]:
    """The multiplier of the learning rate in each epoch.

    Of 10 epochs, the published ``multistep`` warms the rate up in the first and multiplies it by 0.2 at epochs 3, 6
    and 8; other lengths scale these. Where the code raises the rate step by step over the first epoch, this holds it at
    the ramp's mean, so that the schedule does not depend on the number of batches.
    """
    if kind == "multistep":
        steps = sorted({place for place in (round(epochs * tenth / 10) for tenth in (3, 6, 8)) if 0 < place < epochs})
        warm = 1 if epochs >= 5 else 0
        if not steps:
            return [1.0] * epochs
        factor = schedule.factor("multistep", epochs=epochs, milestones=steps, gamma=0.2, warmup_epochs=warm)
    else:
        factor = schedule.factor(kind, epochs=epochs)
    return [factor(epoch) for epoch in range(epochs)]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Jitter, blur and grey each image of a batch (batch, channels, height, width) with values in 0..1.

    Brightness, contrast and saturation by up to 0.4 and hue by up to 0.1, in random order, with probability 0.4; blur
    3x3 with sigma 0.1 to 2, probability 0.2; grey, probability 0.1. Other than three channels have no colour: of the
    jitter, brightness and contrast remain.

    Raises:
        ContlearnError: values outside 0..1, which these operations would cut off.
    """
    low, high = (float(bound) for bound in torch.aminmax(images))
    if low < 0 or high > 1:
        raise ContlearnError(
            f"warmup_augment: expected images with values in 0..1, got {low:.3g}..{high:.3g}; expected a stream that "
            "does not normalise, or warmup_augment: false"
        )
    return torch.stack([_one(sample, generator) for sample in images])


def _one(sample: Tensor, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    coloured = len(sample) == 3
    if uniform(0, 1) < 0.4:
        jitters: list[Callable[[Tensor], Tensor]] = [
            lambda x: image.adjust_brightness(x, uniform(0.6, 1.4)),
            lambda x: image.adjust_contrast(x, uniform(0.6, 1.4)) if coloured else _contrast(x, uniform(0.6, 1.4)),
            lambda x: image.adjust_saturation(x, uniform(0.6, 1.4)) if coloured else x,
            lambda x: image.adjust_hue(x, uniform(-0.1, 0.1)) if coloured else x,
        ]
        for place in torch.randperm(len(jitters), generator=generator).tolist():
            sample = jitters[place](sample)
    if uniform(0, 1) < 0.2:
        sigma = uniform(0.1, 2.0)
        sample = image.gaussian_blur(sample, [3, 3], [sigma, sigma])
    if uniform(0, 1) < 0.1 and coloured:
        sample = image.rgb_to_grayscale(sample, num_output_channels=3)
    return sample


def _contrast(sample: Tensor, factor: float) -> Tensor:
    mean = sample.mean()
    return sample.sub(mean).mul_(factor).add_(mean).clamp_(0, 1)


def warm_up(
    network: torch.nn.Module,
    batches: Batches,
    *,
    optimizer: torch.optim.Optimizer,
    rates: list[float],
    first_epoch: int,
    prepare: Callable[[Tensor], Tensor],
    commit: Callable[[], None],
    after_epoch: Callable[[int], None],
) -> None:
    """Cross-entropy on labelled source data, epoch by epoch.

    Args:
        network: gives logits; what its optimizer holds trains.
        batches: starts a pass over (images, labels).
        optimizer: of the parts that train.
        rates: learning rate of each epoch.
        first_epoch: epochs that are done already.
        prepare: turns the images of a batch into those trained on.
        commit: called after each step.
        after_epoch: called with the number of epochs done.

    Raises:
        ContlearnError: a pass without a batch, or a loss that is not finite.
    """
    for epoch in range(first_epoch, len(rates)):
        for group in optimizer.param_groups:
            group["lr"] = rates[epoch]
        empty = True
        for x, y, *_ in batches():
            empty = False
            loss = F.cross_entropy(network(prepare(x)), y)
            if not bool(torch.isfinite(loss)):
                raise ContlearnError(
                    f"warm-up: the loss is {loss.item()} in epoch {epoch + 1}; expected a smaller warmup_lr or weights "
                    "that are finite"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            commit()
        optimizer.zero_grad()
        if empty:
            raise ContlearnError(
                f"warm-up: pass {epoch + 1} over the source data has no batch; expected a function that starts a new "
                "pass each time it is called"
            )
        after_epoch(epoch + 1)
