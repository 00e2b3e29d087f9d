"""The reference etc/gproxyd.yaml against the code: every key, every default, every example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from gproxyd.config import Config, load, messages, source

REFERENCE = Path(__file__).parent.parent / "etc" / "gproxyd.yaml"
MARK = "#| "
VENDORS = {"openai": True, "anthropic": True}
FILLED_BY_EXAMPLES = {"providers", "providers.*.models", "aliases", "agents", "users", "users.*.keys"} | {
    f"users.*.{key}" for key in ("permissions", "rate_limits", "quota")
}
"""Empty by default, and the reference shows there what they are for."""


@pytest.fixture
def with_examples(tmp_path: Path) -> Path:
    path = tmp_path / "gproxyd.yaml"
    path.write_text("".join(line.removeprefix(MARK) for line in REFERENCE.read_text().splitlines(keepends=True)))
    return path


def keys(shape: Any, seen: set[type], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key path of the schema, with `*` for free names and list items, and its default (or undefined).

    A section that occurs in several places (a price, a limit) is walked in the first of them only, and so are the
    keys that several sections inherit.
    """
    shape = messages._bare(shape)
    if isinstance(shape, type) and issubclass(shape, BaseModel):
        shown = {name for base in shape.__mro__ if base in seen for name in getattr(base, "model_fields", ())}
        seen.update(shape.__mro__)
        for name, field in shape.model_fields.items():
            if name not in shown:
                key = f"{path}.{name}".lstrip(".")
                yield key, field.get_default(call_default_factory=True)
                yield from keys(field.annotation, seen, key)
    elif get_origin(shape) is Mapping:
        names = get_args(messages._bare(get_args(shape)[0]))  # where they are not free
        yield from ((f"{path}.{name}", PydanticUndefined) for name in names)
        yield from keys(get_args(shape)[1], seen, f"{path}.*")
    elif get_origin(shape) is tuple:
        yield from keys(get_args(shape)[0], seen, f"{path}.*")


def stated(value: Any, path: str) -> list[Any]:
    """The values under the key path of a loaded configuration, as far as they were written in the file."""
    if not path:
        return [value]
    head, _, rest = path.partition(".")
    below: list[Any] = []
    if head == "*":
        below = list(value.values()) if isinstance(value, Mapping) else list(value or ())
    elif isinstance(value, BaseModel):
        below = [getattr(value, head)] if head in value.model_fields_set else []
    elif isinstance(value, Mapping):
        below = [value[head]] if head in value else []
    return [found for each in below for found in stated(each, rest)]


KEYS = dict(keys(Config, set()))


def test_the_schema_is_walked() -> None:
    for key in (
        "server.listen",
        "endpoints.a2a",
        "providers.*.timeouts.connect",
        "providers.*.models.*.price.cache_write_1h",
        "providers.*.dialects.gemini",
        "providers.*.models.*.price.above.*.tokens",
        "providers.*.models.*.price.reasoning",
        "providers.*.models.*.price.flex",
        "providers.*.rate_limits.concurrency",
        "aliases.*.price",
        "users.*.rate_limits.*.model",
        "users.*.quota.period",
        "users.*.keys.*.budget",
        "users.*.keys.*.expires_at",
        "routing.retries.budget",
    ):
        assert key in KEYS


@pytest.mark.parametrize("key", KEYS)
def test_every_key_and_default_is_in_the_reference(key: str, with_examples: Path) -> None:
    values = stated(load(with_examples, vendors=VENDORS), key)
    assert values, f"{key} is missing in {REFERENCE.name}"
    default = KEYS[key]
    if default is not PydanticUndefined and not isinstance(default, BaseModel) and key not in FILLED_BY_EXAMPLES:
        assert default in values, f"{REFERENCE.name} shows {key}, but nowhere its default"


def test_the_reference_as_shipped_means_the_defaults() -> None:
    assert load(REFERENCE, vendors=VENDORS) == Config()


def test_the_examples_load(with_examples: Path) -> None:
    config = load(with_examples, vendors=VENDORS)
    assert set(config.providers) == {"anthropic", "openai-main", "local"}
    assert config.providers["anthropic"].vendor == "anthropic"
    assert str(config.aliases["chat-default"]) == "openai-main/gpt-4.1-mini"
    assert [warning.partition(":")[0] for warning in config.warnings] == ["users.alice.keys.trial"]


def test_the_examples_open_no_door(with_examples: Path) -> None:
    """A key that anyone can read in the documentation must not let anyone in."""
    keys = [key for user in load(with_examples, vendors=VENDORS).users.values() for key in user.keys.values()]
    assert not any(key.enabled for key in keys if key.token)


def test_every_section_that_is_shipped_has_all_its_keys_written_out() -> None:
    data = source.read(REFERENCE).data
    assert list(data) == list(Config.model_fields)
    for name, body in data.items():
        section = Config.model_fields[name].annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert list(body) == list(section.model_fields)


def test_every_key_that_is_shipped_has_a_comment() -> None:
    bare = [
        line
        for before, line in pairwise(REFERENCE.read_text().splitlines())
        if line.startswith("  ") and line.lstrip()[0] != "#" and not before.lstrip().startswith("# ")
    ]
    assert bare == []


def test_the_lines_fit_a_screen() -> None:
    assert max(map(len, REFERENCE.read_text().splitlines())) <= 120
