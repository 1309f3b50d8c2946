"""Mesa (arXiv 2111.11124): training whose saved activations take a byte per number, joined to any other method.

The forward runs in full precision; the copies that the backward pass needs are in 8 bits, rounded up or down by chance.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from contlearn.errors import ContlearnError
from contlearn.strategies.compressed_copies import Compressor, Ranges, Rounding
from contlearn.strategies.compressed_operations import CompressedOperations


class MesaPlugin(SupervisedPlugin):
    """Activation compression as a plug-in.

    While a strategy trains on an experience, the operations of its network (and of its losses) save compressed copies,
    see ``CompressedOperations``; evaluation is untouched.

    Args:
        groups: at most so many groups of channels share a range in each saved tensor; tensors of attention heads
            ``(batch, heads, tokens, ...)`` have a range for each head. The largest number that divides the channels.
        rounding: ``stochastic``, so that a copy is right on average, or ``nearest``.
        ranges: ``batch``, every copy has the range of its own numbers; or ``ema`` as in the paper, averaged over steps
            for each place in the network, which clips what lies outside it when the data change.
        decay: of that average.
        min_elements: tensors with fewer elements are saved as they are.

    Attributes:
        generator: source of the stochastic rounding.
        averages: ranges under ``ema``: minimum and extent (2, groups) by place.
    """

    not_exportable = "it compresses what autograd keeps, and an exported graph has none; export without it"

    memory_names = {"averages": "activation_ranges"}
    checkpoint_exclude = ("_operations",)
    memory_exclude = ("_operations",)

    def __init__(
        self,
        groups: int = 8,
        *,
        rounding: Rounding = "stochastic",
        ranges: Ranges = "batch",
        decay: float = 0.9,
        min_elements: int = 1024,
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("rounding", rounding, ("stochastic", "nearest")), ("ranges", ranges, ("batch", "ema")),
        ):  # fmt: skip
            if value not in choices:
                raise ContlearnError(f"{option}: expected {' or '.join(choices)}, got {value!r}")
        for option, number in (("groups", groups), ("min_elements", min_elements)):
            if not number >= 1:
                raise ContlearnError(f"{option}: expected at least 1, got {number}")
        if not 0 <= decay < 1:
            raise ContlearnError(f"decay: expected at least 0 and below 1, got {decay}")
        self.groups = groups
        self.rounding = rounding
        self.ranges = ranges
        self.decay = decay
        self.min_elements = min_elements
        self.generator = torch.Generator()
        self.averages: dict[str, Tensor] = {}
        self._seeded = False
        self._operations = CompressedOperations(
            Compressor(
                groups=groups, rounding=rounding, ranges=ranges, decay=decay, min_elements=min_elements,
                generator=self.generator, averages=self.averages,
            )
        )  # fmt: skip

    @property
    def operations(self) -> CompressedOperations:
        """The block ``with plugin.operations:`` in which what is saved is compressed, for a loop of one's own."""
        return self._operations

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Compress from here to the end of training on this experience, and no longer: it may end by an exception."""
        if not self._seeded:
            # From the global generator, which a run seeds, so that another seed rounds differently.
            self.generator.manual_seed(int(torch.randint(2**62, ())))
            self._seeded = True
        train = strategy._train_exp

        def train_compressed(*args: Any, **kwargs: Any) -> Any:
            vars(strategy).pop("_train_exp", None)
            with self._operations.over(strategy.model):
                return train(*args, **kwargs)

        strategy._train_exp = train_compressed
