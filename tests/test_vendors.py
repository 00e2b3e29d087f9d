"""The table of vendors at work: addresses, keys, headers and quirks against a golden file; Azure, Vertex, custom ones.

`UPDATE=1 pytest tests/test_vendors.py -k golden` writes the golden file anew. Read the difference before you keep it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from urllib.parse import parse_qs

import orjson
import pytest
import yaml
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from gproxyd.config import load
from gproxyd.config.schema import Auth
from gproxyd.dialects import quirks
from gproxyd.errors import Refusal, UpstreamError
from gproxyd.gateway import route
from gproxyd.routing import providers
from gproxyd.routing.credentials import CredentialPool
from gproxyd.routing.providers import Face, Provider
from gproxyd.secrets import Secret
from gproxyd.types import DialectName
from gproxyd.vendors import auth, oauth
from gproxyd.vendors.catalogue import AuthPlace, vendors
from gproxyd.wire import inject, operations, target

GOLDEN = Path(__file__).parent / "golden" / "vendors.yaml"
KEY = "KEY"

FORMS: dict[str, tuple[str, str]] = {name: (name, "") for name in vendors()} | {
    "azure": ("azure", "base_url: https://res.openai.azure.com"),
    "azure, by deployment": (
        "azure",
        "base_url: https://res.openai.azure.com, api_version: 2024-10-21, deployments: {MODEL: mine}",
    ),
    "vertex, with a project": ("vertex", "project: proj"),
    "vertex, with a project in a region": ("vertex", "project: proj, location: europe-west4"),
    "vllm": ("vllm", "base_url: http://127.0.0.1:8000"),
    "custom": ("custom", "dialects: {openai_chat: http://127.0.0.1:8000, gemini: http://127.0.0.1:8001/v1beta}"),
    "custom, with every quirk": (
        "custom",
        "dialects: {openai_chat: http://127.0.0.1:8000/v4}, quirks: {both_keys: true, stream_options: false, "
        "tool_choice_auto: false, reasoning_content: removed, flat_content: true, "
        "limited: [{status: 413, contains: w}], "
        "body_errors: [{at: error.code, limited: [1], refused: [2], failed: [3]}]}",
    ),
}
"""Every vendor in every form: vendor, and what a section says."""

ENDPOINTS: dict[str, dict[str, str]] = {
    "openai_chat": {
        "chat": "/v1/chat/completions",
        "completions": "/v1/completions",
        "embeddings": "/v1/embeddings",
        "moderations": "/v1/moderations",
        "rerank": "/v1/rerank",
        "images": "/v1/images/generations",
        "speech": "/v1/audio/speech",
        "audio": "/v1/audio/transcriptions",
        "files": "/v1/files",
        "batches": "/v1/batches",
    },
    "openai_responses": {"responses": "/v1/responses", "count_tokens": "/v1/responses/input_tokens"},
    "anthropic": {"messages": "/v1/messages", "count_tokens": "/v1/messages/count_tokens"},
    "gemini": {
        "generate": "/v1beta/models/MODEL:generateContent",
        "count_tokens": "/v1beta/models/MODEL:countTokens",
        "embeddings": "/v1beta/models/MODEL:embedContent",
    },
}
STREAMED = {
    "chat": None,
    "completions": None,
    "responses": None,
    "messages": None,
    "generate": "/v1beta/models/MODEL:streamGenerateContent?alt=sse",
}
"""Endpoints that stream, and their path if it is another then."""

CHAT = {
    "model": "MODEL",
    "messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}], "reasoning_content": "r"}],
    "tool_choice": "auto",
}


def section(settings: str, vendor: str = "custom") -> Any:
    """A provider's section, through the real reader."""
    path = Path(os.environ["PYTEST_TMP"]) / "gproxyd.yaml"
    path.write_text(f"providers: {{up: {{vendor: {vendor}, {settings}}}}}\n")
    return load(path, vendors={name: one.base_url is not None for name, one in vendors().items()}).providers["up"]


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))


def provider(vendor: str, settings: str = "") -> Provider:
    told = section(settings, vendor)
    return providers.build("up", told, vendors()[vendor], CredentialPool([Secret("key", KEY)]), usable=True)


