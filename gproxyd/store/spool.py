"""Records on disk before they are in the database: files of lines, one JSON array each.

Invariants: a line is one write to a file that only this process appends to, so a process that is killed loses nothing
it had written; a file is deleted only when its reader says so; files belong to the process whose name they bear, and
whoever holds the lock on that process's own lock file may read and delete them: the process itself while it lives,
and anyone who finds it dead.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

SEGMENT = 8 * 2**20
"""Bytes after which a new file begins."""

MOST_ORPHANS = 32
"""Dead processes whose files are taken over at a time: each costs a descriptor."""

_APPEND = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC


@dataclass(slots=True, eq=False)
class Owner:
    """A process, living or dead, whose lock is held here."""

    lock: Path
    descriptor: int


@dataclass(slots=True, eq=False)
class Segment:
    """One file. `read_to` is the offset up to which it is in the database, None = as the database remembers."""

    path: Path
    owner: Owner
    read_to: int | None = None

    @property
    def name(self) -> str:
        return self.path.name


class Spool:
    """This process's files, and those of dead processes that it has taken over. Blocks for as long as a write takes."""

    def __init__(self, folder: Path, *, segment_bytes: int = SEGMENT) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._rotate_at = segment_bytes
        self._owner: Owner | None = None
        self._descriptor = -1
        self._count = 0
        self._torn = False
        self.size = 0
        self.current: Segment | None = None
        self.segments: deque[Segment] = deque()

    def open(self) -> None:
        """Begins to take lines; makes the folder where there is none. Raises OSError. Does nothing if it is open."""
        if self._owner is None:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._owner = _own(self._folder)
        if self.current is None:
            self._begin_segment(self._owner)

    def append(self, line: bytes) -> None:
        """Writes one line with its end. Raises OSError, and then it is not there."""
        if self.size >= self._rotate_at:
            self._rotate()
        if self._torn:
            line = b"\n" + line
        written = os.write(self._descriptor, line)
        if written != len(line):
            self._take_back(written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False
        self.size += written

    def _take_back(self, written: int) -> None:
        """A part of a line is in the file. No reader has taken it: it has no end yet."""
        try:
            if not self._torn:
                os.ftruncate(self._descriptor, self.size)
                return
        except OSError:
            pass  # it stays, and the next line begins with a line end, so that it stands alone and is skipped
        self.size += written
        self._torn = True

    def _rotate(self) -> None:
        assert self._owner is not None
        try:
            self._begin_segment(self._owner)
        except OSError:
            # The old one takes more; the next try comes after as much again.
            self._rotate_at += self._segment_bytes

    def _begin_segment(self, owner: Owner) -> None:
        path = owner.lock.with_suffix(f".{self._count:06d}")
        descriptor = os.open(path, _APPEND, 0o600)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._count, self.size, self._torn = descriptor, self._count + 1, 0, False
        self._rotate_at = self._segment_bytes
        self.current = Segment(path, owner, 0)
        self.segments.append(self.current)

    def begin_anew(self) -> None:
        """The current file was deleted under our hands: what was not read of it goes into a new one. Raises OSError."""
        assert self.current is not None
        assert self._owner is not None
        gone, read_to = self.current, self.current.read_to or 0
        unread = os.pread(self._descriptor, self.size - read_to, read_to)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if not self._owner.lock.exists():
            os.close(self._owner.descriptor)
            self._owner = None  # first: should the next step fail, its descriptor must not be used again
            self._owner = _own(self._folder)
        self._begin_segment(self._owner)
        self.segments.remove(gone)
        for line in unread.splitlines(keepends=True):
            self.append(line)

    def adopt(self) -> list[Segment]:
        """Takes over what dead processes left. Raises OSError if the folder cannot be read."""
        names = sorted(os.listdir(self._folder))
        held = {segment.owner.lock.name for segment in self.segments}
        if self._owner is not None:
            held.add(self._owner.lock.name)
        owners = sorted({f"{name.rpartition('.')[0]}.lock" for name in names if _is_ours(name)} - held)
        found: list[Segment] = []
        for lock in owners[:MOST_ORPHANS]:
            owner = _take(self._folder / lock)
            if owner is None:
                continue
            stem = lock.removesuffix("lock")
            # Looked for again under the lock: another may have finished them meanwhile.
            left = sorted(name for name in os.listdir(self._folder) if name.startswith(stem) and name != lock)
            if not left:
                _release(owner)
            found.extend(Segment(self._folder / name, owner) for name in left)
        self.segments.extendleft(reversed(found))
        return found

    def is_own(self, segment: Segment) -> bool:
        return segment.owner is self._owner

    def retire(self, segment: Segment) -> None:
        """Forgets a file that is in the database as a whole and was deleted."""
        self.segments.remove(segment)
        owner = segment.owner
        if owner is not self._owner and all(other.owner is not owner for other in self.segments):
            _release(owner)

    def close(self) -> None:
        """Lets go of everything. What was read to its end is deleted, the rest waits for the next process."""
        if self.current is not None and self.current.read_to == self.size:
            self.segments.remove(self.current)
            self.current.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        unfinished = {segment.owner for segment in self.segments}
        for owner in unfinished:
            os.close(owner.descriptor)
        if self._owner is not None and self._owner not in unfinished:
            _release(self._owner)
        self.segments.clear()
        self._owner = self.current = None


def read_lines(path: Path, start: int, most: int, most_bytes: int = 2**18) -> tuple[list[bytes], int, bool]:
    """Up to `most` whole lines from `start`, where the last of them ends, and whether there is more after that.

    Raises OSError. A last line without an end is not taken: it may be on its way, or torn.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        data = os.pread(descriptor, most_bytes, start) if start < size else b""
    finally:
        os.close(descriptor)
    lines = data.split(b"\n", most)
    rest = lines.pop()
    end = start + len(data) - len(rest)
    if not lines and len(data) == most_bytes:
        # No line of ours is that long: what a broken disk left is skipped.
        return [data], start + len(data), start + len(data) < size
    return lines, end, end < size


_NAME = re.compile(r"usage-[0-9]+-[0-9]+\.(?:lock|[0-9]+)")


def _is_ours(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def _own(folder: Path) -> Owner:
    """A lock file of a name that nobody ever had. Raises OSError."""
    while True:
        lock = folder / f"usage-{time.time_ns():020d}-{os.getpid()}.lock"
        try:
            os.close(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            continue
        # Until it is locked, another may take it for one of the dead and delete it; then the next name is tried.
        owner = _take(lock)
        if owner is not None:
            if _is_file(owner.descriptor, lock):
                return owner
            os.close(owner.descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _take(lock: Path) -> Owner | None:
    """The lock of a dead process, which may have lost its file; None if its process lives. Raises OSError."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return Owner(lock, descriptor)


def _release(owner: Owner) -> None:
    """The lock file goes while it is still locked, so nobody can hold a lock that means nothing."""
    try:
        os.unlink(owner.lock)
    except FileNotFoundError:
        pass  # somebody tidied up; there is nothing left to delete
    os.close(owner.descriptor)
