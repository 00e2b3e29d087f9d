"""The splice: the model's name changes at its places, and not one other byte."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gproxyd.dialects.dialect import DIALECTS
from gproxyd.wire.splice import Place, Splicer, TextSplicer, count_models, quoted, replace_model
from tests.support.streams import CUTS, JSON_BODIES, at_cuts, byte_by_byte, law, pieces

PLACES: dict[str, tuple[Place, ...]] = {name: dialect.places for name, dialect in DIALECTS.items()}
SHOWN = b'"chat-default"'

# Documents are trees that are written twice, once as they come and once as they must go on: the oracle parses nothing.


@dataclass(frozen=True)
class Text:
    """A string, as spelled, without its quotes."""

    spelled: bytes


@dataclass(frozen=True)
class Word:
    """A number or a literal, as spelled."""

    spelled: bytes


@dataclass(frozen=True)
class Array:
    items: tuple[Any, ...]
    space: bytes


@dataclass(frozen=True)
class Object:
    """Members are (name, name as spelled, value)."""

    members: tuple[tuple[bytes, bytes, Any], ...]
    space: bytes


def written(tree: Any, places: tuple[Place, ...], value: bytes | None, path: Place | None = ()) -> bytes:
    """The tree as JSON; with a `value`, the strings at the places replaced. `path` is None where no place can be."""
    match tree:
        case Word(spelled):
            return spelled
        case Text(spelled):
            return value if value is not None and path in places else b'"%b"' % spelled
        case Array(items, space):
            inner = () if path == () else None
            texts = [space + written(item, places, value, inner) + space for item in items]
            return b"[%b]" % (b",".join(texts) or space)
        case Object(members, space):
            texts = [
                b'%b"%b"%b:%b%b%b'
                % (space, spelled, space, space, written(item, places, value, deeper(path, name)), space)
                for name, spelled, item in members
            ]
            return b"{%b}" % (b",".join(texts) or space)
    raise AssertionError(tree)


def deeper(path: Place | None, name: bytes) -> Place | None:
    return None if path is None else (*path, name)


def escaped(name: bytes, which: int) -> bytes:
    """A spelling of `name` in which some letters are escapes: `mod\\u0065l`."""
    return b"".join(
        (b"\\u%04x" % letter if which & 1024 else b"\\u%04X" % letter) if which >> at & 1 else bytes((letter,))
        for at, letter in enumerate(name)
    )


NAMES = st.sampled_from([b"model", b"modelVersion", b"response", b"message"])
DECOYS = st.sampled_from(
    [
        b"",
        b"models",
        b"Model",
        b"mode",
        b"model ",
        b"\xc3\xbc",
        b"x",
        b"choices",
        b'\\"model\\"',
        b"model\\u0000",
        b"\\n",
    ]
)
SPELLED = st.one_of(
    NAMES.map(lambda name: (name, name)),
    st.tuples(NAMES, st.integers(0, 2047)).map(lambda pair: (pair[0], escaped(*pair))),
    DECOYS.map(lambda name: (b"\0" + name, name)),
)
STRINGS = st.one_of(
    st.sampled_from(
        [
            rb"gpt-4", rb"", rb"model", rb"modelVersion", rb"\"model\":\"x\"", rb"\\", rb"\\\"", rb"x\\", rb"\"model",
            rb"a\/b", rb"\u006dodel", rb"\ud83d\ude00", rb"line\n\r\t", rb"{[", rb"}],:", rb"\u2028", b"\xe2\x80\xa8",
            b"\xf0\x9f\x98\x80", b"\x7f", rb"chat-default", rb"\"", rb"\"model\"", rb"data: [DONE]",
        ]
    ),
    st.text(max_size=8).map(lambda text: json.dumps(text)[1:-1].encode()),
    st.text(st.characters(min_codepoint=32, exclude_characters='"\\', exclude_categories=["Cs"]), max_size=8).map(
        str.encode
    ),
).map(Text)  # fmt: skip
WORDS = st.sampled_from(
    [b"0", b"-0", b"1.0", b"1e999", b"-1E-9", b"9007199254740993", b"1" * 40, b"true", b"false", b"null"]
).map(Word)
SPACES = st.sampled_from([b"", b"", b"", b" ", b"\n", b"\r\n\t ", b"  "])


def _branches(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    member = st.tuples(SPELLED, children).map(lambda pair: (*pair[0], pair[1]))
    objects = st.builds(Object, st.lists(member, max_size=4).map(tuple), SPACES)
    return st.one_of(objects, objects, st.builds(Array, st.lists(children, max_size=3).map(tuple), SPACES))


TREES = st.recursive(st.one_of(STRINGS, STRINGS, WORDS), _branches, max_leaves=10)
OBJECTS = TREES.filter(lambda tree: isinstance(tree, Object))
WHICH = st.sampled_from(sorted(PLACES))


def spliced(parts: list[bytes], places: tuple[Place, ...], value: bytes = SHOWN) -> bytes:
    splicer = Splicer(places, value)
    return b"".join(splicer.feed(part) for part in parts)


# The machine.


@law(200)
@given(TREES, WHICH, CUTS)
def test_only_the_strings_at_the_places_change(tree: Any, which: str, cuts: list[int]) -> None:
    places = PLACES[which]
    text, expected = written(tree, places, None), written(tree, places, SHOWN)
    json.loads(text.replace(b"1e999", b"1e99"))  # the generator's own law: it writes JSON
    for parts in ([text], list(byte_by_byte(text)), at_cuts(text, cuts)):
        assert spliced(parts, places) == expected, parts


@law(40)
@given(TREES, WHICH)
def test_every_single_cut_agrees(tree: Any, which: str) -> None:
    text, expected = written(tree, PLACES[which], None), written(tree, PLACES[which], SHOWN)
    for cut in range(len(text) + 1):
        assert spliced(pieces(text, [cut]), PLACES[which]) == expected, cut


@law(150)
@given(TREES, WHICH, st.binary(max_size=6))
def test_what_is_not_touched_stays_whatever_the_value(tree: Any, which: str, value: bytes) -> None:
    """Any value, even one that is no JSON: it is put in, never read."""
    text = written(tree, PLACES[which], None)
    assert spliced([text], PLACES[which], value) == written(tree, PLACES[which], value)


@pytest.mark.parametrize("body", JSON_BODIES, ids=lambda body: body.name)
def test_recorded_bodies_at_every_cut(body: Any) -> None:
    places = DIALECTS[body.dialect].places
    for cut in range(len(body.upstream) + 1):
        assert spliced(pieces(body.upstream, [cut]), places, b'"alias"') == body.shown(b"alias"), cut


# Short cuts.


@law(120)
@given(st.lists(TREES, min_size=1, max_size=4), WHICH, st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_whole_texts_in_any_order_agree_with_the_machine(trees: list[Any], which: str, order: list[int]) -> None:
    places = PLACES[which]
    splicer = TextSplicer(places, SHOWN)
    for index in order:
        tree = trees[index % len(trees)]
        assert splicer.splice(written(tree, places, None)) == written(tree, places, SHOWN)


BEGINNINGS = [
    b"{", b'{"model"', b'{"a":"\\"model"', b'{"a":"x\\\\","model"', b'{"a":{"model":"m"}', b'{"a":"model"',
    b'{"model":null', b'{"model":"m\\"', b'{"model":"m"', b'{"modelVersion":"m"', b'[{"model":"m"',
    b'{"mod\\u0065l":"m"', b'{"model":"model"',
]  # fmt: skip
ENDS = [
    b"}", b',"model":"real"}', b',"modelVersion":"real"}', b':"real"}', b':"model"}', b',"model":"m","x":"y"}',
    b"]}", b"}]", b',"b":{"model":"m"}}', b',"b":"\\"model\\":\\"m\\""}', b',"mod\\u0065l":"real"}', b':null}',
    b',"b":["model","m"]}', b',"model"}', b',"a":"\\"modelVersion","modelVersion":"real"}', b',"model":null}',
    b' , "model" : "model" }', b',"x":"\\\\"}',
]  # fmt: skip
NAMES_SHOWN = [SHOWN, b'"m"', b'"model"', b'"modelVersion"', b'"real"', b'"a"']


def _valid(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


HOSTILE = [text for head in BEGINNINGS for tail in ENDS if _valid(text := head + tail)]


SHOWN_BY = [
    *(("openai_chat", value) for value in (SHOWN, b'"m"', b'"model"', b'"real"')),
    *(("gemini", value) for value in (SHOWN, b'"modelVersion"')),
    ("openai_responses", b'"model"'),
    ("anthropic", SHOWN),
]


@pytest.mark.parametrize(("which", "value"), SHOWN_BY)
def test_no_event_makes_a_short_cut_lie_about_the_next(which: str, value: bytes) -> None:
    """Every pair of texts that share beginnings, mentions and names in all the ways that the proofs rely on."""
    places = PLACES[which]
    expected = {text: spliced([text], places, value) for text in HOSTILE}
    assert len(HOSTILE) > 60
    for first in HOSTILE:
        for second in HOSTILE:
            splicer = TextSplicer(places, value)
            assert splicer.splice(first) == expected[first], first
            assert splicer.splice(second) == expected[second], (first, second)


def test_a_remembered_beginning_is_only_trusted_where_its_one_mention_is_the_member() -> None:
    """The string before the member ends like a mention, and the shown name is spelled like the member itself."""
    splicer = TextSplicer(((b"model",),), b'"model"')
    assert splicer.splice(rb'{"a":"x\"model","model":null}') == rb'{"a":"x\"model","model":null}'
    assert splicer.splice(rb'{"a":"x\"model","model":"gpt-4"}') == rb'{"a":"x\"model","model":"model"}'


@law(80)
@given(st.lists(st.tuples(OBJECTS, st.booleans()), min_size=2, max_size=5), st.sampled_from(NAMES_SHOWN))
def test_events_that_repeat_their_beginning_agree(trees: list[tuple[Object, bool]], value: bytes) -> None:
    """As a vendor streams: a common head with the model in it, then something else each time."""
    places = PLACES["openai_chat"]
    splicer = TextSplicer(places, value)
    for tree, plain in trees:
        name = b"model" if plain else b"mod\\u0065l"
        head = ((b"id", b"id", Text(b"1")), (b"model", name, Text(b"m")))
        whole = Object(head + tree.members, tree.space)
        assert splicer.splice(written(whole, places, None)) == written(whole, places, value)


# Garbage.


GARBAGE = st.one_of(
    st.binary(max_size=60),
    st.lists(
        st.sampled_from(
            [*b'" \\ { } [ ] : , model "model" "modelVersion" "x" \\u006 1 \xff'.split(b" "), b" ", b"\n"]
        ),
        max_size=20,
    ).map(b"".join),
)  # fmt: skip


@law(300)
@given(GARBAGE, WHICH, CUTS)
@example(b'{"model":"\\', "openai_chat", [])
@example(b'{"\\', "openai_chat", [3])
@example(b'{"\\ud800":1,"model":"x"', "openai_chat", [4, 5])
def test_garbage_is_cut_as_it_likes_and_never_raises(garbage: bytes, which: str, cuts: list[int]) -> None:
    places = PLACES[which]
    whole = spliced([garbage], places)
    assert spliced(at_cuts(garbage, cuts), places) == whole
    assert spliced(list(byte_by_byte(garbage)), places) == whole
    machine = Splicer(places, SHOWN)
    machine.feed(garbage)
    if not machine.hits:
        assert whole == garbage
    count_models(garbage)
    replace_model(garbage, b'"x"')
    TextSplicer(places, SHOWN).splice(garbage)


@pytest.mark.parametrize("text", [b'"modelVersion":"m"}', b'x "modelVersion": "m"}\n'])
def test_a_member_of_nothing_is_no_place(text: bytes) -> None:
    assert TextSplicer(PLACES["gemini"], SHOWN).splice(text) == text


@pytest.mark.parametrize("depth", [1, 10_000])
def test_nesting_costs_no_stack(depth: int) -> None:
    text = b'{"a":' + b"[" * depth + b'{"model":"m"}' + b"]" * depth + b',"model":"m"}'
    assert spliced([text], PLACES["openai_chat"]) == text[:-4] + SHOWN + b"}"
    deep = b'{"message":' * depth + b'{"model":"m"}' + b"}" * depth
    assert spliced([deep], PLACES["anthropic"]) == (deep.replace(b'"m"', SHOWN) if depth == 1 else deep)


# Requests.


@law(150)
@given(OBJECTS, st.sampled_from(["gpt-4", "a/b:c", "model", 'q"uo\\te', "ü"]))
def test_the_request_names_another_model_and_is_the_same_otherwise(tree: Object, name: str) -> None:
    places = PLACES["openai_chat"]
    top = [value for member, _, value in tree.members if member == b"model"]
    body = written(tree, places, None)
    if len(top) == 1 and isinstance(top[0], Text):
        assert replace_model(body, quoted(name)) == written(tree, places, quoted(name))
        assert json.loads(replace_model(body, quoted(name)).replace(b"1e999", b"1"))["model"] == name
    if top:
        assert count_models(body) == len(top)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (rb'{"mod\u0065l":"a","x":{"model":"b"}}', rb'{"mod\u0065l":"n","x":{"model":"b"}}'),
        (rb'{"x":{"model":"b"},"\u006dodel":"a"}', rb'{"x":{"model":"b"},"\u006dodel":"n"}'),
        (rb'{"x":"\"model","model":"a"}', rb'{"x":"\"model","model":"n"}'),
        (rb'{"x":"model","model":"a"}', rb'{"x":"model","model":"n"}'),
        (rb'{"model" : "model"}', rb'{"model" : "n"}'),
        (rb'{"model":"\u0061\"\\"}', rb'{"model":"n"}'),
        (rb'{"x":[{"model":"a"}],"model":"b","y":{"model":1}}', rb'{"x":[{"model":"a"}],"model":"n","y":{"model":1}}'),
    ],
)
def test_the_member_is_replaced_and_not_its_likeness(body: bytes, expected: bytes) -> None:
    assert count_models(body) == 1
    assert replace_model(body, b'"n"') == expected


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"model":"a"}', 1),
        (b'{"model":"a","model":"b"}', 2),
        (b'{"model":"a","mod\\u0065l":"b"}', 2),
        (b'{"\\u006D\\u006F\\u0064\\u0065\\u006C":"a","model":"b"}', 2),
        (b'{"model":1,"model":"b"}', 2),
        (b'{"model":"a","x":{"model":"b"}}', 1),
        (b'{"model":"model"}', 1),
        (b'{"model":"a","messages":[{"content":"\\"model\\":\\"x\\""}],"tools":[{"model":1}]}', 1),
        (b'{"model":"a","Model":"b","models":["c"],"model ":"d"}', 1),
    ],
)
def test_models_are_counted_in_every_spelling(body: bytes, count: int) -> None:
    assert count_models(body) == count


# Speed.


def _cost(build: Any, size: int) -> float:
    """CPU seconds, the best of three."""
    best = float("inf")
    for _ in range(3):
        parts, work = build(size)
        start = time.process_time()
        for part in parts:
            work(part)
        best = min(best, time.process_time() - start)
    return best


def _one_string(size: int) -> Any:
    text = b'{"model":"m","a":"' + b"x\\n" * (size // 3) + b'"}'
    return pieces(text, range(0, size, 65536)), Splicer(PLACES["openai_chat"], SHOWN).feed


def _many_escapes(size: int) -> Any:
    text = b'{"' + b'\\"' * (size // 2) + b'":1,"model":"m"}'
    return pieces(text, range(0, len(text), 65536)), Splicer(PLACES["openai_chat"], SHOWN).feed


def _many_decoys(size: int) -> Any:
    return [b'{"a":[' + b'{"model":"m"},' * (size // 14) + b'1],"model":"m"}'], lambda body: replace_model(body, b'"x"')


def _many_members(size: int) -> Any:
    return [b"{" + b'"model":"m",' * (size // 12) + b'"a":1}'], TextSplicer(PLACES["openai_chat"], SHOWN).splice


def _spaces_before_the_value(size: int) -> Any:
    return [b'{"modelVersion":"m"' + b" " * size + b',"a":[]}'], TextSplicer(PLACES["gemini"], SHOWN).splice


@pytest.mark.parametrize(
    "build",
    [_one_string, _many_escapes, _many_decoys, _many_members, _spaces_before_the_value],
    ids=lambda f: f.__name__[1:],
)
def test_time_grows_with_the_text_and_not_faster(build: Any) -> None:
    grown = min(_cost(build, 2**19) - 4.5 * _cost(build, 2**17) for _ in range(3))
    assert grown <= 0.02


def test_many_hostile_texts_by_seed() -> None:
    """Tokens thrown together, kept where they are JSON: short cuts and machine agree over one long stream."""
    rng = random.Random(20)
    for which in sorted(PLACES):
        splicer = TextSplicer(PLACES[which], b'"model"')
        for _ in range(1000):
            text = rng.choice(HOSTILE)
            assert splicer.splice(text) == spliced([text], PLACES[which], b'"model"'), (which, text)


def test_every_spelling_of_a_place_is_a_mention() -> None:
    """The first short cut rests on it."""
    for places in PLACES.values():
        splicer = TextSplicer(places, SHOWN)
        for place in places:
            for which in range(2 ** min(len(place[-1]), 10)):
                for case in (0, 1024):
                    assert splicer.mentioned(b'{"%b":"m"}' % escaped(place[-1], which | case)), (place, which)
