"""What a request takes is given back when it is needed no more: its prompt once the answer has begun, the rest at its
end, and without the collector's help."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from gproxyd.gateway.call import Call
from gproxyd.gateway.downstream import Downstream
from gproxyd.gateway.relay import Relay
from tests.support import raw
from tests.support.process import Process
from tests.support.replies import EVENT_STREAM, LAST_CHUNK, chunk
from tests.support.running import SECRETS, Loop, until
from tests.support.upstream import Pause, Upstream

KIB = 1024
STREAMS = 40
EVENT = (
    b'data: {"id":"x","object":"chat.completion.chunk","model":"m","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
)

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
providers:
  up:
    {{vendor: custom, dialects: {{openai_chat: "{url}"}}, credentials: [provider-key], models: [{{id: m}}, {{id: n}}]}}
aliases: {{alias: up/m}}
agents: {{team: {{targets: [up/m, up/n]}}}}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
"""


def ask(model: str, size: int) -> bytes:
    prompt = {"role": "user", "content": "y" * size}
    return raw.request("/v1/chat/completions", {"model": model, "stream": True, "messages": [prompt]})


@pytest.mark.parametrize("size", [64 * KIB, 200 * KIB, 1024 * KIB])
@pytest.mark.parametrize("model", ["alias", "team"])
def test_a_stream_does_not_hold_its_prompt(loop: Loop, tmp_path: Path, model: str, size: int) -> None:
    upstream = Upstream(loop, lambda got: [EVENT_STREAM, chunk(EVENT), Pause(20)])
    with Process(tmp_path, CONFIG.format(url=upstream.start().url), SECRETS) as daemon, ExitStack() as stack:

        def begun(count: int) -> int:
            """Resident bytes once so many more streams have brought their first event."""
            for _ in range(count):
                sock = stack.enter_context(raw.connect(daemon.port))
                sock.sendall(ask(model, size))
                read = b""
                while b'"content":"a"' not in read:
                    read += sock.recv(65536)
            return daemon.memory()["VmRSS"]

        before = begun(8)  # what is needed once
        each = (begun(STREAMS) - before) / STREAMS / KIB
        print(f"{model}, prompts of {size // KIB} KiB: {each:.0f} KiB per stream")
        assert each < 60


def test_what_a_stream_took_is_given_back_without_the_collector(loop: Loop) -> None:
    upstream = Upstream(loop, lambda got: [EVENT_STREAM, *[chunk(EVENT)] * 5, LAST_CHUNK]).start()
    gateway = loop.gateway(CONFIG.format(url=upstream.url))

    def left() -> Counter[str]:
        until(gateway.at_rest)
        return Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, (Relay, Call, Downstream)))

    with raw.connect(gateway.port) as sock:
        for model in ("alias", "team"):
            for _ in range(3):
                sock.sendall(ask(model, 100))
                assert raw.read(sock).complete
            gc.collect()
            gc.disable()
            try:
                before = left()
                for _ in range(20):
                    sock.sendall(ask(model, 100))
                    assert raw.read(sock).complete
                more = left() - before
            finally:
                gc.enable()
            assert more.total() <= 3, more
