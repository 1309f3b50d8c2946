"""The model that a test-time adapter starts from: weights of the user's, or trained once on the stream's clean data.

What was trained is kept in the cache (:mod:`contlearn.weight_cache`), by data, initial weights, options and versions.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from contlearn import weight_cache
from contlearn.checkpoint import CheckpointFolder
from contlearn.domain_progress import DomainProgress
from contlearn.errors import ContlearnError, Interrupted
from contlearn.files import atomic_write_bytes
from contlearn.models._weights import Tensors, _backbone_names, _check_fit, _timm_names, read_tensors
from contlearn.state import Samples, seed_everything
from contlearn.strategies.loader import BatchLoader, BatchSource

WEIGHTS = "model.safetensors"
WARMUP = "warmup.safetensors"
RANDOM = "random_state"
# What published networks call the layer that our head stands for.
_HEADS = ("head", "fc", "linear", "classifier", "logits")


class SourceTraining:
    """Gives an adapter the model it starts from.

    Args:
        adapter: its ``source`` and ``source_training`` say where the weights come from.
        stream: its first training experience is the source data.
        seed: seeds the training.
        progress: what to tell.
        checkpoint: folder for the position inside a training that is stopped; ``None`` stores none.
        stopped: whether the run shall stop as soon as it can.
    """

    def __init__(
        self,
        adapter: Any,
        stream: Any,
        *,
        seed: int,
        progress: DomainProgress,
        checkpoint: Path | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.adapter = adapter
        self.stream = stream
        self.seed = seed
        self.progress = progress
        self.checkpoint = checkpoint
        self.stopped = stopped
        self.training: Any = None
        self._watcher = _Watcher(progress)

    def interrupt(self) -> None:
        """Stop after the current iteration, where one is running."""
        if self.training is not None:
            self.training.interrupt = True

    # ------------------------------------------------------------------ weights

    def provide(self) -> str:
        """Put the source weights into ``adapter.model``; gives where they came from: ``file``, ``cache``, ``training``.

        Raises:
            ContlearnError: weights that are missing, damaged or do not fit, a stream whose first training experience
                lacks classes, or a cache that cannot be written.
            Interrupted: the run shall stop.
        """
        if self.adapter.source is not None:
            load_classifier(self.adapter.model, self.adapter.source)
            return "file"
        if self.adapter.source_training["epochs"] == 0:
            return "training"  # the initial weights
        data = self.source_data()
        key = self._key(data)
        if key is None:
            self._train()
            return "training"
        model = self.adapter.model
        if self._from_cache(key):
            return "cache"
        name = getattr(model, "spec", {}).get("name", type(model).__name__)
        waiting = f"another process is training the source model {name!r}; waiting for it"
        with weight_cache.locked(key, lambda: self.progress.message(waiting), lambda: not self.stopped()):
            if self.stopped():
                raise Interrupted
            if self._from_cache(key):
                return "cache"
            self._train()
            weight_cache.store(key, model.state_dict())
        return "training"

    def source_data(self) -> Any:
        """The clean training data, with the transforms of training.

        Raises:
            ContlearnError: there is none, or it lacks classes that the stream tests.
        """
        name = self.adapter.spec["name"]
        train = list(self.stream.streams["train"])
        if not train:
            raise ContlearnError(
                f"strategy {name!r}: the stream has no clean training data to train the source model on; expected "
                "strategy.source, a run folder or a file of weights"
            )
        known = {int(label) for label in train[0].classes_in_this_experience}
        tested = {int(c) for e in self.stream.streams["test"] for c in e.classes_in_this_experience}
        if not tested <= known:
            missing = ", ".join(map(str, sorted(tested - known)[:5]))
            raise ContlearnError(
                f"strategy {name!r} adapts at test time and trains its source model on the first training experience, "
                f"which in {getattr(self.stream, 'kind', 'this stream')!r} lacks classes that are tested ({missing}); "
                "expected a stream whose classes are all there from the start, such as corruptions or "
                "domain_incremental, or strategy.source"
            )
        return train[0].dataset.train()

    def _key(self, data: Any) -> str | None:
        """The cache's key of this training; ``None`` where something that decides it cannot be described."""
        model = self.adapter.model
        try:
            return weight_cache.key_of(
                data=weight_cache.fingerprint(data, getattr(self.stream, "spec", {})),
                weights=weight_cache.digest(model.state_dict()),
                model=repr(model),
                frozen=[name for name, parameter in model.named_parameters() if not parameter.requires_grad],
                training=self.adapter.source_training,
                seed=self.seed,
                device=self.adapter.device.type,
            )
        except weight_cache.Undescribable:
            self.progress.message("the source model is not kept in the cache: the stream has a transform of its own")
            return None

    def _from_cache(self, key: str) -> bool:
        tensors = weight_cache.load(key, self.progress.message)
        if tensors is None:
            return False
        try:
            self.adapter.model.load_state_dict(tensors)
        except RuntimeError:  # names and shapes are part of the key: this is no file of ours
            return False
        return True

    def _train(self) -> None:
        from contlearn import strategies

        options = self.adapter.source_training
        seed_everything(self.seed)
        training: Any = strategies.create(
            "naive", self.adapter.model, lr=options["lr"], momentum=0.9, lr_schedule="cosine",
            epochs=options["epochs"], batch_size=options["batch_size"], device=str(self.adapter.device),
        )  # fmt: skip
        training.generator.manual_seed(self.seed)
        checkpoints = CheckpointFolder(self.checkpoint, Samples(self.stream)) if self.checkpoint is not None else None
        if checkpoints is not None and checkpoints.position() is not None:
            checkpoints.check_inside()
            training.resume_from = functools.partial(self._resume, checkpoints)
        self.progress.stage("source model", 1, options["epochs"])
        self.progress.experience(0)
        training.plugins.insert(0, self._watcher)  # in front of the clock, which counts on
        self.training = training
        if self.stopped():
            raise Interrupted
        try:
            training.train(next(iter(self.stream.streams["train"])), eval_streams=[])
        except Interrupted:
            if checkpoints is not None:
                with self._unwatched():
                    checkpoints.save(training, 0, inside=True)
            raise
        finally:
            self.training = None
        self.progress.evaluated(0, None)
        self.adapter.model.zero_grad(set_to_none=True)
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint, ignore_errors=True)

    def _resume(self, checkpoints: CheckpointFolder) -> None:
        with self._unwatched():
            checkpoints.load_inside(self.training)

    @contextlib.contextmanager
    def _unwatched(self) -> Iterator[None]:
        """The training's own plug-ins: those a checkpoint describes."""
        self.training.plugins.remove(self._watcher)
        try:
            yield
        finally:
            self.training.plugins.insert(0, self._watcher)

    # ------------------------------------------------------------------ before deployment

    def prepare(self) -> None:
        """Show clean source data to an adapter that needs it.

        What an adapter with ``meta_state`` and ``load_meta`` makes of it (EcoTTA's warm-up) is kept in the cache, and
        where such a preparation is stopped, it goes on from its last epoch.
        """
        adapter = self.adapter
        if not adapter.needs_source_data:
            return
        data = self.source_data()
        seed_everything(self.seed)
        adapter.generator.manual_seed(self.seed)
        batches = SourceBatches(data, adapter, stopped=self.stopped)
        self.progress.stage("preparing on source data", 1)
        self.progress.experience(0)
        if hasattr(adapter, "meta_state"):
            self._warm_up(data, batches)
        else:
            adapter.prepare_with(batches)
        adapter.model.zero_grad(set_to_none=True)
        self.progress.evaluated(0, None)

    def _warm_up(self, data: Any, batches: SourceBatches) -> None:
        adapter = self.adapter
        # With a file of the user's own, the adapter itself sees to it.
        key = self._meta_key(data) if getattr(adapter, "warmup", None) is None else None
        tensors = weight_cache.load(key, self.progress.message) if key is not None else None
        if tensors is not None:
            adapter.load_meta(tensors)
            return
        path = self.checkpoint / WARMUP if self.checkpoint is not None else None
        resume = None
        if path is not None and path.exists():
            try:
                resume = load_tensors(path.read_bytes())
                batches.random_state = resume.pop(RANDOM)
            except (OSError, SafetensorError, LookupError) as error:
                raise ContlearnError(f"checkpoint file {str(path)!r} is damaged ({error}); delete it") from None

        def after_epoch(epochs: int, state: Tensors) -> None:
            self.progress.epoch(epochs - 1, getattr(adapter, "warmup_epochs", epochs), None)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                copies = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
                atomic_write_bytes(path, save_tensors({**copies, RANDOM: torch.get_rng_state()}))

        adapter.prepare_with(batches, on_epoch=after_epoch, resume=resume)
        if key is not None:
            weight_cache.store(key, adapter.meta_state())
        if path is not None:
            path.unlink(missing_ok=True)

    def _meta_key(self, data: Any) -> str | None:
        adapter = self.adapter
        try:
            return weight_cache.key_of(
                data=weight_cache.fingerprint(data, getattr(self.stream, "spec", {})),
                weights=weight_cache.digest(adapter.model.state_dict()),
                adapter=getattr(adapter, "meta_options", adapter.spec),
                seed=self.seed,
                device=adapter.device.type,
            )
        except weight_cache.Undescribable:
            return None


