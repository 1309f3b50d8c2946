"""The step of a test-time adapter: predict a batch and adapt to it, as one function of its state and the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.strategies.step import (
    Input,
    NotExportable,
    Step,
    Tensors,
    buffers_of,
    moving_buffers,
    swapped,
    where_any,
)
from contlearn.strategies.updates import Update


@dataclass
class Adaptation:
    """What an adapter says of one batch.

    Attributes:
        logits: its answer (batch, classes).
        loss: () to descend; ``None`` where nothing is trained.
        gate: boolean (): whether the batch counts; ``None``: always. Where it does not, nothing moves.
        method: new values of the method's own state, by name.
    """

    logits: Tensor
    loss: Tensor | None = None
    gate: Tensor | None = None
    method: Tensors = field(default_factory=dict)


def adapter_step(adapter: Any, *, batch_size: int, input_shape: Sequence[int]) -> Step:
    """The step of ``adapter`` as it stands.

    Args:
        adapter: started.
        batch_size: images per batch.
        input_shape: (channels, height, width).

    Raises:
        NotExportable: the adapter declares no step, or takes several per batch.
        ContlearnError: it was not started.
    """
    if adapter.not_exportable:
        raise NotExportable(f"{adapter.spec['name']}: {adapter.not_exportable}")
    if adapter.steps != 1:
        raise NotExportable(f"steps: a device takes one step per batch; expected 1, got {adapter.steps}")
    if not adapter.started:
        raise ContlearnError(f"adapter {adapter.spec['name']!r}: expected start() before its step is declared")
    model: nn.Module = adapter.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    update = Update(adapter.optimizer, trained) if adapter.optimizer is not None and trained else None
    own = {f"method.{name}": held.detach().clone() for name, held in adapter.step_tensors().items()}
    shape = (batch_size, *input_shape)
    inputs = {"x": Input(shape, torch.float32, "frames")}
    if update is not None:
        inputs["lr"] = Input((1,), torch.float32, "learning_rate")

    def run(weights: Tensors, buffers: Tensors, method: Tensors, x: Tensor) -> Adaptation:
        held = {f"model.{name}": t for name, t in {**weights, **buffers}.items()}
        bare = {name.removeprefix("method."): t for name, t in method.items()}
        with torch.enable_grad():
            return swapped(  # type: ignore[no-any-return]
                {"model": model}, held, lambda: adapter.step_adaptation(x, bare)
            )

    example = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    start = {name: p.detach().requires_grad_() for name, p in trained.items()}
    # Buffers of layers that are told not to track are written by nobody.
    moving = moving_buffers(model, lambda copies: run(start, copies, own, example))
    adapted = dict(adapter.adapted())
    moving = [name for name in moving if name in adapted]
    with torch.no_grad():
        classes = int(run(start, {n: b.clone() for n, b in buffers_of(model).items()}, own, example).logits.shape[1])
    kept = update.state if update is not None else {}
    state = {
        **{name: p.detach().clone() for name, p in trained.items()},
        **{name: adapted[name].detach().clone() for name in moving},
        **kept, **own,
    }  # fmt: skip
    roles = {
        **dict.fromkeys(trained, "weight"), **dict.fromkeys(moving, "statistic"),
        **dict.fromkeys(kept, "optimizer"), **dict.fromkeys(own, "method"),
    }  # fmt: skip

    def compute(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        weights = {name: state[name].detach().requires_grad_() for name in trained}
        buffers = {
            name: (state[name] if name in moving else held).clone() for name, held in buffers_of(model).items()
        }
        found = run(weights, buffers, {name: state[name] for name in own}, given["x"])
        new: Tensors = {name: buffers[name] for name in moving}
        loss = torch.zeros(1)
        if found.loss is not None and update is not None:
            gradients = torch.autograd.grad(found.loss, list(weights.values()), allow_unused=True)
            named = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
            with torch.no_grad():
                moved, slots = update.apply({n: state[n] for n in trained}, named, state, given["lr"])
            new.update({**moved, **slots})
            loss = found.loss.detach().reshape(1)
        new.update({f"method.{name}": value.detach() for name, value in found.method.items()})
        if found.gate is not None:
            new = where_any(found.gate, new, state)
        return {"loss": loss, "logits": found.logits.detach()}, new

    def predict(state: Tensors, given: Tensors) -> Tensor:
        held = {f"model.{name}": state[name] for name in trained}
        held.update({f"model.{name}": state[name] if name in moving else b for name, b in buffers_of(model).items()})
        held = {name: tensor.clone() for name, tensor in held.items()}
        logits: Tensor = swapped({"model": model}, held, lambda: adapter.step_prediction(given["x"]))
        return logits

    rates = {"lr": update.lr} if update is not None else {}
    return Step(
        method=adapter.spec["name"], model=model, inputs=inputs, state=state, roles=roles, compute=compute,
        predict=predict, classes=classes, rates=rates, open_classes=tuple(range(classes)),
        hyperparameters=dict(rates),
    )  # fmt: skip
