"""Where the daemon listens and where it connects: the spelling of addresses, checked strictly.

Every parser raises ValueError with a sentence that says what is expected and never quotes the value. Upstream hosts
are refused when different programs would read them as different machines (`127.1`, `0x7f.1`, `2130706433`), and
when they can only be a mistake or an attack on the machine itself (link-local, cloud metadata). Loopback and private
addresses are allowed: an administrator who writes them means them.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_URL_TEXT = re.compile(r"[!#-;=?-\[\]_a-z~]+", re.IGNORECASE | re.ASCII)
_URL = re.compile(r"(https?)://([^/]*)(/.*)?", re.IGNORECASE | re.ASCII)
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^\[\]:]*)(?::([0-9]{1,5}))?", re.ASCII)
# Underscores are no part of DNS host names, yet container networks use them.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE | re.ASCII)
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*", re.IGNORECASE | re.ASCII)
_DOT_SEGMENT = re.compile(r"/(?:\.|%2e){1,2}(?:/|\Z)", re.IGNORECASE | re.ASCII)

# Link-local addresses hold most metadata services; these stand elsewhere (AWS, Google and Alibaba in this order).
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "fd20:ce::254", "100.100.100.200")))
_METADATA_NAMES = frozenset({"metadata.google.internal", "metadata.goog"})
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_THIS_NETWORK = ipaddress.IPv4Network("0.0.0.0/8")

_LISTEN_FORMS = '"127.0.0.1:8787", "[::1]:8787" or "unix:/run/gproxyd/http.sock"'
_LONGEST_SOCKET_PATH = 107
"""sizeof(sockaddr_un.sun_path) - 1 on Linux."""


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """A TCP address (`host`, `port`; no brackets around IPv6) or, where `path` is set, a Unix socket."""

    host: str = ""
    port: int = 0
    path: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_listen(text: str) -> ListenAddress:
    """`host:port`, `[v6]:port` or `unix:/path`; port 0 lets the kernel choose."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if path[:1] != "/" or not path.isprintable() or len(path.encode()) > _LONGEST_SOCKET_PATH:
            raise ValueError(f'must be "unix:" and an absolute path of at most {_LONGEST_SOCKET_PATH} bytes')
        return ListenAddress(path=path)
    match = _AUTHORITY.fullmatch(text)
    if match is None or match[2] is None or not match[1] or int(match[2]) > 65535:
        raise ValueError(f"must be an address to listen on, as in {_LISTEN_FORMS}")
    host, _ = parse_host(match[1], zone=True)
    return ListenAddress(host, int(match[2]))


def parse_network(text: str) -> Network:
    """A CIDR such as "10.0.0.0/8"; a single address is the network of just that one."""
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    raise ValueError('must be a network without host bits, as in "10.0.0.0/8", "fd00::/8" or "192.0.2.7"')


def parse_url(text: str) -> str:
    """An http or https base URL; scheme and host come back in lower case, without a slash at the end."""
    if not _URL_TEXT.fullmatch(text) or (match := _URL.fullmatch(text)) is None:
        raise ValueError('must be a URL in plain ASCII, as in "https://api.example.com" or "http://10.0.0.7:8000/v1"')
    if "?" in text or "#" in text:
        raise ValueError("must be a URL without a query (?) or a fragment (#)")
    scheme, authority, path = match[1].lower(), match[2], match[3] or ""
    if _DOT_SEGMENT.search(path):
        raise ValueError('must be a URL whose path holds no "." or ".." segment')
    return f"{scheme}://{_upstream_authority(authority)}{path.rstrip('/')}"


def parse_proxy(text: str) -> str:
    """`http://host:port`, the form of an egress proxy."""
    form = 'must be the URL of an HTTP proxy, as in "http://proxy.example.com:3128"'
    match = _URL.fullmatch(text)
    if match is None or match[1].lower() != "http" or match[3] not in {None, "/"}:
        raise ValueError(form)
    authority = _upstream_authority(match[2])
    if not re.search(r":[0-9]+\Z", authority):
        raise ValueError(form)
    return f"http://{authority}"


def _upstream_authority(authority: str) -> str:
    if "@" in authority:
        raise ValueError("must be a URL without a user name or password; keys belong into credentials")
    match = _AUTHORITY.fullmatch(authority)
    if match is None or not match[1] or (match[2] and not 0 < int(match[2]) < 65536):
        raise ValueError("must be a URL with a host and, if any, a port from 1 to 65535")
    host, address = parse_host(match[1])
    if address is not None:
        check_upstream(address)
    elif host.rstrip(".") in _METADATA_NAMES:
        raise ValueError("must not lead to a cloud metadata service")
    shown = f"[{host}]" if ":" in host else host
    return f"{shown}:{int(match[2])}" if match[2] else shown


def parse_host(text: str, *, zone: bool = False) -> tuple[str, Address | None]:
    """A host as (name or address without brackets, in lower case; the address if it is one).

    `zone` allows an IPv6 zone (`fe80::1%eth0`).
    """
    if text.startswith("["):
        try:
            address = ipaddress.IPv6Address(text[1:-1])
        except ValueError:
            address = None
        if address is None or (address.scope_id is not None and not zone):
            raise ValueError("must have a valid IPv6 address between its brackets")
        return str(address), address
    labels = text.lower().split(".")
    # The rule of the URL standard: a host whose last label is a number is an IPv4 address, or else invalid.
    if _NUMERIC.fullmatch(labels[-1] or labels[-2 if len(labels) > 1 else -1]):
        try:
            return text, ipaddress.IPv4Address(text)
        except ValueError:
            pass
        raise ValueError("must have an IPv4 address of four plain decimal numbers, as in 127.0.0.1, or a host name")
    if labels[-1] == "" and len(labels) > 1:
        labels.pop()  # the root's dot
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(
            "must have a host name of letters, digits, '-', '_' and '.', or an address ([...] around IPv6)"
        )
    return text.lower(), None


def is_address(text: str) -> bool:
    """Whether it is an IP address, as opposed to a name or nonsense."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def check_upstream(address: Address) -> None:
    """Raises ValueError for an address that no upstream can have, in any of its spellings."""
    for seen in _meanings(address):
        if seen.is_link_local or seen in _METADATA:
            raise ValueError("must not lead to a link-local address or a cloud metadata service")
        if seen.is_unspecified or seen.is_multicast or seen in _THIS_NETWORK:
            raise ValueError("must have the address of one machine, not an unspecified or multicast address")


def _meanings(address: Address) -> list[Address]:
    """The address, and the IPv4 address that it carries if it is a mapped, 6to4 or NAT64 one."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    carried = [address.ipv4_mapped, address.sixtofour]
    if address in _NAT64:
        carried.append(ipaddress.IPv4Address(address.packed[-4:]))
    return [address, *(each for each in carried if each is not None)]
