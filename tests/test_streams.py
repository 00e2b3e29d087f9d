"""Streams and bodies on their way to the client: at once, unharmed, and never complete unless they were."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import orjson
import pytest

from tests.support import raw
from tests.support.raw import Reply
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk, json_reply
from tests.support.running import Loop, Running, until
from tests.support.servers import listening, read_head
from tests.support.upstream import Fin, Got, Pause, Reset, Script, Stall, Upstream
from tests.test_uploads import process

MIB = 1024 * 1024

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
streams: {{keepalive: {keepalive}}}
providers:
  openai-main: {{vendor: openai, base_url: "{url}", credentials: [provider-key], timeouts: {{idle: {idle}}}}}
  anthropic-main: {{vendor: anthropic, base_url: "{url}", credentials: [provider-key], timeouts: {{idle: {idle}}}}}
  vertex-main: {{vendor: gemini, base_url: "{url}", credentials: [provider-key], timeouts: {{idle: {idle}}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""


def gateway_to(loop: Loop, url: str, *, keepalive: str = "0s", idle: str = "5s") -> Running:
    return loop.gateway(CONFIG.format(url=url, keepalive=keepalive, idle=idle))


_KNOWN: dict[tuple[object, ...], tuple[Upstream, Running]] = {}


def played(loop: Loop, script: Script | Callable[[Got], Script], **more: str) -> tuple[Upstream, Running]:
    """An upstream that plays `script`, and a gateway to it: the same ones for every test of the same settings."""
    settings = (loop, loop.era, *sorted(more.items()))
    if settings not in _KNOWN:
        upstream = Upstream(loop, []).start()
        _KNOWN[settings] = upstream, gateway_to(loop, upstream.url, **more)
    upstream, gateway = _KNOWN[settings]
    until(gateway.at_rest)
    upstream._script = script
    upstream.requests.clear()
    return upstream, gateway


# The four dialects: how each asks for a stream, what an event looks like, and how an error ends one.

MESSAGES = [{"role": "user", "content": "Hello"}]
REQUESTS = {
    "openai_chat": raw.request(
        "/v1/chat/completions",
        {
            "model": "openai-main/upstream-1",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": MESSAGES,
        },
    ),
    "openai_responses": raw.request(
        "/v1/responses", {"model": "openai-main/upstream-1", "stream": True, "input": "Hello"}
    ),
    "anthropic": raw.request(
        "/v1/messages",
        {"model": "anthropic-main/upstream-1", "stream": True, "max_tokens": 9, "messages": MESSAGES},
    ),
    "gemini": raw.request(
        "/v1beta/models/vertex-main/upstream-1:streamGenerateContent?alt=sse",
        {"contents": [{"parts": [{"text": "Hello"}]}]},
    ),
}
EVENTS = {
    "openai_chat": b'data: {"id":"c","model":"%b","choices":[{"delta":{"content":"a"}}]}\n\n',
    "openai_responses": b'event: response.created\ndata: {"type":"response.created","response":{"model":"%b"}}\n\n',
    "anthropic": b'event: message_start\ndata: {"type":"message_start","message":{"model":"%b","content":[]}}\n\n',
    "gemini": b'data: {"candidates":[{"content":{"parts":[{"text":"a"}]}}],"modelVersion":"%b"}\n\n',
}
SHOWN = {
    "openai_chat": b"openai-main/upstream-1",
    "openai_responses": b"openai-main/upstream-1",
    "anthropic": b"anthropic-main/upstream-1",
    "gemini": b"vertex-main/upstream-1",
}
PINGS = {
    "openai_chat": b": keep-alive\n\n",
    "openai_responses": b": keep-alive\n\n",
    "anthropic": b'event: ping\ndata: {"type": "ping"}\n\n',
    "gemini": b": keep-alive\n\n",
}
DIALECTS = list(REQUESTS)


def sent(dialect: str) -> bytes:
    return EVENTS[dialect] % b"upstream-1"


def seen(dialect: str) -> bytes:
    return EVENTS[dialect] % SHOWN[dialect]


def error_of(dialect: str, event: bytes) -> tuple[str, str]:
    """The code and the message of an error event, which must be whole and in the dialect's own form."""
    name, _, data = event.rpartition(b"data: ")
    assert event.endswith(b"\n\n") and event.count(b"\n\n") == 1, event
    told = orjson.loads(data)
    if dialect == "anthropic":
        assert name == b"event: error\n" and told["type"] == "error" and told["request_id"].startswith("req_")
        return told["error"]["type"], told["error"]["message"]
    if dialect == "openai_responses":
        assert name == b"event: error\n" and told["type"] == "error" and isinstance(told["sequence_number"], int)
        return told["code"], told["message"]
    assert name == b""
    if dialect == "gemini":
        return told["error"]["status"], told["error"]["message"]
    return told["error"]["code"], told["error"]["message"]


