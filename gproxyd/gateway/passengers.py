"""Who a client's connection speaks to while a request is answered."""

from __future__ import annotations

from typing import Protocol


class Writable(Protocol):
    """Who writes into a client's transport and must know when to stop."""

    def client_paused(self) -> None: ...
    def client_resumed(self) -> None: ...


class Passenger(Protocol):
    """A request that is answered on the short way."""

    def client_left(self) -> None: ...
