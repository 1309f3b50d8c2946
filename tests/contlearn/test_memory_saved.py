"""Saved activations and live storages: against the autograd graph itself, and against arithmetic by hand."""

from __future__ import annotations

import contextlib
import gc
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn import models
from contlearn.memory.saved import LiveStorages, SavedForBackward, unique_bytes

FLOAT = 4


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """The garbage collector is off: what is freed inside is freed by reference counts alone."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def saved_in_graph(loss: Tensor, own: list[Tensor]) -> int:
    """Bytes that the graph behind ``loss`` keeps, read off its nodes: each storage once, by address, without ``own``.

    Wrapped numbers (the 2 of ``x * 2``) are part of a node and not tensors that a network holds: 0 dimensions, 8 bytes.
    None of the networks here has one; `test_a_number_is_no_activation` shows the difference.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in own}
    found: dict[int, int] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        held += list(getattr(node, "saved_tensors", ()))  # of functions written in Python
        for value in held:
            for tensor in value if isinstance(value, tuple | list) else [value]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in ours:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def tensors_of(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def spec(side: int, classes: int = 10) -> Any:
    return types.SimpleNamespace(input_shape=(3, side, side), n_classes=classes, task_labels=False)


NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "mlp": (8, lambda: models.create("mlp", spec(8), head="fixed", hidden=16, hidden_layers=3, seed=0)),
    "resnet32": (16, lambda: models.create("resnet32", spec(16), head="fixed", seed=0)),
    "mobilenetv2": (32, lambda: timm.create_model("mobilenetv2_050", num_classes=10, drop_rate=0.2)),
    "vit_tiny": (
        64,
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10, proj_drop_rate=0.1),
    ),
}


def freeze(network: nn.Module, which: str) -> None:
    parameters = list(network.parameters())
    count = {"nothing": 0, "first half": len(parameters) // 2, "all but the head": len(parameters) - 2}[which]
    for parameter in parameters[:count]:
        parameter.requires_grad_(False)


@pytest.fixture(scope="module", params=NETWORKS)
def network_and_images(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    side, build = NETWORKS[request.param]
    torch.manual_seed(0)
    return build(), torch.rand(3, 3, side, side)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", ["nothing", "first half", "all but the head"])
def test_activations_are_what_the_graph_keeps(
    network_and_images: tuple[nn.Module, Tensor], frozen: str, training: bool
) -> None:
    network, images = network_and_images
    targets = torch.tensor([1, 2, 3])
    network.requires_grad_(True)
    freeze(network, frozen)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def loss() -> Tensor:
        network.load_state_dict(state)
        network.train(training)
        network.zero_grad()
        torch.manual_seed(1)
        return F.cross_entropy(network(images), targets)

    plain = loss()
    expected = saved_in_graph(plain, tensors_of(network))
    plain.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in network.parameters()]

    saved = SavedForBackward(tensors_of(network))
    with no_collection(), saved.watching():
        watched = loss()
        assert saved.live == expected
        watched.backward()
        assert saved.live == 0
    assert saved.peak == expected > 0
    assert watched.equal(plain)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or gradient.equal(parameter.grad)


@pytest.mark.parametrize("name", ["resnet32", "mobilenetv2", "vit_tiny"])
def test_freezing_the_trunk_leaves_only_what_the_head_needs(name: str) -> None:
    side, build = NETWORKS[name]
    network = build()
    freeze(network, "all but the head")
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    saved = SavedForBackward(tensors_of(network))
    with saved.watching():
        loss = F.cross_entropy(network.eval()(torch.rand(5, 3, side, side)), torch.arange(5))
    # The features in front of the head, the logarithm of the softmax, the labels, and the sum of the samples' weights.
    features = 5 * head.in_features * FLOAT
    extra = saved.peak - features - 5 * 10 * FLOAT - 5 * 8 - FLOAT
    if name == "vit_tiny":  # the head reads the class token out of all tokens, whose storage stays: 16 patches and it
        assert extra == 16 * features
    else:
        assert extra == 0
    loss.backward()
    assert saved.live == 0


# ---------------------------------------------------------------- by hand


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), act()]
    return nn.Sequential(*layers[:-1])


def peak_of(network: nn.Module, *inputs: Tensor) -> int:
    saved = SavedForBackward(tensors_of(network))
    with saved.watching():
        output = network(*inputs)
        assert saved.live == saved.peak
        output.sum().backward()
        assert saved.live == 0
    return saved.peak


def test_an_mlp_keeps_its_input_and_each_hidden_output() -> None:
    # Linear keeps its input, ReLU its output, which is the next Linear's input.
    assert peak_of(mlp(7, 5, 4, 3), torch.rand(6, 7)) == 6 * (7 + 5 + 4) * FLOAT


