"""Streams where they are hard: cut at every byte, behind giants, raced to their end, left on either way.

RACES=N makes the race between a client and its upstream another length.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator

import orjson
import pytest

from gproxyd.gateway import door
from tests.support import raw
from tests.support.bank import PAUSE, Bank, Client, Holder, alike, bank, quick_ledger, shared, short
from tests.support.certs import Authority, believed
from tests.support.configs import providers_at
from tests.support.dialects import (
    CHAT_USAGE,
    CHATS,
    COST,
    DONE,
    MESSAGES,
    Dialect,
    delta,
    every_dialect,
    last_usage,
)
from tests.support.raw import Reply
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk, json_reply
from tests.support.running import CONFIG, Loop, Running, until
from tests.support.servers import listening, read_request
from tests.support.upstream import Got, Pause, Script, Stall, Upstream
from tests.test_events import ENDINGS, held_up
from tests.test_streams import PINGS, REQUESTS, played, seen, sent

__all__ = ["bank", "quick_ledger", "shared", "short"]

MIB = 1024 * 1024
RACES = int(os.environ.get("RACES", "150"))


def booked_once(gateway: Running) -> None:
    """Nothing runs, nothing is held, and everybody's every request has one record, nobody's any."""
    inside = gateway.daemon.gateway
    until(gateway.at_rest)
    until(lambda: not inside.books.quotas.held() and not inside.books.limiter.running())
    assert inside.budget.held == 0
    database = sqlite3.connect(f"file:{gateway.folder}/state.db?mode=ro", uri=True)

    def records() -> list[str]:
        return sorted(one for (one,) in database.execute("SELECT request_id FROM usage"))

    def owed() -> list[str]:
        return sorted(line["request_id"] for line in gateway.requests() if line.get("key"))

    until(lambda: records() == owed())
    assert len(set(records())) == len(records())
    database.close()


# Who leaves.


class PlainLoop(Loop):
    """asyncio's own loop instead of uvloop's."""

    def __init__(self) -> None:
        super().__init__()
        self.loop.close()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)


@pytest.fixture(scope="module", params=[Loop, PlainLoop], ids=["uvloop", "asyncio"])
def either_loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    with request.param() as running:
        yield running


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    made = Authority(tmp_path_factory.mktemp("authority"))
    with believed(made):
        yield made


LEFT: dict[str, Script] = {
    "before the first byte": [Stall()],
    "within a stream": [EVENT_STREAM + chunk(b'data: {"model":"m"}\n\n'), Stall()],
}
DEPARTURES = 12


@pytest.mark.parametrize("way", ["long", "short"])
@pytest.mark.parametrize("when", LEFT)
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_an_upstream_hears_within_a_quarter_second_that_its_client_has_left(
    either_loop: Loop, authority: Authority, secure: bool, when: str, way: str, short: list[str]
) -> None:
    """Time after time: there and back again, on connections of which the upstream's is new each time."""

    def script(got: Got) -> Script:
        return LEFT[when] if b"leave" in got.body else [json_reply(b"{}")]

    upstream = Upstream(either_loop, script).start(tls=authority.server() if secure else None)
    gateway = quick(either_loop, upstream)
    took: list[float] = []
    for number in range(DEPARTURES):
        lines = [("X-Number", str(number))] if way == "long" else []
        with raw.connect(gateway.port) as sock:
            for _ in range(2):
                sock.sendall(raw.request("/up/v1/chat/completions", {"model": "m"}))
                assert raw.read(sock).status == 200
                time.sleep(PAUSE)
            short.clear()
            upstream.left_at.clear()
            count = len(upstream.requests)
            leaving = {"model": "m", "stream": True, "user": "leave"}
            sock.sendall(raw.request("/up/v1/chat/completions", leaving, headers=lines))
            until(lambda count=count: len(upstream.requests) > count)
            if when != "before the first byte":
                data = b""
                while b"data: " not in data:
                    data += sock.recv(65536)
            left = time.monotonic()
            if number % 2:
                raw.reset(sock)
        took.append(until(lambda: upstream.left_at)[0] - left)
        assert len(short) == (way == "short")
    assert max(took) < 0.25, sorted(took)
    until(gateway.at_rest)
    gone = until(
        lambda: (r := [x for x in gateway.requests() if x["outcome"] == "client_gone"])[DEPARTURES - 1 :] and r
    )
    assert len(gone) == DEPARTURES and {line["status"] for line in gone} == {200 if "within" in when else 499}
    booked_once(gateway)


