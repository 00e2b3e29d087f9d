"""The picker: members of a JSON text of any length, however it is cut."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.wire.pick import MAX_DEPTH, MAX_VALUE, Picker
from tests.support.streams import CUTS, at_cuts, byte_by_byte, law

NAMES = ("usage", "error", "a")


def picked(pieces: Any, names: tuple[str, ...] = NAMES) -> list[tuple[str, Any]]:
    picker = Picker(names)
    return [(name, orjson.loads(text)) for piece in pieces for name, text in picker.feed(piece)]


_STRINGS = st.text(st.sampled_from('a"\\{}[],: \n\u00e9\U0001f600usage'), max_size=12)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.floats(allow_nan=False, allow_infinity=False) | _STRINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | _STRINGS, inner, max_size=4),
    max_leaves=20,
)
_ROOTS = st.dictionaries(st.sampled_from(NAMES) | _STRINGS, _JSON, max_size=6)
_STYLES = st.sampled_from([
    {"ensure_ascii": True, "separators": (",", ":")},
    {"ensure_ascii": False, "indent": 2},
    {"separators": (" , ", " : ")},
])  # fmt: skip


@law(500)
@given(_ROOTS, _STYLES, CUTS)
def test_however_it_is_cut_the_members_are_those_of_the_parser(root: Any, style: Any, cuts: list[int]) -> None:
    text = json.dumps(root, **style).encode()
    expected = [(name, value) for name, value in json.loads(text).items() if name in NAMES]
    assert picked(at_cuts(text, cuts)) == expected


@law(100)
@given(st.lists(_ROOTS, max_size=4), _STYLES, CUTS)
def test_elements_of_an_array_are_roots(roots: Any, style: Any, cuts: list[int]) -> None:
    text = json.dumps(roots, **style).encode()
    expected = [(name, value) for root in json.loads(text) for name, value in root.items() if name in NAMES]
    assert picked(at_cuts(text, cuts)) == expected


@law(100)
@given(_ROOTS, _STYLES)
def test_byte_by_byte_is_as_good_as_whole(root: Any, style: Any) -> None:
    text = json.dumps(root, **style).encode()
    assert picked(byte_by_byte(text)) == picked([text])


def test_quotes_behind_back_slashes_end_a_string_or_do_not_wherever_the_cut_falls() -> None:
    for length in range(7):
        for letters in itertools.product('\\"x' if length < 5 else '\\"', repeat=length):
            string = "".join(letters)
            text = orjson.dumps({"b": [string, {"a": string}], string: 0, "a": string, "usage": 1})
            for cut in range(len(text)):
                assert picked([text[:cut], text[cut:]]) == [("a", string), ("usage", 1)], (cut, text)


def test_what_it_tells_of_a_text_does_not_depend_on_the_cuts_or_on_the_pauses() -> None:
    text = b' {"a": 1 , "b":[{"a":2}],"usage":{"a":["x"]},"\\u0061":\n"y\\"" } {"a":3}'
    whole = Picker(NAMES)
    whole.feed(text)
    assert whole.counts == {"a": 3, "usage": 1}
    assert [text[slice(*whole.spans[name])] for name in ("usage", "a")] == [b'{"a":["x"]}', b"3"]
    assert (whole.end, whole.members, whole.deep, whole.broken) == (text.index(b" {", 1), True, False, False)
    for size in range(1, len(text)):
        cut, paused, position = Picker(NAMES), Picker(NAMES), 0
        for at in range(0, len(text), size):
            cut.feed(text[at : at + size])
        while position < len(text):
            before, position = position, paused.advance(text, position, min(position + size, len(text)), 2)
            assert position > before
        for each in (cut, paused):
            for told in ("counts", "spans", "end", "members", "deep", "broken", "begun", "closed"):
                assert getattr(each, told) == getattr(whole, told), (size, told)


@pytest.mark.parametrize(("text", "broken"), [(b'{"a":1]}', True), (b'{"a":1:2}', True), (b'{"a":[1]}', False)])
def test_a_bracket_or_a_colon_where_none_may_stand_is_told(text: bytes, broken: bool) -> None:
    picker = Picker(NAMES)
    picker.feed(text)
    assert picker.broken is broken


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_too_many_open_brackets_are_told_wherever_the_cut_falls(levels: int) -> None:
    for depth in range(MAX_DEPTH - 3, MAX_DEPTH + 3):  # the root is one more
        text = (
            b'{"b":'
            + b"[" * (depth - levels)
            + b'{"":' * levels
            + b"0"
            + b"}" * levels
            + b"]" * (depth - levels)
            + b"}"
        )
        for size in (1, 7, 100, 2000, 10**6):
            picker = Picker(NAMES)
            for at in range(0, len(text), size):
                picker.feed(text[at : at + size])
            assert picker.deep == (depth >= MAX_DEPTH), (depth, size)
            assert picker.closed


TEXTS = [
    (b'{"usage":{"a":"}\\"]"},"b":[{"usage":1}]}', [("usage", {"a": '}"]'})]),
    (b'{"text":"\\"usage\\":{\\"a\\":1}","usage":2}', [("usage", 2)]),
    (b'{"us\\u0061ge":3}', [("usage", 3)]),
    (b'{"usage":1,"usage":[2]}', [("usage", 1), ("usage", [2])]),
    (b' \n{ "usage" : "x" , "b" : 1 }\n', [("usage", "x")]),
    (b'{"usage":null,"error":true}', [("usage", None), ("error", True)]),
    (b'[{"usage":1},[{"usage":2}],{"usage":3}]', [("usage", 1), ("usage", 3)]),
    (b'{"b":"\\\\","usage":1}', [("usage", 1)]),
    (b'{"\\\\":1,"usage":2}', [("usage", 2)]),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=[repr(text) for text, _ in TEXTS])
def test_decoys(text: bytes, expected: list[tuple[str, Any]]) -> None:
    assert picked([text]) == picked(byte_by_byte(text)) == expected


@pytest.mark.parametrize("text", [b"", b"usage", b'"usage":1', b"[1,2", b'{"usage":{"a":1}', b'{"usage', b'{"usage":"',
                                  b"]}}}{", b'{"usage"}', b"\xff\xfe"])  # fmt: skip
def test_what_is_broken_or_cut_picks_nothing_that_has_not_ended(text: bytes) -> None:
    assert picked([text]) == picked(byte_by_byte(text)) == []


@law(300)
@given(st.lists(st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"usage", b" ", b"\n", b"1"])), CUTS)
def test_any_bytes_whatever_pick_the_same_in_any_cut(parts: list[bytes], cuts: list[int]) -> None:
    text = b"".join(parts)
    whole, cut = Picker(NAMES), Picker(NAMES)
    assert whole.feed(text) == [pair for piece in at_cuts(text, cuts) for pair in cut.feed(piece)]
    assert (whole.begun, whole.closed) == (cut.begun, cut.closed)


def test_whether_it_ended_is_told() -> None:
    picker = Picker(NAMES)
    assert (picker.begun, picker.closed) == (False, False)
    picker.feed(b'{"a":{}')
    assert (picker.begun, picker.closed) == (True, False)
    picker.feed(b"}")
    assert (picker.begun, picker.closed) == (True, True)


@pytest.mark.parametrize("size", [1, 1000, 10**6])
def test_a_value_beyond_the_bound_is_dropped_and_the_next_is_not(size: int) -> None:
    text = b'{"a":"%b","usage":1}' % (b"x" * MAX_VALUE)
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    picker = Picker(NAMES)
    assert [pair for piece in pieces for pair in picker.feed(piece)] == [("usage", b"1")]
    assert picker.dropped


def test_memory_is_bounded() -> None:
    picker = Picker(NAMES)
    tracemalloc.start()
    try:
        for opening in (b'{"a":"', b'","b":["', b'"],"'):  # a wanted value, another, a name: none of them ends
            picker.feed(opening)
            for _ in range(200):
                picker.feed(b"x" * 65536)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1024 * 1024


DENSE = {
    "brackets that only open": b"[" * 400_000,
    "pairs": b"[]," * 200_000,
    "strings": b'"x",' * 200_000,
    "objects": b'{"a":[1,{"b":2}]},' * 30_000,
    "a bracket before each text": b'["tttttttttttttttttttttttt",' * 20_000,
    "escapes": b'"' + b"\\n" * 300_000,
    "numbers": b"0.123456," * 60_000,
}


@pytest.mark.parametrize("text", DENSE.values(), ids=list(DENSE))
def test_time_is_linear(text: bytes) -> None:
    def seconds(times: int) -> float:
        picker, whole = Picker(NAMES), b'{"b":[' + text[: len(text) // 4] * times
        began = time.process_time()
        for at in range(0, len(whole), 16384):
            picker.feed(whole[at : at + 16384])
        return time.process_time() - began

    assert seconds(4) < 8 * max(min(seconds(1), seconds(1)), 0.005)
