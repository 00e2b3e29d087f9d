"""What a caller may do, and that an expired key stays expired."""

from __future__ import annotations

import pytest

from gproxyd.errors import Refusal
from gproxyd.policy.callers import (
    Caller,
    Expiry,
    Role,
    authenticate,
    authorise_agent,
    authorise_endpoint,
    authorise_model,
    authorise_provider,
    digest,
    permissions_of,
)
from gproxyd.policy.permissions import Globs

KEY = b"ck-alice-0123456789"


class Clock:
    """A wall clock that can be set, and a monotonic one that only goes on."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.now = 50.0

    def go(self, seconds: float) -> None:
        self.wall += seconds
        self.now += seconds


def made(role: Role = "user", **more: object) -> Caller:
    return Caller("alice", "laptop", role, **more)  # type: ignore[arg-type]


def code(call: object, *arguments: object) -> str | None:
    try:
        call(*arguments)  # type: ignore[operator]
    except Refusal as refusal:
        return refusal.code
    return None


# Expiry.


@pytest.mark.parametrize(
    ("offset", "refused"), [(-1.0, False), (-0.001, False), (0.0, True), (0.001, True), (1.0, True)]
)
def test_a_key_expires_at_its_very_second(offset: float, refused: bool) -> None:
    clock = Clock()
    table = {digest(KEY): made(expires_at=clock.wall + 60)}
    expiry = Expiry(lambda: clock.wall, lambda: clock.now)
    clock.go(60 + offset)
    assert (code(authenticate, table, KEY, expiry) == "unauthorized") is refused


@pytest.mark.parametrize("used", [True, False])
def test_an_expired_key_never_revives_when_the_clock_is_set_back(used: bool) -> None:
    """Whether it was used after it had expired or not."""
    clock = Clock()
    table = {digest(KEY): made(expires_at=clock.wall + 60)}
    expiry = Expiry(lambda: clock.wall, lambda: clock.now)
    assert authenticate(table, KEY, expiry).user == "alice"
    clock.go(61)
    if used:
        assert code(authenticate, table, KEY, expiry) == "unauthorized"
    for step in (2, 3600, 86_400, 10 * 365 * 86_400):
        clock.wall -= step
        assert code(authenticate, table, KEY, expiry) == "unauthorized"


def test_a_refused_key_stays_refused_when_a_leap_of_the_clock_is_mended_and_others_live() -> None:
    clock = Clock()
    other = KEY + b"2"
    table = {digest(KEY): made(expires_at=clock.wall + 60), digest(other): made(expires_at=clock.wall + 60)}
    expiry = Expiry(lambda: clock.wall, lambda: clock.now)
    clock.wall += 3600
    assert code(authenticate, table, KEY, expiry) == "unauthorized"
    clock.wall -= 3600
    assert code(authenticate, table, KEY, expiry) == "unauthorized"
    assert authenticate(table, other, expiry)


def test_a_key_with_a_new_date_is_looked_at_anew() -> None:
    clock = Clock()
    expiry = Expiry(lambda: clock.wall, lambda: clock.now)
    clock.go(61)
    assert code(authenticate, {digest(KEY): made(expires_at=clock.wall - 1)}, KEY, expiry) == "unauthorized"
    assert authenticate({digest(KEY): made(expires_at=clock.wall + 1)}, KEY, expiry)
    assert authenticate({digest(KEY): made()}, KEY, expiry)


# Which key it is.


ODD = ["schlüssel-é".encode(), b"\xff\x80", b"k" * 8192, b"%_*?", b"' OR 1=1--", "\U0001f511".encode(), b"a\0b", b""]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_key_is_unknown_until_it_is_in_the_table(odd: bytes) -> None:
    assert code(authenticate, {digest(KEY): made()}, odd) == "unauthorized"
    assert code(authenticate, {digest(odd): made()}, odd) == (None if odd else "unauthorized")


def test_keys_are_told_apart_by_all_their_bytes_and_hashes_open_nothing() -> None:
    shared = b"ck-" + b"s" * 80
    table = {digest(shared + b"1"): made(), digest(shared + b"2"): Caller("bob", "x", "user")}
    assert authenticate(table, shared + b"1").user == "alice"
    assert authenticate(table, shared + b"2").user == "bob"
    hashed = digest(shared + b"1")
    for wrong in (shared, shared + b"3", hashed, hashed.hex().encode(), b"alice/laptop", shared[:20]):
        assert code(authenticate, table, wrong) == "unauthorized"


# What it may do.


def test_without_permissions_an_admin_may_all_and_others_nothing() -> None:
    assert code(authorise_model, made("admin"), "x/y") is None
    assert code(authorise_provider, made("admin"), "x") is None
    for role in ("user", "read-only"):
        assert code(authorise_model, made(role), "x/y") == "forbidden_model"
        assert code(authorise_provider, made(role), "x") == "forbidden_model"


def test_permissions_of_an_admin_are_everything_unless_the_key_is_narrowed() -> None:
    assert permissions_of("admin", [], None).may("x")
    assert permissions_of("user", ["x*"], None).may("xy") and not permissions_of("user", [], None).may("x")
    narrowed = permissions_of("admin", [], ["x"])
    assert narrowed.may("x") and not narrowed.may("y") and not narrowed.covers_provider("p")


def test_a_name_that_does_not_pass_is_refused_with_constant_words() -> None:
    caller = made(permissions=permissions_of("user", ["openai-main/*"], None))
    assert code(authorise_model, caller, "openai-main/gpt-5") is None
    texts = set()
    for name in ("openai-main", "anthropic-main/claude", "", "OPENAI-MAIN/x", "\r\nx: y"):
        with pytest.raises(Refusal, match=r"^forbidden: model: ") as caught:
            authorise_model(caller, name)
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert code(authorise_provider, caller, "openai-main") is None
    assert code(authorise_provider, caller, "anthropic-main") == "forbidden_model"


def test_a_key_of_agents_gets_those_agents_and_nothing_else() -> None:
    for role in ("user", "admin"):
        caller = made(role, permissions=permissions_of(role, ["*"], None), agents=("build", "test"))  # type: ignore[arg-type]
        assert code(authorise_agent, caller, "build") is None and code(authorise_model, caller, "build") is None
        assert code(authorise_agent, caller, "deploy") == "forbidden_agent"
        assert code(authorise_model, caller, "openai-main/gpt-5") == "forbidden_model"
        assert code(authorise_provider, caller, "openai-main") == "forbidden_model"
    assert code(authorise_agent, made("admin", agents=()), "build") == "forbidden_agent"


def test_a_key_of_agents_is_not_more_than_its_user() -> None:
    caller = made(permissions=permissions_of("user", ["openai-main/*"], None), agents=("build",))
    assert code(authorise_agent, caller, "build") == "forbidden_agent"


def test_an_agent_needs_a_permission_like_a_model() -> None:
    caller = made(permissions=permissions_of("user", ["build"], None))
    assert code(authorise_agent, caller, "build") is None
    assert code(authorise_agent, caller, "test") == "forbidden_agent"


ENDPOINTS = ("POST /v1/chat/completions", "GET /v1/models", "* /proxy/anthropic/*")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/chat/completions", True), ("GET", "/v1/models", True), ("HEAD", "/v1/models", True),
        ("GET", "/proxy/anthropic/v1/x", True), ("DELETE", "/proxy/anthropic/", True),
        ("GET", "/v1/chat/completions", False), ("HEAD", "/v1/chat/completions", False),
        ("post", "/v1/chat/completions", False), ("POST", "/v1/chat/completions/", False),
        ("POST", "//v1/chat/completions", False), ("POST", "/v1/models", False),
        ("POST", "/v1/chat/complet%69ons", False), ("GET", "/v1/models/x", False), ("GET", "/proxy/openai/v1/x", False),
        ("GET", "/proxy/anthropic", False), ("GET", "/proxy/openai/proxy/anthropic/x", False), ("GET", "", False),
    ],
)  # fmt: skip
def test_a_key_may_use_the_endpoints_it_is_narrowed_to(method: str, path: str, allowed: bool) -> None:
    expected = None if allowed else "forbidden_endpoint"
    for role in ("user", "admin", "read-only"):
        caller = made(role, endpoints=Globs(ENDPOINTS))  # type: ignore[arg-type]
        assert code(authorise_endpoint, caller, method, path) == expected
        assert code(authorise_endpoint, made(role), method, path) is None  # type: ignore[arg-type]


def test_a_caller_shows_no_money_and_no_key() -> None:
    assert KEY.decode() not in repr(made())