class SourceBatches:
    """Clean, labelled source data on the adapter's device: every iteration (or call) is a new pass of ``(x, y)``.

    The order is drawn from the adapter's generator, so that a preparation that stores it can be resumed.

    Args:
        data: the data, with the transforms of training.
        adapter: gives device, generator and batch size (that of its warm-up where it has one).
        stopped: whether to stop between two batches, by :class:`contlearn.errors.Interrupted`.
    """

    def __init__(self, data: Any, adapter: Any, *, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped
        self.random_state: Tensor | None = None
        """Of PyTorch, for the transforms of the next pass; ``None`` goes on with the one that is."""
        self._loader = BatchLoader(
            BatchSource(data, adapter.device),
            batch_size=getattr(adapter, "warmup_batch_size", adapter.batch_size),
            shuffle=True,
            generator=adapter.generator,
        )

    def __len__(self) -> int:
        """Batches of one pass."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.random_state is not None:
            torch.set_rng_state(self.random_state)
            self.random_state = None
        for batch in self._loader:
            if self.stopped():
                raise Interrupted
            yield batch[0], batch[1]

    __call__ = __iter__


class _Watcher(SupervisedPlugin):
    """Tells how far the training is."""

    memory_exempt = True

    def __init__(self, progress: DomainProgress) -> None:
        super().__init__()
        self._progress = progress

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Tell the iteration."""
        self._progress.iteration(strategy.clock.train_epoch_iterations, len(strategy.dataloader))

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Tell the epoch."""
        epoch = int(strategy.clock.train_exp_epochs)
        self._progress.epoch(epoch, int(strategy.train_epochs), strategy.epoch_losses[-1])


# ---------------------------------------------------------------------- files


def weights_file(source: str | Path) -> Path:
    """The file of weights behind ``source``, a run folder or the file itself.

    Raises:
        ContlearnError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise ContlearnError(
                f"source {str(source)!r}: the folder has no {WEIGHTS}; expected that of a finished run, or a file of "
                "weights"
            )
        return path / WEIGHTS
    if not path.exists():
        raise ContlearnError(
            f"source {str(source)!r}: no such file or folder; expected a run folder or a file of weights"
        )
    return path


def load_classifier(model: nn.Module, source: str) -> None:
    """Fill a whole classifier, head included, from a run folder or a file of tensors.

    A file may hold the state dict of one of our classifiers, or of the network under timm's or RobustBench's names,
    also under ``state_dict`` or ``model`` of a training checkpoint.

    Args:
        model: a model of :mod:`contlearn.models`; changed in place.
        source: path of a run folder, or of a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file.

    Raises:
        ContlearnError: nothing there, damaged, or weights that do not fit.
    """
    name = str(getattr(model, "spec", {}).get("name", type(model).__name__))
    path = weights_file(source)
    tensors = _named_as_ours(model, read_tensors(path, model=name))
    head: Any = getattr(model, "head", None)
    rows = tensors.get("head.weight")
    if hasattr(head, "grow") and rows is not None and rows.ndim == 2:
        head.grow(rows.shape[0])
    _check_fit(model.state_dict(), tensors, source, name)
    model.load_state_dict(tensors, strict=False)  # strict but for BatchNorm's batch counter, which old files lack


def _named_as_ours(model: nn.Module, tensors: Tensors) -> Tensors:
    """The tensors under the names of a ``Classifier``."""
    for prefix in ("module.", "model."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    backbone = getattr(model, "backbone", None)
    if backbone is None or any(name.startswith("backbone.") for name in tensors):
        return tensors
    heads = _timm_names(backbone, "classifier") or _HEADS
    found = {f"backbone.{name}": value for name, value in _backbone_names(backbone, dict(tensors)).items()}
    for head in heads:
        with contextlib.suppress(KeyError):
            found["head.weight"] = tensors[f"{head}.weight"]
            found["head.bias"] = tensors[f"{head}.bias"]
            break
    return found
