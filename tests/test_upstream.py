"""Connections to upstreams: kept, reused, given up; what one answers never reaches somebody else's client."""

from __future__ import annotations

import random
import re
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.support import raw
from tests.support.certs import Authority, believed
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, PROVIDER_KEY, SECRETS, Loop, Running, until
from tests.support.servers import black_hole, listening, read_head, read_request
from tests.support.upstream import Fin, Got, Pause, Reset, Script, Stall, Upstream, chunk, json_reply

COMPLETION = b'{"id":"x","object":"chat.completion","model":"m","choices":[]}'
OK = json_reply(COMPLETION)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  up:
    vendor: {vendor}
    base_url: "{url}"
    credentials: [provider-key]
    timeouts: {{connect: {connect}, first_byte: {first_byte}, idle: {idle}}}
    proxy: {proxy}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""


def gateway_to(
    loop: Loop,
    url: str,
    *,
    vendor: str = "openai",
    connect: str = "2s",
    first_byte: str = "5s",
    idle: str = "5s",
    proxy: str = "null",
    secrets: dict[str, str] | None = None,
) -> Running:
    config = CONFIG.format(url=url, vendor=vendor, connect=connect, first_byte=first_byte, idle=idle, proxy=proxy)
    return loop.gateway(config, secrets)


def chat(gateway: Running, body: object = CHAT, **more: object) -> Reply:
    return raw.send(gateway.port, raw.request("/up/v1/chat/completions", body, **more))  # type: ignore[arg-type]


def refused(reply: Reply, status: int, code: str) -> None:
    """The gateway's own error, whole, in OpenAI's form."""
    assert (reply.status, reply.json["error"]["code"], reply.complete) == (status, code, True), reply.data


def line(gateway: Running, reply: Reply) -> dict[str, object]:
    return gateway.request(reply.header("x-request-id") or "")


# Keeping connections.


def test_one_connection_serves_request_after_request(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url)
    for _ in range(20):
        assert chat(gateway).status == 200
    assert upstream.connections == 1 and len(upstream.requests) == 20


