"""MobileTL in runs: joined to other methods, with cached features, stopped and resumed, and as the update of TENT."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.training import Naive as AvalancheNaive
from torch import Tensor, nn

from contlearn import models, run, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.memory.account import snapshot
from contlearn.running import RunInterrupted
from contlearn.strategies.adapter import entropy
from contlearn.strategies.eata import EATA
from contlearn.strategies.feature_cache import FeatureCache, digests
from contlearn.strategies.mobiletl import MobileTLPlugin, prepare
from contlearn.strategies.sar import SAR
from contlearn.strategies.tent import Tent

GREY: Any = SimpleNamespace(input_shape=(1, 16, 16), n_classes=4, task_labels=False)
HOSTS = [
    name
    for name in strategies.list(kind=("class-incremental", "plug-in"))
    if name != "mobiletl" and "mobiletl" not in strategies.describe(name).excludes
]
# It freezes statistics that AdaB2N balances; the other way round AdaB2N has the last norms.
REFUSED = {"adab2n": "bn1 is a AdaB2N2d; expected a BatchNorm2d .of methods that replace it, name mobiletl first"}
MEMORIES = {"memory_size": 12, "patterns_per_experience": 4}


@pytest.fixture
def grey(made_up) -> Any:
    """Six classes of 16x16 images in three experiences."""
    return scenarios.class_incremental(made_up(6, per_class=8, side=16), n_experiences=3)


def network(stream: Any) -> Any:
    """Five blocks, of which the last three are inverted residuals with squeeze-and-excite and SiLU."""
    return models.create("test_efficientnet", stream, seed=0)


def trained(stream: Any, plugin: Any, host: str = "naive", *, out: Path | None = None, **options: Any) -> Any:
    known = strategies.parameters(host)
    options = {**{key: value for key, value in MEMORIES.items() if key in known}, **options}
    plugins = [plugin, *options.pop("others", ())]
    settings = {"lr": 0.05, "epochs": 2, "batch_size": 8, "device": "cpu", **options}
    strategy = strategies.create(host, network(stream), plugins=plugins, **settings)
    strategy.result = run(strategy, stream, quiet=True, out=out, resume=out is not None)
    return strategy


def weights(strategy: Any) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in strategy.model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---------------------------------------------------------------------- joined to others


@pytest.mark.parametrize("host", HOSTS)
def test_it_works_inside_every_other_method(grey, host) -> None:
    if host in REFUSED:
        with pytest.raises(ContlearnError, match=REFUSED[host]):
            trained(grey, MobileTLPlugin(blocks=2), host)
        return
    strategy = trained(grey, MobileTLPlugin(blocks=2), host)
    before, after = network(grey).state_dict(), weights(strategy)
    split = strategy.model.backbone.split
    for key, tensor in before.items():
        path = key.removeprefix("backbone.")
        if any(path.startswith(f"{unit}.") for unit in split.trunk):
            assert torch.equal(after[key], tensor), key
    path = "backbone.blocks.4.0.conv_pw.weight"
    assert not torch.equal(after[path], before[path]) and after[path].isfinite().all()
    assert all(accuracy is not None for accuracy in strategy.result.accuracy_matrix[-1])


def test_its_settings_shrink_the_account_of_the_run(grey) -> None:
    full = run(strategies.create("naive", network(grey), batch_size=8, device="cpu"), grey, quiet=True).memory
    tuned = trained(grey, MobileTLPlugin(blocks=1), epochs=1).result.memory
    assert tuned["activations"] < 0.25 * full["activations"]
    assert tuned["trainable_weights"] < 0.8 * full["trainable_weights"]
    packed = trained(grey, MobileTLPlugin(blocks=1, trunk_int8=True), epochs=1).result.memory
    assert packed["weights"] < 0.8 * tuned["weights"] and packed["persistent"] < 0.8 * tuned["persistent"]


def test_avalanches_own_strategy_is_a_host_of_a_prepared_model(grey, quiet) -> None:
    plugin, model = MobileTLPlugin(blocks=1, cache_trunk=True), network(grey)
    made = lambda: AvalancheNaive(  # noqa: E731
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), plugins=[plugin], evaluator=quiet(),
        train_mb_size=8, train_epochs=2,
    )  # fmt: skip
    with pytest.raises(ContlearnError, match="mobiletl: the model was not prepared; call plugin"):
        made().train(grey.train_stream[0])
    plugin.prepare_model(model)
    before = model.state_dict()["backbone.blocks.4.0.conv_pw.weight"].clone()
    strategy = made()
    for experience in grey.train_stream:
        strategy.train(experience)
    assert not torch.equal(model.state_dict()["backbone.blocks.4.0.conv_pw.weight"], before)
    assert len(plugin.cache) == 48


@pytest.mark.parametrize("joined", strategies.describe("mobiletl").composes_with)
def test_methods_named_after_it_join_it(grey, joined) -> None:
    if joined == "mobiletl":
        return
    strategy = trained(grey, MobileTLPlugin(blocks=2), others=[joined], epochs=1)
    path = "backbone.blocks.4.0.conv_pw.weight"
    before, after = network(grey).state_dict(), weights(strategy)
    assert not torch.equal(after[path], before[path]) and after[path].isfinite().all()
    assert torch.equal(after["backbone.conv_stem.weight"], before["backbone.conv_stem.weight"])


# ---------------------------------------------------------------------- cached features


@pytest.mark.parametrize("host", ["naive", "replay", "er_ace"])
def test_cached_features_train_to_the_same_bits(grey, host, watch) -> None:
    sizes: list[int] = []
    plain = trained(grey, MobileTLPlugin(blocks=2, trunk_batch=1), host, epochs=2)
    plugin = MobileTLPlugin(blocks=2, trunk_batch=1, cache_trunk=True)
    count = watch(before_training_exp=lambda s: s.model.backbone.conv_stem.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if s.is_training else None))  # fmt: skip
    cached = trained(grey, plugin, host, epochs=2, others=[count])
    assert same(weights(plain), weights(cached))
    assert plain.result.accuracy_matrix == cached.result.accuracy_matrix
    assert len(plugin.cache) == 48 and cached.model.backbone.serve is None
    # Three hooks by the third experience: what counts is that each image was computed once.
    assert len(sizes) == 16 * (1 + 2 + 3) and set(sizes) == {1}


def test_cached_features_are_close_to_those_of_whole_batches(grey) -> None:
    x, plain = torch.rand(6, 1, 16, 16), prepare(network(grey), blocks=2)
    cached = FeatureCache().serve(x, plain.backbone.compute_trunk)
    torch.testing.assert_close(cached, plain.backbone.trunk(x), rtol=1e-3, atol=1e-4)


def test_the_cache_is_counted_and_not_stored(grey, tmp_path) -> None:
    plugin = MobileTLPlugin(blocks=2, cache_trunk=True)
    strategy = trained(grey, plugin, out=tmp_path / "run")
    feature = strategy.model.backbone.trunk(torch.rand(1, 1, 16, 16))
    report = snapshot(strategy)
    assert report.method_state == {"trunk_features": 48 * feature.numel() * 4}
    assert report.persistent == report.weights
    assert sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoint").iterdir()) < 1.5 * report.weights
    assert strategy.result.memory["method_state.trunk_features"] == report.method_state["trunk_features"]


def test_a_cache_recognises_images_and_computes_each_once() -> None:
    cache, calls = FeatureCache(), []

    def compute(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x.sum((2, 3))

    x = torch.rand(4, 3, 5, 5)
    for some in (x, x.flip(0), torch.stack([x[1], x[1]])):
        torch.testing.assert_close(cache.serve(some, compute), some.sum((2, 3)))
    assert calls == [1] * 4 and len(cache) == 4
    assert digests(x.double()) != digests(x) != digests(x + 1) and len(set(digests(x))) == 4
    assert digests(x.to(memory_format=torch.channels_last)) == digests(x) == digests(x.flip(3).flip(3))
    assert digests(x.view(4, 3, 25, 1)) != digests(x)
    assert copy.deepcopy(cache) is cache  # a teacher's trunk is the same


def test_a_trunk_with_other_weights_is_computed_anew() -> None:
    cache, layer = FeatureCache(), nn.Conv2d(1, 2, 3)
    with torch.no_grad():
        cache.made_by(layer.parameters())
        old = cache.serve(torch.ones(1, 1, 4, 4), layer)
        cache.made_by(layer.parameters())
        assert len(cache) == 1
        layer.weight.mul_(2)
        cache.made_by(layer.parameters())
        assert len(cache) == 0 and not torch.equal(cache.serve(torch.ones(1, 1, 4, 4), layer), old)


def test_random_augmentation_is_refused(made_up) -> None:
    data = made_up(6, side=16)
    for augment, named in (("flip", "RandomFlip"), ("crop_flip", "RandomCrop, RandomFlip"), ("cifar", "ColorJitter")):
        stream = scenarios.class_incremental(data, n_experiences=3, augment=augment)
        with pytest.raises(ContlearnError, match=f"cache_trunk: the training images are augmented at random .*{named}"):
            trained(stream, MobileTLPlugin(blocks=1, cache_trunk=True))
    generator = torch.Generator().manual_seed(0)

    def noisy(images: Tensor) -> Tensor:
        return images + torch.randint(0, 9, images.shape, generator=generator, dtype=torch.uint8)

    stream = scenarios.class_incremental(data, n_experiences=3, transform=noisy)
    with pytest.raises(ContlearnError, match="more different images were met than the 16 of the stream"):
        trained(stream, MobileTLPlugin(blocks=1, cache_trunk=True), epochs=2)
    trained(stream, MobileTLPlugin(blocks=1), epochs=1)


# ---------------------------------------------------------------------- stopped and resumed


class StopAt(SupervisedPlugin):
    """SIGTERM to this process in a training iteration."""

    checkpoint_exclude = ("at",)

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.clock.train_iterations == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("options", [{"cache_trunk": True}, {"trunk_int8": True, "last_norm": "running"}])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(grey, tmp_path, options) -> None:
    def one(folder: str, at: int = -1) -> Any:
        plugin = MobileTLPlugin(blocks=2, **options)
        return trained(grey, plugin, "replay", out=tmp_path / folder, others=[StopAt(at)], momentum=0.9)

    whole = one("whole")
    for at in (1, 7):
        with pytest.raises(RunInterrupted):
            one(str(at), at)
        again = one(str(at))
        assert same(weights(whole), weights(again))
        assert whole.result.accuracy_matrix == again.result.accuracy_matrix
        held = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", str(at))]
        assert held[0] == held[1]


# ---------------------------------------------------------------------- test-time adaptation


@pytest.mark.parametrize(("cls", "options"), [
    (Tent, {}), (EATA, {"margin": 1.0, "d_margin": 1.0, "fisher_samples": 8}),
    (SAR, {"margin": 1.0, "reset_below": 0.0}),
])  # fmt: skip
def test_adapters_lower_the_entropy_with_the_top_of_the_network_and_leave_the_rest(cls, options) -> None:
    model = models.create("mobilenetv2_035", GREY, seed=0, head="fixed")
    x = torch.rand(16, 1, 16, 16)
    model.train()
    with torch.no_grad():
        for _ in range(20):  # statistics that fit, as a trained model has them
            model(x)
    adapter = cls(model=model, scope="mobiletl", blocks=2, lr=0.01, guard="off", device="cpu", **options)
    if adapter.needs_source_data:
        adapter.prepare_with([(x, torch.zeros(16))])
    adapter.start()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first = entropy(adapter.predict(x)).mean()
    for _ in range(6):
        assert adapter(x).shape == (16, 4)
    assert entropy(adapter.predict(x)).mean() < 0.98 * first
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    units = (*model.backbone.split.blocks, "conv_head", "bn2")
    assert moved and all(any(key.startswith(f"backbone.{unit}.") for unit in units) for key in moved)
    assert not any("running" in key or "num_batches" in key for key in moved)
    assert "backbone.blocks.6.0.conv_dw.weight" in moved and "backbone.blocks.6.0.bn1.weight" not in moved
    adapter.reset()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    adapter.start()  # once more, on a model that is prepared
    adapter(x)


def test_mistakes_of_the_scope_get_one_line() -> None:
    with pytest.raises(ContlearnError, match="unknown scope 'mobilet'; did you mean 'mobiletl'"):
        Tent(model=models.create("resnet14", GREY, head="fixed"), scope="mobilet")
    with pytest.raises(ContlearnError, match="'resnet14' has no inverted residual blocks"):
        Tent(model=models.create("resnet14", GREY, head="fixed"), scope="mobiletl").start()