def test_a_function_of_its_input_keeps_one_more_per_layer() -> None:
    # GELU keeps its input, and its output is the next Linear's.
    assert peak_of(mlp(7, 5, 4, 3, act=nn.GELU), torch.rand(6, 7)) == 6 * (7 + 2 * 5 + 2 * 4) * FLOAT


def test_a_frozen_mlp_keeps_what_is_behind_the_first_trained_layer() -> None:
    network = mlp(7, 5, 4, 3)
    network[0].requires_grad_(False)
    # The input and the first ReLU are of no use; the second Linear needs its input, and so on.
    assert peak_of(network, torch.rand(6, 7)) == 6 * (5 + 4) * FLOAT


def test_a_frozen_layer_between_trained_ones_needs_no_input() -> None:
    network = mlp(7, 5, 4, 3)
    network[2].requires_grad_(False)
    # Linear 2 passes gradients on through its weights alone, but the ReLU in front of it keeps the same tensor.
    assert peak_of(network, torch.rand(6, 7)) == 6 * (7 + 5 + 4) * FLOAT
    plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 4).requires_grad_(False), nn.Linear(4, 3))
    assert peak_of(plain, torch.rand(6, 7)) == 6 * (7 + 4) * FLOAT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_is_that_of_the_tensors(dtype: torch.dtype) -> None:
    assert peak_of(mlp(7, 5, 3).to(dtype), torch.rand(6, 7, dtype=dtype)) == 6 * (7 + 5) * dtype.itemsize


def test_batch_norm_keeps_its_input_and_statistics_in_training_only() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    images = torch.rand(4, 2, 5, 5)
    maps = 4 * 3 * 25 * FLOAT
    convolution = 4 * 2 * 25 * FLOAT
    # Convolution: input. BatchNorm: its input, mean and inverse deviation. ReLU: its output.
    assert peak_of(network.train(), images) == convolution + maps + 2 * 3 * FLOAT + maps
    assert peak_of(network.eval(), images) == convolution + maps + maps


def test_views_of_one_storage_count_once_and_whole() -> None:
    weight = torch.rand(10, requires_grad=True)
    base = torch.rand(4, 10)
    saved = SavedForBackward([weight])
    with saved.watching():
        loss = (base[0] * weight).sum() + (base[1] * weight).sum() + (base.view(40)[5:15] * weight).sum()
    assert saved.live == saved.peak == 40 * FLOAT
    loss.backward()
    assert saved.live == 0


def test_a_parameter_saved_by_a_product_is_not_counted() -> None:
    layer = nn.Linear(4, 4, bias=False)
    inputs = torch.rand(2, 4, requires_grad=True)
    saved = SavedForBackward(layer.parameters())
    with saved.watching():
        loss = layer(inputs).sum()
    assert saved.peak == 2 * 4 * FLOAT
    everything = SavedForBackward([])
    with everything.watching():
        layer(inputs).sum()
    assert everything.peak == (2 * 4 + 4 * 4) * FLOAT
    loss.backward()


def test_an_input_of_two_layers_counts_once() -> None:
    first, second = nn.Linear(6, 3), nn.Linear(6, 2)
    inputs = torch.rand(5, 6)
    saved = SavedForBackward([*first.parameters(), *second.parameters()])
    with saved.watching():
        loss = first(inputs).sum() + second(inputs).sum()
    assert saved.live == 5 * 6 * FLOAT
    loss.backward()
    assert saved.live == 0


def test_a_number_is_no_activation() -> None:
    inputs = torch.rand(5, requires_grad=True)
    saved = SavedForBackward([inputs])
    with saved.watching():
        loss = (inputs * 2.0).sum()
    assert saved.peak == 0
    assert saved_in_graph(loss, [inputs]) == 8


def test_what_a_function_in_python_saves_is_counted() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x, x * x)
            return x * x * x

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            _, square = ctx.saved_tensors
            return 3 * square * gradients[0]

    inputs = torch.rand(7, requires_grad=True)
    saved = SavedForBackward([inputs])
    with saved.watching():
        loss = Cube.apply(inputs).sum()
        assert saved.live == 7 * FLOAT == saved_in_graph(loss, [inputs])
    loss.backward()
    assert saved.live == 0
    assert inputs.grad is not None and torch.allclose(inputs.grad, 3 * inputs.detach() ** 2)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_count_their_indices_and_values() -> None:
    weight = torch.rand(5, 2, requires_grad=True)
    coordinates = torch.sparse_coo_tensor(torch.arange(5).repeat(2, 1), torch.rand(5), (5, 5))
    rows = torch.sparse_csr_tensor(torch.arange(6), torch.arange(5), torch.rand(5), (5, 5))
    for sparse, expected in ((coordinates, 5 * (2 * 8 + FLOAT)), (rows, 6 * 8 + 5 * 8 + 5 * FLOAT)):
        saved = SavedForBackward([weight])
        with saved.watching():
            loss = torch.sparse.mm(sparse, weight).sum()
        assert saved.peak == expected == unique_bytes([sparse])
        loss.backward()
        assert saved.live == 0


