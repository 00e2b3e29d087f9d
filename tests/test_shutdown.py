"""How the daemon ends, what it tells its manager meanwhile, and how it fails to start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gproxyd.host.systemd import Manager, Pulse
from tests.support import raw
from tests.support.process import Process, run
from tests.support.running import CONFIG, SECRETS, until

CHAT = raw.Chat().body()


class Ear:
    """A service manager's end of $NOTIFY_SOCKET: every datagram, and when it came."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.heard: list[tuple[float, list[str]]] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(65536):
                self.heard.append((time.monotonic(), data.decode().split("\n")))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def lines(self) -> list[str]:
        return [line for _, lines in self.heard for line in lines]

    def times(self, line: str) -> list[float]:
        return [at for at, lines in self.heard if line in lines]


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[Ear]:
    made = Ear(str(tmp_path / "notify"))
    yield made
    made.close()


@pytest.fixture
def vendor(vendor_at: tuple[object, str]) -> str:
    return vendor_at[1]


def daemon(folder: Path, vendor: str, *, drain: str = "20s", listen: str = "", **environ: str) -> Process:
    config = CONFIG.format(vendor=vendor).replace('["127.0.0.1:0"]', f'["127.0.0.1:0"], drain: {drain}{listen}')
    return Process(folder, config, SECRETS, **environ)


def streaming(port: int, events: int, delay: int = 100) -> tuple[socket.socket, bytes]:
    """A stream that has begun; `delay` in milliseconds."""
    sock = raw.connect(port)
    slow = [("x-demo-event-delay", str(delay)), ("x-demo-events", str(events))]
    sock.sendall(raw.request("/v1/chat/completions", {**CHAT, "stream": True}, headers=slow))
    return sock, sock.recv(65536)


def rows(folder: Path) -> list[tuple[int, int | None, str]]:
    with contextlib.closing(sqlite3.connect(folder / "gproxyd.db")) as database:
        return database.execute("SELECT status, output_tokens, provenance FROM usage ORDER BY seq").fetchall()


# The order of things.


def test_idle_connections_end_at_once_busy_ones_with_their_answer_and_streams_in_full(
    tmp_path: Path, vendor: str
) -> None:
    with daemon(tmp_path, vendor) as running, raw.connect(running.port) as idle, raw.connect(running.port) as busy:
        idle.sendall(raw.request("/healthz", key=None))
        assert raw.read(idle).header("connection") is None
        sock, first = streaming(running.port, 20)
        time.sleep(0.6)
        busy.sendall(raw.request("/healthz", key=None))
        assert raw.read(busy).header("connection") is None
        running.signal(signal.SIGTERM)
        running.wait_for("draining")
        began = time.monotonic()
        busy.sendall(raw.request("/readyz", key=None))
        told = raw.read(busy)
        assert (told.status, told.body, told.header("connection")) == (503, b"draining", "close")
        assert idle.recv(10) == b""
        assert time.monotonic() - began < 0.5, "an idle connection was kept until the streams were over"
        with pytest.raises(OSError, match="refused"):
            raw.connect(running.port)
        assert raw.read(sock, seen=first).complete
        sock.close()
        assert running.process.wait(5) == 0
    assert [status for status, _, _ in rows(tmp_path)] == [200]


def test_a_request_whose_head_has_begun_is_served(tmp_path: Path, vendor: str) -> None:
    """Whenever its rest comes: the looks at who is idle come every 50 ms, the rests of these every 3 ms."""
    request = raw.request("/v1/chat/completions", CHAT)
    with daemon(tmp_path, vendor) as running, ExitStack() as stack:
        socks = [stack.enter_context(raw.connect(running.port)) for _ in range(60)]
        for sock in socks:
            sock.sendall(request[:40])
        time.sleep(0.7)
        running.signal(signal.SIGTERM)
        running.wait_for("draining")
        time.sleep(0.7)
        for sock in socks:
            sock.sendall(request[40:])
            time.sleep(0.003)
        for sock in socks:
            reply = raw.read(sock)
            assert (reply.status, reply.header("connection")) == (200, "close")
        assert running.process.wait(5) == 0


def test_readiness_is_told_at_the_operators_address_to_the_end(tmp_path: Path, vendor: str) -> None:
    with daemon(tmp_path, vendor, listen=', ops_listen: ["127.0.0.1:0"]') as running:
        ops = int(running.ready["listen"].split()[1].rpartition(":")[2])
        assert raw.send(ops, raw.request("/readyz", key=None)).status == 200
        sock, first = streaming(running.port, 10)
        running.signal(signal.SIGTERM)
        running.wait_for("draining")
        assert raw.send(ops, raw.request("/readyz", key=None)).status == 503
        assert raw.send(ops, raw.request("/healthz", key=None)).status == 200
        assert raw.read(sock, seen=first).complete
        sock.close()
        assert running.process.wait(5) == 0


