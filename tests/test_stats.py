"""What is counted: sums are exact, quantiles are near enough, nothing grows, and `/statsz` has the promised shape."""

from __future__ import annotations

import timeit
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from math import ceil

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gproxyd
from gproxyd.dialects.usage import Usage
from gproxyd.observe import stats as module
from gproxyd.observe.histogram import FINE, HIGHEST, LOWEST, Histogram, quantile
from gproxyd.observe.stats import NO_STATUS, OTHER, WINDOW, Stats, Tally
from gproxyd.types import UsageRecord
from gproxyd.units import format_usd


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def took(tally: Tally, seconds: float, times: int = 1, ttft: float | None = None) -> None:
    for _ in range(times):
        tally.finished(200, seconds, ttft, None, None, None, None, False)


def timed() -> tuple[Clock, Stats, Tally]:
    """A clock, and what goes by it."""
    clock = Clock()
    stats = Stats(clock=clock)
    return clock, stats, stats.tally("chat", "p", "m")


def every_second(clock: Clock, tally: Tally, seconds: float) -> Iterator[None]:
    """So long, a request of one second in each."""
    for _ in range(int(seconds)):
        clock.now += 1
        took(tally, 1.0)
        yield


def latency(stats: Stats, model: str = "p/m") -> dict[str, float | None]:
    found: dict[str, float | None] = stats.statsz()["models"][model]["latency_ms"]
    return found


# Quantiles.

SECONDS = st.floats(LOWEST, HIGHEST) | st.sampled_from(FINE)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(SECONDS, min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]) | st.floats(0.001, 1.0))
def test_a_quantile_is_at_most_five_per_cent_off(values: list[float], share: float) -> None:
    histogram = Histogram(FINE)
    for value in values:
        histogram.add(value)
    true = sorted(values)[max(1, ceil(share * len(values))) - 1]
    found = quantile(histogram.counts, share)
    assert found is not None
    assert abs(found - true) <= 0.05 * true, (found, true)


def test_five_per_cent_also_holds_for_what_statsz_says_in_milliseconds() -> None:
    for value in [LOWEST, 0.00012, 0.0333, 0.4, 3.7, 61.0, 599.0, 9_999.0]:
        stats = Stats()
        took(stats.tally("chat", "p", "m"), value)
        assert latency(stats)["p50"] == pytest.approx(value * 1000, rel=0.05)


@pytest.mark.parametrize(("value", "told"), [(0.0, LOWEST), (LOWEST / 9, LOWEST), (HIGHEST * 5, HIGHEST)])
def test_what_lies_outside_is_told_as_the_limit(value: float, told: float) -> None:
    histogram = Histogram(FINE)
    histogram.add(value)
    assert quantile(histogram.counts, 0.5) == told


def test_of_nothing_there_is_no_quantile() -> None:
    assert quantile(Histogram(FINE).counts, 0.5) is None


def test_bounds_rise_by_ten_per_cent_at_most() -> None:
    assert FINE[0] == LOWEST
    assert FINE[-1] == HIGHEST
    assert all(low < high <= low * 1.1000001 for low, high in pairwise(FINE))


def test_quantiles_are_told_in_order() -> None:
    stats = Stats()
    tally = stats.tally("chat", "p", "m")
    took(tally, 0.1, 80, ttft=0.01)
    took(tally, 1.0, 18, ttft=0.1)
    took(tally, 10.0, 2, ttft=1.0)
    entry = stats.statsz()["models"]["p/m"]
    assert entry["latency_ms"] == pytest.approx({"p50": 100, "p90": 1000, "p99": 10_000}, rel=0.05)
    assert entry["ttft_ms"] == pytest.approx({"p50": 10, "p90": 100, "p99": 1000}, rel=0.05)


def test_failures_do_not_make_a_model_look_fast() -> None:
    stats = Stats()
    tally = stats.tally("chat", "p", "m")
    took(tally, 2.0, 10)
    for _ in range(90):
        tally.finished(429, 0.002, None, None, None, None, None, True)
    assert latency(stats)["p50"] == pytest.approx(2000, rel=0.05)
    assert stats.statsz()["models"]["p/m"]["errors"] == 90


