"""Shared set-up: one thread, since the nets in these tests are too small for two, and no example has a time limit."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# No test times anything: hypothesis would fail one whose example takes 200 ms on a busy machine.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
