"""The network fails, at every stage, in every way, on either side: each failure is classified, bounded and forgotten.

The reviewed table `faults.yaml` says what must come out. Everything (clients, relays, the gateway and its upstream)
runs on one event loop, so that no thread's turn decides an outcome; limits are short, and toxics scaled to them.

A random schedule is replayed with the seed that its failure prints: FAULT_SEED=… FAULT_ROUNDS=17:18 runs round 17 only.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import re
import select
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson
import pytest
import yaml

from gproxyd.gateway import door, intake, relay
from gproxyd.upstream.deadlines import TICK
from tests.support import raw
from tests.support.certs import Authority, believed
from tests.support.checks import quick_log
from tests.support.configs import providers_at
from tests.support.process import Process
from tests.support.raw import Reply
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk, json_reply
from tests.support.running import SECRETS, Loop, Running, until
from tests.support.servers import accepting, listening, read_head, read_request
from tests.support.toxics import (
    Bandwidth,
    Latency,
    LimitData,
    Mark,
    Relay,
    ResetPeer,
    Slicer,
    SlowClose,
    Timeout,
    Toxic,
)
from tests.support.upstream import Fin, Got, Pause, Reset, Script, Stall, Upstream

T = TypeVar("T")

SIDES = ("upstream", "client")
STAGES = (
    "connect",
    "TLS",
    "request headers",
    "request body",
    "response headers",
    "first event",
    "mid-body",
    "last chunk",
)
TOXICS = ("latency", "bandwidth", "slow_close", "timeout", "reset_peer", "slicer", "limit_data")
MODES = ("stream", "json")

CONNECT, FIRST_BYTE, IDLE = 0.6, 1.0, 0.8
"""The provider's limits in seconds: toxics stay well below, on a busy machine, too."""

HEAD_LIMIT, BODY_IDLE, WRITE_DEADLINE = 1.0, 0.8, 0.8
"""The gateway's own limits towards clients, shortened."""

AT_ONCE = 16
PATIENCE = 6.0


def configuration(urls: Mapping[str, str], keepalive: str = "0s") -> str:
    """Whose provider it is stands in the path of every request."""
    named = {name: f"{url}/{name}" for name, url in urls.items()}
    return providers_at(named, connect="600ms", first_byte="1s", idle="800ms", keepalive=keepalive)


# What the upstream answers, and what the client must get of it.

PAUSE = 0.02
HOLD = 0.25
"""Seconds for which the upstream is silent where a client is to leave meanwhile."""

PAD = "x" * 60
PIECES = {
    "stream": [
        f'data: {{"at":"one","pad":"{PAD}"}}\n\n'.encode(),
        f'data: {{"at":"two","pad":"{PAD}"}}\n\n'.encode(),
        b'data: {"at":"end"}\n\ndata: [DONE]\n\n',
    ],
    "json": [
        f'{{"a":{{"at":"one","pad":"{PAD}"}},'.encode(),
        f'"b":{{"at":"two","pad":"{PAD}"}},'.encode(),
        b'"c":{"at":"end"}}',
    ],
}
FILLING = {
    "stream": b'data: {"filling":"%b"}\n\n' % (b"y" * 65536) * 128,
    "json": b'"filling":"%b",' % (b"y" * (8 * 1024 * 1024)),
}
"""More than the kernel takes for a client that reads nothing."""

HEADS = {
    "stream": EVENT_STREAM,
    "json": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
}


def pieces(mode: str, *, large: bool = False) -> list[bytes]:
    one, two, end = PIECES[mode]
    return [one, FILLING[mode] + two if large else two, end]


def answer(mode: str, *, large: bool = False, hold: int | None = None) -> Script:
    """Head, three pieces, last chunk; `hold` is the step behind which there is silence."""
    steps = [HEADS[mode], *(chunk(piece) for piece in pieces(mode, large=large)), LAST_CHUNK]
    script: Script = []
    for number, step in enumerate(steps):
        script += [step, Pause(HOLD if number == hold else PAUSE)]
    return script


def request(path: str, mode: str, user: str) -> bytes:
    body = {"model": "m", "user": user, "stream": mode == "stream"}
    body["messages"] = [{"role": "user", "content": "Hello " * 50}]
    return raw.request(path, body)


def status_of(reply: Reply) -> int:
    """The status, as soon as it is there."""
    line = re.match(rb"HTTP/1\.1 (\d{3}) ", reply.data)
    return int(line[1]) if line else 0


def ending(reply: Reply, mode: str, *, large: bool = False) -> str:
    """How an answer ended, in the table's words."""
    if not reply.data:
        return "nothing"
    if b"\r\n\r\n" not in reply.data:
        return "torn"
    if reply.status != 200:
        return f"error {reply.json['error']['code']}" if reply.complete else "torn"
    whole = b"".join(pieces(mode, large=large))
    body = reply.body.replace(b": keep-alive\n\n", b"")
    if reply.complete:
        return "whole" if body == whole else f"wrong: {body[:500]!r}"
    events = body[: body.rfind(b"\n\n") + 2] if mode == "stream" and b"\n\n" in body else b""
    tail = body[len(events) :]
    failed = re.search(rb'data: (\{"error":.*\})\n\n\Z', events)
    if not whole.startswith(events[: failed.start()] if failed else events):
        return f"wrong: {body[:500]!r}"
    if failed:
        return f"event {orjson.loads(failed[1])['error']['code']}"
    ours = any(one.startswith(tail) or tail.startswith(one) for one in (b": keep-alive", b'data: {"error":'))
    return "torn" if ours or whole.startswith(events + tail) else f"wrong: {body[:500]!r}"


# The cells.


