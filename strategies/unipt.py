"""UniPT (arXiv 2308.14316): a side module over all features of a frozen network, none of whose blocks runs again.

The last feature is the anchor: its tokens attend to those of each layer, and layers are weighed by their agreement.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.errors import ContlearnError
from contlearn.strategies.sherl import SidePlugin, SideTuned, check_choice, check_width, default_width
from contlearn.strategies.sherl_hosts import Host
from contlearn.strategies.sherl_route import down_layer, flat, rolled

Confidence = Literal["layer", "merged"]


class UniPT(SideTuned):
    """The network of UniPT: (batch, channels, height, width) to (batch, feature_dim).

    Args:
        trunk: the backbone.
        host: of the backbone.
        hidden: width h of the side module.
        confidence: what of a layer is compared with the anchor: its own tokens (``layer``) or the merged (``merged``).
        eps: least sum that attention is divided by.
    """

    def __init__(
        self, trunk: nn.Module, host: Host, *, hidden: int, confidence: Confidence = "layer", eps: float = 1e-8
    ) -> None:
        super().__init__(trunk, host)
        self.confidence, self.eps = confidence, eps
        self.down = nn.ModuleList(down_layer(width, hidden, host.kind) for width in (*host.widths, host.final_width))
        self.project = down_layer(hidden, hidden, host.kind)
        self.up = nn.Conv2d(hidden, host.final_width, 1) if host.kind == "maps" else nn.Linear(hidden, host.final_width)
        self.gate = nn.Linear(hidden, 1)

    def merge(self, query: Tensor, tokens: Tensor, counted: Tensor | None = None) -> Tensor:
        """(l1norm(ReLU(q k^T)) + I) k: (batch, tokens, h) of the anchor's tokens and a layer's, in one shape.

        Args:
            query: the anchor's.
            tokens: the layer's.
            counted: (batch, tokens), which tokens are no padding.
        """
        weights = F.relu(query @ tokens.transpose(1, 2))
        if counted is not None:
            weights = weights * counted.unsqueeze(1)
        # Divided behind the product: one tensor of tokens x tokens is kept for backward instead of two.
        return weights @ tokens / (weights.sum(-1, keepdim=True) + self.eps) + tokens

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim)."""
        features, counted = self.features(x)
        lowered = [down(feature) for down, feature in zip(self.down, features, strict=True)]
        size = features[-1].shape[2:]
        del features
        maps = self.host.kind == "maps"
        tokens = [flat(one) for one in lowered] if maps else lowered
        anchor = tokens[-1]
        merged = [self.merge(anchor, one, counted) for one in tokens[:-1]]
        compared = merged if self.confidence == "merged" else tokens[:-1]
        middle = _mean(anchor, counted)
        scores = torch.cat([self.gate(middle * _mean(one, counted)) for one in compared], dim=1)
        stacked = torch.stack(merged, dim=1)
        weighed = (scores.softmax(1).unsqueeze(1) @ stacked.flatten(2)).view_as(anchor)
        joined = lowered[-1] + self.project(rolled(weighed, size) if maps else weighed)
        return self.host.pool(self.trunk, self.up(F.relu(joined)))


def _mean(tokens: Tensor, counted: Tensor | None) -> Tensor:
    """(batch, h): mean over the tokens that count."""
    if counted is None:
        return tokens.mean(1)
    weights = counted.to(tokens.dtype).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


class UniPTPlugin(SidePlugin):
    """UniPT as a plug-in: side module and head train, the backbone stays as it is, bit for bit.

    On CNNs maps are brought to the size of the last by averages; the released module has learnt weights inside each
    window, which need the maps at full size.

    Args:
        width: h. ``None``: in the proportion of the released hosts, see ``sherl``.
        confidence: what is compared with the anchor: ``layer`` (as released) or ``merged``.
        eps: least sum of attention in the l1 norm.
        seed: of the side module's initial weights; ``None`` takes the model's seed.

    Raises:
        ContlearnError: a value out of range.
    """

    method = "unipt"
    network = UniPT

    def __init__(
        self, *, width: int | None = None, confidence: Confidence = "layer", eps: float = 1e-8, seed: int | None = None
    ) -> None:
        super().__init__(seed=seed)
        check_width(width)
        check_choice("confidence", confidence, Confidence)
        if not eps > 0:
            raise ContlearnError(f"eps: expected more than 0, got {eps}")
        self.width, self.confidence, self.eps = width, confidence, eps

    def build(self, trunk: nn.Module, host: Host) -> SideTuned:
        """The network of UniPT around a backbone."""
        hidden = default_width(host) if self.width is None else self.width
        options: dict[str, Any] = {"confidence": self.confidence, "eps": self.eps}
        return UniPT(trunk, host, hidden=hidden, **options)
