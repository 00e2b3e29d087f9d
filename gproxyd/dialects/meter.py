"""Usage read out of what passes by, at next to no cost.

Invariants
- Bytes pass unchanged, but for the one chunk that the gateway asked for and the client did not (`hide`).
- An event is parsed only if it can tell something. `"usage"` with its plain quotes cannot stand inside of a JSON
  string, where quotes are escaped, so what a model writes costs nothing and counts for nothing.
- What is broken, cut or absurd is passed by: a Meter never raises.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from gproxyd.dialects.usage import LAYOUTS, Tally, Usage, at, plain_usage
from gproxyd.types import DialectName
from gproxyd.wire import sse
from gproxyd.wire.pick import Picker

WHOLE = 256 * 1024
"""Bytes beyond which a reply is walked through instead of parsed."""


@dataclass(frozen=True, slots=True)
class Signs:
    """How a dialect's stream speaks.

    usage    the member that tells usage
    answer   the member that bears the model's words, where the events' type does not say so; empty it is no answer
    end      what must be in a stream's last event
    """

    usage: str
    answer: str
    end: bytes

    @property
    def needle(self) -> bytes:
        return b'"%b"' % self.usage.encode("ascii")


_DONE = b"[DONE]"
_SIGNS: Mapping[DialectName, Signs] = {
    "openai_chat": Signs("usage", "choices", _DONE),
    "openai_responses": Signs("usage", "choices", _DONE),  # its own last events tell usage
    "anthropic": Signs("usage", "choices", b"message_stop"),
    "gemini": Signs("usageMetadata", "candidates", b'"finishReason"'),
}

_THOUGHT = re.compile(
    rb'"(?:reasoning(?:_content|_text)?|thinking_delta|response\.reasoning[a-z_.]*)"|"thought"\s*+:\s*+true'
)
_ERROR = b'"error"'
_EMPTY_LINES = 4  # bytes that no event fits into
_NULL = re.compile(rb"\s*+:\s*+null")

# Types of events: the last ones, and those that bear nothing of an answer.
_ENDS: Final = frozenset({
    "message_stop", "response.completed", "response.incomplete", "response.failed", "transcript.text.done",
    "speech.audio.done", "image_generation.completed", "image_edit.completed",
})  # fmt: skip
_QUIET: Final = frozenset({
    "error", "keepalive", "ping", "message_start", "message_delta", "message_stop", "response.created",
    "response.queued", "response.in_progress", "response.failed",
})  # fmt: skip

# An event: lines that are not empty, and the empty ones around them. CRLF is taken whole.
_EVENT = re.compile(rb"[\r\n]*+(?>(?:[^\r\n]++(?>\r\n|\n|\r|\Z))*)[\r\n]*+")
_LINE_END = re.compile(rb"\r\n|\n|\r")


class Meter:
    """Reads one reply. It comes by one of three ways:

        events(block)           a stream of events, in blocks of whole ones; returns what goes on
        whole(body)             one JSON text
        feed(piece), finish()   one JSON text in pieces, however long

    Then, at any time:

        usage           what was told so far; of a stream that was cut, too
        tier            the service tier that was told
        errored         an error came in place of an answer, or amid it
        seen_content    something of an answer came, if only its empty beginning
        complete        the answer's own end came: a last event, `[DONE]`, a finish reason, the bracket of a JSON text
        event_count     events that passed, about
        last            the last block that passed without a look; whoever saw to it that it needs none may set it
    """

    __slots__ = ("_begun", "_complete", "_dialect", "_end", "_hide", "_looked_at", "_needle", "_one",
                 "_picker", "_signs", "_tally", "errored", "event_count", "last", "seen_content")  # fmt: skip

    def __init__(self, dialect: DialectName, hide: bool = False) -> None:
        self._dialect = dialect
        self._signs = _SIGNS[dialect]
        self._needle, self._end = self._signs.needle, self._signs.end
        self._hide = hide and dialect == "openai_chat"
        self._tally = Tally(dialect)
        self._picker: Picker | None = None
        self._begun = self._complete = False
        self.last = b""  # the last block that passed without a look
        self._looked_at = b""  # the last one that was looked at
        self._one = 0  # a block with fewer bytes is one event; known when the first event of an answer has come
        self.errored = self.seen_content = False
        self.event_count = 0

    @property
    def needle(self) -> bytes:
        """What a block of events must contain to tell usage."""
        return self._needle

    @property
    def usage(self) -> Usage | None:
        return self._tally.usage

    @property
    def complete(self) -> bool:
        self._look_back()
        return self._complete

    @property
    def thinks(self) -> bool:
        """Whether the last event that passed bore a thought, and not yet an answer."""
        events = _split(self.last or self._looked_at)
        return bool(events) and _THOUGHT.search(events[-1]) is not None

    @property
    def tier(self) -> str | None:
        return self._tally.tier

    def events(self, block: bytes) -> bytes:
        """Takes whole events, the last of a stream perhaps unterminated; returns those that go on."""
        if len(block) < self._one:
            self.event_count += 1
        else:
            self.event_count += block.count(b"\n\n") or len(_split(block))
        # `rfind` is twice as fast as `in`, which first asks whether it is given a number.
        if self.seen_content and ((block.rfind(self._needle) < 0 and block.rfind(_ERROR) < 0) or not self._told(block)):
            if len(block) > _EMPTY_LINES:
                self.last = block
            return block
        return self._look(block)

    def _told(self, text: bytes) -> bool:
        """Whether usage or an error stands somewhere in the text, and is not null."""
        return _is_told(text, self._needle) or _is_told(text, _ERROR)

    def _look_back(self) -> None:
        """An end that tells nothing else has passed without a look."""
        last, self.last = self.last, b""
        for event in _split(last) if self._end in last else ():
            if self._end in event:
                self._event(event)

    def _look(self, block: bytes) -> bytes:
        """Parses what can tell something among the events of a block; returns the block without those to be hidden."""
        self._look_back()
        self._looked_at = block
        bom, self._begun = not self._begun and block.startswith(sse.BOM), True
        kept: list[bytes] = []
        events = _split(block)
        for event in events:
            skip = len(events) > 1 and self.seen_content and self._end not in event and not self._told(event)
            if skip or not self._event(event.removeprefix(sse.BOM) if bom else event):
                kept.append(event)
            if self.seen_content and not self._one:
                self._one = len(event) * 3 // 2
            bom = False
        return block if len(kept) == len(events) else b"".join(kept)

    def _event(self, event: bytes) -> bool:
        """Takes one event. Returns whether the client must not see it."""
        data = _data(event)
        if data == _DONE:
            self._complete = True
            return False
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            return False
        if not isinstance(value, dict):
            return False
        self._take(value)
        kind = value.get("type")
        if kind in _ENDS if isinstance(kind, str) else self._finished(value):
            self._complete = True
        if self._answers(value):
            self.seen_content = True
        if value.get("choices") != [] or not isinstance(value.get("usage"), dict) or value.get("error"):
            return False
        self._complete = True  # OpenAI's last word, but for [DONE]
        return self._hide

    def _answers(self, value: Mapping[str, Any]) -> bool:
        """Whether an event bears something of an answer. One of no known kind does, unless it tells usage."""
        if self._signs.answer in value:
            return bool(value[self._signs.answer])
        kind = value.get("type")
        if isinstance(kind, str):
            return kind not in _QUIET
        return not self.errored and self._signs.usage not in value

    def _finished(self, value: Mapping[str, Any]) -> bool:
        """Gemini ends without an event of its own: its last ones say why, for every candidate."""
        candidates = value.get("candidates")
        if isinstance(candidates, list) and candidates:
            for candidate in candidates:
                if not isinstance(candidate, dict) or not candidate.get("finishReason"):
                    return False
            return True
        return at(value, ("promptFeedback", "blockReason")) is not None

    def _take(self, value: Mapping[str, Any]) -> None:
        self._tally.add(value)
        told = value.get("error") or ("response" in value and at(value, ("response", "error")))
        if told or value.get("type") == "error" or value.get("object") == "error":
            self.errored = True

    def whole(self, body: bytes) -> None:
        """Takes a whole reply."""
        if len(body) > WHOLE:
            self.feed(body)
            self.finish()
            return
        try:
            value = orjson.loads(body)
        except orjson.JSONDecodeError:
            return
        self.take(value)

    def take(self, value: object) -> None:
        """Takes a whole reply that has been parsed."""
        for part in value if isinstance(value, list) else (value,):
            if isinstance(part, dict):
                self._take(part)
                self._complete = True
        self.seen_content = self._complete and not self.errored

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes of a reply that is not held whole."""
        if self._picker is None:
            places = LAYOUTS[self._dialect].places + LAYOUTS[self._dialect].tiers
            self._picker = Picker({place[0] for place in places} | {"error", "type", "object"})
        for name, text in self._picker.feed(piece):
            try:
                value = orjson.loads(text)
            except orjson.JSONDecodeError:
                continue
            self._take({name: value})
        self.seen_content = self._picker.begun and not self.errored

    def finish(self) -> None:
        """The reply's bytes are at their end, for better or worse."""
        if self._picker is not None:
            self._complete = self._picker.closed


