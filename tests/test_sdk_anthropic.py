"""Anthropic's own SDK through the gateway, in every form of address."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import pytest

from gproxyd.host.demo import DemoVendor, Seen
from gproxyd.host.demo.script import THOUGHTS
from tests.support import sdk
from tests.support.running import CLIENT_KEY, PROVIDER_KEY, Running, until
from tests.support.sdk import Form

SONNET = "claude-3-5-sonnet-latest"
FORMS = sdk.forms("anthropic-main", {SONNET: "smart"})
AGGREGATED, SCOPED = FORMS[0], FORMS[2]
HELLO = [{"role": "user", "content": "Say hello in one short sentence."}]
HELLO_ANSWER = "Hello there, nice to meet you!"
WEATHER = {"role": "user", "content": "What is the weather in Paris?"}
BOTH = {"role": "user", "content": "The weather, please, of both."}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "model": {"type": "string"}}}
ARGUMENTS = {"city": "Paris", "model": "demo"}
TOOLS = [{"name": "get_weather", "input_schema": SCHEMA}]
THINKING = {"type": "enabled", "budget_tokens": 2000}
CUT = {"x-demo-chunk": "3", "x-demo-eol": "crlf"}


@dataclass(frozen=True)
class Front:
    """A client of the gateway in one form of address, and one of the vendor itself."""

    form: Form
    claude: anthropic.Anthropic
    direct: anthropic.Anthropic

    def model(self, upstream: str = SONNET) -> str:
        return self.form.model(upstream)

    def asked(self, messages: list[dict[str, Any]] = HELLO, **more: Any) -> dict[str, Any]:
        return {"model": self.model(), "max_tokens": 4000, "messages": messages, **more}


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    yield from sdk.unset()


@pytest.fixture(scope="module")
def direct(vendor_at: tuple[DemoVendor, str]) -> Iterator[anthropic.Anthropic]:
    asked = {"api_key": PROVIDER_KEY, "default_headers": sdk.DIRECT}
    with anthropic.Anthropic(base_url=vendor_at[1], **asked, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def fronts(gateway: Running, direct: anthropic.Anthropic) -> Iterator[dict[str, Front]]:
    with anthropic.Anthropic(base_url=gateway.url, api_key=CLIENT_KEY, max_retries=0) as client:
        yield {
            form.name: Front(form, client.with_options(base_url=f"{gateway.url}{form.path}"), direct) for form in FORMS
        }


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def front(fronts: dict[str, Front], request: pytest.FixtureRequest) -> Front:
    """Every form, with aliases and without."""
    return fronts[request.param.name]


@pytest.fixture(params=[AGGREGATED, SCOPED], ids=lambda form: form.name)
def side(fronts: dict[str, Front], request: pytest.FixtureRequest) -> Front:
    """Both forms, for what no alias changes."""
    return fronts[request.param.name]


@pytest.fixture
def claude(fronts: dict[str, Front]) -> anthropic.Anthropic:
    return fronts["aggregated"].claude


@pytest.fixture(autouse=True)
def seen(vendor: DemoVendor) -> Iterator[list[Seen]]:
    yield from sdk.recorded(vendor, "x-api-key")


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"messages": HELLO, "system": 'Say "model": "x".'}),
    ("thinking", {"messages": HELLO, "thinking": THINKING}),
    ("tools", {"messages": [BOTH], "tools": TOOLS}),
    ("thinking-tools", {"messages": [WEATHER], "tools": TOOLS, "thinking": {"type": "adaptive"}}),
    ("cut", {"messages": [{"role": "user", "content": "a long story"}], "max_tokens": 2}),
]


@pytest.mark.parametrize("manner", ["plain", "stream", "cut"])
@pytest.mark.parametrize("asked", [call[1] for call in CALLS], ids=[call[0] for call in CALLS])
def test_alike(front: Front, seen: list[Seen], asked: dict[str, Any], manner: str) -> None:
    """What the SDK makes of the gateway's answer and of the vendor's own is the same, but for the model's name."""
    asked = {"max_tokens": 4000} | asked
    if manner != "plain":
        asked |= {"stream": True, "extra_headers": CUT if manner == "cut" else {}}
    told: list[Any] = [
        client.messages.create(model=model, **asked)
        for client, model in ((front.claude, front.model()), (front.direct, SONNET))
    ]
    if manner != "plain":
        told = [list(stream) for stream in told]
        assert told[0][-1].type == "message_stop"
    sdk.assert_alike(*told, sent=front.model(), upstream=SONNET)
    assert len(sdk.parted(told[1])[0]) == 1
    assert (seen[0].method, seen[0].target, seen[0].body) == (seen[1].method, seen[1].target, seen[1].body)


