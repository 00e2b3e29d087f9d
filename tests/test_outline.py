"""Large JSON bodies are walked through in slices; what routing learns of them is what a parser would have told."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gproxyd.errors import Refusal
from gproxyd.gateway.intake import outline_of
from gproxyd.wire import outline
from gproxyd.wire.outline import Outline

MIB = 1024 * 1024
BOUND = 0.020
"""Seconds for which one step may stop everybody else."""


def walked(body: bytes, size: int) -> Outline:
    """The outline by slices of `size` bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outline, "SLICE", size)
        (*pauses, found) = outline.walk(body)
    assert pauses == [None] * -(-len(body) // size)
    assert found is not None
    return found


def sizes(body: bytes) -> Iterator[int]:
    """Every size for a short body; for a longer one every small size, and some that let the cuts fall anywhere."""
    yield from range(1, min(len(body), 80) + 1)
    yield from range(81, len(body) + 2, 37)


def told(found: Outline) -> tuple[object, ...]:
    """What routing asks an outline. A model that is no string is refused, whatever else it is."""
    model = found.model if isinstance(found.model, str) else None
    return found.models, model, found.has_stream


def agree(body: bytes) -> None:
    parsed = outline.parse(body)
    for size in sizes(body):
        found = walked(body, size)
        assert told(found) == told(parsed), (size, body)
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
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_both_ways_tell_the_same_wherever_the_cuts_fall(name: str) -> None:
    agree(DOCUMENTS[name])


def test_the_last_of_several_decides_though_it_is_no_string() -> None:
    for body in (b'{"model":"a","model":5}', b'{"model":"a","model":{}}', b'{"model":"a","mod\\u0065l":null}'):
        agree(body)


def test_whether_there_are_members() -> None:
    for body in (b"{}", b" { \n\t} ", b'{"a":1}', b'{"model":"m"}', b'{ "":{}}'):
        assert {walked(body, size).members for size in sizes(body)} == {outline.parse(body).members}, body


_names = st.sampled_from(["model", "stream", "messages", "mode", "a", ""]) | st.text(max_size=4)
_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6) | st.sampled_from(["model", '"model":"x"']),
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


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_documents(), st.integers(1, 400))
def test_both_ways_tell_the_same_of_any_object(body: bytes, size: int) -> None:
    parsed = outline.parse(body)
    for each in {1, 2, 3, size}:
        found = walked(body, each)
        assert told(found) == told(parsed), (each, body)
        if parsed.models == 1 and isinstance(parsed.model, str):
            assert found.renamed(body, "p/other") == parsed.renamed(body, "p/other"), (each, body)


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
        assert told(found) == (1, "m", False)
        assert (turns >= outline.LARGE // outline.SLICE) == (size > outline.LARGE), turns
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
        assert [told(walk.result()) for walk in walks] == [(1, "m", False)] * 12

    asyncio.run(work())
    pauses.sort()
    assert pauses[len(pauses) // 2] < 2 * BOUND, pauses


LARGE_BODIES: dict[str, bytes] = {
    "text": b'{"model":"m","a":"' + b"x" * (8 * MIB) + b'"}',
    "escapes": b'{"model":"m","a":"' + b"\\n" * (4 * MIB) + b'"}',
    "white space": b'  {"model":"m"' + b" " * (8 * MIB) + b"}  ",
    "one long name": b'{"model":"m","' + b"k" * (8 * MIB) + b'":0}',
    "numbers": b'{"model":"m","a":[' + b"0," * (4 * MIB) + b"0]}",
    "brackets": b'{"model":"m","a":[' + b"[]," * (8 * MIB // 3) + b"0]}",
    "members": b'{"model":"m",' + b'"":0,' * (2 * MIB // 5) + b'"z":0}',
}


@pytest.mark.parametrize("name", LARGE_BODIES)
def test_no_step_takes_long(name: str) -> None:
    """Whatever megabytes are made of. Measured in the thread's own time: what else the machine does is no step's."""
    body = LARGE_BODIES[name]
    dense = name in ("brackets", "members")
    worst: list[float] = []
    for part in (body,) if dense else (body,) * 3:
        steps: list[float] = []
        walk = outline.walk(part)
        found = None
        while found is None:
            began = time.thread_time()
            found = next(walk)
            steps.append(time.thread_time() - began)
        assert told(found) == (1, "m", False)
        # Of some hundred equal steps a few may be unlucky all the same; the last looks at all of the body.
        worst.append(max(sorted(steps)[-5] if dense else max(steps), steps[0], steps[-1]))
    assert statistics.median(worst) < BOUND, worst
