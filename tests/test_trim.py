"""What is changed in a conversation before it is sent: what does not fit is left out, an agent's prompt is put in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gproxyd.dialects.prompt import with_system
from gproxyd.dialects.rewrite import rewrite
from gproxyd.dialects.trim import trim
from gproxyd.dialects.turns import SHAPES, items, role
from gproxyd.dialects.weight import weights
from gproxyd.types import DialectName

DIALECTS: Sequence[DialectName] = get_args(DialectName)

Json = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """One go of the assistant: it thinks, or not, calls so many tools, and gets their results; or it just speaks."""

    calls: int
    thinks: bool
    size: int
    words: bool = False  # the user speaks beside the results


@dataclass(frozen=True)
class Turn:
    said: int  # messages of the user in a row
    size: int
    rounds: Sequence[Round]


ROUNDS = st.builds(Round, st.integers(0, 3), st.booleans(), st.integers(1, 200), st.booleans())
TURNS = st.builds(Turn, st.integers(1, 2), st.integers(1, 200), st.lists(ROUNDS, max_size=4))


def text_of(size: int) -> str:
    return "word " * size


def chat(turns: Sequence[Turn]) -> Json:
    messages: list[Json] = [{"role": "system", "content": "be kind"}]
    for t, turn in enumerate(turns):
        messages += [{"role": "user", "content": text_of(turn.size)} for _ in range(turn.said)]
        for r, one in enumerate(turn.rounds):
            ids = [f"call_{t}_{r}_{c}" for c in range(one.calls)]
            calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in ids]
            messages.append(
                {"role": "assistant", "content": text_of(one.size), **({"tool_calls": calls} if ids else {})}
            )
            messages += [{"role": "tool", "tool_call_id": id, "content": text_of(one.size)} for id in ids]
        if t == 1:
            messages.append({"role": "developer", "content": "be brief"})
    return {"model": "m", "messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}


def responses(turns: Sequence[Turn]) -> Json:
    found: list[Json] = [{"type": "message", "role": "developer", "content": "be kind"}]
    for t, turn in enumerate(turns):
        found += [{"role": "user", "content": [{"type": "input_text", "text": text_of(turn.size)}]}] * turn.said
        for r, one in enumerate(turn.rounds):
            ids = [f"call_{t}_{r}_{c}" for c in range(one.calls)]
            if one.thinks:
                found.append({"type": "reasoning", "id": f"rs_{t}_{r}", "encrypted_content": "x" * one.size})
            if not ids:
                found.append({"type": "message", "role": "assistant", "content": text_of(one.size), "id": f"m_{t}_{r}"})
            found += [{"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"} for id in ids]
            found += [{"type": "function_call_output", "call_id": id, "output": text_of(one.size)} for id in ids]
    return {"model": "m", "instructions": "be brief", "input": [dict(one) for one in found]}


def anthropic(turns: Sequence[Turn]) -> Json:
    messages: list[Json] = []
    for t, turn in enumerate(turns):
        messages += [{"role": "user", "content": text_of(turn.size)} for _ in range(turn.said)]
        for r, one in enumerate(turn.rounds):
            ids = [f"toolu_{t}_{r}_{c}" for c in range(one.calls)]
            content: list[Json] = [{"type": "text", "text": text_of(one.size)}]
            if one.thinks:
                content.insert(0, {"type": "thinking", "thinking": "so", "signature": "s" * 40})
            content += [{"type": "tool_use", "id": id, "name": "f", "input": {}} for id in ids]
            messages.append({"role": "assistant", "content": content})
            back: list[Json] = [{"type": "tool_result", "tool_use_id": id, "content": text_of(one.size)} for id in ids]
            if ids and one.words:
                back.append({"type": "text", "text": "and hurry"})
            if ids:
                messages.append({"role": "user", "content": back})
    return {"model": "m", "system": "be kind", "messages": messages, "tools": [{"name": "f", "input_schema": {}}]}


def gemini(turns: Sequence[Turn]) -> Json:
    contents: list[Json] = []
    for turn in turns:
        contents += [{"role": "user", "parts": [{"text": text_of(turn.size)}]} for _ in range(turn.said)]
        for one in turn.rounds:
            call = {"functionCall": {"name": "f", "args": {}}, "thoughtSignature": "s" * 40}
            contents.append({"role": "model", "parts": [{"text": text_of(one.size)}, *([call] * one.calls)]})
            result = {"functionResponse": {"name": "f", "response": {"result": text_of(one.size)}}}
            words = [{"text": "and hurry"}] if one.words else []
            if one.calls:
                contents.append({"role": "user", "parts": [result] * one.calls + words})
    return {"systemInstruction": {"parts": [{"text": "be kind"}]}, "contents": contents}


WRITERS: dict[DialectName, Callable[[Sequence[Turn]], Json]] = {
    "openai_chat": chat,
    "openai_responses": responses,
    "anthropic": anthropic,
    "gemini": gemini,
}


def check_chat(fields: Json) -> None:
    """Results stand right behind the calls, one for each."""
    open_calls: list[str] = []
    for message in fields["messages"]:
        if message["role"] == "tool":
            open_calls.remove(message["tool_call_id"])
            continue
        assert open_calls == []
        open_calls = [call["id"] for call in message.get("tool_calls", ())]
    assert open_calls == []


def check_responses(fields: Json) -> None:
    """Every output has its call before it, every call its output, and reasoning what it led to right behind it."""
    calls: set[str] = set()
    before = None
    for item in fields["input"]:
        kind = item.get("type", "message")
        if before == "reasoning":
            assert kind in ("function_call", "message") and item.get("role", "assistant") == "assistant"
        if kind == "function_call":
            calls.add(item["call_id"])
        elif kind == "function_call_output":
            calls.remove(item["call_id"])
        before = kind
    assert not calls
    assert before != "reasoning"


def check_anthropic(fields: Json) -> None:
    """The first is the user's; all calls are answered in the next message, and nothing else is."""
    calls: set[str] = set()
    for n, message in enumerate(fields["messages"]):
        content = message["content"] if isinstance(message["content"], list) else []
        assert n or message["role"] == "user"
        answered = {block["tool_use_id"] for block in content if block["type"] == "tool_result"}
        assert answered == calls
        calls = {block["id"] for block in content if block["type"] == "tool_use"}
    assert not calls


