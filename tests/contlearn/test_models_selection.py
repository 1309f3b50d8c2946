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


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["qvk"], "trainable: 'qvk' matches no parameter of model 'resnet20'; did you mean 'qkv'"),
        (["qkv"], "trainable: 'qkv' matches no parameter of model 'resnet20' (expected"),
        (["stage1.*", "stage9.*"], "'stage9.*' matches no parameter"),
        ("norms", "trainable: expected a list of patterns, got 'norms'"),
    ],
)
def test_what_matches_nothing_gets_one_line(wanted: list[str], said: str) -> None:
    with pytest.raises(ContlearnError) as caught:
        models.create("resnet20", stream(), trainable=wanted)
    assert said in str(caught.value) and "\n" not in str(caught.value)
