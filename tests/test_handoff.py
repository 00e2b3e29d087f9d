"""Another process takes over: on the same sockets, with what the first one knew, and nobody notices."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gproxyd.host import systemd
from gproxyd.units import parse_usd
from tests.support import raw
from tests.support.process import Process, run
from tests.support.running import CLIENT_KEY, CONFIG, SECRETS, until

CHAT = raw.Chat().body()
SLOW = [("x-demo-event-delay", "150"), ("x-demo-events", "20")]
ANN, BEN = "ck-ann-handoff", "ck-ben-handoff"

LIMIT = 100 * 10**9

PEOPLE = f"""\
  ann: {{role: user, permissions: ["*"], quota: {{usd: "100"}}, keys: {{k: {{token: {ANN}}}}}}}
  ben: {{role: user, permissions: ["*"], rate_limits: [{{rpm: 3}}], keys: {{k: {{token: {BEN}}}}}}}
"""


class Line(Process):
    """A daemon and all who come after it."""

    def __init__(self, folder: Path, vendor: str, listen: str = '["127.0.0.1:0"]') -> None:
        config = (
            CONFIG.format(vendor=vendor)
            .replace('["127.0.0.1:0"]', listen)
            .replace("\nusers: {", "\nusers:\n  ")
            .rstrip()
            .removesuffix("}")
        )
        priced = '{id: gpt-4.1-mini, price: {input: "1.00", output: "1.00"}}'
        config = config.replace("{id: gpt-4.1-mini}", priced) + "\n" + PEOPLE
        self.runtime = folder / "run"
        self.runtime.mkdir()
        super().__init__(folder, config, SECRETS, RUNTIME_DIRECTORY=str(self.runtime))

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[arg-type]
        for pid in self.heirs():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in self.heirs()))

    def log(self) -> list[dict[str, Any]]:
        """Without what a process that cannot even begin tells people."""
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def heirs(self) -> list[int]:
        return [line["pid"] for line in self.log() if line["event"] == "handed_over"]

    def hand_over(self) -> int:
        """Has a process take over from the one that serves; returns its pid."""
        known = self.heirs()
        os.kill(known[-1] if known else self.pid, signal.SIGUSR2)
        until(lambda: len(self.heirs()) > len(known), 30)
        return self.heirs()[-1]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run(*words, RUNTIME_DIRECTORY=str(self.runtime))

    def chat(self, key: str = CLIENT_KEY, **more: object) -> raw.Reply:
        return raw.send(self.port, raw.request("/v1/chat/completions", {**CHAT, **more}, key=key))

    def rows(self) -> list[tuple[str, int, int]]:
        with contextlib.closing(sqlite3.connect(self.folder / "gproxyd.db")) as database:
            return database.execute("SELECT id, status, cost_nanousd FROM usage").fetchall()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def line(tmp_path: Path, vendor_at: tuple[object, str]) -> Iterator[Line]:
    with Line(tmp_path, vendor_at[1]) as running:
        yield running


def streaming(line: Line, key: str = CLIENT_KEY) -> tuple[socket.socket, bytes]:
    """A stream of three seconds that has begun."""
    sock = raw.connect(line.port)
    sock.sendall(raw.request("/v1/chat/completions", {**CHAT, "stream": True}, headers=SLOW, key=key))
    return sock, sock.recv(65536)


def test_the_new_process_serves_on_the_same_port_while_the_old_one_ends_its_stream(line: Line) -> None:
    began = time.monotonic()
    sock, first = streaming(line)
    heir = line.hand_over()
    assert line.chat().status == 200
    assert alive(line.pid), "the old one left its client"
    assert b"\ngproxyd_predecessors 1.0\n" in raw.send(line.port, raw.request("/metrics", key=None)).body
    whole = raw.read(sock, seen=first)
    assert whole.complete
    sock.close()
    assert line.process.wait(5) == 0
    assert time.monotonic() - began > 2, "the old one did not stay for its stream"
    assert alive(heir)
    until(lambda: b"\ngproxyd_predecessors 0.0\n" in raw.send(line.port, raw.request("/metrics", key=None)).body)
    assert line.chat().status == 200


def test_one_connection_after_the_other_moves_and_hears_of_it(line: Line) -> None:
    with raw.connect(line.port) as talking, raw.connect(line.port) as silent:
        silent.sendall(raw.request("/healthz", key=None))
        assert raw.read(silent).header("connection") is None
        changing = threading.Thread(target=line.hand_over)
        changing.start()
        for _ in range(1000):
            talking.sendall(raw.request("/v1/chat/completions", CHAT))
            reply = raw.read(talking)
            assert reply.status == 200
            if reply.header("connection") == "close":
                break
            time.sleep(0.02)
        changing.join()
        assert talking.recv(100) == b""
        assert silent.recv(100) == b"", "a connection without a request has nothing to wait for"
    assert line.process.wait(5) == 0


def test_it_brings_the_configuration_as_it_is_by_then(line: Line) -> None:
    line.config.write_text(line.config.read_text().replace("chat-default:", "chat-newest:"))
    line.hand_over()
    assert line.chat(model="chat-newest").status == 200
    assert line.chat(model="chat-default").status == 400


def test_a_new_process_that_cannot_serve_changes_nothing_and_says_why(line: Line) -> None:
    good = line.config.read_text()
    line.config.write_text(good.replace("vendor: openai", "vendr: openai"))
    told = line.command("reload", "--hand-off")
    assert told.returncode == 1
    assert "providers.openai-main.vendr: is not a known key" in told.stderr
    assert line.chat().status == 200
    assert line.process.poll() is None
    line.config.write_text(good)
    told = line.command("reload", "--hand-off")
    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout == f"process {until(line.heirs)[0]} has taken over\n"


def test_one_that_fails_late_says_why_too(line: Line) -> None:
    """Its configuration is good, its code is not: the database is of a later version."""
    with contextlib.closing(sqlite3.connect(line.folder / "gproxyd.db")) as database:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        database.execute("PRAGMA user_version = 99")
        told = line.command("reload", "--hand-off")
        database.execute(f"PRAGMA user_version = {version}")
    assert told.returncode == 1
    assert "conflict: the new process cannot serve: " in told.stderr
    assert "was written by a newer gproxyd" in told.stderr
    assert line.chat().status == 200


def test_the_administrators_socket_goes_with_it(line: Line) -> None:
    line.hand_over()
    assert line.process.wait(5) == 0
    assert "tester" in line.command("users", "list").stdout


def test_every_listener_goes_with_it(tmp_path: Path, vendor_at: tuple[object, str]) -> None:
    """Clients' by TCP and by a file, and the operators'."""
    path = tmp_path / "http.sock"
    listen = f'["127.0.0.1:0", "unix:{path}"], ops_listen: ["[::1]:0"]'
    with Line(tmp_path, vendor_at[1], listen) as line:
        heir = line.hand_over()
        assert line.process.wait(5) == 0
        assert line.chat().status == 200
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(path))
            sock.sendall(raw.request("/v1/chat/completions", CHAT))
            assert raw.read(sock).status == 200
        with raw.connect(int(line.ready["listen"].rpartition(":")[2]), host="::1") as sock:
            sock.sendall(raw.request("/readyz", key=None))
            assert raw.read(sock).body == b"OK"
        told = until(lambda: [entry["listen"] for entry in line.log() if entry["event"] == "ready"][1:])
        assert told == [line.ready["listen"]]
        assert alive(heir)


def test_nobody_may_ask_for_it_by_a_network(line: Line) -> None:
    assert raw.send(line.port, raw.request("/admin/handoff", {})).status == 404
    assert line.heirs() == []


def test_two_at_once_are_one_too_many(line: Line) -> None:
    asking = threading.Thread(target=line.hand_over)
    asking.start()
    time.sleep(0.2)
    told = line.command("reload", "--hand-off")
    asking.join(30)
    assert len(line.heirs()) == 1 or told.returncode == 0, "the second one asked the new process"
    if told.returncode:
        assert "another one is about to take over already" in told.stderr


def test_a_rate_limit_holds_across_it(line: Line) -> None:
    assert [line.chat(BEN).status for _ in range(2)] == [200, 200]
    line.hand_over()
    assert [line.chat(BEN).status for _ in range(2)] == [200, 429]


def test_money_that_the_old_process_spends_is_spent_for_the_new_one_too(line: Line) -> None:
    """Before it, while both run, and when the old one is gone."""
    assert line.chat(ANN, max_tokens=1).status == 200
    sock, first = streaming(line, ANN)
    spent, left = account(line)
    assert spent > 0
    assert left < LIMIT - spent, "the stream holds nothing"
    line.hand_over()
    assert account(line) == (spent, left)
    assert raw.read(sock, seen=first).complete
    sock.close()
    assert line.process.wait(5) == 0
    paid = [cost for _, _, cost in line.rows() if cost]
    cost = sum(paid)
    assert (len(paid), cost > spent) == (2, True)
    until(lambda: account(line) == (cost, LIMIT - cost))


def account(line: Line) -> tuple[int, int]:
    """What ann has spent and what she has left, in nano-dollars, as the process knows that answers."""
    told = raw.send(line.port, raw.request("/v1/me/quota", key=ANN)).json
    return parse_usd(told["spent_usd"]), parse_usd(told["remaining_usd"])


def test_no_record_is_lost_or_doubled_by_any_number_of_them(line: Line) -> None:
    stop, sent = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            sent.append(line.chat().status)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for one in askers:
        one.start()
    for _ in range(3):
        line.hand_over()
    stop.set()
    for one in askers:
        one.join()
    assert set(sent) == {200}
    until(lambda: len(line.rows()) >= len(sent))
    assert len(line.rows()) == len({identity for identity, _, _ in line.rows()}) == len(sent)


# What is handed over by a service manager.


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def given(descriptors: list[int], names: str, code: str, pid: str = "self") -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process that got the descriptors as systemd gives them."""
    places = "; ".join(f"os.dup2({descriptor}, {100 + place})" for place, descriptor in enumerate(descriptors))
    again = "; ".join(f"os.dup2({100 + place}, {3 + place})" for place in range(len(descriptors)))
    meant = "str(os.getpid())" if pid == "self" else repr(pid)
    script = f"""\
import os
{places}
{again}
os.environ.update(LISTEN_PID={meant}, LISTEN_FDS="{len(descriptors)}", LISTEN_FDNAMES="{names}")
from gproxyd.host import systemd
from gproxyd.units import parse_usd
try:
    taken = systemd.take_sockets(os.environ, os.getpid())
except OSError as error:
    print(error)
    raise SystemExit(1)
{code}
"""
    line = [sys.executable, "-c", script]
    return subprocess.run(line, pass_fds=descriptors, capture_output=True, text=True, timeout=20)