def face_of(at_work: Provider, path: str, dialect: DialectName, method: str = "POST") -> tuple[Face, bytes]:
    """The face and the request target for what a client asks for."""
    asked = target.parse(b"/up" + path.encode())
    operation = asked.methods[method]
    admission: Any = SimpleNamespace(target=asked, operation=operation, dialect=dialect)
    own = at_work.endpoints.get(operation.name) if operation.dialect == "openai_chat" else None
    face = own or route._face(admission, at_work)
    return face, face.target(route._rest(admission, "MODEL"), asked.query if asked.marked else None, "MODEL")


def url(at_work: Provider, path: str, dialect: DialectName = "openai_chat") -> str:
    face, whole = face_of(at_work, path, dialect)
    return f"{face.origin}{whole.decode()}"


def lines(at_work: Provider, face: Face) -> str:
    """What a request to this face bears that is not the client's."""
    held = auth.attach(face.auth, KEY, face.origin, at_work.origins) + face.demanded(())
    return "; ".join(held.decode().split("\r\n")[:-1])


def row(at_work: Provider, path: str, dialect: DialectName) -> str:
    face, whole = face_of(at_work, path, dialect)
    return f"POST {face.origin}{whole.decode()} <- {lines(at_work, face)}"


def members(told: Any, path: str = "") -> set[str]:
    if isinstance(told, dict):
        return {one for name, value in told.items() for one in members(value, f"{path}.{name}".lstrip("."))}
    if isinstance(told, list):
        return {one for value in told for one in members(value, f"{path}[]")}
    return {f"{path}={told}"}


def changes(at_work: Provider, *, stream: bool) -> str:
    """What becomes of a chat request on its way."""
    before = CHAT | {"stream": stream}
    body = orjson.dumps(before)
    if stream and at_work.tells_usage:
        body = inject.usage_asked(body, before)
    if at_work.fits:
        body = quirks.fit(body, at_work.quirks)
    was, now = members(before), members(orjson.loads(body))
    return " ".join([*(f"+{one}" for one in sorted(now - was)), *(f"-{one}" for one in sorted(was - now))])


def described(vendor: str, settings: str) -> dict[str, Any]:
    at_work = provider(vendor, settings)
    told: dict[str, Any] = {}
    for dialect, names in sorted((at_work.can or {one: frozenset(ENDPOINTS[one]) for one in at_work.faces}).items()):
        for name in sorted(names):
            path = ENDPOINTS[dialect][name]
            chat = (dialect, name) == ("openai_chat", "chat")
            rows = {name: (path, False)}
            if name in STREAMED:
                rows[f"{name}, streamed"] = (STREAMED[name] or path, True)
            for title, (asked, stream) in rows.items():
                text = row(at_work, asked, dialect)
                if chat and (told_more := changes(at_work, stream=stream)):
                    text += f" {{{told_more}}}"
                told.setdefault(dialect, {})[title] = text
    raw = at_work.raw
    told["raw"] = f"{raw.origin}{raw.root.decode()} <- {lines(at_work, raw)}"
    if (listing := at_work.listing) is not None:
        address = f"GET {listing.face.origin}{listing.face.target(listing.path).decode()}"
        told["list"] = f"{address} <- {lines(at_work, listing.face)} ({listing.shape}, {listing.page})"
    told["limited"] = [f"{one.status} {(one.contains or b'').decode()}".strip() for one in at_work.limited]
    told["refusals"] = [f"{one.status} {(one.contains or b'').decode()}".strip() for one in at_work.refusals]
    for error in at_work.body_errors:
        told[f"errors at {error.at}"] = {
            meaning: " ".join(sorted(getattr(error, meaning))) for meaning in ("limited", "refused", "failed")
        }
    return told


# The table.


def test_every_vendor_in_every_form_is_as_the_golden_file_says() -> None:
    now = {title: described(*form) for title, form in sorted(FORMS.items())}
    text = yaml.safe_dump(now, sort_keys=False, width=400)
    if os.environ.get("UPDATE"):
        GOLDEN.write_text(text)
    was = yaml.safe_load(GOLDEN.read_text())
    assert list(was) == list(now)
    for title, told in now.items():
        assert told == was[title], f"{title} has changed; if that is meant, UPDATE=1 writes it down"


def test_the_vendors_that_are_promised_are_there() -> None:
    promised = """openai anthropic gemini vertex azure deepseek moonshot zai zai-coding groq together mistral xai
        perplexity cohere deepinfra openrouter nvidia qwen minimax sambanova cerebras github fireworks jina voyage
        ollama vllm llamacpp zen custom""".split()  # noqa: SIM905
    assert set(promised) == set(vendors())