@dataclass(frozen=True)
class Cell:
    side: str
    stage: str
    toxic: str
    mode: str

    @property
    def name(self) -> str:
        return re.sub("[^a-z]+", "-", f"{self.side}-{self.stage}-{self.toxic}-{self.mode}".lower())

    @property
    def large(self) -> bool:
        """Whether the answer must be so long that it fills every buffer on its way."""
        return (self.side, self.stage) == ("client", "mid-body") and self.toxic in ("timeout", "bandwidth")

    @property
    def hold(self) -> int | None:
        """Where the upstream is silent, so that a client who leaves does so in the midst of the answer."""
        if self.side == "upstream" or self.toxic not in ("slow_close", "reset_peer", "limit_data"):
            return None
        if self.stage == "first event":
            return 1 if self.toxic == "limit_data" else 0
        return {"response headers": 0, "mid-body": 1, "last chunk": 3}.get(self.stage)

    @property
    def mark(self) -> Mark:
        if self.stage == "last chunk":
            plain = self.mode == "json" and self.side == "client"  # there it has a length, and no last chunk
            if self.toxic == "slow_close":
                return b'"at":"end"}}' if plain else LAST_CHUNK
            return b'"at":"end"' if plain else PIECES[self.mode][2][-8:] + b"\r\n"
        return {
            "connect": None,
            "TLS": 0,
            "request headers": 20,
            "request body": b'"messages"',
            "response headers": b"HTTP/1.1 200 OK",
            "first event": b"\r\n\r\n",
            "mid-body": b'"at":"one"',
        }[self.stage]

    def made(self) -> Toxic:
        way = "up" if self.stage in ("connect", "request headers", "request body") else "down"
        if self.toxic == "latency":
            return Latency(way, self.mark, 0.1, 0.03)
        if self.toxic == "bandwidth":
            return Bandwidth(way, self.mark, 12e6 if self.large else 8192 if self.stage == "TLS" else 3000)
        if self.toxic == "limit_data":
            count = {"connect": 0, "TLS": 100, "last chunk": 1}.get(self.stage, 10)
            return LimitData(way, self.mark, count)
        kinds = {"slow_close": SlowClose, "timeout": Timeout, "reset_peer": ResetPeer, "slicer": Slicer}
        return kinds[self.toxic](way, self.mark)

    def most(self) -> float:
        """Seconds from the fault to the end: the limit of the stage, if it has one."""
        if self.toxic == "timeout":
            if self.side == "client":
                return {"connect": HEAD_LIMIT, "request headers": HEAD_LIMIT, "request body": BODY_IDLE}.get(
                    self.stage, WRITE_DEADLINE
                )
            return {"connect": CONNECT, "TLS": CONNECT, "first event": IDLE, "mid-body": IDLE, "last chunk": IDLE}.get(
                self.stage, FIRST_BYTE
            )
        return {"slow_close": 0.1, "reset_peer": 0.0, "limit_data": 0.0}.get(self.toxic, 1.0)


@dataclass(frozen=True)
class Row:
    """What the table says of one cell."""

    expected: tuple[int, str, str, int, int]
    retryable: bool


def read_table() -> tuple[dict[Cell, Row], dict[Cell, str]]:
    """The cells that can be, and the reasons why the others cannot. Every cell is one or the other."""
    table = yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text())
    assert tuple(table) == SIDES
    rows: dict[Cell, Row] = {}
    impossible: dict[Cell, str] = {}
    for side in SIDES:
        assert tuple(table[side]) == STAGES, side
        for stage in STAGES:
            assert tuple(table[side][stage]) == TOXICS, (side, stage)
            for toxic, entry in table[side][stage].items():
                assert set(entry) <= {"both", "stream", "json", "why", "impossible", "retryable"}, entry
                for mode in MODES:
                    cell = Cell(side, stage, toxic, mode)
                    if "impossible" in entry:
                        impossible[cell] = entry["impossible"]
                        continue
                    status, ends, outcome, attempts, processed = entry.get("both") or entry[mode]
                    rows[cell] = Row((status, ends, outcome, attempts, processed), entry.get("retryable", False))
    return rows, impossible


ROWS, IMPOSSIBLE = read_table()


# Carrying them out.


@dataclass
class Result:
    """What became of one cell. Times are the loop's, None where nothing of the kind took place."""

    reply: Reply
    began: float
    heard: float
    begun: float | None
    record: dict[str, Any] | None
    logged: float | None
    processed: int
    tags: list[tuple[str, Reply]] = field(default_factory=list)


class Field:
    """A gateway, its upstream in plain and in TLS, and what the gateway says of its requests."""

    def __init__(self, loop: Loop, scripted: Any, authority: Authority | None = None) -> None:
        self.loop = loop
        self.plain = Upstream(loop, scripted).start()
        self.secure = Upstream(loop, scripted).start(tls=authority.server()) if authority else self.plain
        self.gateway: Running
        self.records: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        self.lag = 0.0
        self.unheard: list[str] = []
        """What asyncio would complain of: an exception that nobody has looked at, a callback that failed."""
        loop.loop.set_exception_handler(lambda _, context: self.unheard.append(f"{context['message']}: {context}"))

    def serve(self, urls: Mapping[str, str], keepalive: str = "0s") -> None:
        """Starts the gateway, and notes when it is through with what."""
        self.gateway = self.loop.gateway(configuration(urls, keepalive))
        handler = self.gateway.daemon.gateway
        put = handler._journal.put

        def noting(level: str, event: str, fields: Mapping[str, Any] | str) -> None:
            if event == "request":
                told = orjson.loads(f"{{{fields}}}") if isinstance(fields, str) else dict(fields)
                self.records.setdefault(told["path"].split("/")[1], []).append((self.loop.loop.time(), told))
            put(level, event, fields)

        handler._journal.put = noting  # type: ignore[method-assign]

    def processed(self, name: str, user: str) -> int:
        """How many complete requests the upstream has seen."""
        seen = (*self.plain.requests, *(self.secure.requests if self.secure is not self.plain else ()))
        target, mark = f"/{name}/".encode(), f'"user":"{user}"'.encode()
        return sum(got.complete and got.target.startswith(target) and mark in got.body for got in seen)

    @asynccontextmanager
    async def timed(self) -> AsyncIterator[None]:
        """Measures how late the loop itself is, which is nobody's fault but the machine's."""

        async def measure() -> None:
            clock = asyncio.get_running_loop().time
            while True:
                due = clock() + 0.01
                await asyncio.sleep(0.01)
                self.lag = max(self.lag, clock() - due)

        task = asyncio.create_task(measure())
        try:
            yield
        finally:
            task.cancel()

    def settled(self) -> bool:
        daemon = self.gateway.daemon
        return self.gateway.at_rest() and not daemon._door.connections

    def check_silence(self) -> None:
        """A fault of a peer is told by the request's own line, and by nothing else."""
        gc.collect()
        assert {line["event"] for line in self.gateway.log()} <= {"ready", "request"}
        assert not self.unheard, (len(self.unheard), self.unheard[0])


