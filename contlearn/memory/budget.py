"""A budget for everything a device must keep: weights, method state and exemplars together."""

from __future__ import annotations

from typing import Any

from contlearn.errors import ContlearnError
from contlearn.memory.holdings import model_tensors
from contlearn.memory.saved import unique_bytes
from contlearn.memory.units import in_words, parse_bytes

SELECTION_BYTES = 4  # a reservoir keeps one float32 weight per exemplar
# Copies that a method keeps between experiences beside the model itself: of all weights, of the parameters that train,
# and of those in front of the head. Methods that distil share one teacher. What is no copy, a plug-in says itself
# (``kept_bytes``).
MODEL_COPIES = {"lwf": 1, "gdumb": 1, "icarl": 1}
TRAINED_COPIES = {"si": 2}
ENCODER_COPIES = {"l2": 1, "online_ewc": 2}
SHARED_TEACHER = ("pred_kd", "feat_kd")


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
    rows = max(0, stream.n_classes - getattr(model.head, "out_features", stream.n_classes))
    head = rows * (model.feature_dim + 1) * 4
    weights = unique_bytes(model_tensors(model)) + head
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    encoder = unique_bytes(trained) - unique_bytes(p for p in model.head.parameters() if p.requires_grad)
    trainable = unique_bytes(trained) + head
    total = weights
    for method in (spec, *spec["plugins"]):
        total += _copies(method, len(stream.train_stream), weights=weights, trainable=trainable, encoder=encoder)
    methods = {name for method in (spec, *spec["plugins"]) for name in _parts(method)}
    total += weights * bool(methods & set(SHARED_TEACHER))
    for plugin in strategy.plugins:
        if hasattr(plugin, "kept_bytes"):
            total += plugin.kept_bytes(model, experiences=len(stream.train_stream), head_rows=head)
    if not strategy.reset_optimizer:
        if hasattr(strategy.optimizer, "moment_bytes"):  # SinkGD: matrices keep nothing, the head Adam's moments
            total += strategy.optimizer.moment_bytes() + 2 * head
        else:
            moments = 2 if spec["optimizer"] in ("adam", "adamw") else int(bool(spec["momentum"]))
            total += moments * trainable
    return int(total)


def _copies(method: dict[str, Any], experiences: int, *, weights: int, trainable: int, encoder: int) -> int:
    """Bytes of what one method keeps of the model."""
    if method["name"] == "ewc":
        return 2 * trainable * (experiences if method["mode"] == "separate" else 1)
    parts = _parts(method)
    return (
        weights * sum(MODEL_COPIES.get(name, 0) for name in parts)
        + trainable * sum(TRAINED_COPIES.get(name, 0) for name in parts)
        + encoder * sum(ENCODER_COPIES.get(name, 0) for name in parts)
    )


def _parts(method: dict[str, Any]) -> list[str]:
    """A method's name, or those of the methods it is put together from."""
    if method["name"] != "rehearsal_free":
        return [method["name"]]
    parts = {
        "l2": method["l2"],
        "online_ewc": method["ewc"],
        "feat_kd": method["feat_kd"],
        "pred_kd": method["pred_kd"] or method["class_loss"] == "ce_kd",
    }
    return [name for name, wanted in parts.items() if wanted]