CODES = {
    "openai_chat": ("upstream_error", "upstream_timeout"),
    "openai_responses": ("upstream_error", "upstream_timeout"),
    "anthropic": ("api_error", "timeout_error"),
    "gemini": ("UNAVAILABLE", "DEADLINE_EXCEEDED"),
}
"""What a failure and a time-out are called."""


# As they come.


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_event_is_there_before_the_next_is_sent(loop: Loop, dialect: str) -> None:
    event, shown = sent(dialect), seen(dialect)
    steps: Script = [step for _ in range(10) for step in (chunk(event), Pause(0.05))]
    _, gateway = played(loop, [EVENT_STREAM, *steps, LAST_CHUNK])
    arrivals: list[float] = []
    data = b""
    with raw.connect(gateway.port) as sock:
        sock.sendall(REQUESTS[dialect])
        while not data.endswith(LAST_CHUNK):
            data += sock.recv(65536)
            arrivals += [time.monotonic()] * (data.count(shown) - len(arrivals))
    assert Reply(data, "open").body == shown * 10
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert len(gaps) == 9 and min(gaps) > 0.02, "events were held back and came together"
    assert max(gaps) < 0.2


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", [1, 7])
def test_an_event_in_pieces_is_whole_when_it_arrives(loop: Loop, dialect: str, size: int) -> None:
    stream = sent(dialect) * 3
    pieces = [chunk(stream[start : start + size]) for start in range(0, len(stream), size)]
    _, gateway = played(loop, [EVENT_STREAM, *pieces, LAST_CHUNK])
    reply = raw.send(gateway.port, REQUESTS[dialect])
    assert reply.complete and reply.body == seen(dialect) * 3


def test_the_head_does_not_wait_for_the_first_event(loop: Loop) -> None:
    _, gateway = played(loop, [EVENT_STREAM, Pause(0.6), chunk(sent("openai_chat")), LAST_CHUNK])
    with raw.connect(gateway.port) as sock:
        start = time.monotonic()
        sock.sendall(REQUESTS["openai_chat"])
        data = sock.recv(65536)
        assert time.monotonic() - start < 0.1
        assert data.endswith(b"\r\n\r\n") and Reply(data, "open").header("content-type") == "text/event-stream"
        while not data.endswith(LAST_CHUNK):
            data += sock.recv(65536)
        assert time.monotonic() - start > 0.5 and Reply(data, "open").body == seen("openai_chat")


DONE = b"data: [DONE]\n\n"
AFTERWORD = b'data: {"late":true}\n\n'


@pytest.mark.parametrize(
    "ending",
    [b"", DONE, DONE * 2, DONE + AFTERWORD, b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n\r\n"],
)
def test_whatever_ends_a_stream_is_the_vendors_to_choose(loop: Loop, ending: bytes) -> None:
    last = chunk(ending) if ending else b""
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent("openai_chat")), last, LAST_CHUNK])
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert reply.complete and reply.body == seen("openai_chat") + ending


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_error_within_a_stream_passes_unchanged(loop: Loop, dialect: str) -> None:
    error = b'event: error\ndata: {"error":{"message":"The server had an error","type":"server_error"}}\n\n'
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent(dialect)), chunk(error), LAST_CHUNK])
    reply = raw.send(gateway.port, REQUESTS[dialect])
    assert (reply.status, reply.complete, reply.body) == (200, True, seen(dialect) + error)


def test_a_stream_that_is_answered_with_json(loop: Loop) -> None:
    for status in (b"200 OK", b"429 Too Many Requests"):
        _, gateway = played(loop, [json_reply(b'{"model":"upstream-1","n":1}', status=status)])
        reply = raw.send(gateway.port, REQUESTS["openai_chat"])
        assert reply.complete and reply.header("content-type") == "application/json"
        name = "openai-main/upstream-1" if b"200" in status else "upstream-1"
        assert (reply.status, reply.json) == (int(status[:3]), {"model": name, "n": 1})


