"""What strategies with a memory share: storage policies by name, herding, logits beside exemplars."""

from __future__ import annotations

from typing import Any, Literal

import torch
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from avalanche.models import avalanche_forward
from avalanche.training.storage_policy import (
    BalancedExemplarsBuffer,
    ClassBalancedBuffer,
    ExemplarsBuffer,
    ExperienceBalancedBuffer,
    ReservoirSamplingBuffer,
)
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.loader import BatchLoader, BatchSource
from contlearn.strategies.step import NotExportable

Policy = Literal["reservoir", "class_balanced", "experience_balanced", "herding"]


def require_positive(**options: int | None) -> None:
    """Check that options are at least 1 where they are given.

    Raises:
        ContlearnError: one that is not.
    """
    for name, value in options.items():
        if value is not None and value < 1:
            raise ContlearnError(f"{name}: expected at least 1, got {value}")


def storage_policy(name: Policy, memory_size: int) -> ExemplarsBuffer:
    """An Avalanche storage policy by name.

    Args:
        name: ``reservoir`` (a uniform sample of everything seen), ``class_balanced`` and ``experience_balanced`` (equal
            shares, each a reservoir), ``herding`` (equal shares per class, chosen by iCaRL's herding on features).
        memory_size: exemplars in all.

    Raises:
        ContlearnError: unknown name, or no room for one exemplar.
    """
    require_positive(memory_size=memory_size)
    if name == "reservoir":
        return ReservoirSamplingBuffer(memory_size)
    if name == "class_balanced":
        return ClassBalancedBuffer(memory_size)
    if name == "experience_balanced":
        return ExperienceBalancedBuffer(memory_size)
    if name == "herding":
        return HerdingBuffer(memory_size)
    raise ContlearnError(f"policy: expected reservoir, class_balanced, experience_balanced or herding, got {name!r}")


def device_policy(policy: ExemplarsBuffer) -> str:
    """What a device's runner calls a storage policy: ``reservoir`` or ``balanced`` (by class).

    Raises:
        NotExportable: one that needs features, or the borders between experiences.
    """
    if type(policy) is ReservoirSamplingBuffer:
        return "reservoir"
    if type(policy) is ClassBalancedBuffer:
        return "balanced"
    raise NotExportable(
        f"policy: {type(policy).__name__} cannot be kept on a device; expected reservoir or class_balanced"
    )


def take_in(policy: ExemplarsBuffer, agent: Any, experience: Any) -> None:
    """Update a storage policy with an experience.

    Avalanche keeps the weights of a reservoir as a slice of those of every sample it has just looked at; a copy lets
    the rest go.
    """
    policy.post_adapt(agent, experience)
    groups = getattr(policy, "buffer_groups", None)
    for buffer in [policy] if groups is None else groups.values():
        if isinstance(buffer, ReservoirSamplingBuffer):
            buffer._buffer_weights = buffer._buffer_weights.clone()


@torch.no_grad()
def outputs_of(module: Any, dataset: AvalancheDataset[Any], *, device: torch.device, batch_size: int = 512) -> Tensor:
    """``module`` applied to every sample of ``dataset`` under its evaluation transform: ``(n, ...)`` on the CPU.

    The module runs in evaluation mode and is left in the mode it was in.
    """
    owner = module if isinstance(module, nn.Module) else getattr(module, "__self__", None)
    modes = {m: m.training for m in owner.modules()} if isinstance(owner, nn.Module) else {}
    if isinstance(owner, nn.Module):
        owner.eval()
    batches = BatchLoader(BatchSource(dataset.eval(), device), batch_size=batch_size)
    outputs = torch.cat(
        [
            (avalanche_forward(module, x, rest[-1]) if isinstance(module, nn.Module) else module(x)).cpu()
            for x, *rest in batches
        ]
    )
    for m, training in modes.items():
        m.training = training
    return outputs


