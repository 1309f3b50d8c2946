"""The codec behind checkpoints: what a strategy holds comes back as it was, from JSON and plain tensors alone."""

from __future__ import annotations

import collections
import copy
import functools
import json
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from contlearn import models, scenarios, strategies
from contlearn.errors import ContlearnError
from contlearn.state import Decoder, Encoder, Samples, Unstorable, rng_state, seed_everything, set_rng_state

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
ARRAYS = ["float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "bool", "complex64"]


@functools.cache
def shared() -> Any:
    """One strategy for all tests, which do not change it."""
    stream = scenarios.class_incremental("digits", n_experiences=3)
    strategy = strategies.create("naive", models.create("mlp", stream, seed=0, hidden=4), device="cpu")
    return SimpleNamespace(strategy=strategy, samples=Samples(stream))


def stored(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """What would be on the disk: the JSON text read back, and the bytes of the tensors read back."""
    encoder = Encoder(shared().strategy, shared().samples)
    text = json.dumps(encoder.value(value, "x"), allow_nan=False)
    return json.loads(text), load(save(encoder.tensors))


def round_trip(value: Any, current: Any = None) -> Any:
    description, tensors = stored(value)
    return Decoder(shared().strategy, shared().samples, tensors).value(description, current)


def same(left: Any, right: Any) -> bool:
    """Equal in type, order and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.requires_grad == right.requires_grad
            and left.detach().numpy(force=True).tobytes() == right.detach().numpy(force=True).tobytes()
            if left.dtype is not torch.bfloat16
            else torch.equal(left.view(torch.int16), right.view(torch.int16))
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return same(list(left), list(right)) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, set | frozenset):
        return left == right
    if isinstance(left, list | tuple | collections.deque):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return np.float64(left).tobytes() == np.float64(right).tobytes() or (left != left and right != right)
    return bool(left == right)


plain = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([0.0, -0.0, 1e300])
)
keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=3,
)
shapes = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    made = torch.randn(draw(shapes), generator=generator).mul(100).to(draw(st.sampled_from(DTYPES)))
    if made.dim() > 1 and draw(st.booleans()):
        made = made.transpose(0, 1)  # not contiguous
    return made


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(shapes))
    made = np.random.default_rng(draw(st.integers(0, 9))).normal(size=shape) * 100
    made = np.asarray(np.abs(made)).astype(draw(st.sampled_from(ARRAYS)))
    return made[::-1] if shape and draw(st.booleans()) else made  # negative strides


values = st.recursive(
    plain | tensors() | arrays(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(collections.deque)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=values)
def test_any_nested_value_comes_back(value: Any) -> None:
    assert same(round_trip(value), value)
    assert same(round_trip(value, current=copy.deepcopy(value)), value)  # put into what is there already


@settings(max_examples=100, deadline=None)
@given(value=values, other=values)
def test_what_was_there_before_does_not_matter(value: Any, other: Any) -> None:
    before = copy.deepcopy(other)
    restored = round_trip(value, current=other)
    if isinstance(other, collections.deque) and isinstance(value, collections.deque):
        assert restored.maxlen == before.maxlen
    assert same(restored, value)


@given(value=st.sampled_from([np.float32(0.1), np.int64(-3), np.bool_(True), np.float64("nan"), np.uint8(255)]))
def test_a_number_of_numpys_comes_back_as_a_number(value: Any) -> None:
    assert same(round_trip(value), value.item())


def test_random_sources_go_on_where_they_were() -> None:
    generator, source = torch.Generator().manual_seed(5), random.Random(7)
    torch.rand(3, generator=generator)
    source.gauss(0, 1)  # leaves a second number in waiting
    one, two = round_trip([generator, source], current=[torch.Generator(), random.Random(1)])
    assert torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=generator))
    assert [two.gauss(0, 1) for _ in range(3)] == [source.gauss(0, 1) for _ in range(3)]


def test_the_global_random_sources_go_on_where_they_were() -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)]

    seed_everything(3)
    draw()
    np.random.normal()  # leaves a second number in waiting
    description, held = stored(rng_state())
    expected = draw()
    seed_everything(99)
    set_rng_state(Decoder(shared().strategy, shared().samples, held).value(description))
    assert draw() == expected


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30])
def test_a_seed_out_of_range_is_the_users_to_mend(seed: int) -> None:
    with pytest.raises(ContlearnError, match=f"seed: expected .* got {seed}"):
        seed_everything(seed)


def test_shared_things_stay_shared() -> None:
    inner: dict[str, Any] = {"a": [1]}
    tensor, array, source = torch.ones(2), np.ones(2), torch.Generator()
    held = {"one": inner, "two": [inner, (inner,)], "t": [tensor, tensor], "n": [array, array], "g": [source, source]}
    back = round_trip(held)
    assert back["one"] is back["two"][0] is back["two"][1][0]
    for key in ("t", "n", "g"):
        assert back[key][0] is back[key][1]
    assert back["t"][0] is not tensor


def test_things_that_hold_themselves_come_back() -> None:
    knot: dict[str, Any] = {"list": [], "deque": collections.deque(maxlen=3)}
    knot["list"].append(knot["list"])
    knot["deque"].append(knot)
    back = round_trip(knot)
    assert back["list"][0] is back["list"]
    assert back["deque"][0] is back


def test_what_was_one_thing_at_the_start_and_is_two_now_comes_back_as_two() -> None:
    now = {"importance": {"w": 1}, "anchor": {"w": 2}}
    start: dict[str, Any] = {}
    start = {"importance": start, "anchor": start}
    assert round_trip(now, current=start) == now


def test_a_bounded_deque_stays_bounded() -> None:
    back = round_trip(collections.deque([1, 2], maxlen=2), current=collections.deque(maxlen=2))
    back.append(3)
    assert list(back) == [2, 3]


class Open:
    """Something a checkpoint cannot know."""


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Open(), "test_state.Open"),
        (open, None),
        (np.array(["text"]), "ndarray of <U4"),
        (np.array([object()]), "ndarray of object"),
        (np.ma.masked_array([1.0]), "MaskedArray"),
        (np.array([1], dtype=">i4"), "ndarray of >i4"),
        (np.longdouble(1), "longdouble"),
        (np.random.default_rng(0), "Generator"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
        (b"bytes", "builtins.bytes"),
        (range(3), "builtins.range"),
        (1j, "builtins.complex"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_what_has_no_stored_form_is_named_by_its_place(value: Any, named: str | None) -> None:
    if named is None:  # has one, or is put there again by the constructor
        round_trip({"here": [value]}, current={"here": [value]})
        return
    with pytest.raises(Unstorable, match=r"^x\.here\.0: ") as refused:
        stored({"here": [value]})
    assert named in str(refused.value)
