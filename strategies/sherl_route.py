"""SHERL's early route (arXiv 2407.07523): features of all layers merge into one tensor, redundant layers count less.

E_i = Down_i(F_i), guide e = E_{N-1}; a_i = l1norm(ReLU(w.(E_i * e) + b) / r_i), r_i = sum_j ReLU(cos(E_i, E_j));
m = sum a_i E_i + e; x = Up(m) + tanh(p / T) F_{N-1}, with p = 0 at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Redundancy = Literal["differentiable", "detached", "off"]
Residual = Literal["tanh", "plain", "none"]
DOWN_EPS, UP_EPS = 1e-5, 1e-12  # of the LayerNorms, as released
_COSINE_EPS = 1e-8


class GatedDown(nn.Module):
    """The gated MLP of the CLIP-ViL and T5 hosts: u = ReLU(W1 x), (W2 u + u) * sigmoid(W3 u)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., hidden)."""
        u = F.relu(self.first(x))
        out: Tensor = (self.second(u) + u) * torch.sigmoid(self.gate(u))
        return out


def flat(maps: Tensor) -> Tensor:
    """(batch, width, height, width) as tokens (batch, positions, width)."""
    return maps.flatten(2).transpose(1, 2)


def rolled(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """What :func:`flat` was given, contiguous; ``size``: height and width."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *size)


def redundancy(features: Tensor) -> Tensor:
    """r_i of features (..., layers, h): (..., layers); each at least 1, since a layer is as redundant as itself.

    From the products of unnormalised features, so that backward needs no normalised copy of them.
    """
    products = features @ features.transpose(-1, -2)
    squares = products.diagonal(dim1=-2, dim2=-1)
    norms = squares.clamp_min(_COSINE_EPS**2).sqrt()
    cosines = products / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
    return F.relu(cosines).sum(-1)


class Merge(nn.Module):
    """Gates of the shallow features and their sum with the guide: steps 2 to 4.

    Args:
        hidden: width h.
        mode: ``differentiable``: gradients flow through r_i, as released; ``detached``: r_i is a constant; ``off``: 1.
        eps: least sum of gates that they are divided by.
    """

    def __init__(self, hidden: int, *, mode: Redundancy = "differentiable", eps: float = 1e-8) -> None:
        super().__init__()
        self.attend = nn.Linear(hidden, 1)
        self.mode = mode
        self.eps = eps

    def gates(self, shallow: Tensor, guide: Tensor) -> Tensor:
        """(batch, tokens, layers) >= 0, with sum 1, or 0 where no layer agrees with the guide."""
        # w.(E_i * e) as E_i.(w * e): the product with every layer is never made.
        scores = (shallow @ (self.attend.weight.squeeze(0) * guide).unsqueeze(-1)).squeeze(-1) + self.attend.bias
        gates = F.relu(scores)
        if self.mode != "off":
            divisor = redundancy(shallow)
            gates = gates / (divisor.detach() if self.mode == "detached" else divisor)
        return gates / (gates.sum(-1, keepdim=True) + self.eps)

    def forward(self, shallow: Tensor, guide: Tensor) -> Tensor:
        """m (batch, tokens, h) of shallow features (batch, tokens, layers, h) and the guide (batch, tokens, h)."""
        gates = self.gates(shallow, guide)
        return (gates.unsqueeze(-2) @ shallow).squeeze(-2) + guide


class EarlyRoute(nn.Module):
    """Merges collected features into the input of the late route.

    Args:
        widths: of the features F_0 .. F_{N-1}; the last is also the width of the result.
        hidden: width h.
        kind: ``tokens`` or ``maps``; maps come in one size.
        down: ``linear``: Linear and LayerNorm; ``gated``: :class:`GatedDown`. Maps: 1x1 convolution and BatchNorm.
        up: ``norm``: ReLU, Linear, LayerNorm, Dropout; ``linear``: ReLU, Linear. Maps: 1x1 convolution, BatchNorm,
            ReLU.
        redundancy: mode of :class:`Merge`.
        residual: how much of the raw last feature is added: ``tanh(p / T)``, all (``plain``), or ``none``.
        temperature: T.
        dropout: of ``up`` ``norm``.
        eps: of :class:`Merge`.

    Attributes:
        p: the gate's parameter (1,), 0 at the start; absent unless ``residual`` is ``tanh``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        hidden: int,
        *,
        kind: str = "tokens",
        down: Literal["linear", "gated"] = "linear",
        up: Literal["norm", "linear"] = "norm",
        redundancy: Redundancy = "differentiable",
        residual: Residual = "tanh",
        temperature: float = 0.1,
        dropout: float = 0.1,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        self.kind, self.residual, self.temperature = kind, residual, temperature
        self.down = nn.ModuleList(down_layer(width, hidden, kind, down) for width in widths)
        self.merge = Merge(hidden, mode=redundancy, eps=eps)
        if kind == "maps":
            self.up = nn.Sequential(nn.Conv2d(hidden, widths[-1], 1), nn.BatchNorm2d(widths[-1]), nn.ReLU())
        else:
            self.up = nn.Sequential(nn.ReLU(), nn.Linear(hidden, widths[-1]))
            if up == "norm":
                self.up.extend([nn.LayerNorm(widths[-1], eps=UP_EPS), nn.Dropout(dropout)])
        if residual == "tanh":
            self.p = nn.Parameter(torch.zeros(1))

    def merged(self, features: Sequence[Tensor]) -> Tensor:
        """m (batch, tokens, h) of the features."""
        lowered = [down(feature) for down, feature in zip(self.down, features, strict=True)]
        if self.kind == "maps":
            lowered = [flat(one) for one in lowered]
        m: Tensor = self.merge(torch.stack(lowered[:-1], dim=2), lowered[-1])
        return m

    def forward(self, features: Sequence[Tensor], last: Tensor) -> Tensor:
        """x, in the shape of ``last``.

        Args:
            features: N tensors (batch, tokens, width_i), or (batch, width_i, height, width), maps pooled to the size of
                the last.
            last: the raw last feature.
        """
        m = self.merged(features)
        x: Tensor = self.up(rolled(m, last.shape[2:]) if self.kind == "maps" else m)
        if self.residual == "tanh":
            return x + torch.tanh(self.p / self.temperature) * last
        return x + last if self.residual == "plain" else x


def down_layer(width: int, hidden: int, kind: str, down: str = "linear") -> nn.Module:
    """One Down_i."""
    if kind == "maps":
        return nn.Sequential(nn.Conv2d(width, hidden, 1), nn.BatchNorm2d(hidden))
    if down == "gated":
        return GatedDown(width, hidden)
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden, eps=DOWN_EPS))
