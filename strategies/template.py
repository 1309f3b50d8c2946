"""The training loop of every supervised strategy: Avalanche's template with batched tensor indexing.

Same hooks in the same order as ``avalanche.training.templates.SupervisedTemplate``, so any ``SupervisedPlugin`` works;
what differs is how batches are formed (one gather instead of a Python call per sample), that hooks a plugin does not
define are not called, and that a run can be stopped and resumed at any iteration with the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.core import BasePlugin, BaseSGDPlugin, SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.templates import SupervisedTemplate as AvalancheTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn
from torch.optim import Optimizer

from contlearn import strategies
from contlearn.errors import ContlearnError, Interrupted
from contlearn.strategies import schedule
from contlearn.strategies.first_experience import plans
from contlearn.strategies.loader import BatchLoader, BatchSource

OptimizerName = Literal["sgd", "adam", "adamw", "sinkgd"]
_NO_OPS = (BasePlugin, BaseSGDPlugin, SupervisedPlugin)


def make_optimizer(
    name: OptimizerName, parameters: Iterator[nn.Parameter], *, lr: float, momentum: float, weight_decay: float,
    model: nn.Module | None = None,
) -> Optimizer:  # fmt: skip
    """An optimizer by name; ``model`` tells ``sinkgd`` which of the parameters are its output layer.

    Raises:
        ContlearnError: unknown name, or momentum given to an optimizer that has none.
    """
    trainable: list[nn.Parameter] = list(parameters)
    if not trainable:  # a head that has no rows yet in front of a frozen trunk
        trainable = [nn.Parameter(torch.empty(0))]
    if name == "sgd":
        return torch.optim.SGD(trainable, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum:
        raise ContlearnError(f"momentum: only sgd takes it; expected 0 with optimizer {name}, got {momentum}")
    if name == "adam":
        return torch.optim.Adam(trainable, lr=lr, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(trainable, lr=lr, weight_decay=weight_decay)
    if name == "sinkgd":
        from contlearn.strategies.sinkgd import SinkGD, parameter_groups

        groups = trainable if model is None else parameter_groups(model, trainable)
        return SinkGD(groups, lr, weight_decay=weight_decay)
    raise ContlearnError(f"optimizer: expected sgd, adam, adamw or sinkgd, got {name!r}")


def resolve_device(device: str | torch.device) -> torch.device:
    """``auto`` is CUDA when there is one, else the CPU.

    Raises:
        ContlearnError: a device PyTorch does not know or does not see.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ContlearnError(f"device: expected auto, cpu or cuda, got {str(device)!r} ({error})") from None
    return resolved


