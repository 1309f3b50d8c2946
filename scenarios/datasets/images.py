"""Image files into one uint8 array: decoded by threads, resized; all unreadable files are reported at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets import cache

EXTENSIONS = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
DEFAULT_SIZE = 224
_CACHE_ABOVE = 2000
_PROGRESS_ABOVE = 500
_CHUNK = 256
_THREADS = min(8, os.cpu_count() or 1)
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_GREY_MODES = frozenset({"1", "L", "LA", "La", *_SIXTEEN_BIT})
_ORIENTATION_TAG = 0x0112  # EXIF
_QUARTER_TURNS = range(5, 9)


@dataclass(frozen=True)
class Decoding:
    """How files become arrays.

    Attributes:
        image_size: Height and width; ``None``: the files' own size when all share one, else 224.
        channels: 3, or ``None``: 1 when all files are grey, else 3.
        upright: Whether to turn photographs as their EXIF orientation says. Off for published data sets, whose
            papers did not.
    """

    image_size: int | None = None
    channels: int | None = 3
    upright: bool = False


@dataclass(frozen=True)
class _Header:
    height: int
    width: int
    grey: bool


@dataclass(frozen=True)
class _Unreadable:
    path: Path
    reason: str


def read_images(files: Sequence[Path], decoding: Decoding, *, root: Path, name: str) -> torch.Tensor:
    """Decode files into a uint8 tensor ``(len(files), channels, height, width)``, in order.

    Resizing follows torchvision's ``Resize`` (shorter side, bilinear, antialiased) and ``CenterCrop``. 16-bit grey
    becomes 8-bit by its high byte. More than 2,000 files are decoded once into the cache (see ``cache``) and mapped.

    Args:
        files: Image files below ``root``.
        decoding: Size, channels and orientation.
        root: What paths in the cache key are relative to.
        name: The data set's name, for messages.

    Raises:
        ContlearnError: Some files cannot be read; names the first and counts the others.
    """
    if len(files) <= _CACHE_ABOVE:
        return torch.from_numpy(_into_memory(_Decoder(files, decoding, name)))
    key = cache.fingerprint(files, root=root, settings=f"{decoding} Pillow {PIL.__version__}")
    cached = cache.load(key)
    if cached is None:
        decoder = _Decoder(files, decoding, name)
        cached = cache.store(key, decoder.shape(), decoder.chunks())
        if cached is None:
            cached = _into_memory(decoder)
    return torch.from_numpy(cached)


def _into_memory(decoder: _Decoder) -> np.ndarray:
    images = np.empty(decoder.shape(), dtype=np.uint8)
    start = 0
    for chunk in decoder.chunks():
        images[start : start + len(chunk)] = chunk
        start += len(chunk)
    return images


class _Decoder:
    """One pass over the files; ``chunks`` may be called again for another pass."""

    def __init__(self, files: Sequence[Path], decoding: Decoding, name: str) -> None:
        self._files = files
        self._decoding = decoding
        self._name = name
        self._shape: tuple[int, int, int] | None = None  # (channels, height, width)

    def shape(self) -> tuple[int, int, int, int]:
        """``(n, channels, height, width)``; looks at the files' headers when the settings leave it open."""
        if self._shape is None:
            self._shape = self._find_shape()
        return (len(self._files), *self._shape)

    def _find_shape(self) -> tuple[int, int, int]:
        size, channels = self._decoding.image_size, self._decoding.channels
        if size is not None and channels is not None:
            return channels, size, size
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._header, self._files, chunksize=_CHUNK))
        headers = {header for header in found if header is not None}  # the pass over the pixels reports the others
        if channels is None:
            channels = 1 if headers and all(header.grey for header in headers) else 3
        sides = {(header.height, header.width) for header in headers}
        if size is None and len(sides) == 1:
            return channels, *sides.pop()
        size = size or DEFAULT_SIZE
        return channels, size, size

    def _header(self, path: Path) -> _Header | None:
        try:
            with Image.open(path) as image:
                width, height = image.size
                if self._decoding.upright and _orientation(image) in _QUARTER_TURNS:
                    width, height = height, width
                return _Header(height, width, image.mode in _GREY_MODES)
        except Exception:  # reported with its reason by the pass over the pixels
            return None

    def chunks(self) -> Iterator[np.ndarray]:
        """Consecutive uint8 arrays ``(k, channels, height, width)``.

        After an unreadable file nothing more is yielded, but the rest is still read, to report all such files at once.
        """
        unreadable: list[_Unreadable] = []
        with ThreadPoolExecutor(_THREADS) as pool, _Progress(len(self._files), self._name) as progress:
            for start in range(0, len(self._files), _CHUNK):
                decoded = list(pool.map(self._decode, self._files[start : start + _CHUNK]))
                unreadable += [item for item in decoded if isinstance(item, _Unreadable)]
                if not unreadable:
                    yield np.stack([item for item in decoded if isinstance(item, np.ndarray)])
                progress.advance(len(decoded))
        if unreadable:
            raise self._error(unreadable)

    def _error(self, unreadable: list[_Unreadable]) -> ContlearnError:
        first, others = unreadable[0], len(unreadable) - 1
        also = f"; {others} other image(s) cannot be read either, next {unreadable[1].path}" if others else ""
        return ContlearnError(
            f"data set {self._name!r}: cannot read the image {first.path} ({first.reason}){also}; replace or delete it"
        )

    def _decode(self, path: Path) -> np.ndarray | _Unreadable:
        channels, height, width = self.shape()[1:]
        try:
            with Image.open(path) as image:
                upright = self._decoding.upright and _orientation(image) != 1
                turned = ImageOps.exif_transpose(image) if upright else image
                pixels = np.asarray(_fitted(_eight_bit(turned, grey=channels == 1), height, width))
        except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files
            # Pillow quotes the path, which the message already has.
            reason = str(error).replace(repr(str(path)), "the file") or type(error).__name__
            return _Unreadable(path, reason)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; upright (1) when there is none or it is damaged: the pixels may be fine."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Pillow raises SyntaxError, struct.error and others here
        return 1


def _eight_bit(image: Image.Image, *, grey: bool) -> Image.Image:
    """The image in mode L or RGB; alpha is dropped, as torchvision's loader does."""
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode.startswith(("I", "F")):
        raise ValueError(f"pixel format {image.mode!r} (32 bits per pixel) is not supported; save it with 8 or 16 bits")
    return image.convert("L" if grey else "RGB")


def _fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """Shorter side to the target, then the centre; an image of that size is returned as it is."""
    if image.size == (width, height):
        return image
    # Only squares get here: other shapes are kept when all files share them, and then nothing is resized.
    short, long = sorted(image.size)
    scaled = (height, int(height * long / short))
    image = image.resize(scaled if image.width <= image.height else scaled[::-1], Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


class _Progress:
    """A progress bar on a terminal for more than 500 images, else nothing."""

    def __init__(self, total: int, name: str) -> None:
        self._bar = None
        if total > _PROGRESS_ABOVE and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(f"reading {name}", total=total)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, count)
