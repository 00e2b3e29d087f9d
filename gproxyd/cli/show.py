"""What the commands print: tables, details, JSON.

Invariant: nothing that a client or a vendor has named reaches a terminal as anything but printable characters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

Columns = Mapping[str, str]
"""Heading -> the member of a row, where `quota.usd` is a member of a member."""


def as_json(value: Any) -> None:
    """Indented for people, one line for programs."""
    option = orjson.OPT_INDENT_2 if sys.stdout.isatty() else None
    print(orjson.dumps(value, option=option).decode())


def as_list(rows: Sequence[Any], *, json: bool, columns: Columns | None = None, empty: str) -> None:
    """A list as the API gives it, or as a table; without columns those of the rows."""
    if json:
        as_json({"data": rows, "next": None})
    elif rows:
        table(rows, columns or {name: name for row in rows for name in row})
    else:
        print(empty)


def table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> None:
    values = [[_member(row, path) for path in columns.values()] for row in rows]
    cells = [[text(value) for value in row] for row in values]
    headings = [text(heading).upper() for heading in columns]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    numbers = [all(_is_number(value) for value in column) for column in zip(*values, strict=True)]
    print(_bold(_line(headings, widths, numbers)))
    for row in cells:
        print(_line(row, widths, numbers))


def details(value: Mapping[str, Any], indent: int = 0) -> None:
    """One member a line; lists of objects and objects below their name."""
    margin = " " * indent
    width = max((len(text(name)) for name in value), default=0)
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            print(f"{margin}{text(name)}")
            details(inner, indent + 2)
        elif isinstance(inner, list) and any(isinstance(one, Mapping) for one in inner):
            for number, one in enumerate(inner, 1):
                print(f"{margin}{text(name)} {number}")
                details(one if isinstance(one, Mapping) else {"value": one}, indent + 2)
        else:
            print(f"{margin}{text(name).ljust(width)}  {text(inner)}")


def text(value: Any) -> str:
    """A value in a line of its own."""
    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(text, value))
    if isinstance(value, Mapping):
        return " ".join(f"{text(name)}={text(inner)}" for name, inner in value.items())
    return "".join(one if one.isprintable() else "?" for one in str(value))


def _member(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value.replace(".", "", 1).lstrip("-").isdigit()
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _line(cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> str:
    aligned = (
        cell.rjust(width) if number else cell.ljust(width)
        for cell, width, number in zip(cells, widths, numbers, strict=True)
    )
    return "  ".join(aligned).rstrip()


def _bold(line: str) -> str:
    fancy = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM", "dumb") != "dumb"
    return f"\x1b[1m{line}\x1b[0m" if fancy else line