# ---------------------------------------------------------------- over time


def test_two_forwards_before_one_backward_are_the_sum() -> None:
    network = mlp(7, 5, 3)
    saved = SavedForBackward(tensors_of(network))
    with saved.watching():
        loss = network(torch.rand(6, 7)).sum() + network(torch.rand(2, 7)).sum()
        loss.backward()
    assert saved.peak == (6 + 2) * (7 + 5) * FLOAT
    assert saved.live == 0


def test_two_pairs_of_forward_and_backward_are_the_larger() -> None:
    network = mlp(7, 5, 3)
    saved = SavedForBackward(tensors_of(network))
    with saved.watching():
        for size in (2, 6, 3):
            network(torch.rand(size, 7)).sum().backward()
            assert saved.live == 0
    assert saved.peak == 6 * (7 + 5) * FLOAT


def test_a_retained_graph_keeps_what_it_saved() -> None:
    network = mlp(7, 5, 3)
    saved = SavedForBackward(tensors_of(network))
    with saved.watching():
        loss = network(torch.rand(6, 7)).sum()
        loss.backward(retain_graph=True)
        first = network[0].weight.grad.clone()
        assert saved.live == 6 * (7 + 5) * FLOAT
        loss.backward()
        assert saved.live == 0
    assert torch.equal(network[0].weight.grad, 2 * first)


def test_nothing_is_saved_without_gradients() -> None:
    network = mlp(7, 5, 3)
    saved = SavedForBackward(tensors_of(network))
    with saved.watching():
        with torch.no_grad():
            network(torch.rand(6, 7))
        network.requires_grad_(False)(torch.rand(6, 7))
    assert saved.peak == saved.live == 0


def test_nothing_is_counted_outside_the_block() -> None:
    network = mlp(7, 5, 3)
    saved = SavedForBackward(tensors_of(network))
    with pytest.raises(ZeroDivisionError), saved.watching():
        raise ZeroDivisionError
    network(torch.rand(6, 7)).sum().backward()
    assert saved.peak == 0


def test_gradients_of_gradients_are_the_same_bits() -> None:
    weight, inputs = torch.rand(5, 5, requires_grad=True), torch.rand(3, 5)

    def second() -> Tensor:
        output = torch.tanh(torch.tanh(inputs @ weight) @ weight).pow(2).sum()
        (gradient,) = torch.autograd.grad(output, weight, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), weight)[0]

    plain = second()
    saved = SavedForBackward([weight])
    with no_collection(), saved.watching():
        assert second().equal(plain)
        assert saved.live == 0


@pytest.mark.parametrize("function", [torch.exp, torch.tanh, torch.sigmoid, F.softplus, lambda x: x.softmax(0)])
def test_what_is_saved_goes_with_its_graph_without_the_collector(function: Callable[[Tensor], Tensor]) -> None:
    """Functions that save their own output would keep themselves alive if the hook held that output's graph."""
    weight = torch.rand(50, requires_grad=True)
    saved = SavedForBackward([weight])
    with no_collection(), saved.watching():
        output = function(weight * weight.detach().clone())
        storage = weakref.ref(output.untyped_storage())
        assert saved.live > 0
        output.sum().backward()
        assert saved.live == 0
        assert storage() is not None
        del output
        assert storage() is None
        abandoned = function(weight * weight.detach().clone())  # a graph that no backward pass ever frees
        storage = weakref.ref(abandoned.untyped_storage())
        del abandoned
        assert saved.live == 0 and storage() is None


def test_what_is_excluded_is_not_kept_alive_nor_its_address_excluded() -> None:
    weight = torch.rand(64, requires_grad=True)
    old = torch.rand(64)
    address, storage = old.untyped_storage()._cdata, weakref.ref(old.untyped_storage())
    saved = SavedForBackward([weight, old])
    with no_collection(), saved.watching():
        loss = (weight * old).sum()
        assert saved.peak == 0
        del loss, old
        assert storage() is None
        tensors = [torch.rand(64) for _ in range(100)]
        assert address in {tensor.untyped_storage()._cdata for tensor in tensors}, "the address was not taken again"
        losses = [(weight * tensor).sum() for tensor in tensors]
        assert saved.live == 100 * 64 * FLOAT
        del losses
    assert saved.live == 0


