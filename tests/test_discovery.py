"""Vendors' lists of models: what is read of them, how they are asked for, and what a bad one cannot do."""

from __future__ import annotations

import gzip
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.host import asking
from gproxyd.units import parse_usd
from gproxyd.vendors import discovery
from gproxyd.vendors.discovery import CAPABILITIES, MOST_MODELS, MOST_PAGES, Asking, Found, NoList
from gproxyd.vendors.offers import Offers, Shop
from gproxyd.vendors.prices import Price
from gproxyd.wire.target import MODEL_NAME
from tests.support import raw
from tests.support.running import CLIENT_KEY, PROVIDER_KEY, Loop, Running, until
from tests.support.upstream import Got, Pause, Reset, Script, Stall, Upstream, json_reply

# What is read.

SHAPES: list[tuple[str, Any]] = [
    ("openai", {"object": "list", "data": [{"id": "a"}, {"id": "b/c"}]}),
    ("ollama", {"models": [{"name": "a"}, {"name": "b/c"}]}),
    ("model", {"data": [{"model": "a"}, {"model": "b/c", "name": "B"}]}),
    ("strings", ["a", "b/c"]),
    ("strings below data", {"data": ["a", "b/c"]}),
    ("strings below models", {"models": ["a", "b/c"]}),
    ("array", [{"id": "a", "name": "A"}, {"id": "b/c"}]),
    ("gemini", {"models": [{"name": "models/a"}, {"name": "models/b/c"}]}),
    ("vertex", {"publisherModels": [{"name": "publishers/google/models/a"}, {"name": "publishers/x/models/b/c"}]}),
    ("mixed", {"data": ["a", {"id": 7}, None, {"id": "b/c"}, [], {"id": "a"}, {"x": "y"}]}),
]


@pytest.mark.parametrize("answer", [answer for _, answer in SHAPES], ids=[name for name, _ in SHAPES])
def test_every_known_shape_of_a_list_is_read(answer: Any) -> None:
    asking = Asking()
    asking.feed(json.dumps(answer).encode())
    assert [model.id for model in asking.models] == ["a", "b/c"]
    assert asking.query is None


ROWS: list[tuple[str, dict[str, Any], Found]] = [
    ("openai", {"id": "m", "object": "model", "created": 1686935002, "owned_by": "openai"},
     Found("m", created=1686935002)),
    ("anthropic", {"type": "model", "id": "m", "display_name": "Model M", "created_at": "2025-02-19T00:00:00Z",
                   "max_input_tokens": 200000, "max_tokens": 64000,
                   "capabilities": {"image_input": {"supported": True}, "pdf_input": {"supported": False},
                                    "thinking": {"supported": True, "types": {}}, "effort": {"low": {}}}},
     Found("m", 200000, 64000, None, "Model M", 1739923200, frozenset({"vision", "reasoning"}), frozenset({"pdf"}))),
    ("gemini", {"name": "models/m", "displayName": "M", "inputTokenLimit": 1048576, "outputTokenLimit": 65536,
                "thinking": True},
     Found("m", 1048576, 65536, None, "M", None, frozenset({"reasoning"}))),
    ("groq", {"id": "m", "context_window": 131072, "max_completion_tokens": 32768}, Found("m", 131072, 32768)),
    ("mistral", {"id": "m", "max_context_length": 32768, "created": 1, "name": "m",
                 "capabilities": {"completion_chat": True, "function_calling": True, "vision": False}},
     Found("m", 32768, None, None, "m", 1, frozenset({"tools"}), frozenset({"vision"}))),
    ("cohere", {"name": "m", "endpoints": ["chat"], "context_length": 128000.0, "features": ["tools", "vision"]},
     Found("m", 128000, can=frozenset({"tools", "vision"}))),
    ("vllm", {"id": "m", "max_model_len": 4096, "permission": []}, Found("m", 4096)),
    ("github", {"id": "m", "name": "Model", "limits": {"max_input_tokens": 9, "max_output_tokens": 8},
                "capabilities": ["streaming", "tool-calling"], "supported_input_modalities": ["text", "image"]},
     Found("m", 9, 8, title="Model", can=frozenset({"tools", "vision"}))),
    ("openrouter", {"id": "m", "name": "M", "context_length": 1000,
                    "top_provider": {"max_completion_tokens": 100, "is_moderated": False},
                    "architecture": {"input_modalities": ["text", "image", "file"]},
                    "supported_parameters": ["tools", "reasoning", "structured_outputs", "temperature"],
                    "pricing": {"prompt": "0.0000004", "completion": "0.00000160", "input_cache_read": "0.0000001",
                                "internal_reasoning": "0", "request": "0", "image": "0.001"}},
     Found("m", 1000, 100, Price(parse_usd("0.40"), parse_usd("1.60"), parse_usd("0.10")), "M", None,
           frozenset({"tools", "reasoning", "json_schema", "vision", "pdf"}))),
]  # fmt: skip