def test_old_traffic_fades_within_two_windows() -> None:
    clock, stats, tally = timed()
    took(tally, 100.0, 1000)
    for _ in every_second(clock, tally, 2 * WINDOW + 1):
        pass
    assert latency(stats)["p99"] == pytest.approx(1000, rel=0.05)


def test_recent_traffic_counts_for_a_whole_window() -> None:
    clock, stats, tally = timed()
    for _ in every_second(clock, tally, 2.5 * WINDOW):
        pass
    took(tally, 100.0, 10_000)
    for _ in every_second(clock, tally, WINDOW - 1):
        assert latency(stats)["p50"] == pytest.approx(100_000, rel=0.05)


def test_the_last_values_stay_visible_until_newer_ones_come() -> None:
    clock, stats, tally = timed()
    took(tally, 5.0, 100)
    clock.now += 100_000
    assert latency(stats)["p50"] == pytest.approx(5000, rel=0.05)
    took(tally, 1.0)
    assert latency(stats)["p99"] == pytest.approx(1000, rel=0.05)


def test_an_endpoint_out_of_use_does_not_mix_into_anothers_quantiles() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    took(stats.tally("embeddings", "p", "m"), 50.0, 1000)
    clock.now += 3 * WINDOW
    took(stats.tally("chat", "p", "m"), 1.0)
    entry = stats.statsz()["models"]["p/m"]
    assert entry["latency_ms"]["p50"] == pytest.approx(1000, rel=0.05)
    assert entry["requests"] == 1001


# Sums.

TOKENS = st.none() | st.integers(0, 2**40)
USAGES = st.none() | st.builds(Usage, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, TOKENS)
COSTS = st.none() | st.integers(0, 10**15)
ROUTES = st.tuples(st.sampled_from(["chat", "messages"]), st.sampled_from(["a", "b"]), st.sampled_from(["m", "n"]))
FINISHED = st.tuples(ROUTES, st.sampled_from([200, 200, 404, 429, 503]), st.booleans(), USAGES, COSTS)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(FINISHED, max_size=60))
def test_statsz_adds_up_exactly_what_was_counted(
    requests: list[tuple[tuple[str, str, str], int, bool, Usage | None, int | None]],
) -> None:
    stats = Stats()
    for route, status, error, usage, cost in requests:
        stats.tally(*route).finished(status, 1.0, None, None, None, usage, cost, error)
    told = stats.statsz()
    assert told["requests"]["total"] == len(requests)
    assert set(told["models"]) == {f"{provider}/{model}" for (_, provider, model), *_ in requests}
    for name, entry in told["models"].items():
        mine = [rest for (_, provider, model), *rest in requests if f"{provider}/{model}" == name]
        used = [usage for _, _, usage, _ in mine if usage is not None]
        costs = [cost for *_, cost in mine if cost is not None]
        assert entry["requests"] == len(mine)
        assert entry["errors"] == sum(error for _, error, _, _ in mine)
        assert entry["input_tokens"] == sum(usage.input_tokens or 0 for usage in used)
        assert entry["output_tokens"] == sum(usage.output_tokens or 0 for usage in used)
        assert entry["cache_read_tokens"] == sum(usage.cache_read_tokens or 0 for usage in used)
        written = sum((usage.cache_write_tokens or 0) + (usage.cache_write_1h_tokens or 0) for usage in used)
        assert entry["cache_write_tokens"] == written
        assert entry["reasoning_tokens"] == sum(usage.reasoning_tokens or 0 for usage in used)
        assert entry["cost_usd"] == (format_usd(sum(costs)) if costs else None)


def test_ten_million_tiny_costs_sum_exactly() -> None:
    stats = Stats()
    tally = stats.tally("chat", "p", "m")
    tally.finished(200, 1.0, None, None, None, None, 10**15 + 1, False)
    for _ in range(10_000):
        tally.finished(200, 1.0, None, None, None, None, 100, False)  # $0.0000001
    assert stats.statsz()["models"]["p/m"]["cost_usd"] == "1000000.001000001"


