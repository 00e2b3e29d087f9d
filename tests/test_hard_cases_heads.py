"""Heads at their limits, byte by byte as well; bodies that wait for leave; floods of keys; time that is not yet."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import gproxyd
from tests.support import raw
from tests.support.certs import Authority, believed
from tests.support.checks import Bench, check_alive, check_error, quick_log
from tests.support.framing import CHUNKED, COUNT, FILES, HOST, KEY, LINE, TOTAL, field, filled, get, post, target_of
from tests.support.process import Process
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, CONFIG, PROVIDER_KEY, SECRETS, Loop, until
from tests.support.upstream import Upstream, json_reply
from tests.test_framing import PARSERS

MARK = b"mark-of-the-peer"
OWN = len(HOST + KEY) - 2 * len(b": \r\n")


@pytest.fixture(scope="module")
def made(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        yield Bench(loop)


@pytest.fixture
def bench(made: Bench) -> Bench:
    made.reset()
    made.upstream.requests.clear()
    return made


def lines(count: int) -> bytes:
    """A request with so many header lines."""
    return get(b"".join(b"X-%d: y\r\n" % at for at in range(count - 2)))


# The parser counts the names of header lines in its own way, so of those the limit is met within a few bytes.
AT_THE_LIMIT = {
    "a target": get(line=b"GET %b HTTP/1.1" % target_of(LINE)),
    "a header": field(b"X-Y: " + b"a" * (LINE - 3)),
    "a name": field(b"a" * (LINE - 20) + b": x"),
    "header lines": lines(COUNT),
    "all header lines": get(filled(TOTAL - OWN)),
}
BEYOND_IT = {
    "a target": get(line=b"GET %b HTTP/1.1" % target_of(LINE + 1)),
    "a header": field(b"X-Y: " + b"a" * (LINE + 1)),
    "a name": field(b"a" * (LINE + 1) + b": x"),
    "header lines": lines(COUNT + 1),
    "all header lines": get(filled(TOTAL - OWN + 1)),
}


def pieces(data: bytes, how: str) -> Iterator[bytes]:
    """`bytes`: the beginning and the end byte by byte; all of it would take long and cross no other limit."""
    size, at = {"whole": len(data), "segments": 1460, "bytes": 97}[how], 0
    while at < len(data):
        step = 1 if how == "bytes" and (at < 500 or at >= len(data) - 700) else size
        yield data[at : at + step]
        at += step


def sent(port: int, data: bytes, how: str) -> Reply:
    """What cannot be sent any more has been refused."""
    with raw.connect(port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces(data, how):
                sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return raw.read(sock)


HOW = ["whole", "segments", "bytes"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", AT_THE_LIMIT)
def test_a_head_at_its_limit_passes_however_it_comes(bench: Bench, what: str, how: str) -> None:
    reply = sent(bench.gateway.port, AT_THE_LIMIT[what], how)
    assert (reply.status, reply.header("connection")) == (200, None), reply.data[:300]
    (got,) = bench.upstream.requests
    if what == "a target":
        assert b"/openai-main" + got.target == target_of(LINE)
    if what == "header lines":
        assert [value for name, value in got.headers if name.startswith(b"X-")] == [b"y"] * (COUNT - 2)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("what", BEYOND_IT)
def test_a_byte_or_a_line_more_is_431_however_it_comes(bench: Bench, what: str, how: str) -> None:
    reply = sent(bench.gateway.port, BEYOND_IT[what], how)
    check_error(reply, 431, "headers_too_large")
    assert reply.header("connection") == "close"
    assert bench.upstream.requests == []
    own = reply.header("x-request-id")
    told = until(lambda: [line for line in bench.gateway.log() if line.get("request_id") == own])
    assert [(line["event"], line["status"]) for line in told] == [("malformed_request", 431)]


TOO_LARGE = {
    "a target": b"GET /%b HTTP/1.1\r\n" % (MARK * 3000),
    "a header": b"GET / HTTP/1.1\r\nX: %b\r\n" % (MARK * 3000),
    "a name": b"GET / HTTP/1.1\r\n%b: x\r\n" % (MARK * 3000),
    "many lines": b"GET / HTTP/1.1\r\n" + b"X: %b\r\n" % MARK * 300,
    "many bytes": b"GET / HTTP/1.1\r\n" + b"X: %b\r\n" % (MARK * 500) * 30,
}


@pytest.mark.parametrize("before", ["", "an answered request", "a request that runs"])
@pytest.mark.parametrize("end", [b"", b"\r\n"], ids=["endless", "ended"])
@pytest.mark.parametrize("what", TOO_LARGE)
def test_nothing_of_a_head_that_is_too_large_is_repeated(bench: Bench, what: str, end: bytes, before: str) -> None:
    """The first on its connection, a later one, or one behind another in the same piece."""
    with raw.connect(bench.gateway.port) as sock:
        if before == "an answered request":
            sock.sendall(get())
            assert raw.read(sock).status == 200
        first = get() if before == "a request that runs" else b""
        data = TOO_LARGE[what] + end
        sock.sendall(first)
        if first:
            until(lambda: bench.upstream.requests)
        try:
            sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        reply = raw.read(sock, until_complete=False)
    answers = reply.data.split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * bool(first) + [b"431"]
    assert reply.ended in ("fin", "rst")
    assert MARK not in reply.data
    until(bench.gateway.at_rest)
    assert MARK.decode() not in bench.gateway.log_path.read_text()
    check_alive(bench.gateway)


BEHIND = post(CHUNKED, b"5\r\nhello\r\n0\r\n", target=FILES)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tail", [b"X: " + b"a" * 20_000 + b"\r\n\r\n", b"X-T: 1\r\n" * 300 + b"\r\n"])
def test_a_trailer_that_is_too_large_is_a_malformed_body(bench: Bench, tail: bytes, how: str) -> None:
    """It is no header: whoever is told 431 would look for a header to leave out."""
    reply = sent(bench.gateway.port, BEHIND + tail, how)
    check_error(reply, 400, "invalid_request")
    assert not [got for got in bench.upstream.requests if got.complete]


def test_a_head_without_end_holds_no_more_than_a_head_may(bench: Bench) -> None:
    """Lines that are each short enough, and not too many: together they are refused before their end comes."""
    with raw.connect(bench.gateway.port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        taken = 0
        try:
            for _ in range(100):
                sock.sendall(b"X: %b\r\n" % (b"a" * 8000))
                taken += 1
                time.sleep(0.002)
        except (BrokenPipeError, ConnectionResetError):
            pass
        reply = raw.read(sock)
    assert reply.status == 431
    check_alive(bench.gateway)


# Which parser reads them.


@pytest.mark.parametrize("parser", PARSERS)
def test_a_slow_parser_is_told_of(loop: Loop, tmp_path: Path, parser: str) -> None:
    upstream = Upstream(loop, [json_reply(b"{}")]).start()
    with Process(tmp_path, CONFIG.format(vendor=upstream.url), SECRETS, **PARSERS[parser]) as daemon:
        told = [line["level"] for line in daemon.log() if line["event"] == "slow_parser"]
        assert told == ([] if parser == "c" else ["warning"])


# Bodies that wait for leave.

QUOTAS = """\
users: {{poor: {{permissions: ["*"], quota: {{usd: "0"}}, keys: {{k: {{token: ck-poor-1}}}}}},
  slow: {{permissions: ["*"], rate_limits: [{{model: "*", rpm: 1}}], keys: {{k: {{token: ck-slow-1}}}}}},
  tester"""


@pytest.fixture(scope="module")
def limited(loop: Loop) -> Iterator[Bench]:
    with quick_log():
        yield Bench(loop, CONFIG.replace("users: {{tester", QUOTAS))


FORM = ("Content-Type", "multipart/form-data; boundary=b")
WAITING = [FORM, ("Content-Length", "100000"), ("Expect", "100-continue")]


@pytest.mark.parametrize(("key", "status"), [("ck-poor-1", 402), ("ck-slow-1", 429)])
def test_who_has_spent_all_is_told_before_a_streamed_body_is_asked_for(limited: Bench, key: str, status: int) -> None:
    if status == 429:
        first = raw.request("/openai-main/v1/files", b"x", key=key, headers=[FORM])
        assert raw.send(limited.gateway.port, first).status == 200
    before = len(limited.upstream.requests)
    reply = raw.send(limited.gateway.port, raw.request("/openai-main/v1/files", b"", key=key, headers=WAITING))
    assert (reply.status, reply.data.count(b"HTTP/1.1 ")) == (status, 1), reply.data
    assert reply.header("connection") == "close"
    assert len(limited.upstream.requests) == before


# Keys by the thousand.


def test_a_flood_of_wrong_keys_does_not_slow_a_good_one(bench: Bench) -> None:
    """Four clients try keys as fast as they are refused."""
    over = threading.Event()
    tried = [0] * 4

    def guess(number: int) -> None:
        with raw.connect(bench.gateway.port) as sock:
            while not over.is_set():
                wrong = [raw.request("/v1/models", key=f"ck-{number}-{os.urandom(8).hex()}") for _ in range(20)]
                sock.sendall(b"".join(wrong))
                got = b""
                while got.count(b"HTTP/1.1 401") < len(wrong) or not got.endswith(b"}"):
                    got += sock.recv(262144)
                tried[number] += len(wrong)

    threads = [threading.Thread(target=guess, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    took: list[float] = []
    try:
        with raw.connect(bench.gateway.port) as sock:
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                began = time.monotonic()
                sock.sendall(get())
                assert raw.read(sock).status == 200
                took.append(time.monotonic() - began)
    finally:
        over.set()
        for thread in threads:
            thread.join(10)
    took.sort()
    print(f"{sum(tried)} keys tried; a good one: p50 {took[len(took) // 2] * 1e3:.1f} ms of {len(took)}")
    assert sum(tried) > 200
    assert took[len(took) * 9 // 10] < 0.5, took[-5:]


# Upstreams whose time has not come.


def not_yet(authority: Authority, folder: Path) -> None:
    """A certificate of this authority that begins tomorrow, in server.pem and server.key."""
    (folder / "ca.cnf").write_text(
        f"[ca]\ndefault_ca = d\n[d]\ndatabase = {folder}/index\nserial = {folder}/serial\nnew_certs_dir = {folder}\n"
        "default_md = sha256\npolicy = p\ncopy_extensions = copy\nunique_subject = no\n[p]\ncommonName = supplied\n"
    )
    (folder / "index").touch()
    (folder / "serial").write_text("01\n")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(folder / "server.key")]
    named = ["-subj", "/CN=server", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    begins, ends = (time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * 86400)) for days in (1, 2))
    signer = ["-cert", str(authority.path), "-keyfile", str(authority.path.with_suffix(".key"))]
    for command in (
        ["req", *key, "-out", str(folder / "server.csr"), *named],
        ["ca", "-batch", "-notext", "-config", str(folder / "ca.cnf"), *signer, "-startdate", begins, "-enddate", ends,
         "-in", str(folder / "server.csr"), "-out", str(folder / "server.pem")],
    ):  # fmt: skip
        subprocess.run(["openssl", *command], check=True, capture_output=True, timeout=30)


def test_a_certificate_that_is_not_valid_yet_is_not_believed(loop: Loop, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    not_yet(authority, tmp_path)
    with believed(authority):
        context = authority.server()
        context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
        upstream = Upstream(loop, [json_reply(b"{}")]).start(tls=context)
        gateway = loop.gateway(CONFIG.format(vendor=upstream.url.replace("127.0.0.1", "localhost")))
        reply = raw.send(gateway.port, raw.request("/openai-main/v1/files/f"))
        check_error(reply, 502, "upstream_tls")
        assert upstream.requests == []
        assert PROVIDER_KEY not in gateway.log_path.read_text() and CLIENT_KEY not in gateway.log_path.read_text()


def test_nowhere_is_a_certificate_believed_unseen() -> None:
    """There is no switch for it either."""
    for path in Path(gproxyd.__file__).parent.rglob("*.py"):
        text = path.read_text()
        for word in ("CERT_NONE", "check_hostname = False", "verify=False", "ssl=False", "_create_unverified"):
            assert word not in text, path
