"""Single values of the configuration: what each may be, and how the wrong ones are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gproxyd.config import Config, RateLimit, Retries, Target, load
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


def price(text: str) -> str:
    return provider(f"models: [{{id: a, price: {{{text}}}}}]")


def alias(text: str) -> str:
    return f"providers: {{openai: }}\naliases: {{a: {text}}}\n"


def user(text: str) -> str:
    return f"users:\n  u:\n    {text}\n"


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
    *((user(f"permissions: ['{text}']"), "users.u.permissions[0]", "* and ?")
      for text in ("", "a b", "a,b é", "a" * 257, "{a}", "!a", "a\\b")),
    (user("permissions: '*'"), "users.u.permissions", "list"),
    (user("permissions: [5]"), "users.u.permissions[0]", "must be text"),
    (user("permissions: [[a]]"), "users.u.permissions[0]", "must be text"),
    (user("rate_limits: {rpm: 1}"), "users.u.rate_limits", "list"),
    *((user(f"rate_limits: [{text}]"), "users.u.rate_limits[0]", "limits nothing")
      for text in ("{}", "{model: a}", "{rpm: 0, tpm: 0}", "null")),
    *((user(f"rate_limits: [{{{kind}: {text}}}]"), f"users.u.rate_limits[0].{kind}", message)
      for kind in ("rpm", "rpd", "tpm", "concurrency")
      for text, message in (("-1", "at least 0"), ("1.5", "whole number"), ("'1'", "whole number"), ("true", "whole"))),
    (user("rate_limits: [{rpm: 1, model: 'a b'}]"), "users.u.rate_limits[0].model", "* and ?"),
    (user("rate_limits: [{rpm: 1, modle: a}]"), "users.u.rate_limits[0].modle", "did you mean `model`"),
    (user("rate_limits: [{rpm: 1}, {model: a, rpm: 1}, {tpm: 1}]"), "users.u.rate_limits[2]", "same models"),
    (user("quota: {}"), "users.u.quota.usd", "required"),
    (user("quota: 5"), "users.u.quota", "section"),
    *((user(f"quota: {{usd: {text}}}"), "users.u.quota.usd", '"0.40"') for text in ("25", "25.0", "'-1'", "$25", "")),
    (user("quota: {usd: '1', period: week}"), "users.u.quota.period", "'day' or 'month'"),
    (user("budget: {usd: '1'}"), "users.u.budget", "not a known key"),
    (key("token: a, quota: {usd: '1'}"), "users.u.keys.k.quota", "not a known key"),
    (key("token: a, budget: {usd: 1}"), "users.u.keys.k.budget.usd", "US dollars"),
    (key("token: a, rate_limits: [{}]"), "users.u.keys.k.rate_limits[0]", "limits nothing"),
    (key("token: a, rate_limits: [{rpm: 1}, {rpm: 2}]"), "users.u.keys.k.rate_limits[1]", "same models"),
    *((key(f"token: a, {name}: {text}"), f"users.u.keys.k.{name}", message)
      for name in ("models", "endpoints", "agents") for text, message in (("[]", "an entry"), ("'*'", "list"))),
    (key("token: a, models: ['a b']"), "users.u.keys.k.models[0]", "* and ?"),
    (key("token: a, agents: ['a*']"), "users.u.keys.k.agents[0]", "client can send"),
    *((key(f"token: a, endpoints: ['{text}']"), "users.u.keys.k.endpoints[0]", "a method in capitals")
      for text in ("", "*", "/v1/models", "GET", "GET v1", "GET  /v1", "get /v1", "GET/v1", "GET /v1 HTTP/1.1", "** /",
                   "GET *", "GET,POST /v1", " GET /v1", "GET /é")),
    (alias("{}"), "aliases.a.target", "required"),
    (alias("{target: openai}"), "aliases.a.target", "provider and a model"),
    (alias("{target: }"), "aliases.a.target", "provider and a model"),
    (alias("{target: opnai/x}"), "aliases.a.target", "did you mean `openai`"),
    (alias("{target: a}"), "aliases.a.target", "another alias"),
    (alias("{target: openai/x, prise: {}}"), "aliases.a.prise", "did you mean `price`"),
    (alias("{target: openai/x, price: '1'}"), "aliases.a.price", "section"),
    (alias("{target: openai/x, price: {input: 1}}"), "aliases.a.price.input", "US dollars"),
    (alias("{target: openai/x, price: {above: [{tokens: 1}, {tokens: 1}]}}"), "aliases.a.price.above[1]", "more"),
    (alias("[openai/x]"), "aliases.a", "provider and a model"),
    (price("above: {tokens: 1}"), "providers.x.models[0].price.above", "list"),
    (price("above: [{input: '1'}]"), "providers.x.models[0].price.above[0].tokens", "required"),
    (price("above: [{tokens: 0}]"), "providers.x.models[0].price.above[0].tokens", "at least 1"),
    (price("above: [{tokens: 1, flex: {}}]"), "providers.x.models[0].price.above[0].flex", "not a known key"),
    (price("above: [{tokens: 2}, {tokens: 1}]"), "providers.x.models[0].price.above[1]", "more tokens"),
    (price("reasoning: 1"), "providers.x.models[0].price.reasoning", "US dollars"),
    (price("flex: {output: 1}"), "providers.x.models[0].price.flex.output", "US dollars"),
    (price("priority: {above: []}"), "providers.x.models[0].price.priority.above", "not a known key"),
    (provider("rate_limits: {rpm: -1}"), "providers.x.rate_limits.rpm", "at least 0"),
    (provider("rate_limits: {tpm: '1'}"), "providers.x.rate_limits.tpm", "whole number"),
    (provider("rate_limits: {rpd: 1}"), "providers.x.rate_limits.rpd", "not a known key"),
    (provider("rate_limits: [{rpm: 1}]"), "providers.x.rate_limits", "section"),
    ("routing: {bare_models: catalogue}", "routing.bare_models", "'reject' or 'catalog'"),
    ("routing: {on_disconnect: stop}", "routing.on_disconnect", "'cancel' or 'drain'"),
    ("routing: {first_token_window: 5}", "routing.first_token_window", "duration"),
    ("routing: {retries: 3}", "routing.retries", "section"),
    ("routing: {retries: {max: -1}}", "routing.retries.max", "at least 0"),
    *((f"routing: {{retries: {{budget: {text}}}}}", "routing.retries.budget", message)
      for text, message in (("'0.1'", "number"), ("true", "number"), (".nan", "number"), (".inf", "number"),
                            ("-0.1", "least 0"), ("1.1", "most 1"), ("10%", "number"))),
    ("breaker: {failures: 0}", "breaker.failures", "at least 1"),
    ("breaker: {open_for: 0s}", "breaker.open_for", "longer than 0s"),
    *((f"state: {{database: {text}}}", "state.database", "absolute path of a file")
      for text in ("/var/lib/x.db", "'sqlite:'", "sqlite:/x.db", "sqlite://x.db", "'sqlite:///'", "'sqlite:////'", "sqlite:///x/",
                   "'sqlite:///:memory:?cache=shared'", "'sqlite:///x.db#a'", "sqlite:///a%2fb", "sqlite:///a/../b",
                   "sqlite:///./b", '"sqlite:///a\\0b"', "postgresql://u:p@h/d", "5", "true", "[]")),
    *((f"server: {{trusted_proxies: ['{text}']}}", "server.trusted_proxies[0]", "host bits")
      for text in ("10.0.0.1/8", "10.0.0.0/33", "proxy", "", "010.0.0.0/8")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "path", "message"), WRONG)
def test_wrong_values(problems_of: Problems, text: str, path: str, message: str) -> None:
    (problem,) = problems_of(text)
    assert problem.key == path
    assert message in problem.message
    assert problem.line is not None


def test_no_wrong_value_is_quoted(problems_of: Problems) -> None:
    """Whatever stands in the wrong place may be a key; these are the places where text is expected."""
    told = problems_of(
        "state: {database: 'postgres://u:pa55word@h/d'}\n"
        "routing: {bare_models: pa55word, retries: {budget: pa55word}}\n"
        "aliases: {a: {target: pa55word}}\n"
        "users: {u: {permissions: [pa55 word], rate_limits: [{model: pa55 word}], quota: {usd: pa55word},\n"
        "  keys: {k: {token: a, endpoints: [pa55word], agents: [pa55 word], budget: {usd: '1', period: pa55word}}}}}\n"
    )
    assert len(told) == 10
    assert not any("pa55" in str(problem) for problem in told)


def test_what_people_may(config_of: Load) -> None:
    config = config_of(
        "users:\n"
        "  ann: {permissions: [openai/*, 'gpt-?', '[x]'], quota: {usd: '25.00'},\n"
        "    rate_limits: [{rpm: 60}, {model: openai/*, rpd: 1, tpm: 2, concurrency: 3}],\n"
        "    keys: {k: {token: a, models: [m], agents: [build],\n"
        "      endpoints: [POST /v1/chat/completions, '* /proxy/openai/*', M-SEARCH /],\n"
        "      rate_limits: [{tpm: 9}], budget: {usd: '0.000000001', period: day}}, l: {token: b}}}\n"
        "  bob: {rate_limits: [], quota: }\n"
    )
    ann, bob = config.users["ann"], config.users["bob"]
    assert ann.permissions == ("openai/*", "gpt-?", "[x]")
    assert ann.rate_limits == (RateLimit(rpm=60), RateLimit(model="openai/*", rpd=1, tpm=2, concurrency=3))
    assert ann.rate_limits[0].model == "*"
    assert ann.quota is not None and (ann.quota.usd, ann.quota.period) == (25 * 10**9, None)
    held, plain = ann.keys["k"], ann.keys["l"]
    assert (held.models, held.agents) == (("m",), ("build",))
    assert held.endpoints == ("POST /v1/chat/completions", "* /proxy/openai/*", "M-SEARCH /")
    assert held.rate_limits == (RateLimit(tpm=9),)
    assert held.budget is not None and (held.budget.usd, held.budget.period) == (1, "day")
    assert (plain.models, plain.endpoints, plain.agents, plain.rate_limits, plain.budget) == (
        None,
        None,
        None,
        (),
        None,
    )
    assert (bob.permissions, bob.rate_limits, bob.quota) == ((), (), None)


def test_a_wrong_key_hides_nothing_of_the_user_around_it(problems_of: Problems) -> None:
    told = problems_of(user("rate_limits: [{}]\n    keys: {k: {token: a, models: []}, l: {sha256: , token: }}"))
    assert [problem.key for problem in told] == ["users.u.rate_limits[0]", "users.u.keys.k.models", "users.u.keys.l"]


@pytest.mark.parametrize(("text", "warned"), [
    ("keys: {k: {credential: c}}", "give it `permissions`"),
    ("role: read-only\n    keys: {k: {credential: c}}", "give it `permissions`"),
    ("keys: {k: {credential: c}}\n    permissions: []", "give it `permissions`"),
    ("permissions: [a]\n    keys: {k: {credential: c}}", None),
    ("role: admin\n    keys: {k: {credential: c}}", None),
    ("role: admin\n    permissions: [a]\n    keys: {k: {credential: c}}", "have no effect"),
    ("role: user", None),
])  # fmt: skip
def test_a_user_whose_keys_may_call_nothing_is_warned_of(config_of: Load, text: str, warned: str | None) -> None:
    warnings = config_of(user(text)).warnings
    assert len(warnings) == (warned is not None)
    assert all(warning.startswith("users.u: ") and str(warned) in warning for warning in warnings)


def test_an_alias_is_a_target_with_or_without_a_price(config_of: Load) -> None:
    aliases = config_of(
        "providers: {openai: }\naliases: {a: openai/x/y, b: {target: openai/x/y, price: {input: '2'}}}"
    ).aliases
    for name in ("a", "b"):
        assert (aliases[name].provider, aliases[name].model, str(aliases[name])) == ("openai", "x/y", "openai/x/y")
        assert aliases[name].target == Target("openai", "x/y")
    own = aliases["b"].price
    assert aliases["a"].price is None
    assert own is not None and (own.input, own.output) == (2 * 10**9, None)


def test_prices_by_length_and_tier(config_of: Load) -> None:
    text = (
        "input: '1.25', reasoning: '3', above: [{tokens: 128000, input: '2'}, {tokens: 200000, cache_write_1h: '4'}], "
        "flex: {input: '0.625'}, priority: {output: '9'}"
    )
    held = config_of(price(text)).providers["x"].models[0].price
    assert held is not None
    assert (held.input, held.output, held.reasoning) == (1_250_000_000, None, 3 * 10**9)
    assert [(tier.tokens, tier.input, tier.cache_write_1h) for tier in held.above] == [
        (128_000, 2 * 10**9, None),
        (200_000, None, 4 * 10**9),
    ]
    assert held.flex is not None and (held.flex.input, held.flex.output) == (625_000_000, None)
    assert held.priority is not None and held.priority.output == 9 * 10**9


def test_limits_towards_a_provider(config_of: Load) -> None:
    limits = config_of(provider("rate_limits: {rpm: 5, concurrency: 2}")).providers["x"].rate_limits
    assert (limits.rpm, limits.tpm, limits.concurrency) == (5, 0, 2)


def test_routing_breaker_and_records(config_of: Load) -> None:
    config = config_of(
        "routing: {on_disconnect: drain, first_token_window: 2s, retries: {max: 0, budget: 1}}\n"
        "breaker: {failures: 2, open_for: 1min}\nrecords: {enable_usage: false, usage_keep: 1d}\n"
    )
    assert (config.routing.on_disconnect, config.routing.bare_models) == ("drain", "reject")
    assert (config.routing.first_token_window, config.routing.retries) == (2.0, Retries(max=0, budget=1.0))
    assert (config.breaker.failures, config.breaker.open_for) == (2, 60.0)
    assert (config.records.enable_usage, config.records.usage_keep, config.records.log_keep) == (
        False,
        86400.0,
        604800.0,
    )
    assert Config().routing.on_disconnect == "cancel"


@pytest.mark.parametrize(("text", "path"), [
    ("sqlite:///var/lib/gproxyd/gproxyd.db", "/var/lib/gproxyd/gproxyd.db"),
    ("sqlite:////var/lib/x.db", "/var/lib/x.db"),
    ("sqlite:///srv/my files/x", "/srv/my files/x"),
    ("sqlite:///srv/bücher.db", "/srv/bücher.db"),
])  # fmt: skip
def test_the_database_is_where_the_configuration_says(config_of: Load, text: str, path: str) -> None:
    state = config_of(f"state: {{database: '{text}'}}").state
    assert state.database == state.path({"STATE_DIRECTORY": "/elsewhere"}) == Path(path)


def test_the_database_is_in_the_state_directory_else_here(config_of: Load) -> None:
    state = config_of("state: {database: null}").state
    assert state.database is None
    assert state.path({"STATE_DIRECTORY": "/var/lib/gproxyd"}) == Path("/var/lib/gproxyd/gproxyd.db")
    assert state.path({"STATE_DIRECTORY": "/a:/b"}) == Path("/a/gproxyd.db")  # systemd.exec(5): separated by colons
    assert state.path({}) == state.path({"STATE_DIRECTORY": ""}) == Path("gproxyd.db")


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
