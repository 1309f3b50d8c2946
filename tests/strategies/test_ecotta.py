"""EcoTTA against plain autograd on the loss as it is written, its partitions, its filter, and its memory."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.memory import papers
from contlearn.memory.holdings import model_tensors, optimizer_tensors
from contlearn.memory.saved import LiveStorages
from contlearn.strategies import ecotta_gradients
from contlearn.strategies.adapter import entropy
from contlearn.strategies.ecotta import EcoTTA
from contlearn.strategies.ecotta_network import EcoTTANetwork
from contlearn.strategies.ecotta_partitions import conv_stride, cut, partition_sizes

LR, MOMENTUM, LAM, MARGIN = 0.01, 0.9, 0.5, 0.97


def host(name="resnet14", *, shape=(3, 16, 16), classes=5, **options):
    """A model whose BatchNorms have seen something, so that their statistics are not 0 and 1."""
    stream = SimpleNamespace(input_shape=shape, n_classes=classes, task_labels=False)
    model = models.create(name, stream, head="fixed", seed=0, **options)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def adapter(model=None, *, double=True, **options):
    """A started adapter whose meta parts are random; double precision for tight comparisons."""
    model = host() if model is None else model
    options = {"lr": LR, "momentum": MOMENTUM, "lam": LAM, "margin": MARGIN, "warmup_epochs": 0, **options}
    made = EcoTTA(model=model.double() if double else model, guard="off", device="cpu", **options)
    made.network.to(torch.float64 if double else torch.float32)
    return made.start()


def images(n=8, *, seed=0, shape=(3, 16, 16), dtype=torch.float64):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------- the loss as it is written


def literal_terms(network, x, *, batch):
    """Logits and R_1..R_K by PyTorch's own layers and autograd, with the detached pass written out."""
    backbone = network.backbone
    backbone.train(batch)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    blocks, counts = backbone.blocks, network.cut.blocks
    groups = [blocks[sum(counts[:k]) : sum(counts[: k + 1])] for k in range(len(counts))]

    def partition(k, x):
        u = x
        for block in groups[k]:
            u = block(u)
        part = network.meta[k]
        norm = [nn.functional.batch_norm(a, None, None, m.weight, m.bias, True) for a, m in (
            (u, part.norm), (part.conv(x), part.conv_norm))]  # fmt: skip
        return u, norm[0] + norm[1].relu()

    inside = backbone.stem(x)
    penalties = []
    detached = inside
    for k in range(len(groups)):
        inside = partition(k, inside)[1]
        u, out = partition(k, detached.detach())
        penalties.append((out - u.detach()).abs().mean())
        detached = out
    logits = network.head(backbone.tail(inside))
    backbone.eval()
    return logits, penalties


def literal_loss(network, x, *, batch, lam=LAM, margin=MARGIN, parts=("entropy", "penalty")):
    logits, penalties = literal_terms(network, x, batch=batch)
    h = entropy(logits)
    keep = h < margin * math.log(logits.shape[1])
    loss = h[keep].mean() if "entropy" in parts else 0.0
    return logits, loss + lam * sum(penalties) if "penalty" in parts else loss, int(keep.sum())


