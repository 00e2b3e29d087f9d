"""Another process takes over while the first one ends its streams: what these hold counts in both."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from gproxyd.errors import Refusal
from gproxyd.policy.limits import Limiter, Rule
from tests.support import raw
from tests.support.running import until
from tests.test_handoff import ANN, CHAT, LIMIT, Line, account, alive

ENDLESS = [("x-demo-event-delay", "200"), ("x-demo-events", "300")]
SHORT = [("x-demo-event-delay", "200"), ("x-demo-events", "20")]


@pytest.fixture
def line(tmp_path: Path, vendor_at: tuple[object, str]) -> Iterator[Line]:
    with Line(tmp_path, vendor_at[1]) as running:
        yield running


def somebody(line: Line, name: str, **limit: int) -> str:
    """The key of a new user with such a limit."""
    made = {"name": name, "permissions": ["*"], "rate_limits": [{"model": "*", **limit}], "keys": [{"name": "k"}]}
    reply = raw.send(line.port, raw.request("/admin/users", made))
    assert reply.status == 201, reply.data
    token: str = reply.json["keys"][0]["token"]
    return token


def stream(key: str, headers: list[tuple[str, str]] = ENDLESS) -> bytes:
    return raw.request("/v1/chat/completions", {**CHAT, "stream": True}, headers=headers, key=key)


def streaming(line: Line, key: str, headers: list[tuple[str, str]] = ENDLESS) -> tuple[socket.socket, bytes]:
    """A stream that has begun."""
    sock = raw.connect(line.port)
    sock.sendall(stream(key, headers))
    first = sock.recv(65536)
    assert first.startswith(b"HTTP/1.1 200 ")
    return sock, first


def refused(line: Line, key: str) -> bool:
    """Whether one request more is one too many."""
    reply = line.chat(key)
    assert reply.status in (200, 429)
    assert reply.status == 200 or "concurrency" in reply.json["error"]["message"]
    return reply.status == 429


def test_a_caller_runs_no_more_at_once_in_both_processes_than_in_one(line: Line) -> None:
    """And its place is free as soon as its stream ends, though others still keep the old process."""
    one, two = somebody(line, "one", concurrency=1), somebody(line, "two", concurrency=2)
    (stays, _), (ends, _), (other, _) = streaming(line, two), streaming(line, one), streaming(line, two)
    with stays, ends, other:
        heir = line.hand_over()
        assert [refused(line, key) for key in (one, two)] == [True, True]
        assert line.chat().status == 200, "nobody else is limited"
        ends.close()
        until(lambda: not refused(line, one), 2)
        assert refused(line, two)
        other.close()
        until(lambda: not refused(line, two), 2)
        more, _ = streaming(line, two)  # one in each
        with more:
            assert refused(line, two)
        assert alive(line.pid)
        stays.close()
    assert line.process.wait(5) == 0
    assert alive(heir)
    until(lambda: not refused(line, two), 2)


def test_a_stream_that_ends_by_itself_gives_its_place_back_with_its_last_bytes(line: Line) -> None:
    key = somebody(line, "one", concurrency=1)
    (stays, _), (sock, first) = (
        streaming(line, somebody(line, "two", rpm=0, concurrency=9)),
        streaming(line, key, SHORT),
    )
    with stays, sock:
        line.hand_over()
        was_refused = refused(line, key)
        assert raw.read(sock, seen=first).complete
        until(lambda: not refused(line, key), 0.5)
        assert was_refused, "the stream had ended before"
        assert alive(line.pid)


def test_a_request_that_the_old_process_takes_at_the_last_moment_counts_in_the_new_one(line: Line) -> None:
    key = somebody(line, "one", concurrency=1)
    with raw.connect(line.port) as late:
        data = stream(key)
        late.sendall(data[:20])
        line.hand_over()
        assert not refused(line, key)
        late.sendall(data[20:])
        assert late.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert alive(line.pid)
        until(lambda: refused(line, key), 2)
    until(lambda: not refused(line, key), 2)


def test_a_process_that_is_killed_holds_nothing_any_more(line: Line) -> None:
    key = somebody(line, "one", concurrency=1)
    sock, _ = streaming(line, key)
    with sock:
        line.hand_over()
        assert refused(line, key)
        os.kill(line.pid, signal.SIGKILL)
        until(lambda: not refused(line, key), 2)


def test_the_third_process_knows_what_streams_of_the_first_one_hold_and_cost(line: Line) -> None:
    key = somebody(line, "one", concurrency=1)
    (sock, _), (paid, first) = streaming(line, key), streaming(line, ANN, SHORT)
    with sock, paid:
        line.hand_over()
        third = line.hand_over()
        assert refused(line, key)
        assert alive(line.pid)
        sock.close()
        until(lambda: not refused(line, key), 2)
        assert raw.read(paid, seen=first).complete
    until(lambda: not alive(line.heirs()[0]), 5)
    assert alive(third)
    (record,) = raw.send(line.port, raw.request("/admin/usage?user=ann")).json["data"]
    cost = record["cost_nanousd"]
    assert cost and account(line) == (cost, LIMIT - cost)


# Without processes.


def test_what_another_process_holds_counts_until_it_says_otherwise() -> None:
    limiter = Limiter()
    rule = Rule("user:a", "*", concurrency=3)
    limiter.hold_elsewhere({rule.id: (2, 50), "user:b *": (1, 0)})
    own = limiter.admit([rule], "m", 7)
    with pytest.raises(Refusal):
        limiter.admit([rule], "m")
    assert limiter.all_held() == {rule.id: (3, 57), "user:b *": (1, 0)}
    limiter.hold_elsewhere({rule.id: (1, 20)})
    limiter.forget_idle()
    assert limiter.held(rule.id) == (2, 27)
    limiter.free_elsewhere()
    assert limiter.all_held() == {rule.id: (1, 7)}
    own.release()
    assert limiter.running() == 0 and limiter.held("user:c *") == (0, 0)


def test_tokens_that_another_process_is_expected_to_use_are_taken() -> None:
    limiter = Limiter()
    rule = Rule("user:a", "*", tpm=100)
    limiter.hold_elsewhere({rule.id: (1, 100)})
    with pytest.raises(Refusal):
        limiter.admit([rule], "m", 1)
    limiter.free_elsewhere()
    assert limiter.admit([rule], "m", 1).open
