"""The daemon's admin API, over its Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urlencode

DEFAULT = Path("/run/gproxyd")
NAME = "admin.sock"

TIMEOUT = 120.0
"""Seconds: asking all vendors for their models may take a while."""

MAX_PAGE = 1000


class Failed(Exception):
    """The command has failed; the text says why."""


def socket_path(given: Path | None, environ: Mapping[str, str]) -> Path:
    """As given, else `$GPROXYD_ADMIN_SOCKET`, else `admin.sock` in `$RUNTIME_DIRECTORY`, else in /run/gproxyd."""
    if given is not None:
        return given
    if named := environ.get("GPROXYD_ADMIN_SOCKET"):
        return Path(named)
    return Path(environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or DEFAULT, NAME)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(self._path))


class Client:
    """Asks the daemon. Every method raises Failed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = _Connection(path)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def get(self, path: str, **query: Any) -> Any:
        return self.ask("GET", path, query=query)

    def ask(self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None) -> Any:
        """The JSON of one answer. Parameters that are None are left out."""
        response = self._open(method, path, body, query)
        try:
            return json.loads(self._read(response))
        except ValueError:
            raise Failed(f"what listens on {self._path} does not answer as gproxyd does") from None

    def rows(self, path: str, most: int | None = None, **query: Any) -> list[Any]:
        """The rows of a list, page after page; at most so many."""
        found: list[Any] = []
        cursor = None
        while most is None or len(found) < most:
            page = MAX_PAGE if most is None else min(MAX_PAGE, most - len(found))
            told = self.get(path, **query, limit=page, cursor=cursor)
            found += told["data"]
            cursor = told["next"]
            if cursor is None:
                break
        return found

    def lines(self, path: str, patient: bool = False, **query: Any) -> Iterator[bytes]:
        """The lines of an answer as they come; `patient` waits for each for ever."""
        response = self._open("GET", path, None, query)
        if patient and self._connection.sock is not None:
            self._connection.sock.settimeout(None)
        while line := self._line(response):
            yield line

    def _open(self, method: str, path: str, body: Any, query: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = path + (f"?{urlencode(given)}" if given else "")
        content = None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, target, content, {"Content-Type": "application/json"} if content else {})
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error) from error
        if response.status >= 400:
            raise Failed(_message(response.status, self._read(response)))
        return response

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error) from error

    def _line(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.readline()
        except (OSError, http.client.HTTPException) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> Failed:
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return Failed(
                f"no gproxyd runs here: nobody listens on {self._path} (--socket or $GPROXYD_ADMIN_SOCKET name another)"
            )
        if isinstance(error, PermissionError):
            return Failed(f"no permission for {self._path}: be root, or the user that gproxyd runs as")
        if isinstance(error, TimeoutError):
            return Failed(f"gproxyd did not answer within {TIMEOUT:.0f} s")
        if isinstance(error, http.client.BadStatusLine | ConnectionError | http.client.IncompleteRead):
            return Failed("gproxyd ended the connection before it had answered")
        return Failed(f"cannot talk to {self._path}: {error}")


def _message(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"gproxyd answered with status {status}"


def user_path(name: str, *more: str) -> str:
    """The path of a user, or of something below it. A name is one segment, whatever it holds."""
    return "/admin/users/" + "/".join(quote(part, safe="") for part in (name, *more))
