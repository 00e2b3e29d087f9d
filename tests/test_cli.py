"""The commands, as a shell runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gproxyd import __version__
from tests.support.process import run

GOOD = """\
providers:
  openai-main: {vendor: openai}
aliases: {fast: openai-main/gpt-4.1-mini}
users: {admin: {role: admin, keys: {default: {credential: admin-key}}}}
"""

BAD = """\
server: {lisen: ["127.0.0.1:8787"]}
providers:
  v1: {vendor: openai}
  local: {vendor: nobody}
aliases: {fast: gone/model}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    return path


def test_version() -> None:
    assert run("version").stdout == f"gproxyd {__version__}\n"
    assert json.loads(run("version", "--json").stdout) == {"version": __version__}


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["check", "--help"], ["demo", "--help"]])
def test_help(arguments: list[str]) -> None:
    told = run(*arguments)
    assert told.returncode == 0
    assert "usage: gproxyd" in told.stdout


@pytest.mark.parametrize("arguments", [[], ["fly"], ["serve", "--fast"]])
def test_a_command_that_cannot_be_understood_is_status_2(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2


def test_check_tells_what_would_be_served_and_warns_of_missing_secrets(good: Path) -> None:
    told = run("check", "--config", str(good))
    assert told.returncode == 0
    assert "OK" in told.stdout
    assert "the secret 'openai-main' is missing" in told.stdout
    assert "switched off" in told.stdout
    assert "the secret 'admin-key' is missing" in told.stdout


def test_check_as_json(good: Path, bad: Path) -> None:
    fine = json.loads(run("check", "--config", str(good), "--json").stdout)
    assert fine["ok"] is True
    assert fine["problems"] == []
    assert fine["warnings"]
    told = run("check", "--config", str(bad), "--json")
    assert told.returncode == 1
    found = json.loads(told.stdout)
    assert found["ok"] is False
    assert {problem["key"] for problem in found["problems"]} >= {"server.lisen", "providers.v1", "aliases.fast"}
    assert all(problem["line"] for problem in found["problems"])


def test_every_problem_is_told_at_once_with_file_line_and_key(bad: Path) -> None:
    told = run("check", "--config", str(bad))
    assert told.returncode == 1
    for place in (":1: server.lisen", ":3: providers.v1", ":4: providers.local", ":5: aliases.fast"):
        assert f"{bad}{place}" in told.stderr, told.stderr


def test_serve_starts_nothing_on_a_bad_configuration(bad: Path) -> None:
    told = run("serve", "--config", str(bad))
    assert told.returncode == 78
    assert "4 problems" in told.stderr
    assert "Traceback" not in told.stderr


def test_the_configuration_is_found_through_the_environment(good: Path) -> None:
    assert run("check", GPROXYD_CONFIG=str(good)).returncode == 0
    assert "does-not-exist" in run("check", GPROXYD_CONFIG="/does-not-exist").stderr


def test_a_port_in_use_is_a_plain_message(good: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        good.write_text(GOOD + f'server: {{listen: ["127.0.0.1:{port}"]}}\n')
        told = run("serve", "--config", str(good))
    assert told.returncode == 1
    assert f"gproxyd: cannot listen on 127.0.0.1:{port}" in told.stderr
    assert "Traceback" not in told.stderr
