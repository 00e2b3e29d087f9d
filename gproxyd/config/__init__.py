"""The configuration: YAML files in, one frozen `Config` or every problem at once.

    source     files -> plain data and the place of every key
    schema     the keys, their types and defaults (pydantic models)
    people     those of users and their keys
    agents     those of names that stand for several models
    quirks     those of a vendor's ways
    section    the base of all sections
    fields     the scalar types: how one value is written and held
    addresses  URLs, hosts, listening addresses, networks
    rules      what spans several keys
    messages   pydantic's errors -> sentences for the administrator

A wrong value hides no other problem: it is set aside with the entry around it (a provider, an alias, a user's key,
else the section), and the rules that span several keys run on the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gproxyd.config import messages, rules, source
from gproxyd.config.addresses import ListenAddress
from gproxyd.config.agents import Agent, AgentTarget, Sticky, Strategy
from gproxyd.config.fields import Known, Target
from gproxyd.config.people import Quota, RateLimit, Role, User, UserKey
from gproxyd.config.schema import (
    Alias,
    Auth,
    Breaker,
    Chat,
    Config,
    Endpoints,
    Log,
    Model,
    Price,
    Provider,
    ProviderLimits,
    Rates,
    Records,
    Retries,
    Routing,
    Server,
    State,
    Streams,
    Tier,
    Timeouts,
)
from gproxyd.config.source import Flaw, KeyPath, Source
from gproxyd.errors import ConfigError, Problem

__all__ = [
    "Agent",
    "AgentTarget",
    "Alias",
    "Auth",
    "Breaker",
    "Chat",
    "Config",
    "Endpoints",
    "ListenAddress",
    "Log",
    "Model",
    "Price",
    "Provider",
    "ProviderLimits",
    "Quota",
    "RateLimit",
    "Rates",
    "Records",
    "Retries",
    "Role",
    "Routing",
    "Server",
    "State",
    "Sticky",
    "Strategy",
    "Streams",
    "Target",
    "Tier",
    "Timeouts",
    "User",
    "UserKey",
    "default_path",
    "load",
]

DEFAULT_PATH = Path("/etc/gproxyd")

_ENTRIES = frozenset({"providers", "aliases", "agents", "users"})
"""Sections whose entries stand for themselves: a flaw in one leaves the others usable."""


def default_path(environ: Mapping[str, str]) -> Path:
    """`$GPROXYD_CONFIG`, else /etc/gproxyd."""
    return Path(environ.get("GPROXYD_CONFIG") or DEFAULT_PATH)


def load(path: Path, *, vendors: Mapping[str, bool]) -> Config:
    """Read the configuration at `path`, a file or a directory.

    `vendors` holds the name of every known vendor and whether it has a base URL of its own; `custom` needs no
    mention. Raises ConfigError with all problems that can be found together.
    """
    read = source.read(path)
    known = _known(read.data, {"custom": False, **vendors})
    # With a file missing, names from it would seem to dangle: then only the shape is checked.
    config, flaws = _validate(read.data, known if read.complete else None)
    if read.complete:
        flaws += rules.check(config, known)
    flaws = read.flaws + [each for each in flaws if not _follows(each.path, read.unread)]
    if flaws:
        raise ConfigError(_in_file_order(read, flaws))
    return config


def _known(data: Mapping[str, Any], vendors: Mapping[str, bool]) -> Known:
    def names(section: str) -> frozenset[str]:
        entries = data.get(section)
        return frozenset(entries) if isinstance(entries, dict) else frozenset()

    return Known(vendors, names("providers"), names("aliases"), names("agents"))


def _validate(data: dict[str, Any], known: Known | None) -> tuple[Config, list[Flaw]]:
    """The configuration made of what is sound, and the flaws of the rest."""
    try:
        return Config.model_validate(data, context=known), []
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    sound = copy.deepcopy(data)
    for detail in details:
        _set_aside(sound, detail["loc"])
    return Config.model_validate(sound, context=known), [messages.flaw(detail) for detail in details]


def _set_aside(data: dict[str, Any], path: KeyPath) -> None:
    """Remove the smallest entry around `path` that others do not depend on."""
    depth = 1
    if path[0] in _ENTRIES and len(path) > 1:
        depth = 4 if path[0] == "users" and path[2:3] == ("keys",) and len(path) > 3 else 2
    parent: Any = data
    for part in path[: depth - 1]:
        parent = parent.get(part, {})
    parent.pop(path[depth - 1], None)


def _follows(path: KeyPath, unread: set[KeyPath]) -> bool:
    """Whether a flaw at `path` only repeats that the value there could not be read."""
    return any(path[:length] in unread for length in range(len(path) + 1))


def _in_file_order(read: Source, flaws: list[Flaw]) -> list[Problem]:
    problems = []
    for each in flaws:
        place = read.place(each.path)
        file = each.file or (place.file if place else read.root)
        line = each.line if each.file else (place.line if place else None)
        problems.append(Problem(file, line, messages.key_path(each.path), each.message))
    rank = {file: index for index, file in enumerate(read.files)}
    return sorted(problems, key=lambda problem: (rank.get(problem.file, -1), problem.line or 0))
