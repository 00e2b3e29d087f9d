"""Frames -> function, file and line.

Invariants: no variable of a frame is ever read; a file is named relative to the folder that it is imported from, so no
path of this machine is told; a capture keeps code objects, never frames, so it keeps nobody's variables alive.
"""

from __future__ import annotations

import sysconfig
from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import gproxyd

DEPTH = 128
"""Frames of a stack that are kept, counted from the leaf."""


class Place(NamedTuple):
    """One frame of a profile: `module.qualified_name`, its file, the function's first line, the line."""

    function: str
    file: str
    first: int
    line: int


Stack = tuple[Place, ...]
"""Leaf first."""


class Capture(NamedTuple):
    """A stack as it was met, leaf first: code objects, and the offset in bytes of the instruction in each."""

    codes: tuple[CodeType, ...]
    offsets: tuple[int, ...]


def capture(frame: FrameType | None) -> Capture:
    """The stack that ends in `frame`. Cheap enough for a signal handler: lines are found later."""
    codes: list[CodeType] = []
    offsets: list[int] = []
    while frame is not None and len(codes) < DEPTH:
        codes.append(frame.f_code)
        offsets.append(frame.f_lasti)
        frame = frame.f_back
    return Capture(tuple(codes), tuple(offsets))


def capture_frames(frames: Iterable[FrameType]) -> Capture:
    """Frames that do not hang together, leaf first: an await chain's."""
    kept = list(frames)[:DEPTH]
    return Capture(tuple(frame.f_code for frame in kept), tuple(frame.f_lasti for frame in kept))


class _Lines:
    """Which line an instruction belongs to."""

    def __init__(self, code: CodeType) -> None:
        spans = [(start, line) for start, _, line in code.co_lines() if line is not None]
        self._starts = [start for start, _ in spans]
        self._lines = [line for _, line in spans]
        self._first = code.co_firstlineno

    def at(self, offset: int) -> int:
        index = bisect_right(self._starts, offset) - 1
        return self._lines[index] if index >= 0 else self._first


class Resolver:
    """Captures -> stacks. One per profile."""

    def __init__(self) -> None:
        # By identity: code objects compare by value, slowly, and without their file.
        self._lines: dict[int, _Lines] = {}
        self._places: dict[tuple[int, int], Place] = {}
        self._kept: list[CodeType] = []  # an identity means something only as long as its object lives

    def stack(self, captured: Capture) -> Stack:
        return tuple(
            self._places.get((id(code), offset)) or self._place(code, offset)
            for code, offset in zip(captured.codes, captured.offsets, strict=True)
        )

    def _place(self, code: CodeType, offset: int) -> Place:
        lines = self._lines.get(id(code))
        if lines is None:
            lines = self._lines[id(code)] = _Lines(code)
            self._kept.append(code)
        place = place_of(code, lines.at(offset))
        self._places[id(code), offset] = place
        return place


def place_of(code: CodeType, line: int) -> Place:
    file = shorten(code.co_filename)
    return Place(f"{module_of(file)}.{code.co_qualname}", file, code.co_firstlineno, line)


def _roots() -> list[str]:
    """The folders that modules are imported from; a folder stands before those that it lies in."""
    folders = {Path(gproxyd.__file__).parent.parent}
    folders |= {Path(path) for name, path in sysconfig.get_paths().items() if name.endswith("lib")}
    folders |= {folder.resolve() for folder in folders}
    return sorted((f"{folder}/" for folder in folders), key=len, reverse=True)


_ROOTS = _roots()


@lru_cache(maxsize=4096)
def shorten(filename: str) -> str:
    """`aiohttp/web_protocol.py`; only the file's own name where it was imported from nowhere known."""
    if filename.startswith("<"):
        return filename
    for root in _ROOTS:
        if filename.startswith(root):
            return filename[len(root) :]
    return filename.rpartition("/")[2]


@lru_cache(maxsize=4096)
def module_of(file: str) -> str:
    """`aiohttp.web_protocol`, of a file that was shortened."""
    if file.startswith("<"):
        return file.strip("<>").removeprefix("frozen ")
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def named(name: str, file: str = "") -> Place:
    """A frame for what is no Python function: a type, a lock, a thread of foreign code."""
    return Place(name, file, 0, 0)


def label(name: str) -> str:
    """A thread's or task's name, as a label: printable, of bounded length."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:64])
