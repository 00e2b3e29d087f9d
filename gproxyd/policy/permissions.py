"""Globs over names: which models a caller may name, which endpoints a key may use.

`*` stands for any characters, `/` included, `?` for exactly one; everything else stands for itself, its case too.

Invariants: a decision depends on nothing but the patterns and the very text that was asked about; it takes time in
proportion to that text, whatever the pattern; what is remembered of decisions is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_REMEMBERED = 4096
"""Decisions that one set of globs remembers before it forgets them all."""

_LONGEST = 256
"""Characters beyond which a text is not remembered: whoever sends long ones must not fill the memory."""


class Globs:
    """A set of patterns, of which one must match. Immutable but for what it remembers."""

    __slots__ = ("_compiled", "_exact", "_known", "patterns")

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._exact = frozenset(pattern for pattern in self.patterns if not _WILD.search(pattern))
        self._compiled = tuple(_compile(pattern) for pattern in self.patterns if _WILD.search(pattern))
        self._known: dict[str, bool] = {}

    def match(self, text: str) -> bool:
        known = self._known.get(text)
        if known is not None:
            return known
        found = text in self._exact or any(pattern.fullmatch(text) for pattern in self._compiled)
        if len(text) <= _LONGEST:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[text] = found
        return found

    def cover(self, prefix: str) -> bool:
        """Whether one pattern alone matches everything that begins with `prefix` and goes on."""
        return any(_covers(pattern, prefix) for pattern in self.patterns)


@lru_cache(maxsize=1024)
def globs(patterns: tuple[str, ...]) -> Globs:
    """The globs of these patterns: one object, and one memory, for all who have the same."""
    return Globs(patterns)


_WILD = re.compile(r"[*?]")


@lru_cache(maxsize=1024)
def _compile(pattern: str) -> re.Pattern[str]:
    """A pattern without catastrophes: between two stars the first fit is as good as any, so none is ever undone.

    `(?>...)` keeps that first fit; the last piece is not searched for but looked back at from the end.
    """
    first, *rest = re.split(r"\*+", pattern)
    if not rest:
        return re.compile(_piece(first), re.DOTALL)
    *middle, last = rest
    searched = "".join(f"(?>.*?{_piece(piece)})" for piece in middle)
    return re.compile(f"{_piece(first)}{searched}.{{{len(last)},}}+(?<={_piece(last)})", re.DOTALL)


def _piece(text: str) -> str:
    return "".join("." if character == "?" else re.escape(character) for character in text)


def _covers(pattern: str, prefix: str) -> bool:
    """A character that the pattern does not name can only meet a wildcard, so it stands for every other one.

    And tails longer than the pattern need a star, which takes longer ones still: a finite number of them proves all.
    """
    other = next(character for character in map(chr, range(0xE000, 0xF8FF)) if character not in pattern)
    compiled = _compile(pattern)
    return all(compiled.fullmatch(prefix + other * length) for length in range(1, len(pattern) + 2))


class Permissions:
    """What a key may name: what one of its user's globs allows and, where the key is narrowed, one of its own too.

    `models` None: the key is not narrowed; empty: it may name nothing.
    """

    __slots__ = ("_key", "_user")

    def __init__(self, user: Iterable[str], models: Iterable[str] | None = None) -> None:
        self._user = globs(tuple(user))
        self._key = None if models is None else globs(tuple(models))

    def may(self, name: str) -> bool:
        """Whether the name, exactly as the client sent it, is allowed."""
        return self._user.match(name) and (self._key is None or self._key.match(name))

    def covers_provider(self, provider: str) -> bool:
        """Whether everything at a provider is allowed, so that a request may go there without naming a model."""
        prefix = provider + "/"
        return self._user.cover(prefix) and (self._key is None or self._key.cover(prefix))


EVERYTHING = Permissions(["*"])
NOTHING = Permissions([])
