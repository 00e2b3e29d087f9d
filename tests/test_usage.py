"""Tokens as vendors tell them: every shape that is known, and numbers that cannot be."""

from __future__ import annotations

from typing import Any, get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.dialects.usage import (
    MAX_COUNT,
    Asked,
    Tally,
    Usage,
    estimate_input,
    estimate_tokens,
    from_value,
    request_bounds,
)
from gproxyd.types import DialectName
from tests.support.streams import law

DIALECTS: tuple[DialectName, ...] = get_args(DialectName)

CHAT_DETAILS = {
    "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 128, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
    },
}  # fmt: skip


def chat_usage(prompt: int, completion: int, *, total: int | None = None, cached: int | None = None,
               reasoning: int | None = None, **more: int) -> dict[str, Any]:  # fmt: skip
    """Usage as the Chat Completions API has it, and `more` of what others put beside; None is left out."""
    parts = {
        "total_tokens": total,
        **more,
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        "completion_tokens_details": None if reasoning is None else {"reasoning_tokens": reasoning},
    }
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return counts | {name: part for name, part in parts.items() if part is not None}


REPLIES: dict[str, tuple[DialectName, Any, Usage | None]] = {
    "OpenAI chat": (
        "openai_chat",
        {"object": "chat.completion", "choices": [{}], "service_tier": "default",
         "usage": {"prompt_tokens": 2006, "completion_tokens": 300, "total_tokens": 2306, **CHAT_DETAILS}},
        Usage(2006, 300, 1920, reasoning_tokens=128, service_tier="default"),
    ),
    "OpenAI responses": (
        "openai_responses",
        {"object": "response", "status": "completed", "error": None, "service_tier": "priority",
         "usage": {"input_tokens": 18014, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 18011},
                   "output_tokens": 57, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 18071}},
        Usage(18014, 57, 0, 18011, None, 0, "priority"),
    ),
    "an event of the Responses API": (
        "openai_responses",
        {"type": "response.completed", "response": {"service_tier": "flex", "usage": {
            "input_tokens": 9, "output_tokens": 3, "total_tokens": 12}}},
        Usage(9, 3, service_tier="flex"),
    ),
    "OpenAI embeddings": (
        "openai_chat", {"object": "list", "data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}}, Usage(8),
    ),
    "OpenAI images": (
        "openai_chat",
        {"created": 1, "data": [{"b64_json": "AAAA"}],
         "usage": {"input_tokens": 50, "output_tokens": 4160, "total_tokens": 4210,
                   "input_tokens_details": {"text_tokens": 10, "image_tokens": 40}}},
        Usage(50, 4160),
    ),
    "OpenAI transcription, by tokens": (
        "openai_chat",
        {"text": "hi", "usage": {"type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59,
                                 "input_token_details": {"text_tokens": 0, "audio_tokens": 14}}},
        Usage(14, 45),
    ),
    "OpenAI transcription, by time": (
        "openai_chat", {"text": "hi", "usage": {"type": "duration", "seconds": 9}}, None,
    ),
    "DeepSeek": (
        "openai_chat",
        {"usage": chat_usage(1204, 40, total=1244, cached=1024, reasoning=12, prompt_cache_hit_tokens=1024,
                             prompt_cache_miss_tokens=180)},
        Usage(1204, 40, 1024, reasoning_tokens=12),
    ),
    "DeepSeek, another's field a zero": (
        "openai_chat",
        {"usage": chat_usage(1204, 40, cached=0, prompt_cache_hit_tokens=1024)},
        Usage(1204, 40, 1024),
    ),
    "Groq, unasked": (
        "openai_chat",
        {"choices": [{"delta": {}, "finish_reason": "stop"}],
         "x_groq": {"id": "req_1", "usage": {"queue_time": 0.018, "prompt_tokens": 45, "prompt_time": 0.002,
                                             "completion_tokens": 76, "completion_time": 0.27, "total_tokens": 121}}},
        Usage(45, 76),
    ),
    "xAI counts reasoning beside": (
        "openai_chat",
        {"usage": chat_usage(10120, 1499, total=14428, cached=128, reasoning=2809)},
        Usage(10120, 4308, 128, reasoning_tokens=2809),
    ),
    "xAI, with less reasoning than words": (
        "openai_chat", {"usage": chat_usage(20, 7, total=30, reasoning=3)}, Usage(20, 10, reasoning_tokens=3),
    ),
    "Gemini's OpenAI face has thoughts in the total alone": (
        "openai_chat",
        {"usage": chat_usage(758, 102, total=1725)},
        Usage(758, 967, reasoning_tokens=865),
    ),
    "a total that includes cached tokens besides is no reasoning": (
        "openai_chat", {"usage": chat_usage(5, 10, total=115, cached=100)}, Usage(5, 10, 100),
    ),
    "Perplexity reasons more than it writes": (
        "openai_chat",
        {"usage": chat_usage(33, 7163, total=7196, citation_tokens=20216, num_search_queries=18,
                             reasoning_tokens=73997)},
        Usage(33, 81160, reasoning_tokens=73997),
    ),
    "Cohere's rerank, charged by searches": (
        "openai_chat", {"results": [], "meta": {"billed_units": {"search_units": 1}}}, None,
    ),
    "Cohere's rerank, charged by tokens": (
        "openai_chat",
        {"results": [], "meta": {"billed_units": {"input_tokens": 5.0}, "tokens": {"input_tokens": 66}}},
        Usage(5),
    ),
    "Voyage's rerank": ("openai_chat", {"data": [], "usage": {"total_tokens": 26}}, Usage(26)),
    "Anthropic": (
        "anthropic",
        {"type": "message", "content": [], "usage": {
            "input_tokens": 21, "cache_creation_input_tokens": 556, "cache_read_input_tokens": 18876,
            "cache_creation": {"ephemeral_5m_input_tokens": 456, "ephemeral_1h_input_tokens": 100},
            "output_tokens": 393, "output_tokens_details": {"thinking_tokens": 200},
            "server_tool_use": {"web_search_requests": 1}, "service_tier": "standard"}},
        Usage(21, 393, 18876, 456, 100, 200, "standard", cached_in_input=False),
    ),
    "Anthropic, lifetimes not told": (
        "anthropic",
        {"usage": {"input_tokens": 3, "cache_creation_input_tokens": 50, "cache_read_input_tokens": 0,
                   "cache_creation": None, "output_tokens": 1}},
        Usage(3, 1, 0, 50, cached_in_input=False),
    ),
    "Anthropic, fast": (
        "anthropic",
        {"usage": {"input_tokens": 3, "output_tokens": 1, "service_tier": "standard", "speed": "fast"}},
        Usage(3, 1, service_tier="fast", cached_in_input=False),
    ),
    "Gemini": (
        "gemini",
        {"candidates": [{}], "usageMetadata": {
            "promptTokenCount": 1000, "cachedContentTokenCount": 600, "candidatesTokenCount": 50,
            "toolUsePromptTokenCount": 30, "thoughtsTokenCount": 167, "totalTokenCount": 1247,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1000}], "serviceTier": "priority"}},
        Usage(1030, 217, 600, reasoning_tokens=167, service_tier="priority"),
    ),
    "Vertex": (
        "gemini",
        {"usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 2, "totalTokenCount": 6,
                           "trafficType": "ON_DEMAND_FLEX"}},
        Usage(4, 2, service_tier="flex"),
    ),
    "Gemini, thoughts alone": (
        "gemini", {"usageMetadata": {"promptTokenCount": 4, "thoughtsTokenCount": 20, "totalTokenCount": 24}},
        Usage(4, 20, reasoning_tokens=20),
    ),
    "Gemini's growing array": (
        "gemini",
        [{"usageMetadata": {"promptTokenCount": 4, "totalTokenCount": 4}},
         {"usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 1, "totalTokenCount": 5}},
         {"usageMetadata": {"promptTokenCount": 4, "candidatesTokenCount": 9, "totalTokenCount": 13}}],
        Usage(4, 9),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dialect", "value", "usage"), REPLIES.values(), ids=list(REPLIES))
def test_what_a_vendor_tells(dialect: DialectName, value: Any, usage: Usage | None) -> None:
    assert from_value(dialect, orjson.loads(orjson.dumps(value))) == usage


NOTHING = [{}, {"usage": None}, {"usage": {}}, {"usage": []}, {"usage": "much"}, {"usage": 7}, {"id": 1}, [], [1], None,
           "usage", 5, {"response": None}, {"response": {"usage": None}}, {"usageMetadata": {}}, {"message": "x"},
           {"usage": {"prompt_tokens": None}}, {"meta": {"billed_units": None}}, {"x_groq": {"id": "r"}}]  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("value", NOTHING, ids=str)
def test_nothing_told_is_no_usage(dialect: DialectName, value: Any) -> None:
    assert from_value(dialect, value) is None


ZEROS: dict[DialectName, dict[str, Any]] = {
    "openai_chat": {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}},
    "openai_responses": {"usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}},
    "anthropic": {"usage": {"input_tokens": 0, "output_tokens": 0}},
    "gemini": {"usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": 0, "totalTokenCount": 0}},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_told_zeros_are_zeros(dialect: DialectName) -> None:
    usage = from_value(dialect, ZEROS[dialect])
    assert usage is not None and (usage.input_tokens, usage.output_tokens, usage.clamped) == (0, 0, False)


OUTPUT_NAMES: dict[DialectName, tuple[str, str, str]] = {
    "openai_chat": ("usage", "prompt_tokens", "completion_tokens"),
    "openai_responses": ("usage", "input_tokens", "output_tokens"),
    "anthropic": ("usage", "input_tokens", "output_tokens"),
    "gemini": ("usageMetadata", "promptTokenCount", "candidatesTokenCount"),
}
HOSTILE = [(b"1e18", MAX_COUNT), (b"18446744073709551615", MAX_COUNT), (b"100000001", MAX_COUNT), (b"-5", None),
           (b"-0.5", None), (b"3.7", 4), (b'"12"', None), (b"true", None), (b"false", None), (b"[]", None),
           (b'{"a":1}', None)]  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("number", "taken"), HOSTILE, ids=[repr(number) for number, _ in HOSTILE])
def test_absurd_numbers_are_flagged_and_harmless(dialect: DialectName, number: bytes, taken: int | None) -> None:
    place, first, second = (name.encode() for name in OUTPUT_NAMES[dialect])
    usage = from_value(dialect, orjson.loads(b'{"%b":{"%b":7,"%b":%b}}' % (place, first, second, number)))
    assert usage is not None and usage.clamped
    assert (usage.input_tokens, usage.output_tokens) == (7, taken)


def test_whole_floats_are_plain_counts() -> None:
    assert from_value("openai_chat", {"usage": {"prompt_tokens": 7.0, "completion_tokens": 0.0}}) == Usage(7, 0)


def test_a_total_that_lies_makes_no_output() -> None:
    usage = from_value("openai_chat", {"usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 10**18}})
    assert usage is not None and usage.clamped and usage.output_tokens == 2


@pytest.mark.parametrize("word", ["", "x" * 33, "flex\n", "fl ex", "<b>", "\u0434", 5, None, ["flex"], {"a": 1}])
def test_what_is_no_word_is_no_tier(word: Any) -> None:
    assert from_value("openai_chat", {"service_tier": word, "usage": {"prompt_tokens": 1}}) == Usage(1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_usage_below_the_top_is_none(dialect: DialectName) -> None:
    inner = {"usage": {"prompt_tokens": 5, "input_tokens": 5}, "usageMetadata": {"promptTokenCount": 5}}
    spoof = {"choices": [inner], "candidates": [inner], "content": [inner], "delta": inner, "output": [inner]}
    assert from_value(dialect, spoof) is None


def test_later_words_replace_and_a_zero_takes_nothing_back() -> None:
    tally = Tally("anthropic")
    tally.add({"type": "message_start", "message": {"usage": {
        "input_tokens": 317, "cache_creation_input_tokens": 4425, "output_tokens": 1, "service_tier": "standard",
        "cache_creation": {"ephemeral_5m_input_tokens": 25, "ephemeral_1h_input_tokens": 4400}}}})  # fmt: skip
    tally.add({"type": "message_delta", "usage": {"input_tokens": 0, "output_tokens": 40}})
    tally.add({"type": "message_delta", "usage": {"output_tokens": 89, "cache_creation_input_tokens": 4425}})
    assert tally.usage == Usage(317, 89, None, 25, 4400, None, "standard", cached_in_input=False)


def test_the_prompt_includes_what_was_cached() -> None:
    assert Usage(100, 1, 60, 10).prompt_tokens == 100
    assert Usage(100, 1, 60, 10, 5, cached_in_input=False).prompt_tokens == 175
    assert Usage(None, 1).prompt_tokens == 0


_NAMES = st.sampled_from([
    "usage", "usageMetadata", "message", "response", "x_groq", "meta", "billed_units", "tokens", "prompt_tokens",
    "completion_tokens", "total_tokens", "input_tokens", "output_tokens", "cache_creation", "service_tier", "speed",
    "cache_creation_input_tokens", "ephemeral_1h_input_tokens", "prompt_tokens_details", "cached_tokens",
    "output_tokens_details", "reasoning_tokens", "promptTokenCount", "thoughtsTokenCount", "candidatesTokenCount",
    "error", "type", "choices",
])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=6),
    max_leaves=25,
)


@law(400)
@given(JSON, st.sampled_from(DIALECTS))
def test_no_reply_whatever_makes_a_count_that_cannot_be(value: Any, dialect: DialectName) -> None:
    usage = from_value(dialect, value)
    if usage is None:
        return
    counts = [usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens,
              usage.cache_write_1h_tokens, usage.reasoning_tokens]  # fmt: skip
    for count in counts:
        assert count is None or (type(count) is int and 0 <= count <= MAX_COUNT)


ASKED: list[tuple[DialectName, dict[str, Any], Asked]] = [
    ("openai_chat", {}, Asked()),
    ("openai_chat", {"max_tokens": 100}, Asked(100)),
    ("openai_chat", {"max_tokens": 100, "max_completion_tokens": 300, "n": 3}, Asked(900)),
    ("openai_chat", {"max_tokens": 16, "n": 2, "best_of": 5}, Asked(80)),
    ("openai_chat", {"stream": True, "stream_options": {"include_usage": True}}, Asked(None, True, True)),
    ("openai_chat", {"stream": 1, "stream_options": {"include_usage": 1}}, Asked()),
    ("openai_chat", {"stream_options": None, "n": None, "max_tokens": None}, Asked()),
    ("openai_chat", {"max_tokens": "100", "n": 2}, Asked()),
    ("openai_chat", {"max_tokens": -1}, Asked()),
    ("openai_chat", {"max_tokens": True}, Asked()),
    ("openai_chat", {"max_tokens": 7, "n": 0}, Asked(7)),
    ("openai_chat", {"max_tokens": 0}, Asked(0)),
    ("openai_chat", {"max_tokens": 10**18, "n": 10**18}, Asked(MAX_COUNT)),
    ("openai_chat", {"service_tier": "Flex"}, Asked(service_tier="flex")),
    ("openai_responses", {"max_output_tokens": 64, "max_tokens": 999, "stream": True}, Asked(64, True)),
    ("anthropic", {"max_tokens": 1024, "stream": True, "n": 9}, Asked(1024, True)),
    ("gemini", {"generationConfig": {"maxOutputTokens": 50, "candidateCount": 4}}, Asked(200)),
    ("gemini", {"generation_config": {"max_output_tokens": 50, "candidate_count": 2}}, Asked(100)),
    ("gemini", {"generationConfig": [], "max_tokens": 5}, Asked()),
    ("gemini", {"serviceTier": "SERVICE_TIER_PRIORITY"}, Asked(service_tier="priority")),
]


@pytest.mark.parametrize(("dialect", "body", "asked"), ASKED, ids=str)
def test_what_a_request_asks_for(dialect: DialectName, body: dict[str, Any], asked: Asked) -> None:
    assert request_bounds(dialect, body) == asked


@pytest.mark.parametrize(("size", "worst", "likely"), [(0, 0, 0), (1, 1, 1), (4, 2, 1), (5, 3, 2), (1000, 500, 250)])
def test_estimates_round_up(size: int, worst: int, likely: int) -> None:
    assert (estimate_input(size), estimate_tokens(size)) == (worst, likely)
