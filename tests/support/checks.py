"""What must be true after every request, whatever it was.

A `Bench` is a gateway with one scripted upstream behind its three providers. Its `ask`, `refused` and `forwarded` send
bytes and then look at everything around them: the gateway is at rest and still answers, the log has one line for the
request and none of its secrets, the upstream saw one credential (the provider's own) or nothing at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pytest

from gproxyd.errors import REFUSALS
from gproxyd.observe import journal
from tests.support import raw
from tests.support.raw import Reply
from tests.support.running import CLIENT_KEY, CONFIG, PROVIDER_KEY, Loop, Running, until
from tests.support.upstream import Got, Script, Upstream, json_reply

PROMPT = "pr-canary-5b8e2f17"
"""A prompt that may be seen by the upstream and by the client whose answer quotes it, and nowhere else."""

CREDENTIAL_HEADERS = frozenset(
    {b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key", b"cookie", b"proxy-authorization"}
)

PLACES = {"openai-main": "authorization", "anthropic-main": "x-api-key", "vertex-main": "x-goog-api-key"}
"""Where each provider of the usual configuration wants its key."""

OK = json_reply(b'{"object":"demo","model":"m"}')
_RECORDS = frozenset({"request", "malformed_request"})


@contextmanager
def quick_log() -> Iterator[None]:
    """Log lines are written as they come: a test that waits for its line would wait for the gathering, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "GATHER", 0.0)
        yield


class Bench:
    """A gateway and the upstream behind it. `script` is what the upstream answers; `reset` makes it the usual 200."""

    def __init__(
        self, loop: Loop, config: str = CONFIG, secrets: dict[str, str] | None = None, *, host: str = "127.0.0.1"
    ) -> None:
        self.script: Script = [OK]
        self.upstream = Upstream(loop, lambda _: self.script).start(host)
        self.gateway = loop.gateway(config.format(vendor=self.upstream.url), secrets)
        self.secrets = {CLIENT_KEY, PROVIDER_KEY, *(secrets or {}).values()}

    def reset(self) -> None:
        self.script = [OK]

    @property
    def authority(self) -> bytes:
        return self.upstream.url.partition("://")[2].encode()

    def ask(self, data: bytes | Iterable[bytes | tuple[bytes, float]], **send: Any) -> Reply:
        """One request on a connection of its own, and what must be true after every request."""
        before = os.path.getsize(self.gateway.log_path)
        reply = raw.send(self.gateway.port, data, **send)
        until(self.gateway.at_rest)
        self._check_log(reply, before)
        self._check_reply(reply)
        check_alive(self.gateway)
        return reply

    def refused(
        self,
        data: bytes | Iterable[bytes | tuple[bytes, float]],
        status: int,
        code: str,
        dialect: str | None = "openai_chat",
        **send: Any,
    ) -> Reply:
        """A request that the gateway answers with an error of its own, and of which the upstream sees nothing."""
        before = len(self.upstream.requests)
        reply = self.ask(data, **send)
        check_error(reply, status, code, dialect)
        assert self.upstream.requests[before:] == []
        return reply

    def forwarded(
        self,
        data: bytes | Iterable[bytes | tuple[bytes, float]],
        place: str = "authorization",
        status: int = 200,
        **send: Any,
    ) -> tuple[Got, Reply]:
        """A request that reaches the upstream once, with the provider's key in its place and no other credential."""
        before = len(self.upstream.requests)
        reply = self.ask(data, **send)
        assert reply.status == status, reply.data
        assert reply.complete, reply.data
        (got,) = self.upstream.requests[before:]
        check_credential(got, place)
        assert got.header("host") == [self.authority]
        return got, reply

    def _check_log(self, reply: Reply, before: int) -> None:
        request_id = reply.header("x-request-id")
        assert request_id is not None, reply.data

        def written() -> bytes | None:
            with open(self.gateway.log_path, "rb") as log:
                log.seek(max(before - 1, 0))
                text = log.read()
            if before:
                text = text.partition(b"\n")[2]  # of a line before, of which half was there
            return text if records(text) and text.endswith(b"\n") else None

        def records(text: bytes) -> int:
            lines = [orjson.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]
            return sum(line["event"] in _RECORDS and line["request_id"] == request_id for line in lines)

        text = until(written)
        assert records(text) == 1, text
        for secret in (*self.secrets, PROMPT):
            assert secret.encode() not in text, text

    def _check_reply(self, reply: Reply) -> None:
        assert PROVIDER_KEY.encode() not in reply.data
        assert reply.header("server") is None
        if reply.header("x-gproxyd-provider") is None:
            assert PROMPT.encode() not in reply.data
            for secret in self.secrets:
                assert secret.encode() not in reply.data, reply.data


def check_alive(gateway: Running) -> None:
    """A clean request on a new connection is answered at once."""
    began = time.monotonic()
    assert raw.send(gateway.port, raw.request("/healthz", key=None)).status == 200
    assert time.monotonic() - began < 1


def check_credential(got: Got, place: str) -> None:
    """Exactly one credential, the provider's own, in its place; the client's nowhere."""
    found = [(name.lower(), value) for name, value in got.headers if name.lower() in CREDENTIAL_HEADERS]
    scheme = b"Bearer " if place == "authorization" else b""
    assert found == [(place.encode(), scheme + PROVIDER_KEY.encode())], found
    everything = got.target + b"".join(name + value for name, value in got.headers)
    assert CLIENT_KEY.encode() not in everything, everything


def check_error(reply: Reply, status: int, code: str, dialect: str | None = "openai_chat") -> None:
    """An error of the gateway's own, in its caller's dialect (None: in whichever)."""
    assert reply.status == status, reply.data
    assert reply.complete, reply.data
    assert reply.header("content-type") == "application/json"
    body = reply.json
    label = REFUSALS[code][1]
    if dialect == "anthropic":
        assert body == {"type": "error", "error": body["error"], "request_id": reply.header("request-id")}
        assert set(body["error"]) == {"type", "message"}
    elif dialect == "gemini":
        assert body["error"]["code"] == status
        assert set(body["error"]) == {"code", "message", "status", "details"}
    elif dialect is not None:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == code
    assert body["error"]["message"].startswith(label), body


def chat(model: object = "openai-main/gpt-4.1-mini", **more: object) -> dict[str, object]:
    """The body of a chat request whose prompt must not leak."""
    return {"model": model, "messages": [{"role": "user", "content": PROMPT}], **more}


ENDPOINTS = {
    "openai_chat": "/v1/chat/completions",
    "openai_responses": "/v1/responses",
    "anthropic": "/v1/messages",
}
"""One endpoint of each dialect that names its model in a JSON body."""
