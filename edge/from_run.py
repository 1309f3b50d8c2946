"""What is exported from a configuration (fresh) or from a run folder (as training left it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contlearn import config as configuration
from contlearn.checkpoint import CheckpointFolder
from contlearn.errors import ContlearnError
from contlearn.flatdata import leaf_ids
from contlearn.scenarios.transforms import BatchTransform, Normalise
from contlearn.session import CONFIG
from contlearn.state import Samples, seed_everything


@dataclass
class Ready:
    """A strategy that stands as its artifact will start.

    Attributes:
        strategy: trained or fresh; an adapter is started.
        stream: its stream.
        seen: labels trained on so far, all of them in finished experiences.
        counts: training samples of each label met so far.
    """

    strategy: Any
    stream: Any
    seen: list[int] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def adapts(self) -> bool:
        """Whether it is a test-time adapter."""
        return bool(getattr(self.strategy, "adapts", False))


def ready(source: str | Path, overrides: Sequence[str] = (), *, quiet: bool = True) -> Ready:
    """The strategy of a configuration file or of a run folder.

    Args:
        source: a YAML file, or the folder of a run.
        overrides: as ``contlearn run`` takes them (``--strategy.lr=0.1``).
        quiet: show nothing while a source model is trained.

    Raises:
        ContlearnError: neither of the two, a bad configuration, missing data, a damaged checkpoint.
    """
    where = Path(source)
    folder = where if where.is_dir() else None
    if folder is not None and not (folder / CONFIG).is_file():
        raise ContlearnError(f"{str(folder)!r}: expected a configuration file or a run folder, found no {CONFIG} in it")
    resolved = configuration.resolve(configuration.load(folder / CONFIG if folder else where), overrides)
    resolved["strategy"]["device"] = "cpu"  # what is traced is the same everywhere
    stream = configuration.make_stream(resolved)
    made = Ready(configuration.build_on(stream, resolved), stream)
    if made.adapts:
        _start(made, folder, int(resolved["seed"]), quiet)
    elif folder is not None:
        _restore(made, folder)
    return made


def _start(made: Ready, folder: Path | None, seed: int, quiet: bool) -> None:
    """Source weights as a run gets them; then, from a run folder, where adaptation ended."""
    from avalanche.benchmarks import CLScenario, EagerCLStream

    from contlearn.adapting import visits_of
    from contlearn.domain_progress import DomainProgress
    from contlearn.source_model import SourceTraining

    adapter = made.strategy
    progress = DomainProgress(quiet=quiet)
    with progress:
        source = SourceTraining(adapter, made.stream, seed=seed, progress=progress)
        source.provide()
        adapter.model.eval()
        source.prepare()
    seed_everything(seed)
    adapter.generator.manual_seed(seed)
    adapter.start()
    if folder is not None:
        none = Samples(CLScenario([EagerCLStream("train", [])]))
        _load(CheckpointFolder(folder / "checkpoint", none, steps=len(visits_of(made.stream))), adapter, [], folder)


def _restore(made: Ready, folder: Path) -> None:
    from contlearn.memory.account import MemoryAccount

    strategy, experiences = made.strategy, list(made.stream.streams["train"])
    checkpoints = CheckpointFolder(folder / "checkpoint", Samples(made.stream))
    plugins = strategy.plugins
    strategy.plugins = [MemoryAccount(), *plugins]  # those that a run's checkpoint describes
    try:
        done = _load(checkpoints, strategy, experiences, folder)
    finally:
        strategy.plugins = plugins
    for experience in experiences[:done]:
        labels, counts = torch.as_tensor(list(experience.dataset.targets)).unique(return_counts=True)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            made.counts[label] = made.counts.get(label, 0) + count
    made.seen = sorted(made.counts)


def _load(checkpoints: CheckpointFolder, strategy: Any, experiences: list[Any], folder: Path) -> int:
    position = checkpoints.position()
    if position is None or not position.experiences_done:
        raise ContlearnError(f"{str(folder)!r}: expected a run with a finished experience, found none stored")
    checkpoints.load_boundary(strategy, experiences)
    return position.experiences_done


def preprocessing_of(stream: Any) -> dict[str, Any] | None:
    """How the stream's raw uint8 images become the network's input; ``None`` where it does something else to them."""
    dataset = stream.streams["test"][0].dataset
    leaves, _, _ = leaf_ids(dataset)
    pixels = _normalisation(dataset._flat_data)
    if pixels is None or any(getattr(leaf, "images", torch.empty(0)).dtype != torch.uint8 for leaf in leaves):
        return None
    plain = {"scale": 1.0 / pixels.scale, "layout": "NCHW", "input": "uint8"}
    return {**plain, "mean": list(pixels.mean or ()), "std": list(pixels.std or ())}


def _normalisation(data: Any) -> Normalise | None:
    """The one step of the evaluation transform, wherever in the tree of data sets it stands."""
    groups = getattr(data, "_transform_groups", None)
    found = groups["eval"] if groups is not None else None
    for step in getattr(found, "transforms", None) or ([found] if found is not None else []):
        if isinstance(step, BatchTransform):
            return step.steps[0] if len(step.steps) == 1 and isinstance(step.steps[0], Normalise) else None
    for child in getattr(data, "_datasets", ()):
        below = _normalisation(child)
        if below is not None:
            return below
    return None


def exemplars_of(made: Ready, classes: int, *, raw: bool) -> dict[str, np.ndarray] | None:
    """What the run's replay memory holds, as the runner stores it; ``None`` without a memory or with an empty one.

    Args:
        made: from :func:`ready`.
        classes: outputs of the step.
        raw: uint8 images as they are stored, instead of prepared ones.
    """
    hosts = [made.strategy, *made.strategy.plugins]
    policy = next((host.storage_policy for host in hosts if hasattr(host, "storage_policy")), None)
    if policy is None or not len(policy.buffer):
        return None
    dataset = policy.buffer.eval()
    labels = torch.as_tensor(list(dataset.targets)).numpy().astype(np.int32)
    if raw:
        leaves, leaf_of, place_of = leaf_ids(dataset)
        pieces = [leaves[leaf].images[int(place)].numpy() for leaf, place in zip(leaf_of, place_of, strict=True)]
        frames = np.stack(pieces)
    else:
        frames = torch.stack([dataset[index][0] for index in range(len(dataset))]).numpy()
    seen_of = np.zeros(classes, np.int64)
    for label, count in made.counts.items():
        seen_of[label] = count
    counts = np.bincount(labels, minlength=classes)
    full = counts == counts.max()
    seen = np.array([seen_of.sum()], np.int64)
    order = np.empty(0, np.int64)
    return {"frames": frames, "labels": labels, "seen": seen, "seen_of": seen_of, "full": full, "order": order}
