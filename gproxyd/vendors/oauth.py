"""Google service accounts: a key that is never sent, and the tokens that are fetched with it.

Invariants
- A token is fetched in a thread, by one fetch at a time for all who wait; waiting for it blocks nobody else.
- It is renewed before it expires. Until then everybody gets it without waiting, also while its successor is fetched;
  when fetching fails, it is used up to its end.
- Neither key nor token is in any text: `repr` is the secret's name, and no error quotes what Google's library, the
  key or the token endpoint says.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

from gproxyd.errors import GproxydError, UpstreamError
from gproxyd.types import Origin

SCOPE = "https://www.googleapis.com/auth/cloud-platform"

RENEW = 300.0
"""Seconds before its end at which a token's successor is fetched. Tokens live for an hour."""

LAST = 10.0
"""Seconds before its end at which a token is used no more: it has to arrive before it expires."""

PAUSE = 30.0
"""Seconds between two attempts to renew a token that can still be used."""

TIMEOUT = 10.0
"""Seconds for each step of an exchange with the token endpoint."""

MAX_ANSWER = 64 * 1024
"""Bytes of an answer of the token endpoint."""

_LOCAL = frozenset({"127.0.0.1", "::1", "localhost"})


class Key(Protocol):
    """A secret: shown by `reveal()` and nothing else."""

    def reveal(self) -> str: ...


class UnusableKey(GproxydError):
    """The key of a service account cannot be used. The text says why and shows nothing of it."""


class ServiceAccount:
    """A service account in the place of a key: `reveal` gives the token of the hour.

    Raises UnusableKey if the secret is not the JSON key of a service account, or `google-auth` is not installed.
    `now` gives seconds that only grow. `identity` tells one key from others and is no secret.
    """

    def __init__(self, key: Key, *, proxy: Origin | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._name = repr(key)
        self._credentials, self.identity = _credentials(key)
        self._transport = _transport(proxy)
        self._now = now
        self._token = ""
        self._ends = 0.0
        self._tried = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return self._name

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("a secret is not pickled or copied")

    @property
    def fresh(self) -> bool:
        """Whether there is a token, and its successor is not due."""
        return self._now() < self._ends - RENEW

    @property
    def usable(self) -> bool:
        return self._now() < self._ends - LAST

    def reveal(self) -> str:
        """The token. Call it where the token is put on the wire, after `ready`. Raises UpstreamError without one."""
        if not self.usable:
            raise UpstreamError("auth", "there is no token for the provider's service account")
        return self._token

    def forget(self) -> None:
        """The vendor refused the token: the next request fetches another."""
        self._ends = 0.0

    async def ready(self) -> None:
        """Returns when there is a token that can be used. Raises UpstreamError if none can be had."""
        if self.fresh:
            return
        if self.usable:  # nobody has to wait for the next one
            if self._fetching is None and self._now() - self._tried > PAUSE:
                self._fetch()
            return
        fetching = self._fetching or self._fetch()
        await asyncio.shield(fetching)

    def _fetch(self) -> asyncio.Task[None]:
        self._tried = self._now()
        self._fetching = asyncio.get_running_loop().create_task(self._renew())
        self._fetching.add_done_callback(self._fetched)
        return self._fetching

    def _fetched(self, task: asyncio.Task[None]) -> None:
        self._fetching = None
        if not task.cancelled():
            task.exception()  # looked at: whoever waits hears of it; with a token in hand, the next attempt will do

    async def _renew(self) -> None:
        asked = self._now()
        try:
            token, lasts = await asyncio.to_thread(self._exchange)
        except UpstreamError:
            raise
        except Exception:  # noqa: BLE001 - whatever a foreign library raises may quote the key or the answer
            raise _no_token() from None
        self._token, self._ends = token, asked + lasts

    def _exchange(self) -> tuple[str, float]:
        """A new token, and the seconds for which it holds. Runs in a thread."""
        self._credentials.refresh(self._transport)
        token, expiry = self._credentials.token, self._credentials.expiry
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or expiry is None:
            raise _no_token()
        left = (expiry.replace(tzinfo=datetime.UTC) - datetime.datetime.now(datetime.UTC)).total_seconds()
        return token, left


def _no_token() -> UpstreamError:
    return UpstreamError("auth", "no token could be had for the gateway's own service account", code="upstream_auth")


def _credentials(key: Key) -> tuple[Any, str]:
    """What Google's library makes of a key, and the key's identity. Raises UnusableKey."""
    try:
        from google.oauth2.service_account import Credentials
    except ImportError:
        raise UnusableKey("needs the package google-auth (pip install 'gproxyd[vertex]')") from None
    try:
        told = json.loads(key.reveal())
    except ValueError:
        told = None
    if not isinstance(told, dict) or told.get("type") != "service_account":
        raise UnusableKey("is not the JSON key of a Google service account")
    endpoint = urlsplit(str(told.get("token_uri")))
    if endpoint.scheme != "https" and not (endpoint.scheme == "http" and endpoint.hostname in _LOCAL):
        raise UnusableKey("names a token endpoint that is not https")
    try:
        credentials: Any = Credentials.from_service_account_info(told, scopes=[SCOPE])  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - whatever a foreign library raises may quote the key
        raise UnusableKey("is not a sound key of a Google service account") from None
    return credentials, f"{told.get('client_email')}/{told.get('private_key_id')}"


async def ready(key: Key | None) -> None:
    """Returns when a key can be put on the wire: at once, unless it is a service account. Raises UpstreamError."""
    if isinstance(key, ServiceAccount):
        await key.ready()


def is_service_account(key: Key) -> bool:
    """Whether a secret looks like one: such must not be sent to anybody."""
    return key.reveal().lstrip().startswith("{")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The assertion goes to the endpoint that the key names, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _transport(proxy: Origin | None) -> Callable[..., Any]:
    """What Google's library calls to send a request (google.auth.transport.Request), out through the provider's proxy.

    The environment's proxies are not looked at: the configuration says where the gateway goes out.
    """
    proxies = {} if proxy is None else {"http": str(proxy), "https": str(proxy)}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect())

    def send(
        url: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **_: Any,
    ) -> _Answer:
        request = urllib.request.Request(url, data=body, headers=dict(headers or {}), method=method)  # noqa: S310
        try:
            with opener.open(request, timeout=TIMEOUT) as answer:
                return _Answer(answer.status, dict(answer.headers), answer.read(MAX_ANSWER))
        except urllib.error.HTTPError as refused:
            with refused:
                return _Answer(refused.code, dict(refused.headers), refused.read(MAX_ANSWER))
        except OSError:
            raise UpstreamError(
                "connect", "the token endpoint of the provider's service account cannot be reached"
            ) from None

    return send


class _Answer:
    """What Google's library wants of an answer (google.auth.transport.Response)."""

    def __init__(self, status: int, headers: Mapping[str, str], data: bytes) -> None:
        self.status = status
        self.headers = headers
        self.data = data
