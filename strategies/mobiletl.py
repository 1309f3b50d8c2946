"""MobileTL (arXiv 2212.03246): transfer learning of the top inverted residual blocks in half the memory.

Frozen trunk, inner norms of which the offset alone trains, and activations that keep one bit per number.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from avalanche.core import SupervisedPlugin
from torch import nn

from contlearn.errors import ContlearnError, unknown_name
from contlearn.strategies.feature_cache import FeatureCache, require_fixed_images
from contlearn.strategies.inverted_residual import SplitBackbone, split_of
from contlearn.strategies.mobiletl_layers import ActivationBackward, ShiftNorm, with_backward
from contlearn.strategies.packed import quantise_frozen

HeadLayers = Literal["train", "frozen"]
LastNorm = Literal["batch", "running"]


class MobileTLPlugin(SupervisedPlugin):
    """Trains the last inverted residual blocks of a network and its classifier; all in front of them is inference.

    The model must have been prepared before its optimizer is made: strategies of contlearn do so, elsewhere call
    :meth:`prepare_model` first.

    Args:
        blocks: inverted residual blocks that train, counted from the top; 1 to 5 in the paper. 0 trains what follows
            them.
        head_layers: whether the layers between the last block and the classifier ``train`` or are ``frozen``.
        activation_backward: ``sign`` passes the gradient where the activation's input is not negative and keeps one bit
            per number; ``exact`` uses the derivative.
        last_norm: statistics of the norm behind each trained projection: of the ``batch``, as in the paper, or
            ``running``, which stay as they are (for streams whose batches hold few classes).
        trunk_int8: keep the frozen convolutions' weights as int8.
        trunk_batch: images that pass the frozen trunk at a time; 0 for all of a batch.
        cache_trunk: compute the trunk's output once per training image and keep it; not with random augmentation.

    Attributes:
        cache: the trunk's output by image.

    Raises:
        ContlearnError: a value out of range or an unknown name.
    """

    memory_names = {"cache": "trunk_features"}
    checkpoint_exclude = ("cache",)  # computed anew after a resume, to the same bits

    def __init__(
        self,
        blocks: int = 3,
        *,
        head_layers: HeadLayers = "train",
        activation_backward: ActivationBackward = "sign",
        last_norm: LastNorm = "batch",
        trunk_int8: bool = False,
        trunk_batch: int = 0,
        cache_trunk: bool = False,
    ) -> None:
        super().__init__()
        self.settings = _checked(
            blocks=blocks, head_layers=head_layers, activation_backward=activation_backward, last_norm=last_norm,
            trunk_int8=trunk_int8, trunk_batch=trunk_batch,
        )  # fmt: skip
        self.cache_trunk = cache_trunk
        self.cache = FeatureCache()

    def prepare_model(self, model: nn.Module) -> None:
        """Split the backbone and replace layers in place; parameters and buffers of the tail stay the same objects.

        Raises:
            ContlearnError: a model without inverted residual blocks, with fewer than asked for, or with layers the
                method does not know.
        """
        prepare(model, **self.settings)

    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        """Check that the model was prepared."""
        _backbone(strategy.model)

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Serve cached features; the model may be another than before, or its trunk may have been written to."""
        if not self.cache_trunk:
            return
        backbone = _backbone(strategy.model)
        require_fixed_images(strategy.adapted_dataset)
        experience = strategy.experience
        self.cache.made_by(backbone.trunk_tensors())
        self.cache.limit = _images_so_far(experience, len(strategy.adapted_dataset))
        backbone.serve = self.cache.serve

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Evaluation and copies of the model compute by themselves."""
        _backbone(strategy.model).serve = None


def prepare(
    model: nn.Module,
    *,
    blocks: int = 3,
    head_layers: HeadLayers = "train",
    activation_backward: ActivationBackward = "sign",
    last_norm: LastNorm = "batch",
    trunk_int8: bool = False,
    trunk_batch: int = 0,
) -> nn.Module:
    """Make a classifier train as MobileTL does, in place.

    Of the backbone, convolutions, last norms and the offsets of inner norms train in the last ``blocks`` inverted
    residual blocks (and behind them, with ``head_layers`` train); the classifier stays as it is. A model that is
    prepared with the same options is only frozen anew.

    Args:
        model: a ``Classifier`` with a backbone of timm's EfficientNet or MobileNetV3 class.
        blocks: as in :class:`MobileTLPlugin`, and so are the others.
        head_layers: see there.
        activation_backward: see there.
        last_norm: see there.
        trunk_int8: see there.
        trunk_batch: see there.

    Returns:
        The same object.

    Raises:
        ContlearnError: a value out of range, a model without such blocks or with fewer, a layer the method does not
            know, or a model that is prepared with other options.
    """
    settings = _checked(
        blocks=blocks, head_layers=head_layers, activation_backward=activation_backward, last_norm=last_norm,
        trunk_int8=trunk_int8, trunk_batch=trunk_batch,
    )  # fmt: skip
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, SplitBackbone):
        if backbone.settings != settings:
            raise ContlearnError(f"mobiletl: the model is prepared with {backbone.settings}; expected the same options")
        _freeze(backbone)
        return model
    name = str(getattr(model, "spec", {}).get("name", type(backbone).__name__))
    split = split_of(backbone, blocks, model=name)
    made = SplitBackbone(backbone, split, frozen_head=head_layers == "frozen", trunk_batch=trunk_batch)
    made.settings = settings
    shifts = {path: _shift(made, path, activation_backward) for path in made.inner_norms()}
    acts = {path: with_backward(act, activation_backward, name=path) for path, act in _other_activations(made)}
    for path, layer in {**shifts, **acts}.items():  # only now, so that a refused model is left as it was
        owner, _, leaf = path.rpartition(".")
        setattr(made.get_submodule(owner), leaf, layer.train(made.training))
    made.still = tuple(made.last_norms()) if last_norm == "running" else ()
    made.train(backbone.training)
    _freeze(made)
    if trunk_int8:
        # torchao's IntxWeightOnlyConfig takes convolutions too, and dequantises at each call as this does, but its
        # tensor subclass has no safetensors form and no storage that the memory account could count.
        quantise_frozen(made)
    model.backbone = made
    return model


def _checked(**settings: Any) -> dict[str, Any]:
    for option, choices in (
        ("head_layers", HeadLayers), ("activation_backward", ActivationBackward), ("last_norm", LastNorm),
    ):  # fmt: skip
        if settings[option] not in get_args(choices):
            raise unknown_name(option, settings[option], get_args(choices))
    for option in ("blocks", "trunk_batch"):
        value = settings[option]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ContlearnError(f"{option}: expected a whole number of at least 0, got {value!r}")
    return settings


def _shift(backbone: SplitBackbone, path: str, backward: ActivationBackward) -> ShiftNorm:
    norm = backbone.get_submodule(path)
    act = norm._modules.get("act")
    return ShiftNorm(norm, None if act is None else with_backward(act, backward, name=path), name=path)


def _other_activations(backbone: SplitBackbone) -> list[tuple[str, nn.Module]]:
    """Activations of full size that follow no inner norm: behind a projection, and MobileNetV3's behind its head.

    Those in squeeze-and-excite work on one number per channel and stay exact, its gate included.
    """
    places = [f"{path}.act" for path in backbone.last_norms()]
    places += [name for name in backbone.split.head if name == "act2"]
    found = ((path, dict(backbone.named_modules()).get(path)) for path in places)
    return [(path, act) for path, act in found if not isinstance(act, nn.Identity | None)]


def _freeze(backbone: SplitBackbone) -> None:
    """Freeze all but what trains."""
    backbone.requires_grad_(False)
    # The paper names "the top blocks and the classifier" and freezes what lies below them. The convolution in between
    # lies above them, and in MobileNetV3 it is a part of the classifier; so it trains unless told otherwise.
    above = () if backbone.frozen_head else backbone.split.head
    for name in (*backbone.split.blocks, *above):
        unit = backbone.get_submodule(name).requires_grad_(True)
        for module in unit.modules():
            if isinstance(module, ShiftNorm):
                module.weight.requires_grad_(False)  # type: ignore[union-attr]


def _backbone(model: nn.Module) -> SplitBackbone:
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, SplitBackbone):
        raise ContlearnError(
            "mobiletl: the model was not prepared; call plugin.prepare_model(model) before the optimizer is made"
        )
    return backbone


def _images_so_far(experience: Any, at_least: int) -> int:
    """Training images of the stream up to and with this experience."""
    stream = getattr(experience, "origin_stream", None)
    if stream is None:
        return at_least
    return sum(len(stream[index].dataset) for index in range(experience.current_experience + 1))
