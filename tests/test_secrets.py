"""Secrets come from the first directory that has them, and are never shown."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import traceback
from pathlib import Path

import pytest

from gproxyd.secrets import MAX_BYTES, Secret, SecretError, SecretStore

CANARY = "sk-canary-5f0d"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "secrets"
    path.mkdir()
    return path


def put(directory: Path, name: str, content: bytes | str, mode: int = 0o600) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def values(store: SecretStore, name: str) -> list[str]:
    return [secret.reveal() for secret in store.get(name)]


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ("one", ["one"]),
        ("one\n", ["one"]),
        ("one\r\n", ["one"]),
        ("one\ntwo", ["one", "two"]),
        ("one\n\n\ntwo\n\n", ["one", "two"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("with a space", ["with a space"]),
        ("~!@#$%^&*()", ["~!@#$%^&*()"]),
        ("", []),
        ("\n", []),
        (" \n\n", []),
    ],
)
def test_each_line_is_a_key(directory: Path, content: str, keys: list[str]) -> None:
    put(directory, "openai", content)
    store = SecretStore([directory])
    assert values(store, "openai") == keys
    assert store.warnings == ([] if keys else ["secret openai: the file is empty"])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (f"{CANARY}\tx", "line 1 holds a character"),
        (f"{CANARY}\rx", "line 1 holds a character"),
        (f"ok\n{CANARY}\0", "line 2 holds a character"),
        (f"{CANARY}\x7f", "line 1 holds a character"),
        (f"{CANARY}é", "line 1 holds a character"),
        (f"\ufeff{CANARY}", "line 1 holds a character"),
        (b"\xff" + CANARY.encode(), "line 1 holds a character"),
        (f"{CANARY} ", "line 1 begins or ends with a space"),
        (f" {CANARY}", "line 1 begins or ends with a space"),
        (CANARY * (MAX_BYTES // len(CANARY) + 1), "larger than 256 KiB"),
    ],
)
def test_what_cannot_be_a_key_is_refused_by_name(directory: Path, content: bytes | str, complaint: str) -> None:
    put(directory, "openai", content)
    with pytest.raises(SecretError, match=f"^secret openai: .*{complaint}") as caught:
        SecretStore([directory]).get("openai")
    assert "canary" not in "".join(traceback.format_exception(caught.value))


def test_the_first_directory_that_has_it_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    put(first, "a", "from-first")
    put(second, "a", "from-second")
    put(second, "b", "only-second")
    store = SecretStore([tmp_path / "absent", first, second])
    assert values(store, "a") == ["from-first"]
    assert values(store, "b") == ["only-second"]
    assert store.get("c") == ()


def test_a_broken_file_is_not_passed_over(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    put(first, "a", "\t")
    put(second, "a", "good")
    with pytest.raises(SecretError, match="secret a: line 1"):
        SecretStore([first, second]).get("a")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "../a", "a\0b"])
def test_names_are_plain_file_names(directory: Path, name: str) -> None:
    with pytest.raises(SecretError, match="plain file name"):
        SecretStore([directory]).get(name)


def test_what_is_no_file_is_refused(directory: Path) -> None:
    (directory / "folder").mkdir()
    os.mkfifo(directory / "pipe")
    (directory / "loop").symlink_to("loop")
    store = SecretStore([directory])
    with pytest.raises(SecretError, match=r"secret folder: what stands in .* is not a file"):
        store.get("folder")
    with pytest.raises(SecretError, match=r"secret pipe: what stands in .* is not a file"):
        store.get("pipe")
    with pytest.raises(SecretError, match="secret loop: cannot be read"):
        store.get("loop")
    with pytest.raises(SecretError, match=r"secret n{300}: cannot be read"):
        store.get("n" * 300)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(directory: Path) -> None:
    put(directory, "a", CANARY, mode=0)
    with pytest.raises(SecretError, match=r"secret a: cannot be read .*Permission denied"):
        SecretStore([directory]).get("a")


def test_symbolic_links_are_followed(directory: Path) -> None:
    put(directory, "..2027_data", "linked")
    (directory / "a").symlink_to("..2027_data")  # as Kubernetes mounts them
    assert values(SecretStore([directory]), "a") == ["linked"]


@pytest.mark.parametrize(
    ("environ", "directories"),
    [
        ({}, ["/run/secrets/gproxyd"]),
        ({"CREDENTIALS_DIRECTORY": "", "GPROXYD_SECRETS_DIR": ""}, ["/run/secrets/gproxyd"]),
        ({"GPROXYD_SECRETS_DIR": "/own"}, ["/own", "/run/secrets/gproxyd"]),
        ({"CREDENTIALS_DIRECTORY": "/cred"}, ["/cred", "/run/secrets/gproxyd"]),
        (
            {"GPROXYD_SECRETS_DIR": "/own", "CREDENTIALS_DIRECTORY": "/cred"},
            ["/cred", "/own", "/run/secrets/gproxyd"],
        ),
    ],
)
def test_directories_of_the_environment(environ: dict[str, str], directories: list[str]) -> None:
    store = SecretStore.from_environment(environ)
    assert [str(path) for path in store.directories] == directories


def test_a_file_that_everyone_can_read_is_warned_of_once(tmp_path: Path) -> None:
    own, systemd = tmp_path / "own", tmp_path / "systemd"
    put(own, "open", CANARY, mode=0o644)
    put(own, "closed", CANARY, mode=0o640)
    put(systemd, "theirs", CANARY, mode=0o444)
    store = SecretStore.from_environment({"CREDENTIALS_DIRECTORY": str(systemd), "GPROXYD_SECRETS_DIR": str(own)})
    for name in ("open", "closed", "theirs", "open"):
        assert values(store, name) == [CANARY]
    assert store.warnings == [f"secret open: the file in {own} can be read by every user; chmod it to 0600"]


def test_a_secret_shows_only_its_name() -> None:
    secret = Secret("openai-main", CANARY)
    shown = [
        str(secret),
        repr(secret),
        f"{secret}",
        f"{secret!r:>20}",
        repr([secret]),
        str({"key": secret}),
        "".join(map(str, [secret])),
    ]
    assert all("openai-main" in text and "canary" not in text for text in shown)
    assert secret.reveal() == CANARY
    assert secret.sha256() == hashlib.sha256(CANARY.encode()).digest()


def test_a_secret_cannot_leave_by_the_back_door() -> None:
    secret = Secret("openai-main", CANARY)
    for carry_off in (pickle.dumps, copy.copy, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError) as caught:
            carry_off(secret)
        assert "canary" not in str(caught.value)
    assert not hasattr(secret, "__dict__")
    assert secret != Secret("openai-main", CANARY)
    assert secret != CANARY


def test_the_keys_of_a_pool_can_be_told_apart(directory: Path) -> None:
    put(directory, "pool", "one\n\ntwo\nthree\n")
    assert [str(secret) for secret in SecretStore([directory]).get("pool")] == ["pool", "pool#2", "pool#3"]
