"""From files to plain data, with the place of every key.

Invariants: what is read is bounded (bytes, values, nesting, aliases expanded) before it is built; no message
quotes the file; a file that cannot be read whole contributes nothing and marks the source incomplete.

YAML is read by the core schema of YAML 1.2: `yes`, `on`, `10:30` and `2027-01-01` are text, as are keys of any kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

try:
    from yaml import CSafeLoader as FastLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader as FastLoader  # type: ignore[assignment]

KeyPath = tuple[str | int, ...]
"""The way to a value: keys of mappings, indexes of lists."""

MAX_BYTES = 4 * 2**20
MAX_VALUES = 200_000
MAX_DEPTH = 32

_TAG = "tag:yaml.org,2002:"
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# What libyaml or PyYAML says -> what an administrator can act upon. Their own words may quote the file.
_SYNTAX = {
    "mapping values are not allowed": "a key stands where none may; check the indentation, and quote text holding ': '",
    "could not find expected ':'": "a key lacks its ':'",
    "did not find expected key": "the indentation does not match, or a bracket or quote is not closed",
    "did not find expected ','": "a bracket is not closed, or a comma is missing",
    "expected ',' or": "a bracket is not closed, or a comma is missing",
    "did not find expected '-'": "the list ends with a wrong indentation",
    "found unexpected end of stream": "a quote is not closed",
    "found character": "a value begins with a character that needs quotes, or the line is indented with a tab",
    "found a tab character": "the line is indented with a tab; use spaces",
    "found undefined alias": "an alias (*name) refers to an anchor (&name) that is not there",
    "found duplicate anchor": "two anchors (&name) bear the same name",
    "found unknown escape character": "an unknown escape stands in \"...\"; use '...' to take text literally",
    "but found another document": "the file holds several documents ('---'); only one is allowed",
}


class CoreSchema:
    """Which plain scalars are more than text: null, booleans, integers and floats of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {
        None: [
            (_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)\Z")),
            (_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
            # A leading zero is an octal number to some and a decimal to others: it stays text, and so is refused.
            (_TAG + "int", re.compile(r"(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
            (_TAG + "float", re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?)\Z")),
            (_TAG + "float", re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")),
            (_TAG + "merge", re.compile(r"<<\Z")),
        ]
    }


class Loader(CoreSchema, FastLoader):
    """PyYAML's safe loader with the core schema; used only to parse and compose, never to construct."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key or a list item stands; lines count from 1."""

    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Flaw:
    """One thing wrong: at which key path, what, and where if that is not simply the place of the path."""

    path: KeyPath
    message: str
    file: str | None = None
    line: int | None = None


@dataclass(slots=True)
class Source:
    """What the files say: the data, the place of each key path, and the flaws met on the way."""

    root: str
    """The path given by the administrator: the place of what stands nowhere else."""
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    flaws: list[Flaw] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)
    """Values that had to be left out: whatever else seems wrong with them only follows from that."""
    complete: bool = True
    """Whether every file could be read; otherwise what seems missing may well be there."""

    def place(self, path: KeyPath) -> Place | None:
        """The place of `path`, or of the nearest key above it that was written down."""
        for length in range(len(path), 0, -1):
            if found := self.places.get(path[:length]):
                return found
        return None


class _Unusable(Exception):
    """The file contributes nothing: the line, if known, and the reason."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


def read(path: Path) -> Source:
    """Read a file, or a directory with `gproxyd.yaml` and `conf.d/*.yaml`, merged in the order of their names.

    Mappings merge by key, everything else is replaced; an empty value (null) adds nothing to a mapping. Never
    raises for what files hold or lack: that ends up in `flaws`.
    """
    source = Source(str(path))
    for file in _files(path, source):
        source.files.append(str(file))
        try:
            node = compose(_text(file))
            reader = _Reader(str(file))
            data = reader.document(node)
        except _Unusable as reason:
            source.flaws.append(Flaw((), reason.message, str(file), reason.line))
            source.complete = False
            continue
        source.flaws.extend(reader.flaws)
        source.unread.update(reader.unread)
        source.places.update(reader.places)
        source.data = merge(source.data, data)
    return source


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid upon it; see `read`."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = merge(below, value)
        elif not (isinstance(below, dict) and value is None):
            merged[key] = value
    return merged


def _files(path: Path, source: Source) -> list[Path]:
    if not os.path.isdir(path):  # Path.is_dir raises where the answer is forbidden to know
        return [path]
    try:
        # The names an editor leaves behind begin with a dot.
        names = sorted(name for name in os.listdir(path / "conf.d") if name.endswith(".yaml") and name[0] != ".")
    except FileNotFoundError:
        names = []
    except OSError as error:
        source.flaws.append(Flaw((), f"cannot be listed: {error.strerror}", str(path / "conf.d")))
        source.complete = False
        names = []
    return [path / "gproxyd.yaml", *(path / "conf.d" / name for name in names)]


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise _Unusable(None, f"cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the path
        raise _Unusable(None, "cannot be read: the path is not valid") from None
    if len(content) > MAX_BYTES:
        raise _Unusable(None, f"is larger than {MAX_BYTES // 2**20} MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable(content.count(b"\n", 0, error.start) + 1, "is not UTF-8 text") from None
    if found := _UNPRINTABLE.search(text):
        raise _Unusable(text.count("\n", 0, found.start()) + 1, "holds a control character")
    return text


def compose(text: str) -> yaml.Node | None:
    """The node tree of one YAML document, None if it is empty."""
    try:
        _bound(yaml.parse(text, Loader=Loader))
        node: yaml.Node | None = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        line, message = _syntax(error)
    else:
        return node
    # Raised out here so that no traceback carries PyYAML's error, which holds a piece of the file.
    raise _Unusable(line, message)


def _bound(events: Iterator[yaml.Event]) -> None:
    """Stop before the tree is built, which recurses: deep nesting would exhaust the stack."""
    depth = 0
    for count, event in enumerate(events):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH or count > 2 * MAX_VALUES:
            raise _too_much(None if event.start_mark is None else event.start_mark.line + 1)


def _too_much(line: int | None) -> _Unusable:
    return _Unusable(line, f"holds more than {MAX_VALUES} values, or nests deeper than {MAX_DEPTH} levels")


def _syntax(error: yaml.YAMLError) -> tuple[int | None, str]:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    opened = getattr(error, "context_mark", None)
    said = f"{getattr(error, 'problem', '')}"
    reason = next(
        (plain for known, plain in _SYNTAX.items() if said.startswith(known)), "the line cannot be understood"
    )
    if mark is None:
        return None, f"is not valid YAML: {reason}"
    since = f" (it begins on line {opened.line + 1})" if opened is not None and opened.line < mark.line else ""
    return mark.line + 1, f"is not valid YAML: {reason}{since}"


class _Reader:
    """Turns the node tree of one file into plain data; collects places and flaws."""

    def __init__(self, file: str) -> None:
        self.places: dict[KeyPath, Place] = {}
        self.flaws: list[Flaw] = []
        self.unread: set[KeyPath] = set()
        self._file = file
        self._values = 0

    def document(self, node: yaml.Node | None) -> dict[str, Any]:
        data = None if node is None else self._value(node, ())
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise _Unusable(None, "must hold a mapping (key: value) at its top")
        return data

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._values += 1
        # Aliases make the tree larger than the file, and even endless.
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise _too_much(node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            try:
                return _scalar(node)
            except ValueError:
                pass
        self._flaw(node, path, "bears a YAML tag (!...) or a number that is not supported here")
        self.unread.add(path)
        return None

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = Place(self._file, node.start_mark.line + 1)
        return self._value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._flaw(key_node, path, "has a key that is not plain text")
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key_node.tag == _TAG + "merge":
                self._flaw(key_node, path, "uses '<<', which is not supported; write the keys out")
            elif key in lines:
                self._flaw(key_node, (*path, key), f"is given twice; the first is on line {lines[key]}")
            else:
                lines[key] = line
                self.places[*path, key] = Place(self._file, line)
                data[key] = self._value(value_node, (*path, key))
        return data

    def _flaw(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.flaws.append(Flaw(path, message, self._file, node.start_mark.line + 1))


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """The value of a scalar by its tag. Raises ValueError for other tags and for what does not fit its tag."""
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "str" | "merge" | "!":
            return text
        case "null" if text in {"", "~", "null", "Null", "NULL"}:
            return None
        case "bool" if text.lower() in {"true", "false"}:
            return text.lower() == "true"
        case "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise ValueError("no such tag")
