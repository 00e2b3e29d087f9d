"""Large JSON bodies are worked on in steps: what comes out means what it does of small ones, which are parsed."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.dialects import bonds as dialect_bonds
from gproxyd.dialects import draft, quirks, sift
from gproxyd.dialects.bonds import bonds, bonds_large
from gproxyd.dialects.capabilities import needs, needs_large
from gproxyd.dialects.conversation import sticky_key, sticky_key_large
from gproxyd.dialects.prompt import with_system
from gproxyd.dialects.quirks import Quirks, fit, fit_large
from gproxyd.dialects.rewrite import rewrite
from gproxyd.dialects.sift import Long, Sifted, Unread
from gproxyd.dialects.trim import trim
from gproxyd.dialects.turns import SHAPES
from gproxyd.dialects.weight import weights, weights_large
from gproxyd.errors import Refusal
from gproxyd.types import DialectName
from gproxyd.wire import inject, outline, pieces, spans
from gproxyd.wire.operations import find
from gproxyd.wire.pieces import edited, joined
from gproxyd.wire.spans import at_once
from gproxyd.wire.splice import replace_model_path, replace_model_path_large
from tests.support.streams import law

MIB = 1024 * 1024
BOUND = 0.020
"""Seconds for which one step may stop everybody else."""

DIALECTS: tuple[DialectName, ...] = ("openai_chat", "openai_responses", "anthropic", "gemini")
OPERATIONS = [find(b"/v1", path)[0]["POST"] for path in (b"/responses", b"/messages", b"/chat/completions")]
T = TypeVar("T")


@contextmanager
def everything_is_long(size: int) -> Iterator[None]:
    """What is longer than `size` bytes is taken for long, and steps are as short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "WINDOW", 2 * size + 1)
        patch.setattr(spans, "TOKENS", 3)
        patch.setattr(spans, "_FIND", size)
        patch.setattr(quirks, "WHOLE", size)
        patch.setattr(sift, "WHOLE", size)
        patch.setattr(sift, "MAX_VALUE", size)
        patch.setattr(sift, "_CHUNK", 24)
        patch.setattr(sift, "_DEPTH", 100)
        patch.setattr(dialect_bonds, "_AT_ONCE", 2)
        patch.setattr(pieces, "STEP", 4 * size)
        patch.setattr(pieces, "_FRESH", 0)
        patch.setattr(pieces, "_SHORT", size)
        patch.setattr(pieces, "_MANY", 3)
        yield


# Any JSON, as anybody may write it. It is made of a seed: so large documents are drawn quickly.

_TEXTS = [
    "user",
    "assistant",
    "system",
    "tool",
    "text",
    "auto",
    "",
    "é☃😀" * 9,
    '\\"model\\":',
    '{"a":"]',
    "\\\\",
    "x" * 90,
]
_TYPES = ["text", "text", "text", "image_url", "tool_use", "tool_result", "input_text", "thinking"]
_NAMES = ["type", "text", "role", "content", "parts", "id", "cache_control", "output", "a", ""]


