"""What of a backbone trains is chosen by patterns over parameter names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from contlearn import models
from contlearn.errors import ContlearnError


def stream(side: int = 16, channels: int = 3) -> SimpleNamespace:
    return SimpleNamespace(input_shape=(channels, side, side), n_classes=4, task_labels=False)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def vit(**options: object) -> torch.nn.Module:
    return models.create(
        "vit_tiny_patch16_224", stream(), head="fixed", seed=0, depth=2, embed_dim=24, num_heads=3, **options
    )


def test_the_query_key_and_value_projections_of_every_block_train_and_the_head() -> None:
    blocks = {f"backbone.blocks.{index}.attn.qkv.{name}" for index in range(2) for name in ("weight", "bias")}
    assert trained(vit(trainable=["qkv"])) == blocks | {"head.weight", "head.bias"}


def test_vit_b_16_has_as_many_parameters_there_as_published() -> None:
    import timm

    from contlearn.models._selection import select_trainable

    with torch.device("meta"):
        backbone = timm.create_model("vit_base_patch16_224", num_classes=0)
    select_trainable(backbone, ["qkv"], model="vit_base_patch16_224")
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 21_261_312  # METHODS: 85.0 MB in fp32


def test_norms_are_found_by_kind_and_patterns_add_up() -> None:
    model = models.create("resnet20", stream(), head="fixed", seed=0, trainable=["norms", "stem.*"])
    chosen = trained(model)
    for path, module in model.backbone.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"backbone.{path}.{name}"
            wanted = isinstance(module, torch.nn.BatchNorm2d) or path.startswith("stem")
            assert (full in chosen) == wanted, full
    assert {"head.weight", "head.bias"} <= chosen


def test_head_leaves_nothing_of_the_backbone_and_none_everything() -> None:
    assert trained(vit(trainable=["head"])) == {"head.weight", "head.bias"}
    assert trained(vit(trainable=[])) == {"head.weight", "head.bias"}
    assert len(trained(vit())) == len(list(vit().parameters()))


def test_the_spec_keeps_the_choice_and_the_weights_are_the_same() -> None:
    chosen, free = vit(trainable=["qkv"]), vit()
    assert chosen.spec["trainable"] == ["qkv"] and free.spec["trainable"] is None
    assert all(torch.equal(a, b) for a, b in zip(chosen.parameters(), free.parameters(), strict=True))
    assert chosen.input_shape == (3, 16, 16)


def test_biases_are_every_additive_term_and_all_is_all() -> None:
    chosen = trained(vit(trainable=["biases"]))
    names = [name for name, _ in vit().named_parameters()]
    assert chosen == {name for name in names if name.endswith(".bias")} | {"head.weight"}
    assert "backbone.norm.bias" in chosen and "backbone.blocks.0.attn.qkv.bias" in chosen
    assert trained(vit(trainable=["all"])) == set(names)


def test_separate_biases_of_attention_count_and_position_tables_do_not() -> None:
    from contlearn.models._selection import select_trainable

    backbone = torch.nn.Sequential(torch.nn.MultiheadAttention(4, 2))
    backbone.register_parameter("relative_position_bias_table", torch.nn.Parameter(torch.zeros(3)))
    select_trainable(backbone, ["biases"], model="m")
    assert trained(backbone) == {"0.in_proj_bias", "0.out_proj.bias"}


@pytest.mark.parametrize(
    ("name", "last", "behind"),
    [
        ("resnet20", ["stage3.1.", "stage3.2."], []),
        ("slim_resnet18", ["stage4.0.", "stage4.1."], []),
        ("wrn16_2", ["stage3.0.", "stage3.1."], ["norm."]),
        ("vit_tiny_patch16_224", ["blocks.10.", "blocks.11."], ["norm."]),
        ("efficientnet_lite0", ["blocks.5.3.", "blocks.6.0."], ["conv_head.", "bn2."]),
        # The convolution behind MobileNetV3's last block sits among the blocks but is none.
        ("mobilenetv3_small_100", ["blocks.4.1.", "blocks.4.2."], ["blocks.5.0.", "conv_head."]),
        ("resnet18", ["layer4.0.", "layer4.1."], []),
        ("timm/convnext_atto", ["stages.3.blocks.0.", "stages.3.blocks.1."], ["stages.3.downsample.", "head.norm."]),
        ("swin_tiny_patch4_window7_224", ["layers.3.blocks."], ["layers.3.downsample", "norm."]),
    ],
)
def test_the_last_blocks_train_with_all_that_follows_them(name: str, last: list[str], behind: list[str]) -> None:
    with torch.device("meta"):
        model = models.create(name, stream(224 if "_224" in name else 32), trainable=["last_blocks:2"])
    prefixes = ("head.", *(f"backbone.{part}" for part in (*last, *behind)))
    names = [name for name, _ in model.named_parameters()]
    assert trained(model) == {name for name in names if name.startswith(prefixes)}


def test_every_block_counts_once_and_one_more_is_a_mistake() -> None:
    for name, blocks in (("resnet20", 9), ("efficientnet_lite0", 16), ("mobilenetv3_small_100", 11)):
        whole = models.create(name, stream(32), seed=0, trainable=[f"last_blocks:{blocks}"])
        frozen = {name.removeprefix("backbone.") for name, _ in whole.named_parameters()}
        frozen -= {name.removeprefix("backbone.") for name in trained(whole)}
        assert frozen and all(name.startswith(("stem", "conv_stem", "bn1")) for name in frozen)
        with pytest.raises(ContlearnError, match=f"expected last_blocks:K with K from 1 to {blocks}"):
            models.create(name, stream(32), trainable=[f"last_blocks:{blocks + 1}"])


def test_presets_add_up() -> None:
    model = models.create("resnet20", stream(), head="fixed", seed=0, trainable=["last_blocks:1", "biases"])
    chosen = trained(model)
    assert {"backbone.stage3.2.conv1.weight", "backbone.stem.1.bias"} <= chosen
    assert not {"backbone.stage3.1.conv1.weight", "backbone.stem.1.weight"} & chosen


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["qvk"], "trainable: 'qvk' matches no parameter of model 'resnet20'; did you mean 'qkv'"),
        (["qkv"], "trainable: 'qkv' matches no parameter of model 'resnet20' (expected"),
        (["stage1.*", "stage9.*"], "'stage9.*' matches no parameter"),
        (["last_blocks"], "expected last_blocks:K with K from 1 to 9"),
        (["last_blocks:0"], "'last_blocks:0' for model 'resnet20', expected last_blocks:K with K from 1 to 9"),
        (["last_blocks:two"], "'last_blocks:two' for model 'resnet20'"),
        (["last_block:2"], "did you mean 'last_blocks:K'"),
        (["bias"], "did you mean 'biases'"),
        ("norms", "trainable: expected a list of patterns, got 'norms'"),
    ],
)
def test_what_matches_nothing_gets_one_line(wanted: list[str], said: str) -> None:
    with pytest.raises(ContlearnError) as caught:
        models.create("resnet20", stream(), trainable=wanted)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_blocks_of_a_model_without_any_are_not_guessed() -> None:
    with pytest.raises(ContlearnError, match="the blocks of model 'mlp' are not known"):
        models.create("mlp", stream(), trainable=["last_blocks:1"])
