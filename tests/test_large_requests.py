"""Large requests through a daemon: nobody waits long for them, and what they turn into is what it should be."""

from __future__ import annotations

import base64
import gc
import random
import re
import socket
import time
from collections.abc import Callable, Iterator

import orjson
import pytest

from gproxyd.wire import outline
from tests.support import raw
from tests.support.replies import json_reply
from tests.support.running import Loop, Running, until
from tests.support.servers import listening, read_head
from tests.support.turns import Turns

MIB = 1024 * 1024
BOUND = 0.020
"""Seconds of the loop's thread for which one turn may last."""

CONFIG = """\
server: {{listen: ["127.0.0.1:0"], max_body: 128MiB}}
discovery: {{enabled: false}}
chat: {{default_stream: {stream}}}
providers:
  up: {{vendor: openai, base_url: "{url}", credentials: [provider-key], models: [{{id: m}}]}}
  other: {{vendor: openai, base_url: "{url}/other", credentials: [provider-key], models: [{{id: m}}]}}
  odd: {{vendor: openai, base_url: "{url}", credentials: [provider-key], quirks: {{reasoning_content: removed}}}}
  gem: {{vendor: gemini, base_url: "{url}", credentials: [provider-key]}}
aliases: {{fast: up/m, emb: gem/embedding-001}}
agents:
  team: {{targets: [other/m, up/m]}}
  kind: {{targets: [up/m, other/m], system_prompt: "Be kind.", force: true}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""
CHAT, EMBED = "/v1/chat/completions", "/v1beta/models/emb:batchEmbedContents"
OK = json_reply(b'{"id":"x","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"content":"a"}}]}')
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"


class Vendor:
    """Remembers what it got; at `/other` it is broken."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, bytes]] = []

    def serve(self, peer: socket.socket) -> None:
        while True:
            head, rest = read_head(peer)
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
            body = bytearray(rest)
            while length is not None and len(body) < int(length[1]):
                body += peer.recv(MIB)
            path = head.split(b" ")[1]
            self.got.append((path, bytes(body)))
            peer.sendall(BROKEN if path.startswith(b"/other") else OK)

    def last(self) -> bytes:
        return self.got[-1][1]


@pytest.fixture(scope="module")
def vendor() -> Vendor:
    return Vendor()


@pytest.fixture(scope="module")
def start(vendor: Vendor) -> Iterator[Callable[..., tuple[Loop, Running]]]:
    with listening(vendor.serve) as port, Loop() as loop:
        yield lambda stream="false": (loop, loop.gateway(CONFIG.format(url=f"http://127.0.0.1:{port}", stream=stream)))


@pytest.fixture(scope="module")
def running(start: Callable[..., tuple[Loop, Running]]) -> tuple[Loop, Running]:
    return start()


def post(path: str, body: bytes) -> bytes:
    head = raw.request(path, {}).partition(b"\r\n\r\n")[0]
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    return b"\r\n".join(lines) + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def longest_turn(loop: Loop, work: Callable[[], None]) -> float:
    """Seconds of its thread's time that the loop's longest turn took meanwhile."""
    with Turns(loop) as turns:
        work()
    return turns.worst


_PROSE = b'{"role":"user","content":"%b"},' % (b'Hello, \\"world\\" ' * 60)
_THOUGHT = b'{"role":"assistant","reasoning_content":"r","content":""}'


