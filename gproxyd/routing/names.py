"""A model's name -> provider and upstream model. First match wins; what matches nothing is refused with a way out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from gproxyd.errors import Refusal
from gproxyd.wire.target import MODEL_NAME

Aliases = Mapping[str, tuple[str, str]]
"""Alias -> (provider, upstream model)."""


class Resolved(NamedTuple):
    """`provider` and the model's name there; `renamed` if replies must bear the name that the client sent."""

    provider: str
    model: str
    renamed: bool


def check(name: object) -> str:
    """A model's name as a client sent it. Raises Refusal (400) for what no model can be called."""
    if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
        raise Refusal(
            "invalid_request", "'model' must be a model's name: a string of 1 to 256 plain characters", param="model"
        )
    return name


def aggregated(name: str, aliases: Aliases, providers: Collection[str]) -> Resolved:
    """`/v1` and `/v1beta`: an alias, or `provider/model`. Raises Refusal (400 provider_prefix)."""
    if (target := aliases.get(name)) is not None:
        return Resolved(*target, renamed=True)
    provider, slash, rest = name.partition("/")
    if slash and rest and provider in providers:
        return Resolved(provider, within(rest, provider, aliases).model, renamed=True)
    raise Refusal(
        "provider_prefix",
        f"the model '{name}' names no configured provider and is no alias; write 'provider/{name}', call "
        f"'/{{provider}}/v1/...' instead of '/v1/...', or ask for an alias of that name",
        param="model",
    )


def within(name: str, provider: str, aliases: Aliases) -> Resolved:
    """Scoped and raw: an alias counts only if it resolves into this very provider."""
    target = aliases.get(name)
    if target is not None and target[0] == provider:
        return Resolved(provider, target[1], renamed=True)
    return Resolved(provider, name, renamed=False)
