"""Mesa: results keep their bits, what is saved is a quarter, gradients are close and right on average."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from avalanche.training.supervised import Naive as AvalancheNaive
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from contlearn import models, scenarios
from contlearn.errors import ContlearnError
from contlearn.memory.account import MemoryAccount
from contlearn.memory.saved import SavedForBackward
from contlearn.state import Decoder, Encoder, Samples
from contlearn.strategies.compressed_copies import Compressor, restore
from contlearn.strategies.mesa import MesaPlugin
from contlearn.strategies.naive import Naive
from contlearn.strategies.replay import Replay


def operations(**options: Any) -> Any:
    plugin = MesaPlugin(**options)
    plugin.generator.manual_seed(0)
    return plugin.operations


def compressor(**options: Any) -> Compressor:
    found: Compressor = operations(**options).compressor
    return found


def measured(function: Callable[..., Tensor], inputs: list[Tensor], block: Any = None) -> tuple[Tensor, int, list[Any]]:
    """Output, bytes saved beside the parameters, and gradients under a fixed random cotangent."""
    fresh = [x if isinstance(x, nn.Parameter) else x.detach().clone() for x in inputs]
    inputs = [copy.requires_grad_(x.requires_grad) for copy, x in zip(fresh, inputs, strict=True)]
    saved = SavedForBackward([x for x in inputs if isinstance(x, nn.Parameter)])
    with saved.watching():
        if block is None:
            out = function(*inputs)
        else:
            with block:
                out = function(*inputs)
        live = saved.live
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    return out.detach(), live, list(torch.autograd.grad(out, wanted, cotangent))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


def given(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


STATISTICS = torch.zeros(16), torch.ones(16)
MAPS, TOKENS, HEADS = (4, 16, 12, 12), (8, 50, 64), (4, 4, 32, 16)
# Function, inputs, which gradients (by place) must be exact, largest relative error of the others, share of the bytes.
CASES: dict[str, Any] = {
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), lambda: [given(*MAPS), weight(8, 16, 3, 3), weight(8)],
               (0, 2), 0.02, 0.26),
    "strided grouped conv2d": (lambda x, w: F.conv2d(x, w, None, 2, (1, 2), 1, 4),
                               lambda: [given(*MAPS), weight(8, 4, 3, 5)], (0,), 0.02, 0.26),
    "depthwise conv2d": (lambda x, w: F.conv2d(x, w, None, 1, 2, 2, 16), lambda: [given(*MAPS), weight(16, 1, 3, 3)],
                         (0,), 0.02, 0.26),
    "frozen conv2d": (lambda x, w: F.conv2d(x, w), lambda: [given(*MAPS), weight(8, 16, 3, 3).requires_grad_(False)],
                      (0,), 0.0, 0.0),
    "linear": (F.linear, lambda: [given(*TOKENS), weight(32, 64), weight(32)], (0, 2), 0.02, 0.26),
    "linear of vectors": (F.linear, lambda: [given(64, 64), weight(32, 64), weight(32)], (0, 2), 0.02, 0.27),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, *STATISTICS, w, b, True),
                   lambda: [given(*MAPS), weight(16), weight(16)], (2,), 0.02, 0.28),
    "batch_norm of vectors": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
                              lambda: [given(128, 16), weight(16), weight(16)], (2,), 0.02, 0.35),
    "batch_norm in evaluation mode": (lambda x, w, b: F.batch_norm(x, *STATISTICS, w, b),
                                      lambda: [given(*MAPS), weight(16), weight(16)], (0, 2), 0.02, 0.28),
    "frozen batch_norm": (lambda x: F.batch_norm(x, *STATISTICS), lambda: [given(*MAPS)], (0,), 0.0, 0.01),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (64,), w, b), lambda: [given(*TOKENS), weight(64), weight(64)],
                   (2,), 0.02, 0.30),
    "group_norm": (lambda x, w, b: F.group_norm(x, 4, w, b), lambda: [given(*MAPS), weight(16), weight(16)],
                   (2,), 0.02, 0.27),
    "relu": (F.relu, lambda: [given(*MAPS)], (0,), 0.0, 1 / 32),
    "relu_": (lambda x: torch.relu_(x * 1), lambda: [given(*MAPS)], (0,), 0.0, 1 / 32),
    "relu6": (lambda x: F.relu6(x * 4), lambda: [given(*MAPS)], (0,), 0.0, 1 / 32),
    "hardtanh": (F.hardtanh, lambda: [given(*MAPS)], (0,), 0.0, 1 / 32),
    "gelu": (F.gelu, lambda: [given(*TOKENS)], (), 0.02, 0.26),
    "tanh gelu": (lambda x: F.gelu(x, approximate="tanh"), lambda: [given(*MAPS)], (), 0.02, 0.26),
    "silu": (F.silu, lambda: [given(*MAPS)], (), 0.02, 0.26),
    "silu in place": (lambda x: F.silu(x * 1, inplace=True), lambda: [given(*MAPS)], (), 0.02, 0.26),
    "hardswish": (F.hardswish, lambda: [given(*MAPS)], (), 0.02, 0.26),
    "hardswish in place": (lambda x: F.hardswish(x * 1, True), lambda: [given(*MAPS)], (), 0.02, 0.26),
    "softmax": (lambda x: F.softmax(x, dim=-1), lambda: [given(*HEADS)], (), 0.02, 0.26),
    "softmax method": (lambda x: x.softmax(1), lambda: [given(64, 32)], (), 0.02, 0.27),
    "matmul": (lambda q, k: q @ k.transpose(-2, -1), lambda: [given(*HEADS), given(*HEADS)], (), 0.02, 0.26),
    "matmul with a weight": (torch.matmul, lambda: [given(*HEADS), weight(16, 8)], (0,), 0.02, 0.26),
    "broadcast matmul": (torch.matmul, lambda: [given(4, 1, 32, 16), given(3, 16, 32)], (), 0.02, 0.27),
    "bmm": (torch.bmm, lambda: [given(8, 20, 16), given(8, 16, 30)], (), 0.02, 0.27),
    "product": (lambda x, gate: x * gate, lambda: [given(*MAPS), given(4, 16, 1, 1)], (0,), 0.02, 0.30),
    "product of two maps": (torch.mul, lambda: [given(*MAPS), given(*MAPS)], (), 0.02, 0.26),
    "attention": (F.scaled_dot_product_attention, lambda: [given(*HEADS) for _ in range(3)], (), 0.03, 0.26),
    "causal attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2),
                         lambda: [given(*HEADS) for _ in range(3)], (), 0.03, 0.26),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), lambda: [given(*MAPS)], (0,), 0.0, 1 / 16),
    "overlapping max_pool2d": (lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), 2, ceil_mode=True),
                               lambda: [given(4, 16, 13, 11)], (0,), 0.0, 0.2),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), lambda: [given(4, 16, 13, 11)], (0,), 0.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_layer_keeps_its_bits_saves_a_quarter_and_has_close_gradients(name) -> None:
    function, make, exact_ones, bound, share = CASES[name]
    inputs = make()
    exact_out, exact_bytes, exact = measured(function, inputs)
    out, saved, found = measured(function, inputs, operations())
    assert torch.equal(out, exact_out)
    floats = sum(4 * x.numel() for x in inputs if not isinstance(x, nn.Parameter))
    # Attention saves more than its inputs; ReLU its output, which is as large as its input.
    assert saved <= share * (exact_bytes if name not in ("relu_", "relu6", "silu in place") else floats)
    for place, (left, right) in enumerate(zip(found, exact, strict=True)):
        if place in exact_ones:
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        else:
            assert 0 < error(left, right) < bound


@pytest.mark.parametrize("name", ["conv2d", "gelu", "batch_norm", "group_norm", "attention", "max_pool2d"])
def test_other_memory_layouts(name) -> None:
    function, make, *_ = CASES[name]
    inputs = [x.detach().transpose(-2, -1).contiguous().transpose(-2, -1).requires_grad_() if x.ndim == 4
              and not isinstance(x, nn.Parameter) else x for x in make()]  # fmt: skip
    exact_out, _, exact = measured(function, inputs)
    out, _, found = measured(function, inputs, operations())
    assert torch.equal(out, exact_out)
    assert all(error(left, right) < 0.03 for left, right in zip(found, exact, strict=True))


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize(("rounding", "steps"), [("stochastic", 1.0), ("nearest", 0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_copy_is_off_by_at_most_a_step_of_its_groups_range(rounding, steps, dtype) -> None:
    scale = 10.0 ** torch.arange(-3, 5).repeat_interleave(2)
    x = (torch.randn(4, 16, 9, 9) * scale.view(16, 1, 1) + 3).to(dtype)
    tensors, form = compressor(rounding=rounding).keep(x, 1, None, "")
    codes, ranges = tensors
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and ranges.shape == (2, 8)
    copy = restore(tensors, form, torch.float64)
    groups = x.double().view(4, 8, 2, 9, 9).transpose(0, 1).flatten(1)
    step = (groups.amax(1) - groups.amin(1)) / 255
    off = (copy - x).view(4, 8, 2, 9, 9).transpose(0, 1).flatten(1).abs().amax(1)
    assert (off <= steps * step * 1.001 + 1e-6 * groups.abs().amax(1)).all()
    assert (off > 0.4 * step).all() or dtype == torch.bfloat16  # whose own steps may be wider


def test_extreme_ranges_stay_finite() -> None:
    for values in (torch.zeros(2048), torch.full((2048,), 7.0), torch.rand(2048) * 1e-42, torch.randn(2048) * 1e37):
        tensors, form = compressor().keep(values.view(32, 64), 1, None, "")
        copy = restore(tensors, form, torch.float32)
        torch.testing.assert_close(copy, values.view(32, 64), rtol=0, atol=float(values.abs().max()) / 100 + 1e-40)
    broken = torch.randn(32, 64)
    broken[0, 0] = torch.nan
    tensors, form = compressor().keep(broken, 1, None, "")
    assert restore(tensors, form, torch.float32).isnan().any()  # a run that diverges is seen to


def test_groups_divide_the_channels_and_heads_have_their_own() -> None:
    for size, groups in ((12, 6), (8, 4), (7, 1), (13, 1)):
        (_, ranges), _ = compressor(groups=6).keep(torch.randn(300, size), 1, None, "")
        assert ranges.shape == (2, groups)
    scale = torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    q, k = ((torch.randn(2, 3, 32, 16) * scale).requires_grad_() for _ in range(2))
    exact = measured(lambda a, b: a @ b.transpose(-2, -1), [q, k])[2]
    found = measured(lambda a, b: a @ b.transpose(-2, -1), [q, k], operations(groups=1))[2]
    for head in range(3):
        assert error(found[0][:, head], exact[0][:, head]) < 0.02


def gradients(rounding: str, draws: int) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    inputs = [given(64, 64), weight(8, 64)]
    block = operations(rounding=rounding)
    exact = measured(F.linear, inputs)[2][1]
    return exact, [measured(F.linear, inputs, block)[2][1] for _ in range(draws)]


def test_the_weights_gradient_is_right_on_average_with_stochastic_rounding_alone() -> None:
    exact, found = gradients("stochastic", 400)
    one = sum(error(each, exact) for each in found[:20]) / 20
    mean = error(torch.stack(found).mean(0), exact)
    assert one / 20 * 0.8 < mean < one / 20 * 1.25  # falls as 1 / sqrt(400)
    exact, found = gradients("nearest", 2)
    assert torch.equal(found[0], found[1]) and error(found[0], exact) > 4 * mean


def test_what_several_layers_save_is_copied_once() -> None:
    first, second = weight(8, 16, 3, 3), weight(8, 16, 1, 1)
    x = given(4, 16, 12, 12)
    block = operations()

    def both(x: Tensor, changed: bool = False) -> Tensor:
        x = x * 1
        left = F.conv2d(x, first)
        if changed:
            x.add_(1)
        return left.sum() + F.conv2d(x, second).sum()

    def bytes_of(function: Callable[..., Any]) -> int:
        saved = SavedForBackward([first, second])
        with saved.watching(), block:
            out = function(x)
            out.sum().backward()
        return saved.peak

    one = x.numel() + 2 * 8 * 4
    assert bytes_of(both) == one
    assert bytes_of(lambda x: both(x, changed=True)) == 2 * one
    # A view of the same numbers, such as tokens as rows, is the same copy.
    flat = weight(4, 12)
    rows = bytes_of(lambda x: F.linear(x, flat).sum() + F.linear(x.view(-1, 12), flat).sum())
    assert rows == x.numel() + 2 * 6 * 4 + flat.numel() * 4
    assert not block.compressor._copies


def test_a_copy_that_is_gone_is_not_shared_with_what_takes_its_place() -> None:
    block, w = operations(), weight(4, 64)
    with block:
        for value in range(20):
            x = torch.full((64, 64), float(value))
            out = F.linear(x, w)
            (found,) = torch.autograd.grad(out.sum(), w)
            assert torch.equal(found, torch.full((4, 64), 64.0 * value))
            del out
        kept = []
        for value in range(5):
            x = torch.full((64, 64), float(value))
            kept.append(F.linear(x, w))
            del x  # the copy lives on, and the memory of x may go to the next
    for value, out in enumerate(kept):
        assert torch.equal(torch.autograd.grad(out.sum(), w)[0], torch.full((4, 64), 64.0 * value))


def test_what_is_left_alone() -> None:
    def same(function: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> bool:
        left, right = measured(function, inputs), measured(function, inputs, operations(**options))
        return left[1] == right[1] and all(map(torch.equal, left[2], right[2]))

    assert same(F.linear, [given(8, 64), weight(32, 64)])  # 512 numbers
    assert not same(F.linear, [given(8, 64), weight(32, 64)], min_elements=512)
    large = weight(64, 64)
    assert same(lambda x, w: x @ w + (w.t() * w).sum(), [given(4, 64), large])  # weights, and views of them
    mask = torch.rand(64, 64) > 0.5
    assert same(lambda x: x * mask, [given(64, 64)]) and same(lambda x: x * 2, [given(64, 64)])
    assert same(lambda x, w: x.expand(64, 64) * w.expand(64, 64), [given(1), given(1, 1)])
    assert same(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=1e-9), [given(*HEADS)])
    with operations(), torch.no_grad():
        assert F.relu(given(64, 64)).grad_fn is None
    x, w = torch.randn(64, 64), torch.randn(32, 64)
    with operations():
        found = torch.func.grad(lambda w: F.linear(x, w).relu().square().sum())(w)
        assert torch.equal(torch.mul(x, 2 * x, out=torch.empty(0)), 2 * x * x)
    torch.testing.assert_close(found, torch.func.grad(lambda w: F.linear(x, w).relu().square().sum())(w))


def test_attention_with_masks() -> None:
    for mask in (torch.randn(32, 32), torch.rand(32, 32) > 0.3):
        inputs = [given(*HEADS) for _ in range(3)]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        exact, found = measured(attend, inputs), measured(attend, inputs, operations())
        assert torch.equal(exact[0], found[0])
        assert all(error(left, right) < 0.03 for left, right in zip(found[2], exact[2], strict=True))


def test_backward_inside_the_block_is_the_same() -> None:
    inputs = [given(*HEADS) for _ in range(3)]
    grown = []
    for inside in (False, True):
        block = operations()
        with block:
            out = F.scaled_dot_product_attention(*inputs)
            found = torch.autograd.grad(out.sum(), inputs) if inside else None
        grown.append(found or torch.autograd.grad(out.sum(), inputs))
    assert all(map(torch.equal, *grown))


def test_other_modes_inside_and_outside_still_see_their_calls() -> None:
    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += func is F.relu
            return func(*args, **(kwargs or {}))

    outer, inner, x = Seen(), Seen(), given(64, 64)
    saved = SavedForBackward([])
    with saved.watching(), outer, operations(), inner:
        out = F.relu(x)
    assert (inner.count, outer.count) == (1, 0) and saved.live == 64 * 64 // 8 and out.shape == x.shape


@pytest.mark.parametrize(
    "name", ["conv2d", "linear", "batch_norm", "layer_norm", "group_norm", "gelu", "matmul", "attention"]
)
def test_mixed_precision(name) -> None:
    function, make, *_ = CASES[name]

    def mixed(*inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs)

    inputs = make()
    exact_out, _, exact = measured(mixed, inputs)
    out, _, found = measured(mixed, inputs, operations())
    assert torch.equal(out, exact_out) and out.dtype == exact_out.dtype
    for left, right in zip(found, exact, strict=True):
        assert left.dtype == right.dtype and error(left, right) < 0.04


# ---------------------------------------------------------------- networks


def passed(model: nn.Module, x: Tensor, block: Any = None) -> tuple[Tensor, int, Tensor]:
    """Logits, bytes saved, and all gradients in one vector."""
    saved = SavedForBackward([*model.parameters(), *model.buffers()])
    with saved.watching():
        if block is None:
            out = model(x)
        else:
            with block:
                out = model(x)
        live = saved.live
        model.zero_grad()
        F.cross_entropy(out, torch.arange(len(x))).backward()
    return out.detach(), live, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("resnet10t", {}, 32),
        ("mobilenetv3_small_050", {"drop_rate": 0.0}, 64),
        ("efficientnet_lite0", {"drop_rate": 0.0}, 64),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 3}, 32),
        ("convnext_atto", {}, 32),
    ],
)
def test_networks_of_timm(name, options, side) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(4, 3, side, side)
    exact_out, exact_bytes, exact = passed(model, x)
    after = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    out, saved, found = passed(model, x, operations(min_elements=64))
    assert torch.equal(out, exact_out)
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())  # running statistics
    assert saved < 0.29 * exact_bytes
    assert error(found, exact) < 0.1


@pytest.mark.parametrize("ranges", ["batch", "ema"])
def test_two_forwards_before_a_backward_keep_their_own_ranges(ranges) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64))
    near, far = torch.randn(32, 64), 50 * torch.randn(32, 64) + 20

    def of(order: str) -> list[Tensor]:
        block = operations(ranges=ranges)
        with block.over(model):
            if order == "apart":
                return [*torch.autograd.grad(model(near).square().sum(), model.parameters()),
                        *torch.autograd.grad(model(far).square().sum(), model.parameters())]  # fmt: skip
            outs = [model(near), model(far)]
            return [g for out in outs for g in torch.autograd.grad(out.square().sum(), model.parameters())]

    assert all(map(torch.equal, of("apart"), of("together")))


def test_a_shift_is_clipped_by_averaged_ranges_and_not_by_the_batchs_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    errors = {}
    for ranges in ("batch", "ema"):
        block = operations(ranges=ranges)
        with block.over(model):
            for scale in (*[1.0] * 10, 10.0):  # ten steps of one experience, and the first of the next
                x = scale * torch.randn(64, 64)
                (found,) = torch.autograd.grad(model(x).sum(), model.parameters())
                errors[ranges, scale] = error(found, x.sum(0).expand(8, 64))
    assert errors["batch", 10.0] < 0.02 and errors["batch", 1.0] < 0.02 and errors["ema", 1.0] < 0.05
    assert errors["ema", 10.0] > 0.2
    ((place, held),) = block.compressor.averages.items()
    assert place.startswith("0:") and held.shape == (2, 8)


def test_the_average_is_the_papers() -> None:
    plain = compressor(ranges="ema", groups=1, decay=0.9)
    low = extent = None
    for scale in (1.0, 3.0, 0.5):
        x = scale * torch.randn(64, 64)
        one, span = float(x.min()), float(x.max() - x.min())
        low, extent = (one, span) if low is None else (0.9 * low + 0.1 * one, 0.9 * extent + 0.1 * span)
        tensors, _ = plain.keep(x, 1, None, "here")
        assert tensors[1].flatten().tolist() == pytest.approx([low, extent], rel=1e-5)


# ---------------------------------------------------------------- the plug-in


def images(made_up: Any, **options: Any) -> Any:
    return scenarios.class_incremental(made_up(side=8, **options), n_experiences=2)


def strategy_of(stream: Any, plugin: MesaPlugin | None, *more: Any, kind: Any = Naive, **options: Any) -> Any:
    model = models.create("resnet14", stream, seed=0)
    plugins = [*more, *([] if plugin is None else [plugin])]
    made = kind(model=model, plugins=plugins, lr=0.05, batch_size=9, device="cpu", **options)
    made.generator.manual_seed(3)
    return made


@pytest.mark.parametrize("kind", [Naive, Replay])
def test_the_account_shows_a_quarter_of_the_activations(made_up, kind) -> None:
    stream, activations = images(made_up), []
    for plugin in (None, MesaPlugin(min_elements=64)):
        account = MemoryAccount()
        strategy = strategy_of(stream, plugin, account, kind=kind)
        for experience in stream.train_stream:
            strategy.train(experience, eval_streams=[])
            account.close_experience(strategy)
        activations.append([report.activations for report in account.reports])
        assert not any("Mesa" in name or "ranges" in name for name in account.reports[-1].method_state)
    assert all(packed < 0.28 * plain for plain, packed in zip(*activations, strict=True))


def test_it_works_in_avalanches_own_strategy(stream, small, quiet) -> None:
    model = small(stream)
    before = model.backbone.layers[0][0].weight.detach().clone()
    seen: list[str] = []
    model.register_forward_hook(lambda m, i, out: seen.append(out.grad_fn.name() if out.grad_fn else ""))
    strategy = AvalancheNaive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), evaluator=quiet(), train_mb_size=8,
        plugins=[MesaPlugin(min_elements=1)],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy.train(stream.train_stream[0], num_workers=0)
    assert "Compressed" in seen[0]
    assert not torch.equal(before, model.backbone.layers[0][0].weight)


def test_it_ends_with_the_experience_whatever_ends_it(stream, small, watch) -> None:
    def fail(strategy: Any) -> None:
        raise RuntimeError("stop")

    for hooks in ({}, {"after_forward": fail}):
        plugin, model = MesaPlugin(min_elements=1, ranges="ema"), small(stream)
        strategy = Naive(model=model, plugins=[plugin, watch(**hooks)], batch_size=8, device="cpu")
        try:
            strategy.train(stream.train_stream[0], eval_streams=[])
        except RuntimeError as raised:
            assert hooks and str(raised) == "stop"
        else:
            assert not hooks
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        x = given(64, 64)
        assert "Relu" in F.relu(x).grad_fn.name() and "_train_exp" not in vars(strategy)


def weights_after(stream: Any, seed: int, watch: Any, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)  # for the rows of the head
    seeding = watch(before_training_exp=lambda strategy: torch.manual_seed(seed))
    strategy = strategy_of(stream, MesaPlugin(min_elements=64, **options), seeding)
    strategy.train(stream.train_stream[0], eval_streams=[])
    return [p.detach() for p in strategy.model.parameters()]


def test_a_seed_gives_the_same_run_and_another_one_other_roundings(made_up, watch) -> None:
    stream = images(made_up)
    first = weights_after(stream, 1, watch)
    assert all(map(torch.equal, first, weights_after(stream, 1, watch)))
    assert not all(map(torch.equal, first, weights_after(stream, 2, watch)))
    assert all(map(torch.equal, weights_after(stream, 1, watch, rounding="nearest"),
                   weights_after(stream, 2, watch, rounding="nearest")))  # fmt: skip


@pytest.mark.parametrize("ranges", ["batch", "ema"])
def test_a_stored_run_goes_on_with_the_same_bits(made_up, ranges) -> None:
    stream = images(made_up)

    def fresh() -> Any:
        return strategy_of(stream, MesaPlugin(min_elements=64, ranges=ranges))

    strategy = fresh()
    strategy.train(stream.train_stream[0], eval_streams=[])
    encoder = Encoder(strategy, Samples(stream))
    state, tensors = json.loads(json.dumps(encoder.strategy_state())), load(save(encoder.tensors))
    torch.manual_seed(99)
    again = fresh()
    Decoder(again, Samples(stream), tensors).strategy_state(state, experiences_done=[stream.train_stream[0]])
    for one in (strategy, again):
        torch.manual_seed(5)
        one.train(stream.train_stream[1], eval_streams=[])
    left, right = strategy.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)
    plugins = [one.plugins[0] for one in (strategy, again)]
    assert plugins[0].averages.keys() == plugins[1].averages.keys() and bool(plugins[0].averages) == (ranges == "ema")
    assert all(torch.equal(value, plugins[1].averages[key]) for key, value in plugins[0].averages.items())


def test_it_learns_as_well(stream, small) -> None:
    losses = []
    for plugins in ([], [MesaPlugin(min_elements=1)]):
        torch.manual_seed(0)
        strategy = Naive(model=small(stream, hidden=32), plugins=plugins, lr=0.1, epochs=60, batch_size=8, device="cpu")
        strategy.generator.manual_seed(0)
        strategy.train(stream.train_stream[0], eval_streams=[])
        losses.append(strategy.epoch_losses)
    assert losses[1][-1] < 0.3 * losses[1][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": 0}, "groups: expected at least 1, got 0"),
        ({"min_elements": 0}, "min_elements: expected at least 1, got 0"),
        ({"rounding": "up"}, "rounding: expected stochastic or nearest, got 'up'"),
        ({"ranges": "running"}, "ranges: expected batch or ema, got 'running'"),
        ({"decay": 1.0}, "decay: expected at least 0 and below 1, got 1.0"),
    ],
)
def test_mistakes_get_one_line(options, said) -> None:
    with pytest.raises(ContlearnError) as caught:
        MesaPlugin(**options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
