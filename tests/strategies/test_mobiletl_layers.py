"""MobileTL's layers against their formulas, what they keep for backward, and how they trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import make_divisible
from timm.layers.norm_act import BatchNormAct2d
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.memory.papers import mobiletl_block
from contlearn.memory.saved import SavedForBackward
from contlearn.strategies.mobiletl import prepare
from contlearn.strategies.mobiletl_layers import ExactReLU6, ShiftNorm, SignActivation, with_backward

KINDS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
EDGES = torch.tensor([-8.0, -3.0, -1e-30, -0.0, 0.0, 1e-30, 0.5, 3.0, 6.0, 7.0, float("inf")])


def saved(function: Any, x: Tensor, *, exclude: Iterator[Tensor] | tuple[Tensor, ...] = ()) -> int:
    """Bytes that are kept for backward after a forward pass."""
    watch = SavedForBackward(exclude)
    with watch.watching():
        out = function(x)
    assert out.requires_grad
    return watch.live


def filled(norm: nn.Module) -> nn.Module:
    """A norm with statistics, scale and offset that are not the initial ones."""
    generator = torch.Generator().manual_seed(1)
    for held in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        held.data.copy_(torch.rand(held.shape, generator=generator) + 0.2)
    norm.weight.data[0] *= -1
    return norm


# ---------------------------------------------------------------------- activations


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_keeps_its_bits_and_backward_is_the_gradient_where_the_input_is_not_negative(kind, inplace) -> None:
    a = torch.cat([EDGES, 3 * torch.randn(2000)])
    layer = with_backward(kind(inplace=inplace), "sign", name="act")
    leaf = a.clone().requires_grad_()
    out = layer(leaf * 1.0)
    assert torch.equal(out.view(torch.int32), kind()(a).view(torch.int32))
    gradient = torch.randn(len(a))
    gradient[8] = float("inf")
    (found,) = torch.autograd.grad(out, leaf, gradient)
    expected = torch.tensor([g if value >= 0 else 0.0 for g, value in zip(gradient.tolist(), a.tolist(), strict=True)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.Hardswish, nn.SiLU])
def test_finite_differences_disagree_with_the_approximation(kind) -> None:
    a = torch.tensor([-2.0, 0.7, 2.9, 6.5], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(with_backward(kind(), "sign", name="act")(a).sum(), a)
    with torch.no_grad():
        true = (kind()(a + 1e-6) - kind()(a - 1e-6)) / 2e-6
    assert found.tolist() == [0, 1, 1, 1]
    assert float((found - true).abs().max()) > 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [64, 63, 1, 8 * 49])
def test_a_mask_takes_a_bit_for_each_number(kind, count) -> None:
    a = torch.randn(count, requires_grad=True)
    assert saved(with_backward(kind(), "sign", name="act"), a, exclude=(a,)) == -(-count // 8)


def test_without_a_gradient_nothing_is_compared_or_kept() -> None:
    layer = SignActivation(nn.Hardswish(inplace=True))
    x = torch.randn(9)
    with torch.no_grad():
        assert layer(x) is x
    assert not layer(torch.randn(9)).requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_exact_relu6_has_pytorchs_gradient_in_a_bit_for_each_number(inplace) -> None:
    layer = with_backward(nn.ReLU6(inplace=inplace), "exact", name="act")
    assert isinstance(layer, ExactReLU6)
    a = torch.cat([EDGES, 4 * torch.randn(1013)]).requires_grad_()
    (found,) = torch.autograd.grad(layer(a * 1.0).sum(), a)
    (expected,) = torch.autograd.grad(F.relu6(a).sum(), a)
    assert torch.equal(found, expected)
    assert saved(layer, a.detach().requires_grad_() * 1.0) == 128
    assert saved(nn.ReLU6(inplace=inplace), a.detach().requires_grad_() * 1.0) == 4 * 1024


def test_exact_leaves_the_other_activations_as_they_are() -> None:
    for act in (nn.ReLU(inplace=True), nn.Hardswish(), nn.SiLU(), nn.Mish(), nn.Identity()):
        assert with_backward(act, "exact", name="act") is act


def test_an_activation_without_an_approximation_is_named() -> None:
    with pytest.raises(ContlearnError, match=r"'sign' is not defined for blocks\.3, a Mish; expected one of ReLU"):
        with_backward(nn.Mish(), "sign", name="blocks.3")


# ---------------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shift_norm_is_the_norm_in_evaluation_mode_of_which_the_offset_trains(dtype) -> None:
    norm = filled(nn.BatchNorm2d(5, eps=1e-3)).to(dtype)
    reference = copy.deepcopy(norm).eval()
    shift = ShiftNorm(norm).train()
    assert shift.state_dict().keys() == reference.state_dict().keys()
    shift.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in shift.state_dict().items()}
    x = torch.randn(3, 5, 4, 6, dtype=dtype, requires_grad=True)
    assert torch.equal(shift(x), reference(x))
    gradient = torch.randn(3, 5, 4, 6, dtype=dtype)
    dx, db = torch.autograd.grad(shift(x), [x, shift.bias], gradient)
    by_hand = gradient * (reference.weight / (reference.running_var + 1e-3).sqrt())[None, :, None, None]
    torch.testing.assert_close(dx, by_hand.detach())
    torch.testing.assert_close(db, gradient.sum((0, 2, 3)))
    expected = torch.autograd.grad(reference(x), [x, reference.bias], gradient)
    torch.testing.assert_close([dx, db], list(expected))
    assert all(torch.equal(tensor, before[name]) for name, tensor in shift.state_dict().items())


def test_a_shift_norm_keeps_nothing_for_backward() -> None:
    shift = ShiftNorm(filled(nn.BatchNorm2d(5)))
    x = torch.randn(2, 5, 8, 8, requires_grad=True)
    assert saved(shift, x, exclude=(*shift.parameters(), *shift.buffers())) == 0


def test_what_follows_a_fused_norm_follows_its_replacement() -> None:
    norm = filled(BatchNormAct2d(4, act_layer=nn.Hardswish)).eval()
    shift = ShiftNorm(norm, with_backward(norm.act, "sign", name="act"))
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(shift(x), norm(x)) and torch.equal(ShiftNorm(norm)(x), norm(x))


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (nn.GroupNorm(1, 4), "blocks.0 is a GroupNorm; expected a BatchNorm2d"),
        (nn.BatchNorm2d(4, affine=False), "blocks.0 lacks running statistics or scale and offset"),
        (nn.BatchNorm2d(4, track_running_stats=False), "blocks.0 lacks running statistics or scale and offset"),
    ],
)
def test_norms_that_cannot_be_shifted_are_refused(norm, said) -> None:
    with pytest.raises(ContlearnError, match=said):
        ShiftNorm(norm, name="blocks.0")


# ---------------------------------------------------------------------- a block


def block(kind: str, channels: int) -> InvertedResidual:
    """An inverted residual block of MobileNetV2 or V3, expansion 6."""
    if kind == "v2":
        return InvertedResidual(channels, channels, exp_ratio=6, act_layer=nn.ReLU6)
    rounded = partial(make_divisible, divisor=8)
    gate = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=rounded)
    return InvertedResidual(channels, channels, exp_ratio=6, act_layer=nn.Hardswish, se_layer=gate)


def prepared(made: nn.Module, backward: str = "sign") -> nn.Module:
    """The same block as MobileTL trains it."""
    for name in ("bn1", "bn2"):
        norm = made.get_submodule(name)
        shift = ShiftNorm(norm, with_backward(norm.act, backward, name=name), name=name)
        shift.weight.requires_grad_(False)
        setattr(made, name, shift)
    return made.train()


@pytest.mark.parametrize(("kind", "published"), [("v2", 2.16), ("v3", 3.10)])
@pytest.mark.parametrize(("channels", "side", "batch"), [(48, 28, 1), (96, 7, 8), (16, 10, 3)])
def test_a_block_keeps_what_the_papers_formula_says(kind, published, channels, side, batch) -> None:
    made = prepared(block(kind, channels))
    found = saved(made, torch.randn(batch, channels, side, side), exclude=(*made.parameters(), *made.buffers()))
    formula = mobiletl_block(channels, side, squeeze_excite=kind == "v3", batch_size=batch).total
    assert found == pytest.approx(formula, rel=0.01)
    # The formula of the published figure, without the vectors of squeeze-and-excite.
    inner, narrow = 6 * channels * side**2 * batch, channels * side**2 * batch
    figure = 4 * (2 * narrow + 2 * inner) + 2 * inner / 8 + 4 * inner * (kind == "v3")
    assert found == pytest.approx(figure, rel=0.05 if side < 20 else 0.01)
    if (channels, side) == (48, 28):
        assert found / 1e6 == pytest.approx(published, rel=0.01)


def test_a_block_in_plain_pytorch_keeps_at_least_the_published_amount_of_full_training() -> None:
    for kind, published in (("v2", 4.02), ("v3", 6.66)):
        made = block(kind, 48).train()
        found = saved(made, torch.randn(1, 48, 28, 28), exclude=(*made.parameters(), *made.buffers()))
        assert found / 1e6 > 0.99 * published


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_exact_gradients_of_a_block_are_autograds_with_the_same_statistics(kind) -> None:
    reference = block(kind, 8).double()
    for name in ("bn1", "bn2", "bn3"):
        filled(reference.get_submodule(name))
    made = prepared(copy.deepcopy(reference), "exact")
    reference.train()
    reference.bn1.eval(), reference.bn2.eval()
    x, gradient = (torch.randn(4, 8, 6, 6, dtype=torch.float64) for _ in range(2))
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(left).backward(gradient), reference(right).backward(gradient)
    torch.testing.assert_close(left.grad, right.grad)
    for name, parameter in reference.named_parameters():
        found = made.get_parameter(name).grad
        if name in ("bn1.weight", "bn2.weight"):
            assert found is None
        else:
            torch.testing.assert_close(found, parameter.grad)
    assert torch.equal(made.bn3.running_mean, reference.bn3.running_mean)


# ---------------------------------------------------------------------- tracing


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050"])
@pytest.mark.parametrize("backward", ["sign", "exact"])
def test_a_training_step_traces_to_portable_operators_that_compute_the_same(name, backward) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    spec: Any = SimpleNamespace(input_shape=(1, 32, 32), n_classes=3, task_labels=False)
    model = prepare(models.create(name, spec, seed=0, head="fixed"), blocks=1, activation_backward=backward)
    model.train()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}

    def gradients(x: Tensor, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(model(x), y), list(trained.values())))

    x, y = torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 2, 1])
    state = copy.deepcopy(model.state_dict())
    expected = gradients(x, y)
    model.load_state_dict(state)
    traced = make_fx(gradients)(x, y)
    pure = make_fx(torch.func.functionalize(traced))(x, y)  # in-place operators removed, as for an export
    for graph in (traced, pure):
        model.load_state_dict(state)
        torch.testing.assert_close(graph(x, y), expected)
        used = {str(node.target) for node in graph.graph.nodes if "aten" in str(node.target)}
        assert not any("view.dtype" in target or "shift" in target for target in used), used
        assert any(target.startswith("aten.ge") for target in used) == (backward == "sign")
    inplace = [target for target in used if target.split(".")[1] in ("hardtanh_", "hardswish_", "relu_", "silu_")]
    assert not inplace
