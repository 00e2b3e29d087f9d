"""What is booked of answers that nobody, or no upstream, ended: clients that leave, upstreams that break off.

With `routing.on_disconnect: cancel` the upstream's work ends with its client, and what was told or seen until then is
booked; with `drain` the upstream is heard to its end for the bill's sake, within bounds.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gproxyd.gateway import exchange, relay
from tests.support import raw
from tests.support.bank import PAUSE, Bank, Client, Holder, quick_ledger, short
from tests.support.dialects import CACHED, CHAT, CHATS, COST, INPUT, MESSAGES, RESPONSES, Dialect, every_dialect
from tests.support.running import Loop, until
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Fin, Pause, Reset, Script, Stall, chunk, json_reply

__all__ = ["quick_ledger", "short"]

Json = Any
Leave = Callable[[Client], None]

whole_or_stream = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
rst_or_fin = pytest.mark.parametrize("how", [Reset(), Fin()], ids=["rst", "fin"])


@pytest.fixture(scope="module")
def cancelling(loop: Loop) -> Bank:
    return Bank(loop)


@pytest.fixture(scope="module")
def draining(loop: Loop) -> Bank:
    return Bank(loop, on_disconnect="drain")


@pytest.fixture(params=["fin", "rst"])
def leave(request: pytest.FixtureRequest) -> Leave:
    """How the client goes."""
    if request.param == "rst":
        return lambda client: raw.reset(client.sock)
    return lambda client: client.sock.close()


class Ride:
    """One request under way, on the long way or the short one (a Gemini path knows but the long one).

    `who` sends it, somebody new.
    """

    who: Holder

    def __init__(self, way: str, short: list[str]) -> None:
        self._way = way
        self._short = short
        self._clients: list[Client] = []

    def begin(self, bank: Bank, dialect: Dialect, script: Script, *, stream: bool) -> Client:
        """Sends it and waits until the upstream has it, which then does what the script says."""
        self.who, self._dialect = bank.user(10**9), dialect
        data = self.who.request(dialect.target(stream=stream), dialect.content(stream=stream))
        client = Client(bank.gateway.port)
        self._clients.append(client)
        if self._way == "short":
            bank.script = dialect.script(stream=stream)
            assert client.ask(data).status == 200
            time.sleep(2 * PAUSE)
        seen = len(bank.upstream.requests)
        bank.script = script
        client.sock.sendall(data)
        until(lambda: len(bank.upstream.requests) > seen)
        return client

    def record(self) -> Json:
        """What is booked of it, once it is at rest."""
        record = self.who.settled(2 if self._way == "short" else 1)[-1]
        assert (record["id"] in self._short) is (self._way == "short" and self._dialect.cheap)
        return record

    def close(self) -> None:
        for client in self._clients:
            client.sock.close()


@pytest.fixture(params=["long", "short"])
def ride(request: pytest.FixtureRequest, short: list[str]) -> Iterator[Ride]:
    made = Ride(request.param, short)
    yield made
    made.close()


def read_until(client: Client, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        piece = client.sock.recv(65536)
        assert piece, data
        data += piece
    return data


AMID = {"chat": b'"i"', "responses": b'"h"', "messages": b'"h"', "generate": b'"i"'}
"""What the second event of a dialect's stream bears and the first does not."""

LAST = {"chat": b"[DONE]", "responses": b'"total_tokens":120', "messages": b'"message_stop"}', "generate": b'"STOP"'}


def holding(bank: Bank) -> bool:
    """Whether the first bytes of a whole answer are here."""
    return any(one._held for one in bank.gateway.daemon.gateway.exchanges.relays)


# The client leaves, and with it the upstream's work.


@every_dialect
def test_a_stream_whose_client_leaves_is_booked_as_far_as_it_came(
    cancelling: Bank, dialect: Dialect, ride: Ride, leave: Leave
) -> None:
    script: Script = [EVENT_STREAM, *map(chunk, dialect.events[:2]), Stall()]
    client = ride.begin(cancelling, dialect, script, stream=True)
    read_until(client, AMID[dialect.name])
    leave(client)
    record = ride.record()
    told = dialect not in (CHATS, RESPONSES)
    assert record["provenance"] == ("partial" if told else "estimated")
    assert (record["client_gone"], record["stream"], record["status"]) == (True, True, 200)
    assert record["output_tokens"] == 2 and record["cost_nanousd"] > 0
    if told:
        assert record["cost_nanousd"] >= 60 * INPUT + 40 * CACHED


