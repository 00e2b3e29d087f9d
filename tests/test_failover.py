"""Three scripted upstreams that fail in every way: the client sees one clean answer or one clean error.

What is tried, how the breakers turn and what is booked is a table (TABLE).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from tests.support import raw
from tests.support.raw import Reply
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk, json_reply
from tests.support.running import CLIENT_KEY, SECRETS, Loop, Running, until
from tests.support.upstream import Fin, Got, Pause, Reset, Script, Stall, Upstream

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
discovery: {{enabled: false}}
providers:
  a: {{vendor: custom, dialects: {{openai_chat: "{a}", anthropic: "{a}"}}, auth: bearer, credentials: [key-a], {extra_a}
    timeouts: {fast}, models: [{{id: m, context: 1000, price: {{input: "1", output: "1"}}}}]}}
  b: {{vendor: custom, dialects: {{openai_chat: "{b}"}}, auth: bearer, credentials: [key-b], timeouts: {fast}, {extra_b}
    models: [{{id: m, context: 100000, price: {{input: "2", output: "2"}}}}]}}
  c: {{vendor: custom, dialects: {{openai_chat: "{c}"}}, auth: bearer, credentials: [key-c], timeouts: {fast},
    models: [{{id: m, price: {{input: "3", output: "3"}}}}]}}
agents:
  team: {{targets: [a/m, b/m, c/m]}}
  only: {{targets: [a/m]}}
  turns: {{strategy: round_robin, targets: [a/m, b/m, c/m]}}
  cheap: {{strategy: cost, targets: [c/m, b/m, a/m]}}
  stuck: {{strategy: sticky, targets: [a/m, b/m, c/m]}}
  session: {{strategy: round_robin, targets: [a/m, b/m, c/m], sticky: {{header: x-session-id}}}}
  swift: {{strategy: latency, targets: [a/m, b/m]}}
  polite: {{targets: [{{target: b/m, max_output: 7, headers: {{x-team: red}}}}], system_prompt: Be kind.}}
  short: {{targets: [a/m], overflow: trim}}
  narrow: {{targets: [a/m]}}
  none: {{targets: ["a/x*"]}}
aliases: {{crew: team, direct: b/m}}
routing: {{bare_models: catalog, first_token_window: 2s, retries: {{max: 3, budget: 0.1}}}}
breaker: {{failures: {failures}, open_for: {open_for}, rate: 0}}
users:
  tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}
  ann: {{permissions: [team, direct], keys: {{main: {{token: ck-ann}}}}}}
  bob: {{permissions: ["*"], keys: {{main: {{token: ck-bob, agents: [team]}}}}}}
  eve: {{permissions: [crew, "a/*", m], keys: {{main: {{token: ck-eve}}}}}}
"""


def answer(name: str, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"from {name}"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return {"id": "x", "object": "chat.completion", "model": "m", "choices": choices, "usage": USAGE, **more}


def events(name: str) -> list[bytes]:
    parts: list[dict[str, Any]] = [
        {"model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": f"from {name}"}}]},
        {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"model": "m", "choices": [], "usage": USAGE},
    ]
    return [b"data: " + orjson.dumps(part) + b"\n\n" for part in parts] + [b"data: [DONE]\n\n"]


def well(name: str, *, stream: bool) -> Script:
    if stream:
        return [EVENT_STREAM, *(chunk(event) for event in events(name)), LAST_CHUNK]
    return [json_reply(orjson.dumps(answer(name)))]


ERROR = b'{"error":{"message":"no","type":"server_error"}}'


def status(line: bytes, headers: bytes = b"", body: bytes = ERROR) -> Script:
    return [json_reply(body, status=line, headers=headers)]


EVENT_ERROR = b'data: {"error":{"message":"overloaded","type":"server_error"}}\n\n'
PAGE = b"<html>sign in</html>"

