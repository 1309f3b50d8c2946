"""Fine-tuning on each experience in turn: the lower bound every method is compared with."""

from __future__ import annotations

from contlearn.strategies.template import SupervisedTemplate


class Naive(SupervisedTemplate):
    """Train on the current experience and nothing else."""
