"""A memory given in bytes: the number of exemplars follows once the stream shows what one weighs."""

from __future__ import annotations

from typing import Any

from contlearn.errors import ContlearnError
from contlearn.flatdata import leaf_ids
from contlearn.memory.holdings import INDEX_BYTES, LABEL_BYTES, sample_bytes
from contlearn.memory.units import parse_bytes
from contlearn.strategies.template import SupervisedTemplate


class Rehearsal(SupervisedTemplate):
    """Base of strategies with a bounded memory of exemplars.

    A subclass says how many bytes it stores beside pixels, label and index (:meth:`extra_bytes`) and takes the number
    of exemplars through :meth:`set_memory_size`.

    Args:
        memory_budget: bytes of the memory (``65536``, ``64KB``), instead of ``memory_size``.
        kwargs: options of the training loop.

    Raises:
        ContlearnError: not an amount of memory, or (when training starts) too little for one exemplar.
    """

    def __init__(self, *, memory_budget: int | str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.memory_budget = None if memory_budget is None else parse_bytes(memory_budget)
        self._fitted = self.memory_budget is None

    def extra_bytes(self, n_classes: int) -> int:
        """Bytes stored with an exemplar beside pixels, label and index."""
        return 0

    def set_memory_size(self, count: int) -> None:
        """Take ``count`` as the number of exemplars."""
        raise NotImplementedError

    def exemplar_bytes(self, experience: Any) -> int:
        """Bytes of one exemplar of the stream that ``experience`` belongs to, as the memory account counts them."""
        leaves, _, _ = leaf_ids(experience.dataset)
        known = set(experience.classes_seen_so_far) | set(getattr(experience, "future_classes", None) or ())
        return sample_bytes(leaves[0]) + LABEL_BYTES + INDEX_BYTES + self.extra_bytes(len(known))

    def fit_memory(self, experience: Any) -> int | None:
        """Turn the budget into a number of exemplars, once; ``None`` without a budget.

        Raises:
            ContlearnError: a budget too small for one exemplar; the message gives the smallest that is not.
        """
        if self.memory_budget is None:
            return None
        each = self.exemplar_bytes(experience)
        count = self.memory_budget // each
        if count < 1:
            raise ContlearnError(
                f"memory_budget: {self.memory_budget} bytes hold no exemplar of {each} bytes; expected at least {each}"
            )
        self.set_memory_size(count)
        self._fitted = True
        return count

    def _before_training_exp(self, **kwargs: Any) -> None:
        if not self._fitted:
            self.fit_memory(self.experience)
        super()._before_training_exp(**kwargs)
