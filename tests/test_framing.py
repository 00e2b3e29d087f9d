"""Where one request ends and the next begins: every message has one meaning, whole or in pieces, for both parsers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import orjson
import pytest
from aiohttp import web_protocol
from aiohttp.http_parser import HttpRequestParserPy

from gproxyd.gateway import door, intake
from tests.support import framing, raw
from tests.support.checks import OK, Bench, check_alive, check_credential, quick_log
from tests.support.framing import (
    CHAT,
    CHUNKED,
    CORPUS,
    FILES,
    FIVE,
    GROUPS,
    LAST,
    SMUGGLED,
    WAITS,
    Case,
    Verdict,
    answers,
    get,
    post,
    read_strictly,
    trailer,
)
from tests.support.process import Process, clean_environ
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, CONFIG, PROVIDER_KEY, SECRETS, Loop, until
from tests.support.upstream import Got, Pause, Script, Upstream, json_reply

MIB = 1024 * 1024
LINGER = 0.1
SEED = int(os.environ.get("FRAMING_SEED", "7"))


@pytest.fixture(scope="module")
def made(loop: Loop) -> Iterator[Bench]:
    with quick_log(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(door._OPTIONS, "lingering_time", LINGER)
        bench = Bench(loop)
        until(bench.gateway.log)
        bench.gateway.daemon._told._most = sys.maxsize  # every line counts here
        yield bench


@pytest.fixture
def bench(made: Bench) -> Bench:
    made.reset()
    made.upstream.requests.clear()
    made.upstream.peer_left.clear()
    return made


@pytest.fixture(params=["c", "python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of aiohttp's parsers reads what is sent from now on."""
    if request.param == "python":
        monkeypatch.setattr(web_protocol, "HttpRequestParser", HttpRequestParserPy)
    return str(request.param)


class Talk(NamedTuple):
    """What came back for a message, and for what was sent behind it; how the connection ended."""

    replies: list[Reply]
    ended: str


def is_refusal(verdict: Verdict) -> bool:
    """Whether something may stand behind the message at once: it will be neither answered nor missed."""
    return not verdict.goes_on and verdict.statuses[-1] >= 400


def talk(port: int, data: bytes, verdict: Verdict, *, patience: float = 5) -> Talk:
    """Sends a message; behind one after which the connection goes on, or must not, another one."""
    with raw.connect(port, timeout=patience) as sock:
        if verdict == WAITS:
            sock.sendall(data)
            sock.settimeout(0.1)
            assert raw.read(sock) == Reply(b"", "timeout")
            return Talk([], "timeout")
        try:
            sock.sendall(data + (LAST if is_refusal(verdict) else b""))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has been refused before its end; the answer is there
        got = b""
        if verdict.goes_on:
            for _ in verdict.statuses:
                got += raw.read(sock, seen=b"").data if len(verdict.statuses) == 1 else b""
            while len(verdict.statuses) > 1 and got.count(b"HTTP/1.1 ") < len(verdict.statuses):
                got += sock.recv(65536)
            sock.sendall(LAST)
        rest = raw.read(sock, until_complete=False)
        return Talk(answers(got + rest.data), rest.ended)


def check_talk(talked: Talk, verdict: Verdict) -> None:
    statuses = tuple(reply.status for reply in talked.replies)
    assert statuses == verdict.statuses + ((200,) if verdict.goes_on else ())
    if verdict == WAITS:
        return
    assert talked.ended in (("fin", "rst", "timeout") if verdict.lingers else ("fin", "rst"))
    if verdict.goes_on:
        assert talked.replies[-1].body == b"OK"
    else:
        assert talked.replies[-1].header("connection") == "close"
    for reply in talked.replies:
        assert reply.header("server") is None
        assert PROVIDER_KEY.encode() not in reply.data and CLIENT_KEY.encode() not in reply.data
        if reply.status >= 400:
            assert reply.json["error"]["code"] and b"smuggled" not in reply.data and FIVE not in reply.data


