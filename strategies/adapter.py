"""The base of test-time adaptation: ``adapter(x) -> logits`` adapts to a batch without labels and predicts it.

The calling convention is that of TENT (arXiv 2006.10726) and its successors; streams, memory account and checkpoints
are those of every other strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from contlearn.errors import ContlearnError
from contlearn.strategies.guards import Guard
from contlearn.strategies.template import make_optimizer, resolve_device

Batches = Iterable[tuple[Tensor, Tensor]] | Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Adapter:
    """Base of every test-time adapter.

    A subclass says what of the model adapts (:meth:`configure`) and how one batch is used (:meth:`adapt`). One that
    keeps more between batches than weights and optimizer state gives it in :meth:`method_state` and takes it back in
    :meth:`load_method_state`.

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
        guard: what happens when adaptation breaks the model (non-finite weights, logits or loss; drift; collapse):
            ``restore`` goes back to the last good state and predicts the batch with it, ``report`` only notes it in
            ``trips``, ``off`` does not look.
        guard_every: batches between two copies of a good state.
        guard_window: latest predictions that are looked at for collapse, in samples.
        collapse_share: share of one class among them from which collapse is suspected; it counts as collapse when the
            source model gives that class to less than half as many of another window of samples.
        max_drift: largest L2 distance of the adapted parameters from their start, relative to the start's L2 norm;
            0 for none.
        device: ``auto`` (CUDA when there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Attributes:
        model: the network.
        optimizer: ``None`` for an adapter that trains nothing.
        batches: batches seen since the last reset.
        last_loss: loss of the last step of the latest batch, ``nan`` where none was taken.
        stepped: optimizer steps taken for the latest batch.
        gave_up: the guard found that even the start answers with one class where the source model does not (batches too
            small for their statistics); until :meth:`reset` the source model answers and nothing adapts.
        trips: what the guard found: ``batch`` (counted from the last reset), ``reason``, ``figure``, and with
            ``restore`` what was put back (``restored``: ``snapshot``, ``start`` or ``source``).

    Raises:
        ContlearnError: a value out of range, or an unknown optimizer or device.
    """

    adapts = True
    """Marks an adapter for the run."""
    watched_for_collapse = True
    """Whether its answers can become worse than the source model's."""
    needs_source_data = False
    """Whether :meth:`prepare_with` has to see source data before :meth:`start`."""
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
        guard: Literal["off", "report", "restore"] = "restore",
        guard_every: int = 10,
        guard_window: int = 512,
        collapse_share: float = 0.9,
        max_drift: float = 1.0,
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
        self.guard = Guard(
            guard, every=guard_every, window=guard_window, collapse_share=collapse_share, max_drift=max_drift
        )
        self.trips: list[dict[str, Any]] = []
        self.started = False
        self.gave_up = False
        self.batches = 0
        self.last_loss = float("nan")
        self.stepped = 0
        self._initial: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    memory_names = {"_initial": "initial_state", "guard": "guard_state"}

    # ------------------------------------------------------------------ what a subclass gives

    def configure(self) -> None:
        """Set modes and ``requires_grad`` of the model, and put into it what adapts."""
        raise NotImplementedError

    def adapt(self, x: Tensor) -> Tensor:
        """Use one batch ``(batch, channels, height, width)`` and return its logits ``(batch, classes)``."""
        raise NotImplementedError

    def prepare_with(self, batches: Batches) -> None:
        """Look at clean, labelled source data before deployment and before :meth:`start`; most adapters do not.

        Args:
            batches: batches (images, labels), or a function that starts a pass over them.
        """

    def method_state(self) -> dict[str, Tensor]:
        """What the method keeps between batches beside weights and optimizer state, by name."""
        return {}

    def load_method_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy back what :meth:`method_state` gave; an empty ``state`` is that of the start."""

    def predict(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of the model as it is now; nothing changes."""
        # Layers that write their statistics during a forward pass write into copies.
        written = {name: held.clone() for name, held in self.adapted() if not isinstance(held, nn.Parameter)}
        with torch.no_grad():
            logits: Tensor = functional_call(self.model, written, (x,)) if written else self.model(x)
        return logits

    # ------------------------------------------------------------------ export

    not_exportable = "it declares no step"
    """Why its step cannot run on a device; empty if it can."""

    def declare_step(self, *, batch_size: int, input_shape: Sequence[int], **options: Any) -> Any:
        """The adaptation step as a pure function (:class:`contlearn.strategies.step.Step`); call :meth:`start` before.

        Args:
            batch_size: images per batch.
            input_shape: (channels, height, width).
            options: none is known here; those of supervised strategies are ignored if ``None``.

        Raises:
            ContlearnError: an option that only a supervised strategy has.
        """
        from contlearn.strategies.adapter_step import adapter_step

        for name, value in options.items():
            if value is not None:
                raise ContlearnError(f"{name}: strategy {self.spec['name']!r} takes none; expected it left out")
        return adapter_step(self, batch_size=batch_size, input_shape=input_shape)

    def step_tensors(self) -> dict[str, Tensor]:
        """What :meth:`step_adaptation` keeps beside weights, statistics and optimizer, by name."""
        return {}

    def step_adaptation(self, x: Tensor, method: dict[str, Tensor]) -> Any:
        """Answer and loss of one batch, without a decision of Python's that depends on values.

        Args:
            x: images (batch, channels, height, width).
            method: what :meth:`step_tensors` named.

        Returns:
            :class:`contlearn.strategies.adapter_step.Adaptation`.
        """
        raise NotImplementedError

    def step_prediction(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of the model as it is."""
        logits: Tensor = self.model(x)
        return logits

    # ------------------------------------------------------------------ life

    def start(self) -> Adapter:
        """Make the source model ready to adapt: called once its weights are final, before the first batch."""
        self._make_ready()
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
        self.load_method_state({})
        self.guard.begin()
        self.trips = []
        self.batches = self.stepped = 0
        self.last_loss = float("nan")
        self.gave_up = False
        self.started = True
        return self

    def _make_ready(self) -> None:
        """Modes, trainable parameters and hooks; a second call does not hook anything twice."""
        while self._hooks:
            self._hooks.pop().remove()
        self.model.eval()
        self.model.requires_grad_(False)
        self.configure()

    def adapted(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the model that adaptation changes, by name.

        Trainable parameters, and the buffers of layers in training mode unless they are told not to track statistics.
        """
        for path, module in self.model.named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield prefix + name, parameter
            if module.training and getattr(module, "track_running_stats", True):
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
        self.stepped, self.last_loss = 0, float("nan")
        if self.gave_up:
            return self.source_logits(x)
        with torch.enable_grad():
            logits = self.adapt(x).detach()
        return self.guard.look(self, x, logits)

    @torch.no_grad()
    def back_to_start(self) -> None:
        """Weights, statistics, optimizer and method state as :meth:`start` left them."""
        for name, tensor in self.adapted():
            tensor.copy_(self._initial[name])
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self.load_method_state({})

    def reset(self) -> None:
        """Everything as :meth:`start` left it, the guard's memory and the count of batches included; trips stay."""
        self.back_to_start()
        self.guard.begin()
        self.batches = self.stepped = 0
        self.last_loss = float("nan")
        self.gave_up = False

    @torch.no_grad()
    def start_logits(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of the model with the weights of :meth:`start`, in its present modes."""
        # Of the initial tensors only buffers could be written by a forward pass; they are small.
        parameters = {name for name, _ in self.model.named_parameters()}
        weights = {name: held if name in parameters else held.clone() for name, held in self._initial.items()}
        logits: Tensor = functional_call(self.model, weights, (x,))
        return logits

    @torch.no_grad()
    def source_logits(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of the source model: the weights of :meth:`start` and its own statistics."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return self.start_logits(x)
        finally:
            for module in training:
                module.training = True

    def moving(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that changes from batch to batch: of the model, the optimizer and the method, by name."""
        yield from ((f"model.{name}", tensor) for name, tensor in self.adapted())
        yield from self._beside_weights()

    def _beside_weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.optimizer is not None:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for parameter, held in self.optimizer.state.items():
                for slot, value in held.items():
                    if isinstance(value, Tensor):
                        yield f"optimizer.{names[id(parameter)]}.{slot}", value
        yield from ((f"method.{name}", tensor) for name, tensor in self.method_state().items())

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of every tensor that changes from batch to batch."""
        return {name: tensor.detach().clone() for name, tensor in self.moving()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put a :meth:`snapshot` back, by copying."""
        for name, tensor in self.adapted():
            tensor.copy_(state[f"model.{name}"])
        self._load_beside_weights(state)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the model, and those of optimizer and method: what a device keeps."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state.update(self._beside_weights())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave; the start that :meth:`reset` goes back to stays this adapter's own.

        Raises:
            ContlearnError: the adapter was not started; tensors missing, unknown or of another shape.
        """
        if not self.started:
            raise ContlearnError(f"adapter {self.spec['name']!r}: expected start() before its state is loaded")
        weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise ContlearnError(f"adapter state: {' '.join(str(error).split())}") from None
        self._load_beside_weights(state)
        self.guard.begin()

    def _load_beside_weights(self, state: Mapping[str, Tensor]) -> None:
        if self.optimizer is not None:
            self.optimizer.state.clear()
            parameters = dict(self.model.named_parameters())
            for key, value in state.items():
                if not key.startswith("optimizer."):
                    continue
                name, _, slot = key.removeprefix("optimizer.").rpartition(".")
                if name not in parameters:
                    raise ContlearnError(f"adapter state: {key!r} belongs to no parameter of this model")
                # A step counter stays on the CPU, moments go with their weight.
                place = parameters[name].device if value.dim() else value.device
                self.optimizer.state[parameters[name]][slot] = value.detach().to(place, copy=True)
        self.load_method_state(
            {key.removeprefix("method."): value for key, value in state.items() if key.startswith("method.")}
        )

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer on ``loss``."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # Gradients live in a step only.
        self.optimizer.zero_grad()
        self.last_loss = float(loss.detach())
        self.stepped += 1


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax in nats, ``(batch,)``."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)