@every_dialect
@whole_or_stream
def test_a_client_that_leaves_before_the_answer_is_booked_what_was_asked(
    cancelling: Bank, dialect: Dialect, ride: Ride, leave: Leave, stream: bool
) -> None:
    client = ride.begin(cancelling, dialect, [Stall()], stream=stream)
    leave(client)
    record = ride.record()
    assert (record["provenance"], record["client_gone"], record["status"]) == ("estimated", True, 499)
    assert record["input_tokens"] > 0 and record["output_tokens"] == 0 and record["cost_nanousd"] > 0


@every_dialect
def test_a_client_that_leaves_amid_a_whole_answer_is_booked_too(
    cancelling: Bank, dialect: Dialect, ride: Ride, leave: Leave
) -> None:
    whole = json_reply(json.dumps(dialect.whole).encode())
    client = ride.begin(cancelling, dialect, [whole[:-10], Stall()], stream=False)
    until(lambda: holding(cancelling))
    leave(client)
    record = ride.record()
    assert (record["provenance"], record["client_gone"]) == ("estimated", True)
    assert record["cost_nanousd"] > 0


def test_a_client_that_leaves_an_upstreams_refusal_pays_nothing(cancelling: Bank, ride: Ride, leave: Leave) -> None:
    refusal = json_reply(b'{"error":{"message":"no"}}', status=b"429 No")
    client = ride.begin(cancelling, CHATS, [refusal[:-3], Stall()], stream=False)
    relays = cancelling.gateway.daemon.gateway.exchanges.relays
    until(lambda: any(one._head is not None for one in relays))
    leave(client)
    record = ride.record()
    assert (record["cost_nanousd"], record["client_gone"]) == (0, True)


@every_dialect
def test_a_client_that_has_read_the_last_event_and_leaves_is_measured(
    cancelling: Bank, dialect: Dialect, ride: Ride
) -> None:
    """Vendors' SDKs end the connection at [DONE], before the last chunk."""
    script: Script = [EVENT_STREAM, *map(chunk, dialect.events), Stall()]
    client = ride.begin(cancelling, dialect, script, stream=True)
    read_until(client, LAST[dialect.name])
    client.sock.close()
    record = ride.record()
    assert (record["provenance"], record["cost_nanousd"]) == ("measured", COST)


# The upstream breaks off.


@every_dialect
@rst_or_fin
def test_an_upstream_that_breaks_off_amid_a_stream_is_booked_once_as_partial(
    cancelling: Bank, dialect: Dialect, ride: Ride, how: Any
) -> None:
    script: Script = [EVENT_STREAM, *map(chunk, dialect.events[:2]), how]
    with ride.begin(cancelling, dialect, script, stream=True) as client:
        reply = raw.read(client.sock, until_complete=False)
    assert AMID[dialect.name] in reply.body and not reply.complete
    record = ride.record()
    told = dialect not in (CHATS, RESPONSES)
    assert record["provenance"] == ("partial" if told else "estimated")
    assert (record["client_gone"], record["status"]) == (False, 200)
    assert record["cost_nanousd"] > 0


def test_an_upstream_that_breaks_off_behind_its_usage_is_booked_what_it_told(cancelling: Bank, ride: Ride) -> None:
    script: Script = [EVENT_STREAM, *map(chunk, CHATS.events[:3]), Reset()]
    with ride.begin(cancelling, CHATS, script, stream=True) as client:
        assert not raw.read(client.sock, until_complete=False).complete
    record = ride.record()
    assert (record["cost_nanousd"], record["provenance"]) == (COST, "measured")


@pytest.mark.parametrize("turn", range(30))
def test_a_client_and_an_upstream_that_leave_at_once_are_booked_once(cancelling: Bank, ride: Ride, turn: int) -> None:
    gone = threading.Event()
    script: Script = [EVENT_STREAM, *map(chunk, CHATS.events[:2]), Pause(0.004), Reset() if turn % 2 else LAST_CHUNK]
    client = ride.begin(cancelling, CHATS, script, stream=True)
    read_until(client, AMID["chat"])
    gone.wait(0.0002 * turn)
    client.sock.close()
    record = ride.record()
    assert record["cost_nanousd"] > 0


