"""The short way of an agent: it is as short, and what fails there goes on along the long one."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gproxyd.gateway import lane
from tests.support import raw
from tests.support.running import CLIENT_KEY, Loop, until
from tests.test_failover import CASES, TABLE, Field, _heal, text_of


@pytest.fixture(scope="module")
def field(loop: Loop) -> Field:
    return Field.make(loop)


class Client:
    def __init__(self, field: Field) -> None:
        self.field = field
        self.sock = raw.connect(field.gateway.port)

    def ask(self, model: str, *, stream: bool) -> raw.Reply:
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        if stream:
            body["stream"] = True
        self.sock.sendall(raw.request("/v1/chat/completions", orjson.dumps(body), key=CLIENT_KEY))
        return raw.read(self.sock)


@pytest.mark.parametrize(("fault", "stream"), CASES)
@pytest.mark.parametrize("all_fail", [False, True])
def test_what_fails_on_the_short_way_goes_on_along_the_long_one(
    field: Field, fault: str, stream: bool, all_fail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    field.loop.run(_heal(field.gateway.daemon.gateway.exchanges.registry))
    flights: list[object] = []
    depart = lane.Flight.depart
    monkeypatch.setattr(lane.Flight, "depart", lambda self, body: (flights.append(1), depart(self, body))[1])
    field.scripts.update(dict.fromkeys("abc", "well"))
    client = Client(field)
    with client.sock:
        for _ in range(3):
            assert text_of(client.ask("team", stream=stream), stream=stream) == "from a"
            idle = field.gateway.daemon.gateway.exchanges.pool._idle
            port = field.upstreams["a"].port
            until(lambda idle=idle, port=port: any(there for (origin, _), there in idle.items() if origin.port == port))
        assert flights
        flights.clear()
        field.tried()
        field.scripts.update(dict.fromkeys("abc" if all_fail else "a", fault))
        reply = client.ask("team", stream=stream)
        assert flights == [1]
        again = (
            "a" if fault == "reset" else ""
        )  # on a connection that was used before, nobody can tell whether it was read
        if all_fail:
            assert (reply.status, reply.complete) == (TABLE[fault][0], True), reply.data
            assert field.tried() in ("abc", again + "abc") and reply.header("x-gproxyd-attempts") == "3"
        else:
            assert (reply.status, text_of(reply, stream=stream)) == (200, "from b")
            assert field.tried() in ("ab", again + "ab") and reply.header("x-gproxyd-attempts") == "2"
    until(lambda: field.gateway.daemon.gateway.books.limiter.running() == 0 and field.gateway.at_rest())


def test_plain_failures_on_the_short_way_open_the_breaker(loop: Loop) -> None:
    field = Field.make(loop, failures=4, open_for="20s")
    client = Client(field)
    with client.sock:
        for _ in range(3):
            assert client.ask("a/m", stream=False).status == 200
        field.scripts["a"] = "500"
        assert [client.ask("a/m", stream=False).status for _ in range(5)] == [500] * 4 + [503]