def test_a_usage_record_is_counted_like_a_usage() -> None:
    record = UsageRecord(
        "i", 0.0, "r", None, None, None, None, None, None, None, None, 7, 5, 3, 2, 1, 4, None, "measured", 200, False,
        1, None, 1.0, False,
    )  # fmt: skip
    stats = Stats()
    stats.tally("chat", "p", "m").finished(200, 1.0, None, None, None, record, None, False)
    entry = stats.statsz()["models"]["p/m"]
    kinds = ("input", "output", "cache_read", "cache_write", "reasoning")
    assert [entry[f"{kind}_tokens"] for kind in kinds] == [7, 5, 3, 3, 4]


def test_tokens_of_unknown_price_are_told_apart_from_requests_without_tokens() -> None:
    tally = Stats().tally("chat", "p", "m")
    tally.finished(200, 1.0, None, None, None, Usage(1, 1), None, False)
    tally.finished(200, 1.0, None, None, None, Usage(1, 1), 0, False)
    tally.finished(502, 1.0, None, None, None, None, None, True)
    assert (tally.priced, tally.unpriced) == (1, 1)


def test_the_two_overheads_are_kept_apart() -> None:
    stats = Stats()
    tally = stats.tally("chat", "p", "m")
    tally.finished(200, 1.0, None, 0.25, 0.5, None, None, False)
    tally.finished(502, 1.0, None, 0.25, None, None, None, True)
    assert (stats.request_overhead.total, stats.response_overhead.total) == (0.5, 0.5)


# Bounds.


def test_a_route_has_one_tally() -> None:
    stats = Stats()
    assert stats.tally("chat", "p", "m") is stats.tally("chat", "p", "m", "openai")
    assert len({id(stats.tally(*route)) for route in [("a", "p", "m"), ("b", "p", "m"), ("a", "q", "m")]}) == 3


def test_any_number_of_names_makes_a_bounded_number_of_tallies() -> None:
    stats = Stats()
    first = stats.tally("chat", "p", "model-0")
    for number in range(20_000):
        took(stats.tally("chat", "p", f"model-{number}"), 1.0)
    for number in range(20_000):
        took(stats.tally(f"endpoint-{number}", f"provider-{number}", "m"), 1.0)
    assert len(stats.tallies) <= module.MAX_TALLIES + 201
    assert sum(tally.requests for tally in stats.tallies) == 40_000
    assert stats.tally("chat", "p", "model-0") is first
    assert stats.tally("chat", "p", "one more").model == OTHER
    assert stats.tally("x", "y", "z").provider == OTHER
    assert stats.statsz()["models"]["p/other"]["requests"] > 18_000


@pytest.mark.parametrize("status", [0, -1, 99, 600, 999, 10**20])
def test_what_is_no_status_is_counted_without_one(status: int) -> None:
    tally = Stats().tally("chat", "p", "m")
    tally.finished(status, 1.0, None, None, None, None, None, True)
    tally.finished(status, 1.0, None, None, None, None, None, True)
    assert tally.statuses == {NO_STATUS: 2}


def test_an_upstream_that_invents_statuses_makes_no_more_than_a_few() -> None:
    tally = Stats().tally("chat", "p", "m")
    for status in (200, *range(100, 1000), 200):
        tally.finished(status, 1.0, None, None, None, None, None, True)
    assert len(tally.statuses) <= module.MAX_STATUSES + 1
    assert tally.requests == 902
    assert tally.statuses[200] == 3


