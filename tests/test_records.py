"""Records of requests that took several attempts: they tell of one, the last, as it was on the wire."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.support import raw
from tests.support.checks import chat
from tests.support.fuzz import RECORDS
from tests.support.raw import Reply
from tests.support.running import Loop, Running, until
from tests.support.upstream import Got, Script, Upstream, json_reply

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  a: {{vendor: custom, dialects: {{openai_chat: "{a}"}}, auth: bearer, credentials: [provider-key],
    models: [{{id: m}}]}}
  b: {{vendor: custom, dialects: {{openai_chat: "{b}"}}, auth: bearer, credentials: [provider-key],
    models: [{{id: m}}]}}
agents: {{team: {{targets: [a/m, b/m]}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""
BUSY = json_reply(b'{"error":{"message":"busy, come later"}}', status=b"503 Busy")
OK = json_reply(b'{"ok":1}')


class Field:
    """Two vendors, the first of which is busy."""

    def __init__(self, loop: Loop, more: str = "") -> None:
        self.busy, self.good = Upstream(loop, lambda _: [BUSY]).start(), Upstream(loop, _answer).start()
        self.gateway: Running = loop.gateway((CONFIG + RECORDS + more).format(a=self.busy.url, b=self.good.url))

    def ask(self) -> tuple[Reply, dict[str, Any]]:
        """An answer, and the record of its request."""
        reply = raw.send(self.gateway.port, raw.request("/v1/chat/completions", chat("team")))
        asked = raw.request(f"/admin/requests/{reply.header('x-request-id')}")

        def found() -> Any:
            told = raw.send(self.gateway.port, asked)
            return told.json if told.status == 200 else None

        return reply, until(found)


def _answer(_: Got) -> Script:
    return [OK]


@pytest.fixture(scope="module")
def field(loop: Loop) -> Field:
    return Field(loop)


def test_the_record_of_a_second_attempt_holds_its_body_and_not_the_first_ones_before_it(field: Field) -> None:
    reply, record = field.ask()
    assert (reply.status, record["attempts"]) == (200, 2)
    (got,) = field.good.requests[-1:]
    assert record["upstream_request"].encode() == got.body
    assert record["upstream_response"] == '{"ok":1}'
    told = record["upstream"]
    assert told["url"] == f"{field.good.url}/v1/chat/completions"
    assert [name for name, _ in told["headers"]] == [name.decode() for name, _ in got.headers]
    assert orjson.loads(record["upstream_request"])["model"] == "m"


def test_a_record_tells_of_the_traceparent_that_the_last_attempt_bore(loop: Loop) -> None:
    pytest.importorskip("opentelemetry.sdk")
    collector = Upstream(loop, _answer).start()
    field = Field(loop, f'tracing: {{{{endpoint: "{collector.url}"}}}}\n')
    _, record = field.ask()
    told = [value for name, value in record["upstream"]["headers"] if name == "traceparent"]
    assert [value.encode() for value in told] == field.good.requests[-1].header("traceparent")
    assert len(told) == 1