class TestMessages:
    def test_text_and_usage(self, front: Front) -> None:
        told = front.claude.messages.create(**front.asked())
        assert (told.model, told.content[0].text, told.stop_reason) == (front.model(), HELLO_ANSWER, "end_turn")
        spent = told.usage
        assert (spent.input_tokens, spent.cache_creation_input_tokens, spent.cache_read_input_tokens) == (5, 1, 2)
        assert spent.output_tokens == 8

    def test_stream(self, front: Front) -> None:
        with front.claude.messages.stream(**front.asked()) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert (final.model, text, final.usage.output_tokens) == (front.model(), HELLO_ANSWER, 8)

    def test_large_stream(self, front: Front) -> None:
        large = {"x-demo-size": "300000", "x-demo-events": "1000"}
        with front.claude.messages.stream(**front.asked(extra_headers=large)) as stream:
            final = stream.get_final_message()
        assert final.model == front.model() and len(final.content[0].text) == 300_000

    @pytest.mark.parametrize("stream", [False, True])
    def test_thoughts_and_tools(self, front: Front, seen: list[Seen], stream: bool) -> None:
        asked = front.asked([WEATHER], tools=TOOLS, thinking=THINKING)
        if stream:
            with front.claude.messages.stream(**asked) as events:
                told = events.get_final_message()
        else:
            told = front.claude.messages.create(**asked)
        thought, call = told.content
        assert told.stop_reason == "tool_use" and told.model == front.model()
        assert thought.thinking == "".join(THOUGHTS) and call.input == ARGUMENTS
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]}
        turns = [WEATHER, {"role": "assistant", "content": told.content}, result]
        later = front.claude.messages.create(**front.asked(turns, tools=TOOLS, thinking=THINKING))
        assert later.content[-1].text == "The tool answered: sunny"
        again = json.loads(seen[1].body)["messages"][1]["content"]
        assert again[0]["signature"] == thought.signature and again[1]["id"] == call.id

    def test_count_tokens(self, front: Front, seen: list[Seen]) -> None:
        assert front.claude.messages.count_tokens(model=front.model(), messages=HELLO).input_tokens == 8
        assert seen[0].target == b"/v1/messages/count_tokens" and json.loads(seen[0].body)["model"] == SONNET

    def test_headers(self, side: Front, seen: list[Seen]) -> None:
        told = side.claude.messages.with_raw_response.create(
            **side.asked(extra_headers={"anthropic-beta": "one-2025-01-01,two-2025-01-01"})
        )
        headers = told.headers
        assert headers["x-gproxyd-provider"] == "anthropic-main" and headers["x-gproxyd-model"] == SONNET
        assert headers["request-id"] == headers["x-request-id"] and headers["request-id"].startswith("req_")
        assert told.parse()._request_id == headers["request-id"] != headers["x-gproxyd-upstream-request-id"]
        assert headers["anthropic-ratelimit-requests-limit"] == "4000"
        assert "anthropic-organization-id" not in headers and "server" not in headers
        assert seen[0].header("anthropic-beta") == ["one-2025-01-01,two-2025-01-01"]
        assert seen[0].header("anthropic-version") == [side.claude.default_headers["anthropic-version"]]

    def test_beta(self, front: Front, seen: list[Seen]) -> None:
        told = front.claude.beta.messages.create(**front.asked(betas=["one-2025-01-01"]))
        assert told.model == front.model() and seen[0].header("anthropic-beta") == ["one-2025-01-01"]

    @pytest.mark.parametrize("place", ["x-api-key", "Authorization"])
    def test_places_of_the_key(self, front: Front, place: str) -> None:
        """The SDK's older versions sent `api_key` in `x-api-key`; now it is a bearer's, as `auth_token` always was."""
        given = {"x-api-key": CLIENT_KEY, "Authorization": anthropic.Omit()}
        claude = front.claude.with_options(default_headers=given if place == "x-api-key" else {})
        told = claude.messages.with_raw_response.create(**front.asked())
        assert (
            place in told.http_request.headers
            and len({"x-api-key", "authorization"} & set(told.http_request.headers)) == 1
        )
        assert told.parse().model == front.model()
        assert SONNET in {model.id.rpartition("/")[2] for model in claude.models.list()}