# The upstream is heard to its end.


@every_dialect
@whole_or_stream
def test_an_answer_is_heard_to_its_end_and_measured(
    draining: Bank, dialect: Dialect, ride: Ride, leave: Leave, stream: bool
) -> None:
    if stream:
        script: Script = [EVENT_STREAM, *map(chunk, dialect.events[:2]), Pause(0.1)]
        script += [*map(chunk, dialect.events[2:]), LAST_CHUNK]
    else:
        whole = json_reply(json.dumps(dialect.whole).encode())
        script = [whole[:-10], Pause(0.1), whole[-10:]]
    before = draining.upstream.connections
    client = ride.begin(draining, dialect, script, stream=stream)
    if stream:
        read_until(client, AMID[dialect.name])
    else:
        until(lambda: holding(draining))
    leave(client)
    record = ride.record()
    assert (record["provenance"], record["client_gone"], record["status"]) == ("measured", True, 200)
    assert record["cost_nanousd"] == COST
    # The upstream's connection serves the next one.
    opened = draining.upstream.connections
    draining.script = dialect.script(stream=stream)
    assert ride.who.ask(dialect.target(stream=stream), dialect.content(stream=stream)).status == 200
    assert draining.upstream.connections == opened <= before + 1


@every_dialect
def test_an_answer_whose_client_left_before_its_head_is_heard_and_measured(
    draining: Bank, dialect: Dialect, ride: Ride
) -> None:
    script: Script = [Pause(0.1), *dialect.script(stream=True)]
    client = ride.begin(draining, dialect, script, stream=True)
    client.sock.close()
    record = ride.record()
    assert (record["provenance"], record["client_gone"], record["cost_nanousd"]) == ("measured", True, COST)


def test_an_answer_larger_than_a_connection_holds_is_heard_to_its_end(draining: Bank, ride: Ride) -> None:
    """The client takes nothing, so the upstream is not read; when it has left, the upstream is."""
    long = [CHATS.events[0]] * 40_000
    script: Script = [EVENT_STREAM, chunk(b"".join(long)), *map(chunk, CHATS.events[2:]), LAST_CHUNK]
    client = ride.begin(draining, CHATS, script, stream=True)
    until(lambda: any(one._paused for one in draining.gateway.daemon.gateway.exchanges.relays))
    raw.reset(client.sock)
    record = ride.record()
    assert (record["provenance"], record["client_gone"], record["cost_nanousd"]) == ("measured", True, COST)


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int | float], None]]:
    def bound(name: str, value: float) -> None:
        monkeypatch.setattr(exchange if hasattr(exchange, name) else relay, name, value)

    return bound


FLOOD = [chunk(CHATS.events[0] * 500)] * 40


@pytest.mark.parametrize(
    ("bound", "value", "rest"),
    [
        ("DRAIN_FOR", 0.2, [Stall()]),
        ("DRAIN_MOST", 100_000, [*FLOOD, Stall()]),
        ("MOST_DRAINING", 0, [Pause(0.1), *map(chunk, CHATS.events[2:]), LAST_CHUNK]),
    ],
    ids=["time", "bytes", "number"],
)
def test_beyond_the_bounds_the_upstreams_work_ends_and_is_estimated(
    draining: Bank,
    ride: Ride,
    bounded: Callable[[str, float], None],
    bound: str,
    value: float,
    rest: Script,
) -> None:
    bounded(bound, value)
    draining.upstream.peer_left.clear()
    client = ride.begin(draining, CHATS, [EVENT_STREAM, *map(chunk, CHATS.events[:2]), *rest], stream=True)
    read_until(client, AMID["chat"])
    client.sock.close()
    assert draining.upstream.peer_left.wait(3)
    record = ride.record()
    assert (record["provenance"], record["client_gone"]) == ("estimated", True)
    assert record["cost_nanousd"] > 0
    assert draining.gateway.request(record["request_id"])["bytes_out"] > 0  # what the client had got till then