async def converse(port: int, data: bytes, hopeless: Callable[[], bool] = lambda: False) -> Reply:
    """Sends a request and reads one answer, until it is whole, the connection ends, or waiting is `hopeless`."""
    loop = asyncio.get_running_loop()
    reply = Reply(b"", "timeout")
    received: list[bytes] = []

    async def talk() -> None:
        await loop.sock_connect(sock, ("127.0.0.1", port))
        try:
            await loop.sock_sendall(sock, data)
        except OSError:
            pass  # what has been answered all the same can be read
        while more := await loop.sock_recv(sock, 1 << 18):
            received.append(more)
            if b"".join(received[-4:]).endswith((LAST_CHUNK, b"}")):
                reply.data = b"".join(received)
                if raw._looks_complete(reply):
                    reply.ended = "open"
                    return
        reply.ended = "fin"

    with socket.socket() as sock:
        sock.setblocking(False)
        task = loop.create_task(talk())
        deadline = loop.time() + PATIENCE
        while not task.done() and loop.time() < deadline:
            last = hopeless()
            await asyncio.wait((task,), timeout=0.1 if last else 0.02)  # what is on its way still arrives
            if last:
                break
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled() and isinstance(task.exception(), ConnectionError):
            reply.ended = "rst"
    reply.data = b"".join(received)
    return reply


async def until_true(look: Callable[[], object], seconds: float) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not look():
        if loop.time() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


def path(name: str) -> str:
    return f"/{name}/v1/chat/completions"


async def tagged(port: int, name: str, tags: Sequence[str]) -> list[tuple[str, Reply]]:
    """Requests at the same time, each of which must get the answer that bears its own tag."""
    replies = await asyncio.gather(*(converse(port, request(path(name), "json", tag)) for tag in tags))
    return list(zip(tags, replies, strict=True))


def tag_of(got: Got) -> str:
    found = re.search(rb'"user":"([^"]+)"', got.body)
    return found[1].decode() if found else ""


def tag_reply(tag: str) -> bytes:
    return json_reply(b'{"tag":"%b"}' % tag.encode())


def check_tagged(replies: Sequence[tuple[str, Reply]]) -> None:
    for tag, reply in replies:
        assert (reply.status, reply.body) == (200, b'{"tag":"%b"}' % tag.encode()), (tag, reply)