def test_sockets_are_told_by_name_kept_from_children_and_forgotten() -> None:
    with listening() as one, listening() as two, listening() as three, listening() as four:
        code = (
            "print({role: [s.fileno() for s in found] for role, found in taken.items()})\n"
            "print([os.get_inheritable(n) for n in range(3, 7)], [n for n in os.environ if n.startswith('LISTEN_')])"
        )
        names = "http:gproxyd-admin.socket:ops:gproxyd@3.socket"
        told = given([s.fileno() for s in (one, two, three, four)], names, code)
    assert told.stdout.splitlines() == [
        "{'http': [3, 6], 'admin': [4], 'ops': [5]}",
        "[False, False, False, False] []",
    ], told.stderr


def test_sockets_that_are_meant_for_another_process_are_not_ours() -> None:
    with listening() as one:
        assert given([one.fileno()], "http", "print(taken)", pid="1").stdout == "{}\n"


def test_a_descriptor_that_cannot_be_listened_on_is_refused_by_number_and_name() -> None:
    with socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as datagrams, open("/dev/null") as file:
        for descriptor in (idle.fileno(), datagrams.fileno(), file.fileno()):
            told = given([descriptor], "http", "")
            assert told.returncode == 1
            assert told.stdout.startswith("descriptor 3 (http) was handed over but is no ")


