"""Load: wrk for requests, an own client for streams. Everything is bounded in count and time."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

from tests.bench.proxies import KEY, OTHER_CORES, Proxy

_LUA = """\
wrk.method = "POST"
wrk.path = "%s"
wrk.headers["Content-Type"] = "%s"
wrk.headers["Authorization"] = "Bearer %s"
wrk.headers["User-Agent"] = "OpenAI/Python 2.0"
wrk.headers["Accept"] = "application/json"
wrk.headers["x-stainless-lang"] = "python"
local file = io.open("%s", "rb")
wrk.body = file:read("*a")
done = function(summary, latency, requests)
  io.write(string.format("RESULT %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write +
    summary.errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass
class Requests:
    """A run of requests: how many, seconds of the proxy's CPU for each, and latencies in seconds."""

    count: int
    seconds: float
    errors: int
    p50: float
    p99: float
    cpu_each: float

    @property
    def rate(self) -> float:
        return self.count / self.seconds


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


@dataclass(frozen=True)
class Work:
    """What is asked for: a request's body by the model that it names, its path, and its content type."""

    body: Callable[[str], bytes]
    path: str = "/v1/chat/completions"
    kind: str = "application/json"


def requests(proxy: Proxy, work: Work, model: str, folder: Path, *, connections: int, seconds: int) -> Requests:
    """wrk against a proxy."""
    (folder / "body").write_bytes(work.body(model))
    script = folder / "post.lua"
    script.write_text(_LUA % (work.path, work.kind, KEY, folder / "body"))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(script)]
    before = proxy.cpu()
    done = subprocess.run(
        [*command, f"{'https' if proxy.authority else 'http'}://127.0.0.1:{proxy.port}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + 60,
        preexec_fn=lambda: os.sched_setaffinity(0, OTHER_CORES),
    )
    spent = proxy.cpu() - before
    match = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert match, done.stdout
    count, duration, errors, p50, p99 = (int(group) for group in match.groups())
    return Requests(count, duration / 1e6, errors, p50 / 1e6, p99 / 1e6, spent / max(count, 1))


@dataclass
class Streams:
    """A run of streams: events that arrived, seconds of the proxy's CPU for each, resident bytes while all are open.

    delays  seconds from an event's departure at the upstream to its arrival here, where events are apart
    times   seconds from each request to the end of its stream
    """

    events: int
    complete: int
    seconds: float
    cpu_each: float
    rss: int
    delays: list[float]
    times: list[float]


def streams(proxy: Proxy, model: str, *, count: int, events: int, gap: float, look_at: float | None = None) -> Streams:
    """`count` concurrent streams through a proxy. `look_at`: seconds after which its memory is read."""
    saved = os.sched_getaffinity(0)
    os.sched_setaffinity(0, OTHER_CORES)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_streams(proxy, model, count, events, gap, look_at))
    finally:
        os.sched_setaffinity(0, saved)


async def _streams(proxy: Proxy, model: str, count: int, events: int, gap: float, look_at: float | None) -> Streams:
    loop = asyncio.get_running_loop()
    prompt = f"events={events} gap={gap}"
    body = f'{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"{prompt}"}}]}}'.encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %b\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (KEY.encode(), len(body), body)
    )
    clients = [_Client(loop) for _ in range(count)]
    tls: dict[str, Any] = {}
    if proxy.authority:
        tls = {"ssl": ssl.create_default_context(cafile=str(proxy.authority)), "server_hostname": "localhost"}
    for start in range(0, count, 50):
        opened = (
            loop.create_connection(lambda it=it: it, "127.0.0.1", proxy.port, **tls)
            for it in clients[start : start + 50]
        )
        await asyncio.gather(*opened)
    cpu, began = proxy.cpu(), loop.time()
    for client in clients:
        client.began = time.monotonic()
        client.transport.write(request)
    rss = 0
    if look_at is not None:
        await asyncio.sleep(look_at)
        rss = proxy.rss()
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), 120)
    spent, took = proxy.cpu() - cpu, loop.time() - began
    arrived = sum(client.events for client in clients)
    for client in clients:
        client.transport.abort()
    whole = [client for client in clients if client.whole]
    return Streams(
        events=arrived,
        complete=len(whole),
        seconds=took,
        cpu_each=spent / max(arrived, 1),
        rss=rss,
        delays=[delay / 1e9 for client in clients for delay in client.delays],
        times=[client.ended - client.began for client in whole],
    )


_STAMP = b'"fp_'


class _Client(asyncio.Protocol):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.events = 0
        self.whole = False
        self.began = self.ended = 0.0
        self.delays: list[int] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.events += data.count(b"data: {")
        at = data.find(_STAMP) + len(_STAMP)
        sent = data[at : at + 20]  # of all that came at once the first event is the one that waited longest
        if at >= len(_STAMP) and len(sent) == 20 and int(sent):
            self.delays.append(time.monotonic_ns() - int(sent))
        if data.endswith(b"0\r\n\r\n"):
            self.whole = True
            self.ended = time.monotonic()
            if not self.done.done():
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)
