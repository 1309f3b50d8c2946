"""CORe50 (Lomonaco and Maltoni, arXiv 1705.03550): 50 objects of 10 categories in 11 sessions, the domains."""

from __future__ import annotations

from contlearn.errors import ContlearnError
from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.listings import Listing, read_listed
from contlearn.scenarios.datasets.loading import Request
from contlearn.scenarios.datasets.tree import images_below

_SESSIONS = range(1, 12)
_TEST_SESSIONS = (3, 7, 10)
_PER_CATEGORY = 5
_CATEGORIES = (
    "plug_adapter",
    "mobile_phone",
    "scissor",
    "light_bulb",
    "can",
    "glass",
    "ball",
    "marker",
    "cup",
    "remote_control",
)
_OBJECTS = tuple(f"{category}{number}" for category in _CATEGORIES for number in range(1, _PER_CATEGORY + 1))


def load_core50(request: Request) -> ImageData:
    """Frames uint8 ``(n, 3, 128, 128)``; sessions 3, 7 and 10 test, the other 8 train, as in the paper.

    ``core50`` has the 50 objects as classes, ``core50:categories`` the 10 categories (objects 1 to 5, 6 to 10, ...).
    Only the pictures are read: the pickled file lists of the official site are neither needed nor opened.

    Raises:
        ContlearnError: An object is missing from a session, or a frame cannot be read.
    """
    directory = request.root / "core50_128x128"
    by_category = request.option == "categories"
    train, test = Listing(), Listing()
    for session in _SESSIONS:
        listing = test if session in _TEST_SESSIONS else train
        for index in range(len(_OBJECTS)):
            folder = directory / f"s{session}" / f"o{index + 1}"
            frames = images_below(folder) if folder.is_dir() else []
            if not frames:
                raise ContlearnError(f"{folder} holds no frames; unpack core50_128x128.zip again")
            listing.files += frames
            listing.targets += [index // _PER_CATEGORY if by_category else index] * len(frames)
            listing.domains += [session - 1] * len(frames)
    return read_listed(
        request,
        train,
        test,
        _CATEGORIES if by_category else _OBJECTS,
        directory=directory,
        default_size=128,
        domain_names=tuple(f"s{session}" for session in _SESSIONS),
    )