@contextmanager
def short_limits() -> Iterator[None]:
    with quick_log(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(door._OPTIONS, "keepalive_timeout", HEAD_LIMIT)
        patch.setattr(intake, "BODY_IDLE", BODY_IDLE)
        patch.setattr(relay, "WRITE_DEADLINE", WRITE_DEADLINE)
        yield


class Matrix:
    """Cells carried out at once, so many at a time."""

    def __init__(self, loop: Loop, authority: Authority, cells: Sequence[Cell]) -> None:
        self.results: dict[Cell, Result] = {}
        self._cells = cells
        self._named = {cell.name: cell for cell in cells}
        self.field = Field(loop, self._script, authority)
        self._relays: dict[Cell, Relay] = {}

    def _script(self, got: Got) -> Script:
        tag = tag_of(got)
        if tag != "fault":
            return [tag_reply(tag)]
        cell = self._named[got.target.split(b"/")[1].decode()]
        return answer(cell.mode, large=cell.large, hold=cell.hold)

    def run(self) -> None:
        urls = {}
        for cell in self._cells:
            upstream = self.field.secure if cell.stage == "TLS" else self.field.plain
            urls[cell.name] = upstream.url
            if cell.side == "upstream":
                port = self._relay(cell, upstream.port)
                urls[cell.name] = f"{'https' if cell.stage == 'TLS' else 'http'}://127.0.0.1:{port}"
        self.field.serve(urls)
        for cell in self._cells:
            if cell.side == "client":
                self._relay(cell, self.field.gateway.port)
        self.field.loop.run(self._all(), 120)

    def _relay(self, cell: Cell, port: int) -> int:
        state: Any = "open"
        if (cell.side, cell.stage) == ("upstream", "connect"):
            state = {"timeout": "black hole", "reset_peer": "refused"}.get(cell.toxic, "open")
        toxics = [cell.made()] if state == "open" else []
        buffer = 65536 if cell.large else None
        made = Relay("127.0.0.1", port, toxics=lambda: toxics, state=state, receive_buffer=buffer)
        self._relays[cell] = made
        return made.port

    async def _all(self) -> None:
        some = asyncio.Semaphore(AT_ONCE)

        async def one(cell: Cell) -> None:
            async with some:
                self.results[cell] = await self._one(cell)

        async with self.field.timed():
            await asyncio.gather(*(one(cell) for cell in self._cells))

    async def _one(self, cell: Cell) -> Result:
        clock = asyncio.get_running_loop().time
        relay = self._relays[cell]
        await relay.start()
        gateway = self.field.gateway.port
        port = relay.port if cell.side == "client" else gateway
        records = self.field.records.setdefault(cell.name, [])
        began = clock()
        data = request(path(cell.name), cell.mode, "fault")
        reply = await converse(port, data, lambda: bool(records) and "down" in relay.stuck and cell.side == "client")
        heard = clock()
        if ROWS[cell].expected[2] != "none":
            await until_true(lambda: records, 3)
        logged, record = records[0] if records else (None, None)
        begun = relay.begun_at[0] if relay.begun_at else None
        processed = self.field.processed(cell.name, "fault")
        await relay.heal()
        await asyncio.sleep(0.05)  # the gateway hears of connections that have ended now
        tags = await tagged(port, cell.name, [f"{cell.name}-{number}" for number in range(2)])
        await relay.close()
        return Result(reply, began, heard, begun, record, logged, processed, tags)


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """Those cells that are asked for."""
    asked = {item.callspec.params.get("cell") for item in request.session.items if hasattr(item, "callspec")}
    authority = Authority(tmp_path_factory.mktemp("authority"))
    with believed(authority), short_limits(), Loop() as loop:
        made = Matrix(loop, authority, [cell for cell in ROWS if cell in asked])
        made.run()
        yield made


def test_the_table_has_every_cell() -> None:
    assert len(ROWS) + len(IMPOSSIBLE) == 224
    assert all(IMPOSSIBLE.values())
    assert {cell.stage for cell in IMPOSSIBLE} == {"connect", "TLS"}


@pytest.mark.parametrize("cell", ROWS, ids=lambda cell: cell.name)
def test_cell(matrix: Matrix, cell: Cell) -> None:
    result, row = matrix.results[cell], ROWS[cell]
    record = result.record or {"outcome": "none", "attempts": 0}
    outcome = record["outcome"] + (f": {record['reason']}" if record.get("reason") else "")
    seen = (status_of(result.reply), ending(result.reply, cell.mode, large=cell.large))
    found = (*seen, outcome, record["attempts"], result.processed)
    assert found == row.expected
    if not row.retryable:
        assert result.processed <= 1
    if result.record and result.record["outcome"] != "client_gone":
        assert result.record["status"] == seen[0]
    # What failed ends within the limit of its stage; what only was slow ends all the same.
    unmet = (cell.side, cell.stage) == ("upstream", "connect") and cell.toxic in ("timeout", "reset_peer")
    assert unmet or result.begun is not None, "the fault did not take place"
    if cell.toxic in ("latency", "bandwidth"):
        assert result.heard - result.began > 0.05
    start = result.begun or result.began
    over = max(result.heard, result.logged or 0) if seen[1] != "torn" else result.logged or result.heard
    slack = 2 * TICK + 0.15 + 4 * matrix.field.lag  # who is late once is so at every turn that a request takes
    if row.expected[1] == "whole" or outcome == "ok":
        assert over - result.began < 1.5 + slack
    else:
        assert over - start < cell.most() + slack
    check_tagged(result.tags)


def test_nothing_is_left_of_the_matrix(matrix: Matrix) -> None:
    until(matrix.field.settled)
    gateway = matrix.field.gateway
    expected = {
        path(cell.name): (ROWS[cell].expected[2] != "none") + len(result.tags)
        for cell, result in matrix.results.items()
    }

    def lines() -> Counter[str]:
        return Counter(line["path"] for line in gateway.requests())

    until(lambda: lines().total() >= sum(expected.values()))
    assert lines() == Counter(expected)
    matrix.field.check_silence()


# Random schedules.

SEED = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(1 << 32))
ROUNDS = os.environ.get("FAULT_ROUNDS") or "400"
SLOTS = 24
RANDOM_MODES = ("stream", "json", "upload")


def rounds() -> range:
    """`400` are the first 400, `17:18` only number 17."""
    first, _, last = ROUNDS.rpartition(":")
    return range(int(first or 0), int(last))


def upload(path: str, user: str) -> bytes:
    body = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n"user":"%b"\r\n' % user.encode()
    body += b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n%b\r\n--b--\r\n' % (b"z" * 20_000)
    return raw.request(path, body, headers=[("Content-Type", "multipart/form-data; boundary=b")])


@dataclass(frozen=True)
class Schedule:
    """What goes wrong in one round, all of it made from the seed and the round's number."""

    number: int
    mode: str
    client: tuple[Toxic, ...]
    upstream: tuple[Toxic, ...]

    @classmethod
    def make(cls, seed: int, number: int) -> Schedule:
        dice = random.Random(f"{seed}/{number}")
        mode = dice.choice(RANDOM_MODES)
        return cls(number, mode, cls._some(dice, mode), cls._some(dice, mode))

    @classmethod
    def _some(cls, dice: random.Random, mode: str) -> tuple[Toxic, ...]:
        return tuple(cls._one(dice, mode) for _ in range(dice.choice((0, 1, 1, 2))))

    @staticmethod
    def _one(dice: random.Random, mode: str) -> Toxic:
        way = dice.choice(("up", "down"))
        longest = 21_000 if mode == "upload" and way == "up" else 900
        after = dice.choice((None, 0, b"\r\n\r\n", b'"at":"one"', dice.randrange(longest)))
        kind = dice.choice(TOXICS)
        if kind == "latency":
            return Latency(way, after, dice.uniform(0.0, 0.12), 0.0)
        if kind == "bandwidth":
            return Bandwidth(way, after, dice.uniform(40_000, 200_000) if longest > 900 else dice.uniform(3000, 20_000))
        if kind == "slow_close":
            return SlowClose(way, after, dice.uniform(0.0, 0.3))
        if kind == "limit_data":
            return LimitData(way, after, dice.randrange(longest))
        if kind == "slicer" and longest > 900:
            return Slicer(way, b"z" * 19_000, seed=dice.randrange(1000))
        return {"timeout": Timeout, "reset_peer": ResetPeer, "slicer": Slicer}[kind](way, after)

    def request(self, name: str) -> bytes:
        user = f"r{self.number}"
        return upload(f"/{name}/v1/files", user) if self.mode == "upload" else request(path(name), self.mode, user)


