"""The one place where a provider's credential is put on a request.

Invariant: a key never leaves for an origin that its provider did not configure, whatever bug made the address.
"""

from __future__ import annotations

from collections.abc import Collection

from gproxyd.errors import GproxydError
from gproxyd.types import Origin
from gproxyd.vendors.catalogue import AuthPlace


class ForeignOrigin(GproxydError):
    """A request was about to take a provider's key to somebody else."""


def attach(place: AuthPlace, key: str, target: Origin, allowed: Collection[Origin]) -> bytes:
    """The header lines (with CRLF) that bear the key, empty for `none`. A service account's `key` is its token.

    Raises ForeignOrigin if the request's final origin is none of the provider's own.
    """
    if target not in allowed:
        raise ForeignOrigin("a request for another origin was about to bear a provider's credential")
    if place == "none":
        return b""
    if place == "bearer" or place == "service-account":
        return b"Authorization: Bearer %b\r\n" % key.encode("ascii")
    if place == "bearer+x-goog-api-key":
        return b"Authorization: Bearer %b\r\nx-goog-api-key: %b\r\n" % (key.encode("ascii"), key.encode("ascii"))
    return b"%b: %b\r\n" % (place.encode("ascii"), key.encode("ascii"))
