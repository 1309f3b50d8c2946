"""TinyTL: branches that start as nothing, frozen weights, and memory that is low in fact."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import nn
from torch.nn import functional as F

from contlearn import models, run, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory.saved import SavedForBackward
from contlearn.running import RunInterrupted
from contlearn.strategies.naive import Naive
from contlearn.strategies.tinytl import LiteResidual, TinyTLPlugin, halved, lite_residual


def network(name="mobilenetv2_100", side=64, **options):
    stream = SimpleNamespace(input_shape=(3, side, side), n_classes=5, task_labels=False)
    return models.create(name, stream, head="fixed", seed=0, **options)


def prepared(name="mobilenetv2_100", side=64, **options):
    model = network(name, side)
    TinyTLPlugin(**options).prepare_model(model)
    return model


def saved_by(model, x, y):
    watch = SavedForBackward([*model.parameters(), *model.buffers()])
    with watch.watching():
        loss = F.cross_entropy(model(x), y)
    size = watch.live
    loss.backward()
    return size


@pytest.mark.parametrize("name", ["mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_lite0", "mnasnet_100"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_the_function_starts_unchanged(name, blocks) -> None:
    model = network(name, 48).eval()
    x = torch.randn(2, 3, 48, 48)
    expected = model(x)
    TinyTLPlugin(blocks=blocks).prepare_model(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.train()(x), expected)  # running statistics in training, too
    count = sum(isinstance(module, LiteResidual) for module in model.modules())
    assert count == (blocks or {"mobilenetv3_small_100": 11, "efficientnet_lite0": 16}.get(name, 17))


def test_biases_branches_and_classifier_train_and_nothing_else() -> None:
    model = prepared(blocks=3)
    chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, _ in model.named_parameters():
        branch = ".branch." in name and not name.endswith("branch.4.bias")
        bias = name.endswith(".bias") and ".branch." not in name
        assert (name in chosen) == (branch or bias or name.startswith("head.")), name
    alone = prepared(blocks=3, biases=False)
    chosen = {name for name, p in alone.named_parameters() if p.requires_grad}
    assert chosen == {name for name, _ in alone.named_parameters() if ".branch." in name or name.startswith("head.")}


def test_branches_learn_and_frozen_weights_and_statistics_stay() -> None:
    model = prepared(side=48).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in model.state_dict().items():
        if name not in trained:
            assert torch.equal(tensor, before[name]), name
        elif ".branch." in name and not name.endswith(("branch.1.bias", "branch.0.weight")):
            assert not torch.equal(tensor, before[name]), name


def test_the_gradient_is_that_of_the_same_network_in_plain_pytorch() -> None:
    lean = prepared(side=48, blocks=4).train()
    for module in lean.modules():
        if isinstance(module, LiteResidual):
            nn.init.normal_(module.branch[-1].weight)
    plain = copy.deepcopy(lean)
    plain._forward_pre_hooks.clear()
    plain._forward_hooks.clear()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x, y = torch.randn(4, 3, 48, 48), torch.tensor([0, 1, 2, 3])
    small, large = saved_by(lean, x, y), saved_by(plain, x, y)
    for (name, p), other in zip(lean.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (other.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert small < large / 10


def test_saved_bytes_are_branches_and_bits() -> None:
    model = prepared()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    sizes = [4 * module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def note(module, inputs):
        sizes.append(inputs[0].numel() / 8 if isinstance(module, nn.ReLU6) else 4 * inputs[0].numel())

    hooks = [
        module.register_forward_pre_hook(note)
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU6) or (".branch." in name and isinstance(module, nn.Conv2d | nn.GroupNorm))
    ]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    expected = sum(sizes)
    assert expected < saved_by(model.train(), x, y) < 1.04 * expected  # the rest: statistics, bits, the features
    full = saved_by(network().train(), x, y)
    assert expected < full / 10


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (7, 7), (1, 1), (1, 4)])
def test_halving_is_average_pooling_that_counts_the_rim_alone_and_keeps_nothing(size) -> None:
    x = torch.randn(2, 3, *size, requires_grad=True)
    watch = SavedForBackward([])
    with watch.watching():
        out = halved(x)
    expected = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(out, expected)
    assert watch.live == 0
    weights = torch.randn_like(out)
    (found,) = torch.autograd.grad((out * weights).sum(), x)
    (right,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("side", "kernel", "expected"), [(14, 5, 5), (10, 5, 5), (8, 5, 3), (7, 5, 3), (3, 5, 1), (1, 5, 1), (14, 3, 3)]
)
def test_the_kernel_fits_the_halved_map(side, kernel, expected) -> None:
    branch = lite_residual((16, side), (24, side), kernel=kernel, groups=2, generator=torch.Generator())
    assert branch[0].kernel_size == (expected, expected) and branch[0].groups == 2
    assert (branch[1].num_groups, branch[4].num_groups) == (2, 3)
    x = torch.randn(1, 16, side, side)
    assert branch(halved(x)).shape[1:] == (24, -(-side // 2), -(-side // 2))


def test_strided_blocks_have_strided_branches() -> None:
    model = prepared()
    x = torch.randn(1, 3, 64, 64)
    strides = []

    def note(module, inputs, output):
        strides.append((module.branch[0].stride[0], inputs[0].shape[2] // output.shape[2]))

    for module in model.modules():
        if isinstance(module, LiteResidual):
            module.register_forward_hook(note)
    model.eval()(x)
    assert [mine for mine, _ in strides] == [theirs for _, theirs in strides] and {1, 2} == {s for s, _ in strides}


def test_the_seed_fixes_the_branches_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = prepared(blocks=1, seed=3).state_dict()
    torch.manual_seed(2)
    second, third = prepared(blocks=1, seed=3).state_dict(), prepared(blocks=1, seed=4).state_dict()
    key = "backbone.blocks.6.0.branch.0.weight"
    assert torch.equal(first[key], second[key]) and not torch.equal(first[key], third[key])


class Stop(SupervisedPlugin):
    """Interrupts the host after some steps; after 0, never."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def after_training_iteration(self, strategy, **kwargs) -> None:
        self.steps -= 1
        strategy.interrupt = strategy.interrupt or self.steps == 0


