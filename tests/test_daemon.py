"""The daemon's life: listeners, reload, drain, what it tells."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from gproxyd.observe.journal import Journal
from tests.support import raw
from tests.support.process import Process
from tests.support.running import CLIENT_KEY, CONFIG, PROVIDER_KEY, SECRETS, Loop, until

CHAT = raw.Chat().body()


@pytest.fixture
def daemon(tmp_path: Path, vendor_at: tuple[object, str]) -> Process:
    return Process(tmp_path, CONFIG.format(vendor=vendor_at[1]), SECRETS)


def chat(port: int, *, key: str = CLIENT_KEY, **more: object) -> raw.Reply:
    return raw.send(port, raw.request("/v1/chat/completions", {**CHAT, **more}, key=key))


def test_health_and_readiness_need_no_key(gateway: object) -> None:
    for path in ("/healthz", "/readyz"):
        reply = raw.send(gateway.port, raw.request(path, key=None))  # type: ignore[attr-defined]
        assert (reply.status, reply.body) == (200, b"OK")
        assert reply.header("content-type") == "text/plain; charset=utf-8"


def test_ops_listen_takes_health_away_from_the_main_listener(loop: Loop, vendor_at: tuple[object, str]) -> None:
    config = CONFIG.format(vendor=vendor_at[1]).replace(
        '["127.0.0.1:0"]', '["127.0.0.1:0"], ops_listen: ["127.0.0.1:0"]'
    )
    running = loop.gateway(config)
    ops = int(running.daemon.addresses[1].rpartition(":")[2])
    assert raw.send(ops, raw.request("/healthz", key=None)).body == b"OK"
    assert raw.send(running.port, raw.request("/healthz", key=None)).status == 401
    assert raw.send(running.port, raw.request("/healthz")).status == 404
    assert raw.send(ops, raw.request("/v1/models")).status == 404


def test_unix_sockets_and_ipv6(loop: Loop, vendor_at: tuple[object, str], tmp_path: Path) -> None:
    path = tmp_path / "gproxyd.sock"
    listen = f'["unix:{path}", "[::1]:0"]'
    running = loop.gateway(CONFIG.format(vendor=vendor_at[1]).replace('["127.0.0.1:0"]', listen))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        sock.sendall(raw.request("/v1/chat/completions", CHAT))
        assert raw.read(sock).json["model"] == "openai-main/gpt-4.1-mini"
    port = int(running.daemon.addresses[1].rpartition(":")[2])
    with raw.connect(port, host="::1") as sock:
        sock.sendall(raw.request("/healthz", key=None))
        assert raw.read(sock).body == b"OK"


def test_reload_swaps_the_configuration_and_running_streams_keep_theirs(daemon: Process) -> None:
    with daemon:
        sock = raw.connect(daemon.port)
        slow = [("x-demo-event-delay", "150"), ("x-demo-events", "8")]
        sock.sendall(
            raw.request("/v1/chat/completions", {**CHAT, "model": "chat-default", "stream": True}, headers=slow)
        )
        first = sock.recv(65536)
        assert first.startswith(b"HTTP/1.1 200 OK")
        text = daemon.config.read_text().replace("chat-default:", "chat-other:")
        daemon.config.write_text(text)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reloaded")
        assert chat(daemon.port, model="chat-default").status == 400
        assert chat(daemon.port, model="chat-other").json["model"] == "chat-other"
        whole = raw.read(sock, seen=first)
        assert whole.complete
        assert whole.body.count(b'"model":"chat-default"') == whole.body.count(b'"model"')
        sock.close()


def test_a_bad_file_changes_nothing_at_reload_and_is_told_without_secrets(daemon: Process) -> None:
    with daemon:
        daemon.config.write_text(f"providers: {{openai-main: {{vendr: openai}}}}\ntoken: {PROVIDER_KEY}\n")
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reload_refused")
        assert chat(daemon.port).status == 200
        told = [line["message"] for line in daemon.log() if line["event"] == "configuration"]
        assert any("providers.openai-main.vendr" in message for message in told)
        assert PROVIDER_KEY not in json.dumps(daemon.log())


def test_a_key_revoked_by_reload_is_refused_from_the_next_request_on(daemon: Process) -> None:
    with daemon:
        assert chat(daemon.port).status == 200
        (daemon.folder / "secrets" / "client-key").write_text("another-key\n")
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reloaded")
        assert chat(daemon.port).status == 401
        assert chat(daemon.port, key="another-key").status == 200


def test_a_missing_secret_switches_its_provider_off_loudly(tmp_path: Path, vendor_at: tuple[object, str]) -> None:
    config = CONFIG.format(vendor=vendor_at[1]).replace("credentials: [provider-key]", "credentials: [gone]", 1)
    with Process(tmp_path, config, SECRETS) as daemon:
        reply = chat(daemon.port)
        assert reply.status == 503
        assert reply.json["error"]["code"] == "no_target"
        warnings = [line["message"] for line in daemon.log() if line["level"] == "warning"]
        assert any("'gone' is missing" in warning for warning in warnings)
        assert any("openai-main: switched off" in warning for warning in warnings)
        listed = raw.send(daemon.port, raw.request("/v1/models")).json["data"]
        assert not any(model["id"].startswith("openai-main/") for model in listed)


def test_sigterm_lets_streams_finish_and_exits_0(daemon: Process) -> None:
    with daemon:
        idle = raw.connect(daemon.port)
        streaming = raw.connect(daemon.port)
        slow = [("x-demo-event-delay", "100"), ("x-demo-events", "10")]
        streaming.sendall(raw.request("/v1/chat/completions", {**CHAT, "stream": True}, headers=slow))
        first = streaming.recv(65536)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")
        assert idle.recv(10) == b""
        with pytest.raises(OSError, match="refused"):
            raw.connect(daemon.port)
        assert raw.read(streaming, seen=first).complete
        assert daemon.process.wait(5) == 0
        idle.close()
        streaming.close()


def test_readiness_tells_of_draining_on_a_live_connection(daemon: Process) -> None:
    with daemon:
        streaming = raw.connect(daemon.port)
        slow = [("x-demo-event-delay", "100"), ("x-demo-events", "10")]
        pipelined = raw.request("/v1/chat/completions", {**CHAT, "stream": True}, headers=slow)
        streaming.sendall(pipelined)
        assert streaming.recv(65536)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")
        data = raw.read(streaming, until_complete=False)
        assert data.ended == "fin"
        assert daemon.process.wait(5) == 0
        streaming.close()


def test_a_second_signal_ends_streams_with_the_dialects_error_event(daemon: Process) -> None:
    with daemon:
        sock = raw.connect(daemon.port)
        slow = [("x-demo-event-delay", "200"), ("x-demo-events", "200")]
        sock.sendall(raw.request("/v1/chat/completions", {**CHAT, "stream": True}, headers=slow))
        first = sock.recv(65536)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        whole = raw.read(sock, seen=first)
        assert not whole.complete
        assert b'"code":"overloaded"' in whole.body
        assert daemon.process.wait(5) == 0
        assert time.monotonic() - began < 4
        line = next(line for line in daemon.log() if line["event"] == "request")
        assert line["outcome"] == "upstream_error"
        assert line["reason"] == "shutdown"
        sock.close()


def test_a_reader_that_stops_reading_the_log_does_not_stop_requests() -> None:
    """The log goes into a pipe that nobody empties, until all has been said."""
    reader, writer = os.pipe()
    journal = Journal(level="info", form="json", descriptor=writer)
    for number in range(30_000):
        began = time.perf_counter()
        journal.record("info", "line", number=number)
        assert time.perf_counter() - began < 0.5
    closing = threading.Thread(target=journal.close)
    closing.start()
    os.set_blocking(reader, False)
    text = b""
    while closing.is_alive():
        if select.select([reader], [], [], 0.01)[0]:
            text += os.read(reader, 1 << 20)
    os.close(writer)
    text += os.read(reader, 1 << 20)
    os.close(reader)
    dropped = sum(json.loads(line)["count"] for line in text.splitlines() if b"log_lines_dropped" in line)
    assert 10_000 < dropped < 30_000


def test_one_line_per_request_holds_what_an_operator_needs_and_no_secret(gateway: object) -> None:
    secret_prompt = "canary-prompt-81d2"
    body = {**CHAT, "messages": [{"role": "user", "content": secret_prompt}]}
    reply = raw.send(gateway.port, raw.request("/v1/chat/completions?debug=1", body))  # type: ignore[attr-defined]
    line = gateway.request(reply.header("x-request-id"))  # type: ignore[attr-defined]
    assert {name: line[name] for name in ("key", "form", "provider", "model", "requested_model", "status")} == {
        "key": "tester/main",
        "form": "aggregated",
        "provider": "openai-main",
        "model": "gpt-4.1-mini",
        "requested_model": "openai-main/gpt-4.1-mini",
        "status": 200,
    }
    assert line["attempts"] == 1
    assert line["bytes_in"] == len(json.dumps(body, separators=(",", ":")))
    assert line["bytes_out"] == len(reply.body)
    assert 0 < line["ttfb_ms"] <= line["duration_ms"]
    assert line["outcome"] == "ok"
    text = json.dumps(gateway.log())  # type: ignore[attr-defined]
    assert not any(canary in text for canary in (secret_prompt, CLIENT_KEY, PROVIDER_KEY, "debug=1"))


def test_text_lines_are_one_line_each_whatever_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    journal = Journal(level="info", form="text", descriptor=descriptor)
    journal.record("info", "request", path="/v1/x\n\x1b[31m evil=1", agent='a "b"', empty=None, long="x" * 5000)
    journal.close()
    os.close(descriptor)
    (line,) = until(lambda: path.read_text().splitlines())
    assert "\x1b" not in line
    assert 'path="/v1/x\\n\\u001b[31m evil=1"' in line
    assert len(line) < 1000


def test_a_file_or_a_living_socket_in_the_way_of_a_unix_listener_stays(loop: Loop, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("do not delete")
    config = f'server: {{listen: ["127.0.0.1:0", "unix:{precious}"]}}'
    with pytest.raises(OSError, match="cannot listen on unix"):
        loop.gateway(config)
    assert precious.read_text() == "do not delete"
    path = tmp_path / "living.sock"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        with pytest.raises(OSError, match="cannot listen on unix"):
            loop.gateway(f'server: {{listen: ["127.0.0.1:0", "unix:{path}"]}}')
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    loop.gateway(f'server: {{listen: ["127.0.0.1:0", "unix:{path}"]}}')  # what is left of a dead one is replaced


def test_readiness_tells_of_draining_on_the_ops_listener(tmp_path: Path, vendor_at: tuple[object, str]) -> None:
    config = CONFIG.format(vendor=vendor_at[1])
    config = config.replace('["127.0.0.1:0"]', '["127.0.0.1:0"], ops_listen: ["127.0.0.1:0"]')
    with Process(tmp_path, config, SECRETS) as daemon, raw.connect(daemon.port) as streaming:
        ops = int(daemon.ready["listen"].split()[1].rpartition(":")[2])
        slow = [("x-demo-event-delay", "100"), ("x-demo-events", "10")]
        streaming.sendall(raw.request("/v1/chat/completions", {**CHAT, "stream": True}, headers=slow))
        seen = streaming.recv(65536)
        assert raw.send(ops, raw.request("/readyz", key=None)).status == 200
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")
        reply = raw.send(ops, raw.request("/readyz", key=None))
        assert (reply.status, reply.body) == (503, b"draining")
        assert raw.send(ops, raw.request("/healthz", key=None)).status == 200
        assert raw.read(streaming, seen=seen).complete
        assert daemon.process.wait(5) == 0
