"""Random numbers for a batch of images, each image from a generator of its own.

Image 17 gets the same numbers alone, in a batch of 4 and in the whole data set, whatever the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Draws on the CPU, moved to ``device``: a corruption does not depend on where it is made.

    Args:
        key: what the draws belong to, such as seed, corruption and severity.
        indices: number of each image in its data set ``(n,)``.
        device: where the numbers go.
    """

    def __init__(self, key: str, indices: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._generators = [torch.Generator().manual_seed(_seed(f"{key}/{index}")) for index in indices]

    def zeros(self, *shape: int) -> Tensor:
        """Nothing drawn: float32 zeros ``(n, *shape)``."""
        return torch.zeros(len(self._generators), *shape, device=self._device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers ``(n, *shape)``."""
        return self._gathered([torch.randn(shape, generator=generator) for generator in self._generators])

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers in ``[low, high)``, shape ``(n, *shape)``."""
        unit = self._gathered([torch.rand(shape, generator=generator) for generator in self._generators])
        return unit.mul_(high - low).add_(low)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers in ``low..high - 1``, int64 ``(n, *shape)``."""
        drawn = [torch.randint(low, high, shape, generator=generator) for generator in self._generators]
        return self._gathered(drawn)

    def poisson(self, rates: Tensor) -> Tensor:
        """Counts with the given rates ``(n, ...)``, same shape."""
        pairs = zip(rates.cpu(), self._generators, strict=True)
        return self._gathered([torch.poisson(rate, generator=generator) for rate, generator in pairs])

    def _gathered(self, drawn: list[Tensor]) -> Tensor:
        return torch.stack(drawn).to(self._device)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
