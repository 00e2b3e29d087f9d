"""Agents in the configuration: what can be said of them, and what is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from gproxyd import config
from gproxyd.config import Config
from gproxyd.errors import ConfigError

PROVIDERS = "providers: {one: {vendor: openai}, two: {vendor: anthropic}}\n"


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(PROVIDERS + text)
    return config.load(path, vendors={"openai": True, "anthropic": True})


def flaws(tmp_path: Path, text: str) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return [(problem.key, problem.message) for problem in caught.value.problems]


def test_all_that_can_be_said(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        """
agents:
  plain: {targets: [one/gpt-5]}
  full:
    strategy: sticky
    targets:
      - one/gpt-4*
      - gpt-5
      - {target: two/claude, weight: 3, max_output: 100, headers: {X-A: b}, format: anthropic}
    required: [vision, tools]
    system_prompt: Be kind.
    force: true
    overflow: trim
    sticky: {header: X-Session, ttl: 5min}
aliases: {crew: full}
""",
    )
    plain, full = settings.agents["plain"], settings.agents["full"]
    assert (plain.strategy, plain.required, plain.overflow, plain.sticky) == ("fallback", (), "refuse", None)
    assert [(one.target, one.weight) for one in full.targets] == [("one/gpt-4*", 1), ("gpt-5", 1), ("two/claude", 3)]
    last = full.targets[2]
    assert (last.max_output, dict(last.headers), last.format) == (100, {"X-A": "b"}, "anthropic")
    assert full.sticky is not None and (full.sticky.header, full.sticky.ttl) == ("x-session", 300.0)
    assert (settings.aliases["crew"].provider, settings.aliases["crew"].model) == ("", "full")
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("agents: {a: {}}", "agents.a.targets", "required"),
        ("agents: {a: {targets: []}}", "agents.a.targets", "must hold an entry"),
        ("agents: {a: {targets: [three/m]}}", "agents.a.targets[0].target", "not configured"),
        ("agents: {a: {targets: [b]}}\naliases: {b: one/m}", "agents.a.targets[0].target", "alias or agent"),
        ("agents: {a: {targets: [one/m]}, b: {targets: [a]}}", "agents.b.targets[0].target", "alias or agent"),
        ("agents: {a: {targets: [one/m]}}\naliases: {a: one/m}", "agents.a", "the name of an alias"),
        ("agents: {a*: {targets: [one/m]}}", "agents.?", "must be what a client can send"),
        ("agents: {a: {targets: [one/m], strategy: best}}", "agents.a.strategy", "must be one of"),
        ("agents: {a: {targets: [one/m], required: [sight]}}", "agents.a.required[0]", "must be one of"),
        ("agents: {a: {targets: [{target: one/m, weight: 0}]}}", "agents.a.targets[0].weight", "at least 1"),
        (
            "agents: {a: {targets: [{target: one/m, headers: {authorization: x}}]}}",
            "agents.a.targets[0].headers.authorization",
            "carries a credential",
        ),
        (
            "agents: {a: {targets: [{target: one/m, headers: {X-A: x, x-a: y}}]}}",
            "agents.a.targets[0].headers.X-A",
            "two spellings",
        ),
        ("agents: {a: {targets: [one/m], colour: red}}", "agents.a.colour", "not a known key"),
        ("aliases: {b: nobody}", "aliases.b", "must be a provider and a model"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, text: str, key: str, words: str) -> None:
    found = flaws(tmp_path, text)
    assert any(place == key and words in message for place, message in found), found


def test_a_flaw_in_one_agent_hides_none_in_another(tmp_path: Path) -> None:
    found = flaws(tmp_path, "agents: {a: {targets: [three/m]}, b: {targets: [four/m]}}")
    assert [place for place, _ in found] == ["agents.a.targets[0].target", "agents.b.targets[0].target"]


def test_what_has_no_effect_is_warned_of(tmp_path: Path) -> None:
    settings = load(tmp_path, "agents: {a: {targets: [one/m], force: true, mcp: [search]}}")
    assert [warning.partition(":")[0] for warning in settings.warnings] == ["agents.a.mcp", "agents.a.force"]


def test_a_prompt_and_headers_are_not_shown(tmp_path: Path) -> None:
    settings = load(
        tmp_path, "agents: {a: {targets: [{target: one/m, headers: {x-key: hidden}}], system_prompt: hidden}}"
    )
    assert "hidden" not in repr(settings)
