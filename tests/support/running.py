"""A gateway and its upstreams at work in a thread of their own, on real sockets.

with Loop() as loop:                      one event loop (uvloop) in a thread
    vendor = loop.vendor()                the scripted vendor, remembering what it has seen
    gateway = loop.gateway(CONFIG, {...}) a daemon from YAML text and secrets
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from gproxyd import daemon
from gproxyd.daemon import Daemon, Places
from gproxyd.host.demo import DemoVendor
from gproxyd.observe.journal import Journal

T = TypeVar("T")

CLIENT_KEY = "ck-test-4f7d1b0c"
PROVIDER_KEY = "pk-test-9a3e5c7d"

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  openai-main: {{vendor: openai, base_url: "{vendor}", credentials: [provider-key], models: [{{id: gpt-4.1-mini}}]}}
  anthropic-main:
    {{vendor: anthropic, base_url: "{vendor}", credentials: [provider-key], models: [{{id: claude-3-5-sonnet-latest}}]}}
  vertex-main: {{vendor: gemini, base_url: "{vendor}", credentials: [provider-key], models: [{{id: gemini-1.5-flash}}]}}
aliases: {{chat-default: openai-main/gpt-4.1-mini, smart: anthropic-main/claude-3-5-sonnet-latest,
  flash: vertex-main/gemini-1.5-flash, whisper: openai-main/whisper-1}}
endpoints: {{files: openai-main, batches: openai-main, images: openai-main, audio: openai-main, rerank: openai-main}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""
"""Three providers on one vendor. `{vendor}` is its address."""

_QUIET = {"discovery": "discovery: {enabled: false}\n", "breaker": "breaker: {failures: 1000, rate: 0}\n"}


def quiet(config: str) -> str:
    """The same, but that nobody is asked for models, nor left alone, unless the configuration says so: scripted vendors
    count what they are asked, and fail on purpose."""
    # In front, because some append to the end of a file.
    return "".join(text for section, text in _QUIET.items() if f"{section}:" not in config) + config


SECRETS = {"provider-key": PROVIDER_KEY, "client-key": CLIENT_KEY}


class Running:
    """One daemon: its address, its log, and the daemon itself for a look inside."""

    def __init__(self, loop: Loop, daemon: Daemon, log: Path, journal: Journal, folder: Path) -> None:
        self._loop = loop
        self._journal = journal
        self.daemon = daemon
        self.log_path = log
        self.folder = folder
        address = next(address for address in daemon.addresses if not address.startswith("unix:"))
        host, _, port = address.rpartition(":")
        self.host, self.port = host, int(port)
        self.url = f"http://{address}"

    def log(self) -> list[dict[str, Any]]:
        """Every line so far; one that is being written does not count yet."""
        return [json.loads(line) for line in self.log_path.read_text().split("\n")[:-1]]

    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == "request"]

    def request(self, request_id: str) -> dict[str, Any]:
        """The line of one request; waits until it has been written."""
        return until(lambda: next((line for line in self.requests() if line["request_id"] == request_id), None))

    def at_rest(self) -> bool:
        """Whether nothing is under way."""
        return not self.daemon.gateway.in_flight and not self.daemon.gateway.exchanges.relays

    def stop(self) -> None:
        async def stop() -> None:
            hurry = asyncio.Event()
            hurry.set()
            await self.daemon.drain(hurry)
            await self.daemon.stop()

        self._loop.run(stop())
        self._journal.close()


class Loop:
    """An event loop in a thread. Everything started through it is stopped when the block ends."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._endings: list[Callable[[], object]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="gproxyd-test-")
        self._count = 0
        self.era = 0

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release(0)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
        self._folder.cleanup()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 30) -> T:
        """Runs a coroutine on the loop, from the test's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def mark(self) -> int:
        """A moment, for `release`."""
        return len(self._endings)

    def release(self, mark: int) -> None:
        """Stops what was started since `mark`; another `era` begins."""
        self.era += 1
        while len(self._endings) > mark:
            self._endings.pop()()

    def at_end(self, ending: Callable[[], object]) -> None:
        self._endings.append(ending)

    def vendor(self, *, keys: tuple[str, ...] = (PROVIDER_KEY,), **start: Any) -> tuple[DemoVendor, str]:
        """The scripted vendor and its address."""
        vendor = DemoVendor(keys=keys, remember=1000)
        address = self.run(vendor.start(**start))
        self.at_end(lambda: self.run(vendor.stop()))
        return vendor, address

    def gateway(self, config: str, secrets: dict[str, str] | None = None) -> Running:
        """A daemon from YAML text. Its log goes to a file as JSON."""
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        (folder / "secrets").mkdir(parents=True)
        (folder / "gproxyd.yaml").write_text(quiet(config))
        for name, value in (SECRETS if secrets is None else secrets).items():
            (folder / "secrets" / name).touch(0o600)
            (folder / "secrets" / name).write_text(value + "\n")
        environ = {"GPROXYD_SECRETS_DIR": str(folder / "secrets")}
        snapshot = daemon.load(folder / "gproxyd.yaml", environ)
        log = folder / "log.jsonl"
        descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        self.at_end(lambda: os.close(descriptor))
        journal = Journal(level="debug", form="json", descriptor=descriptor)

        async def start() -> Daemon:
            places = Places(folder / "state.db", folder, folder / "gproxyd.yaml", environ)
            started = Daemon(snapshot, journal, asyncio.get_running_loop(), places)
            await started.start()
            return started

        running = Running(self, self.run(start()), log, journal, folder)
        self.at_end(running.stop)
        return running


def until(look: Callable[[], T | None], seconds: float = 5.0) -> T:
    """Waits until `look` finds something, and returns it; fails loudly otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.005)
    raise AssertionError(f"not seen within {seconds} s")
