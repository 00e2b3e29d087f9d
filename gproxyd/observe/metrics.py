"""The counters as Prometheus reads them: text format 0.0.4, made from `stats` at the moment of the scrape.

Invariants: nothing here is counted, only read; a family is taken in one go, so a histogram's parts belong together.
Labels come from the configuration and from the code, never from a request. Base units; counters end in `_total`.

The `gen_ai_*` families are those of OpenTelemetry's semantic conventions for generative AI metrics (status:
development; https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/), translated as the specification of
its Prometheus compatibility says: dots become underscores, the unit `s` becomes `_seconds`, `{token}` goes.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from operator import add

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gproxyd import __version__
from gproxyd.observe.genai import OPERATIONS, provider_name
from gproxyd.observe.histogram import DURATION, GEN_AI_DURATION, GEN_AI_TOKENS, GEN_AI_TTFT, TTFT, Histogram
from gproxyd.observe.lag import LoopLag
from gproxyd.observe.stats import NO_STATUS, OTHER, Stats, Tally
from gproxyd.units import NANO_PER_USD

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

PIECE = 500
"""Samples that are rendered in one go: a few milliseconds."""

BREAKER_STATES = {"closed": 0, "half-open": 1, "open": 2}

# event -> help, labels
_EVENTS = {
    "upstream_errors": ("Attempts that failed, by what happened.", ("provider", "kind")),
    "upstream_retries": ("Requests that were sent again, by where they went.", ("provider",)),
    "circuit_breaker_transitions": ("Circuit breakers entering a state.", ("target", "state")),
    "rate_limit_rejections": ("Requests refused by a rate limit, by its kind.", ("rule",)),
    "overflow_guard_triggers": ("What the guard against too long requests did.", ("action",)),
    "redactions": ("Things found by redaction, by category.", ("category",)),
    "mcp_tool_calls": ("Calls of MCP tools.", ("server", "status")),
}

_MODEL = ("provider", "model")
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")

_Labels = tuple[str, ...]
_Rows = Iterable[tuple[_Labels, Iterable[Histogram]]]
"""Label values, and the histograms that are added up under them."""


class Exporter:
    """Renders everything that is known. `lag` may be left out where no event loop is watched."""

    def __init__(self, stats: Stats, lag: LoopLag | None = None) -> None:
        self._registry = CollectorRegistry()
        for read in (_requests, _gen_ai, _events, _gauges, _sinks):
            self._registry.register(_Reader(partial(read, stats)))
        if lag is not None:
            self._registry.register(_Reader(partial(_lag, lag)))
        self._registry.register(_Reader(_build))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def render(self) -> bytes:
        """The whole text (CONTENT_TYPE)."""
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """The same text bit by bit, for who wants to let others run in between."""
        for family in self._registry.collect():
            yield from _render(family)


class _Reader(Collector):
    """What a registry asks: families from a function."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()


class _Piece(Collector):
    """Some samples of a family."""

    def __init__(self, family: Metric, start: int) -> None:
        self._part = Metric(family.name, family.documentation, family.type)
        self._part.samples = family.samples[start : start + PIECE]

    def collect(self) -> Iterable[Metric]:
        yield self._part


def _render(family: Metric) -> Iterator[bytes]:
    """A family's text. HELP and TYPE stand at its beginning only, and also where there is nothing to tell yet."""
    for start in range(0, len(family.samples) or 1, PIECE):
        text = generate_latest(_Piece(family, start))
        yield text.split(b"\n", 2)[2] if start else text


# Families.


