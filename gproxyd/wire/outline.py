"""What routing and metering need to know of a request's JSON body: a few of its top-level members.

A small body is parsed. A large one is walked through in steps, with a pause for everybody else between them: parsing
it at once would stop all streams for as long as that takes.

Invariants
- Both ways count the top-level members `model` alike, in any spelling, and of a JSON object tell the same. Nothing may
  stand behind it. The values that are picked are valid JSON.
- The bytes that go on are those that came. So what else is wrong with a large body is the vendor's to find: which
  bracket closes which inside of values that nobody here reads, and what stands between their brackets and strings.
  Both ways refuse what nests too deep.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass

import orjson

from gproxyd.errors import Refusal
from gproxyd.wire.pick import MAX_VALUE, Picker
from gproxyd.wire.pieces import Edit
from gproxyd.wire.splice import count_models, only_model, quoted, replace_model

LARGE = 256 * 1024
"""Bytes beyond which a body is walked through instead of parsed: a parser may take 20 ms for them."""

SLICE = 32 * 1024
"""Bytes that are walked through at once: at most some milliseconds, however dense they are."""

REACH = 8 * 1024
"""Bytes that a step may be longer if an object ends there: what a cut leaves open is read more than once."""

TOKENS = 2048
"""Quotes, brackets, commas and colons that are looked at one by one in a step, at most: some milliseconds."""

FIELDS = (
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "best_of",
    "service_tier",
    "serviceTier",
    "generationConfig",
    "generation_config",
    "previous_response_id",
    "store",
    "background",
)
"""The members that are read from a large body."""

_BLANK = b" \t\r\n"
_SEAM = re.compile(rb'"[ \t\r\n]*+\}[ \t\r\n\]}]*+')  # likely the end of an object and of those around it
_BLANKS = re.compile(rb"[ \t\r\n]*+")


@dataclass(slots=True)
class Outline:
    """`models` counts the top-level members `model`, `model` is the value of the last, `members` whether there are any.

    `fields` holds top-level members, of equal names the last: all of a small body, of a large one those in FIELDS.
    `span` is where the model stands, if it is a string and its place is known. `places` says where the values of a
    large body's fields stand, with the blanks around them, but for those that are there twice.
    """

    models: int
    model: object
    members: bool
    fields: Mapping[str, object]
    span: tuple[int, int] | None = None
    places: Mapping[str, tuple[int, int]] | None = None

    @property
    def has_stream(self) -> bool:
        return "stream" in self.fields

    def renamed(self, body: bytes, name: str) -> bytes:
        """The body with another model; it must have exactly one, and a string."""
        return self.replaced(body, quoted(name))

    def renaming(self, name: str) -> list[Edit]:
        """The same for a large body: what is to be edited in it."""
        assert self.span is not None
        return [(*self.span, quoted(name))]

    def replaced(self, body: bytes, text: bytes) -> bytes:
        """The same, for a name that is a JSON text already."""
        if self.span is None:
            return replace_model(body, text)
        start, end = self.span
        view = memoryview(body)
        return b"".join((view[:start], text, view[end:]))  # copied once


def parse(body: bytes) -> Outline:
    """The outline of a small body. Raises Refusal (400) for what is not a JSON object; the text names no byte of it."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _unreadable() from None
    if not isinstance(document, dict):
        raise _no_object()
    if "model" not in document:
        return Outline(0, None, bool(document), document)
    span = only_model(body)
    return Outline(1 if span else count_models(body), document["model"], True, document, span)


def walk(body: bytes) -> Generator[Outline | None, None, Outline]:
    """The outline of a large body, step by step: yields None after each, and the outline at last, which it also
    returns. Raises Refusal."""
    position = yield from _past_blanks(body, 0)
    if not body.startswith(b"{", position):
        raise _no_object()
    picker = Picker(FIELDS)
    while picker.end is None:
        if position == len(body):
            raise _unreadable()
        position = picker.advance(body, position, _cut(body, position + SLICE), TOKENS)
        picker.picked.clear()  # where they stand is enough
        if picker.broken or picker.deep:
            raise _unreadable()
        yield None
    if (yield from _past_blanks(body, picker.end)) != len(body):  # one object, and nothing behind it
        raise _unreadable()
    fields: dict[str, object] = {}
    for name, (start, end) in picker.spans.items():
        if end - start > MAX_VALUE:
            raise Refusal("invalid_request", f"the value of '{name}' is too long", param=name)
        try:
            fields[name] = orjson.loads(body[start:end])
        except orjson.JSONDecodeError:
            raise _unreadable() from None
        yield None
    model = fields.get("model")
    span = _trimmed(body, *picker.spans["model"]) if isinstance(model, str) else None
    places = {name: place for name, place in picker.spans.items() if picker.counts[name] == 1}
    found = Outline(picker.counts.get("model", 0), model, picker.members, fields, span, places)
    yield found
    return found


def first_member(body: bytes, text: bytes, *, empty: bool) -> Edit:
    """`text`, a name and a value, as the object's first member."""
    opened = body.index(b"{") + 1
    return opened, opened, text if empty else text + b","


def usage_asked(body: bytes, found: Outline) -> list[Edit]:
    """As `inject.usage_asked` asks for a stream's usage; where the place is in doubt, nothing is asked for."""
    if "stream_options" not in found.fields:
        return [first_member(body, b'"stream_options":{"include_usage":true}', empty=False)]
    options, place = found.fields["stream_options"], (found.places or {}).get("stream_options")
    if place is None or not isinstance(options, dict) or options.get("include_usage") not in (None, False):
        return []
    return [(*place, orjson.dumps({**options, "include_usage": True}))]


def _cut(body: bytes, position: int) -> int:
    """Where a step that goes up to `position`, or a little further, ends best."""
    seam = _SEAM.search(body, position, position + REACH)
    return min(position, len(body)) if seam is None else seam.end()


def _past_blanks(body: bytes, position: int) -> Generator[None, None, int]:
    """Passes over white space slice by slice. Returns the position behind it."""
    while position < len(body):
        end = min(position + SLICE, len(body))
        position = _BLANKS.match(body, position, end).end()  # type: ignore[union-attr]  # an empty match is one, too
        if position < end:
            break
        yield None
    return position


def _trimmed(body: bytes, start: int, end: int) -> tuple[int, int]:
    """Where a value stands without the blanks around it."""
    value = body[start:end].lstrip(_BLANK)
    start = end - len(value)
    return start, start + len(value.rstrip(_BLANK))


def _unreadable() -> Refusal:
    return Refusal("invalid_request", "the request's body is not valid JSON")


def _no_object() -> Refusal:
    return Refusal("invalid_request", "the request's body must be a JSON object")
