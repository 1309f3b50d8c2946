"""A budget for everything a device must keep: weights, method state and exemplars together."""

from __future__ import annotations

from typing import Any

from contlearn.errors import ContlearnError
from contlearn.memory.holdings import model_tensors
from contlearn.memory.saved import unique_bytes
from contlearn.memory.units import in_words, parse_bytes

SELECTION_BYTES = 4  # a reservoir keeps one float32 weight per exemplar
# Copies of the model that a method keeps between experiences beside the model itself; EWC's grow with the stream.
MODEL_COPIES = {"lwf": 1, "si": 2, "gdumb": 1, "icarl": 1}


def apply(strategy: Any, stream: Any, memory_budget: int | str) -> int:
    """Fit a strategy into ``memory_budget`` bytes of persistent memory, as the account will count it at the end.

    Weights (with the head at its final width), optimizer state that outlives an experience and the method's copies of
    the model come first; what is left is the budget of the memory of exemplars, where the strategy has one.

    Args:
        strategy: a contlearn strategy that has not been trained yet.
        stream: its stream.
        memory_budget: bytes, or text such as ``16MB``.

    Returns:
        Bytes left for exemplars (for a strategy without a memory, bytes left over).

    Raises:
        ContlearnError: a budget that cannot be met; the message gives the smallest that can.
    """
    from contlearn.strategies.rehearsal import Rehearsal

    budget = parse_bytes(memory_budget)
    fixed = fixed_bytes(strategy, stream)
    least = fixed
    if isinstance(strategy, Rehearsal):
        exemplars = len(stream.train_stream) if strategy.spec["name"] == "agem" else 1
        least += exemplars * (strategy.exemplar_bytes(stream.train_stream[0]) + SELECTION_BYTES)
    if budget < least:
        raise ContlearnError(
            f"memory_budget: {budget} bytes ({in_words(budget)}) cannot hold model {strategy.model.spec['name']!r} "
            f"with strategy {strategy.spec['name']!r}; expected at least {least} bytes ({in_words(least)})"
        )
    left = budget - fixed
    if isinstance(strategy, Rehearsal):
        each = strategy.exemplar_bytes(stream.train_stream[0])
        strategy.memory_budget = max(each, left * each // (each + SELECTION_BYTES))
        strategy._fitted = False
    return left


def fixed_bytes(strategy: Any, stream: Any) -> int:
    """Bytes at the end of the stream of everything but exemplars."""
    model, spec = strategy.model, strategy.spec
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    rows = max(0, stream.n_classes - getattr(model.head, "out_features", stream.n_classes))
    head = rows * (model.feature_dim + 1) * 4
    weights = unique_bytes(model_tensors(model)) + head
    trainable += head
    copies = MODEL_COPIES.get(spec["name"], 0)
    if spec["name"] == "ewc":
        copies = 2 * (len(stream.train_stream) if spec["mode"] == "separate" else 1)
    moments = 0
    if not strategy.reset_optimizer:
        moments = 2 if spec["optimizer"] in ("adam", "adamw") else int(bool(spec["momentum"]))
    total: int = weights + copies * (trainable if spec["name"] in ("ewc", "si") else weights) + moments * trainable
    return total
