"""Bounds that keep all data: joint training on everything at once, and cumulative training on everything so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.utils import concat_datasets

from contlearn.strategies.template import SupervisedTemplate


class Joint(SupervisedTemplate):
    """Upper bound: one training on the union of all experiences.

    ``train`` takes the whole stream at once; the accuracy matrix of a run has one row. Hooks see the last experience.
    """

    not_exportable = "it trains on the data of all experiences at once, which a device does not have"

    trains_jointly = True

    def train(self, experiences: Any, eval_streams: Any = None, **kwargs: Any) -> Any:
        """Train once on all ``experiences`` (a stream or a list)."""
        self._all = list(experiences) if isinstance(experiences, Iterable) else [experiences]
        return super().train(self._all[-1], eval_streams, **kwargs)

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Use the union of all experiences."""
        self.adapted_dataset = concat_datasets([experience.dataset for experience in self._all]).train()

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow the model, from the first experience on: in an online stream the last is no task boundary."""
        last, self.experience = self.experience, self._all[0]
        super().check_model_and_optimizer(**kwargs)
        self.experience = last

    def model_adaptation(self, model: Any = None) -> Any:
        """Grow the head for the classes of every experience."""
        if not self.is_training:
            return super().model_adaptation(model)
        last = self.experience
        for self.experience in self._all:
            model = super().model_adaptation(model)
        self.experience = last
        return model


class Cumulative(SupervisedTemplate):
    """Train on all data seen so far at every experience; the model is not reset in between."""

    not_exportable = "it trains on all data seen so far, which a device does not keep; export replay"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen: AvalancheDataset[Any] | None = None

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Use the union of the experiences so far."""
        assert self.experience is not None
        current = self.experience.dataset
        self.seen = current if self.seen is None else concat_datasets([self.seen, current])
        self.adapted_dataset = self.seen.train()
