"""Ladder side tuning (LST, arXiv 2206.06522): a narrow network beside a frozen one, fed by its features.

h_i = block_i(s_i h_{i-1} + (1 - s_i) Down_i(F_i)), s_i = sigmoid(g_i / T); h_0 = Down_0(F_0); the result is Up(h_N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn.errors import ContlearnError
from contlearn.strategies.sherl import SidePlugin, SideTuned, check_choice
from contlearn.strategies.sherl_hosts import Host

Init = Literal["auto", "prune", "random"]


class SideBlock(nn.Module):
    """A pre-norm transformer block of width h: attention, then an MLP.

    Args:
        width: h.
        heads: attention heads; a divisor of the width.
        hidden: of the MLP.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """(batch, tokens, width) in and out; ``counted`` (batch, tokens): which tokens are no padding."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if counted is None else counted[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class MapBlock(nn.Module):
    """The block beside a CNN, which the paper has none for: x + bn(conv(relu(bn(conv(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        """(batch, width, height, width) in and out."""
        out: Tensor = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return out


class LST(SideTuned):
    """The network of LST: (batch, channels, height, width) to (batch, feature_dim).

    Args:
        trunk: the backbone.
        host: of the backbone.
        width: of the side network.
        dropped: positions i >= 1 whose side block is left out; their features are mixed in all the same.
        temperature: T.

    Attributes:
        gates: g_1 .. g_N, 0 at the start: both sides count half.
    """

    def __init__(
        self, trunk: nn.Module, host: Host, *, width: int, dropped: Sequence[int] = (), temperature: float = 0.1
    ) -> None:
        super().__init__(trunk, host)
        self.temperature = temperature
        maps = host.kind == "maps"
        widths = (*host.widths, host.final_width)
        self.down = nn.ModuleList(nn.Conv2d(one, width, 1) if maps else nn.Linear(one, width) for one in widths)
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(1)) for _ in widths[1:])
        heads = next(heads for heads in range(min(max(host.heads, 1), width), 0, -1) if width % heads == 0)
        self.blocks = nn.ModuleDict()
        for place in range(1, len(widths)):
            if place not in dropped:
                self.blocks[str(place)] = MapBlock(width) if maps else SideBlock(width, heads, 4 * width)
        self.norm = nn.BatchNorm2d(width) if maps else nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Conv2d(width, host.final_width, 1) if maps else nn.Linear(width, host.final_width)

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim)."""
        features, counted = self.features(x)
        h = self.down[0](features[0])
        for place in range(1, len(features)):
            share = torch.sigmoid(self.gates[place - 1] / self.temperature)
            h = share * h + (1 - share) * self.down[place](features[place])
            if str(place) in self.blocks:
                h = self.blocks[str(place)](h, counted)
        return self.host.pool(self.trunk, self.up(self.norm(h)))


@torch.no_grad()
def prune_into(side: LST) -> None:
    """Initialise the side blocks of a timm ViT with slices of its blocks: the rows with the largest sums |w|.

    The residual stream keeps the same channels everywhere (those that its norms and the projections into it give most
    weight), each head and the MLP their own; Down_i then picks these channels out of F_i.
    """
    trunk: Any = side.trunk
    big = list(trunk.blocks)
    width = side.norm.weight.numel()
    scores = torch.zeros(trunk.embed_dim, device=big[0].norm1.weight.device)
    for block in big:
        scores += block.attn.proj.weight.abs().sum(1) + block.mlp.fc2.weight.abs().sum(1)
    stream = _largest(scores, width)
    for place, small in side.blocks.items():
        block = big[int(place) - 1]
        assert isinstance(small, SideBlock)
        hidden = _largest(block.mlp.fc1.weight.abs().sum(1), small.fc1.out_features)
        heads = block.attn.num_heads
        rows = block.attn.qkv.weight.view(3, heads, -1, trunk.embed_dim).abs().sum((0, 3))
        size = rows.shape[1]
        inner = torch.cat([h * size + _largest(row, width // heads) for h, row in enumerate(rows)])
        whole = torch.cat([part * trunk.embed_dim + inner for part in range(3)])
        for norm, wide in ((small.norm1, block.norm1), (small.norm2, block.norm2)):
            norm.weight.copy_(wide.weight[stream])
            norm.bias.copy_(wide.bias[stream])
        for new, old, out, into in (
            (small.qkv, block.attn.qkv, whole, stream), (small.proj, block.attn.proj, stream, inner),
            (small.fc1, block.mlp.fc1, hidden, stream), (small.fc2, block.mlp.fc2, stream, hidden),
        ):  # fmt: skip
            new.weight.copy_(old.weight[out][:, into])
            if old.bias is None:
                new.bias.zero_()
            else:
                new.bias.copy_(old.bias[out])
    for down in side.down:
        assert isinstance(down, nn.Linear)
        down.weight.zero_()
        down.weight[torch.arange(width), stream] = 1.0
        down.bias.zero_()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest, ascending."""
    return scores.topk(count).indices.sort().values


def _prunable(side: LST) -> bool:
    """Whether the backbone's blocks are timm's plain ViT blocks, and the side network has as many heads."""
    blocks = getattr(side.trunk, "blocks", None)
    if side.host.kind != "tokens" or blocks is None:
        return False
    from timm.models.vision_transformer import Block

    narrow = [block for block in side.blocks.values() if isinstance(block, SideBlock)]
    hidden = [block.fc1.out_features for block in narrow]
    plain = ("ls1", "ls2", "attn.q_norm", "attn.k_norm", "attn.norm")
    return all(
        type(block) is Block
        and isinstance(block.norm1, nn.LayerNorm)
        and isinstance(block.attn.qkv, nn.Linear)
        and all(isinstance(block.get_submodule(name), nn.Identity) for name in plain)
        for block in blocks
    ) and all(
        block.heads == side.host.heads and width <= big.mlp.fc1.out_features
        for block, width, big in zip(narrow, hidden, blocks, strict=False)
    )


class LSTPlugin(SidePlugin):
    """LST as a plug-in: side network and head train, the backbone stays as it is, bit for bit.

    The paper initialises side blocks by structured pruning of the backbone, guided by Fisher information or by the size
    of weights; here it is the size of weights, which needs no data. Training there: lr 3e-3.

    Args:
        factor: the side network's width is the backbone's divided by this.
        dropped: positions of side blocks to leave out, 1 that of the first block.
        temperature: T, divides the gates' parameters.
        init: ``prune``: slices of the backbone's blocks (timm ViTs whose heads divide the width); ``random``; ``auto``:
            ``prune`` where it is possible.
        seed: of the side network's initial weights; ``None`` takes the model's seed.

    Raises:
        ContlearnError: a value out of range.
    """

    method = "lst"
    network = LST

    def __init__(
        self,
        *,
        factor: int = 8,
        dropped: Sequence[int] = (),
        temperature: float = 0.1,
        init: Init = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        check_choice("init", init, Init)
        if not (isinstance(factor, int) and factor >= 1):
            raise ContlearnError(f"factor: expected a whole number of at least 1, got {factor}")
        if not temperature > 0:
            raise ContlearnError(f"temperature: expected more than 0, got {temperature}")
        self.factor, self.temperature, self.init = factor, temperature, init
        self.dropped = [int(place) for place in dropped]

    def build(self, trunk: nn.Module, host: Host) -> SideTuned:
        """The network of LST around a backbone."""
        count = len(host.widths)
        wrong = [place for place in self.dropped if not 1 <= place <= count]
        if wrong:
            raise ContlearnError(f"dropped: expected positions in 1..{count}, got {wrong[0]}")
        # A CNN's width is that of its blocks, not of a head convolution behind them.
        width = max(host.last_width // self.factor, 1)
        side = LST(trunk, host, width=width, dropped=self.dropped, temperature=self.temperature)
        possible = _prunable(side)
        if self.init == "prune" and not possible:
            raise ContlearnError(
                f"lst: init 'prune' needs plain ViT blocks of timm with a number of heads that divides the side width"
                f" {width}; expected 'random' for this {type(trunk).__name__}"
            )
        if possible and self.init != "random":
            prune_into(side)
        return side