def test_a_run_that_is_resumed_ends_with_the_same_bits(made_up, tmp_path) -> None:
    stream = scenarios.transfer(made_up(classes=3, per_class=6, side=32))

    def strategy(steps=0):
        model = models.create("mobilenetv3_small_050", stream, seed=0)
        plugins = [TinyTLPlugin(blocks=2), Stop(steps)]
        return Naive(model=model, epochs=2, batch_size=6, lr=0.05, device="cpu", plugins=plugins)

    whole = strategy()
    run(whole, stream, out=tmp_path / "whole", quiet=True)
    with pytest.raises(RunInterrupted):
        run(strategy(4), stream, out=tmp_path / "cut", quiet=True)
    again = strategy()
    run(again, stream, out=tmp_path / "cut", resume=True, quiet=True)
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TinyTLPlugin(blocks=-1), "blocks: expected at least 0, got -1"),
        (lambda: TinyTLPlugin(kernel=4), "kernel: expected an odd number, got 4"),
        (lambda: prepared(blocks=18), "blocks: expected at most 17 for this model, got 18"),
        (lambda: prepared("resnet20", 32), "CifarResNet has no inverted residual blocks; expected a model that has"),
        (lambda: TinyTLPlugin().prepare_model(nn.Linear(2, 2)), "Linear is no classifier with a known input_shape"),
    ],
)
def test_mistakes_get_one_line(make, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        make()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_host_of_avalanche_needs_a_prepared_model(made_up, quiet) -> None:
    from avalanche.training import Naive as AvalancheNaive

    stream = scenarios.transfer(made_up(classes=3, per_class=4, side=32))
    model = models.create("mobilenetv3_small_050", stream, seed=0, head="fixed")
    host = AvalancheNaive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=nn.CrossEntropyLoss(),
        plugins=[TinyTLPlugin()], evaluator=quiet(),
    )  # fmt: skip
    with pytest.raises(ContlearnError, match="tinytl: the model has no branches"):
        host.train(stream.train_stream[0])
