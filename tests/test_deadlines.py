"""Deadlines are for peers that do not come, not for a process that was held up itself."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gproxyd.upstream.deadlines import TICK, Deadlines, within
from tests.support import raw
from tests.support.configs import providers_at
from tests.support.replies import json_reply
from tests.support.running import Loop
from tests.support.upstream import Pause, Upstream

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def peer_that_sends_after(seconds: float) -> AsyncIterator[socket.socket]:
    """A socket; what it gets comes from another thread, which nothing on the loop holds up."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        sending = threading.Timer(seconds, theirs.sendall, (b"x",))
        sending.start()
        try:
            yield ours
        finally:
            sending.cancel()
            await asyncio.to_thread(sending.join)


def test_what_came_while_the_process_stood_still_came_in_time(loop: Loop) -> None:
    async def wait() -> bytes:
        running = asyncio.get_running_loop()
        async with peer_that_sends_after(0.1) as sock:
            running.call_later(0.05, time.sleep, 0.6)
            async with within(0.3):
                came = await running.sock_recv(sock, 1)
                for _ in range(5):  # a handshake takes some turns
                    await asyncio.sleep(0)
                return came

    assert loop.run(wait()) == b"x"


@pytest.mark.parametrize("held_up", [0.0, 0.6])
def test_who_does_not_come_at_all_is_given_up_all_the_same(loop: Loop, held_up: float) -> None:
    async def wait() -> float:
        running = asyncio.get_running_loop()
        began = running.time()
        async with peer_that_sends_after(3.0) as sock:
            running.call_later(0.05, time.sleep, held_up)
            with pytest.raises(TimeoutError):
                async with within(0.3):
                    await running.sock_recv(sock, 1)
            return running.time() - began

    assert 0.29 < loop.run(wait()) < 2.5


class Waiting:
    """Counts how often it was looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def tick(self, now: float) -> None:
        self.looks += 1


def test_a_process_that_is_late_every_time_keeps_its_deadlines(loop: Loop) -> None:
    async def wait() -> int:
        running = asyncio.get_running_loop()
        deadlines, waiting = Deadlines(running), Waiting()
        deadlines.watch(waiting)
        for _ in range(6):
            running.call_soon(time.sleep, 2.5 * TICK)
            await asyncio.sleep(0.001)
        deadlines.stop()
        return waiting.looks

    assert 2 <= loop.run(wait()) <= 4


def test_an_answer_that_waited_for_a_busy_process_reaches_its_client(loop: Loop) -> None:
    """The upstream answers after 0.2 of its 0.5 seconds; from 0.1 to 0.9 nothing here moves."""
    upstream = Upstream(loop, lambda got: [Pause(0.2), json_reply(b'{"id":"x","model":"m","choices":[]}')]).start()
    gateway = loop.gateway(providers_at({"main": upstream.url}, connect="2s", first_byte="500ms", idle="500ms"))
    request = raw.request("/main/v1/chat/completions", CHAT)
    assert raw.send(gateway.port, request).status == 200
    with raw.connect(gateway.port) as sock:
        sock.sendall(request)
        loop.loop.call_soon_threadsafe(loop.loop.call_later, 0.1, time.sleep, 0.8)
        assert raw.read(sock).status == 200


def test_an_upstream_that_is_silent_is_given_up_in_time(loop: Loop) -> None:
    upstream = Upstream(loop, lambda got: [Pause(5.0), json_reply(b"{}")]).start()
    gateway = loop.gateway(providers_at({"main": upstream.url}, connect="2s", first_byte="500ms", idle="500ms"))
    began = time.monotonic()
    reply = raw.send(gateway.port, raw.request("/main/v1/chat/completions", CHAT))
    assert (reply.status, reply.json["error"]["code"]) == (504, "upstream_timeout")
    assert 0.45 < time.monotonic() - began < 2.5