def check_seen(requests: list[Got], verdict: Verdict) -> None:
    whole = [got for got in requests if got.complete]
    assert tuple((got.method, got.target, got.body) for got in whole) == verdict.seen
    if verdict.statuses in ((400,), (431,)):
        assert all(got.target == b"/v1/files" for got in requests), "only an upload may have begun"
    for got in whole:
        check_credential(got, "authorization")
        assert "x-trailer" not in dict(got.headers)
        chunked = got.header("transfer-encoding") == [b"chunked"]
        body = b"%x\r\n%b\r\n" % (len(got.body), got.body) if chunked and got.body else got.body
        (sent,) = read_strictly(got.raw_head + b"\r\n\r\n" + body + (b"0\r\n\r\n" if chunked else b""))
        assert (sent.method, sent.target, sent.body) == (got.method, got.target, got.body)


def check_log(bench: Bench, before: int, talked: Talk, verdict: Verdict) -> None:
    """One line for each answer, and no line for anything else."""
    ids = {reply.header("x-request-id") for reply in talked.replies}
    assert len(ids) == len(talked.replies)

    def written() -> bytes | None:
        with open(bench.gateway.log_path, "rb") as log:
            log.seek(before - 1)
            text = log.read().partition(b"\n")[2]  # a line may have been half written before
        ours = [line for line in text.splitlines() if any(str(one).encode() in line for one in ids)]
        told = len(ours) == len(ids) and (verdict != WAITS or b'"client_gone"' in text)
        return text if told and text.endswith(b"\n") else None

    text = until(written)
    lines = [orjson.loads(line) for line in text.splitlines()]
    assert {line["event"] for line in lines} <= {"request", "malformed_request"}, text
    others = [line for line in lines if line["request_id"] not in ids and line.get("endpoint") != "health"]
    assert [line["outcome"] for line in others] == (["client_gone"] if verdict == WAITS else [])
    for secret in bench.secrets:
        assert secret.encode() not in text, text


def ids_of(cases: list[Case]) -> list[str]:
    return [case.name.replace(" ", "-") for case in cases]


@pytest.mark.parametrize("case", CORPUS, ids=ids_of(CORPUS))
def test_a_message_has_one_meaning(bench: Bench, parser: str, case: Case) -> None:
    verdict = case.by(parser)
    before = os.path.getsize(bench.gateway.log_path)
    talked = talk(bench.gateway.port, case.data, verdict)
    check_talk(talked, verdict)
    until(bench.gateway.at_rest)
    check_seen(bench.upstream.requests, verdict)
    check_log(bench, before, talked, verdict)
    check_alive(bench.gateway)


def test_the_corpus_is_what_it_says() -> None:
    names = [case.name for case in CORPUS]
    assert len(set(names)) == len(names)
    assert all((case.python is None) == (not case.why) for case in CORPUS), "a difference has its reason"
    assert len(CORPUS) > 300


# In pieces.


