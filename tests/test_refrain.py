"""Events that go like one before them: faster on their way, and the same in every byte and every count."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.dialects.meter import Meter
from gproxyd.errors import UpstreamError
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.repeats import Repeats
from gproxyd.types import DialectName
from gproxyd.upstream.connection import Connection
from gproxyd.wire import refrain
from gproxyd.wire.http1 import ResponseHead
from gproxyd.wire.refrain import Refrains
from gproxyd.wire.transform import Events
from tests.support import raw
from tests.support.configs import providers_at
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk
from tests.support.running import Loop, Running, until
from tests.support.streams import law
from tests.support.upstream import Pause, Reset, Script, Upstream

SHOWN = b'"our/name"'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Json = Any


class Client:
    """A Downstream as far as Repeats and the usual way need one: what was written, without framing."""

    def __init__(self) -> None:
        self.body = b""
        self.quick = 0

    def write(self, data: bytes) -> None:
        self.body += data

    def chunk(self, data: bytes, size: int) -> None:
        body, complete = raw.dechunk(data + b"0\r\n\r\n")
        assert complete
        assert len(body) == size
        self.quick += 1
        self.body += body


class Usual:
    """What a relay does with a stream: each piece through the transform, then an offer to `repeats`, if any."""

    def __init__(self, dialect: DialectName, refrains: Refrains | None, *, rename: bool = True) -> None:
        self.meter = Meter(dialect, hide=True)
        self.client = Client()
        shown = SHOWN if rename else None
        places = DIALECTS[dialect].places if rename else ()
        self.events = Events(places, SHOWN, self.meter.events)
        self.over: UpstreamError | str | None = None
        self.connection = Connection(cast(asyncio.AbstractEventLoop, None))
        self.repeats: Repeats | None = None
        if refrains is not None:
            down = cast(Downstream, self.client)
            self.repeats = Repeats(dialect, refrains, self.events, self.meter, down, shown)
        self.connection.begin("POST", self)

    def answered(self, head: ResponseHead, body: bytes) -> None:
        self.received(body)
        self.ended()

    def started(self, head: ResponseHead) -> None:
        assert head.status == 200

    def received(self, data: bytes) -> None:
        self.client.write(self.events.feed(data))
        if self.repeats is not None and self.repeats.ready:
            self.connection.offer(self.repeats.take)

    def ended(self) -> None:
        self.client.write(self.events.finish())
        self.over = "whole"

    def failed(self, error: UpstreamError) -> None:
        self.over = error

    def told(self) -> tuple[object, ...]:
        """Everything that may not depend on the way that events took."""
        over = self.over if isinstance(self.over, str | None) else str(self.over)
        meter = self.meter
        facts = (meter.usage, meter.errored, meter.seen_content, meter.thinks, meter.complete)
        return (over, self.client.body, *facts)


def both(dialect: DialectName, pieces: list[bytes], refrains: Refrains, *, rename: bool = True) -> Usual:
    """Sends the same pieces both ways; everything must be the same."""
    one, other = Usual(dialect, None, rename=rename), Usual(dialect, refrains, rename=rename)
    for piece in pieces:
        for way in (one, other):
            if way.over is None:
                way.connection.data_received(piece)
    assert other.told() == one.told()
    assert abs(other.meter.event_count - one.meter.event_count) <= 2 + one.meter.event_count // 20  # it is an estimate
    return other


def event(value: Json, *lines: str) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return "".join(line + "\n" for line in lines).encode() + b"data: " + text.encode() + b"\n\n"


def said(text: str, **more: Json) -> Json:
    return {
        "id": "c1",
        "created": 7,
        "model": "upstream-1",
        "choices": [{"index": 0, "delta": {"content": text}}],
    } | more


WORDS = [
    "Hello",
    "",
    'a "quoted" word',
    "error",
    "usage",
    "model",
    '"model":"x"',
    "\\u0022",
    "ü☃",
    "a\nb",
    "[DONE]",
    "}",
]
CHAT = [event(said(word)) for word in WORDS]


def stream(*events: bytes) -> list[bytes]:
    return [HEAD, *map(chunk, events), LAST_CHUNK]


def test_the_third_event_that_goes_alike_takes_the_quick_way() -> None:
    taken = both("openai_chat", stream(*[event(said("x"))] * 10), Refrains(DIALECTS["openai_chat"].places))
    assert taken.client.quick == 7  # the first begins the answer, the second and third are listened to
    assert taken.client.body.count(SHOWN) == 10
    assert b"upstream-1" not in taken.client.body


def test_another_stream_of_the_same_provider_has_nothing_to_learn() -> None:
    refrains = Refrains(DIALECTS["openai_chat"].places)
    both("openai_chat", stream(*[event(said("x"))] * 4), refrains)
    other = [event(said(f"word {number}", id=f"chat-{number}", created=number)) for number in range(10)]
    assert both("openai_chat", stream(*other), refrains).client.quick == 9


def test_whatever_is_said_stays_what_it_is() -> None:
    refrains = Refrains(DIALECTS["openai_chat"].places)
    both("openai_chat", stream(*[event(said("x"))] * 4), refrains)
    assert both("openai_chat", stream(*CHAT), refrains).client.quick > len(CHAT) // 2


UNLIKE = {
    "usage": said("x", usage={"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}),
    "an error": {"error": {"message": "m", "type": "server_error"}},
    "usage alone": {"model": "upstream-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}},
    "a second model": '{"model":"upstream-1","model":"upstream-1","choices":[{"delta":{"content":"x"}}]}',
    "an escaped model": json.dumps(said("x")).replace("model", "m\\u006fdel"),
    "a model that is none": said("x", model=None),
    "a model inside": {"id": "c1", "created": 7, "inner": {"model": "mine"}, "choices": [{"delta": {"content": "x"}}]},
    "another type": said("x", type="error"),
    "the same type": said("x", type="response.output_text.delta"),
    "no JSON": "{oh",
    "an end": "[DONE]",
}


@pytest.mark.parametrize("value", UNLIKE.values(), ids=UNLIKE)
@pytest.mark.parametrize("rename", [True, False])
def test_what_tells_something_is_always_looked_at(value: Json, rename: bool) -> None:
    refrains = Refrains(DIALECTS["openai_chat"].places)
    usual = [event(said("x"))] * 4
    both("openai_chat", stream(*usual, *[event(value)] * 4, *usual), refrains, rename=rename)
    both("openai_chat", stream(*usual, event(value), *usual, event(value)), refrains, rename=rename)


def pieces_of(data: bytes, random_: random.Random) -> Iterator[bytes]:
    """As a network may cut it: mostly chunk by chunk, at times several together or some in two."""
    while data:
        size = random_.choice([data.find(b"\n\n\r\n") + 4, random_.randrange(1, 2000), random_.randrange(1, 60)])
        size = max(1, min(size, len(data)))
        yield data[:size]
        data = data[size:]


EVENTS: dict[DialectName, list[bytes]] = {
    "openai_chat": CHAT + [event(value) for value in UNLIKE.values()],
    "openai_responses": [
        event({"type": "response.created", "response": {"id": "r", "model": "upstream-1"}}, "event: response.created"),
        *(
            event({"type": "response.output_text.delta", "sequence_number": n, "delta": word}, "event: delta")
            for n, word in enumerate(WORDS)
        ),
        event({"type": "response.completed", "response": {"model": "upstream-1", "usage": {"input_tokens": 9}}}),
    ],
    "anthropic": [
        event({"type": "message_start", "message": {"model": "upstream-1", "usage": {"input_tokens": 3}}}),
        *(
            event(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}, "event: x"
            )
            for word in WORDS
        ),
        *(event({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "a"}}) for _ in "ab"),
        event({"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "s" * 40}}),
        event({"type": "ping"}, ": comment", "event: ping"),
        event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}}),
        event({"type": "message_stop"}, "event: message_stop"),
    ],
    "gemini": [
        *(event({"candidates": [{"content": {"parts": [{"text": w}]}}], "modelVersion": "upstream-1"}) for w in WORDS),
        event({"candidates": [{"finishReason": "STOP"}], "usageMetadata": {"promptTokenCount": 3}}),
    ],
}


@pytest.mark.parametrize("dialect", EVENTS)
@law(60)
@given(seed=st.integers(0, 2**32), rename=st.booleans())
def test_both_ways_tell_the_same_however_it_is_cut(dialect: DialectName, seed: int, rename: bool) -> None:
    random_ = random.Random(seed)
    refrains = Refrains(DIALECTS[dialect].places)
    most, last = EVENTS[dialect][:-1], EVENTS[dialect][-1]
    for _ in range(4):
        few = random_.sample(most, 4)
        told = [*(random_.choice(few if random_.random() < 0.9 else most) for _ in range(40)), last]
        text = HEAD + b"".join(map(chunk, told)) + LAST_CHUNK
        both(dialect, list(pieces_of(text, random_)), refrains, rename=rename)


@pytest.mark.parametrize("dialect", ["openai_chat", "openai_responses", "anthropic", "gemini"])
def test_what_a_model_says_takes_the_quick_way(dialect: DialectName) -> None:
    refrains = Refrains(DIALECTS[dialect].places)
    events = EVENTS[dialect]
    both(dialect, stream(*events), refrains)
    assert both(dialect, stream(*events), refrains).client.quick > len(WORDS) // 2


@pytest.mark.parametrize(
    "broken",
    [
        b"5\r\ndata: {}\n\n\r\n",
        chunk(event(said("x")))[:-2] + b"xx",
        b"x" + chunk(event(said("x"))),
        b"0" + chunk(event(said("x")))[1:],
        b"fffffff" + chunk(event(said("x")))[2:],
    ],
    ids=["size", "end", "junk", "zero", "huge"],
)
def test_a_chunk_that_is_none_is_an_error_both_ways(broken: bytes) -> None:
    both(
        "openai_chat",
        [HEAD, *map(chunk, [event(said("x"))] * 5), broken, broken],
        Refrains(DIALECTS["openai_chat"].places),
    )


def test_several_chunks_at_once_leave_in_one_piece() -> None:
    refrains = Refrains(DIALECTS["openai_chat"].places)
    both("openai_chat", stream(*[event(said("x"))] * 4), refrains)
    burst = b"".join(map(chunk, [event(said(f"w{n}")) for n in range(50)]))
    taken = both("openai_chat", [HEAD, chunk(event(said("x"))), burst + LAST_CHUNK], refrains)
    assert taken.client.quick == 1
    assert taken.client.body.count(SHOWN) == 51


def test_who_never_repeats_himself_is_not_listened_to_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refrain, "MOST_TRIES", 20)
    refrains = Refrains(DIALECTS["openai_chat"].places)
    strange = [event(said("x", **{f"member{number}": number})) for number in range(40)]
    both("openai_chat", stream(*strange), refrains)
    assert len(refrains._heard) == 20
    assert both("openai_chat", stream(*[event(said("x"))] * 10), refrains).client.quick == 0


def test_learning_an_event_is_never_long() -> None:
    """In time of the thread, not of the clock, which tells of the neighbours."""
    refrains = Refrains(DIALECTS["openai_chat"].places)
    crowded = event(said("x", many=[""] * 300))
    usual = event(said("x", **{f"member{number}": "x" for number in range(refrain.MOST_VALUES - 5)}))
    for told in (crowded, usual):
        began = time.thread_time()
        both("openai_chat", stream(*[told] * 3), refrains)
        assert time.thread_time() - began < 0.05
    assert both("openai_chat", stream(*[usual] * 10), refrains).client.quick == 9


# Through the gateway.


def asked(model: str = "openai-main/upstream-1") -> bytes:
    return raw.request("/v1/chat/completions", {"model": model, "stream": True, "messages": MESSAGES})


MESSAGES = [{"role": "user", "content": "Hello"}]
USAGE = event({"model": "upstream-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 90}})
DONE = event("[DONE]")


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pieces that went the usual way."""
    pieces: list[bytes] = []
    feed = Events.feed

    def counted(self: Events, data: bytes) -> bytes:
        pieces.append(data)
        return feed(self, data)

    monkeypatch.setattr(Events, "feed", counted)
    return pieces


