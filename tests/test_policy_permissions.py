"""Globs and what they allow: against a slow and obvious matcher, and in time that no pattern can blow up."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gproxyd.policy.permissions import EVERYTHING, NOTHING, Globs, Permissions, globs

PATTERNS = st.text("ab/.*?[\n", max_size=8)
NAMES = st.text("ab/.[*?\n", max_size=10)


def obvious(pattern: str, text: str) -> bool:
    @cache
    def at(i: int, j: int) -> bool:
        if i == len(pattern):
            return j == len(text)
        if pattern[i] == "*":
            return at(i + 1, j) or (j < len(text) and at(i, j + 1))
        return j < len(text) and pattern[i] in ("?", text[j]) and at(i + 1, j + 1)

    return at(0, 0)


@given(st.lists(PATTERNS, max_size=3), NAMES)
@example(["a*a"], "a")
@example(["*a?*?a"], "aaba")
@example(["**"], "")
def test_globs_match_what_the_obvious_matcher_matches(patterns: list[str], text: str) -> None:
    expected = any(obvious(pattern, text) for pattern in patterns)
    asked = Globs(patterns)
    assert asked.match(text) is expected
    assert asked.match(text) is expected, "a remembered decision is the same decision"


@given(PATTERNS, st.text("ab/", max_size=4))
@example("p?*", "p/")
@example("?????", "ab/")
def test_cover_claims_neither_too_much_nor_too_little(pattern: str, prefix: str) -> None:
    """Tails of a foreign character are the hardest to match, so they refute every false claim."""
    covered = Globs([pattern]).cover(prefix)
    assert covered is all(obvious(pattern, prefix + "z" * length) for length in range(1, 24))
    if covered:
        for tail in ("a", "ab/", "b.[", "*", "?" * 9):
            assert obvious(pattern, prefix + tail)


@pytest.mark.parametrize(
    ("pattern", "covered"),
    [
        ("*", True), ("openai-main/*", True), ("openai-*", True), ("*/*", True), ("open??-main/*", True),
        ("openai-main/?*", True), ("o*i*/*", True), ("openai-main/**", True), ("openai-main*", True),
        ("openai-main/gpt*", False), ("openai-main/*-mini", False), ("openai-main/?", False), ("openai-main", False),
        ("openai-main/", False), ("openai-main/??*", False), ("Openai-main/*", False), ("openai/*", False), ("", False),
        ("*/gpt-5", False), ("openai-main/*/*", False), ("\ue000*", False),
    ],
)  # fmt: skip
def test_a_provider_is_covered_by_a_pattern_that_matches_all_of_it(pattern: str, covered: bool) -> None:
    assert Permissions([pattern]).covers_provider("openai-main") is covered
    assert Permissions(["*"], [pattern]).covers_provider("openai-main") is covered
    assert Permissions([pattern], ["*"]).covers_provider("openai-main") is covered


def test_two_halves_of_a_provider_do_not_prove_the_whole() -> None:
    assert not Permissions(["p/a*", "p/b*"]).covers_provider("p")


@pytest.mark.parametrize("pattern", ["*a" * 60 + "*b", "?*" * 60 + "b", "a*" * 60 + "b", "*" * 200 + "b", "*?" * 99])
@pytest.mark.parametrize("text", ["a" * 8000, "a" * 8000 + "c", ""])
def test_no_pattern_takes_more_than_linear_time(pattern: str, text: str) -> None:
    asked = Globs([pattern])
    start = time.process_time()
    asked.match(text)
    assert time.process_time() - start < 0.1


SPELLINGS = [
    "gpt-4o ", " gpt-4o", "GPT-4O", "gpt-4O", "ｇｐｔ-4o", "openai-main/gpt-4o", "gpt-4o-evil", "gpt-4o\n", "gpt-4o\0",
    "gpt%2D4o", "gpt\u20104o", "gpt-4", "", "*", "gpt-?o", "g\u0440t-4o",
]  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_another_spelling_is_another_name(name: str) -> None:
    assert not Permissions(["gpt-4o"]).may(name)
    assert Permissions(["gpt-4o"]).may("gpt-4o")


def test_stars_take_slashes_and_line_ends_and_nothing_else_is_special() -> None:
    assert Permissions(["openai-main/*"]).may("openai-main/a/b/c")
    assert Permissions(["a*b"]).may("a\n/b")
    assert (
        not Permissions(["a.c"]).may("abc")
        and not Permissions(["[ab]*"]).may("a1")
        and not Permissions(["a|b"]).may("a")
    )
    assert Permissions(["[ab]*"]).may("[ab]x") and not Permissions(["gpt-4*"]).may("xgpt-4")


def test_a_name_must_pass_the_user_and_the_key() -> None:
    both = Permissions(["openai-main/*", "chat"], ["chat", "openai-main/gpt-*", "anthropic-main/*"])
    for name, allowed in {
        "chat": True, "openai-main/gpt-5": True, "openai-main/o3": False, "anthropic-main/claude": False, "x": False,
    }.items():  # fmt: skip
        assert both.may(name) is allowed, name


def test_an_empty_list_allows_nothing_and_a_missing_one_narrows_nothing() -> None:
    assert not NOTHING.may("") and not NOTHING.may("x") and not NOTHING.covers_provider("p")
    assert EVERYTHING.may("") and EVERYTHING.may("x/y") and EVERYTHING.covers_provider("p")
    assert not Permissions(["*"], []).may("x") and Permissions(["*"], None).may("x")


def test_what_is_remembered_is_bounded() -> None:
    asked = Globs(["a*"])
    for number in range(10_000):
        assert asked.match(f"a{number}")
        assert not asked.match(f"b{number}")
    assert len(asked._known) <= 4096
    known = len(asked._known)
    assert asked.match("a" * 10_000) and len(asked._known) == known


def test_equal_patterns_share_their_memory() -> None:
    assert globs(("x/*",)) is globs(("x/*",))
