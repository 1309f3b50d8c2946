"""Test-time streams: clean training data, then test data under one corruption after another (arXiv 1903.12261)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from avalanche.benchmarks import DatasetExperience, EagerCLStream
from avalanche.benchmarks.utils import DataAttribute, TaskLabels, TransformGroups
from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios import datasets
from contlearn.scenarios.corruption import corrupt
from contlearn.scenarios.datasets.corrupted import CORRUPTED, open_corrupted
from contlearn.scenarios.source import load_source
from contlearn.scenarios.stream import (
    ImageTensors,
    LabelList,
    Scenario,
    classification_dataset,
    experiences_of,
    recorded,
)
from contlearn.scenarios.temporal import (
    Domain,
    Order,
    Schedule,
    chosen_corruptions,
    chosen_samples,
    domain_name,
    temporal_order,
    visit_names,
    visits_of,
)
from contlearn.scenarios.transforms import BatchTransform, Normalise

if TYPE_CHECKING:
    from contlearn.scenarios.datasets import ImageData

# Corrupted images kept at once; beyond it the domain used longest ago is dropped, and made again when asked for.
KEPT_BYTES = 1 << 30


@recorded
def corruptions(
    dataset: str | ImageData = "mnist5k",
    *,
    corruptions: Sequence[str] | None = None,
    severity: int = 5,
    schedule: Schedule = "continual",
    rounds: int = 1,
    order: Order = "iid",
    concentration: float = 0.1,
    samples: int | None = None,
    seed: int = 0,
    **data_options: Any,
) -> Scenario:
    """Clean training data once, then the test data under one corruption after another, in temporal order.

    ``continual``: each corruption once, at ``severity``, without a break (CoTTA, arXiv 2203.13591). ``gradual``: each
    corruption rises from severity 1 to ``severity`` and falls back to 1 (CoTTA's gradual protocol). ``recurring``: the
    list, ``rounds`` times. ``mixed``: all corruptions in one experience. The order of the samples inside a test
    experience is the order in time; nothing is to be shuffled.

    Images of a data set's test part are corrupted here (``contlearn.scenarios.corruption``) when first used;
    ``cifar10_c``, ``cifar100_c`` and ``imagenet_c`` read official files. A domain takes one byte per value, images x
    channels x height x width; at most 1 GiB of domains is kept (all of them in ``mixed``), others are made again.

    Args:
        dataset: a data set's name, ``folder:PATH`` for your own images, an ``ImageData``, or one of ``cifar10_c``,
            ``cifar100_c`` and ``imagenet_c``.
        corruptions: names of corruptions, in the order they come; default: all 15 in the official order.
        severity: 1 to 5; the peak where the schedule is ``gradual``.
        schedule: which domain comes when.
        rounds: how often ``recurring`` goes through the list, at least 2; otherwise 1.
        order: ``iid`` shuffles the samples of a test experience; ``dirichlet`` correlates their classes in time
            (NOTE, arXiv 2208.05117; RoTTA, arXiv 2303.13899).
        concentration: of the Dirichlet distribution; smaller is more correlated.
        samples: test images per domain, the same ones in every domain; default: all.
        seed: seeds corruptions, order, the choice of samples and the split.
        data_options: options of the data set.

    Returns:
        A :class:`TestTimeScenario`: a ``Scenario`` with ``domains`` and ``domain_names``.

    Raises:
        ContlearnError: unknown corruption or schedule, a severity outside 1..5, rounds that do not fit the schedule,
            more samples than test images, files missing or damaged. Without training images (ImageNet-C, or the clean
            CIFAR missing) only the use of ``train_stream`` raises.
    """
    names = chosen_corruptions(corruptions)
    if isinstance(severity, bool) or severity not in (1, 2, 3, 4, 5):
        raise ContlearnError(f"severity: expected a whole number from 1 to 5, got {severity!r}")
    if seed < 0:
        raise ContlearnError(f"seed: expected 0 or more, got {seed}")
    visits = visits_of(names, severity, schedule, rounds)
    if isinstance(dataset, str) and dataset in CORRUPTED:
        bed = _official(dataset, names, severity, seed, data_options)
    else:
        bed = _synthetic(dataset, seed, data_options)
    chosen = chosen_samples(len(bed.targets), samples, seed)
    domains = list(dict.fromkeys(domain for visit in visits for domain in visit))
    store = _Store(lambda domain: bed.images(domain, chosen), budget=None if schedule == "mixed" else KEPT_BYTES)
    targets = bed.targets[chosen]
    leaves = {domain: DomainImages(store, domain, targets) for domain in domains}
    bases: dict[tuple[Domain, ...], TaskAwareSupervisedClassificationDataset] = {}
    parts, sources, labels = [], [], []
    for number, visit in enumerate(visits):
        if visit not in bases:
            bases[visit] = _dataset([leaves[domain] for domain in visit], [domains.index(d) for d in visit], bed)
        sources.append(bases[visit])
        labels.append(targets.repeat(len(visit)))
        parts.append(temporal_order(labels[-1], order, concentration, np.random.default_rng((seed, 1, number))))
    test = experiences_of(sources, parts, targets=labels, tasks=[0] * len(visits))
    return TestTimeScenario(
        bed.train if isinstance(bed.train, list) else [],
        test,
        no_train=bed.train if isinstance(bed.train, str) else None,
        domains=visit_names(visits),
        domain_names=[domain_name(domain) for domain in domains],
        input_shape=bed.input_shape,
        class_names=bed.class_names,
    )


class TestTimeScenario(Scenario):
    """A stream whose test experiences are visits to domains, in temporal order.

    The data set of every test experience carries ``targets_domain``: for each sample, an index into ``domain_names``.

    Attributes:
        domains: name of each test experience: ``fog:5``, ``fog:5#2`` on the second visit, ``mixed``.
        domain_names: the distinct domains, ``corruption:severity``, in order of first appearance.
    """

    __test__ = False  # not a test class, whatever its name says to pytest

    def __init__(
        self,
        train: Sequence[DatasetExperience],
        test: Sequence[DatasetExperience],
        *,
        no_train: str | None,
        domains: Sequence[str],
        domain_names: Sequence[str],
        input_shape: tuple[int, int, int],
        class_names: Sequence[str],
    ) -> None:
        super().__init__(
            train,
            test,
            kind="corruptions",
            input_shape=input_shape,
            class_names=class_names,
            original_classes=range(len(class_names)),
        )
        self.domains = list(domains)
        self.domain_names = list(domain_names)
        if no_train is not None:
            self._streams["train"] = self.train_stream = _NoTrainStream(no_train)


class _NoTrainStream(EagerCLStream[DatasetExperience]):
    """Says why there is no training data to whoever asks for some."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        super().__init__("train", [])

    def _full_length(self) -> NoReturn:
        raise ContlearnError(self._reason)

    __len__ = _full_length

    def __getitem__(self, index: Any) -> NoReturn:
        raise ContlearnError(self._reason)

    def __iter__(self) -> NoReturn:
        raise ContlearnError(self._reason)


@dataclass(frozen=True)
class _Bed:
    """What a stream is made of: clean training experiences (or why there are none) and corrupted test images."""

    train: list[DatasetExperience] | str
    targets: Tensor  # of the test images (n,)
    images: Callable[[Domain, Tensor], Tensor]
    transform: BatchTransform
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]