@pytest.mark.parametrize(("row", "found"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_what_vendors_tell_of_a_model_is_read(row: dict[str, Any], found: Found) -> None:
    assert discovery.read([row]) == (found,)


@pytest.mark.parametrize(
    "pricing",
    [
        {"input": "0.000003", "output": "0.000015"},  # per token or per million? nobody says
        {"input": 0.88, "output": 0.88},
        {"prompt": "-1", "completion": "-1"},
        {"prompt": "0", "completion": "0", "image": "0.04"},  # tokens are free because it is the image that costs
        {"prompt": "1e-7"},
        {"prompt": "NaN"},
        {"completion": "0.1"},
        "free",
        None,
        [],
    ],
    ids=str,
)
def test_a_price_whose_meaning_is_not_certain_is_unknown(pricing: Any) -> None:
    assert discovery.read([{"id": "m", "pricing": pricing}]) == (Found("m"),)


def test_a_model_that_is_free_has_a_price_of_nothing() -> None:
    (found,) = discovery.read([{"id": "m", "pricing": {"prompt": "0", "completion": "0", "image": "0"}}])
    assert found.price == Price(0, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6)
    | st.dictionaries(
        st.sampled_from(["data", "models", "id", "name", "model", "pricing", "prompt", "completion", "created",
                         "created_at", "capabilities", "limits", "has_more", "last_id", "nextPageToken",
                         "context_length", "thinking", "unit", "input"]) | st.text(max_size=5),
        inner, max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip


@given(JSON)
def test_whatever_an_answer_holds_it_gives_names_that_can_be_called_or_no_list(answer: Any) -> None:
    asking = Asking()
    try:
        asking.feed(json.dumps(answer).encode())
    except NoList as failed:
        told = str(failed)
        assert told in ("its answer holds no list of models", "its list names no model")
    for model in asking.models:
        assert MODEL_NAME.fullmatch(model.id)
        assert model.title is None or model.title.isprintable()
        assert model.context is None or 1 <= model.context <= 10**9
        assert model.can | model.cannot <= CAPABILITIES and not model.can & model.cannot


@given(st.binary(max_size=50))
def test_bytes_that_are_no_json_are_no_list(body: bytes) -> None:
    with pytest.raises(NoList):
        Asking().feed(b"<" + body)


@pytest.mark.parametrize("bad", ["a\nb", "a\x00", "\x1b[2J", "a b", "ä", "", "a" * 257, "../x", "a/../b", "\u202egpt"])
def test_a_name_that_no_model_can_bear_is_left_out(bad: str) -> None:
    assert [model.id for model in discovery.read([bad, {"id": bad}, "good"])] == ["good"]


FOUND = st.builds(
    Found,
    id=st.from_regex(r"[a-z][a-z0-9./-]{0,10}[a-z0-9]", fullmatch=True).filter(lambda name: MODEL_NAME.fullmatch(name)),
    context=st.none() | st.integers(1, 10**9),
    max_output=st.none() | st.integers(1, 10**9),
    price=st.none() | st.builds(Price, input=st.integers(0, 10**15), output=st.none() | st.integers(0, 10**15)),
    title=st.none() | st.just("A title"),
    created=st.none() | st.integers(1, 2**33 - 1),
    can=st.frozensets(st.sampled_from(["vision", "tools"])),
    cannot=st.frozensets(st.sampled_from(["reasoning", "pdf"])),
)


@given(st.lists(FOUND, max_size=5, unique_by=lambda one: one.id))
def test_what_is_kept_is_read_again_as_it_was(found: list[Found]) -> None:
    assert discovery.read(orjson.loads(orjson.dumps(discovery.write(found)))) == tuple(found)


PAGES: list[tuple[str | None, str, list[tuple[str, dict[str, Any]]]]] = [
    ("after_id", "data", [("limit=1000", {"has_more": True, "last_id": "a&b"}),
                          ("limit=1000&after_id=a%26b", {"has_more": False, "last_id": "c"})]),
    ("pageToken", "models", [("pageSize=1000", {"nextPageToken": "t=1"}), ("pageSize=1000&pageToken=t%3D1", {}),]),
    ("page_token", "models", [("page_size=1000", {"next_page_token": "x"}), ("page_size=1000&page_token=x", {})]),
    (None, "data", [("", {"has_more": True, "last_id": "x"}), ("after=x", {"has_more": False})]),
    (None, "models", [("", {"nextPageToken": "x"}), ("pageToken=x", {"nextPageToken": "y"}), ("pageToken=y", {})]),
    ("none", "data", [("", {"has_more": True, "last_id": "x"})]),
]  # fmt: skip


@pytest.mark.parametrize(("page", "member", "steps"), PAGES, ids=str)
def test_every_page_of_a_list_is_asked_for(page: str | None, member: str, steps: list[Any]) -> None:
    asking = Asking(page)
    for number, (query, more) in enumerate(steps):
        assert asking.query == query
        asking.feed(json.dumps({member: [{"id": f"m{number}"}], **more}).encode())
    assert asking.query is None
    assert [model.id for model in asking.models] == [f"m{number}" for number in range(len(steps))]


@pytest.mark.parametrize("cursor", [lambda _: "same", lambda number: f"t{number}"], ids=["same", "ever new"])
def test_a_list_without_an_end_is_left(cursor: Callable[[int], str]) -> None:
    asking, pages = Asking(), 0
    while asking.query is not None:
        asking.feed(json.dumps({"models": [f"m{pages}"], "nextPageToken": cursor(pages)}).encode())
        pages += 1
    assert 2 <= pages <= MOST_PAGES


def test_no_more_than_so_many_models_are_taken() -> None:
    asking = Asking()
    asking.feed(json.dumps({"data": [f"m{n}" for n in range(MOST_MODELS + 100)], "nextPageToken": "t"}).encode())
    assert len(asking.models) == MOST_MODELS and asking.query is None


def test_numbers_of_tokens_that_nobody_can_mean_are_unknown() -> None:
    rows = [{"id": "m", "context_length": value} for value in (0, -1, 10**30, 1e300, "4096", True, None, [1])]
    assert {found.context for row in rows for found in discovery.read([row])} == {None}


# What is known of a model.


class Written:
    def __init__(self, id: str, context: int | None = None, price: Any = None) -> None:
        self.id, self.context, self.max_output, self.price = id, context, None, price


def test_each_field_is_taken_from_the_first_who_knows_it_and_says_who_that_was() -> None:
    found = [Found("gpt-4.1-mini", context=5, max_output=7, title="Mini", can=frozenset({"audio_in"}),
                   cannot=frozenset({"vision"})), Found("new")]  # fmt: skip
    offers = Offers({"p": Shop("openai", [Written("gpt-4.1-mini", context=3)])}, {"p": found, "gone": found})
    offer = offers.of_provider("p")["gpt-4.1-mini"]
    assert (offer.context, offer.max_output, offer.title) == (3, 7, "Mini")
    assert offer.price is not None and offer.price.input == parse_usd("0.40")
    assert {"audio_in", "tools"} <= offer.capabilities and "vision" not in offer.capabilities
    assert offer.sources == {
        "context": "configured",
        "max_output": "discovered",
        "title": "discovered",
        "price": "built-in",
        "capabilities": "discovered",
        "mode": "built-in",
    }
    assert [(one.id, one.origin) for one in offers] == [("gpt-4.1-mini", "configured"), ("new", "discovered")]
    unlisted = offers.facts("p", "gpt-4.1-nano")
    assert unlisted.origin == "built-in" and set(unlisted.sources.values()) == {"built-in"}
    assert offers.facts("p", "nobody-knows").origin is None


def test_a_model_is_offered_by_all_who_list_it_in_the_order_of_the_configuration() -> None:
    shops = {name: Shop("custom", [Written("b")] if name == "z" else []) for name in ("z", "a", "m")}
    offers = Offers(shops, {"a": [Found("x"), Found("b")], "m": [Found("b")]})
    assert offers.providers_of("b") == ("z", "a", "m")
    assert offers.providers_of("x") == ("a",) and offers.providers_of("gpt-4.1") == ()
    assert len(offers) == 4


# How they are asked.


def listing(*ids: str) -> bytes:
    return json_reply(json.dumps({"data": [{"id": name} for name in ids]}).encode())


class Place:
    """A gateway with one provider, whose vendor's list is `page`'s doing."""

    def __init__(self, loop: Loop, script: Script | Callable[[Got], Script], text: str = "", more: str = "") -> None:
        self.loop = loop
        self.vendor = Upstream(loop, script).start()
        self.text = text or f'main: {{vendor: openai, base_url: "{self.vendor.url}", credentials: [provider-key]}}'
        self.text = self.text.replace("URL", self.vendor.url)
        self.gateway = loop.gateway(config(self.text, more))
        stock(loop, self.gateway)

    def refresh(self) -> Any:
        return ask(self.gateway, "POST", "/admin/models/refresh")["providers"]["main"]

    def ids(self) -> list[str]:
        return [entry["id"] for entry in ask(self.gateway, "GET", "/v1/models")["data"]]


def config(providers: str, more: str = "") -> str:
    return (
        'server: {listen: ["127.0.0.1:0"]}\n'
        f"providers:\n  {providers}\n"
        f"{more or 'discovery: {interval: 1h}'}\n"
        "users: {tester: {role: admin, keys: {main: {credential: client-key}}}}\n"
    )


def stock(loop: Loop, running: Running) -> None:
    """Waits for the first round, which a daemon begins by itself."""
    house = running.daemon.house
    until(lambda: house._discovering is not None)
    discovering = house._discovering
    assert discovering is not None
    until(lambda: discovering.rounds, 12)


def ask(running: Running, method: str, path: str) -> Any:
    reply = raw.send(running.port, raw.request(path, key=CLIENT_KEY, method=method), timeout=15)
    assert reply.status == 200, reply.data
    return reply.json


PLACES: list[tuple[str, str, bytes, dict[str, str]]] = [
    ('main: {vendor: openai, base_url: "URL", credentials: [provider-key]}', "openai", b"/v1/models",
     {"authorization": f"Bearer {PROVIDER_KEY}"}),
    ('main: {vendor: anthropic, base_url: "URL", credentials: [provider-key]}', "anthropic", b"/v1/models?limit=1000",
     {"x-api-key": PROVIDER_KEY, "anthropic-version": "2023-06-01"}),
    ('main: {vendor: gemini, base_url: "URL", credentials: [provider-key]}', "gemini", b"/v1beta/models?pageSize=1000",
     {"x-goog-api-key": PROVIDER_KEY}),
    ('main: {vendor: custom, dialects: {openai_chat: "URL/deep"}, auth: none, headers: {X-Mine: "1"}}', "custom",
     b"/deep/v1/models", {"x-mine": "1"}),
    ('main: {vendor: custom, dialects: {anthropic: "URL"}, auth: api-key, credentials: [provider-key]}', "like",
     b"/v1/models", {"api-key": PROVIDER_KEY, "anthropic-version": "2023-06-01"}),
    ('main: {vendor: groq, base_url: "URL/openai/v1", credentials: [provider-key]}', "groq", b"/openai/v1/models",
     {"authorization": f"Bearer {PROVIDER_KEY}"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "target", "headers"), [(p[0], *p[2:]) for p in PLACES], ids=[p[1] for p in PLACES])
def test_a_vendor_is_asked_at_its_own_place_with_the_providers_key(
    loop: Loop, text: str, target: bytes, headers: dict[str, str]
) -> None:
    shop = Place(loop, [listing("one")], text)
    (got,) = shop.vendor.requests
    assert (got.method, got.target) == ("GET", target)
    sent = {name.decode().lower(): value.decode() for name, value in got.headers}
    assert headers.items() <= sent.items() and sent["accept-encoding"] == "identity"
    keys = {"authorization", "x-api-key", "x-goog-api-key", "api-key"}
    assert keys & sent.keys() == keys & headers.keys() and "cookie" not in sent
    assert shop.ids() == ["main/one"]


def test_all_pages_are_fetched(loop: Loop) -> None:
    def script(got: Got) -> Script:
        after = got.target.partition(b"after_id=")[2].decode()
        number = int(after.removeprefix("m") or -1) + 1
        page = {"data": [{"id": f"m{number}"}], "has_more": number < 4, "last_id": f"m{number}"}
        return [json_reply(json.dumps(page).encode())]

    text = 'main: {vendor: anthropic, base_url: "URL", credentials: [provider-key]}'
    assert Place(loop, script, text).ids() == [f"main/m{number}" for number in range(5)]


def test_an_egress_proxy_is_used(loop: Loop) -> None:
    proxy = Upstream(loop, [listing("behind")]).start()
    text = (
        'main: {vendor: openai, base_url: "http://vendor.invalid", credentials: [provider-key], '
        f'proxy: "{proxy.url}"}}'
    )
    assert Place(loop, [], text).ids() == ["main/behind"]
    assert proxy.requests[0].target == b"http://vendor.invalid/v1/models"


HUGE = b'{"data":[' + b'{"id":"m"},' * 1_000_000 + b'{"id":"m"}]}'
HOSTILE: list[tuple[str, Script, str]] = [
    ("html", [json_reply(b"<html><body>Sign in</body></html>")], "its answer is no JSON"),
    ("nothing", [json_reply(b"")], "its answer is no JSON"),
    ("deep", [json_reply(b"[" * 100_000)], "its answer is no JSON"),
    ("wrong types", [json_reply(b'{"data":{"id":"m"},"models":7}')], "its answer holds no list of models"),
    ("no names", [json_reply(b'{"data":[{"id":{}},7,{"id":"\\u001b[2J"}]}')], "its list names no model"),
    ("empty", [json_reply(b'{"data":[]}')], "its list names no model"),
    ("huge", [json_reply(HUGE)], "its list is too large"),
    ("huge, and nobody says so",
     [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", *[b" " * 2**20] * 11], "its list is too large"),
    ("packed", [json_reply(gzip.compress(b" " * 2**20), headers=b"Content-Encoding: gzip\r\n")],
     "its answer is packed, though it was asked not to"),
    ("redirect", [json_reply(b"", status=b"302 Found", headers=b"Location: http://127.0.0.1:1/\r\n")],
     "it answered with status 302"),
    ("refused", [json_reply(b'{"error":"Incorrect API key pk-test-9a3e5c7d"}', status=b"401 Nope")],
     "it answered with status 401"),
    ("down", [json_reply(b"x", status=b"503 No")], "it answered with status 503"),
    ("reset", [Reset()], "the connection broke"),
    ("no HTTP", [b"SSH-2.0-x\r\n\r\n"], "it does not answer in HTTP"),
    ("cut", [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", Pause(0.05), Reset()], "its answer breaks off"),
    ("silent", [Stall()], "it did not answer in time"),
    ("slow", [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", *[b" ", Pause(0.1)] * 10, Stall()],
     "it did not answer in time"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "error"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_an_answer_that_is_no_list_changes_nothing_and_is_told(
    loop: Loop, script: Script, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [listing("one", "two")]
    shop = Place(loop, lambda got: good if got.connection == 1 else script)
    assert shop.ids() == ["main/one", "main/two"]
    monkeypatch.setattr(asking, "SECONDS", 0.5)
    told = shop.refresh()
    assert (told["models"], told["error"]) == (2, error)
    assert shop.ids() == ["main/one", "main/two"]
    (warned,) = until(lambda: warnings(shop.gateway))
    assert (warned["provider"], warned["error"]) == ("main", error)
    assert PROVIDER_KEY not in shop.gateway.log_path.read_text()
    until(shop.gateway.at_rest)


def warnings(running: Running) -> list[Any]:
    return [line for line in running.log() if line["event"] == "discovery" and line["level"] == "warning"]


def test_a_list_that_never_ends_is_cut_and_harms_nothing(loop: Loop) -> None:
    count = iter(range(10**9))

    def script(got: Got) -> Script:
        number = next(count)
        return [json_reply(b'{"models":["m%d"],"nextPageToken":"%d"}' % (number, number))]

    shop = Place(loop, script)
    assert len(shop.vendor.requests) == MOST_PAGES == len(shop.ids())


def test_many_models_of_many_pages_stay_below_the_limit(loop: Loop) -> None:
    def script(got: Got) -> Script:
        number = int(got.target.partition(b"pageToken=")[2] or 0)
        rows = [{"id": f"m{number}-{n}"} for n in range(1999)]
        return [json_reply(json.dumps({"data": rows, "nextPageToken": str(number + 1)}).encode())]

    shop = Place(loop, script)
    assert shop.refresh()["models"] == MOST_MODELS == len(shop.ids())


# What is kept.


def test_the_last_good_list_is_served_after_a_restart_though_the_vendor_is_down(loop: Loop) -> None:
    up = [listing("one")]
    shop = Place(loop, lambda got: up)
    path = shop.gateway.folder / "state.db.models"
    until(path.exists)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PROVIDER_KEY.encode() not in path.read_bytes()
    assert [name for name in os.listdir(path.parent) if name.startswith(path.name)] == [path.name]
    kept = path.read_bytes()
    up[:] = [json_reply(b"x", status=b"500 No")]
    later = loop.gateway(config(shop.text))
    until(lambda: later.daemon.house._discovering and later.daemon.house._discovering.rounds)  # its file is written
    assert ask(later, "GET", "/v1/models")["data"] == []
    restarted(loop, later, kept)
    assert [entry["id"] for entry in ask(later, "GET", "/v1/models")["data"]] == ["main/one"]
    provider = ask(later, "GET", "/admin/providers")["data"][0]
    assert provider["models"] == 1 and provider["discovery"]["error"] == "it answered with status 500"
    assert provider["discovery"]["at"] == orjson.loads(kept)["main"]["at"]


def restarted(loop: Loop, running: Running, kept: bytes) -> None:
    """The same daemon as if it had begun with that file."""

    async def again() -> None:
        house = running.daemon.house
        await house.close()
        (running.folder / "state.db.models").write_bytes(kept)  # after the last word of the one that ends
        await house.stock(running.folder / "state.db", running.daemon._journal)

    loop.run(again())
    stock(loop, running)


@pytest.mark.parametrize(
    "kept",
    [b"", b"{", b"[]", b'{"main":7}', b'{"main":{"home":"x","at":"y","models":[]}}', b'{"main":{"home":7}}', b"\xff"],
    ids=str,
)
def test_a_file_that_is_spoilt_is_passed_over(loop: Loop, kept: bytes) -> None:
    shop = Place(loop, [listing("one")])
    restarted(loop, shop.gateway, kept)
    assert shop.ids() == ["main/one"]


def test_a_file_that_is_none_is_not_read(loop: Loop, tmp_path: Path) -> None:
    shop = Place(loop, [listing("one")])
    path = shop.gateway.folder / "state.db.models"
    target = tmp_path / "elsewhere"
    target.write_bytes(b"precious")
    path.unlink()
    path.symlink_to(target)
    restarted_as_is(loop, shop.gateway)
    assert shop.ids() == ["main/one"]
    assert target.read_bytes() == b"precious" and not path.is_symlink()


def restarted_as_is(loop: Loop, running: Running) -> None:
    async def again() -> None:
        await running.daemon.house.close()
        await running.daemon.house.stock(running.folder / "state.db", running.daemon._journal)

    loop.run(again())
    stock(loop, running)


def test_a_provider_that_moves_begins_without_the_list_of_its_old_place(loop: Loop) -> None:
    shop = Place(loop, [listing("old")])
    other = Upstream(loop, [json_reply(b"x", status=b"500 No")]).start()
    path = shop.gateway.folder / "gproxyd.yaml"
    path.write_text(path.read_text().replace(shop.vendor.url, other.url))
    assert ask(shop.gateway, "POST", "/admin/reload")["reloaded"] is True
    assert shop.ids() == []
    until(lambda: other.requests)
    path.write_text(path.read_text().replace(other.url, shop.vendor.url))
    assert ask(shop.gateway, "POST", "/admin/reload")["reloaded"] is True
    until(lambda: shop.ids() == ["main/old"])


def test_a_provider_that_is_new_is_asked_at_once_and_the_others_keep_their_lists(loop: Loop) -> None:
    shop = Place(loop, [listing("one")])
    other = Upstream(loop, [listing("two")]).start()
    path = shop.gateway.folder / "gproxyd.yaml"
    fresh = f'also: {{vendor: custom, dialects: {{openai_chat: "{other.url}"}}, auth: none}}'
    path.write_text(path.read_text().replace("providers:\n", f"providers:\n  {fresh}\n"))
    assert ask(shop.gateway, "POST", "/admin/reload")["reloaded"] is True
    assert "main/one" in shop.ids()
    until(lambda: sorted(shop.ids()) == ["also/two", "main/one"])
    assert len(shop.vendor.requests) == 1


def test_a_list_that_changes_is_seen_at_the_next_interval(loop: Loop) -> None:
    answers = [listing("one")]
    shop = Place(loop, lambda got: answers, more="discovery: {interval: 200ms}")
    assert shop.ids() == ["main/one"]
    answers[:] = [listing("two")]
    until(lambda: shop.ids() == ["main/two"])


def test_nobody_is_asked_where_discovery_is_off_until_an_administrator_says_so(loop: Loop) -> None:
    vendor = Upstream(loop, [listing("one")]).start()
    text = f'main: {{vendor: openai, base_url: "{vendor.url}", credentials: [provider-key], models: [{{id: own}}]}}'
    gateway = loop.gateway(config(text, "discovery: {enabled: false}"))
    time.sleep(0.2)
    assert not vendor.requests
    assert ask(gateway, "POST", "/admin/models/refresh")["providers"]["main"]["models"] == 1
    assert [entry["id"] for entry in ask(gateway, "GET", "/v1/models")["data"]] == ["main/own", "main/one"]


def test_a_provider_without_its_secret_or_without_a_list_is_not_asked(loop: Loop) -> None:
    vendor = Upstream(loop, [listing("one")]).start()
    text = (
        f'main: {{vendor: openai, base_url: "{vendor.url}", credentials: [nowhere]}}\n'
        f'  jina: {{base_url: "{vendor.url}", credentials: [provider-key]}}'
    )
    gateway = loop.gateway(config(text))
    told = ask(gateway, "POST", "/admin/models/refresh")["providers"]
    assert told["main"]["error"] == "it is switched off: its secret is missing"
    assert told["jina"]["error"] == "its vendor tells no list"
    assert not vendor.requests


def test_vendors_are_asked_at_the_same_time(loop: Loop) -> None:
    slow = [Pause(0.5), listing("one")]
    vendors = [Upstream(loop, slow).start() for _ in range(4)]
    text = "\n".join(
        f'  p{n}: {{vendor: custom, dialects: {{openai_chat: "{one.url}"}}, auth: none}}'
        for n, one in enumerate(vendors)
    )
    gateway = loop.gateway(config(text.strip()))
    stock(loop, gateway)
    began = time.monotonic()
    ask(gateway, "POST", "/admin/models/refresh")
    assert time.monotonic() - began < 1.2


def test_requests_do_not_wait_for_a_vendor_that_is_being_asked(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "SECONDS", 1.0)
    vendor = Upstream(loop, [Stall()]).start()
    text = f'main: {{vendor: openai, base_url: "{vendor.url}", credentials: [provider-key], models: [{{id: own}}]}}'
    gateway = loop.gateway(config(text))
    until(lambda: vendor.requests)
    began = time.monotonic()
    assert [entry["id"] for entry in ask(gateway, "GET", "/v1/models")["data"]] == ["main/own"]
    assert time.monotonic() - began < 0.5


def test_what_was_discovered_is_what_a_request_costs(loop: Loop) -> None:
    row = {"id": "m", "pricing": {"prompt": "0.000001", "completion": "0.000002"}, "context_length": 1234}
    shop = Place(loop, [json_reply(json.dumps({"data": [row]}).encode())])
    facts = shop.gateway.daemon.gateway.snapshot.facts("main", "m", None)
    assert facts.price == Price(parse_usd("1"), parse_usd("2")) and facts.context == 1234
    assert facts.named is False  # a vendor's list must not make labels of metrics
    (shown,) = ask(shop.gateway, "GET", "/admin/models")["data"]
    assert shown["sources"] == {"context": "discovered", "price": "discovered"} and shown["origin"] == "discovered"
