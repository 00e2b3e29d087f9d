"""Money where it is hard: answers that nobody hears, that lie, that come in another shape; the sums of a bad day."""

from __future__ import annotations

import gzip
import json
import random
import socket
import sqlite3
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from gproxyd.gateway import exchange
from tests.support import raw
from tests.support.bank import Bank, Client, Holder, alike, ask_often, bank, quick_ledger, shared, short
from tests.support.dialects import (
    CHAT,
    CHATS,
    COST,
    INPUT,
    MESSAGES,
    OUTPUT,
    RESPONSES,
    ZEROES,
    Dialect,
    delta,
    event,
    every_dialect,
    last_usage,
    streamed,
    whole_or_not,
)
from tests.support.running import Loop, until
from tests.support.servers import listening, read_request
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Fin, Got, Pause, Reset, Script, chunk, json_reply
from tests.test_disconnect_usage import AMID, read_until

__all__ = ["bank", "quick_ledger", "shared", "short"]

Json = Any


@pytest.fixture(scope="module")
def draining(loop: Loop) -> Bank:
    return Bank(loop, on_disconnect="drain")


# Streams that are heard for nobody.


def test_no_more_streams_than_so_many_are_heard_for_nobody_and_each_makes_room_again(
    draining: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "MOST_DRAINING", 2)
    draining.script = [
        EVENT_STREAM,
        *map(chunk, CHATS.events[:2]),
        Pause(0.3),
        *map(chunk, CHATS.events[2:]),
        LAST_CHUNK,
    ]
    for _ in range(3):
        who = draining.user(10**9)
        clients = [Client(draining.gateway.port) for _ in range(4)]
        for client in clients:
            client.sock.sendall(who.request(CHATS.path, {**CHAT, "stream": True}))
        for client in clients:
            read_until(client, AMID["chat"])
        for client in clients:
            client.sock.close()
        records = who.settled(4)
        assert Counter(record["provenance"] for record in records) == {"measured": 2, "estimated": 2}
        assert [record["cost_nanousd"] for record in records if record["provenance"] == "measured"] == [COST] * 2
        assert all(record["client_gone"] and record["cost_nanousd"] > 0 for record in records)


# What a stream tells in the end.


def test_a_usage_of_null_behind_one_that_tells_takes_nothing_back(bank: Bank) -> None:
    told = {"prompt_tokens": 9, "completion_tokens": 3}
    bank.script = streamed([delta("a", usage=told), delta("b", usage=None), event("[DONE]")])
    who = bank.user()
    ask_often(who, CHATS.path, {**CHAT, "stream": True}, 3)
    record = alike(who.settled(3))
    assert (record["input_tokens"], record["output_tokens"], record["provenance"]) == (9, 3, "measured")


def test_an_upstream_that_knows_no_stream_options_says_so_to_the_client(bank: Bank, short: list[str]) -> None:
    """Its 400 is passed on as it came, costs nothing, and nobody tries again behind the client's back."""
    refusal = b'{"error":{"message":"Unrecognized request argument: stream_options","code":"unknown"} }'

    def picky(got: Got) -> Script:
        refused = b"stream_options" in got.body
        return [json_reply(refusal, status=b"400 Bad Request")] if refused else streamed(CHATS.events)

    bank.script = picky
    who = bank.user(10**9)
    before = len(bank.upstream.requests)
    replies = ask_often(who, CHATS.path, {**CHAT, "stream": True}, 3)
    assert {(reply.status, reply.body) for reply in replies} == {(400, refusal)}
    record = alike(who.settled(3))
    assert (record["cost_nanousd"], record["provenance"], record["attempts"]) == (0, "absent", 1)
    assert len(bank.upstream.requests) == before + 3


