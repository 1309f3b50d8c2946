"""Where EcoTTA cuts a network (arXiv 2303.01904, Table 13): stem, K partitions of consecutive blocks, tail.

What a block is comes from the network itself: a residual network of ours says it, any other is taken as the chain of
its children, and that reading is checked on an image before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._residual import ResidualBackbone

_RESNET50 = {4: (3, 3, 5, 5), 5: (2, 2, 4, 4, 4)}
"""Sixteen blocks, as in the community's ResNet-50 (Lily-Le/EcoTTA); the authors' own counts are not public."""

Shape = tuple[int, int, int]
Unit = tuple[str, ...]
"""Names of modules in the backbone that run one after the other."""


@dataclass(frozen=True)
class Chain:
    """A backbone as stem, blocks and tail; ``shapes[i]`` (channels, height, width) goes into block ``i``.

    ``tail`` is ``None`` where the backbone's own ``tail`` method follows the blocks.
    """

    stem: Unit
    blocks: tuple[Unit, ...]
    tail: Unit | None
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Cut:
    """The same with consecutive blocks joined; partition ``k`` maps ``shapes[k]`` to ``shapes[k + 1]``."""

    stem: Unit
    partitions: tuple[Unit, ...]
    tail: Unit | None
    shapes: tuple[Shape, ...]
    blocks: tuple[int, ...]


def cut(model: nn.Module, k: int, blocks: Sequence[int] = ()) -> Cut:
    """Cut the backbone of a ``Classifier`` into partitions.

    Args:
        model: made by ``contlearn.models.create``, or any with ``backbone`` and ``input_shape``.
        k: number of partitions.
        blocks: blocks per partition; overrides ``k``.

    Raises:
        ContlearnError: a network that is no chain of convolutional blocks, or a number of partitions it cannot have.
    """
    backbone, shape = getattr(model, "backbone", None), getattr(model, "input_shape", None)
    if not isinstance(backbone, nn.Module) or shape is None:
        raise ContlearnError("ecotta: expected a model of contlearn.models, with a backbone and an input_shape")
    chain = chain_of(backbone, tuple(shape))
    counts = tuple(blocks) or partition_sizes(len(chain.blocks), k)
    if min(counts) < 1 or sum(counts) != len(chain.blocks):
        raise ContlearnError(
            f"blocks_per_partition: expected counts of at least 1 that add up to the network's {len(chain.blocks)} "
            f"blocks, got {list(counts)}"
        )
    places = [0, *accumulate(counts)]
    return Cut(
        chain.stem,
        tuple(tuple(name for unit in chain.blocks[start:end] for name in unit) for start, end in pairwise(places)),
        chain.tail,
        tuple(chain.shapes[place] for place in places),
        counts,
    )


def partition_sizes(n_blocks: int, k: int) -> tuple[int, ...]:
    """Blocks per partition: the paper's table, or its rule.

    The table of both WRNs follows one rule: shallow partitions have half the blocks of deep ones, together 6 shares (K
    = 4: 1, 1, 2, 2; K = 5: 1, 1, 1, 1, 2). It is used for 3 <= K <= 6, an even split for any other K.

    Raises:
        ContlearnError: fewer than one partition, or more than there are blocks.
    """
    if not 1 <= k <= n_blocks:
        raise ContlearnError(f"k: expected 1 to {n_blocks} partitions of the network's {n_blocks} blocks, got {k}")
    if n_blocks == 16 and k in _RESNET50:
        return _RESNET50[k]
    deep = 6 - k if 3 <= k <= 6 else 0
    shares = [1] * (k - deep) + [2] * deep
    ends = [round(n_blocks * share / sum(shares)) for share in accumulate(shares)]
    # At least one block each, however few there are.
    for index in range(k):
        ends[index] = max(ends[index], index + 1, ends[index - 1] + 1 if index else 0)
    for index in reversed(range(k)):
        ends[index] = min(ends[index], n_blocks - (k - 1 - index))
    return tuple(end - start for start, end in pairwise([0, *ends]))


def conv_stride(inside: Shape, outside: Shape) -> tuple[int, int]:
    """Stride of the 3x3 convolution with padding 1 that maps one size to the other: H_in / H_out.

    Raises:
        ContlearnError: no stride does.
    """
    strides = tuple(-(-before // after) for before, after in zip(inside[1:], outside[1:], strict=True))
    reached = tuple(-(-before // stride) for before, stride in zip(inside[1:], strides, strict=True))
    if reached != outside[1:]:
        raise ContlearnError(
            f"ecotta: a partition maps {inside[1]}x{inside[2]} pixels to {outside[1]}x{outside[2]}, which no stride of "
            "a 3x3 convolution does; expected other blocks_per_partition"
        )
    return strides[0], strides[1]


@torch.no_grad()
def chain_of(backbone: nn.Module, shape: Shape) -> Chain:
    """Read a backbone as stem, blocks and tail.

    Blocks are the network's composite modules with a convolution of their own (residual, inverted residual, dense);
    in a plain chain of layers, every convolution with what follows it. What comes first is the stem.

    Raises:
        ContlearnError: the network is no such chain.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    like = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *shape, generator=generator).to(like)
    try:
        backbone.eval()
        if isinstance(backbone, ResidualBackbone):
            return _residual(backbone, x)
        layers = list(_layers("", backbone, x))
        found = _classified(backbone, layers)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise _no_chain(backbone, str(error)) from error
    finally:
        for module, training in modes:
            module.training = training
    return found


