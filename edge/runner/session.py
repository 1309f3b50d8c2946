"""A session: an artifact that adapts and predicts, and keeps what it learned."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from contlearn.edge.runner.contract import SCHEMA, load_manifest, verify_files
from contlearn.edge.runner.errors import RunnerError, unknown
from contlearn.edge.runner.frames import all_finite
from contlearn.edge.runner.graph import Buffer, Graph
from contlearn.edge.runner.inputs import Inputs
from contlearn.edge.runner.learned import Learned
from contlearn.edge.runner.options import checked_options, open_options, open_providers
from contlearn.edge.runner.saved import StateFolder
from contlearn.edge.runner.shipped import identity_of, read_memory, read_shipped
from contlearn.edge.runner.tensors import read_tensors
from contlearn.edge.runner.weights import Weights


class Session:
    """An artifact that adapts and predicts.

    Weights, optimizer state and statistics exist twice: a step reads one set, writes the other, and the sets change
    places once the result passed the guards. A step that fails or is refused therefore leaves the state as it was.

    Args:
        path: the artifact's folder.
        providers: execution provider(s) by short name (``cpu``, ``cuda``, ``tensorrt``, ``coreml``, ``qnn``,
            ``xnnpack``) or ONNX Runtime's own, or pairs of name and options; default ``cpu``.
        threads: threads within an operator; default: ONNX Runtime's choice.
        state_dir: where :meth:`save` writes; default ``state`` in the artifact.
        seed: of the random numbers (replay, uniform inputs), until a saved state brings its own.
        memory_options: overrides the manifest's ``session_options``; see :data:`MEMORY_OPTIONS`.

    Attributes:
        manifest: the checked manifest.
        opened: what the state was read from.
        skipped: a line for each damaged state file that was passed over.
        lr: the learning rate; may be set.
        steps: steps run, refused ones included.
        trips: how often each guard tripped.

    Raises:
        RunnerError: an artifact that is incomplete, altered, foreign or too new; a state of another artifact; an
            execution provider that is not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Any = None,
        threads: int | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        seed: int = 0,
        *,
        memory_options: Mapping[str, Any] | None = None,
    ) -> None:
        import onnxruntime as ort  # late: reading and checking a manifest needs no runtime

        folder = Path(path)
        self.manifest = manifest = load_manifest(folder)
        if manifest["target"] != "onnxruntime":
            raise RunnerError(f"{folder}: target {manifest['target']!r} runs elsewhere; expected 'onnxruntime'")
        verify_files(folder, manifest)
        if type(seed) is not int or seed < 0:
            raise RunnerError(f"seed: expected a whole number from 0, got {seed!r}")
        options = {**manifest["session_options"], **checked_options(memory_options or {}, "memory_options")}
        chosen, settings = open_providers(ort, providers), open_options(ort, options, threads)

        def graph(role: str, inputs: Any, outputs: Any) -> Graph:
            paths = [folder / name for name in manifest["graphs"][role]]
            return Graph(ort, paths, settings, chosen, inputs, outputs, manifest["opset"])

        self._adapt = graph("adapt", manifest["inputs"], manifest["outputs"])
        self._predict = graph("predict", manifest["predict"]["inputs"], manifest["predict"]["outputs"])
        self.inputs = Inputs(ort, manifest)
        self.batch_size, self.classes = self.inputs.batch_size, self.inputs.classes
        results = [spec for spec in manifest["outputs"] if spec["meaning"] != "state"]
        self._results = {s["name"]: Buffer(ort, np.zeros(s["shape"], s["dtype"])) for s in results}
        self._names = {m: [s["name"] for s in results if s["meaning"] == m] for m in ("loss", "logits", "metric")}
        answer = manifest["predict"]["outputs"][0]
        self._answer = {answer["name"]: Buffer(ort, np.zeros(answer["shape"], answer["dtype"]))}
        weights = Weights(ort, read_shipped(folder, manifest), manifest, self._adapt.device)
        past = read_memory(folder, manifest)
        try:
            self.learned = Learned(weights, manifest, classes=self.classes, seed=seed, memory=past)
        except (ValueError, LookupError) as error:
            raise RunnerError(f"{folder}: {error}") from error
        self._identity = identity_of(manifest)
        self._folder = StateFolder(Path(state_dir) if state_dir is not None else folder / "state")
        self._generation: int | None = None
        self.skipped: list[str] = []
        self.opened = self._open_saved() or str(manifest["state"]["file"])

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.learned.lr

    @lr.setter
    def lr(self, value: float) -> None:
        self.learned.set_lr(value)

    @property
    def steps(self) -> int:
        """Steps run, refused ones included."""
        return self.learned.steps

    @property
    def trips(self) -> dict[str, int]:
        """How often each guard tripped."""
        return self.learned.trips

    def step(self, x: Any, y: Any = None, *, prepared: bool = False, remember: bool = True) -> dict[str, Any]:
        """Adapt to one batch.

        Args:
            x: frames ``(batch_size, ...)``: raw ones of the manifest's ``preprocessing.input`` dtype, or float32 ones
                that were prepared already.
            y: labels ``(batch_size,)``, whole numbers from 0; only for methods that learn from labels.
            prepared: ``x`` was prepared already, although its dtype is that of raw frames.
            remember: offer the batch to the replay memory; not where frames come more than once (see :meth:`remember`).

        Returns:
            ``loss``; ``logits`` ``(batch_size, classes)``: the step's own, or after a trip those of the state that is
            in place then; ``tripped``: ``None``, ``non_finite_loss``, ``non_finite_logits``, ``non_finite_state``,
            ``collapse`` or ``drift``; ``restored``: ``None``, ``previous`` (the state before this step), ``snapshot``
            or ``shipped``; ``step``: its number; ``metrics``: further outputs by name.

        Raises:
            RunnerError: wrong shape, dtype or number of rows, NaN or infinite values, missing or unknown labels, or
                ONNX Runtime failed. Nothing was changed then.
        """
        learned, inputs = self.learned, self.inputs
        x, raw = inputs.frames.check(x, self.batch_size, prepared=prepared)
        if inputs.replays_raw and not raw:
            raise RunnerError("frames: the replay memory keeps raw frames; expected those instead of prepared ones")
        labels = inputs.check_labels(y)
        opened = learned.opened.copy()
        if labels is not None:
            opened[labels] = True
        random = learned.rng.bit_generator.state
        try:
            inputs.fill(x, raw, labels, lr=learned.lr, opened=opened, old=learned.old)
            inputs.fill_random(labels, learned.replay, learned.rng)
            feeds = {**inputs.buffers, **learned.weights.feeds()}
            self._adapt.run(learned.weights.front, feeds, {**self._results, **learned.weights.targets()})
        except BaseException:
            learned.rng.bit_generator.state = random
            raise
        loss = float(self._results[self._names["loss"][0]].read().reshape(-1)[0])
        logits = np.array(self._results[self._names["logits"][0]].read())
        learned.steps += 1
        restored: str | None = None
        tripped = self._non_finite(loss, logits)
        if tripped:
            restored, logits = self._refuse()
        else:
            learned.weights.swap()
            learned.opened = opened
            tripped, restored, logits = self._look(logits, labels)
        if tripped:
            learned.trips[tripped] = learned.trips.get(tripped, 0) + 1
        elif learned.replay and remember:
            self._take(x if inputs.replays_raw else inputs.prepared, labels)
        return {
            "loss": loss,
            "logits": logits,
            "tripped": tripped,
            "restored": restored,
            "step": learned.steps,
            "metrics": {name: np.array(self._results[name].read()) for name in self._names["metric"]},
        }

    def remember(self, x: Any, y: Any = None, *, prepared: bool = False) -> None:
        """Offer frames to the replay memory without learning from them.

        For training in several epochs: ``step(..., remember=False)`` throughout, then each frame once at the end of the
        experience, so that no frame is kept twice and steps rehearse earlier experiences only.

        Args:
            x: any number of frames, as for :meth:`step`.
            y: their labels, for methods that learn from labels.
            prepared: as for :meth:`step`.

        Raises:
            RunnerError: as :meth:`step`, or a method without a replay memory. Nothing was changed then.
        """
        inputs = self.inputs
        if not self.learned.replay:
            raise RunnerError(f"remember: {inputs.method!r} keeps no replay memory")
        x, raw = inputs.frames.check(x, None, prepared=prepared)
        if inputs.replays_raw and not raw:
            raise RunnerError("frames: the replay memory keeps raw frames; expected those instead of prepared ones")
        labels = inputs.check_labels(y, len(x))
        if raw and not inputs.replays_raw:
            ready = np.empty((len(x), *inputs.frames.shape), inputs.frames.dtype)
            inputs.frames.prepare(x, raw, ready)
            x = ready
        self._take(x, labels)

    def _take(self, frames: np.ndarray, labels: np.ndarray | None) -> None:
        replay, rng = self.learned.replay, self.learned.rng
        assert replay
        for row in range(len(frames)):
            replay.take(frames[row], -1 if labels is None else int(labels[row]), rng)

    def finish_experience(self) -> None:
        """The stream moves on to something else: teachers and anchors follow the weights, as the manifest's ``copies``
        say, and the classes met so far are old from now on.

        Methods that look back to earlier experiences (distillation, penalties) need it; for others it changes nothing.
        :meth:`save` afterwards makes it last; a power cut in between leaves the experience unfinished, never half.
        """
        self.learned.finish_experience()

    def predict(self, x: Any, *, prepared: bool = False) -> np.ndarray:
        """Logits ``(rows, classes)`` for any number of frames, with the state as it is; nothing changes.

        The graph takes ``batch_size`` frames at a time; the last batch is filled up with frames of its own.

        Raises:
            RunnerError: wrong shape or dtype, NaN or infinite values, or ONNX Runtime failed.
        """
        x, raw = self.inputs.frames.check(x, None, prepared=prepared)
        answer = np.empty((len(x), self.classes), next(iter(self._answer.values())).array.dtype)
        self.inputs.fill_mask(self.learned.opened)
        for start in range(0, len(x), self.batch_size):
            rows = x[start : start + self.batch_size]
            count = len(rows)
            if count < self.batch_size:
                rows = rows[np.arange(self.batch_size) % count]
            self.inputs.fill_frames(rows, raw)
            answer[start : start + count] = self._ask()[:count]
        return answer

    def save(self) -> Path:
        """Write everything needed to go on bit for bit; return the file.

        Raises:
            RunnerError: it cannot be written. The states saved before are as they were.
        """
        metadata = {"format": "contlearn-state", "schema": str(SCHEMA), "artifact": self._identity}
        metadata["session"] = self.learned.record()
        self._generation = self._folder.write(self.learned.tensors(), metadata, keep=self._generation)
        return self._folder.path(self._generation)

    def rollback(self, to: str = "saved") -> str:
        """Go back, and return what to.

        Args:
            to: ``saved``: everything as in the last :meth:`save` that can be read, or as shipped if there is none;
                ``snapshot``: weights, optimizer state and statistics as the guards last found them good.

        Raises:
            RunnerError: there is no snapshot.
        """
        if to == "saved":
            saved = self._open_saved()
            if saved is None:
                self.reset()
            return saved or "shipped"
        if to != "snapshot":
            raise unknown("state to go back to", to, ("saved", "snapshot"))
        weights = self.learned.weights
        if not weights.snapshot:
            raise RunnerError("rollback: the guards have no snapshot yet; expected to='saved', or reset()")
        weights.snapshot_used = False
        return self._put_back()

    def reset(self) -> None:
        """Everything as shipped, random numbers from the seed; what was saved stays until the next :meth:`save`."""
        self.learned.reset()

    def state(self) -> dict[str, np.ndarray]:
        """Copies of weights, optimizer state, statistics and method state by name."""
        return self.learned.weights.copies()

    def account(self) -> dict[str, int]:
        """Bytes that the session itself holds; what ONNX Runtime takes within a step comes on top."""
        buffers = {id(b): b for b in [*self.inputs.buffers.values(), *self._results.values(), *self._answer.values()]}
        return {
            **self.learned.weights.account(),
            "replay": self.learned.replay.nbytes if self.learned.replay else 0,
            "inputs_outputs": sum(buffer.array.nbytes for buffer in buffers.values()),
        }

    def _ask(self) -> np.ndarray:
        """Logits of the predict graph for the frames in its buffer."""
        weights = self.learned.weights
        self._predict.run(weights.front, {**self.inputs.buffers, **weights.feeds()}, self._answer)
        return np.array(next(iter(self._answer.values())).read())

    def _ask_shipped(self) -> np.ndarray:
        """The same from the shipped state."""
        arrays = {name: buffer.array for name, buffer in self.inputs.buffers.items()}
        return self._predict.run_copied({**arrays, **self.learned.weights.shipped})[next(iter(self._answer))]

    def _non_finite(self, loss: float, logits: np.ndarray) -> str | None:
        if not self.learned.guards.rules["non_finite"]:
            return None
        if not math.isfinite(loss):
            return "non_finite_loss"
        if not all_finite(logits):
            return "non_finite_logits"
        return None if self.learned.weights.new_is_finite() else "non_finite_state"

    def _refuse(self) -> tuple[str, np.ndarray]:
        """The step's result is not taken; what is in place instead, and its logits."""
        self.inputs.fill_mask(self.learned.opened)
        logits = self._ask()
        # Where even the shipped state has no finite answer, the frames are at fault and not the weights.
        if all_finite(logits) or not all_finite(self._ask_shipped()):
            return "previous", logits
        return self._put_back(), self._ask()

    def _look(self, logits: np.ndarray, labels: np.ndarray | None) -> tuple[str | None, str | None, np.ndarray]:
        """Collapse and drift: what tripped, what was put back, and the logits to answer with."""
        weights, guards = self.learned.weights, self.learned.guards
        limit = guards.rules["max_drift"]
        drift = weights.drift() if limit else 0.0

        def truth() -> np.ndarray:
            return labels if labels is not None else self._ask_shipped().argmax(1)

        label = -1 if drift > limit else guards.collapsed(logits.argmax(1), truth)
        if label < 0 and drift <= limit:
            due = guards.copies and self.learned.steps % guards.rules["snapshot_every"] == 0
            if due and guards.trusts() and drift <= limit / 2:
                weights.take_snapshot()
            return None, None, logits
        restored = self._put_back()
        logits = self._ask()
        # A suspicion takes most of a window to arise: the snapshot may have collapsed as well.
        if label >= 0 and restored == "snapshot" and guards.is_collapse(label, logits.argmax(1), truth()):
            restored = self._put_back()
            logits = self._ask()
        return "drift" if label < 0 else "collapse", restored, logits

    def _put_back(self) -> str:
        self.learned.guards.forget()
        return self.learned.weights.put_back()

    def _open_saved(self) -> str | None:
        """Take over the newest generation that can be read, and return its name."""
        self.skipped = []
        for number, path in self._folder.generations().items():
            try:
                tensors, metadata = read_tensors(path, sealed=True)
            except RunnerError as error:
                self.skipped.append(str(error))
                continue
            if metadata.get("format") != "contlearn-state" or metadata.get("schema") != str(SCHEMA):
                raise RunnerError(f"{str(path)!r}: expected a state of schema {SCHEMA}, got {metadata.get('schema')!r}")
            if metadata.get("artifact") != self._identity:
                raise RunnerError(
                    f"{str(path)!r} is what another artifact learned; remove it, or give this one its own state_dir"
                )
            try:
                self.learned.take_over(tensors, metadata["session"])
            except (ValueError, LookupError, TypeError, OverflowError, AttributeError, RecursionError) as error:
                raise RunnerError(f"{str(path)!r} does not fit this artifact: {error}") from error
            self._generation = number
            return path.name
        return None