def quick(loop: Loop, upstream: Upstream) -> Running:
    return loop.gateway(providers_at({"up": upstream.url}, connect="5s", first_byte="9s", idle="9s", keepalive="0s"))


def travel(sock: socket.socket, gateway: Running) -> None:
    """The connection's next request of this kind goes the short way."""
    for _ in range(2):
        sock.sendall(raw.request("/up/v1/chat/completions", {"model": "m"}))
        assert raw.read(sock).status == 200
        until(gateway.at_rest)


def test_who_ends_its_side_behind_a_request_of_the_short_way_is_gone(loop: Loop, short: list[str]) -> None:
    upstream = Upstream(loop, lambda got: [*([Pause(0.3)] * (b"slow" in got.body)), json_reply(b"{}")]).start()
    gateway = quick(loop, upstream)
    with raw.connect(gateway.port) as sock:
        travel(sock, gateway)
        short.clear()
        sock.sendall(raw.request("/up/v1/chat/completions", {"model": "m", "user": "slow"}))
        until(lambda: len(upstream.requests) == 3)
        sock.shutdown(socket.SHUT_WR)
        assert raw.read(sock) == Reply(b"", "fin")
    assert upstream.peer_left.wait(0.25) and len(short) == 1
    line = gateway.request(short[0])
    assert (line["outcome"], line["status"], line["attempts"]) == ("client_gone", 499, 1)
    booked_once(gateway)


