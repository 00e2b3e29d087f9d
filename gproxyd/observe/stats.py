"""What has been counted since the process began: the one place where finished requests are added up.

Invariants: everything happens on the event loop's thread, so there are plain integers and no locks. Nothing grows with
traffic: label sets, statuses and histograms are bounded, and what does not fit is counted under "other". What only
counts up never goes down, whatever the configuration becomes. No caller, key or prompt is known here.

Quantiles come from a histogram whose bounds lie 10 % apart, which puts any value between 0.1 ms and 10,000 s at most
5 % off. They cover the last five to ten minutes: the histogram is copied every five minutes, and what had been counted
when the copy before the last was made is subtracted. Old values stay visible until newer ones come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import add
from typing import Any, Literal, Protocol, TypedDict

from gproxyd import __version__
from gproxyd.observe.histogram import FINE, GEN_AI_TOKENS, NOTES, OVERHEAD, Histogram, Recent, quantile
from gproxyd.units import format_usd

OTHER = "other"
"""The label of what is not configured, or did not fit."""

MAX_TALLIES = 1_000
_ROOM = (MAX_TALLIES, MAX_TALLIES + 200, MAX_TALLIES + 201)
"""How many tallies there may be: with a model's own name, with "other" for a model, with "other" for everything."""
MAX_SERIES = 500
"""Label sets of one event counter."""
MAX_STATUSES = 32
"""Different statuses of one tally; the rest is counted under NO_STATUS."""
NO_STATUS = 0

WINDOW = 300.0
"""Seconds between two copies: quantiles cover one to two windows."""


class Tokens(Protocol):
    """What is counted of a request's usage: not negative, None where nobody told."""

    @property
    def input_tokens(self) -> int | None: ...
    @property
    def output_tokens(self) -> int | None: ...
    @property
    def cache_read_tokens(self) -> int | None: ...
    @property
    def cache_write_tokens(self) -> int | None: ...
    @property
    def cache_write_1h_tokens(self) -> int | None: ...
    @property
    def reasoning_tokens(self) -> int | None: ...


def _times() -> Histogram:
    return Histogram(FINE)


def _sizes() -> Histogram:
    return Histogram(GEN_AI_TOKENS)


