"""What a request cost in tokens, as its vendor tells it, and what a request asks for.

Invariants
- A count is a whole number between 0 and MAX_COUNT, or None: nobody told. A told zero is a zero.
- Counts of a stream are cumulative: the last told value of each kind stands, nothing is ever added up over events.
  A zero does not take back a count: compatible servers fill what they do not know (Anthropic's `message_delta`).
- Only members at their places count; what a model wrote is never looked into.

Sources: the OpenAI API reference (chat completions, responses, embeddings, images, audio) and its prompt caching
guide; Anthropic's "Streaming messages", "Prompt caching" and "Service tiers" pages; the Gemini API reference
(UsageMetadata); DeepSeek's "Context caching", Groq's and xAI's chat references, Cohere's rerank reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from gproxyd.types import DialectName

MAX_COUNT: Final = 10**8
"""Tokens: no honest answer has more. A number beyond is taken for this one, and flagged."""

Kinds: TypeAlias = Mapping[str, "str | Kinds"]
"""Names of members -> what they count; for members that are objects, their names in turn."""


@dataclass(slots=True)
class Usage:
    """The tokens of one request; None = not told.

    input_tokens           with OpenAI and Gemini including, with Anthropic excluding what caches read and wrote
                           (`cached_in_input`); Gemini's prompts of its own tools included
    output_tokens          all that is billed as output: reasoning included, whatever the vendor's own count leaves out
    cache_write_tokens     written to caches, except what Anthropic keeps for an hour (`cache_write_1h_tokens`)
    reasoning_tokens       the part of `output_tokens` that was thought
    service_tier           the vendor's word for how it was served, such as "default", "flex", "priority"
    clamped                a number was not taken as told: negative, absurd, broken, or no number
    """

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    reasoning_tokens: int | None = None
    service_tier: str | None = None
    clamped: bool = False
    cached_in_input: bool = True

    @property
    def cached_tokens(self) -> int:
        """What caches read and wrote."""
        return (self.cache_read_tokens or 0) + (self.cache_write_tokens or 0) + (self.cache_write_1h_tokens or 0)

    @property
    def prompt_tokens(self) -> int:
        """The size of the prompt, cached or not: what price tiers go by."""
        told = self.input_tokens or 0
        return max(told, self.cached_tokens) if self.cached_in_input else told + self.cached_tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a dialect tells usage.

    places   of the usage objects in a reply or an event, in rising authority
    kinds    what the members of such an object count
    tiers    places of words that tell the service tier; of one reply's, any other outweighs a standard one
    """

    places: tuple[tuple[str, ...], ...]
    kinds: Kinds
    tiers: tuple[tuple[str, ...], ...]
    cached_in_input: bool = True


# OpenAI's endpoints, and those who speak like it. `cached_tokens` and `cache_write_tokens` are slices of the input.
_OPENAI_INPUT: Kinds = {"cached_tokens": "cache_read", "cache_write_tokens": "cache_write"}
_OPENAI_OUTPUT: Kinds = {"reasoning_tokens": "reasoning"}
_OPENAI = Layout(
    places=(
        ("usage",),
        ("response", "usage"),  # events of the Responses API
        ("x_groq", "usage"),  # Groq's streams, unasked
        ("meta", "tokens"),  # Cohere's rerank: what was read,
        ("meta", "billed_units"),  # and what is charged for
    ),
    kinds={
        "prompt_tokens": "input",
        "input_tokens": "input",
        "completion_tokens": "output",
        "output_tokens": "output",
        "total_tokens": "total",
        "prompt_tokens_details": _OPENAI_INPUT,
        "input_tokens_details": _OPENAI_INPUT,
        "completion_tokens_details": _OPENAI_OUTPUT,
        "output_tokens_details": _OPENAI_OUTPUT,
        "prompt_cache_hit_tokens": "cache_read",  # DeepSeek; hits and misses are the prompt
        "cached_tokens": "cache_read",  # Moonshot
        "reasoning_tokens": "reasoning",  # Perplexity
    },
    tiers=(("service_tier",), ("response", "service_tier")),
)

LAYOUTS: Final[Mapping[DialectName, Layout]] = {
    "openai_chat": _OPENAI,
    "openai_responses": _OPENAI,
    "anthropic": Layout(
        places=(("message", "usage"), ("usage",)),
        kinds={
            "input_tokens": "input",
            "output_tokens": "output",
            "cache_read_input_tokens": "cache_read",
            "cache_creation_input_tokens": "cache_write_all",
            "cache_creation": {
                "ephemeral_5m_input_tokens": "cache_write",
                "ephemeral_1h_input_tokens": "cache_write_1h",
            },
            "output_tokens_details": {"thinking_tokens": "reasoning"},
        },
        tiers=(("usage", "service_tier"), ("message", "usage", "service_tier"), ("usage", "speed"),
               ("message", "usage", "speed")),
        cached_in_input=False,
    ),
    "gemini": Layout(
        places=(("usageMetadata",),),
        kinds={
            "promptTokenCount": "input",
            "toolUsePromptTokenCount": "tool_input",
            "cachedContentTokenCount": "cache_read",
            "candidatesTokenCount": "output",
            "thoughtsTokenCount": "thoughts",
        },
        tiers=(("usageMetadata", "trafficType"), ("usageMetadata", "serviceTier")),
    ),
}  # fmt: skip

