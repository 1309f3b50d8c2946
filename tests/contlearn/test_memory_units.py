"""Amounts of memory: read exactly, written to three digits, and nonsense refused in one line."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contlearn.errors import ContlearnError
from contlearn.memory import in_words, parse_bytes

FACTORS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4096", 4096),
        (4096, 4096),
        (4096.0, 4096),
        ("1", 1),
        ("16MB", 16_000_000),
        ("16MiB", 16 * 1024 * 1024),
        ("64 KiB", 65536),
        (" 64\tkb \n", 64_000),
        ("2gib", 2**31),
        ("1.5GB", 1_500_000_000),
        ("16.", 16),
        (".5KB", 500),
        ("1.001KB", 1001),  # 1000.9999999999999 in floating point
        ("8.003GB", 8_003_000_000),
        ("9007199254740993", 2**53 + 1),  # no float
        ("1.9", 1),
        ("0.0015KB", 1),
        ("1.9999KB", 1999),
    ],
)
def test_amounts_are_read_exactly(text: Any, amount: int) -> None:
    assert parse_bytes(text) == amount


@given(st.integers(1, 10**15))
def test_whole_bytes_come_back(amount: int) -> None:
    assert parse_bytes(amount) == parse_bytes(str(amount)) == parse_bytes(f"{amount}B") == amount


@given(
    st.integers(1, 10**9),
    st.integers(0, 10**6 - 1),
    st.sampled_from(sorted(FACTORS)),
    st.sampled_from([str.lower, str.upper, str]),
    st.sampled_from(["", " ", "\t "]),
)
def test_decimals_are_exact_and_rounded_down(whole: int, millionths: int, unit: str, case: Any, space: str) -> None:
    exact = (whole + Fraction(millionths, 10**6)) * FACTORS[unit]
    assert parse_bytes(f"{space}{whole}.{millionths:06}{space}{case(unit)}{space}") == exact.__floor__()


@given(st.integers(1, 10**14))
def test_words_are_read_back_to_three_digits(amount: int) -> None:
    words = in_words(amount)
    assert abs(parse_bytes(words) - amount) <= 0.005 * amount + (1 if amount >= 1000 else 0)
    assert len(words.split()[0].replace(".", "")) <= 3 or amount >= 999.5e9 or words.startswith("1000 ")


@given(st.integers(1, 10**14), st.integers(1, 10**14))
def test_more_bytes_are_never_fewer_in_words(first: int, second: int) -> None:
    low, high = sorted((first, second))
    assert parse_bytes(in_words(low)) <= parse_bytes(in_words(high))


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (12_345, "12.3 kB"),
        (999_499, "999 kB"),
        (1_050_000, "1.05 MB"),
        (1.05e9, "1.05 GB"),
        (2_000_000_000_000, "2000 GB"),
        (-12_345, "-12.3 kB"),
        (None, "-"),
    ],
)
def test_words(amount: float | None, words: str) -> None:
    assert in_words(amount) == words


@pytest.mark.parametrize(
    "value",
    [
        "", " ", "MB", "-5", "+5", "1e3", "1e3MB", "1 000", "1,5MB", "1.2.3", "16 M B", "16 mb 3", "0x10", "16TB",
        "16bit", "nan", "inf", "١٦MB", "16\nMB\nextra", "9" * 5000, "." + "1" * 5000, None, True, False, [], {}, b"16",
        -1, 1e300, float("nan"), float("inf"),
    ],
    ids=lambda value: repr(value)[:12],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(ContlearnError) as caught:
        parse_bytes(value, "budget")
    assert str(caught.value).startswith("budget: expected bytes such as 65536, 64KB or 16MiB, got ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, "0", "0MB", "0.0", "0.9", "0.0009KB"])
def test_less_than_a_byte_is_refused(value: Any) -> None:
    with pytest.raises(ContlearnError, match=r"^memory_budget: expected at least 1 byte, got "):
        parse_bytes(value)


@given(st.text(max_size=20))
def test_any_text_is_an_amount_or_refused_in_one_line(text: str) -> None:
    try:
        assert parse_bytes(text) >= 1
    except ContlearnError as error:
        assert len(str(error).splitlines()) == 1
