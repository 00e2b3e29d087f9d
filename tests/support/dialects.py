"""The vendors' dialects, and what one answer in each looks like, whole and streamed.

All of them tell of 100 tokens read, 40 of these from a cache, and of 20 written. A token costs 1000 nano-dollars to
read, 100 to read from a cache, 2000 to write, so that sums are plain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk, json_reply
from tests.support.upstream import Script

INPUT, CACHED, OUTPUT = 1000, 100, 2000
"""Nano-dollars per token."""

PRICE = '{{input: "1.00", cache_read: "0.10", output: "2.00"}}'
"""The same as a configuration says it, for a text that is yet to be formatted."""

COST = 60 * INPUT + 40 * CACHED + 20 * OUTPUT
"""Nano-dollars of each of these answers."""

Json = Any


def event(value: Json, name: str = "") -> bytes:
    """One event, as the vendor that names its events or does not."""
    head = f"event: {name}\n" if name else ""
    data = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"{head}data: {data}\n\n".encode()


def named(value: Json) -> bytes:
    return event(value, value["type"])


def streamed(events: Sequence[bytes]) -> Script:
    return [EVENT_STREAM, *map(chunk, events), LAST_CHUNK]


@dataclass(frozen=True, repr=False)
class Dialect:
    """How a vendor is asked and answers.

    `error` is its event for an error; `cheap` tells of what it asks whether it may go the short way.
    """

    name: str
    provider: str
    path: str
    body: Mapping[str, Json]
    whole: Mapping[str, Json]
    events: Sequence[bytes]
    error: bytes
    cheap: bool = True

    def target(self, *, stream: bool) -> str:
        return self.path.replace("VERB", "streamGenerateContent?alt=sse" if stream else "generateContent")

    def content(self, *, stream: bool) -> Json:
        return {**self.body, "stream": True} if stream and self.cheap else dict(self.body)

    def script(self, *, stream: bool) -> Script:
        return streamed(self.events) if stream else [json_reply(json.dumps(self.whole).encode())]

    def __repr__(self) -> str:
        return self.name


HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "oai/m", "messages": HELLO, "max_tokens": 50}


def openai_usage(read: str, written: str) -> dict[str, Json]:
    """Two of its APIs tell the same by other names."""
    return {
        f"{read}_tokens": 100,
        f"{written}_tokens": 20,
        "total_tokens": 120,
        f"{read}_tokens_details": {"cached_tokens": 40},
        f"{written}_tokens_details": {"reasoning_tokens": 5},
    }


CHAT_USAGE, RESPONSES_USAGE = openai_usage("prompt", "completion"), openai_usage("input", "output")
GEMINI_USAGE = {
    "promptTokenCount": 100,
    "cachedContentTokenCount": 40,
    "candidatesTokenCount": 15,
    "thoughtsTokenCount": 5,
    "totalTokenCount": 120,
}


def delta(text: str, **more: Json) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return event({"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [choice], **more})


def last_usage(usage: Json, **more: Json) -> bytes:
    return event({"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [], "usage": usage, **more})


DONE = event("[DONE]")

DIALECTS = (
    Dialect(
        "chat",
        "oai",
        "/v1/chat/completions",
        CHAT,
        {"id": "c", "model": "m", "choices": [{"message": {"content": "hi"}}], "usage": CHAT_USAGE},
        (delta("h", usage=None), delta("i", usage=None), last_usage(CHAT_USAGE), DONE),
        event({"error": {"message": "boom", "type": "server_error"}}),
    ),
    Dialect(
        "responses",
        "oai",
        "/v1/responses",
        {"model": "oai/m", "input": "Hello", "max_output_tokens": 50},
        {"id": "r", "object": "response", "status": "completed", "model": "m", "output": [], "usage": RESPONSES_USAGE},
        (
            named({"type": "response.created", "response": {"id": "r", "model": "m", "usage": None}}),
            named({"type": "response.output_text.delta", "delta": "h"}),
            named({"type": "response.output_text.delta", "delta": "i"}),
            named({"type": "response.completed", "response": {"id": "r", "model": "m", "usage": RESPONSES_USAGE}}),
        ),
        named({"type": "error", "code": "server_error", "message": "boom"}),
    ),
    Dialect(
        "messages",
        "ant",
        "/v1/messages",
        {"model": "ant/m", "messages": HELLO, "max_tokens": 50},
        {
            "id": "msg",
            "type": "message",
            "model": "m",
            "content": [{"type": "text", "text": "hi"}],
            "usage": {"input_tokens": 60, "cache_read_input_tokens": 40, "output_tokens": 20},
        },
        (
            named(
                {
                    "type": "message_start",
                    "message": {
                        "id": "msg",
                        "model": "m",
                        "content": [],
                        "usage": {"input_tokens": 60, "cache_read_input_tokens": 40, "output_tokens": 1},
                    },
                }
            ),
            named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "h"}}),
            named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "i"}}),
            named({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}}),
            named({"type": "message_stop"}),
        ),
        named({"type": "error", "error": {"type": "overloaded_error", "message": "boom"}}),
    ),
    Dialect(
        "generate",
        "gem",
        "/v1beta/models/gem/m:VERB",
        {"contents": [{"parts": [{"text": "Hello"}]}], "generationConfig": {"maxOutputTokens": 50}},
        {
            "candidates": [{"content": {"parts": [{"text": "hi"}]}, "finishReason": "STOP"}],
            "modelVersion": "m",
            "usageMetadata": GEMINI_USAGE,
        },
        (
            event({"candidates": [{"content": {"parts": [{"text": "h"}]}}], "modelVersion": "m",
                   "usageMetadata": {"promptTokenCount": 100, "cachedContentTokenCount": 40,
                                     "candidatesTokenCount": 1}}),
            event({"candidates": [{"content": {"parts": [{"text": "i"}]}}], "modelVersion": "m",
                   "usageMetadata": {"promptTokenCount": 100, "cachedContentTokenCount": 40,
                                     "candidatesTokenCount": 2}}),
            event({"candidates": [{"content": {"parts": [{"text": ""}]}, "finishReason": "STOP"}], "modelVersion": "m",
                   "usageMetadata": GEMINI_USAGE}),
        ),
        event({"error": {"code": 503, "message": "boom", "status": "UNAVAILABLE"}}),
        cheap=False,
    ),
)  # fmt: skip
CHATS, RESPONSES, MESSAGES, GENERATES = DIALECTS

ZEROES: Mapping[str, Json] = {
    "chat": {"usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}},
    "responses": {"usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}},
    "messages": {"usage": {"input_tokens": 0, "output_tokens": 0}},
    "generate": {"usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": 0, "totalTokenCount": 0}},
}
"""By dialect, what tells that nothing was used."""

every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=str)
whole_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