_STANDARD = frozenset({"standard", "default", "auto", "on_demand", "unspecified", "traffic_type_unspecified"})
_TIER_NAMES = {
    "on_demand_priority": "priority",  # Vertex
    "on_demand_flex": "flex",
    "service_tier_priority": "priority",
    "service_tier_flex": "flex",
}
_TIER_WORD = re.compile(r"[a-z0-9_.-]{1,32}")


def _tier_name(word: object) -> str | None:
    """A vendor's word for a tier in the spelling that prices know; None if it is no such word."""
    if not isinstance(word, str):
        return None
    if word in _STANDARD:
        return word
    word = word.lower()
    return _TIER_NAMES.get(word, word) if _TIER_WORD.fullmatch(word) else None


def at(value: object, place: tuple[str, ...]) -> object:
    """What stands at a place in a JSON value; None if nothing does."""
    for name in place:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


class Tally:
    """Adds up to one Usage what a reply, or the events of a stream one after the other, tell."""

    __slots__ = ("_clamped", "_counts", "_layout", "tier")

    def __init__(self, dialect: DialectName) -> None:
        self._layout = LAYOUTS[dialect]
        self._counts: dict[str, int] = {}
        self._clamped = False
        self.tier: str | None = None

    def add(self, value: Mapping[str, Any]) -> None:
        """Takes a whole reply, or the data of an event."""
        layout = self._layout
        for place in layout.places:
            told = value.get(place[0])
            if told is None:
                continue
            if len(place) > 1:
                told = at(told, place[1:])
            if isinstance(told, dict):
                self._read(told, layout.kinds)
        tier: str | None = None
        for place in layout.tiers:
            told = value.get(place[0])
            if told is not None:
                word = _tier_name(at(told, place[1:]))
                if word is not None and (tier is None or word not in _STANDARD):
                    tier = word
        if tier is not None:
            self.tier = tier

    def _read(self, told: Mapping[str, Any], kinds: Kinds) -> None:
        counts = self._counts
        for name, value in told.items():
            kind = kinds.get(name)
            if kind is None or value is None:
                continue
            if type(kind) is not str:
                if type(value) is dict:
                    self._read(value, kind)  # type: ignore[arg-type]  # what is no name is a table of them
                continue
            if type(value) is not int or not 0 <= value <= MAX_COUNT:
                value = self._doubted(value)
            if value or (value == 0 and kind not in counts):
                counts[kind] = value

    def _doubted(self, value: object) -> int | None:
        """A number that is no plain count: whole floats are (Cohere), what is absurd is flagged and made harmless."""
        if isinstance(value, float) and value.is_integer() and 0 <= value <= MAX_COUNT:
            return int(value)
        self._clamped = True
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            return None
        return int(-(-min(value, MAX_COUNT) // 1))

    @property
    def usage(self) -> Usage | None:
        """The tokens so far; None if none were told."""
        if not self._counts:
            return None
        get = self._counts.get
        told_output, reasoning = get("output"), get("thoughts", get("reasoning"))
        output, reasoning = _billed_output(self._counts, told_output, reasoning)
        write, write_1h = get("cache_write"), get("cache_write_1h")
        if (all_writes := get("cache_write_all")) is not None:
            write = max(0, all_writes - (write_1h or 0))
        return Usage(
            _sum(get("input"), get("tool_input")) if "input" in self._counts else _input_of(self._counts),
            output,
            get("cache_read"),
            write,
            write_1h,
            reasoning,
            self.tier,
            self._clamped,
            self._layout.cached_in_input,
        )


_PLAIN_MEMBERS = frozenset({
    "prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details",
})  # fmt: skip
_ELSEWHERE = frozenset({"response", "x_groq", "meta"})
_NO_DETAILS: Mapping[str, Any] = {}


def plain_usage(value: Mapping[str, Any]) -> Usage | None:
    """Short cut for what most chat completions tell: prompt, completion, and the total that is just their sum.

    None where anything else may have a say; then `Tally` decides. It would come to the same.
    """
    told = value.get("usage")
    if type(told) is not dict or not _PLAIN_MEMBERS.issuperset(told) or not _ELSEWHERE.isdisjoint(value):
        return None
    prompt, completion = told.get("prompt_tokens"), told.get("completion_tokens")
    read = told.get("prompt_tokens_details") or _NO_DETAILS
    written = told.get("completion_tokens_details") or _NO_DETAILS
    cached, thought = read.get("cached_tokens"), written.get("reasoning_tokens")
    if (
        type(prompt) is not int
        or type(completion) is not int
        or told.get("total_tokens") != prompt + completion
        or not 0 <= prompt <= MAX_COUNT
        or not 0 <= completion <= MAX_COUNT
        or (cached is not None and (type(cached) is not int or not 0 <= cached <= prompt))
        or (thought is not None and (type(thought) is not int or not 0 <= thought <= completion))
        or "cache_write_tokens" in read
    ):
        return None
    tier = value.get("service_tier")
    return Usage(prompt, completion, cached, None, None, thought, None if tier is None else _tier_name(tier))


def _sum(*counts: int | None) -> int | None:
    told = [count for count in counts if count is not None]
    return min(sum(told), MAX_COUNT) if told else None


def _input_of(counts: Mapping[str, int]) -> int | None:
    """Input that nobody names. Rerankers and some embedders tell a total alone, and have no output."""
    return counts.get("tool_input") if "output" in counts else counts.get("total", counts.get("tool_input"))


def _billed_output(
    counts: Mapping[str, int], output: int | None, reasoning: int | None
) -> tuple[int | None, int | None]:
    """Output and reasoning such that the first includes the second.

    Gemini counts thoughts beside candidates. OpenAI counts reasoning inside of completions, xAI beside them, and
    only the total tells; Perplexity's deep research reasons more than it writes. Gemini's OpenAI face has thoughts
    in nothing but the total.
    """
    if "thoughts" in counts:
        return _sum(output, reasoning), reasoning
    if output is None:
        return output, reasoning
    beside = counts.get("total", 0) - counts.get("input", 0) - output
    cached = counts.get("cache_read", 0) + counts.get("cache_write", 0)
    if reasoning and (beside == reasoning or reasoning > output):
        return _sum(output, reasoning), reasoning
    if reasoning is None and "input" in counts and 0 < beside < MAX_COUNT // 2 and beside != cached:
        return _sum(output, beside), beside
    return output, reasoning


def from_value(dialect: DialectName, value: object) -> Usage | None:
    """The usage of a whole reply: a JSON object, or Gemini's array of them, of which the last word counts."""
    tally = Tally(dialect)
    for part in value if isinstance(value, list) else (value,):
        if isinstance(part, dict):
            tally.add(part)
    return tally.usage


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for. `max_output` in tokens, over all its alternatives; None = it sets no bound.

    `stream` says the body does; a Gemini path may say so instead.
    """

    max_output: int | None = None
    stream: bool = False
    include_usage: bool = False
    service_tier: str | None = None


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Where a request bounds its output. Several alternatives may each be as long as the limit."""

    limits: tuple[tuple[str, ...], ...]
    alternatives: tuple[tuple[str, ...], ...] = ()
    tiers: tuple[tuple[str, ...], ...] = (("service_tier",),)
    names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        places = (*self.limits, *self.alternatives, *self.tiers, ("stream_options",))
        object.__setattr__(self, "names", frozenset(place[0] for place in places))


_BOUNDS: Mapping[DialectName, _Bounds] = {
    "openai_chat": _Bounds((("max_completion_tokens",), ("max_tokens",)), (("n",), ("best_of",))),
    "openai_responses": _Bounds((("max_output_tokens",),)),
    "anthropic": _Bounds((("max_tokens",),)),
    # Google's servers read both spellings of a field.
    "gemini": _Bounds(
        tuple((config, name) for config in ("generationConfig", "generation_config")
              for name in ("maxOutputTokens", "max_output_tokens")),
        tuple((config, name) for config in ("generationConfig", "generation_config")
              for name in ("candidateCount", "candidate_count")),
        (("serviceTier",), ("service_tier",)),
    ),
}  # fmt: skip


def request_bounds(dialect: DialectName, body: Mapping[str, Any]) -> Asked:
    """What the JSON object of a request asks for. Where it says a thing twice, the greater number is believed."""
    bounds = _BOUNDS[dialect]
    if bounds.names.isdisjoint(body):
        return Asked(None, body.get("stream") is True)
    limit = _greatest(body, bounds.limits)
    if limit is not None:
        limit = min(limit * max(1, _greatest(body, bounds.alternatives) or 1), MAX_COUNT)
    tier = next((name for place in bounds.tiers if (name := _tier_name(at(body, place))) is not None), None)
    return Asked(
        limit,
        body.get("stream") is True,
        at(body, ("stream_options", "include_usage")) is True,
        tier,
    )


def _greatest(body: Mapping[str, Any], places: tuple[tuple[str, ...], ...]) -> int | None:
    told = [value for place in places if type(value := at(body, place)) is int and value >= 0]
    return min(max(told), MAX_COUNT) if told else None


def estimate_input(size: int) -> int:
    """Tokens that a request body of `size` bytes can hold at worst, for holds on quotas: half its bytes, rounded up.

    Ordinary text has three to five bytes in a token; code, JSON and rare scripts come down to about two.
    """
    return (size + 1) // 2


def estimate_tokens(size: int) -> int:
    """Tokens that `size` bytes of text probably are, for booking what nobody told: a quarter, rounded up."""
    return (size + 3) // 4