def test_at_the_deadline_streams_end_with_their_dialects_error_and_are_booked(tmp_path: Path, vendor: str) -> None:
    with daemon(tmp_path, vendor, drain="1s") as running:
        sock, first = streaming(running.port, 1000)
        running.signal(signal.SIGTERM)
        began = time.monotonic()
        whole = raw.read(sock, seen=first)
        sock.close()
        assert not whole.complete
        assert b'"code":"overloaded"' in whole.body
        assert running.process.wait(5) == 0
        assert 0.9 < time.monotonic() - began < 3
    ((_, tokens, provenance),) = rows(tmp_path)
    assert tokens is not None and tokens > 5
    assert provenance in ("partial", "estimated")


def test_a_second_signal_ends_it_at_once_and_records_are_kept(tmp_path: Path, vendor: str) -> None:
    with daemon(tmp_path, vendor) as running:
        sock, first = streaming(running.port, 1000)
        running.signal(signal.SIGTERM)
        running.wait_for("draining")
        began = time.monotonic()
        running.signal(signal.SIGINT)
        assert not raw.read(sock, seen=first).complete
        sock.close()
        assert running.process.wait(5) == 0
        assert time.monotonic() - began < 3
    assert len(rows(tmp_path)) == 1


def test_a_third_signal_waits_for_nothing(tmp_path: Path, vendor: str) -> None:
    with daemon(tmp_path, vendor) as running:
        sock, _ = streaming(running.port, 1000)
        for _ in range(2):
            running.signal(signal.SIGTERM)
            time.sleep(0.05)
        while running.process.poll() is None:
            running.signal(signal.SIGTERM)
            time.sleep(0.01)
        sock.close()
        assert running.process.returncode in (0, 143, -signal.SIGTERM), "it had ended already, or was ended"


# What the manager hears.


@pytest.mark.parametrize("abstract", [False, True], ids=["file", "abstract"])
def test_the_manager_hears_of_every_step_in_order(tmp_path: Path, vendor: str, abstract: bool) -> None:
    address = f"@gproxyd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    ear = Ear(address)
    try:
        with daemon(tmp_path, vendor, NOTIFY_SOCKET=address) as running:
            until(lambda: "READY=1" in ear.lines())
            assert ear.lines()[0] == "READY=1", "something was told before it served"
            assert raw.send(running.port, raw.request("/healthz", key=None)).status == 200
            sock, first = streaming(running.port, 30)
            busy = "STATUS=serving: 1 requests in flight, 1 of them being answered"
            until(lambda: busy in ear.lines())
            running.signal(signal.SIGTERM)
            until(lambda: "STOPPING=1" in ear.lines())
            until(lambda: any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in ear.lines()))
            assert raw.read(sock, seen=first).complete
            sock.close()
            assert running.process.wait(5) == 0
        assert ear.lines().count("READY=1") == 1
        assert not any("WATCHDOG" in line for line in ear.lines()), "nobody had asked for it"
    finally:
        ear.close()


def test_a_reload_is_told_with_its_time_and_its_end(tmp_path: Path, vendor: str, ear: Ear) -> None:
    with daemon(tmp_path, vendor, NOTIFY_SOCKET=str(tmp_path / "notify")) as running:
        until(lambda: "READY=1" in ear.lines())
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        running.signal(signal.SIGHUP)
        running.wait_for("reloaded")
        until(lambda: ear.lines().count("READY=1") == 2)
    (begun,) = (lines for _, lines in ear.heard if "RELOADING=1" in lines)
    assert before < int(begun[1].removeprefix("MONOTONIC_USEC=")) < before + 5_000_000


def test_no_reload_and_no_hand_over_takes_more_than_one_voice(tmp_path: Path, vendor: str, ear: Ear) -> None:
    """After a hand-over only the new process speaks: the old one's STOPPING would end the new one."""
    with daemon(tmp_path, vendor, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="800000") as running:
        running.signal(signal.SIGUSR2)
        heir = running.wait_for("handed_over", 30)["pid"]
        try:
            until(lambda: f"MAINPID={heir}" in ear.lines())
            assert running.process.wait(5) == 0
            mine = len(ear.heard)
            until(lambda: "WATCHDOG=1" in [line for _, lines in ear.heard[mine:] for line in lines])
            assert "STOPPING=1" not in ear.lines()
        finally:
            os.kill(heir, signal.SIGTERM)
            until(lambda: "STOPPING=1" in ear.lines())