def gateway(loop: Loop, script: Script, *, idle: str = "1s", more: str = "") -> Running:
    upstream = Upstream(loop, script).start()
    config = providers_at({"openai-main": upstream.url}, connect="1s", first_byte="2s", idle=idle, more=more)
    return loop.gateway(config)


def tokens(one: Running) -> dict[str, int]:
    """What has been booked, by kind."""
    until(one.at_rest)
    text = raw.send(one.port, raw.request("/metrics", key=None)).body.decode()
    found = re.findall(r'^gproxyd_tokens_total\{.*kind="(input|output)".*\} ([0-9.]+)$', text, re.MULTILINE)
    return {kind: int(float(value)) for kind, value in found}


def paced(count: int) -> Script:
    """Events one by one, so that each is a piece of its own."""
    steps: Script = [EVENT_STREAM]
    for number in range(count):
        steps += [chunk(event(said(f"word {number}"))), Pause(0.003)]
    return steps


def test_a_stream_arrives_whole_and_is_booked_whole(loop: Loop, passed: list[bytes]) -> None:
    one = gateway(loop, [*paced(40), chunk(USAGE), chunk(DONE), LAST_CHUNK])
    with raw.connect(one.port) as sock:
        reply = raw.exchange(sock, asked())
    assert reply.complete
    assert [f"word {number}".encode() in reply.body for number in range(40)] == [True] * 40
    assert reply.body.count(b'"openai-main/upstream-1"') == 40
    assert reply.body.endswith(DONE)
    assert len(passed) < 20
    line = one.request(reply.header("x-request-id") or "")
    assert (line["outcome"], line["bytes_out"]) == ("ok", len(reply.body))
    assert tokens(one) == {"input": 3, "output": 90}