class Author:
    """Writes requests."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def some(self, choices: Mapping[str, Callable[[], Any]], share: float = 0.4) -> dict[str, Any]:
        return {name: make() for name, make in choices.items() if self.rng.random() < share}

    def text(self) -> str:
        return self.rng.choice(_TEXTS) + self.rng.choice(_TEXTS) * self.rng.randint(0, 2)

    def any(self, depth: int = 3) -> Any:
        kind = self.rng.randint(0, 8 if depth else 5)
        if kind < 6:
            return [None, True, self.rng.randint(-9, 2**60), 0.5, -1e9, self.text()][kind]
        inner = [self.any(depth - 1) for _ in range(self.rng.randint(0, 4))]
        return inner if kind == 6 else dict(zip(self.rng.sample(_NAMES, len(inner)), inner, strict=True))

    def link(self) -> str:
        return self.rng.choice(["c1", "c2"])

    def part(self) -> Any:
        if self.rng.random() < 0.1:
            return self.any()
        return {"type": self.rng.choice(_TYPES)} | self.some(
            {
                "text": self.text,
                "id": self.link,
                "file_id": self.link,
                "signature": lambda: self.text() + "x" * 20,
                "tool_use_id": self.link,
                "cache_control": lambda: {"type": "ephemeral", "ttl": "1h"},
                "image_url": lambda: {"url": "data:image/png;base64,AAAA"},
                "functionCall": lambda: {"id": "c1", "name": "f"},
                "a": self.any,
            }
        )

    def content(self) -> Any:
        kind = self.rng.randint(0, 3)
        if kind < 2:
            return [self.any(), self.text()][kind]
        if kind == 2:
            return [self.part() for _ in range(self.rng.randint(0, 4))]
        return [{"type": "text", "text": self.text()} for _ in range(self.rng.randint(0, 3))]

    def message(self) -> Any:
        if self.rng.random() < 0.1:
            return self.any()
        role = self.rng.choice(["system", "developer", "user", "user", "assistant", "assistant", "tool", "model"])
        return {"role": role} | self.some(
            {
                "content": self.content,
                "parts": self.content,
                "reasoning_content": self.text,
                "tool_call_id": self.link,
                "tool_calls": lambda: [{"id": "c1", "type": "function"}],
                "type": lambda: self.rng.choice(["message", "reasoning", "function_call", "function_call_output"]),
                "call_id": self.link,
                "a": self.any,
            }
        )

    def items(self) -> Any:
        return [self.message() for _ in range(self.rng.randint(0, 7))] if self.rng.random() < 0.9 else self.any()

    def members(self) -> dict[str, Any]:
        return self.some(
            {
                "messages": self.items,
                "input": self.items,
                "contents": self.items,
                "system": self.content,
                "instructions": self.text,
                "systemInstruction": lambda: {"parts": [self.part()]},
                "system_instruction": self.any,
                "tools": lambda: [{"type": self.text(), "a": self.any()}, self.any()],
                "tool_choice": lambda: self.rng.choice(["auto", "none", {"type": "auto"}]),
                "stream_options": lambda: self.rng.choice([None, {}, {"include_usage": True}]),
                "max_tokens": lambda: self.rng.randint(1, 99),
                "prompt_cache_key": self.text,
                "reasoning_effort": lambda: self.rng.choice(["none", "low"]),
                "unknown": self.any,
            }
        )

    def body(self) -> bytes:
        """Any white space, any spelling; now and then a member is there twice."""
        members = list(self.members().items())
        if members and self.rng.random() < 0.2:
            members.insert(0, (self.rng.choice(members)[0], self.any()))
        if self.rng.random() < 0.5:
            members.insert(self.rng.randint(0, len(members)), ("model", "m"))
        return self.blank() + self.object(members) + self.blank()

    def blank(self) -> bytes:
        return self.rng.choice([b"", b"", b"", b" ", b"\n\t", b" " * 40])

    def written(self, value: Any) -> bytes:
        if isinstance(value, dict):
            return self.object(value.items())
        if isinstance(value, list):
            return b"[" + b",".join(self.blank() + self.written(one) + self.blank() for one in value) + b"]"
        return self.string(value) if isinstance(value, str) else orjson.dumps(value)

    def object(self, members: Iterable[tuple[str, Any]]) -> bytes:
        pairs = (self.string(name) + self.blank() + b":" + self.blank() + self.written(one) for name, one in members)
        return b"{" + b",".join(self.blank() + pair + self.blank() for pair in pairs) + self.blank() + b"}"

    def string(self, text: str) -> bytes:
        units = text.encode("utf-16-be")
        if self.rng.random() < 0.8:
            return orjson.dumps(text)
        return b'"%b"' % b"".join(b"\\u%02x%02x" % (units[n], units[n + 1]) for n in range(0, len(units), 2))


bodies = st.builds(lambda seed: Author(seed).body(), st.integers(0, 2**64))
_sizes = st.sampled_from([130, 200, 400])  # every word that means something is short, however it is spelled


# Quirks.

_quirks = st.builds(
    Quirks,
    stream_options=st.booleans(),
    tool_choice_auto=st.booleans(),
    reasoning_content=st.sampled_from(["kept", "removed"]),
    flat_content=st.booleans(),
)


@law(600)
@given(bodies, _quirks, _sizes)
def test_a_large_body_is_fitted_like_a_small_one(body: bytes, wanted: Quirks, size: int) -> None:
    with everything_is_long(size):
        large = at_once(fit_large(body, wanted))
    small = fit(body, wanted)
    assert orjson.loads(large) == orjson.loads(small), (body, large)
    if small is body:
        assert large is body


def test_of_a_large_body_only_what_a_quirk_names_is_touched() -> None:
    """Numbers that a parser would write in another way stay as they came, and so does white space."""
    body = (
        b'{ "x" : 1.50e2, "stream_options": {}, "messages" : [ {"role": "user",  "n": 123456789012345678901234567890},'
        b' {"role": "assistant" , "content": [{"type":"text","text":"a\\u0041"}, {"type":"text","text":"\\/"}],'
        b' "reasoning_content": "r", "n":1.0E5} ] , "tool_choice":"auto"}'
    )
    every = Quirks(stream_options=False, tool_choice_auto=False, reasoning_content="removed", flat_content=True)
    with everything_is_long(16):
        assert at_once(fit_large(body, every)) == (
            b'{ "x" : 1.50e2, "messages" : [ {"role": "user",  "n": 123456789012345678901234567890},'
            b' {"role": "assistant" , "content": "a\\u0041\\n\\/", "n":1.0E5} ]}'
        )


@pytest.mark.parametrize(
    "body", [b"", b"[", b'{"messages":[{"role":"assistant","reasoning_content":', b'{"messages":[}']
)
def test_what_is_no_json_is_left_to_the_vendor(body: bytes) -> None:
    assert at_once(fit_large(body, Quirks(reasoning_content="removed"))) is body


# What routing reads, and what agents write.


def sifted(dialect: DialectName, body: bytes) -> Sifted:
    return at_once(sift.sift(dialect, body))


def plain(value: Any) -> Any:
    """A value without stand-ins."""
    if isinstance(value, Long):
        return value[:]
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(one) for one in value] if isinstance(value, list) else value


@law(600)
@given(st.sampled_from(DIALECTS), bodies, _sizes)
def test_of_a_large_body_the_same_is_read(dialect: DialectName, body: bytes, size: int) -> None:
    fields = {name: value for name, value in orjson.loads(body).items() if name in sift.NAMES}
    with everything_is_long(size):
        found = sifted(dialect, body)
        assert plain(found.fields) == fields
        conversation = fields.get(SHAPES[dialect].items)
        if isinstance(conversation, list):
            assert [orjson.loads(body[start:end]) for start, end in found.places] == conversation
        else:
            assert not found.places
        assert at_once(needs_large(dialect, found.fields)) == needs(dialect, fields)
        assert at_once(sticky_key_large(dialect, found.fields)) == sticky_key(dialect, fields)
        for operation in OPERATIONS:
            assert at_once(bonds_large(operation, dialect, found.fields)) == bonds(operation, dialect, fields)
        sizes = draft.drafted(dialect, found).sizes
        assert at_once(weights_large(dialect, found.fields, sizes)) == weights(dialect, fields)


@law(600)
@given(st.sampled_from(DIALECTS), bodies, _sizes, st.booleans(), st.integers(1, 120))
def test_a_large_request_is_rewritten_like_a_small_one(
    dialect: DialectName, body: bytes, size: int, force: bool, budget: int
) -> None:
    """With a prompt of the agent's, then made shorter."""
    fields = orjson.loads(body)
    after = with_system(dialect, fields, "Be kind.", force)
    shorter = trim(dialect, after, budget)
    with everything_is_long(size):
        own = at_once(draft.prompted(draft.drafted(dialect, sifted(dialect, body)), "Be kind.", force))
        assert orjson.loads(at_once(draft.written(body, own, ()))) == orjson.loads(rewrite(body, fields, after))
        less = at_once(draft.shortened(own, len(body), -1, budget))
        assert (less is None) == (shorter is None)
        if less is not None and shorter is not None:
            assert orjson.loads(at_once(draft.written(body, less, ()))) == orjson.loads(rewrite(body, fields, shorter))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("body", [b"{ }", b'{"unknown":1}', b'{"system_instruction":1,"systemInstruction":2}'])