async def deliver(port: int, pieces: list[bytes], verdict: Verdict) -> Talk:
    """As `talk`, on the gateway's own loop: between two pieces it gets its turn, so it reads each one by itself."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in [*pieces, LAST] if verdict != WAITS and is_refusal(verdict) else pieces:
            try:
                sock.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        data, ended = b"", "open"
        told = not verdict.goes_on
        deadline = time.monotonic() + (0.05 if verdict == WAITS else 5)
        while ended == "open":
            if not told and data.count(b"HTTP/1.1 ") == len(verdict.statuses) and _all_whole(data):
                told = True
                sock.sendall(LAST)
            try:
                more = sock.recv(65536)
            except BlockingIOError:
                ended = "open" if time.monotonic() < deadline else "timeout"
                await asyncio.sleep(0)
            except ConnectionResetError:
                ended = "rst"
            else:
                data += more
                ended = "open" if more else "fin"
        return Talk(answers(data), ended)


def _all_whole(data: bytes) -> bool:
    try:
        return bool(answers(data))
    except AssertionError:
        return False


def cuttings(data: bytes, random: random.Random) -> Iterator[list[bytes]]:
    """One byte each, as long as the message is not huge; then at random."""
    if len(data) <= 2000:
        yield [data[at : at + 1] for at in range(len(data))]
    else:
        yield [data[at : at + 1000] for at in range(0, len(data), 1000)]
    for _ in range(int(os.environ.get("FRAMING_CUTS", "4"))):
        count = random.randint(1, 8)
        cuts = sorted({random.randrange(1, len(data)) for _ in range(count)}) if len(data) > 1 else []
        yield [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def essence(requests: list[Got]) -> list[tuple[list[bytes], bytes]]:
    """What the upstream got, byte for byte; save that a body that is still coming goes on in chunks."""
    framing = (b"content-length:", b"transfer-encoding:")
    return [
        ([line for line in got.raw_head.split(b"\r\n") if not line.lower().startswith(framing)], got.body)
        for got in requests
        if got.complete
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_one_verdict_however_it_is_cut(loop: Loop, bench: Bench, parser: str, group: str) -> None:
    chance = random.Random(SEED)
    requests = bench.upstream.requests
    for case in GROUPS[group]:
        verdict = case.by(parser)
        requests.clear()
        talk(bench.gateway.port, case.data, verdict)
        until(bench.gateway.at_rest)
        whole = essence(requests)
        for pieces in cuttings(case.data, chance):
            requests.clear()
            where = f"{case.name}, seed {SEED}, cut into {[len(piece) for piece in pieces]}"
            try:
                check_talk(loop.run(deliver(bench.gateway.port, pieces, verdict)), verdict)
                until(bench.gateway.at_rest)
                check_seen(requests, verdict)
                assert essence(requests) == whole
            except AssertionError as error:
                raise AssertionError(where) from error
    check_alive(bench.gateway)


def test_pieces_are_read_one_by_one(loop: Loop, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would test nothing."""
    sizes: list[int] = []
    received = door.DoorProtocol.data_received

    def noting(self: door.DoorProtocol, data: bytes) -> None:
        sizes.append(len(data))
        received(self, data)

    monkeypatch.setattr(door.DoorProtocol, "data_received", noting)
    pieces = [get()[at : at + 1] for at in range(len(get()))]
    loop.run(deliver(bench.gateway.port, pieces, framing.GET_PASSES))
    assert sizes[: len(pieces)] == [1] * len(pieces)


# The real program, with either parser.

PARSERS: dict[str, dict[str, str]] = {"c": {}, "python": {"AIOHTTP_NO_EXTENSIONS": "1"}}


@pytest.fixture(scope="module", params=PARSERS)
def apart(
    request: pytest.FixtureRequest, loop: Loop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Process, Upstream]]:
    upstream = Upstream(loop, [OK]).start()
    config = CONFIG.format(vendor=upstream.url) + "log: {level: debug}\n"
    with Process(tmp_path_factory.mktemp("apart"), config, SECRETS, **PARSERS[request.param]) as process:
        yield request.param, process, upstream


STARTING = frozenset({"ready", "slow_parser"})


def descriptors(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def test_the_whole_corpus_against_the_program(apart: tuple[str, Process, Upstream]) -> None:
    parser, process, upstream = apart
    talk(process.port, get(), framing.GET_PASSES)
    before = descriptors(process)
    until(lambda: len([line for line in process.log() if line["event"] == "request"]) == 2)
    known = {line["request_id"] for line in process.log() if "request_id" in line}
    replies: list[Reply] = []
    for case in CORPUS:
        upstream.requests.clear()
        verdict = case.by(parser)
        try:
            talked = talk(process.port, case.data, verdict, patience=0.3 if verdict.lingers else 5)
            check_talk(talked, verdict)
            check_seen(upstream.requests, verdict)
        except AssertionError as error:
            raise AssertionError(case.name) from error
        replies += talked.replies
    until(lambda: descriptors(process) <= before, 10)
    assert process.process.poll() is None
    assert raw.send(process.port, LAST).status == 200

    ids = {reply.header("x-request-id") for reply in replies}
    counted = sum(case.by(parser) in (framing.MALFORMED, framing.TOO_LARGE) for case in CORPUS)
    until(lambda: len(ids - {line.get("request_id") for line in process.log()}) <= counted)
    lines = [line for line in process.log() if line["event"] not in STARTING and line.get("request_id") not in known]
    assert {line["event"] for line in lines} == {"request", "malformed_request"}, [
        line for line in lines if "request" not in line["event"]
    ]
    assert len({line["request_id"] for line in lines}) == len(lines)
    answered = [line for line in lines if line["request_id"] in ids]
    others = [line for line in lines if line["request_id"] not in ids and line.get("endpoint") != "health"]
    assert {line["outcome"] for line in others} <= {"client_gone"}
    left_out = len(ids) - len(answered)  # a flood of malformed requests is counted instead
    assert left_out <= counted
    text = orjson.dumps(lines).decode()
    assert not any(secret in text for secret in SECRETS.values())


@pytest.mark.parametrize("parser", PARSERS)
def test_which_parser_is_in_use(parser: str) -> None:
    """The one in C by default; the other only where somebody asks for it."""
    code = "import gproxyd.gateway.door, aiohttp.web_protocol as p; print(p.HttpRequestParser.__module__)"
    environ = {name: value for name, value in clean_environ().items() if name != "AIOHTTP_NO_EXTENSIONS"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**environ, **PARSERS[parser]}
    )
    assert found.stdout.strip() == {"c": "aiohttp._http_parser", "python": "aiohttp.http_parser"}[parser]


