"""Single values of the configuration: what each may be, and how the wrong ones are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gproxyd.config import Config, load
from gproxyd.errors import ConfigError, Problem

VENDORS = {"openai": True, "azure": False}

# Spelled out here once more: a name that falls out of the code's own list would become a provider's.
RESERVED = {
    "v1", "v1beta", "proxy", "admin", "console", "debug", "healthz", "readyz", "statsz", "metrics",
    ".well-known", "api",
}  # fmt: skip

Load = Callable[[str], Config]
Problems = Callable[[str], list[Problem]]


@pytest.fixture
def config_of(tmp_path: Path) -> Load:
    def build(text: str) -> Config:
        path = tmp_path / "gproxyd.yaml"
        path.write_text(text)
        return load(path, vendors=VENDORS)

    return build


@pytest.fixture
def problems_of(config_of: Load) -> Problems:
    def build(text: str) -> list[Problem]:
        with pytest.raises(ConfigError) as caught:
            config_of(text)
        return caught.value.problems

    return build


def provider(text: str) -> str:
    return f"providers:\n  x:\n    vendor: openai\n    {text}\n"


def key(text: str) -> str:
    return f"users:\n  u:\n    keys:\n      k: {{{text}}}\n"


WRONG = [
    ("server: 5", "server", "section"),
    ("server: []", "server", "section"),
    ("providers: [a]", "providers", "section"),
    ("providers: {openai: true}", "providers.openai", "section"),
    ("server: {listen: '127.0.0.1:1'}", "server.listen", "list"),
    ("server: {listen: [5]}", "server.listen[0]", "address to listen on"),
    ("server: {drain: 600}", "server.drain", "duration"),
    ("server: {drain: -1s}", "server.drain", "duration"),
    ("server: {max_body: 0B}", "server.max_body", "larger than 0B"),
    ("server: {max_body: .nan}", "server.max_body", "size"),
    ("server: {listen: ['a:1', 'a:1']}", "server.listen[1]", "already"),
    ("server: {listen: ['a:1'], ops_listen: ['a:1']}", "server.ops_listen[0]", "already"),
    ("chat: {default_stream: yes}", "chat.default_stream", "true or false"),
    ("chat: {default_stream: 1}", "chat.default_stream", "true or false"),
    ("chat: {default_stream: !!bool 1}", "chat.default_stream", "tag"),
    ("redaction: {mode: none}", "redaction", "not a known key"),
    ("aliases: {'': openai/x}\nproviders: {openai: }", "aliases.?", "visible"),
    ("aliases: {a: }", "aliases.a", "provider and a model"),
    ("aliases: {a: openai/}\nproviders: {openai: }", "aliases.a", "provider and a model"),
    ("aliases: {a: openai}\nproviders: {openai: }", "aliases.a", "provider and a model"),
    ("aliases: {a: b, b: openai/x}\nproviders: {openai: }", "aliases.a", "another alias"),
    ("providers: {azure: }", "providers.azure", "base_url"),
    ("providers: {local: {vendor: custom, base_url: 'http://a'}}", "providers.local", "dialects"),
    *((f"providers: {{'{name}': {{vendor: openai}}}}", f"providers.{name}", "path of the gateway")
      for name in sorted(RESERVED - {".well-known"})),
    *((f"providers: {{'{name}': {{vendor: openai}}}}", f"providers.{name}", "no name for a provider")
      for name in ("OpenAI", "a.b", "a/b", "a" * 64)),
    *((f"providers: {{'{name}': {{vendor: openai}}}}", "providers.?", "no name for a provider")
      for name in ("", "-a", "_a", "a b", ".well-known", "é")),
    (provider("auth: basic"), "providers.x.auth", "one of 'none', 'bearer'"),
    (provider("credentials: openai"), "providers.x.credentials", "list"),
    (provider("credentials: [a/b]"), "providers.x.credentials[0]", "name of a secret"),
    (provider("credentials: [sk-abcdefghij0123456789]"), "providers.x.credentials[0]", "looks like a key"),
    (provider("timeouts: {connect: 0s}"), "providers.x.timeouts.connect", "longer than 0s"),
    (provider("models: [{}]"), "providers.x.models[0].id", "required"),
    (provider("models: [{id: 5}]"), "providers.x.models[0].id", "must be text"),
    (provider("models: [{id: a}, {id: a}]"), "providers.x.models[1]", "id of a model above"),
    *((provider(f"models: [{{id: a, context: {text}}}]"), "providers.x.models[0].context", "whole number")
      for text in ('"10"', "1.0", "010", "1_000", "true", ".inf", "10:30")),
    (provider("models: [{id: a, context: -1}]"), "providers.x.models[0].context", "at least 1"),
    (provider(f"models: [{{id: a, context: {'9' * 4000}}}]"), "providers.x.models[0].context", "at most 1000000000"),
    *((provider(f"models: [{{id: a, price: {{input: {text}}}}}]"), "providers.x.models[0].price.input", '"0.40"')
      for text in ("0.40", "1", '"-1"', '"1e3"', '"0.1234567890"', "[]")),
    (provider("dialects: {openai_chta: 'http://a'}"), "providers.x.dialects.openai_chta", "did you mean `openai_chat`"),
    *((provider(f"headers: {{{name}: a}}"), f"providers.x.headers.{name}", "credential")
      for name in ("Authorization", "x-api-key", "X-Goog-Api-Key", "api-key", "cookie", "proxy-authorization")),
    *((provider(f"headers: {{{name}: a}}"), f"providers.x.headers.{name}", "connection")
      for name in ("Host", "content-length", "Connection", "TE", "trailer", "Transfer-Encoding", "upgrade")),
    (provider("headers: {'a b': c}"), "providers.x.headers.?", "no name for a header"),
    *((provider(f"headers: {{a: {text}}}"), "providers.x.headers.a", "printable")
      for text in (r'"a\r\nb: c"', r'"a\0"', r'"a\tb"', "é", "' a'", "'a '")),
    (provider("headers: {x-a: b, X-A: c}"), "providers.x.headers.X-A", "given already"),
    (provider("headers: {a: 5}"), "providers.x.headers.a", "must be text"),
    *((provider(f"proxy: {text}"), "providers.x.proxy", "")
      for text in ("proxy:3128", "http://proxy", "https://p:1", "http://p:1/x", "http://u:p@p:1", "http://169.254.1.1:1")),
    ("users: {'a b': }", "users.?", "no valid name"),
    (key(""), "users.u.keys.k", "exactly one of"),
    ("users: {u: {keys: {k: {credential: a}, l: {credential: a}}}}", "users.u.keys.l", "same key as users.u.keys.k"),
    (key("token: a, credential: b"), "users.u.keys.k", "exactly one of"),
    (key("token: 'a b'"), "users.u.keys.k.token", "visible ASCII"),
    (key("token: 12345"), "users.u.keys.k.token", "in quotes"),
    (key("sha256: abc"), "users.u.keys.k.sha256", "64 hexadecimal digits"),
    *((key(f"token: a, expires_at: {text}"), "users.u.keys.k.expires_at", "RFC 3339")
      for text in ("2027-01-01", "2027-01-01T00:00:00", "2027-13-01T00:00:00Z", "5", "0001-01-01T00:00:00+01:00")),
    *((f"server: {{trusted_proxies: ['{text}']}}", "server.trusted_proxies[0]", "host bits")
      for text in ("10.0.0.1/8", "10.0.0.0/33", "proxy", "", "010.0.0.0/8")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "path", "message"), WRONG)
def test_wrong_values(problems_of: Problems, text: str, path: str, message: str) -> None:
    (problem,) = problems_of(text)
    assert problem.key == path
    assert message in problem.message
    assert problem.line is not None


@pytest.mark.parametrize("text", [
    "8787", ":8787", "localhost", "localhost:", "localhost:x", "localhost:65536", "::1:80", "[::1]", "[::g]:1",
    "127.1:80", "a b:1", "unix:", "unix:rel", "unix:@abstract", "unix:/" + "a" * 107, "*:80",
    "http://a:1", "localhost:８０",
])  # fmt: skip
def test_addresses_that_cannot_be_listened_on(problems_of: Problems, text: str) -> None:
    (problem,) = problems_of(f"server: {{listen: ['{text}']}}")
    assert problem.key == "server.listen[0]"


@pytest.mark.parametrize("text", [
    "a", "//a", "ftp://a", "file:///etc/passwd", "http://", "http:///v1", "http://:80", "http://a:", "http://a:0",
    "http://a:65536", "http://u@a", "http://u:p@a", "http://a?x", "http://a/#x", "http://a\\b", "http://a b", "http://é",
    "http://a/../b", "http://a/%2e%2E/b", "http://a..b", "http://-a", "http://[::1", "http://[fe80::1%25eth0]", "http://a%00",
    "http://2130706433", "http://127.1", "http://0x7f.1", "http://0x7f000001", "http://0177.0.0.1", "http://127.0.0.0x1",
    "http://127.0.0.1.", "http://1.2.3.256", "http://169.254.169.254", "http://169.254.0.1", "http://[fe80::1]",
    "http://[fd00:ec2::254]", "http://[::ffff:169.254.169.254]", "http://[64:ff9b::a9fe:a9fe]", "http://[2002:a9fe:a9fe::]",
    "http://metadata.google.internal", "http://METADATA.google.internal.", "http://0.0.0.0", "http://[::]", "http://0.1.2.3",
    "http://224.0.0.1", "http://[ff02::1]", "http://100.100.100.200",
])  # fmt: skip
def test_urls_that_lead_nowhere_good(problems_of: Problems, text: str) -> None:
    (problem,) = problems_of(provider(f"base_url: '{text}'"))
    assert (problem.line, problem.key) == (4, "providers.x.base_url")


@pytest.mark.parametrize("text", [
    "http://127.0.0.1:8000", "http://localhost", "http://10.0.0.1/v1", "http://192.168.1.1", "http://[fd00::1]:80/x",
    "https://my_container.internal.:8443/a/b", "https://xn--bcher-kva.example", "https://a1.2b", "https://h/p%2Fq/@x",
])  # fmt: skip
def test_urls_that_are_meant(config_of: Load, text: str) -> None:
    assert config_of(provider(f"base_url: '{text}'")).providers["x"].base_url == text
