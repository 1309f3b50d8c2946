"""Shared set-up: one thread, since the nets in these tests are too small for two, and quiet third parties."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
