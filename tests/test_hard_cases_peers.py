"""Peers at their worst, one by one: who floods behind a request, feeds crumbs, sends odd bytes, or hangs up.

TRIES=N has more posts meet connections that close under them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest

from gproxyd.gateway import door, intake
from tests import test_secrecy
from tests.support import raw
from tests.support.bank import short
from tests.support.checks import Bench, check_alive, check_error, quick_log
from tests.support.framing import CHAT, CHUNKED, FILES, LAST, get, post
from tests.support.process import Process
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, CONFIG, SECRETS, Loop, until
from tests.support.servers import listening, read_head
from tests.support.upstream import Pause, Upstream, json_reply
from tests.test_framing import LINGER, PARSERS, parser
from tests.test_hard_cases_heads import QUOTAS
from tests.test_limits import events_within, in_a_network_of_its_own, silently, trickling, with_descriptors
from tests.test_upstream import Hasty

__all__ = ["parser", "short"]

MIB = 1024 * 1024
HEALTH = LAST.replace(b"Connection: close\r\n", b"")
TRIES = int(os.environ.get("TRIES", "2000"))


def cpu_seconds(daemon: Process) -> float:
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Clients that send and send.


def known(**more: object) -> bytes:
    return raw.request("/openai-main/v1/chat/completions", {"model": "m", **more})


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("way", ["long", "short"])
def test_a_flood_behind_a_slow_request_waits_outside_and_takes_no_memory(
    loop: Loop, tmp_path: Path, kind: str, way: str
) -> None:
    """None of those behind it is answered before it, and soon nothing more is read."""
    upstream = Upstream(loop, lambda got: [*([Pause(1.0)] * (b"slow" in got.body)), json_reply(b"{}")]).start()
    config = CONFIG.format(vendor=upstream.url)
    with Process(tmp_path, config, SECRETS, **PARSERS[kind]) as daemon, raw.connect(daemon.port) as sock:
        for _ in range(3):
            sock.sendall(known())
            assert raw.read(sock).status == 200
            time.sleep(0.01)
        before = daemon.memory()["VmRSS"]
        sock.sendall(known(user="slow", model="m" if way == "short" else "other"))
        sock.setblocking(False)
        block, taken = (known() if way == "short" else HEALTH) * 2000, 0
        end = time.monotonic() + 0.6
        while time.monotonic() < end and taken < 64 * MIB:
            try:
                taken += sock.send(block[taken % len(block) :])
            except BlockingIOError:
                time.sleep(0.005)
        assert len(block) < taken < 32 * MIB, "it went on reading"
        assert daemon.memory()["VmRSS"] - before < 8 * MIB, taken
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.close()
        until(lambda: raw.send(daemon.port, LAST).status == 200)


@pytest.fixture(scope="module")
def poor(loop: Loop) -> Iterator[Bench]:
    with quick_log(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(door._OPTIONS, "lingering_time", LINGER)
        yield Bench(loop, CONFIG.replace("users: {{tester", QUOTAS))


@pytest.mark.parametrize(("key", "status"), [(b"ck-poor-1", 402), (b"ck-slow-1", 429)])
@pytest.mark.parametrize("lines", [b"Content-Length: 1073741824\r\n", CHUNKED], ids=["length", "chunked"])
def test_who_may_spend_no_more_can_read_so_while_sending_a_gigabyte(
    poor: Bench, parser: str, key: bytes, status: int, lines: bytes
) -> None:
    def of(data: bytes) -> bytes:
        return data.replace(CLIENT_KEY.encode(), key)

    if status == 429:
        raw.send(poor.gateway.port, of(post(b"Content-Length: 1\r\n", b"x", target=FILES)))
    count = len(poor.upstream.requests)
    piece = b"10000\r\n%b\r\n" % (b"x" * 65536) if lines == CHUNKED else b"x" * 65536
    with raw.connect(poor.gateway.port) as sock:
        sock.sendall(of(post(lines, target=FILES)))
        began, taken = time.monotonic(), 0
        for _ in range(16):
            sock.sendall(piece)
        reply = raw.read(sock)
        assert (reply.status, reply.complete, reply.header("connection")) == (status, True, "close")
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 3:
                taken += sock.send(piece)
        assert time.monotonic() - began < LINGER + 1.5
        assert taken < 64 * MIB
    until(poor.gateway.at_rest)
    assert len(poor.upstream.requests) == count


def drip(port: int, target: bytes, a_second: int, seconds: float) -> Reply:
    """A byte to a chunk, each with an extension of 4 KiB, until somebody has had enough."""
    crumb = b"1;" + b"e" * 4096 + b"\r\n \r\n"
    with raw.connect(port) as sock:
        sock.sendall(post(CHUNKED, b"1\r\n{\r\n", target=target))
        sock.settimeout(1 / a_second)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                if sock.recv(1, socket.MSG_PEEK):
                    break
            sock.sendall(crumb)
        sock.settimeout(1)
        return raw.read(sock)


@pytest.mark.parametrize("target", [CHAT, FILES], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", PARSERS)
def test_crumbs_in_wrappings_cost_little(loop: Loop, tmp_path: Path, kind: str, target: bytes) -> None:
    upstream = Upstream(loop, [json_reply(b"{}")]).start()
    with Process(tmp_path, CONFIG.format(vendor=upstream.url), SECRETS, **PARSERS[kind]) as daemon:
        raw.send(daemon.port, LAST)
        before, spent, began = daemon.memory()["VmRSS"], cpu_seconds(daemon), time.monotonic()
        assert drip(daemon.port, target, 200, 2.0).data == b""
        busy = (cpu_seconds(daemon) - spent) / (time.monotonic() - began)
        print(f"200 crumbs a second: {busy:.1%} of a processor")
        assert busy < 0.20
        assert daemon.memory()["VmRSS"] - before < 4 * MIB
        assert raw.send(daemon.port, LAST).status == 200
    assert not [got for got in upstream.requests if got.complete]


@pytest.mark.parametrize("target", [CHAT, FILES], ids=["held", "streamed"])
def test_crumbs_in_wrappings_are_no_rate(
    loop: Loop, parser: str, target: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is the body's own bytes."""
    monkeypatch.setattr(intake, "RATE_GRACE", 0.3)
    bench = Bench(loop)
    check_error(drip(bench.gateway.port, target, 100, 3.0), 408, "request_timeout")
    until(bench.gateway.at_rest)
    assert not [got for got in bench.upstream.requests if got.complete]


