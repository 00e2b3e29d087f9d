"""What routing reads in a request: which conversation it belongs to, what it needs, how long it is, who thought."""

from __future__ import annotations

import base64
import copy
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gproxyd
from gproxyd.dialects.capabilities import NEEDS
from gproxyd.dialects.conversation import Sticky, estimate_tokens, needs, sticky_key
from gproxyd.dialects.identity import asked, deleted, made
from gproxyd.dialects.prompt import with_system
from gproxyd.dialects.reasoning import MARKS, digest, reasoning_made, reasoning_origin
from gproxyd.dialects.trim import trim
from gproxyd.dialects.weight import FILE, IMAGE, LOW_IMAGE, text_tokens
from gproxyd.types import DialectName
from gproxyd.wire.operations import Operation, find

DIALECTS: Sequence[DialectName] = get_args(DialectName)

Json = dict[str, Any]


MARKED = {"cache_control": {"type": "ephemeral"}}


def conversation(dialect: DialectName, system: str, said: str, later: Sequence[str] = (), **more: Any) -> Json:
    """A request whose user said something first, and `later` turns of assistant and user by turns."""
    spoken = [said, *later]
    if dialect == "gemini":
        contents = [{"role": "model" if n % 2 else "user", "parts": [{"text": text}]} for n, text in enumerate(spoken)]
        return {"systemInstruction": {"parts": [{"text": system}]}, "contents": contents, **more}
    messages = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(spoken)]
    if dialect == "openai_chat":
        return {"messages": [{"role": "system", "content": system}, *messages], **more}
    if dialect == "anthropic":
        return {"system": system, "messages": messages, **more}
    return {"instructions": system, "input": messages, **more}


def key(dialect: DialectName, fields: Json) -> bytes:
    sticky = sticky_key(dialect, fields)
    assert sticky is not None
    assert len(sticky.key) == 16
    return sticky.key


@pytest.mark.parametrize("dialect", DIALECTS)
def test_later_turns_have_the_key_of_the_first_and_other_conversations_another(dialect: DialectName) -> None:
    first = key(dialect, conversation(dialect, "be kind", "hi", temperature=1))
    assert key(dialect, conversation(dialect, "be kind", "hi", ["hello", "how are you?"], model="other")) == first
    assert key(dialect, conversation(dialect, "be kind", "hi!")) != first
    assert key(dialect, conversation(dialect, "be rude", "hi")) != first


SAME: list[tuple[DialectName, Json, Json]] = [
    (
        "anthropic",
        {"system": "be kind", "messages": [{"role": "user", "content": "hi"}]},
        {
            "system": [{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
                {"role": "assistant", "content": "hello"},
            ],
        },
    ),
    (
        "anthropic",
        {
            "system": [
                {"text": "x-anthropic-billing-header: cc_version=2.1.100.7b4; cch=eb6c6;", "type": "text"},
                {"type": "text", "text": "be kind"},
            ],
            "messages": [{"role": "user", "content": "hi"}],
        },
        {
            "system": [
                {"text": "x-anthropic-billing-header: cc_version=2.1.100.7b4; cch=00f1a;", "type": "text"},
                {"type": "text", "text": "be kind"},
            ],
            "messages": [{"role": "user", "content": "hi"}],
        },
    ),
    (
        "openai_chat",
        {"messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}]},
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
                {"role": "user", "content": [{"text": "hi", "type": "text"}]},
            ]
        },
    ),
    (
        "openai_responses",
        {"input": "hi"},
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}], "id": "msg_1"},
                {"type": "reasoning", "id": "rs_1", "summary": []},
            ]
        },
    ),
    (
        "gemini",
        {"system_instruction": {"parts": {"text": "be kind"}}, "contents": {"parts": [{"text": "hi"}]}},
        {
            "systemInstruction": {"parts": [{"text": "be kind"}]},
            "contents": [{"role": "user", "parts": [{"text": "hi"}]}],
        },
    ),
    (
        "openai_chat",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u", "detail": "low"}}]}
            ]
        },
        {
            "messages": [
                {"content": [{"image_url": {"detail": "low", "url": "u"}, "type": "image_url"}], "role": "user"}
            ]
        },
    ),
]


@pytest.mark.parametrize(("dialect", "one", "other"), SAME, ids=range(len(SAME)))
def test_one_beginning_in_two_spellings_is_one_conversation(dialect: DialectName, one: Json, other: Json) -> None:
    assert key(dialect, one) == key(dialect, other)


