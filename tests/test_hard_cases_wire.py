"""Three readers, one meaning: what follows or resembles a request of the short way; lines where a reader may be fooled.

The short way understands a request by the bytes of one that a parser has read before. So whatever looks like such a
request, or stands behind one, must mean there what it means to the parsers.

WAYS_SEED=N WAYS_ROUNDS=N make the comparison of both ways another or a longer one; a failure prints both, and the
bytes.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.support import raw
from tests.support.bank import short
from tests.support.checks import Bench, check_alive, check_error, quick_log
from tests.support.framing import (
    CHAT,
    CHUNKED,
    FILES,
    FIVE,
    GROUPS,
    HOST,
    JSON,
    KEY,
    LAST,
    MALFORMED,
    SIZES,
    SMUGGLED,
    answers,
    chunks,
    get,
    post,
    read_strictly,
)
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, CONFIG, Loop, until
from tests.support.upstream import Got
from tests.test_framing import bench, check_seen, check_talk, deliver, made, parser, talk
from tests.test_fuzz_requests import recording
from tests.test_hard_cases_streams import booked_once

__all__ = ["bench", "made", "parser", "short"]

MIB = 1024 * 1024
SEED = int(os.environ.get("WAYS_SEED", "11"))
ROUNDS = int(os.environ.get("WAYS_ROUNDS", "200"))
KNOWN_TARGET = b"/openai-main/v1/chat/completions"
KNOWN_BODY = b'{"model":"known","messages":[]}'


def known(body: bytes = KNOWN_BODY) -> bytes:
    """A request with the head that the short way knows, whatever its body."""
    return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n%b\r\n%b" % (KNOWN_TARGET, HOST, KEY, len(body), JSON, body)


def prime(bench: Bench, sock: socket.socket) -> None:
    """Two requests on a connection: a gateway that has a short way knows it from now on."""
    for _ in range(2):
        sock.sendall(known())
        assert raw.read(sock).status == 200
        until(bench.gateway.at_rest)
    bench.upstream.requests.clear()


GROUPED = [name for name in GROUPS if name != "limits"]


@pytest.mark.parametrize("group", GROUPED)
def test_behind_a_request_of_the_short_way_a_message_has_its_one_meaning(
    bench: Bench, parser: str, group: str, short: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = raw.connect

    def travelled(port: int, **more: Any) -> socket.socket:
        sock = connect(port, **more)
        prime(bench, sock)
        return sock

    for case in GROUPS[group]:
        verdict = case.by(parser)
        short.clear()
        with monkeypatch.context() as patch:
            patch.setattr(raw, "connect", travelled)
            talked = talk(bench.gateway.port, case.data, verdict)
        assert short, "nothing went the short way"
        try:
            check_talk(talked, verdict)
            until(bench.gateway.at_rest)
            check_seen(bench.upstream.requests, verdict)
        except AssertionError as error:
            raise AssertionError(case.name) from error
    check_alive(bench.gateway)


# The same bytes on both ways.

BODIES = [
    KNOWN_BODY,
    b'{"model":"known","stream":true,"messages":[]}',
    b'{"model":"known","stream":true,"stream_options":{"include_usage":false}}',
    b'{"stream":true,"model":"known","stream_options":null}',
    *(b'{"model":"known",%b}' % member for member in (
        b'"model":"known"', b'"model":"other"', b'"mod\\u0065l":"other"', b'"\\u006dodel":"known"', b'"Model":"x"',
        b'"a":{"model":"other"}', b'"a":"\\"model\\":\\"x\\""', b'"a":NaN', b'"a":Infinity', b'"a":-0', b'"a":1e999',
        b'"a":01', b'"a":' + b"9" * 400, b'"a":"\xff"', b'"a":"\\ud800"', b'"a":"\0"', b'"a":"\\u0000"', b'"a":1,',
        b'"stream":1', b'"stream":"true"', b'"stream":null', b'"stream":true,"stream":false',
        b'"max_tokens":-1', b'"max_tokens":1e18', b'"n":1e400', b'"a":' + b"[" * 600 + b"]" * 600,
        b'"a":' + b"[" * 2000, b'"a":/**/1', b"'a':1", b'"a":1}{"b":2',
    )),
    b' \t\r\n{"model":"known"}\n\n', b'\xef\xbb\xbf{"model":"known"}', b'{"model":"known"}\0', b'{"model":"known"} x',
    b'{"model":"known "}', b'{"model":" known"}', b'{"model":"KNOWN"}', b'{"model":"known\\u0000"}',
    b'{"model":"know\\u006e"}',
    b'{"model":["known"]}', b'{"model":null}', b'{"model":""}', b'["model","known"]', b'"known"', b"{}", b"", b"{ }",
    '{"model":"\uff4bnown"}'.encode(), '{"model":"known"}'.encode("utf-16"), b'{"model":"m","messages":[]}',
]  # fmt: skip
"""Odd bodies behind a head that the short way knows."""

FRAMINGS = [
    known(),
    known().replace(b"Content-Length: ", b"Content-Length: 0"),
    known().replace(b"Content-Length: ", b"Content-Length: +"),
    known().replace(b"Content-Length: 31", b"Content-Length: 31 "),
    known().replace(b"Content-Length: 31", b"Content-Length: 31, 31"),
    known().replace(b"Content-Length: 31", b"Content-Length: 31\r\nContent-Length: 31"),
    known().replace(b"Content-Length: 31", b"Content-Length: 31\r\nContent-Length: 3"),
    known().replace(b"Content-Length: 31", b"Content-Length: 31\r\n" + CHUNKED[:-2]),
    known().replace(b"Content-Length: 31", b"Content-Length: 31\n"),
    known().replace(b"Content-Length: 31", b"Content-Length: 30"),
    known().replace(b"Content-Length: 31", b"Content-Length: 32"),
    known().replace(b"Content-Length: 31", b"Content-Length: 0"),
    known().replace(b"Content-Length: 31", "Content-Length: ٣١".encode()),
    known().replace(b"Content-Length: 31", b"Content-Length: 0000000000031"),
    known().replace(b"Content-Length: 31", b"content-length:31"),
    known().replace(HOST, HOST * 2),
    known().replace(b"application/json", b"application/xml_"),
    known().replace(b"Content-Type: appl", b"Transfer-Encoding:"),
    known().replace(CLIENT_KEY.encode(), CLIENT_KEY[:-1].encode() + b"d"),
    known() + known(),
    known() + SMUGGLED,
    known()[:-1] + b"\r\n",
    b"\r\n" + known(),
    known() + b"\r\n" + known(),
    known(SMUGGLED),
    known(known()),
    post(b"Content-Length: %d\r\n" % len(known()), known(), target=FILES),
    post(CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(known()), known()), target=FILES),
    post(CHUNKED, b"5\r\n%b\r\n0\r\n%b" % (FIVE, known()), target=FILES),
    b"GET /healthz HTTP/1.1\r\nX-Y: z\r\n" + known(),
    *(known(body) for body in BODIES),
]
MARKS = [
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b'"', b"{", b"}", b"\\", b"0", b"1", b"5"),
    *(CHUNKED, b"Content-Length: 3\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", FIVE),
    *(b'"model":"m",', b'"stream":true,', KEY, HOST, SMUGGLED, b"GET ", b"HTTP/1.0", b"?key=x", b"%2e%2e/"),
]  # fmt: skip


def damaged(chance: random.Random) -> bytes:
    """A request that is nearly a known one, or whose length is true and whose body is nearly a good one."""
    body_only = chance.random() < 0.6
    data = bytearray(chance.choice(BODIES[:40] if body_only else FRAMINGS))
    for _ in range(chance.choice([1, 1, 2])):
        at = chance.randint(min(5, len(data)), len(data))  # odd methods are for upstreams that know them
        match chance.randrange(5):
            case 0:
                data[at:at] = chance.choice(MARKS)
            case 1:
                del data[at : at + chance.randint(1, 4)]
            case 2:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 3:
                data[at:at] = data[at : at + chance.randint(1, 40)]
            case _:
                data[at : at + chance.randint(1, 8)] = chance.choice(MARKS)
    return known(bytes(data)) if body_only else bytes(data)


class Told(NamedTuple):
    """What came of some bytes: the answers, how the connection ended, what went up."""

    answers: list[tuple[int, bytes]]
    ended: str
    sent: list[tuple[str, bytes, bytes, list[tuple[bytes, bytes]]]]


async def hear(sock: socket.socket, data: bytes, patience: float, enough: Callable[[bytes], object]) -> Reply:
    """Sends bytes, and listens until it is enough, the connection ends, or nothing comes for that long."""
    loop, heard = asyncio.get_running_loop(), Reply(b"", "open")
    try:
        sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        heard.ended = "cut"
    until_then = loop.time() + patience
    while heard.ended == "open" and not enough(heard.data) and loop.time() < until_then:
        await asyncio.sleep(0)
        try:
            more = sock.recv(65536)
        except BlockingIOError:
            continue
        except ConnectionResetError:
            more = b""
        heard.data += more
        heard.ended = "open" if more else "cut"
    return heard


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    """Whole, or in two pieces: where something that looks like another request begins, where a head ends, anywhere."""
    places = [found.start() for found in re.finditer(rb"(?=POST|GET)|(?<=\r\n\r\n)", data)]
    at = chance.choice([0, *places, chance.randrange(len(data) + 1)])
    return [piece for piece in (data[:at], data[at:]) if piece]


async def converse(bench: Bench, pieces: list[bytes], patience: float) -> Reply:
    """Sends them on a connection that has been travelled before, and then a last request. On the gateway's own loop,
    so that it reads each piece by itself."""
    rests = bench.gateway.at_rest
    with socket.create_connection(("127.0.0.1", bench.gateway.port)) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else the second piece would wait
        for _ in range(2):
            await hear(sock, known(), 1.0, lambda got: got.endswith(b"}") and rests())
        bench.upstream.requests.clear()
        said = b""
        for piece in (*pieces, LAST):
            wait = patience if piece is LAST else patience / 3
            heard = await hear(sock, piece, wait, lambda got, last=piece is LAST: got and not last and rests())
            said += heard.data
            if heard.ended == "cut":
                break
        return Reply(said, heard.ended)


def told(loop: Loop, bench: Bench, pieces: list[bytes], patience: float) -> Told:
    heard = loop.run(converse(bench, pieces, patience))
    until(bench.gateway.at_rest)
    replies = [(one.status, re.sub(rb"req_\w+", b"", one.body)) for one in answers(heard.data)]
    return Told(replies, heard.ended, [sent(got) for got in bench.upstream.requests if got.complete])


def sent(got: Got) -> tuple[str, bytes, bytes, list[tuple[bytes, bytes]]]:
    return got.method, got.target, got.body, [line for line in got.headers if line[0].lower() != b"host"]


@pytest.fixture(scope="module")
def long_way(loop: Loop) -> Bench:
    """A gateway that has no other."""
    with quick_log():
        bench = Bench(loop)
    bench.gateway.daemon._door._short_way = None
    return bench


def test_both_ways_make_the_same_of_whatever_looks_like_a_known_request(
    loop: Loop, bench: Bench, long_way: Bench, parser: str, short: list[str]
) -> None:
    print(f"WAYS_SEED={SEED} WAYS_ROUNDS={ROUNDS}")
    chance = random.Random(SEED)
    went = 0
    for number in range(-2 * len(FRAMINGS), ROUNDS):
        data = cut(FRAMINGS[number % len(FRAMINGS)] if number < 0 else damaged(chance), chance)
        for patience in (0.01, 0.05, 0.25):  # a busy machine may be late once, not three times
            short.clear()
            here, there = (told(loop, one, data, patience) for one in (bench, long_way))
            assert short, "the gateway has forgotten its short way"
            if here == there:
                break
        went += len(short) > 2
        assert here == there, f"WAYS_SEED={SEED}, round {number}: {data!r}"
    assert went > len(FRAMINGS) // 4, "too few went the short way"
    for gateway in (bench.gateway, long_way.gateway):
        check_alive(gateway)
        booked_once(gateway)
        assert not [line for line in gateway.log() if line["level"] == "error"]


# Chunks.


@pytest.mark.parametrize("target", [CHAT, FILES])
@pytest.mark.parametrize(
    "line",
    [
        b"Host: evil.example",
        b"Content-Type: text/plain",
        b"Content-Length: 0",
        b"Content-Length: 500",
        b"Transfer-Encoding: identity",
        b"Transfer-Encoding: chunked",
        b"Content-Encoding: gzip",
        b"Authorization: Bearer " + CLIENT_KEY.encode(),
        b"x-goog-api-key: " + CLIENT_KEY.encode(),
        b"Upgrade: websocket",
    ],
)
def test_no_trailer_says_anything_of_framing_type_host_or_key(
    bench: Bench, parser: str, line: bytes, target: bytes
) -> None:
    """It is skipped, or the request is malformed; what went up is the same as without it."""
    plain = chunks(b"5\r\n%b\r\n0\r\n\r\n" % FIVE, target)
    assert raw.send(bench.gateway.port, plain).status == 200
    spoilt = plain.replace(b"\r\n0\r\n\r\n", b"\r\n0\r\n%b\r\n\r\n" % line)
    reply = raw.send(bench.gateway.port, spoilt)
    assert reply.status in (200, 400) and reply.data.count(b"HTTP/1.1 ") == 1
    keyless = raw.send(bench.gateway.port, spoilt.replace(KEY, b""))
    assert keyless.status == 401 or (keyless.status, reply.status) == (400, 400)
    until(bench.gateway.at_rest)
    whole = [sent(got) for got in bench.upstream.requests if got.complete]
    assert whole == [whole[0]] * (2 if reply.status == 200 else 1)


ENDLESS = b"F" * 17
"""A size of which one of the parsers waits for every byte."""


@pytest.mark.parametrize("size", [*SIZES, b";", b";a=b", ENDLESS], ids=repr)
def test_no_end_of_an_upload_goes_up_where_a_chunk_has_no_size(loop: Loop, parser: str, size: bytes) -> None:
    """What the upstream has got by then is the beginning of a request to its last byte."""
    start = post(CHUNKED, b"4\r\ngood\r\n", target=FILES)
    with recording() as recorder:
        gateway = loop.gateway(CONFIG.format(vendor=f"http://127.0.0.1:{recorder.port}"))
        with raw.connect(gateway.port) as sock:
            sock.sendall(start)
            until(lambda: recorder.connections and b"good" in recorder.connections[0])
            sock.sendall(b"%b\r\n%b\r\n0\r\n\r\n" % (size, FIVE) + SMUGGLED)
            if size != ENDLESS:
                reply = raw.read(sock, until_complete=False)
                check_error(reply, 400, "invalid_request")
                assert reply.data.count(b"HTTP/1.1 ") == 1
        until(gateway.at_rest)
        (got,) = recorder.connections
        assert b"\r\nTransfer-Encoding: chunked\r\n" in got and b"4\r\ngood\r\n" in got
        assert size == ENDLESS or got.endswith(b"4\r\ngood\r\n")
        with pytest.raises(ValueError, match=r"invalid literal|not whole"):
            read_strictly(bytes(got))


NEXT = get(line=b"GET /openai-main/v1/files/of-the-next-request HTTP/1.1").replace(KEY, KEY + b"X-Y: of-the-next\r\n")


def test_no_byte_of_the_next_request_is_told_where_a_line_ends_badly(loop: Loop, bench: Bench, parser: str) -> None:
    """Each LF begins a segment of its own, in which another request stands."""
    before = os.path.getsize(bench.gateway.log_path)
    for case in GROUPS["line ends"]:
        if case.by(parser) != MALFORMED:
            continue
        for at in (match.start() for match in re.finditer(b"\n", case.data)):
            pieces = [case.data[:at], case.data[at:] + NEXT]
            talked = loop.run(deliver(bench.gateway.port, pieces, MALFORMED))
            assert [reply.status for reply in talked.replies] == [400], (case.name, at)
            assert b"of-the-next" not in talked.replies[0].data
    until(bench.gateway.at_rest)
    assert b"of-the-next" not in bench.gateway.log_path.read_bytes()[before:]
    assert not [got for got in bench.upstream.requests if b"of-the-next" in got.raw_head]


def test_every_request_of_all_these_has_its_one_record_and_nothing_is_held(bench: Bench) -> None:
    """And none has one of which nobody knows whose it was."""
    booked_once(bench.gateway)
    until(lambda: bench.gateway.daemon._door.crowd.count == 0)
    kept = b"".join(path.read_bytes() for path in bench.gateway.folder.rglob("state.db*") if path.is_file())
    kept += raw.send(bench.gateway.port, raw.request("/metrics", key=None)).data + bench.gateway.log_path.read_bytes()
    assert not [secret for secret in (*bench.secrets, "of-the-next") if secret.encode() in kept]