def _synthetic(dataset: str | ImageData, seed: int, options: dict[str, Any]) -> _Bed:
    source = load_source(dataset, seed=seed, **options)
    data = source.data
    channels, height, width = data.input_shape
    if channels not in (1, 3) or min(height, width) < 8:
        raise ContlearnError(
            f"data set {data.name!r}: corruptions need 1 or 3 channels and sides of at least 8 pixels, got images "
            f"{data.input_shape}"
        )

    def images(domain: Domain, chosen: Tensor) -> Tensor:
        name, severity = domain
        return corrupt(data.test_images[chosen], name, severity=severity, seed=seed, indices=chosen, scale=data.scale)

    return _Bed(
        _clean(data.train_images, data.train_targets, source.train_transform, source.test_transform),
        data.test_targets,
        images,
        source.test_transform,
        data.class_names,
        data.input_shape,
    )


def _official(name: str, names: list[str], severity: int, seed: int, options: dict[str, Any]) -> _Bed:
    root, image_size = options.get("root"), options.get("image_size")
    files = open_corrupted(name, corruptions=names, severity=severity, root=root, image_size=image_size)
    mean, std = files.normalisation
    pixels = Normalise(255.0, mean, std) if options.get("normalise", True) else Normalise(255.0)
    class_names = files.class_names
    train: list[DatasetExperience] | str
    if files.source is None:
        train = f"data set {name!r} has no training images; take a model that was trained on ImageNet"
    else:
        found, said = datasets.status(files.source, root)
        train = f"data set {name!r} has no training images of its own: {said}"
        if found or options.get("download"):
            source = load_source(files.source, seed=seed, **options)
            data = source.data
            class_names = data.class_names if len(data.class_names) == len(class_names) else class_names
            train = _clean(data.train_images, data.train_targets, source.train_transform, source.test_transform)

    def images(domain: Domain, chosen: Tensor) -> Tensor:
        return files.images(*domain, chosen)

    return _Bed(train, files.targets, images, BatchTransform(pixels), class_names, files.input_shape)


