"""Requests, departures, failures, changes and reloads in any order: at rest nothing is held and all sums agree.

A state machine makes users, sends requests on either way that end well or badly, leaves some of them under way, gives
and takes money, revokes keys, reads the configuration again and starts the daemon anew. Whenever everything is at
rest: no money and no place is held; spent and remaining make up the limit; the ledger's sum is what was spent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from gproxyd.units import format_usd, parse_usd
from tests.support import raw
from tests.support.bank import PAUSE, Bank, Client, Holder, quick_ledger
from tests.support.dialects import DIALECTS, Dialect, streamed
from tests.support.running import Loop, until
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Fin, Got, Pause, Reset, Script, Stall, chunk, json_reply

__all__ = ["quick_ledger"]

Json = Any

SHAPES = ("well", "refused", "reset", "cut", "error", "dear", "nothing", "nonsense")
"""How an upstream may end a request; `stuck` ones never end."""


def answer(got: Got) -> Script:
    """What the request itself says that its answer should be."""
    shape, stream, name = orjson.loads(got.body)["shape"]
    dialect = next(one for one in DIALECTS if one.name == name)
    events = dialect.events
    if shape == "refused":
        return [json_reply(b'{"error":{"message":"no"}}', status=b"500 No")]
    if shape == "reset":
        return [Reset()]
    if shape == "nonsense":
        return [b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"]
    if shape == "nothing":
        return streamed([]) if stream else [json_reply(b"{}")]
    if shape == "error":
        return streamed([*events[:2], dialect.error]) if stream else [json_reply(dialect.error.partition(b"data: ")[2])]
    if shape == "dear":
        grown = [one.replace(b":20", b":90000").replace(b": 20", b": 90000") for one in events]
        return streamed(grown) if stream else [json_reply(orjson.dumps(dialect.whole).replace(b":20", b":90000"))]
    whole = json_reply(orjson.dumps(dialect.whole))
    begun: Script = [EVENT_STREAM, *map(chunk, events[:2])] if stream else [whole[:-5]]
    if shape == "stuck":
        return [*begun, Stall()]
    if shape == "mute":
        return [Stall()]
    if shape == "slow":
        return [*begun, Pause(0.03), *(map(chunk, events[2:]) if stream else [whole[-5:]]), *([LAST_CHUNK] * stream)]
    if shape == "cut":
        return [*begun, Fin()]
    return streamed(events) if stream else [whole]


@dataclass
class Known:
    """A user as the machine knows them."""

    holder: Holder
    limit: int | None
    credit: int = 0
    revoked: bool = False
    clients: list[Client] = field(default_factory=list)


class Accounts(RuleBasedStateMachine):
    """`bank` is set by the test."""

    bank: Bank

    def __init__(self) -> None:
        super().__init__()
        self.bank.script = answer
        self.users: list[Known] = []
        self.away: list[Client] = []
        self.restarts = 0
        self.meet(10**8, None, 0, 0)

    # People and their money.

    @rule(
        usd=st.sampled_from([None, 0, 10**5, 10**6, 10**8]),
        period=st.sampled_from([None, "day", "month"]),
        rpm=st.sampled_from([0, 0, 3]),
        concurrency=st.sampled_from([0, 1]),
    )
    def meet(self, usd: int | None, period: str | None, rpm: int, concurrency: int) -> None:
        limit = {"model": "*", "rpm": rpm, "concurrency": concurrency, "tpm": 50 * rpm}
        limits = [limit] if rpm or concurrency else []
        self.users.append(Known(self.bank.user(usd, period=period if usd is not None else None, limits=limits), usd))

    @rule(who=st.integers(0, 9), usd=st.sampled_from([1, 10**5, 10**7]))
    def top_up(self, who: int, usd: int) -> None:
        user = self.user(who)
        status = 200 if user.limit is not None else 409
        path = f"/admin/users/{user.holder.name}/quota/top-up"
        self.bank.admin("POST", path, {"usd": format_usd(usd)}, status)  # no quota, nothing to add to
        if user.limit is not None:
            user.credit += usd

    @rule(who=st.integers(0, 9), usd=st.sampled_from([0, 10**6, 10**8]), period=st.sampled_from([None, "day", "month"]))
    def allow(self, who: int, usd: int, period: str | None) -> None:
        user = self.user(who)
        path = f"/admin/users/{user.holder.name}/quota"
        self.bank.admin("PUT", path, {"usd": format_usd(usd), "period": period})
        user.limit = usd

    @rule(who=st.integers(0, 9))
    def renew_key(self, who: int) -> None:
        holder = self.user(who).holder
        path = f"/admin/users/{holder.name}/keys"
        self.bank.admin("DELETE", f"{path}/k")
        assert holder.chat(shape=["well", False, "chat"]).status == 401
        holder.token = self.bank.admin("POST", path, {"name": "k"}, 201)["token"]

    # Requests.

    @rule(
        who=st.integers(0, 9),
        dialect=st.sampled_from(DIALECTS),
        stream=st.booleans(),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    )
    def ask(self, who: int, dialect: Dialect, stream: bool, shapes: list[str]) -> None:
        """One after the other over a connection, as long as it lasts."""
        holder = self.user(who).holder
        with Client(self.bank.gateway.port) as client:
            for shape in shapes:
                time.sleep(PAUSE)
                reply = client.ask(self.request(holder, dialect, shape, stream=stream))
                assert reply.status in (200, 402, 429, 500, 502), reply.data
                if reply.ended != "open":
                    return

    @rule(who=st.integers(0, 9), dialect=st.sampled_from(DIALECTS), stream=st.booleans(), count=st.integers(2, 8))
    def ask_at_once(self, who: int, dialect: Dialect, stream: bool, count: int) -> None:
        holder = self.user(who).holder
        clients = [Client(self.bank.gateway.port) for _ in range(count)]
        time.sleep(PAUSE)
        for client in clients:
            client.sock.sendall(self.request(holder, dialect, "well", stream=stream))
        for client in clients:
            assert raw.read(client.sock).status in (200, 402, 429)
            client.sock.close()

    @rule(
        who=st.integers(0, 9),
        dialect=st.sampled_from(DIALECTS),
        stream=st.booleans(),
        shape=st.sampled_from(["stuck", "mute", "slow"]),
    )
    def begin(self, who: int, dialect: Dialect, stream: bool, shape: str) -> None:
        """A request that stays under way, perhaps."""
        client = Client(self.bank.gateway.port)
        time.sleep(PAUSE)
        client.sock.sendall(self.request(self.user(who).holder, dialect, shape, stream=stream))
        self.away.append(client)

    @precondition(lambda self: self.away)
    @rule(which=st.integers(0, 9), reset=st.booleans(), wait=st.sampled_from([0, 0.001, 0.02]))
    def leave(self, which: int, reset: bool, wait: float) -> None:
        client = self.away.pop(which % len(self.away))
        time.sleep(wait)
        if reset:
            raw.reset(client.sock)
        client.sock.close()

    # The daemon.

    @rule()
    def reload(self) -> None:
        self.bank.admin("POST", "/admin/reload")

    @precondition(lambda self: self.restarts < 1)
    @rule()
    def restart(self) -> None:
        self.restarts += 1
        self.bank.restart()

    @rule()
    def rest(self) -> None:
        """Everybody leaves; then all sums must agree."""
        for client in self.away:
            client.sock.close()
        self.away.clear()
        until(self.agree)
        self.bank.settle()
        for user in self.users:
            told = user.holder.quota()
            assert told["usd"] == (None if user.limit is None else format_usd(user.limit))
            if user.limit is not None:
                assert parse_usd(told["credit_usd"]) == user.credit
                assert user.limit + user.credit == parse_usd(told["spent_usd"]) + signed(told["remaining_usd"])

    def agree(self) -> bool:
        """Whether everybody has spent what the ledger says. Not at once: who has left may not be noticed yet."""
        daemon = self.bank.gateway.daemon
        ledger = daemon.state.ledger
        if daemon.gateway.in_flight or daemon.gateway.exchanges.relays or ledger is None or ledger.queued:
            return False
        rows = self.bank.admin("GET", "/admin/usage?group_by=user")["data"]
        sums = {row["key"]: parse_usd(row["cost_usd"]) for row in rows}
        return all(user.holder.spent == sums.get(user.holder.name, 0) for user in self.users)

    def teardown(self) -> None:
        self.rest()
        bugs = [line for line in self.bank.gateway.log() if line["event"] == "bug" or line["level"] == "critical"]
        assert not bugs

    # Within.

    def user(self, number: int) -> Known:
        return self.users[number % len(self.users)]

    @staticmethod
    def request(holder: Holder, dialect: Dialect, shape: str, *, stream: bool) -> bytes:
        body = {**dialect.content(stream=stream), "shape": [shape, stream, dialect.name]}
        return holder.request(dialect.target(stream=stream), body)


def signed(usd: str) -> int:
    return -parse_usd(usd[1:]) if usd.startswith("-") else parse_usd(usd)


@pytest.fixture(params=["cancel", "drain"])
def bank(loop: Loop, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bank:
    monkeypatch.setattr("gproxyd.gateway.relay.DRAIN_FOR", 0.2)
    if (left := 86400 - time.time() % 86400) < 60:
        time.sleep(left + 1)  # the records of a day would be those of two
    return Bank(loop, on_disconnect=request.param)


def test_at_rest_nothing_is_held_and_all_sums_agree(bank: Bank) -> None:
    machine = type("Accounts", (Accounts,), {"bank": bank})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
