"""EcoTTA: memory-efficient continual test-time adaptation by small meta parts (arXiv 2303.01904).

Where the authors' sample and its community completion (Lily-Le/EcoTTA) differ, the line says which is taken and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.files import atomic_write_bytes
from contlearn.strategies.adapter import Adapter
from contlearn.strategies.adapter_step import Adaptation
from contlearn.strategies.ecotta_gradients import Gradients, loss_gradients, passing, regulariser_gradients
from contlearn.strategies.ecotta_network import EcoTTANetwork
from contlearn.strategies.ecotta_partitions import cut
from contlearn.strategies.ecotta_warmup import Batches, augment, rate_factors, warm_up
from contlearn.strategies.packed import quantise_frozen


class EcoTTA(Adapter):
    """Frozen network, trained meta parts: filtered entropy plus a self-distilled regulariser per partition.

    Per batch, with p the softmax of the logits, h its entropy and u_k, x_k the output of partition k without and with
    its meta part: L = mean of h over samples with h < margin * ln(classes), + lam * sum over k of mean |x_k - sg(u_k)|
    with the partition's input detached (section 3.2). One forward keeps the partitions' inputs; then each partition is
    run again, last to first, and its two gradients taken, so that the graph of one partition exists at a time. Where no
    sample passes the filter, nothing moves: no weight, momentum or statistic.

    Before deployment the meta parts are warmed up on labelled source data (:meth:`prepare_with`, or a stored file).

    Args:
        k: number of partitions K; the paper's counts of blocks for its networks, its rule for others.
        blocks_per_partition: residual blocks of each partition; overrides ``k``.
        lam: weight of the regulariser (0.5 in the paper, 0.25 and 2 in the two public codes).
        margin: samples with an entropy below ``margin * ln(classes)`` are used (0.4, as in EATA).
        update: ``single``: one step on the whole loss; ``two_step``: the community's order, a step on the regulariser
            and then, with a fresh forward, one on the entropy.
        frozen_batchnorm: statistics that frozen BatchNorms use: ``batch`` (as released) or ``source`` (the running
            ones; their inputs need not be kept).
        packed_relu: keep 1 bit per ReLU output for backward instead of the output.
        int8_frozen: hold the weights of frozen convolutions and linear layers as int8 with one scale per output
            channel; floats exist one layer at a time.
        recompute: run each partition again for its gradient; without, one forward keeps the graph of all.
        warmup: file of warmed-up meta parts (.safetensors): read if it is there, else written after the warm-up.
        warmup_epochs: passes over the source data (10 on CIFAR, 3 on ImageNet); 0 leaves meta parts that were never
            trained, with which the network predicts nothing useful.
        warmup_lr: learning rate of the warm-up (SGD, momentum 0.9).
        warmup_batch_size: its batch size (64 on CIFAR, 256 on ImageNet).
        warmup_schedule: ``multistep`` (CIFAR) or ``cosine`` (ImageNet).
        warmup_augment: colour jitter, blur and grey in the warm-up, which need images with values in 0..1; ``null``: if
            the first batch has such values (a stream that normalises has not).
        lr: learning rate of the adaptation.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: momentum of ``sgd``.
        kwargs: options every adapter has.

    Attributes:
        kept: samples of the last batch that passed the filter.
        needs_source_data: whether the warm-up is still to come.

    Raises:
        ContlearnError: a value out of range, a network that is no chain of convolutional blocks, or a number of
            partitions it cannot have.
    """

    checkpoint_exclude = (*Adapter.checkpoint_exclude, "cut")

    def __init__(
        self,
        *,
        model: nn.Module,
        k: int = 4,
        blocks_per_partition: Sequence[int] = (),
        lam: float = 0.5,
        margin: float = 0.4,
        update: Literal["single", "two_step"] = "single",
        frozen_batchnorm: Literal["batch", "source"] = "batch",
        packed_relu: bool = True,
        int8_frozen: bool = False,
        recompute: bool = True,
        warmup: str | None = None,
        warmup_epochs: int = 10,
        warmup_lr: float = 0.05,
        warmup_batch_size: int = 64,
        warmup_schedule: Literal["multistep", "cosine"] = "multistep",
        warmup_augment: bool | None = None,
        lr: float = 5e-3,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        momentum: float = 0.9,
        **kwargs: Any,
    ) -> None:
        for name, value, least in (
            ("lam", lam, 0.0), ("margin", margin, 0.0), ("warmup_epochs", warmup_epochs, 0),
            ("warmup_lr", warmup_lr, 0.0), ("warmup_batch_size", warmup_batch_size, 1),
        ):  # fmt: skip
            if not value >= least:
                raise ContlearnError(f"{name}: expected at least {least}, got {value}")
        for name, text, allowed in (
            ("update", update, ("single", "two_step")), ("frozen_batchnorm", frozen_batchnorm, ("batch", "source")),
            ("warmup_schedule", warmup_schedule, ("multistep", "cosine")),
        ):  # fmt: skip
            if text not in allowed:
                raise ContlearnError(f"{name}: expected {' or '.join(allowed)}, got {text!r}")
        if warmup is not None and Path(warmup).suffix != ".safetensors":
            raise ContlearnError(f"warmup: expected a .safetensors file, got {warmup!r}")
        super().__init__(model=model, lr=lr, optimizer=optimizer, momentum=momentum, **kwargs)
        self.cut = cut(self.model, k, blocks_per_partition)
        self.lam, self.margin, self.update = lam, margin, update
        self.frozen_batchnorm, self.packed_relu, self.int8_frozen = frozen_batchnorm, packed_relu, int8_frozen
        self.recompute = recompute
        self.warmup, self.warmup_epochs, self.warmup_batch_size = warmup, warmup_epochs, warmup_batch_size
        self.warmup_augment = self._augments = warmup_augment
        self.warmup_rates = [warmup_lr * factor for factor in rate_factors(warmup_epochs, warmup_schedule)]
        self.needs_source_data = warmup_epochs > 0 and not (warmup is not None and Path(warmup).is_file())
        self.kept = 0

    @property
    def meta_options(self) -> dict[str, Any]:
        """What decides the warmed-up meta parts beside the source weights and the data."""
        return {
            "blocks": list(self.cut.blocks),
            "frozen_batchnorm": self.frozen_batchnorm,
            "batch_size": self.warmup_batch_size,
            "rates": self.warmup_rates,
            "augment": self.warmup_augment,
        }

    @property
    def network(self) -> EcoTTANetwork:
        """The model with its meta parts; they are made when first asked for, around the weights of that moment."""
        if not isinstance(self.model, EcoTTANetwork):
            self.model = EcoTTANetwork(
                self.model,
                self.cut,
                generator=self.generator,
                batch_statistics=self.frozen_batchnorm == "batch",
                packed=self.packed_relu,
            )
        return self.model

    # ------------------------------------------------------------------ before deployment

    def prepare_with(
        self,
        batches: Batches | Iterable[tuple[Tensor, Tensor]],
        *,
        on_epoch: Callable[[int, dict[str, Tensor]], None] | None = None,
        resume: dict[str, Tensor] | None = None,
    ) -> None:
        """Warm the meta parts up: cross-entropy on clean, labelled source data; everything else stays frozen.

        The frozen BatchNorms use the statistics that :attr:`frozen_batchnorm` says, in the warm-up as later. As
        released, ``batch`` would also move their running statistics; nothing ever reads those in that mode, so they
        stay.

        Args:
            batches: a function that starts a pass over batches (images, labels) and is called once per epoch, or
                something that can be iterated over again; orders drawn from ``self.generator`` resume with the rest.
            on_epoch: called after each epoch with the number of epochs done and all that resuming needs.
            resume: what ``on_epoch`` was given.

        Raises:
            ContlearnError: fewer passes than epochs, images the augmentation cannot take, or a loss that is not finite.
        """
        if isinstance(batches, Iterator) and self.warmup_epochs > 1:
            raise ContlearnError(
                f"ecotta: the warm-up takes {self.warmup_epochs} passes; expected a function that starts a pass, got an"
                " iterator of one"
            )
        start: Batches = batches if callable(batches) else lambda: batches
        self._augments = self.warmup_augment
        network = self._ready()
        optimizer = torch.optim.SGD(network.meta.parameters(), lr=1.0, momentum=0.9)
        done = self._resumed(optimizer, resume) if resume else 0

        def after_epoch(epochs: int) -> None:
            if on_epoch is not None:
                on_epoch(epochs, self._progress(optimizer, epochs))

        warm_up(
            network,
            start,
            optimizer=optimizer,
            rates=self.warmup_rates,
            first_epoch=done,
            prepare=self._augmented,
            commit=network.commit,
            after_epoch=after_epoch,
        )
        self.needs_source_data = False
        if self.warmup is not None:
            atomic_write_bytes(self.warmup, save({k: v.cpu().contiguous() for k, v in self.meta_state().items()}))

    def _augmented(self, x: Tensor) -> Tensor:
        if self._augments is None:
            low, high = torch.aminmax(x)
            self._augments = bool(low >= 0) and bool(high <= 1)
        return augment(x, self.generator) if self._augments else x

    def _ready(self) -> EcoTTANetwork:
        """The network with nothing but its meta parts trainable and in training mode."""
        network = self.network
        network.eval()
        network.requires_grad_(False)
        network.meta.train()
        network.meta.requires_grad_(True)
        return network

    def _progress(self, optimizer: torch.optim.Optimizer, epochs: int) -> dict[str, Tensor]:
        momenta = (optimizer.state[parameter]["momentum_buffer"] for parameter in self.network.meta.parameters())
        return {
            **{name: tensor.clone() for name, tensor in self.meta_state().items()},
            **{f"momentum.{index}": tensor.clone() for index, tensor in enumerate(momenta)},
            "generator": self.generator.get_state(),
            "epochs": torch.tensor(epochs),
        }

    def _resumed(self, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> int:
        self.load_meta({name: tensor for name, tensor in state.items() if name.startswith("meta.")})
        self._ready()
        self.needs_source_data = True
        for index, parameter in enumerate(self.network.meta.parameters()):
            optimizer.state[parameter]["momentum_buffer"] = state[f"momentum.{index}"].to(parameter.device, copy=True)
        self.generator.set_state(state["generator"].cpu())
        return int(state["epochs"])

    def meta_state(self) -> dict[str, Tensor]:
        """All that the warm-up makes: weights and statistics of the meta parts, by name in the network."""
        return {f"meta.{name}": tensor for name, tensor in self.network.meta.state_dict().items()}

    def load_meta(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`meta_state` gave; the warm-up is then done.

        Raises:
            ContlearnError: tensors missing, too many, or of another shape (another network or other partitions).
        """
        try:
            self.network.meta.load_state_dict({name.removeprefix("meta."): value for name, value in state.items()})
        except RuntimeError as error:
            raise ContlearnError(f"ecotta: the stored meta parts do not fit: {error}") from None
        self.needs_source_data = False

    def start(self) -> EcoTTA:
        """Make the source model ready to adapt.

        Raises:
            ContlearnError: the meta parts were not warmed up, or their file cannot be read or does not fit.
        """
        if self.needs_source_data:
            raise ContlearnError(
                "ecotta: the meta parts were not warmed up; expected prepare_with(...), load_meta(...), or "
                "warmup_epochs=0"
            )
        if self.warmup is not None and not isinstance(self.model, EcoTTANetwork) and Path(self.warmup).is_file():
            try:
                self.load_meta(load_file(self.warmup))
            except (SafetensorError, OSError) as error:
                raise ContlearnError(f"warmup: {self.warmup!r} cannot be read ({error})") from None
        self._ready()
        super().start()
        return self

    def configure(self) -> None:
        """Meta parts train; the frozen layers give up their floats if asked to."""
        network = self._ready()
        if self.int8_frozen:
            quantise_frozen(network)

    # ------------------------------------------------------------------ at test time

    def adapt(self, x: Tensor) -> Tensor:
        """Predict, and take a step where samples pass the filter.

        The logits are those of the forward that the (entropy) step starts from, as in both public codes.
        """
        logits = None
        for _ in range(self.steps):
            logits = self._single(x) if self.update == "single" else self._two_steps(x)
        return self.predict(x) if logits is None else logits

    @property
    def not_exportable(self) -> str:  # type: ignore[override]
        """Why there is no step."""
        return "" if self.update == "single" else "update: two_step takes two steps per batch; expected single"

    def step_adaptation(self, x: Tensor, method: dict[str, Tensor]) -> Adaptation:
        """The whole loss over masks; the graph of one partition does not reach into another's regulariser."""
        network = self.network
        bound, terms = network.stem(x), []
        for k in range(len(network.meta)):
            if self.lam:
                leaf = bound.detach()
                u = network.frozen(k, leaf)
                terms.append((network.meta[k](u, leaf) - u.detach()).abs().mean())
            bound = network.partition(k, bound)
        logits = network.tail(bound)
        h, passes = passing(logits, self.margin)
        chosen = passes.to(h.dtype)
        count = chosen.sum()
        loss = (h * chosen).sum() / count.clamp(min=1.0)
        if terms:
            loss = loss + self.lam * torch.stack(terms).sum()
        network.commit()
        return Adaptation(logits, loss, count > 0)

    def predict(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of the network as it is now; nothing changes."""
        with torch.no_grad():
            logits: Tensor = self.network(x)
        return logits

    @torch.no_grad()
    def source_logits(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of the frozen network alone, with its own statistics."""
        network = self.network
        kept, network.batch_statistics = network.batch_statistics, False
        try:
            logits: Tensor = network.head(network.source_features(x))
        finally:
            network.batch_statistics = kept
        return logits

    def _single(self, x: Tensor) -> Tensor:
        """One step on the whole loss, which is what section 3.2 minimises."""
        found = loss_gradients(self.network, x, lam=self.lam, margin=self.margin, recompute=self.recompute)
        self._close(found)
        return found.logits

    def _two_steps(self, x: Tensor) -> Tensor:
        """The order of the community's code, which always takes the first step; here it needs a sample that passes."""
        assert self.optimizer is not None
        first = regulariser_gradients(self.network, x, lam=self.lam, margin=self.margin)
        self._close(first)
        if not first.kept:
            return first.logits
        second = loss_gradients(self.network, x, lam=0.0, margin=self.margin, recompute=self.recompute)
        self._close(second)
        self.last_loss = first.loss + (second.loss if second.kept else 0.0)
        return second.logits

    def _close(self, found: Gradients) -> None:
        """Step on the gradients that are there, or leave everything as it is."""
        assert self.optimizer is not None
        self.kept = found.kept
        if found.kept:
            self.optimizer.step()
            self.network.commit()
            self.stepped += 1
            self.last_loss = found.loss
        else:
            self.network.forget()
        self.optimizer.zero_grad()
