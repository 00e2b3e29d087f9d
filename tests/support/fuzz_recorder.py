"""An upstream that keeps every byte it gets, and a strict reader of what that is.

The reader shares no code with the gateway. What the gateway began and gave up must still be the beginning of one
well-formed request.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.support.framing import CRLF, read_strictly
from tests.support.replies import json_reply
from tests.support.running import until

OK = json_reply(b"{}")

_END = b"\r\n\r\n"
_SIZE = re.compile(rb"[1-9a-f][0-9a-f]{0,7}|0")


class Received(NamedTuple):
    """A request as it came. `body` has no framing any more; where it is not `whole`, it is what came of it."""

    method: str
    path: bytes
    query: bytes | None
    headers: list[tuple[bytes, bytes]]
    body: bytes
    whole: bool


def received(data: bytes) -> list[Received]:
    """All that came on one connection. Only the last may not be whole. Raises ValueError for what no request is."""
    found: list[Received] = []
    while data:
        head, mark, rest = data.partition(_END)
        if not mark:
            break  # given up within a head: nobody takes that for a request
        one, taken = _first(head, rest)
        if one.whole:
            message = data[: len(head) + len(_END) + taken]
            if [sent.body for sent in read_strictly(message)] != [one.body]:
                raise ValueError(f"not one request: {message!r}")
        elif taken < len(rest):
            raise ValueError(f"a body with something else in it: {rest!r}")
        found.append(one)
        data = rest[taken:]
    return found


def _first(head: bytes, rest: bytes) -> tuple[Received, int]:
    """The request of that head, and how many bytes of `rest` are its body."""
    lines = head.split(CRLF)
    unframed = [line for line in lines if not line.lower().startswith((b"content-length:", b"transfer-encoding:"))]
    sent = read_strictly(CRLF.join(unframed) + _END)[0]
    headers = [(name, value) for name, _, value in (line.partition(b": ") for line in lines[1:])]
    told = {name.lower(): value for name, value in headers}
    if b"transfer-encoding" in told:
        body, taken, whole = _dechunked(rest)
    else:
        size = int(told.get(b"content-length", b"0"))
        body, whole = rest[:size], len(rest) >= size
        taken = len(body)
    path, mark, query = sent.target.partition(b"?")
    return Received(sent.method, path, query if mark else None, headers, body, whole), taken


def _dechunked(data: bytes) -> tuple[bytes, int, bool]:
    """A body without its framing, the bytes that it takes, and whether its end came. Raises ValueError."""
    body, at = b"", 0
    while True:
        end = data.find(CRLF, at)
        line = data[at:] if end < 0 else data[at:end]
        if end < 0 and len(line) <= 8:
            return body, len(data), False
        if not _SIZE.fullmatch(line):
            raise ValueError(f"not a chunk's size: {line!r}")
        start, size = end + 2, int(line, 16)
        body += data[start : start + size]
        at = start + size + 2
        if not CRLF.startswith(data[start + size : at]):
            raise ValueError(f"a chunk that is longer than its size: {data[start:at]!r}")
        if len(data) < at:
            return body, len(data), False
        if not size:
            return body, at, True


class Recorder:
    """Keeps every byte of every connection, and answers whatever looks like a whole request."""

    def __init__(self) -> None:
        self.connections: list[bytearray] = []
        self._talks: dict[int, threading.Thread] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]

    def requests(self) -> list[Received]:
        """What came since `begin`, in its order. Raises ValueError for what no request is."""
        return [one for data in self.connections for one in received(bytes(data))]

    def serve(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                return
            got = bytearray()
            self.connections.append(got)
            talk = threading.Thread(target=self._talk, args=(connection, got), daemon=True)
            talk.start()
            self._talks[peer[1]] = talk

    def begin(self) -> None:
        """Forgets what came so far."""
        self.connections.clear()
        self._talks.clear()

    def settle(self) -> None:
        """Waits until all is here of connections that have ended: also of those that nobody had accepted yet."""
        with socket.create_connection(("127.0.0.1", self.port)) as last:
            until(lambda: self._talks.get(last.getsockname()[1]))  # they are accepted in their order
        for talk in list(self._talks.values()):
            talk.join(5)
            assert not talk.is_alive(), "a connection has not ended"

    def _talk(self, connection: socket.socket, got: bytearray) -> None:
        answered = 0
        with connection:
            while True:
                try:
                    more = connection.recv(65536)
                    if not more:
                        return
                    got += more
                    found = _whole(bytes(got))
                    while answered < found:
                        answered += 1
                        connection.sendall(OK)
                except OSError:
                    return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _whole(data: bytes) -> int:
    """How many whole requests there are. What is none never becomes one, and is found at the end of the round."""
    try:
        return sum(one.whole for one in received(data))
    except ValueError:
        return 0


@contextmanager
def recording() -> Iterator[Recorder]:
    recorder = Recorder()
    thread = threading.Thread(target=recorder.serve, daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        recorder.close()
        thread.join(5)
