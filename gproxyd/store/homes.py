"""Where things live: the id of a response, a file, a batch leads to the provider that made it.

Invariants: whoever remembers or forgets never waits; whoever looks waits for the reader's thread at most, never for the
disk on the loop; memory is bounded. What was remembered is found at once, also while the database is away, and after a
restart: a kill loses what came in its last GATHER seconds, of files and batches its last transaction.

An id is held as a digest, which bounds its size and keeps a stolen database from telling any. Nobody's name stands
beside it: a home only says where a request is to go, as if its path had named the provider, and whether the caller may
use that provider is asked afterwards, of everybody alike. Guessing an id gains nothing.
"""

from __future__ import annotations

import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import Final, NamedTuple

from gproxyd.store.database import MAX_PAGE, Database
from gproxyd.store.errors import Unavailable
from gproxyd.store.gathering import Gatherer
from gproxyd.store.ledger import Warn
from gproxyd.store.reports import delete_in_turns

MOST_KNOWN = 50_000
"""Homes in memory: some 10 MiB."""

MOST_WAITING = 50_000
"""Changes that wait in memory while the database takes none."""

MOST_ASKED = 100
BATCH = 500
"""Rows per transaction, at most."""
DAY = 86_400.0

KEEP: Final[Mapping[str, float | None]] = {
    "response": 30 * DAY,  # as long as OpenAI keeps them
    "conversation": None,
    "file": None,
    "batch": 90 * DAY,
    "container": 30 * DAY,
    "reasoning": 7 * DAY,
}
"""Seconds for which the home of a kind of thing is kept; None: until it is deleted. Of any other kind: 30 days."""

_LASTING = frozenset({"file", "batch"})  # nobody sends these again: they are written at once

_PUT = (
    "INSERT INTO homes VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
    "provider = excluded.provider, account = excluded.account, expires_at = excluded.expires_at"
)
_PRUNE = "DELETE FROM homes WHERE id IN (SELECT id FROM homes WHERE expires_at < ? LIMIT ?)"


class Home(NamedTuple):
    """`account` says which of the provider's credentials it was, by a name that is no secret; "" is any."""

    provider: str
    account: str = ""


class _Entry(NamedTuple):
    home: Home
    expires_at: float | None

    def lives(self, now: float) -> bool:
        return self.expires_at is None or now < self.expires_at


class Homes(Gatherer):
    """Remembers homes. A kind is one of KEEP, an id the vendor's own; equal ids of two kinds are two things.

    written  changes that the database got
    dropped  changes that are lost to it: it was away for too long
    """

    REFUSED = "homes_refused"
    DROPPED = "homes_dropped"

    def __init__(
        self, database: Database, warn: Warn, *, most: int = MOST_KNOWN, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(database, warn)
        self._most = most
        self._clock = clock
        self._known: OrderedDict[bytes, _Entry] = OrderedDict()
        self._waiting: dict[bytes, _Entry | None] = {}  # None: to be deleted
        self._changes = 0

    @property
    def queued(self) -> int:
        """Changes that are not in the database yet."""
        return len(self._waiting)

    def remember(self, kind: str, id: str, home: Home) -> None:
        """A reply showed that this lives there."""
        digest, now, keep = _digest(kind, id), self._clock(), KEEP.get(kind, 30 * DAY)
        known = self._known.get(digest)
        if known is not None and known.home == home and (keep is None or (known.expires_at or 0) > now + keep / 2):
            self._known.move_to_end(digest)
            return  # lists tell the same again and again
        entry = _Entry(home, None if keep is None else now + keep)
        self._hold(digest, entry)
        self._change(digest, entry, kind in _LASTING)

    def forget(self, kind: str, id: str) -> None:
        """It is deleted."""
        digest = _digest(kind, id)
        self._known.pop(digest, None)
        self._change(digest, None, False)

    def known(self, kind: str, id: str) -> Home | None:
        """Its home, if that is in memory."""
        entry = self._look_up(_digest(kind, id))
        return entry.home if entry is not None else None

    async def find(self, kind: str, id: str) -> Home | None:
        """Its home; None if nobody knows, or the database is away."""
        return await self.first(((kind, id),))

    async def first(self, named: Iterable[tuple[str, str]]) -> Home | None:
        """The home of the first of these (kind, id) that has one. All are looked up at once, MOST_ASKED at most."""
        digests = [_digest(kind, id) for kind, id in islice(named, MOST_ASKED)]
        unknown: list[bytes] = []
        for digest in digests:
            entry = self._look_up(digest)
            if entry is not None:
                if not unknown:
                    return entry.home
                break  # no later one can be the first
            if digest not in self._waiting:
                unknown.append(digest)
        found = await self._read(unknown) if unknown else {}
        for digest in digests:
            entry = self._look_up(digest) or found.get(digest)
            if entry is not None:
                return entry.home
        return None

    def _look_up(self, digest: bytes) -> _Entry | None:
        entry = self._known.get(digest)
        if entry is None:
            entry = self._waiting.get(digest)
        else:
            self._known.move_to_end(digest)
        return entry if entry is not None and entry.lives(self._clock()) else None

    async def _read(self, digests: list[bytes]) -> Mapping[bytes, _Entry]:
        """What the database knows of these."""
        marks, changes = ", ".join("?" * len(digests)), self._changes
        try:
            rows = await self._database.read(f"SELECT * FROM homes WHERE id IN ({marks})", digests)  # noqa: S608
        except Unavailable as error:
            self._alarm("homes_unreadable", error=str(error))
            return {}
        now = self._clock()
        entries = {bytes(id): _Entry(Home(provider, account), until) for id, provider, account, until in rows}
        found = {digest: entry for digest, entry in entries.items() if entry.lives(now)}
        if changes == self._changes:  # else one of them may have been deleted meanwhile
            for digest, entry in found.items():
                self._hold(digest, entry)
        return {digest: entry for digest, entry in found.items() if digest not in self._waiting}

    def _hold(self, digest: bytes, entry: _Entry) -> None:
        self._known[digest] = entry
        self._known.move_to_end(digest)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def _change(self, digest: bytes, entry: _Entry | None, hurried: bool) -> None:
        self._changes += 1
        if len(self._waiting) >= MOST_WAITING and digest not in self._waiting:
            self.dropped += 1
            return
        self._waiting[digest] = entry
        self._woken(hurried)

    async def _write_waiting(self) -> None:
        while self._waiting:
            # They stay where they are found until they are written; what changes meanwhile is written after.
            changes = dict(islice(self._waiting.items(), BATCH))
            await self._database.write(partial(_write, changes=changes))
            for digest, entry in changes.items():
                if self._waiting[digest] is entry:
                    del self._waiting[digest]
            self.written += len(changes)

    async def prune(self, now: float | None = None) -> int:
        """Deletes what is kept no longer, little by little, and says how many. Raises Unavailable."""
        return await delete_in_turns(self._database, _PRUNE, self._clock() if now is None else now, MAX_PAGE)


def _digest(kind: str, id: str) -> bytes:
    return blake2b(f"{kind} {id}".encode("utf-8", "replace"), digest_size=16).digest()


def _write(connection: sqlite3.Connection, changes: Mapping[bytes, _Entry | None]) -> None:
    kept = [(digest, *entry.home, entry.expires_at) for digest, entry in changes.items() if entry is not None]
    connection.executemany(_PUT, kept)
    connection.executemany(
        "DELETE FROM homes WHERE id = ?", [(one,) for one, entry in changes.items() if entry is None]
    )