def test_every_endpoint_of_the_table_exists_and_every_vendor_says_what_is_not_verified() -> None:
    for name, vendor in vendors().items():
        for dialect, names in vendor.can.items():
            assert names <= ENDPOINTS[dialect].keys(), name
        assert vendor.can or name == "custom"
        assert vendor.unverified is None or vendor.unverified.strip()
        assert vendor.base_url is None or not vendor.base_url.endswith("/")
    for dialect, paths in ENDPOINTS.items():
        for name, path in paths.items():
            version = path[: path.index("/", 1)].encode()
            found = operations.find(version, path[len(version) :].encode())[0]["POST"]
            assert (found.name, found.dialect) == (name, dialect)


def test_the_configuration_knows_every_place_of_a_key() -> None:
    assert set(get_args(Auth)) | {"bearer+x-goog-api-key"} == set(get_args(AuthPlace))


# Addresses.


@pytest.mark.parametrize(
    ("vendor", "base", "path", "whole"),
    [
        ("openai", "http://h:1", "/v1/chat/completions", "http://h:1/v1/chat/completions"),
        ("openai", "http://h:1/v1", "/v1/chat/completions", "http://h:1/v1/chat/completions"),
        ("openai", "http://h:1/x/v4", "/v1/chat/completions", "http://h:1/x/v4/chat/completions"),
        ("groq", "https://api.groq.com/openai/v1", "/v1/chat/completions", "https://api.groq.com/openai/v1/chat/completions"),
        ("zai", "https://open.bigmodel.cn/api/paas/v4", "/v1/chat/completions", "https://open.bigmodel.cn/api/paas/v4/chat/completions"),
        ("zai", "https://open.bigmodel.cn", "/v1/messages", "https://open.bigmodel.cn/api/anthropic/v1/messages"),
        ("azure", "https://r.openai.azure.com/openai/v1", "/v1/responses", "https://r.openai.azure.com/openai/v1/responses"),
        ("cohere", "http://h:1", "/v1/chat/completions", "http://h:1/compatibility/v1/chat/completions"),
        ("cohere", "http://h:1", "/v1/rerank", "http://h:1/v2/rerank"),
        ("jina", "http://h:1", "/v1/embeddings", "http://h:1/v1/embeddings"),
        ("perplexity", "http://h:1", "/v1/chat/completions", "http://h:1/chat/completions"),
        ("gemini", "https://g.test/v1beta/openai", "/v1/chat/completions", "https://g.test/v1beta/openai/chat/completions"),
    ],
)  # fmt: skip
def test_a_configured_address_takes_the_place_of_the_vendors(vendor: str, base: str, path: str, whole: str) -> None:
    dialect: DialectName = "anthropic" if "messages" in path else "openai_chat"
    assert url(provider(vendor, f"base_url: {base}"), path, dialect) == whole


def test_a_vendors_own_second_origin_is_no_foreign_one() -> None:
    for name in ("cohere", "jina"):
        at_work = provider(name)
        for face in (*at_work.faces.values(), *at_work.endpoints.values(), at_work.raw):
            auth.attach(face.auth, KEY, face.origin, at_work.origins)
    elsewhere = provider("jina", "base_url: http://h:1").origins
    assert [str(origin) for origin in elsewhere] == ["http://h:1"]


def test_both_keys_are_sent_where_they_are_wanted_and_nowhere_else() -> None:
    at_work = provider("gemini", "quirks: {both_keys: true}")
    chat, _ = face_of(at_work, "/v1/chat/completions", "openai_chat")
    own, _ = face_of(at_work, "/v1beta/models/m:generateContent", "gemini")
    assert (
        auth.attach(chat.auth, "k", chat.origin, at_work.origins) == b"Authorization: Bearer k\r\nx-goog-api-key: k\r\n"
    )
    assert auth.attach(own.auth, "k", own.origin, at_work.origins) == b"x-goog-api-key: k\r\n"
    assert provider("gemini").faces["openai_chat"].auth == "bearer"


def test_a_header_that_is_demanded_is_sent_only_if_nobody_gave_it() -> None:
    face = provider("anthropic").faces["anthropic"]
    assert face.demanded({b"content-type"}) == b"anthropic-version: 2023-06-01\r\n"
    assert face.demanded({b"anthropic-version"}) == b""
    written = provider("anthropic", "headers: {Anthropic-Version: '2024-01-01'}")
    assert written.faces["anthropic"].demanded(()) == b""
    assert written.header_lines == b"Anthropic-Version: 2024-01-01\r\n"


