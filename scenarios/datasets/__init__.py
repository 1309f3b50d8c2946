"""Data sets as image tensors: ``load`` one by name; ``list_datasets``, ``describe`` and ``status`` read no data.

Nothing here imports torch, torchvision or scikit-learn before ``load`` is called.
"""

from contlearn.scenarios.datasets.image_data import ImageData
from contlearn.scenarios.datasets.loading import load
from contlearn.scenarios.datasets.locate import CACHE_VARIABLE, DATA_VARIABLE, status
from contlearn.scenarios.datasets.registry import DatasetInfo, describe, list_datasets

__all__ = [
    "CACHE_VARIABLE",
    "DATA_VARIABLE",
    "DatasetInfo",
    "ImageData",
    "describe",
    "list_datasets",
    "load",
    "status",
]