class TestModels:
    def test_aggregated(self, claude: anthropic.Anthropic, seen: list[Seen]) -> None:
        names = {model.id: model for model in claude.models.list()}
        assert {f"anthropic-main/{SONNET}", "openai-main/gpt-4.1-mini", "smart", "chat-default"} <= names.keys()
        for name in (f"anthropic-main/{SONNET}", "vertex-main/gemini-1.5-flash", "smart", "chat-default"):
            assert claude.models.retrieve(name) == names[name]
        assert names["smart"].type == "model" and names["smart"].display_name and names["smart"].created_at
        assert not seen

    def test_scoped(self, fronts: dict[str, Front]) -> None:
        claude = fronts["scoped"].claude
        names = {model.id: model for model in claude.models.list()}
        assert {SONNET, "smart"} <= names.keys() and not {"chat-default", f"anthropic-main/{SONNET}"} & names.keys()
        for name in (SONNET, "smart"):
            assert claude.models.retrieve(name) == names[name]

    @pytest.mark.parametrize("limit", [1, 2, 3, 1000])
    def test_pages(self, claude: anthropic.Anthropic, limit: int) -> None:
        whole = [model.id for model in claude.models.list(limit=1000)]
        first = claude.models.list(limit=limit)
        assert len(first.data) == min(limit, len(whole)) and first.has_more == (limit < len(whole))
        assert (first.first_id, first.last_id) == (whole[0], first.data[-1].id)
        assert [model.id for model in claude.models.list(limit=limit)] == whole
        behind = claude.models.list(limit=limit, after_id=whole[1])
        assert [model.id for model in behind.data] == whole[2 : 2 + limit]
        before = claude.models.list(limit=limit, before_id=whole[3])
        assert [model.id for model in before.data] == whole[max(0, 3 - limit) : 3]
        assert before.has_more == (limit < 3)

    @pytest.mark.parametrize(
        "page", [{"limit": 0}, {"limit": -1}, {"after_id": "nobody"}, {"extra_query": {"limit": "x"}}], ids=str
    )
    def test_bad_pages(self, claude: anthropic.Anthropic, page: dict[str, Any]) -> None:
        with pytest.raises(anthropic.BadRequestError, match="invalid_request: ") as caught:
            claude.models.list(**page)
        assert caught.value.type == "invalid_request_error"

    @pytest.mark.parametrize("name", ["nope", "anthropic-main/nope", "nobody/smart"])
    def test_unknown(self, side: Front, name: str) -> None:
        with pytest.raises(anthropic.NotFoundError, match="model_not_found: ") as caught:
            side.claude.models.retrieve(name)
        assert caught.value.type == "not_found_error" and caught.value.request_id.startswith("req_")


Call = Callable[[Front, dict[str, Any]], Any]


def plain(front: Front, more: dict[str, Any]) -> Any:
    return front.claude.messages.create(**(front.asked() | more))


def streamed(front: Front, more: dict[str, Any]) -> Any:
    with front.claude.messages.stream(**(front.asked() | more)) as stream:
        return stream.get_final_message()


def counted(front: Front, more: dict[str, Any]) -> Any:
    return front.claude.messages.count_tokens(**({"model": front.model(), "messages": HELLO} | more))


each_call = pytest.mark.parametrize("call", [plain, streamed, counted])


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind", "word"),
        [
            (400, anthropic.BadRequestError, "invalid_request_error"),
            (403, anthropic.PermissionDeniedError, "permission_error"),
            (404, anthropic.NotFoundError, "not_found_error"),
            (413, anthropic.APIStatusError, "request_too_large"),
            (429, anthropic.RateLimitError, "rate_limit_error"),
            (500, anthropic.InternalServerError, "api_error"),
            (503, anthropic.InternalServerError, "api_error"),
            (529, anthropic.InternalServerError, "overloaded_error"),
        ],
    )
    @each_call
    def test_the_vendors_own(
        self, side: Front, seen: list[Seen], call: Call, status: int, kind: type[anthropic.APIStatusError], word: str
    ) -> None:
        broken = {"extra_headers": {"x-demo-status": str(status)}}
        caught = []
        for front in (side, Front(SCOPED, side.direct, side.direct)):
            with pytest.raises(kind) as raised:
                call(front, broken)
            caught.append(raised.value)
        assert (caught[0].status_code, caught[0].type, caught[0].body) == (status, word, caught[1].body)
        assert caught[0].response.headers.get("retry-after") == ("7" if status == 429 else None)
        assert caught[0].request_id.startswith("req_") and caught[0].request_id != caught[1].request_id
        assert len(seen) == 2

    @each_call
    def test_unknown_model(self, side: Front, call: Call) -> None:
        with pytest.raises(anthropic.NotFoundError, match="model: nope"):
            call(side, {"model": side.model("nope")})

    @each_call
    def test_refused_key(self, side: Front, gateway: Running, call: Call) -> None:
        with pytest.raises(anthropic.InternalServerError, match="upstream_error: upstream_auth") as caught:
            call(side, {"extra_headers": {"x-demo-status": "401"}})
        assert (caught.value.status_code, caught.value.type) == (502, "api_error")
        sdk.told_nothing(caught.value, caught.value.response.text)
        assert sdk.log_line(gateway, caught.value.request_id)["reason"] == "auth"

    @each_call
    def test_wrong_key(self, side: Front, seen: list[Seen], call: Call) -> None:
        stranger = Front(side.form, side.claude.with_options(api_key="ck-wrong"), side.direct)
        with pytest.raises(anthropic.AuthenticationError, match="unauthorized: ") as caught:
            call(stranger, {})
        assert caught.value.type == "authentication_error" and caught.value.request_id.startswith("req_")
        assert caught.value.body["request_id"] == caught.value.request_id
        assert "ck-wrong" not in caught.value.response.text and not seen

    @each_call
    def test_no_prefix(self, fronts: dict[str, Front], seen: list[Seen], call: Call) -> None:
        with pytest.raises(anthropic.BadRequestError) as caught:
            call(fronts["aggregated"], {"model": SONNET})
        assert caught.value.body["error"]["message"].startswith("provider_prefix: ")
        assert caught.value.type == "invalid_request_error" and not seen

    def test_unknown_provider(self, claude: anthropic.Anthropic, gateway: Running) -> None:
        with pytest.raises(anthropic.NotFoundError, match="unknown_provider: ") as caught:
            claude.with_options(base_url=f"{gateway.url}/nobody").messages.create(
                model=SONNET, max_tokens=5, messages=HELLO
            )
        assert caught.value.type == "not_found_error"

    def test_retries(self, fronts: dict[str, Front], seen: list[Seen]) -> None:
        front = fronts["aggregated-alias"]
        with pytest.raises(anthropic.InternalServerError):
            front.claude.with_options(max_retries=1).messages.create(
                **front.asked(extra_headers={"x-demo-status": "529"})
            )
        assert len(seen) == 2


