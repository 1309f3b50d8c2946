"""TENT: entropy minimisation at test time over the affine parameters of normalisation layers (arXiv 2006.10726)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from contlearn.errors import ContlearnError, unknown_name
from contlearn.strategies.adapter import Adapter, entropy
from contlearn.strategies.adapter_step import Adaptation
from contlearn.strategies.bn_stats import use_batch_statistics
from contlearn.strategies.norm_layers import is_norm


class Tent(Adapter):
    """TENT: the mean entropy of a batch's predictions is lowered by one step per batch.

    Scale and offset of every normalisation layer train (BatchNorm, GroupNorm, LayerNorm, RMSNorm), all else is frozen.
    BatchNorm normalises with the batch's own statistics. The paper's settings: Adam 1e-3 at batch 200 (CIFAR), SGD
    2.5e-4 with momentum 0.9 at batch 64 (ImageNet).

    Args:
        scope: what adapts: the ``norms``, as in the paper, or the top of the network as ``mobiletl`` trains it
            (arXiv 2212.03246; ours): convolutions, last norms and the offsets of inner norms of the last inverted
            residual blocks and the layers behind them. The classifier and the trunk stay, the trunk with the source's
            statistics; the last norms use the batch's.
        blocks: how many blocks ``mobiletl`` adapts.
        kwargs: options every adapter has.

    Raises:
        ContlearnError: a value out of range or an unknown scope; at :meth:`start`, a model without what adapts.
    """

    def __init__(self, *, scope: Literal["norms", "mobiletl"] = "norms", blocks: int = 3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if scope not in ("norms", "mobiletl"):
            raise unknown_name("scope", scope, ("norms", "mobiletl"))
        self.scope, self.blocks = scope, blocks

    def configure(self) -> None:
        """Batch statistics; scale and offset train, or the scope's part of the network."""
        if self.scope == "mobiletl":
            self._configure_top()
            return
        self._hooks += use_batch_statistics(self.model)
        parameters = [parameter for layer in self.layers() for parameter in affine(layer)]
        if not parameters:
            raise ContlearnError(
                f"{self.spec['name']}: the model {type(self.model).__name__} has no normalisation layer with scale and "
                "offset to adapt; expected one that has, such as resnet14 or wrn40_2"
            )
        for parameter in parameters:
            parameter.requires_grad_(True)

    def _configure_top(self) -> None:
        from contlearn.strategies.inverted_residual import SplitBackbone
        from contlearn.strategies.mobiletl import prepare

        backbone = prepare(self.model, blocks=self.blocks).backbone
        assert isinstance(backbone, SplitBackbone)
        for name in backbone.last_norms():
            self._hooks += use_batch_statistics(backbone.get_submodule(name))

    def layers(self) -> Iterator[nn.Module]:
        """The normalisation layers that adapt."""
        return (module for module in self.model.modules() if is_norm(module))

    not_exportable = ""

    def step_adaptation(self, x: Tensor, method: dict[str, Tensor]) -> Adaptation:
        """The mean entropy."""
        logits: Tensor = self.model(x)
        return Adaptation(logits, entropy(logits).mean())

    def adapt(self, x: Tensor) -> Tensor:
        """Predict, then step: the logits are those in front of the (last) step, as in the paper (section 3.3)."""
        if not self.steps:
            return self.predict(x)
        for _ in range(self.steps):
            logits: Tensor = self.model(x)
            self.descend(entropy(logits).mean())
        return logits


def affine(layer: nn.Module) -> list[nn.Parameter]:
    """Scale and offset of a normalisation layer, as far as it has them."""
    held = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return [parameter for parameter in held if isinstance(parameter, nn.Parameter)]