def meta_gradients(network, loss):
    found = torch.autograd.grad(loss, list(network.meta.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(network.meta.parameters(), found, strict=True)]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("statistics", ["batch", "source"])
def test_gradients_are_those_of_the_loss_as_it_is_written(statistics, packed, recompute):
    made = adapter(frozen_batchnorm=statistics, packed_relu=packed, recompute=recompute)
    network, x = made.network, images()
    logits, loss, kept = literal_loss(copy.deepcopy(network), x, batch=statistics == "batch")
    assert 0 < kept < len(x), "the filter must divide this batch"
    reference = copy.deepcopy(network)
    expected = meta_gradients(reference, literal_loss(reference, x, batch=statistics == "batch")[1])
    found = ecotta_gradients.loss_gradients(network, x, lam=LAM, margin=MARGIN, recompute=recompute)
    torch.testing.assert_close(found.logits, logits.detach())
    assert found.kept == kept
    assert found.loss == pytest.approx(loss.item())
    for ours, theirs in zip(network.meta.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-7, atol=1e-10)
    assert all(parameter.grad is None for parameter in [*network.backbone.parameters(), *network.head.parameters()])


def test_the_regulariser_of_a_partition_reaches_no_other():
    made = adapter()
    network, x = made.network, images()
    reference = copy.deepcopy(network)
    _, penalties = literal_terms(reference, x, batch=True)
    with torch.no_grad():
        bound = network.stem(x)
    for k in range(len(network.meta)):
        network.meta.zero_grad()
        nothing = torch.zeros_like(network.partition(k, bound))
        penalty, in_front = ecotta_gradients._backward(network, k, (bound,), nothing, LAM)
        assert k == 0 or not in_front.any()  # exactly zero, so nothing in front of it can move
        assert penalty == pytest.approx(LAM * float(penalties[k].detach()))
        expected = torch.autograd.grad(LAM * penalties[k], list(reference.meta[k].parameters()), retain_graph=True)
        for ours, theirs in zip(network.meta[k].parameters(), expected, strict=True):
            torch.testing.assert_close(ours.grad, theirs, rtol=1e-7, atol=1e-12)
        others = [p for j in range(len(network.meta)) if j != k for p in network.meta[j].parameters()]
        assert all(p.grad is None for p in others)
        bound = network.partition(k, bound).detach()


@pytest.mark.parametrize("update", ["single", "two_step"])
def test_three_batches_are_a_literal_loop(update):
    made = adapter(update=update)
    reference = copy.deepcopy(made.network)
    optimizer = torch.optim.SGD(reference.meta.parameters(), lr=LR, momentum=MOMENTUM)
    for seed in range(3):
        x = images(seed=seed)
        passes = [("entropy", "penalty")] if update == "single" else [("penalty",), ("entropy",)]
        for parts in passes:
            logits, loss, kept = literal_loss(reference, x, batch=True, parts=parts)
            assert kept
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(made(x), logits.detach())
        assert made.stepped == len(passes)
        for ours, theirs in zip(made.network.meta.parameters(), reference.meta.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_both_orders_differ():
    # Otherwise the loop above could not tell them apart.
    first, second = adapter(update="single"), adapter(update="two_step")
    assert not torch.allclose(first(images()), second(images()))


# ---------------------------------------------------------------------- what moves, and when


def all_state(made):
    return {name: tensor.clone() for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("update", ["single", "two_step"])
def test_without_a_sample_that_passes_nothing_moves(update, recompute):
    made = adapter(update=update, recompute=recompute)
    made(images(seed=1))
    before = all_state(made)
    made.margin = 0.0
    x = images(seed=2)
    expected = made.predict(x)
    torch.testing.assert_close(made(x), expected)
    after = all_state(made)
    assert before.keys() == after.keys()  # the momenta are among them
    assert any(name.startswith("optimizer.") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert math.isnan(made.last_loss) and made.stepped == made.kept == 0
    assert all(parameter.grad is None for parameter in made.model.parameters())
    # and the batch after it does not make up for it
    made.margin = MARGIN
    other = adapter(update=update, recompute=recompute)
    other(images(seed=1))
    assert torch.equal(made(images(seed=3)), other(images(seed=3)))


def test_only_meta_parts_and_their_statistics_move():
    made = adapter()
    before = all_state(made)
    made(images())
    after = made.state_dict()
    for name in before:
        assert torch.equal(before[name], after[name]) == (not name.startswith("model.meta.")), name


def test_running_statistics_follow_the_batch_once():
    made = adapter()
    part, x = made.network.parts[0], images()
    before = part.norm.running_mean.clone(), part.norm.running_var.clone()
    with torch.no_grad():
        u = made.network.frozen(0, made.network.stem(x))
    made(x)
    values = u.transpose(0, 1).flatten(1)
    torch.testing.assert_close(part.norm.running_mean, 0.9 * before[0] + 0.1 * values.mean(1))
    torch.testing.assert_close(part.norm.running_var, 0.9 * before[1] + 0.1 * values.var(1))
    assert int(part.norm.num_batches_tracked) == 1


def test_predicting_leaves_nothing_behind():
    made, other = adapter(), adapter()
    made.predict(images(seed=5))
    assert torch.equal(made(images()), other(images()))
    assert all(torch.equal(a, b) for a, b in zip(all_state(made).values(), all_state(other).values(), strict=True))


def test_no_steps_predict():
    made = adapter(steps=0)
    before = all_state(made)
    assert torch.equal(made(images()), made.predict(images()))
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"int8_frozen": True}, {"update": "two_step"}])
def test_a_stored_state_goes_on_as_if_nothing_had_happened(options):
    made = adapter(double=False, **options)
    for seed in range(2):
        made(images(seed=seed, dtype=torch.float32))
    stored = all_state(made)
    other = adapter(double=False, **options)
    other.load_state_dict(stored)
    for seed in range(2, 4):
        x = images(seed=seed, dtype=torch.float32)
        assert torch.equal(made(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(all_state(made).values(), all_state(other).values(), strict=True))


def test_reset_is_the_start():
    made = adapter()
    first = made(images())
    made(images(seed=1))
    made.reset()
    assert torch.equal(made(images()), first)


@pytest.mark.parametrize("name", ["resnet14", "slim_resnet18"])
@pytest.mark.parametrize("side", [16, 8])
def test_one_image_at_a_time(name, side):
    # At 8 pixels the last blocks of the deeper network have one value per channel.
    shape = (3, side, side)
    made = adapter(host(name, shape=shape), margin=2.0)
    for seed in range(2):
        assert bool(torch.isfinite(made(images(1, seed=seed, shape=shape))).all())
    assert made.stepped == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in made.state_dict().values())


def test_a_seed_decides_everything():
    runs = [adapter(double=False) for _ in range(2)]
    for made in runs:
        for seed in range(2):
            made(images(seed=seed, dtype=torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(*(all_state(made).values() for made in runs), strict=True))


def test_int8_weights_change_little_and_are_a_quarter():
    plain, small = adapter(double=False), adapter(double=False, int8_frozen=True)
    x = images(dtype=torch.float32)
    torch.testing.assert_close(small(x), plain(x), rtol=0.2, atol=0.1)
    sizes = [sum(t.numel() * t.element_size() for t in model_tensors(m.model.backbone)) for m in (plain, small)]
    assert sizes[1] < 0.3 * sizes[0]


# ---------------------------------------------------------------------- partitions


def test_the_rule_gives_the_papers_table():
    for name, blocks in (("wrn40_2", 18), ("wrn28_10", 12)):
        for k, counts in papers.ECOTTA_PARTITIONS[name].items():
            assert partition_sizes(blocks, k) == counts
    assert partition_sizes(16, 4) == (3, 3, 5, 5)
    assert partition_sizes(16, 5) == (2, 2, 4, 4, 4)


def test_any_valid_number_of_partitions_covers_all_blocks():
    for blocks in range(1, 40):
        for k in range(1, blocks + 1):
            counts = partition_sizes(blocks, k)
            assert (len(counts), sum(counts), min(counts) >= 1) == (k, blocks, True)


CASES = [
    ("resnet14", {}, (3, 16, 16), 6),
    ("wrn40_2", {"normalise_input": True}, (3, 16, 16), 18),
    ("slim_resnet18", {}, (1, 15, 21), 8),
    ("simple_cnn", {}, (3, 16, 16), 4),
    ("efficientnet_lite0", {}, (3, 64, 64), 16),
    ("resnet18", {}, (3, 64, 64), 8),
    ("mobilenetv3_small_050", {}, (3, 64, 64), 12),
    ("regnety_002", {}, (3, 64, 64), 13),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_without_meta_parts_it_is_the_source_network(case):
    name, options, shape, blocks = case
    model = host(name, shape=shape, **options).eval()
    x = images(2, shape=shape, dtype=torch.float32)
    expected = model.features(x)
    network = EcoTTANetwork(
        model, cut(model, 4), generator=torch.Generator(), batch_statistics=False, packed=True
    ).eval()
    assert sum(network.cut.blocks) == blocks
    torch.testing.assert_close(network.source_features(x), expected, rtol=1e-4, atol=1e-5)
    # Modules are shared, not copied, and the model itself still is the source model.
    assert network.backbone is model.backbone and torch.equal(model.features(x), expected)
    assert set(network.parameters()) >= set(model.parameters())
    # The meta parts fit: each adds its convolution to what the partition gives.
    with torch.no_grad():
        at = network.stem(x)
        for k, after in enumerate(network.cut.shapes[1:]):
            at = network.partition(k, at)
            assert at.shape[1:] == after
    # A partition consists of consecutive blocks and starts with the one the counts say.
    units = [unit for partition in network.cut.partitions for unit in partition]
    assert len(units) == len(set(units)) >= blocks


@pytest.mark.parametrize(
    ("inside", "outside", "stride"),
    [((16, 32, 32), (32, 16, 16), (2, 2)), ((3, 15, 21), (8, 8, 11), (2, 2)), ((3, 9, 9), (4, 3, 9), (3, 1)),
     ((3, 13, 1), (4, 4, 1), (4, 1))],
)  # fmt: skip
def test_the_convolution_steps_as_the_partition_does(inside, outside, stride):
    assert conv_stride(inside, outside) == stride
    conv = nn.Conv2d(inside[0], outside[0], 3, stride=stride, padding=1)
    assert conv(torch.zeros(1, *inside)).shape[1:] == outside


def test_partitions_that_downsample_have_a_strided_convolution():
    network = adapter(host("wrn40_2", shape=(3, 32, 32)), double=False).network
    assert [part.conv.stride for part in network.parts] == [(1, 1), (1, 1), (2, 2), (2, 2)]
    assert [(p.conv.in_channels, p.conv.out_channels) for p in network.parts] == [
        (16, 32), (32, 32), (32, 64), (64, 128),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (host, {"k": 0}, r"k: expected 1 to 6 partitions of the network's 6 blocks, got 0"),
        (host, {"k": 7}, r"k: expected 1 to 6 partitions"),
        (host, {"blocks_per_partition": [3, 4]}, r"add up to the network's 6 blocks, got \[3, 4\]"),
        (host, {"blocks_per_partition": [6, 0]}, "counts of at least 1"),
        (lambda: host("mlp"), {}, "expected a convolutional network that is a chain of blocks, got MLP"),
        (lambda: host("vit_tiny_patch16_224"), {}, "got VisionTransformer"),
        (lambda: nn.Conv2d(3, 3, 1), {}, "expected a model of contlearn.models"),
        (host, {"lam": -1.0}, "lam: expected at least 0"),
        (host, {"update": "both"}, "update: expected single or two_step, got 'both'"),
        (host, {"frozen_batchnorm": "train"}, "frozen_batchnorm: expected batch or source"),
        (host, {"warmup": "meta.pt"}, "warmup: expected a .safetensors file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, options, message):
    with pytest.raises(ContlearnError, match=message) as caught:
        EcoTTA(model=make(), device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_explicit_counts_override_k():
    assert adapter(k=4, blocks_per_partition=[1, 5]).cut.blocks == (1, 5)


# ---------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("name", "k", "meta", "megabytes"),
    [("wrn40_2", 4, 107_008, 79.6), ("wrn40_2", 5, 144_128, 92.3),
     ("wrn28_10", 4, 2_562_560, 404.9), ("wrn28_10", 5, 3_485_440, 471.6)],
)  # fmt: skip
def test_the_papers_memory_from_this_network(name, k, meta, megabytes):
    model = host(name, shape=(3, 32, 32), classes=10)
    network = EcoTTANetwork(model, cut(model, k), generator=torch.Generator(), batch_statistics=True, packed=True)
    assert sum(parameter.numel() for parameter in network.meta.parameters()) == meta
    account = papers.tinytl(network, (3, 32, 32), batch_size=64, trainable=network.meta.parameters())
    assert account.stored / papers.MB == pytest.approx(megabytes, abs=0.1)
    assert account.stored == papers.ecotta(name, k).stored
    assert account.profiler_peak == papers.ecotta(name, k).profiler_peak


def peak(step, model, optimizer):
    """Bytes live at the worst moment of a step, weights and optimizer state included."""
    step()  # momenta
    live = LiveStorages(tracked=[*model_tensors(model), *optimizer_tensors(optimizer)])
    with live:
        step()
    return live.peak


def test_the_step_lives_on_a_third_of_what_full_back_propagation_takes():
    shape, x = (3, 16, 16), images(32, shape=(3, 16, 16), dtype=torch.float32)

    def plain(trains):
        model = host("wrn40_2", shape=shape).train()
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(trains == "all" or isinstance(module, nn.BatchNorm2d))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])

        def step():
            optimizer.zero_grad()
            entropy(model(x)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return peak(step, model, optimizer)

    def ours(**options):
        made = adapter(host("wrn40_2", shape=shape), double=False, margin=2.0, **options)
        return peak(lambda: made(x), made.model, made.optimizer)

    tent, full, batch = plain("norms"), plain("all"), ours()
    assert batch < 0.6 * tent and batch < 0.35 * full
    source = ours(frozen_batchnorm="source")
    assert ours(frozen_batchnorm="source", int8_frozen=True) < source < batch < ours(recompute=False)
    assert ours(recompute=False) < ours(recompute=False, packed_relu=False)