def test_a_stream_that_falls_silent_is_still_ended_in_time(loop: Loop) -> None:
    one = gateway(loop, [*paced(40), Pause(6)], idle="1s")
    with raw.connect(one.port, timeout=8) as sock:
        reply = raw.exchange(sock, asked())
    assert reply.body.count(b"word") == 40
    assert b'"upstream_timeout"' in reply.body
    assert one.request(reply.header("x-request-id") or "")["reason"] == "timeout_idle"


def test_a_stream_whose_upstream_dies_never_looks_complete(loop: Loop) -> None:
    one = gateway(loop, [*paced(40), chunk(event(said("half")))[:30], Pause(0.05), Reset()])
    with raw.connect(one.port) as sock:
        reply = raw.exchange(sock, asked())
    assert not reply.complete
    assert b"half" not in reply.body
    assert reply.body.count(b"word") == 40
    assert b'"error"' in reply.body.rpartition(b"data: ")[2]


def test_an_answer_that_was_on_trial_goes_the_quick_way_too(loop: Loop, passed: list[bytes]) -> None:
    agent = "agents: {quick: {targets: [openai-main/upstream-1, openai-main/upstream-2]}}\n"
    one = gateway(loop, [*paced(40), chunk(USAGE), chunk(DONE), LAST_CHUNK], more=agent)
    with raw.connect(one.port) as sock:
        reply = raw.exchange(sock, asked("quick"))
    assert reply.complete, reply
    assert len(passed) < 20
    assert tokens(one) == {"input": 3, "output": 90}


def test_a_client_that_leaves_amid_repetition_ends_the_upstream(loop: Loop) -> None:
    upstream = Upstream(loop, paced(2000)).start()
    config = providers_at({"openai-main": upstream.url}, connect="1s", first_byte="2s", idle="1s")
    one = loop.gateway(config)
    with raw.connect(one.port) as sock:
        sock.sendall(asked())
        raw.read(sock, until_complete=False)
    assert upstream.peer_left.wait(2)
    until(one.at_rest)
