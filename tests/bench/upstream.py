"""An upstream with canned answers: `python -m tests.bench.upstream PORT [CERT KEY]`.

`POST /v1/chat/completions` with `"stream":true` gets events; the request's prompt says how many and how far apart
(`events=100 gap=0.005`); anything else gets one JSON answer of about 1 KiB, after the whole body has been read. Events
that are apart bear the moment at which they were sent, in nanoseconds of the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
import time
from typing import cast

import uvloop

MODEL = "bench-model"

_TEXT = "x" * 700
JSON = (
    b'{"id":"chatcmpl-bench","object":"chat.completion","created":1750000000,"model":"%b","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"%b"},"finish_reason":"stop"}],"usage":{"prompt_tokens":100,'
    b'"completion_tokens":200,"total_tokens":300}}' % (MODEL.encode(), _TEXT.encode())
)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: req_up\r\n"
ANSWER = b"%bContent-Length: %d\r\n\r\n%b" % (_HEAD, len(JSON), JSON)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = (
    b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1750000000,"model":"%b",'
    b'"system_fingerprint":"fp_%020d","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)
EVENT = b"%x\r\n%b\r\n" % (len(_EVENT % (MODEL.encode(), 0)), _EVENT.replace(b"%b", MODEL.encode()))
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_STREAM = re.compile(rb"events=(\d+) gap=([0-9.]+)")


class Canned(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.loop = asyncio.get_running_loop()
        self.head = b""
        self.missing = 0
        self.tail = b""

    def data_received(self, data: bytes) -> None:
        if self.missing:
            self.missing -= len(data)
            self.tail = (self.tail + data)[-4096:]
        else:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self.head, 0, end)
            chunked = b"chunked" in self.head[:end].lower()
            self.tail = self.head[end + 4 :]
            self.missing = (int(length[1]) if length else 0) - len(self.tail)
            if chunked:
                self.missing = 0 if self.tail.endswith(b"0\r\n\r\n") else 1 << 62
            self.head = b""
        if self.missing > 0 and self.tail.endswith(b"\r\n0\r\n\r\n") and self.missing > 1 << 60:
            self.missing = 0
        if self.missing <= 0:
            self.missing = 0
            self.answer()

    def answer(self) -> None:
        stream = _STREAM.search(self.tail)
        if stream is None:
            self.transport.write(ANSWER)
            return
        count, gap = int(stream[1]), float(stream[2])
        self.transport.write(HEAD)
        if gap:
            self.loop.call_later(gap, self.event, count, gap)
        else:
            event = EVENT % 0
            for _ in range(count):
                self.transport.write(event)
            self.transport.write(END)

    def event(self, left: int, gap: float) -> None:
        if self.transport.is_closing():
            return
        if left:
            self.transport.write(EVENT % time.monotonic_ns())
            self.loop.call_later(gap, self.event, left - 1, gap)
        else:
            self.transport.write(END)


async def main(port: int, certificate: str | None, key: str | None) -> None:
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
    server = await asyncio.get_running_loop().create_server(Canned, "127.0.0.1", port, ssl=context, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    given = sys.argv[2:4] if len(sys.argv) > 3 else [None, None]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1]), *given))
