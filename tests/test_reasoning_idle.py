"""Silence amid an answer: more of it is borne while the model thinks."""

from __future__ import annotations

import json

import pytest

from tests.support import raw
from tests.support.configs import providers_at
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk
from tests.support.running import SECRETS, Loop
from tests.support.upstream import Pause, Upstream

THOUGHTS = [{"reasoning_content": "so"}, {"reasoning": "so"}]
WORD = {"content": "so"}


def event(delta: dict[str, str]) -> bytes:
    value = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [{"index": 0, "delta": delta}]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def answer(loop: Loop, patience: str, *deltas: dict[str, str]) -> raw.Reply:
    """What a client gets of these events, of a second's silence, and of one event more."""
    begun = b"".join(chunk(event(delta)) for delta in deltas)
    ended = chunk(event(WORD)) + chunk(b"data: [DONE]\n\n") + LAST_CHUNK
    upstream = Upstream(loop, [EVENT_STREAM + begun, Pause(1.0), ended]).start()
    idle = f"300ms, reasoning_idle: {patience}"
    config = providers_at({"up": upstream.url}, connect="1s", first_byte="1s", idle=idle, keepalive="0s")
    gateway = loop.gateway(config, SECRETS)
    body = {"model": "up/m", "stream": True, "messages": [{"role": "user", "content": "?"}]}
    return raw.send(gateway.port, raw.request("/v1/chat/completions", body))


@pytest.mark.parametrize("thought", THOUGHTS, ids=lambda thought: next(iter(thought)))
def test_a_model_that_thinks_may_be_silent_for_longer(loop: Loop, thought: dict[str, str]) -> None:
    reply = answer(loop, "3s", WORD, thought)
    assert reply.complete and reply.body.endswith(b"data: [DONE]\n\n")


def test_one_that_answers_may_not(loop: Loop) -> None:
    reply = answer(loop, "3s", THOUGHTS[0], WORD)
    assert not reply.complete and b"upstream_timeout" in reply.body


def test_nor_one_that_thinks_for_longer_than_it_may(loop: Loop) -> None:
    reply = answer(loop, "500ms", WORD, THOUGHTS[0])
    assert not reply.complete and b"upstream_timeout" in reply.body
