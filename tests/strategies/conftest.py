"""A tiny stream, tiny models and a plug-in made of functions."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from torch import nn

from contlearn import models, scenarios
from contlearn.models import Classifier, GrowingHead
from contlearn.scenarios.datasets import ImageData
from contlearn.scenarios.stream import Scenario


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Dropout, reservoirs and Avalanche's loaders draw from the global generators."""
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def made_up() -> Callable[..., ImageData]:
    """``made_up(classes, per_class=..., ...)``: noisy images, each class brighter at its own pixel."""

    def make(classes: int = 6, *, per_class: int = 8, side: int = 4, seed: int = 0, **fields: Any) -> ImageData:
        generator = torch.Generator().manual_seed(seed)

        def images(targets: torch.Tensor) -> torch.Tensor:
            noise = torch.randint(0, 128, (len(targets), side * side), generator=generator, dtype=torch.uint8)
            noise[torch.arange(len(targets)), targets] += 127
            return noise.view(-1, 1, side, side)

        targets = torch.arange(classes).repeat_interleave(per_class)
        targets = targets[torch.randperm(len(targets), generator=generator)]
        test_targets = torch.arange(classes).repeat(3)
        return ImageData(
            name="made_up",
            train_images=images(targets),
            test_images=images(test_targets),
            train_targets=targets,
            test_targets=test_targets,
            class_names=tuple(f"class {label}" for label in range(classes)),
            **fields,
        )

    return make


@pytest.fixture
def stream(made_up: Callable[..., ImageData]) -> Scenario:
    """Six classes in three experiences of sixteen images; training images are inverted, evaluated ones are not."""
    return scenarios.class_incremental(made_up(), n_experiences=3, transform=lambda image: 255 - image)


@pytest.fixture
def small() -> Callable[..., nn.Module]:
    """``small(stream, ...)``: a network with one hidden layer of 8, without dropout unless asked for."""

    def make(stream: Scenario, *, hidden: int = 8, dropout: float = 0.0, **options: Any) -> nn.Module:
        return models.create("mlp", stream, **{"seed": 0, "hidden": hidden, "dropout": dropout, **options})

    return make


@pytest.fixture
def fitting(small: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``fitting(name, stream, ...)``: the small network, with a BatchNorm for a strategy that replaces it."""

    def make(name: str, stream: Scenario, **options: Any) -> nn.Module:
        model = small(stream, **options)
        if name == "adab2n":
            model.backbone = nn.Sequential(model.backbone, nn.BatchNorm1d(model.feature_dim))
        return model

    return make


@pytest.fixture
def normed() -> Callable[..., nn.Module]:
    """``normed(stream)``: a network of two hidden layers with BatchNorm in front of the ReLUs."""

    def make(stream: Scenario) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = nn.Sequential(
                nn.Flatten(),
                nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(),
                nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(),
            )  # fmt: skip
            model = Classifier(backbone, GrowingHead(8), feature_dim=8)
        model.input_shape = stream.input_shape
        return model

    return make


@pytest.fixture
def watch() -> Callable[..., SupervisedPlugin]:
    """``watch(before_update=function, ...)``: a plug-in that calls each function with the strategy."""

    def make(**hooks: Callable[[Any], Any]) -> SupervisedPlugin:
        plugin = SupervisedPlugin()
        for event, function in hooks.items():
            setattr(plugin, event, lambda strategy, function=function, **kwargs: function(strategy))
        return plugin

    return make


@pytest.fixture
def quiet() -> Callable[[], EvaluationPlugin]:
    """An evaluator for Avalanche's own strategies that prints nothing."""

    def make() -> EvaluationPlugin:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No loggers specified")
            return EvaluationPlugin(loggers=[])

    return make


@pytest.fixture
def identify() -> Callable[..., Callable[[torch.Tensor], list[tuple[int, int]]]]:
    """``identify(stream, "train")(images)``: experience and position of each image of a batch, by its pixels."""

    def of(stream: Scenario, group: str) -> Callable[[torch.Tensor], list[tuple[int, int]]]:
        def pixels(image: torch.Tensor) -> bytes:
            return bytes((image * 255).round().to(torch.uint8).flatten().tolist())

        table = {
            pixels(image): (index, position)
            for index, experience in enumerate(stream.train_stream)
            for position, (image, *_) in enumerate(experience.dataset.with_transforms(group))
        }
        return lambda images: [table[pixels(image)] for image in images]

    return of
