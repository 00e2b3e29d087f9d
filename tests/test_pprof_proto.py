"""profile.proto as it is written: read back by a decoder of its own, which knows nothing of the writer."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gproxyd.observe.pprof.proto import Profile, ValueType
from gproxyd.observe.pprof.stacks import Place

CPU = (ValueType("samples", "count"), ValueType("cpu", "nanoseconds"))


def varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value): ints of varint fields, bytes of length-delimited ones."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, kind = key >> 3, key & 7
        assert kind in (0, 2), "the format has no other wire types"
        value, at = varint(data, at)
        if kind == 2:
            assert at + value <= len(data)
            yield number, data[at : at + value]
            at += value
        else:
            yield number, value


def first(data: bytes) -> dict[int, Any]:
    return dict(fields(data))


def packed(data: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        number, at = varint(data, at)
        numbers.append(number - 2**64 if number >= 2**63 else number)
    return numbers


class Decoded:
    """A profile: `types`, `samples` as (stack of (function, file, first, line), values, labels), and its numbers."""

    def __init__(self, body: bytes) -> None:
        parts: dict[int, list[Any]] = {}
        self.raw = gzip.decompress(body)
        for number, value in fields(self.raw):
            parts.setdefault(number, []).append(value)
        self.strings = [text.decode() for text in parts[6]]
        self.types = [self._value_type(part) for part in parts[1]]
        self.mappings = [first(part) for part in parts[3]]
        functions = {it[1]: it for it in map(first, parts.get(5, []))}
        self.places = {}
        for location in map(first, parts.get(4, [])):
            line = first(location[4])
            function = functions[line[1]]
            names = (self.strings[function[2]], self.strings[function.get(4, 0)])
            assert location[2] == self.mappings[0][1]
            assert function[3] == function[2]
            self.places[location[1]] = (*names, function.get(5, 0), line.get(2, 0))
        assert 0 not in self.places and 0 not in functions
        self.samples = [self._sample(part) for part in parts.get(2, [])]
        self.at, self.duration = parts[9][0], parts[10][0]
        self.period_type, self.period = self._value_type(parts[11][0]), parts[12][0]
        self.comments = [self.strings[index] for index in parts.get(13, [])]
        assert 14 not in parts, "the last sample type is the default one"

    def _value_type(self, data: bytes) -> tuple[str, str]:
        it = first(data)
        return self.strings[it[1]], self.strings[it[2]]

    def _sample(self, data: bytes) -> tuple[list[tuple[str, str, int, int]], list[int], dict[str, str]]:
        labels = [first(value) for number, value in fields(data) if number == 3]
        it = first(data)
        stack = [self.places[id_] for id_ in packed(it[1])]
        return stack, packed(it[2]), {self.strings[one[1]]: self.strings[one[2]] for one in labels}

    def total(self) -> int:
        return sum(values[-1] for _, values, _ in self.samples)

    def within(self, function: str) -> int:
        """The main value of all samples that have the function, anywhere in their stack."""
        found = (values for stack, values, _ in self.samples if any(function in place[0] for place in stack))
        return sum(values[-1] for values in found)


def stack(*names: str) -> tuple[Place, ...]:
    return tuple(Place(name, f"{name}.py", 1, 7) for name in names)


def make() -> Profile:
    return Profile(CPU, period_type=CPU[1], period=10_000_000)


def test_what_is_added_is_read_back_leaf_first_with_its_labels() -> None:
    profile = make()
    profile.add(stack("leaf", "root"), (1, 300), (("thread", "MainThread"),))
    profile.comment("said once")
    decoded = Decoded(profile.encode())
    assert decoded.types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert decoded.samples == [
        ([("leaf", "leaf.py", 1, 7), ("root", "root.py", 1, 7)], [1, 300], {"thread": "MainThread"})
    ]
    assert (decoded.period_type, decoded.period) == (("cpu", "nanoseconds"), 10_000_000)
    assert decoded.comments == ["said once"]


def test_equal_stacks_are_added_up_and_others_are_not() -> None:
    profile = make()
    for labels in ((), (), (("task", "other"),)):
        profile.add(stack("a", "b"), (1, 5), labels)
    profile.add(stack("b", "a"), (1, 7))
    assert sorted(values for _, values, _ in Decoded(profile.encode()).samples) == [[1, 5], [1, 7], [2, 10]]


def test_the_table_of_strings_begins_with_an_empty_one_and_has_each_once() -> None:
    profile = make()
    profile.add(stack("a", "b", "a"), (1, 1))
    strings = Decoded(profile.encode()).strings
    assert strings[0] == ""
    assert len(strings) == len(set(strings))


def test_lines_of_one_function_are_locations_of_their_own_but_one_function() -> None:
    profile = make()
    profile.add((Place("f", "f.py", 1, 2),), (1, 1))
    profile.add((Place("f", "f.py", 1, 3),), (1, 1))
    raw = gzip.decompress(profile.encode())
    assert [number for number, _ in fields(raw)].count(4) == 2
    assert [number for number, _ in fields(raw)].count(5) == 1


def test_the_mapping_says_that_there_is_nothing_to_look_for() -> None:
    decoded = Decoded(make().encode())
    assert [(it[1], decoded.strings[it[5]], it[7], it[8], it[9]) for it in decoded.mappings] == [
        (1, "gproxyd", 1, 1, 1)
    ]


def test_the_time_ends_where_the_profile_is_closed() -> None:
    profile = make()
    profile.close()
    duration = Decoded(profile.encode()).duration
    assert 0 < duration < 10**9
    assert Decoded(profile.encode()).duration == duration


def test_the_same_profile_makes_the_same_bytes() -> None:
    profile = make()
    profile.add(stack("a"), (1, 1))
    profile.close()
    assert profile.encode() == profile.encode()


def test_an_empty_profile_is_one() -> None:
    assert Decoded(make().encode()).samples == []


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLACES = st.builds(Place, NAMES.filter(bool), NAMES, st.integers(0, 2**31), st.integers(0, 2**31))
LABELS = st.lists(st.tuples(NAMES.filter(bool), NAMES.filter(bool)), max_size=2, unique_by=lambda it: it[0]).map(tuple)
ADDED = st.tuples(
    st.lists(PLACES, max_size=5).map(tuple),
    st.tuples(st.integers(-(2**61), 2**61), st.integers(0, 2**61)),
    LABELS,
)


@given(st.lists(ADDED, max_size=8, unique_by=lambda it: (it[0], it[2])))
def test_every_profile_is_read_back_as_it_was(added: list[Any]) -> None:
    profile = make()
    for one in added:
        profile.add(*one)
    read = [
        (tuple(map(tuple, places)), tuple(values), labels)
        for places, values, labels in Decoded(profile.encode()).samples
    ]
    assert read == [(tuple(map(tuple, places)), values, dict(labels)) for places, values, labels in added]


def test_the_text_has_the_largest_first_and_says_where() -> None:
    profile = make()
    profile.add(stack("small"), (9, 10))
    profile.add((Place("big", "big.py", 3, 4), Place("no_file", "", 0, 0)), (1, 20), (("task", "t"),))
    profile.comment("a remark")
    head, remark, *rest = profile.text().splitlines()
    assert head.startswith("samples/count cpu/nanoseconds in 0.0")
    assert remark == "# a remark"
    assert rest == ["", "1 20 @ task=t", "#\tbig\tbig.py:4", "#\tno_file", "", "9 10 @", "#\tsmall\tsmall.py:7"]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2**31, 2**62])
def test_numbers_at_the_edges_of_a_varint(size: int) -> None:
    profile = make()
    profile.add(stack("a"), (1, size))
    assert Decoded(profile.encode()).samples[0][1] == [1, size]
