"""What is measured: started as processes of their own, pinned to one core; their CPU time and memory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROXY_CORE = 0
OTHER_CORES = {1} if (os.cpu_count() or 1) > 1 else {0}
KEY = "ck-bench"

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")

_NGINX = """\
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_rlimit_nofile 20000;
events {{ worker_connections 8192; }}
http {{
  access_log {folder}/access.log; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  keepalive_requests 1000000000; client_max_body_size 0;
  upstream target {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass {scheme}://target; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_request_buffering off; proxy_read_timeout 300s;
      proxy_ssl_trusted_certificate {certificate}; proxy_ssl_verify {verify}; proxy_ssl_name localhost;
    }}
  }}
}}
"""

_GPROXYD = """\
server: {{listen: ["127.0.0.1:{port}"]}}
log: {{level: info, format: json}}
providers:
  bench:
    vendor: custom
    dialects: {{openai_chat: "{scheme}://localhost:{upstream}"}}
    credentials: [bench]
    models: [{{id: bench-model{price}}}]
aliases: {{fast: bench/bench-model}}
endpoints: {{audio: bench}}
users: {{bench: {{role: user, permissions: ["*"], {limits}keys: {{main: {{credential: client}}}}}}}}
"""
_PRICE = ', price: {input: "0.40", output: "1.60"}'
_LIMITS = 'quota: {usd: "1000000"}, rate_limits: [{rpm: 100000000, tpm: 100000000000, concurrency: 5000}], '
"""Limits that are counted, but never reached."""

DIRECT, GPROXYD, LIMITED = "direct", "gproxyd", "gproxyd, with limits"


@dataclass
class Proxy:
    """A process under measurement. `pid` is the one that does the work; 0 for the upstream itself, asked directly, of
    which nothing is measured. `authority` is who certifies the port where it speaks TLS."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None
    pid: int
    authority: Path | None = None

    def cpu(self) -> float:
        """Seconds of CPU so far, of all threads, user and system."""
        if not self.pid:
            return 0.0
        spent = _scheduled(self.pid)
        if spent is not None:
            return spent
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def rss(self) -> int:
        """Resident bytes now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _scheduled(pid: int) -> float | None:
    """Seconds that the threads of a process ran, by the scheduler's clock, which counts nanoseconds; None where the
    kernel does not tell. What a thread ran that has ended is lost; the programs here keep theirs."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((thread / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            if thread.exists():
                return None
    return total / 1e9


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    command: list[str], cores: set[int], environ: Mapping[str, str] | None = None, log: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**os.environ, **(environ or {})},
        stdout=subprocess.DEVNULL,
        stderr=log,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on {port}")


def upstream(certificate: tuple[Path, Path] | None = None) -> Proxy:
    """The upstream; with a certificate and its key, over TLS. The certificate is its own authority."""
    port = free_port()
    files = [str(path) for path in certificate] if certificate else []
    process = launch([sys.executable, "-m", "tests.bench.upstream", str(port), *files], OTHER_CORES)
    wait_for(port, process)
    return Proxy(DIRECT, port, process, 0, certificate[0] if certificate else None)


def nginx_program() -> str | None:
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def nginx(folder: Path, target: Proxy) -> Proxy:
    """nginx as a plain proxy. It must be installed."""
    program = nginx_program()
    assert program is not None
    port = free_port()
    folder.mkdir(parents=True)
    settings = {
        "folder": folder,
        "port": port,
        "upstream": target.port,
        "scheme": _scheme(target),
        "certificate": target.authority or "/etc/ssl/certs/ca-certificates.crt",
        "verify": "on" if target.authority else "off",
    }
    (folder / "nginx.conf").write_text(_NGINX.format(**settings))
    process = launch([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)], {PROXY_CORE})
    wait_for(port, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Proxy("nginx", port, process, int(workers[0]))


def usual(target: Proxy) -> Proxy:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.usual", str(port), f"{_scheme(target)}://localhost:{target.port}"]
    process = launch(command, {PROXY_CORE}, _trusting(target))
    wait_for(port, process)
    return Proxy("usual aiohttp proxy", port, process, process.pid)


def gproxyd(folder: Path, target: Proxy, *, limited: bool = False) -> Proxy:
    """With permissions, an alias, usage, ledger, log and metrics; `limited`: with a quota, a price and rate limits."""
    port = free_port()
    secrets = folder / "secrets"
    secrets.mkdir(parents=True, mode=0o700)
    for name, value in (("bench", "pk-bench"), ("client", KEY)):
        (secrets / name).touch(0o600)
        (secrets / name).write_text(value)
    config = folder / "gproxyd.yaml"
    price, limits = (_PRICE, _LIMITS) if limited else ("", "")
    text = _GPROXYD.format(port=port, upstream=target.port, scheme=_scheme(target), price=price, limits=limits)
    config.write_text(text)
    environ = {"GPROXYD_SECRETS_DIR": str(secrets), "STATE_DIRECTORY": str(folder), **_trusting(target)}
    command = [sys.executable, "-m", "gproxyd", "serve", "--config", str(config)]
    with open(folder / "log.jsonl", "wb") as log:
        process = launch(command, {PROXY_CORE}, environ, log.fileno())
    wait_for(port, process)
    return Proxy(LIMITED if limited else GPROXYD, port, process, process.pid)


def _scheme(target: Proxy) -> str:
    return "https" if target.authority else "http"


def _trusting(target: Proxy) -> dict[str, str]:
    return {"SSL_CERT_FILE": str(target.authority)} if target.authority else {}