ZERO_ENDS: Mapping[str, tuple[bytes, ...]] = {
    "chat": (delta("a", usage=None), last_usage(ZEROES["chat"]["usage"]), event("[DONE]")),
    "responses": (
        *RESPONSES.events[:2],
        event(
            {"type": "response.completed", "response": {"id": "r", **ZEROES["responses"]}},
            "response.completed",
        ),
    ),
    "messages": (
        event({"type": "message_start", "message": {"id": "m", "content": [], **ZEROES["messages"]}}, "message_start"),
        MESSAGES.events[1],
        event({"type": "message_delta", "delta": {}, **ZEROES["messages"]}, "message_delta"),
        MESSAGES.events[-1],
    ),
    "generate": (
        event({"candidates": [{"content": {"parts": [{"text": "h"}]}, "finishReason": "STOP"}], **ZEROES["generate"]}),
    ),
}


@every_dialect
def test_a_zero_that_a_stream_tells_costs_nothing_and_is_not_estimated(bank: Bank, dialect: Dialect) -> None:
    bank.script = streamed(ZERO_ENDS[dialect.name])
    who = bank.user(10**9)
    replies = ask_often(who, dialect.target(stream=True), dialect.content(stream=True), 3)
    assert all(reply.complete for reply in replies)
    record = alike(who.settled(3))
    assert (record["input_tokens"], record["output_tokens"], record["cost_nanousd"]) == (0, 0, 0)
    assert record["provenance"] == "measured" and who.spent == 0


# What only looks like it.

