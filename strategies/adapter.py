"""The base of test-time adaptation: ``adapter(x) -> logits`` adapts to a batch without labels and predicts it.

The calling convention is that of TENT (arXiv 2006.10726) and its successors; streams, memory account and checkpoints are
those of every other strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from contlearn.errors import ContlearnError
from contlearn.strategies.template import make_optimizer, resolve_device


class Adapter:
    """Base of every test-time adapter.

    A subclass says what of the model adapts (:meth:`configure`) and how one batch is used (:meth:`adapt`).

    Args:
        model: network trained on source data; changed in place.
        batch_size: samples per batch in a run.
        lr: learning rate.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: momentum of ``sgd``.
        weight_decay: L2 penalty of ``sgd`` and ``adam``, decoupled decay of ``adamw``.
        steps: adaptation steps per batch.
        source: weights of the model trained on source data: a run folder, or a file of the whole classifier
            (.safetensors, .pth; RobustBench names are understood). Without, a run first trains the model on the
            stream's clean training data, once per seed, and keeps it in the cache.
        source_epochs: epochs of that training.
        source_lr: its learning rate (SGD, momentum 0.9, cosine to 0).
        source_batch_size: its batch size.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Attributes:
        model: the network.
        optimizer: ``None`` for an adapter that trains nothing.
        batches: batches seen since the last reset.
        last_loss: loss of the last step, ``nan`` where none was taken.

    Raises:
        ContlearnError: a value out of range, or an unknown optimizer or device.
    """

    adapts = True
    """Marks an adapter for the run."""
    needs_source_data = False
    """Whether :meth:`prepare` looks at source data."""
    checkpoint_exclude: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        model: nn.Module,
        batch_size: int = 64,
        lr: float = 1e-3,
        optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        steps: int = 1,
        source: str | None = None,
        source_epochs: int = 5,
        source_lr: float = 0.1,
        source_batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1), ("lr", lr, 0.0), ("momentum", momentum, 0.0), ("steps", steps, 0),
            ("weight_decay", weight_decay, 0.0), ("source_epochs", source_epochs, 0), ("source_lr", source_lr, 0.0),
            ("source_batch_size", source_batch_size, 1),
        ):  # fmt: skip
            if not value >= least:
                raise ContlearnError(f"{name}: expected at least {least}, got {value}")
        self.device = resolve_device(device)
        self.batch_size = batch_size
        self.lr, self.momentum, self.weight_decay, self.steps = lr, momentum, weight_decay, steps
        self.optimizer_name = optimizer
        self.source = source
        self.source_training = {"epochs": source_epochs, "lr": source_lr, "batch_size": source_batch_size}
        self.model = model.to(self.device)
        self.optimizer: Optimizer | None = None
        self.spec: dict[str, Any] = {"name": type(self).__name__}
        # What checkpoints and the memory account look at in any strategy.
        self.plugins: list[Any] = []
        self.evaluator = None
        self.reset_optimizer = False
        self.generator = torch.Generator()
        self.started = False
        self.batches = 0
        self.last_loss = float("nan")
        self._initial: dict[str, Tensor] = {}

    memory_names = {"_initial": "initial_state"}

    # ------------------------------------------------------------------ what a subclass gives

    def configure(self) -> None:
        """Set modes and ``requires_grad`` of the model, and put into it what adapts."""
        raise NotImplementedError

    def adapt(self, x: Tensor) -> Tensor:
        """Use one batch ``(batch, channels, height, width)`` and return its logits ``(batch, classes)``."""
        raise NotImplementedError

    def prepare_with(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Look at batches of clean, labelled source data (images, labels) before deployment; most adapters do not."""

    # ------------------------------------------------------------------ life

    def start(self) -> Adapter:
        """Make the source model ready to adapt: called once its weights are final, before the first batch."""
        self.model.eval()
        self.model.requires_grad_(False)
        self.configure()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = (
            make_optimizer(
                self.optimizer_name,  # type: ignore[arg-type]
                iter(trained),
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
            )
            if trained
            else None
        )
        self._initial = {name: tensor.detach().clone() for name, tensor in self.adapted()}
        self.batches = 0
        self.started = True
        return self

    def adapted(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that adaptation changes, by name: trainable parameters and the buffers of layers in training mode."""
        for path, module in self.model.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield prefix + name, parameter
            if module.training:
                for name, buffer in module.named_buffers(recurse=False):
                    yield prefix + name, buffer

    def __call__(self, x: Tensor) -> Tensor:
        """Adapt to a batch ``(batch, channels, height, width)`` and return its logits ``(batch, classes)``.

        Raises:
            ContlearnError: the adapter was not started, or the input is not finite.
        """
        if not self.started:
            raise ContlearnError(f"adapter {self.spec['name']!r}: expected start() before the first batch")
        x = x.to(self.device)
        if not bool(torch.isfinite(x).all()):
            raise ContlearnError("adapter: expected finite inputs, got NaN or infinity")
        self.batches += 1
        logits = self.adapt(x)
        return logits.detach()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the state of :meth:`start`: weights, statistics and optimizer."""
        self.restore(self._initial)
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self.batches = 0

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all that adaptation changes in the model."""
        return {name: tensor.detach().clone() for name, tensor in self.adapted()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Put a :meth:`snapshot` back."""
        for name, tensor in self.adapted():
            tensor.copy_(state[name])

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the model, and the optimizer's by parameter: what a device keeps."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.optimizer is not None:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for parameter, held in self.optimizer.state.items():
                for key, value in held.items():
                    if isinstance(value, Tensor):
                        state[f"optimizer.{names[id(parameter)]}.{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            ContlearnError: tensors missing or of another shape.
        """
        weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise ContlearnError(f"adapter state: {' '.join(str(error).split())}") from None
        if self.optimizer is not None:
            self.optimizer.state.clear()
            parameters = dict(self.model.named_parameters())
            for key, value in state.items():
                if key.startswith("optimizer."):
                    name, _, slot = key.removeprefix("optimizer.").rpartition(".")
                    self.optimizer.state[parameters[name]][slot] = value.clone()

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer on ``loss``."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # Gradients live in a step only.
        self.optimizer.zero_grad()
        self.last_loss = float(loss.detach())


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax in nats, ``(batch,)``."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)
