"""Large JSON bodies are walked through in slices; what routing learns of them is what a parser would have told."""

from __future__ import annotations

import asyncio
import statistics
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.errors import Refusal
from gproxyd.gateway.intake import outline_of
from gproxyd.wire import outline
from gproxyd.wire.outline import Outline
from gproxyd.wire.pick import MAX_VALUE
from tests.support.streams import law

MIB = 1024 * 1024
BOUND = 0.020
"""Seconds for which one step may stop everybody else."""


def walked(body: bytes, size: int, tokens: int = outline.TOKENS) -> Outline:
    """The outline by steps of at most `size` bytes (half as many more where an object ends) and `tokens` tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outline, "SLICE", size)
        patch.setattr(outline, "REACH", size // 2)
        patch.setattr(outline, "TOKENS", tokens)
        (*pauses, found) = outline.walk(body)
    assert len(pauses) >= len(body) // (size + size // 2)
    assert not any(pauses)
    assert found is not None
    return found


def sizes(body: bytes) -> Iterator[int]:
    """Every size for a short body; for a longer one every small size, and some that let the cuts fall anywhere."""
    yield from range(1, min(len(body), 80) + 1)
    yield from range(81, len(body) + 2, 37)


def told(found: Outline) -> tuple[object, ...]:
    """What an outline tells of both small and large bodies."""
    fields = {name: value for name, value in found.fields.items() if name in outline.FIELDS}
    return found.models, found.model, found.has_stream, found.members, fields


def all_steps(body: bytes) -> Iterator[tuple[int, int]]:
    """Bytes and tokens of a step: every size that matters, and few tokens."""
    yield from ((size, outline.TOKENS) for size in sizes(body))
    yield from [(9, 1), (10**6, 1), (10**6, 2), (10**6, 5)]


def agree(body: bytes, steps: Iterable[tuple[int, int]]) -> None:
    """The walk in any of these steps tells what the parser tells."""
    parsed = outline.parse(body)
    for size, tokens in steps:
        found = walked(body, size, tokens)
        assert told(found) == told(parsed), (size, tokens, body)
        if parsed.models == 1 and isinstance(parsed.model, str):
            assert found.renamed(body, 'other/"näme"') == parsed.renamed(body, 'other/"näme"'), (size, body)


DOCUMENTS: dict[str, bytes] = {
    "plain": b'{"model":"up/m","messages":[{"role":"user","content":"Hello"}],"stream":true}',
    "no model": b'{"messages":[{"model":"inner"}],"n":1}',
    "no members": b"{}",
    "only white space within": b" \n{ \t\r\n } ",
    "white space everywhere": b' \t\r\n{ "a" : [ ] , \n "model"\t:\r\n "m" , "stream" : null } \n ',
    "last": b'{"messages":[[[{"a":{}}]],"}{"],"model":"m"}',
    "in strings": b'{"a":"\\"model\\":\\"x\\"","b":"{\\"model","c":["\\"stream\\":"],"model":"m"}',
    "deeper down": b'{"b":{"model":"y","stream":1},"c":[{"model":"z"}],"model":"m"}',
    "escaped member": b'{"mod\\u0065l":"m"}',
    "all of it escaped": b'{"\\u006d\\u006f\\u0064\\u0065\\u006c":"m"}',
    "escaped stream": b'{"model":"m","\\u0073\\u0074\\u0072\\u0065\\u0061\\u006d":false}',
    "escaped value": b'{"model":"\\u006d\\"\\\\\\/\\ud83d\\ude00","stream":true}',
    "twice": b'{"model":"a","x":{},"model":"b"}',
    "twice, one escaped": b'{"model":"a","m\\u006fdel":"b"}',
    "three times": b'{"model":"a","model":"a","mode\\u006c":"a"}',
    "not a string": b'{"model":["a",{"model":"b"}],"stream":{}}',
    "null": b'{"model":null}',
    "number": b'{"model":5}',
    "object": b'{"model":{"model":"a"}}',
    "empty names": b'{"":"","model":"","a":{"":{"":[""]}}}',
    "back-slashes": b'{"a\\\\":"\\\\\\\\","model":"m\\\\","b":"\\\\\\""}',
    "member that only begins or ends so": b'{"models":"a","xmodel":"b","model ":"c","MODEL":"d"}',
    "numbers and words": b'{"a":-1.5e+10,"b":[true,false,null,0],"model":"m"}',
    "not ASCII": '{"größe":"☃","model":"môdel","x":"\u2028"}'.encode(),
    "nested as deep as it may be": b'{"a":' + b"[" * 1023 + b"]" * 1023 + b',"model":"m"}',
    "pairs as deep as they may be": b'{"a":' + b"[" * 1021 + b'{"":[]},[{},""]' + b"]" * 1021 + b',"model":"m"}',
    "back-slashes in front of quotes": orjson.dumps(
        {
            "a": ["x" * (n % 2) + "\\" * n + '"' * m + "\\" * k for n in range(6) for m in range(3) for k in (0, 1, 4)],
            "model": "m",
        }
    ),
    "JSON in strings": orjson.dumps(
        {"a": [orjson.dumps({"model": [orjson.dumps({"model": "}"}).decode()]}).decode()] * 2}
    ),
    "all members that are read": b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"max_tokens":1,'
    b'"max_completion_tokens":2,"max_output_tokens":3,"n":4,"best_of":5,"service_tier":"flex","serviceTier":"x",'
    b'"generationConfig":{"maxOutputTokens":6,"a":[{}]},"generation_config":{},"previous_response_id":null,'
    b'"store":false,"background":true,"user":"u","messages":[{"n":7,"max_tokens":8,"stream":false}]}',
    "such a member twice": b'{"n":1,"max_tokens":[2],"n":3,"max_tok\\u0065ns":4,"a":{"n":5}}',
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_both_ways_tell_the_same_wherever_the_cuts_fall(name: str) -> None:
    agree(DOCUMENTS[name], all_steps(DOCUMENTS[name]))


def test_the_last_of_several_decides_though_it_is_no_string() -> None:
    for body in (b'{"model":"a","model":5}', b'{"model":"a","model":{}}', b'{"model":"a","mod\\u0065l":null}'):
        agree(body, all_steps(body))


def test_whether_there_are_members() -> None:
    for body in (b"{}", b" { \n\t} ", b'{"a":1}', b'{"model":"m"}', b'{ "":{}}'):
        assert {walked(body, size).members for size in sizes(body)} == {outline.parse(body).members}, body


_names = st.sampled_from(["model", "stream", "messages", "mode", "n", ""]) | st.text(max_size=4)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 99)
    | st.text(max_size=6)
    | st.sampled_from(["model", '"model":"x"', "\\\\", '\\\\"', '"}', '{"n":"\\\\"}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def _documents(draw: st.DrawFn) -> bytes:
    """A JSON object whose members may stand there twice, spelled with escapes, with any white space between."""
    blank = st.text(" \t\r\n", max_size=2).map(str.encode)

    def spelled(text: str) -> bytes:
        if draw(st.booleans()):
            return orjson.dumps(text)
        units = text.encode("utf-16-be")
        return b'"%b"' % b"".join(b"\\u%02x%02x" % (units[i], units[i + 1]) for i in range(0, len(units), 2))

    members = draw(st.lists(st.tuples(_names, _values), max_size=5))
    texts = [
        b"%b%b%b:%b%b%b"
        % (
            draw(blank),
            spelled(name),
            draw(blank),
            draw(blank),
            spelled(value) if isinstance(value, str) else orjson.dumps(value),
            draw(blank),
        )
        for name, value in members
    ]
    return b"%b{%b}%b" % (draw(blank), b",".join(texts), draw(blank))


@law(300)
@given(_documents(), st.integers(1, 400), st.integers(1, 40))
def test_both_ways_tell_the_same_of_any_object(body: bytes, size: int, tokens: int) -> None:
    agree(body, ((each, tokens) for each in {1, 2, 3, size}))


REFUSED: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \r\n\t ",
    "an array": b'[{"model":"m"}]',
    "a string": b'"model"',
    "a number": b"5",
    "a word": b"null",
    "a byte order mark": b'\xef\xbb\xbf{"model":"m"}',
    "no end": b'{"model":"m"',
    "no end of an inner array": b'{"model":"m","a":[1,2}',
    "no end of an inner object": b'{"model":"m","a":{"b":{}}',
    "no end of a string": b'{"model":"m","a":"}',
    "end of a string escaped": b'{"model":"m","a":"\\"}',
    "a brace too many": b'{"model":"m"}}',
    "braces too many after white space": b'{"model":"m"} }}',
    "a bracket too many": b'{"model":"m"}]',
    "a bracket too many within": b'{"model":"m","a":1]}',
    "a second object": b'{"model":"m"}{}',
    "a second object with another model": b'{"a":1}{"model":"m"}',
    "a second object on the next line": b'{"model":"m"}\n{"a":1}\n',
    "a word behind": b'{"model":"m"}x',
    "a word and an object behind": b'{"model":"m"} x {}',
    "a comma behind": b'{"model":"m"},',
    "a string behind": b'{"model":"m"}"}"',
    "a zero byte behind": b'{"model":"m"}\0',
    "an array behind": b'{"model":"m"}[{}]',
}


def refused(body: bytes, size: int | None) -> None:
    with pytest.raises(Refusal) as caught:
        outline.parse(body) if size is None else walked(body, size)
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")


@pytest.mark.parametrize("name", REFUSED)
def test_both_ways_refuse_what_is_no_object(name: str) -> None:
    body = REFUSED[name]
    for size in (None, *sizes(body + b" ")):
        refused(body, size)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'], ids=["arrays", "objects"])
@pytest.mark.parametrize("size", [100, 1000, 16 * 1024, MIB], ids=str)
@pytest.mark.parametrize("depth", [1024, 1500, 5000])
def test_both_ways_refuse_what_is_too_deep(opening: bytes, size: int, depth: int) -> None:
    """Also if it is over within one slice."""
    closing = b"]" if opening == b"[" else b"}"
    body = b'{"model":"m","a":' + opening * depth + b"0" + closing * depth + b"}"
    refused(body, None)
    refused(body, size)


VENDORS: dict[str, bytes] = {
    "brackets that do not match": b'{"model":"m","a":[{"b":1]},"n":2}',
    "no JSON between them": b'{"model":"m","a":[1 2,,x:"y"],"b":nonsense,"n":2}',
    "a comma too many": b'{"model":"m","n":2,}',
    "control characters": b'{"model":"m","a":"\x00\n","n":2}',
}


@pytest.mark.parametrize("name", VENDORS)
def test_what_is_wrong_within_a_large_body_is_left_to_the_vendor(name: str) -> None:
    """The bytes go on as they came. What was told of them does not depend on the cuts."""
    body = VENDORS[name]
    refused(body, None)
    for size in sizes(body):
        assert told(walked(body, size)) == (1, "m", False, True, {"model": "m", "n": 2})


@pytest.mark.parametrize(
    "value", [b"", b"x", b"01", b'"\\x"', b"[1,]", b'{"a":1]', b"1 2", b'"a" "b"', b'"\xff"'], ids=repr
)
@pytest.mark.parametrize("name", [b"model", b"n", b"generationConfig", b"\\u006e"], ids=repr)
def test_both_ways_refuse_a_member_that_is_read_and_no_json(name: bytes, value: bytes) -> None:
    body = b'{"%b":%b,"a":[]}' % (name, value)
    for size in (None, *sizes(body)):
        refused(body, size)


def test_a_member_that_is_read_may_be_so_long_and_no_longer() -> None:
    for name in outline.FIELDS:
        longest = b'"%b"' % (b"x" * (MAX_VALUE - 2))
        for size in (1000, MIB):
            assert walked(b'{"%b":%b}' % (name.encode(), longest), size).fields == {name: "x" * (MAX_VALUE - 2)}
            refused(b'{"%b":%b }' % (name.encode(), longest), size)
            refused(b'{"%b":%b}' % (name.encode(), b"[" + b"1," * MAX_VALUE + b"1]"), size)


def test_what_members_are_called_takes_no_memory() -> None:
    """Neither a name of megabytes, nor one that stands there many thousand times."""
    for text in (
        b'"' + b"k" * (2 * MIB) + b'":0',
        b",".join([b'"n":[1]'] * 20_000),
        b'"a":"' + b"x" * (2 * MIB) + b'"',
    ):
        body = b'{%b,"model":"m"}' % text
        tracemalloc.start()
        try:
            (*_, found) = outline.walk(body)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert found is not None
        assert found.model == "m"
        assert peak < 512 * 1024


def test_a_refusal_repeats_nothing_of_the_body() -> None:
    for body in (b'{"model":"canary-31c7",', b'["canary-31c7"]', b'{"model":"canary-31c7"}canary-31c7'):
        for size in (None, 7):
            with pytest.raises(Refusal) as caught:
                outline.parse(body) if size is None else walked(body, size)
            assert "canary" not in str(caught.value)
            assert caught.value.__cause__ is None


def test_only_large_bodies_are_walked_through_and_others_get_their_turn() -> None:
    turns = 0

    async def look(body: bytes) -> Outline:
        nonlocal turns
        turns = 0
        over = asyncio.Event()

        async def count() -> None:
            nonlocal turns
            while not over.is_set():
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.get_running_loop().create_task(count())
        found = await outline_of(body)
        over.set()
        await counting
        return found

    frame = b'{"model":"m","a":"%b"}'
    for size in (outline.LARGE, outline.LARGE + 1):
        body = frame % (b"x" * (size - len(frame) + 2))
        assert len(body) == size
        found = asyncio.run(look(body))
        assert told(found)[:3] == (1, "m", False)
        assert (turns >= outline.LARGE // (outline.SLICE + outline.REACH)) == (size > outline.LARGE), turns
        assert found.renamed(body, "n") == body.replace(b'"m"', b'"n"', 1)


def test_many_large_bodies_at_once_do_not_add_up() -> None:
    """However many are walked through, between two steps everybody else gets a turn."""
    body = b'{"model":"m","a":[' + b'"",' * (outline.LARGE // 3) + b"0]}"
    pauses: list[float] = []

    async def work() -> None:
        walks = [asyncio.ensure_future(outline_of(body)) for _ in range(12)]
        while not all(walk.done() for walk in walks):
            began = time.thread_time()
            await asyncio.sleep(0)
            pauses.append(time.thread_time() - began)
        assert [told(walk.result())[:3] for walk in walks] == [(1, "m", False)] * 12

    asyncio.run(work())
    pauses.sort()
    assert pauses[len(pauses) // 2] < 2 * BOUND, pauses


LARGE_BODIES: dict[str, bytes] = {
    "text": b'{"model":"m","a":"' + b"x" * (8 * MIB) + b'"}',
    "escapes": b'{"model":"m","a":"' + b"\\n" * (4 * MIB) + b'"}',
    "white space": b" " * MIB + b'{"model":"m","a":0' + b" " * (6 * MIB) + b"}" + b" " * MIB,
    "one long name": b'{"model":"m","' + b"k" * (8 * MIB) + b'":0}',
    "numbers": b'{"model":"m","a":[' + b"0," * (4 * MIB) + b"0]}",
    "brackets": b'{"model":"m","a":[' + b"[]," * (8 * MIB // 3) + b"0]}",
    "strings": b'{"model":"m","a":[' + b'"",' * (2 * MIB // 3) + b"0]}",
    "escaped quotes": b'{"model":"m","a":["' + b'\\"' * MIB + b'"]}',
    "back-slashes": b'{"model":"m","a":["' + b"\\" * (2 * MIB) + b'"]}',
    "strings behind brackets": b'{"model":"m","a":[' + (b"[[[" + b'"",' * 16_000 + b"0]]],") * 20 + b"0]}",
    "deep brackets": b'{"model":"m","a":[' + (b"[" * 1000 + b"]" * 1000 + b",") * (MIB // 2001) + b"0]}",
    "members that are read": b'{"model":"m",' + b'"n":0,' * (MIB // 6) + b'"z":0}',
    "members": b'{"model":"m",' + b'"":0,' * (2 * MIB // 5) + b'"z":0}',
}


@pytest.mark.parametrize("name", LARGE_BODIES)
def test_no_step_takes_long(name: str) -> None:
    """Whatever megabytes are made of. Measured in the thread's own time: what else the machine does is no step's."""
    body = LARGE_BODIES[name]
    dense = name not in ("text", "escapes", "white space", "one long name", "numbers")
    worst: list[float] = []
    for part in (body,) if dense else (body,) * 3:
        steps: list[float] = []
        walk = outline.walk(part)
        found = None
        while found is None:
            began = time.thread_time()
            found = next(walk)
            steps.append(time.thread_time() - began)
        assert told(found)[:3] == (1, "m", False)
        # Of some hundred equal steps a few may be unlucky all the same; the last looks at all of the body.
        worst.append(max(sorted(steps)[-5] if dense else max(steps), steps[0], steps[-1]))
    assert statistics.median(worst) < BOUND, worst