def test_a_prompt_is_put_into_a_request_of_little_else(dialect: DialectName, body: bytes) -> None:
    fields = orjson.loads(body)
    own = at_once(draft.prompted(draft.drafted(dialect, sifted(dialect, body)), "Be kind.", True))
    expected = rewrite(body, fields, with_system(dialect, fields, "Be kind.", True))
    assert orjson.loads(at_once(draft.written(body, own, ()))) == orjson.loads(expected)


def test_what_is_kept_of_a_conversation_keeps_its_bytes() -> None:
    body = (
        b'{"messages": [ {"role":"system","content":"old"} , {"role":"user","n":1.0E2} ,\n  {"role":"user","x":1e-400} '
        b'], "max_tokens" : 7 }'
    )
    own = at_once(draft.prompted(draft.drafted("openai_chat", sifted("openai_chat", body)), "new", True))
    assert at_once(draft.written(body, own, ())) == (
        b'{"messages": [{"role":"system","content":"new"},{"role":"user","n":1.0E2} ,\n  {"role":"user","x":1e-400}],'
        b' "max_tokens" : 7 }'
    )


@law(200)
@given(st.text(max_size=300), st.integers(0, 300), st.integers(0, 300), st.booleans())
def test_a_long_text_gives_out_what_is_asked_for(text: str, start: int, end: int, escaped: bool) -> None:
    units = text.encode("utf-16-be")
    inner = orjson.dumps(text)[1:-1]
    if escaped:
        inner = b"".join(b"\\u%02X%02x" % (units[n], units[n + 1]) for n in range(0, len(units), 2))
    body = b'"%b"' % inner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sift, "_CHUNK", 24)
        if not inner:
            return
        long = at_once(sift._long(body, 1, len(body) - 1))
    assert len(long) == len(text)
    assert long[start:end] == text[start:end]
    assert long[-end - 1 :] == text[-end - 1 :]
    assert long[:start] == text[:start]
    assert long.encode() == text.encode()
    assert long.isascii() == text.isascii()


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"messages":[1', b'{"messages":[{"a":tru}]}', b'{"input":"\xff"}']
)
def test_what_cannot_be_read_is_refused(body: bytes) -> None:
    dialect: DialectName = "openai_responses" if b"input" in body else "openai_chat"
    with pytest.raises(Refusal) as caught:
        sifted(dialect, body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")


def test_so_many_values_are_kept_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sift, "MOST_VALUES", 10)
    body = orjson.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 9})
    messages = sifted("openai_chat", body).fields["messages"]
    assert [message["role"] for message in messages] == ["user"] * 9
    assert [isinstance(message["content"], Unread) for message in messages] == [False] * 2 + [True] * 7
    monkeypatch.setattr(sift, "MOST_ITEMS", 8)
    with pytest.raises(Refusal, match="more than 8 items"):
        sifted("openai_chat", body)


