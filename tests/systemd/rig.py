"""A machine of its own for gproxyd: a real systemd over a throw-away copy of this one, with the units as installed.

The daemon lies in /opt/gproxyd, as `make install` would put it there, save that its libraries are this checkout's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.running import until

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("sysd.sh")
PYTHON = "/opt/gproxyd/bin/python3"
VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGE = f"/opt/gproxyd/lib/{VERSION}/site-packages/gproxyd"

PORT, VENDOR_PORT = 8787, 9100
KEY, ADMIN_KEY, VENDOR_KEY = "ck-rig-0f2e", "ak-rig-77ab", "pk-rig-canary-5d1c"

CONFIG = f"""\
server: {{drain: 20s}}
log: {{format: json}}
providers:
  main: {{vendor: openai, base_url: "http://127.0.0.1:{VENDOR_PORT}", credentials: [vendor-key],
    models: [{{id: m, price: {{input: "1.00", output: "1.00"}}}}]}}
users:
  root: {{role: admin, keys: {{k: {{token: {ADMIN_KEY}}}}}}}
  ann: {{role: user, permissions: ["main/*"], keys: {{k: {{token: {KEY}}}}}}}
"""

VENDOR = f"""\
[Service]
ExecStart={PYTHON} /opt/rig/upstream.py {VENDOR_PORT} {VENDOR_KEY}
"""

BLOCKING = """\
import signal, time

def hold_up_the_loop(*_):
    time.sleep(60)

signal.signal(signal.SIGRTMIN, hold_up_the_loop)
"""
"""What a test machine's Python has in addition: a signal that blocks whatever runs."""

CREDENTIAL = """\
[Service]
LoadCredential=vendor-key:/etc/gproxyd/credentials/vendor-key
"""


def unfit() -> str | None:
    """Why no machine can be booted here, if that is so."""
    if os.geteuid() != 0:
        return "a systemd of our own takes root"
    if not Path("/lib/systemd/systemd").exists():
        return "there is no systemd here to boot"
    missing = [tool for tool in ("unshare", "nsenter", "setpriv", "pivot_root", "ip") if shutil.which(tool) is None]
    if missing:
        return f"booting takes {', '.join(missing)} (util-linux, iproute2)"
    if subprocess.run(["findmnt", "-n", "-t", "cgroup2"], capture_output=True).returncode:
        return "booting takes a cgroup v2 file system"
    found = subprocess.run(["/usr/bin/python3", "--version"], capture_output=True, text=True)
    if VERSION.removeprefix("python") != ".".join(found.stdout.split()[-1:][0].split(".")[:2] if found.stdout else ""):
        return f"the system's Python is not {VERSION}, which the libraries of this checkout are for"
    return None


