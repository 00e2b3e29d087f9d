"""Where a vendor's API differs from the dialect that it speaks: what is declared, and what is done about it.

Invariants
- A body to which nothing applies is returned as the very same object.
- Nothing is invented, and nothing is taken away but what the quirk names: signatures in `extra_content`, members
  that nobody here knows and the order of everything survive. Where something applies, the one body is parsed and
  written again: its white space goes, and of equal names in one object the last stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

Meaning = Literal["limited", "refused", "failed"]
"""What an error is: too much was asked of the vendor, the key is no good, or anything else."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Answers of a status, and with a word in the body if the status alone does not say enough."""

    status: int
    contains: bytes | None = None


@dataclass(frozen=True, slots=True)
class BodyError:
    """Error codes inside answers, whatever their status. `at` leads to the code, "error.code"; codes are text."""

    at: str
    limited: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Quirks:
    """The ways of one vendor; the defaults are those of the dialect.

    both_keys          the OpenAI face wants the key as `x-goog-api-key` beside `Authorization`
    stream_options     False: chat requests must not have that member, so streams tell no tokens
    tool_choice_auto   False: `tool_choice: "auto"` is refused; it is left out, for it is what is meant without it
    reasoning_content  of assistant messages: "kept" as the client sends it, "required" (a translation must carry it
                       over), or "removed" because the vendor refuses it
    flat_content       content must be a string: arrays of nothing but texts become one, joined by line breaks
    limited            answers that mean a rate limit, beside 429
    body_errors        error codes inside bodies
    """

    both_keys: bool = False
    stream_options: bool = True
    tool_choice_auto: bool = True
    reasoning_content: Literal["kept", "required", "removed"] = "kept"
    flat_content: bool = False
    limited: tuple[Answer, ...] = ()
    body_errors: tuple[BodyError, ...] = ()

    @property
    def fit(self) -> bool:
        """Whether chat requests have to be fitted at all."""
        return any(wanted(self) for wanted, _, _ in _FIXES)


def fit(body: bytes, quirks: Quirks) -> bytes:
    """A chat request of OpenAI's dialect as the vendor wants it; the same object where nothing is to be done."""
    due = [fix for wanted, mark, fix in _FIXES if mark in body and wanted(quirks)]
    if not due:
        return body
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body  # the vendor says what is wrong with it
    if not isinstance(document, dict):
        return body
    changed = [fix(document) for fix in due]
    return orjson.dumps(document) if any(changed) else body


def is_limited(status: int, body: bytes, answers: Collection[Answer]) -> bool:
    """Whether an answer means a rate limit. `body` may be its beginning."""
    if status == 429:
        return True
    return any(one.status == status and (one.contains is None or one.contains in body) for one in answers)


def body_error(body: bytes, errors: Collection[BodyError]) -> Meaning | None:
    """What the error code inside a whole JSON answer, or inside the data of an event, means; None if there is none."""
    if not errors:
        return None
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    for error in errors:
        code = _at(document, error.at)
        if code in error.limited:
            return "limited"
        if code in error.refused:
            return "refused"
        if code in error.failed:
            return "failed"
    return None


def _at(document: object, path: str) -> str | None:
    for name in path.split("."):
        if not isinstance(document, Mapping):
            return None
        document = document.get(name)
    return str(document) if isinstance(document, str | int) and not isinstance(document, bool) else None


# What is done to a request. Each tells whether it has changed anything.


def _without_stream_options(document: dict[str, Any]) -> bool:
    return document.pop("stream_options", None) is not None


def _without_auto(document: dict[str, Any]) -> bool:
    if document.get("tool_choice") != "auto":
        return False
    del document["tool_choice"]
    return True


def _without_reasoning(document: dict[str, Any]) -> bool:
    changed = False
    for message in _messages(document):
        if message.get("role") == "assistant" and "reasoning_content" in message:
            del message["reasoning_content"]
            changed = True
    return changed


def _flat(document: dict[str, Any]) -> bool:
    changed = False
    for message in _messages(document):
        texts = _texts(message.get("content"))
        if texts:
            message["content"] = "\n".join(texts)
            changed = True
    return changed


def _messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    messages = document.get("messages")
    return [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


def _texts(content: object) -> list[str] | None:
    """The texts of an array of content that holds nothing else."""
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return texts


_FIXES: tuple[tuple[Callable[[Quirks], bool], bytes, Callable[[dict[str, Any]], bool]], ...] = (
    (lambda quirks: not quirks.stream_options, b'"stream_options"', _without_stream_options),
    (lambda quirks: not quirks.tool_choice_auto, b'"tool_choice"', _without_auto),
    (lambda quirks: quirks.reasoning_content == "removed", b'"reasoning_content"', _without_reasoning),
    (lambda quirks: quirks.flat_content, b'"text"', _flat),
)
"""When a fix is wanted; what a body must hold to need it (inside of a string its quotes would be escaped); the fix."""