def _clean(
    images: Tensor, targets: Tensor, train: BatchTransform, evaluation: BatchTransform
) -> list[DatasetExperience]:
    base = classification_dataset(
        ImageTensors(images, targets), task_labels=torch.zeros_like(targets), train=train, evaluation=evaluation
    )
    return experiences_of(base, [torch.arange(len(targets))], targets=targets, tasks=[0])


class _Store:
    """Images of domains, made on first use and kept up to ``budget`` bytes (``None``: all of them)."""

    def __init__(self, make: Callable[[Domain], Tensor], *, budget: int | None) -> None:
        self._make = make
        self._budget = budget
        self._kept: OrderedDict[Domain, Tensor] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return sum(images.nbytes for images in self._kept.values())

    def images(self, domain: Domain) -> Tensor:
        """The images of a domain, uint8 ``(n, channels, height, width)``."""
        if domain not in self._kept:
            self._kept[domain] = self._make(domain)
            while self._budget is not None and len(self._kept) > 1 and self.nbytes > self._budget:
                self._kept.popitem(last=False)
        self._kept.move_to_end(domain)
        return self._kept[domain]


class DomainImages(ImageTensors):
    """The leaf of one domain: its images come from the stream's store when they are asked for."""

    def __init__(self, store: _Store, domain: Domain, targets: Tensor) -> None:
        self._store = store
        self.domain = domain
        self.targets = targets

    @property
    def images(self) -> Tensor:  # type: ignore[override]
        """The corrupted images, uint8 ``(n, channels, height, width)``."""
        return self._store.images(self.domain)


def _dataset(
    leaves: Sequence[DomainImages], numbers: Sequence[int], bed: _Bed
) -> TaskAwareSupervisedClassificationDataset:
    """A data set over the leaves, one after another, with the domain of each sample as an attribute."""
    targets = torch.cat([leaf.targets for leaf in leaves])
    domain = torch.tensor(numbers).repeat_interleave(len(leaves[0]))
    return TaskAwareSupervisedClassificationDataset(
        list(leaves),
        data_attributes=[
            DataAttribute(LabelList(targets), "targets"),
            DataAttribute(LabelList(domain), "targets_domain"),
            TaskLabels(LabelList(torch.zeros_like(targets))),
        ],
        transform_groups=TransformGroups({"train": (bed.transform, None), "eval": (bed.transform, None)}),
    )
