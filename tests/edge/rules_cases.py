"""Differentiable functions and inputs that between them use every family of rules."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn
from torch.nn import functional as F


def _ints(high, *shape, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def _floats(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ties(*shape):
    """Images in which windows hold equal maxima."""
    return _ints(3, *shape).float()


# name: (function, inputs). Floating-point inputs are differentiated.
POOLING = {
    "max 3/2 padded, ties": (lambda x: F.max_pool2d(x, 3, 2, 1), [_ties(2, 3, 11, 12)]),
    "max 2/2": (lambda x: F.max_pool2d(x, 2), [_floats(2, 3, 8, 9)]),
    "max overlapping, ceil": (lambda x: F.max_pool2d(x, (3, 2), (2, 3), (1, 0), ceil_mode=True), [_ties(2, 3, 10, 11)]),
    "max dilated": (lambda x: F.max_pool2d(x, 2, 1, 0, 2), [_ties(2, 2, 7, 7)]),
    "max 1-D": (lambda x: F.max_pool1d(x, 3, 2, 1), [_ties(2, 3, 11)]),
    "adaptive max": (lambda x: F.adaptive_max_pool2d(x, (2, 3)), [_ties(2, 3, 6, 9)]),
    "avg": (lambda x: F.avg_pool2d(x, 3, 2, 1), [_floats(2, 3, 11, 12)]),
    "avg without padding, ceil": (
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), [_floats(2, 3, 10, 12)],
    ),
    "avg ceil": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), [_floats(2, 3, 10, 13)]),
    "avg divisor": (lambda x: F.avg_pool2d(x, 2, 2, divisor_override=3), [_floats(2, 3, 8, 8)]),
    "avg 1-D": (lambda x: F.avg_pool1d(x, 2), [_floats(2, 3, 8)]),
    "global": (lambda x: F.adaptive_avg_pool2d(x, 1), [_floats(2, 3, 5, 7)]),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), [_floats(2, 3, 7, 9)]),
    "mean": (lambda x: x.mean((2, 3)), [_floats(2, 3, 5, 7)]),
}  # fmt: skip

NORMS = {
    "layer": (lambda x, w, b: F.layer_norm(x, (5, 6), w, b), [_floats(3, 4, 5, 6), _floats(5, 6), _floats(5, 6) + 1]),
    "layer plain": (lambda x: F.layer_norm(x, (6,)), [_floats(3, 4, 6)]),
    "group": (lambda x, w, b: F.group_norm(x, 2, w, b), [_floats(3, 4, 5, 6), _floats(4), _floats(4, seed=1)]),
    "group plain": (lambda x: F.group_norm(x, 4), [_floats(3, 4, 5)]),
    "batch, batch statistics": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [_floats(3, 4, 5, 6) + 3, _floats(4), _floats(4) + 1],
    ),
    "batch, 1-D, no weight": (lambda x: F.batch_norm(x, None, None, None, None, True), [_floats(9, 4)]),
    "batch, evaluation": (
        lambda x, w, b: F.batch_norm(x, torch.full((4,), 0.3), torch.full((4,), 2.0), w, b, False),
        [_floats(3, 4, 5, 6), _floats(4), _floats(4, seed=1)],
    ),
    "instance": (lambda x: F.instance_norm(x), [_floats(3, 4, 5, 6)]),
    "var_mean": (lambda x: torch.cat([v.flatten() for v in torch.var_mean(x, (0, 2))]), [_floats(3, 4, 5)]),
    "std": (lambda x: x.std(1, correction=0), [_floats(3, 4, 5)]),
    "mean of many": (lambda x: x.abs().mean(), [_floats(8, 16, 20, 30)]),
    "sum of many": (lambda x: (x * x).sum(), [_floats(5, 61, 71)]),
    "rms": (lambda x, w: F.rms_norm(x, (6,), w), [_floats(3, 4, 6), _floats(6)]),
}  # fmt: skip

_KINKS = torch.cat([_floats(40) * 4, torch.tensor([-3.0, 0.0, 3.0, 6.0, -1.0, 1.0])])
ACTIVATIONS = {
    name: (function, [_KINKS])
    for name, function in {
        "relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh, "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid, "silu": F.silu, "gelu": F.gelu,
        "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid, "tanh": torch.tanh, "elu": F.elu, "selu": F.selu, "celu": lambda x: F.celu(x, 0.7),
        "leaky": F.leaky_relu, "softplus": F.softplus, "mish": F.mish, "logsigmoid": F.logsigmoid, "glu": F.glu,
        "softmax": lambda x: x.reshape(2, 23).softmax(1), "log_softmax": lambda x: x.reshape(2, 23).log_softmax(1),
        "clamp": lambda x: x.clamp(-1.0, 2.0), "in place": lambda x: F.relu6(x * 1.5, inplace=True),
        "hardswish in place": lambda x: F.hardswish(x * 1.5, inplace=True),
    }.items()
}  # fmt: skip
ACTIVATIONS["prelu"] = (F.prelu, [_floats(3, 4, 5), _floats(4)])

_LOGITS, _LABELS = _floats(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
_IGNORED = torch.tensor([0, -100, 2, 2, 1, -100])
_PROBABILITIES = torch.sigmoid(_floats(6, 5, seed=3))
LOSSES = {
    "cross entropy": (F.cross_entropy, [_LOGITS, _LABELS]),
    "smoothing": (lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), [_LOGITS, _LABELS]),
    "smoothing, weights": (
        lambda x, y: F.cross_entropy(x, y, torch.arange(1.0, 6.0), label_smoothing=0.1), [_LOGITS, _LABELS],
    ),
    "weights, sum": (lambda x, y: F.cross_entropy(x, y, torch.arange(1.0, 6.0), reduction="sum"), [_LOGITS, _LABELS]),
    "ignored": (F.cross_entropy, [_LOGITS, _IGNORED]),
    "ignored class": (lambda x, y: F.cross_entropy(x, y, ignore_index=2), [_LOGITS, _LABELS]),
    "none": (lambda x, y: F.cross_entropy(x, y, reduction="none"), [_LOGITS, _LABELS]),
    "soft labels": (lambda x: F.cross_entropy(x, _PROBABILITIES), [_LOGITS]),
    "masked classes": (
        lambda x, y: F.cross_entropy(x.masked_fill(torch.tensor([False, True, False, False, False]), -math.inf), y),
        [_LOGITS, torch.tensor([0, 4, 2, 2, 0, 3])],
    ),
    "pixels": (F.cross_entropy, [_floats(2, 5, 3, 4), _ints(5, 2, 3, 4)]),
    "one sample": (F.nll_loss, [_floats(5), torch.tensor(3)]),
    "bce logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, _PROBABILITIES, pos_weight=torch.arange(1.0, 6.0)), [_LOGITS],
    ),
    "bce": (lambda x: F.binary_cross_entropy(torch.sigmoid(x), _PROBABILITIES), [_LOGITS]),
    "mse": (F.mse_loss, [_LOGITS, _PROBABILITIES]),
    "l1": (F.l1_loss, [_LOGITS, _PROBABILITIES]),
    "smooth l1": (lambda x: F.smooth_l1_loss(x, _PROBABILITIES, beta=0.5), [_LOGITS]),
    "huber": (lambda x: F.huber_loss(x, _PROBABILITIES, delta=0.5, reduction="sum"), [_LOGITS]),
    "kl": (lambda x: F.kl_div(x.log_softmax(1), _PROBABILITIES, reduction="batchmean"), [_LOGITS]),
    "kl, logarithms": (
        lambda x: F.kl_div(x.log_softmax(1), _PROBABILITIES.log(), reduction="batchmean", log_target=True), [_LOGITS],
    ),
    "cosine": (lambda x: F.cosine_similarity(x, _PROBABILITIES).sum(), [_LOGITS]),
    "entropy": (lambda x: -(x.softmax(1) * x.log_softmax(1)).sum(1).mean(), [_LOGITS]),
}  # fmt: skip


def _attend(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


_INDEX = _ints(4, 3, 6)
_QKV = [_floats(2, 3, 5, 4, seed=n) for n in range(3)]
_MASK = torch.where(_ints(4, 2, 1, 5, 5) > 0, 0.0, -math.inf).index_fill(3, torch.tensor([0]), 0.0)
SHAPES = {
    "attention": (_attend(), _QKV),
    "causal, scale": (_attend(is_causal=True, scale=0.3), _QKV),
    "mask": (_attend(attn_mask=_MASK), _QKV),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), [_floats(2, 3, 4, 5)]),
    "nearest to size": (lambda x: F.interpolate(x, (7, 3)), [_floats(2, 3, 4, 5)]),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), [_floats(2, 3, 6, 5)]),
    "bilinear, corners": (
        lambda x: F.interpolate(x, (3, 9), mode="bilinear", align_corners=True), [_floats(2, 3, 4, 5)],
    ),
    "embedding": (lambda w, i: F.embedding(i, w), [_floats(7, 3), _ints(7, 2, 5)]),
    "embedding, padding": (lambda w, i: F.embedding(i, w, 2, scale_grad_by_freq=True), [_floats(7, 3), _ints(7, 2, 5)]),
    "steps": (lambda x: x[:, 1::2, -3:], [_floats(4, 7, 5)]),
    "select": (lambda x: x[:, -2] * 2, [_floats(4, 7, 5)]),
    "negative pads": (lambda x: F.pad(x, (-1, 2, 1, -2)), [_floats(2, 3, 6, 7)]),
    "pads": (lambda x: F.pad(x, (0, 1, 0, 1)), [_floats(2, 3, 6, 7)]),
    "index": (lambda x: x[:, torch.tensor([2, 0, 2, -1])], [_floats(3, 4, 5)]),
    "index by a table": (lambda x: x[torch.tensor([[2, 0], [2, 1]])], [_floats(4, 5)]),
    "index_select": (lambda x: x.index_select(2, torch.tensor([1, 1, 0])), [_floats(3, 4, 5)]),
    "gather": (lambda x: x.gather(1, _INDEX), [_floats(3, 4)]),
    "joined": (
        lambda x, y: torch.where(x.unsqueeze(1) > 0, torch.stack([x, y], 1), torch.cat([y, y], 1).view(3, 2, 4)),
        [_floats(3, 4), _floats(3, 4, seed=1)],
    ),
    "split": (lambda x: sum(part.sum() * n for n, part in enumerate(x.chunk(3, 1))), [_floats(3, 6)]),
    "expand": (lambda x: x.expand(2, 3, 6), [_floats(3, 1)]),
    "no dropout": (lambda x: F.dropout(x, 0.5, training=False), [_floats(3, 4)]),
    "normalise": (lambda x: F.normalize(x, dim=1), [_floats(3, 4)]),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), [_floats(2, 8, 3, 3)]),
    "linear": (lambda x, w, b: F.linear(x, w, b), [_floats(3, 4), _floats(5, 4), _floats(5)]),
    "convolution 1-D": (
        lambda x, w, b: F.conv1d(x, w, b, 2, 1), [_floats(2, 4, 9), _floats(6, 4, 3), _floats(6)],
    ),
    "convolution up": (
        lambda x, w: F.conv_transpose2d(x, w, None, 2, 1, 1), [_floats(2, 4, 5, 5), _floats(4, 3, 3, 3)],
    ),
}  # fmt: skip

CONVOLUTIONS = {
    f"{name} k{kernel} s{stride}": (
        functools.partial(F.conv2d, stride=stride, padding=kernel // 2, groups=groups),
        [_floats(2, 4, size, size), _floats(outer, 4 // groups, kernel, kernel)],
    )
    for name, outer, groups in (("dense", 6, 1), ("grouped", 6, 2), ("depthwise", 4, 4))
    for kernel, stride, size in ((1, 1, 11), (3, 1, 11), (3, 2, 12), (3, 1, 5))
}

FAMILIES = {
    "pooling": POOLING, "norms": NORMS, "activations": ACTIVATIONS, "losses": LOSSES, "shapes": SHAPES,
    "convolutions": CONVOLUTIONS,
}  # fmt: skip


def step(function):
    """A function of the inputs that gives the output and the gradients of a weighted sum of it."""

    def run(*inputs):
        leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
        out = function(*leaves)
        weights = torch.arange(out.numel(), dtype=out.dtype).reshape(out.shape).add(1).sin()
        wanted = [x for x in leaves if x.requires_grad]
        return (out.detach(), *torch.autograd.grad((out * weights).sum(), wanted))

    return run


class SmallNet(nn.Module):
    """Inverted residuals with batch normalisation, an overlapping maximum and a squeeze."""

    def __init__(self):
        super().__init__()

        def block(inner, outer, kernel, stride=1, groups=1, act=True):
            layers = [
                nn.Conv2d(inner, outer, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outer),
            ]  # fmt: skip
            return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if act else []))

        self.stem = block(3, 8, 3, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.wide = nn.Sequential(block(8, 8, 3, groups=8), block(8, 8, 1, act=False))
        self.down = nn.Sequential(block(8, 12, 1), block(12, 12, 5, 2, groups=12))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = self.down(x + self.wide(x))
        return self.head(x.mean((2, 3)))
