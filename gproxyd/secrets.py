"""Secrets: read from files by name, and never shown.

A secret named N is the file N in the first directory that has it; each line of the file is one key of a pool,
unless the whole is a JSON object, which is one key.

Invariants: a Secret shows its name wherever it is printed, cannot be pickled or copied, and equals only itself.
No error and no warning of this module quotes the content of a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Never

from gproxyd.errors import GproxydError

DEFAULT_DIRECTORY = Path("/run/secrets/gproxyd")
MAX_BYTES = 256 * 1024


class SecretError(GproxydError):
    """A secret is there but cannot be used. The text names it and never shows its content."""


class Secret:
    """One key. `str` and `repr` give its name; only `reveal` gives the key."""

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self._value = value

    def reveal(self) -> str:
        """The key itself. Call it where the key is put on the wire, and do not keep the result."""
        return self._value

    def sha256(self) -> bytes:
        """The SHA-256 digest (32 bytes) by which a caller's key is looked up."""
        return hashlib.sha256(self._value.encode("ascii")).digest()

    def __repr__(self) -> str:
        return self.name

    def __reduce_ex__(self, protocol: object) -> Never:
        # pickle and copy both come through here.
        raise TypeError("a secret is not pickled or copied")


def _document(content: bytes) -> str | None:
    """A JSON object, as Google gives its service accounts' keys: all of its lines are one key, written on one."""
    if not content.lstrip().startswith(b"{"):
        return None
    try:
        return json.dumps(json.loads(content))
    except ValueError:
        return None


class SecretStore:
    """The directories that hold secrets, searched in order.

    `private` names those of them whose files nobody else on the machine should be able to read; `warnings`
    collects what the administrator ought to hear about, one sentence each, no sentence twice.
    """

    def __init__(self, directories: Sequence[Path], *, private: Collection[Path] = ()) -> None:
        self.directories = tuple(directories)
        self.warnings: list[str] = []
        self._private = frozenset(private)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> SecretStore:
        """`$CREDENTIALS_DIRECTORY` (set by systemd), `$GPROXYD_SECRETS_DIR`, then /run/secrets/gproxyd."""
        systemd = [Path(text)] if (text := environ.get("CREDENTIALS_DIRECTORY")) else []
        own = [Path(text)] if (text := environ.get("GPROXYD_SECRETS_DIR")) else []
        return cls([*systemd, *own, DEFAULT_DIRECTORY], private=own)

    def get(self, name: str) -> tuple[Secret, ...]:
        """The keys of the secret `name`, one per line of its file; empty when no directory has it.

        In a pool the second key is called `NAME#2`, and so on. Raises SecretError when the name is no plain
        file name, or the file cannot be read or holds something that cannot be a key.
        """
        if name in {"", ".", ".."} or "/" in name or "\0" in name:
            raise SecretError(f"secret {name!r}: the name of a secret must be a plain file name, without '/'")
        for directory in self.directories:
            content = self._read(directory, name)
            if content is not None:
                return self._keys(name, content)
        return ()

    def _read(self, directory: Path, name: str) -> bytes | None:
        """The content of the file, None if there is none."""
        try:
            # Non-blocking, or a FIFO of that name would hold up the daemon for ever.
            handle = os.open(directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._check_mode(directory, name, os.fstat(handle).st_mode)
                with open(handle, "rb", closefd=False) as file:
                    content = file.read(MAX_BYTES + 1)
            finally:
                os.close(handle)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise SecretError(f"secret {name}: cannot be read from {directory} ({error.strerror})") from None
        if len(content) > MAX_BYTES:
            raise SecretError(f"secret {name}: the file in {directory} is larger than {MAX_BYTES // 1024} KiB")
        return content

    def _check_mode(self, directory: Path, name: str, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise SecretError(f"secret {name}: what stands in {directory} under that name is not a file")
        if directory in self._private and mode & stat.S_IROTH:
            self._warn(f"secret {name}: the file in {directory} can be read by every user; chmod it to 0600")

    def _keys(self, name: str, content: bytes) -> tuple[Secret, ...]:
        values = []
        if (document := _document(content)) is not None:
            return (Secret(name, document),)
        for number, line in enumerate(content.split(b"\n"), start=1):
            value = line.removesuffix(b"\r")
            if not value.strip(b" "):
                continue
            if not all(0x20 <= byte < 0x7F for byte in value):
                raise SecretError(f"secret {name}: line {number} holds a character that is not printable ASCII")
            if value != value.strip(b" "):
                raise SecretError(f"secret {name}: line {number} begins or ends with a space; remove it")
            values.append(value.decode("ascii"))
        if not values:
            self._warn(f"secret {name}: the file is empty")
        return tuple(
            Secret(name if number == 1 else f"{name}#{number}", value) for number, value in enumerate(values, start=1)
        )

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warnings:
            self.warnings.append(sentence)
