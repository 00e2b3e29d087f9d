"""`GET /admin/events`: finished requests as server-sent events.

    event: request          a record, as /admin/usage shows it
    event: dropped          {"count": n}: so many were lost, because the listener was too slow
    : keep-alive            while nothing happens

The stream ends when the listener is no longer an administrator, and when the gateway stops.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson

from gproxyd.admin import views
from gproxyd.admin.feed import Subscription
from gproxyd.admin.house import Call, House
from gproxyd.admin.people import still_admin
from gproxyd.types import Answer, Question

QUIET = 15.0
"""Seconds of silence after which a comment is sent, where `streams.keepalive` says nothing."""


async def events(call: Call) -> Answer:
    subscription = call.house.subscribe()
    return Answer(200, "text/event-stream", _stream(call.house, call.question, subscription))


async def _stream(house: House, question: Question, subscription: Subscription) -> AsyncGenerator[bytes, None]:
    try:
        yield b": gproxyd\n\n"
        while True:
            record = await subscription.next(house.config.streams.keepalive or QUIET)
            if not still_admin(house, question) or (record is None and subscription.closed):
                return
            if lost := subscription.dropped():
                yield _event("dropped", {"count": lost})
            yield _event("request", views.record(record)) if record is not None else b": keep-alive\n\n"
    finally:
        subscription.close()


def _event(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))
