"""Features in front of the part that trains, computed once per image and kept, for a trunk that never changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.scenarios.transforms import PerSample, RandomCrop, RandomFlip
from contlearn.strategies.loader import _transforms


class FeatureCache:
    """Outputs of a frozen function per image, found by the image's content.

    By content and not by place in a data set: an image may come from the stream, from a memory, or in a pass that a
    strategy makes by itself, and is recognised in all of them.

    Attributes:
        features: output ``(...)`` by digest of the image.
        limit: images that can exist; more mean that they are drawn anew each time.
    """

    def __init__(self) -> None:
        self.features: dict[bytes, Tensor] = {}
        self.limit: int | None = None
        self._made_by: tuple[tuple[int, int], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        return self  # copies of a model share the trunk's weights, too

    def __len__(self) -> int:
        return len(self.features)

    def made_by(self, weights: Iterable[Tensor]) -> None:
        """Forget everything if the weights are not those the features were computed with."""
        now = tuple((id(tensor), tensor._version) for tensor in weights)
        if now != self._made_by:
            self.features.clear()
        self._made_by = now

    def serve(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """``compute(x)`` for images ``(batch, channels, height, width)``, computed for those not seen before.

        Raises:
            ContlearnError: more different images than there are.
        """
        names = digests(x)
        missing = {name: place for place, name in enumerate(names) if name not in self.features}
        if self.limit is not None and len(self.features) + len(missing) > self.limit:
            raise ContlearnError(
                f"cache_trunk: more different images were met than the {self.limit} of the stream, so they are made at "
                "random; expected a stream without random augmentation, or cache_trunk false"
            )
        # On a CPU one at a time: no feature then depends on the images it was met with, and a resumed run, which
        # computes anew, has the same bits. A GPU, where bits are not promised, takes them together.
        places = list(missing.values())
        size = 1 if x.device.type == "cpu" else max(1, len(places))
        for start in range(0, len(places), size):
            some = places[start : start + size]
            for place, feature in zip(some, compute(x[some]), strict=True):
                self.features[names[place]] = feature.clone()
        return torch.stack([self.features[name] for name in names])


def digests(x: Tensor) -> list[bytes]:
    """16 bytes for each image of a batch; equal for equal images of the same shape and precision."""
    # Under autocast the same image has features of another precision.
    cast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    salt = f"{tuple(x.shape[1:])} {x.dtype} {cast}".encode()
    rows = x.detach().contiguous().cpu().flatten(1).view(torch.uint8).numpy()
    return [hashlib.blake2b(row.tobytes() + salt, digest_size=16).digest() for row in rows]


def require_fixed_images(dataset: AvalancheDataset[Any]) -> None:
    """Check that a data set's images are not augmented at random, as far as their transforms tell.

    Raises:
        ContlearnError: a random transform; the message names it.
    """
    steps = [step for chain in _transforms(dataset._flat_data) or () for step in getattr(chain, "steps", ())]
    drawn = [type(step).__name__ for step in steps if isinstance(step, RandomCrop | RandomFlip)]
    inner = [type(step.transform).__name__ for step in steps if isinstance(step, PerSample)]
    drawn += [name for name in inner if name.startswith(("Random", "ColorJitter"))]
    if drawn:
        raise ContlearnError(
            f"cache_trunk: the training images are augmented at random ({', '.join(drawn)}); expected a stream with "
            "augment none, or cache_trunk false"
        )
