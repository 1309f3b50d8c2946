"""Networks that grow by a part per task: where they are cut, what a new task appends, what stays as it was."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.models import Classifier, GrowingHead
from contlearn.strategies.memo_network import ExpandableBackbone, expand
from contlearn.strategies.memo_split import split_backbone


def made(name: str, shape: tuple[int, int, int], **options: Any) -> Any:
    stream = SimpleNamespace(input_shape=shape, n_classes=10, task_labels=False)
    return models.create(name, stream, seed=0, **options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def brings(*classes: int) -> Any:
    return SimpleNamespace(classes_in_this_experience=list(classes))


def grown(name: str = "resnet14", *tasks: tuple[int, ...], train_base: bool = False, specialised: int = 1) -> Any:
    """A model after the adaptation to each task."""
    model = made(name, (1, 8, 8))
    general, part = split_backbone(model.backbone, specialised, input_shape=(1, 8, 8))
    expand(model, general, part, train_base=train_base)
    for task in tasks:
        adapt(model, *task)
    return model


def adapt(model: Any, *classes: int) -> None:
    for module in (model.backbone, model.head, model.aux):
        module.adaptation(brings(*classes))


@pytest.mark.parametrize(
    ("name", "shape", "whole", "specialised"),
    [("resnet32", (3, 32, 32), 463_504, 351_488), ("timm/resnet18", (3, 64, 64), 11_176_512, 8_393_728)],
)
def test_the_papers_backbones_are_cut_as_in_the_paper(name, shape, whole, specialised) -> None:
    general, part = split_backbone(made(name, shape).backbone, 1, input_shape=shape)
    assert (count(general), count(part)) == (whole - specialised, specialised)


@pytest.mark.parametrize(
    ("name", "shape", "stages"),
    [
        ("slim_resnet18", (1, 8, 8), 3), ("wrn16_2", (3, 16, 16), 2), ("test_vit", (3, 160, 160), 2),
        ("test_resnet", (3, 32, 32), 2), ("test_efficientnet", (3, 32, 32), 2), ("test_convnext", (3, 32, 32), 2),
        ("mobilenetv3_small_050", (3, 32, 32), 1), ("mlp", (1, 4, 4), 1), ("simple_cnn", (1, 8, 8), 4),
    ],
)  # fmt: skip
def test_the_halves_are_the_network_and_share_nothing(name, shape, stages) -> None:
    backbone = made(name, shape).backbone.eval()
    x = torch.rand(2, *shape)
    for specialised in range(1, stages + 1):
        general, part = split_backbone(backbone, specialised, input_shape=shape)
        assert count(general) + count(part) == count(backbone) and count(part) > 0
        ids = [{id(p) for p in half.parameters()} for half in (general, part)]
        assert not ids[0] & ids[1] and ids[0] | ids[1] == {id(p) for p in backbone.parameters()}
        torch.testing.assert_close(part(general(x)), backbone(x))


def test_every_part_of_a_transformer_starts_from_its_pre_trained_block_without_dead_parameters() -> None:
    model = made("test_vit", (3, 160, 160))
    with torch.no_grad():
        for parameter in model.backbone.parameters():  # as weights from a file
            parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.02)
    blocks = [copy.deepcopy(block.state_dict()) for block in model.backbone.blocks]
    norm = copy.deepcopy(model.backbone.norm.state_dict())
    block_size, norm_size = count(model.backbone.blocks[-1]), count(model.backbone.norm)
    general, part = split_backbone(model.backbone, 1, input_shape=(3, 160, 160))
    expand(model, general, part, train_base=False)
    adapt(model, 0)
    adapt(model, 1)
    for one in model.backbone.specialised:
        assert count(one) == block_size + norm_size
        held = one.state_dict()
        for key, value in {**{f"trunk.blocks.0.{k}": v for k, v in blocks[-1].items()},
                           **{f"trunk.norm.{k}": v for k, v in norm.items()}}.items():  # fmt: skip
            assert torch.equal(held.pop(key), value)
        assert not held
    features = model.train().features(torch.rand(2, 3, 160, 160))
    model.head(features).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.numel() and p.dim() > 1
               and p is not model.aux.weight)  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "specialised", "said"),
    [
        (nn.Bilinear(3, 3, 4), 1, "specialised: backbone Bilinear has no stages that are known; expected one of: "),
        (nn.Sequential(nn.Flatten()), 1, "specialised: backbone Sequential has no stages"),
        ("resnet14", 0, "specialised: expected 1 to 3 of the 3 stages of CifarResNet, got 0"),
        ("resnet14", 4, "specialised: expected 1 to 3 of the 3 stages of CifarResNet, got 4"),
        ("densenet121", 1, "specialised: backbone DenseNet has no stages that are known"),
    ],
)
def test_a_network_that_cannot_be_cut_is_named(backbone, specialised, said) -> None:
    backbone = made(backbone, (3, 32, 32)).backbone if isinstance(backbone, str) else backbone
    with pytest.raises(ContlearnError) as caught:
        split_backbone(backbone, specialised, input_shape=(3, 32, 32))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_part_that_would_change_what_the_others_read_is_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), Writes(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    class Writes(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2.0))

    with pytest.raises(ContlearnError, match="is no chain of its stages"):
        split_backbone(InPlace(), 1, input_shape=(1, 8, 8))


def test_a_task_appends_a_copy_of_the_newest_part_and_freezes_the_rest() -> None:
    model = grown("resnet14", (0, 1))
    with torch.no_grad():
        for tensor in [*model.backbone.parameters(), *model.backbone.buffers()]:
            tensor.add_(1)
    adapt(model, 2, 3, 4)
    backbone = model.backbone
    old, new = backbone.specialised
    assert all(torch.equal(value, new.state_dict()[key]) for key, value in old.state_dict().items())
    assert not {t.data_ptr() for t in old.state_dict().values()} & {t.data_ptr() for t in new.state_dict().values()}
    assert not any(p.requires_grad for p in [*old.parameters(), *backbone.general.parameters()])
    assert all(p.requires_grad for p in new.parameters())
    assert backbone.feature_dim == model.head.in_features == 128 == model.features(torch.rand(2, 1, 8, 8)).shape[1]
    assert (backbone.old, backbone.new) == ([0, 1], [2, 3, 4])


@pytest.mark.parametrize("train_base", [False, True])
def test_what_is_frozen_stays_in_evaluation_mode_whatever_train_says(train_base) -> None:
    model = grown("resnet14", (0,), (1,), train_base=train_base)
    for mode in (True, False, True):
        model.train(mode)
    *old, new = model.backbone.specialised
    assert not any(m.training for part in old for m in part.modules()) and all(m.training for m in new.modules())
    assert all(m.training == train_base for m in model.backbone.general.modules())
    assert all(p.requires_grad == train_base for p in model.backbone.general.parameters())
    before = copy.deepcopy(model.backbone.state_dict())
    model(torch.rand(16, 1, 8, 8))
    after = model.backbone.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved and all(key.startswith(("specialised.1.", *(["general."] if train_base else []))) for key in moved)


def test_the_head_keeps_what_it_knew_and_gives_old_classes_random_weights_on_new_features() -> None:
    model = grown("resnet14", (0, 1))
    weight = torch.randn(2, 64)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(torch.tensor([3.0, -2.0]))
    adapt(model, 2, 3)
    head = model.head
    assert head.weight.shape == (4, 128)
    assert torch.equal(head.weight[:2, :64], weight) and head.bias.tolist() == [3.0, -2.0, 0.0, 0.0]
    bound = math.sqrt(3 / 128)  # Kaiming-uniform with the gain of a linear layer over 128 inputs
    for fresh in (head.weight[:2, 64:], head.weight[2:]):
        assert 0.9 * bound < fresh.abs().max() <= bound and (fresh != 0).all()


def test_rows_that_a_higher_label_made_exist_are_new_when_their_class_comes() -> None:
    model = grown("resnet14", (3,))
    with torch.no_grad():
        model.head.weight.fill_(7.0)
        model.head.bias.fill_(7.0)
    adapt(model, 1)
    assert (model.head.weight[3, :64] == 7).all() and model.head.bias.tolist() == [0.0, 0.0, 0.0, 7.0]
    assert (model.head.weight[:3].abs() < 1).all()


def test_classes_seen_before_begin_no_task_and_evaluation_none_at_all() -> None:
    model = grown("mlp", (0, 1))
    rows = model.head.weight
    adapt(model, 0, 1)  # as at every evaluation and every resumed experience
    adapt(model, 1)
    assert len(model.backbone.specialised) == 1 and model.head.weight is rows
    model.eval()
    adapt(model, 2, 3)
    assert len(model.backbone.specialised) == 1 and model.backbone.new == [0, 1]
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 4)  # reported, never the answer


def test_the_auxiliary_head_tells_new_classes_from_each_other_and_from_all_old_ones() -> None:
    model = grown("mlp", (4, 1))
    assert model.aux.weight.numel() == 0 and model.aux.classes == []
    adapt(model, 7, 2, 5)
    first = model.aux.weight
    assert first.shape == (4, model.backbone.part_features)
    labels = torch.tensor([4, 1, 2, 5, 7, 2])
    assert model.aux.targets(labels).tolist() == [0, 0, 1, 2, 3, 1]
    adapt(model, 0)
    assert model.aux.weight.shape[0] == 2 and model.aux.targets(torch.tensor([7, 0])).tolist() == [0, 1]
    features = model.train().features(torch.rand(3, 1, 8, 8))
    newest = model.backbone.specialised[-1](model.backbone.general(torch.rand(3, 1, 8, 8)))
    assert model.aux(torch.cat([features[:, :-100] + 1e3, newest], 1)).abs().max() < 1e2  # older parts are not read


def test_a_state_dict_of_any_age_is_taken_up() -> None:
    old = grown("resnet14", (0, 1), (2,), (3, 4))
    fresh = grown("resnet14")
    fresh.load_state_dict(old.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fresh.eval()(x), old.eval()(x)) and len(fresh.backbone.specialised) == 3


def test_growing_is_the_same_for_the_same_seed_and_a_head_of_another_kind_is_refused() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(grown("mlp", (0,), (1,)).head.weight)
    assert torch.equal(*weights)
    model = Classifier(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)), feature_dim=4)
    with pytest.raises(ContlearnError, match=r"head: expected one of contlearn\.models or a linear layer"):
        expand(model, nn.Sequential(), model.backbone, train_base=False)


def test_a_linear_head_is_taken_over_with_its_weights() -> None:
    head = nn.Linear(4, 3)
    model = Classifier(nn.Linear(4, 4), head, feature_dim=4)
    expand(model, nn.Sequential(), model.backbone, train_base=False)
    assert isinstance(model.head, GrowingHead) and isinstance(model.backbone, ExpandableBackbone)
    assert model.head.weight is head.weight and model.head.bias is head.bias
