"""SHERL (arXiv 2407.07523): a frozen network, a light side route over its features, and its last block run once more.

The backbone runs without gradients; back-propagation crosses the late route (its last block) and the early route only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from contlearn.errors import ContlearnError, unknown_name
from contlearn.strategies.frozen_operations import FrozenOperations
from contlearn.strategies.sherl_hosts import Host, find_host, pool_map
from contlearn.strategies.sherl_route import EarlyRoute, Redundancy, Residual


class SideTuned(nn.Module):
    """A frozen backbone in evaluation mode and what trains beside it; the base of SHERL, UniPT and LST.

    Attributes:
        trunk: the backbone, frozen.
        host: how it is run in pieces.
    """

    def __init__(self, trunk: nn.Module, host: Host) -> None:
        super().__init__()
        self.trunk = trunk.requires_grad_(False).eval()
        self.host = host

    def train(self, mode: bool = True) -> SideTuned:
        """Training mode of what trains: the backbone stays in evaluation mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Collected features and, last, what the backbone pools, of one size; and which tokens count. No gradients."""
        host = self.host
        with torch.no_grad():
            found, context = host.shallow(self.trunk, x, self._average)
            late = host.late(self.trunk, found[-1], context)
            if host.kind == "maps":
                found[-1] = self._average(len(found) - 1, found[-1])
            return [*found, host.finish(self.trunk, late)], host.padding(context)

    def _average(self, place: int, feature: Tensor) -> Tensor:
        return pool_map(feature, self.host.late_windows[place], largest=False)


class SHERL(SideTuned):
    """The network of SHERL: (batch, channels, height, width) to (batch, feature_dim).

    Args:
        trunk: the backbone.
        host: of the backbone.
        hidden: width h of the early route.
        features: positions of the features to merge; ``None`` takes all.
        late: ``block``: the last block is run again with gradients; ``none``: it is one of the collected features.
        packed: ReLUs of the late route keep bits for backward.
        route: options of :class:`EarlyRoute`.

    Raises:
        ContlearnError: positions that there are not, or without the last.
    """

    def __init__(
        self,
        trunk: nn.Module,
        host: Host,
        *,
        hidden: int,
        features: Sequence[int] | None = None,
        late: Literal["block", "none"] = "block",
        packed: bool = True,
        **route: Any,
    ) -> None:
        super().__init__(trunk, host)
        self.late, self.packed = late, packed
        widths = host.widths if late == "block" else (*host.widths, host.last_width)
        self.chosen = _positions(features, len(widths))
        self.early = EarlyRoute([widths[place] for place in self.chosen], hidden, kind=host.kind, **route)

    def collect(self, x: Tensor) -> tuple[list[Tensor], Tensor, Any]:
        """Features for the early route, the raw last one, and what later layers need beside them; no gradients."""
        host = self.host
        with torch.no_grad():
            found, context = host.shallow(self.trunk, x, self._reduce)
            last = found[-1]
            if self.late == "none":
                last = host.late(self.trunk, last, context)
                if host.kind == "maps":
                    found[-1] = self._reduce(len(found) - 1, found[-1])
                found.append(last)
            if host.kind == "maps":
                found[-1] = pool_map(last, 1, largest=True)
        return [found[place] for place in self.chosen], last, context

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, feature_dim)."""
        features, last, context = self.collect(x)
        x = self.early(features, last)
        del features, last
        with FrozenOperations(packed=self.packed):
            if self.late == "block":
                x = self.host.late(self.trunk, x, context)
            return self.host.pool(self.trunk, self.host.finish(self.trunk, x))

    def _reduce(self, place: int, feature: Tensor) -> Tensor:
        windows = self.host.windows if self.late == "block" else self.host.late_windows
        return pool_map(feature, windows[place], largest=True)