# The model's name, and what a stream is asked for.


@law(200)
@given(
    st.lists(
        st.sampled_from(
            [
                b'"model"',
                b":",
                b" ",
                b'"models/old"',
                b'"models/older"',
                b'\\"model\\":\\"models/old\\"',
                b"{",
                b",",
                b"\n" * 9,
            ]
        ),
        max_size=30,
    ),
    _sizes,
)
def test_the_name_in_the_path_is_replaced_alike(parts: list[bytes], size: int) -> None:
    body = b"{" + b"".join(parts)
    with everything_is_long(size):
        large = at_once(replace_model_path_large(body, "old", "new/er"))
    assert large == replace_model_path(body, "old", "new/er")
    assert (large is body) == (large == body)


@pytest.mark.parametrize(
    "more",
    [
        b"",
        b',"stream_options":null',
        b',"stream_options":{}',
        b',"stream_options":{"include_usage":true}',
        b', "stream_options" : { "include_usage" : false , "x" : [1] } ',
        b',"stream_options":{"include_usage":null}',
        b',"stream_options":{"x":1}',
        b',"stream_options":[]',
        b',"stream_options":{},"stream_options":{"x":2}',
    ],
)
def test_a_stream_is_asked_for_its_usage_alike(more: bytes) -> None:
    body = b'{"model":"m","stream":true%b}' % more
    *_, found = outline.walk(body)
    assert found is not None
    large = at_once(edited(body, outline.usage_asked(body, found)))
    assert orjson.loads(large) == orjson.loads(inject.usage_asked(body, outline.parse(body).fields))