def _counter(name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[_Labels, float]]) -> Metric:
    family = CounterMetricFamily(f"gproxyd_{name}", text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[_Labels, float]]) -> Metric:
    family = GaugeMetricFamily(f"gproxyd_{name}", text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _histogram(name: str, text: str, labels: Sequence[str], bounds: Sequence[float], rows: _Rows) -> Metric:
    """`bounds` are some of those the histograms have; rows without a value are left out."""
    family = HistogramMetricFamily(name, text, labels=labels)
    ends = [floatToGoString(bound) for bound in bounds]  # type: ignore[no-untyped-call]
    for values, histograms in rows:
        merged = list(histograms)
        below = _below(merged)
        if below[-1]:
            slots = [bisect_left(merged[0].bounds, bound) for bound in bounds]
            buckets = [(end, below[slot]) for end, slot in zip(ends, slots, strict=True)]
            total = sum(histogram.total for histogram in merged)
            family.add_metric(values, [*buckets, ("+Inf", below[-1])], total)
    return family


def _below(histograms: Sequence[Histogram]) -> list[int]:
    """How many values do not exceed each bound; the last is all of them."""
    counts: Iterable[int] = histograms[0].counts
    for other in histograms[1:]:
        counts = map(add, counts, other.counts)
    return list(accumulate(counts))


def _grouped(tallies: Iterable[Tally], key: Callable[[Tally], _Labels]) -> dict[_Labels, list[Tally]]:
    groups: defaultdict[_Labels, list[Tally]] = defaultdict(list)
    for tally in tallies:
        groups[key(tally)].append(tally)
    return groups


# Readers.


def _requests(stats: Stats) -> Iterator[Metric]:
    yield _counter(
        "requests",
        "Finished requests.",
        ("endpoint", "provider", "model", "status"),
        (
            ((tally.endpoint, tally.provider, tally.model, OTHER if status == NO_STATUS else str(status)), count)
            for tally in stats.tallies
            for status, count in tally.statuses.items()
        ),
    )
    models = _grouped(stats.tallies, lambda tally: (tally.provider, tally.model))
    yield _histogram(
        "gproxyd_request_duration_seconds",
        "From accepting a request to the last byte of its answer.",
        _MODEL,
        DURATION,
        ((labels, [h for tally in group for h in (tally.succeeded, tally.failed)]) for labels, group in models.items()),
    )
    yield _histogram(
        "gproxyd_time_to_first_token_seconds",
        "From accepting a request to the first token of its answer.",
        _MODEL,
        TTFT,
        ((labels, [tally.ttft for tally in group]) for labels, group in models.items()),
    )
    yield _histogram(
        "gproxyd_overhead_seconds",
        "Time in the gateway: from accepting a request to writing it upstream (request), and from the upstream's first"
        " byte to writing it to the client (response).",
        ("direction",),
        stats.request_overhead.bounds,
        ((("request",), [stats.request_overhead]), (("response",), [stats.response_overhead])),
    )
    yield from _usage(models)


def _usage(models: dict[_Labels, list[Tally]]) -> Iterator[Metric]:
    told = {labels: [tally.tokens() for tally in group] for labels, group in models.items()}
    yield _counter(
        "tokens",
        "Tokens as vendors report them; kinds overlap (OpenAI's and Gemini's input includes what came from a cache,"
        " output includes reasoning).",
        (*_MODEL, "kind"),
        (
            ((*labels, kind), count)
            for labels, each in told.items()
            for kind in each[0]
            if (count := sum(tokens[kind] for tokens in each))
        ),
    )
    yield _counter(
        "cost_usd",
        "What requests of known price have cost, in US dollars.",
        _MODEL,
        (
            (labels, sum(tally.cost_nano for tally in group) / NANO_PER_USD)
            for labels, group in models.items()
            if any(tally.priced for tally in group)
        ),
    )
    yield _counter(
        "unpriced_requests",
        "Requests that used tokens whose price is unknown.",
        _MODEL,
        (
            (labels, unpriced)
            for labels, group in models.items()
            if (unpriced := sum(tally.unpriced for tally in group))
        ),
    )


def _gen_ai_labels(tally: Tally) -> _Labels:
    return (OPERATIONS[tally.endpoint], provider_name(tally.vendor, tally.provider), tally.model)


def _gen_ai(stats: Stats) -> Iterator[Metric]:
    inferences = (tally for tally in stats.tallies if tally.endpoint in OPERATIONS and tally.provider and tally.model)
    groups = _grouped(inferences, _gen_ai_labels)
    yield _histogram(
        "gen_ai_client_operation_duration_seconds",
        "GenAI operation duration.",
        (*_GEN_AI, "error_type"),
        GEN_AI_DURATION,
        # "_OTHER" is the convention's word for an error that is not classified; requests_total has the statuses.
        (
            row
            for labels, group in groups.items()
            for row in (
                ((*labels, ""), [tally.succeeded for tally in group]),
                ((*labels, "_OTHER"), [tally.failed for tally in group]),
            )
        ),
    )
    yield _histogram(
        "gen_ai_client_token_usage",
        "Number of input and output tokens used.",
        (*_GEN_AI, "gen_ai_token_type"),
        GEN_AI_TOKENS,
        (
            row
            for labels, group in groups.items()
            for row in (
                ((*labels, "input"), [tally.input for tally in group]),
                ((*labels, "output"), [tally.output for tally in group]),
            )
        ),
    )
    yield _histogram(
        "gen_ai_server_time_to_first_token_seconds",
        "Time to generate first token, as seen from the gateway.",
        _GEN_AI,
        GEN_AI_TTFT,
        ((labels, [tally.ttft for tally in group]) for labels, group in groups.items()),
    )


def _events(stats: Stats) -> Iterator[Metric]:
    for event, (text, labels) in _EVENTS.items():
        yield _counter(event, text, labels, stats.events.get(event, {}).items())


def _gauges(stats: Stats) -> Iterator[Metric]:
    sources = stats.sources
    yield _gauge("in_flight_requests", "Requests being answered.", (), [((), sources.in_flight())])
    text = "Processes that have handed over to this one and still end their streams."
    yield _gauge("predecessors", text, (), [((), sources.predecessors())])
    yield _gauge(
        "circuit_breaker_state",
        "0 closed, 1 half-open, 2 open.",
        ("target",),
        (((target,), BREAKER_STATES[breaker["state"]]) for target, breaker in sources.circuit_breakers().items()),
    )
    yield _gauge(
        "rate_limit_remaining",
        "What a rate limit towards a provider still grants; the model is the rule's pattern.",
        (*_MODEL, "rule"),
        (
            ((provider, model, kind), limit["remaining"])
            for provider, models in sources.rate_limiters().get("providers", {}).items()
            for model, kinds in models.items()
            for kind, limit in kinds.items()
        ),
    )
    yield _gauge(
        "mcp_server_up",
        "Whether the tools of an MCP server can be called.",
        ("server",),
        (((name,), server["state"] == "up") for name, server in sources.mcp().items()),
    )
    yield _gauge("mcp_active_tasks", "Calls of MCP tools that are running.", (), [((), sources.mcp_active_tasks())])


def _sinks(stats: Stats) -> Iterator[Metric]:
    sink = stats.sources.usage_sink()
    for key, make, name, text in (
        ("queued", _gauge, "usage_sink_queue", "Usage records that wait to be written."),
        ("written", _counter, "usage_sink_written", "Usage records that have been written."),
        ("dropped", _counter, "usage_sink_dropped", "Usage records that were lost."),
    ):
        yield make(name, text, (), [((), sink[key])] if sink else [])
    lost = stats.sources.log_lines_dropped()
    yield _counter("log_lines_dropped", "Log lines that were lost.", (), [((), lost)])
    traces = stats.sources.traces()
    for key, text in (("sent", "Spans that a collector has taken."), ("lost", "Spans that were lost.")):
        yield _counter(f"spans_{key}", text, (), [((), traces[key])] if traces else [])


def _lag(lag: LoopLag) -> Iterator[Metric]:
    yield _gauge("event_loop_lag_seconds", "How late the last timer was.", (), [((), lag.last)])
    yield _gauge("event_loop_lag_max_seconds", "The latest timer of the last minute.", (), [((), lag.worst)])
    yield _histogram(
        "gproxyd_event_loop_delay_seconds",
        "How late timers were.",
        (),
        lag.histogram.bounds,
        [((), [lag.histogram])],
    )


def _build() -> Iterator[Metric]:
    family = InfoMetricFamily("gproxyd_build", "What is running.")
    family.add_metric((), {"version": __version__, "python": platform.python_version()})
    yield family
