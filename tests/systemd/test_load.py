"""Restarts and hand-offs under load: nobody's request fails, and no stream is cut."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.support.running import until
from tests.systemd.rig import CONFIG, KEY, PACKAGE, PORT, Load, Rig, unfit

pytestmark = [pytest.mark.systemd, pytest.mark.skipif(unfit() is not None, reason=str(unfit()))]

ROUNDS = int(os.environ.get("ROUNDS", "50"))

CLIENTS = {"keeping": 64, "closing": 8, "streaming": 20, "pause": 0.3}

P99 = float(os.environ.get("P99", "50"))
"""Milliseconds, of all requests together. A new process costs a second of one core, and on a machine that is busy with
other things as well everybody waits for that."""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as booted:
        assert booted.chat() == "200"
        until(lambda: rows(booted) == 1)
        yield booted


def rows(rig: Rig) -> int:
    return int(rig.sql("SELECT count(*) FROM usage WHERE status = 200"))


def all_booked_once(rig: Rig, before: int, done: int) -> None:
    """As many records as answers, by however many processes, and the totals agree."""
    until(lambda: rows(rig) - before >= done, 10)
    assert rows(rig) - before == done
    assert rig.sql("SELECT (SELECT sum(requests) FROM totals) - (SELECT count(*) FROM usage)") == "0"


def change_under_load(rig: Rig, how: str, pause: float) -> Load:
    """`systemctl HOW`, again and again, with so many seconds between."""
    before = rows(rig)
    with Load(rig, **CLIENTS) as load:
        time.sleep(2)
        seen = {rig.pid}
        for _ in range(ROUNDS):
            rig.systemctl(how, "gproxyd")
            seen.add(rig.pid)
            time.sleep(pause)
    print(f"{ROUNDS} times {how}:", load.report)
    assert len(seen) == ROUNDS + 1, "the process stayed the same"
    assert load.report["failures"] == {}
    all_booked_once(rig, before, sum(load.report["done"].values()))
    return load


def test_hand_offs_fail_no_request_cut_no_stream_and_go_unnoticed(rig: Rig) -> None:
    load = change_under_load(rig, "reload", 0.4)
    assert load.report["done"]["stream"] > 20
    assert load.report["announced"] > 0, "nobody was told that a connection ends"
    assert load.report["ms"]["p99"] <= P99
    assert rig.show("NRestarts") == "0"


def test_restarts_fail_no_request_and_cut_no_stream(rig: Rig) -> None:
    change_under_load(rig, "restart", 0.1)


def test_a_hand_off_brings_new_code_and_a_new_configuration(rig: Rig) -> None:
    rig.run("sed", "-i", 's/__version__ = ".*"/__version__ = "9.9.9"/', f"{PACKAGE}/__init__.py")
    rig.write("/etc/gproxyd/gproxyd.yaml", CONFIG + "aliases: {newest: main/m}\n")
    rig.systemctl("reload", "gproxyd")
    until(lambda: rig.events("ready")[-1]["version"] == "9.9.9")
    body = '{"model":"newest","messages":[{"role":"user","content":"hello"}]}'
    options = ("-H", "Content-Type: application/json", "-d", body)
    assert rig.status("/v1/chat/completions", *options) == "403", "the alias is there; ann may not use it"


def test_a_stop_waits_for_the_streams_of_every_process_there_still_is(rig: Rig) -> None:
    """Longer than the unit allows by itself: the daemon asks for more time."""
    rig.drop_in("test", "[Service]\nTimeoutStopSec=3\n")
    rig.systemctl("restart", "gproxyd")
    old = rig.pid
    body = '{"model":"main/m","stream":true,"messages":[{"role":"user","content":"long"}]}'
    line = ["curl", "-sSN", "-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json", "-d", body]
    with subprocess.Popen(
        rig.command(*line, f"http://127.0.0.1:{PORT}/v1/chat/completions"), stdout=subprocess.PIPE, text=True
    ) as streaming:
        assert streaming.stdout is not None
        streaming.stdout.readline()
        rig.systemctl("reload", "gproxyd")
        assert rig.pid != old
        began = time.monotonic()
        rig.systemctl("stop", "gproxyd.socket", "gproxyd-admin.socket", "gproxyd")
        assert time.monotonic() - began > 4, "nobody waited"
        rest = streaming.stdout.read()
    assert rest.count("data: ") == 101
    assert rest.endswith("data: [DONE]\n\n")
    assert rig.show("Result") == "success"