def test_json_that_is_answered_with_a_stream(loop: Loop) -> None:
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent("openai_chat") + DONE), LAST_CHUNK])
    body = {"model": "openai-main/upstream-1", "stream": False, "messages": MESSAGES}
    reply = raw.send(gateway.port, raw.request("/v1/chat/completions", body))
    assert reply.complete and reply.header("content-type") == "text/event-stream"
    assert reply.body == seen("openai_chat") + DONE


# Broken.

BROKEN: dict[str, tuple[Script, int]] = {
    "fin": ([Fin()], 0),
    "reset": ([Reset()], 0),
    "silence": ([Stall()], 1),
    "a bad chunk": ([b"xyz\r\n", Stall()], 0),
    "a bad chunk in the same segment": ([chunk(b": x\n\n") + b"xyz\r\n", Stall()], 0),
}


@pytest.mark.parametrize("half", [b"", b'data: {"id":"c","choi', b'data: {"id":"half"}\n'])
@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_that_breaks_ends_with_an_error_of_its_dialect(
    loop: Loop, dialect: str, how: str, half: bytes
) -> None:
    """All that came whole is delivered, half an event never is, and no client can take the stream for complete."""
    ending, kind = BROKEN[how]
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent(dialect) * 2 + half), *ending], idle="300ms")
    reply = raw.send(gateway.port, REQUESTS[dialect])
    assert reply.status == 200 and not reply.complete and reply.ended == "fin"
    came = seen(dialect) * 2
    assert reply.body.startswith(came)
    rest = reply.body[len(came) :]
    if "same segment" in how:
        rest = rest.removeprefix(b": x\n\n" if not half else rest[: rest.index(b": x\n\n") + 5])
    code, message = error_of(dialect, rest)
    assert code == CODES[dialect][kind] and message.startswith(("upstream_error", "upstream_timeout")[kind])
    line = gateway.request(reply.header("x-request-id") or "")
    assert (line["status"], line["outcome"]) == (200, ("upstream_error", "upstream_timeout")[kind])


@pytest.mark.parametrize("left", [1, 40, 150, 2000])
def test_a_stream_of_known_length_that_breaks_is_not_filled_up(loop: Loop, left: int) -> None:
    """The error event must not pass for the bytes that are missing: the client would see a complete response."""
    event = sent("openai_chat")
    size = len(event) * 3 + left
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % size
    _, gateway = played(loop, [head + event * 3, Fin()])
    body = {"model": "upstream-1", "stream": True, "messages": MESSAGES}
    reply = raw.send(gateway.port, raw.request("/openai-main/v1/chat/completions", body))
    assert reply.body.startswith(event * 3)
    assert not reply.complete, reply.data


def test_a_long_event_that_breaks_is_cut(loop: Loop) -> None:
    """Too long to be held, so its beginning has left; the error event still stands alone."""
    start = b'data: {"model":"upstream-1","choices":"' + b"x" * 3 * MIB
    _, gateway = played(loop, [EVENT_STREAM, chunk(start), Pause(0.2), Fin()])
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert not reply.complete and len(reply.body) > 3 * MIB
    head, _, event = reply.body.rpartition(b"\n\ndata: ")
    assert head.startswith(b'data: {"model":"openai-main/upstream-1"') and b'"error"' in event