def flooding(port: int, start: bytes, piece: bytes, total: int, patience: float = 4) -> tuple[int, Reply]:
    """Sends `piece` again and again behind `start`: how many bytes were taken, and what was answered."""
    with raw.connect(port) as sock:
        sent = 0
        try:
            sock.sendall(start)
            while sent < total:
                sent += sock.send(piece)
        except OSError:
            pass  # the gateway has had enough
        sock.settimeout(patience)
        return sent, raw.read(sock, until_complete=False)


FLOODS = {
    "CONNECT": (get(line=b"CONNECT gateway.test:443 HTTP/1.1"), b"x" * MIB, 405),
    "a WebSocket": (get(b"Connection: Upgrade\r\nUpgrade: websocket\r\n"), b"x" * MIB, 426),
    "a WebSocket, and requests": (get(b"Connection: Upgrade\r\nUpgrade: websocket\r\n"), SMUGGLED * 10_000, 426),
    "h2c": (get(b"Connection: Upgrade\r\nUpgrade: h2c\r\n"), b"x" * MIB, 426),
    "an upgrade with a body": (post(b"Upgrade: websocket\r\nContent-Length: 20971520\r\n"), b"x" * MIB, 426),
    "a target": (b"GET /", b"x" * MIB, 431),
    "a header": (b"GET / HTTP/1.1\r\nX: ", b"x" * MIB, 431),
    "a header's name": (b"GET / HTTP/1.1\r\n", b"x" * MIB, 431),
    "headers": (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 100_000, 431),
    "a trailer": (post(CHUNKED, b"5\r\n%b\r\n0\r\nX: " % FIVE), b"x" * MIB, 400),
    "trailers": (post(CHUNKED, b"5\r\n%b\r\n0\r\n" % FIVE), b"X: y\r\n" * 100_000, 400),
    "chunks of a byte": (post(CHUNKED, b"1\r\n{\r\n"), b"1;%b\r\n \r\n" % (b"a" * 4096), 0),
    "garbage": (b"", random.Random(1).randbytes(MIB), 400),
}  # fmt: skip


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_is_ended_and_costs_no_memory(apart: tuple[str, Process, Upstream], what: str) -> None:
    _, process, upstream = apart
    start, piece, status = FLOODS[what]
    upstream.requests.clear()
    before = process.memory()["VmRSS"]
    total = 4 * MIB if what == "chunks of a byte" else 20 * MIB
    sent, reply = flooding(process.port, start, piece, total, 4 if status else 0.3)
    assert process.memory()["VmRSS"] - before < 8 * MIB, sent
    together = what == "h2c" and reply.status == 400  # the flood came in one piece with the request, which it spoilt
    endless = what == "garbage" and reply.status == 431  # one of the parsers looks at the line's length first
    assert reply.status == status or together or endless, reply.data[:200]
    if status:
        assert len(answers(reply.data)) == 1 and reply.ended in ("fin", "rst")
    assert [got for got in upstream.requests if got.complete] == []
    assert raw.send(process.port, LAST).status == 200


# Trailers.


