"""`GET /v1/models`: what a caller may call, in the caller's dialect, from memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import anthropic
import openai
import orjson
import pytest
from google import genai
from google.genai import types
from hypothesis import given, settings
from hypothesis import strategies as st

from gproxyd.errors import Refusal
from gproxyd.gateway import listing
from gproxyd.gateway.shelves import Alias, Shelves
from gproxyd.policy.callers import Caller, permissions_of
from gproxyd.units import parse_usd
from gproxyd.vendors.discovery import Found
from gproxyd.vendors.offers import Offers, Shop
from gproxyd.vendors.prices import Price
from tests.support import raw, sdk
from tests.support.running import CLIENT_KEY, Loop, Running, until
from tests.support.upstream import Upstream, json_reply

ROWS = [
    {"id": "gpt-4.1-mini", "created": 1744000000},
    {"id": "meta/llama-4:free", "context_length": 1000, "created": 1744000001, "pricing": {"prompt": "0.000001"}},
    *({"id": f"org/model-{number}"} for number in range(70)),
]

CONFIG = """\
server: {{listen: ["127.0.0.1:0"]}}
discovery: {{interval: 1h}}
providers:
  shop: {{vendor: openai, base_url: "{vendor}", credentials: [provider-key], models: [{{id: own, context: 5}}]}}
  bare:
    vendor: custom
    dialects: {{anthropic: "{vendor}"}}
    auth: none
    models: [{{id: own, context: 7, max_output: 3}}]
  off: {{vendor: groq, credentials: [nowhere], models: [{{id: never}}]}}
aliases:
  fast: shop/gpt-4.1-mini
  cheap: {{target: shop/own, price: {{input: "0.01"}}}}
  gone: off/never
agents:
  team/build: {{targets: [shop/own, bare/own]}}
  nobody: {{targets: [off/never]}}
users:
  tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}
  ann: {{role: user, permissions: ["shop/org/*", fast], keys: {{k: {{token: ann-key-12345678}}}}}}
  bob: {{role: user, permissions: ["*"], keys: {{k: {{token: bob-key-12345678, agents: [team/build]}}}}}}