def test_the_watchdog_is_fed_by_the_loop_and_not_when_it_is_blocked(tmp_path: Path, vendor: str, ear: Ear) -> None:
    with daemon(tmp_path, vendor, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="1000000") as running:
        until(lambda: len(ear.times("WATCHDOG=1")) >= 4)
        gaps = [later - one for one, later in zip(ear.times("WATCHDOG=1"), ear.times("WATCHDOG=1")[1:], strict=False)]
        assert max(gaps) < 0.5, "less often than twice per interval"
        running.signal(signal.SIGSTOP)
        time.sleep(0.1)
        count = len(ear.times("WATCHDOG=1"))
        time.sleep(1)
        assert len(ear.times("WATCHDOG=1")) == count
        running.signal(signal.SIGCONT)
        until(lambda: len(ear.times("WATCHDOG=1")) > count)


def test_a_watchdog_for_another_process_is_not_ours() -> None:
    environ = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
    assert Manager.take(environ).watchdog is None
    assert environ == {}, "a program that is started from here would speak for the daemon"
    ours = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}
    assert Manager.take(ours).watchdog == 1.0


@pytest.mark.parametrize("well", [True, False])
def test_the_watchdog_hears_nothing_from_a_daemon_that_is_not_well(tmp_path: Path, ear: Ear, well: bool) -> None:
    manager = Manager(str(tmp_path / "notify"), 0.2)

    async def beat() -> None:
        pulse = Pulse(manager, asyncio.get_running_loop(), lambda: well, lambda: "two\nlines")
        pulse.start()
        await asyncio.sleep(0.5)
        pulse.stop()

    asyncio.run(beat())
    until(lambda: ear.heard)
    assert ear.lines().count("STATUS=two lines") == 1
    assert ("WATCHDOG=1" in ear.lines()) is well


def test_a_manager_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    for address in (None, str(tmp_path / "nothing"), "@nothing", "not/absolute"):
        began = time.monotonic()
        manager = Manager(address, 1.0)
        manager.ready()
        manager.tell("WATCHDOG=1")
        assert time.monotonic() - began < 1


# How it does not start.


def test_a_port_that_is_taken_fails_the_start_and_is_named(tmp_path: Path, vendor: str, ear: Ear) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        told = started(tmp_path, CONFIG.format(vendor=vendor).replace("127.0.0.1:0", address))
    assert told.returncode == 1
    assert f"cannot listen on {address}: " in told.stderr
    assert "READY=1" not in ear.lines()


def test_a_configuration_that_cannot_be_used_ends_with_ex_config(tmp_path: Path, ear: Ear) -> None:
    told = started(tmp_path, "providers: [wrong]\n")
    assert told.returncode == 78
    assert "providers" in told.stderr
    assert "READY=1" not in ear.lines()


def test_a_state_directory_that_cannot_be_used_fails_the_start(tmp_path: Path, vendor: str, ear: Ear) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    told = started(tmp_path, CONFIG.format(vendor=vendor), STATE_DIRECTORY=str(tmp_path / "state"))
    assert told.returncode == 1
    assert re.search(r"gproxyd: cannot use .*/state/gproxyd.db", told.stderr)
    assert "Traceback" not in told.stderr
    assert "READY=1" not in ear.lines()


@pytest.mark.parametrize("mode", ["PYTHONDEVMODE", "PYTHONASYNCIODEBUG"])
def test_no_mode_for_developers_is_served_in(tmp_path: Path, vendor: str, mode: str) -> None:
    """Its answers show tracebacks, and its parser takes what ours would refuse."""
    told = started(tmp_path, CONFIG.format(vendor=vendor), **{mode: "1"})
    assert told.returncode == 1
    assert "development mode" in told.stderr


def started(folder: Path, config: str, **environ: str) -> subprocess.CompletedProcess[str]:
    prepared = Process(folder, config, SECRETS)
    given = {name: prepared._environ[name] for name in ("GPROXYD_SECRETS_DIR", "STATE_DIRECTORY")} | environ
    return run("serve", "--config", str(prepared.config), NOTIFY_SOCKET=str(folder / "notify"), **given)


def test_a_crash_leaves_no_image_of_the_memory(tmp_path: Path, vendor: str) -> None:
    """It would hold every key."""
    with daemon(tmp_path, vendor) as running:
        limits = Path(f"/proc/{running.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits)
        running.signal(signal.SIGSEGV)
        running.process.wait(5)
        said = (tmp_path / "log.jsonl").read_text()
    assert "Fatal Python error: Segmentation fault" in said
    assert not any(secret in said for secret in SECRETS.values())