class Storm:
    """Slots side by side, each with a relay on either side of the gateway, and one round after the other."""

    def __init__(self, loop: Loop) -> None:
        self.schedules = [Schedule.make(SEED, number) for number in rounds()]
        self._modes = {f"r{schedule.number}": schedule.mode for schedule in self.schedules}
        self.field = Field(loop, self._script)
        self.broken: list[str] = []

    def _script(self, got: Got) -> Script:
        tag = tag_of(got)
        if tag not in self._modes:
            return [tag_reply(tag)]
        return answer("stream" if self._modes[tag] == "stream" else "json")

    def run(self) -> None:
        slots = {f"s{number}": Relay("127.0.0.1", self.field.plain.port) for number in range(SLOTS)}
        self.field.serve({name: f"http://127.0.0.1:{relay.port}" for name, relay in slots.items()}, "150ms")
        self.field.loop.run(self._all(slots), 180)

    async def _all(self, slots: Mapping[str, Relay]) -> None:
        waiting = list(reversed(self.schedules))

        async def one_after_another(name: str, upstream: Relay) -> None:
            await upstream.start()
            while waiting:
                schedule = waiting.pop()
                try:
                    await self._round(schedule, name, upstream)
                except (AssertionError, OSError) as wrong:
                    self.broken.append(f"round {schedule.number}: {wrong}\n{schedule}")
            await upstream.close()

        async with self.field.timed():
            await asyncio.gather(*(one_after_another(name, upstream) for name, upstream in slots.items()))

    async def _round(self, schedule: Schedule, name: str, upstream: Relay) -> None:
        clock = asyncio.get_running_loop().time
        client = Relay("127.0.0.1", self.field.gateway.port, toxics=lambda: schedule.client)
        await client.start()
        await upstream.spoil(lambda: schedule.upstream)
        records = self.field.records[name] = []
        began = clock()
        reply = await converse(client.port, schedule.request(name), lambda: bool(records) and "down" in client.stuck)
        quiet = clock()
        user = f"r{schedule.number}"
        if self.field.processed(name, user) or reply.data:
            await until_true(lambda: records, 3)
        else:
            await asyncio.sleep(0.1)
        took = (records[0][0] if records else quiet) - began
        await client.heal()
        await upstream.heal()
        await until_true(lambda: not client.busy, 1)
        await asyncio.sleep(0.05)
        try:
            self._judge(schedule, reply, [record for _, record in records], self.field.processed(name, user), took)
            check_tagged(await tagged(client.port, name, [f"after-{schedule.number}"]))
        finally:
            await client.close()

    def _judge(
        self, schedule: Schedule, reply: Reply, records: list[dict[str, Any]], processed: int, took: float
    ) -> None:
        """What is true whatever goes wrong."""
        ends = ending(reply, "stream" if schedule.mode == "stream" else "json")
        status = status_of(reply)
        seen = f"{status} {ends}, processed {processed} times, {took:.2f} s, {records}"
        assert took < PATIENCE + self.field.lag, seen
        assert processed <= 1 and processed <= len(records) <= 1, seen
        assert not ends.startswith("wrong"), seen
        assert status in (0, 200, 408, 502, 504), seen
        if not records:
            assert ends == "nothing", seen
            return
        record = records[0]
        outcome = record["outcome"]
        assert outcome in ("ok", "refused", "client_gone", "upstream_error", "upstream_timeout"), seen
        assert record["attempts"] <= 1, seen
        if outcome == "ok":
            assert (record["status"], processed) == (200, 1), seen
        if ends == "whole":
            assert outcome == "ok", seen
        if ends.startswith(("error", "event")):
            assert record["status"] == status and outcome not in ("ok", "client_gone"), seen
        if not schedule.client:
            # Nothing is wrong on the client's side: it is told how it ended, and only what cannot tell is torn.
            assert ends != "nothing" and outcome != "client_gone", seen
            assert ends != "torn" or schedule.mode == "upload", seen
        if not schedule.upstream:
            assert not outcome.startswith("upstream"), seen


def test_random_schedules_keep_the_laws() -> None:
    print(f"FAULT_SEED={SEED} FAULT_ROUNDS={ROUNDS}")
    with short_limits(), Loop() as loop:
        storm = Storm(loop)
        storm.run()
        replay = f"replay with FAULT_SEED={SEED} FAULT_ROUNDS=N:N+1"
        assert not storm.broken, "\n\n".join((f"{len(storm.broken)} broken", *storm.broken[:10], replay))
        until(storm.field.settled)
        storm.field.check_silence()


# How much is held for what is stuck.

STUCK = 24
MIB = 1024 * 1024


def patient(url: str) -> str:
    """A configuration whose provider gives everything twenty seconds."""
    return providers_at({"up": url}, connect="20s", first_byte="20s", idle="20s", more="aliases: {shown: up/m}\n")


SILENT_AFTER: dict[str, bytes] = {
    "an event without end": EVENT_STREAM + chunk(b'data: {"model":"m","a":"' + b"x" * (900 * 1024)),
    "a held body": HEADS["json"] + chunk(b'{"model":"m","a":"' + b"x" * (200 * 1024)),
    "a client that takes nothing": EVENT_STREAM + chunk(FILLING["stream"]) * 4,
    "an upload that is not taken": b"",
}


