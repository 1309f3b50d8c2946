"""The memory account of a run: one report per experience, in bytes, for any Avalanche strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from avalanche.core import SupervisedPlugin
from torch import Tensor

from contlearn.memory.holdings import Holdings, model_tensors, optimizer_tensors
from contlearn.memory.saved import LiveStorages, SavedForBackward, unique_bytes


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by component.

    Attributes:
        weights: parameters and buffers at stored precision.
        trainable_weights: of these, parameters that training changes.
        gradients: gradients after the backward pass.
        optimizer: momenta, moments and their like.
        activations: storages saved for the backward pass at the worst moment of a step, each storage once; parameters
            and buffers excluded.
        replay: exemplars at the precision held (uint8 pixels, int64 labels and indices, logits).
        method_state: everything else the method holds, by name (Fisher, anchors, teachers, prototypes, masks).
        exemplars: number of distinct samples held for rehearsal.
        persistent: what must survive a power cut: weights, optimizer state that outlives an experience, method state
            and replay, between two experiences.
        peak_static: weights, optimizer, method state and replay, plus every other storage live at the worst moment of a
            training step (activations, gradients, the batch, temporaries), followed from allocation to release.
        peak_measured: growth of the process's resident high-water mark (CPU) or the allocator's peak (CUDA), from a
            process of its own; ``None`` where it was not measured.
    """

    weights: int
    trainable_weights: int
    gradients: int
    optimizer: int
    activations: int
    replay: int
    method_state: dict[str, int] = field(default_factory=dict)
    exemplars: int = 0
    persistent: int = 0
    peak_static: int = 0
    peak_measured: int | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over static peak."""
        return None if self.peak_measured is None or not self.peak_static else self.peak_measured / self.peak_static

    def as_record(self) -> dict[str, int]:
        """Flat fields of a ``memory`` event: ``method_state`` is the total, ``method_state.NAME`` each part."""
        record = {key: value for key, value in asdict(self).items() if isinstance(value, int)}
        record["method_state"] = sum(self.method_state.values())
        record.update({f"method_state.{name}": size for name, size in self.method_state.items()})
        return record


class StepWatch:
    """One step under watch, in bytes, from here to :meth:`close`: what autograd saves and every storage alive.

    Args:
        strategy: any strategy, or an adapter.
        batch: tensors of this step or the last one that exist already.

    Attributes:
        gradients: most that were alive at a :meth:`note_gradients`; ``None`` before any.
    """

    def __init__(self, strategy: Any, batch: Iterable[Tensor] = ()) -> None:
        self._strategy = strategy
        self.gradients: int | None = None
        holdings = Holdings(strategy)
        held = [*model_tensors(strategy.model), *optimizer_tensors(strategy.optimizer), *holdings.tensors()]
        gradients = [p.grad for p in strategy.model.parameters() if p.grad is not None]
        # What stands for an array is alive only here; of everything else, only its owner may decide.
        self._arrays = [tensor for tensor in held if tensor.is_meta]
        self._saved = SavedForBackward(held)
        self._live = LiveStorages(tracked=[*held, *gradients, *batch])
        self._replay = holdings.replay_bytes()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._saved.watching())
        self._stack.enter_context(self._live)

    @property
    def working(self) -> int:
        """Peak of everything but the exemplars."""
        return self._live.peak

    def note_gradients(self) -> None:
        """Gradients are there now."""
        self.gradients = max(self.gradients or 0, gradient_bytes(self._strategy))

    def figures(self) -> dict[str, int]:
        """Stop watching; ``gradients``, ``activations``, ``peak_static`` and ``method_state.NAME`` of the step."""
        found = {
            "gradients": gradient_bytes(self._strategy) if self.gradients is None else self.gradients,
            "activations": self._saved.peak,
            "peak_static": self._replay + self._live.peak,
        }
        self.close()
        found.update({f"method_state.{name}": size for name, size in Holdings(self._strategy).state_bytes().items()})
        return found

    def close(self) -> None:
        """Watch no more."""
        self._stack.close()
        self._arrays = []


class MemoryAccount(SupervisedPlugin):
    """A plug-in that measures the first two training steps of every experience, and what is left after it.

    Put it first in ``strategy.plugins``: a method may already run the network in front of the step. Two steps, of which
    the larger figures count: the first finds no gradients yet, the second may be the last and have a smaller batch.

    Args:
        record: called with each report after training on an experience.

    Attributes:
        reports: one per experience.
        working: peak of the measured steps of this experience without the exemplars.
    """

    memory_exempt = True
    checkpoint_exclude = ("_record", "_watch")

    def __init__(self, record: Callable[[MemoryReport], None] | None = None) -> None:
        super().__init__()
        self._record = record
        self.reports: list[MemoryReport] = []
        self.working = 0
        self._sampled: dict[str, int] = {}
        self._step = 0
        self._asleep = False
        self._watch: StepWatch | None = None

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Look at steps of this experience."""
        experience = strategy.experience.logging()
        # The pieces of an online stream are too many to look at each: the first (of full size) and the last (which may
        # be smaller, but has seen all classes) stand for the experience they were cut from.
        first = getattr(experience, "is_first_subexp", True)
        if first:
            self._sampled, self.working = {}, 0
        self._step = 0
        self._asleep = not (first or getattr(experience, "is_last_subexp", True))
        self._release_after(strategy)

    def _release_after(self, strategy: Any) -> None:
        """Let nothing be watched any more when training on this experience ends, by an exception inside a step too."""
        train = strategy._train_exp

        def train_and_release(*args: Any, **kwargs: Any) -> Any:
            vars(strategy).pop("_train_exp", None)
            try:
                return train(*args, **kwargs)
            finally:
                self._release()

        strategy._train_exp = train_and_release

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Start to watch."""
        self._step += 1
        if self._asleep or self._step > 2:
            return
        last = [*(strategy.mbatch or []), strategy.mb_output, strategy.loss]
        self._watch = StepWatch(strategy, [tensor for tensor in last if isinstance(tensor, Tensor)])

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Gradients are all there now."""
        if self._watch is not None:
            self._watch.note_gradients()

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Stop watching and note the figures."""
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        self.working = max(self.working, watch.working)
        _keep_largest(self._sampled, watch.figures())

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = None

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing: other plug-ins update their memories in this hook; :meth:`close_experience` comes after them all."""

    def close_experience(self, strategy: Any) -> MemoryReport:
        """The report of the experience that was just trained on."""
        self._release()
        report = snapshot(strategy, self._sampled)
        self.reports.append(report)
        if self._record is not None:
            self._record(report)
        return report