class SidePlugin(SupervisedPlugin):
    """Base of the plug-ins that put a :class:`SideTuned` network in place of a model's backbone.

    Args:
        seed: of the initial weights of what is added; ``None`` takes the model's own, else 0.
    """

    method = "side tuning"
    network: type[SideTuned] = SideTuned

    def __init__(self, *, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and not 0 <= seed < 2**63:
            raise ContlearnError(f"seed: expected 0..2**63-1, got {seed}")
        self.seed = seed

    def build(self, trunk: nn.Module, host: Host) -> SideTuned:
        """The network around a backbone."""
        raise NotImplementedError

    def prepare_model(self, model: nn.Module) -> None:
        """Replace ``model.backbone``; done once, a second call changes nothing.

        Raises:
            ContlearnError: no backbone, one of no known structure, or one that another side method holds already.
        """
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise ContlearnError(
                f"{self.method}: {type(model).__name__} has no backbone to keep frozen; expected a model of"
                " contlearn or contlearn.models.Classifier(backbone, head)"
            )
        if isinstance(backbone, self.network):
            return
        if isinstance(backbone, SideTuned):
            raise ContlearnError(
                f"{self.method}: the backbone is that of {type(backbone).__name__} already; expected one of"
                " sherl, unipt and lst"
            )
        host = find_host(backbone, method=self.method, input_shape=getattr(model, "input_shape", None))
        seed = self.seed if self.seed is not None else (getattr(model, "spec", {}).get("seed") or 0)
        weight = next(backbone.parameters())
        with _seeded(seed):
            side = self.build(backbone, host)
        side.to(device=weight.device, dtype=weight.dtype)
        model.backbone = side.train(model.training)

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check that the model was prepared."""
        if not isinstance(getattr(strategy.model, "backbone", None), self.network):
            raise ContlearnError(
                f"{self.method}: the model was not prepared; call plugin.prepare_model(model) before the optimizer"
                " is made"
            )


class SHERLPlugin(SidePlugin):
    """SHERL as a plug-in: early route and head train, the backbone stays as it is, bit for bit.

    The defaults are the released settings of the BERT and ResNeXt hosts; ViTs take those of BERT. Training settings
    there: AdamW, lr 5e-4, weight decay 1e-2, batch 112, 25 epochs, lr / 10 at 15.

    Args:
        width: h of the early route. ``None``: 2/3 of a transformer's width (512 for 768), 1/4 of a CNN's last feature
            (512 for 2048), which are the released 512 on the released hosts.
        features: positions of the collected features to merge, 0 the embedding or first stage, such as T5's
            [1, 2, 3, 5, 6, 7, 9, 10, 11]; the last must be among them. ``None`` takes all.
        late: ``block``: the last block runs again with gradients; ``none``: nothing does (the CLIP4Clip host, with
            ``residual`` ``plain`` and ``up`` ``linear``).
        down: ``linear``: Linear and LayerNorm; ``gated``: the gated MLP of the CLIP-ViL and T5 hosts. CNNs: ``linear``
            alone, a 1x1 convolution and BatchNorm.
        up: ``norm``: ReLU, Linear, LayerNorm, Dropout; ``linear``: ReLU, Linear (CLIP-ViL, T5). CNNs: ``norm`` alone, a
            1x1 convolution, BatchNorm and ReLU.
        redundancy: ``differentiable`` (as released), ``detached``, or ``off``: gates without the redundancy.
        residual: raw last feature in the input of the late route: ``tanh(p / temperature)`` times it, all of it
            (``plain``), or ``none``.
        temperature: divides the gate's parameter p.
        dropout: of ``up`` ``norm``.
        eps: least sum of gates in the l1 norm (1e-8 or 1e-6 in the released hosts).
        packed: ReLUs of a CNN's late route keep bits for backward, and frozen norms a factor.
        seed: of the early route's initial weights; ``None`` takes the model's seed.

    Raises:
        ContlearnError: a value out of range.
    """

    method = "sherl"
    network = SHERL

    def __init__(
        self,
        *,
        width: int | None = None,
        features: Sequence[int] | None = None,
        late: Literal["block", "none"] = "block",
        down: Literal["linear", "gated"] = "linear",
        up: Literal["norm", "linear"] = "norm",
        redundancy: Redundancy = "differentiable",
        residual: Residual = "tanh",
        temperature: float = 0.1,
        dropout: float = 0.1,
        eps: float = 1e-8,
        packed: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed=seed)
        check_choice("late", late, Literal["block", "none"])
        check_choice("down", down, Literal["linear", "gated"])
        check_choice("up", up, Literal["norm", "linear"])
        check_choice("redundancy", redundancy, Redundancy)
        check_choice("residual", residual, Residual)
        check_width(width)
        for name, value in (("temperature", temperature), ("eps", eps)):
            if not value > 0:
                raise ContlearnError(f"{name}: expected more than 0, got {value}")
        if not 0 <= dropout < 1:
            raise ContlearnError(f"dropout: expected 0 or more and less than 1, got {dropout}")
        self.width = width
        self.features = None if features is None else list(features)
        self.late, self.packed = late, packed
        self.down, self.up = down, up
        self.redundancy, self.residual = redundancy, residual
        self.temperature, self.dropout, self.eps = temperature, dropout, eps

    def build(self, trunk: nn.Module, host: Host) -> SideTuned:
        """The network of SHERL around a backbone."""
        if host.kind == "maps" and (self.down, self.up) != ("linear", "norm"):
            name, value = ("down", self.down) if self.down != "linear" else ("up", self.up)
            other = "linear" if name == "down" else "norm"
            raise ContlearnError(f"sherl: {name} {value!r} is for transformers; expected {other!r} on a CNN")
        return SHERL(
            trunk, host, hidden=default_width(host) if self.width is None else self.width, features=self.features,
            late=self.late, packed=self.packed, down=self.down, up=self.up, redundancy=self.redundancy,
            residual=self.residual, temperature=self.temperature, dropout=self.dropout, eps=self.eps,
        )  # fmt: skip


def default_width(host: Host) -> int:
    """h in the proportion of the released hosts: 512 of 768 for tokens, 512 of 2048 for maps; at least 8."""
    return max(8, host.widths[-1] * 2 // 3 if host.kind == "tokens" else host.widths[-1] // 4)


def check_width(width: int | None) -> None:
    """Raises ContlearnError unless ``None`` or a positive whole number."""
    if width is not None and not (isinstance(width, int) and width >= 1):
        raise ContlearnError(f"width: expected a whole number of at least 1, or none, got {width}")


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raises ContlearnError unless ``value`` is one of the values of a ``Literal``."""
    if value not in get_args(kind):
        raise unknown_name(name, value, get_args(kind))


def _positions(features: Sequence[int] | None, count: int) -> list[int]:
    """Valid positions in order."""
    if features is None:
        return list(range(count))
    chosen = sorted({int(place) for place in features})
    if len(chosen) < 2 or chosen[0] < 0 or chosen[-1] != count - 1:
        raise ContlearnError(
            f"features: expected at least two positions in 0..{count - 1}, {count - 1} (the guide) among them, got"
            f" {list(features)}"
        )
    return chosen


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