def test_events_are_counted_and_their_labels_bounded() -> None:
    stats = Stats()
    stats.retry("p")
    stats.retry("p")
    stats.redacted("email", 3)
    for number in range(5_000):
        stats.upstream_error("p", f"kind-{number}")
    assert stats.events["upstream_retries"] == {("p",): 2}
    assert stats.events["redactions"] == {("email",): 3}
    errors = stats.events["upstream_errors"]
    assert len(errors) == module.MAX_SERIES + 1
    assert sum(errors.values()) == 5_000
    assert errors[(OTHER, OTHER)] == 5_000 - module.MAX_SERIES


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.usefixtures("traced")
def test_memory_is_bounded() -> None:
    stats = Stats()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(3_000):
        took(stats.tally("chat", f"p{number % 300}", f"m{number}"), 1.0, ttft=0.1)
    full = tracemalloc.get_traced_memory()[0]
    for number in range(20_000):
        value = LOWEST * 1.0005**number
        usage = Usage(number, number, number, number, number, number)
        stats.tally("chat", "p", f"n{number}").finished(
            number % 1000, value, value, value, value, usage, number, number % 2 == 0
        )
    after = tracemalloc.get_traced_memory()[0]
    assert full - before < 16 * 2**20, full - before
    assert after - full < 64 * 2**10, after - full


# The document.

QUANTILES = {"p50": None, "p90": None, "p99": None}


def test_statsz_of_nothing_has_its_shape() -> None:
    told = Stats().statsz()
    assert told.pop("uptime_seconds") < 5
    assert told == {
        "version": gproxyd.__version__,
        "requests": {"in_flight": 0, "total": 0},
        "models": {},
        "circuit_breakers": {},
        "providers": {},
        "mcp": {},
        "rate_limiters": {},
        "usage_sink": {},
    }


def test_statsz_shows_every_section() -> None:
    clock = Clock()
    stats = Stats(clock=clock)
    sources = stats.sources
    sources.in_flight = lambda: 3
    sources.circuit_breakers = lambda: {"p/m": {"state": "open", "failures": 5, "opens": 1, "retry_at": "2026-11-21Z"}}
    sources.providers = lambda: {"p": {"usable": True}}
    sources.mcp = lambda: {"files": {"state": "up", "tools": 2, "version": None}}
    sources.rate_limiters = lambda: {"providers": {"p": {"*": {"rpm": {"limit": 60, "remaining": 12}}}}}
    sources.usage_sink = lambda: {"queued": 1, "written": 2, "dropped": 0}
    stats.tally("chat", "p", "m").finished(502, 1.0, None, None, None, None, None, True)
    clock.now += 12.5
    told = orjson.loads(orjson.dumps(stats.statsz()))
    assert told == {
        "version": gproxyd.__version__,
        "uptime_seconds": 12.5,
        "requests": {"in_flight": 3, "total": 1},
        "models": {
            "p/m": {
                "requests": 1,
                "errors": 1,
                "input_tokens": 0,
                "output_tokens": 0,
                "cache_read_tokens": 0,
                "cache_write_tokens": 0,
                "reasoning_tokens": 0,
                "cost_usd": None,
                "latency_ms": QUANTILES,
                "ttft_ms": QUANTILES,
            }
        },
        "circuit_breakers": {"p/m": {"state": "open", "failures": 5, "opens": 1, "retry_at": "2026-11-21Z"}},
        "providers": {"p": {"usable": True}},
        "mcp": {"files": {"state": "up", "tools": 2, "version": None}},
        "rate_limiters": {"providers": {"p": {"*": {"rpm": {"limit": 60, "remaining": 12}}}}},
        "usage_sink": {"queued": 1, "written": 2, "dropped": 0},
    }


def test_requests_without_a_model_count_in_the_total_only() -> None:
    stats = Stats()
    took(stats.tally("files", "p", ""), 1.0)
    took(stats.tally("models", "", ""), 1.0)
    stats.tally("chat", "p", "never asked for")
    told = stats.statsz()
    assert told["requests"]["total"] == 2
    assert told["models"] == {}


def test_counting_a_request_costs_next_to_nothing() -> None:
    stats = Stats()
    tally, usage = stats.tally("chat", "p", "m"), Usage(1200, 340, None, None, None, 0)

    def count() -> None:
        tally.finished(200, 1.234, 0.321, 0.0002, 0.0001, usage, 52_300, False)

    best = min(timeit.repeat(count, number=2_000, repeat=20)) / 2_000
    print(f"{best * 1e6:.2f} µs a request")
    assert best < 6e-6  # 1.4 µs on an idle core; a busy machine is not a fault of the code
