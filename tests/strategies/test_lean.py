"""Lean forward passes: the same numbers, and of frozen layers only what the derivative needs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from contlearn import models, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory.saved import SavedForBackward
from contlearn.strategies.lean import LeanOperations, LeanPlugin, run_lean
from contlearn.strategies.naive import Naive


def network(name="efficientnet_lite0", *trainable):
    stream = SimpleNamespace(input_shape=(3, 32, 32), n_classes=5, task_labels=False)
    return models.create(name, stream, head="fixed", seed=0, trainable=trainable or None).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])


def step(model):
    """Output, bytes saved for backward, gradients."""
    x, y = batch()
    watch = SavedForBackward([*model.parameters(), *model.buffers()])
    with watch.watching():
        out = model(x)
        loss = F.cross_entropy(out, y)
    saved = watch.live
    loss.backward()
    return out.detach(), saved, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def still(model):
    """Frozen norms in evaluation mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
            module.eval()


def inputs_of(model, kinds):
    """Bytes of the inputs of modules of some kinds in one pass."""
    sizes = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: sizes.append(4 * inputs[0].numel()))
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        copy.deepcopy(model)(batch()[0])
        model(batch()[0])
    for hook in hooks:
        hook.remove()
    return sum(sizes) // 2


def one_experience(made_up):
    return scenarios.transfer(made_up(classes=4, per_class=4, side=12))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_100", "resnet20"])
@pytest.mark.parametrize("trainable", ["biases", "norms", "last_blocks:2", "all", "head"])
def test_forward_is_bit_identical_and_gradients_are_the_same(name, trainable) -> None:
    plain = network(name, trainable)
    lean = copy.deepcopy(plain)
    run_lean(lean)
    (out, saved, expected), (found_out, found_saved, found) = step(plain), step(lean)
    assert torch.equal(out, found_out) and found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    for (key, buffer), other in zip(plain.named_buffers(), lean.buffers(), strict=True):
        assert torch.equal(buffer, other), key
    if trainable in ("biases", "norms"):
        assert found_saved < 0.75 * saved


@pytest.mark.parametrize("name", ["efficientnet_lite0", "mobilenetv3_small_100"])
def test_running_statistics_equal_frozen_norms_in_evaluation_mode(name) -> None:
    plain = network(name, "biases")
    lean = copy.deepcopy(plain)
    run_lean(lean, frozen_norms="running")
    still(plain)
    before = {key: value.clone() for key, value in lean.named_buffers()}
    (out, _, expected), (found_out, _, found) = step(plain), step(lean)
    assert torch.equal(out, found_out) and found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in lean.named_buffers())


def test_biases_alone_keep_bits_of_relus_and_a_vector_per_image() -> None:
    model = network("efficientnet_lite0", "biases")
    relus = inputs_of(model, nn.ReLU6)
    run_lean(model, frozen_norms="running")
    saved = step(model)[1]
    features = 4 * 4 * model.feature_dim  # the classifier's input
    factors = 4 * sum(m.num_features for m in model.modules() if isinstance(m, _BatchNorm))
    assert relus / 32 + features < saved < relus / 32 + features + factors + 4096


def test_norms_alone_keep_their_inputs_and_bits_of_relus() -> None:
    model = network("efficientnet_lite0", "norms")
    norms, relus = inputs_of(model, _BatchNorm), inputs_of(model, nn.ReLU6)
    run_lean(model)
    saved = step(model)[1]
    statistics = 2 * 4 * sum(m.num_features for m in model.modules() if isinstance(m, _BatchNorm))
    assert norms + relus / 32 < saved < norms + relus / 32 + statistics + 4 * 4 * model.feature_dim + 4096


def test_a_trunk_in_front_of_what_trains_keeps_nothing() -> None:
    plain = network("resnet20", "last_blocks:1")
    unpacked = copy.deepcopy(plain)
    run_lean(unpacked, packed=False, frozen_norms="running")
    assert step(plain)[1] == step(unpacked)[1]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2, "padding": 2}])
def test_a_convolution_of_which_the_bias_trains(first, options) -> None:
    conv = nn.Conv2d(4, 6, 3, **options)
    conv.weight.requires_grad_(False)
    x = torch.randn(2, 4, 7, 8)
    gradients = []
    for lean in (False, True):
        given = x.clone().requires_grad_(not first)
        conv.bias.grad = None
        watch = SavedForBackward(conv.parameters())
        with watch.watching():
            if lean:
                with LeanOperations():
                    out = conv(given)
            else:
                out = conv(given)
        assert watch.live == (0 if lean else 4 * x.numel())
        out.sin().sum().backward()
        gradients.append((out.detach(), conv.bias.grad, given.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    for expected, found in zip(gradients[0][1:], gradients[1][1:], strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected)


def test_once_is_enough_and_copies_run_lean_by_themselves() -> None:
    model = network("resnet20", "biases")
    run_lean(model)
    run_lean(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    twin = copy.deepcopy(model)
    (hook,) = twin._forward_pre_hooks.values()
    assert hook.__self__ is not next(iter(model._forward_pre_hooks.values())).__self__
    assert step(twin)[1] == step(model)[1]


def test_a_pass_that_fails_leaves_nothing_open() -> None:
    model = network("resnet20", "biases")
    run_lean(model)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 2, 32, 32))
    assert torch._C._len_torch_function_stack() == 0


def test_per_sample_gradients_still_work() -> None:
    model = network("resnet20", "biases").eval()
    x, y = batch()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(held, image, label):
        return F.cross_entropy(torch.func.functional_call(model, held, (image[None],)), label[None])

    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    run_lean(model)
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    assert all(torch.equal(found[name], expected[name]) for name in weights)


def test_training_with_the_plugin_has_the_same_bits(made_up) -> None:
    results = []
    for plugins in ([], [LeanPlugin()]):
        stream = one_experience(made_up)
        model = models.create("resnet14", stream, seed=0, trainable=["norms"], head="fixed")
        strategy = Naive(model=model, epochs=1, batch_size=8, lr=0.1, device="cpu", plugins=plugins)
        strategy.generator.manual_seed(0)
        strategy.train(stream.train_stream[0], eval_streams=[])
        results.append(strategy.model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_hosts_of_avalanche_run_lean(made_up, quiet) -> None:
    from avalanche.training import Naive as AvalancheNaive

    stream = one_experience(made_up)
    model = models.create("resnet14", stream, seed=0, trainable=["biases"], head="fixed")
    seen = []
    model.backbone.stem[0].register_forward_hook(
        lambda *_: seen.append(torch._C._len_torch_function_stack() if torch.is_grad_enabled() else None)
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    host = AvalancheNaive(
        model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), train_mb_size=8, plugins=[LeanPlugin()],
        evaluator=quiet(),
    )  # fmt: skip
    host.train(stream.train_stream[0])
    assert seen == [1, 1]


def test_unknown_statistics_get_one_line() -> None:
    with pytest.raises(ContlearnError, match="frozen_norms: expected batch or running, got 'eval'"):
        LeanPlugin(frozen_norms="eval")