def herd(features: Tensor, count: int) -> list[int]:
    """Greedy herding (iCaRL, arXiv 1611.07725, algorithm 4).

    Args:
        features: ``(n, d)``; normalised by the caller where the method asks for it.
        count: exemplars to choose, at most ``n``.

    Returns:
        Positions in order of choice: each brings the mean of those chosen so far nearest to the mean of all.
    """
    mean = features.mean(0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen: list[int] = []
    for step in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / step).pow(2).sum(1)
        best = int(torch.where(free, distance, torch.inf).argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return chosen


class _RankedExemplars(ExemplarsBuffer):
    """Exemplars of one class in order of importance; making room drops the last."""

    _buffer: AvalancheDataset[Any]

    def resize(self, strategy: Any, new_size: int) -> None:
        """Keep the first ``new_size``."""
        self.max_size = new_size
        if len(self._buffer) > new_size:
            self._buffer = self._buffer.subset(list(range(new_size)))


class HerdingBuffer(BalancedExemplarsBuffer[_RankedExemplars]):
    """Equal shares per class, chosen by herding on the L2-normalised features of the model at that time.

    A class is herded once, when its data is there; later it only loses its last exemplars (iCaRL, algorithms 4 and 5).
    Avalanche's ``ParametricBuffer`` herds what is left again at every step, with a model that has moved on, and towards
    the mean of the exemplars instead of the class.
    """

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Take in the experience; a class that returns is herded anew from its exemplars and the new data."""
        data = exp.dataset
        rows = by_class(data)
        share = dict(
            zip(
                [*self.buffer_groups, *(label for label in rows if label not in self.buffer_groups)],
                self.get_group_lengths(len(set(self.buffer_groups) | set(rows))),
                strict=True,
            )
        )
        extract = feature_extractor(agent.model)
        for label, positions in rows.items():
            candidates = data.subset(positions)
            if label in self.buffer_groups:
                candidates = self.buffer_groups[label].buffer.concat(candidates)
            features = outputs_of(extract, candidates, device=agent.device).flatten(1)
            chosen = herd(nn.functional.normalize(features, dim=1), share[label])
            group = self.buffer_groups.setdefault(label, _RankedExemplars(share[label]))
            group.buffer = candidates.subset(chosen)
        for label, group in self.buffer_groups.items():
            group.resize(agent, share[label])


def by_class(data: AvalancheDataset[Any]) -> dict[int, list[int]]:
    """Positions of the samples of each class, classes in order of first appearance."""
    rows: dict[int, list[int]] = {}
    for position, label in enumerate(data.targets):  # type: ignore[attr-defined]
        rows.setdefault(int(label), []).append(position)
    return rows


def feature_extractor(model: nn.Module) -> Any:
    """The function from images to the features in front of the classifier, ``(batch, d)``.

    Raises:
        ContlearnError: a model without a ``features`` method.
    """
    features = getattr(model, "features", None)
    if not callable(features):
        raise ContlearnError(
            f"model: expected one with a features(x) method (as all of contlearn.models), got {type(model).__name__}"
        )
    return features


class LogitMemory(ClassBalancedBuffer):
    """A class-balanced memory that keeps, beside each exemplar, the logits the model gave it when it was stored.

    The head may have grown since: rows differ in length, and a batch pads them with NaN.
    """

    def post_adapt(self, agent: Any, exp: Any) -> None:
        """Take in the experience's data with the current model's logits."""
        data = exp.dataset
        logits = outputs_of(agent.model, data, device=agent.device)[:, : agent.output_width]
        stored = DataAttribute([row.clone() for row in logits], "logits", use_in_getitem=True)
        self.update_from_dataset(type(data)([data], data_attributes=[stored]), agent)
        for group in self.buffer_groups.values():
            # A subset refers to the rows of all it was cut from; only those of the exemplars are to stay in memory.
            kept = DataAttribute(list(group.buffer._data_attributes["logits"]), "logits", use_in_getitem=True)
            group.buffer = type(data)([group.buffer], data_attributes=[kept])