FALSE = {"usage": {"prompt_tokens": 0, "input_tokens": 0, "output_tokens": 0}, "usageMetadata": {"promptTokenCount": 0}}
DECOYS: Mapping[str, tuple[bytes, Json]] = {
    "chat": (
        event({"id": "c", "choices": [{"index": 0, "delta": {"tool_calls": [{"function": FALSE}], **FALSE}}]}),
        {"choices": [{"message": {"content": "hi", "tool_calls": [{"function": FALSE}], **FALSE}, **FALSE}]},
    ),
    "responses": (
        event({"type": "response.output_item.done", "item": {"type": "function_call", **FALSE}}),
        {"output": [{"type": "function_call", "arguments": json.dumps(FALSE), **FALSE}]},
    ),
    "messages": (
        event({"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "input": FALSE}}),
        {"content": [{"type": "tool_use", "id": "t", "name": "n", "input": FALSE}]},
    ),
    "generate": (
        event({"candidates": [{"content": {"parts": [{"functionCall": {"name": "f", "args": FALSE}}]}}]}),
        {"candidates": [{"content": {"parts": [{"functionCall": {"args": FALSE}}]}, "finishReason": "STOP"}]},
    ),
}


@every_dialect
@whole_or_not
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_usage_among_a_tools_arguments_counts_for_nothing(
    bank: Bank, dialect: Dialect, stream: bool, place: str
) -> None:
    """A model may be told to write whatever it likes, as JSON of its own, too."""
    decoy, members = DECOYS[dialect.name]
    if stream:
        last = len(dialect.events) - 1
        at = 1 if place == "before" else last
        bank.script = streamed([*dialect.events[:at], decoy, *dialect.events[at:]])
    else:
        whole = {name: value for name, value in dialect.whole.items() if name not in members}
        both = {**members, **whole} if place == "before" else {**whole, **members}
        bank.script = [json_reply(json.dumps(both).encode())]
    who = bank.user()
    ask_often(who, dialect.target(stream=stream), dialect.content(stream=stream), 3)
    record = alike(who.settled(3))
    assert (record["cost_nanousd"], record["provenance"]) == (COST, "measured")


# Answers in another coding or shape than usual.


@every_dialect
@whole_or_not
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_what_passes_compressed_is_measured_all_the_same(
    bank: Bank, dialect: Dialect, stream: bool, coding: str
) -> None:
    """The client asked for it and gets every byte as it came; the tokens are read in a copy."""
    packer = zlib.compressobj(wbits=31 if coding == "gzip" else 15)
    text = list(dialect.events) if stream else [json.dumps(dialect.whole).encode()]
    packed = [packer.compress(one) + packer.flush(zlib.Z_SYNC_FLUSH) for one in text] + [packer.flush()]
    kind = b"text/event-stream" if stream else b"application/json"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Encoding: %b\r\nTransfer-Encoding: chunked\r\n\r\n"
    bank.script = [head % (kind, coding.encode()), *map(chunk, packed), LAST_CHUNK]
    who = bank.user()
    target = f"/proxy/{dialect.provider}" + dialect.target(stream=stream).replace(f"{dialect.provider}/", "")
    body = (
        {**dialect.content(stream=stream), "model": "m"} if "model" in dialect.body else dialect.content(stream=stream)
    )
    with Client(bank.gateway.port) as client:
        reply = client.ask(who.request(target, body, headers=[("Accept-Encoding", coding)]))
    assert (reply.status, reply.header("content-encoding"), reply.body) == (200, coding, b"".join(packed))
    (record,) = who.settled(1)
    assert (record["cost_nanousd"], record["provenance"]) == (COST, "measured")


def test_a_copy_that_would_grow_without_bounds_is_given_up_and_the_answer_passes(bank: Bank) -> None:
    bomb = gzip.compress(bytes(300 << 20), 9)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    bank.script = [head % len(bomb) + bomb]
    who = bank.user(10**9)
    began = time.monotonic()
    data = who.request("/proxy/oai/v1/chat/completions", {**CHAT, "model": "m"}, headers=[("Accept-Encoding", "gzip")])
    with Client(bank.gateway.port) as client:
        assert client.ask(data).body == bomb
    assert time.monotonic() - began < 3
    (record,) = who.settled(1)
    assert record["provenance"] in ("estimated", "partial") and record["cost_nanousd"] > 0


@every_dialect
@whole_or_not
def test_an_answer_of_another_shape_than_was_asked_for_is_measured(bank: Bank, dialect: Dialect, stream: bool) -> None:
    """JSON for who asked for a stream, a stream for who did not: both tell their tokens."""
    bank.script = dialect.script(stream=not stream)
    who = bank.user()
    replies = ask_often(who, dialect.target(stream=stream), dialect.content(stream=stream), 3)
    assert all(reply.status == 200 and reply.complete for reply in replies)
    record = alike(who.settled(3))
    assert (record["cost_nanousd"], record["provenance"]) == (COST, "measured")


# Who waits for room at an upstream.


def test_who_leaves_while_waiting_for_room_at_an_upstream_has_held_nothing_for_long(loop: Loop) -> None:
    bank = Bank(loop)
    config = bank.config.replace("  oai:\n", "  oai:\n    rate_limits: {concurrency: 1}\n", 1)
    assert config != bank.config
    bank.gateway.stop()
    bank.gateway = loop.gateway(config)
    bank.script = [Pause(0.4), *CHATS.script(stream=False)]
    who = bank.user(10**9)
    data = who.request(CHATS.path, CHAT)
    before = len(bank.upstream.requests)
    with ExitStack() as clients:
        stays, *leaves = [clients.enter_context(Client(bank.gateway.port)) for _ in range(6)]
        stays.sock.sendall(data)
        until(lambda: len(bank.upstream.requests) > before)
        for client in leaves:
            client.sock.sendall(data)
        until(lambda: bank.gateway.daemon.gateway.in_flight == 6)
        time.sleep(0.05)
        for client in leaves:
            client.sock.close()
        until(lambda: bank.gateway.daemon.gateway.in_flight == 1)
        assert raw.read(stays.sock).status == 200
    assert len(bank.upstream.requests) == before + 1
    records = who.settled(6)
    assert sorted(record["cost_nanousd"] for record in records) == [0] * 5 + [COST]
    bank.script = CHATS.script(stream=False)
    assert who.chat().status == 200  # and the room is there again


# One caller beside another.


def test_a_caller_who_floods_beyond_the_limit_does_not_slow_another(bank: Bank) -> None:
    bank.script = CHATS.script(stream=False)
    greedy, modest = bank.user(limits=[{"model": "*", "rpm": 10}]), bank.user()
    over = threading.Event()
    counts: Counter[bytes] = Counter()

    def flood() -> None:
        data = greedy.request(CHATS.path, CHAT) * 10
        with raw.connect(bank.gateway.port) as sock:
            while not over.is_set():
                sock.sendall(data)
                got = b""
                while got.count(b"HTTP/1.1 ") < 10 or not got.endswith(b"}"):
                    got += sock.recv(262144)
                counts.update(part[:3] for part in got.split(b"HTTP/1.1 ")[1:])

    thread = threading.Thread(target=flood)
    thread.start()
    took: list[float] = []
    try:
        with Client(bank.gateway.port) as client:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                began = time.monotonic()
                assert client.ask(modest.request(CHATS.path, CHAT)).status == 200
                took.append(time.monotonic() - began)
    finally:
        over.set()
        thread.join(10)
    took.sort()
    print(f"{dict(counts)} for the one; the other: p50 {took[len(took) // 2] * 1e3:.1f} ms of {len(took)}")
    assert counts[b"200"] == 10 and counts[b"429"] > 100 and set(counts) == {b"200", b"429"}
    assert took[len(took) * 9 // 10] < 0.25, took[-5:]


# Requests that were read, and then met a reset.


@pytest.mark.parametrize("after", [0.015, 0.03])
def test_a_post_that_was_read_and_then_reset_is_never_sent_twice(bank: Bank, after: float) -> None:
    """Its kernel puts the acknowledgement off by 40 ms: that it is not there does not mean that nobody has read it."""

    def resets(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            _, body = read_request(connection)
            if b"drop" in body:
                met.append(body)
                time.sleep(after)
                raw.reset(connection)
                return
            connection.sendall(json_reply(b'{"choices":[]}'))

    met: list[bytes] = []
    with listening(resets) as port:
        gateway = bank.loop.gateway(bank.config.replace(bank.upstream.url, f"http://127.0.0.1:{port}"))
        with Client(gateway.port) as client:
            for number in range(5):
                for _ in range(10):  # a conversation, in which acknowledgements ride on answers
                    assert client.ask(raw.request(CHATS.path, CHAT)).status == 200
                assert client.ask(raw.request(CHATS.path, {**CHAT, "user": f"drop{number}"})).status == 502
    assert len(met) == 5, "sent twice"


# The sums of a bad day.

SHAPES = ("whole", "whole", "stream", "stream", "slow", "late", "cut", "reset", "refused", "mute end", "behind usage")


class Day:
    """Requests of which each has a number that its upstream tells as its output tokens, so that a row says whose it is.

    told   numbers of requests whose usage was sent to the gateway in full
    seen   numbers of all requests that reached the upstream
    left   numbers of requests whose client did not wait for the answer
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.told: Counter[int] = Counter()
        self.seen: Counter[int] = Counter()
        self.left: set[int] = set()
        bank.script = self.answer

    def answer(self, got: Got) -> Script:
        shape, _, number = json.loads(got.body)["user"].partition("/")
        tokens = int(number)
        self.seen[tokens] += 1
        usage = {"prompt_tokens": 100, "completion_tokens": tokens}
        events = [delta("h", usage=None), delta("i", usage=None), last_usage(usage), event("[DONE]")]
        scripts: dict[str, Script] = {
            "whole": [json_reply(json.dumps({"choices": [{"message": {"content": "hi"}}], "usage": usage}).encode())],
            "stream": streamed(events),
            "slow": [EVENT_STREAM, *(step for one in events for step in (chunk(one), Pause(0.01))), LAST_CHUNK],
            "late": [Pause(0.05), *streamed(events)],
            "cut": [EVENT_STREAM, *map(chunk, events[:2]), Fin()],
            "reset": [Pause(0.1), Reset()],
            "refused": [json_reply(b'{"error":{"message":"busy"}}', status=b"529 Overloaded")],
            "mute end": [Pause(0.02), Fin()],
            "behind usage": [EVENT_STREAM, *map(chunk, events[:3]), Pause(0.1), Fin()],
        }
        if shape in ("whole", "stream", "slow", "late", "behind usage"):
            self.told[tokens] += 1
        return scripts[shape]

    def talk(self, who: Holder, numbers: Iterator[int], seed: int) -> None:
        """One client of several; now and then it leaves before the end."""
        chance = random.Random(seed)
        client = Client(self.bank.gateway.port)
        for number in numbers:
            shape = chance.choice(SHAPES)
            streams = shape not in ("whole", "refused", "mute end")
            body = {**CHAT, "stream": streams, "user": f"{shape}/{number}"}
            client.sock.sendall(who.request(CHATS.path, body))
            if chance.random() < 0.25:
                self.left.add(number)
                time.sleep(chance.choice((0.0, 0.005, 0.03)))
                (raw.reset(client.sock) if chance.random() < 0.5 else client.sock.close())
                client = Client(self.bank.gateway.port)
                continue
            reply = raw.read(client.sock)
            if reply.ended != "open" or reply.header("connection") == "close":
                client.sock.close()
                client = Client(self.bank.gateway.port)
        client.sock.close()


def test_what_the_vendor_has_told_and_what_is_booked_are_the_same_rows_after_a_bad_day(loop: Loop) -> None:
    """Clients leave, upstreams break off, the database is locked, the configuration is read again, all at once."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    bank = Bank(loop, on_disconnect="drain", more="breaker: {failures: 1000000, open_for: 1s}\n")
    day = Day(bank)
    who = bank.user(10**12)
    threads = [
        threading.Thread(target=day.talk, args=(who, iter(range(1000 * turn + 1, 1000 * turn + 91)), seed + turn))
        for turn in range(8)
    ]
    for thread in threads:
        thread.start()
    locked = sqlite3.connect(bank.gateway.folder / "state.db", isolation_level=None, timeout=5)
    for _ in range(3):
        time.sleep(0.3)
        locked.execute("BEGIN IMMEDIATE")
        time.sleep(0.2)
        locked.execute("ROLLBACK")
        bank.admin("POST", "/admin/reload")
    locked.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    bank.settle()
    ledger = bank.gateway.daemon.state.ledger
    assert ledger is not None
    until(lambda: not ledger.queued)
    rows = bank.admin("GET", f"/admin/usage?user={who.name}&limit=1000")["data"]
    assert len(rows) == len({row["id"] for row in rows}) == len({row["request_id"] for row in rows})
    measured = [row for row in rows if row["provenance"] == "measured"]
    heard = Counter(row["output_tokens"] for row in measured)
    assert not heard - day.told, (seed, heard - day.told)
    # Who leaves while the request is still going up takes it along: such a one is estimated.
    unheard = day.told - heard
    assert unheard.total() <= 3 and unheard.keys() <= day.left, (seed, unheard)
    for row in measured:
        assert row["cost_nanousd"] == 100 * INPUT + row["output_tokens"] * OUTPUT
    # The rest: broken off before its usage, refused, or gone before it reached the upstream.
    others = Counter(row["provenance"] for row in rows if row["provenance"] != "measured")
    assert max(day.seen.values()) == 1, "sent twice"
    assert others.total() >= day.seen.total() - day.told.total()
    assert set(others) <= {"estimated", "partial", "absent"}
    assert {row["cost_nanousd"] for row in rows if row["provenance"] == "absent"} <= {0}
    assert who.spent == sum(row["cost_nanousd"] for row in rows)
    (total,) = [row for row in bank.admin("GET", "/admin/usage?group_by=user")["data"] if row["key"] == who.name]
    assert total["requests"] == len(rows)
    assert not [line for line in bank.gateway.log() if line["event"] == "bug"]