@law(100)
@given(st.lists(st.binary(max_size=50)), _sizes)
def test_parts_are_joined(parts: list[bytes], size: int) -> None:
    with everything_is_long(size):
        assert at_once(joined([*parts])) == b"".join(parts)


# How long a step takes.


def longest(steps: Generator[object, None, T]) -> tuple[float, T]:
    """Seconds of the thread's time that its longest step took, and what it returned."""
    worst = 0.0
    while True:
        began = time.thread_time()
        try:
            next(steps)
        except StopIteration as end:
            return max(worst, time.thread_time() - began), end.value
        worst = max(worst, time.thread_time() - began)


def conversation(size: int, unit: bytes) -> bytes:
    return b'{"model":"m","messages":[%b{"role":"user"}],"reasoning_content":0}' % (unit * (size // len(unit)))


_PROSE = b'{"role":"assistant","reasoning_content":"r","content":"%b"},' % (b'Hello, \\"world\\" ' * 60)
LARGE_BODIES = {
    "text": conversation(6 * MIB, _PROSE),
    "one text": conversation(7 * MIB, b'{"role":"user","content":"%b"},' % (b"word \\n" * (MIB - 20))),
    "small messages": conversation(49_990 * 31, b'{"role":"user","content":"ab"},'),
    "parts": b'{"messages":[{"role":"user","content":[%b0]}]}' % (b'{"type":"text","text":"a"},' * 60_000),
    "dense": b'{"messages":[{"role":"user","content":"a"}],"x":[%b0]}' % (b'{"a":[],"b":{}},' * 120_000),
    "dense messages": conversation(2 * MIB, b'{"role":"user","x":[%b0]},' % (b'{"a":[],"b":{}},' * 1_000)),
    "deep": conversation(MIB, b'{"role":"user","x":[%b0]},' % (b"[" * 500 + b"]" * 500 + b",")),
    "blanks": b'{"messages":[%b{"role":"user"%b}]}' % (b" " * (3 * MIB), b"\n" * (3 * MIB)),
    "escapes": conversation(2 * MIB, b'{"role":"user","content":"%b"},' % (b'\\"' * (MIB - 20))),
}
EVERY = Quirks(stream_options=False, tool_choice_auto=False, reasoning_content="removed", flat_content=True)


def _rewritten(body: bytes) -> Generator[object, None, bytes]:
    """All that is done to a request for an agent's member."""
    found = yield from sift.sift("openai_chat", body)
    own = yield from draft.prompted(draft.drafted("openai_chat", found), "Be kind.", True)
    yield from needs_large("openai_chat", own.fields)
    yield from sticky_key_large("openai_chat", own.fields)
    less = yield from draft.shortened(own, len(body), 1000, 1000)
    return (yield from draft.written(body, less or own, ()))


@pytest.fixture
def settled() -> Iterator[None]:
    """What lives on is not looked through for garbage, and that is looked for as the daemon does."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("name", LARGE_BODIES)
def test_no_step_takes_long(name: str) -> None:
    body = LARGE_BODIES[name]
    attempts: list[float] = []
    for _ in range(3):
        fitted, fits = longest(fit_large(body, EVERY))
        written, writes = longest(_rewritten(body))
        attempts.append(max(fitted, written))
        del fits, writes
        if attempts[-1] < BOUND:
            return
    pytest.fail(f"the longest steps took {attempts} s")
