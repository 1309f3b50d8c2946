"""MobileTL on whole networks: what trains, what stays, what is computed and kept, and the mistakes one can make."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.memory.saved import SavedForBackward
from contlearn.strategies.inverted_residual import SplitBackbone
from contlearn.strategies.mobiletl import MobileTLPlugin, prepare
from contlearn.strategies.mobiletl_layers import ShiftNorm, SignActivation
from contlearn.strategies.packed import Int8Conv2d

GREY: Any = SimpleNamespace(input_shape=(1, 32, 32), n_classes=4, task_labels=False)
FAMILIES = {
    "efficientnet_lite0": ("blocks.5.3", "blocks.6.0"),
    "mobilenetv2_035": ("blocks.5.2", "blocks.6.0"),
    "mobilenetv3_small_050": ("blocks.4.1", "blocks.4.2"),
    "efficientnet_b0": ("blocks.5.3", "blocks.6.0"),
    "mnasnet_050": ("blocks.5.3", "blocks.6.0"),
    "spnasnet_100": ("blocks.5.3", "blocks.6.0"),
    "test_efficientnet": ("blocks.3.0", "blocks.4.0"),
}


def made(name: str = "mobilenetv2_035", **options: Any) -> Any:
    """A network with norm statistics, scales and offsets that are not the initial ones."""
    model = models.create(name, GREY, seed=0, head="fixed", **options)
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for held in (module.weight, module.bias, module.running_mean, module.running_var):
                held.data.add_(0.3 * torch.rand(held.shape, generator=generator))
    return model


def images(count: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))


def one_step(model: nn.Module, x: Tensor, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
    F.cross_entropy(model(x), torch.arange(len(x)) % 4).backward()
    optimizer.step()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prepared_network_computes_the_same_and_keeps_every_name(name) -> None:
    model = made(name).eval()
    x = images(2)
    with torch.no_grad():
        before = model(x)
    tensors = {key: id(tensor) for key, tensor in model.state_dict(keep_vars=True).items()}
    assert prepare(model, blocks=2) is model
    assert {key: id(tensor) for key, tensor in model.state_dict(keep_vars=True).items()} == tensors
    with torch.no_grad():
        assert torch.equal(model(x), before)
    assert model.backbone.split.blocks == FAMILIES[name]
    assert model.backbone.feature_dim == model.feature_dim
    for path in model.backbone.split.blocks:
        block = model.backbone.get_submodule(path)
        assert isinstance(block.bn1, ShiftNorm) and isinstance(block.bn1.act, SignActivation)
        assert not any(isinstance(module, ShiftNorm) for module in model.backbone.get_submodule("blocks.0").modules())


@pytest.mark.parametrize("name", ["mobilenetv2_035", "mobilenetv3_small_050"])
@pytest.mark.parametrize("head_layers", ["train", "frozen"])
def test_a_step_moves_exactly_what_the_method_trains(name, head_layers) -> None:
    model = prepare(made(name), blocks=2, head_layers=head_layers)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    backbone = model.train().backbone
    one_step(model, images())
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    above = () if head_layers == "frozen" else ("conv_head", "bn2", *(n for n in backbone.split.head if "." in n))
    expected = {f"head.{leaf}" for leaf in ("weight", "bias")}
    for key in before:
        path = key.removeprefix("backbone.")
        if not any(path.startswith(f"{unit}.") for unit in (*backbone.split.blocks, *above)):
            continue
        owner = backbone.get_submodule(path.rpartition(".")[0])
        if not isinstance(owner, ShiftNorm) or path.endswith(".bias"):
            expected.add(key)
    assert moved == expected
    assert sum(isinstance(m, ShiftNorm) for m in backbone.modules()) >= 4  # scale and statistics of these did not move


def test_below_the_first_trained_block_nothing_is_computed_or_kept_for_backward() -> None:
    model = prepare(made(), blocks=1).train()
    x = images().requires_grad_()
    watch = SavedForBackward((*model.parameters(), *model.buffers()))
    with watch.watching():
        z = model.backbone.trunk(x)
        assert (watch.live, z.requires_grad) == (0, False)
        features = model.backbone.tail(z)
    first = model.backbone.get_submodule("blocks.6.0").conv_pw
    assert watch.live >= z.numel() * 4 and first.weight.requires_grad
    features.sum().backward()
    assert x.grad is None
    below = [p for path in model.backbone.split.trunk for p in model.backbone.get_submodule(path).parameters()]
    assert len(below) > 100 and all(parameter.grad is None for parameter in below)


def test_the_whole_network_keeps_far_less_than_full_training() -> None:
    kept = {}
    for blocks in (None, 1, 3, 5):
        model = made().train() if blocks is None else prepare(made(), blocks=blocks).train()
        watch = SavedForBackward((*model.parameters(), *model.buffers()))
        with watch.watching():
            out = model(images())
        kept[blocks] = watch.live
        del out
    assert kept[1] < kept[3] < kept[5] < kept[None] / 3


@pytest.mark.parametrize("last_norm", ["batch", "running"])
def test_gradients_of_the_tail_are_autograds_with_the_same_statistics(last_norm) -> None:
    reference = made("mobilenetv3_small_050").double()
    model = prepare(copy.deepcopy(reference), blocks=2, activation_backward="exact", last_norm=last_norm).train()
    reference.eval()
    if last_norm == "batch":
        for path in FAMILIES["mobilenetv3_small_050"]:
            reference.backbone.get_submodule(path).bn3.train()
    x, labels = images().double(), torch.arange(8) % 4
    losses = [F.cross_entropy(net(x), labels) for net in (model, reference)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) > 20
    for key in trained:
        torch.testing.assert_close(model.get_parameter(key).grad, reference.get_parameter(key).grad, msg=key)


def test_the_last_norms_use_the_batch_or_the_running_statistics() -> None:
    for last_norm in ("batch", "running"):
        model = prepare(made(), blocks=2, last_norm=last_norm).train()
        statistics = [model.backbone.get_submodule(path).running_mean.clone() for path in model.backbone.last_norms()]
        one_step(model, images())
        now = [model.backbone.get_submodule(path).running_mean for path in model.backbone.last_norms()]
        moved = [not torch.equal(a, b) for a, b in zip(statistics, now, strict=True)]
        assert moved == [last_norm == "batch"] * 2
        assert all(model.backbone.get_submodule(path).weight.grad is not None for path in model.backbone.last_norms())


def test_modes_follow_the_method_and_not_the_caller() -> None:
    model = prepare(made(drop_path_rate=0.5, drop_rate=0.5), blocks=2).train()
    assert not any(module.training for path in model.backbone.split.trunk
                   for module in model.backbone.get_submodule(path).modules())  # fmt: skip
    assert all(model.backbone.get_submodule(path).training for path in model.backbone.split.blocks)
    x = images(2)
    assert torch.equal(model.backbone.trunk(x), model.backbone.trunk(x))  # no stochastic depth below
    assert not torch.equal(model(x), model(x))  # dropout above
    model.eval()
    assert torch.equal(model(x), model(x))
    twin = copy.deepcopy(model).train()
    assert not twin.backbone.bn1.training and twin.backbone.get_submodule("blocks.6.0").bn3.training


def test_no_block_trains_the_layers_behind_them_and_all_blocks_leave_the_stem() -> None:
    model = prepare(made(), blocks=0)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"backbone.conv_head.weight", "backbone.bn2.bias", "head.weight", "head.bias"}
    model = prepare(made(), blocks=17)
    assert model.backbone.split.trunk == ("conv_stem", "bn1") and len(model.backbone.split.blocks) == 17
    one_step(model.train(), images())


@pytest.mark.parametrize("backward", ["sign", "exact"])
def test_frozen_head_layers_keep_no_input(backward) -> None:
    kept = {}
    for head_layers in ("train", "frozen"):
        model = prepare(made(), blocks=0, head_layers=head_layers, activation_backward=backward).train()
        z = model.backbone.trunk(images()).requires_grad_()
        watch = SavedForBackward((*model.parameters(), *model.buffers()))
        with watch.watching():
            out = model.backbone.tail(z)
        kept[head_layers] = watch.live
        out.sum().backward()
        assert z.grad is not None
    assert kept["train"] - kept["frozen"] == z.numel() * 4 and kept["frozen"] <= 8 * 1280 / 8 * z[0, 0].numel() + 64


# ---------------------------------------------------------------------- the trunk


def test_int8_weights_of_the_trunk_change_little_and_save_bytes() -> None:
    plain, packed = prepare(made(), blocks=2), prepare(made(), blocks=2, trunk_int8=True)
    x = images()
    left, right = plain.backbone.trunk(x), packed.backbone.trunk(x)
    assert 0 < float((left - right).norm() / left.norm()) < 0.1
    units = packed.backbone.split.trunk
    trunk = [module for path in units for module in packed.backbone.get_submodule(path).modules()]
    assert not any(type(module) is nn.Conv2d for module in trunk)
    units = packed.backbone.split.blocks
    tail = [module for path in units for module in packed.backbone.get_submodule(path).modules()]
    assert not any(isinstance(module, Int8Conv2d) for module in tail)
    sizes = [sum(t.numel() * t.element_size() for t in model.state_dict().values()) for model in (plain, packed)]
    weights = sum(p.numel() for path in plain.backbone.split.trunk
                  for p in plain.backbone.get_submodule(path).parameters() if p.ndim == 4)  # fmt: skip
    assert sizes[0] - sizes[1] > 2.9 * weights * 0.9
    one_step(packed.train(), x)
    twin = prepare(made(), blocks=2, trunk_int8=True)
    twin.load_state_dict(packed.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), packed.eval()(x))


def test_micro_batches_pass_the_trunk_one_after_another() -> None:
    whole, parts = prepare(made()), prepare(made(), trunk_batch=3)
    sizes: list[int] = []
    parts.backbone.conv_stem.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    x = images(8)
    torch.testing.assert_close(parts.backbone.trunk(x), whole.backbone.trunk(x), rtol=1e-4, atol=1e-5)
    assert sizes == [3, 3, 2]


# ---------------------------------------------------------------------- preparing


def test_preparing_twice_is_freezing_anew_and_other_options_are_refused() -> None:
    model = prepare(made(), blocks=2)
    backbone = model.backbone
    model.requires_grad_(False)
    assert prepare(model, blocks=2).backbone is backbone
    assert backbone.get_submodule("blocks.6.0").conv_pw.weight.requires_grad
    assert not backbone.get_submodule("blocks.6.0").bn1.weight.requires_grad and not model.head.weight.requires_grad
    with pytest.raises(ContlearnError, match=r"is prepared with .*'blocks': 2.*; expected the same options"):
        prepare(model, blocks=3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet14", {}, "model 'resnet14' has no inverted residual blocks; expected one that has, such as effic"),
        ("mobilenetv1_100", {}, r"no inverted residual blocks \(its blocks are DepthwiseSeparableConv\)"),
        ("mobilenetv4_conv_small_050", {}, r"its blocks are ConvBnAct, UniversalInvertedResidual"),
        ("efficientnet_cc_b0_4e", {"blocks": 2}, "2 of model 'efficientnet_cc_b0_4e' reach blocks.4.0, a CondConv"),
        ("test_efficientnet_gn", {"blocks": 1}, "blocks.4.0.bn1 is a GroupNormAct; expected a BatchNorm2d"),
        ("mobilenetv2_035", {"blocks": 18}, "blocks: expected 0..17 for model 'mobilenetv2_035', got 18"),
    ],
)
def test_networks_that_do_not_fit_are_refused_and_left_as_they_were(name, options, said) -> None:
    model = made(name)
    backbone, layers = model.backbone, [type(module) for module in model.modules()]
    with pytest.raises(ContlearnError, match=said) as caught:
        prepare(model, **options)
    assert "\n" not in str(caught.value)
    assert model.backbone is backbone and [type(module) for module in model.modules()] == layers
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": -1}, "blocks: expected a whole number of at least 0, got -1"),
        ({"blocks": 1.5}, "blocks: expected a whole number of at least 0, got 1.5"),
        ({"trunk_batch": True}, "trunk_batch: expected a whole number"),
        ({"head_layers": "freeze"}, "unknown head_layers 'freeze'; did you mean 'frozen'"),
        ({"activation_backward": "signs"}, "unknown activation_backward 'signs'; did you mean 'sign'"),
        ({"last_norm": "layer"}, "unknown last_norm 'layer'"),
    ],
)
def test_mistakes_get_one_line(options, said) -> None:
    for call in (lambda: MobileTLPlugin(**options), lambda: prepare(made(), **options)):
        with pytest.raises(ContlearnError) as caught:
            call()
        assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_activation_without_an_approximation_needs_the_exact_derivative() -> None:
    with pytest.raises(ContlearnError, match=r"'sign' is not defined for blocks.6.0.bn1, a Mish"):
        prepare(made(act_layer="mish"), blocks=1)
    model = prepare(made(act_layer="mish"), blocks=1, activation_backward="exact")
    assert isinstance(model.backbone, SplitBackbone)
    one_step(model.train(), images())
