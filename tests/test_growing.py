"""Gemini's stream without `alt=sse` is a JSON array that grows: it must pass as it comes."""

from __future__ import annotations

import time

from tests.support import raw
from tests.support.running import Loop
from tests.support.upstream import LAST_CHUNK, Fin, Pause, Upstream, chunk

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST, SECOND = b'[{"modelVersion":"up","n":1}\n', b',\r\n{"modelVersion":"up","n":2}]'

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
providers: {{g: {{vendor: gemini, base_url: "{up}", credentials: [provider-key]}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""

TARGET = "/v1beta/models/g/up:streamGenerateContent"


def test_each_element_arrives_before_the_next_is_sent_and_bears_the_asked_name(loop: Loop) -> None:
    upstream = Upstream(loop, [HEAD, chunk(FIRST), Pause(0.6), chunk(SECOND), LAST_CHUNK]).start()
    gateway = loop.gateway(CONFIG.format(up=upstream.url))
    with raw.connect(gateway.port) as sock:
        began = time.monotonic()
        sock.sendall(raw.request(TARGET, {"contents": []}))
        seen = b""
        while b'"n":1}' not in seen:
            seen += sock.recv(65536)
        assert time.monotonic() - began < 0.5
        reply = raw.read(sock, seen=seen)
    assert reply.complete
    assert reply.body == (FIRST + SECOND).replace(b'"up"', b'"g/up"')


def test_one_that_breaks_is_never_whole(loop: Loop) -> None:
    upstream = Upstream(loop, [HEAD, chunk(FIRST), Pause(0.05), Fin()]).start()
    gateway = loop.gateway(CONFIG.format(up=upstream.url))
    reply = raw.send(gateway.port, raw.request(TARGET, {"contents": []}))
    assert reply.status == 200
    assert not reply.complete
    assert reply.body == FIRST.replace(b'"up"', b'"g/up"')
