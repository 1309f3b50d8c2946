"""Build a model for a stream: backbone by name, head by the kind of stream."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from contlearn.errors import ContlearnError, unknown_name
from contlearn.models._checks import Shape, whole
from contlearn.models._registry import TIMM_FACTORY, TIMM_PREFIX, describe

if TYPE_CHECKING:
    from torch import nn

    from contlearn.models._classifier import Classifier

HeadKind = Literal["auto", "growing", "task", "fixed"]


class StreamSpec(Protocol):
    """What a model must know about the stream it is built for."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""

    @property
    def n_classes(self) -> int:
        """Number of classes over the whole stream."""

    @property
    def task_labels(self) -> bool:
        """Whether the task id is given at test time."""


def create(
    name: str,
    stream: StreamSpec,
    *,
    seed: int | None = None,
    head: HeadKind = "auto",
    weights: str | os.PathLike[str] | None = None,
    trainable: Sequence[str] | None = None,
    **options: Any,
) -> nn.Module:
    """A model for ``stream``: a ``Classifier``, or a ``TaskClassifier`` for the head ``task``.

    Args:
        name: One of ``contlearn.models.list()``, or any timm name (``"timm/NAME"`` where ours would hide it).
        stream: Gives the shape of the images, the number of classes, and whether task ids are given at test time.
        seed: Seed of the initial weights; torch's global generator is then left untouched. None draws from it.
            Rows that a growing head gains later are drawn from the global generator in either case.
        head: ``growing`` starts without outputs and follows the classes seen in training; ``task`` does the same
            and masks the classes of other tasks; ``fixed`` has all ``stream.n_classes`` outputs from the start;
            ``auto`` is ``task`` where task ids are given at test time, else ``growing``.
        weights: Weights of the backbone: a local file (.safetensors, .pth, .pt, .bin; tensors only), or
            ``"imagenet"`` for ``efficientnet_lite0``.
        trainable: What of the backbone trains: patterns over parameter names (``stage3.*``), ``qkv`` (the query, key
            and value projections of every self-attention block), ``norms``, ``biases``, ``last_blocks:K`` (the last K
            blocks and what follows them), ``all``, or ``head`` (nothing of it). The rest
            is frozen; the head always trains. None trains everything.
        options: Options of the model; see the factory that ``describe(name)`` names.

    Raises:
        ContlearnError: Unknown name, head or option, a value out of range, images the model cannot take, or weights
            that are missing, damaged or do not fit.
    """
    info = describe(name)
    if head not in get_args(HeadKind):
        raise unknown_name("head", head, get_args(HeadKind))
    if head == "auto":
        head = "task" if stream.task_labels else "growing"
    shape = _input_shape(stream)
    outputs = whole("the stream's n_classes", stream.n_classes, least=1)
    factory = info.load_factory()
    timm_name = info.name.removeprefix(TIMM_PREFIX) if info.factory == TIMM_FACTORY else None
    if timm_name is None:
        options = _resolved(info.name, factory, options)
    spec = {
        "name": info.name,
        **options,
        "head": head,
        "weights": None if weights is None else os.fspath(weights),
        "trainable": None if trainable is None else [*trainable],
        "seed": seed,
    }
    with _seeded(seed):
        backbone = factory(shape, **options) if timm_name is None else factory(shape, name=timm_name, **options)
        if weights is not None:
            from contlearn.models._weights import load_weights

            load_weights(backbone, weights, model=info.name)
        if trainable is not None:
            from contlearn.models._selection import select_trainable

            if isinstance(trainable, str):
                raise ContlearnError(f"trainable: expected a list of patterns, got {trainable!r}")
            select_trainable(backbone, trainable, model=info.name)
        model = _with_head(backbone, head, outputs, spec)
        model.input_shape = shape
        return model


def _with_head(backbone: Any, head: str, outputs: int, spec: dict[str, Any]) -> Classifier:
    from contlearn.models._classifier import Classifier

    features: int = backbone.feature_dim
    if head == "fixed":
        from torch.nn import Linear

        return Classifier(backbone, Linear(features, outputs), feature_dim=features, spec=spec)
    if head == "growing":
        from contlearn.models._growing_head import GrowingHead

        return Classifier(backbone, GrowingHead(features), feature_dim=features, spec=spec)
    from contlearn.models._task_head import TaskClassifier, TaskHead

    return TaskClassifier(backbone, TaskHead(features), feature_dim=features, spec=spec)


def _input_shape(stream: StreamSpec) -> Shape:
    shape = tuple(stream.input_shape)
    if len(shape) != 3:
        raise ContlearnError(f"the stream's input_shape is {shape}, expected (channels, height, width)")
    channels, height, width = (whole("the stream's input_shape", size, least=1) for size in shape)
    return channels, height, width


def _resolved(model: str, factory: Callable[..., nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with the factory's defaults filled in."""
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in defaults:
            if not defaults:
                raise ContlearnError(f"model {model!r} has no options, {option!r} was given")
            raise unknown_name(f"option of model {model!r}", option, defaults)
    return defaults | options


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    import torch

    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would also seed the generators of every GPU, which fork_rng leaves alone here.
        torch.default_generator.manual_seed(whole("seed", seed, least=0, most=2**64 - 1))
        yield
