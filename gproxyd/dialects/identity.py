"""The ids of things that live with one vendor: which a reply made, which a request speaks of.

Invariants: nothing here raises, whatever JSON comes; of one text so many ids are told, and none is longer than LONGEST.
An id only says where to send a request. It is no secret and no permission: who may use the vendor is asked afterwards.

Sources: the OpenAI API reference (responses, conversations, files, batches, containers), Anthropic's Files API and code
execution pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, Literal, NamedTuple

from gproxyd.dialects.turns import Fields, items, parts
from gproxyd.dialects.usage import at
from gproxyd.wire.operations import Operation

Kind = Literal["response", "conversation", "file", "batch", "container", "reasoning"]
"""What an id names. "reasoning" is a digest of `reasoning`, in hexadecimal."""

LONGEST: Final = 256
MOST: Final = 64
"""Ids that are told of one request; of a list as a reply, ten times as many."""

EVENT_MARK: Final = b'"response.created"'
"""The event of a stream that tells an id bears this."""

_FAMILIES: Mapping[str, Kind] = {"responses": "response", "files": "file", "batches": "batch"}
_BATCH_FILES = ("input_file_id", "output_file_id", "error_file_id")


class Named(NamedTuple):
    kind: Kind
    id: str


def made(operation: Operation, target_id: bytes | None, value: Mapping[str, Any]) -> tuple[Named, ...]:
    """What a JSON reply, or the data of a stream's event, shows to live with the vendor that sent it.

    A batch's files appear while it is looked after, and lists tell of things made before: so any reply counts. Where
    the path names an id, only that thing is believed: the content of a file is JSON of a user's making.
    """
    if kind := _FAMILIES.get(operation.name):
        listed = value.get("data") if value.get("object", "list") == "list" and target_id is None else None
        shown = [
            one
            for one in (listed if isinstance(listed, list) else (value, value.get("response")))
            if isinstance(one, dict) and one.get("object", one.get("type")) == kind
        ]  # Anthropic's files have a type
        if target_id is not None:
            name = _text(target_id)
            shown = [one for one in shown if one.get("id") == name]
        return _bounded((one for inner in shown for one in _shown(kind, inner)), 10 * MOST)
    if operation.name == "messages":
        container = at(value, ("container", "id")) or at(value, ("message", "container", "id"))
        return _bounded([("container", container)])
    return ()


def deleted(operation: Operation, value: Mapping[str, Any]) -> tuple[Named, ...]:
    """What the reply to a DELETE says is no more."""
    kind = _FAMILIES.get(operation.name)
    gone = value.get("deleted") is True or value.get("type") == "file_deleted"
    return _bounded([(kind, value.get("id"))]) if kind and gone else ()


def asked(operation: Operation, target_id: bytes | None, fields: Fields) -> tuple[Named, ...]:
    """What a request speaks of, most binding first: its path's id, what it goes on from, its files, newest first."""
    return _bounded(_asked(operation, target_id, fields))


def _asked(operation: Operation, target_id: bytes | None, fields: Fields) -> Iterator[tuple[Kind, object]]:
    kind = _FAMILIES.get(operation.name)
    if kind and target_id:
        yield kind, _text(target_id)
    yield "response", fields.get("previous_response_id")
    conversation = fields.get("conversation")
    yield "conversation", conversation.get("id") if isinstance(conversation, dict) else conversation
    yield "file", fields.get("input_file_id")
    yield from _in_tools(fields)
    container = fields.get("container")
    yield "container", container.get("id") if isinstance(container, dict) else container
    for item in islice(reversed(items(operation.dialect, fields)), 10 * MOST):
        for part in islice(parts(operation.dialect, item), 10 * MOST):
            for place in (("file_id",), ("file", "file_id"), ("source", "file_id")):
                yield "file", at(part, place)


def _in_tools(fields: Fields) -> Iterator[tuple[Kind, object]]:
    """OpenAI's code interpreter runs in a container, which may be given files."""
    tools = fields.get("tools")
    for tool in islice(tools, MOST) if isinstance(tools, list) else ():
        container = at(tool, ("container",))
        yield "container", container
        files = at(container, ("file_ids",))
        for one in islice(files, MOST) if isinstance(files, list) else ():
            yield "file", one


def _shown(kind: Kind, value: Mapping[str, Any]) -> Iterator[tuple[Kind, object]]:
    if value.get("deleted") is True or value.get("store") is False:
        return
    yield kind, value.get("id")
    if kind == "batch":
        for name in _BATCH_FILES:
            yield "file", value.get(name)
    elif kind == "response":
        yield "conversation", at(value, ("conversation", "id"))


def _text(target_id: bytes) -> str:
    return target_id.decode("ascii", "replace")


def _bounded(named: Iterable[tuple[Kind, object]], most: int = MOST) -> tuple[Named, ...]:
    found: dict[Named, None] = {}
    for kind, one in named:
        if isinstance(one, str) and 0 < len(one) <= LONGEST:
            found[Named(kind, one)] = None
            if len(found) == most:
                break
    return tuple(found)
