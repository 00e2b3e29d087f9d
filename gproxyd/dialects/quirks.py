"""Where a vendor's API differs from the dialect that it speaks: what is declared, and what is done about it.

Invariants
- A body to which nothing applies is returned as the very same object.
- Nothing is invented, and nothing is taken away but what the quirk names: signatures in `extra_content`, members
  that nobody here knows and the order of everything survive. Where something applies, the one body is parsed and
  written again: its white space goes, and of equal names in one object the last stays. Of a large body only the
  messages that something applies to are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from gproxyd.wire import spans
from gproxyd.wire.pieces import Pieces
from gproxyd.wire.spans import Member, Span

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


def fit_large(body: bytes, quirks: Quirks) -> Generator[None, None, bytes]:
    """The same for a body of any length, in steps; what comes out means the same. What is changed is changed where it
    stands, every other byte stays."""
    marks = [mark for wanted, mark, _ in _FIXES if wanted(quirks)]
    due = yield from spans.mentions(body, marks)
    if not due:
        return body
    try:
        return (yield from _Surgery(body, due).done())
    except ValueError:
        return body  # the vendor says what is wrong with it


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


def _each(fix: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], bool]:
    """The same for all messages of a request."""

    def of_all(document: dict[str, Any]) -> bool:
        messages = document.get("messages")
        dicts = [one for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
        changed = [fix(one) for one in dicts]
        return any(changed)

    return of_all


def _unreasoned(message: dict[str, Any]) -> bool:
    if message.get("role") != "assistant" or "reasoning_content" not in message:
        return False
    del message["reasoning_content"]
    return True


def _flattened(message: dict[str, Any]) -> bool:
    texts = _texts(message.get("content"))
    if texts:
        message["content"] = "\n".join(texts)
    return bool(texts)


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
    (lambda quirks: quirks.reasoning_content == "removed", b'"reasoning_content"', _each(_unreasoned)),
    (lambda quirks: quirks.flat_content, b'"text"', _each(_flattened)),
)
"""When a fix is wanted; what a body must hold to need it (inside of a string its quotes would be escaped); the fix."""
_OPTIONS, _CHOICE, _REASONING, _TEXT = (mark for _, mark, _ in _FIXES)
_OF_A_MESSAGE = {_REASONING: _unreasoned, _TEXT: _flattened}
_ESCAPED = b"\\u00"  # how a letter of a member's name begins when it is escaped


# The same for large bodies.

WHOLE = 32 * 1024
"""Bytes of a message, or of a part of one, up to which it is parsed."""


class _Surgery:
    """One large body. ValueError: it is no JSON."""

    def __init__(self, body: bytes, due: Collection[bytes]) -> None:
        self._body = body
        self._due = due
        self._fixes = [fix for mark, fix in _OF_A_MESSAGE.items() if mark in due]
        self._pieces = Pieces(body)
        self._changed = False

    def done(self) -> Generator[None, None, bytes]:
        """Raises ValueError."""
        body = self._body
        start, end = yield from spans.root(body)
        found = yield from spans.named(body, start, end, ("stream_options", "tool_choice", "messages"))
        options, choices, messages = (found.get(name, []) for name in ("stream_options", "tool_choice", "messages"))
        doomed: list[Member] = []
        if _OPTIONS in self._due:
            doomed += options
            self._changed = bool(options) and body[options[-1].start : options[-1].end] != b"null"
        if _CHOICE in self._due and choices and self._short(choices[-1].start, choices[-1].end) == "auto":
            doomed += choices
            self._changed = True
        cuts = spans.without(sorted(doomed, key=lambda one: one.at))
        for cut in cuts:
            if messages and cut[0] < messages[-1].start:
                self._pieces.edit(*cut)
        if messages and self._fixes:
            yield from self._messages(messages[-1].start, messages[-1].end)
        for cut in cuts:
            if not messages or cut[0] >= messages[-1].start:
                self._pieces.edit(*cut)
        return (yield from self._pieces.joined()) if self._changed else body

    def _short(self, start: int, end: int) -> object:
        """The value that stands there, if it is no longer than those that matter; else None."""
        return orjson.loads(self._body[start:end]) if end - start <= WHOLE else None

    def _messages(self, start: int, end: int) -> Generator[None, None, None]:
        body = self._body
        if body[start] != _BRACKET:
            return
        for span in spans.elements(body, start, end):
            if span is None:
                yield None
            elif body[span[0]] == _BRACE:
                if span[1] - span[0] > WHOLE:
                    yield from self._large(*span)
                else:
                    self._small(*span)

    def _small(self, start: int, end: int) -> None:
        text = self._body[start:end]
        if _ESCAPED not in text and not any(mark in text for mark in self._due):
            return
        message = orjson.loads(text)
        changed = [fix(message) for fix in self._fixes]
        if any(changed):
            self._changed = True
            self._pieces.edit(start, end, orjson.dumps(message))

    def _large(self, start: int, end: int) -> Generator[None, None, None]:
        body, pieces = self._body, self._pieces
        found = yield from spans.named(body, start, end, ("role", "reasoning_content", "content"))
        roles, thoughts, contents = (found.get(name, []) for name in ("role", "reasoning_content", "content"))
        doomed: list[Member] = []
        if _unreasoned in self._fixes and roles and self._short(roles[-1].start, roles[-1].end) == "assistant":
            doomed += thoughts
        flat = False
        if _flattened in self._fixes and contents and body[contents[-1].start] == _BRACKET:
            flat = yield from self._all_texts(contents[-1].start, contents[-1].end)
        cuts: list[tuple[int, int, Member | None]] = [(*cut, None) for cut in spans.without(doomed)]
        if flat:
            cuts.append((contents[-1].start, contents[-1].end, contents[-1]))
        self._changed = self._changed or bool(cuts)
        for begin, stop, content in sorted(cuts, key=lambda cut: cut[:2]):
            pieces.keep(begin)
            if content is not None:
                pieces.skip(begin)
                yield from self._flatten(begin, stop)
            pieces.skip(stop)

    def _all_texts(self, start: int, end: int) -> Generator[None, None, bool]:
        """Whether an array of content holds texts, and nothing else."""
        some = False
        for span in spans.elements(self._body, start, end):
            if span is None:
                yield None
                continue
            if (yield from self._text(span)) is None:
                return False
            some = True
        return some

    def _flatten(self, start: int, end: int) -> Generator[None, None, None]:
        """Puts the texts of an array as one text."""
        between = b'"'
        for span in spans.elements(self._body, start, end):
            if span is None:
                yield None
                continue
            text = yield from self._text(span)
            self._pieces.put(between)
            if isinstance(text, tuple):
                self._pieces.copy(text[0] + 1, text[1] - 1)
            else:
                assert text is not None
                self._pieces.put(text[1:-1])
            between = b"\\n"
        self._pieces.put(b'"')

    def _text(self, part: Span) -> Generator[None, None, Span | bytes | None]:
        """A part's text as JSON, or where it stands; None if the part is of another kind."""
        start, end = part
        body = self._body
        if body[start] != _BRACE:
            return None
        if end - start <= WHOLE:
            texts = _texts([orjson.loads(body[start:end])])
            return None if texts is None else orjson.dumps(texts[0])
        found = yield from spans.named(body, start, end, ("type", "text"))
        if len(found) < 2 or self._short(found["type"][-1].start, found["type"][-1].end) != "text":
            return None
        text = found["text"][-1]
        return (text.start, text.end) if body[text.start] == _QUOTE else None


_QUOTE, _BRACE, _BRACKET = b'"{['
