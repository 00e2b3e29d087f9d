"""The real program as a process: `python -m gproxyd ...`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.running import quiet, until


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """One command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gproxyd", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**clean_environ(), **environ},
    )


def clean_environ() -> dict[str, str]:
    """This process's environment without what would lead the program to somebody's configuration or secrets."""
    ours = ("GPROXYD_CONFIG", "GPROXYD_SECRETS_DIR", "CREDENTIALS_DIRECTORY")
    return {name: value for name, value in os.environ.items() if name not in ours}


class Process:
    """A daemon that runs until the block ends. Its log is JSON lines on standard error."""

    def __init__(self, folder: Path, config: str, secrets: dict[str, str], *, options: Sequence[str] = (), **env: str):
        self.folder = folder
        self.config = folder / "gproxyd.yaml"
        self.config.write_text(quiet(config))
        (folder / "secrets").mkdir(exist_ok=True)
        for name, value in secrets.items():
            (folder / "secrets" / name).touch(0o600)
            (folder / "secrets" / name).write_text(value)
        self._log = folder / "log.jsonl"
        self._environ = {
            **clean_environ(),
            "GPROXYD_SECRETS_DIR": str(folder / "secrets"),
            "STATE_DIRECTORY": str(folder),
            **env,
        }
        self._options = list(options)
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> Process:
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gproxyd", "serve", "--config", str(self.config), *self._options],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environ,
            )
        self.ready = until(lambda: self._find("ready") or self._dead(), 20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def _dead(self) -> None:
        assert self.process.poll() is None, self._log.read_text()

    def _find(self, event: str) -> dict[str, Any] | None:
        return next((line for line in self.log() if line["event"] == event), None)

    def log(self) -> list[dict[str, Any]]:
        """Every complete line so far."""
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for(self, event: str, seconds: float = 5) -> dict[str, Any]:
        return until(lambda: self._find(event), seconds)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.ready["listen"].split()[0].rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def memory(self) -> dict[str, int]:
        """VmRSS and VmHWM in bytes."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        pairs = (line.split() for line in lines if line.startswith("Vm"))
        return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in pairs}
