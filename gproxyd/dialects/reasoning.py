"""Which vendor thought what is sent back to it: marks of encrypted reasoning in replies and in later requests.

What a model thought comes encrypted or signed, is sent back with the next turn, and can be read by none but the account
that made it. The digest of such a text leads from the request back to where the reply came from.

Invariants: a digest is of the very text, so a request has the digests that a reply had if the client kept the text;
nothing here raises; of a request the newest MOST are told, newest first. What is shorter than SHORTEST is no such text.

Sources: the OpenAI API reference (reasoning items, compaction), Anthropic's "Extended thinking", Google's "Thought
signatures" (also in `extra_content` of its OpenAI face), OpenRouter's "Reasoning tokens" (`reasoning_details`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import islice
from typing import Any, Final

from gproxyd.dialects.turns import Fields, items, listed, parts, role
from gproxyd.dialects.usage import at
from gproxyd.types import DialectName

MOST: Final = 16
"""Digests that are told of one request or reply."""

SHORTEST: Final = 16
"""Characters that a signature or an encrypted text has at least. Google knows shorter ones that stand for none."""

MARKS: Final[Mapping[DialectName, re.Pattern[bytes]]] = {
    "openai_chat": re.compile(rb'"(?:thought_signature|reasoning_details|thinking_blocks)"'),
    "openai_responses": re.compile(rb'"encrypted_content"'),
    "anthropic": re.compile(rb'"(?:signature|redacted_thinking)"'),
    "gemini": re.compile(rb'"thought_?[sS]ignature"'),
}
"""A reply, or an event of a stream, without this tells nothing and need not be parsed."""

BINDING: Final[Mapping[DialectName, re.Pattern[bytes]]] = {
    dialect: re.compile(rb'"(?:previous_response_id|conversation|container|(?:input_)?file_ids?)"|' + marks.pattern)
    for dialect, marks in MARKS.items()
}
"""A request without this speaks of nothing that lives with one vendor."""

_DUMMIES = frozenset({"skip_thought_signature_validator", "context_engineering_is_the_way_to_go"})
_MOST_ITEMS = 2_000


def digest(text: str) -> bytes:
    """16 bytes that stand for an encrypted text."""
    return blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def reasoning_origin(dialect: DialectName, fields: Fields) -> tuple[bytes, ...]:
    """The digests of what the request sends back, newest first."""
    newest = islice(reversed(items(dialect, fields)), _MOST_ITEMS)
    return _digests(
        text for item in newest if role(dialect, item) != "user" for text in reversed([*_of_item(dialect, item)])
    )


def reasoning_made(dialect: DialectName, value: Mapping[str, Any]) -> tuple[bytes, ...]:
    """The digests of what a reply bears, or the data of one event of a stream."""
    return _digests(_REPLIES[dialect](value))


def _digests(texts: Iterable[object]) -> tuple[bytes, ...]:
    found: dict[bytes, None] = {}
    for text in texts:
        if isinstance(text, str) and len(text) >= SHORTEST and text not in _DUMMIES:
            found[digest(text)] = None
            if len(found) == MOST:
                break
    return tuple(found)


def _of_item(dialect: DialectName, item: object) -> Iterator[object]:
    if not isinstance(item, dict):
        return
    if dialect == "openai_responses":
        yield item.get("encrypted_content")
    elif dialect == "openai_chat":
        yield from _of_message(item)
    else:
        for part in parts(dialect, item):
            yield from _of_part(part)


def _of_part(part: object) -> Iterator[object]:
    """Anthropic's thinking blocks and Gemini's parts. A thinking block whose text is long may be signed at its end."""
    if isinstance(part, dict):
        yield part.get("signature")
        yield part.get("thoughtSignature") or part.get("thought_signature")
        if part.get("type") == "redacted_thinking":
            yield part.get("data")


def _of_message(message: Mapping[str, Any]) -> Iterator[object]:
    """A chat message of the assistant, or the delta of one."""
    yield at(message, ("extra_content", "google", "thought_signature"))
    for call in _list(message.get("tool_calls")):
        yield at(call, ("extra_content", "google", "thought_signature"))
    for name in ("reasoning_details", "thinking_blocks"):
        for detail in _list(message.get(name)):
            yield at(detail, ("signature",))
            yield at(detail, ("data",))


def _chat_reply(value: Mapping[str, Any]) -> Iterator[object]:
    for choice in _list(value.get("choices")):
        for name in ("message", "delta"):
            if isinstance(message := at(choice, (name,)), dict):
                yield from _of_message(message)


def _responses_reply(value: Mapping[str, Any]) -> Iterator[object]:
    """What an item bears when it is only just added is not what it bears in the end."""
    if value.get("type") == "response.output_item.done":
        yield at(value, ("item", "encrypted_content"))
    for item in (*_list(value.get("output")), *_list(at(value, ("response", "output")))):
        yield at(item, ("encrypted_content",))


def _anthropic_reply(value: Mapping[str, Any]) -> Iterator[object]:
    for part in (*_list(value.get("content")), value.get("content_block"), value.get("delta")):
        yield from _of_part(part)


def _gemini_reply(value: Mapping[str, Any]) -> Iterator[object]:
    for candidate in _list(value.get("candidates")):
        for part in listed(at(candidate, ("content", "parts"))):
            yield from _of_part(part)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


_REPLIES: Mapping[DialectName, Callable[[Mapping[str, Any]], Iterator[object]]] = {
    "openai_chat": _chat_reply,
    "openai_responses": _responses_reply,
    "anthropic": _anthropic_reply,
    "gemini": _gemini_reply,
}
