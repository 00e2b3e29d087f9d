"""How many clients may be connected: in total, and from one address.

Invariant: every connection that has entered leaves once. Addresses are counted by what one client can have of them:
an IPv4 address, also where it comes mapped into IPv6, or an IPv6 network of 64 bits.
"""

from __future__ import annotations

import ipaddress
import resource
from collections import Counter
from collections.abc import Sequence

Bucket = str
"""What connections of one client are counted under; empty for those that are not counted by address."""

_RESERVE = 128
"""Descriptors that are left for listeners, logs and files."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Crowd:
    """Counts connections. `limit` holds for all, `each` for one address; loopback and `trusted` have no `each`."""

    def __init__(self, limit: int, each: int, trusted: Sequence[Network] = ()) -> None:
        self.limit = limit
        self._each = each
        self._trusted = tuple(trusted)
        self._by_address: Counter[Bucket] = Counter()
        self.count = 0

    def enter(self, peer: object) -> Bucket | None:
        """The bucket of a new connection, to be given back to `leave`; None if there is no room."""
        bucket = self._bucket(peer)
        if self.count >= self.limit or (bucket and self._by_address[bucket] >= self._each):
            return None
        self.count += 1
        if bucket:
            self._by_address[bucket] += 1
        return bucket

    def leave(self, bucket: Bucket) -> None:
        self.count -= 1
        if bucket:
            self._by_address[bucket] -= 1
            if not self._by_address[bucket]:
                del self._by_address[bucket]

    def _bucket(self, peer: object) -> Bucket:
        if not isinstance(peer, tuple):
            return ""  # a Unix socket: its file's mode says who may connect
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if address.is_loopback or any(address in network for network in self._trusted):
            return ""
        if address.version == 4:
            return str(address)
        return str(ipaddress.IPv6Network((address, 64), strict=False))


def room_for(wanted: int) -> int:
    """How many clients the process can serve with its descriptors: each needs one, its upstream another or two.

    Raises the soft limit of descriptors to the hard one first.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (hard - _RESERVE) // 2))