def test_an_idle_connection_ends_in_time_behind_a_request_of_the_short_way(
    loop: Loop, short: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(door._OPTIONS, "keepalive_timeout", 0.3)
    gateway = quick(loop, Upstream(loop, [json_reply(b"{}")]).start())
    with raw.connect(gateway.port) as sock:
        travel(sock, gateway)
        began = time.monotonic()
        assert short and raw.read(sock) == Reply(b"", "fin")
        assert 0.25 < time.monotonic() - began < 1.5


# A client and an upstream that end in the same turn of the loop.


@pytest.mark.parametrize("way", ["long", "short"])
def test_whoever_is_first_there_is_one_record(way: str, caplog: pytest.LogCaptureFixture, short: list[str]) -> None:
    chance = random.Random(3)
    # A head that bears a date is never remembered.
    date = [("Date", "Sun, 06 Nov 1994 08:49:37 GMT")] if way == "long" else []
    body = {"model": "m", "stream": True, "messages": []}
    request = raw.request("/up/v1/chat/completions", body, headers=date)
    outcomes = set()
    with Loop() as loop, socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        listener.settimeout(5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        gateway = loop.gateway(providers_at({"up": url}, connect="5s", first_byte="9s", idle="9s", keepalive="0s"))
        for turn in range(RACES + len(ENDINGS)):
            how = ENDINGS[list(ENDINGS)[turn % len(ENDINGS)]]
            with raw.connect(gateway.port) as client:
                client.sendall(request)
                upstream, _ = listener.accept()
                with upstream:
                    upstream.settimeout(5)
                    for _ in range(2 if way == "short" else 0):
                        read_request(upstream)
                        upstream.sendall(json_reply(b'{"model":"m"}'))
                        assert raw.read(client).status == 200
                        until(gateway.at_rest)
                        client.sendall(request)
                    read_request(upstream)
                    upstream.sendall(EVENT_STREAM + chunk(b'data: {"model":"m"}\n\n'))
                    data = b""
                    while b"data: " not in data:
                        data += client.recv(65536)
                    with held_up(loop):
                        leave = chance.choice([raw.reset, socket.socket.close])
                        for act in chance.sample([lambda: leave(client), lambda: how(upstream)], 2):  # noqa: B023
                            act()
            until(gateway.at_rest)
        assert (len(short) > RACES) == (way == "short")
        booked_once(gateway)
        outcomes = {line["outcome"] for line in gateway.requests()}
        assert outcomes <= {"ok", "client_gone", "upstream_error"}
        assert {line["event"] for line in gateway.log()} == {"ready", "request"}
    assert caplog.records == []


# Cut anywhere.


def cut_everywhere(text: bytes, begin: int = 1, at_once: int = 5) -> Iterator[Script]:
    """Streams of these bytes that are cut, each at a few places, together at every one."""
    offsets = list(range(begin, len(text)))
    step = -(-len(offsets) // at_once)
    for first in range(step):
        edges = [0, *offsets[first::step], len(text)]
        pieces = [chunk(text[start:end]) for start, end in itertools.pairwise(edges)]
        yield [EVENT_STREAM, *(step for piece in pieces for step in (piece, Pause(0.001))), LAST_CHUNK]


def heard(bank: Bank, who: Holder, dialect: Dialect, scripts: Iterator[Script], text: bytes) -> int:
    """Asks for each of them on one connection: every byte of `text` must come. How many there were."""
    data = who.request(dialect.target(stream=True), {**dialect.content(stream=True), **ASKED.get(dialect.name, {})})
    count = 0
    with Client(bank.gateway.port) as client:
        for script in scripts:
            bank.script = script
            reply = client.ask(data)
            named = reply.body.replace(b'"%b/m"' % dialect.provider.encode(), b'"m"')
            assert (reply.complete, named) == (True, text), script
            count += 1
    return count


ASKED = {"chat": {"stream_options": {"include_usage": True}}}


@every_dialect
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_wherever_a_stream_is_cut_its_tokens_are_the_same(
    bank: Bank, dialect: Dialect, ends: bytes, short: list[str]
) -> None:
    text = b"".join(dialect.events).replace(b"\n", ends)
    who = bank.user(10**12)
    count = heard(bank, who, dialect, cut_everywhere(text, at_once=5 if ends == b"\n" else 25), text)
    record = alike(who.settled(count))
    assert (record["cost_nanousd"], record["provenance"], record["stream"]) == (COST, "measured", True)
    assert bool(short) is dialect.cheap


@every_dialect
def test_tokens_that_an_unterminated_last_event_tells_count(bank: Bank, dialect: Dialect) -> None:
    """However little of its last line's end there is, and wherever it was cut."""
    events = dialect.events[:-1] if dialect in (CHATS, MESSAGES) else dialect.events
    who = bank.user(10**12)
    count = 0
    for missing in (1, 2):
        text = b"".join(events)[:-missing]
        count += heard(bank, who, dialect, cut_everywhere(text, len(text) - 60, 4), text)
    assert {record["cost_nanousd"] for record in who.settled(count)} == {COST}


# Behind a giant.

GIANT = b'data: {"model":"m","choices":[],"pad":"%b"}\n\n' % (b"x" * (2 * MIB))


@pytest.mark.parametrize("apart", [False, True], ids=["in one piece", "apart"])
def test_behind_an_event_too_large_to_hold_tokens_are_read_and_hidden(bank: Bank, apart: bool) -> None:
    """What shares a segment with its end is an event like any other."""
    parts: list[bytes] = [delta("h"), GIANT, last_usage(CHAT_USAGE), DONE]
    script: Script = [EVENT_STREAM, chunk(b"".join(parts)), LAST_CHUNK]
    if apart:
        script = [EVENT_STREAM, *(step for part in parts for step in (chunk(part), Pause(0.05))), LAST_CHUNK]
    bank.script = script
    who = bank.user(10**12)
    reply = who.chat(stream=True)
    assert reply.complete and reply.body.endswith(b'x"}\n\n' + DONE), reply.body[-300:]
    (record,) = who.settled(1)
    assert (record["cost_nanousd"], record["provenance"]) == (COST, "measured")


def test_tokens_in_an_event_too_large_to_hold_are_not_believed_to_be_known(bank: Bank) -> None:
    giant = GIANT.replace(b'"pad"', b'"usage":{"prompt_tokens":1,"completion_tokens":1},"pad"')
    bank.script = [EVENT_STREAM, chunk(delta("h")), chunk(giant), chunk(DONE), LAST_CHUNK]
    who = bank.user(10**12)
    assert who.chat(stream=True).complete
    (record,) = who.settled(1)
    assert record["provenance"] == "estimated" and record["cost_nanousd"] > 0


# At once.


@pytest.mark.parametrize("ping", [b": ping\n\n", PINGS["anthropic"], b":\n\n"])
def test_the_upstreams_own_pings_are_signs_of_life(loop: Loop, ping: bytes) -> None:
    steps: Script = [step for _ in range(7) for step in (Pause(0.15), chunk(ping))]
    _, gateway = played(loop, [EVENT_STREAM, *steps, chunk(sent("anthropic")), LAST_CHUNK], idle="500ms")
    reply = raw.send(gateway.port, REQUESTS["anthropic"])
    assert reply.complete and reply.body == ping * 7 + seen("anthropic")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_events_are_undone_as_they_come(loop: Loop, coding: str) -> None:
    """Each says when it was sent; half of them arrive within some milliseconds, flushed in their midst as well."""

    def metronome(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_request(connection)
        connection.sendall(EVENT_STREAM[:-2] + b"Content-Encoding: %b\r\n\r\n" % coding.encode())
        packer = zlib.compressobj(wbits=31 if coding == "gzip" else 15)
        for _ in range(80):
            time.sleep(0.006)
            event = b'data: {"model":"upstream-1","at":%.6f}\n\n' % time.monotonic()
            for half in (event[:20], event[20:]):
                connection.sendall(chunk(packer.compress(half) + packer.flush(zlib.Z_SYNC_FLUSH)))
        connection.sendall(chunk(packer.flush()) + LAST_CHUNK)
        connection.recv(1)

    late: list[float] = []
    with listening(metronome) as port:
        gateway = loop.gateway(CONFIG.format(vendor=f"http://127.0.0.1:{port}"))
        with raw.connect(gateway.port) as sock:
            sock.sendall(REQUESTS["openai_chat"])
            data = b""
            while not data.endswith(LAST_CHUNK):
                data = data.rpartition(b"\n\n")[2] + sock.recv(65536)
                now = time.monotonic()
                late += [now - float(piece.partition(b"}")[0]) for piece in data.split(b'"at":')[1:]]
    late.sort()
    assert len(late) == 80
    assert late[40] < 0.005 and late[78] < 0.05, (late[40], late[-3:])


# Requests that grow and shrink on their way.

RENAMED = {
    "s": "a-model-whose-name-is-longer-than-what-it-is-called",
    "an-alias-that-is-longer-than-the-name-it-stands-for": "m",
}


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alias", RENAMED)
def test_a_request_that_was_rewritten_has_one_framing_and_its_true_length(
    loop: Loop, alias: str, stream: bool, framing: str, short: list[str]
) -> None:
    """One behind the other on one connection to the upstream: a false length would be met by the next request."""
    upstream = Upstream(loop, [json_reply(b'{"model":"m"}')]).start()
    names = ", ".join(f"{name}: up/{model}" for name, model in RENAMED.items())
    more = f"aliases: {{{names}}}\n"
    gateway = loop.gateway(providers_at({"up": upstream.url}, connect="5s", first_byte="9s", idle="9s", more=more))
    body = {
        "messages": [{"role": "user", "content": "ü\\u2028"}],
        "model": alias,
        **({"stream": True} if stream else {}),
    }
    data = orjson.dumps(body)
    lines = [("Content-Type", "application/json")]
    if framing == "chunked":
        lines.append(("Transfer-Encoding", "chunked"))
        data = b"".join(chunk(data[at : at + 7]) for at in range(0, len(data), 7)) + LAST_CHUNK
    with Client(gateway.port) as client:
        for _ in range(4):
            assert client.ask(raw.request("/v1/chat/completions", data, headers=lines)).status == 200
            time.sleep(PAUSE)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    for got in upstream.requests:
        assert orjson.loads(got.body) == {**body, "model": RENAMED[alias], **options}
        assert got.header("content-length") == [b"%d" % len(got.body)] and not got.header("transfer-encoding")
    assert (len(upstream.requests), upstream.connections) == (4, 1)
    assert bool(short) is (framing == "length")
    booked_once(gateway)
