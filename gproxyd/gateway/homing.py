"""Where things live: ids that answers tell are remembered, and requests that speak of them go where they are.

Invariants: what passes is never changed nor held back; an id is remembered before the client can have read it; what is
read of an answer for its ids is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import orjson

from gproxyd.dialects import identity, reasoning
from gproxyd.dialects.identity import Named
from gproxyd.errors import UpstreamError
from gproxyd.gateway.route import Route
from gproxyd.store.homes import Home
from gproxyd.upstream.connection import ResponseSink
from gproxyd.wire import sse
from gproxyd.wire.http1 import ResponseHead

MAX_READ = 256 * 1024
"""Bytes of an answer that are read for ids."""


class Homes(Protocol):
    """Who remembers (`store.homes`)."""

    def remember(self, kind: str, id: str, home: Home) -> None: ...
    def forget(self, kind: str, id: str) -> None: ...
    async def find(self, kind: str, id: str) -> Home | None: ...


async def home_of(homes: Homes | None, asked: Iterable[Named]) -> str | None:
    """The provider where the first of these lives whose home is known."""
    if homes is not None:
        for kind, name in asked:
            home = await homes.find(kind, name)
            if home is not None:
                return home.provider
    return None


class Listener:
    """A ResponseSink that gives everything on to another, and reads the ids in it."""

    def __init__(self, sink: ResponseSink, route: Route, method: str, homes: Homes) -> None:
        self._sink = sink
        self._route = route
        self._deletes = method == "DELETE"
        self._homes = homes
        self._events = False
        self._held: list[bytes] | None = None
        self._size = 0

    def answered(self, head: ResponseHead, body: bytes) -> None:
        self._begin(head)
        if self._held is not None and len(body) <= MAX_READ:
            self._read(body)
        self._sink.answered(head, body)

    def started(self, head: ResponseHead) -> None:
        self._begin(head)
        self._sink.started(head)

    def received(self, data: bytes) -> None:
        if self._held is not None:
            self._size += len(data)
            self._held.append(data)
            if self._events:
                self._take_events(whole=False)
            elif self._size > MAX_READ:
                self._held = None
        self._sink.received(data)

    def ended(self) -> None:
        if self._held is not None:
            if self._events:
                self._take_events(whole=True)
            else:
                self._read(b"".join(self._held))
        self._sink.ended()

    def failed(self, error: UpstreamError) -> None:
        self._sink.failed(error)

    # Within.

    def _begin(self, head: ResponseHead) -> None:
        kind = head.fields.media_type()
        self._events = kind == b"text/event-stream"
        told = 200 <= head.status < 300 and not head.fields.coding()
        self._held = [] if told and (self._events or kind == b"application/json") else None

    def _take_events(self, *, whole: bool) -> None:
        """The events that are whole by now; the rest waits for more."""
        text = b"".join(self._held or ())
        end = len(text) if whole else sse.end_of_events(text)
        if end:
            self._read_events(text[:end])
        rest = text[end:]
        self._held = None if len(rest) > MAX_READ else [rest]

    def _read_events(self, block: bytes) -> None:
        mark = reasoning.MARKS[self._route.dialect.name]
        if identity.EVENT_MARK not in block and (not self._route.judged or mark.search(block) is None):
            return
        for line in block.splitlines():
            if line.startswith(b"data:") and (identity.EVENT_MARK in line or mark.search(line)):
                self._take(_parsed(line[5:]))

    def _read(self, body: bytes) -> None:
        if self._events:
            self._read_events(body)
        else:
            self._take(_parsed(body))

    def _take(self, value: Mapping[str, Any]) -> None:
        route, operation = self._route, self._route.operation
        if operation is None:
            return
        home = Home(route.provider.name)
        if self._deletes:
            for kind, name in identity.deleted(operation, value):
                self._homes.forget(kind, name)
            return
        for kind, name in identity.made(operation, route.target_id, value):
            self._homes.remember(kind, name, home)
        if route.judged:
            for digest in reasoning.reasoning_made(route.dialect.name, value):
                self._homes.remember("reasoning", digest.hex(), home)


def _parsed(text: bytes) -> Mapping[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