@pytest.mark.parametrize(
    "line", [b"Authorization: Bearer " + CLIENT_KEY.encode(), b"x-api-key: " + CLIENT_KEY.encode()]
)
def test_a_trailer_is_no_header_of_the_next_request(bench: Bench, parser: str, line: bytes) -> None:
    """Wherever the segments end, and in one segment, too."""
    first, second = trailer(line), get().replace(framing.KEY, b"")
    both = first + second
    for cut in (*range(len(first) - len(line) - 9, len(first) + 20), len(both)):
        with raw.connect(bench.gateway.port) as sock:
            sock.sendall(both[:cut])
            if cut == len(first):
                assert raw.read(sock).status == 200
                sock.sendall(second)
                assert raw.read(sock).status == 401
                continue
            time.sleep(0.002)
            sock.sendall(both[cut:])
            reply = raw.read(sock)
            with contextlib.suppress(ConnectionResetError):  # an end behind the first answer, met by the second's rest
                while reply.data.count(b"HTTP/1.1 ") < 2 and (more := sock.recv(65536)):
                    reply.data += more
            found = [each.status for each in answers(reply.data)]
            assert found in ([200], [200, 401], [200, 400]), cut
    assert {got.method for got in bench.upstream.requests} == {"POST"}


def test_trailers_reach_nobody(bench: Bench, parser: str) -> None:
    lines = b"\r\n".join([b"X-Trailer: t", b"Host: evil.example", b"X-Other: t"])
    with raw.connect(bench.gateway.port) as sock:
        for _ in range(3):
            sock.sendall(trailer(lines.replace(b"Host", b"X-Host")))
            assert raw.read(sock).status == 200
            sock.sendall(get())
            assert raw.read(sock).status == 200
    for got in bench.upstream.requests:
        assert not got.header("x-trailer") and not got.header("x-host") and not got.header("x-other")
        assert len(got.header("host")) == 1
    assert len(bench.upstream.requests) == 6


def test_chunked_bodies_in_one_connection_however_long(bench: Bench, parser: str) -> None:
    """A new parser takes over behind each of them; nothing of the next request is lost on the way."""
    with raw.connect(bench.gateway.port) as sock:
        for size in (0, 1, 5, 70_000, 300_000, 2):
            body = b"x" * size
            framed = b"".join(
                b"%x\r\n%b\r\n" % (len(part), part) for at in range(0, size, 9000) if (part := body[at : at + 9000])
            )
            sock.sendall(post(CHUNKED, framed + b"0\r\n\r\n", target=FILES))
            reply = raw.read(sock)
            assert (reply.status, reply.header("connection")) == (200, None), size
            assert bench.upstream.requests[-1].body == body


# Bodies that are not what their head says.


@pytest.mark.parametrize("head", [post(b"Content-Length: 100\r\n", FIVE), post(CHUNKED, b"5\r\n%b\r\n" % FIVE)])
@pytest.mark.parametrize("leave", ["fin", "rst", "half"])
def test_a_body_that_breaks_off_goes_nowhere(bench: Bench, parser: str, head: bytes, leave: str) -> None:
    before = len(bench.gateway.requests())
    with raw.connect(bench.gateway.port) as sock:
        sock.sendall(head)
        until(lambda: not bench.gateway.at_rest())
        if leave == "rst":
            raw.reset(sock)
        elif leave == "half":
            sock.shutdown(socket.SHUT_WR)
            assert raw.read(sock).data == b""
    until(bench.gateway.at_rest)
    line = until(lambda: bench.gateway.requests()[before:])[-1]
    assert (line["outcome"], line["status"], line["attempts"]) == ("client_gone", 499, 0)
    assert bench.upstream.requests == []