class SupervisedTemplate(AvalancheTemplate):  # type: ignore[type-arg]
    """Base of every supervised strategy.

    Args:
        model: network to train; heads that grow do so at the start of each experience.
        lr: learning rate at the start of each experience.
        epochs: passes over each experience.
        batch_size: samples of the current experience per iteration.
        optimizer: ``sgd``, ``adam``, ``adamw``, ``sinkgd`` (normalised gradients, see ``SinkGD``), or a torch
            ``Optimizer`` (Python only; then ``lr``, ``momentum`` and ``weight_decay`` are read from it).
        momentum: momentum of ``sgd``.
        weight_decay: L2 penalty of ``sgd`` and ``adam``, decoupled decay of ``adamw`` and ``sinkgd``.
        reset_optimizer: forget momenta and moments at the start of each experience.
        lr_schedule: how the learning rate moves inside an experience; it starts anew in each.
        milestones: epochs at which ``multistep`` multiplies the rate by ``gamma``.
        gamma: factor of ``multistep``.
        warmup_epochs: epochs of linear warm-up at the start of each experience.
        first_experience: what the first experience has instead of ``epochs``, ``lr``, ``weight_decay``,
            ``lr_schedule``, ``milestones``, ``gamma`` or ``warmup_epochs``, such as ``{epochs: 200}``.
        clip_grad_norm: clip the gradient's L2 norm to this value; 0 does not clip.
        amp: mixed precision on CUDA: ``none``, ``bf16``, or ``fp16`` with loss scaling; ignored on the CPU.
        eval_batch_size: samples per batch when evaluating.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.
        criterion: loss of outputs and targets (Python only); default: cross-entropy.
        plugins: other methods to join (``contlearn list strategies`` names them): names, or mappings of a name and
            options, such as ``[l2, {name: nap, every: 10}]``; in Python also Avalanche ``SupervisedPlugin`` objects.
        evaluator: Avalanche ``EvaluationPlugin`` (Python only); default: none, since a run keeps its own records.

    Raises:
        ContlearnError: a value out of range, or an unknown optimizer, schedule or device.
    """

    experience: Any
    dataloader: Any
    train_epochs: int
    _stop_training: bool

    def __init__(
        self,
        *,
        model: nn.Module,
        lr: float = 0.1,
        epochs: int = 1,
        batch_size: int = 32,
        optimizer: OptimizerName | Optimizer = "sgd",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        reset_optimizer: bool = False,
        lr_schedule: schedule.ScheduleName = "constant",
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        warmup_epochs: int = 0,
        first_experience: dict[str, Any] | None = None,
        clip_grad_norm: float = 0.0,
        amp: Literal["none", "bf16", "fp16"] = "none",
        eval_batch_size: int = 512,
        device: str = "auto",
        criterion: nn.Module | None = None,
        plugins: Sequence[str | dict[str, Any] | SupervisedPlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        for name, value, least in (
            ("epochs", epochs, 1), ("batch_size", batch_size, 1), ("eval_batch_size", eval_batch_size, 1),
            ("lr", lr, 0.0), ("momentum", momentum, 0.0), ("weight_decay", weight_decay, 0.0),
            ("clip_grad_norm", clip_grad_norm, 0.0), ("warmup_epochs", warmup_epochs, 0),
        ):  # fmt: skip
            if not value >= least:
                raise ContlearnError(f"{name}: expected at least {least}, got {value}")
        if amp not in ("none", "bf16", "fp16"):
            raise ContlearnError(f"amp: expected none, bf16 or fp16, got {amp!r}")
        placed = resolve_device(device)
        joined = strategies.joined(plugins)
        for plugin in joined:
            # What a plug-in inserts into the model is optimised, stored and counted like the rest of it.
            prepare = getattr(plugin, "prepare_model", None)
            if prepare is not None:
                prepare(model)
        if not isinstance(optimizer, Optimizer):
            optimizer = make_optimizer(
                optimizer, model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, model=model
            )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=criterion if criterion is not None else nn.CrossEntropyLoss(),
            train_mb_size=batch_size,
            train_epochs=epochs,
            eval_mb_size=eval_batch_size,
            device=placed,
            plugins=joined,
            evaluator=evaluator if evaluator is not None else _silent_evaluator(),
        )
        self.spec: dict[str, Any] = {"name": type(self).__name__}
        """Name and resolved options, for a run's ``config.yaml``."""
        self.generator = torch.Generator()
        """Source of every order in which samples are served; ``run`` seeds it."""
        self.reset_optimizer = reset_optimizer
        self.clip_grad_norm = clip_grad_norm
        self._usual_plan = {
            "epochs": epochs, "lr_schedule": lr_schedule, "milestones": milestones, "gamma": gamma,
            "warmup_epochs": warmup_epochs,
        }  # fmt: skip
        self._first_plan = dict(first_experience or {})
        self.plan_training()
        self.scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        self.amp = amp if placed.type == "cuda" else "none"
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.amp == "fp16")
        self._stop_training = False
        self.interrupt = False
        """Set (from a signal handler, say) to stop after the current iteration by raising :class:`Interrupted`."""
        self.resume_from: Callable[[], None] | None = None
        """Called once when training on an experience begins, to put a stored mid-experience state back."""
        self.epoch_losses: list[float] = []
        """Mean loss of each finished epoch of the current experience."""
        self._loss_sum = torch.zeros(1)
        self._hooks: dict[str, list[Callable[..., Any]]] = {}

    # ------------------------------------------------------------------ hooks

    def _collect_hooks(self) -> None:
        """Forget which plugins define which hooks; plugins may have been added since."""
        self._hooks = {}

    def _trigger(self, event: str, **kwargs: Any) -> None:
        """Call ``event`` of every plugin that defines it, in the order of ``self.plugins``."""
        hooks = self._hooks.get(event)
        if hooks is None:
            hooks = self._hooks[event] = [
                getattr(plugin, event) for plugin in self.plugins if _defines(plugin, event, self)
            ]
        for hook in hooks:
            hook(self, **kwargs)

    # ------------------------------------------------------------------ data

    def loader(
        self, dataset: AvalancheDataset[Any], *, batch_size: int, shuffle: bool, drop_last: bool = False
    ) -> BatchLoader:
        """Batches of ``dataset`` on this strategy's device, in an order drawn from its generator."""
        source = BatchSource(dataset, self.device)
        return BatchLoader(
            source, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, generator=self.generator
        )

    def make_train_dataloader(self, shuffle: bool = True, drop_last: bool = False, **kwargs: Any) -> None:
        """Serve ``self.adapted_dataset`` in mini-batches; the options are those of ``train(..., shuffle=False)``."""
        assert self.adapted_dataset is not None
        self.dataloader = self.loader(
            self.adapted_dataset, batch_size=self.train_mb_size, shuffle=shuffle, drop_last=drop_last
        )

    def make_eval_dataloader(self, **kwargs: Any) -> None:
        """Serve ``self.adapted_dataset`` in order."""
        assert self.adapted_dataset is not None
        self.dataloader = self.loader(self.adapted_dataset, batch_size=self.eval_mb_size, shuffle=False)

    def _unpack_minibatch(self) -> None:
        """Batches of our loaders are lists on the device already; those of other loaders are moved there."""
        if not isinstance(self.dataloader, BatchLoader):
            super()._unpack_minibatch()

    # ------------------------------------------------------------------ model and optimizer

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow the model for the experience, tell the optimizer, and start the learning-rate schedule."""
        kwargs.setdefault("reset_optimizer_state", self.reset_optimizer)
        super().check_model_and_optimizer(**kwargs)
        plan = self.plans[min(self.clock.train_exp_counter, 1)]
        self.train_epochs = plan.epochs
        self.scheduler = plan.start(self.optimizer)

    def plan_training(self) -> None:
        """Take the rates of the optimizer's groups, as they are now, for those at the start of each experience."""
        self.plans = plans(self.optimizer, self._usual_plan, self._first_plan)

    @property
    def pass_targets(self) -> Tensor:
        """Labels ``(batch,)`` of the samples of the forward pass that is about to run, in the order of its rows."""
        targets: Tensor = self.mb_y
        return targets

    def forward(self) -> Tensor:
        """The model's output ``(batch, outputs)`` on the current batch."""
        return super().forward()  # type: ignore[no-any-return]

    def backward(self) -> None:
        """Back-propagate the loss, scaled for fp16."""
        if self.scaler.is_enabled():
            self.scaler.scale(self.loss).backward(retain_graph=self.retain_graph)
            self.scaler.unscale_(self.optimizer)
        else:
            super().backward()

    def optimizer_step(self) -> None:
        """Clip if asked to and update the weights."""
        if self.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.amp == "none":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=torch.bfloat16 if self.amp == "bf16" else torch.float16)

    # ------------------------------------------------------------------ export

    not_exportable = ""
    """Why its step cannot run on a device; empty if it can."""

    def declare_step(self, *, batch_size: int, input_shape: Sequence[int], **options: Any) -> Any:
        """The training step as a pure function (:class:`contlearn.strategies.step.Step`).

        Args:
            batch_size: samples of the current experience per step.
            input_shape: (channels, height, width).
            options: of :func:`contlearn.strategies.supervised_step.supervised_step`.
        """
        from contlearn.strategies.supervised_step import supervised_step

        return supervised_step(self, batch_size=batch_size, input_shape=input_shape, **options)

    def step_batch(self, x: Tensor, y: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
        """The batch ``[x, y, task labels]`` of an exported step; exemplars, where there are any, follow."""
        if "x_memory" in given:
            x, y = torch.cat([x, given["x_memory"]]), torch.cat([y, given["y_memory"]])
        return [x, y, torch.zeros_like(y)]

    def step_bound(self, masks: Any, given: dict[str, Tensor]) -> contextlib.AbstractContextManager[Any]:
        """While open, the loss looks at these masks of classes."""
        return contextlib.nullcontext()

    # ------------------------------------------------------------------ loops

    def _before_training(self, **kwargs: Any) -> None:
        self._collect_hooks()
        self._trigger("before_training", **kwargs)

    def _before_eval(self, **kwargs: Any) -> None:
        self._collect_hooks()
        self._trigger("before_eval", **kwargs)

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        self.epoch_losses = []
        self._loss_sum = torch.zeros(1, device=self.device)
        resuming = self.resume_from is not None
        if self.resume_from is not None:
            restore, self.resume_from = self.resume_from, None
            restore()
        while len(self.epoch_losses) < self.train_epochs:
            if not resuming:
                self._before_training_epoch(**kwargs)
                self._loss_sum.zero_()
            resuming = False
            if self._stop_training:
                self._stop_training = False
                break
            self.training_epoch(**kwargs)
            iterations = max(1, self.clock.train_epoch_iterations)
            self.epoch_losses.append(self._loss_sum.item() / iterations)
            self._after_training_epoch(**kwargs)
            if self.scheduler is not None:
                self.scheduler.step()

    def training_epoch(self, **kwargs: Any) -> None:
        """One pass over ``self.dataloader`` with the full sequence of hooks."""
        autocast = self._autocast()
        for self.mbatch in self.dataloader:
            if self._stop_training:
                break
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            self.optimizer.zero_grad()
            self.loss = self._make_empty_loss()
            with autocast:
                self._before_forward(**kwargs)
                self.mb_output = self.forward()
                self._after_forward(**kwargs)
                self.loss += self.criterion()
                self._before_backward(**kwargs)
            self.backward()
            self._after_backward(**kwargs)
            self._before_update(**kwargs)
            self.optimizer_step()
            self._after_update(**kwargs)
            self._loss_sum += self.loss.detach()
            self._after_training_iteration(**kwargs)
            if self.interrupt:
                raise Interrupted

    def eval_epoch(self, **kwargs: Any) -> None:
        """One pass over ``self.dataloader`` without gradients; NaN is the loss of classes without an output."""
        for self.mbatch in self.dataloader:
            self._unpack_minibatch()
            self._before_eval_iteration(**kwargs)
            self._before_eval_forward(**kwargs)
            self.mb_output = self.forward()
            self._after_eval_forward(**kwargs)
            known = int(self.mb_y.max()) < self.mb_output.shape[1]
            self.loss = self.criterion() if known else torch.full((1,), float("nan"), device=self.device)
            self._after_eval_iteration(**kwargs)

    def training_state(self) -> dict[str, Any]:
        """What of the loop itself must be stored to resume in the middle of an experience."""
        return {
            "epoch_losses": self.epoch_losses,
            "loss_sum": self._loss_sum,
            "scheduler": self.scheduler,
            "dataloader": self.dataloader,
        }

    # Every trigger goes through ``_trigger``: Avalanche asks each plugin for each event by name.

    def _before_training_exp(self, **kwargs: Any) -> None:
        self._before_train_dataset_adaptation(**kwargs)
        self.train_dataset_adaptation(**kwargs)
        self._after_train_dataset_adaptation(**kwargs)
        self.make_train_dataloader(**kwargs)
        self.check_model_and_optimizer(**kwargs)
        self._trigger("before_training_exp", **kwargs)

    def _before_eval_exp(self, **kwargs: Any) -> None:
        self._before_eval_dataset_adaptation(**kwargs)
        self.eval_dataset_adaptation(**kwargs)
        self._after_eval_dataset_adaptation(**kwargs)
        self.make_eval_dataloader(**kwargs)
        self.model = self.model_adaptation()
        self._trigger("before_eval_exp", **kwargs)


def _trigger_of(event: str) -> Callable[..., None]:
    def trigger(self: SupervisedTemplate, **kwargs: Any) -> None:
        self._trigger(event, **kwargs)

    trigger.__name__ = f"_{event}"
    return trigger


for _event in (
    "after_training_exp", "after_training", "after_eval", "after_eval_exp",
    "before_training_epoch", "after_training_epoch", "before_training_iteration", "after_training_iteration",
    "before_forward", "after_forward", "before_backward", "after_backward", "before_update", "after_update",
    "before_eval_iteration", "after_eval_iteration", "before_eval_forward", "after_eval_forward",
    "before_train_dataset_adaptation", "after_train_dataset_adaptation",
    "before_eval_dataset_adaptation", "after_eval_dataset_adaptation",
):  # fmt: skip
    setattr(SupervisedTemplate, f"_{_event}", _trigger_of(_event))


def _silent_evaluator() -> EvaluationPlugin:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin(loggers=[])


def _defines(plugin: Any, event: str, strategy: SupervisedTemplate) -> bool:
    """Whether calling ``event`` of ``plugin`` can do anything."""
    if isinstance(plugin, EvaluationPlugin):
        return bool(plugin.metrics or plugin.loggers)
    if isinstance(plugin, PeriodicEval) and plugin.eval_every < 0:
        return False
    if event in getattr(plugin, "__dict__", {}):
        return True
    method = getattr(type(plugin), event, None)
    if method is None:
        return hasattr(plugin, event)
    return not any(method is base.__dict__.get(event) for base in _NO_OPS)
