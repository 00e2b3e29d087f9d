"""How a connection comes to be: DNS, TCP, CONNECT through a proxy, TLS.

Every foreign error is translated here. Names are resolved off the loop and remembered for a while; of several
addresses two families race (RFC 8305). An address that a name should never have (link-local, where clouds keep
their metadata, or multicast) is not dialled.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import aiohappyeyeballs

from gproxyd.config.addresses import check_upstream, is_address
from gproxyd.errors import UpstreamError
from gproxyd.types import Origin
from gproxyd.upstream.connection import Connection
from gproxyd.upstream.deadlines import within
from gproxyd.wire.http1 import ResponseReader

RACE_DELAY = 0.25
"""Seconds until the second address family is tried beside the first (RFC 8305 section 8)."""

_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})
"""What this machine has run out of, which is not the upstream's fault."""

NAME_TTL = 30.0
"""Seconds for which a resolved name is believed."""

_AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]


@cache
def tls_context() -> ssl.SSLContext:
    """Verification on, TLS 1.2 or newer, the system's authorities (`SSL_CERT_FILE` names others)."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


class Dialler:
    """Opens connections. `resolve` is getaddrinfo(3), called in threads."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        tls: Callable[[], ssl.SSLContext] = tls_context,
        resolve: Callable[..., Sequence[_AddressInfo]] = socket.getaddrinfo,
    ) -> None:
        self._loop = loop
        self._tls = tls
        self._resolver = resolve
        self._names: dict[tuple[str, int], tuple[float, Sequence[_AddressInfo]]] = {}
        self._lookups: dict[tuple[str, int], asyncio.Future[Sequence[_AddressInfo]]] = {}

    async def dial(self, origin: Origin, proxy: Origin | None, timeout: float) -> Connection:
        """A fresh connection to `origin`, through `proxy` if there is one. `timeout` is in seconds, for everything.

        Raises UpstreamError: dns, connect, tls, or timeout_connect.
        """
        try:
            async with within(timeout):
                return await self._dial(origin, proxy)
        except TimeoutError:
            raise UpstreamError(
                "timeout_connect", "the upstream could not be reached in time", code="upstream_timeout"
            ) from None

    async def _dial(self, origin: Origin, proxy: Origin | None) -> Connection:
        sock = await self._connect(proxy or origin)
        try:
            if proxy is not None:
                await self._tunnel(sock, origin)
            return await self._adopt(sock, origin)
        except BaseException:
            sock.close()
            raise

    async def _connect(self, origin: Origin) -> socket.socket:
        infos = await self._resolve(origin)
        try:
            sock = await aiohappyeyeballs.start_connection(
                infos, happy_eyeballs_delay=RACE_DELAY, interleave=1, loop=self._loop
            )
        except OSError as refused:
            self._names.pop((origin.host, origin.port), None)
            if refused.errno in _EXHAUSTED:
                raise UpstreamError("exhausted", "no connection can be opened now", code="overloaded") from refused
            raise UpstreamError("connect", "the upstream refuses connections or cannot be reached") from refused
        self._prefer(origin, sock)
        return sock

    def _prefer(self, origin: Origin, sock: socket.socket) -> None:
        """The address that was reached is tried first, for as long as the name is believed: `localhost` is two, and
        most servers listen on one of them."""
        known = self._names.get((origin.host, origin.port))
        if known is None or len(known[1]) < 2:
            return
        try:
            reached = sock.getpeername()[:2]
        except OSError:
            return  # it is gone again
        if tuple(known[1][0][4][:2]) != reached:
            infos = sorted(known[1], key=lambda info: tuple(info[4][:2]) != reached)
            self._names[origin.host, origin.port] = (known[0], infos)

    async def _resolve(self, origin: Origin) -> Sequence[_AddressInfo]:
        known = self._names.get((origin.host, origin.port))
        if known is not None and known[0] > self._loop.time():
            return known[1]
        infos: Sequence[_AddressInfo]
        try:
            if is_address(origin.host):
                infos = socket.getaddrinfo(
                    origin.host, origin.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
                )
            else:
                infos = await self._look_up(origin.host, origin.port)
        except OSError as unknown:
            raise UpstreamError("dns", "the upstream's name cannot be resolved") from unknown
        usable = [info for info in infos if may_dial(str(info[4][0]))]
        if not usable:
            raise UpstreamError("dns", "the upstream's name resolves to no address that may be dialled")
        self._names[origin.host, origin.port] = (self._loop.time() + NAME_TTL, usable)
        return usable

    async def _look_up(self, host: str, port: int) -> Sequence[_AddressInfo]:
        """getaddrinfo(3) in a thread of its own, one per name however many wait for it.

        The loop's resolver has a handful of threads for all names: few that hang would hold up every other. The thread
        is a daemon, so that one which hangs does not hold up the end of the process either.
        """
        answer = self._lookups.get((host, port))
        if answer is None:
            answer = self._lookups[host, port] = self._loop.create_future()
            answer.add_done_callback(lambda done: self._looked_up(host, port, done))
            threading.Thread(target=self._ask, args=(host, port, answer), name="resolver", daemon=True).start()
        return await asyncio.shield(answer)

    def _looked_up(self, host: str, port: int, done: asyncio.Future[Sequence[_AddressInfo]]) -> None:
        del self._lookups[host, port]
        done.exception()  # looked at, should nobody wait any more

    def _ask(self, host: str, port: int, answer: asyncio.Future[Sequence[_AddressInfo]]) -> None:
        try:
            infos = self._resolver(host, port, type=socket.SOCK_STREAM)
            tell = partial(answer.set_result, infos)
        except (OSError, UnicodeError) as unknown:
            tell = partial(answer.set_exception, OSError(str(unknown)))
        try:
            self._loop.call_soon_threadsafe(tell)
        except RuntimeError:
            pass  # the loop is closed: nobody waits for it any more

    async def _tunnel(self, sock: socket.socket, origin: Origin) -> None:
        """CONNECT (RFC 9110 section 9.3.6). Read in small pieces: what follows the head belongs to the tunnel."""
        host = f"[{origin.host}]" if ":" in origin.host else origin.host
        authority = f"{host}:{origin.port}".encode("ascii")
        await self._loop.sock_sendall(sock, b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (authority, authority))
        reader = ResponseReader()
        reader.expect("HEAD")  # the answer has no body: the tunnel begins behind its head
        head = None
        while head is None:
            data = await self._loop.sock_recv(sock, 1)
            progress = reader.feed(data)
            if not data or progress.error is not None:
                raise UpstreamError("connect", "the egress proxy does not answer in HTTP")
            head = progress.head
        if head.status != 200:
            raise UpstreamError("connect", f"the egress proxy refused the tunnel with status {head.status}")

    async def _adopt(self, sock: socket.socket, origin: Origin) -> Connection:
        secure = origin.scheme == "https"
        try:
            _, connection = await self._loop.create_connection(
                lambda: Connection(self._loop),
                sock=sock,
                ssl=self._tls() if secure else None,
                server_hostname=origin.host if secure else None,
            )
        except (ssl.SSLError, ssl.CertificateError) as failed:
            raise UpstreamError("tls", _tls_text(failed), code="upstream_tls") from failed
        except OSError as failed:
            if secure:
                raise UpstreamError("tls", "the TLS handshake was cut off", code="upstream_tls") from failed
            raise UpstreamError("connect", "the upstream closed the connection at once") from failed
        return connection


def _tls_text(failed: ssl.SSLError | ssl.CertificateError) -> str:
    """OpenSSL's own verdict on a certificate is ours to repeat; its other texts may quote the peer."""
    if isinstance(failed, ssl.SSLCertVerificationError):
        return f"the upstream's certificate was not accepted ({failed.verify_message})"
    return "the TLS handshake failed"


def may_dial(address: str) -> bool:
    """Whether a name may resolve to it: the same rule that the configuration applies to addresses written out."""
    try:
        check_upstream(ipaddress.ip_address(address.partition("%")[0]))
    except ValueError:
        return False
    return True