class AdapterAccount:
    """Measures the first two batches that a test-time adapter learns from, as :class:`MemoryAccount` does steps.

    A batch that a filter passes over has no step: it is looked at, but does not count as one of the two.

    Attributes:
        sampled: largest figures so far, as :func:`snapshot` takes them.
        working: peak of the measured batches.
        measured: batches that count; batches looked at.
    """

    COUNT = 2
    PATIENCE = 20  # batches to look at, whatever they hold

    def __init__(self) -> None:
        self.sampled: dict[str, int] = {}
        self.working = 0
        self.measured = (0, 0)

    @property
    def wanted(self) -> bool:
        """Whether the next batch shall be measured."""
        counted, looked = self.measured
        return counted < self.COUNT and looked < self.PATIENCE

    @contextlib.contextmanager
    def watching(self, adapter: Any, x: Tensor) -> Iterator[None]:
        """Measure the batch ``x`` that the adapter is given inside the block."""
        watch = StepWatch(adapter, [x])
        # An adapter drops its gradients inside the call; at a step, they are all there.
        optimizer = adapter.optimizer
        hooks = [optimizer.register_step_pre_hook(lambda *_: watch.note_gradients())] if optimizer is not None else []
        try:
            yield
            counted, looked = self.measured
            self.measured = (counted + (watch.gradients is not None or optimizer is None), looked + 1)
            self.working = max(self.working, watch.working)
            _keep_largest(self.sampled, watch.figures())
        finally:
            watch.close()
            for hook in hooks:
                hook.remove()

    def counters(self) -> dict[str, float]:
        """What was measured so far, for a checkpoint."""
        figures = {f"memory.{name}": float(size) for name, size in self.sampled.items()}
        return {**figures, "measured": self.measured[0], "looked": self.measured[1], "working": self.working}

    def restore(self, counters: Mapping[str, float]) -> None:
        """Go on from what :meth:`counters` gave."""
        self.measured = int(counters.get("measured", 0)), int(counters.get("looked", 0))
        self.working = int(counters.get("working", 0))
        self.sampled = {k.removeprefix("memory."): int(v) for k, v in counters.items() if k.startswith("memory.")}


def _keep_largest(figures: dict[str, int], found: Mapping[str, int]) -> None:
    for name, size in found.items():
        figures[name] = max(size, figures.get(name, 0))


class StopAfter(SupervisedPlugin):
    """Ends training after so many steps."""

    memory_exempt = True

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count the step."""
        if strategy.clock.train_iterations + 1 >= self.steps:
            strategy.stop_training()


def snapshot(strategy: Any, step: dict[str, int] | None = None) -> MemoryReport:
    """What a strategy holds now, with the figures of a measured step.

    Args:
        strategy: any Avalanche strategy.
        step: ``gradients``, ``activations``, ``peak_static`` and ``method_state.NAME`` of a step.
    """
    step = step or {}
    holdings = Holdings(strategy)
    parameters = list(strategy.model.parameters())
    weights = unique_bytes(model_tensors(strategy.model))
    optimizer = unique_bytes(optimizer_tensors(strategy.optimizer))
    state, replay = holdings.state_bytes(), holdings.replay_bytes()
    lasting = sum(Holdings(strategy, lasting=True).state_bytes().values())
    kept = 0 if getattr(strategy, "reset_optimizer", False) else optimizer
    during = {key.removeprefix("method_state."): size for key, size in step.items() if key.startswith("method_state.")}
    resident = weights + optimizer + sum(state.values()) + replay
    return MemoryReport(
        weights=weights,
        trainable_weights=unique_bytes(p for p in parameters if p.requires_grad),
        gradients=step.get("gradients", 0),
        optimizer=optimizer,
        activations=step.get("activations", 0),
        replay=replay,
        method_state={name: max(state.get(name, 0), during.get(name, 0)) for name in sorted({*state, *during})},
        exemplars=holdings.exemplar_count(),
        persistent=weights + kept + lasting + replay,
        peak_static=max(step.get("peak_static", 0), resident),
    )


def gradient_bytes(strategy: Any) -> int:
    """Bytes of the gradients that exist now."""
    return unique_bytes(p.grad for p in strategy.model.parameters() if p.grad is not None)
