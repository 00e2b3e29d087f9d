"""A gateway where requests cost money, before an upstream that says what a test wants it to say.

A `Bank` is both, with an administrator's key; its users are made through the admin API. The fixtures belong to the
modules that import them and name them in their `__all__`: `shared` and `bank`, `quick_ledger`, `short`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from gproxyd import daemon
from gproxyd.daemon import Daemon, Places
from gproxyd.gateway.lane import Flight
from gproxyd.observe.journal import Journal
from gproxyd.policy.quotas import Quotas
from gproxyd.store import ledger
from gproxyd.units import format_usd, parse_usd
from tests.support import raw
from tests.support.dialects import CHAT, PRICE
from tests.support.raw import Reply
from tests.support.running import Loop, Running, until
from tests.support.upstream import Got, Script, Upstream

CONFIG = (
    """\
server: {{listen: ["127.0.0.1:0"]}}
streams: {{keepalive: 0s}}
routing: {{on_disconnect: {on_disconnect}}}
providers:
  oai:
    vendor: openai
    base_url: "{url}"
    credentials: [provider-key]
    timeouts: {{connect: 2s, first_byte: 2s, idle: 2s}}
    models:
    - {{id: m, context: 100000, max_output: 500, price: PRICE}}
    - {{id: small, context: 100, max_output: 10, price: PRICE}}
    - {{id: unpriced}}
    - id: stepped
      price: {{input: "1.00", output: "2.00", above: [{{tokens: 1000, input: "3.00", output: "5.00"}}],
        flex: {{input: "0.50", output: "1.00"}}}}
  ant:
    vendor: anthropic
    base_url: "{url}"
    credentials: [provider-key]
    timeouts: {{connect: 2s, first_byte: 2s, idle: 2s}}
    models: [{{id: m, max_output: 500, price: PRICE}}]
  gem:
    vendor: gemini
    base_url: "{url}"
    credentials: [provider-key]
    timeouts: {{connect: 2s, first_byte: 2s, idle: 2s}}
    models: [{{id: m, max_output: 500, price: PRICE}}]
  nowhere: {{vendor: openai, base_url: "http://127.0.0.1:1", credentials: [provider-key],
    models: [{{id: m, price: PRICE}}]}}
