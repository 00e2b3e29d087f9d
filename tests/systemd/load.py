"""Clients that forgive nothing: `python load.py PORT KEY KEEPING CLOSING STREAMING SECONDS`, until standard input ends.

KEEPING clients keep their connection and ask again after SECONDS or so; CLOSING ones make a connection for every
request; STREAMING ones read one stream after the other. A request that was sent and not answered whole has failed:
nothing is tried again. An idle connection that the server ends is no failure: the next request makes another one.
Prints JSON: how many requests, which failures, and quantiles of the time to the whole answer (a stream's: to its head).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter

import uvloop

PORT, KEY = int(sys.argv[1]), sys.argv[2]
PAUSE = float(sys.argv[6])


def _request(**more: object) -> bytes:
    body = json.dumps({"model": "main/m", "messages": [{"role": "user", "content": "hello"}], **more}).encode()
    body = body.replace(b'"stream": true', b'"stream":true')
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


PLAIN, STREAM = _request(), _request(stream=True)


class Tally:
    def __init__(self) -> None:
        self.done: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.waits: list[float] = []
        self.announced = 0
        self.stop = False


class Client:
    """One connection at a time."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes, *, keep: bool) -> None:
        tally, kind = self._tally, "stream" if request is STREAM else "keep" if keep else "close"
        began = time.perf_counter()
        try:
            async with asyncio.timeout(30):
                if self._reader is None or self._reader.at_eof() or self._writer is None:
                    self.leave()
                    self._reader, self._writer = await asyncio.open_connection("127.0.0.1", PORT)
                self._writer.write(request)
                head = await self._reader.readuntil(b"\r\n\r\n")
                waited = time.perf_counter() - began
                if not head.startswith(b"HTTP/1.1 200"):
                    raise ValueError(head[:40])
                if request is STREAM:
                    body = await self._reader.readuntil(b"0\r\n\r\n")
                    if body.count(b"data: ") != 22 or b"[DONE]" not in body:
                        raise ValueError("cut")
                else:
                    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                    await self._reader.readexactly(length)
                    waited = time.perf_counter() - began
        except (OSError, EOFError, ValueError) as error:
            tally.failures[f"{kind}: {error!r}"[:120]] += 1
            self.leave()
            return
        tally.done[kind] += 1
        tally.waits.append(waited)
        if b"\r\nconnection: close" in head.lower():
            tally.announced += 1
            self.leave()
        elif not keep:
            self.leave()

    def leave(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def _work(tally: Tally, request: bytes, *, keep: bool) -> None:
    client = Client(tally)
    await asyncio.sleep(random.random() * (2 if request is STREAM else PAUSE))
    while not tally.stop:
        await client.ask(request, keep=keep)
        if request is PLAIN:
            await asyncio.sleep(PAUSE * (0.5 + random.random()))
    client.leave()


async def _main() -> None:
    tally = Tally()
    keeping, closing, streaming = map(int, sys.argv[3:6])
    works = [_work(tally, PLAIN, keep=True) for _ in range(keeping)]
    works += [_work(tally, PLAIN, keep=False) for _ in range(closing)]
    works += [_work(tally, STREAM, keep=False) for _ in range(streaming)]
    tasks = [asyncio.create_task(work) for work in works]
    await asyncio.to_thread(sys.stdin.read)
    tally.stop = True
    await asyncio.gather(*tasks)
    tally.waits.sort()
    waits = tally.waits or [0.0]
    at = {name: round(waits[int(share * (len(waits) - 1))] * 1000, 1) for name, share in QUANTILES}
    print(json.dumps({"done": tally.done, "failures": tally.failures, "announced": tally.announced, "ms": at}))


QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))

if __name__ == "__main__":
    uvloop.run(_main())