def test_the_connection_used_last_is_used_first(loop: Loop) -> None:
    together = threading.Barrier(3)

    def script(got: Got) -> Script:
        return [Pause(0.2), OK] if b"first" in got.body else [OK]

    upstream = Upstream(loop, script).start()
    gateway = gateway_to(loop, upstream.url)

    def ask(delay: float) -> None:
        together.wait(5)
        time.sleep(delay)
        assert chat(gateway, CHAT | {"user": "first"}).status == 200

    threads = [threading.Thread(target=ask, args=(delay,)) for delay in (0.0, 0.05, 0.1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert upstream.connections == 3
    for _ in range(5):
        chat(gateway)
    last = upstream.requests[2].connection
    assert [got.connection for got in upstream.requests[3:]] == [last] * 5


def tagged(got: Got) -> bytes:
    """A reply that bears the tag of its very request."""
    match = re.search(rb'"user":"(\w+)"', got.body)
    return b'{"tag":"%b"}' % (match[1] if match else b"none")


POISON = json_reply(b'{"tag":"poison"}')
SPOILT: dict[str, Callable[[Got], Script]] = {
    "another response in the same segment": lambda got: [json_reply(tagged(got)) + POISON],
    "another response a little later": lambda got: [json_reply(tagged(got)), Pause(0.02), POISON],
    "one stray byte": lambda got: [json_reply(tagged(got)) + b"x"],
    "connection: close, and another response": lambda got: [
        json_reply(tagged(got), headers=b"Connection: close\r\n") + POISON
    ],
    "connection: close, left open": lambda got: [json_reply(tagged(got), headers=b"Connection: close\r\n")],
    "bytes behind the last chunk": lambda got: [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        + chunk(tagged(got))
        + b"0\r\n\r\n"
        + POISON
    ],
    "204 with a body": lambda got: [b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nHELLO" + POISON],
    "204 with a body in chunks": lambda got: [
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(b"HELLO") + b"0\r\n\r\n"
    ],
    "304 with a body": lambda got: [b"HTTP/1.1 304 Not Modified\r\n\r\n" + POISON],
    "HTTP/1.0": lambda got: [b"HTTP/1.0 200 OK\r\nContent-Length: 14\r\n\r\n" + b'{"tag":"old"} ' + POISON],
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_connection_with_stray_bytes_is_not_used_again(loop: Loop, how: str) -> None:
    """Else every later answer would be one behind: each client would get somebody else's."""
    upstream = Upstream(loop, lambda got: SPOILT[how](got) if b"spoil" in got.body else [json_reply(tagged(got))])
    gateway = gateway_to(loop, upstream.start().url)
    reply = chat(gateway, CHAT | {"user": "spoil"})
    assert b"poison" not in reply.data and b"HELLO" not in reply.data
    if reply.status in (204, 304):
        assert not reply.body and reply.header("content-length") is None
    time.sleep(0.05 if "later" in how else 0)
    for number in range(5):
        assert chat(gateway, CHAT | {"user": f"client{number}"}).json == {"tag": f"client{number}"}
    assert [got.connection for got in upstream.requests] == [1, 2, 2, 2, 2, 2]


def test_the_answer_to_head_ends_at_its_head(loop: Loop) -> None:
    def script(got: Got) -> Script:
        if got.method == "HEAD":
            spare = POISON if got.target.endswith(b"poison") else b""
            return [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1234\r\n\r\n" + spare]
        return [json_reply(tagged(got))]

    upstream = Upstream(loop, script).start()
    gateway = gateway_to(loop, upstream.url)
    for name in ("file", "file", "poison"):
        last = raw.request("/healthz", headers=[("Connection", "close")])
        both = raw.request(f"/up/v1/files/{name}", method="HEAD") + last
        reply = raw.send(gateway.port, both, until_complete=False)
        head, _, rest = reply.data.partition(b"\r\n\r\n")
        assert b"Content-Length: 1234" in head and b"poison" not in reply.data
        assert rest.startswith(b"HTTP/1.1 200 OK") and rest.endswith(b"\r\n\r\nOK")
        assert chat(gateway, CHAT | {"user": name}).json == {"tag": name}
    assert [got.connection for got in upstream.requests] == [1, 1, 1, 1, 1, 2]


def test_many_at_once_get_their_own_answers(loop: Loop) -> None:
    def script(got: Got) -> Script:
        return [Pause(random.random() / 100), json_reply(tagged(got))]

    upstream = Upstream(loop, script).start()
    gateway = gateway_to(loop, upstream.url)
    wrong: list[bytes] = []

    def ask(worker: int) -> None:
        for number in range(10):
            tag = f"w{worker}n{number}"
            reply = chat(gateway, CHAT | {"user": tag})
            if reply.body != b'{"tag":"%b"}' % tag.encode():
                wrong.append(reply.data)

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert upstream.connections <= 12 and len(upstream.requests) == 120


# Connections that the upstream gives up.


class Hasty:
    """Answers with tags, and closes each connection that has been idle for some random milliseconds."""

    def __init__(self, most: float) -> None:
        self._most = most
        self.processed: Counter[bytes] = Counter()
        self.connections = 0
        self.lock = threading.Lock()

    def __call__(self, connection: socket.socket) -> None:
        with self.lock:
            self.connections += 1
        patience = 5.0
        while select.select([connection], [], [], patience)[0]:
            _, body = read_request(connection)
            match = re.search(rb'"user":"(\w+)"', body)
            assert match
            with self.lock:
                self.processed[match[1]] += 1
            connection.sendall(json_reply(b'{"tag":"%b"}' % match[1]))
            patience = random.random() * self._most


def test_an_idle_connection_that_closes_under_a_post_hurts_nobody(loop: Loop) -> None:
    """Each request is answered and processed once, wherever the upstream's FIN meets it.

    Where the request lies unread in the upstream's kernel when it closes, that says RST, as it would had it been read:
    nothing proves that it was not, so it is not sent again.
    """
    seed = random.randrange(1 << 32)
    random.seed(seed)
    upstream = Hasty(0.005)
    unproven: set[bytes] = set()
    with listening(upstream) as port:
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
        with raw.connect(gateway.port) as sock:
            for number in range(400):
                tag = f"try{number}"
                sock.sendall(raw.request("/up/v1/chat/completions", CHAT | {"user": tag}))
                reply = raw.read(sock)
                if reply.status == 502 and line(gateway, reply)["reason"] == "reset":
                    unproven.add(tag.encode())
                else:
                    assert (reply.status, reply.body) == (200, b'{"tag":"%b"}' % tag.encode()), (seed, tag, reply.data)
                time.sleep(random.random() * 0.005)
    assert set(upstream.processed.values()) == {1}, seed
    assert len(upstream.processed.keys() | unproven) == 400
    assert len(unproven) <= 20, seed
    assert upstream.connections > 40, "the race did not take place"


def unanswered(loop: Loop, ending: Script) -> tuple[Upstream, Running]:
    """An upstream that reads a request with `drop` in it and then ends the connection without an answer."""
    upstream = Upstream(loop, lambda got: ending if b"drop" in got.body else [OK]).start()
    return upstream, gateway_to(loop, upstream.url)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "reused"])
@pytest.mark.parametrize(
    "ending", [[Fin()], [Pause(0.3), Fin()], [Pause(0.3), Reset()]], ids=["fin at once", "fin later", "reset later"]
)
def test_a_post_that_was_read_is_never_sent_twice(loop: Loop, ending: Script, warm: bool) -> None:
    """Whatever the upstream did with it (money was spent, perhaps), doing it again is not the gateway's to decide."""
    upstream, gateway = unanswered(loop, ending)
    if warm:
        assert chat(gateway).status == 200
    reply = chat(gateway, CHAT | {"user": "drop"})
    refused(reply, 502, "upstream_error")
    assert [b"drop" in got.body for got in upstream.requests] == [False] * warm + [True]
    assert line(gateway, reply)["attempts"] == 1
    assert chat(gateway).status == 200


def test_a_get_on_a_stale_connection_is_sent_again_once(loop: Loop) -> None:
    """GET is safe (RFC 9110 section 9.2.1), so a reused connection that ends under it costs the client nothing."""

    def script(got: Got) -> Script:
        stale = upstream.connections < 2 and len(upstream.requests) > 1
        return [Fin()] if stale else [OK]

    upstream = Upstream(loop, script)
    gateway = gateway_to(loop, upstream.start().url)
    assert chat(gateway).status == 200
    reply = raw.send(gateway.port, raw.request("/up/v1/files/a"))
    assert reply.status == 200 and reply.header("x-gproxyd-attempts") == "2"
    assert [got.connection for got in upstream.requests] == [1, 1, 2]


def test_a_get_on_a_fresh_connection_is_not_repeated(loop: Loop) -> None:
    upstream = Upstream(loop, [Fin()]).start()
    gateway = gateway_to(loop, upstream.url)
    refused(raw.send(gateway.port, raw.request("/up/v1/files/a")), 502, "upstream_error")
    assert len(upstream.requests) == 1


def test_an_answer_that_began_is_never_asked_for_again(loop: Loop) -> None:
    upstream = Upstream(loop, lambda got: [b"HTTP/1.1 200 OK\r\nContent-", Reset()] if b"drop" in got.body else [OK])
    gateway = gateway_to(loop, upstream.start().url)
    assert chat(gateway).status == 200
    refused(chat(gateway, CHAT | {"user": "drop"}), 502, "upstream_error")
    assert len(upstream.requests) == 2


# What cannot be reached, or does not speak.


def test_silence_is_ended_by_the_first_byte_limit(loop: Loop) -> None:
    upstream = Upstream(loop, [Stall()]).start()
    gateway = gateway_to(loop, upstream.url, first_byte="400ms")
    start = time.monotonic()
    reply = chat(gateway)
    refused(reply, 504, "upstream_timeout")
    assert 0.4 <= time.monotonic() - start < 0.9
    assert upstream.peer_left.wait(1)
    assert line(gateway, reply)["reason"] == "timeout_first_byte"
    assert len(upstream.requests) == 1


def test_a_held_body_that_stops_is_a_clean_error(loop: Loop) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    upstream = Upstream(loop, [head + b'{"id":', Stall()]).start()
    gateway = gateway_to(loop, upstream.url, idle="400ms")
    reply = chat(gateway)
    refused(reply, 504, "upstream_timeout")
    assert line(gateway, reply)["reason"] == "timeout_idle"
    assert upstream.peer_left.wait(1)


def test_a_port_where_nobody_listens(loop: Loop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    gateway = gateway_to(loop, f"http://127.0.0.1:{port}")
    reply = chat(gateway)
    refused(reply, 502, "upstream_error")
    assert line(gateway, reply)["reason"] == "connect"


def test_a_connection_that_never_comes_about(loop: Loop) -> None:
    with black_hole() as port:
        gateway = gateway_to(loop, f"http://127.0.0.1:{port}", connect="400ms")
        start = time.monotonic()
        reply = chat(gateway)
        refused(reply, 504, "upstream_timeout")
        assert 0.4 <= time.monotonic() - start < 0.9
        assert line(gateway, reply)["reason"] == "timeout_connect"


def test_a_name_that_does_not_exist(loop: Loop) -> None:
    gateway = gateway_to(loop, "http://no-such-upstream.invalid")
    reply = chat(gateway)
    refused(reply, 502, "upstream_error")
    assert line(gateway, reply)["reason"] == "dns"


def test_other_providers_go_on_while_one_is_unreachable(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    with black_hole() as port:
        config = CONFIG.format(
            url=f"http://127.0.0.1:{port}", vendor="openai", connect="600ms", first_byte="5s", idle="5s", proxy="null"
        )
        other = f'  fine: {{vendor: openai, base_url: "{upstream.url}", credentials: [provider-key]}}\nusers:'
        gateway = loop.gateway(config.replace("users:", other))
        waiting = [raw.connect(gateway.port) for _ in range(20)]
        for sock in waiting:
            sock.sendall(raw.request("/up/v1/chat/completions", CHAT))
        start = time.monotonic()
        for _ in range(10):
            assert raw.send(gateway.port, raw.request("/fine/v1/chat/completions", CHAT)).status == 200
        assert time.monotonic() - start < 0.4
        for sock in waiting:
            assert raw.read(sock).status == 504
            sock.close()


def test_an_upstream_on_ipv6(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start("::1")
    gateway = gateway_to(loop, upstream.url)
    assert chat(gateway).status == 200
    assert upstream.requests[0].header("host") == [b"[::1]:%d" % upstream.port]


def test_interim_responses_are_swallowed(loop: Loop) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\nContent-Length: 7\r\n\r\n"
    upstream = Upstream(loop, [b"HTTP/1.1 100 Continue\r\n\r\n", hints * 3, Pause(0.02), hints + OK]).start()
    gateway = gateway_to(loop, upstream.url)
    for _ in range(3):
        reply = chat(gateway)
        assert reply.status == 200 and reply.data.count(b"HTTP/1.1") == 1 and reply.header("link") is None
        assert reply.body == COMPLETION
    assert upstream.connections == 1


def test_interim_responses_without_end_are_cut_off(loop: Loop) -> None:
    upstream = Upstream(loop, [b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, Stall()]).start()
    refused(chat(gateway_to(loop, upstream.url)), 502, "upstream_error")
    assert upstream.peer_left.wait(1)


def test_interim_responses_do_not_put_off_the_first_byte_limit(loop: Loop) -> None:
    drip: Script = [step for _ in range(20) for step in (b"HTTP/1.1 100 Continue\r\n\r\n", Pause(0.1))]
    upstream = Upstream(loop, [*drip, OK]).start()
    refused(chat(gateway_to(loop, upstream.url, first_byte="400ms")), 504, "upstream_timeout")


MARK = b"mark-of-the-peer"
GARBAGE = {
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: %b\r\nConnection: upgrade\r\n\r\n" % MARK,
    "no status line": MARK + b"\r\n\r\n",
    "another protocol": b"SSH-2.0-%b\r\n" % MARK,
    "a status out of range": b"HTTP/1.1 99 %b\r\nContent-Length: 0\r\n\r\n" % MARK,
    "a status of four digits": b"HTTP/1.1 2000 %b\r\nContent-Length: 0\r\n\r\n" % MARK,
    "status 600": b"HTTP/1.1 600 %b\r\nContent-Length: 0\r\n\r\n" % MARK,
    "two framings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\n%b" % MARK,
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n%b" % MARK,
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\n%b" % MARK,
    "an unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\nX-M: %b\r\n\r\n" % MARK,
    "a bare CR in the reason": b"HTTP/1.1 200 O\rK%b\r\nContent-Length: 0\r\n\r\n" % MARK,
    "NUL in a header": b"HTTP/1.1 200 OK\r\nX-M: %b\0\r\nContent-Length: 0\r\n\r\n" % MARK,
    "a folded header": b"HTTP/1.1 200 OK\r\nX-M: a\r\n %b\r\nContent-Length: 0\r\n\r\n" % MARK,
    "a header without a colon": b"HTTP/1.1 200 OK\r\n%b\r\nContent-Length: 0\r\n\r\n" % MARK,
    "a head too large": b"HTTP/1.1 200 OK\r\n" + b"X-M: %b\r\n" % (MARK * 100) * 400 + b"\r\n",
    "headers without number": b"HTTP/1.1 200 OK\r\n" + b"X-M: %b\r\n" % MARK * 10_000 + b"\r\n",
    "a bad chunk in a held body": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"a":\r\nxyz%b\r\n' % MARK,
}


@pytest.mark.parametrize("what", GARBAGE)
def test_what_is_not_http_becomes_a_502_without_the_peers_bytes(loop: Loop, what: str) -> None:
    upstream = Upstream(loop, [GARBAGE[what], Stall()]).start()
    gateway = gateway_to(loop, upstream.url)
    reply = chat(gateway)
    refused(reply, 502, "upstream_error")
    assert MARK not in reply.data and MARK.decode() not in gateway.log_path.read_text()
    assert line(gateway, reply)["reason"] == "protocol"
    assert upstream.peer_left.wait(1) and len(upstream.requests) == 1


# Through a proxy.


class Proxy:
    """A proxy for CONNECT. `targets` are the authorities it was asked for, `seen` all that went up through it."""

    def __init__(self, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self._answer = answer
        self.heads: list[bytes] = []
        self.seen = b""

    def __call__(self, connection: socket.socket) -> None:
        head, rest = read_head(connection)
        self.heads.append(head)
        assert not rest, "bytes were sent before the tunnel stood"
        connection.sendall(self._answer)
        if b" 200 " not in self._answer:
            connection.settimeout(2)
            self.seen += connection.recv(65536)
            return
        host, _, port = head.split(b" ")[1].rpartition(b":")
        with socket.create_connection((host.strip(b"[]").decode(), int(port)), 5) as onward:
            while True:
                ready = select.select([connection, onward], [], [], 5)[0]
                for source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is connection:
                        self.seen += data
                    (onward if source is connection else connection).sendall(data)
                if not ready:
                    return


@contextmanager
def proxied(loop: Loop, url: str, proxy: Callable[[socket.socket], object], **more: str) -> Iterator[Running]:
    with listening(proxy) as port:
        yield gateway_to(loop, url, proxy=f'"http://127.0.0.1:{port}"', **more)  # type: ignore[arg-type]


def test_a_proxy_tunnels_and_its_connections_are_kept(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    proxy = Proxy()
    with proxied(loop, upstream.url, proxy) as gateway:
        for _ in range(5):
            assert chat(gateway).status == 200
        authority = b"127.0.0.1:%d" % upstream.port
        assert [head.split(b"\r\n")[0] for head in proxy.heads] == [b"CONNECT %b HTTP/1.1" % authority]
        assert b"\r\nHost: " + authority in proxy.heads[0]
        assert PROVIDER_KEY.encode() not in proxy.heads[0] and CLIENT_KEY.encode() not in proxy.heads[0]
    assert upstream.requests[0].target == b"/v1/chat/completions"


def test_tls_through_a_proxy_hides_everything_from_it(loop: Loop, tmp_path_factory: pytest.TempPathFactory) -> None:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    with believed(authority):
        upstream = Upstream(loop, [OK]).start(tls=authority.server())
        proxy = Proxy()
        with proxied(loop, f"https://localhost:{upstream.port}", proxy) as gateway:
            for _ in range(3):
                assert chat(gateway).status == 200
        assert proxy.heads[0].startswith(b"CONNECT localhost:%d HTTP/1.1\r\n" % upstream.port)
        assert upstream.requests[0].header("authorization") == [b"Bearer " + PROVIDER_KEY.encode()]
        assert b"localhost" in proxy.seen, "no server name was indicated"
        assert PROVIDER_KEY.encode() not in proxy.seen and b"Hello" not in proxy.seen


REFUSING = {
    "authentication wanted": b"HTTP/1.1 407 Proxy Authentication Required\r\nX-M: mark-of-the-peer\r\n\r\n",
    "forbidden": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 16\r\n\r\nmark-of-the-peer",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://mark-of-the-peer/\r\n\r\n",
    "garbage": b"mark-of-the-peer\r\n\r\n",
}


@pytest.mark.parametrize("what", REFUSING)
def test_a_proxy_that_refuses_learns_nothing(loop: Loop, what: str) -> None:
    upstream = Upstream(loop, [OK]).start()
    proxy = Proxy(REFUSING[what])
    with proxied(loop, upstream.url, proxy) as gateway:
        reply = chat(gateway)
        refused(reply, 502, "upstream_error")
        assert MARK not in reply.data
        assert line(gateway, reply)["reason"] == "connect"
    assert upstream.connections == 0 and not proxy.seen


def test_a_proxy_that_ends_the_connection(loop: Loop) -> None:
    with proxied(loop, "http://127.0.0.1:9", lambda connection: read_head(connection)) as gateway:
        refused(chat(gateway), 502, "upstream_error")


def test_a_silent_proxy_is_ended_by_the_connect_limit(loop: Loop) -> None:
    def silent(connection: socket.socket) -> None:
        while connection.recv(4096):
            pass
        left.set()

    left = threading.Event()
    with proxied(loop, "http://127.0.0.1:9", silent, connect="400ms") as gateway:
        start = time.monotonic()
        refused(chat(gateway), 504, "upstream_timeout")
        assert 0.4 <= time.monotonic() - start < 0.9
        assert left.wait(1)


# Credentials.


def test_the_keys_of_a_pool_are_used_in_turn(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url, secrets=SECRETS | {"provider-key": "pk-one\npk-two\npk-three"})
    for _ in range(9):
        assert chat(gateway).status == 200
    used = [got.header("authorization")[0] for got in upstream.requests]
    assert set(used[:3]) == {b"Bearer pk-one", b"Bearer pk-two", b"Bearer pk-three"}
    assert used == used[:3] * 3


VENDOR_401 = b'{"error":{"message":"Incorrect API key provided: pk-bad**. Find yours at https://vendor.test."}}'


def test_a_refused_key_is_parked_and_the_others_go_on(loop: Loop) -> None:
    def script(got: Got) -> Script:
        bad = got.header("authorization") == [b"Bearer pk-bad"]
        return [json_reply(VENDOR_401, status=b"401 Unauthorized") if bad else OK]

    upstream = Upstream(loop, script).start()
    gateway = gateway_to(loop, upstream.url, secrets=SECRETS | {"provider-key": "pk-good\npk-bad"})
    replies = [chat(gateway) for _ in range(10)]
    assert [reply.status for reply in replies] == [200] * 10
    turned = [reply for reply in replies if reply.header("x-gproxyd-attempts") == "2"]
    assert len(turned) == 1  # the request that met the bad key went on with the good one
    assert not any(b"Incorrect" in reply.data or b"vendor.test" in reply.data for reply in replies)
    loud = until(lambda: [entry for entry in gateway.log() if entry["event"] == "credential_refused"])
    assert len(loud) == 1 and loud[0]["level"] == "error"
    assert (loud[0]["credential"], loud[0]["provider"]) == ("provider-key#2", "up")
    text = gateway.log_path.read_text()
    assert "pk-bad" not in text and "pk-good" not in text and "Incorrect" not in text
    assert line(gateway, turned[0])["outcome"] == "ok"


@pytest.mark.parametrize("framing", ["length", "chunked", "stream", "head"])
def test_a_refused_key_is_told_without_the_vendors_text(loop: Loop, framing: str) -> None:
    kind = b"text/event-stream" if framing == "stream" else b"application/json"
    head = b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\nContent-Type: %b\r\n" % kind
    if framing == "chunked":
        answer = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(VENDOR_401) + b"0\r\n\r\n"
    else:
        answer = head + b"Content-Length: %d\r\n\r\n" % len(VENDOR_401)
        answer += VENDOR_401 if framing != "head" else b""
    upstream = Upstream(loop, [answer]).start()
    gateway = gateway_to(loop, upstream.url)
    if framing == "head":
        reply = raw.send(gateway.port, raw.request("/up/v1/files/a", method="HEAD"), until_complete=False, timeout=0.3)
        assert reply.status == 502 and not reply.body
    else:
        reply = chat(gateway)
        refused(reply, 502, "upstream_auth")
    assert b"Incorrect" not in reply.data and reply.header("www-authenticate") is None
    assert until(lambda: [entry for entry in gateway.log() if entry["event"] == "credential_refused"])


def gemini(gateway: Running) -> Reply:
    body = {"contents": [{"parts": [{"text": "Hello"}]}]}
    return raw.send(gateway.port, raw.request("/up/v1beta/models/gemini-1.5-flash:generateContent", body))


def google_error(status: int, word: str) -> bytes:
    return (
        b'{"error":{"code":%d,"message":"no","status":"X","details":[{"@type":'
        b'"type.googleapis.com/google.rpc.ErrorInfo","reason":"%b"}]}}' % (status, word.encode())
    )


@pytest.mark.parametrize(("status", "word"), [(400, "API_KEY_INVALID"), (403, "API_KEY_SERVICE_BLOCKED"), (401, "ANY")])
def test_gemini_says_in_its_own_way_that_a_key_is_no_good(loop: Loop, status: int, word: str) -> None:
    answer = json_reply(google_error(status, word), status=b"%d No" % status)
    gateway = gateway_to(loop, Upstream(loop, [answer]).start().url, vendor="gemini")
    reply = gemini(gateway)
    error = reply.json["error"]
    assert (reply.status, error["code"], error["details"][0]["reason"]) == (502, 502, "UPSTREAM_AUTH")
    assert word.encode() not in reply.data
    loud = until(lambda: [entry for entry in gateway.log() if entry["event"] == "credential_refused"])
    assert loud[0]["credential"] == "provider-key"


@pytest.mark.parametrize(("status", "word"), [(400, "INVALID_ARGUMENT"), (403, "CONSUMER_SUSPENDED"), (404, "X")])
def test_other_errors_of_the_vendor_pass_unchanged(loop: Loop, status: int, word: str) -> None:
    body = google_error(status, word)
    answer = json_reply(body, status=b"%d No" % status)
    gateway = gateway_to(loop, Upstream(loop, [answer]).start().url, vendor="gemini")
    reply = gemini(gateway)
    assert (reply.status, reply.body) == (status, body)
    assert not [entry for entry in gateway.log() if entry["event"] == "credential_refused"]


def test_a_provider_without_its_secret_is_off(loop: Loop) -> None:
    upstream = Upstream(loop, [OK]).start()
    gateway = gateway_to(loop, upstream.url, secrets={"client-key": CLIENT_KEY})
    reply = chat(gateway)
    refused(reply, 503, "no_target")
    assert upstream.connections == 0
    assert until(lambda: [entry for entry in gateway.log() if "provider-key" in entry.get("message", "")])
