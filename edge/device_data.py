"""A data set as a device sees it: raw frames in NumPy arrays, labels as the artifact numbers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from contlearn.errors import ContlearnError, unknown_name


@dataclass(frozen=True)
class DeviceData:
    """Frames (rows, ...) and labels (rows,) for training and for evaluation.

    Attributes:
        order: labels in the order in which the data set's classes come.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    order: list[int]


def parse_corruption(text: str | None) -> tuple[str, int] | None:
    """``gaussian_noise:5`` as a name and a severity; 5 where none is given.

    Raises:
        ContlearnError: an unknown corruption, or a severity outside 1..5.
    """
    if text is None:
        return None
    from contlearn.scenarios.corruption import CORRUPTIONS

    name, _, severity = text.partition(":")
    if name not in CORRUPTIONS:
        raise unknown_name("corruption", name, CORRUPTIONS)
    if severity not in ("", *"12345"):
        raise ContlearnError(f"--corruption: expected NAME:SEVERITY with a severity from 1 to 5, got {text!r}")
    return name, int(severity or 5)


def load(manifest: Mapping[str, Any], data: str, *, corruption: str | None = None, seed: int = 0) -> DeviceData:
    """A data set for an artifact.

    Args:
        manifest: of the artifact: shape and dtype of frames, names of classes.
        data: a data set's name, or ``folder:PATH``.
        corruption: put on all frames, as in ``gaussian_noise:5``.
        seed: of the split, where the data set has none of its own, and of the corruption.

    Raises:
        ContlearnError: unknown or missing data, frames of another shape, classes that the artifact does not have.
    """
    import torch

    from contlearn.scenarios.corruption import corrupt
    from contlearn.scenarios.source import load_source

    spoil = parse_corruption(corruption)
    spec = next(spec for spec in manifest["inputs"] if spec["meaning"] == "frames")
    shape = tuple(spec["shape"][1:])
    square = len(shape) == 3 and shape[1] == shape[2]
    source = load_source(data, seed=seed, image_size=shape[1] if square and data.startswith("folder:") else None)
    if source.data.input_shape != shape:
        raise ContlearnError(f"--data: expected frames of shape {shape} for this artifact, {data!r} has "
                             f"{source.data.input_shape}")  # fmt: skip
    label_of = _labels(list(manifest["classes"]), list(source.data.class_names), _outputs(manifest), data)
    table = torch.tensor(label_of)
    rule, frames = manifest.get("preprocessing"), []
    for images in (source.data.train_images, source.data.test_images):
        if spoil is not None:
            images = corrupt(images, spoil[0], severity=spoil[1], seed=seed, scale=source.data.scale)
        raw = rule is not None and rule["input"] == "uint8"
        array = (images if raw else source.test_transform(images)).numpy()
        frames.append(np.moveaxis(array, 1, -1) if raw and rule is not None and rule["layout"] == "NHWC" else array)
    train_y, test_y = (table[targets].numpy() for targets in (source.data.train_targets, source.data.test_targets))
    return DeviceData(frames[0], train_y, frames[1], test_y, label_of)


def _outputs(manifest: Mapping[str, Any]) -> int:
    return int(next(spec["shape"][1] for spec in manifest["outputs"] if spec["meaning"] == "logits"))


def _labels(known: list[str], names: list[str], outputs: int, data: str) -> list[int]:
    """The artifact's label of each class of the data: by name where names agree, else by number."""
    if known and set(names) <= set(known):
        return [known.index(name) for name in names]
    if len(names) > outputs:
        raise ContlearnError(f"--data: {data!r} has {len(names)} classes, the artifact {outputs}; expected no more")
    return list(range(len(names)))
