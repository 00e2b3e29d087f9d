"""What lives with one vendor is looked for there: files, responses, what a model thought."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from gproxyd.store.homes import Homes
from tests.support import raw
from tests.support.raw import Reply
from tests.support.running import SECRETS, Loop, Running
from tests.support.upstream import EVENT_STREAM, LAST_CHUNK, Got, Script, Upstream, chunk, json_reply

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
discovery: {{enabled: false}}
providers:
  a: {{vendor: custom, dialects: {{openai_responses: "{a}", openai_chat: "{a}"}}, auth: none, models: [{{id: m}}]}}
  b: {{vendor: custom, dialects: {{openai_responses: "{b}", openai_chat: "{b}"}}, auth: none, models: [{{id: m}}]}}
endpoints: {{files: a}}
agents: {{team: {{targets: [a/m, b/m]}}, other: {{targets: [b/m, a/m]}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""

THOUGHT = "gAAAAABencrypted-thought-of-"


class Bench:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.upstreams = {name: Upstream(loop, self.script_of(name)).start() for name in "ab"}
        urls = {name: upstream.url for name, upstream in self.upstreams.items()}
        self.gateway: Running = loop.gateway(CONFIG.format(**urls), SECRETS)
        self.homes = loop.run(self._homes())
        self.count = 0

    async def _homes(self) -> Homes:
        database = self.gateway.daemon.state.database
        assert database is not None
        homes = Homes(database, lambda event, /, **fields: None)
        homes.start()
        self.gateway.daemon.gateway.exchanges.homes = homes
        return homes

    def script_of(self, name: str) -> Any:
        def script(got: Got) -> Script:
            if got.method == "DELETE":
                return [json_reply(b'{"id":"file-%b","object":"file","deleted":true}' % name.encode())]
            if b"/files" in got.target:
                return [json_reply(b'{"id":"file-%b","object":"file"}' % name.encode())]
            asked = orjson.loads(got.body) if got.body else {}
            self.count += 1
            thought = {"type": "reasoning", "id": "rs_1", "encrypted_content": THOUGHT + name}
            response = {"id": f"resp-{name}-{self.count}", "object": "response", "model": "m", "output": [thought]}
            if asked.get("stream") is not True:
                return [json_reply(orjson.dumps(response))]
            parts = [
                {"type": "response.created", "response": response | {"output": []}},
                {"type": "response.output_item.done", "item": thought},
                {"type": "response.completed", "response": response},
            ]
            return [EVENT_STREAM, *(chunk(b"data: " + orjson.dumps(part) + b"\n\n") for part in parts), LAST_CHUNK]

        return script

    def ask(self, path: str, body: Any = None, *, method: str = "POST") -> Reply:
        data = b"" if body is None else orjson.dumps(body)
        return raw.send(self.gateway.port, raw.request(path, data, method=method))

    def where(self) -> str:
        found = "".join(name * len(one.requests) for name, one in self.upstreams.items())
        for one in self.upstreams.values():
            one.requests.clear()
        return found

    def response(self, model: str, *, stream: bool = False, **more: Any) -> Reply:
        return self.ask("/v1/responses", {"model": model, "input": "hi", "stream": stream, **more})


@pytest.fixture(scope="module")
def bench(loop: Loop) -> Iterator[Bench]:
    made = Bench(loop)
    yield made
    loop.run(made.homes.stop())


def test_a_file_is_asked_for_where_it_was_made_until_it_is_deleted(bench: Bench) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    request = raw.request("/b/v1/files", form, headers=[("Content-Type", "multipart/form-data; boundary=b")])
    assert raw.send(bench.gateway.port, request).status == 200
    assert bench.where() == "b"
    assert bench.ask("/v1/files/file-b", method="GET").status == 200
    assert bench.where() == "b"
    assert bench.ask("/v1/files/file-unknown", method="GET").status == 200
    assert bench.where() == "a"
    bench.ask("/v1/files/file-b", method="DELETE")
    assert bench.where() == "b"
    bench.ask("/v1/files/file-b", method="GET")
    assert bench.where() == "a"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_asked_for_and_gone_on_from_where_it_was_made(bench: Bench, stream: bool) -> None:
    reply = bench.response("other", stream=stream)
    assert reply.status == 200 and bench.where() == "b"
    made = f"resp-b-{bench.count}"
    assert made.encode() in reply.body
    bench.ask(f"/v1/responses/{made}", method="GET")
    assert bench.where() == "b"
    bench.response("team", previous_response_id=made)
    assert bench.where() == "b"
    bench.response("team")
    assert bench.where() == "a"


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_model_thought_goes_back_to_who_can_read_it(bench: Bench, stream: bool) -> None:
    bench.response("other", stream=stream)
    assert bench.where() == "b"
    items = [
        {"role": "user", "content": "hi"},
        {"type": "reasoning", "id": "rs_1", "encrypted_content": THOUGHT + "b"},
        {"role": "user", "content": "go on"},
    ]
    bench.response("team", input=items)
    assert bench.where() == "b"