@whole_or_stream
def test_an_upstream_that_says_nothing_to_nobody_is_given_up_and_estimated(
    draining: Bank, ride: Ride, bounded: Callable[[str, float], None], stream: bool
) -> None:
    bounded("DRAIN_FOR", 0.2)
    client = ride.begin(draining, CHATS, [Stall()], stream=stream)
    client.sock.close()
    record = ride.record()
    assert (record["provenance"], record["client_gone"]) == ("estimated", True)
    assert record["cost_nanousd"] > 0


@every_dialect
@rst_or_fin
def test_an_upstream_that_breaks_off_while_nobody_listens_is_booked_once(
    draining: Bank, dialect: Dialect, ride: Ride, how: Any
) -> None:
    script: Script = [EVENT_STREAM, *map(chunk, dialect.events[:2]), Pause(0.05), how]
    client = ride.begin(draining, dialect, script, stream=True)
    read_until(client, AMID[dialect.name])
    client.sock.close()
    record = ride.record()
    assert record["provenance"] == ("partial" if dialect not in (CHATS, RESPONSES) else "estimated")
    assert record["client_gone"] and record["cost_nanousd"] > 0


def test_a_refusal_that_nobody_hears_costs_nothing(draining: Bank, ride: Ride) -> None:
    script: Script = [Pause(0.1), json_reply(b'{"error":{}}', status=b"500 No")]
    client = ride.begin(draining, CHATS, script, stream=False)
    client.sock.close()
    record = ride.record()
    assert (record["cost_nanousd"], record["client_gone"], record["status"]) == (0, True, 500)


def test_what_is_heard_for_nobody_still_counts_as_held(draining: Bank, short: list[str]) -> None:
    """A client that leaves again and again gets no more than its quota that way."""
    who = draining.user(10**6, limits=[{"model": "*", "concurrency": 2}])
    draining.script = [Pause(0.3), *CHATS.script(stream=True)]
    data = who.request("/v1/chat/completions", {**CHAT, "stream": True})
    seen = len(draining.upstream.requests)
    clients = [Client(draining.gateway.port) for _ in range(2)]
    for client in clients:
        client.sock.sendall(data)
    until(lambda: len(draining.upstream.requests) == seen + 2)
    for client in clients:
        client.sock.close()
    until(lambda: not draining.gateway.daemon.gateway.in_flight)
    assert draining.quotas.held() > 0
    assert who.chat().status == 429
    assert [record["cost_nanousd"] for record in sorted(who.settled(3), key=lambda one: one["status"])] == [
        COST,
        COST,
        0,
    ]


def test_an_end_of_the_daemon_books_what_is_heard_for_nobody(loop: Loop) -> None:
    bank = Bank(loop, on_disconnect="drain")
    who = bank.user(10**9)
    bank.script = [EVENT_STREAM, *map(chunk, MESSAGES.events[:2]), Stall()]
    client = Client(bank.gateway.port)
    client.sock.sendall(who.request(MESSAGES.target(stream=True), MESSAGES.content(stream=True)))
    read_until(client, AMID["messages"])
    client.sock.close()
    until(lambda: not bank.gateway.daemon.gateway.in_flight)
    assert bank.quotas.held() > 0
    bank.upstream.peer_left.clear()
    bank.restart()
    assert bank.upstream.peer_left.wait(1)
    (record,) = who.settled(1)
    assert (record["provenance"], record["client_gone"]) == ("partial", True)
    assert who.spent == record["cost_nanousd"] > 0


def test_what_brings_no_tokens_is_not_heard_for_nobody(draining: Bank, short: list[str]) -> None:
    who = draining.user(10**9)
    draining.upstream.peer_left.clear()
    draining.script = [Stall()]
    with Client(draining.gateway.port) as client:
        client.sock.sendall(raw.request("/oai/v1/files/f", key=who.token))
        seen = len(draining.upstream.requests)
        until(lambda: len(draining.upstream.requests) >= seen)
        time.sleep(0.05)
    assert draining.upstream.peer_left.wait(1)
    (record,) = who.settled(1)
    assert (record["cost_nanousd"], record["client_gone"]) == (0, True)
