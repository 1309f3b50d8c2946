"""Backbones cut into pieces: the pieces are the backbone, the last block is withheld, maps come in one size."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.models import Classifier
from contlearn.strategies.lst import LSTPlugin
from contlearn.strategies.sherl import SHERLPlugin
from contlearn.strategies.sherl_hosts import find_host, pool_map
from contlearn.strategies.unipt import UniPTPlugin

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
BACKBONES: list[tuple[str, tuple[int, int, int], dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ("vit_tiny_patch16_224", (3, 16, 16), VIT, (24,) * 4, (1,) * 4),
    ("vit_small_patch16_224", (3, 16, 16), {**VIT, "global_pool": "avg", "class_token": False}, (24,) * 4, (1,) * 4),
    ("deit_tiny_distilled_patch16_224", (3, 16, 16), VIT, (24,) * 4, (1,) * 4),
    ("slim_resnet18", (1, 13, 10), {"width": 4}, (4, 8, 16, 32), (8, 4, 2, 1)),
    ("resnet14", (3, 12, 12), {}, (16, 32, 64), (4, 2, 1)),
    ("wrn16_2", (3, 8, 8), {}, (32, 64, 128), (4, 2, 1)),
    ("resnet18", (3, 64, 64), {}, (64, 128, 256, 512), (8, 4, 2, 1)),
    ("efficientnet_lite0", (3, 96, 96), {}, (24, 40, 112, 192), (8, 4, 2, 1)),
    ("mobilenetv3_small_050", (3, 36, 36), {}, (8, 16, 24, 48), (8, 4, 2, 1)),
]


def made(name: str, shape: tuple[int, int, int], options: dict[str, Any]) -> Any:
    stream = SimpleNamespace(input_shape=shape, n_classes=3, task_labels=False)
    return models.create(name, stream, head="fixed", seed=0, **options)


def bert(**changed: Any) -> Any:
    import transformers

    small = {
        "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
        "max_position_embeddings": 16,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertModel(transformers.BertConfig(**{**small, **changed}), add_pooling_layer=False)


@pytest.mark.parametrize(("name", "shape", "options", "widths", "windows"), BACKBONES)
def test_the_pieces_are_the_backbone_and_features_are_the_published_ones(name, shape, options, widths, windows) -> None:
    model = made(name, shape, options).eval()
    trunk = model.backbone
    host = find_host(trunk, method="sherl", input_shape=shape)
    assert host.widths == widths and host.windows == windows
    x = torch.randn(2, *shape)
    with torch.no_grad():
        expected = trunk(x)
        features, context = host.shallow(trunk, x)
        found = host.pool(trunk, host.finish(trunk, host.late(trunk, features[-1], context)))
    assert torch.equal(found, expected) and len(features) == len(widths)


@pytest.mark.parametrize(("name", "shape", "options", "widths", "windows"), BACKBONES)
def test_the_withheld_block_is_the_last_and_only_the_last(name, shape, options, widths, windows) -> None:
    trunk = made(name, shape, options).eval().backbone
    host = find_host(trunk, method="sherl", input_shape=shape)
    x = torch.randn(2, *shape)
    blocks = list(trunk.blocks) if host.kind == "tokens" else [b for stage in host.stages(trunk) for b in stage]

    def features_with(number: int) -> list[torch.Tensor]:
        """Features when the weights of one block have changed."""
        held = copy.deepcopy(blocks[number].state_dict())
        with torch.no_grad():
            for parameter in blocks[number].parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            found = host.shallow(trunk, x)[0]
        blocks[number].load_state_dict(held)
        return found

    with torch.no_grad():
        before = host.shallow(trunk, x)[0]
    without = features_with(-1)
    assert all(torch.equal(one, other) for one, other in zip(before, without, strict=True))
    neighbour = features_with(-2)
    changed = [not torch.equal(one, other) for one, other in zip(before, neighbour, strict=True)]
    assert changed == [False] * (len(before) - 1) + [True]


@pytest.mark.parametrize(("name", "shape", "options", "widths", "windows"), BACKBONES)
@pytest.mark.parametrize("plugin", [SHERLPlugin, UniPTPlugin, LSTPlugin])
def test_every_method_gives_the_backbones_number_of_features_and_trains_all_it_adds(
    name, shape, options, widths, windows, plugin
) -> None:
    model = made(name, shape, options)
    plugin().prepare_model(model)
    maps = [t for t in model.backbone.features(torch.randn(2, *shape))[0] if t.ndim == 4]
    assert len({tuple(one.shape[2:]) for one in maps}) <= 1
    model(torch.randn(4, *shape)).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and all(p.grad is None for p in model.backbone.trunk.parameters())


def test_windows_of_a_small_last_map_are_those_of_the_published_host() -> None:
    x = torch.randn(2, 3, 12, 8)
    pooled = pool_map(x, 4, largest=True)
    for row in range(3):
        for column in range(2):
            window = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.allclose(pooled[:, :, row, column], window.mean((2, 3)) + window.amax((2, 3)), atol=1e-6)
    assert torch.equal(pool_map(x, 1, largest=True), 2 * x) and pool_map(x, 1, largest=False) is x
    torn = pool_map(torch.ones(1, 1, 13, 13), 8, largest=False)  # windows over the edge count what is there
    assert torn.shape == (1, 1, 2, 2) and torch.equal(torn, torch.ones(1, 1, 2, 2))


def test_a_last_stage_of_one_block_is_withheld_as_a_whole() -> None:
    model = made("resnet14", (3, 12, 12), {})
    model.backbone.stage3 = model.backbone.stage3[:1]
    host = find_host(model.backbone, method="sherl", input_shape=(3, 12, 12))
    assert (host.widths, host.windows, host.late_windows) == ((16, 32), (2, 1), (4, 2))
    for plugin in (SHERLPlugin(), SHERLPlugin(late="none"), UniPTPlugin(), LSTPlugin()):
        model = made("resnet14", (3, 12, 12), {})
        model.backbone.stage3 = model.backbone.stage3[:1]
        plugin.prepare_model(model)
        assert model(torch.randn(2, 3, 12, 12)).shape == (2, 3)


# ---------------------------------------------------------------------- BERT


def test_berts_pieces_are_bert_and_padding_is_masked() -> None:
    trunk = bert().eval()
    host = find_host(trunk, method="sherl")
    ids = torch.randint(1, 50, (2, 7))
    ids[1, 4:] = 0
    with torch.no_grad():
        features, context = host.shallow(trunk, ids)
        last = host.finish(trunk, host.late(trunk, features[-1], context))
        expected = trunk(ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    assert len(features) == 4
    for one, other in zip(features, expected.hidden_states, strict=False):
        assert torch.allclose(one[:, :4], other[:, :4], atol=1e-5)
    assert torch.allclose(host.pool(trunk, last), expected.last_hidden_state[:, 0], atol=1e-5)


@pytest.mark.parametrize("plugin", [SHERLPlugin, UniPTPlugin, LSTPlugin])
def test_padding_changes_no_prediction(plugin) -> None:
    model = Classifier(bert(), nn.Linear(24, 3), feature_dim=24)
    plugin().prepare_model(model)
    model.eval()
    ids = torch.randint(1, 50, (2, 5))
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    assert torch.allclose(model(ids), model(padded), atol=1e-4)


def test_the_published_bert_variant_has_5133058_trainable_parameters() -> None:
    trunk = nn.Module()  # of BERT-base, all that the number of parameters depends on
    trunk.embeddings, trunk.encoder, trunk.config = nn.Embedding(1, 1), nn.Module(), SimpleNamespace(hidden_size=768)
    trunk.encoder.layer = nn.ModuleList(nn.Identity() for _ in range(12))
    plugin = SHERLPlugin()
    network = plugin.build(trunk, find_host(trunk, method="sherl"))
    assert len(network.early.down) == 12 and network.early.merge.attend.in_features == 512
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 5_133_058


def test_a_structure_that_is_not_known_is_named_with_those_that_are() -> None:
    with pytest.raises(ContlearnError) as caught:
        find_host(nn.Sequential(nn.Linear(2, 2)), method="unipt")
    said = str(caught.value)
    assert said.startswith("unipt: backbone Sequential") and "\n" not in said
    assert all(known in said for known in ("VisionTransformer", "ResNet", "efficientnet_lite0", "BertModel"))
