"""Writes the manual pages, from the commands and the reference configuration: manual.py FOLDER

gproxyd.8       commands and options as the parser knows them, events as the journal gets them
gproxyd.yaml.5  every key with the comment and the default that etc/gproxyd.yaml gives it
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tree import Argument, Command, commands

from gproxyd import __version__
from gproxyd.observe.native import MESSAGE_IDS

HERE = Path(__file__).parent
REFERENCE = HERE.parent / "etc" / "gproxyd.yaml"
CHANGES = HERE.parent / "CHANGELOG.md"
EXAMPLE = "#| "
_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _day() -> str:
    """The day of the last change that is told of, so that a page is the same whenever it is made."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    return time.strftime("%B %-d, %Y", time.gmtime(int(told) if told else CHANGES.stat().st_mtime))


def prose(words: str) -> str:
    """Words as text lines of roff; every sentence begins a line, so that the space after it can be right."""
    sentences = re.split(r"(?<=[a-z)\]\"][.!?])\s+(?=[A-Z\"/])", " ".join(words.split()))
    return literal("\n".join(line for one in sentences for line in textwrap.wrap(one, 78, **_WHOLE)))


def literal(lines: str) -> str:
    """Lines as they are: no escape, and none that looks like a request."""
    escaped = lines.replace("\\", "\\e").splitlines()
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'", "") else line for line in escaped)


def word(given: str) -> str:
    """A word on a macro's line: never a macro itself."""
    return '"\\&' + given.replace("\\", "\\e").replace('"', '""') + '"'


# gproxyd(8)


def commands_page(root: Command) -> str:
    page = (HERE / "gproxyd.8.in").read_text()
    filled = {
        "@VERSION@": __version__,
        "@DAY@": _day(),
        "@COMMANDS@": "\n".join(line for command in root.below for line in _command(command)),
        "@EVENTS@": "\n".join(f".It {word(event)} Ta {word(found)}" for event, found in sorted(MESSAGE_IDS.items())),
    }
    for mark, value in filled.items():
        page = page.replace(mark, value)
    return page


def _command(command: Command) -> Iterator[str]:
    if command.below:
        for inner in command.below:
            yield from _command(inner)
        return
    yield ".It Xo"
    yield f".Ic {' '.join(map(word, command.path[1:]))}"
    for argument in command.arguments:
        if argument.flags != ("-h", "--help"):
            yield _synopsis(argument)
    yield ".Xc"
    yield prose(_sentence(command.help))
    told = [one for one in command.options if one.help and one.flags != ("-h", "--help")]
    if told:
        yield ".Bl -tag -width Ds -compact"
        for option in told:
            yield f".It Fl {word(option.flags[-1][1:])}{_value(option)}"
            yield prose(_sentence(option.help))
        yield ".El"


def _synopsis(argument: Argument) -> str:
    if not argument.flags:
        shown = f"Ar {word(argument.metavar)}"
    else:
        shown = f"Fl {word(argument.flags[-1][1:])}{_value(argument)}"
    more = " Ar ..." if argument.many else ""
    return f".Op {shown}{more}" if argument.optional else f".{shown}{more}"


def _value(argument: Argument) -> str:
    return "" if argument.kind == "flag" else f" Ar {word(argument.metavar)}"


def _sentence(told: str) -> str:
    """Help as the parser has it begins small and ends without a full stop."""
    return f"{told[:1].upper()}{told[1:].rstrip('.')}." if told else ""


# gproxyd.yaml(5)


def configuration_page() -> str:
    page = (HERE / "gproxyd.yaml.5.in").read_text()
    for mark, value in {"@DAY@": _day(), "@SECTIONS@": "\n".join(_sections(REFERENCE.read_text()))}.items():
        page = page.replace(mark, value)
    return page


def _sections(reference: str) -> Iterator[str]:
    """One subsection per section of the reference; what stands above the first one is the page's own text."""
    lines = reference.splitlines()
    tops = [number for number, line in enumerate(lines) if re.match(r"[a-z]", line)]
    for number, top in enumerate(tops):
        first = top
        while first and lines[first - 1].startswith("# "):
            first -= 1
        last = tops[number + 1] if number + 1 < len(tops) else len(lines)
        body = lines[top + 1 : last]
        while body and (not body[-1] or body[-1].startswith("# ")):  # that is the next one's introduction
            body.pop()
        yield f".Ss {lines[top].partition(':')[0]}"
        if first < top and first > 0:
            yield prose("\n".join(line[2:] for line in lines[first:top]))
        if any(line.startswith(EXAMPLE) for line in body):
            yield from _example([lines[top], *body])
        else:
            yield from _keys(body)


def _example(lines: Sequence[str]) -> Iterator[str]:
    yield ".Bd -literal -offset indent"
    yield literal("\n".join(line.removeprefix(EXAMPLE) for line in lines))
    yield ".Ed"


def _keys(lines: Sequence[str]) -> Iterator[str]:
    """A comment is about the keys that follow it."""
    yield ".Bl -tag -width Ds"
    comment: list[str] = []
    open_item = False
    for line in (one.strip() for one in lines):
        if line.startswith("#"):
            if not open_item:
                comment.append(line[1:].strip())
            else:
                comment, open_item = [line[1:].strip()], False
        elif line:
            yield f".It Ic {word(line)}"
            if comment:
                yield prose("\n".join(comment))
            comment, open_item = [], True
    yield ".El"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gproxyd.8").write_text(commands_page(commands()))
    (folder / "gproxyd.yaml.5").write_text(configuration_page())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