def check_gemini(fields: Json) -> None:
    """The first is the user's; behind calls stand as many results."""
    calls = 0
    for n, content in enumerate(fields["contents"]):
        assert n or content["role"] == "user"
        assert sum("functionResponse" in part for part in content["parts"]) == calls
        calls = sum("functionCall" in part for part in content["parts"])
    assert not calls


CHECKS: dict[DialectName, Callable[[Json], None]] = {
    "openai_chat": check_chat,
    "openai_responses": check_responses,
    "anthropic": check_anthropic,
    "gemini": check_gemini,
}


def tokens(dialect: DialectName, fields: Any) -> int:
    fixed, each = weights(dialect, fields)
    return fixed + sum(each)


def all_trimmed(dialect: DialectName, fields: Json) -> list[Any]:
    """Everything that a request is cut to as there is less and less room."""
    found: list[Any] = [fields]
    while (less := trim(dialect, fields, tokens(dialect, found[-1]) - 1)) is not None:
        found.append(less)
    return found


def ids(dialect: DialectName, fields: Any) -> list[int]:
    return [id(one) for one in items(dialect, fields)]


def alternates(dialect: DialectName, fields: Any) -> bool:
    spoken = [role(dialect, item) for item in items(dialect, fields)]
    sides = [who == "assistant" for who in spoken if who != "system"]
    return all(one != other for one, other in pairwise(sides))


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=80, deadline=None)
@given(turns=st.lists(TURNS, min_size=1, max_size=5))
def test_however_little_room_there_is_what_stays_is_legal_and_unchanged(
    dialect: DialectName, turns: list[Turn]
) -> None:
    fields = WRITERS[dialect](turns)
    original = copy.deepcopy(fields)
    CHECKS[dialect](fields)
    conversation = items(dialect, fields)
    speakers = [role(dialect, item) for item in conversation]
    last_said = max(n for n, who in enumerate(speakers) if who == "user")
    kept = {id(conversation[last_said]), id(conversation[-1])}
    kept.update(id(item) for item, who in zip(conversation, speakers, strict=True) if who == "system")
    for cut in all_trimmed(dialect, fields)[1:]:
        CHECKS[dialect](cut)
        left = ids(dialect, cut)
        assert left == [one for one in ids(dialect, fields) if one in set(left)]
        assert kept <= set(left)
        if alternates(dialect, fields):
            assert alternates(dialect, cut)
        assert {name: value for name, value in cut.items() if name != SHAPES[dialect].items} == {
            name: value for name, value in original.items() if name != SHAPES[dialect].items
        }
    assert fields == original


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(TURNS, min_size=1, max_size=5), budget=st.integers(0, 3000))
def test_no_more_is_left_out_than_must_be(dialect: DialectName, turns: list[Turn], budget: int) -> None:
    fields = WRITERS[dialect](turns)
    ladder = all_trimmed(dialect, fields)
    for more, less in pairwise(ladder):
        assert set(ids(dialect, less)) < set(ids(dialect, more))
        exact = trim(dialect, fields, tokens(dialect, less))
        assert exact is not None
        assert ids(dialect, exact) == ids(dialect, less)
    cut = trim(dialect, fields, budget)
    fits = [one for one in ladder if tokens(dialect, one) <= budget]
    if cut is None:
        assert fits == []
    else:
        assert ids(dialect, cut) == ids(dialect, fits[0])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_fits_is_the_very_same_request(dialect: DialectName) -> None:
    fields = WRITERS[dialect]([Turn(1, 5, [Round(1, False, 5)])])
    assert trim(dialect, fields, tokens(dialect, fields)) is fields


