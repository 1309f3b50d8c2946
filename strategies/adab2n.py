"""AdaB2N (arXiv 2310.08855): BatchNorm whose statistics are balanced between tasks, as a plug-in for any strategy.

It replaces the BatchNorm layers of a model, tells them which task each row of a batch belongs to, and adds their
regulariser to the loss.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.adab2n_layer import AdaB2N, AdaB2N1d, AdaB2N2d, TaskBatch, TaskRegister, check_kappa
from contlearn.strategies.step_part import PlainStep

_REPLACED: tuple[tuple[type[nn.Module], type[AdaB2N]], ...] = (
    (nn.BatchNorm1d, AdaB2N1d),
    (nn.BatchNorm2d, AdaB2N2d),
)


class AdaB2NPlugin(PlainStep, SupervisedPlugin):
    """Adaptive balance of BatchNorm.

    The model must have been prepared before its optimizer is made: strategies of contlearn do so, elsewhere call
    :meth:`prepare_model` first. The gain presumes a host that rehearses in one forward pass: ``er_ace`` with
    ``joint_forward=True``, ``derpp`` (and ``second_batch=True`` for the authors' loss). In a host with several passes
    per step the first has balanced statistics, the others those of BatchNorm. psi is trained by the host's optimizer
    at the host's rate.

    The authors searched kappa in {0.1, 0.4, 0.7, 1}, lam in {0.01, 0.1, 1, 10} ({1e-5 ... 1e-2} for Mini-ImageNet) and
    start_task in {0, 1}, and did not publish what they chose. The defaults lie in the middle of these grids; a
    later code base takes kappa 0.5 and lam 1.

    Args:
        kappa: 0..1; momentum of the running statistics: 1 as BatchNorm, 0 the mean over all steps, between them one
            that falls from momentum^kappa to 1 - (1 - momentum)^kappa.
        lam: weight of the regulariser that keeps batch and running statistics close; 0 computes none.
        start_task: first task (counted from 0) with the regulariser.
        renormalise: leave tasks without a row in the batch out of the weights. As released, they keep theirs, and the
            statistics shrink towards 0.
        fused: layers save for the backward pass what BatchNorm saves; ``False``: operation by operation.

    Raises:
        ContlearnError: kappa outside 0..1, a negative lam or start_task.
    """

    memory_names = {"batch": "task_rows"}
    checkpoint_exclude = ("batch", "_layers")

    def __init__(
        self,
        *,
        kappa: float = 0.4,
        lam: float = 0.1,
        start_task: int = 0,
        renormalise: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        check_kappa(kappa)
        for name, value in (("lam", lam), ("start_task", start_task)):
            if not value >= 0:
                raise ContlearnError(f"{name}: expected at least 0, got {value}")
        self.kappa = kappa
        self.lam = lam
        self.start_task = start_task
        self.renormalise = renormalise
        self.fused = fused
        self.register = TaskRegister()
        self.batch = TaskBatch()
        self._layers: list[AdaB2N] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaB2NPlugin:
        made = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():  # a model's copy shares the register, a strategy's goes its own way
            setattr(made, name, value.copy() if name == "register" else copy.deepcopy(value, memo))
        return made

    def prepare_model(self, model: nn.Module) -> None:
        """Replace every BatchNorm1d and BatchNorm2d in place; parameters and buffers stay the same objects.

        Raises:
            ContlearnError: the model has none, or one of a kind whose behaviour is not known.
        """
        replace_batchnorm(
            model, kappa=self.kappa, renormalise=self.renormalise, fused=self.fused, register=self.register,
            batch=self.batch,
        )  # fmt: skip
        self._attach(model)
        if not self._layers:
            raise ContlearnError(
                f"adab2n: {type(model).__name__} has no BatchNorm1d or BatchNorm2d layer; choose a model that has"
            )

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check that the model was prepared."""
        self._attach(strategy.model)
        if not self._layers:
            raise ContlearnError(
                "adab2n: the model has no AdaB2N layer; call the plug-in's prepare_model(model) before the optimizer"
            )

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Take hold of the layers (the model may be another than before) and count steps for them."""
        self._attach(strategy.model)
        self.batch.counts_steps = True

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Tell the layers the task of each row."""
        targets = getattr(strategy, "pass_targets", None)
        rows = self.register.rows(strategy.mb_y if targets is None else targets)
        self.batch.open(rows, collect=self.lam > 0 and self.register.count > self.start_task)

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        """Let go of the rows."""
        self.batch.close()

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Add the regularisers of all layers."""
        penalties, self.batch.penalties = self.batch.penalties, []
        if penalties:
            strategy.loss = strategy.loss + self.lam * torch.stack(penalties).sum()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Move the momentum of the running statistics on, once per step however many passes it had."""
        for layer in self._layers:
            if layer.training:
                layer.advance()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Outside of training, every pass in training mode counts."""
        self.batch.counts_steps = False

    def step_ready(self, strategy: Any) -> None:
        """Steps are counted by the step, not by passes."""
        self._attach(strategy.model)
        self.batch.counts_steps = True

    @contextlib.contextmanager
    def step_bound(self, strategy: Any, tensors: dict[str, Tensor], masks: Any) -> Iterator[None]:
        """While open, classes that a device meets first belong to the latest task."""
        self.register.rest = self.register.count - 1
        try:
            yield
        finally:
            self.register.rest = -1

    def step_buffers(self, strategy: Any) -> list[str]:
        """The momentum of the running statistics."""
        return [f"{name}.eta" for name, module in strategy.model.named_modules() if isinstance(module, AdaB2N)]

    def step_after(
        self, weights: dict[str, Tensor], statistics: dict[str, Tensor], tensors: dict[str, Tensor], lr: Tensor
    ) -> dict[str, Tensor]:
        """Move that momentum on."""
        for name in statistics:
            if name.endswith(".eta"):
                layer = self._layers[0]
                assert layer.momentum is not None
                if layer.kappa != 1:
                    statistics[name] = statistics[name] / (statistics[name] + (1 - layer.momentum) ** layer.kappa)
        return {}

    def kept_bytes(self, model: nn.Module, *, experiences: int, head_rows: int) -> int:
        """Bytes the layers gain over a stream at most: one number of ``psi`` per task beyond the first."""
        return sum(layer.psi.element_size() * (experiences - 1) for layer in self._layers)

    def _attach(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, AdaB2N)]
        for layer in self._layers:
            layer.register, layer.batch = self.register, self.batch


def replace_batchnorm(model: nn.Module, **options: Any) -> None:
    """Replace every BatchNorm1d and BatchNorm2d inside ``model`` by an AdaB2N layer, in place.

    Layers with frozen statistics that are no such module, and AdaB2N layers, stay. A layer that occurs twice is
    replaced by one layer that occurs twice.

    Args:
        model: the network.
        options: of :class:`AdaB2N` (kappa, renormalise, fused, register, batch).

    Raises:
        ContlearnError: a subclass of BatchNorm whose behaviour is not known, or a layer without running statistics or
            momentum.
    """
    made: dict[int, AdaB2N] = {}
    for name, parent, leaf, norm in list(_batchnorms(model)):
        if id(norm) not in made:
            made[id(norm)] = from_batchnorm(norm, name=name, **options)
        setattr(parent, leaf, made[id(norm)])


def from_batchnorm(norm: nn.BatchNorm1d | nn.BatchNorm2d, *, name: str = "layer", **options: Any) -> AdaB2N:
    """The AdaB2N layer with the parameters, buffers, device and mode of a BatchNorm layer.

    Args:
        norm: BatchNorm1d or BatchNorm2d, or timm's BatchNormAct2d.
        name: what error messages call it.
        options: of :class:`AdaB2N`.

    Raises:
        ContlearnError: another kind, or one without running statistics or momentum.
    """
    kind = next((made for known, made in _REPLACED if isinstance(norm, known)), None)
    plain = type(norm) in [known for known, _ in _REPLACED]
    followed = norm._modules.keys() == {"drop", "act"}
    if kind is None or not (plain or followed):
        raise ContlearnError(f"adab2n: {name} is a {type(norm).__name__}; expected a BatchNorm1d or BatchNorm2d")
    if norm.running_mean is None:
        raise ContlearnError(f"adab2n: {name} has no running statistics; expected track_running_stats=True")
    if norm.momentum is None:
        raise ContlearnError(f"adab2n: {name} has momentum None; expected a number (kappa 0 averages over all steps)")
    layer = kind(norm.num_features, eps=norm.eps, momentum=norm.momentum, affine=norm.affine, **options)
    layer.to(device=norm.running_mean.device, dtype=norm.running_mean.dtype)
    layer._parameters.update(norm._parameters)
    layer._buffers.update(norm._buffers)
    if norm.weight is not None:
        layer.psi.requires_grad_(norm.weight.requires_grad)  # frozen with its layer
    if followed:
        layer.drop, layer.act = norm._modules["drop"], norm._modules["act"]
    layer.restart()
    return layer.train(norm.training)


def _batchnorms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.BatchNorm1d | nn.BatchNorm2d]]:
    """(name, parent, attribute, layer) of every place a BatchNorm layer sits."""
    for prefix, parent in model.named_modules():
        for leaf, child in parent._modules.items():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and not isinstance(child, AdaB2N):
                yield f"{prefix}.{leaf}".lstrip("."), parent, leaf, child
