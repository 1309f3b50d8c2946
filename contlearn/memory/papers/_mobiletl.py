"""MobileTL's activation memory of one inverted residual block (Chiang et al., arXiv 2212.03246).

No code was released; the formula follows the author's published figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from contlearn.errors import unknown_name
from contlearn.models._checks import whole

MobileTLMethod = Literal["mobiletl", "full"]
MobileTLActivation = Literal["relu6", "hswish"]


@dataclass(frozen=True)
class MobileTLBlock:
    """Bytes that backward needs of one block, for the whole batch. The paper prints MB of 10^6 bytes.

    Attributes:
        conv_inputs: Inputs of the expanding, the depthwise and the projecting convolution.
        norm_inputs: Inputs of the BatchNorms that follow them.
        activations: What the two activations keep: inputs or masks.
        squeeze_excite: The input that squeeze-and-excite scales.
        squeeze_excite_vectors: What its two small convolutions and their activations keep.
    """

    conv_inputs: tuple[int, int, int]
    norm_inputs: tuple[int, int, int]
    activations: tuple[int, int]
    squeeze_excite: int
    squeeze_excite_vectors: int

    @property
    def total(self) -> int:
        """All of it."""
        inputs = sum(self.conv_inputs) + sum(self.norm_inputs) + sum(self.activations)
        return inputs + self.squeeze_excite + self.squeeze_excite_vectors


def mobiletl_block(
    channels: int,
    resolution: int,
    *,
    expansion: int = 6,
    out_channels: int | None = None,
    squeeze_excite: bool = False,
    activation: MobileTLActivation | None = None,
    method: MobileTLMethod = "mobiletl",
    batch_size: int = 1,
    relu6_bits: Literal[1, 2] = 1,
) -> MobileTLBlock:
    """Bytes stored to train one inverted residual block of stride 1.

    MobileTL trains the convolutions and the last BatchNorm, shifts the other two (nothing is stored) and passes the
    gradient of either activation where its input is not negative (1 bit a number). Full back-propagation stores the
    input of every convolution, BatchNorm and h-swish, and the mask of every ReLU6. Squeeze-and-excite is the same for
    both: its input, and the vectors inside.

    What the figures print, in MB, against this function:

    * One block of expansion 6, figure ``block_ours_mem``: MobileNetV2 2.16 (here 2.164), V3 3.10 (3.109), V3 full
      6.66 (6.665). V2 full is printed as 4.02 and not met: 3.970 here. With two bits per ReLU6, one for each
      threshold, it would be 4.027 (``relu6_bits``).
    * One block of expansion 1, the motivation table (full): V2 0.913 (0.9126), V3 1.362 (1.3617). It needs one bit per
      ReLU6: two would give 0.922.

    Neither states a shape. The table's parameter counts (230,592; 21,408; 26,136) are those of 96 channels and 5x5
    kernels, and its 1.362 needs a batch of 8 images of 7x7 pixels; both figures are met there. One image of 28x28
    pixels and 48 channels has as many numbers as that batch and differs in the vectors of squeeze-and-excite alone: V3
    3.070 and V3 full 6.626.

    Args:
        channels: Channels of the block's input.
        resolution: Height and width of the block's input and output.
        expansion: Factor from ``channels`` to the channels inside.
        out_channels: Channels of the output; None for ``channels``.
        squeeze_excite: Whether the block has squeeze-and-excite after the depthwise convolution (MobileNetV3), with a
            quarter of the inner channels, to the nearest multiple of 8.
        activation: None for MobileNetV3's ``"hswish"`` with squeeze-and-excite, MobileNetV2's ``"relu6"`` without.
        method: ``"mobiletl"``, or ``"full"`` for full back-propagation.
        batch_size: Images per step.
        relu6_bits: Bits per number that full back-propagation keeps of a ReLU6.

    Raises:
        ContlearnError: A value out of range or an unknown name.
    """
    narrow = whole("channels", channels, least=1)
    pixels = whole("resolution", resolution, least=1) ** 2 * whole("batch_size", batch_size, least=1)
    wide = narrow * whole("expansion", expansion, least=1)
    last = narrow if out_channels is None else whole("out_channels", out_channels, least=1)
    if method not in get_args(MobileTLMethod):
        raise unknown_name("method of mobiletl_block", method, get_args(MobileTLMethod))
    if activation is None:
        activation = "hswish" if squeeze_excite else "relu6"
    elif activation not in get_args(MobileTLActivation):
        raise unknown_name("activation of mobiletl_block", activation, get_args(MobileTLActivation))
    inner = 4 * wide * pixels
    if method == "mobiletl":
        kept = _mask_bytes(wide * pixels)
    elif activation == "relu6":
        kept = _mask_bytes(wide * pixels * whole("relu6_bits", relu6_bits, least=1, most=2))
    else:
        kept = inner
    norm = 0 if method == "mobiletl" else inner
    return MobileTLBlock(
        conv_inputs=(4 * narrow * pixels, inner, inner),
        norm_inputs=(norm, norm, 4 * last * pixels),
        activations=(kept, kept),
        squeeze_excite=inner if squeeze_excite else 0,
        squeeze_excite_vectors=_squeeze_excite_vectors(wide, batch_size) if squeeze_excite else 0,
    )


def _squeeze_excite_vectors(channels: int, batch_size: int) -> int:
    """Inputs of the two convolutions, the ReLU's mask between them, and the input of the h-sigmoid at the end."""
    reduced = max(8, (channels // 4 + 4) // 8 * 8)
    return 4 * batch_size * (channels + reduced + channels) + _mask_bytes(batch_size * reduced)


def _mask_bytes(bits: int) -> int:
    return -(-bits // 8)