@pytest.mark.parametrize("dialect", DIALECTS)
def test_whole_turns_go_first_then_the_oldest_rounds_of_the_last(dialect: DialectName) -> None:
    plain = Round(0, False, 10)
    turns = [Turn(1, 10, [plain]), Turn(1, 10, [Round(1, True, 10), plain]), Turn(1, 10, [Round(2, True, 10)] * 3)]
    fields = WRITERS[dialect](turns)
    said = [
        len([one for one in items(dialect, cut) if role(dialect, one) == "user"])
        for cut in all_trimmed(dialect, fields)
    ]
    assert said == [3, 2, 1, 1, 1]


def test_one_question_and_a_hundred_rounds_of_tools_are_cut_to_the_question_and_the_newest() -> None:
    fields = anthropic([Turn(1, 10, [Round(1, True, 100) for _ in range(100)])])
    cut = trim("anthropic", fields, 1_000)
    assert cut is not None
    messages = cut["messages"]
    assert messages[0] is fields["messages"][0]
    assert messages[1:] == fields["messages"][-len(messages) + 1 :]
    assert 1 < len(messages) < 20
    check_anthropic(dict(cut))


def test_what_the_user_says_beside_results_stays_with_its_round() -> None:
    rounds = [Round(1, False, 50), Round(1, False, 50, words=True), Round(1, False, 50), Round(1, False, 50)]
    fields = anthropic([Turn(1, 10, rounds)])
    *_, least = all_trimmed("anthropic", fields)
    assert least["messages"] == [fields["messages"][n] for n in (0, 3, 4, 7, 8)]


def test_an_output_that_comes_after_the_next_question_keeps_its_call() -> None:
    fields = {
        "input": [
            {"role": "user", "content": text_of(50)},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"role": "user", "content": "are you there?"},
            {"type": "function_call_output", "call_id": "a", "output": text_of(50)},
            {"role": "assistant", "content": text_of(50)},
            {"role": "user", "content": "go on"},
        ]
    }
    for cut in all_trimmed("openai_responses", fields):
        check_responses(dict(cut))
    assert [len(cut["input"]) for cut in all_trimmed("openai_responses", fields)] == [6, 1]


def test_an_item_that_may_ask_for_the_reasoning_before_it_stays_with_it() -> None:
    def call(name: str) -> list[Json]:
        made = {"type": "function_call", "id": f"fc_{name}", "call_id": name, "name": "f", "arguments": "{}"}
        return [made, {"type": "function_call_output", "call_id": name, "output": text_of(20)}]

    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    newest = [{"type": "reasoning", "id": "rs_2", "summary": []}, *call("c")]
    fields = {"input": [{"role": "user", "content": "q"}, thought, *call("a"), *call("b"), *newest]}
    assert [len(cut["input"]) for cut in all_trimmed("openai_responses", fields)] == [9, 4]


def test_calls_that_all_have_the_same_id_are_told_apart() -> None:
    rounds = [Round(1, False, 30)] * 4
    fields = chat([Turn(1, 10, rounds), Turn(1, 10, rounds)])
    for message in fields["messages"]:
        for call in message.get("tool_calls", ()):
            call["id"] = "call_f"
        if message["role"] == "tool":
            message["tool_call_id"] = "call_f"
    assert len(all_trimmed("openai_chat", fields)) == 5


def test_what_the_vendor_made_of_older_turns_stays() -> None:
    compacted = {"type": "compaction", "id": "cmp_1", "encrypted_content": "x" * 40}
    fields = {"input": [compacted, {"role": "user", "content": text_of(50)}, {"role": "assistant", "content": "a"},
                        {"role": "user", "content": "b"}]}  # fmt: skip
    *_, least = all_trimmed("openai_responses", fields)
    assert least["input"] == [compacted, {"role": "user", "content": "b"}]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": 3, "input": "long " * 99, "contents": {"parts": "x"}},
        {"messages": [None, 1, []], "input": [[]], "contents": ["a"]},
    ],
    ids=["none", "odd", "odder"],
)
def test_what_has_no_shape_is_left_as_it_is(dialect: DialectName, fields: Json) -> None:
    assert trim(dialect, fields, 10_000) is fields
    assert trim(dialect, fields, -1) is None


