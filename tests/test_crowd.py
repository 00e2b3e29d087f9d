"""How many clients may be connected: what counts as one client, and that whoever leaves is no longer counted."""

from __future__ import annotations

import ipaddress
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gproxyd.gateway import crowd
from gproxyd.gateway.crowd import Crowd, room_for

ONE_CLIENT: dict[str, tuple[tuple[object, ...], ...]] = {
    "IPv4, any port": (("192.0.2.1", 1000), ("192.0.2.1", 65535)),
    "IPv4 mapped into IPv6": (("192.0.2.1", 1), ("::ffff:192.0.2.1", 1, 0, 0), ("::ffff:c000:201", 2, 0, 0)),
    "an IPv6 network": (("2001:db8:1:2::1", 1, 0, 0), ("2001:db8:1:2:ffff:ffff:ffff:ffff", 1, 0, 0)),
    "link-local with its interface": (("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth0", 1, 0, 2)),
}
TWO_CLIENTS: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "IPv4": (("192.0.2.1", 1), ("192.0.2.2", 1)),
    "IPv4 mapped": (("::ffff:192.0.2.1", 1, 0, 0), ("::ffff:192.0.2.2", 1, 0, 0)),
    "neighbouring IPv6 networks": (("2001:db8:1:2::1", 1, 0, 0), ("2001:db8:1:3::1", 1, 0, 0)),
    "IPv4 and IPv6": (("192.0.2.1", 1), ("2001:db8::c000:201", 1, 0, 0)),
}
UNCOUNTED: dict[str, object] = {
    "loopback": ("127.0.0.1", 1),
    "all of loopback": ("127.255.0.9", 1),
    "IPv6 loopback": ("::1", 1, 0, 0),
    "mapped loopback": ("::ffff:127.0.0.1", 1, 0, 0),
    "a trusted proxy": ("198.51.100.7", 1),
    "a trusted proxy, mapped": ("::ffff:198.51.100.7", 1, 0, 0),
    "a trusted IPv6 proxy": ("2001:db8:ffff::7", 1, 0, 0),
    "a Unix socket": "",
    "a named Unix socket": "/run/client.sock",
    "an abstract Unix socket": b"\0name",
    "nobody any more": None,
}
TRUSTED = (ipaddress.ip_network("198.51.100.0/24"), ipaddress.ip_network("2001:db8:ffff::/48"))


@pytest.mark.parametrize("name", ONE_CLIENT)
def test_one_client_has_one_count(name: str) -> None:
    people = Crowd(100, 1)
    for first in ONE_CLIENT[name]:
        bucket = people.enter(first)
        assert bucket
        for second in ONE_CLIENT[name]:
            assert people.enter(second) is None
        people.leave(bucket)
    assert people.count == 0


@pytest.mark.parametrize("name", TWO_CLIENTS)
def test_two_clients_have_two(name: str) -> None:
    first, second = TWO_CLIENTS[name]
    people = Crowd(100, 1)
    buckets = [people.enter(first), people.enter(second)]
    assert all(buckets)
    assert buckets[0] != buckets[1]
    assert people.enter(first) is people.enter(second) is None
    assert people.count == 2


@pytest.mark.parametrize("name", UNCOUNTED)
def test_the_own_machine_and_trusted_proxies_are_limited_in_total_only(name: str) -> None:
    people = Crowd(5, 1, TRUSTED)
    assert [people.enter(UNCOUNTED[name]) for _ in range(6)] == [""] * 5 + [None]
    people.leave("")
    assert people.enter(UNCOUNTED[name]) == ""


def test_the_neighbours_of_a_trusted_network_are_not_trusted() -> None:
    people = Crowd(100, 1, TRUSTED)
    for outside in (("198.51.101.7", 1), ("2001:db8:fffe::7", 1, 0, 0)):
        assert people.enter(outside)
        assert people.enter(outside) is None


def test_the_total_holds_for_all_and_a_refusal_takes_nothing() -> None:
    people = Crowd(3, 2)
    a, b = ("192.0.2.1", 1), ("192.0.2.2", 1)
    inside = [people.enter(a), people.enter(a)]
    assert [people.enter(a) for _ in range(10)] == [None] * 10  # an address has its limit
    inside.append(people.enter(b))
    assert [people.enter(b) for _ in range(10)] == [None] * 10  # and all have theirs
    assert people.enter(("127.0.0.1", 1)) is None
    assert people.count == 3
    for bucket in inside:
        assert bucket is not None
        people.leave(bucket)
    assert people.count == 0
    assert people.enter(a) and people.enter(a) and people.enter(b)


_PEERS = [
    ("192.0.2.1", 1),
    ("192.0.2.2", 1),
    ("::ffff:192.0.2.1", 1, 0, 0),
    ("2001:db8::1", 1, 0, 0),
    ("2001:db8::2", 1, 0, 0),
    ("198.51.100.7", 1),
    ("127.0.0.1", 1),
    "",
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 6), st.integers(1, 4), st.lists(st.tuples(st.sampled_from(_PEERS), st.booleans(), st.integers(0, 9)))
)
def test_however_they_come_and_go_nothing_stays_behind(
    limit: int, each: int, steps: list[tuple[object, bool, int]]
) -> None:
    people = Crowd(limit, each, TRUSTED)
    inside: list[str] = []
    for peer, comes, which in steps:
        if comes or not inside:
            bucket = people.enter(peer)
            if bucket is not None:
                inside.append(bucket)
            else:
                full = len(inside) == limit
                assert full or any(name and inside.count(name) == each for name in inside)
        else:
            people.leave(inside.pop(which % len(inside)))
        assert people.count == len(inside) <= limit
        assert all(inside.count(name) <= each for name in inside if name)
    for bucket in inside:
        people.leave(bucket)
    assert people.count == 0
    assert not people._by_address  # not even a zero: addresses come and go for years


@pytest.mark.parametrize("hard", [64, 256, 1024, 20_000, 1_000_000, resource.RLIM_INFINITY])
def test_there_is_never_room_for_more_than_the_descriptors(monkeypatch: pytest.MonkeyPatch, hard: int) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(crowd.resource, "getrlimit", lambda _: (min(hard, 64) if hard > 0 else 64, hard))
    monkeypatch.setattr(crowd.resource, "setrlimit", lambda _, pair: set_to.append(pair))
    for wanted in (1, 10, 10_000):
        room = room_for(wanted)
        assert 1 <= room <= wanted
        if hard != resource.RLIM_INFINITY and room > 1:
            assert 2 * room < hard
        else:
            assert room == wanted or hard < 256
    assert set(set_to) == {(hard, hard)}  # what the administrator allows is made use of