@pytest.mark.parametrize("how", SILENT_AFTER)
def test_what_is_stuck_takes_little_memory(tmp_path: Path, how: str) -> None:
    """No more than a megabyte each, however much waits on either side."""
    gone = threading.Event()
    met = threading.Semaphore(0)

    def stubborn(connection: socket.socket) -> None:
        read_head(connection)
        met.release()
        if SILENT_AFTER[how]:
            connection.sendall(SILENT_AFTER[how])
        gone.wait(20)

    large = upload("/up/v1/files", "u").replace(b"z" * 20_000, b"z" * (8 * MIB))
    large = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(large.partition(b"\r\n\r\n")[2]), large)
    data = {
        "an upload that is not taken": large,
        "an event without end": raw.request("/v1/chat/completions", {"model": "shown", "stream": True, "messages": []}),
        "a held body": raw.request("/v1/chat/completions", {"model": "shown", "messages": []}),
    }.get(how, request(path("up"), "stream", "u"))
    socks: list[socket.socket] = []
    with ExitStack() as stack:
        port = stack.enter_context(listening(stubborn, rcvbuf=16 * 1024))
        config = patient(f"http://127.0.0.1:{port}")
        daemon = stack.enter_context(Process(tmp_path, config, SECRETS))
        try:
            for number in range(STUCK + 1):
                sock = raw.connect(daemon.port, rcvbuf=4096)
                sock.setblocking(False)
                socks.append(sock)
                sent = 0
                while sent < len(data):  # a first request for what is made once only; then as much as goes
                    try:
                        sent += sock.send(data[sent:])
                    except BlockingIOError:
                        if not select.select([], [sock], [], 0.1)[1]:
                            break
                assert met.acquire(timeout=5)
                if number == 0:
                    before = settled_memory(daemon)
            grown = settled_memory(daemon) - before
            assert grown <= STUCK * MIB, f"{grown / STUCK / MIB:.2f} MiB each"
        finally:
            gone.set()
            for sock in socks:
                sock.close()


def settled_memory(daemon: Process) -> int:
    """What the process holds as soon as it holds no more."""
    sizes = [0]
    deadline = time.monotonic() + 5
    while (time.monotonic() < deadline and len(set(sizes[-4:])) != 1) or len(sizes) < 5:
        time.sleep(0.1)
        sizes.append(daemon.memory()["VmRSS"])
    return sizes[-1]


# Names.