def test_quirks_of_the_configuration_take_the_place_of_the_vendors_one_by_one() -> None:
    at_work = provider("nvidia", "quirks: {stream_options: true}")
    assert (at_work.tells_usage, at_work.fits, at_work.quirks.tool_choice_auto) == (True, True, False)
    assert not provider("nvidia", "quirks: {stream_options: true, tool_choice_auto: true}").fits
    assert provider("groq", "quirks: {limited: []}").limited == ()
    assert provider("groq", "quirks: {flat_content: true}").limited == vendors()["groq"].quirks.limited


@pytest.mark.parametrize("name", sorted({"openai", "anthropic", "gemini", "deepseek", "groq", "ollama", "custom"}))
def test_most_vendors_cost_no_request_anything(name: str) -> None:
    vendor, settings = FORMS[name]
    at_work = provider(vendor, settings)
    assert (at_work.fits, at_work.mints) == (False, False)


# Azure.


def azure(more: str = "") -> Provider:
    return provider("azure", f"base_url: https://r.openai.azure.com, api_version: 2024-10-21{more}")


def test_a_deployment_stands_in_the_path_by_its_own_name_or_the_models() -> None:
    at_work = azure(", deployments: {gpt-4o: my-4o}")
    face = at_work.faces["openai_chat"]
    assert face.target(b"/chat/completions", None, "gpt-4o") == (
        b"/openai/deployments/my-4o/chat/completions?api-version=2024-10-21"
    )
    assert face.target(b"/embeddings", b"", "ada/2") == b"/openai/deployments/ada%2F2/embeddings?api-version=2024-10-21"
    assert "openai_responses" not in at_work.faces


def test_the_clients_query_stays_and_its_own_version_counts() -> None:
    face = azure().faces["openai_chat"]
    assert face.target(b"/x", b"a=1&b", "m") == b"/openai/deployments/m/x?api-version=2024-10-21&a=1&b"
    assert face.target(b"/x", b"a=1&api-version=2025-01-01", "m") == (
        b"/openai/deployments/m/x?a=1&api-version=2025-01-01"
    )


def test_what_belongs_to_no_deployment_lives_beside_them() -> None:
    assert url(azure(), "/v1/files") == "https://r.openai.azure.com/openai/files?api-version=2024-10-21"


def test_a_deployment_needs_a_model() -> None:
    with pytest.raises(Refusal) as caught:
        azure().faces["openai_chat"].target(b"/chat/completions", None, None)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "model")


# Keys.


def keys(vendor: str, settings: str, *secrets: Secret) -> tuple[list[Any], list[str]]:
    warned: list[str] = []
    told = section(settings, vendor)
    return list(providers.keys_of("up", told, vendors()[vendor], secrets, warned.append)), warned


def test_plain_keys_are_what_they_are() -> None:
    secret = Secret("key", "sk-1")
    assert keys("openai", "", secret) == ([secret], [])
    assert keys("vertex", "", secret) == ([secret], [])


def test_a_service_accounts_key_is_never_sent_as_it_is(account: Account) -> None:
    secret = account.secret()
    for vendor, settings in (("vertex", ""), ("openai", ""), ("vertex", "project: p, auth: x-goog-api-key")):
        found, warned = keys(vendor, settings, secret)
        assert found == []
        assert warned == ["providers.up: the secret google is a service account's; it needs `project`, or that `auth`"]


def test_what_is_no_service_account_is_left_out_and_told_of(account: Account) -> None:
    told = json.loads(account.secret().reveal())
    for wrong in ("sk-canary", "{", "[]", json.dumps(told | {"type": "user"}), json.dumps(told | {"private_key": "x"})):
        found, warned = keys("vertex", "project: p", Secret("google", wrong))
        assert found == []
        assert len(warned) == 1
        assert warned[0].startswith("providers.up: the secret google is no")
        assert "canary" not in warned[0]


@pytest.mark.parametrize("endpoint", ["http://token.example.com/", "ftp://127.0.0.1/", "x", None])
def test_a_token_endpoint_in_the_clear_is_refused(account: Account, endpoint: str | None) -> None:
    told = json.loads(account.secret().reveal()) | {"token_uri": endpoint}
    _, warned = keys("vertex", "project: p", Secret("google", json.dumps(told)))
    assert warned == ["providers.up: the secret google names a token endpoint that is not https"]