@dataclass(slots=True)
class Reading:
    """What a whole reply told, in the words of a Meter. `root` is the reply, if it is a JSON object."""

    usage: Usage | None = None
    errored: bool = False
    complete: bool = False
    root: Mapping[str, Any] | None = None
    event_count: int = 0

    @property
    def seen_content(self) -> bool:
        return self.complete and not self.errored

    def finish(self) -> None:
        """It was whole from the beginning."""


def read_reply(dialect: DialectName, body: bytes) -> Reading:
    """Reads a whole reply of at most WHOLE bytes."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return Reading()
    if type(value) is dict and dialect == "openai_chat" and "error" not in value and value.get("type") != "error":
        usage = plain_usage(value)
        if usage is not None:
            return Reading(usage, value.get("object") == "error", True, value)
    meter = Meter(dialect)
    meter.take(value)
    return Reading(meter.usage, meter.errored, meter.complete, value if isinstance(value, dict) else None)


def tells(dialect: DialectName, text: bytes) -> bool:
    """Whether a Meter must see this piece of a stream: usage or an error stands somewhere in it, and is not null."""
    return _is_told(text, _SIGNS[dialect].needle) or _is_told(text, _ERROR)


def _is_told(text: bytes, name: bytes) -> bool:
    """Whether a member of that (quoted) name stands somewhere in the text with another value than null."""
    found = text.find(name)
    while found >= 0:
        found += len(name)
        if not text.startswith(b":null", found) and _NULL.match(text, found) is None:
            return True
        found = text.find(name, found)
    return False


def _split(block: bytes) -> list[bytes]:
    """The events of a block, with every byte of it."""
    size, cr = len(block), block.find(13)
    if (
        block.find(b"\n\n") == size - 2
        if cr < 0
        else (cr == size - 4 and block.endswith(b"\r\n\r\n") and block.find(10) == size - 3)
    ):
        return [block]  # as one mostly comes
    return [event for event in _EVENT.findall(block) if event]


def _data(event: bytes) -> bytes:
    """The data of an event, without white space around it: its lines joined by LF."""
    text = event.strip()
    if text.startswith(b"data:") and b"\n" not in text and b"\r" not in text:
        return text[5:].lstrip()
    lines = text.split(b"\n") if b"\r" not in text else _LINE_END.split(text)
    return b"\n".join([line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]).strip()
