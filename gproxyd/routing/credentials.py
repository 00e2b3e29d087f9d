"""The keys of a provider, used in turn; a refused one is parked.

Invariant: a parked key is used again only when its time is over or no other key is left; then the one that has been
parked longest is tried, so that a key mended at the vendor works again without a restart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PARKED_FOR = 60.0
"""Seconds for which a refused key is left alone while there are others."""


class Key(Protocol):
    """A secret: shown by `reveal()` and nothing else."""

    def reveal(self) -> str: ...


@dataclass(slots=True, eq=False)
class Credential:
    """One key of a pool. Times are monotonic seconds."""

    key: Key | None
    used_at: float = 0.0
    parked_at: float | None = None


class CredentialPool:
    """The keys of one provider, in the order of configuration. One without keys serves providers that want none."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._credentials = [Credential(key) for key in keys] or [Credential(None)]

    def take(self) -> Credential:
        """The key for the next attempt: of those not parked the one that has rested longest."""
        if len(self._credentials) == 1:
            return self._credentials[0]
        now = time.monotonic()
        fit = [one for one in self._credentials if one.parked_at is None or now - one.parked_at > PARKED_FOR]
        if fit:
            chosen = min(fit, key=lambda one: one.used_at)
        else:
            chosen = min(self._credentials, key=lambda one: one.parked_at or 0.0)
        chosen.used_at = now
        return chosen

    def park(self, credential: Credential) -> None:
        """The vendor refused this key."""
        credential.parked_at = time.monotonic()

    def accepted(self, credential: Credential) -> None:
        """The vendor took this key."""
        credential.parked_at = None
