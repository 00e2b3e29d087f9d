"""Asks a vendor for its list of models, over a connection of its own: never on a request's path.

Invariants: an answer costs at most SECONDS and MOST_BYTES, all pages together; the provider's key goes nowhere but to
the provider; no redirect is followed; what goes wrong is told in words of ours, never the peer's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from gproxyd import __version__
from gproxyd.routing.providers import Face, Listing, Provider
from gproxyd.upstream.dial import may_dial, tls_context
from gproxyd.vendors import auth
from gproxyd.vendors.discovery import MOST_BYTES, Asking, Found, NoList

SECONDS = 10.0
"""For one vendor's list, all pages together."""

_OWN_HEADERS = {"User-Agent": f"gproxyd/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity"}
_ANTHROPIC = b"anthropic-version: 2023-06-01\r\n"
"""What that API wants to have from everybody, whoever serves it."""


def place(provider: Provider) -> str | None:
    """The address of a provider's list, without its query. None: it has none that could be asked for."""
    listing = provider.listing
    if listing is None or listing.face.auth == "service-account":
        return None
    return f"{listing.face.origin}{listing.face.target(listing.path).decode('ascii')}"


def session() -> aiohttp.ClientSession:
    """Connections that are closed after use, with the same rules as the gateway's own: which addresses, which TLS."""
    connector = aiohttp.TCPConnector(resolver=_Resolver(), use_dns_cache=False, force_close=True, ssl=tls_context())
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=_OWN_HEADERS,
        raise_for_status=False,
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
    )


async def ask(client: aiohttp.ClientSession, provider: Provider) -> Sequence[Found]:
    """The models that a provider's vendor lists. Raises NoList."""
    if provider.listing is None:
        raise NoList("its vendor tells no list")
    try:
        async with asyncio.timeout(SECONDS):
            return await _pages(client, provider, provider.listing)
    except TimeoutError:
        raise NoList("it did not answer in time") from None
    except (aiohttp.ClientError, OSError, ValueError) as failed:
        raise NoList(_sentence(failed)) from None


async def _pages(client: aiohttp.ClientSession, provider: Provider, listing: Listing) -> Sequence[Found]:
    loop = asyncio.get_running_loop()
    headers = _headers(provider, listing.face)
    proxy = str(provider.proxy) if provider.proxy is not None else None
    asking, left = Asking(listing.page), MOST_BYTES
    while asking.query is not None:
        path = listing.face.target(listing.path, asking.query.encode("ascii") or None)
        target = URL(f"{listing.face.origin}{path.decode('ascii')}", encoded=True)
        async with client.get(target, headers=headers, proxy=proxy, allow_redirects=False) as answer:
            body = await _body(answer, left)
        left -= len(body)
        await loop.run_in_executor(None, asking.feed, body)  # thousands of models take a while
    return asking.models


async def _body(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    if answer.status != 200:
        raise NoList(f"it answered with status {answer.status}")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise NoList("its answer is packed, though it was asked not to")
    pieces, length = [], 0
    async for piece in answer.content.iter_any():
        length += len(piece)
        if length > limit:
            raise NoList("its list is too large")
        pieces.append(piece)
    return b"".join(pieces)


def _headers(provider: Provider, face: Face) -> Mapping[str, str]:
    """The key, what the administrator adds, what the API demands: the first of these that names a header."""
    key = provider.credentials.all()[0].key
    attached = b"" if key is None else auth.attach(face.auth, key.reveal(), face.origin, provider.origins)
    demanded = _ANTHROPIC if face is provider.faces.get("anthropic") else b""
    told: dict[str, str] = {}
    for lines in (attached, provider.header_lines, *face.defaults.values(), demanded):
        for name, value in _lines(lines):
            told.setdefault(name, value)
    return told


def _lines(lines: bytes) -> Iterator[tuple[str, str]]:
    for line in lines.decode("ascii").split("\r\n"):
        name, colon, value = line.partition(": ")
        if colon:
            yield name.lower(), value


_SENTENCES: Sequence[tuple[type[Exception], str]] = (
    (aiohttp.ClientConnectorDNSError, "its name cannot be resolved to an address that may be dialled"),
    (aiohttp.ClientProxyConnectionError, "the egress proxy cannot be reached"),
    (aiohttp.ClientHttpProxyError, "the egress proxy refuses"),
    (aiohttp.ClientSSLError, "its certificate or its TLS is not good"),
    (ssl.SSLError, "its certificate or its TLS is not good"),
    (aiohttp.ClientConnectorError, "it cannot be reached"),
    (aiohttp.ClientPayloadError, "its answer breaks off"),
    (aiohttp.ClientOSError, "the connection broke"),
    (aiohttp.ServerDisconnectedError, "it closed the connection without an answer"),
    (aiohttp.ClientResponseError, "it does not answer in HTTP"),
)


def _sentence(failed: Exception) -> str:
    """Without the error's own text: that may hold what a peer sent, or the address with all that stands in it."""
    return next((text for kind, text in _SENTENCES if isinstance(failed, kind)), "it cannot be asked")


class _Resolver(AbstractResolver):
    """getaddrinfo(3) in threads of its own, which a name that hangs may keep without holding up anybody else.

    A name may not lead where the configuration may not: to link-local addresses, where clouds keep their metadata.
    """

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[Any]] = loop.create_future()
        threading.Thread(target=_look_up, args=(host, port, family, loop, answer), name="resolver", daemon=True).start()
        usable = [info for info in await answer if may_dial(str(info[4][0]))]
        if not usable:
            raise OSError("the name leads to no address that may be dialled")
        return [
            ResolveResult(
                hostname=host,
                host=str(info[4][0]),
                port=port,
                family=info[0],
                proto=info[2],
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for info in usable
        ]

    async def close(self) -> None:
        """Nothing is held open."""


def _look_up(
    host: str, port: int, family: int, loop: asyncio.AbstractEventLoop, answer: asyncio.Future[Sequence[Any]]
) -> None:
    def tell(found: Sequence[Any]) -> None:
        if not answer.done():
            answer.set_result(found)

    try:
        found: Sequence[Any] = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = ()
    try:
        loop.call_soon_threadsafe(tell, found)
    except RuntimeError:
        pass  # the loop is closed: nobody waits for it any more
