"""A daemon on a bad disk: full, slow, broken, locked; logs that nobody takes. Requests are served, and nothing is lost.

Faults are made below the program: a small file system of its own (unshare(1)), and a library in front of the C library
whose writes and flushes fail or take their time as long as a file says so.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from gproxyd.observe.journal import Journal
from tests.support import raw
from tests.support.process import Process, clean_environ
from tests.support.running import SECRETS, Loop, until
from tests.support.upstream import EVENT_STREAM, Got, Pause, Reset, Script, Upstream, chunk, json_reply
from tests.test_store_crashes import namespaces

MIB = 1024 * 1024
OK = json_reply(b'{"id":"x","object":"chat.completion","model":"m","choices":[],"usage":{"prompt_tokens":5}}')
CONFIG = """\
server: {{listen: ["127.0.0.1:{port}"]}}
log: {{level: {level}}}
streams: {{keepalive: 0s}}
providers:
  up: {{vendor: custom, auth: none, dialects: {{openai_chat: "{url}"}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""
CHAT = raw.request("/up/v1/chat/completions", {"model": "m", "messages": []})
STREAM = raw.request("/up/v1/chat/completions", {"model": "m", "messages": [], "stream": True})
HEALTH = raw.request("/healthz", key=None)


@pytest.fixture(scope="module")
def upstream(loop: Loop) -> Upstream:
    return Upstream(loop, lambda _: [OK]).start()


def config(upstream: Upstream, *, port: int = 0, level: str = "info") -> str:
    return CONFIG.format(url=upstream.url, port=port, level=level)


def asked(port: int, count: int) -> list[float]:
    """So many requests one after the other on a connection; how long each took."""
    took: list[float] = []
    with raw.connect(port) as sock:
        for _ in range(count):
            began = time.monotonic()
            sock.sendall(CHAT)
            assert raw.read(sock).status == 200
            took.append(time.monotonic() - began)
    return sorted(took)


def rows(state: Path) -> tuple[int, int, int]:
    """Rows of usage, different ones, and what the totals have counted."""
    with sqlite3.connect(f"file:{state}/gproxyd.db?mode=ro", uri=True) as connection:
        found = connection.execute("SELECT count(*), count(DISTINCT id) FROM usage").fetchone()
        (counted,) = connection.execute("SELECT coalesce(sum(requests), 0) FROM totals").fetchone()
    connection.close()
    return *found, counted


def booked(state: Path, count: int, seconds: float = 10) -> None:
    until(lambda: rows(state) == (count, count, count), seconds)


# A disk that refuses, or takes its time (H09, H15).

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static const char *under(void) { static const char *p; return p ? p : (p = getenv("FAULTS_UNDER")); }

/* What the file says: an errno's number, "slow", or nothing. */
static int fault(int slow_too) {
    char word[16] = {0};
    static ssize_t (*real_read)(int, void *, size_t);
    if (!real_read) real_read = dlsym(RTLD_NEXT, "read");
    const char *path = getenv("FAULTS_ARE");
    int fd = path ? open(path, O_RDONLY) : -1;
    if (fd < 0) return 0;
    ssize_t got = real_read(fd, word, sizeof word - 1);
    close(fd);
    if (got <= 0) return 0;
    if (!strncmp(word, "slow", 4)) {
        if (slow_too) {
            struct timespec two = {2, 0};
            int told = open(getenv("FAULTS_TOLD"), O_WRONLY | O_APPEND);
            if (told >= 0) { dprintf(told, "x"); close(told); }
            nanosleep(&two, NULL);
        }
        return 0;
    }
    return atoi(word);
}

static int ours(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    const char *prefix = under();
    return size > 0 && prefix && !strncmp(path, prefix, strlen(prefix));
}

#define WRITES(type, name, sign, call) \
    type name sign { \
        static type (*real) sign; \
        int error; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (ours(fd) && (error = fault(0))) { errno = error; return -1; } \
        return real call; \
    }
#define FLUSHES(name) \
    int name(int fd) { \
        static int (*real)(int); \
        int error; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (ours(fd) && (error = fault(1))) { errno = error; return -1; } \
        return real(fd); \
    }
WRITES(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
WRITES(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITES(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
WRITES(int, ftruncate, (int fd, off_t size), (fd, size))
WRITES(int, ftruncate64, (int fd, off64_t size), (fd, size))
FLUSHES(fsync)
FLUSHES(fdatasync)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler to make the library with")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    made = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(made), str(folder / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return made


class Disk:
    """A state directory whose files fail with what `fails` says."""

    def __init__(self, folder: Path, shim: Path) -> None:
        self.state = folder / "state"
        self.state.mkdir(mode=0o700)
        self._are, self._told = folder / "faults", folder / "slept"
        self._are.write_text("")
        self._told.write_text("")
        self.environ = {
            "LD_PRELOAD": str(shim),
            "FAULTS_UNDER": str(self.state),
            "FAULTS_ARE": str(self._are),
            "FAULTS_TOLD": str(self._told),
            "STATE_DIRECTORY": str(self.state),
        }

    def fails(self, how: int | str) -> None:
        self._are.write_text(str(how) if how else "")

    @property
    def slept(self) -> int:
        return len(self._told.read_text())


@pytest.fixture
def disk(tmp_path: Path, shim: Path) -> Disk:
    return Disk(tmp_path, shim)


@pytest.mark.parametrize("error", [5, 30, 28], ids=["EIO", "EROFS", "ENOSPC"])
def test_while_the_disk_refuses_requests_are_served_and_later_all_is_booked(
    tmp_path: Path, disk: Disk, upstream: Upstream, error: int
) -> None:
    """No crash, no loop of crashes: it is told, what was used waits in memory, and is booked once."""
    with Process(tmp_path, config(upstream), SECRETS, **disk.environ) as daemon:
        asked(daemon.port, 20)
        booked(disk.state, 20)
        disk.fails(error)
        took = asked(daemon.port, 100)
        assert took[98] < 0.2, took[-3:]
        assert raw.send(daemon.port, HEALTH).status == 200
        daemon.wait_for("usage_spool_refuses")
        daemon.wait_for("usage_store_refuses")
        figures = raw.send(daemon.port, raw.request("/statsz", key=None)).json["usage_sink"]
        assert (figures["queued"], figures["dropped"]) == (100, 0)
        disk.fails(0)
        booked(disk.state, 120)
        assert daemon.process.poll() is None
        told = [line["event"] for line in daemon.log() if line["event"].startswith("usage_")]
        assert len(told) <= 4, told
        asked(daemon.port, 5)
        booked(disk.state, 125)


def test_a_disk_that_refuses_to_the_end_costs_the_records_and_says_how_many(
    tmp_path: Path, disk: Disk, upstream: Upstream
) -> None:
    with Process(tmp_path, config(upstream), SECRETS, **disk.environ) as daemon:
        asked(daemon.port, 5)
        booked(disk.state, 5)
        disk.fails(5)
        asked(daemon.port, 7)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.process.wait(20) == 0
        assert time.monotonic() - began < 15
        assert daemon.wait_for("usage_records_dropped")["count"] == 7
    disk.fails(0)
    with Process(tmp_path, config(upstream), SECRETS, **disk.environ) as daemon:
        asked(daemon.port, 1)
        booked(disk.state, 6)


def test_a_start_on_a_disk_that_refuses_ends_with_one_message(tmp_path: Path, disk: Disk, upstream: Upstream) -> None:
    """The manager's own limit ends a loop of starts; each of them is short and says why."""
    with Process(tmp_path, config(upstream), SECRETS, **disk.environ) as daemon:
        asked(daemon.port, 1)
        booked(disk.state, 1)
    disk.fails(5)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gproxyd", "serve", "--config", str(tmp_path / "gproxyd.yaml")],
        capture_output=True,
        text=True,
        timeout=30,
        env={**clean_environ(), "GPROXYD_SECRETS_DIR": str(tmp_path / "secrets"), **disk.environ},
    )
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and str(disk.state) in done.stderr, done.stderr
    disk.fails(0)
    with Process(tmp_path, config(upstream), SECRETS, **disk.environ) as daemon:
        asked(daemon.port, 1)
        booked(disk.state, 2)


def test_a_disk_that_flushes_slowly_slows_no_request(tmp_path: Path, disk: Disk, upstream: Upstream) -> None:
    """Two seconds for every flush: the queue grows meanwhile, on disk, and is empty again afterwards."""
    with Process(tmp_path, config(upstream), SECRETS, **disk.environ) as daemon:
        asked(daemon.port, 20)
        booked(disk.state, 20)
        disk.fails("slow")
        took: list[float] = []
        count = 20
        while not disk.slept and count < 12_000:
            count += pipelined(daemon.port, 500)
        assert disk.slept, "nothing was flushed"
        began = time.monotonic()
        while time.monotonic() - began < 1.5:  # within the flush
            took += asked(daemon.port, 20)
            count += 20
        took.sort()
        assert took[len(took) * 99 // 100] < 0.15, took[-5:]
        memory = daemon.memory()["VmRSS"]
        disk.fails(0)
        booked(disk.state, count, 20)
        assert daemon.memory()["VmRSS"] < memory + 32 * MIB
        assert not [line for line in daemon.log() if line["event"] == "usage_writer_died"]


def pipelined(port: int, count: int) -> int:
    """So many requests in few writes."""
    with raw.connect(port, timeout=20) as sock:
        for _ in range(count // 20):
            sock.sendall(CHAT * 20)
            got = b""
            while got.count(b"HTTP/1.1 200 OK") < 20 or not got.endswith(b"}"):
                more = sock.recv(262144)
                assert more
                got += more
    return count // 20 * 20


# A disk that is full (H04), a database that is locked (H06).


@contextmanager
def small_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Processes that start from here on have four megabytes for their state, on a file system of their own."""
    state = folder / "state"
    state.mkdir()
    shell = folder / "python"
    mount = 'mount --make-rprivate / && mount -t tmpfs -o size=4m,mode=700 none "$STATE_DIRECTORY"'
    shell.write_text(f'#!/bin/sh\nexec unshare -rm sh -c \'{mount} && exec "{sys.executable}" "$@"\' sh "$@"\n')
    shell.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(shell))
    yield {"STATE_DIRECTORY": str(state)}


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def counted(port: int) -> int:
    """Requests to the upstream, as the daemon tells: nobody outside its namespace can open its database."""
    told = raw.send(port, raw.request("/admin/usage?group_by=provider")).json["data"]
    return sum(row["requests"] for row in told if row["key"] == "up")


@pytest.mark.skipif(not namespaces(), reason="no small disk can be made here (unshare -rm)")
def test_with_a_full_disk_requests_are_served_and_later_all_is_booked(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        small_disk(tmp_path, monkeypatch) as environ,
        Process(tmp_path, config(upstream), SECRETS, **environ) as daemon,
    ):
        state = Path(f"/proc/{daemon.pid}/root{environ['STATE_DIRECTORY']}")
        asked(daemon.port, 20)
        until(lambda: counted(daemon.port) == 20)
        filler = state / "filler"
        with pytest.raises(OSError, match="No space"):
            fill(filler)
        took = asked(daemon.port, 400)
        assert took[395] < 0.2, took[-5:]
        daemon.wait_for("usage_spool_refuses")
        filler.unlink()
        until(lambda: counted(daemon.port) == 420, 20)
        assert sum(line["event"] == "usage_store_refuses" for line in daemon.log()) <= 1


def test_while_the_database_is_locked_requests_are_served_and_later_all_is_booked(
    tmp_path: Path, upstream: Upstream
) -> None:
    with Process(tmp_path, config(upstream), SECRETS) as daemon:
        asked(daemon.port, 10)
        booked(tmp_path, 10)
        other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None, timeout=5)
        other.execute("BEGIN EXCLUSIVE")
        began, took = time.monotonic(), []
        while time.monotonic() - began < 3.0:
            took += asked(daemon.port, 50)
        other.execute("ROLLBACK")
        other.close()
        took.sort()
        assert took[len(took) * 99 // 100] < 0.1, took[-5:]
        booked(tmp_path, 10 + len(took), 15)
        assert sum(line["event"] == "usage_store_refuses" for line in daemon.log()) == 1


# Everything at once (M07).


def test_a_locked_database_an_upstream_that_breaks_and_an_end_together_lose_nothing(loop: Loop, tmp_path: Path) -> None:
    """Each client is told how its stream ended, the process ends in time, and the next one has every record."""

    def script(got: Got) -> Script:
        return (
            [EVENT_STREAM, chunk(b'data: {"choices":[{}]}\n\n'), Pause(0.6), Reset()] if b"stream" in got.body else [OK]
        )

    breaking = Upstream(loop, script).start()
    with Process(tmp_path, config(breaking), SECRETS) as daemon:
        asked(daemon.port, 10)
        booked(tmp_path, 10)
        other = sqlite3.connect(tmp_path / "gproxyd.db", isolation_level=None, timeout=5)
        other.execute("BEGIN EXCLUSIVE")
        with ExitStack() as stack:
            streams = [stack.enter_context(raw.connect(daemon.port)) for _ in range(8)]
            for sock in streams:
                sock.sendall(STREAM)
            seen = [sock.recv(65536) for sock in streams]
            began = time.monotonic()
            daemon.signal(signal.SIGTERM)
            for sock, first in zip(streams, seen, strict=True):
                reply = raw.read(sock, seen=first)
                assert reply.status == 200 and not reply.complete and b'"error"' in reply.body
        assert daemon.process.wait(20) == 0
        assert time.monotonic() - began < 15
        other.execute("ROLLBACK")
        other.close()
    with Process(tmp_path, config(breaking), SECRETS) as daemon:
        asked(daemon.port, 1)
        booked(tmp_path, 19)


# A log that nobody takes (H05).


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def logging_to(folder: Path, upstream: Upstream, stderr: int) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A daemon whose log goes to a descriptor, and its port."""
    port = free_port()
    (folder / "gproxyd.yaml").write_text(config(upstream, port=port, level="debug"))
    (folder / "secrets").mkdir()
    (folder / "secrets" / "client-key").touch(0o600)
    (folder / "secrets" / "client-key").write_text(SECRETS["client-key"])
    process = subprocess.Popen(
        [sys.executable, "-m", "gproxyd", "serve", "--config", str(folder / "gproxyd.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={**clean_environ(), "GPROXYD_SECRETS_DIR": str(folder / "secrets"), "STATE_DIRECTORY": str(folder)},
    )
    try:
        until(lambda: process.poll() is not None or _answers(port), 20)
        assert process.poll() is None
        yield process, port
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def _answers(port: int) -> bool:
    try:
        return raw.send(port, HEALTH).status == 200
    except OSError:
        return False


def test_a_log_that_nobody_reads_slows_no_request_and_what_is_lost_is_counted(
    tmp_path: Path, upstream: Upstream
) -> None:
    """The pipe is full after a few hundred lines; then ten thousand wait, and the rest is counted."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 65536)
    with logging_to(tmp_path, upstream, writer) as (process, port):
        os.close(writer)
        count = 0
        while count < 11_000:
            count += pipelined(port, 1000)
        took = asked(port, 200)
        assert took[195] < 0.1, took[-5:]
        booked(tmp_path, count + 200)
        text: list[bytes] = []
        thread = threading.Thread(target=_drain, args=(reader, text))
        thread.start()
        process.terminate()
        assert process.wait(20) == 0
        thread.join(10)
    lines = [json.loads(line) for line in b"".join(text).splitlines()]
    lost = sum(line["count"] for line in lines if line["event"] == "log_lines_dropped")
    told = sum(line["event"] == "request" for line in lines)
    assert lost > 500
    assert told + lost >= count + 200


def _drain(reader: int, into: list[bytes]) -> None:
    while data := os.read(reader, 1 << 20):
        into.append(data)
    os.close(reader)


def test_a_log_on_a_full_disk_slows_no_request(tmp_path: Path, upstream: Upstream) -> None:
    with open("/dev/full", "wb", buffering=0) as full, logging_to(tmp_path, upstream, full.fileno()) as (process, port):
        pipelined(port, 1000)
        took = asked(port, 200)
        assert took[195] < 0.1, took[-5:]
        booked(tmp_path, 1200)
        process.terminate()
        assert process.wait(20) == 0


def test_what_a_full_disk_has_cost_of_the_log_is_told_when_there_is_room_again(tmp_path: Path) -> None:
    """Every line that was lost, however many times the disk has refused in between."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    journal = Journal(level="info", form="json", descriptor=descriptor)
    for number in range(1000):
        journal.record("info", "line", number=number)
        if number % 300 == 299:
            time.sleep(0.1)
    until(lambda: journal.lost >= 1000)
    file = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, descriptor)
    journal.record("info", "line", number=1000)
    journal.close()
    os.close(file)
    os.close(descriptor)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line.get("number") for line in lines if line["event"] == "line"] == [1000]
    assert sum(line["count"] for line in lines if line["event"] == "log_lines_dropped") == 1000


def test_a_line_that_a_full_disk_took_in_part_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    journal = Journal(level="info", form="json", descriptor=descriptor)
    real, state = os.write, {"left": 30}

    def full(fd: int, data: bytes) -> int:
        if fd != descriptor:
            return real(fd, data)
        if not state["left"]:
            raise OSError(28, "No space left on device")
        some, state["left"] = data[: state["left"]], 0
        return real(fd, some)

    monkeypatch.setattr(os, "write", full)
    journal.record("info", "torn")
    until(lambda: journal.lost)
    monkeypatch.setattr(os, "write", real)
    journal.record("info", "whole")
    journal.close()
    os.close(descriptor)
    whole = [
        line for line in (tmp_path / "log").read_text().splitlines() if line.endswith("}") and line.startswith("{")
    ]
    assert "whole" in [json.loads(line)["event"] for line in whole if line.count('{"time"') == 1]
