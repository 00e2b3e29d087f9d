"""What Prometheus is told: every line can be read back, says what was counted, and there are never too many."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import gproxyd
from gproxyd.observe import lag as lags
from gproxyd.observe import metrics
from gproxyd.observe.histogram import DURATION, FINE, GEN_AI_DURATION, GEN_AI_TOKENS, GEN_AI_TTFT, TTFT
from gproxyd.observe.lag import LoopLag
from gproxyd.observe.metrics import Exporter
from gproxyd.observe.stats import Stats
from tests.test_stats import Usage

FAMILIES: dict[str, tuple[str, set[str]]] = {
    "gproxyd_requests": ("counter", {"endpoint", "provider", "model", "status"}),
    "gproxyd_request_duration_seconds": ("histogram", {"provider", "model"}),
    "gproxyd_time_to_first_token_seconds": ("histogram", {"provider", "model"}),
    "gproxyd_overhead_seconds": ("histogram", {"direction"}),
    "gproxyd_tokens": ("counter", {"provider", "model", "kind"}),
    "gproxyd_cost_usd": ("counter", {"provider", "model"}),
    "gproxyd_unpriced_requests": ("counter", {"provider", "model"}),
    "gproxyd_in_flight_requests": ("gauge", set()),
    "gproxyd_predecessors": ("gauge", set()),
    "gproxyd_upstream_errors": ("counter", {"provider", "kind"}),
    "gproxyd_upstream_retries": ("counter", {"provider"}),
    "gproxyd_circuit_breaker_state": ("gauge", {"target"}),
    "gproxyd_circuit_breaker_transitions": ("counter", {"target", "state"}),
    "gproxyd_rate_limit_rejections": ("counter", {"rule"}),
    "gproxyd_rate_limit_remaining": ("gauge", {"provider", "model", "rule"}),
    "gproxyd_overflow_guard_triggers": ("counter", {"action"}),
    "gproxyd_redactions": ("counter", {"category"}),
    "gproxyd_mcp_tool_calls": ("counter", {"server", "status"}),
    "gproxyd_mcp_active_tasks": ("gauge", set()),
    "gproxyd_mcp_server_up": ("gauge", {"server"}),
    "gproxyd_usage_sink_queue": ("gauge", set()),
    "gproxyd_usage_sink_written": ("counter", set()),
    "gproxyd_usage_sink_dropped": ("counter", set()),
    "gproxyd_log_lines_dropped": ("counter", set()),
    "gproxyd_spans_sent": ("counter", set()),
    "gproxyd_spans_lost": ("counter", set()),
    "gproxyd_event_loop_lag_seconds": ("gauge", set()),
    "gproxyd_event_loop_lag_max_seconds": ("gauge", set()),
    "gproxyd_event_loop_delay_seconds": ("histogram", set()),
    "gproxyd_build_info": ("gauge", {"version", "python"}),
    "gen_ai_client_operation_duration_seconds": (
        "histogram",
        {"gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "error_type"},
    ),
    "gen_ai_client_token_usage": (
        "histogram",
        {"gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_token_type"},
    ),
    "gen_ai_server_time_to_first_token_seconds": (
        "histogram",
        {"gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model"},
    ),
}
BY_OTHERS = ("process_", "python_")
"""Families that prometheus_client itself brings."""


def busy() -> tuple[Stats, LoopLag]:
    """Some of everything."""
    stats, lag = Stats(), LoopLag()
    tally = stats.tally("chat", "openai-main", "gpt-5", "openai")
    tally.finished(200, 1.25, 0.3, 0.0002, 0.0001, Usage(100, 20, 50, 5, 6, 7), 1_500_000_000, False)
    tally.finished(200, 3.0, None, 0.0002, 0.0001, Usage(10, 2), None, False)
    tally.finished(429, 0.002, None, 0.0002, None, None, None, True)
    stats.tally("embeddings", "openai-main", "gpt-5", "openai").finished(200, 0.4, None, None, None, None, 500, False)
    stats.tally("files", "openai-main", "").finished(200, 0.1, None, None, None, None, None, False)
    stats.upstream_error("openai-main", "connect")
    stats.retry("openai-main")
    stats.breaker_turned("openai-main/gpt-5", "open")
    stats.limited("rpm")
    stats.guarded("refused")
    stats.redacted("email", 2)
    stats.mcp_tool_called("files", "ok")
    sources = stats.sources
    sources.in_flight = lambda: 4
    sources.circuit_breakers = lambda: {
        "a/x": {"state": "closed", "failures": 0, "opens": 0, "retry_at": None},
        "b/x": {"state": "half-open", "failures": 5, "opens": 1, "retry_at": None},
        "c/x": {"state": "open", "failures": 5, "opens": 1, "retry_at": "2026-11-21T00:00:00Z"},
    }
    sources.rate_limiters = lambda: {
        "providers": {"openai-main": {"*": {"rpm": {"limit": 60, "remaining": 12}}}},
        "user": {"rpm": {"active": 1, "exhausted": 0}},
    }
    sources.mcp = lambda: {
        "files": {"state": "up", "tools": 2, "version": "1"},
        "web": {"state": "down", "tools": 0, "version": None},
    }
    sources.mcp_active_tasks = lambda: 2
    sources.usage_sink = lambda: {"queued": 1, "written": 22, "dropped": 3}
    sources.log_lines_dropped = lambda: 9
    sources.traces = lambda: {"sent": 3, "lost": 1}
    lag.last = 0.007
    lag.histogram.add(0.007)
    return stats, lag


def read(text: bytes) -> dict[str, Metric]:
    families = list(text_string_to_metric_families(text.decode()))
    assert len({family.name for family in families}) == len(families), "a family stands in two places"
    return {family.name: family for family in families}


def samples(text: bytes) -> list[Sample]:
    return [sample for family in read(text).values() for sample in family.samples]


def value(text: bytes, name: str, **labels: str) -> float | None:
    found = [sample.value for sample in samples(text) if sample.name == name and sample.labels == labels]
    assert len(found) <= 1
    return found[0] if found else None


def check_histograms(families: dict[str, Metric]) -> int:
    """Each must rise to its count; how many there are."""
    groups: dict[tuple[str, frozenset[tuple[str, str]]], list[Sample]] = {}
    for family in families.values():
        for sample in family.samples:
            if family.type == "histogram":
                rest = frozenset((key, label) for key, label in sample.labels.items() if key != "le")
                groups.setdefault((family.name, rest), []).append(sample)
    for (name, _), group in groups.items():
        buckets = [sample for sample in group if sample.name == f"{name}_bucket"]
        counts = [sample.value for sample in buckets]
        ends = [float(sample.labels["le"]) for sample in buckets]
        assert all(low < high for low, high in pairwise(ends))
        assert counts == sorted(counts)
        assert ends[-1] == float("inf")
        assert [sample.value for sample in group if sample.name == f"{name}_count"] == [counts[-1]]
        assert len([sample for sample in group if sample.name == f"{name}_sum"]) == 1
    return len(groups)


# What there is.


def test_every_family_has_the_promised_name_type_and_labels() -> None:
    families = read(Exporter(*busy()).render())
    assert {name for name in families if not name.startswith(BY_OTHERS)} == set(FAMILIES)
    for name, (kind, labels) in FAMILIES.items():
        assert families[name].type == kind, name
        assert families[name].samples, name
        assert families[name].documentation.endswith("."), name
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == labels, name


def test_the_process_tells_of_itself() -> None:
    text = Exporter(Stats()).render()
    assert {"process_resident_memory_bytes", "process_open_fds", "python_info"} <= set(read(text))
    assert abs((value(text, "process_start_time_seconds") or 0) - time.time()) < 3600
    assert any(sample.labels.get("version") == gproxyd.__version__ for sample in samples(text))


def test_every_line_can_be_read_back_and_no_series_is_there_twice() -> None:
    text = Exporter(*busy()).render()
    found = samples(text)
    lines = [line for line in text.decode().splitlines() if line and not line.startswith("#")]
    assert len(found) == len(lines)
    assert max(Counter((sample.name, frozenset(sample.labels.items())) for sample in found).values()) == 1
    assert check_histograms(read(text)) > 8


def test_the_values_are_those_that_were_counted() -> None:
    text = Exporter(*busy()).render()
    route = {"endpoint": "chat", "provider": "openai-main", "model": "gpt-5"}
    model = {"provider": "openai-main", "model": "gpt-5"}
    assert value(text, "gproxyd_requests_total", **route, status="200") == 2
    assert value(text, "gproxyd_requests_total", **route, status="429") == 1
    assert value(text, "gproxyd_requests_total", **{**route, "endpoint": "files", "model": ""}, status="200") == 1
    assert value(text, "gproxyd_request_duration_seconds_count", **model) == 4
    assert value(text, "gproxyd_request_duration_seconds_sum", **model) == pytest.approx(4.652)
    assert value(text, "gproxyd_time_to_first_token_seconds_count", **model) == 1
    assert value(text, "gproxyd_overhead_seconds_count", direction="request") == 3
    assert value(text, "gproxyd_overhead_seconds_count", direction="response") == 2
    kinds = {"input": 110, "output": 22, "cache_read": 50, "cache_write": 11, "reasoning": 7}
    for kind, tokens in kinds.items():
        assert value(text, "gproxyd_tokens_total", **model, kind=kind) == tokens
    assert value(text, "gproxyd_cost_usd_total", **model) == 1.5000005
    assert value(text, "gproxyd_unpriced_requests_total", **model) == 1
    assert value(text, "gproxyd_in_flight_requests") == 4
    assert [value(text, "gproxyd_circuit_breaker_state", target=f"{name}/x") for name in "abc"] == [0, 1, 2]
    assert value(text, "gproxyd_circuit_breaker_transitions_total", target="openai-main/gpt-5", state="open") == 1
    assert value(text, "gproxyd_rate_limit_remaining", provider="openai-main", model="*", rule="rpm") == 12
    assert value(text, "gproxyd_redactions_total", category="email") == 2
    assert value(text, "gproxyd_mcp_server_up", server="files") == 1
    assert value(text, "gproxyd_mcp_server_up", server="web") == 0
    assert value(text, "gproxyd_usage_sink_queue") == 1
    assert value(text, "gproxyd_usage_sink_written_total") == 22
    assert value(text, "gproxyd_usage_sink_dropped_total") == 3
    assert value(text, "gproxyd_log_lines_dropped_total") == 9
    assert value(text, "gproxyd_event_loop_lag_seconds") == 0.007


def test_before_anything_happened_the_families_are_named() -> None:
    text = Exporter(Stats(), LoopLag()).render()
    assert set(FAMILIES) <= set(read(text))
    assert value(text, "gproxyd_in_flight_requests") == 0
    assert read(text)["gproxyd_usage_sink_written"].samples == []  # without a ledger nothing is said of one


# Histograms.

SECONDS = st.floats(0, 2e4) | st.sampled_from(FINE)
EXPORTED: list[tuple[str, Sequence[float]]] = [
    ("gproxyd_request_duration_seconds", DURATION),
    ("gen_ai_client_operation_duration_seconds", GEN_AI_DURATION),
    ("gproxyd_time_to_first_token_seconds", TTFT),
    ("gen_ai_server_time_to_first_token_seconds", GEN_AI_TTFT),
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(SECONDS, min_size=1, max_size=30), st.lists(st.integers(0, 2**30), min_size=1, max_size=30))
def test_buckets_hold_exactly_what_does_not_exceed_them(times: list[float], tokens: list[int]) -> None:
    stats = Stats()
    for endpoint in ("chat", "messages"):  # one operation, two tallies
        for seconds in times:
            stats.tally(endpoint, "p", "m").finished(200, seconds, seconds, None, None, None, None, False)
    for count in tokens:
        stats.tally("chat", "p", "m").finished(200, 1e9, None, None, None, Usage(count), 0, False)
    families = read(Exporter(stats).render())
    check_histograms(families)
    ordered = sorted([*times, *times])
    for name, bounds in EXPORTED:
        told = {s.labels["le"]: s.value for s in families[name].samples if s.name.endswith("_bucket")}
        assert [float(end) for end in told] == [*bounds, float("inf")]
        assert [told[end] for end in list(told)[:-1]] == [bisect_right(ordered, bound) for bound in bounds]
    told = {s.labels["le"]: s.value for s in families["gen_ai_client_token_usage"].samples if "le" in s.labels}
    assert list(told.values())[:-1] == [bisect_right(sorted(tokens), bound) for bound in GEN_AI_TOKENS]
    assert told["+Inf"] == len(tokens)


# OpenTelemetry's conventions for generative AI.


def test_the_buckets_are_those_of_the_conventions() -> None:
    assert GEN_AI_DURATION == (
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    )  # fmt: skip
    assert GEN_AI_TOKENS == (
        1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
    )  # fmt: skip


def test_an_operation_is_told_under_its_well_known_names() -> None:
    stats = Stats()
    for endpoint, provider, vendor in [
        ("chat", "a", "openai"),
        ("messages", "b", "anthropic"),
        ("responses", "c", "mistral"),
        ("generate", "d", "gemini"),
        ("generate", "e", "vertex"),
        ("embeddings", "f", ""),
        ("completions", "g", "custom"),
        ("files", "h", "openai"),
        ("models", "i", "openai"),
    ]:
        stats.tally(endpoint, provider, "m", vendor).finished(200, 1.0, None, None, None, None, None, False)
    stats.tally("responses", "c", "", "mistral").finished(200, 1.0, None, None, None, None, None, False)
    family = read(Exporter(stats).render())["gen_ai_client_operation_duration_seconds"]
    told = [sample.labels for sample in family.samples if sample.name.endswith("_count")]
    assert {(labels["gen_ai_operation_name"], labels["gen_ai_provider_name"]) for labels in told} == {
        ("chat", "openai"),
        ("chat", "anthropic"),
        ("chat", "mistral_ai"),
        ("generate_content", "gcp.gemini"),
        ("generate_content", "gcp.vertex_ai"),
        ("embeddings", "f"),
        ("text_completion", "custom"),
    }
    assert {labels["gen_ai_request_model"] for labels in told} == {"m"}


def test_providers_of_one_vendor_are_one_there() -> None:
    stats = Stats()
    for provider in ("openai-main", "openai-spare"):
        stats.tally("chat", provider, "gpt-5", "openai").finished(200, 1.0, 0.5, None, None, Usage(5), 0, False)
    text = Exporter(stats).render()
    labels = {
        "gen_ai_operation_name": "chat",
        "gen_ai_provider_name": "openai",
        "gen_ai_request_model": "gpt-5",
    }
    assert value(text, "gen_ai_client_operation_duration_seconds_count", **labels, error_type="") == 2
    assert value(text, "gen_ai_client_token_usage_sum", **labels, gen_ai_token_type="input") == 10
    assert value(text, "gen_ai_server_time_to_first_token_seconds_count", **labels) == 2
    assert check_histograms(read(text))


def test_failed_operations_have_an_error_type() -> None:
    text = Exporter(*busy()).render()
    labels = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "openai", "gen_ai_request_model": "gpt-5"}
    name = "gen_ai_client_operation_duration_seconds_count"
    assert value(text, name, **labels, error_type="") == 2
    assert value(text, name, **labels, error_type="_OTHER") == 1


# Labels and limits.


@pytest.mark.parametrize("model", ['a"b', "a\\b", "a\nb", "a}b{c,d=e", "modèle-日本", "a/b:c@d", "#", " "])
def test_any_configured_name_comes_back_as_it_is(model: str) -> None:
    stats = Stats()
    stats.tally("chat", "p", model).finished(200, 1.0, 0.5, None, None, Usage(1, 1), 5, False)
    text = Exporter(stats).render()
    assert value(text, "gproxyd_requests_total", endpoint="chat", provider="p", model=model, status="200") == 1


def test_counters_never_go_down_and_any_number_of_names_makes_no_more_series() -> None:
    stats = Stats()
    exporter = Exporter(stats)
    for number in range(30):
        stats.tally("chat", "p", f"m{number}").finished(200, 1.0, None, None, None, Usage(1), 1, False)
    seen: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    sizes = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gproxyd.observe.stats._ROOM", (40, 42, 43))
        for turn in range(4):
            for number in range(2_000):
                tally = stats.tally("chat", f"p{number % 7}", f"m{number}-{turn}")
                tally.finished(100 + number % 800, 0.5, 0.1, 0.001, 0.001, Usage(3, 4), 7, number % 3 == 0)
            families = read(exporter.render())
            for family in families.values():
                for sample in family.samples:
                    if family.type != "gauge" and not family.name.startswith(BY_OTHERS):
                        key = (sample.name, frozenset(sample.labels.items()))
                        assert sample.value >= seen.get(key, 0), key
                        seen[key] = sample.value
            sizes.append(sum(len(family.samples) for family in families.values()))
    assert sum(count for (name, _), count in seen.items() if name == "gproxyd_requests_total") == 8_030
    assert sizes[1] == sizes[2] == sizes[3]


def test_statuses_are_told_as_codes() -> None:
    stats = Stats()
    for status in (200, 499, 529, 0, 999):
        stats.tally("chat", "p", "m").finished(status, 1.0, None, None, None, None, None, False)
    told = {
        sample.labels["status"]: sample.value for sample in read(Exporter(stats).render())["gproxyd_requests"].samples
    }
    assert told == {"200": 1, "499": 1, "529": 1, "other": 2}


# Rendering.


def many(models: int) -> Stats:
    stats = Stats()
    for number in range(models):
        tally = stats.tally("chat", "openai-main", f"gpt-{number}", "openai")
        tally.finished(200, 1.25, 0.3, 0.0002, 0.0001, Usage(100, 20, 50, 5, 6, 7), 1_500, False)
        tally.finished(429, 0.002, None, 0.0002, None, None, None, True)
    return stats


def test_in_pieces_it_is_the_same_text() -> None:
    exporter = Exporter(many(20))
    pieces = list(exporter.pieces())
    text = b"".join(pieces)
    assert max(piece.count(b"\n") for piece in pieces) <= metrics.PIECE + 2
    assert any(not piece.startswith(b"#") for piece in pieces), "no family was cut"
    ours, again = ([line for line in each.splitlines() if b"gproxyd_" in line] for each in (text, exporter.render()))
    assert ours == again
    headers = [line for line in text.splitlines() if line.startswith(b"#")]
    assert len(headers) == len(set(headers)) == 2 * len(read(text))
    assert check_histograms(read(text)) > 60


def test_three_thousand_series_take_less_than_fifty_milliseconds() -> None:
    exporter = Exporter(many(23))
    assert 2_500 < len(samples(exporter.render())) < 3_500

    def once() -> float:
        started = time.perf_counter()
        exporter.render()
        return time.perf_counter() - started

    best = min(once() for _ in range(8))
    print(f"{best * 1000:.1f} ms")
    assert best < 0.05


def test_it_says_which_format_it_is() -> None:
    assert metrics.CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"
    text = Exporter(*busy()).render()
    assert text.endswith(b"\n")
    assert b"# EOF" not in text
    assert b"_created" not in text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
@pytest.mark.parametrize("make", [busy, lambda: (Stats(), LoopLag())], ids=["busy", "idle"])
def test_promtool_finds_nothing(make: Callable[[], tuple[Stats, LoopLag]]) -> None:
    text = Exporter(*make()).render()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# The loop's lag.


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lags, "INTERVAL", 0.02)


LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as running:
        yield running


@pytest.mark.usefixtures("often")
def test_a_loop_that_is_held_up_is_told_to_be_late(runner: asyncio.Runner) -> None:
    lag = LoopLag()

    async def live() -> None:
        lag.start(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        time.sleep(0.2)  # noqa: ASYNC251 - this is the stall
        await asyncio.sleep(0.1)
        lag.stop()

    runner.run(live())
    assert 0.15 < lag.worst < 5
    assert 0.0 <= lag.last < lag.worst
    assert sum(lag.histogram.counts) > 1
    assert value(Exporter(Stats(), lag).render(), "gproxyd_event_loop_lag_max_seconds") == lag.worst


@pytest.mark.usefixtures("often")
def test_a_loop_with_nothing_to_do_is_hardly_late(runner: asyncio.Runner) -> None:
    lag = LoopLag()

    async def live() -> None:
        lag.start(asyncio.get_running_loop())
        await asyncio.sleep(0.5)
        lag.stop()

    runner.run(live())
    timers = sum(lag.histogram.counts)
    assert timers > 2
    assert sum(lag.histogram.counts[:5]) > timers / 2  # up to 20 ms: somebody else may want the core


@pytest.mark.usefixtures("often")
def test_after_stop_it_measures_no_more_and_may_start_again(runner: asyncio.Runner) -> None:
    lag = LoopLag()

    async def live() -> list[int]:
        loop, seen = asyncio.get_running_loop(), []
        for _ in range(2):
            lag.start(loop)
            await asyncio.sleep(0.07)
            lag.stop()
            lag.stop()
            seen.append(sum(lag.histogram.counts))
            await asyncio.sleep(0.07)
            assert sum(lag.histogram.counts) == seen[-1]
        return seen

    first, second = runner.run(live())
    assert 0 < first < second


class Script:
    """A loop whose timers come as late as the test says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timer: tuple[float, Callable[..., None], tuple[object, ...]] | None = None

    def call_later(self, delay: float, callback: Callable[..., None], *args: object) -> object:
        assert self.timer is None, "one timer at a time"
        self.timer = (self.now + delay, callback, args)
        return self

    def fire(self, late: float) -> None:
        assert self.timer is not None
        (due, callback, args), self.timer = self.timer, None
        self.now = due + late
        callback(*args)


def test_the_worst_is_that_of_the_last_minute() -> None:
    script = Script()
    lag = LoopLag(clock=lambda: script.now)
    lag.start(script)  # type: ignore[arg-type]
    assert (lag.last, lag.worst) == (0.0, 0.0)
    script.fire(0.75)
    assert lag.last == lag.worst == 0.75
    for _ in range(119):
        script.fire(0.0)
    assert (lag.last, lag.worst) == (0.0, 0.75)
    script.fire(-0.001)  # a timer that comes early is on time
    assert (lag.last, lag.worst) == (0.0, 0.0)
    assert lag.histogram.total == 0.75
