"""Servers of blocking sockets, a thread per connection: for what asyncio would smooth over."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def accepting(listener: socket.socket, serve: Callable[[socket.socket], object]) -> Iterator[None]:
    """Serves each connection of `listener`. At the end of the block all of them end, and the listener, too."""
    connections: list[socket.socket] = []

    def run(connection: socket.socket) -> None:
        with connection:
            try:
                serve(connection)
            except OSError:
                pass  # the peer left; the test looks at what it left behind

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threading.Thread(target=run, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # gone already


@contextmanager
def listening(serve: Callable[[socket.socket], object], *, rcvbuf: int | None = None) -> Iterator[int]:
    """A server on a port of its own, which it gives."""
    listener = socket.socket()
    if rcvbuf is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    with accepting(listener, serve):
        yield listener.getsockname()[1]


@contextmanager
def black_hole() -> Iterator[int]:
    """A port at which connecting takes for ever: nobody accepts, and the kernel's queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
                fillers.append(filler)
            time.sleep(0.02)
            yield port
        finally:
            for filler in fillers:
                filler.close()


def read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """Reads to the end of a head: the head, and what came behind it."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            raise ConnectionResetError("the peer left before its head was complete")
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def read_request(connection: socket.socket) -> tuple[bytes, bytes]:
    """Reads one request whose length is told: its head and its body."""
    head, body = read_head(connection)
    match = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    length = int(match[1]) if match else 0
    while len(body) < length:
        more = connection.recv(65536)
        if not more:
            raise ConnectionResetError("the peer left in its body")
        body += more
    return head, body