FAULTS: dict[str, Script] = {
    "500": status(b"500 Oops"),
    "502": status(b"502 Bad Gateway"),
    "503": status(b"503 Unavailable"),
    "504": status(b"504 Timeout"),
    "408": status(b"408 Request Timeout"),
    "429": status(b"429 Too Many", b"Retry-After: 30\r\n"),
    "529": status(b"529 Overloaded"),
    "401": status(b"401 Unauthorized"),
    "reset": [Reset()],
    "closed": [Fin()],
    "no answer": [Stall()],
    "no HTTP": [b"SSH-2.0-OpenSSH_9\r\n\r\n", Fin()],
    "half a head": [b"HTTP/1.1 200 OK\r\nContent-Ty", Fin()],
    "half a body": [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{", Fin()],
    "a page": [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%b" % (len(PAGE), PAGE)],
    "nothing": [b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"],
    "an error in 200": [json_reply(ERROR)],
    "an error event": [EVENT_STREAM, chunk(EVENT_ERROR), LAST_CHUNK],
    "a silent stream": [EVENT_STREAM, Stall()],
    "an empty stream": [EVENT_STREAM, LAST_CHUNK],
}

STREAM_ONLY = {"an error event", "a silent stream", "an empty stream"}
JSON_ONLY = {"half a body", "an error in 200"}


@dataclass
class Field:
    """Three upstreams and the gateway before them. `scripts` says what each does next: well, or a fault's name."""

    loop: Loop
    gateway: Running
    upstreams: dict[str, Upstream]
    scripts: dict[str, str]

    @classmethod
    def make(
        cls, loop: Loop, *, failures: int = 1000, open_for: str = "300ms", keys: str = "pk-a", **extra: str
    ) -> Field:
        scripts = dict.fromkeys("abc", "well")
        upstreams: dict[str, Upstream] = {}

        def script_of(name: str) -> Any:
            def script(got: Got) -> Script:
                what = scripts[name]
                if what == "key":
                    what = "401" if got.header("authorization") == [b"Bearer pk-bad"] else "well"
                stream = orjson.loads(got.body).get("stream") is True
                if what == "breaks":
                    return [EVENT_STREAM, chunk(events(name)[0]), Pause(0.05), Reset()]
                return well(name, stream=stream) if what == "well" else FAULTS[what]

            return script

        for name in "abc":
            upstreams[name] = Upstream(loop, script_of(name)).start()
        config = CONFIG.format(
            **{name: upstream.url for name, upstream in upstreams.items()},
            fast="{first_byte: 300ms, connect: 500ms, idle: 300ms}",
            failures=failures,
            open_for=open_for,
            extra_a=extra.get("a", ""),
            extra_b=extra.get("b", ""),
        )
        secrets = SECRETS | {"key-a": keys, "key-b": "pk-b", "key-c": "pk-c"}
        return cls(loop, loop.gateway(config, secrets), upstreams, scripts)

    def ask(
        self, model: str = "team", *, stream: bool = False, key: str = CLIENT_KEY, headers: Any = (), **more: Any
    ) -> Reply:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
        if stream:
            body["stream"] = True
        data = raw.request("/v1/chat/completions", orjson.dumps(body), key=key, headers=[*headers])
        return raw.send(self.gateway.port, data)

    def tried(self) -> str:
        """Who was asked, in alphabetical order, once for each request."""
        found = "".join(name * len(one.requests) for name, one in self.upstreams.items())
        for one in self.upstreams.values():
            one.requests.clear()
        return found

    def last(self, name: str) -> dict[str, Any]:
        body: dict[str, Any] = orjson.loads(self.upstreams[name].requests[-1].body)
        return body

    def line(self, reply: Reply) -> dict[str, Any]:
        return self.gateway.request(reply.header("x-request-id") or "")

    def statsz(self) -> dict[str, Any]:
        told: dict[str, Any] = raw.send(self.gateway.port, raw.request("/statsz", method="GET")).json
        return told

    def metrics(self) -> str:
        return raw.send(self.gateway.port, raw.request("/metrics", method="GET")).body.decode()


@pytest.fixture(scope="module")
def field(loop: Loop) -> Field:
    return Field.make(loop)


@pytest.fixture(autouse=True)
def _well(request: pytest.FixtureRequest) -> None:
    if "field" in request.fixturenames:
        one: Field = request.getfixturevalue("field")
        one.scripts.update(dict.fromkeys("abc", "well"))
        registry = one.gateway.daemon.gateway.exchanges.registry
        one.loop.run(_heal(registry))
        one.tried()


async def _heal(registry: Any) -> None:
    """What earlier tests have done to the targets is forgotten."""
    for health in list(registry._targets.values()):
        health._breakers.clear()
        health._limited.clear()
        for credential in health.pool.all():
            credential.parked_at = None
        health._look(registry.clock())
    registry._budgets.clear()
    registry.orders.pins._known.clear()
    registry.latencies._known.clear()


def text_of(reply: Reply, *, stream: bool) -> str:
    if not stream:
        content: str = reply.json["choices"][0]["message"]["content"]
        return content
    assert reply.complete and reply.body.endswith(b"data: [DONE]\n\n"), reply.data
    pieces = [line[6:] for line in reply.body.split(b"\n\n") if line.startswith(b"data: {")]
    return "".join(
        choice["delta"].get("content", "") for piece in pieces for choice in orjson.loads(piece).get("choices", ())
    )


CASES = [
    (fault, stream)
    for fault in FAULTS
    for stream in (False, True)
    if fault not in (JSON_ONLY if stream else STREAM_ONLY)
]


# fault -> status that the client sees if all three have it, code of the error (None: the vendor's own answer)
TABLE: dict[str, tuple[int, str | None]] = {
    "500": (500, None),
    "502": (502, None),
    "503": (503, None),
    "504": (504, None),
    "408": (408, None),
    "429": (429, None),
    "529": (529, None),
    "401": (502, "upstream_auth"),
    "reset": (502, "upstream_error"),
    "closed": (502, "upstream_error"),
    "no answer": (504, "upstream_timeout"),
    "no HTTP": (502, "upstream_error"),
    "half a head": (502, "upstream_error"),
    "half a body": (502, "upstream_error"),
    "a page": (502, "upstream_error"),
    "nothing": (502, "upstream_error"),
    "an error in 200": (502, "upstream_error"),
    "an error event": (502, "upstream_error"),
    "a silent stream": (504, "upstream_timeout"),
    "an empty stream": (502, "upstream_error"),
}


@pytest.mark.parametrize(("fault", "stream"), CASES)
def test_the_next_target_answers_and_the_client_sees_nothing_of_the_fault(
    field: Field, fault: str, stream: bool
) -> None:
    field.scripts["a"] = fault
    reply = field.ask(stream=stream)
    assert (reply.status, text_of(reply, stream=stream)) == (200, "from b"), reply.data
    assert b'"team"' in reply.body and b'"m"' not in reply.body
    told = [reply.header(f"x-gproxyd-{name}") for name in ("provider", "model", "attempts")]
    assert told == ["b", "m", "2"] and len(reply.headers("x-gproxyd-provider")) == 1
    assert field.tried() == "ab"
    line = field.line(reply)
    assert (line["provider"], line["model"], line["requested_model"], line["attempts"]) == ("b", "m", "team", 2)
    assert (line["outcome"], line["status"]) == ("ok", 200)


@pytest.mark.parametrize(("fault", "stream"), CASES)
def test_where_all_fail_there_is_one_clean_error(field: Field, fault: str, stream: bool) -> None:
    field.scripts.update(dict.fromkeys("abc", fault))
    reply = field.ask(stream=stream)
    expected, code = TABLE[fault]
    assert (reply.status, reply.complete, reply.header("x-gproxyd-attempts")) == (expected, True, "3"), reply.data
    assert field.tried() == "abc"
    if code is None:
        assert reply.body == ERROR
    else:
        assert reply.json["error"]["code"] == code
        assert b"sign in" not in reply.data and b"overloaded" not in reply.data
    if fault == "429":
        assert reply.header("retry-after") == "30"
    line = field.line(reply)
    assert (line["status"], line["attempts"]) == (expected, 3)


def test_a_stream_that_breaks_after_its_first_event_is_not_begun_anew(field: Field) -> None:
    field.scripts["a"] = "breaks"
    reply = field.ask(stream=True)
    assert b"from a" in reply.body and b"from b" not in reply.body and b'"error"' in reply.body
    assert not reply.complete and field.tried() == "a"
    assert field.line(reply)["outcome"] == "upstream_error"


def test_a_request_that_is_wrong_itself_is_not_tried_elsewhere(field: Field) -> None:
    FAULTS["400"] = status(b"400 Bad Request")
    field.scripts["a"] = "400"
    reply = field.ask()
    assert (reply.status, reply.body, field.tried()) == (400, ERROR, "a")


def test_a_connection_that_is_refused_is_one_more_fault(loop: Loop) -> None:
    field = Field.make(loop)
    config = field.gateway.folder / "gproxyd.yaml"
    dead = loop.gateway(
        config.read_text().replace(field.upstreams["a"].url, "http://127.0.0.1:1"),
        SECRETS | {"key-a": "x", "key-b": "x", "key-c": "x"},
    )
    field.gateway = dead
    for _ in range(3):
        reply = field.ask()
        assert (reply.status, text_of(reply, stream=False), reply.header("x-gproxyd-attempts")) == (200, "from b", "2")


def test_it_is_booked_once_to_the_target_that_answered(field: Field) -> None:
    field.scripts["a"] = "500"
    before = field.statsz()["models"]
    reply = field.ask()
    assert reply.status == 200

    def counted() -> Any:
        models = field.statsz()["models"]
        return models if models.get("b/m", {}).get("requests", 0) > before.get("b/m", {}).get("requests", 0) else None

    after = until(counted)
    for name in ("a/m", "c/m"):
        assert after.get(name, {}).get("requests") == before.get(name, {}).get("requests")
    ledger = field.gateway.daemon.state.database
    assert ledger is not None
    rows = until(lambda: _usage(field, reply.header("x-request-id") or ""))
    assert [(row["provider"], row["model"], row["attempts"], row["cost_usd"]) for row in rows] == [
        ("b", "m", 2, "0.00003")
    ]
    assert field.gateway.daemon.gateway.books.limiter.running() == 0


def _usage(field: Field, request_id: str) -> list[dict[str, Any]]:
    reply = raw.send(field.gateway.port, raw.request("/admin/usage?limit=200", method="GET"))
    return [row for row in reply.json["data"] if row.get("request_id") == request_id]


def test_retries_and_failures_are_counted(field: Field) -> None:
    field.scripts["a"] = "503"
    field.ask()
    text = field.metrics()
    assert 'gproxyd_upstream_retries_total{provider="b"}' in text
    assert 'gproxyd_upstream_errors_total{kind="status",provider="a"}' in text


# Breakers.


def test_a_breaker_opens_is_shown_and_closes_again_when_the_upstream_is_well(loop: Loop) -> None:
    field = Field.make(loop, failures=3, open_for="400ms")
    field.scripts["a"] = "500"
    for _ in range(3):
        assert text_of(field.ask(), stream=False) == "from b"
    assert field.tried() == "aaabbb"
    breaker = field.statsz()["circuit_breakers"]["a/m"]
    assert (breaker["state"], breaker["failures"], breaker["opens"]) == ("open", 3, 1) and breaker["retry_at"]
    assert 'gproxyd_circuit_breaker_state{target="a/m"} 2.0' in field.metrics()
    for _ in range(3):
        assert field.ask().header("x-gproxyd-attempts") == "1"
    assert field.tried() == "bbb"
    healed = time.monotonic()
    field.scripts["a"] = "well"
    reply = until(lambda: one if text_of(one := field.ask(), stream=False) == "from a" else None)
    assert time.monotonic() - healed < 0.4 + 0.3 and reply.header("x-gproxyd-attempts") == "1"
    assert field.statsz()["circuit_breakers"]["a/m"]["state"] == "closed"
    text = field.metrics()
    for state in ("open", "half-open", "closed"):
        assert f'gproxyd_circuit_breaker_transitions_total{{state="{state}",target="a/m"}} 1.0' in text


def test_where_no_breaker_admits_anything_the_client_is_told_when_to_come_back(loop: Loop) -> None:
    field = Field.make(loop, failures=1, open_for="20s")
    field.scripts.update(dict.fromkeys("abc", "500"))
    assert field.ask().status == 500
    field.tried()
    for model in ("team", "a/m"):
        reply = field.ask(model)
        assert (reply.status, reply.json["error"]["code"], field.tried()) == (503, "no_target", "")
        assert 18 <= int(reply.header("retry-after") or 0) <= 20


def test_a_breaker_and_its_state_survive_a_reload(loop: Loop) -> None:
    field = Field.make(loop, failures=1, open_for="20s")
    field.scripts["a"] = "500"
    field.ask()
    field.tried()
    assert list(field.loop.run(field.gateway.daemon._reload_when_asked())) == []
    field.ask()
    assert field.tried() == "b"


def test_a_client_that_leaves_is_no_failure(loop: Loop) -> None:
    field = Field.make(loop, failures=1)
    field.scripts["a"] = "no answer"
    body = orjson.dumps({"model": "a/m", "messages": [{"role": "user", "content": "hi"}]})
    for _ in range(3):
        sock = raw.connect(field.gateway.port)
        sock.sendall(raw.request("/v1/chat/completions", body))
        until(lambda: field.upstreams["a"].requests)
        raw.reset(sock)
        field.upstreams["a"].requests.clear()
        until(field.gateway.at_rest)
    field.scripts["a"] = "well"
    assert field.ask("a/m").status == 200


# Keys.


def test_one_of_several_keys_that_fails_is_nobodys_trouble(loop: Loop) -> None:
    field = Field.make(loop, keys="pk-bad\npk-good\npk-best")
    field.scripts["a"] = "key"
    replies = [field.ask("a/m") for _ in range(12)]
    assert [reply.status for reply in replies] == [200] * 12
    assert sorted(reply.header("x-gproxyd-attempts") or "" for reply in replies) == ["1"] * 11 + ["2"]
    told = until(lambda: [line for line in field.gateway.log() if line["event"] == "credential_refused"])
    assert [line["credential"] for line in told] == ["key-a"] and all("pk-bad" not in str(line) for line in told)


def test_a_key_that_is_limited_rests_and_the_next_one_answers_in_its_place(loop: Loop) -> None:
    field = Field.make(loop, keys="pk-1\npk-2")
    seen: list[bytes] = []

    def script(got: Got) -> Script:
        (key,) = got.header("authorization")
        seen.append(key[-1:])
        return FAULTS["429"] if key.endswith(b"1") else well("a", stream=False)

    field.upstreams["a"]._script = script
    assert [field.ask("a/m").status for _ in range(5)] == [200] * 5
    assert sorted(seen) == [b"1", *[b"2"] * 5]


# Budgets.


def test_an_upstream_that_is_down_is_sent_a_tenth_more_at_most(field: Field) -> None:
    field.scripts["a"] = "502"
    for _ in range(100):
        assert field.ask("only").status == 502
    assert 100 < len(field.upstreams["a"].requests) <= 110
    field.tried()


def test_a_plain_model_is_never_asked_twice(field: Field) -> None:
    field.scripts["a"] = "429"
    for _ in range(5):
        reply = field.ask("a/m")
        assert (reply.status, reply.header("retry-after"), reply.header("x-gproxyd-attempts")) == (429, "30", "1")
    assert field.tried() == "aaaaa"


# Strategies, and what agents do with requests.


def test_targets_take_turns(field: Field) -> None:
    assert sorted(text_of(field.ask("turns"), stream=False)[-1] for _ in range(6)) == list("aabbcc")


def test_the_cheapest_target_is_asked_first(field: Field) -> None:
    assert text_of(field.ask("cheap"), stream=False) == "from a"


def test_a_conversation_stays_where_it_was_and_moves_for_good_when_it_must(field: Field) -> None:
    first = text_of(field.ask("stuck"), stream=False)[-1]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "?"},
    ]
    assert {text_of(field.ask("stuck", messages=turns), stream=False)[-1] for _ in range(4)} == {first}
    others = {
        text_of(field.ask("stuck", messages=[{"role": "user", "content": f"other {number}"}]), stream=False)[-1]
        for number in range(20)
    }
    assert len(others) > 1
    field.scripts[first] = "500"
    second = text_of(field.ask("stuck"), stream=False)[-1]
    field.scripts[first] = "well"
    assert second != first and text_of(field.ask("stuck"), stream=False)[-1] == second


def test_a_session_is_told_by_its_header(field: Field) -> None:
    def answers(session: str) -> set[str]:
        headers = [("X-Session-Id", session)]
        return {text_of(field.ask("session", headers=headers), stream=False) for _ in range(3)}

    seen = [answers(str(number)) for number in range(5)]
    assert all(len(one) == 1 for one in seen) and len(set.union(*seen)) == 3


def test_the_fastest_target_is_asked_first(field: Field) -> None:
    def slowly(got: Got) -> Script:
        return [Pause(0.15), *well("a", stream=False)]

    quick = field.upstreams["a"]._script
    field.upstreams["a"]._script = slowly
    answers = [text_of(field.ask("swift"), stream=False)[-1] for _ in range(8)]
    field.upstreams["a"]._script = quick
    assert set(answers[:2]) == {"a", "b"} and answers[2:] == ["b"] * 6


def test_what_an_agent_adds_reaches_the_upstream(field: Field) -> None:
    assert field.ask("polite", max_tokens=100, headers=[("X-Team", "blue")]).status == 200
    body = field.last("b")
    assert body["messages"][0] == {"role": "system", "content": "Be kind."} and body["max_tokens"] == 7
    assert field.upstreams["b"].requests[-1].header("x-team") == [b"red"]
    field.ask("polite", max_completion_tokens=3)
    assert field.last("b")["max_completion_tokens"] == 3 and "max_tokens" not in field.last("b")


LONG = [
    {"role": "user", "content": "old words " * 400},
    {"role": "assistant", "content": "old answer " * 400},
    {"role": "user", "content": "the question"},
]


def test_a_request_that_is_too_long_goes_to_a_target_that_takes_it_is_shortened_or_refused(field: Field) -> None:
    assert text_of(field.ask("team", messages=LONG), stream=False) == "from b"
    assert field.tried() == "b"
    reply = field.ask("short", messages=LONG, max_tokens=50)
    assert (reply.status, field.last("a")["messages"]) == (200, LONG[2:])
    field.tried()
    reply = field.ask("narrow", messages=LONG)
    assert (reply.status, reply.json["error"]["code"], field.tried()) == (400, "invalid_request", "")
    text = field.metrics()
    for action in ("skip", "trim", "refuse"):
        assert f'gproxyd_overflow_guard_triggers_total{{action="{action}"}} 1.0' in text


def test_a_bare_model_is_every_provider_that_offers_it(field: Field) -> None:
    field.scripts["a"] = "500"
    reply = field.ask("m")
    assert (text_of(reply, stream=False), reply.json["model"], field.tried()) == ("from b", "m", "ab")
    assert field.ask("nobody-has-this").json["error"]["code"] == "provider_prefix"


def test_only_targets_that_speak_the_clients_dialect_are_asked(field: Field) -> None:
    FAULTS["message"] = [json_reply(b'{"type":"message","model":"m","content":[],"usage":{"input_tokens":1}}')]
    field.scripts["a"] = "message"
    body = orjson.dumps({"model": "team", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]})
    reply = raw.send(field.gateway.port, raw.request("/v1/messages", body))
    assert (reply.status, reply.json["model"], field.tried()) == (200, "team", "a")
    FAULTS["busy"] = status(
        b"529 Overloaded", b"", b'{"type":"error","error":{"type":"overloaded_error","message":"!"}}'
    )
    field.scripts["a"] = "busy"
    assert raw.send(field.gateway.port, raw.request("/v1/messages", body)).status == 529
    assert field.tried() == "a"


def test_an_agent_whose_targets_nobody_knows_is_warned_of_and_cannot_be_called(field: Field) -> None:
    reply = field.ask("none")
    assert (reply.status, reply.json["error"]["code"]) == (503, "no_target")
    assert any("agents.none" in str(line) for line in field.gateway.log())


# Permissions.


@pytest.mark.parametrize(
    ("key", "model", "expected"),
    [
        ("ck-ann", "team", 200),
        ("ck-ann", "only", "forbidden_agent"),
        ("ck-ann", "crew", "forbidden_model"),
        ("ck-ann", "a/m", "forbidden_model"),
        ("ck-ann", "m", "forbidden_model"),
        ("ck-ann", "direct", 200),
        ("ck-bob", "team", 200),
        ("ck-bob", "only", "forbidden_agent"),
        ("ck-bob", "a/m", "forbidden_model"),
        ("ck-eve", "crew", 200),
        ("ck-eve", "team", "forbidden_agent"),
        ("ck-eve", "m", 200),
    ],
)
def test_an_agent_needs_a_permission_of_its_own(field: Field, key: str, model: str, expected: int | str) -> None:
    reply = field.ask(model, key=key)
    assert (reply.status if reply.status == 200 else reply.json["error"]["code"]) == expected


def test_an_agent_is_called_by_its_name_in_the_aggregated_form_only(field: Field) -> None:
    body = orjson.dumps({"model": "team", "messages": []})
    raw.send(field.gateway.port, raw.request("/a/v1/chat/completions", body))
    assert field.last("a")["model"] == "team"


# Upstream limits.


def test_a_short_burst_waits_for_room_at_its_upstream(loop: Loop) -> None:
    field = Field.make(loop, a="rate_limits: {concurrency: 1},")
    field.upstreams["a"]._script = lambda got: [Pause(0.1), *well("a", stream=False)]
    socks = [raw.connect(field.gateway.port) for _ in range(4)]
    body = orjson.dumps({"model": "a/m", "messages": []})
    began = time.monotonic()
    for sock in socks:
        sock.sendall(raw.request("/v1/chat/completions", body))
    assert [raw.read(sock).status for sock in socks] == [200] * 4
    for sock in socks:
        sock.close()
    assert 0.4 <= time.monotonic() - began < 2.0
    until(lambda: field.gateway.daemon.gateway.books.limiter.running() == 0)


def test_an_upstream_without_room_is_passed_by_and_waited_for_only_if_there_is_no_other(loop: Loop) -> None:
    field = Field.make(loop, a="rate_limits: {rpm: 2},")
    assert [text_of(field.ask(), stream=False)[-1] for _ in range(4)] == list("aabb")
    reply = field.ask("a/m")
    assert (reply.status, reply.json["error"]["code"]) == (429, "rate_limited") and reply.header("retry-after")
    assert field.gateway.daemon.gateway.books.limiter.running() == 0


# What would become of a request.


def explained(field: Field, model: str) -> dict[str, Any]:
    told: dict[str, Any] = raw.send(
        field.gateway.port, raw.request("/admin/explain", orjson.dumps({"model": model}), key=CLIENT_KEY)
    ).json
    return told


def test_explain_shows_the_whole_decision_and_sends_nothing(loop: Loop) -> None:
    field = Field.make(loop, failures=1, open_for="20s", a="rate_limits: {rpm: 50},")
    field.scripts["a"] = "500"
    field.ask()
    field.tried()
    told = explained(field, "team")
    assert (told["rule"], told["agent"]["strategy"], told["first"]) == ("agent", "fallback", "b/m")
    assert [f"{one['provider']}/{one['model']}" for one in told["targets"]] == ["a/m", "b/m", "c/m"]
    first = told["targets"][0]
    assert first["breakers"]["a/m"]["state"] == "open" and 18 < first["ready_in_seconds"] <= 20
    assert (first["limits"], first["requests_left"], first["price"]["input"]) == ({"rpm": 50}, 49, "1.00")
    assert first["context"] == 1000 and told["ready_in_seconds"] == 0
    assert explained(field, "crew")["rule"] == "alias" and explained(field, "m")["rule"] == "catalog"
    assert explained(field, "a/m")["first"] is None and explained(field, "cheap")["first"] == "b/m"
    before = explained(field, "turns")
    assert before["first"] is None and explained(field, "turns")["targets"][1] == before["targets"][1]
    assert explained(field, "nobody")["error"]["code"] == "provider_prefix"
    assert field.tried() == ""