def text(model: bytes, size: int) -> bytes:
    return b'{"messages":[%b%b],"model":"%b"}' % (_PROSE * (size // len(_PROSE)), _THOUGHT, model)


def dense(model: bytes, size: int) -> bytes:
    inner = b'{"a":[],"b":{}},' * (size // 16)
    return b'{"model":"%b","messages":[%b],"x":[%b0]}' % (model, _THOUGHT, inner)


def image(model: bytes, size: int) -> bytes:
    data = base64.b64encode(random.Random(1).randbytes(size * 3 // 4))
    url = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,%b"}}' % data
    return b'{"model":"%b","messages":[{"role":"user","content":[%b]},%b]}' % (model, url, _THOUGHT)


def embed(size: int) -> bytes:
    unit = b'{"model":"models/emb","content":{"parts":[{"text":"%b"}]}}' % (b"word " * 100)
    return b'{"requests":[%b]}' % b",".join([unit] * (size // len(unit)))


CASES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "an alias, an image of 48 MiB": (CHAT, lambda: image(b"fast", 48 * MIB)),
    "a quirk, text": (CHAT, lambda: text(b"odd/m", 12 * MIB)),
    "a quirk, dense": (CHAT, lambda: dense(b"odd/m", 2 * MIB)),
    "an agent, text": (CHAT, lambda: text(b"team", 12 * MIB)),
    "an agent, dense": (CHAT, lambda: dense(b"team", 2 * MIB)),
    "an agent's prompt": (CHAT, lambda: text(b"kind", 12 * MIB)),
    "the model's name all over": (EMBED, lambda: embed(12 * MIB)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_large_body_stops_nobody_for_long(running: tuple[Loop, Running], name: str) -> None:
    loop, gateway = running
    path, make = CASES[name]
    request = post(path, make())
    attempts: list[float] = []
    gc.collect()
    gc.freeze()  # the tests' own objects are none of the daemon's
    try:
        for _ in range(5):
            with raw.connect(gateway.port, timeout=60) as sock:

                def ask(sock: socket.socket = sock) -> None:
                    sock.sendall(request)
                    assert raw.read(sock).status == 200

                attempts.append(longest_turn(loop, ask))
            if attempts[-1] < BOUND:
                return
    finally:
        gc.unfreeze()
    pytest.fail(f"the loop's longest turns took {attempts} s")


def ask(gateway: Running, body: bytes, path: str = CHAT) -> None:
    with raw.connect(gateway.port, timeout=60) as sock:
        sock.sendall(post(path, body))
        assert raw.read(sock).status == 200


SIZES = {"small": 1000, "large": outline.LARGE + 1000}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_both_ways_the_vendor_gets_the_same(running: tuple[Loop, Running], vendor: Vendor, size: int) -> None:
    _, gateway = running
    long = "x" * size
    messages = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": long},
        {"role": "assistant", "content": "b", "reasoning_content": long},
    ]

    def sent(model: str) -> object:
        ask(gateway, orjson.dumps({"model": model, "messages": messages}))
        return orjson.loads(vendor.last())

    assert sent("fast") == {"model": "m", "messages": messages}
    assert sent("odd/m") == {"model": "m", "messages": [*messages[:2], {"role": "assistant", "content": "b"}]}
    assert sent("kind") == {"model": "m", "messages": [{"role": "system", "content": "Be kind."}, *messages[1:]]}
    vendor.got.clear()
    assert sent("team") == {"model": "m", "messages": messages}  # the first of its members is broken
    assert [path for path, _ in vendor.got] == [b"/other/v1/chat/completions", b"/v1/chat/completions"]
    assert vendor.got[0][1] == vendor.got[1][1]
    ask(gateway, orjson.dumps({"requests": [{"model": "models/emb", "content": long}]}), EMBED)
    assert orjson.loads(vendor.last()) == {"requests": [{"model": "models/embedding-001", "content": long}]}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_both_ways_a_stream_is_asked_for(start: Callable[..., tuple[Loop, Running]], vendor: Vendor, size: int) -> None:
    """Where the configuration says so, and with its usage; of agents, too."""
    _, gateway = start("true")
    messages = [{"role": "user", "content": "x" * size}]
    for model in ("fast", "kind", "team"):
        ask(gateway, b'{"messages":%b,"model":"%b"}' % (orjson.dumps(messages), model.encode()))
        found = orjson.loads(vendor.last())
        assert found.pop("messages")[-1] == messages[-1]
        assert found == {"model": "m", "stream": True, "stream_options": {"include_usage": True}}


def test_who_leaves_while_his_body_is_worked_on_is_noticed(running: tuple[Loop, Running], vendor: Vendor) -> None:
    _, gateway = running
    before, asked = len(gateway.requests()), len(vendor.got)
    deep = b'{"model":"team","messages":[{"role":"user","x":[%b0]}]}' % ((b"[" * 500 + b"]" * 500 + b",") * 700)
    with raw.connect(gateway.port) as sock:
        sock.sendall(post(CHAT, deep))
        time.sleep(0.2)
    line = until(lambda: lines[-1] if len(lines := gateway.requests()) > before else None)
    assert line["outcome"] == "client_gone"
    assert len(vendor.got) == asked