def _residual(backbone: ResidualBackbone, x: Tensor) -> Chain:
    names = {id(module): name for name, module in backbone.named_modules()}
    x = backbone.stem(x)
    shapes = [_shape(x)]
    for block in backbone.blocks:
        x = block(x)
        shapes.append(_shape(x))
    blocks = tuple((names[id(block)],) for block in backbone.blocks)
    return Chain((names[id(backbone.stem)],), blocks, None, tuple(shapes))


@dataclass
class _Layer:
    name: str
    module: nn.Module
    out: Tensor

    @property
    def convolves(self) -> bool:
        return any(isinstance(module, nn.Conv2d) for module in self.module.modules())

    @property
    def composite(self) -> bool:
        return not isinstance(self.module, nn.Conv2d) and self.convolves


def _layers(prefix: str, module: nn.Module, x: Tensor) -> list[_Layer]:
    """The modules a module is a chain of, with their outputs: stages are opened, blocks are not.

    A module is opened where its children in turn compute what it computes and none of them is a bare convolution.

    Raises:
        ContlearnError: the children of the outermost module do not compute what it does.
    """
    out = module(x)
    children = list(module.named_children())
    bare = any(isinstance(child, nn.Conv2d) for _, child in children)
    plain = type(module) is nn.Sequential or not prefix
    if children and (plain or not bare):
        found: list[_Layer] = []
        y: Any = x
        try:
            for name, child in children:
                found += _layers(f"{prefix}{name}.", child, y)
                y = found[-1].out
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            y = None
        if isinstance(y, Tensor) and y.shape == out.shape and torch.allclose(y, out, rtol=1e-4, atol=1e-5):
            return found
        if not prefix:
            raise _no_chain(module, "its children in turn do not compute what it computes")
    return [_Layer(prefix.removesuffix("."), module, out)]


def _classified(backbone: nn.Module, layers: Sequence[_Layer]) -> Chain:
    composite = [place for place, layer in enumerate(layers) if layer.composite and layer.out.ndim == 4]
    starts_block: Callable[[_Layer], bool] = lambda layer: layer.composite  # noqa: E731
    if len(composite) < 2:
        starts_block = lambda layer: layer.convolves  # noqa: E731
    starts = [place for place, layer in enumerate(layers) if starts_block(layer) and layer.out.ndim == 4]
    if starts and starts[0] == 0:  # nothing in front of it: this is the stem
        starts = starts[1:]
    if not starts:
        raise _no_chain(backbone, "it has no convolutional block after its stem")
    end = starts[-1] + 1
    if len(composite) < 2:
        # What pools or flattens behind the last convolution is the tail's.
        while end < len(layers) and layers[end].out.shape == layers[starts[-1]].out.shape:
            end += 1
    places = [*starts, end]
    return Chain(
        tuple(layer.name for layer in layers[: starts[0]]),
        tuple(tuple(layer.name for layer in layers[start:stop]) for start, stop in pairwise(places)),
        tuple(layer.name for layer in layers[end:]),
        tuple(_shape(layers[place - 1].out) for place in places),
    )


def _shape(x: Tensor) -> Shape:
    if x.ndim != 4:
        raise ValueError(f"a block gives a tensor of {x.ndim} dimensions")
    return x.shape[1], x.shape[2], x.shape[3]


def _no_chain(backbone: nn.Module, reason: str) -> ContlearnError:
    return ContlearnError(
        f"ecotta: expected a convolutional network that is a chain of blocks, got {type(backbone).__name__} ({reason})"
    )
