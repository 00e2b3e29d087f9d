"""Hours of everyday chaos in minutes: nothing that the process holds may grow.

`make soak` runs it for SOAK_SECONDS (600 by default); without that variable it is left out.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support import raw
from tests.support.process import Process
from tests.support.running import CLIENT_KEY, CONFIG, SECRETS, Loop

SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))

CHAT = {"model": "chat-default", "messages": [{"role": "user", "content": "Say hello."}]}
MESSAGES = {"model": "smart", "max_tokens": 64, "messages": [{"role": "user", "content": "Say hello."}]}

MIB = 2**20


class Crowd:
    """Clients of every manner, until `over` is set. `seen` counts what became of their requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.over = threading.Event()
        self.seen: Counter[str] = Counter()
        self.threads = [threading.Thread(target=self._live, args=(number,)) for number in range(6)]

    def _live(self, number: int) -> None:
        dice = random.Random(number)
        while not self.over.is_set():
            with raw.connect(self._port) as sock:
                for _ in range(dice.randrange(1, 40)):
                    if self.over.is_set() or not self._ask(sock, dice):
                        break
            time.sleep(dice.random() * 0.02)

    def _ask(self, sock: socket.socket, dice: random.Random) -> bool:
        """One request. Returns whether another may follow on the connection."""
        kind = dice.choice(["json", "json", "stream", "messages", "leave", "unknown", "no key", "models"])
        body = {**CHAT, "stream": True} if kind in ("stream", "leave") else MESSAGES if kind == "messages" else CHAT
        target = "/v1/messages" if kind == "messages" else "/v1/chat/completions"
        if kind == "unknown":
            body = {**CHAT, "model": f"no-such-{dice.random()}"}
        if kind == "models":
            sock.sendall(raw.request("/v1/models", method="GET"))
        else:
            sock.sendall(raw.request(target, body, key="ck-wrong" if kind == "no key" else CLIENT_KEY))
        if kind == "leave":
            sock.recv(64)
            self.seen[kind] += 1
            return False
        reply = raw.read(sock)
        self.seen[f"{kind} {reply.status}"] += 1
        return reply.complete


def held(daemon: Process) -> dict[str, float]:
    """What the process holds now."""
    text = raw.send(daemon.port, raw.request("/debug/pprof/goroutine?debug=1", method="GET")).body.decode()
    tasks = sum(map(int, re.findall(r"^(\d+) @$", text, re.MULTILINE)))
    assert tasks, text
    wal = Path(daemon.folder, "gproxyd.db-wal")
    return {
        "MiB": daemon.memory()["VmRSS"] / MIB,
        "descriptors": len(os.listdir(f"/proc/{daemon.pid}/fd")),
        "threads": len(os.listdir(f"/proc/{daemon.pid}/task")),
        "tasks": tasks,
        "MiB of log": wal.stat().st_size / MIB if wal.exists() else 0.0,
    }


MOST_GROWTH = {"MiB": 6.0, "descriptors": 6, "threads": 1, "tasks": 8, "MiB of log": 16.0}
"""Between the second and the last quarter of the time, by their medians."""


@pytest.mark.slow
@pytest.mark.skipif(not SECONDS, reason="make soak")
def test_nothing_grows(loop: Loop, tmp_path: Path) -> None:
    _, address = loop.vendor()
    config = CONFIG.format(vendor=address) + "debug: {pprof_enabled: true}\n"
    with Process(tmp_path, config, SECRETS) as daemon:
        crowd = Crowd(daemon.port)
        for thread in crowd.threads:
            thread.start()
        samples = []
        try:
            ends = time.monotonic() + SECONDS
            while time.monotonic() < ends:
                time.sleep(min(2.0, SECONDS / 40))
                samples.append(held(daemon))
        finally:
            crowd.over.set()
            for thread in crowd.threads:
                thread.join(10)
        quarter = len(samples) // 4
        growth = {
            name: statistics.median(one[name] for one in samples[-quarter:])
            - statistics.median(one[name] for one in samples[quarter : 2 * quarter])
            for name in samples[0]
        }
        print(json.dumps({"requests": crowd.seen, "last": samples[-1], "growth": growth}, indent=1))
        assert crowd.seen["json 200"] > 10 and crowd.seen["leave"] > 3
        assert not [name for name in crowd.seen if name.split()[-1] in ("500", "502", "503", "504")]
        assert not [line for line in daemon.log() if line["event"] == "bug"]
        assert all(growth[name] <= most for name, most in MOST_GROWTH.items()), growth
