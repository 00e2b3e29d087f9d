"""Durations, sizes and money: exact forms, exact inverses, nothing else."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd import units


@pytest.mark.parametrize(
    ("text", "seconds", "formatted"),
    [
        ("0s", 0.0, "0s"),
        ("0d", 0.0, "0s"),
        ("1ms", 0.001, "1ms"),
        ("300ms", 0.3, "300ms"),
        ("1000ms", 1.0, "1s"),
        ("1.5s", 1.5, "1500ms"),
        ("0.1ms", 0.0001, "0.1ms"),
        ("30s", 30.0, "30s"),
        ("90s", 90.0, "90s"),
        ("10min", 600.0, "10min"),
        ("300s", 300.0, "5min"),
        ("24h", 86_400.0, "1d"),
        ("25h", 90_000.0, "25h"),
        ("0.5h", 1_800.0, "30min"),
        ("400d", 34_560_000.0, "400d"),
        ("36500d", units.LONGEST, "36500d"),
    ],
)
def test_durations(text: str, seconds: float, formatted: str) -> None:
    assert units.parse_duration(text) == seconds
    assert units.format_duration(seconds) == formatted


BAD_DURATIONS = [
    "", "0", "30", "1.5", "s", "-1s", "+1s", " 1s", "1 s", "1s ", "1s\n", "1S", "1m", "1sec", "1hour", "1min30s", ".5s",
    "1.s", "1e3s", "1_000s", "infs", "nans", "٣s", "１s", "36501d", "999999999999999999999s", "0.0000000001s",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_DURATIONS)
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be a duration.*\(?\"36500d|30s"):
        units.parse_duration(text)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), units.LONGEST * 2])
def test_durations_that_have_no_form(seconds: float) -> None:
    with pytest.raises(ValueError, match="between 0s and 36500d"):
        units.format_duration(seconds)


@given(
    st.integers(0, 36_500), st.integers(0, 10**9 - 1), st.integers(0, 9), st.sampled_from(["ms", "s", "min", "h", "d"])
)
def test_durations_round_trip(whole: int, fraction: int, places: int, unit: str) -> None:
    text = f"{whole}.{fraction:09d}"[: len(str(whole)) + 1 + places].rstrip(".") + unit
    try:
        seconds = units.parse_duration(text)
    except ValueError:
        assert unit == "d" and whole == 36_500
        return
    formatted = units.format_duration(seconds)
    assert units.parse_duration(formatted) == seconds
    assert units.format_duration(units.parse_duration(formatted)) == formatted


@pytest.mark.parametrize(
    ("text", "size", "formatted"),
    [
        ("0B", 0, "0B"),
        ("512B", 512, "512B"),
        ("1024B", 1024, "1KiB"),
        ("1025B", 1025, "1025B"),
        ("64KiB", 65_536, "64KiB"),
        ("64MiB", 67_108_864, "64MiB"),
        ("2GiB", 2_147_483_648, "2GiB"),
        ("1536MiB", 1_610_612_736, "1536MiB"),
        ("1TiB", 2**40, "1TiB"),
        ("2048TiB", 2**51, "2048TiB"),
    ],
)
def test_sizes(text: str, size: int, formatted: str) -> None:
    assert units.parse_size(text) == size
    assert units.format_size(size) == formatted


BAD_SIZES = [
    "", "0", "64", "MiB", "-1B", "+1B", " 1B", "1 B", "1B\n", "64MB", "64M", "64mib", "64K", "1.5GiB", "1e3B", "1_0B",
    "٣B", "8388608TiB", "99999999999999999999B",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_SIZES)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r'must be a size.*"64MiB"'):
        units.parse_size(text)


@pytest.mark.parametrize("size", [-1, 2**63])
def test_sizes_that_have_no_form(size: int) -> None:
    with pytest.raises(ValueError, match="not negative"):
        units.format_size(size)


@given(st.integers(0, 2**63 - 1))
def test_sizes_round_trip(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == size


@pytest.mark.parametrize(
    ("text", "nano", "formatted"),
    [
        ("0", 0, "0.00"),
        ("0.40", 400_000_000, "0.40"),
        ("0.4", 400_000_000, "0.40"),
        ("1.60", 1_600_000_000, "1.60"),
        ("25", 25_000_000_000, "25.00"),
        ("0.125", 125_000_000, "0.125"),
        ("0.000000001", 1, "0.000000001"),
        ("0.29", 290_000_000, "0.29"),
        ("9007199254.740993", 9_007_199_254_740_993_000, "9007199254.740993"),  # beyond what a float can hold
    ],
)
def test_money(text: str, nano: int, formatted: str) -> None:
    assert units.parse_usd(text) == nano
    assert units.format_usd(nano) == formatted


BAD_MONEY = [
    "", ".", ".5", "5.", "-1", "+1", " 1", "1 ", "1\n", "1e3", "1E-3", "$1", "1USD", "1,5", "1_000", "1.0000000001",
    "nan", "inf", "٣", "1.٣", "1234567890123",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_MONEY)
def test_bad_money(text: str) -> None:
    with pytest.raises(ValueError, match=r'must be an amount in US dollars.*"0\.40"'):
        units.parse_usd(text)


def test_debts_can_be_shown() -> None:
    assert units.format_usd(-3_000_000_000) == "-3.00"
    assert units.format_usd(-1) == "-0.000000001"


@given(st.integers(0, 10**21 - 1))
def test_money_round_trips(nano: int) -> None:
    assert units.parse_usd(units.format_usd(nano)) == nano


@given(st.decimals(0, 10**9, places=9))
def test_money_is_exact(amount: Decimal) -> None:
    assert Fraction(units.parse_usd(f"{amount:f}"), 10**9) == Fraction(amount)


@pytest.mark.parametrize("parse", [units.parse_duration, units.parse_size, units.parse_usd])
def test_errors_never_quote_what_was_read(parse) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="must be") as caught:
        parse("sk-canary")
    assert "canary" not in str(caught.value)