def test_a_body_that_stops_coming_is_given_up(bench: Bench, parser: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BODY_IDLE", 0.1)
    for head in (post(b"Content-Length: 100\r\n", FIVE), post(CHUNKED, b"5\r\n%b\r\n" % FIVE)):
        reply = raw.send(bench.gateway.port, head, until_complete=False)
        assert (reply.status, reply.json["error"]["code"]) == (408, "request_timeout")
        assert reply.ended in ("fin", "rst")
    assert bench.upstream.requests == []


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "later"])
def test_what_is_too_much_is_the_next_request(bench: Bench, parser: str, apart: bool) -> None:
    """On its own merits: with no key it is refused, and what is no request ends the connection."""
    first = post(b"Content-Length: 5\r\n", FIVE)
    for more, statuses in ((get().replace(framing.KEY, b""), [200, 401]), (b"x" * 500 + b"\r\n\r\n", [200, 400])):
        bench.upstream.requests.clear()
        parts = [(first, 0.05), (more, 0.0)] if apart else [first + more]
        reply = raw.send(bench.gateway.port, parts, half_close=False, until_complete=False, timeout=0.3)
        found = [each.status for each in answers(reply.data)]
        # A parser that meets an error gives up what came in one piece with it; nobody has seen it then.
        assert found == statuses or (not apart and found == [400] and statuses[-1] == 400)
        assert len(bench.upstream.requests) == found.count(200)
        assert all(got.body == FIVE for got in bench.upstream.requests)


# One behind another.


def tagged(got: Got) -> Script:
    tag = got.target.rpartition(b"/")[2]
    return [*([Pause(0.3)] if tag == b"slow" else []), json_reply(b'{"tag":"%b"}' % tag)]


@pytest.fixture
def tags(loop: Loop) -> Bench:
    bench = Bench(loop)
    bench.upstream._script = tagged
    return bench


def test_pipelined_requests_are_answered_in_their_order(tags: Bench, parser: str) -> None:
    names = [b"slow", *(b"n%d" % at for at in range(20))]
    wrong = get().replace(CLIENT_KEY.encode(), b"ck-wrong")
    requests = b"".join(get().replace(b"/files/f", b"/files/" + name) + wrong for name in names)
    start = time.monotonic()
    replies = answers(raw.send(tags.gateway.port, requests + LAST, until_complete=False).data)
    assert time.monotonic() - start < 2
    assert [reply.status for reply in replies] == [200, 401] * len(names) + [200]
    assert [reply.json["tag"].encode() for reply in replies[:-1:2]] == names
    assert [got.target.rpartition(b"/")[2] for got in tags.upstream.requests] == names


def test_a_flood_of_requests_waits_outside(tags: Bench, parser: str) -> None:
    """While one is slow, only a few behind it are taken in; afterwards all are answered."""
    count = 10_000 if parser == "c" else 2000
    flood = LAST.replace(b"Connection: close\r\n", b"") * count
    slow = get().replace(b"/files/f", b"/files/slow")
    with raw.connect(tags.gateway.port) as sock:
        sock.sendall(slow)
        until(lambda: tags.upstream.requests)
        (client,) = tags.gateway.daemon._door.connections
        sock.setblocking(False)
        taken = sock.send(flood)
        time.sleep(0.1)
        assert 1 <= len(client._messages) <= 64
        assert client._buffer_paused
        sock.settimeout(10)
        data, left = b"", flood[taken:] + LAST
        while left or not data.endswith(b"OK") or data.count(b"\r\n\r\nOK") < count + 1:
            if left:
                sock.setblocking(False)
                try:
                    left = left[sock.send(left) :]
                except BlockingIOError:
                    pass
                sock.settimeout(10)
            more = sock.recv(1 << 20)
            assert more
            data += more
    first, *others = answers(data)
    assert first.json == {"tag": "slow"}
    assert len(others) == count + 1 and {reply.body for reply in others} == {b"OK"}


def test_a_connection_remembers_nobody(bench: Bench, parser: str) -> None:
    """Each request is its own key's: a key that was good for one says nothing of the next."""
    with raw.connect(bench.gateway.port) as sock:
        for lines, status in (
            (b"Authorization: Bearer %b\r\n" % CLIENT_KEY.encode(), 200),
            (b"Authorization: Bearer ck-wrong\r\n", 401),
            (b"", 401),
            (b"x-api-key: %b\r\n" % CLIENT_KEY.encode(), 200),
            (b"x-goog-api-key: ck-wrong\r\n", 401),
            (b"", 401),
        ):
            sock.sendall(get().replace(framing.KEY, lines))
            assert raw.read(sock).status == status, lines
    assert len(bench.upstream.requests) == 2


# Expectations, upgrades.


