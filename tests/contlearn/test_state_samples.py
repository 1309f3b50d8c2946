"""Samples in a buffer are stored as positions in the stream, and come back as the same samples in the same order."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.benchmarks.utils import DataAttribute
from avalanche.benchmarks.utils.utils import concat_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from contlearn import models, scenarios, strategies
from contlearn.state import Decoder, Encoder, Samples, Unstorable

STREAMS: dict[str, dict[str, Any]] = {
    "class_incremental": {"n_experiences": 3, "augment": "crop_flip"},
    "task_incremental": {"n_experiences": 3},
    "domain_incremental": {"n_experiences": 2},
    "blurry": {"n_experiences": 3},
    "online": {"n_experiences": 2, "experience_size": 100},
}


def world(name: str) -> Any:
    stream = scenarios.create(name, dataset="digits", **STREAMS[name])
    strategy = strategies.create("naive", models.create("mlp", stream, seed=0, hidden=4), device="cpu")
    return SimpleNamespace(stream=stream, strategy=strategy, samples=Samples(stream))


@functools.cache
def worlds(name: str) -> tuple[Any, Any]:
    """The same stream twice: where samples are stored from, and the process that resumes."""
    return world(name), world(name)


def move(name: str, value: Any) -> Any:
    old, new = worlds(name)
    encoder = Encoder(old.strategy, old.samples)
    text = json.dumps(encoder.value(value, "buffer"))
    images = sum(tensor.nbytes for tensor in encoder.tensors.values() if tensor.dtype is torch.uint8)
    assert images == 0  # positions travel, pixels do not
    return Decoder(new.strategy, new.samples, load(save(encoder.tensors))).value(json.loads(text))


def rows(dataset: Any) -> list[tuple[Any, ...]]:
    """Every sample as plain numbers: pixels after the transform of the current group, label, added attributes, task."""
    torch.manual_seed(0)  # augmentations draw
    return [
        tuple(part.tolist() if hasattr(part, "tolist") else part for part in dataset[i]) for i in range(len(dataset))
    ]


@st.composite
def buffers(draw: st.DrawFn, name: str) -> Any:
    """Subsets of the stream, cut again, shuffled, repeated and joined, as buffers do."""
    experiences = worlds(name)[0].stream.streams["train"]
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        part = experiences[draw(st.integers(0, len(experiences) - 1))].dataset
        for _ in range(draw(st.integers(1, 2))):
            place = st.integers(0, len(part) - 1)
            part = part.subset(draw(st.lists(place, min_size=1, max_size=6)))
        parts.append(part)
    whole = (
        functools.reduce(lambda left, right: left.concat(right), parts)
        if draw(st.booleans())
        else concat_datasets(parts)
    )
    return whole.subset(draw(st.permutations(range(len(whole))))) if draw(st.booleans()) else whole


@pytest.mark.parametrize("name", STREAMS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_buffer_comes_back_in_order(name: str, data: st.DataObject) -> None:
    buffer = data.draw(buffers(name))
    for group in ("train", "eval"):
        before = buffer.with_transforms(group)
        back = move(name, before)
        assert type(back) is type(buffer)
        assert rows(back) == rows(before)
        assert list(back.targets) == list(before.targets)
        assert list(back.targets_task_labels) == list(before.targets_task_labels)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_attributes_that_were_added_come_back_with_their_samples(data: st.DataObject) -> None:
    buffer = data.draw(buffers("class_incremental"))
    widths = data.draw(st.lists(st.integers(1, 4), min_size=len(buffer), max_size=len(buffer)))
    logits = [torch.arange(width) / 7 for width in widths]
    marks = list(range(len(buffer)))
    with_both = type(buffer)(
        [buffer],
        data_attributes=[
            DataAttribute(logits, "logits", use_in_getitem=True),
            DataAttribute(marks, "marks", use_in_getitem=False),
        ],
    )
    order = data.draw(st.permutations(range(len(buffer))))
    cut = with_both.subset(order[: max(1, len(order) // 2)])
    back = move("class_incremental", cut)
    assert rows(back) == rows(cut)
    assert list(back.marks) == list(cut.marks)
    assert all(torch.equal(left, right) for left, right in zip(back.logits, cut.logits, strict=True))
    # It still is a buffer: another cut takes the attributes along.
    assert rows(back.subset([len(back) - 1])) == rows(cut.subset([len(cut) - 1]))


def test_an_empty_buffer_comes_back_empty() -> None:
    empty = worlds("class_incremental")[0].stream.streams["train"][0].dataset.subset([])
    back = move("class_incremental", {"buffer": empty})["buffer"]
    assert len(back) == 0
    assert len(back.concat(worlds("class_incremental")[1].stream.streams["train"][0].dataset.subset([1, 2]))) == 2


def test_one_buffer_held_twice_stays_one() -> None:
    part = worlds("class_incremental")[0].stream.streams["train"][1].dataset.subset([3, 1])
    back = move("class_incremental", {"left": part, "right": [part]})
    assert back["left"] is back["right"][0]


def test_an_experience_comes_back_as_the_streams_own() -> None:
    old, new = worlds("class_incremental")
    held = [old.stream.streams["train"][2], old.stream.streams["test"][1]]
    back = move("class_incremental", held)
    assert back[0] is new.samples.experiences[2]
    assert back[1] is new.stream.streams["test"][1]


@pytest.mark.parametrize("where", ["test", "another stream"])
def test_samples_that_are_not_in_the_training_stream_have_no_stored_form(where: str) -> None:
    old, _ = worlds("class_incremental")
    other = old.stream.streams["test"] if where == "test" else world("class_incremental").stream.streams["train"]
    mixed = old.stream.streams["train"][0].dataset.subset([0]).concat(other[0].dataset.subset([1]))
    with pytest.raises(Unstorable, match=r"^buffer\.memory: holds samples that are not in the training stream"):
        move("class_incremental", {"memory": mixed})
