"""A file found, judged, mended or moved aside, before anybody uses it.

Invariants: nothing is ever overwritten: a file that SQLite cannot trust is renamed with its log, one of a newer version
or of another program is not touched at all; nobody but the owner can read what is made here; a setting counts as made
only when SQLite says so.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from gproxyd.store.errors import StoreError, Unavailable
from gproxyd.store.schema import APPLICATION_ID, MIGRATIONS, migrate

BUSY = 2.0
"""Seconds to wait for somebody else's lock."""

PAGES_TO_CHECKPOINT = 1000
LOG_KEPT = 16 * 2**20
"""Bytes to which the write-ahead log shrinks again after it had to grow."""

Setting = tuple[str, str, str | int]
"""(pragma, what to set, what must be read back)"""

WRITER: tuple[Setting, ...] = (
    ("busy_timeout", str(int(BUSY * 1000)), int(BUSY * 1000)),
    ("journal_mode", "WAL", "wal"),
    ("synchronous", "NORMAL", 1),
    ("foreign_keys", "ON", 1),
    ("wal_autocheckpoint", str(PAGES_TO_CHECKPOINT), PAGES_TO_CHECKPOINT),
    ("journal_size_limit", str(LOG_KEPT), LOG_KEPT),
)
READER: tuple[Setting, ...] = (
    ("busy_timeout", str(int(BUSY * 1000)), int(BUSY * 1000)),
    ("wal_autocheckpoint", "0", 0),
    ("query_only", "ON", 1),
)

SMALLEST = 512
"""Bytes of the smallest page that SQLite knows."""

_UNTRUSTED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_COMPANIONS = ("", "-wal", "-shm")


class Gate:
    """Lets one connection at a time write, checkpoint, open or close, across processes.

    SQLite orders writers by itself, but its own checkpoints beside another's commit could lose pages until 3.51.3
    ("the WAL-reset bug"); and a file is judged and moved aside while nobody else does the same.
    The lock lies on a file of its own: closing any descriptor of the database would drop SQLite's locks on it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        deadline = time.monotonic() + BUSY
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Unavailable("another process holds the database") from None
            time.sleep(0.002)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._descriptor)


def open_writer(path: Path, gate: Gate, warnings: list[str]) -> sqlite3.Connection:
    """The connection that writes, on a file of the newest schema. Raises StoreError or sqlite3.Error."""
    with gate:
        _judge(path, warnings)
        connection = _connect(str(path), WRITER)
        try:
            migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads and never checkpoints."""
    return _connect(str(path), READER)


def companion(path: Path, suffix: str) -> Path:
    """The database's own `-wal`, `-shm` or whatever else lies beside it."""
    return path.with_name(path.name + suffix)


def _connect(path: str, settings: tuple[Setting, ...], *, uri: bool = False) -> sqlite3.Connection:
    # Transactions are begun and ended in words: the library's own would begin them at its leisure. It is opened in one
    # thread and used in another, never in two at once.
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False, uri=uri)
    try:
        for name, value, expected in settings:
            connection.execute(f"PRAGMA {name} = {value}").close()
            found = connection.execute(f"PRAGMA {name}").fetchone()
            if found != (expected,):
                raise StoreError(f"SQLite does not keep {name} = {value} here (a network file system?)")
    except BaseException:
        connection.close()
        raise
    return connection


def _judge(path: Path, warnings: list[str]) -> None:
    """Afterwards there is a file, empty or good, that is ours alone."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise StoreError(f"{path} is no file")
    if status is None or not status.st_size:
        what = "missing" if status is None else "empty"
        if _size(companion(path, "-wal")):
            # SQLite would take a log that belongs to nothing for rubbish and delete it.
            warnings.append(f"the database {path} is {what}, but not its log")
            _move_aside(path, warnings)
        elif status is not None:
            warnings.append(f"the database {path} is empty; a new one begins in it")
            return
        _create(path)
    elif (flaw := _flaw(path, status.st_size)) is not None:
        warnings.append(f"the database {path} is corrupt ({flaw}): users and keys made through the admin API are gone")
        _move_aside(path, warnings)
        _create(path)
    opened = [suffix for suffix in _COMPANIONS if _close_to_others(companion(path, suffix))]
    if opened:
        warnings.append(f"the database {path} was open to others; now it is not")


def _create(path: Path) -> None:
    # SQLite gives its other files the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _close_to_others(path: Path) -> bool:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return False
    if not mode & 0o077:
        return False
    path.chmod(mode & 0o700)
    return True


def _flaw(path: Path, size: int) -> str | None:
    """What makes the file untrustworthy. Raises StoreError for one that is somebody's but not ours to use."""
    if size < SMALLEST:
        return "it is too short"  # which SQLite would take for empty, and write over
    connection = _connect(f"file:{quote(str(path))}?mode=ro", (), uri=True)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application != APPLICATION_ID:
            raise StoreError(f"{path} belongs to another program; it is left alone")
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{path} was written by a newer gproxyd (schema {version}, this one knows {len(MIGRATIONS)}); "
                "it is left alone"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        return None if verdict == "ok" else "quick_check failed"
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _UNTRUSTED:
            raise
        return str(error)
    finally:
        connection.close()


def _move_aside(path: Path, warnings: list[str]) -> None:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name, count = f"{path.name}.corrupt-{stamp}", 1
    while path.with_name(name).exists():
        count += 1
        name = f"{path.name}.corrupt-{stamp}-{count}"
    aside = path.with_name(name)
    for suffix in _COMPANIONS:
        try:
            os.rename(companion(path, suffix), companion(aside, suffix))
        except FileNotFoundError:
            continue  # not every database has them
    warnings.append(f"{path} was moved to {aside}; a new database begins in its place")
