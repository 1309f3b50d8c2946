"""CUB-200-2011 (Wah et al. 2011): photographs of 200 bird species, with the official split."""

from __future__ import annotations

from pathlib import Path

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.listings import Listing, read_listed, read_rows
from contlearn.scenarios.datasets.loading import Request


def load_cub200(request: Request) -> ImageData:
    """Whole photographs (bounding boxes are not used), resized to 224; labels follow ``classes.txt``.

    Raises:
        ContlearnError: A listing is damaged or the listings disagree, or an image cannot be read.
    """
    directory = request.root / "CUB_200_2011"
    class_names = _column(directory / "classes.txt")
    label_of = {identifier: label for label, identifier in enumerate(class_names)}
    class_of = _column(directory / "image_class_labels.txt")
    is_train = _column(directory / "train_test_split.txt")
    train, test = Listing(), Listing()
    for identifier, file_name in _column(directory / "images.txt").items():
        label, side = label_of.get(class_of.get(identifier, "")), is_train.get(identifier)
        if label is None or side not in ("0", "1"):
            raise ContlearnError(
                f"{directory / 'images.txt'}: image {identifier} ({file_name}) has no valid line in "
                "image_class_labels.txt or train_test_split.txt"
            )
        listing = train if side == "1" else test
        listing.files.append(directory / "images" / file_name)
        listing.targets.append(label)
    return read_listed(request, train, test, list(class_names.values()), directory=directory, default_size=224)


def _column(path: Path) -> dict[str, str]:
    """A listing of lines ``<id> <value>``, in file order."""
    return {row[0]: row[1] for row in read_rows(path, at_least=2)}
