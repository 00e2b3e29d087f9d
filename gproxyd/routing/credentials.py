"""The keys of a provider, used in turn; a refused one is parked.

Invariants: a parked key is used again only when its time is over, and then by one attempt a time, or when no other
key is left: then the one that has been parked longest is tried, so that a key mended at the vendor works again without
a restart. What is known of a key outlives a configuration that does not change it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

PARKED_FOR = 60.0
"""Seconds for which a refused key is left alone while there are others."""


class Key(Protocol):
    """A secret: shown by `reveal()` and nothing else."""

    def reveal(self) -> str: ...


@dataclass(slots=True, eq=False)
class Credential:
    """One key of a pool. Times are monotonic seconds.

    place  its number in the pool, from 1
    tag    what tells it from other keys, without telling the key
    """

    key: Key | None
    place: int = 1
    tag: bytes = b""
    used_at: float = 0.0
    parked_at: float | None = None

    def parked(self, now: float) -> bool:
        return self.parked_at is not None and now - self.parked_at <= PARKED_FOR


class CredentialPool:
    """The keys of one provider, in the order of configuration. One without keys serves providers that want none."""

    def __init__(self, keys: Sequence[Key], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._credentials = [Credential(key, place, _tag(key)) for place, key in enumerate(keys, start=1)]
        self._credentials = self._credentials or [Credential(None)]
        self._sole = self._credentials[0] if len(self._credentials) == 1 else None

    def __len__(self) -> int:
        return len(self._credentials)

    def all(self) -> Sequence[Credential]:
        """Every key, in the order of configuration."""
        return self._credentials

    def take(self) -> Credential:
        """The key for the next attempt: of those not parked the one that has rested longest."""
        if self._sole is not None:
            return self._sole
        now = self._clock()
        chosen = (self.fit(now) or self.parked())[0]
        self.use(chosen, now)
        return chosen

    def fit(self, now: float) -> list[Credential]:
        """The keys that may be used, the one that has rested longest first."""
        fit = [one for one in self._credentials if not one.parked(now)]
        return sorted(fit, key=lambda one: one.used_at)

    def parked(self) -> list[Credential]:
        """The refused keys, the one that has been parked longest first."""
        refused = [one for one in self._credentials if one.parked_at is not None]
        return sorted(refused, key=lambda one: one.parked_at or 0.0)

    def use(self, credential: Credential, now: float) -> None:
        """An attempt is made with it. One that had been refused is left alone again until that attempt's outcome."""
        credential.used_at = now
        if credential.parked_at is not None:
            credential.parked_at = now

    def park(self, credential: Credential) -> None:
        """The vendor refused this key."""
        credential.parked_at = self._clock()

    def accepted(self, credential: Credential) -> None:
        """The vendor took this key."""
        credential.parked_at = None

    def freed_in(self, now: float) -> float:
        """Seconds until some key may be used: 0 if one may now."""
        return min(max(0.0, (one.parked_at or now - PARKED_FOR) + PARKED_FOR - now) for one in self._credentials)

    def adopt(self, before: CredentialPool) -> None:
        """Takes over what another pool knows of the same keys."""
        known = {one.tag: one for one in before._credentials}
        for one in self._credentials:
            if (same := known.get(one.tag)) is not None:
                one.used_at, one.parked_at = same.used_at, same.parked_at


def _tag(key: Key) -> bytes:
    text = getattr(key, "identity", None) or key.reveal()  # what mints its tokens has none at first
    return hashlib.sha256(b"gproxyd credential\0" + text.encode("ascii")).digest()[:16]
