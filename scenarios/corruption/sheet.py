"""A contact sheet: one picture under all 15 corruptions, one column per severity."""

from __future__ import annotations

import io
import os

import torch
from torch import Tensor
from torch.nn import functional

from contlearn.files import atomic_write_bytes

_CELL = 96  # pixels
_GAP = 4


def grid(images: Tensor, path: str | os.PathLike[str], *, seed: int = 0, scale: float = 255.0) -> None:
    """Write a PNG of 15 rows (corruptions) by 6 columns (clean, severities 1 to 5).

    Args:
        images: uint8 ``(n, channels, height, width)``; row ``i`` shows image ``i mod n``.
        path: the PNG to write.
        seed: seeds the corruptions.
        scale: pixel value of white.

    Raises:
        ContlearnError: images that cannot be corrupted, or a file that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from contlearn.scenarios.corruption import CORRUPTIONS, SEVERITIES, corrupt

    stride = _CELL + _GAP
    rows, columns = len(CORRUPTIONS), len(SEVERITIES) + 1
    canvas = torch.ones(3, rows * stride - _GAP, columns * stride - _GAP)
    for row, name in enumerate(CORRUPTIONS):
        number = row % len(images)
        image = images[number : number + 1]
        index = torch.tensor([number])
        cells = [corrupt(image, name, severity=s, seed=seed, indices=index, scale=scale) for s in SEVERITIES]
        pictures = torch.cat([image, *cells]).cpu().float() / scale
        fitted = functional.interpolate(pictures, size=(_CELL, _CELL), mode="nearest-exact")
        for column, cell in enumerate(fitted):
            top, left = row * stride, column * stride
            canvas[:, top : top + _CELL, left : left + _CELL] = cell
    # One pixel of the canvas is one of the file: left and top leave room for the names.
    left, top = 110, 30
    width, height = canvas.shape[2] + left + _GAP, canvas.shape[1] + top + _GAP
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    FigureCanvasAgg(figure)
    figure.figimage(canvas.permute(1, 2, 0).numpy(), xo=left, yo=_GAP)
    for column in range(columns):
        said = f"severity {column}" if column else "clean"
        figure.text((left + column * stride + _CELL / 2) / width, 1 - top / 2 / height, said, ha="center", va="center")
    for row, name in enumerate(CORRUPTIONS):
        place = 1 - (top + row * stride + _CELL / 2) / height
        figure.text((left - 8) / width, place, name.replace("_", "\n"), ha="right", va="center", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write_bytes(path, buffer.getvalue())