def test_settings_that_a_vendor_has_no_place_for_are_told_of() -> None:
    _, warned = keys("openai", "project: p, location: here, deployments: {m: d}")
    assert [sentence.partition(":")[0] for sentence in warned] == [
        "providers.up.deployments",
        "providers.up.location",
        "providers.up.project",
    ]
    assert keys("vertex", "project: p, location: here")[1] == []
    assert keys("azure", "base_url: http://h:1, api_version: v, deployments: {m: d}")[1] == []


# Tokens.


class Account:
    """A service account, and a token endpoint that checks what it is told and answers what a test wants."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.asked: list[dict[str, Any]] = []
        self.proxied: list[str] = []
        self.answer: Callable[[], tuple[int, bytes]] = lambda: self.token(f"ya29.{len(self.asked)}")
        account = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                if self.path.startswith("http"):
                    account.proxied.append(self.path)
                account.asked.append(account.read(body["assertion"][0]))
                assert body["grant_type"] == ["urn:ietf:params:oauth:grant-type:jwt-bearer"]
                status, answer = account.answer()
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", "http://127.0.0.1:9/")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Silence."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def token(self, text: str, seconds: int = 3600) -> tuple[int, bytes]:
        return 200, json.dumps({"access_token": text, "expires_in": seconds, "token_type": "Bearer"}).encode()

    def read(self, assertion: str) -> dict[str, Any]:
        """The claims of an assertion, its signature checked."""
        head, claims, signature = assertion.split(".")
        self._key.public_key().verify(
            _decoded(signature), f"{head}.{claims}".encode(), padding.PKCS1v15(), hashes.SHA256()
        )
        read: dict[str, Any] = json.loads(_decoded(claims))
        return read

    def secret(self, endpoint: str | None = None) -> Secret:
        form = serialization.PrivateFormat.PKCS8
        pem = self._key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()
        told = {
            "type": "service_account",
            "project_id": "proj",
            "private_key_id": "id-1",
            "private_key": pem,
            "client_email": "gate@proj.iam.gserviceaccount.com",
            "token_uri": endpoint or f"{self.url}/token",
        }
        return Secret("google", json.dumps(told))


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


@pytest.fixture(scope="module")
def accounts() -> Iterator[Account]:
    made = Account()
    yield made
    made.close()


@pytest.fixture
def account(accounts: Account) -> Account:
    accounts.asked.clear()
    accounts.proxied.clear()
    accounts.answer = lambda: accounts.token(f"ya29.{len(accounts.asked)}")
    return accounts


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


async def _idle(minted: oauth.ServiceAccount) -> None:
    if minted._fetching is not None:
        await asyncio.wait([minted._fetching])
        await asyncio.sleep(0)  # its end is heard of


def test_a_token_is_fetched_once_and_used_until_shortly_before_its_end(account: Account) -> None:
    clock = Clock()
    minted = oauth.ServiceAccount(account.secret(), now=clock)

    async def run() -> None:
        await asyncio.gather(*(minted.ready() for _ in range(50)))
        assert (minted.reveal(), len(account.asked), minted.fresh) == ("ya29.1", 1, True)
        clock.time += 3600 - oauth.RENEW - 5
        await minted.ready()
        assert len(account.asked) == 1
        clock.time += 10  # due, yet good: nobody waits for its successor
        await minted.ready()
        assert minted.reveal() == "ya29.1"
        await _idle(minted)
        assert (minted.reveal(), len(account.asked)) == ("ya29.2", 2)

    asyncio.run(run())
    claims = account.asked[0]
    assert (claims["iss"], claims["scope"]) == ("gate@proj.iam.gserviceaccount.com", oauth.SCOPE)
    assert claims["aud"] == "https://oauth2.googleapis.com/token"


def test_a_token_that_cannot_be_renewed_is_used_to_its_end_and_no_longer(account: Account) -> None:
    clock = Clock()
    minted = oauth.ServiceAccount(account.secret(), now=clock)

    async def run() -> None:
        await minted.ready()
        account.answer = lambda: (403, b'{"error":"no"}')
        clock.time += 3600 - oauth.RENEW + 1
        for _ in range(20):  # a failing endpoint is not asked again at once
            await minted.ready()
            await _idle(minted)
        assert (minted.reveal(), len(account.asked)) == ("ya29.1", 2)
        clock.time += oauth.RENEW
        with pytest.raises(UpstreamError):
            minted.reveal()
        with pytest.raises(UpstreamError):
            await minted.ready()

    asyncio.run(run())


def test_a_refused_token_is_forgotten(account: Account) -> None:
    minted = oauth.ServiceAccount(account.secret())

    async def run() -> None:
        await minted.ready()
        minted.forget()
        await minted.ready()

    asyncio.run(run())
    assert minted.reveal() == "ya29.2"


def test_waiting_for_a_token_stops_nobody_else(account: Account) -> None:
    def slow() -> tuple[int, bytes]:
        time.sleep(0.3)
        return account.token("ya29.slow")

    account.answer = slow
    minted = oauth.ServiceAccount(account.secret())

    async def run() -> float:
        waiting = asyncio.create_task(minted.ready())
        worst = 0.0
        while not waiting.done():
            before = time.monotonic()
            await asyncio.sleep(0)
            worst = max(worst, time.monotonic() - before)
            await asyncio.sleep(0.005)
        await waiting
        return worst

    assert asyncio.run(run()) < 0.2


def test_one_who_leaves_takes_the_token_from_nobody(account: Account) -> None:
    minted = oauth.ServiceAccount(account.secret())

    async def run() -> None:
        first, second = asyncio.create_task(minted.ready()), asyncio.create_task(minted.ready())
        await asyncio.sleep(0)
        first.cancel()
        await second

    asyncio.run(run())
    assert (minted.reveal(), len(account.asked)) == ("ya29.1", 1)


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (400, b'{"error":"invalid_grant","error_description":"canary"}'),
        (200, b'{"id_token":"canary"}'),
        (200, b"canary"),
        (200, b'{"access_token":"canary\\r\\nx: y","expires_in":3600}'),
        (200, b'{"access_token":"canary"}'),
        (200, b'{"access_token":["canary"],"expires_in":3600}'),
        (307, b"canary"),
    ],
)
def test_what_is_no_token_is_a_failure_that_tells_nothing(account: Account, status: int, answer: bytes) -> None:
    account.answer = lambda: (status, answer)
    minted = oauth.ServiceAccount(account.secret())
    with pytest.raises(UpstreamError) as caught:
        asyncio.run(minted.ready())
    assert str(caught.value) == "no token could be had for the gateway's own service account"
    assert (caught.value.reason, caught.value.code) == ("auth", "upstream_auth")
    assert caught.value.__cause__ is None


def test_an_endpoint_that_is_not_there_is_no_refusal(account: Account) -> None:
    minted = oauth.ServiceAccount(account.secret("http://127.0.0.1:9/token"))
    with pytest.raises(UpstreamError) as caught:
        asyncio.run(minted.ready())
    assert caught.value.reason == "connect"


def test_tokens_are_fetched_through_the_providers_proxy(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    secret = account.secret("http://localhost:1/token")
    found, warned = keys("vertex", f"project: p, proxy: '{account.url}'", secret)
    asyncio.run(found[0].ready())
    assert (account.proxied, warned) == (["http://localhost:1/token"], [])
    direct = oauth.ServiceAccount(account.secret())
    asyncio.run(direct.ready())  # the environment's proxy is nobody's


def test_neither_key_nor_token_shows_up_anywhere(account: Account) -> None:
    minted = oauth.ServiceAccount(account.secret())
    asyncio.run(minted.ready())
    assert (repr(minted), str(minted)) == ("google", "google")
    assert minted.identity == "gate@proj.iam.gserviceaccount.com/id-1"
    with pytest.raises(TypeError):
        minted.__reduce_ex__(4)


def test_a_request_to_vertex_bears_the_token(account: Account) -> None:
    told = section("project: proj, location: europe-west4", "vertex")
    (minted,) = providers.keys_of("up", told, vendors()["vertex"], [account.secret()], pytest.fail)
    assert isinstance(minted, oauth.ServiceAccount)
    asyncio.run(oauth.ready(minted))
    at_work = providers.build("up", told, vendors()["vertex"], CredentialPool([]), usable=True)
    face, whole = face_of(at_work, "/v1beta/models/MODEL:generateContent", "gemini")
    assert at_work.mints
    assert str(face.origin) == "https://europe-west4-aiplatform.googleapis.com"
    assert whole == b"/v1/projects/proj/locations/europe-west4/publishers/google/models/MODEL:generateContent"
    held = auth.attach(face.auth, minted.reveal(), face.origin, at_work.origins)
    assert held == b"Authorization: Bearer ya29.1\r\n"