def test_a_name_that_means_nothing_is_refused() -> None:
    with listening() as one:
        told = given([one.fileno()], "amdin", "")
    assert told.stdout == "a socket was handed over as 'amdin'; FileDescriptorName= must be one of http, ops, admin\n"


def test_a_socket_without_a_name_is_for_clients() -> None:
    assert [systemd._role(name) for name in ("", "unknown", "gproxyd.socket", "web.socket")] == ["http"] * 4
    assert systemd._role("gproxyd-ops.socket") == "ops"


@pytest.mark.parametrize("name", ["http", "ops"])
def test_systemd_socket_activate_starts_it_on_a_socket(
    tmp_path: Path, vendor_at: tuple[object, str], name: str
) -> None:
    """As systemd does it, save that nobody restarts it; `server.listen` is ignored."""
    program = "/usr/bin/systemd-socket-activate"
    if not Path(program).exists():
        pytest.skip("systemd-socket-activate is not installed")
    with listening() as free:
        port = free.getsockname()[1]
    prepared = Process(tmp_path, CONFIG.format(vendor=vendor_at[1]), SECRETS)
    passed = [f"-E{one}={prepared._environ[one]}" for one in ("GPROXYD_SECRETS_DIR", "STATE_DIRECTORY", "PATH")]
    line = [program, "-l", f"127.0.0.1:{port}", f"--fdname={name}", *passed, sys.executable, "-m", "gproxyd", "serve"]
    with subprocess.Popen([*line, "--config", str(prepared.config)], stderr=subprocess.PIPE) as process:
        try:
            until(lambda: can_connect(port))
            status = raw.send(port, raw.request("/healthz", key=None)).status
            models = raw.send(port, raw.request("/v1/models", method="GET")).status
        finally:
            process.terminate()
            process.communicate(timeout=10)
        assert (status, models) == ((200, 200) if name == "http" else (200, 404))
        assert process.returncode == 0


def can_connect(port: int) -> bool:
    try:
        raw.connect(port).close()
    except OSError:
        return False
    return True