@pytest.mark.parametrize("target", [CHAT, FILES, b"/proxy/openai-main/v1/x"])
@pytest.mark.parametrize("lines", [b"Content-Length: 5\r\n", CHUNKED])
def test_a_client_that_waits_is_told_to_go_on(bench: Bench, parser: str, target: bytes, lines: bytes) -> None:
    body = b"5\r\n%b\r\n0\r\n\r\n" % FIVE if lines == CHUNKED else FIVE
    with raw.connect(bench.gateway.port) as sock:
        for _ in range(2):
            sock.sendall(post(lines + b"Expect: 100-Continue\r\n", target=target))
            assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(body)
            reply = raw.read(sock)
            assert (reply.status, reply.header("connection")) == (200, None)
    for got in bench.upstream.requests:
        assert got.body == FIVE and not got.header("expect")
    assert len(bench.upstream.requests) == 2


@pytest.mark.parametrize(
    ("lines", "key", "status"),
    [
        (b"Expect: 100-continue\r\nContent-Length: 5\r\n", b"ck-wrong", 401),
        (b"Expect: 100-continue\r\nContent-Length: 999999999999\r\n", b"", 413),
        (b"Expect: foo\r\nContent-Length: 5\r\n", b"", 417),
        (b"Expect: 100-continue, foo\r\nContent-Length: 5\r\n", b"", 417),
        (b"Expect:\r\nContent-Length: 5\r\n", b"", 417),
        (b"Expect: 100-continue\r\nExpect: foo\r\nContent-Length: 5\r\n", b"", 417),
    ],
)
def test_a_client_that_waits_is_refused_without_a_body(
    bench: Bench, parser: str, lines: bytes, key: bytes, status: int
) -> None:
    request = post(lines)
    reply = raw.send(
        bench.gateway.port, request.replace(CLIENT_KEY.encode(), key) if key else request, until_complete=False
    )
    (only,) = answers(reply.data)
    assert (only.status, only.header("connection")) == (status, "close")
    assert bench.upstream.requests == []


@pytest.mark.parametrize("upgrade", ["websocket", "h2c", "foo"])
@pytest.mark.parametrize("apart", [False, True], ids=["at once", "later"])
def test_nothing_behind_an_upgrade_is_answered(bench: Bench, parser: str, upgrade: str, apart: bool) -> None:
    before = os.path.getsize(bench.gateway.log_path)
    first = get(f"Connection: Upgrade\r\nUpgrade: {upgrade}\r\n".encode())
    for behind in (SMUGGLED, b"\x81\x85\0\0\0\0hello", b"GET http://[ HTTP/1.1\r\n\r\n", b"\0" * 100):
        parts = [(first, 0.01), (behind, 0.0)] if apart else [first + behind]
        reply = raw.send(bench.gateway.port, parts, until_complete=False)
        (only,) = answers(reply.data)
        # A parser that meets an error gives up what came in one piece with it.
        assert only.status == 426 or (not apart and only.status == 400 and behind != SMUGGLED)
        assert reply.ended in ("fin", "rst")
    assert bench.upstream.requests == []
    events = {orjson.loads(line)["event"] for line in bench.gateway.log_path.read_bytes()[before:].splitlines()}
    assert events <= {"request", "malformed_request"}


# Refusals while the client still sends.


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(b"Content-Length: 1073741824\r\n", target=FILES).replace(CLIENT_KEY.encode(), b"ck-wrong"), 401),
        (post(CHUNKED, target=FILES).replace(CLIENT_KEY.encode(), b"ck-wrong"), 401),
        (post(b"Content-Length: 999999999999\r\n", target=FILES), 413),
        (post(b"Content-Length: 1073741824\r\n"), 413),
        (post(b"Content-Length: 1073741824\r\n", target=b"/nobody/v1/files"), 404),
        (post(b"Content-Length: 1073741824\r\nUpgrade: x\r\n", target=FILES), 426),
    ],
)  # fmt: skip
def test_who_still_sends_can_read_why_not(bench: Bench, parser: str, request_: bytes, status: int) -> None:
    """The rest is read for a moment, not for ever; no reset overtakes the answer."""
    piece = b"10000\r\n%b\r\n" % (b"x" * 65536) if b"chunked" in request_ else b"x" * 65536
    with raw.connect(bench.gateway.port) as sock:
        sock.sendall(request_)
        start = time.monotonic()
        for _ in range(16):
            sock.sendall(piece)
        reply = raw.read(sock)
        assert (reply.status, reply.complete, reply.header("connection")) == (status, True, "close")
        try:
            while time.monotonic() - start < 3:
                sock.sendall(piece)
        except OSError:
            pass  # enough
        assert time.monotonic() - start < LINGER + 1.5
    assert bench.upstream.requests == []
    until(bench.gateway.at_rest)


