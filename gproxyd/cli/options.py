"""What the commands have in common: their options, and the forms of their arguments."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

from gproxyd.cli.client import Client, socket_path
from gproxyd.units import parse_duration, parse_usd

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command is added."""

Run = Callable[[Client, argparse.Namespace], None]

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def command(commands: Commands, name: str, run: Run, about: str) -> argparse.ArgumentParser:
    """A command that asks the daemon."""
    parser = commands.add_parser(name, help=about, description=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help="where the daemon listens (default: $GPROXYD_ADMIN_SOCKET, $RUNTIME_DIRECTORY/admin.sock, "
        "/run/gproxyd/admin.sock)",
    )

    def ask(options: argparse.Namespace) -> int:
        with Client(socket_path(options.socket, os.environ)) as client:
            run(client, options)
        return 0

    parser.set_defaults(run=ask)
    return parser


def group(commands: Commands, name: str, about: str) -> Commands:
    """A command with commands of its own."""
    parser = commands.add_parser(name, help=about, description=about)
    return parser.add_subparsers(dest=f"{name}_command", required=True, metavar="COMMAND")


def past(text: str) -> str:
    """A time, a date, or how long ago ("24h")."""
    return _moment(text, -1)


def future(text: str) -> str | None:
    """A time, a date, how long from now ("30d"), or "never"."""
    return None if text == "never" else _moment(text, 1)


def _moment(text: str, direction: int) -> str:
    if _DATE.fullmatch(text):
        return f"{text}T00:00:00Z"
    try:
        moment = datetime.now(UTC) + direction * timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        return text  # a time, or what the daemon will refuse
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def money(text: str) -> str | None:
    """An amount in US dollars, or "none"."""
    return None if text == "none" else amount(text)


def amount(text: str) -> str:
    """An amount in US dollars."""
    try:
        parse_usd(text)
    except ValueError:
        raise argparse.ArgumentTypeError("must be an amount in US dollars, as in 25 or 0.50") from None
    return text


def rate_limit(text: str) -> dict[str, Any]:
    """`rpm=60,tpm=200000` or `model=openai-main/*,rpm=10`."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name == "model":
            found[name] = value
        elif name in ("rpm", "rpd", "tpm", "concurrency") and value.isascii() and value.isdigit():
            found[name] = int(value)
        else:
            raise argparse.ArgumentTypeError("must look like model=openai-main/*,rpm=60,rpd=5000,tpm=200000")
    return found


def count(text: str) -> int:
    """A number from 1."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**9):
        raise argparse.ArgumentTypeError("must be a number from 1")
    return int(text)
