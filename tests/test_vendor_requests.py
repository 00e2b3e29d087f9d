"""Vendors' ways, seen from the upstream: quirks, headers, addresses, tokens on a real daemon's requests."""

from __future__ import annotations

import json
from collections.abc import Iterator

import orjson
import pytest

from tests.support import raw
from tests.support.running import SECRETS, Loop, Running
from tests.support.upstream import Upstream, json_reply
from tests.test_vendors import Account

REPLY = json_reply(b'{"id":"x","object":"chat.completion","model":"m","choices":[]}')

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  plain: {{vendor: openai, base_url: "{url}", credentials: [provider-key]}}
  strict: {{vendor: nvidia, base_url: "{url}", credentials: [provider-key]}}
  fast: {{vendor: cerebras, base_url: "{url}", credentials: [provider-key]}}
  odd: {{vendor: custom, dialects: {{openai_chat: "{url}"}}, credentials: [provider-key],
    quirks: {{both_keys: true, flat_content: true}}}}
  claude: {{vendor: anthropic, base_url: "{url}", credentials: [provider-key]}}
  rank: {{vendor: cohere, base_url: "{url}", credentials: [provider-key]}}
  blue: {{vendor: azure, base_url: "{url}", credentials: [provider-key], api_version: "2024-10-21",
    deployments: {{gpt-4o: mine}}}}
  google: {{vendor: vertex, base_url: "{url}", credentials: [google], project: proj}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""


@pytest.fixture(scope="module")
def accounts() -> Iterator[Account]:
    made = Account()
    yield made
    made.close()


@pytest.fixture(scope="module")
def at_work(loop: Loop, accounts: Account) -> tuple[Upstream, Running]:
    upstream = Upstream(loop, [REPLY]).start()
    pretty = json.dumps(json.loads(accounts.secret().reveal()), indent=2)  # as Google's files are
    return upstream, loop.gateway(CONFIG.format(url=upstream.url), SECRETS | {"google": pretty})


def send(at_work: tuple[Upstream, Running], path: str, body: dict[str, object], **more: object) -> raw.Reply:
    reply = raw.send(at_work[1].port, raw.request(path, body, **more))  # type: ignore[arg-type]
    assert reply.status == 200, reply.data
    return reply


CHAT: dict[str, object] = {
    "model": "m",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "r", "extra_content": {"google": {"s": "x=="}}},
    ],
    "tool_choice": "auto",
}


@pytest.mark.parametrize("way", ["the long way", "the short way"])
def test_chat_requests_are_fitted_and_no_others(at_work: tuple[Upstream, Running], way: str) -> None:
    upstream, _ = at_work
    for name, gone in (("plain", ()), ("strict", ("tool_choice", "stream_options")), ("fast", ("reasoning_content",))):
        send(at_work, f"/{name}/v1/chat/completions", CHAT | {"stream_options": {}})
        told = upstream.requests[-1].body
        for member in ("tool_choice", "stream_options", "reasoning_content"):
            assert (b'"%b"' % member.encode() in told) == (member not in gone), (way, name)
        assert b'"extra_content":{"google":{"s":"x=="}}' in told.replace(b'": ', b'":')
    send(at_work, "/odd/v1/chat/completions", CHAT)
    assert orjson.loads(upstream.requests[-1].body)["messages"][0]["content"] == "a\nb"
    assert upstream.requests[-1].header("x-goog-api-key") == [SECRETS["provider-key"].encode()]
    send(at_work, "/strict/v1/embeddings", {"model": "m", "tool_choice": "auto", "input": "x"})
    assert b'"tool_choice"' in upstream.requests[-1].body


def test_a_demanded_header_is_there_once(at_work: tuple[Upstream, Running]) -> None:
    upstream, _ = at_work
    body: dict[str, object] = {"model": "m", "max_tokens": 1, "messages": []}
    send(at_work, "/claude/v1/messages", body)
    assert upstream.requests[-1].header("anthropic-version") == [b"2023-06-01"]
    send(at_work, "/claude/v1/messages", body, headers=[("Anthropic-Version", "2024-01-01")])
    assert upstream.requests[-1].header("anthropic-version") == [b"2024-01-01"]


def test_endpoints_and_deployments_are_where_they_live(at_work: tuple[Upstream, Running]) -> None:
    upstream, _ = at_work
    send(at_work, "/rank/v1/rerank", {"model": "m", "query": "q", "documents": []})
    assert upstream.requests[-1].target == b"/v2/rerank"
    send(at_work, "/blue/v1/chat/completions?x=1", CHAT | {"model": "gpt-4o"})
    assert upstream.requests[-1].target == b"/openai/deployments/mine/chat/completions?api-version=2024-10-21&x=1"
    assert upstream.requests[-1].header("api-key") == [SECRETS["provider-key"].encode()]


def test_vertex_gets_a_token_and_nobody_the_key(at_work: tuple[Upstream, Running], accounts: Account) -> None:
    upstream, gateway = at_work
    for _ in range(3):
        send(at_work, "/google/v1beta/models/gemini-3:generateContent", {"contents": []})
    last = upstream.requests[-1]
    assert last.target == b"/v1/projects/proj/locations/global/publishers/google/models/gemini-3:generateContent"
    assert last.header("authorization") == [b"Bearer ya29.1"]
    assert len(accounts.asked) == 1
    for text in (gateway.log_path.read_text(), *(got.raw_head.decode() for got in upstream.requests)):
        assert "PRIVATE KEY" not in text
    assert "ya29" not in gateway.log_path.read_text()
