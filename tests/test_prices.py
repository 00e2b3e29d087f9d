"""Money: exact to the nano-dollar, never negative, and unknown where it is not known."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.config import Price as Configured
from gproxyd.dialects.usage import MAX_COUNT, Usage
from gproxyd.units import NANO_PER_USD, parse_usd
from gproxyd.vendors import models
from gproxyd.vendors.models import facts
from gproxyd.vendors.prices import Price, Rates, configured, cost, price_of, worst
from tests.support.streams import law

GPT = Price(input=2 * NANO_PER_USD, output=8 * NANO_PER_USD, cache_read=NANO_PER_USD // 2)
CLAUDE = Price(*(parse_usd(usd) for usd in ("3", "15", "0.3", "3.75", "6")))
TIERED = price_of(
    Rates(1250, 10_000, 125),
    [(200_000, Rates(2500, 15_000, 250))],
    {"flex": Rates(625, 5000), "priority": Rates(2250, 18_000, 225)},
)


def usd(amount: str) -> int:
    return parse_usd(amount)


COSTS: dict[str, tuple[Price, Usage, int | None]] = {
    "plain": (GPT, Usage(1000, 100), usd("0.0028")),
    "OpenAI's input includes what was cached": (GPT, Usage(1000, 0, 600), usd("0.0011")),
    "Anthropic's does not": (
        CLAUDE, Usage(1000, 100, 2000, 300, 40, cached_in_input=False),
        usd("0.003") + usd("0.0015") + usd("0.0006") + usd("0.001125") + usd("0.00024"),
    ),
    "zeros cost nothing": (GPT, Usage(0, 0), 0),
    "nothing told is unknown": (GPT, Usage(), None),
    "no price at all": (Price(), Usage(1, 1), None),
    "no price, and nothing to pay": (Price(), Usage(0, 0), 0),
    "output without a price": (Price(input=5), Usage(1, 1), None),
    "an embedding has no output": (Price(input=NANO_PER_USD), Usage(8), 8000),
    "cache reads without a price cost as input": (Price(input=10**6, output=0), Usage(10, 0, 4), 10),
    "cache writes without a price cost as input": (
        Price(input=10**6), Usage(10, 0, 0, 5, 6, cached_in_input=False), 21,
    ),
    "an hour's writes without a price cost as others": (
        Price(10**6, 0, 0, 2 * 10**6), Usage(0, 0, 0, 5, 6, cached_in_input=False), 22,
    ),
    "more cached than there was input": (GPT, Usage(10, 0, 1_000_000), usd("0.5")),
    "reasoning with a price of its own": (
        Price(2_000_000, 8_000_000, reasoning=3_000_000), Usage(1, 10, reasoning_tokens=6), 2 + 32 + 18,
    ),
    "reasoning without one": (Price(2_000_000, 8_000_000), Usage(1, 10, reasoning_tokens=6), 82),
    "more reasoning than output": (Price(0, 8_000_000, reasoning=1_000_000), Usage(1, 10, reasoning_tokens=99), 10),
    "half a nano-dollar is rounded up": (Price(input=500_000), Usage(1), 1),
    "less is rounded down": (Price(input=499_999), Usage(1), 0),
    "rounded once, at the end": (Price(input=400_000, output=400_000), Usage(1, 1), 1),
    "at the threshold": (TIERED, Usage(200_000, 0), 250),
    "one beyond it, all of it": (TIERED, Usage(200_001, 100, 1), 502),  # 500.0 + 1.5 + 0.00025
    "the threshold counts what was cached": (
        price_of(Rates(10**6), [(100, Rates(2 * 10**6))]), Usage(1, 0, 100, cached_in_input=False), 202,
    ),
    "flex": (TIERED, Usage(16_000, 1000, service_tier="flex"), 15),
    "a tier that is not in the table costs as standard": (TIERED, Usage(16_000, 0, service_tier="default"), 20),
    "a dearer one does not": (TIERED, Usage(16_000, 0, service_tier="fast"), None),
    "flex beyond the threshold is scaled": (TIERED, Usage(400_000, 1000, service_tier="flex"), 508),  # 1250, 7500
}  # fmt: skip


@pytest.mark.parametrize(("price", "usage", "nano"), COSTS.values(), ids=list(COSTS))
def test_costs(price: Price, usage: Usage, nano: int | None) -> None:
    assert cost(price, usage) == nano


def test_ten_million_times_the_smallest_price_is_exact() -> None:
    price = Price(input=parse_usd("0.1"))  # $0.0000001 a token
    one = cost(price, Usage(1))
    assert one == 100
    assert sum(one for _ in range(10**7)) == NANO_PER_USD
    assert cost(price, Usage(10**7)) == NANO_PER_USD


@pytest.mark.parametrize("rate", [-1, 0.5, float("nan"), True, "1"])
def test_what_is_no_price_is_refused(rate: Any) -> None:
    with pytest.raises(ValueError, match="a price is"):
        Price(output=rate)


def test_a_threshold_that_leaves_something_out_is_scaled_as_its_input_is() -> None:
    price = price_of(Rates(100, 200, 10, reasoning=400), [(5, Rates(200, 300))])
    assert price.rates(6) == Rates(200, 300, 20)


def test_a_tier_that_leaves_something_out_costs_as_standard_there() -> None:
    assert TIERED.rates(1, "flex") == Rates(625, 5000, 125)


def test_the_configuration_s_price() -> None:
    listed = Configured.model_validate({"input": "3", "output": "15", "cache_read": "0.30"})
    assert configured(listed) == Price(usd("3"), usd("15"), usd("0.3"))
    assert configured(Configured()) == Price()


_RATE = st.none() | st.integers(0, 10**12)
_RATES = st.builds(Rates, _RATE, _RATE, _RATE, _RATE, _RATE, _RATE)
_TOKENS = st.none() | st.integers(0, MAX_COUNT)
_USAGES = st.builds(
    Usage, _TOKENS, _TOKENS, _TOKENS, _TOKENS, _TOKENS, _TOKENS,
    st.sampled_from([None, "default", "flex", "priority", "fast"]), cached_in_input=st.booleans(),
)  # fmt: skip
_PRICES = st.builds(
    price_of, _RATES, st.lists(st.tuples(st.integers(0, MAX_COUNT), _RATES), max_size=2),
    st.dictionaries(st.sampled_from(["flex", "priority", "fast"]), _RATES, max_size=2),
)  # fmt: skip


@law(500)
@given(_PRICES, _USAGES)
def test_no_cost_is_negative_or_above_the_worst(price: Price, usage: Usage) -> None:
    nano = cost(price, usage)
    if nano is None:
        return
    fresh = 0 if usage.cached_in_input else usage.cached_tokens
    prompt = max((usage.input_tokens or 0) + fresh, usage.cached_tokens)
    assert type(nano) is int
    assert 0 <= nano <= worst(price, prompt, usage.output_tokens or 0)


@law(200)
@given(_RATES, _USAGES)
def test_a_cost_is_exact_but_for_half_a_nano_dollar(rates: Rates, usage: Usage) -> None:
    nano = rates.cost(usage)
    if nano is None:
        return
    cached = usage.cached_tokens if usage.cached_in_input else 0
    thought = min(usage.reasoning_tokens or 0, usage.output_tokens or 0) if rates.reasoning is not None else 0
    write = rates.input if rates.cache_write is None else rates.cache_write
    exact = Fraction(
        max(0, (usage.input_tokens or 0) - cached) * (rates.input or 0)
        + (usage.cache_read_tokens or 0) * ((rates.input if rates.cache_read is None else rates.cache_read) or 0)
        + (usage.cache_write_tokens or 0) * (write or 0)
        + (usage.cache_write_1h_tokens or 0) * ((write if rates.cache_write_1h is None else rates.cache_write_1h) or 0)
        + ((usage.output_tokens or 0) - thought) * (rates.output or 0)
        + thought * (rates.reasoning or 0),
        10**6,
    )
    assert -Fraction(1, 2) < nano - exact <= Fraction(1, 2)


def test_the_worst_of_a_long_prompt_is_the_dearest_threshold_in_the_dearest_tier() -> None:
    assert worst(TIERED, 200_000, 1000) == 450 + 18  # priority
    assert worst(TIERED, 200_000, 1000, tiers=()) == 250 + 10
    assert worst(TIERED, 300_000, 1000, tiers=()) == 750 + 15
    assert worst(TIERED, 300_000, 1000) == 1350 + 27  # priority, scaled
    assert worst(CLAUDE, 1_000_000, 0) == usd("6")  # all of it written for an hour
    assert worst(Price(), 10, 10) == 0


def test_holds_for_five_long_prompts_do_not_fall_below_what_they_cost() -> None:
    haiku = facts("anthropic", "claude-haiku-5-5")
    assert haiku is not None and haiku.price is not None
    usage = Usage(300_000, 1000, cached_in_input=False)
    spent = cost(haiku.price, usage)
    assert spent == usd("0.1525")  # above 100,000 tokens
    assert worst(haiku.price, 300_000, 1000) >= spent


def test_facts_of_a_model() -> None:
    model = facts("openai", "gpt-5.4")
    assert model is not None and model.price is not None
    assert (model.mode, model.max_output, model.deprecated) == ("chat", 128_000, None)
    assert {"tools", "vision", "reasoning"} <= model.capabilities
    assert model.price.rates(1000) is model.price
    assert (model.price.input, model.price.output, model.price.cache_read) == (usd("2.5"), usd("15"), usd("0.25"))
    assert model.price.rates(272_001) == Rates(usd("5"), usd("22.5"), usd("0.5"))
    assert model.price.rates(1, "flex") == Rates(usd("1.25"), usd("7.5"), usd("0.13"))
    assert model.price.rates(272_001, "flex") == Rates(usd("2.5"), usd("11.25"), usd("0.26"))


SAME = [
    ("openai", "gpt-4o-2099-01-31", "gpt-4o"),
    ("openai", "gpt-5.4-latest", "gpt-5.4"),
    ("anthropic", "claude-opus-5-20261224", "claude-opus-5"),
    ("anthropic", "claude-haiku-4-5@20251001", "claude-haiku-4-5-20251001"),
    ("anthropic", "claude-opus-5@default", "claude-opus-5"),
    ("gemini", "models/gemini-2.5-pro", "gemini-2.5-pro"),
    ("vertex", "publishers/google/models/gemini-2.5-pro", "gemini-2.5-pro"),
]


@pytest.mark.parametrize(("vendor", "model", "plain"), SAME)
def test_ids_that_mean_the_same(vendor: str, model: str, plain: str) -> None:
    known = facts("gemini" if vendor == "vertex" else vendor, plain)
    assert known is not None
    assert facts(vendor, model) == known


def test_a_snapshot_with_its_own_price_keeps_it() -> None:
    old, new = facts("openai", "gpt-4o-2024-05-13"), facts("openai", "gpt-4o")
    assert old is not None and old.price is not None and old.price.input == usd("5")
    assert new is not None and new.price is not None and new.price.input == usd("2.5")


@pytest.mark.parametrize(
    ("vendor", "model"),
    [("openai", ""), ("openai", "gpt-4o-2024-13-01"), ("openai", "gpt-4o-0905"), ("openai", "gpt-4o-2024"), ("x", "y"),
     ("openai", "gpt"), ("openai", "claude-opus-5"), ("custom", "gpt-4o"), ("openai", "@"), ("openai", "GPT-4O"),
     ("openai", "-latest"), ("gemini", "models/models/gemini-2.5-pro")],
)  # fmt: skip
def test_ids_that_mean_nothing_known(vendor: str, model: str) -> None:
    assert facts(vendor, model) is None


def test_every_line_of_the_table_reads() -> None:
    table = models._table()
    every = [(vendor, name, facts(vendor, name)) for vendor, shelf in table.items() for name in shelf]
    assert len(every) == 1262
    priced = [model for _, _, model in every if model is not None and model.price is not None]
    assert len(priced) == 1143
    for vendor, name, model in every:
        assert model is not None, (vendor, name)
        line = table[vendor][name]
        assert line.count("=") == sum(1 for word in line.replace("(", " ").split() if "=" in word), (vendor, name)
        assert {"chat", "responses", "embedding", "rerank", "realtime", "completion", "moderation", "audio_speech",
                "audio_transcription", "image_generation"} >= {model.mode}  # fmt: skip
        assert model.price is None or cost(model.price, Usage(1000, 0)) is not None or "usd" not in line
    assert sum(len(model.above) for model in (each.price for each in priced) if model is not None) == 90


def test_the_table_is_read_quickly() -> None:
    models._table.cache_clear()
    facts.cache_clear()
    began = time.process_time()
    assert facts("openai", "gpt-4o") is not None
    assert time.process_time() - began < 0.15