# ---------------------------------------------------------------- everything that is live


def test_live_storages_of_a_sum_by_hand() -> None:
    a, b = torch.rand(100), torch.rand(100)
    live = LiveStorages([a, b])
    with no_collection(), live:
        total = a + b
        assert (live.live, live.peak) == (400, 400)
        total += a  # in place
        view = total.view(10, 10)[2:4].t()
        assert (live.live, live.peak) == (400, 400)
        del total
        assert live.live == 400  # the view keeps all of it
        product = view.contiguous() * 2
        assert (live.live, live.peak) == (400 + 80, 400 + 160)  # the copy of the view was freed
        del view
        assert live.live == 80
        del product
    assert (live.live, live.peak) == (0, 560)


def test_known_storages_are_not_counted_and_tracked_ones_are_until_they_are_freed() -> None:
    known, tracked = torch.rand(100), torch.rand(50)
    with no_collection():
        live = LiveStorages([known], tracked=[tracked, tracked[:10]])
        assert live.live == live.peak == 200
        with live:
            known.mul_(2)
            known[:10].add_(1)
            tracked.mul_(2)
            assert live.live == 200
            del tracked
            assert live.live == 0
            del known
            assert live.live == 0
        assert live.peak == 200


def test_a_step_by_hand() -> None:
    weight = torch.rand(30, 20, requires_grad=True)
    weight.grad = torch.rand(30, 20)
    inputs = torch.rand(5, 30)
    live = LiveStorages([weight, inputs], tracked=[weight.grad])
    with no_collection(), live:
        assert live.live == 2400
        weight.grad = None
        assert live.live == 0
        output = inputs @ weight
        assert live.live == 5 * 20 * FLOAT
        loss = output.sum()
        assert live.live == 400 + FLOAT
        loss.backward()
        # Output and loss are held here; the gradient of the sum (one expanded number) and of the loss were freed.
        assert live.live == 400 + FLOAT + 2400
        with torch.no_grad():
            weight -= 0.1 * weight.grad  # a temporary of the weight's size
        assert live.live == 400 + FLOAT + 2400
    assert live.peak == 400 + FLOAT + 2 * 2400


def test_a_storage_that_grows_is_counted_at_its_size() -> None:
    live = LiveStorages()
    with no_collection(), live:
        out = torch.empty(0)
        assert live.live == 0
        torch.add(torch.ones(25), 1, out=out)
        assert live.live == 100
        out.resize_(1000)
        assert live.live == live.peak == 4000
        del out
        assert live.live == 0


def test_what_dies_after_the_block_is_still_subtracted() -> None:
    live = LiveStorages()
    with no_collection():
        with live:
            kept = torch.ones(100)
        outside = torch.ones(100)
        assert live.live == 400
        del kept, outside
        assert live.live == 0


def test_sparse_gradients_do_not_disturb() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    live = LiveStorages(table.parameters())
    with no_collection(), live:
        table(torch.tensor([1, 1, 2])).sum().backward()
        gradient = table.weight.grad
        assert gradient is not None and gradient.is_sparse
        assert live.live == unique_bytes([gradient]) == 3 * 8 + 3 * 4 * FLOAT


def test_a_watcher_keeps_nothing_alive_and_goes_without_the_collector() -> None:
    with no_collection():
        known, tracked = torch.rand(10), torch.rand(10)
        storages = [weakref.ref(tensor.untyped_storage()) for tensor in (known, tracked)]
        live = LiveStorages([known], tracked=[tracked])
        with live:
            kept = known + tracked
        del known, tracked
        assert [storage() for storage in storages] == [None, None]
        watcher = weakref.ref(live)
        del live
        assert watcher() is None
        assert kept.numel() == 10


def test_live_storages_are_never_less_than_what_is_saved() -> None:
    network = mlp(7, 5, 4, 3, act=nn.GELU)
    inputs = torch.rand(6, 7)
    saved = SavedForBackward(tensors_of(network))
    live = LiveStorages(tensors_of(network), tracked=[inputs])
    with no_collection(), saved.watching(), live:
        loss = network(inputs).sum()
        assert live.live >= saved.live == 6 * (7 + 2 * 5 + 2 * 4) * FLOAT
        loss.backward()
        assert live.live == 6 * 7 * FLOAT + FLOAT + sum(p.numel() for p in network.parameters()) * FLOAT
