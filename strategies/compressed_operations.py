"""Run any network so that what its layers save for backward takes a byte per number, or a bit: Mesa, arXiv 2111.11124.

The functions that layers call are taken over, so that it holds for any network; their results keep their bits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from contlearn.strategies import compressed_rules as rules
from contlearn.strategies.compressed_copies import Compressor
from contlearn.strategies.compressed_function import Call, Compressed, Rule
from contlearn.strategies.frozen_operations import several_values
from contlearn.strategies.packed import FrozenNorm, packed_clamp, packed_relu


class CompressedOperations(TorchFunctionMode):
    """Inside the block, what the listed functions save for backward is compressed.

    Convolution (2-D), linear, matrix and element-wise products, batch, layer and group normalisation, GELU, SiLU,
    hardswish, softmax and scaled dot-product attention save copies in bytes; ReLU, ReLU6 and hardtanh one bit per
    number, max pooling a byte per window, average pooling nothing. Weights are saved as they are. Small tensors, other
    functions, tensors of another class (a tracer's or those of ``torch.func``) and what has no gradient are left to
    PyTorch.

    Args:
        compressor: makes the copies.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self.compressor = compressor
        self._stack: list[str] = []
        self._calls: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take over the functions listed below."""
        kwargs = kwargs or {}
        own = _OWN.get(func)
        if own is None or not torch.is_grad_enabled() or "out" in kwargs:
            return func(*args, **kwargs)
        return own(self, func, *args, **kwargs)

    @contextlib.contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """The block for steps on ``model``, with calls named after its modules where ranges are averaged by place."""
        handles = []
        if self.compressor.ranges == "ema":
            for name, module in model.named_modules():
                handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
                handles.append(module.register_forward_hook(self._leaving(), always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    # Functions, not methods: a copy of the network (a teacher) takes hooks along, and must not take this object.

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            self._stack.append(name)
            self._calls[name] = 0

        return enter

    def _leaving(self) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._stack:
                self._stack.pop()

        return leave

    def _place(self) -> str:
        """The module that runs and the number of the call in it, the same in every forward; empty outside."""
        if not self._stack:
            return ""
        name = self._stack[-1]
        self._calls[name] = self._calls.get(name, 0) + 1
        return f"{name}:{self._calls[name]}"

    # ------------------------------------------------------------------

    def plain(self, *tensors: Any) -> bool:
        """Whether these are ordinary tensors (or ``None``), of which one needs a gradient."""
        given = [tensor for tensor in tensors if tensor is not None]
        return any(tensor.requires_grad for tensor in given if isinstance(tensor, Tensor)) and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.layout is torch.strided
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            for tensor in given
        )

    def worth(self, x: Tensor, *others: Any) -> bool:
        """Whether a call on ``x`` is to be taken over."""
        return self.plain(x, *others) and self.compressor.takes(x)

    def run(self, rule: Rule, call: Call, *tensors: Tensor | None) -> Tensor:
        """The result of the call, compressed copies kept."""
        return Compressed.apply(rule, call, self.compressor, self._place(), *tensors)  # type: ignore


# ---------------------------------------------------------------------- layers with weights


def _conv2d(
    mode: CompressedOperations, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if not mode.worth(input, weight, bias) or isinstance(padding, str) or input.ndim != 4:
        return func(input, weight, bias, **how)  # type: ignore[no-any-return]
    how = {key: value if key == "groups" else _pair(value) for key, value in how.items()}
    return mode.run(rules.CONV, Call(functools.partial(func, **how), how), input, weight, bias)


def _linear(
    mode: CompressedOperations, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    if not mode.worth(input, weight, bias) or weight.ndim != 2:
        return func(input, weight, bias)  # type: ignore[no-any-return]
    return mode.run(rules.LINEAR, Call(func), input, weight, bias)


def _batch_norm(
    mode: CompressedOperations, func: Any, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    usual = several_values(input) if training else running_mean is not None and running_var is not None
    if not usual or not mode.worth(input, weight, bias):
        return func(  # type: ignore[no-any-return]
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if not training and not any(held is not None and held.requires_grad for held in (weight, bias)):
        return FrozenNorm.apply(input, running_mean, running_var, weight, bias, eps)  # type: ignore
    settings = (running_mean, running_var, training, momentum, eps)
    return mode.run(rules.BATCH_NORM, Call(func, {"settings": settings}), input, weight, bias)


def _layer_norm(
    mode: CompressedOperations, func: Any, input: Tensor, normalized_shape: Any, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not mode.worth(input, weight, bias):
        return func(input, normalized_shape, weight, bias, eps)  # type: ignore[no-any-return]
    if torch.is_autocast_enabled(input.device.type) and input.device.type == "cuda":
        input = input.float()  # as autocast does for this function
    how = {"shape": list(normalized_shape), "eps": eps}
    return mode.run(rules.LAYER_NORM, Call(func, how), input, weight, bias)


def _group_norm(
    mode: CompressedOperations, func: Any, input: Tensor, num_groups: int, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    mixed = torch.is_autocast_enabled(input.device.type)
    if mixed or input.ndim < 3 or not input.is_contiguous() or not mode.worth(input, weight, bias):
        return func(input, num_groups, weight, bias, eps)  # type: ignore[no-any-return]
    return mode.run(rules.GROUP_NORM, Call(func, {"groups": num_groups, "eps": eps}), input, weight, bias)


# ---------------------------------------------------------------------- products of activations


def _matmul(mode: CompressedOperations, func: Any, input: Tensor, other: Tensor) -> Tensor:
    return _two(mode, func, rules.MATMUL, input, other, least=2)


def _bmm(mode: CompressedOperations, func: Any, input: Tensor, mat2: Tensor) -> Tensor:
    return _matmul(mode, func, input, mat2)


def _mul(mode: CompressedOperations, func: Any, input: Tensor, other: Any) -> Tensor:
    return _two(mode, func, rules.PRODUCT, input, other, least=0)


def _two(mode: CompressedOperations, func: Any, rule: Rule, a: Any, b: Any, *, least: int) -> Tensor:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or min(a.ndim, b.ndim) < least or not mode.plain(a, b):
        return func(a, b)  # type: ignore[no-any-return]
    saved = [x for x, other in ((a, b), (b, a)) if other.requires_grad]
    floats = a.is_floating_point() and b.is_floating_point()
    if not floats or not any(mode.compressor.takes(x) for x in saved):
        return func(a, b)  # type: ignore[no-any-return]
    return mode.run(rule, Call(func), a, b)


def _attention(
    mode: CompressedOperations, func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    how = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    learned = attn_mask is not None and attn_mask.requires_grad
    # Dropout would have to fall on the same places when attention runs again.
    if dropout_p or learned or not mode.worth(query, key, value, attn_mask):
        return func(query, key, value, attn_mask, dropout_p, **how)  # type: ignore[no-any-return]
    call = Call(lambda q, k, v, mask: func(q, k, v, mask, 0.0, **how), how)
    return mode.run(rules.ATTENTION, call, query, key, value, attn_mask)


# ---------------------------------------------------------------------- activations


def _relu(mode: CompressedOperations, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    if not _bits(mode, input, inplace):
        return func(input, inplace)  # type: ignore[no-any-return]
    return packed_relu(input, inplace)


def _torch_relu(mode: CompressedOperations, func: Any, input: Tensor) -> Tensor:
    inplace = func in (torch.relu_, Tensor.relu_)
    return packed_relu(input, inplace) if _bits(mode, input, inplace) else func(input)  # type: ignore[no-any-return]


def _hardtanh(
    mode: CompressedOperations, func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    if not _bits(mode, input, inplace):
        return func(input, min_val, max_val, inplace)  # type: ignore[no-any-return]
    return packed_clamp(input, min_val, max_val, inplace)


def _relu6(mode: CompressedOperations, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _hardtanh(mode, F.hardtanh, input, 0.0, 6.0, inplace)


def _gelu(mode: CompressedOperations, func: Any, input: Tensor, approximate: str = "none") -> Tensor:
    call = functools.partial(func, approximate=approximate)
    if not mode.worth(input):
        return call(input)  # type: ignore[no-any-return]
    return mode.run(rules.GELU, Call(call, {"approximate": approximate}), input)


def _silu(mode: CompressedOperations, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _of_input(mode, rules.SILU, func, input, inplace)


def _hardswish(mode: CompressedOperations, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    return _of_input(mode, rules.HARDSWISH, func, input, inplace)


def _of_input(mode: CompressedOperations, rule: Rule, func: Any, input: Tensor, inplace: bool) -> Tensor:
    call = functools.partial(func, inplace=inplace)
    if not mode.worth(input) or (inplace and not _own_memory(input)):
        return call(input)  # type: ignore[no-any-return]
    return mode.run(rule, Call(call, {"inplace": inplace}), input)


def _softmax(
    mode: CompressedOperations, func: Any, input: Tensor, dim: int | None = None, _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if dim is None or dtype is not None or not mode.worth(input):
        return func(input, dim, _stacklevel, dtype)  # type: ignore[no-any-return]
    return mode.run(rules.SOFTMAX, Call(lambda x: func(x, dim, _stacklevel), {"dim": dim}), input)


def _torch_softmax(
    mode: CompressedOperations, func: Any, input: Tensor, dim: Any, dtype: torch.dtype | None = None
) -> Tensor:
    if not isinstance(dim, int) or dtype is not None or not mode.worth(input):
        return func(input, dim, dtype)  # type: ignore[no-any-return]
    return mode.run(rules.SOFTMAX, Call(lambda x: func(x, dim), {"dim": dim}), input)


# ---------------------------------------------------------------------- pooling


def _max_pool(
    mode: CompressedOperations, func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Any:  # fmt: skip
    kernel = _pair(kernel_size)
    if return_indices or kernel[0] * kernel[1] > 256 or not mode.worth(input):
        return func(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    how = {
        "kernel": kernel, "stride": _pair(stride) if stride else kernel, "padding": _pair(padding),
        "dilation": _pair(dilation), "ceil": ceil_mode,
    }  # fmt: skip
    return mode.run(rules.MAX_POOL, Call(func, how), input)


def _avg_pool(
    mode: CompressedOperations, func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None,
) -> Tensor:  # fmt: skip
    kernel = _pair(kernel_size)
    settings = (
        kernel, _pair(stride) if stride else kernel, _pair(padding), ceil_mode, count_include_pad, divisor_override
    )  # fmt: skip
    if not mode.worth(input):
        return func(input, *settings)  # type: ignore[no-any-return]
    return mode.run(rules.AVG_POOL, Call(lambda x: func(x, *settings), {"settings": settings}), input)


def _bits(mode: CompressedOperations, x: Tensor, inplace: bool) -> bool:
    return mode.worth(x) and x.requires_grad and x.element_size() > 1 and (not inplace or _own_memory(x))


def _own_memory(x: Tensor) -> bool:
    """Whether it may be written to by a function of ours; PyTorch refuses it for some views."""
    return not x._is_view()


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return values if len(values) == 2 else (values[0], values[0])  # type: ignore[return-value]


_OWN: dict[Any, Callable[..., Any]] = {
    torch.conv2d: _conv2d, F.linear: _linear, F.batch_norm: _batch_norm, F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.matmul: _matmul, Tensor.matmul: _matmul, Tensor.__matmul__: _matmul, torch.bmm: _bmm, Tensor.bmm: _bmm,
    torch.mm: _bmm, Tensor.mm: _bmm, torch.mul: _mul, Tensor.mul: _mul, Tensor.__mul__: _mul,
    F.scaled_dot_product_attention: _attention,
    F.relu: _relu, torch.relu: _torch_relu, torch.relu_: _torch_relu,
    Tensor.relu: _torch_relu, Tensor.relu_: _torch_relu, F.relu6: _relu6, F.hardtanh: _hardtanh,
    F.gelu: _gelu, F.silu: _silu, F.hardswish: _hardswish,
    F.softmax: _softmax, torch.softmax: _torch_softmax, Tensor.softmax: _torch_softmax,
    F.max_pool2d: _max_pool, F.avg_pool2d: _avg_pool,
}  # fmt: skip