class TestBreaks:
    @pytest.mark.parametrize("how", ["close", "reset"])
    @pytest.mark.parametrize("after", ["1", "4"])
    def test_stream(self, front: Front, how: str, after: str) -> None:
        broken = {"x-demo-fail": how, "x-demo-fail-after": after}
        with (
            front.claude.messages.create(**front.asked(stream=True, extra_headers=broken)) as stream,
            pytest.raises(anthropic.APIStatusError, match="upstream_error: ") as caught,
        ):
            list(stream)
        assert caught.value.type == "api_error" and caught.value.body["request_id"] == caught.value.request_id
        with pytest.raises(anthropic.APIStatusError, match="upstream_error: "):
            streamed(front, {"extra_headers": broken})

    def test_every_whole_event_came(self, front: Front) -> None:
        broken = {"x-demo-fail-after": "5", "x-demo-chunk": "1000000"}
        with front.claude.messages.create(**front.asked(stream=True, extra_headers=broken)) as stream:
            told = [next(stream) for _ in range(4)]  # and a ping, which the SDK keeps to itself
            with pytest.raises(anthropic.APIStatusError, match="upstream_error: "):
                next(stream)
        assert [event.type for event in told] == ["message_start", "content_block_start", *["content_block_delta"] * 2]
        assert told[0].message.model == front.model()

    def test_the_vendors_own_event(self, front: Front) -> None:
        with pytest.raises(anthropic.APIStatusError, match="Overloaded") as caught:
            streamed(front, {"extra_headers": {"x-demo-fail": "error", "x-demo-fail-after": "3"}})
        assert caught.value.type == "overloaded_error"

    def test_by_the_client(self, front: Front, seen: list[Seen]) -> None:
        slow = {"x-demo-event-delay": "1000"}
        with front.claude.messages.create(**front.asked(stream=True, extra_headers=slow)) as stream:
            next(stream)
        assert until(lambda: seen[0].client_gone)

    @pytest.mark.parametrize("after", ["head", "0", "40"])
    @pytest.mark.parametrize("how", ["close", "reset"])
    def test_plain(self, front: Front, after: str, how: str) -> None:
        with pytest.raises(anthropic.InternalServerError, match="upstream_error: ") as caught:
            plain(front, {"extra_headers": {"x-demo-fail": how, "x-demo-fail-after": after}})
        assert (caught.value.status_code, caught.value.type) == (502, "api_error")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_async(gateway: Running, form: Form) -> None:
    async def talk() -> None:
        base = f"{gateway.url}{form.path}"
        async with anthropic.AsyncAnthropic(base_url=base, api_key=CLIENT_KEY, max_retries=0) as claude:
            asked = {"model": form.model(SONNET), "max_tokens": 100, "messages": HELLO}
            told = await claude.messages.create(**asked)
            assert (told.model, told.content[0].text) == (form.model(SONNET), HELLO_ANSWER)

            async def one() -> str:
                async with claude.messages.stream(**asked) as stream:
                    return "".join([text async for text in stream.text_stream])

            assert await asyncio.gather(*(one() for _ in range(8))) == [HELLO_ANSWER] * 8
            with pytest.raises(anthropic.APIStatusError, match="upstream_error"):
                async with claude.messages.stream(**asked, extra_headers={"x-demo-fail-after": "3"}) as stream:
                    await stream.get_final_message()

    asyncio.run(talk())
