"""What is measured: started as processes of their own, pinned to one core; their CPU time and memory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
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
    models: [{{id: bench-model}}]
aliases: {{fast: bench/bench-model}}
users: {{bench: {{role: user, permissions: ["*"], keys: {{main: {{credential: client}}}}}}}}
"""


@dataclass
class Proxy:
    """A process under measurement. `pid` is the one that does the work."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    pid: int

    def cpu(self) -> float:
        """Seconds of CPU so far, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def rss(self) -> int:
        """Resident bytes now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(command: list[str], cores: set[int], **environ: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
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


def upstream(certificate: tuple[Path, Path] | None = None) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    files = [str(path) for path in certificate] if certificate else []
    process = launch([sys.executable, "-m", "tests.bench.upstream", str(port), *files], OTHER_CORES)
    wait_for(port, process)
    return process, port


def nginx(folder: Path, target: int, authority: Path | None = None) -> Proxy | None:
    """nginx as a plain proxy, or None where it is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        return None
    port = free_port()
    folder.mkdir(parents=True)
    settings = {
        "folder": folder,
        "port": port,
        "upstream": target,
        "scheme": "https" if authority else "http",
        "certificate": authority or "/etc/ssl/certs/ca-certificates.crt",
        "verify": "on" if authority else "off",
    }
    (folder / "nginx.conf").write_text(_NGINX.format(**settings))
    process = launch([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)], {PROXY_CORE})
    wait_for(port, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Proxy("nginx", port, process, int(workers[0]))


def usual(target: int) -> Proxy:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.usual", str(port), f"http://127.0.0.1:{target}"]
    process = launch(command, {PROXY_CORE})
    wait_for(port, process)
    return Proxy("usual aiohttp proxy", port, process, process.pid)


def gproxyd(folder: Path, target: int, authority: Path | None = None) -> Proxy:
    port = free_port()
    secrets = folder / "secrets"
    secrets.mkdir(parents=True, mode=0o700)
    for name, value in (("bench", "pk-bench"), ("client", KEY)):
        (secrets / name).touch(0o600)
        (secrets / name).write_text(value)
    config = folder / "gproxyd.yaml"
    config.write_text(_GPROXYD.format(port=port, upstream=target, scheme="https" if authority else "http"))
    environ = {"GPROXYD_SECRETS_DIR": str(secrets), "STATE_DIRECTORY": str(folder)}
    if authority:
        environ["SSL_CERT_FILE"] = str(authority)
    log = open(folder / "log.jsonl", "wb")  # noqa: SIM115 - the process keeps it
    process = subprocess.Popen(
        [sys.executable, "-m", "gproxyd", "serve", "--config", str(config)],
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        stderr=log,
        preexec_fn=lambda: os.sched_setaffinity(0, {PROXY_CORE}),
    )
    wait_for(port, process)
    return Proxy("gproxyd", port, process, process.pid)
