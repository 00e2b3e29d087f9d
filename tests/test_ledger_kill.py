"""A daemon that is killed at any moment, again and again, on one state: what a client has got in full is booked once.

The process is ended by SIGKILL while several clients are served, now and then while it starts. The next one finds what
the last has left, and then the books must agree: the clients', the ledger's rows, its totals, and the quota.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from gproxyd.units import parse_usd
from tests.support import raw
from tests.support.dialects import COST, DIALECTS, Dialect, streamed
from tests.support.process import Process
from tests.support.running import CLIENT_KEY, SECRETS, Loop
from tests.support.upstream import Got, Pause, Script, Upstream, json_reply

KILLS = 50
CLIENTS = 6
SPENDERS = ("alice", "bob")
SEED = random.randrange(2**32)

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
streams: {{keepalive: 0s}}
routing: {{on_disconnect: {on_disconnect}}}
providers:
  oai: {{vendor: openai, base_url: "{url}", credentials: [provider-key], models: [{{id: m, price: PRICE}}]}}
  ant: {{vendor: anthropic, base_url: "{url}", credentials: [provider-key], models: [{{id: m, price: PRICE}}]}}
  gem: {{vendor: gemini, base_url: "{url}", credentials: [provider-key], models: [{{id: m, price: PRICE}}]}}
users:
  tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}
  alice: {{permissions: ["*"], quota: {{usd: "1000.00"}}, keys: {{k: {{token: alice-key}}}}}}
  bob: {{permissions: ["*"], quota: {{usd: "1000.00", period: month}}, keys: {{k: {{token: bob-key}}}}}}
""".replace("PRICE", '{{input: "1.00", cache_read: "0.10", output: "2.00"}}')


def answer(got: Got) -> Script:
    """As the dialect's vendor would, in pieces that take a little while."""
    dialect = next(one for one in DIALECTS if one.path.partition(":")[0].replace("/gem", "").encode() in got.target)
    stream = b"alt=sse" in got.target or b'"stream":true' in got.body
    if not stream:
        return [json_reply(orjson.dumps(dialect.whole))]
    steps = streamed(dialect.events)
    return [steps[0], steps[1], Pause(0.002), *steps[2:]]


class Crowd:
    """Clients that ask as fast as they are answered, until the daemon is gone. `got` are whole answers, by request."""

    def __init__(self, seed: int) -> None:
        self.got: dict[str, int] = {}
        self.asked = 0
        self._seed = seed
        self._lock = threading.Lock()

    def run(self, port: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._ask, args=(port, self._seed + turn)) for turn in range(CLIENTS)]
        for thread in threads:
            thread.start()
        return threads

    def _ask(self, port: int, seed: int) -> None:
        """Until the connection breaks; now and then a client leaves amid an answer, and comes again."""
        chance = random.Random(seed)
        try:
            while True:
                with raw.connect(port) as sock:
                    while chance.random() > 0.05:
                        sock.sendall(self._request(chance))
                        reply = raw.read(sock)
                        if not (reply.status == 200 and reply.complete and reply.ended == "open"):
                            return
                        with self._lock:
                            self.got[reply.header("x-request-id") or reply.header("request-id") or "?"] = COST
                    sock.sendall(self._request(chance))
                    sock.recv(chance.choice((1, 400)))
        except OSError:
            return

    def _request(self, chance: random.Random) -> bytes:
        dialect: Dialect = chance.choice(DIALECTS)
        stream = chance.random() < 0.5
        self.asked += 1
        body = dialect.content(stream=stream)
        return raw.request(dialect.target(stream=stream), body, key=f"{chance.choice(SPENDERS)}-key")


class Hasty(Process):
    """A process that may be gone before it is ready."""

    def _dead(self) -> dict[str, Any] | None:  # type: ignore[override]
        return None if self.process.poll() is None else {"dead": True}


@pytest.fixture(params=["cancel", "drain"])
def config(loop: Loop, request: pytest.FixtureRequest) -> Iterator[str]:
    upstream = Upstream(loop, answer).start()
    return CONFIG.format(url=upstream.url, on_disconnect=request.param)


def check(process: Process, got: dict[str, int]) -> tuple[int, int]:
    """What the database, the clients and the daemon say of what was used; they must say the same. (rows, nano)"""
    path = process.folder / "gproxyd.db"
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        ours = f"user IN {SPENDERS}"
        rows = connection.execute(
            f"SELECT request_id, user, cost_nanousd, provenance FROM usage WHERE {ours}"
        ).fetchall()
        totals = dict(connection.execute("SELECT user, sum(cost_nanousd) FROM totals GROUP BY user").fetchall())
        (counted,) = connection.execute(f"SELECT coalesce(sum(requests), 0) FROM totals WHERE {ours}").fetchone()
    finally:
        connection.close()
    booked = {row[0]: row for row in rows}
    assert len(booked) == len(rows) == counted, "booked twice"
    lost = got.keys() - booked.keys()
    assert not lost, f"{len(lost)} whole answers are not in the ledger"
    wrong = [booked[one] for one, cost in got.items() if booked[one][2:] != (cost, "measured")]
    assert not wrong, wrong[:3]
    for user in SPENDERS:
        sums = sum(row[2] for row in rows if row[1] == user)
        assert totals.get(user, 0) == sums
        reply = raw.send(process.port, raw.request(f"/admin/users/{user}/quota", key=CLIENT_KEY))
        assert parse_usd(reply.json["spent_usd"]) == sums
    return len(rows), sum(row[2] for row in rows)


def test_no_kill_loses_or_doubles_what_a_client_has_got(config: str, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    got: dict[str, int] = {}
    asked = kills = 0
    while kills < KILLS // 2:
        with Process(tmp_path, config, SECRETS) as process:
            check(process, got)
            crowd = Crowd(chance.randrange(2**32))
            threads = crowd.run(process.port)
            time.sleep(chance.uniform(0.02, 0.4))
            process.signal(signal.SIGKILL)
            kills += 1
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()
            asked += crowd.asked
            got |= crowd.got
        if chance.random() < 0.2:
            kills += hurt_at_start(tmp_path, config, chance)
    with Process(tmp_path, config, SECRETS) as process:
        rows, nano = check(process, got)
        process.signal(signal.SIGTERM)
        assert process.process.wait(15) == 0
    with Process(tmp_path, config, SECRETS) as process:
        assert check(process, got) == (rows, nano)
    print(f"{kills} kills, {asked} requests sent, {len(got)} whole answers, {rows} records")
    assert len(got) > 10 * kills


def hurt_at_start(folder: Path, config: str, chance: random.Random) -> int:
    """Kills a process while it takes over what the last one left."""
    process = Hasty(folder, config, SECRETS)
    timer = threading.Timer(chance.uniform(0.2, 0.8), lambda: process.process.kill())
    timer.start()
    with process:
        process.process.wait(10)
    timer.join()
    return 1
