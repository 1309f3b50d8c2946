"""``ImageData``: a labelled image data set held as uint8 tensors, with what a model needs to normalise it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contlearn.errors import ContlearnError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ImageData:
    """Images, labels and pixel scale of one data set, split into training and test data.

    Images stay uint8: a model sees ``(x / scale - mean) / std``, or ``x / scale`` where ``mean`` is ``None``.

    Attributes:
        name: The name it was loaded by.
        train_images: uint8 ``(n_train, channels, height, width)``.
        test_images: uint8 ``(n_test, channels, height, width)``, the same image shape.
        train_targets: int64 ``(n_train,)``, 0..n_classes-1; every class occurs.
        test_targets: int64 ``(n_test,)``, 0..n_classes-1.
        class_names: One name per class, in label order.
        scale: The pixel value that maps to 1.0.
        mean: Per channel, of ``x / scale``; ``None`` when the data set is not normalised.
        std: Per channel, of ``x / scale``; ``None`` exactly when ``mean`` is.
        train_domains: int64 ``(n_train,)``, indices into ``domain_names``, or ``None``.
        test_domains: int64 ``(n_test,)``, or ``None`` exactly when ``train_domains`` is.
        domain_names: One name per domain; empty without domains.

    Raises:
        ContlearnError: A field has the wrong shape, dtype or range.
    """

    name: str
    train_images: torch.Tensor
    test_images: torch.Tensor
    train_targets: torch.Tensor
    test_targets: torch.Tensor
    class_names: tuple[str, ...]
    scale: float = 255.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    train_domains: torch.Tensor | None = None
    test_domains: torch.Tensor | None = None
    domain_names: tuple[str, ...] = ()

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of one image."""
        channels, height, width = self.train_images.shape[1:]
        return int(channels), int(height), int(width)

    def __repr__(self) -> str:
        sizes = f"train={len(self.train_images)}, test={len(self.test_images)}, input_shape={self.input_shape}"
        return f"ImageData({self.name!r}, {sizes}, n_classes={self.n_classes}, n_domains={len(self.domain_names)})"

    def __post_init__(self) -> None:
        import torch

        self._check_images("train_images", self.train_images)
        self._check_images("test_images", self.test_images)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            self._fail(
                f"train and test images differ in shape: {tuple(self.train_images.shape[1:])} and "
                f"{tuple(self.test_images.shape[1:])} (channels, height, width)"
            )
        if not self.class_names:
            self._fail("class_names is empty; expected one name per class")
        n_train, n_test, n_classes = len(self.train_images), len(self.test_images), len(self.class_names)
        self._check_indices("train_targets", self.train_targets, n_train, n_classes, "class_names")
        self._check_indices("test_targets", self.test_targets, n_test, n_classes, "class_names")
        absent = torch.bincount(self.train_targets, minlength=n_classes).eq(0).nonzero().flatten().tolist()
        if absent:
            names = ", ".join(self.class_names[label] for label in absent[:3])
            self._fail(
                f"{len(absent)} of {n_classes} classes have no training image ({names}); "
                "train_targets must hold every label from 0 to n_classes - 1"
            )
        self._check_domains(n_train, n_test)
        self._check_scale()

    def _fail(self, problem: str) -> None:
        raise ContlearnError(f"data set {self.name!r}: {problem}")

    def _check_images(self, field: str, images: torch.Tensor) -> None:
        import torch

        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
            self._fail(f"{field} must be a uint8 tensor (n, channels, height, width), got {got}")
        if 0 in images.shape:
            self._fail(f"{field} is empty: shape {tuple(images.shape)}")

    def _check_indices(self, field: str, values: torch.Tensor | None, n: int, limit: int, names: str) -> None:
        import torch

        if not isinstance(values, torch.Tensor) or values.dtype != torch.int64 or tuple(values.shape) != (n,):
            got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            self._fail(f"{field} must be an int64 tensor of shape ({n},), one per image, got {got}")
            return
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            self._fail(f"{field} must lie in 0..{limit - 1} ({names} has {limit} entries), got {low}..{high}")

    def _check_domains(self, n_train: int, n_test: int) -> None:
        if not self.domain_names:
            if self.train_domains is not None or self.test_domains is not None:
                self._fail("train_domains or test_domains is given but domain_names is empty")
            return
        self._check_indices("train_domains", self.train_domains, n_train, len(self.domain_names), "domain_names")
        self._check_indices("test_domains", self.test_domains, n_test, len(self.domain_names), "domain_names")

    def _check_scale(self) -> None:
        if not self.scale > 0:
            self._fail(f"scale must be a positive pixel value, got {self.scale}")
        if self.scale < 255:
            high = max(int(self.train_images.max()), int(self.test_images.max()))
            if high > self.scale:
                self._fail(f"pixel values reach {high}, more than scale={self.scale:g}")
        if self.mean is None and self.std is None:
            return
        channels = self.input_shape[0]
        if self.mean is None or self.std is None or len(self.mean) != channels or len(self.std) != channels:
            self._fail(f"mean and std need {channels} values each, one per channel, got {self.mean} and {self.std}")
        elif not all(value > 0 for value in self.std):
            self._fail(f"std must be positive in every channel, got {self.std}")
