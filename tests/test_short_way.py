"""Requests that are answered where their bytes arrive: however those are cut, the answers are the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.gateway import doorstep, lane
from tests.support import raw
from tests.support.configs import providers_at
from tests.support.replies import json_reply
from tests.support.running import Loop, Running, until
from tests.support.streams import law
from tests.support.upstream import Got, Script, Upstream

Pieces = Sequence[bytes]


def echo(got: Got) -> Script:
    """Tells what was said, so that every answer can be told from every other."""
    said = orjson.loads(got.body)["messages"][0]["content"]
    message = {"role": "assistant", "content": said}
    return [json_reply(orjson.dumps({"model": "m", "choices": [{"index": 0, "message": message}]}))]


class Place:
    def __init__(self, loop: Loop) -> None:
        self.upstream = Upstream(loop, echo).start()
        config = providers_at({"up": self.upstream.url}, connect="1s", first_byte="5s", idle="5s")
        self.gateway: Running = loop.gateway(config)
        self.flights = 0


@pytest.fixture(scope="module")
def shared(loop: Loop) -> Place:
    return Place(loop)


@pytest.fixture
def place(shared: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A gateway that knows the head of `asked`, and counts what takes the short way."""
    with raw.connect(shared.gateway.port) as sock:
        answered(sock, [asked("to begin with")], ["to begin with"])
    until(shared.gateway.at_rest)
    shared.flights = 0
    depart = lane.Flight.depart

    def counted(self: lane.Flight, body: bytes) -> None:
        shared.flights += 1
        depart(self, body)

    monkeypatch.setattr(lane.Flight, "depart", counted)
    return shared


def asked(text: str, **more: Any) -> bytes:
    messages = [{"role": "user", "content": text}]
    return raw.request("/v1/chat/completions", {"model": "up/m", "messages": messages, **more})


def parts(request: bytes) -> tuple[bytes, bytes]:
    head, end, body = request.partition(b"\r\n\r\n")
    return head + end, body


def answered(sock: Any, pieces: Pieces, texts: Sequence[str], *, pause: float = 0.002) -> None:
    """Sends the pieces one after another, each in a segment of its own; the answers must be to these texts."""
    for piece in pieces:
        sock.sendall(piece)
        time.sleep(pause)
    seen = b""
    for text in texts:
        reply = raw.read(sock, seen=seen)
        size = len(reply.head) + 4 + int(reply.header("content-length") or 0)
        seen, whole = reply.data[size:], raw.Reply(reply.data[:size], reply.ended)
        assert whole.status == 200, whole
        assert whole.json["choices"][0]["message"]["content"] == text


def test_a_body_that_comes_behind_its_head_goes_the_short_way(place: Place) -> None:
    with raw.connect(place.gateway.port) as sock:
        for number in range(5):
            text = f"number {number}"
            answered(sock, parts(asked(text)), [text])
    assert place.flights == 5


def test_so_does_one_in_many_pieces(place: Place) -> None:
    head, body = parts(asked("word " * 2000))
    with raw.connect(place.gateway.port) as sock:
        answered(sock, [head, *(body[at : at + 1500] for at in range(0, len(body), 1500))], ["word " * 2000])
    assert place.flights == 1


def test_a_body_that_takes_its_time_goes_the_long_way(place: Place) -> None:
    head, body = parts(asked("late"))
    with raw.connect(place.gateway.port) as sock:
        answered(sock, [head, body[:20], body[20:]], ["late"], pause=doorstep.BODY_GRACE * 2)
        assert place.flights == 0
        answered(sock, parts(asked("in time")), ["in time"])
    assert place.flights == 1


def test_a_large_body_is_not_waited_for(place: Place) -> None:
    text = "x" * lane.MOST_AWAITED
    head, body = parts(asked(text))
    with raw.connect(place.gateway.port) as sock:
        answered(sock, [head, body], [text])
    assert place.flights == 0


def test_a_request_behind_another_is_answered_after_it(place: Place) -> None:
    one, other, third = (asked(name) for name in ("one", "other", "third"))
    head, body = parts(one)
    with raw.connect(place.gateway.port) as sock:
        answered(sock, [head, body + other, third], ["one", "other", "third"])
        answered(sock, [head, body[:-1], body[-1:] + other[:30], other[30:]], ["one", "other"])


def test_what_is_no_json_is_refused_in_both_ways(place: Place) -> None:
    head, body = parts(asked("good"))
    with raw.connect(place.gateway.port) as sock:
        sock.sendall(head)
        time.sleep(0.002)
        sock.sendall(b"{" * len(body))
        reply = raw.read(sock)
        assert (reply.status, reply.json["error"]["code"]) == (400, "invalid_request")
        answered(sock, parts(asked("good")), ["good"])


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("said", [0, 10])
def test_who_leaves_before_the_body_is_whole_leaves_nothing_behind(place: Place, reset: bool, said: int) -> None:
    head, body = parts(asked("gone"))
    before = len(place.upstream.requests)
    for _ in range(20):
        with raw.connect(place.gateway.port) as sock:
            sock.sendall(head + body[:said])
            time.sleep(0.001)
            if reset:
                raw.reset(sock)
    until(place.gateway.at_rest)
    time.sleep(doorstep.BODY_GRACE * 2)
    assert len(place.upstream.requests) == before
    with raw.connect(place.gateway.port) as sock:
        answered(sock, parts(asked("still here")), ["still here"])


def test_who_ends_his_side_amid_the_body_is_told(place: Place) -> None:
    head, body = parts(asked("half"))
    reply = raw.send(place.gateway.port, [(head, 0.002), (body[:10], 0.002)], half_close=True)
    assert reply.status in (0, 400)
    assert len(reply.data) == 0 or reply.json["error"]["code"] == "invalid_request"


@law(60)
@given(st.data())
def test_any_cut_of_any_requests_gives_the_same_answers(shared: Place, data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.text('ab☃"\\', max_size=40), min_size=1, max_size=4))
    whole = b"".join(asked(text) for text in texts)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1), max_size=6)))
    with raw.connect(shared.gateway.port) as sock:
        answered(sock, [whole[a:b] for a, b in pairwise([0, *cuts, len(whole)])], texts, pause=0.0005)