def test_a_mark_for_the_cache_on_a_picture_is_no_part_of_it() -> None:
    picture: Json = {"type": "image", "source": {"type": "url", "url": "u"}}
    bare, marked = ({"messages": [{"role": "user", "content": [one]}]} for one in (picture, {**picture, **MARKED}))
    assert key("anthropic", bare) == key("anthropic", marked)


def test_pictures_and_tools_that_differ_are_other_conversations() -> None:
    def asked_of(url: str) -> Json:
        return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}

    assert key("openai_chat", asked_of("a")) != key("openai_chat", asked_of("b"))
    long = "x" * 100_000
    assert key("openai_chat", asked_of(long + "a")) != key("openai_chat", asked_of(long + "b"))


def test_a_clients_own_key_for_its_cache_counts_alone() -> None:
    for dialect in ("openai_chat", "openai_responses"):
        one = key(dialect, conversation(dialect, "a", "b", prompt_cache_key="k"))
        assert key(dialect, conversation(dialect, "c", "d", prompt_cache_key="k")) == one
        assert key(dialect, conversation(dialect, "a", "b", prompt_cache_key="l")) != one
    cached = sticky_key("gemini", conversation("gemini", "a", "b", cachedContent="cachedContents/1"))
    assert cached == sticky_key("gemini", {"contents": [], "cached_content": "cachedContents/1"})
    assert cached is not None
    assert cached.ttl == 3600


def test_what_goes_on_elsewhere_or_says_nothing_is_no_conversation() -> None:
    assert sticky_key("openai_responses", {"input": "go on", "previous_response_id": "resp_1"}) is None
    assert key("openai_responses", {"input": "a", "conversation": "conv_1"}) == key(
        "openai_responses", {"input": "b", "conversation": {"id": "conv_1"}}
    )
    for dialect in DIALECTS:
        assert sticky_key(dialect, {"model": "m"}) is None


EPHEMERAL, HOUR = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}

LIFETIMES: list[tuple[DialectName, Json, float]] = [
    ("anthropic", {}, 300),
    ("anthropic", {"cache_control": EPHEMERAL}, 300),
    ("anthropic", {"cache_control": HOUR}, 3600),
    ("anthropic", {"system": [{"type": "text", "text": "a", "cache_control": HOUR}]}, 3600),
    ("anthropic", {"tools": [{"name": "f"}, {"name": "g", "cache_control": HOUR}]}, 3600),
    ("anthropic", {"system": [{"type": "text", "text": "a", "cache_control": {"ttl": "soon"}}]}, 300),
    ("openai_chat", {}, 600),
    ("openai_chat", {"prompt_cache_retention": "in_memory"}, 600),
    ("openai_chat", {"prompt_cache_retention": "24h"}, 86_400),
    ("openai_responses", {"prompt_cache_retention": "24h"}, 86_400),
    ("openai_responses", {"prompt_cache_options": {"mode": "implicit"}}, 1800),
    ("openai_responses", {"prompt_cache_options": {"ttl": "2h"}}, 7200),
    ("openai_chat", {"prompt_cache_retention": ["24h"]}, 600),
    ("gemini", {}, 300),
]


@pytest.mark.parametrize(("dialect", "more", "seconds"), LIFETIMES, ids=range(len(LIFETIMES)))
def test_the_cache_lasts_as_long_as_the_request_asked(dialect: DialectName, more: Json, seconds: float) -> None:
    sticky = sticky_key(dialect, {**conversation(dialect, "be kind", "hi"), **more})
    assert sticky is not None
    assert sticky.ttl == seconds


def test_a_mark_in_the_last_messages_of_a_long_conversation_is_seen() -> None:
    fields = conversation("anthropic", "s", "hi", ["a", "b"] * 500)
    fields["messages"][-2] = {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": HOUR}]}
    assert sticky_key("anthropic", fields) == Sticky(key("anthropic", conversation("anthropic", "s", "hi")), 3600)


def said(dialect: DialectName, *parts: Any, **more: Any) -> Json:
    names = {"openai_chat": ("messages", "content"), "openai_responses": ("input", "content")}
    items, content = names.get(dialect, ("contents", "parts") if dialect == "gemini" else ("messages", "content"))
    return {items: [{"role": "user", content: list(parts)}], **more}


PNG, PDF = "data:image/png;base64,iVBOR", "data:application/pdf;base64,JVBER"
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}

