"""Quirks: what is done to a request, what an answer is taken for, and that nothing else is touched."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest

from gproxyd.config import load
from gproxyd.config import quirks as configured
from gproxyd.dialects.quirks import Answer, BodyError, Quirks, body_error, fit, is_limited
from gproxyd.errors import ConfigError
from gproxyd.vendors.catalogue import vendors

EVERY = Quirks(stream_options=False, tool_choice_auto=False, reasoning_content="removed", flat_content=True)

SIGNED = {"google": {"thought_signature": "CvcBAb4+9vt/J3=\u2028"}}
CALLS = [
    {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"tool_choice":"auto"}'},
        "extra_content": SIGNED,
    }
]


def chat(**more: Any) -> bytes:
    return orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}], **more})


def fitted(body: bytes, **quirks: Any) -> Any:
    return orjson.loads(fit(body, Quirks(**quirks)))


# Nothing applies.


@pytest.mark.parametrize(
    "body",
    [
        chat(),
        chat(stream=True, tool_choice="required"),
        chat(tool_choice={"type": "function", "function": {"name": "f"}}),
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]),
        chat(
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}
            ]
        ),
        chat(messages=[{"role": "user", "content": []}, {"role": "user", "content": None}, "text", 1]),
        chat(messages=[{"role": "user", "reasoning_content": "a user's own"}]),
        chat(messages="text"),
        chat(
            messages=[{"role": "user", "content": 'say "tool_choice": "auto", "reasoning_content", "stream_options"'}]
        ),
        chat(metadata={"tool_choice": "auto", "stream_options": {}, "reasoning_content": "x"}),
        b'{"tool_choice":"auto"',
        b'["tool_choice","auto"]',
        b"",
    ],
)
def test_a_body_to_which_nothing_applies_is_the_very_same_object(body: bytes) -> None:
    assert fit(body, EVERY) is body


def test_without_a_quirk_nothing_is_ever_touched() -> None:
    body = chat(tool_choice="auto", stream_options={"include_usage": True})
    assert fit(body, Quirks()) is body
    assert not Quirks().fit
    assert not Quirks(reasoning_content="required", both_keys=True, limited=(Answer(529),)).fit


# What is done.


def test_stream_options_are_left_out() -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    assert fitted(body, stream_options=False) == orjson.loads(chat(stream=True))


def test_tool_choice_auto_is_left_out_and_no_other_choice() -> None:
    assert fitted(chat(tools=[], tool_choice="auto"), tool_choice_auto=False) == orjson.loads(chat(tools=[]))
    assert fitted(chat(tools=[], tool_choice="none"), tool_choice_auto=False)["tool_choice"] == "none"


def test_reasoning_is_removed_from_the_assistants_messages_only() -> None:
    messages = [
        {"role": "user", "content": "a", "reasoning_content": "mine"},
        {"role": "assistant", "content": "b", "reasoning_content": "thought", "reasoning": "kept"},
        {"role": "assistant", "content": None, "reasoning_content": "", "tool_calls": CALLS},
    ]
    after = fitted(chat(messages=messages), reasoning_content="removed")["messages"]
    assert after == [
        messages[0],
        {"role": "assistant", "content": "b", "reasoning": "kept"},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
    ]


@pytest.mark.parametrize("way", ["kept", "required"])
def test_reasoning_is_kept_where_a_vendor_wants_it_back(way: str) -> None:
    body = chat(messages=[{"role": "assistant", "content": "b", "reasoning_content": "thought"}])
    assert fit(body, dataclasses.replace(EVERY, reasoning_content=way, flat_content=False)) is body  # type: ignore[arg-type]


def test_texts_become_one_text_and_what_holds_more_stays() -> None:
    mixed = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:x"}}]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": mixed},
        {"role": "assistant", "content": "plain"},
    ]
    after = fitted(chat(messages=messages), flat_content=True)["messages"]
    assert [message["content"] for message in after] == ["be\nbrief", mixed, "plain"]


def test_thought_signatures_survive_every_quirk() -> None:
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": "x"}], "tool_calls": CALLS, "extra_content": SIGNED},
        {"role": "tool", "tool_call_id": "1", "content": "{}", "extra_content": SIGNED},
    ]
    told = {"tool_choice": "auto", "stream_options": {}, "extra_body": {"google": {"thinking_config": {}}}}
    after = orjson.loads(fit(chat(messages=messages, **told), EVERY))
    assert after["messages"][0] == {"role": "assistant", "content": "x", "tool_calls": CALLS, "extra_content": SIGNED}
    assert after["messages"][1] == messages[1]
    assert after["extra_body"] == told["extra_body"]


def test_what_no_quirk_names_survives_in_its_order() -> None:
    rng = random.Random(7)
    for _ in range(300):
        document = {f"k{n}": _value(rng, 3) for n in range(rng.randint(0, 4))}
        document |= {"messages": [{"role": "assistant", "x": _value(rng, 3), "reasoning_content": "r"}]}
        document |= {"tool_choice": "auto", "z": _value(rng, 2)}
        after = orjson.loads(fit(orjson.dumps(document), EVERY))
        del document["tool_choice"], document["messages"][0]["reasoning_content"]  # type: ignore[index]
        assert after == document
        assert list(after) == list(document)


def _value(rng: random.Random, depth: int) -> Any:
    plain: list[Any] = [None, True, -1, 2**53, 1.5, "", 'é\n"', "tool_choice"]
    if depth == 0 or rng.random() < 0.5:
        return rng.choice(plain)
    if rng.random() < 0.5:
        return [_value(rng, depth - 1) for _ in range(3)]
    return {rng.choice(["extra_content", "tool_choice", "stream_options", "a"]): _value(rng, depth - 1) for _ in "ab"}


# Answers.


def test_what_means_a_rate_limit() -> None:
    groq = vendors()["groq"].quirks.limited
    told = b'{"error":{"message":"Request too large","type":"tokens","code":"rate_limit_exceeded"}}'
    assert is_limited(413, told, groq)
    assert not is_limited(413, b'{"error":{"code":"request_too_large"}}', groq)
    assert not is_limited(400, told, groq)
    assert is_limited(529, b"", vendors()["anthropic"].quirks.limited)
    assert not is_limited(413, told, vendors()["anthropic"].quirks.limited)
    assert is_limited(429, b"", ())
    assert not is_limited(503, b"", ())


@pytest.mark.parametrize(
    ("vendor", "body", "meaning"),
    [
        ("zai", b'{"error":{"code":"1302","message":"too many"}}', "limited"),
        ("zai", b'{"error":{"code":1113,"message":"no money"}}', "limited"),
        ("zai-coding", b'{"error":{"code":"1001","message":"who?"}}', "refused"),
        ("zai", b'{"error":{"code":"1210","message":"your own fault"}}', None),
        ("zai", b'{"choices":[{"message":{"content":"1302"}}]}', None),
        ("minimax", b'{"choices":null,"base_resp":{"status_code":1002,"status_msg":"rate limit"}}', "limited"),
        ("minimax", b'{"base_resp":{"status_code":1004,"status_msg":""}}', "refused"),
        ("minimax", b'{"base_resp":{"status_code":0,"status_msg":""}}', None),
        ("openai", b'{"error":{"code":"1302"}}', None),
        ("zai", b'{"error":{"code":true}}', None),
        ("zai", b'{"error":[]}', None),
        ("zai", b"<html>", None),
        ("zai", b"[]", None),
    ],
)
def test_what_an_error_code_inside_a_body_means(vendor: str, body: bytes, meaning: str | None) -> None:
    assert body_error(body, vendors()[vendor].quirks.body_errors) == meaning


def test_a_code_is_looked_for_in_its_place_only() -> None:
    errors = (BodyError("a.b", failed=frozenset({"7"})),)
    assert body_error(b'{"a":{"b":7}}', errors) == "failed"
    assert body_error(b'{"b":7}', errors) is None
    assert body_error(b'{"a":{"b":[7]}}', errors) is None


# Configuration.


def config_of(tmp_path: Path, section: str) -> Any:
    path = tmp_path / "gproxyd.yaml"
    path.write_text(
        f"providers: {{up: {{vendor: custom, dialects: {{openai_chat: http://127.0.0.1:1}}, {section}}}}}\n"
    )
    return load(path, vendors={}).providers["up"]


def test_every_quirk_can_be_configured() -> None:
    assert list(configured.Quirks.model_fields) == [each.name for each in dataclasses.fields(Quirks)]
    written = configured.Quirks.model_fields["reasoning_content"].annotation
    known = Quirks.__annotations__["reasoning_content"]
    assert all(repr(way) in known.replace('"', "'") for way in get_args(get_args(written)[0]))


@pytest.mark.parametrize(
    ("section", "key", "text"),
    [
        ("quirks: {both_kys: true}", "providers.up.quirks.both_kys", "is not a known key; did you mean `both_keys`?"),
        ("quirks: {flat_content: 1}", "providers.up.quirks.flat_content", "must be true or false, without quotes"),
        (
            "quirks: {reasoning_content: dropped}",
            "providers.up.quirks.reasoning_content",
            "must be one of 'kept', 'required' or 'removed'",
        ),
        ("quirks: {limited: [{status: 200}]}", "providers.up.quirks.limited[0].status", "must be at least 400"),
        ("quirks: {limited: [{contains: x}]}", "providers.up.quirks.limited[0].status", "is required"),
        (
            "quirks: {body_errors: [{at: a..b}]}",
            "providers.up.quirks.body_errors[0].at",
            "must be the way to a member of a JSON object, as in error.code",
        ),
        (
            "quirks: {body_errors: [{at: a, limited: [true]}]}",
            "providers.up.quirks.body_errors[0].limited[0]",
            "must be text; put it in quotes if it looks like a number or like true, false or null",
        ),
        ("project: ../x", "providers.up.project", "must be one part of a path: letters, digits and '._:-'"),
        ("location: a/b", "providers.up.location", "must be one part of a path: letters, digits and '._:-'"),
        ("api_version: '..'", "providers.up.api_version", "must be one part of a path: letters, digits and '._:-'"),
    ],
)
def test_an_unknown_quirk_or_a_wrong_value_is_an_error(tmp_path: Path, section: str, key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, section)
    assert [(problem.key, problem.message) for problem in caught.value.problems] == [(key, text)]


def test_codes_may_be_written_as_numbers(tmp_path: Path) -> None:
    told = config_of(tmp_path, "quirks: {body_errors: [{at: error.code, limited: [1302, busy]}]}")
    assert told.quirks.body_errors[0].limited == ("1302", "busy")