"""


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    yield from sdk.unset()


@pytest.fixture(scope="module")
def shop(loop: Loop) -> Running:
    """A gateway whose vendor lists ROWS."""
    vendor = Upstream(loop, [json_reply(json.dumps({"data": ROWS}).encode())]).start()
    running = loop.gateway(CONFIG.format(vendor=vendor.url))
    until(lambda: len(running.daemon.gateway.snapshot.offers) > 70)
    return running


EVERYTHING = ["shop/own", *(f"shop/{row['id']}" for row in ROWS), "bare/own",
              *(f"bare/{row['id']}" for row in ROWS), "team/build", "fast", "cheap"]  # fmt: skip


def ask(running: Running, path: str, key: str = CLIENT_KEY, status: int = 200, **headers: str) -> Any:
    lines = [(name.replace("_", "-"), value) for name, value in headers.items()]
    reply = raw.send(running.port, raw.request(path, key=key, headers=lines))
    assert reply.status == status, reply.data
    assert reply.header("content-type") == "application/json"
    return reply.json


# The vendors' own libraries.


def test_openais_library_lists_and_retrieves_what_was_discovered(shop: Running) -> None:
    with openai.OpenAI(base_url=f"{shop.url}/v1", api_key=CLIENT_KEY, max_retries=0) as client:
        listed = list(client.models.list())
        assert sorted(model.id for model in listed) == sorted(EVERYTHING)
        for model in listed:
            assert client.models.retrieve(model.id) == model and model.object == "model"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("off/never")


def test_anthropics_library_pages_through_all_and_retrieves_each(shop: Running) -> None:
    with anthropic.Anthropic(base_url=shop.url, api_key=CLIENT_KEY, max_retries=0) as client:
        listed = list(client.models.list())  # 20 a page
        assert sorted(model.id for model in listed) == sorted(EVERYTHING)
        for model in listed:
            assert client.models.retrieve(model.id) == model and model.lifecycle == "active"
        named = {model.id: model for model in listed}
        assert named["shop/meta/llama-4:free"].created_at.year == 2025
        assert named["bare/own"].max_input_tokens == 7 and named["bare/own"].max_tokens == 3


@pytest.mark.parametrize("version", ["v1beta", "v1"])
def test_googles_library_pages_through_all_and_retrieves_each(shop: Running, version: str) -> None:
    options = types.HttpOptions(base_url=shop.url, api_version=version)
    with genai.Client(api_key=CLIENT_KEY, http_options=options) as client:
        listed = list(client.models.list(config={"page_size": 40}))
        assert sorted(model.name or "" for model in listed) == sorted(f"models/{name}" for name in EVERYTHING)
        for model in listed:
            assert client.models.get(model=model.name or "") == model


def test_the_scoped_form_calls_models_by_their_own_names(shop: Running) -> None:
    with openai.OpenAI(base_url=f"{shop.url}/shop/v1", api_key=CLIENT_KEY, max_retries=0) as client:
        listed = {model.id: model for model in client.models.list()}
        assert listed.keys() == {"own", *(row["id"] for row in ROWS), "fast", "cheap"}
        for name in ("meta/llama-4:free", "own", "fast"):
            assert client.models.retrieve(name) == listed[name]
    assert ask(shop, "/off/v1/models")["data"] == []


# What is told.


def test_a_model_bears_what_is_known_of_it(shop: Running) -> None:
    told = ask(shop, "/v1/models/shop/gpt-4.1-mini")
    assert told["owned_by"] == "shop" and told["created"] == 1744000000
    assert told["context_window"] == 1047576 and told["max_output_tokens"] == 32768
    assert {"tools", "vision"} <= set(told["capabilities"])
    assert told["pricing"]["input"] == "0.40" and told["pricing"]["unit"] == "usd_per_million_tokens"
    assert ask(shop, "/v1/models/fast") == {**told, "id": "fast", "alias_of": "shop/gpt-4.1-mini"}
    assert ask(shop, "/v1/models/cheap")["pricing"]["input"] == "0.01"
    assert ask(shop, "/v1/models/shop/meta/llama-4:free")["pricing"]["input"] == "1.00"
    assert "pricing" not in ask(shop, "/v1/models/shop/own")


def test_an_agent_promises_what_all_its_targets_can(shop: Running) -> None:
    told = ask(shop, "/v1/models/team/build")
    assert told == {"id": "team/build", "object": "model", "created": 0, "owned_by": "gproxyd", "context_window": 5}
    ask(shop, "/v1/models/nobody", status=404)


@pytest.mark.parametrize("path", ["/v1/models/shop/meta/llama-4:free", "/v1/models/shop%2Fmeta%2fllama-4%3Afree"])
def test_an_id_with_slashes_is_found_however_it_is_encoded(shop: Running, path: str) -> None:
    assert ask(shop, path)["id"] == "shop/meta/llama-4:free"
    assert ask(shop, path.replace("/v1/", "/v1beta/"))["name"] == "models/shop/meta/llama-4:free"
    assert ask(shop, path, anthropic_version="2023-06-01")["type"] == "model"


def test_the_headers_choose_the_dialect(shop: Running) -> None:
    assert ask(shop, "/v1/models")["object"] == "list"
    assert ask(shop, "/v1/models", anthropic_version="2023-06-01").keys() == {"data", "first_id", "last_id", "has_more"}
    reply = raw.send(shop.port, raw.request("/v1/models", key=None, headers=[("x-api-key", CLIENT_KEY)]))
    assert reply.json["has_more"] is True and len(reply.json["data"]) == 20
    assert ask(shop, "/v1beta/models?pageSize=3").keys() == {"models", "nextPageToken"}


def test_a_caller_sees_what_the_caller_may_call_and_nothing_else(shop: Running) -> None:
    ann = {entry["id"] for entry in ask(shop, "/v1/models", "ann-key-12345678")["data"]}
    assert ann == {"fast", *(f"shop/org/model-{number}" for number in range(70))}
    assert [entry["id"] for entry in ask(shop, "/v1/models", "bob-key-12345678")["data"]] == ["team/build"]
    ask(shop, "/v1/models/shop/own", "ann-key-12345678", 404)
    ask(shop, "/v1/models/shop/org/model-1", "ann-key-12345678")


def test_the_list_changes_with_the_people(shop: Running) -> None:
    path = shop.folder / "gproxyd.yaml"
    before = path.read_text()
    try:
        path.write_text(before.replace('permissions: ["shop/org/*", fast]', "permissions: [cheap]"))
        raw.send(shop.port, raw.request("/admin/reload", key=CLIENT_KEY, method="POST"))
        assert [entry["id"] for entry in ask(shop, "/v1/models", "ann-key-12345678")["data"]] == ["cheap"]
    finally:
        path.write_text(before)
        raw.send(shop.port, raw.request("/admin/reload", key=CLIENT_KEY, method="POST"))
    assert len(ask(shop, "/v1/models", "ann-key-12345678")["data"]) == 71


def test_administrators_see_who_said_what(shop: Running) -> None:
    rows: dict[str, Any] = {row["id"]: row for row in ask(shop, "/admin/models?limit=1000")["data"]}
    assert rows.keys() == set(EVERYTHING)
    assert rows["shop/gpt-4.1-mini"]["sources"]["price"] == "built-in" and rows["fast"]["origin"] == "configured"
    assert rows["shop/meta/llama-4:free"]["sources"] == {
        "context": "discovered",
        "price": "discovered",
        "created": "discovered",
    }
    assert rows["shop/own"]["sources"] == {"context": "configured"}
    assert rows["cheap"]["sources"] == {"context": "configured", "price": "configured"}
    assert rows["cheap"]["price"] == {"input": "0.01"}
    (one,) = [row for row in ask(shop, "/admin/providers")["data"] if row["name"] == "shop"]
    assert one["models"] == 73 and one["discovery"]["models"] == 72 and one["discovery"]["error"] is None


# Without a network.

ALL = Caller("root", "k", "admin", permissions=permissions_of("admin", (), None))


def caller(globs: Sequence[str], models: Sequence[str] | None = None, agents: tuple[str, ...] | None = None) -> Caller:
    return Caller("u", "k", "user", permissions=permissions_of("user", globs, models), agents=agents)


def laid_out(found: dict[str, list[Found]], **more: Any) -> Any:
    offers = Offers({name: Shop("custom") for name in found}, found)
    aliases, agents = more.get("aliases", {}), more.get("agents", {})
    return SimpleNamespace(shelves=Shelves(offers, aliases, agents, more.get("usable", lambda name: True)))


def answer(
    snapshot: Any, who: Caller, provider: str | None = None, query: bytes = b"", dialect: Any = "openai_chat"
) -> Any:
    return orjson.loads(orjson.dumps(listing.answer(snapshot, who, provider, None, dialect, query)))


def ids(snapshot: Any, who: Caller, provider: str | None = None) -> list[str]:
    return [entry["id"] for entry in answer(snapshot, who, provider)["data"]]


PIECE = st.sampled_from(["a", "b", "ab", "a/b", "p", "q", "p/a"])
GLOB = st.lists(st.sampled_from(["a", "b", "p", "q", "/", "*", "?"]), min_size=1, max_size=5).map("".join)


@settings(max_examples=300)
@given(
    models=st.lists(PIECE, unique=True),
    aliases=st.dictionaries(PIECE, st.builds(Alias, st.sampled_from(["p", "q"]), PIECE), max_size=3),
    agents=st.dictionaries(st.sampled_from(["agent", "a", "p/a"]), st.just([("p", "a")]), max_size=2),
    globs=st.lists(GLOB, max_size=3),
    narrowed=st.none() | st.lists(GLOB, min_size=1, max_size=2),
    only=st.none() | st.just(("agent",)),
)
def test_the_list_is_exactly_what_the_permissions_allow(
    models: list[str], aliases: Any, agents: Any, globs: list[str], narrowed: Any, only: Any
) -> None:
    snapshot = laid_out({name: [Found(one) for one in models] for name in ("p", "q")}, aliases=aliases, agents=agents)
    who = caller(globs, narrowed, only)
    everything = {*(f"{home}/{one}" for home in ("p", "q") for one in models), *aliases, *agents}
    for _ in range(2):  # the second time from memory
        listed = ids(snapshot, who)
        assert len(listed) == len(set(listed))
        assert set(listed) == {name for name in everything if who.may_model(name)}
    scoped = {*models, *(name for name, alias in aliases.items() if alias.provider == "p")}
    mine = {name for name, alias in aliases.items() if alias.provider == "p"}
    expected = {name for name in scoped if who.may_model(f"p/{name}") or (name in mine and who.may_model(name))}
    assert set(ids(snapshot, who, "p")) == expected
    for name in everything:
        if who.may_model(name):
            assert listing.answer(snapshot, who, None, name.encode(), "openai_chat", b"")
        else:
            with pytest.raises(Refusal, match="model_not_found"):
                listing.answer(snapshot, who, None, name.encode(), "openai_chat", b"")


def test_a_name_that_means_two_things_is_listed_once_as_what_a_request_would_reach() -> None:
    found = {"p": [Found("m", context=1), Found("t", context=2)]}
    aliases = {"p/m": Alias("p", "t"), "m": Alias("p", "t"), "x": Alias("p", "m")}
    snapshot = laid_out(found, aliases=aliases, agents={"x": [("p", "m")], "m": [("p", "m")]})
    told = {entry["id"]: entry.get("alias_of") for entry in answer(snapshot, ALL)["data"]}
    assert told == {"p/m": "p/t", "p/t": None, "m": "p/t", "x": "p/m"}
    scoped = {entry["id"]: entry["context_window"] for entry in answer(snapshot, ALL, "p")["data"]}
    assert scoped == {"m": 2, "t": 2, "p/m": 2, "x": 1}


def test_what_is_switched_off_is_not_listed() -> None:
    found = {"p": [Found("m")], "q": [Found("m")]}
    snapshot = laid_out(
        found,
        aliases={"a": Alias("q", "m"), "b": Alias("p", "m")},
        agents={"one": [("q", "m")], "both": [("q", "m"), ("p", "m")], "none": []},
        usable=lambda name: name == "p",
    )
    assert ids(snapshot, ALL) == ["p/m", "both", "b"]
    assert ids(snapshot, ALL, "q") == []


def test_a_title_cannot_leave_its_place() -> None:
    snapshot = laid_out({"p": [Found("m", title='"},{"id":"evil')]})
    (entry,) = answer(snapshot, ALL, dialect="anthropic")["data"]
    assert (entry["id"], entry["display_name"]) == ("p/m", '"},{"id":"evil')
    (entry,) = answer(snapshot, ALL, dialect="gemini")["models"]
    assert (entry["name"], entry["displayName"]) == ("models/p/m", '"},{"id":"evil')


PRICE = Price(parse_usd("1"), parse_usd("2"))


def _model(home: int, number: int) -> Found:
    return Found(f"org/model-{home}-{number}", 9999, 100, PRICE, f"Model {number}", number + 1, frozenset({"tools"}))


MANY = {f"p{home}": [_model(home, number) for number in range(1000)] for home in range(3)}


@pytest.mark.parametrize("dialect", ["openai_chat", "anthropic", "gemini"])
@pytest.mark.parametrize("globs", [["p0/*", "p1/*", "p2/*"], ["*/model-1-*", "p0/*"], ["x"]], ids=str)
def test_three_thousand_models_take_less_than_two_milliseconds(globs: list[str], dialect: str) -> None:
    snapshot, who = laid_out(MANY), caller(globs)
    query = {"anthropic": b"limit=1000", "gemini": b"pageSize=1000"}.get(dialect, b"")
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        body = orjson.dumps(listing.answer(snapshot, who, None, None, dialect, query))  # type: ignore[arg-type]
        taken.append(time.perf_counter() - began)
    assert len(orjson.loads(body).get("data", orjson.loads(body).get("models"))) == (0 if globs == ["x"] else
        {"openai_chat": 3000 if len(globs) == 3 else 2000}.get(dialect, 1000))  # fmt: skip
    assert sorted(taken)[10] < 0.002, taken


def test_what_is_remembered_of_callers_is_bounded() -> None:
    snapshot = laid_out({"p": [Found("m")]})
    for number in range(2000):
        ids(snapshot, caller([f"p/{number}"]))
    assert len(snapshot.shelves.everything._chosen) <= 256