NEEDED: list[tuple[DialectName, Json, set[str]]] = [
    ("openai_chat", conversation("openai_chat", "s", "hi", ["hello", "bye"], parallel_tool_calls=True), set()),
    ("openai_chat", said("openai_chat", {"type": "image_url", "image_url": {"url": PNG}}), {"vision"}),
    (
        "openai_chat",
        said("openai_chat", {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
        {"audio_in"},
    ),
    ("openai_chat", said("openai_chat", {"type": "file", "file": {"file_data": PDF}}), {"pdf"}),
    ("openai_chat", said("openai_chat", {"type": "file", "file": {"file_data": "data:text/plain;base64,QQ=="}}), set()),
    ("openai_chat", {"messages": [], "tools": [FUNCTION]}, {"tools"}),
    ("openai_chat", {"messages": [], "tools": [], "functions": []}, set()),
    ("openai_chat", {"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, {"tools"}),
    ("openai_chat", {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, {"tools"}),
    ("openai_chat", {"messages": [], "response_format": {"type": "json_schema", "json_schema": {}}}, {"json_schema"}),
    ("openai_chat", {"messages": [], "response_format": {"type": "json_object"}}, set()),
    ("openai_chat", {"messages": [], "reasoning_effort": "high"}, {"reasoning"}),
    ("openai_chat", {"messages": [], "reasoning_effort": "none"}, set()),
    ("openai_chat", {"messages": [], "modalities": ["text", "audio"], "audio": {"voice": "x"}}, {"audio_out"}),
    ("openai_chat", {"messages": [], "web_search_options": {}}, {"web_search"}),
    ("openai_responses", {"input": "hi"}, set()),
    ("openai_responses", said("openai_responses", {"type": "input_image", "image_url": PNG}), {"vision"}),
    ("openai_responses", said("openai_responses", {"type": "input_file", "file_id": "file-1"}), {"pdf"}),
    (
        "openai_responses",
        {
            "input": [
                {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image", "file_id": "f"}]}
            ]
        },
        {"tools", "vision"},
    ),
    ("openai_responses", {"input": "hi", "text": {"format": {"type": "json_schema"}}}, {"json_schema"}),
    ("openai_responses", {"input": "hi", "reasoning": {"effort": "low"}}, {"reasoning"}),
    ("openai_responses", {"input": "hi", "reasoning": {"effort": "none"}}, set()),
    ("openai_responses", {"input": "hi", "tools": [{"type": "web_search_preview"}]}, {"web_search"}),
    (
        "openai_responses",
        {"input": "hi", "tools": [{"type": "computer_use_preview"}, {"type": "custom", "name": "f"}]},
        {"computer_use", "tools"},
    ),
    ("anthropic", conversation("anthropic", "s", "hi"), set()),
    ("anthropic", said("anthropic", {"type": "image", "source": {"type": "url", "url": "u"}}), {"vision"}),
    ("anthropic", said("anthropic", {"type": "document", "source": {"type": "base64", "data": ""}}), {"pdf"}),
    ("anthropic", said("anthropic", {"type": "document", "source": {"type": "text", "data": "plain"}}), set()),
    (
        "anthropic",
        said("anthropic", {"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}}),
        {"vision"},
    ),
    (
        "anthropic",
        said("anthropic", {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
        {"tools", "vision"},
    ),
    ("anthropic", {"messages": [], "thinking": {"type": "enabled", "budget_tokens": 1024}}, {"reasoning"}),
    ("anthropic", {"messages": [], "thinking": {"type": "disabled"}}, set()),
    ("anthropic", {"messages": [], "output_config": {"format": {"type": "json_schema"}}}, {"json_schema"}),
    (
        "anthropic",
        {"messages": [], "tools": [{"type": "web_search_20250305"}, {"type": "computer_20250124"}]},
        {"web_search", "computer_use"},
    ),
    ("anthropic", {"messages": [], "tools": [{"name": "f", "input_schema": {}}]}, {"tools"}),
    ("gemini", conversation("gemini", "s", "hi"), set()),
    ("gemini", said("gemini", {"inlineData": {"mimeType": "image/png", "data": ""}}), {"vision"}),
    ("gemini", said("gemini", {"file_data": {"mime_type": "application/pdf", "file_uri": "u"}}), {"pdf"}),
    ("gemini", said("gemini", {"inlineData": {"mimeType": "audio/wav", "data": ""}}), {"audio_in"}),
    (
        "gemini",
        said("gemini", {"functionResponse": {"name": "f", "parts": [{"inlineData": {"mimeType": "image/png"}}]}}),
        {"tools", "vision"},
    ),
    (
        "gemini",
        {"contents": [], "tools": [{"functionDeclarations": []}, {"googleSearch": {}}]},
        {"tools", "web_search"},
    ),
    ("gemini", {"contents": [], "generationConfig": {"responseSchema": {"type": "OBJECT"}}}, {"json_schema"}),
    ("gemini", {"contents": [], "generation_config": {"thinking_config": {"thinking_budget": 512}}}, {"reasoning"}),
    ("gemini", {"contents": [], "generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}}, set()),
    ("gemini", {"contents": [], "generationConfig": {"responseModalities": ["AUDIO"]}}, {"audio_out"}),
]


@pytest.mark.parametrize(("dialect", "fields", "found"), NEEDED, ids=range(len(NEEDED)))
def test_what_a_request_needs_of_a_model(dialect: DialectName, fields: Json, found: set[str]) -> None:
    assert needs(dialect, fields) == found


def test_needs_are_named_as_the_models_capabilities_are() -> None:
    table = (Path(gproxyd.__file__).parent / "vendors" / "models.yaml").read_text()
    known = {word for words in re.findall(r" can\((.*?)\)", table) for word in words.split()}
    assert known >= NEEDS
    assert {need for _, _, found in NEEDED for need in found} == NEEDS


SIGNATURE = "EqQBCgIYAhIM1gbcDa9GJwZA2b3h"

# dialect, what a reply or an event bears, the turn of the next request, how many
THOUGHT: list[tuple[DialectName, Json, Json, int]] = [
    (
        "anthropic",
        {"content": [{"type": "thinking", "thinking": "so", "signature": SIGNATURE}, {"type": "text"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "so", "signature": SIGNATURE}]},
        1,
    ),
    (
        "anthropic",
        {"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": SIGNATURE}},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "so", "signature": SIGNATURE}]},
        1,
    ),
    (
        "anthropic",
        {"type": "content_block_start", "content_block": {"type": "redacted_thinking", "data": SIGNATURE}},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": SIGNATURE}]},
        1,
    ),
    (
        "openai_responses",
        {"object": "response", "output": [{"type": "reasoning", "encrypted_content": SIGNATURE}]},
        {"type": "reasoning", "id": "rs_1", "encrypted_content": SIGNATURE, "summary": []},
        1,
    ),
    (
        "openai_responses",
        {"type": "response.output_item.done", "item": {"type": "reasoning", "encrypted_content": SIGNATURE}},
        {"type": "reasoning", "encrypted_content": SIGNATURE},
        1,
    ),
    (
        "openai_responses",
        {"type": "response.output_item.added", "item": {"type": "reasoning", "encrypted_content": SIGNATURE}},
        {"type": "reasoning", "encrypted_content": SIGNATURE},
        0,
    ),
    (
        "openai_responses",
        {
            "type": "response.completed",
            "response": {"output": [{"type": "compaction", "encrypted_content": SIGNATURE}]},
        },
        {"type": "compaction", "encrypted_content": SIGNATURE},
        1,
    ),
    (
        "gemini",
        {"candidates": [{"content": {"parts": [{"text": "a"}, {"functionCall": {}, "thoughtSignature": SIGNATURE}]}}]},
        {"role": "model", "parts": [{"functionCall": {}, "thought_signature": SIGNATURE}]},
        1,
    ),
    (
        "openai_chat",
        {
            "choices": [
                {"delta": {"tool_calls": [{"id": "a", "extra_content": {"google": {"thought_signature": SIGNATURE}}}]}}
            ]
        },
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "extra_content": {"google": {"thought_signature": SIGNATURE}}}],
        },
        1,
    ),
    (
        "openai_chat",
        {"choices": [{"message": {"reasoning_details": [{"type": "reasoning.encrypted", "data": SIGNATURE}]}}]},
        {"role": "assistant", "reasoning_details": [{"type": "reasoning.encrypted", "data": SIGNATURE}]},
        1,
    ),
]

ITEMS: dict[DialectName, str] = {
    "openai_chat": "messages",
    "openai_responses": "input",
    "anthropic": "messages",
    "gemini": "contents",
}


@pytest.mark.parametrize(("dialect", "reply", "turn", "count"), THOUGHT, ids=range(len(THOUGHT)))
def test_what_was_thought_leads_back_to_its_reply(dialect: DialectName, reply: Json, turn: Json, count: int) -> None:
    told = reasoning_made(dialect, reply)
    assert told == (digest(SIGNATURE),) * count
    assert MARKS[dialect].search(orjson.dumps(reply))
    asked_with = {ITEMS[dialect]: [{"role": "user"}, turn, {"role": "user"}]}
    assert reasoning_origin(dialect, asked_with) == (digest(SIGNATURE),)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_newest_thoughts_are_told_first_and_not_without_end(dialect: DialectName) -> None:
    turn = next(turn for name, _, turn, _ in THOUGHT if name == dialect)
    turns = [
        orjson.loads(orjson.dumps(turn).replace(SIGNATURE.encode(), b"%s%d" % (SIGNATURE.encode(), n)))
        for n in range(50)
    ]
    found = reasoning_origin(dialect, {ITEMS[dialect]: [{"role": "user"}, *turns]})
    assert found == tuple(digest(f"{SIGNATURE}{n}") for n in range(49, 33, -1))


def test_signatures_that_stand_for_none_and_texts_are_no_thoughts() -> None:
    parts = [{"functionCall": {}, "thoughtSignature": "skip_thought_signature_validator"}, {"thoughtSignature": "x"}]
    assert reasoning_origin("gemini", {"contents": [{"role": "model", "parts": parts}]}) == ()
    assert reasoning_made("anthropic", {"content": [{"type": "text", "text": "signature"}]}) == ()


ENGLISH = "The quick brown fox jumps over the lazy dog, and nobody in the whole village seems to mind it. " * 40
CHINESE = "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神互相对待。" * 40
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах. " * 40


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        (ENGLISH, 0.20, 0.30),  # tokens per character
        (CHINESE, 0.7, 1.3),
        (RUSSIAN, 0.3, 0.6),
        ("😀🎉🚀🔥💯" * 100, 1.5, 3.0),
        (base64.b64encode(bytes(range(256)) * 40).decode(), 0.5, 0.75),
        ('{"id":123456,"tags":["a","b"],"score":1.375}, ' * 100, 0.3, 0.55),
        ("", 0, 0),
    ],
    ids=["english", "chinese", "russian", "emoji", "base64", "json", "empty"],
)
def test_a_text_has_as_many_tokens_as_its_script_takes(text: str, least: float, most: float) -> None:
    for copies in (1, 100):
        assert least * len(text) * copies <= text_tokens(text * copies) <= most * len(text) * copies


PICTURE = base64.b64encode(bytes(3_000_000)).decode()

WEIGHED: list[tuple[DialectName, Json, int]] = [
    (
        "openai_chat",
        said("openai_chat", {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}),
        IMAGE,
    ),
    ("openai_chat", said("openai_chat", {"type": "image_url", "image_url": {"url": "u", "detail": "low"}}), LOW_IMAGE),
    ("openai_responses", said("openai_responses", {"type": "input_image", "image_url": PICTURE}), IMAGE),
    ("openai_responses", said("openai_responses", {"type": "input_file", "file_id": "file-1"}), FILE),
    ("anthropic", said("anthropic", {"type": "image", "source": {"type": "base64", "data": PICTURE}}), IMAGE),
    (
        "anthropic",
        said("anthropic", {"type": "document", "source": {"type": "base64", "data": PICTURE}}),
        len(PICTURE) // 32,
    ),
    (
        "anthropic",
        said("anthropic", {"type": "document", "source": {"type": "text", "data": ENGLISH}}),
        text_tokens(ENGLISH),
    ),
    ("gemini", said("gemini", {"inlineData": {"mimeType": "image/png", "data": PICTURE}}), IMAGE),
    ("gemini", said("gemini", {"text": ENGLISH}), text_tokens(ENGLISH)),
    ("openai_responses", {"input": ENGLISH, "metadata": {"a": ENGLISH}}, text_tokens(ENGLISH)),
    ("openai_chat", {"messages": [], "tools": [{"function": {"description": ENGLISH}}]}, text_tokens(ENGLISH)),
    ("anthropic", {"messages": [], "system": ENGLISH}, text_tokens(ENGLISH)),
]


@pytest.mark.parametrize(("dialect", "fields", "tokens"), WEIGHED, ids=range(len(WEIGHED)))
def test_a_request_has_the_tokens_of_its_texts_and_media(dialect: DialectName, fields: Json, tokens: int) -> None:
    assert tokens <= estimate_tokens(dialect, fields, 10**7) <= tokens + 30


@pytest.mark.parametrize("dialect", DIALECTS)
def test_without_its_items_a_request_counts_by_its_length(dialect: DialectName) -> None:
    assert estimate_tokens(dialect, {"model": "m"}, 4_000_001) == 1_000_001


def _dense(dialect: DialectName) -> Json:
    """Ten MiB of the smallest parts that there are."""
    one = {"text": "a", "type": "text"}
    return said(dialect, *[dict(one) for _ in range(380_000)])


LONG = {
    "one text": lambda dialect: said(dialect, {"type": "text", "text": ENGLISH * 2_700}),
    "rare script": lambda dialect: said(dialect, {"type": "text", "text": CHINESE * 1_900}),
    "many messages": lambda dialect: conversation(dialect, "s", "hi", ["a" * 60] * 100_000),
    "small parts": _dense,
    "nested": lambda dialect: said(dialect, {"type": "x", "content": [[[1, 2, "a"]] * 10] * 50_000}),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_ten_mebibytes_take_bounded_time(dialect: DialectName, kind: str) -> None:
    fields = LONG[kind](dialect)
    taken = {}
    for name, work in (
        ("sticky_key", lambda: sticky_key(dialect, fields)),
        ("needs", lambda: needs(dialect, fields)),
        ("reasoning_origin", lambda: reasoning_origin(dialect, fields)),
        ("estimate_tokens", lambda: estimate_tokens(dialect, fields, 10 * 2**20)),
    ):
        taken[name] = min(_seconds(work) for _ in range(2))
    assert max(taken.values()) < 0.25, taken


def _seconds(work: Any) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def test_a_conversation_of_more_values_than_are_looked_at_is_not_underrated() -> None:
    fields = conversation("openai_chat", "s", "hi", ["some words of a message"] * 30_000)
    least = 30_000 * text_tokens("some words of a message")
    assert estimate_tokens("openai_chat", fields, 10**6) > least
    one = said("openai_chat", *[{"type": "text", "text": "some words of a message"}] * 30_000)
    assert estimate_tokens("openai_chat", one, 10**6) > least


WORDS = st.sampled_from(
    [
        "messages",
        "input",
        "contents",
        "role",
        "user",
        "assistant",
        "model",
        "tool",
        "system",
        "content",
        "parts",
        "type",
        "text",
        "tool_calls",
        "id",
        "call_id",
        "function_call",
        "function_call_output",
        "tool_use",
        "tool_result",
        "source",
        "image_url",
        "input_image",
        "document",
        "file",
        "data",
        "inlineData",
        "functionCall",
        "functionResponse",
        "tools",
        "cache_control",
        "ttl",
        "1h",
        "reasoning",
        "encrypted_content",
        "signature",
        "thinking",
        "output",
        "choices",
        "delta",
        "candidates",
        "generationConfig",
        "thinkingConfig",
        "systemInstruction",
        "instructions",
        "object",
        "conversation",
        "container",
        "file_id",
        "extra_content",
        "google",
        "response",
        "list",
        "batch",
        "modalities",
    ]
)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=25,
)
OPERATIONS: list[Operation] = [
    find(b"/v1", path)[0]["POST"]
    for path in (b"/responses", b"/files", b"/batches", b"/messages", b"/chat/completions")
]


@settings(max_examples=250, deadline=None)
@given(dialect=st.sampled_from(DIALECTS), fields=st.dictionaries(WORDS, ODD, max_size=6))
def test_whatever_json_comes_nothing_raises_and_nothing_is_changed(dialect: DialectName, fields: Json) -> None:
    before = copy.deepcopy(fields)
    sticky_key(dialect, fields)
    assert needs(dialect, fields) <= NEEDS
    assert estimate_tokens(dialect, fields, 100) >= 0
    reasoning_origin(dialect, fields)
    reasoning_made(dialect, fields)
    trim(dialect, fields, 5)
    with_system(dialect, fields, "be kind", True)
    with_system(dialect, fields, "be kind", False)
    for operation in OPERATIONS:
        asked(operation, b"x", fields)
        made(operation, None, fields)
        deleted(operation, fields)
    assert fields == before
