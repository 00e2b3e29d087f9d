"""The journal's native protocol: one datagram to journald is one entry of named fields.

Invariants: a field's name comes from the code, never from a peer, and its value cannot become another field; whoever
sends is never held up for longer than PATIENCE by a journald that does not read; what could not be sent is counted.

The form of an entry, and what becomes of one that does not fit into a datagram, is
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/; the fields' meaning is systemd.journal-fields(7).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

SOCKET = Path("/run/systemd/journal/socket")

MAX_FIELD = 512
"""Letters of a value that are told."""

PATIENCE = 5.0
"""Seconds for which an entry waits for journald to read."""

SETTLE = 0.05
"""Seconds that a process should live on after its last entry: journald looks up whose it was while it reads."""

_BUFFER = 8 * 2**20
"""Bytes that may be on their way: a burst of entries is taken by the kernel, not waited for."""

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
_LETTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")

MESSAGE_IDS = {
    "request": "3bde2fe6d12b4206bb8e215e6b7d2935",
    "ready": "c63ba35b6ffc4d0080dc08bb1dafa2f6",
    "reloaded": "16d2fe5b42dc402b946a2ee5fd7bb5bf",
    "reload_refused": "31057634ee9848859dffd7eef9047784",
    "draining": "0c88fa3da17d4c91b7567ef862053c4f",
    "stopped": "fa886baf85964325808e2a34662a727d",
    "configuration": "8f52c5262978415ab88f5c4f31ff8ebe",
    "credential_refused": "45a1409d3c8a402e8725dfb85bafd5f9",
    "bug": "efa9472441ab4d3a8e07b3356e4710f9",
    "database": "b4064760358a4a6e895af67ccdb21b0b",
    "database_log_large": "0e6dba2782bf496e9e70265bfeae8ebf",
    "library": "214f966d1f774e3c925d283330971e7a",
    "log_lines_dropped": "0e561dfb16914acd9b5ddd8a0351b3d6",
    "malformed_request": "3b92fbd86f6640f496202fcc17bb5e44",
    "connections_refused": "af779a56d2b145a29d48db620863f400",
    "slow_parser": "787498e40ed145b383296a132e321176",
    "usage_records_dropped": "1ee517434fd942939a7a266394243073",
    "usage_store_refuses": "6e144d0340d5426ca3801331d04dbd8d",
    "usage_spool_refuses": "fd9ea135b7d84166b7c2ed060c71960f",
    "usage_spool_unreadable": "91222b6f19bd4378885eb5b8abe55e02",
    "usage_spool_deleted": "698e860adb234821874d16bad6bc7dd3",
    "usage_lines_unreadable": "b8008fa4345642fbbaa6d45dfaa19877",
    "usage_writer_died": "94c3d6ba014a40938844f36623909261",
    "request_log_refused": "166d37ea803f42c49f7f6072bfe701d8",
    "request_log_dropped": "d38335a3bb794620bc4acde8a12bc43b",
    "hand_over_failed": "501bdb1988794b69a730850af75b6d29",
    "handed_over": "f274628922de4661b16bde66344222a0",
    "spans_lost": "08515a6deb6040d9bde492c37735ba6a",
    "homes_dropped": "ac493bf2f5794a64b80f88b88c626009",
    "homes_unreadable": "ef47945c62814a57ae84670acaf23bd2",
    "homes_refused": "a36b40de7387464d9c4b88abbe6cf751",
    "discovery": "680fdc73c12f41e9b2d76c92c47f1813",
}
"""The events that `systemd/gproxyd.catalog` explains (`journalctl --catalog`)."""


def is_stream(descriptor: int, stream: str | None) -> bool:
    """Whether a descriptor leads into the journal already, by `$JOURNAL_STREAM` ("device:inode")."""
    if not stream:
        return False
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{status.st_dev}:{status.st_ino}"


def entry(at: str, level: str, event: str, message: str, fields: Mapping[str, Any]) -> bytes:
    """One entry. `fields` are plain values, those that are None are left out; `at` is the time when it happened."""
    lines = [_head(level, event), f"GPROXYD_TIME={at}"]
    framed = b""
    if "\n" in message:
        framed = _frame("MESSAGE", message)
    else:
        lines.append(f"MESSAGE={message}")
    for name, value in fields.items():
        if value is None:
            continue
        kind = type(value)
        if kind is bool:
            value = "true" if value else "false"
        elif kind is not int and kind is not float:
            value = str(value)
            if len(value) > MAX_FIELD or not value.isprintable():
                value = shown(value)
                if "\n" in value:
                    framed += _frame(_name(name), value)
                    continue
        lines.append(f"{_name(name)}={value}")
    lines.append("")
    return "\n".join(lines).encode("utf-8", "replace") + framed


def shown(text: str) -> str:
    """A text of bounded length in which nothing moves a cursor; lines may end."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text[:MAX_FIELD])


def _frame(name: str, value: str) -> bytes:
    """The form for values of several lines: their length stands before them."""
    data = value.encode("utf-8", "replace")
    return b"%b\n%b%b\n" % (name.encode("ascii"), len(data).to_bytes(8, "little"), data)


@lru_cache(maxsize=256)
def _head(level: str, event: str) -> str:
    """What all entries of an event have in common."""
    head = f"PRIORITY={_PRIORITIES[level]}\nSYSLOG_IDENTIFIER=gproxyd\nGPROXYD_EVENT={event}"
    return f"{head}\nMESSAGE_ID={MESSAGE_IDS[event]}" if event in MESSAGE_IDS else head


@lru_cache(maxsize=256)
def _name(name: str) -> str:
    """journald takes capital letters, digits and underscores, 64 at most."""
    return "GPROXYD_" + "".join(letter if letter in _LETTERS else "_" for letter in name.upper())[:56]


class Sender:
    """Sends entries, from one thread. Raises OSError when made where no journald listens."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = path
        self._socket = self._connect()

    def _connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)  # as much as the system allows
            made.connect(str(self._path))
        except OSError:
            made.close()
            raise
        return made

    def send(self, entries: Sequence[bytes]) -> int:
        """How many of them are lost."""
        return sum(not self._sent(one) for one in entries)

    def _sent(self, data: bytes) -> bool:
        for again in (True, False):
            try:
                self._send(data)
                return True
            except OSError as failed:
                # journald was started anew; or it does not read (EAGAIN), and then nothing helps.
                if not again or failed.errno not in (errno.ECONNREFUSED, errno.ENOTCONN, errno.EPIPE):
                    return False
            try:
                fresh = self._connect()
            except OSError:
                return False
            self._socket.close()
            self._socket = fresh
        return False

    def _send(self, data: bytes) -> None:
        try:
            self._patiently([data])
        except OSError as failed:
            if failed.errno != errno.EMSGSIZE:
                raise
            self._send_file(data)

    def _patiently(self, data: Sequence[bytes], attached: Sequence[tuple[int, int, array[int]]] = ()) -> None:
        try:
            self._socket.sendmsg(data, attached)
        except BlockingIOError:
            waiting = select.poll()
            waiting.register(self._socket, select.POLLOUT)
            waiting.poll(PATIENCE * 1000)
            self._socket.sendmsg(data, attached)

    def _send_file(self, data: bytes) -> None:
        """What is too long for a datagram goes as a sealed file in memory, and the datagram is empty."""
        handle = os.memfd_create("gproxyd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(handle, "wb", closefd=True) as file:
            file.write(data)
            file.flush()
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
            self._patiently([], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [handle]))])

    def close(self) -> None:
        self._socket.close()
