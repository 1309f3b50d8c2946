"""Nearest mean of exemplars (iCaRL, arXiv 1611.07725, algorithm 1): class means of features, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contlearn.strategies.memories import feature_extractor, outputs_of

FAR = -1e4
"""Score of a class without exemplars: below every squared distance of unit vectors, and finite."""


def class_means(
    model: Any, groups: Mapping[int, Any], *, device: torch.device, mirror: bool = False
) -> dict[int, Tensor]:
    """The normalised mean ``(d,)`` of the normalised features of each class's exemplars, where it has any.

    Args:
        model: with a ``features`` method; it runs in evaluation mode on evaluation transforms.
        groups: buffers by label, as ``HerdingBuffer.buffer_groups``.
        device: where the model is.
        mirror: average over each exemplar and its mirror image, as in iCaRL's code.
    """
    extractors = [feature_extractor(model), *([_Mirrored(model)] if mirror else [])]
    means = {}
    for label, group in groups.items():
        if len(group.buffer):  # there may be more classes than the memory has room for
            features = [outputs_of(extract, group.buffer, device=device).flatten(1) for extract in extractors]
            means[int(label)] = F.normalize(F.normalize(torch.cat(features), dim=1).mean(0), dim=0)
    return means


def nearest_mean_scores(features: Tensor, means: Mapping[int, Tensor], outputs: int) -> Tensor:
    """Minus squared distances ``(batch, outputs)`` of normalised features to class means; ``FAR`` where none is.

    Args:
        features: ``(batch, d)``.
        means: from :func:`class_means`.
        outputs: columns, at least one more than the highest label.
    """
    scores = features.new_full((len(features), max([outputs, *(label + 1 for label in means)])), FAR)
    if means:
        labels = sorted(means)
        centres = torch.stack([means[label] for label in labels]).to(features)
        unit = F.normalize(features.flatten(1), dim=1)
        scores[:, torch.tensor(labels, device=features.device)] = -torch.cdist(unit, centres).pow(2)
    return scores


class _Mirrored(nn.Module):
    """Features of left-right mirrored images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return feature_extractor(self.model)(images.flip(-1))  # type: ignore[no-any-return]
