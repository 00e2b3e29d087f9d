"""Throw-away certificates, made with the `openssl` command."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gproxyd.upstream import dial

LOCAL = "DNS:localhost,IP:127.0.0.1,IP:::1"
"""The names under which the tests' own servers are reached."""

_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Authority:
    """A certificate authority in a folder. `path` is what `SSL_CERT_FILE` must name for it to be believed."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = name
        self._count = 0
        self.path = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        usage = ["-addext", "keyUsage=critical,keyCertSign"]
        _openssl("req", "-x509", *_NEW_KEY, "-days", "2", *_out(self._key, self.path), "-subj", f"/CN={name}", *usage)

    def server(self, names: str = LOCAL, *, days: int = 2) -> ssl.SSLContext:
        """A server with a certificate of this authority; one of negative `days` has expired."""
        self._count += 1
        stem = self._folder / f"{self._name}-{self._count}"
        request, key, certificate = stem.with_suffix(".csr"), stem.with_suffix(".key"), stem.with_suffix(".pem")
        named = ["-subj", "/CN=server", "-addext", f"subjectAltName={names}"]
        _openssl("req", *_NEW_KEY, *_out(key, request), *named)
        signer = ["-CA", str(self.path), "-CAkey", str(self._key), "-CAcreateserial", "-copy_extensions", "copy"]
        _openssl("x509", "-req", "-in", str(request), *signer, "-days", str(days), "-out", str(certificate))
        return _context(certificate, key)


def self_signed(folder: Path, names: str = LOCAL) -> ssl.SSLContext:
    """A server whose certificate nobody but itself has signed."""
    certificate, key = folder / "self-signed.pem", folder / "self-signed.key"
    named = ["-subj", "/CN=self", "-addext", f"subjectAltName={names}"]
    _openssl("req", "-x509", *_NEW_KEY, "-days", "2", *_out(key, certificate), *named)
    return _context(certificate, key)


@contextmanager
def believed(authority: Authority) -> Iterator[None]:
    """Daemons of this very process believe `authority`, and no other, while the block runs."""
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = str(authority.path)
    dial.tls_context.cache_clear()
    try:
        dial.tls_context()
        yield
    finally:
        del os.environ["SSL_CERT_FILE"]
        if before is not None:
            os.environ["SSL_CERT_FILE"] = before
        dial.tls_context.cache_clear()


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def _out(key: Path, out: Path) -> list[str]:
    return ["-keyout", str(key), "-out", str(out)]


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=30)
