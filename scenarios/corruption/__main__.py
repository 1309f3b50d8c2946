"""``python -m contlearn.scenarios.corruption OUT.png``: a sheet of a data set's test images under all corruptions."""

from __future__ import annotations

import argparse
import sys

from contlearn.errors import ContlearnError
from contlearn.scenarios import datasets
from contlearn.scenarios.corruption import grid


def main(arguments: list[str] | None = None) -> int:
    """Write the sheet; 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m contlearn.scenarios.corruption", description=grid.__doc__)
    parser.add_argument("out", help="the PNG to write")
    parser.add_argument("--dataset", default="digits", help="a data set's name, or folder:PATH")
    parser.add_argument("--image-size", type=int, default=None, help="side in pixels to resize images to")
    parser.add_argument("--seed", type=int, default=0, help="seeds the split and the corruptions")
    given = parser.parse_args(arguments)
    try:
        data = datasets.load(given.dataset, image_size=given.image_size, seed=given.seed)
        grid(data.test_images[:15], given.out, seed=given.seed, scale=data.scale)
    except ContlearnError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
