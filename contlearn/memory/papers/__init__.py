"""Memory as papers report it, one function per convention, to compare with their tables.

Every convention leaves out other things, so numbers of two papers never belong in one table; what a process really
needs is measured elsewhere in ``contlearn.memory``. All results are bytes: divide by ``MB`` (10^6; TinyTL, EcoTTA,
MobileTL), ``MIB`` (2^20; MEMO) or ``SHERL_GB`` for the unit that the paper prints.
"""

from __future__ import annotations

from contlearn.memory.papers._ecotta import ECOTTA_PARTITIONS, ecotta, ecotta_fine_tuning, ecotta_tent
from contlearn.memory.papers._memo import (
    CIFAR_IMAGE,
    IMAGENET_IMAGE,
    MemoAlignment,
    MemoAUC,
    MemoDevice,
    MemoSplit,
    exemplars_per_model,
    memo_alignment,
    memo_auc,
    memo_device_bytes,
    memo_extra_exemplars,
    memo_split,
    memo_tasks,
)
from contlearn.memory.papers._mobiletl import MobileTLActivation, MobileTLBlock, MobileTLMethod, mobiletl_block
from contlearn.memory.papers._sherl import SHERL_GB, sherl_bytes, sherl_gb
from contlearn.memory.papers._tinytl import TinyTLAccount, TinyTLLayer, tinytl

MB = 10**6
MIB = 2**20

__all__ = [
    "CIFAR_IMAGE",
    "ECOTTA_PARTITIONS",
    "IMAGENET_IMAGE",
    "MB",
    "MIB",
    "SHERL_GB",
    "MemoAUC",
    "MemoAlignment",
    "MemoDevice",
    "MemoSplit",
    "MobileTLActivation",
    "MobileTLBlock",
    "MobileTLMethod",
    "TinyTLAccount",
    "TinyTLLayer",
    "ecotta",
    "ecotta_fine_tuning",
    "ecotta_tent",
    "exemplars_per_model",
    "memo_alignment",
    "memo_auc",
    "memo_device_bytes",
    "memo_extra_exemplars",
    "memo_split",
    "memo_tasks",
    "mobiletl_block",
    "sherl_bytes",
    "sherl_gb",
    "tinytl",
]
