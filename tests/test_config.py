"""The loader: what it accepts, what it refuses and where, and what it never says."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gproxyd.config import Alias, Config, ListenAddress, Target, default_path, load, source
from gproxyd.errors import ConfigError, Problem

VENDORS = {"openai": True, "anthropic": True, "azure": False}
CANARY = "sk-canary-7Qz1"

Load = Callable[[str], Config]
Problems = Callable[[str], list[Problem]]


class PurePython(source.CoreSchema, yaml.SafeLoader):
    """The loader where PyYAML was built without libyaml."""


@pytest.fixture(params=[source.Loader, PurePython], autouse=True)
def _both_loaders(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "Loader", request.param)


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


def short(problems: list[Problem]) -> list[tuple[int | None, str]]:
    return [(problem.line, problem.key) for problem in problems]


def test_an_empty_file_means_the_defaults(config_of: Load) -> None:
    for text in ("", "# nothing\n", "---\n", "null\n", "{}", "server:\nproviders:\nusers:\n"):
        assert config_of(text) == Config()
    config = Config()
    assert config.server.listen == (ListenAddress("127.0.0.1", 8787),)
    assert (config.server.max_body, config.server.max_upload, config.server.drain) == (2**26, 2**31, 600.0)
    assert (config.log.level, config.log.format, config.chat.default_stream) == ("info", "auto", False)
    assert config.streams.keepalive == 15.0


FULL = """
server: {listen: ["0.0.0.0:80", "[::1]:0", "unix:/run/g.sock"], max_body: 1KiB, trusted_proxies: [10.0.0.0/8, "::1"]}
endpoints: {files: openai, rerank: other}
providers:
  openai:
  other:
    vendor: azure
    base_url: HTTPS://Example.COM:8443/v1/
    auth: api-key
    credentials: [one, two]
    models:
      - {id: gpt/x:1, context: 128000, max_output: 0x1000, price: {input: "0.40", cache_write_1h: "0.000000001"}}
    timeouts: {first_byte: 1.5s}
    headers: {X-Team: "a b"}
    proxy: http://proxy:3128/
  local: {vendor: custom, auth: none, dialects: {openai_chat: "http://[::1]:8000", gemini: "http://10.1.2.3"}}
aliases: {"chat:default": other/gpt/x:1}
users:
  alice:
    role: read-only
    permissions: ["*"]
    keys:
      a: {credential: alice-a, expires_at: 2027-01-01T01:00:00+01:00}
      b: {sha256: "%s", enabled: false}
      c: {token: sk-plain}
  bob:
"""


def test_values_are_held_as_callers_want_them(config_of: Load) -> None:
    config = config_of(FULL % ("AB" * 32))
    assert list(map(str, config.server.listen)) == ["0.0.0.0:80", "[::1]:0", "unix:/run/g.sock"]
    assert config.server.listen[1:] == (ListenAddress("::1", 0), ListenAddress(path="/run/g.sock"))
    assert config.server.trusted_proxies == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))
    plain, other, local = (config.providers[name] for name in ("openai", "other", "local"))
    assert (plain.vendor, plain.credentials, plain.auth, plain.base_url) == ("openai", ("openai",), None, None)
    assert (other.vendor, other.credentials, other.auth) == ("azure", ("one", "two"), "api-key")
    assert (other.base_url, other.proxy) == ("https://example.com:8443/v1", "http://proxy:3128")
    assert (other.timeouts.connect, other.timeouts.first_byte, other.timeouts.idle) == (10.0, 1.5, 300.0)
    assert dict(other.headers) == {"X-Team": "a b"}
    (model,) = other.models
    assert (model.id, model.context, model.max_output) == ("gpt/x:1", 128_000, 4096)
    assert model.price is not None
    assert (model.price.input, model.price.output, model.price.cache_write_1h) == (400_000_000, None, 1)
    assert dict(local.dialects) == {"openai_chat": "http://[::1]:8000", "gemini": "http://10.1.2.3"}
    assert config.aliases["chat:default"] == Alias(target=Target("other", "gpt/x:1"))
    alice = config.users["alice"]
    assert (alice.role, config.users["bob"].role, dict(config.users["bob"].keys)) == ("read-only", "user", {})
    a, b, c = (alice.keys[name] for name in "abc")
    assert (a.credential, a.digest, a.expires_at) == ("alice-a", None, datetime(2027, 1, 1, tzinfo=UTC))
    assert a.expired(datetime(2027, 1, 1, tzinfo=UTC)) and not a.expired(datetime(2026, 12, 31, tzinfo=UTC))
    assert (b.digest, b.enabled, b.expired(datetime.now(UTC))) == (b"\xab" * 32, False, False)
    assert c.digest == hashlib.sha256(b"sk-plain").digest()
    (warning,) = config.warnings
    assert warning.startswith("users.alice.keys.c: ") and "plain" in warning
    assert "sk-plain" not in warning + repr(config) + str(config.model_dump())


MANY = """\
server:
  listen: ["127.0.0.1:8787", ":80"]
  max_bdy: 1MiB
