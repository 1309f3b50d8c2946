"""The step of a supervised strategy, made of its own forward pass, loss and plug-ins.

The strategy's hooks up to ``before_backward`` run as in training, on tensors that stand in for its weights; the update
is the optimizer's as a function. A plug-in that acts later, or keeps what moves, says how (:class:`PlainStep`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from avalanche.models import MultiTaskModule
from torch import Tensor, nn

from contlearn.errors import ContlearnError
from contlearn.models._growing_head import UNSEEN, GrowingHead
from contlearn.strategies.drawn import NAME as UNIFORM
from contlearn.strategies.drawn import Drawn
from contlearn.strategies.step import Input, Memory, NotExportable, Step, Tensors, buffers_of, moving_buffers, swapped
from contlearn.strategies.step_part import Masks, PlainStep
from contlearn.strategies.updates import Update

_LATE = (
    "before_training_iteration", "after_backward", "before_update", "after_update", "after_training_iteration",
)  # fmt: skip


def supervised_step(
    strategy: Any,
    *,
    batch_size: int,
    input_shape: Sequence[int],
    classes: int | None = None,
    open_classes: Sequence[int] | None = None,
) -> Step:
    """The step of ``strategy`` as it stands: its weights, optimizer, teachers and anchors are the starting state.

    Args:
        strategy: a strategy of contlearn.
        batch_size: samples of the current experience per step; exemplars join them as the strategy says.
        input_shape: (channels, height, width).
        classes: outputs to make room for, so that the device can learn classes not seen yet; default: those there are.
        open_classes: labels met so far; default: those the head has outputs for before room is made.

    Raises:
        NotExportable: a plug-in, model or option with no exportable step.
    """
    model: nn.Module = strategy.model
    if isinstance(model, MultiTaskModule):
        raise NotExportable("model: a head per task needs task labels on the device; expected a single head")
    parts = [plugin for plugin in strategy.plugins if _concerned(plugin)]
    for plugin in (strategy, *strategy.plugins):
        reason = getattr(plugin, "not_exportable", "")
        if reason or (plugin in parts and not isinstance(plugin, PlainStep)):
            raise NotExportable(f"{type(plugin).__name__}: {reason or 'a plug-in that declares no step'}")
    before = getattr(getattr(model, "head", None), "out_features", 0)
    _make_room(strategy, classes)
    outputs = _outputs(model)
    known = sorted(range(before or outputs) if open_classes is None else open_classes)
    model.train()
    for part in parts:
        getattr(part, "before_training", _nothing)(strategy)
        part.step_ready(strategy)

    memories = [one.step_memory() for one in (strategy, *parts) if hasattr(one, "step_memory")]
    memory: Memory | None = memories[0] if memories else None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    update = Update(strategy.optimizer, trained)
    own = {f"method.{k}.{name}": t for k, part in enumerate(parts) for name, t in part.step_tensors(strategy).items()}
    beside = {
        f"method.{k}.{name}": module
        for k, part in enumerate(parts)
        for name, module in part.step_modules(strategy).items()
    }
    for prefix, module in beside.items():
        own.update({f"{prefix}.{name}": t for name, t in module.state_dict().items() if t.is_floating_point()})
    inputs = _inputs(batch_size, tuple(input_shape), outputs, memory)
    draws: list[tuple[int, ...]] = []

    def run(weights: Tensors, statistics: Tensors, state: Tensors, given: Tensors) -> tuple[Tensor, Tensor]:
        modules: dict[str, nn.Module] = {"model": model}
        held = {f"model.{name}": t for name, t in {**weights, **statistics}.items()}
        for index, (prefix, module) in enumerate(beside.items()):
            modules[f"beside{index}"] = module
            start = f"{prefix}."
            held.update({f"beside{index}.{n.removeprefix(start)}": t for n, t in state.items() if n.startswith(start)})
        masks = Masks(given["class_mask"], given["old_class_mask"])
        with Drawn({name: given[name] for name in inputs if name.startswith(UNIFORM)}) as drawn:
            found = swapped(modules, held, lambda: _forward(strategy, parts, state, masks, given))
        draws[:] = drawn.shapes
        return found  # type: ignore[no-any-return]

    examples = Step(
        "", model, inputs, {}, {}, None, None, outputs, open_classes=tuple(known)  # type: ignore[arg-type]
    ).examples()
    examples["lr"] = torch.tensor([update.lr])
    leaves = _leaves({name: p.detach() for name, p in trained.items()})
    moving = moving_buffers(model, lambda copies: run(leaves, copies, own, examples))
    inputs.update({f"{UNIFORM}{k}": Input(shape, torch.float32, "uniform") for k, shape in enumerate(draws)})
    moving += [name for part in parts for name in part.step_buffers(strategy) if name not in moving]
    state = {
        **{name: p.detach().clone() for name, p in trained.items()},
        **{name: held.detach().clone() for name, held in buffers_of(model).items() if name in moving},
        **update.state,
        **{name: tensor.detach().clone() for name, tensor in own.items()},
    }
    roles = {
        **dict.fromkeys(trained, "weight"), **dict.fromkeys(moving, "statistic"),
        **dict.fromkeys(update.state, "optimizer"), **dict.fromkeys(own, "method"),
    }  # fmt: skip

    def compute(state: Tensors, given: Tensors) -> tuple[Tensors, Tensors]:
        weights = _leaves({name: state[name] for name in trained})
        statistics = {
            name: (state[name] if name in moving else held).clone() for name, held in buffers_of(model).items()
        }
        loss, logits = run(weights, statistics, state, given)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(weights, found, strict=True) if g is not None}
        with torch.no_grad():
            gradients = _clipped(gradients, strategy.clip_grad_norm)
            now = {name: state[name] for name in trained}
            lr = given["lr"]
            for k, part in enumerate(parts):
                lr = part.step_rate(lr, _own(state, k))
            new, kept = update.apply(now, gradients, state, lr)
            statistics = {name: statistics[name].detach() for name in moving}
            for k, part in enumerate(parts):
                moved = part.step_after(new, statistics, _own(state, k), lr)
                kept.update({f"method.{k}.{name}": tensor for name, tensor in moved.items()})
        return {"loss": loss.detach().reshape(1), "logits": logits.detach()[:batch_size]}, {**new, **statistics, **kept}

    def predict(state: Tensors, given: Tensors) -> Tensor:
        held = {f"model.{name}": state[name] for name in (*trained, *moving)}
        with _evaluating(model):
            logits: Tensor = swapped({"model": model}, held, lambda: model(given["x"]))
        return _masked(logits, given["class_mask"])

    return Step(
        method=strategy.spec["name"], model=model, inputs=inputs, state=state, roles=roles, compute=compute,
        predict=predict, classes=outputs, rates={"lr": update.lr}, open_classes=tuple(known), memory=memory,
        copies={
            f"method.{k}.{name}": source for k, part in enumerate(parts)
            for name, source in part.step_copies(strategy).items()
        },
        hyperparameters={"lr": update.lr},
    )  # fmt: skip


def _own(state: Tensors, k: int) -> Tensors:
    start = f"method.{k}."
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def _concerned(plugin: Any) -> bool:
    """Whether a plug-in takes part in a training iteration."""
    from avalanche.core import BasePlugin, BaseSGDPlugin, SupervisedPlugin
    from avalanche.training.plugins.clock import Clock
    from avalanche.training.templates.base_sgd import PeriodicEval

    if isinstance(plugin, PeriodicEval | Clock):
        return False
    hooks = ("before_forward", "after_forward", "before_backward", *_LATE)
    bases = (BasePlugin, BaseSGDPlugin, SupervisedPlugin)
    return isinstance(plugin, PlainStep) or any(
        getattr(type(plugin), hook, None) not in [None, *(getattr(base, hook, None) for base in bases)]
        for hook in hooks
    )


def _make_room(strategy: Any, classes: int | None) -> None:
    head = getattr(strategy.model, "head", None)
    if classes is None or not isinstance(head, GrowingHead):
        if classes is not None and isinstance(head, nn.Linear) and head.out_features != classes:
            raise ContlearnError(f"classes: the model's head has {head.out_features} outputs, got {classes}")
        return
    if head.out_features > classes:
        raise ContlearnError(f"classes: expected at least {head.out_features}, which the head has, got {classes}")
    from avalanche.models.dynamic_optimizers import update_optimizer

    before = dict(strategy.model.named_parameters())
    head.grow(classes)
    now = dict(strategy.model.named_parameters())
    update_optimizer(strategy.optimizer, now, before, reset_state=False)
    strategy.optimized_param_id = now  # or the next experience adds the head's new rows once more


def _outputs(model: nn.Module) -> int:
    head = getattr(model, "head", None)
    rows = getattr(head, "out_features", 0)
    if not rows:
        raise NotExportable("model: its head has no outputs yet; train it first, or give the number of classes")
    return int(rows)


def _inputs(batch: int, shape: tuple[int, ...], outputs: int, memory: Memory | None) -> dict[str, Input]:
    found = {"x": Input((batch, *shape), torch.float32, "frames"), "y": Input((batch,), torch.int64, "labels")}
    if memory is not None:
        found["x_memory"] = Input((memory.batch, *shape), torch.float32, "memory_frames")
        found["y_memory"] = Input((memory.batch,), torch.int64, "memory_labels")
    found["lr"] = Input((1,), torch.float32, "learning_rate")
    found["class_mask"] = Input((outputs,), torch.float32, "class_mask")
    found["old_class_mask"] = Input((outputs,), torch.float32, "old_class_mask")
    return found


def _leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask > 0, logits, UNSEEN)


def _clipped(gradients: Tensors, limit: float) -> Tensors:
    if not limit:
        return gradients
    norm = torch.sqrt(sum((g * g).sum() for g in gradients.values()))  # type: ignore[arg-type]
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
    return {name: g * factor for name, g in gradients.items()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _forward(strategy: Any, parts: list[Any], state: Tensors, masks: Masks, given: Tensors) -> tuple[Tensor, Tensor]:
    """Loss and logits of one batch by the strategy's own hooks."""
    head = getattr(strategy.model, "head", strategy.model)
    kept = {name: vars(strategy).get(name) for name in ("mbatch", "mb_output", "loss", "is_training")}
    x, y = given["x"], given["y"]
    with contextlib.ExitStack() as stack:
        handle = head.register_forward_hook(lambda module, arguments, logits: _masked(logits, masks.seen))
        stack.callback(handle.remove)
        stack.callback(lambda: vars(strategy).update(kept))
        for k, part in enumerate(parts):
            stack.enter_context(part.step_bound(strategy, _own(state, k), masks))
        stack.enter_context(strategy.step_bound(masks, given))
        strategy.is_training = True
        with torch.enable_grad():
            strategy.mbatch = strategy.step_batch(x, y, given)
            strategy.loss = torch.zeros(())
            for plugin in parts:
                getattr(plugin, "before_forward", _nothing)(strategy)
            strategy.mb_output = strategy.forward()
            for plugin in parts:
                getattr(plugin, "after_forward", _nothing)(strategy)
            strategy.loss = strategy.loss + strategy.criterion()
            for plugin in parts:
                getattr(plugin, "before_backward", _nothing)(strategy)
            loss, logits = strategy.loss, strategy.mb_output
        for plugin in parts:
            plugin.step_forget()
    return loss, logits


def _nothing(*_: Any) -> None:
    return None