def test_who_only_ends_its_own_side_is_taken_for_gone(loop: Loop, parser: str) -> None:
    """The connection ends, the upstream hears of it, and the log says so: never a 200 that nobody got."""
    bench = Bench(loop)
    bench.script = [Pause(0.2), OK]
    with raw.connect(bench.gateway.port) as sock:
        sock.sendall(get())
        until(lambda: bench.upstream.requests)
        sock.shutdown(socket.SHUT_WR)
        assert raw.read(sock) == Reply(b"", "fin")
    assert bench.upstream.peer_left.wait(1)
    line = until(bench.gateway.requests)[0]
    assert (line["outcome"], line["status"], line["attempts"]) == ("client_gone", 499, 1)
    assert raw.send(bench.gateway.port, get(), half_close=True, until_complete=False).data == b""
    assert until(lambda: bench.gateway.requests()[1:])[0]["outcome"] == "client_gone"


# Whether a connection goes on.

KEEPING = [
    (b"HTTP/1.1", b"", True),
    (b"HTTP/1.1", b"Connection: keep-alive\r\n", True),
    (b"HTTP/1.1", b"Connection: x-y\r\n", True),
    (b"HTTP/1.1", b"Connection: close\r\n", False),
    (b"HTTP/1.1", b"Connection: Close\r\n", False),
    (b"HTTP/1.1", b"connection: keep-alive, close\r\n", False),
    (b"HTTP/1.1", b"Connection: close, keep-alive\r\n", False),
    (b"HTTP/1.1", b"Connection: keep-alive\r\nConnection: close\r\n", False),
    (b"HTTP/1.0", b"", False),
    (b"HTTP/1.0", b"Connection: close\r\n", False),
    (b"HTTP/1.0", b"Connection: keep-alive\r\n", False),
]


@pytest.mark.parametrize(("version", "lines", "goes_on"), KEEPING)
@pytest.mark.parametrize("target", [b"/openai-main/v1/files/f", b"/healthz", b"/v1/nothing"])
def test_a_connection_goes_on_as_announced(
    bench: Bench, parser: str, version: bytes, lines: bytes, goes_on: bool, target: bytes
) -> None:
    with raw.connect(bench.gateway.port) as sock:
        sock.sendall(get(lines, line=b"GET %b %b" % (target, version)))
        reply = raw.read(sock)
        assert reply.status in (200, 404)
        assert reply.header("connection") == (None if goes_on else "close")
        try:
            sock.sendall(LAST)
        except OSError:
            assert not goes_on
        assert raw.read(sock).body == (b"OK" if goes_on else b"")


def test_nothing_behind_a_close_is_answered(bench: Bench, parser: str) -> None:
    """In one piece the parsers take it for malformed; that is no second answer either."""
    reply = raw.send(bench.gateway.port, get(b"Connection: close\r\n") + SMUGGLED, until_complete=False)
    assert len(answers(reply.data)) == 1 and reply.ended in ("fin", "rst")
    assert all(got.target == b"/v1/files/f" for got in bench.upstream.requests)


def test_an_idle_connection_is_ended_in_time(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(door._OPTIONS, "keepalive_timeout", 0.3)
    bench = Bench(loop)
    with raw.connect(bench.gateway.port) as sock:
        sock.sendall(get())
        assert raw.read(sock).status == 200
        start = time.monotonic()
        assert raw.read(sock) == Reply(b"", "fin")
        assert 0.25 < time.monotonic() - start < 1.5


def test_two_hundred_requests_on_one_connection(bench: Bench, parser: str) -> None:
    with raw.connect(bench.gateway.port) as sock:
        for at in range(200):
            sock.sendall(get() if at % 2 else post(b"Content-Length: 5\r\n", FIVE))
            assert raw.read(sock).status == 200
    assert len(bench.upstream.requests) == 200
