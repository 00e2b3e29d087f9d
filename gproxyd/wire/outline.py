"""What routing needs to know of a request's JSON body: its `model`, and whether it says anything of `stream`.

A small body is parsed. A large one is walked through in slices, with a pause for everybody else between them: parsing
it at once would stop all streams for as long as that takes. Such a body is checked as far as its brackets and its
members on the way go; what else is wrong with it, the vendor will say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from gproxyd.errors import Refusal
from gproxyd.wire.splice import Splicer, count_models, quoted, replace_model

LARGE = 256 * 1024
"""Bytes beyond which a body is walked through instead of parsed: a parser may take 20 ms for them."""

SLICE = 16 * 1024
"""Bytes that are walked through at once: at most some milliseconds, however dense they are."""

MAX_DEPTH = 1024
"""Open brackets beyond which a body is refused, as the parser does with small ones."""

_MODEL = (b"model",)
_STREAM = (b"stream",)


@dataclass(slots=True)
class Outline:
    """`models` counts the top-level members `model`, `model` is the value of the last, `members` whether there are any.

    `span` is where the value stands, if the body was walked through and it is a string.
    """

    models: int
    model: object
    has_stream: bool
    members: bool
    span: tuple[int, int] | None = None

    def renamed(self, body: bytes, name: str) -> bytes:
        """The body with another model; it must have exactly one, and a string."""
        if self.span is None:
            return replace_model(body, name)
        return body[: self.span[0]] + quoted(name) + body[self.span[1] :]


def parse(body: bytes) -> Outline:
    """The outline of a small body. Raises Refusal (400) for what is not a JSON object; the text names no byte of it."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _unreadable() from None
    if not isinstance(document, dict):
        raise _no_object()
    models = count_models(body) if "model" in document else 0
    return Outline(models, document.get("model"), "stream" in document, bool(document))


def walk(body: bytes) -> Iterator[Outline | None]:
    """The outline of a large body, slice by slice: yields None after each, and the outline at last. Raises Refusal."""
    if body.lstrip(b" \t\r\n")[:1] != b"{":
        raise _no_object()
    walker = Splicer((_MODEL, _STREAM), b"")
    for start in range(0, len(body), SLICE):
        walker.feed(body[start : start + SLICE])
        if walker.deepest >= MAX_DEPTH:
            raise _unreadable()
        yield None
    if walker.broken or walker.end != len(body.rstrip(b" \t\r\n")):  # one object, and nothing behind it
        raise _unreadable()
    span = walker.spans.get(_MODEL)
    yield Outline(
        walker.counts.get(_MODEL, 0), _value(body, span), _STREAM in walker.counts, members=walker.members, span=span
    )


def _value(body: bytes, span: tuple[int, int] | None) -> object:
    if span is None:
        return None
    try:
        return orjson.loads(body[span[0] : span[1]])
    except orjson.JSONDecodeError:
        raise _unreadable() from None


def _unreadable() -> Refusal:
    return Refusal("invalid_request", "the request's body is not valid JSON")


def _no_object() -> Refusal:
    return Refusal("invalid_request", "the request's body must be a JSON object")
