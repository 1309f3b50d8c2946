"""Train/test splits of data that come without one: drawn from a seed, in proportion for every class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from contlearn.errors import ContlearnError


def stratified_split(
    labels: Sequence[int] | torch.Tensor, *, test_share: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions so that every class keeps its share, and at least one image, on both sides.

    The test set holds ``round(n * test_share)`` images in all wherever the per-class minimum allows it: every class
    gets its share rounded down, and the classes with the largest remainders one more (30,000 images at 0.2: 6,000).

    Args:
        labels: One label per image, ``(n,)``, any non-negative integers.
        test_share: Share of test images, 0 < share < 1.
        seed: Draws which images.

    Returns:
        Train and test positions, int64, each ascending; disjoint, together 0..n-1.

    Raises:
        ContlearnError: A class has a single image.
    """
    targets = torch.as_tensor(labels, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(targets == label).flatten() for label in torch.unique(targets)]
    sizes = [len(positions) for positions in members]
    if 1 in sizes:
        label = int(targets[members[sizes.index(1)]])
        raise ContlearnError(f"class {label} has a single image; a split needs at least 2 (1 train, 1 test)")
    in_test = torch.zeros(len(targets), dtype=torch.bool)
    for positions, n_test in zip(members, _test_sizes(sizes, test_share), strict=True):
        drawn = torch.randperm(len(positions), generator=generator)[:n_test]
        in_test[positions[drawn]] = True
    return torch.nonzero(~in_test).flatten(), torch.nonzero(in_test).flatten()


def _test_sizes(sizes: list[int], test_share: float) -> list[int]:
    """Test images per class: rounded down, then the largest remainders rounded up until the total is right."""
    ideal = [size * test_share for size in sizes]
    counts = [min(max(math.floor(share), 1), size - 1) for share, size in zip(ideal, sizes, strict=True)]
    missing = round(sum(sizes) * test_share) - sum(counts)
    by_remainder = sorted(range(len(sizes)), key=lambda index: counts[index] - ideal[index])
    for index in by_remainder:
        if missing > 0 and counts[index] < sizes[index] - 1:
            counts[index] += 1
            missing -= 1
    return counts


def take(images: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The images at ascending ``positions``: a view, not a copy, when these are consecutive."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions):
        return images[first : last + 1]
    return images[positions]