@pytest.mark.parametrize("ending", [[Fin()], [Reset()]], ids=["fin", "rst"])
@pytest.mark.parametrize("framing", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n28\r\n"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_json_that_breaks_off_is_a_clean_error(loop: Loop, dialect: str, framing: bytes, ending: Script) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + framing
    _, gateway = played(loop, [head + b'{"model":"upstream-1","secret-half', *ending])
    reply = raw.send(gateway.port, REQUESTS[dialect])
    assert (reply.status, reply.complete) == (502, True)
    error = reply.json["error"]
    assert error["message"].startswith("upstream_error") and b"secret-half" not in reply.data
    assert {"anthropic": error.get("type") == "api_error", "gemini": error.get("status") == "UNAVAILABLE"}.get(
        dialect, error.get("code") == "upstream_error"
    )


@pytest.mark.parametrize("ending", [[Fin()], [Reset()]], ids=["fin", "rst"])
@pytest.mark.parametrize("target", ["/v1/chat/completions", "/openai-main/v1/chat/completions"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_long_json_that_breaks_off_is_never_complete(loop: Loop, target: str, chunked: bool, ending: Script) -> None:
    """Too long to be held: part of it has left."""
    start = b'{"model":"upstream-1","text":"' + b"x" * 600_000
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % (len(start) + 50)
    _, gateway = played(loop, [head + (chunk(start) if chunked else start), *ending])
    model = "openai-main/upstream-1" if target.startswith("/v1/") else "upstream-1"
    reply = raw.send(gateway.port, raw.request(target, {"model": model, "messages": MESSAGES}))
    assert reply.status == 200 and not reply.complete
    assert reply.body.startswith(b'{"model":"%b","text":"xxx' % model.encode())
    assert gateway.request(reply.header("x-request-id") or "")["outcome"] == "upstream_error"


def test_long_json_passes_whole(loop: Loop) -> None:
    rest = b'","text":"' + b"x" * 2 * MIB + b'","model":"inner"}'
    _, gateway = played(loop, [json_reply(b'{"model":"upstream-1' + rest)])
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert reply.complete and reply.body.startswith(b'{"model":"openai-main/upstream-1","text":"xxx')
    assert len(reply.body) >= 2 * MIB


# Keep-alive.


@pytest.mark.parametrize("dialect", DIALECTS)
def test_silence_is_filled_with_the_dialects_ping(loop: Loop, dialect: str) -> None:
    steps: Script = [Pause(0.6), chunk(sent(dialect)), Pause(0.6), chunk(sent(dialect)), LAST_CHUNK]
    _, gateway = played(loop, [EVENT_STREAM, *steps], keepalive="200ms")
    reply = raw.send(gateway.port, REQUESTS[dialect])
    ping, event = PINGS[dialect], seen(dialect)
    assert reply.complete
    before, _, between = reply.body.removesuffix(event).partition(event)
    for silence in (before, between):
        assert silence and silence == ping * (len(silence) // len(ping)) and 1 <= len(silence) // len(ping) <= 3


def test_no_ping_falls_into_an_event(loop: Loop) -> None:
    event = sent("openai_chat")
    _, gateway = played(
        loop, [EVENT_STREAM, chunk(event[:20]), Pause(0.9), chunk(event[20:]), LAST_CHUNK], keepalive="300ms"
    )
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert reply.complete and reply.body == seen("openai_chat")


def test_no_ping_while_events_come(loop: Loop) -> None:
    steps: Script = [step for _ in range(8) for step in (chunk(sent("openai_chat")), Pause(0.1))]
    _, gateway = played(loop, [EVENT_STREAM, *steps, LAST_CHUNK], keepalive="400ms")
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert reply.complete and reply.body == seen("openai_chat") * 8


@pytest.mark.parametrize("what", ["switched off", "json", "before the head"])
def test_no_ping_where_there_must_be_none(loop: Loop, what: str) -> None:
    event = sent("openai_chat")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    scripts: dict[str, Script] = {
        "switched off": [EVENT_STREAM, chunk(event), Pause(0.7), chunk(event), LAST_CHUNK],
        "json": [head, chunk(b'{"a":1'), Pause(0.7), chunk(b"}"), LAST_CHUNK],
        "before the head": [Pause(0.7), EVENT_STREAM, chunk(event), LAST_CHUNK],
    }
    _, gateway = played(loop, scripts[what], keepalive="0s" if what == "switched off" else "200ms")
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert reply.complete and b"keep-alive" not in reply.body


def test_a_ping_does_not_use_up_a_known_length(loop: Loop) -> None:
    """Bytes of the gateway's own within a counted body would cut the vendor's last ones off."""
    event = sent("openai_chat")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % (len(event) * 2)
    _, gateway = played(loop, [head, event, Pause(0.7), event], keepalive="200ms")
    body = {"model": "upstream-1", "stream": True, "messages": MESSAGES}
    reply = raw.send(gateway.port, raw.request("/openai-main/v1/chat/completions", body))
    body_seen = reply.body if reply.header("content-length") is None else reply.body[: len(event) * 2]
    assert reply.complete and body_seen.replace(PINGS["openai_chat"], b"") == event * 2


def test_pings_do_not_put_off_the_idle_limit(loop: Loop) -> None:
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent("openai_chat")), Stall()], keepalive="200ms", idle="700ms")
    start = time.monotonic()
    reply = raw.send(gateway.port, REQUESTS["openai_chat"])
    assert time.monotonic() - start < 1.3
    assert not reply.complete and b"upstream_timeout" in reply.body and b": keep-alive\n\n" in reply.body


# A client that is slow.


def test_a_slow_reader_stops_the_upstream_and_costs_no_memory(tmp_path: Path) -> None:
    total = 128 * MIB
    block = bytes(range(256)) * 4096
    sent_bytes = [0]

    def fast(connection: socket.socket) -> None:
        while True:
            read_head(connection)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % total
            )
            sent_bytes[0] = 0
            view = memoryview(block)
            while sent_bytes[0] < total:
                start = sent_bytes[0] % MIB
                sent_bytes[0] += connection.send(view[start : start + 65536])

    with listening(fast) as port:
        config = CONFIG.format(url=f"http://127.0.0.1:{port}", keepalive="15s", idle="20s")
        with process(tmp_path, config) as daemon:
            request = raw.request("/openai-main/v1/files/f/content")
            with raw.connect(daemon.port, timeout=20) as sock:  # once at full speed: all buffers have been needed
                sock.sendall(request)
                taken = len(sock.recv(65536))
                while taken < total:
                    taken += len(sock.recv(MIB))
            before, peak = daemon.memory("VmRSS"), daemon.memory("VmHWM")
            with raw.connect(daemon.port, rcvbuf=4096, timeout=20) as sock:
                sock.sendall(request)
                time.sleep(0.7)
                stopped_at = sent_bytes[0]
                time.sleep(0.5)
                assert 0 < sent_bytes[0] == stopped_at < 40 * MIB, "the upstream was not stopped"
                assert daemon.memory("VmRSS") - before < 4 * MIB
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * MIB)
                _, rest = read_head(sock)
                place = 0
                while rest:
                    assert rest == (block * 3)[place % MIB :][: len(rest)], place
                    place += len(rest)
                    rest = sock.recv(MIB) if place < total else b""
                assert place == total
            assert daemon.memory("VmHWM") - peak < 8 * MIB