@dataclass(slots=True, eq=False)
class Tally:
    """The finished requests of one endpoint, provider and model (the upstream's name).

    statuses           status -> requests
    errors             of these, how many failed
    succeeded, failed  seconds from accepting the request to the answer's last byte
    ttft               seconds to the first token, where there was one
    input, output      tokens per request, where they were told
    cost_nano          nano-dollars of the `priced` requests; `unpriced` ones used tokens of unknown price
    """

    endpoint: str
    provider: str
    model: str
    vendor: str
    _stats: Stats
    statuses: dict[int, int] = field(default_factory=dict)
    errors: int = 0
    succeeded: Histogram = field(default_factory=_times)
    failed: Histogram = field(default_factory=_times)
    ttft: Histogram = field(default_factory=_times)
    input: Histogram = field(default_factory=_sizes)
    output: Histogram = field(default_factory=_sizes)
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    cost_nano: int = 0
    priced: int = 0
    unpriced: int = 0
    _unfiled: int = 0
    recent: Recent = field(init=False)
    recent_ttft: Recent = field(init=False)
    _turns_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.recent, self.recent_ttft = Recent(self.succeeded), Recent(self.ttft)
        self._turns_at = self._stats.clock() + WINDOW

    def finished(
        self,
        status: int,
        duration: float,
        ttft: float | None,
        request_overhead: float | None,
        response_overhead: float | None,
        usage: Tokens | None,
        cost_nano: int | None,
        error: bool,
    ) -> None:
        """Counts one request. Times in seconds; None where it did not come so far. On the hot path: 1 to 2 µs.

        `request_overhead` goes from accepting the request to having written it upstream, `response_overhead` from the
        upstream's first byte to having written it to the client.
        """
        stats = self._stats
        now = stats.clock()
        if now >= self._turns_at:
            self._turn(now)
        self._unfiled += 1
        if self._unfiled >= NOTES:
            self._file()
        try:
            self.statuses[status] += 1
        except KeyError:
            self._count_new(status)
        if error:
            self.errors += 1
            self.failed.add(duration)
        else:
            self.succeeded.add(duration)
        if ttft is not None:
            self.ttft.add(ttft)
        if request_overhead is not None:
            stats.request_overhead.add(request_overhead)
        if response_overhead is not None:
            stats.response_overhead.add(response_overhead)
        if cost_nano is not None:
            self.cost_nano += cost_nano
            self.priced += 1
        elif usage is not None:
            self.unpriced += 1
        if usage is None:
            return
        if (tokens := usage.input_tokens) is not None:
            self.input.add(tokens)
        if (tokens := usage.output_tokens) is not None:
            self.output.add(tokens)
        if tokens := usage.cache_read_tokens:
            self.cache_read += tokens
        if tokens := usage.cache_write_tokens:
            self.cache_write += tokens
        if tokens := usage.cache_write_1h_tokens:
            self.cache_write += tokens
        if tokens := usage.reasoning_tokens:
            self.reasoning += tokens

    def _file(self) -> None:
        self._unfiled = 0
        stats = self._stats
        for histogram in (self.succeeded, self.failed, self.ttft, self.input, self.output):
            histogram.file()
        stats.request_overhead.file()
        stats.response_overhead.file()

    def _count_new(self, status: int) -> None:
        """An upstream may send any number, and another one every time."""
        known = 100 <= status <= 599 and len(self.statuses) < MAX_STATUSES
        kept = status if known else NO_STATUS
        self.statuses[kept] = self.statuses.get(kept, 0) + 1

    def _turn(self, now: float) -> None:
        forget = self.idle(now)
        for recent in (self.recent, self.recent_ttft):
            recent.turn(forget=forget)
        self._turns_at = now + WINDOW

    def idle(self, now: float) -> bool:
        """Whether everything counted here is older than what quantiles should cover."""
        return now >= self._turns_at + WINDOW

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())

    def tokens(self) -> dict[str, int]:
        """Tokens by kind. Kinds overlap as the vendors' do; writes to a cache are those of every lifetime."""
        return {
            "input": int(self.input.total),
            "output": int(self.output.total),
            "cache_read": self.cache_read,
            "cache_write": self.cache_write,
            "reasoning": self.reasoning,
        }


class Breaker(TypedDict):
    """A circuit breaker. `retry_at` in RFC 3339, None unless it is open."""

    state: Literal["closed", "half-open", "open"]
    failures: int
    opens: int
    retry_at: str | None


def _nothing() -> Any:
    return {}


def _zero() -> int:
    return 0


@dataclass(slots=True)
class Sources:
    """Where the values of other rooms are read from when somebody asks; the daemon sets them. No names of callers.

    circuit_breakers  target -> Breaker
    providers         name -> anything that can be shown
    mcp               server -> {"state", "tools", "version"}; the state "up" means that its tools can be called
    rate_limiters     "providers" -> name -> model glob -> kind -> {"limit", "remaining"}; more is only shown
    usage_sink        {"queued", "written", "dropped"}; empty without a ledger
    traces            {"sent", "lost"} spans; empty without tracing
    predecessors      processes that have handed over and still end their streams
    """

    in_flight: Callable[[], int] = _zero
    circuit_breakers: Callable[[], Mapping[str, Breaker]] = _nothing
    providers: Callable[[], Mapping[str, Any]] = _nothing
    mcp: Callable[[], Mapping[str, Mapping[str, Any]]] = _nothing
    mcp_active_tasks: Callable[[], int] = _zero
    rate_limiters: Callable[[], Mapping[str, Any]] = _nothing
    usage_sink: Callable[[], Mapping[str, int]] = _nothing
    log_lines_dropped: Callable[[], int] = _zero
    traces: Callable[[], Mapping[str, int]] = _nothing
    predecessors: Callable[[], int] = _zero