aliases:
  plain: oai/m
  dear: {{target: oai/m, price: {{input: "10.00", output: "20.00"}}}}
  foreign: {{target: ant/m, price: {{input: "70.00", output: "70.00"}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""
).replace("PRICE", PRICE)

Json = Any


@pytest.fixture(scope="module", autouse=True)
def quick_ledger() -> Iterator[None]:
    """Records are moved into the database as they come: a test that waits for one would wait for the gathering."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "GATHER", 0.005)
        yield


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of requests that went the short way."""
    seen: list[str] = []
    depart = Flight.depart

    def noted(flight: Flight, body: bytes) -> None:
        seen.append(flight.call.id)
        depart(flight, body)

    monkeypatch.setattr(Flight, "depart", noted)
    return seen


class Client:
    """One connection of a client that keeps it."""

    def __init__(self, port: int) -> None:
        self.sock = raw.connect(port)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, data: bytes) -> Reply:
        self.sock.sendall(data)
        return raw.read(self.sock)


@dataclass
class Holder:
    """Somebody who may call, with one key."""

    bank: Bank
    name: str
    token: str
    key: str = "k"

    def request(self, path: str, body: Json, **more: Any) -> bytes:
        return raw.request(path, body, key=self.token, **more)

    def ask(self, path: str, body: Json) -> Reply:
        with Client(self.bank.gateway.port) as client:
            return client.ask(self.request(path, body))

    def chat(self, **more: Any) -> Reply:
        return self.ask("/v1/chat/completions", {**CHAT, **more})

    def records(self, count: int) -> list[Json]:
        """The records of this user, oldest first, as soon as there are so many; there must not be more."""
        path = f"/admin/usage?user={self.name}&limit=1000"
        found: list[Json] = until(
            lambda: rows if len(rows := self.bank.admin("GET", path)["data"]) >= count else None, 3
        )
        assert len(found) == count, found
        return found[::-1]

    def quota(self) -> Json:
        return self.bank.admin("GET", f"/admin/users/{self.name}/quota")

    @property
    def spent(self) -> int:
        """Nano-dollars."""
        return parse_usd(self.quota()["spent_usd"])

    def settled(self, count: int) -> list[Json]:
        """The records, once everything is at rest; what they cost is what was spent."""
        records = self.records(count)
        self.bank.settle()
        assert len({record["id"] for record in records}) == count
        assert self.spent == sum(record["cost_nanousd"] or 0 for record in records)
        return records


class Bank:
    """A gateway, an upstream that answers what `script` says, and an administrator's key."""

    def __init__(self, loop: Loop, *, on_disconnect: str = "cancel", more: str = "") -> None:
        self.loop = loop
        self.script: Script | Callable[[Got], Script] = []
        self.upstream = Upstream(loop, lambda got: self.script(got) if callable(self.script) else self.script).start()
        self.config = CONFIG.format(url=self.upstream.url, on_disconnect=on_disconnect) + more
        self.gateway = loop.gateway(self.config)
        self._count = 0

    @property
    def quotas(self) -> Quotas:
        return self.gateway.daemon.gateway.books.quotas

    def admin(self, method: str, path: str, body: Json = None, status: int = 0) -> Json:
        data = raw.request(path, body, method=method)
        reply = raw.send(self.gateway.port, data)
        assert reply.status == status if status else reply.status < 300, reply.data
        return reply.json

    def user(
        self, usd: int | None = None, *, period: str | None = None, limits: Sequence[Json] = (), **key: Any
    ) -> Holder:
        """Somebody new with `usd` nano-dollars (None: any number), made through the admin API."""
        self._count += 1
        name = f"user{self._count}"
        quota = None if usd is None else {"usd": format_usd(usd), "period": period}
        made = {"name": name, "permissions": ["*"], "quota": quota, "rate_limits": list(limits)}
        told = self.admin("POST", "/admin/users", {**made, "keys": [{"name": "k", **key}]}, 201)
        return Holder(self, name, told["keys"][0]["token"])

    def settle(self) -> None:
        """Waits until nothing runs; then nothing may be held."""
        until(self.gateway.at_rest)
        books = self.gateway.daemon.gateway.books
        until(lambda: not books.quotas.held() and not books.limiter.running(), 1)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a family's values with these labels."""
        text = raw.send(self.gateway.port, raw.request("/metrics", key=None)).body.decode()
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in wanted))

    def restart(self) -> None:
        """The same daemon again, after a regular end, on what it left behind."""
        self.gateway.stop()
        self.gateway = start_again(self.loop, self.gateway)


def start_again(loop: Loop, old: Running) -> Running:
    """Another daemon on the state, the configuration and the secrets of one that has ended."""
    environ = {"GPROXYD_SECRETS_DIR": str(old.folder / "secrets")}
    snapshot = daemon.load(old.folder / "gproxyd.yaml", environ)
    journal = Journal(level="debug", form="json", descriptor=old._journal._descriptor)

    async def start() -> Daemon:
        places = Places(old.folder / "state.db", old.folder, old.folder / "gproxyd.yaml", environ)
        started = Daemon(snapshot, journal, asyncio.get_running_loop(), places)
        await started.start()
        return started

    running = Running(loop, loop.run(start()), old.log_path, journal, old.folder)
    loop.at_end(running.stop)
    return running


@pytest.fixture(scope="module")
def shared(loop: Loop) -> Bank:
    return Bank(loop)


@pytest.fixture
def bank(shared: Bank) -> Bank:
    shared.script = []
    return shared


TIMES = {"id", "request_id", "at", "ttft_ms", "duration_ms"}
"""What differs from one record to the next of equal requests."""


PAUSE = 0.003
"""Seconds after which a connection's task sleeps again: the short way is for requests that come later than that."""


def ask_often(who: Holder, path: str, body: Json, times: int = 4) -> list[Reply]:
    """The same request several times over one connection, each after the other's answer."""
    replies = []
    with Client(who.bank.gateway.port) as client:
        for _ in range(times):
            time.sleep(PAUSE)
            replies.append(client.ask(who.request(path, body)))
    return replies


def alike(records: Sequence[Json]) -> Json:
    """What equal requests have in common: everything but times and ids."""
    plain = [{name: value for name, value in record.items() if name not in TIMES} for record in records]
    assert all(record == plain[0] for record in plain), plain
    return plain[0]