# Clients that send odd things.


@pytest.fixture(scope="module")
def made(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        bench = Bench(loop, CONFIG + "records: {{enable_downstream_log: true, enable_upstream_log: true}}\n")
        until(bench.gateway.log)
        yield bench


@pytest.fixture
def bench(made: Bench) -> Bench:
    made.reset()
    made.upstream.requests.clear()
    return made


def test_a_thousand_bad_cookies_are_nobodys_business(bench: Bench, parser: str) -> None:
    """They are not read, so they cost what other bytes cost, and nobody is told of them."""
    odd = [b"=", b";", b'a="', b"\\x;=b", b"a@b=[]", b'$V="\\"', b"\xff=\xfe", b"c", b" =; ", b"{}=(),"]
    bad = b"; ".join(odd[at % 10] + b"%d" % at for at in range(250))
    before = os.path.getsize(bench.gateway.log_path)
    took = []
    for name in (b"Cookie", b"X-Many"):
        lines = b"%b: %b\r\n" % (name, bad) * 4
        began = time.process_time()
        with raw.connect(bench.gateway.port) as sock:
            for _ in range(100):
                sock.sendall(get(lines))
                assert raw.read(sock).status == 200
        took.append(time.process_time() - began)
    assert took[0] < 2 * took[1] + 0.1, took
    assert not [got for got in bench.upstream.requests if got.header("cookie")]
    until(lambda: bench.gateway.log_path.read_bytes()[before:].count(b"\n") >= 200)
    lines_ = [orjson.loads(line) for line in bench.gateway.log_path.read_bytes()[before:].splitlines()]
    assert [line["event"] for line in lines_] == ["request"] * 200


def test_odd_bytes_in_headers_are_kept_in_envelopes_that_can_be_read(bench: Bench) -> None:
    odd = bytes(range(0x80, 0x100))
    bench.script = [json_reply(b"{}", headers=b"Warning: 199 - %b\r\n" % odd)]
    reply = raw.send(bench.gateway.port, get(b"User-Agent: %b\r\n" % odd))
    assert (reply.status, reply.header("warning")) == (200, "199 - " + odd.decode("latin-1"))
    path = f"/admin/requests/{reply.header('x-request-id')}"
    kept = until(lambda: (told := raw.send(bench.gateway.port, raw.request(path))).status == 200 and told)
    for side in ("downstream", "upstream"):
        assert ["User-Agent", odd.decode("latin-1")] in kept.json[side]["headers"]
    assert not [line for line in bench.gateway.log() if line["event"] in ("bug", "library")]


@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind-a-good-one"])
def test_the_parser_in_python_quotes_a_malformed_request_nowhere_either(
    loop: Loop, tmp_path: Path, behind: bool
) -> None:
    trap = test_secrecy.Trap(tmp_path, loop, **PARSERS["python"])
    with trap.daemon:
        assert "slow_parser" in trap.words()
        test_secrecy.test_a_malformed_request_is_quoted_nowhere(trap, behind)


# Clients that are many.


def test_a_thousand_clients_where_there_are_few_descriptors_are_refused_and_cost_little(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_descriptors(tmp_path, 256, monkeypatch)
    with trickling(loop) as upstream, ExitStack() as stack:
        daemon = stack.enter_context(Process(tmp_path, CONFIG.format(vendor=upstream.url), SECRETS))
        stream = stack.enter_context(raw.connect(daemon.port))
        stream.sendall(known(stream=True))
        assert b"200 OK" in stream.recv(65536)
        began, before = time.monotonic(), cpu_seconds(daemon)
        crowd = [stack.enter_context(raw.connect(daemon.port)) for _ in range(1000)]
        assert events_within(stream, 2.5) >= 25
        busy = (cpu_seconds(daemon) - before) / (time.monotonic() - began)
        print(f"1000 clients for some 100 places: {busy:.0%} of a processor")
        assert busy < 0.30
        refused = [answer for answer in map(silently, crowd) if answer]
        assert len(refused) >= 1000 - 128
        assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in refused)
        for sock in crowd:
            sock.close()
        until(lambda: raw.send(daemon.port, LAST).status == 200)


def test_a_client_of_one_family_is_the_same_by_a_listener_of_both(loop: Loop) -> None:
    """A socket that takes both families (as systemd may hand over) shows IPv4 clients as mapped addresses."""
    server = 'listen: ["127.0.0.1:0"], max_connections_per_address: 2, trusted_proxies: [192.0.2.9/32]'
    gateway = Bench(loop, CONFIG.replace('listen: ["127.0.0.1:0"]', server)).gateway

    def work() -> None:
        both = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        port = both.getsockname()[1]
        serving = loop.run(loop.loop.create_server(gateway.daemon._door, sock=both))
        loop.at_end(lambda: loop.loop.call_soon_threadsafe(serving.close))
        with ExitStack() as stack:

            def ask(source: str, lines: bytes = b"") -> Reply:
                host = "2001:db8::1" if ":" in source else "192.0.2.1"
                sock = socket.create_connection((host, port), 5, source_address=(source, 0))
                stack.enter_context(sock).sendall(get(lines))
                return raw.read(sock)

            for source in ("192.0.2.2", "192.0.2.3", "2001:db8:1::1", "2001:db8:2::1"):
                assert [ask(source).status for _ in range(3)] == [200, 200, 503], source
            for _ in range(5):
                reply = ask("192.0.2.9", b"X-Forwarded-For: 203.0.113.5\r\n")
                assert reply.status == 200
                assert gateway.request(reply.header("x-request-id") or "")["client"] == "203.0.113.5"
        until(lambda: gateway.daemon._door.crowd.count == 0)

    v4 = [f"192.0.2.{number}/24" for number in (1, 2, 3, 9)]
    in_a_network_of_its_own(work, *v4, "2001:db8::1/128", "2001:db8:1::1/128", "2001:db8:2::1/128")


# Upstreams that hang up.

HANGING_UP: dict[str, Callable[[socket.socket], object]] = {
    "at once": lambda _: None,
    "at once, by a reset": raw.reset,
    "at the first byte": lambda connection: connection.recv(1),
    "behind the head": read_head,
    "behind some bytes that are no answer": lambda connection: connection.sendall(b"HTT"),
}


@pytest.mark.parametrize("when", HANGING_UP)
def test_an_upstream_that_accepts_and_hangs_up_is_asked_once(loop: Loop, when: str) -> None:
    """Whatever the method: the connection was fresh, so that it was stale explains nothing."""
    accepted: list[int] = []

    def hang_up(connection: socket.socket) -> None:
        accepted.append(1)
        HANGING_UP[when](connection)

    with listening(hang_up) as port:
        gateway = loop.gateway(CONFIG.format(vendor=f"http://127.0.0.1:{port}"))
        for data in (known(), get(), post(b"Content-Length: 5\r\n", b"hello", target=FILES)):
            accepted.clear()
            began = time.monotonic()
            reply = raw.send(gateway.port, data)
            assert time.monotonic() - began < 1
            check_error(reply, 502, "upstream_error")
            line = gateway.request(reply.header("x-request-id") or "")
            assert (line["outcome"], line["attempts"], len(accepted)) == ("upstream_error", 1, 1)
        check_alive(gateway)


def test_idle_connections_that_close_under_many_posts_cost_few_and_double_none(loop: Loop, short: list[str]) -> None:
    """Thousands of tries, on either way, from several clients at once."""
    upstream = Hasty(0.005)
    workers = 8
    with listening(upstream) as port:
        gateway = loop.gateway(CONFIG.format(vendor=f"http://127.0.0.1:{port}"))

        def ask(worker: int) -> Counter[int]:
            statuses: Counter[int] = Counter()
            with raw.connect(gateway.port) as sock:
                for number in range(TRIES // workers):
                    tag = f"w{worker}n{number}"
                    sock.sendall(known(user=tag))
                    reply = raw.read(sock)
                    statuses[reply.status] += 1
                    assert reply.status == 502 or reply.body == b'{"tag":"%b"}' % tag.encode(), reply.data
                    time.sleep((number * 7 % 50) / 10_000)
            return statuses

        with ThreadPoolExecutor(workers) as pool:
            statuses = sum(pool.map(ask, range(workers)), Counter())
        reasons = Counter(line["reason"] for line in gateway.requests() if line["status"] == 502)
    print(f"{dict(statuses)}, {dict(reasons)}, {upstream.connections} connections, {len(short)} on the short way")
    assert set(upstream.processed.values()) == {1}
    assert statuses[200] + statuses[502] == TRIES and statuses[502] <= TRIES // 10
    assert set(reasons) <= {"reset", "closed"}
    assert upstream.connections > TRIES // 20, "the race did not take place"
    assert len(short) > TRIES // 20