class Rig:
    """with Rig() as rig: one machine, booted and with gproxyd's sockets listening."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gproxyd-rig-"))
        self._machine = self._folder / "m"
        self._added = self._folder / "m.add"

    def __enter__(self) -> Rig:
        self._furnish()
        environ = {**os.environ, "SYSD_BIND": f"{sysconfig.get_path('purelib')}:/opt/libraries"}
        subprocess.run([SCRIPT, "start", self._machine], check=True, env=environ, timeout=60)
        try:
            self.run("systemd-sysusers")
            self.run("systemd-tmpfiles", "--create", "gproxyd.conf")
            self.write("/etc/gproxyd/credentials/vendor-key", VENDOR_KEY)
            self.write("/etc/gproxyd/gproxyd.yaml", CONFIG)
            self.systemctl("start", "vendor", "gproxyd.socket", "gproxyd-admin.socket")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run([SCRIPT, "stop", self._machine], check=False, timeout=60)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _furnish(self) -> None:
        venv = self._added / "opt/gproxyd"
        subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", venv], check=True)
        packages = venv / "lib" / VERSION / "site-packages"
        shutil.copytree(ROOT / "gproxyd", packages / "gproxyd")
        (packages / "libraries.pth").write_text("/opt/libraries\nimport blocking\n")
        (packages / "blocking.py").write_text(BLOCKING)
        program = venv / "bin/gproxyd"
        program.write_text(f"#!{PYTHON}\nimport sys\nfrom gproxyd.cli import main\nsys.exit(main())\n")
        program.chmod(0o755)
        units = self._added / "etc/systemd/system"
        (units / "gproxyd.service.d").mkdir(parents=True)
        for unit in (ROOT / "systemd").glob("gproxyd*.s*"):
            shutil.copy(unit, units)
        (units / "vendor.service").write_text(VENDOR)
        (units / "gproxyd.service.d/credentials.conf").write_text(CREDENTIAL)
        for folder in ("sysusers.d", "tmpfiles.d"):
            shutil.copytree(ROOT / "systemd" / folder, self._added / "usr/lib" / folder)
        (self._added / "opt/rig").mkdir()
        for name in ("upstream.py", "load.py"):
            shutil.copy(Path(__file__).with_name(name), self._added / "opt/rig")
        subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", venv / "lib"], check=True)

    def run(self, *command: str, check: bool = True, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """One command inside, to its end."""
        done = subprocess.run(self.command(*command), input=given, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}\n{self.tail()}"
        return done

    def command(self, *command: str) -> list[str]:
        return [str(SCRIPT), "run", str(self._machine), *command]

    def tail(self) -> str:
        """The last lines of the log."""
        line = self.command("journalctl", "-u", "gproxyd", "-n", "40", "--no-pager", "-o", "short-precise")
        return subprocess.run(line, capture_output=True, text=True, timeout=30).stdout

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", *words, check=check)

    def show(self, name: str, unit: str = "gproxyd") -> str:
        """A property of a unit."""
        return self.systemctl("show", "-P", name, unit).stdout.strip()

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", f"mkdir -p {Path(path).parent} && cat > {path}", given=text)

    def drop_in(self, name: str, text: str | None) -> None:
        """Settings on top of the service's own; None takes them away."""
        path = f"/etc/systemd/system/gproxyd.service.d/{name}.conf"
        if text is None:
            self.run("rm", "-f", path)
        else:
            self.write(path, text)
        self.systemctl("daemon-reload")

    def journal(self, *more: str) -> list[str]:
        """What the service and its manager have said since the boot, line by line."""
        return self.run("journalctl", "-u", "gproxyd", "-o", "cat", "--no-pager", *more).stdout.splitlines()

    def events(self, event: str) -> list[dict[str, Any]]:
        """The daemon's own lines of one kind."""
        lines = (line for line in self.journal() if line.startswith("{") and f'"event":"{event}"' in line)
        return [json.loads(line) for line in lines]

    def until(self, state: str, seconds: float = 20) -> None:
        until(lambda: self.show("ActiveState") == state, seconds)

    def curl(self, path: str, *options: str, key: str = KEY, check: bool = True) -> subprocess.CompletedProcess[str]:
        line = ["curl", "-sS", "-m", "20", "-H", f"Authorization: Bearer {key}", *options]
        return self.run(*line, f"http://127.0.0.1:{PORT}{path}", check=check)

    def status(self, path: str = "/healthz", *options: str) -> str:
        """The status of an answer; 000 where there was none."""
        return self.curl(path, "-o", "/dev/null", "-w", "%{http_code}", *options, check=False).stdout

    def chat(self, *options: str) -> str:
        body = '{"model":"main/m","messages":[{"role":"user","content":"hello"}]}'
        return self.status("/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body, *options)

    def sql(self, query: str) -> str:
        """One row of the ledger, which the daemon has open as well."""
        code = "import sqlite3,sys; print(*sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchone())"
        return self.run("/usr/bin/python3", "-c", code, "/var/lib/gproxyd/gproxyd.db", query).stdout.strip()


class Load:
    """Clients at work until the block ends; then `report` tells how they fared."""

    def __init__(self, rig: Rig, *, keeping: int, closing: int, streaming: int, pause: float = 0.15) -> None:
        words: Sequence[object] = (PORT, KEY, keeping, closing, streaming, pause)
        self._command = rig.command(PYTHON, "/opt/rig/load.py", *map(str, words))
        self.report: dict[str, Any] = {}

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        told, _nothing = self._process.communicate(timeout=60)
        self.report = json.loads(told)
