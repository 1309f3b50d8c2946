"""Operators that draw random numbers: refused, since a portable graph is a pure function of its inputs.

Dropout does not come here from a strategy's step, which takes its numbers as inputs (``contlearn.strategies.drawn``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from contlearn.edge.rules.registry import Gap, Profile, Registry, Rule, refuse

aten = torch.ops.aten
REASON = "a portable graph holds no random numbers"
WAY_OUT = "set dropout to 0, or draw them outside and pass them in as an input"


def native_dropout(target: Profile, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """The identity where nothing is dropped."""
    if p and train is not False:
        raise Gap("native_dropout", {"p": p}, REASON, WAY_OUT)
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


_DRAWS = [
    aten.bernoulli.default, aten.bernoulli.p, aten.rand.default, aten.rand_like.default, aten.randn.default,
    aten.randn_like.default, aten.randint.default, aten.randint.low, aten.randint_like.default, aten.randperm.default,
    aten.rand.generator, aten.randn.generator, aten.randint.generator, aten.randint.low_generator,
    aten.randperm.generator, aten.multinomial.default, aten.normal.Tensor_float, aten.normal.Tensor_Tensor,
    aten.normal_functional.default, aten.bernoulli_.float, aten.bernoulli_.Tensor, aten.uniform_.default,
    aten.normal_.default, aten.exponential_.default,
]  # fmt: skip

REGISTRY = Registry(
    "randomness",
    [
        Rule(aten.native_dropout.default, native_dropout, "identity", "dropout of nothing; else refused"),
        *(refuse(op, REASON, WAY_OUT, "p", "size") for op in _DRAWS),
    ],
)