TEXT = "You are the house's own agent."

ABSENT: dict[DialectName, tuple[Json, Json]] = {
    "openai_chat": (
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "system", "content": TEXT}, {"role": "user", "content": "hi"}]},
    ),
    "openai_responses": ({"input": "hi"}, {"input": "hi", "instructions": TEXT}),
    "anthropic": (
        {"messages": [{"role": "user", "content": "hi"}], "system": []},
        {"messages": [{"role": "user", "content": "hi"}], "system": TEXT},
    ),
    "gemini": (
        {"contents": [{"parts": [{"text": "hi"}]}]},
        {"contents": [{"parts": [{"text": "hi"}]}], "systemInstruction": {"parts": [{"text": TEXT}]}},
    ),
}

USER = {"role": "user", "content": "hi"}
BLOCK = {"type": "text", "text": "mine", "cache_control": {"type": "ephemeral", "ttl": "1h"}}

OWN: list[tuple[DialectName, Json, Json]] = [
    ("openai_chat", {"messages": [{"role": "developer", "content": "mine"}, USER, {"role": "system", "content": "x"}]},
     {"messages": [{"role": "developer", "content": TEXT}, USER]}),
    ("openai_responses", {"instructions": "mine", "input": [{"role": "developer", "content": "x"}, USER]},
     {"instructions": TEXT, "input": [USER]}),
    ("openai_responses", {"input": [{"type": "message", "role": "system", "content": "x"}, USER]},
     {"instructions": TEXT, "input": [USER]}),
    ("anthropic", {"system": "mine", "messages": [USER]}, {"system": TEXT, "messages": [USER]}),
    ("anthropic", {"system": [{"type": "text", "text": "a"}, BLOCK], "messages": [USER]},
     {"system": [{**BLOCK, "text": TEXT}], "messages": [USER]}),
    ("gemini", {"system_instruction": {"parts": [{"text": "mine"}]}, "contents": []},
     {"systemInstruction": {"parts": [{"text": TEXT}]}, "contents": []}),
]  # fmt: skip


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_request_without_a_prompt_gets_the_agents(dialect: DialectName, force: bool) -> None:
    before, after = copy.deepcopy(ABSENT[dialect])
    assert with_system(dialect, before, TEXT, force) == after
    assert before == ABSENT[dialect][0]
    assert with_system(dialect, before, "", force) is before


@pytest.mark.parametrize(("dialect", "before", "after"), OWN)
def test_a_clients_own_prompt_stands_alone_unless_forced_out(dialect: DialectName, before: Json, after: Json) -> None:
    original = copy.deepcopy(before)
    assert with_system(dialect, before, TEXT, False) is before
    assert with_system(dialect, before, TEXT, True) == after
    assert before == original


NAMES = st.sampled_from(["model", "messages", "a", 'q"', "ü", "input"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    before=st.dictionaries(NAMES, VALUES, max_size=5),
    new=st.dictionaries(NAMES.filter(str.isascii), VALUES, max_size=3),
    gone=st.sets(NAMES, max_size=1),
    indent=st.booleans(),
)
def test_a_rewritten_body_says_what_was_meant(before: Json, new: Json, gone: set[str], indent: bool) -> None:
    body = orjson.dumps(before, option=orjson.OPT_INDENT_2 if indent else 0)
    after = {name: value for name, value in {**before, **new}.items() if name not in gone}
    assert orjson.loads(rewrite(body, before, after)) == after


def test_what_is_not_changed_stays_byte_for_byte() -> None:
    body = b'\n{ "seed": 1e3, "n": 12345678901234567890123,  "messages" : [ 1 ],"x":"\\u0041" }\n'
    fields = orjson.loads(body)
    changed = rewrite(body, fields, {**fields, "messages": ["new"], "system": "s"})
    assert (
        changed == b'\n{"system":"s", "seed": 1e3, "n": 12345678901234567890123,  "messages" :["new"],"x":"\\u0041" }\n'
    )
    assert rewrite(body, fields, {**fields}) is body
    assert rewrite(b" { } ", {}, {"a": 1}) == b' {"a":1 } '
    assert rewrite(b'{"a":1, "a":2}', {"a": 2}, {"a": 3}) == b'{"a":3}'