DUAL = """\
server: {{listen: ["127.0.0.1:0"]}}
providers:
{providers}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""


class Resolving:
    """The daemon's loop with a resolver of the test's own. `names` maps a name to what becomes of it."""

    def __init__(self, running: Running, names: Mapping[str, Callable[[int], Awaitable[list[Any]]]]) -> None:
        dialler = running.daemon._pool._dialler
        self._loop = dialler._loop
        self._names = names
        self.asked: Counter[str] = Counter()
        dialler._look_up = self.getaddrinfo  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked[host] += 1
        return await self._names[host](port)


def v4(port: int) -> Any:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))


def v6(port: int, host: str = "::1") -> Any:
    return (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (host, port, 0, 0))


async def fine(port: int) -> list[Any]:
    return [v4(port)]


async def slow(port: int) -> list[Any]:
    await asyncio.sleep(0.15)
    return [v4(port)]


async def slower(port: int) -> list[Any]:
    await asyncio.sleep(1.5)
    return [v4(port)]


async def hanging(port: int) -> list[Any]:
    await asyncio.sleep(30)
    return []


async def nxdomain(port: int) -> list[Any]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


async def servfail(port: int) -> list[Any]:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


async def empty(port: int) -> list[Any]:
    return []


async def metadata(port: int) -> list[Any]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", port))]


async def unroutable_aaaa(port: int) -> list[Any]:
    return [v6(port, "2001:db8::1"), v4(port)]


async def refusing_aaaa(port: int) -> list[Any]:
    return [v6(port), v4(port)]


NAMES: dict[str, tuple[Callable[[int], Awaitable[list[Any]]], int, str | None]] = {
    "nxdomain": (nxdomain, 502, "dns"),
    "servfail": (servfail, 502, "dns"),
    "empty": (empty, 502, "dns"),
    "metadata": (metadata, 502, "dns"),
    "hanging": (hanging, 504, "timeout_connect"),
    "slower": (slower, 504, "timeout_connect"),
    "slow": (slow, 200, None),
    "unroutable-aaaa": (unroutable_aaaa, 200, None),
    "refusing-aaaa": (refusing_aaaa, 200, None),
    "fine": (fine, 200, None),
}


@pytest.fixture
def quick() -> Iterator[Loop]:
    with short_limits(), Loop() as loop:
        yield loop


def ask(port: int, name: str, tag: str = "tag") -> tuple[Reply, float]:
    began = time.monotonic()
    reply = raw.send(port, request(path(name), "json", tag))
    return reply, time.monotonic() - began


def test_trouble_with_names_is_told_in_time_and_stays_with_its_provider(quick: Loop) -> None:
    upstream = Upstream(quick, lambda got: [tag_reply(tag_of(got))]).start()
    gateway = quick.gateway(configuration({name: f"http://{name}.test:{upstream.port}" for name in NAMES}))
    resolver = Resolving(gateway, {f"{name}.test": what for name, (what, _, _) in NAMES.items()})
    names = [name for name in NAMES for _ in range(5)]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: ask(gateway.port, name), names))
    for name, (reply, took) in zip(names, answers, strict=True):
        _, status, reason = NAMES[name]
        record = gateway.request(reply.header("x-request-id") or "")
        assert (name, reply.status, record.get("reason"), record["attempts"]) == (name, status, reason, 1)
        assert took < CONNECT + FIRST_BYTE, (name, took)
        assert name not in ("fine", "nxdomain") or took < CONNECT, (name, took)
        if status != 200:
            assert b".test" not in reply.data, "the upstream's name is nobody's business"
    until(gateway.at_rest)
    # What failed is asked for again at once, what was found is believed for a while.
    before = resolver.asked.copy()
    for name in ("nxdomain", "fine"):
        ask(gateway.port, name)
    assert resolver.asked["nxdomain.test"] == before["nxdomain.test"] + 1
    assert resolver.asked["fine.test"] == before["fine.test"]


def test_a_name_that_has_moved_is_asked_for_again(quick: Loop) -> None:
    """When nobody answers at the address any more, what is remembered of the name is forgotten."""
    upstream = Upstream(quick, lambda got: [tag_reply(tag_of(got))]).start()
    old = Relay("127.0.0.1", upstream.port)
    quick.run(old.start())
    there = [old.port]

    async def moving(_: int) -> list[Any]:
        return [v4(there[0])]

    gateway = quick.gateway(configuration({"up": f"http://moving.test:{old.port}"}))
    Resolving(gateway, {"moving.test": moving})
    assert ask(gateway.port, "up")[0].json == {"tag": "tag"}
    quick.run(old.close())
    there[0] = upstream.port
    until(lambda: ask(gateway.port, "up")[0].status == 200, 1)
    moved = (["ok", "ok"], ["ok", "upstream_error", "ok"])
    until(lambda: [line["outcome"] for line in gateway.requests()] in moved)


async def drop_idle(gateway: Running) -> None:
    gateway.daemon._pool.close()


@contextmanager
def dead_v6(port: int) -> Iterator[None]:
    """An address of the other family at which connecting takes for ever."""
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::1", port))
        listener.listen(0)
        fillers = [socket.socket(socket.AF_INET6) for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("::1", port))
        time.sleep(0.02)
        try:
            yield
        finally:
            for filler in fillers:
                filler.close()


def test_a_dead_ipv6_address_costs_no_more_than_the_race(quick: Loop) -> None:
    upstream = Upstream(quick, lambda got: [tag_reply(tag_of(got))]).start()
    config = configuration({"up": f"http://dual.test:{upstream.port}"}).replace("connect: 600ms", "connect: 2s")
    gateway = quick.gateway(config)
    Resolving(gateway, {"dual.test": refusing_aaaa})
    with dead_v6(upstream.port):
        for _ in range(3):
            reply, took = ask(gateway.port, "up")
            assert reply.json == {"tag": "tag"}
            assert took < 0.4
            quick.run(drop_idle(gateway))
    assert upstream.connections == 3


def test_an_ipv6_upstream_with_its_faults(quick: Loop) -> None:
    """The other family is held to the same limits."""
    upstream = Upstream(quick, lambda got: [tag_reply(tag_of(got))]).start("::1")
    with socket.socket(socket.AF_INET6) as nobody:
        nobody.bind(("::1", 0))
        refused = nobody.getsockname()[1]
        with socket.socket(socket.AF_INET6) as spare:
            spare.bind(("::1", 0))
            dead = spare.getsockname()[1]
        with dead_v6(dead):
            ports = {"good": upstream.port, "refused": refused, "dead": dead}
            gateway = quick.gateway(configuration({name: f"http://[::1]:{port}" for name, port in ports.items()}))
            assert ask(gateway.port, "good")[0].json == {"tag": "tag"}
            assert ask(gateway.port, "refused")[0].status == 502
            reply, took = ask(gateway.port, "dead")
            assert reply.status == 504 and took < CONNECT + 2 * TICK


# Requests that are sent once.

ENDINGS: dict[str, Script] = {
    "fin": [Fin()],
    "reset": [Pause(0.05), Reset()],
    "half a head": [b"HTTP/1.1 200 OK\r\nContent-", Fin()],
    "silence": [Stall()],
    "server error": [json_reply(b'{"error":{}}', status=b"503 Service Unavailable")],
}


METHODS = ("GET", "HEAD", "OPTIONS", "DELETE", "PUT", "POST", "PATCH")


@pytest.mark.parametrize("how", ENDINGS)
def test_no_request_is_sent_twice_in_secret(quick: Loop, how: str) -> None:
    """Whatever the method: a repetition is allowed to the safe ones only, if a kept connection proves to have ended.

    The client is told of it, and silence has no second chance: it would cost the client the same time once more.
    """

    def script(got: Got) -> Script:
        return ENDINGS[how] if b"/drop" in got.target else [tag_reply("ok")]

    cases = [(method, warm) for method in METHODS for warm in (False, True)]
    upstreams = {f"{method}-{warm}".lower(): Upstream(quick, script).start() for method, warm in cases}
    gateway = quick.gateway(configuration({name: upstream.url for name, upstream in upstreams.items()}))

    def ask_once(method: str, warm: bool) -> tuple[int, int, float]:
        name = f"{method}-{warm}".lower()
        if warm:
            assert raw.send(gateway.port, raw.request(f"/proxy/{name}/warm")).status == 200
        target = f"/proxy/{name}/drop"
        body = {"a": 1} if method in ("PUT", "POST", "PATCH") else None
        began = time.monotonic()
        with raw.connect(gateway.port) as sock:
            sock.sendall(raw.request(target, body, method=method))
            assert sock.recv(65536).startswith(b"HTTP/1.1 50")
        took = time.monotonic() - began
        record = until(lambda: next((line for line in gateway.requests() if line["path"] == target), None))
        return sum(b"/drop" in got.target for got in upstreams[name].requests), record["attempts"], took

    with ThreadPoolExecutor(len(cases)) as pool:
        results = dict(zip(cases, pool.map(lambda case: ask_once(*case), cases), strict=True))
    for (method, warm), (seen, attempts, took) in results.items():
        repeatable = warm and how in ("fin", "reset") and method in ("GET", "HEAD", "OPTIONS")
        assert (seen, attempts) == ((2, 2) if repeatable else (1, 1)), (method, warm)
        assert took < CONNECT + FIRST_BYTE + 2 * TICK, (method, warm, took)


# A machine that has no ports left.


def apart(work: Callable[[], T], *commands: Sequence[str]) -> T:
    """Runs `work` in a thread with a network and mounts of its own, set up by `commands`; what it starts stays there.

    Skips the test where that is not allowed.
    """

    def enter() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x40000000 | 0x00020000):  # CLONE_NEWNET, CLONE_NEWNS (unshare(2))
            raise PermissionError("neither network nor mounts can be unshared here")
        usual = (("ip", "link", "set", "lo", "up"), ("mount", "--make-rprivate", "/"))
        for command in (*usual, *commands):
            subprocess.run(command, check=True, capture_output=True, timeout=10)
        return work()

    with ThreadPoolExecutor(1) as own:
        try:
            return own.submit(enter).result(30)
        except (OSError, subprocess.SubprocessError) as forbidden:
            pytest.skip(f"no network of its own: {forbidden}")


def test_without_a_local_port_left_requests_are_refused_at_once(tmp_path: Path) -> None:
    """Ten upstream connections are possible: the eleventh is refused, nothing is tried again, and all recovers."""
    opened: list[socket.socket] = []
    heads: list[bytes] = []
    daemons: list[Process] = []
    go_on = threading.Event()

    def serve(connection: socket.socket) -> None:
        while True:
            heads.append(read_request(connection)[0])
            go_on.wait(10)
            connection.sendall(tag_reply("ok"))

    def start() -> socket.socket:
        listener = socket.create_server(("127.0.0.1", 8000), backlog=128)
        config = patient("http://127.0.0.1:8000")
        config = config.replace("127.0.0.1:0", f"unix:{tmp_path}/door")
        daemons.append(stack.enter_context(Process(tmp_path, config, SECRETS)))
        return listener

    def connect() -> socket.socket:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(5)
        sock.connect(f"{tmp_path}/door")
        opened.append(sock)
        return sock

    with ExitStack() as stack:
        listener = apart(start, ("sysctl", "-w", "net.ipv4.ip_local_port_range=50000 50009"))
        (daemon,) = daemons
        stack.enter_context(accepting(listener, serve))
        for _ in range(10):
            connect().sendall(request(path("up"), "json", "u"))
        until(lambda: len(heads) == 10)
        began = time.monotonic()
        for _ in range(30):
            sock = connect()
            sock.sendall(request(path("up"), "json", "u"))
            assert raw.read(sock).status in (502, 503)
        assert time.monotonic() - began < 3
        lines = until(lambda: (r := [e for e in daemon.log() if e["event"] == "request"]) and len(r) == 30 and r)
        assert {(line["outcome"], line["attempts"]) for line in lines} == {("upstream_error", 1)}
        assert len(heads) == 10
        go_on.set()
        assert all(raw.read(sock).status == 200 for sock in opened[:10])
        sock = connect()
        sock.sendall(request(path("up"), "json", "u"))
        assert raw.read(sock).json == {"tag": "ok"}


@contextmanager
def name_server(sock: socket.socket) -> Iterator[None]:
    """Answers on `sock`: a name with `fine` in it has an address, any other is never answered."""
    over = threading.Event()

    def serve() -> None:
        sock.settimeout(0.1)
        while not over.is_set():
            try:
                question, peer = sock.recvfrom(2048)
            except TimeoutError:
                continue
            end = question.index(b"\0", 12) + 5
            found = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\x7f\0\0\x01"  # A 127.0.0.1 (RFC 1035 section 4.1.3)
            if question[end - 4 : end - 2] != b"\0\x01":
                found = b""
            if b"fine" in question:
                counts = b"\0\x01\0%b\0\0\0\0" % bytes([bool(found)])
                sock.sendto(question[:2] + b"\x81\x80" + counts + question[12:end] + found, peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)
        sock.close()


def test_a_name_server_that_hangs_holds_up_nobody_else(tmp_path: Path) -> None:
    """Lookups that nobody answers must not use up what all lookups share: threads, for instance."""
    hung = [f"hang{number}" for number in range(8)]
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    daemons: list[Process] = []

    def start() -> tuple[socket.socket, socket.socket]:
        listener = socket.create_server(("127.0.0.1", 8000), backlog=128)
        names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        names.bind(("127.0.0.53", 53))
        config = configuration({name: f"http://{name}.test:8000" for name in (*hung, "fine", "finest")})
        config = config.replace("127.0.0.1:0", f"unix:{tmp_path}/door")
        daemons.append(stack.enter_context(Process(tmp_path, config, SECRETS)))
        return listener, names

    def serve(connection: socket.socket) -> None:
        while True:
            read_request(connection)
            connection.sendall(tag_reply("ok"))

    def send(name: str) -> socket.socket:
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.settimeout(5)
        sock.connect(f"{tmp_path}/door")
        sock.sendall(request(path(name), "json", "u"))
        return sock

    with ExitStack() as stack:
        listener, names = apart(start, ("mount", "--bind", f"{tmp_path}/resolv.conf", "/etc/resolv.conf"))
        stack.enter_context(accepting(listener, serve))
        stack.enter_context(name_server(names))
        assert raw.read(send("finest")).json == {"tag": "ok"}
        hanging = [send(name) for name in hung * 5]
        time.sleep(0.05)
        began = time.monotonic()
        assert raw.read(send("fine")).json == {"tag": "ok"}
        assert time.monotonic() - began < CONNECT
        for sock in hanging:
            assert raw.read(sock).status == 504
        assert time.monotonic() - began < CONNECT + 2 * TICK + 0.15