class Stats:
    """All counters of the process. `clock` gives monotonic seconds."""

    def __init__(self, sources: Sources | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.sources = sources or Sources()
        self.clock = clock
        self.request_overhead, self.response_overhead = Histogram(OVERHEAD), Histogram(OVERHEAD)
        self.events: dict[str, dict[tuple[str, ...], int]] = {}
        self._tallies: dict[tuple[str, str, str], Tally] = {}
        self._started = clock()

    def tally(self, endpoint: str, provider: str, model: str, vendor: str = "") -> Tally:
        """The counters of a route, to be kept with it. `model` must be "other" unless it is configured.

        `provider` and `model` are empty where there are none; `vendor` is the provider's, if it is known.
        """
        wanted = (endpoint, provider, model)
        for key, room in zip((wanted, (endpoint, provider, OTHER), (OTHER, OTHER, OTHER)), _ROOM, strict=True):
            found = self._tallies.get(key)
            if found is None and len(self._tallies) < room:
                found = self._tallies[key] = Tally(*key, vendor, self)
            if found is not None:
                return found
        raise AssertionError("there is always room for the last")

    @property
    def tallies(self) -> tuple[Tally, ...]:
        return tuple(self._tallies.values())

    def _count(self, event: str, *labels: str, by: int = 1) -> None:
        counted = self.events.setdefault(event, {})
        if labels not in counted and len(counted) >= MAX_SERIES:
            labels = (OTHER,) * len(labels)
        counted[labels] = counted.get(labels, 0) + by

    def upstream_error(self, provider: str, kind: str) -> None:
        """An attempt failed; `kind` is the reason of an UpstreamError."""
        self._count("upstream_errors", provider, kind)

    def retry(self, provider: str) -> None:
        """A request was sent again, to this provider."""
        self._count("upstream_retries", provider)

    def breaker_turned(self, target: str, state: Literal["closed", "half-open", "open"]) -> None:
        """A breaker has entered `state`."""
        self._count("circuit_breaker_transitions", target, state)

    def limited(self, rule: str) -> None:
        """A request was refused by a rate limit of this kind (rpm, tpm, ...)."""
        self._count("rate_limit_rejections", rule)

    def guarded(self, action: str) -> None:
        """The overflow guard did something about a request that was too long."""
        self._count("overflow_guard_triggers", action)

    def redacted(self, category: str, times: int = 1) -> None:
        """Something of this category was found in a text."""
        self._count("redactions", category, by=times)

    def mcp_tool_called(self, server: str, status: str) -> None:
        self._count("mcp_tool_calls", server, status)

    def statsz(self) -> dict[str, Any]:
        """The document of `/statsz`, ready for JSON. Quantiles and costs of which nothing is known are None."""
        sources = self.sources
        by_model: dict[str, list[Tally]] = {}
        for tally in self._tallies.values():
            if tally.provider and tally.model and tally.statuses:
                by_model.setdefault(f"{tally.provider}/{tally.model}", []).append(tally)
        return {
            "version": __version__,
            "uptime_seconds": round(self.clock() - self._started, 3),
            "requests": {
                "in_flight": sources.in_flight(),
                "total": sum(tally.requests for tally in self._tallies.values()),
            },
            "models": {name: self._model(tallies) for name, tallies in by_model.items()},
            "circuit_breakers": dict(sources.circuit_breakers()),
            "providers": dict(sources.providers()),
            "mcp": dict(sources.mcp()),
            "rate_limiters": dict(sources.rate_limiters()),
            "usage_sink": dict(sources.usage_sink()),
        }

    def _model(self, tallies: list[Tally]) -> dict[str, Any]:
        tokens = [tally.tokens() for tally in tallies]
        priced = any(tally.priced for tally in tallies)
        # An endpoint that nobody uses any more must not keep its old values among another's new ones.
        now = self.clock()
        recent = [tally for tally in tallies if not tally.idle(now)] or tallies
        return {
            "requests": sum(tally.requests for tally in tallies),
            "errors": sum(tally.errors for tally in tallies),
            **{f"{kind}_tokens": sum(each[kind] for each in tokens) for kind in tokens[0]},
            "cost_usd": format_usd(sum(tally.cost_nano for tally in tallies)) if priced else None,
            "latency_ms": _quantiles(tally.recent for tally in recent),
            "ttft_ms": _quantiles(tally.recent_ttft for tally in recent),
        }


def _quantiles(recents: Iterable[Recent]) -> dict[str, float | None]:
    """p50, p90 and p99 in milliseconds, to four digits."""
    counts = [0] * (len(FINE) + 1)
    for recent in recents:
        counts = list(map(add, counts, recent.counts()))
    found = {name: quantile(counts, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {name: None if value is None else float(f"{value * 1000:.4g}") for name, value in found.items()}
