"""A vendor that costs next to nothing, so that what is measured is the gateway: `python upstream.py PORT KEY`.

POST anything with the key: `"stream":true` in the body gets 21 events over two seconds, with "long" in it 101 over ten,
anything else JSON after ten milliseconds.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

PAUSE = 0.1
KEY = sys.argv[2].encode()
_ANSWER = (
    b'{"id":"x","object":"chat.completion","model":"m","choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5}}'
)
_CHOICE = b'"choices":[{"index":0,"delta":{"content":"%d"}}]'
_EVENT = b'data: {"id":"x","object":"chat.completion.chunk","model":"m",' + _CHOICE + b"}\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0))
            if b"authorization: bearer " + KEY + b"\r\n" not in head:
                writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
            elif b'"stream":true' in body:
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for number in range(101 if b'"long"' in body else 21):
                    writer.write(_chunk(_EVENT % number))
                    await asyncio.sleep(PAUSE)
                writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            else:
                await asyncio.sleep(0.01)
                line = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                writer.write(line % len(_ANSWER) + _ANSWER)
    except (OSError, EOFError):
        writer.close()


async def _main() -> None:
    server = await asyncio.start_server(_serve, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main())
