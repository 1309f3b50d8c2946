"""MEMO's storage account (Zhou et al., arXiv 2205.13218): a model is worth so many exemplars.

Rules of wangkiw/ICLR23-MEMO, ``utils/model2exemplar.py``: 4 bytes a parameter, 1 byte a pixel and channel, and no
classifier, optimizer, activations or class means. Sizes here are bytes; the paper's "MB" are MiB (2^20 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from contlearn.errors import ContlearnError, unknown_name
from contlearn.models._checks import whole

if TYPE_CHECKING:
    from torch import nn

CIFAR_IMAGE = 3 * 32 * 32
"""Bytes of one exemplar of CIFAR."""
IMAGENET_IMAGE = 3 * 224 * 224
"""Bytes of one exemplar of ImageNet, at the size it is trained at."""

_MIB = 2**20


@dataclass(frozen=True)
class MemoSplit:
    """Parameters of a backbone as MEMO cuts it.

    Attributes:
        general: Parameters of the part that all tasks share.
        specialised: Parameters of the part that every task gets a copy of.
    """

    general: int
    specialised: int

    @property
    def total(self) -> int:
        """Parameters of the whole backbone."""
        return self.general + self.specialised

    def expanded(self, tasks: int) -> int:
        """Parameters after ``tasks`` tasks."""
        return self.general + tasks * self.specialised


@dataclass(frozen=True)
class MemoAlignment:
    """What equal memory buys each kind of method at the end of a stream. Sizes in bytes; the paper prints MiB.

    Attributes:
        tasks: Number of tasks.
        budget: Size of DER's backbones and its exemplars, one backbone per task.
        memo_exemplars: Exemplars that MEMO may keep within the budget.
        single_exemplars: Exemplars that a method with one backbone may keep within it.
        memo_unaligned: Size of MEMO with DER's number of exemplars.
        single_unaligned: Size of a method with one backbone and DER's number of exemplars.
    """

    tasks: int
    budget: int
    memo_exemplars: int
    single_exemplars: int
    memo_unaligned: int
    single_unaligned: int


@dataclass(frozen=True)
class MemoDevice:
    """Bytes that MEMO keeps on a device.

    Attributes:
        weights: The general part and one specialised part per task.
        classifier: The weights of the linear classifier, without its biases.
        exemplars: The stored images.
    """

    weights: int
    classifier: int
    exemplars: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.classifier + self.exemplars


@dataclass(frozen=True)
class MemoAUC:
    """Areas under the accuracy-over-memory curves, in MiB (accuracies 0..1).

    Attributes:
        average: AUC-A, of the average accuracy over the stream.
        last: AUC-L, of the accuracy after the last task.
    """

    average: float
    last: float


def exemplars_per_model(params: int, image_bytes: int = CIFAR_IMAGE) -> int:
    """Whole exemplars that fit in the memory of a model.

    ResNet-32 is worth 603 exemplars of CIFAR (603.52). ResNet-18 is worth 296 of ImageNet here: it is 296.995, and the
    297 of the literature is rounded up, while 603 is rounded down.

    Args:
        params: Parameters of the model, 4 bytes each.
        image_bytes: Bytes of one exemplar.
    """
    return memo_extra_exemplars(params, 0, image_bytes)


def memo_extra_exemplars(budget_params: int, method_params: int, image_bytes: int = CIFAR_IMAGE) -> int:
    """Whole exemplars that fit in the memory a method leaves of a budget of parameters.

    The protocol's first point of the accuracy-over-memory curve takes one benchmark backbone for the budget, all its
    others DER's backbones (see ``memo_alignment``).

    Args:
        budget_params: Parameters that the memory could hold, 4 bytes each.
        method_params: Parameters that the method has.
        image_bytes: Bytes of one exemplar.

    Raises:
        ContlearnError: A value out of range, or a method larger than the budget.
    """
    budget = whole("budget_params", budget_params, least=0)
    own = whole("method_params", method_params, least=0)
    if own > budget:
        raise ContlearnError(f"method_params is {own}, expected at most the budget's {budget}")
    return 4 * (budget - own) // whole("image_bytes", image_bytes, least=1)


def memo_split(backbone: nn.Module, *specialised: str) -> MemoSplit:
    """Parameters of a real backbone, cut as MEMO cuts it.

    MEMO specialises ``"stage3"`` of our ``resnet32`` (351,488 of 463,504) and ``"layer4"`` of timm's ``resnet18``
    (8,393,728 of 11,176,512).

    Args:
        backbone: A network without classifier, which MEMO does not count.
        specialised: Names of the submodules that every task gets a copy of.

    Raises:
        ContlearnError: No name, or one that the backbone does not have.
    """
    if not specialised:
        raise ContlearnError("no specialised part is named, expected names of submodules such as 'stage3'")
    modules = dict(backbone.named_modules())
    for name in specialised:
        if not name or name not in modules:
            raise unknown_name(f"part of {type(backbone).__name__}", name, [n for n, _ in backbone.named_children()])
    copied = {id(p): p.numel() for name in specialised for p in modules[name].parameters()}
    total = sum(p.numel() for p in backbone.parameters())
    return MemoSplit(general=total - sum(copied.values()), specialised=sum(copied.values()))


def memo_tasks(n_classes: int, initial: int, increment: int) -> int:
    """Number of tasks as MEMO's accounting counts them: (n_classes - initial) // increment + 1.

    One short where ``increment`` does not divide what follows the first task: the remaining classes are a task too.

    Args:
        n_classes: Classes of the stream.
        initial: Classes of the first task.
        increment: Classes of each later one.

    Raises:
        ContlearnError: A value out of range.
    """
    n_classes = whole("n_classes", n_classes, least=1)
    first = whole("initial", initial, least=1, most=n_classes)
    return (n_classes - first) // whole("increment", increment, least=1) + 1


def memo_alignment(
    split: MemoSplit,
    tasks: int,
    *,
    image_bytes: int = CIFAR_IMAGE,
    exemplars: int = 2000,
    single_params: int | None = None,
) -> MemoAlignment:
    """The memory-aligned protocol: every method may use what DER uses at the end of the stream.

    For CIFAR-100 in ten tasks with a ResNet-32 ``memo_exemplars`` is 3312, as in the authors' command line. Over ever
    larger backbones ``budget`` gives the points of their accuracy-over-memory curves: 12.4, 19.8 and 23.5 MiB for
    ResNet-14, 26 and 32 (ten tasks), 493, 872, 1180 and 1273 MiB for ImageNet ResNet-10, 26, 34 and 50 (eleven tasks).
    Two of their points are not met: ResNet-20 gives 16.12 MiB (printed 16.0), ImageNet ResNet-18 756.1 (printed 755).

    Args:
        split: The backbone that DER and MEMO expand.
        tasks: Number of tasks, see ``memo_tasks``.
        image_bytes: Bytes of one exemplar.
        exemplars: Number that DER keeps.
        single_params: Parameters of the method with one backbone; None for ``split``'s. Along the curve of accuracy
            over memory, expanding methods get ever larger backbones while this one stays.

    Raises:
        ContlearnError: A value out of range.
    """
    tasks = whole("tasks", tasks, least=1)
    image_bytes = whole("image_bytes", image_bytes, least=1)
    images = image_bytes * whole("exemplars", exemplars, least=0)
    single = split.total if single_params is None else single_params
    der, memo = tasks * split.total, split.expanded(tasks)
    return MemoAlignment(
        tasks=tasks,
        budget=4 * der + images,
        memo_exemplars=exemplars + memo_extra_exemplars(der, memo, image_bytes),
        single_exemplars=exemplars + memo_extra_exemplars(der, single, image_bytes),
        memo_unaligned=4 * memo + images,
        single_unaligned=4 * single + images,
    )


def memo_device_bytes(
    split: MemoSplit, tasks: int, *, features: int, classes: int, exemplars: int, image_bytes: int = CIFAR_IMAGE
) -> MemoDevice:
    """What MEMO keeps on a device after ``tasks`` tasks: 24.94 * 10^6 bytes for CIFAR-100 in ten tasks.

    Args:
        split: The backbone's parts.
        tasks: Number of tasks so far.
        features: Features that each specialised part gives; the classifier sees those of all tasks.
        classes: Classes so far.
        exemplars: Stored images.
        image_bytes: Bytes of one.

    Raises:
        ContlearnError: A value out of range.
    """
    tasks = whole("tasks", tasks, least=1)
    rows, columns = whole("classes", classes, least=1), tasks * whole("features", features, least=1)
    return MemoDevice(
        weights=4 * split.expanded(tasks),
        classifier=4 * rows * columns,
        exemplars=whole("exemplars", exemplars, least=0) * whole("image_bytes", image_bytes, least=1),
    )


def memo_auc(memory: Sequence[float], average_accuracy: Sequence[float], last_accuracy: Sequence[float]) -> MemoAUC:
    """Areas under accuracy over memory, by the trapezoid rule, as in the paper's AUC-A and AUC-L.

    Args:
        memory: Bytes at each point of the curve, rising.
        average_accuracy: Average accuracy at each, 0..1.
        last_accuracy: Accuracy after the last task at each, 0..1.

    Raises:
        ContlearnError: Fewer than two points, memory that does not rise, or an accuracy missing or outside 0..1.
    """
    if len(memory) < 2 or not all(a < b for a, b in pairwise(memory)):
        raise ContlearnError(f"memory is {list(memory)}, expected two or more rising sizes in bytes")
    return MemoAUC(
        average=_area(memory, average_accuracy, "average_accuracy"),
        last=_area(memory, last_accuracy, "last_accuracy"),
    )


def _area(memory: Sequence[float], accuracy: Sequence[float], option: str) -> float:
    if len(accuracy) != len(memory) or not all(0 <= a <= 1 for a in accuracy):
        raise ContlearnError(f"{option} is {list(accuracy)}, expected {len(memory)} numbers from 0 to 1")
    steps = zip(pairwise(memory), pairwise(accuracy), strict=True)
    return sum((right - left) * (low + high) / 2 for (left, right), (low, high) in steps) / _MIB