def test_what_came_before_a_reset_reaches_a_slow_reader(loop: Loop) -> None:
    event = sent("openai_chat")
    count = 4 * MIB // len(event)
    _, gateway = played(loop, [EVENT_STREAM, chunk(event * count), Pause(0.1), Fin()])
    with raw.connect(gateway.port, rcvbuf=16384) as sock:
        sock.sendall(REQUESTS["openai_chat"])
        time.sleep(0.4)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        reply = raw.read(sock, until_complete=False)
    assert reply.body.count(seen("openai_chat")) == count and not reply.complete
    error_of("openai_chat", reply.body.rpartition(seen("openai_chat"))[2])


# Other framings.


def old(request: bytes) -> bytes:
    return request.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)


def test_http_1_0_gets_its_stream_until_the_end(loop: Loop) -> None:
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent("openai_chat")), Pause(0.1), chunk(DONE), LAST_CHUNK])
    reply = raw.send(gateway.port, old(REQUESTS["openai_chat"]), until_complete=False)
    assert (reply.status, reply.ended) == (200, "fin")
    assert reply.header("transfer-encoding") is None and reply.header("content-length") is None
    assert reply.body == seen("openai_chat") + DONE and reply.header("connection") == "close"


@pytest.mark.parametrize("ending", [[Fin()], [Reset()]], ids=["fin", "rst"])
def test_http_1_0_sees_a_reset_where_a_stream_breaks(loop: Loop, ending: Script) -> None:
    """Its framing knows no other way to say that something is missing."""
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent("openai_chat")), Pause(0.1), *ending])
    reply = raw.send(gateway.port, old(REQUESTS["openai_chat"]), until_complete=False)
    assert reply.status == 200 and reply.ended == "rst"
    assert reply.body.startswith(seen("openai_chat"))


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize("more", [b"", b"Content-Type: application/json\r\n", b"Content-Type: text/event-stream\r\n"])
def test_an_answer_without_a_body(loop: Loop, status: bytes, more: bytes) -> None:
    _, gateway = played(loop, [b"HTTP/1.1 %b\r\n%b\r\n" % (status, more)])
    last = raw.request("/healthz", headers=[("Connection", "close")])
    for request in (REQUESTS["openai_chat"], raw.request("/openai-main/v1/files/f", method="DELETE")):
        reply = raw.send(gateway.port, request + last, until_complete=False)
        assert reply.data.startswith(b"HTTP/1.1 " + status)
        head, _, rest = reply.data.partition(b"\r\n\r\n")
        assert b"content-length" not in head.lower() and b"transfer-encoding" not in head.lower()
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n"), reply.data


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream", b"audio/mpeg"])
@pytest.mark.parametrize("framing", [b"Content-Length: 77", b"Transfer-Encoding: chunked"])
def test_head_gets_a_head(loop: Loop, kind: bytes, framing: bytes) -> None:
    _, gateway = played(loop, [b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nX-Y: z\r\n%b\r\n\r\n" % (kind, framing)])
    last = raw.request("/healthz", headers=[("Connection", "close")])
    for target in ("/openai-main/v1/files/f/content", "/proxy/openai-main/v1/anything"):
        reply = raw.send(gateway.port, raw.request(target, method="HEAD") + last, until_complete=False)
        head, _, rest = reply.data.partition(b"\r\n\r\n")
        assert b"X-Y: z" in head and (b"Content-Length: 77" in head or b"Length" not in framing)
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n") and rest.endswith(b"OK")


def test_pipelined_requests_are_answered_in_order_each_by_its_own_key(loop: Loop) -> None:
    def script(got: Got) -> Script:
        if b'"stream":true' in got.body:
            return [EVENT_STREAM, chunk(sent("openai_chat")), Pause(0.4), chunk(DONE), LAST_CHUNK]
        return [json_reply(b'{"model":"upstream-1"}')]

    upstream, gateway = played(loop, script)
    plain = {"model": "openai-main/upstream-1", "messages": MESSAGES}
    requests = [
        REQUESTS["openai_chat"],
        raw.request("/v1/chat/completions", plain, key="ck-wrong"),
        raw.request("/v1/chat/completions", plain),
        raw.request("/v1/chat/completions", plain, key=None),
        raw.request("/healthz", headers=[("Connection", "close")]),
    ]
    reply = raw.send(gateway.port, b"".join(requests), until_complete=False)
    first, _, rest = reply.data.partition(LAST_CHUNK)
    assert Reply(first + LAST_CHUNK, "open").body == seen("openai_chat") + DONE
    statuses = [int(part[:3]) for part in rest.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [401, 200, 401, 200] and reply.data.endswith(b"OK")
    assert b'{"model":"openai-main/upstream-1"}' in rest
    assert len(upstream.requests) == 2


def test_a_request_behind_a_broken_stream_is_not_answered(loop: Loop) -> None:
    """Its answer would look like the rest of the stream."""
    _, gateway = played(loop, [EVENT_STREAM, chunk(sent("openai_chat")), Pause(0.1), Fin()])
    reply = raw.send(gateway.port, REQUESTS["openai_chat"] + raw.request("/healthz"), until_complete=False)
    assert not reply.complete and reply.data.count(b"HTTP/1.1 ") == 1


def test_many_streams_do_not_mix(loop: Loop) -> None:
    def script(got: Got) -> Script:
        tag = orjson.loads(got.body)["user"].encode()
        event = b'data: {"model":"upstream-1","tag":"%b"}\n\n' % tag
        return [EVENT_STREAM, *(step for _ in range(5) for step in (chunk(event), Pause(0.01))), LAST_CHUNK]

    _, gateway = played(loop, script)
    wrong: list[bytes] = []

    def ask(tag: str) -> None:
        body = {"model": "openai-main/upstream-1", "stream": True, "user": tag, "messages": MESSAGES}
        reply = raw.send(gateway.port, raw.request("/v1/chat/completions", body))
        event = b'data: {"model":"openai-main/upstream-1","tag":"%b"}\n\n' % tag.encode()
        if not reply.complete or reply.body != event * 5:
            wrong.append(reply.data)

    threads = [threading.Thread(target=ask, args=(f"tag{number}",)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
