"""Regular expressions mean the same on every Python that the gateway runs on.

Until 3.11.5 `re` had possessive quantifiers wrong behind a group whose inside can be matched in several ways
(gh-106052): such a match ended too early, or in front of its beginning. Debian 12's own Python is 3.11.2. An atomic
group around a greedy quantifier says the same, and newer versions make one of the other.
"""

from __future__ import annotations

import random
import re
import tokenize
from pathlib import Path

import pytest

import gproxyd
from gproxyd.wire import pick

FOLDER = Path(gproxyd.__file__).parent
POSSESSIVE_GROUP = re.compile(r"(?<!\\)\)(?:[*+?]|\{[0-9,]*\})\+(?!\+)")


def literals(path: Path) -> list[str]:
    with tokenize.open(path) as file:
        return [one.string for one in tokenize.generate_tokens(file.readline) if one.type == tokenize.STRING]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_possessive_quantifier_stands_behind_a_group(path: Path) -> None:
    texts = [text for text in literals(path) if not text.endswith('"""') and '!\\"#$' not in text]
    assert [text for text in texts if POSSESSIVE_GROUP.search(text)] == []


TOKENS = (b"{", b"}", b"[", b"]", b'"a"', b'"a\\"b"', b'"\\\\"', b'"', b":", b",", b"1")


def passed_over(text: bytes, levels: int, position: int = 0) -> int:
    """Up to where there is text without brackets, whole strings, and brackets that are closed, so many levels deep."""
    while position < len(text):
        token = text[position : position + 1]
        if token == b'"':
            end = string_end(text, position + 1)
            if end < 0:
                return position
            position = end + 1
        elif token in b"{[":
            end = passed_over(text, levels - 1, position + 1) if levels else len(text)
            if text[end : end + 1] not in (b"}", b"]"):
                return position
            position = end + 1
        elif token in b"}]":
            return position
        else:
            position += 1
    return position


def string_end(text: bytes, position: int) -> int:
    """Where the quote is that ends a string; -1 if none does."""
    while (found := text.find(b'"', position)) >= 0:
        before = text[:found]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return found
        position = found + 1
    return -1


@pytest.mark.parametrize(("expression", "levels"), [(pick.BULK, 3), (pick._FLAT, 0)], ids=["nested", "flat"])
def test_what_is_passed_over_ends_where_it_should(expression: re.Pattern[bytes], levels: int) -> None:
    dice = random.Random(11)
    for _ in range(5_000):
        text = b"".join(dice.choice(TOKENS) for _ in range(dice.randint(1, 30)))
        found = expression.match(text)
        assert found is not None
        assert found.end() == passed_over(text, levels), text


def test_what_is_passed_over_never_ends_in_front_of_its_beginning() -> None:
    text = b'{"a":' * 200 + b"1" + b"}" * 200
    for position in range(0, 1000, 7):
        for expression in (pick.BULK, pick._FLAT):
            found = expression.match(text, position)
            assert found is not None and found.end() >= position
