"""The commands of gproxyd as its own parser knows them: what manual and completions are made from."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gproxyd.cli import _parser


@dataclass(frozen=True)
class Argument:
    """An option (`flags`), or what stands in its place (`name`).

    kind     flag: takes nothing; choice: one of `choices`; file: a path; value: anything
    metavar  what its value is called
    """

    flags: tuple[str, ...]
    name: str
    metavar: str
    kind: str
    choices: tuple[str, ...]
    help: str
    many: bool
    optional: bool


@dataclass(frozen=True)
class Command:
    """A command; `path` are the words that lead to it, with the program's name."""

    path: tuple[str, ...]
    help: str
    arguments: tuple[Argument, ...]
    below: tuple[Command, ...] = field(default=())

    @property
    def options(self) -> Sequence[Argument]:
        return [one for one in self.arguments if one.flags]

    @property
    def places(self) -> Sequence[Argument]:
        return [one for one in self.arguments if not one.flags]

    def walk(self) -> Iterator[Command]:
        """This one and all below it."""
        yield self
        for command in self.below:
            yield from command.walk()


def commands() -> Command:
    """The whole tree."""
    return _command(("gproxyd",), _parser(), "")


def _command(path: tuple[str, ...], parser: argparse.ArgumentParser, about: str) -> Command:
    found, below = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            below = [_command((*path, name), inner, told.get(name, "")) for name, inner in action.choices.items()]
        else:
            found.append(_argument(action))
    return Command(path, about or parser.description or "", tuple(found), tuple(below))


def _argument(action: argparse.Action) -> Argument:
    choices = tuple(str(choice) for choice in action.choices or ())
    kind = "flag" if action.nargs == 0 else "choice" if choices else "file" if action.type is Path else "value"
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper().replace("_", "-")
    if choices and not isinstance(action.metavar, str):
        metavar = "|".join(choices)
    text = (action.help or "") % {**vars(action), "prog": "gproxyd"} if "%" in (action.help or "") else action.help
    return Argument(
        tuple(action.option_strings),
        action.dest,
        metavar,
        kind,
        choices,
        text or "",
        action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction),
        bool(action.option_strings and not action.required) or action.nargs in ("?", "*"),
    )