log: {level: loud}
log: {level: info}
streams:
  keepalive: 15
endpoints: {files: openaii}
providers:
  openai:
    timeouts:
      connect: 10
    rate_limt: {}
    region: eu
  v1: {vendor: openai}
  local: {vendor: custom}
  openia:
aliases:
  a: openai/gpt
  b: nobody/gpt
  c: a
users:
  bob:
    keys:
      x: {token: abc}
      y: {token: abc}
      z: {enabled: "yes"}
  primary: {role: user}
"""


def test_all_problems_are_told_at_once_in_file_order(problems_of: Problems) -> None:
    problems = problems_of(MANY)
    assert short(problems) == [
        (2, "server.listen[1]"),
        (3, "server.max_bdy"),
        (4, "log.level"),
        (5, "log"),
        (7, "streams.keepalive"),
        (8, "endpoints.files"),
        (12, "providers.openai.timeouts.connect"),
        (13, "providers.openai.rate_limt"),
        (14, "providers.openai.region"),
        (15, "providers.v1"),
        (16, "providers.local"),
        (17, "providers.openia.vendor"),
        (20, "aliases.b"),
        (21, "aliases.c"),
        (26, "users.bob.keys.y"),
        (27, "users.bob.keys.z.enabled"),
        (28, "users.primary"),
    ]
    told = {problem.key: problem.message for problem in problems}
    assert told["server.max_bdy"] == "is not a known key; did you mean `max_body`?"
    assert told["log"] == "is given twice; the first is on line 4"
    assert told["log.level"] == "must be one of 'debug', 'info', 'warning' or 'error'"
    assert told["endpoints.files"] == "names a provider that is not configured; did you mean `openai`?"
    assert told["providers.openai.rate_limt"] == "is not a known key; did you mean `rate_limits`?"
    assert "known here: api_version, auth, base_url" in told["providers.openai.region"]
    assert told["providers.openia.vendor"].endswith("did you mean `openai`?")
    assert "openai_chat" in told["providers.local"]
    assert told["users.bob.keys.y"].startswith("is the same key as users.bob.keys.x")
    assert all(problem.file.endswith("/gproxyd.yaml") for problem in problems)


SYNTAX = [
    ("a: 'x\nb: 1\n", "quote is not closed"),
    ("a: [1, 2\nb: 3\n", "bracket"),
    ("a: {x: 1\n", "bracket"),
    ("a: b: c\n", "a key stands where none may"),
    ("a:\n\t- x\n", "tab"),
    ("a: @x\n", "needs quotes"),
    ("a: *nowhere\n", "anchor"),
    ("a: 1\n---\nb: 1\n", "several documents"),
    ('a: "\\q"\n', "escape"),
    ("a: !nope!x 1\n", "not valid YAML"),
    ("a: \x07\n", "control character"),
    ("- a\n", "must hold a mapping"),
    ("text\n", "must hold a mapping"),
]


@pytest.mark.parametrize(("text", "message"), SYNTAX)
def test_broken_yaml_is_one_problem_and_quotes_nothing(problems_of: Problems, text: str, message: str) -> None:
    (problem,) = problems_of(text.replace("x", CANARY).replace("nowhere", CANARY).replace("nope", CANARY))
    assert message in problem.message
    assert "canary" not in str(problem)
    assert "mapping" in problem.message or problem.line in {1, 2, 3}


HOSTILE = [
    ("log: !!python/object/apply:os.system ['true']", (1, "log"), "tag"),
    ("log:\n  level: !!python/name:os.system", (2, "log.level"), "tag"),
    ("log: {level: !secret x}", (1, "log.level"), "tag"),
    ("streams: {keepalive: !!timestamp 2027-01-01}", (1, "streams.keepalive"), "tag"),
    ("streams: {keepalive: " + "9" * 5000 + "}", (1, "streams.keepalive"), "number"),
    ("log: &a\n  - *a", (1, ""), "nests deeper"),
    ("a: " + "[" * 100_000, (1, ""), "nests deeper"),
    ("a: " + "{a: " * 40 + "}" * 40, (1, ""), "nests deeper"),
    ("a: &a [" + "x, " * 999 + "]\nb: &b [" + "*a, " * 999 + "]\nc: [*b]", (1, ""), "more than"),
    ("log: {[a]: b}", (1, "log"), "not plain text"),
    ("users:\n  <<: {a: }", (2, "users"), "'<<'"),
    ("users: {1: , '1': }", (1, "users.1"), "twice"),
]


@pytest.mark.parametrize(("text", "where", "message"), HOSTILE)
def test_hostile_yaml(problems_of: Problems, text: str, where: tuple[int, str], message: str) -> None:
    (problem,) = problems_of(text)
    assert (problem.line, problem.key) == where
    assert message in problem.message


def test_plain_scalars_follow_the_core_schema(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "{a: yes, b: on, c: 10:30, d: 2027-01-01T00:00:00Z, e: 1_000, f: 010, g: 'true', h: 0b1, i: +.inf, "
        "j: [true, ~, null, -5, 0x1F, 0o17, 1.5, 1e3, ], k: *x, on: 1, null: 2, 3: &x 4}".replace("k: *x, ", "")
    )
    read = source.read(path)
    assert read.flaws == []
    assert read.data == {
        "a": "yes", "b": "on", "c": "10:30", "d": "2027-01-01T00:00:00Z", "e": "1_000", "f": "010", "g": "true",
        "h": "0b1", "i": float("inf"), "j": [True, None, None, -5, 31, 15, 1.5, 1000.0], "on": 1, "null": 2, "3": 4,
    }  # fmt: skip


def test_anchors_may_be_used(config_of: Load) -> None:
    config = config_of("providers:\n  openai: &p {timeouts: {idle: 1s}}\n  anthropic: *p\n")
    assert config.providers["anthropic"].timeouts.idle == config.providers["openai"].timeouts.idle == 1.0
    assert config.providers["anthropic"].vendor == "anthropic"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    big, latin, bom, folder = (tmp_path / name for name in ("big", "latin", "bom", "folder"))
    big.write_bytes(b"#" * (source.MAX_BYTES + 1))
    latin.write_bytes(b"log: {}\n# \xe9\n")
    bom.write_bytes(b"\xef\xbb\xbflog: {}\n")
    (folder / "conf.d" / "a.yaml").mkdir(parents=True)
    assert load(bom, vendors=VENDORS) == Config()
    told = {}
    for path in (big, latin, folder, tmp_path / "none", Path("nul\0")):
        with pytest.raises(ConfigError) as caught:
            load(path, vendors=VENDORS)
        told[path.name] = [str(problem) for problem in caught.value.problems]
    assert told["big"] == [f"{big}: is larger than 4 MiB"]
    assert told["latin"] == [f"{latin}:2: is not UTF-8 text"]
    assert told["none"] == [f"{tmp_path}/none: cannot be read: No such file or directory"]
    assert told["folder"] == [
        f"{folder}/gproxyd.yaml: cannot be read: No such file or directory",
        f"{folder}/conf.d/a.yaml: cannot be read: Is a directory",
    ]
    assert len(told["nul\0"]) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def build(**files: str) -> Path:
        (tmp_path / "conf.d").mkdir()
        for name, text in files.items():
            main = name == "main"
            path = tmp_path / "gproxyd.yaml" if main else tmp_path / "conf.d" / f"{name.replace('_', '.')}.yaml"
            path.write_text(text)
        return tmp_path

    return build


def test_a_directory_is_merged_in_the_order_of_names(folder: Callable[..., Path]) -> None:
    path = folder(
        main="server: {listen: ['a:1', 'b:2'], drain: 1s}\nlog: {level: error}\nproviders: {openai: {auth: bearer}}",
        b20="log: {level: debug}\nserver: {drain: 3s}\nproviders:\n",
        b10="log: {level: warning, format: json}\nserver: {drain: 2s, listen: ['c:3']}",
        b9="providers: {openai: {credentials: [k]}, anthropic: }",
        _hidden="log: 5",
    )
    (path / "conf.d" / "ignored.yml").write_text("log: 5")
    config = load(path, vendors=VENDORS)
    assert (config.log.level, config.log.format) == ("debug", "json")
    assert (config.server.drain, list(map(str, config.server.listen))) == (3.0, ["c:3"])
    assert set(config.providers) == {"openai", "anthropic"}
    assert (config.providers["openai"].auth, config.providers["openai"].credentials) == ("bearer", ("k",))


def test_problems_of_a_directory_name_the_file(folder: Callable[..., Path]) -> None:
    path = folder(
        main="log: {level: loud}\naliases: {a: nobody/x}\n",
        a="\nserver: {drain: 5}\nlog:\n  format: xml\n",
        b="users:\n  bob: {keys: {k: {token: a, tokn: b}}}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load(path, vendors=VENDORS)
    assert [str(problem).split(": ")[:2] for problem in caught.value.problems] == [
        [f"{path}/gproxyd.yaml:1", "log.level"],
        [f"{path}/gproxyd.yaml:2", "aliases.a"],
        [f"{path}/conf.d/a.yaml:2", "server.drain"],
        [f"{path}/conf.d/a.yaml:4", "log.format"],
        [f"{path}/conf.d/b.yaml:2", "users.bob.keys.k.tokn"],
    ]


def test_a_broken_file_makes_no_name_of_it_dangle(folder: Callable[..., Path]) -> None:
    path = folder(main="aliases: {a: openai/x}\nlog: {level: loud}\n", a="providers: {openai: ]")
    with pytest.raises(ConfigError) as caught:
        load(path, vendors=VENDORS)
    assert short(caught.value.problems) == [(2, "log.level"), (1, "")]


def test_default_path() -> None:
    assert default_path({}) == default_path({"GPROXYD_CONFIG": ""}) == Path("/etc/gproxyd")
    assert default_path({"GPROXYD_CONFIG": "/x/y"}) == Path("/x/y")


WITH_SECRETS = FULL.replace("sk-plain", CANARY).replace("a b", CANARY) % ("AB" * 32)
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(WITH_SECRETS)),
        st.integers(0, 12),
        st.sampled_from(["", "\n", "\n  ", "\t", "- ", ": ", *" :,'\"{}[]*&!|#"]),
    ),
    min_size=1,
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(EDITS)
@example([(WITH_SECRETS.index("token: ") + 6, 1, "")])
@example([(WITH_SECRETS.index("token: "), 7, "")])
@example([(WITH_SECRETS.index("token: "), 7, "*")])
@example([(WITH_SECRETS.index("token: ") + 7, 0, "!")])
def test_no_edit_makes_the_loader_crash_or_tell_a_secret(tmp_path: Path, edits: list[tuple[int, int, str]]) -> None:
    text = WITH_SECRETS
    for at, cut, put in edits:
        text = text[:at] + put + text[at + cut :]
    path = tmp_path / "gproxyd.yaml"
    path.write_text(text)
    try:
        config = load(path, vendors=VENDORS)
        told = " ".join(config.warnings)
    except ConfigError as error:
        told = "".join(traceback.format_exception(error))
    assert not re.search("canary|7Qz1", told)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text("ab:-[]{}&*!|>'\"#%@,? \n\t<~0.", max_size=60).map(str.encode)))
def test_no_bytes_make_the_loader_crash(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gproxyd.yaml"
    path.write_bytes(content)
    try:
        problems = []
        load(path, vendors=VENDORS)
    except ConfigError as error:
        problems = error.problems
    assert all(problem.message for problem in problems)


def test_what_belongs_to_a_later_version_is_accepted_and_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "debug: {pprof_enabled: true}\nbreaker: {failures: 6}\ndiscovery: {}\nproviders: {openai: }\n"
        "agents: {a: {targets: [openai/m], mcp: [search]}}\n"
    )
    warnings = load(path, vendors=VENDORS).warnings
    told = [warning.partition(":")[0] for warning in warnings]
    assert told == ["agents.a.mcp"]


@pytest.mark.parametrize("section", ["redaction: {mode: block}", "a2a: {agents: {}}", "mcp: {max_turns: 1}"])
def test_what_limits_or_hides_is_unknown_until_it_does_so(tmp_path: Path, section: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(section)
    with pytest.raises(ConfigError, match=section.partition(":")[0]):
        load(path, vendors=VENDORS)
