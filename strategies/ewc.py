"""Elastic weight consolidation: a quadratic penalty weighted by the Fisher diagonal (arXiv 1612.00796)."""

from __future__ import annotations

from typing import Any, Literal

from avalanche.models import avalanche_forward
from avalanche.training.plugins import EWCPlugin as AvalancheEWCPlugin
from avalanche.training.utils import ParamData, zerolike_params_dict

from contlearn.errors import ContlearnError
from contlearn.strategies.loader import BatchLoader, BatchSource
from contlearn.strategies.step_part import PlainStep
from contlearn.strategies.template import SupervisedTemplate


class EWCPlugin(AvalancheEWCPlugin, PlainStep):
    """Avalanche's EWC plug-in with its pass over the data in batches of tensors.

    The importance is Avalanche's: the mean over mini-batches of the squared gradient of the batch loss, in evaluation
    mode (not the per-sample Fisher diagonal, which is larger by about the batch size).

    Args:
        ewc_lambda: weight of the penalty.
        mode: ``separate`` keeps one penalty per past experience, ``online`` a single one with decay (arXiv 1805.06370).
        decay_factor: decay of the importance in ``online`` mode.
    """

    def __init__(
        self,
        ewc_lambda: float = 1.0,
        *,
        mode: Literal["separate", "online"] = "separate",
        decay_factor: float = 1.0,
    ) -> None:
        if mode not in ("separate", "online"):
            raise ContlearnError(f"mode: expected separate or online, got {mode!r}")
        if ewc_lambda < 0:
            raise ContlearnError(f"ewc_lambda: expected at least 0, got {ewc_lambda}")
        super().__init__(ewc_lambda, mode=mode, decay_factor=decay_factor if mode == "online" else None)

    memory_names = {"saved_params": "anchor", "importances": "fisher"}

    def compute_importances(
        self,
        model: Any,
        criterion: Any,
        optimizer: Any,
        dataset: Any,
        device: Any,
        batch_size: int,
        num_workers: int = 0,
    ) -> dict[str, ParamData]:
        """Mean squared batch gradient per parameter, by name."""
        model.eval()
        importances: dict[str, ParamData] = dict(zerolike_params_dict(model))
        loader = BatchLoader(BatchSource(dataset, device), batch_size=batch_size)
        for batch in loader:
            optimizer.zero_grad()
            criterion(avalanche_forward(model, batch[0], batch[-1]), batch[1]).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    importances[name].data += parameter.grad.detach().pow(2)
        for importance in importances.values():
            importance.data /= float(len(loader))
        optimizer.zero_grad()
        model.train()
        return importances


class EWC(SupervisedTemplate):
    """Elastic weight consolidation.

    Args:
        ewc_lambda: weight of the penalty.
        mode: ``separate`` keeps one penalty per past experience, ``online`` a single one with decay (arXiv 1805.06370).
        decay_factor: decay of the importance in ``online`` mode.
        kwargs: options of the training loop.
    """

    def __init__(
        self,
        *,
        ewc_lambda: float = 1.0,
        mode: Literal["separate", "online"] = "separate",
        decay_factor: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.plugins.insert(0, EWCPlugin(ewc_lambda, mode=mode, decay_factor=decay_factor))
