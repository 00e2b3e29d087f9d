"""A long request on its way to one target: which of its items go there, what else is changed, and the text of it all.

Invariants: nothing is changed in place; of the body every byte stays that belongs to nothing that changes; what comes
out means what `rewrite` would have made of the request.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import orjson

from gproxyd.dialects.prompt import is_system, with_system
from gproxyd.dialects.sift import Sifted
from gproxyd.dialects.trim import left_out
from gproxyd.dialects.turns import SHAPES, items
from gproxyd.dialects.weight import weights_large
from gproxyd.types import DialectName
from gproxyd.wire import outline, spans
from gproxyd.wire.pieces import Edit, Pieces
from gproxyd.wire.spans import Member

_PAUSE = 1024  # items that are looked at at once


@dataclass(frozen=True, slots=True)
class Draft:
    """`fields` are the request's members as they are to be. Of its items, if they are a list, those go that are `kept`,
    told by their places in the body, behind those that are `new`."""

    dialect: DialectName
    came: Sifted
    fields: Mapping[str, Any]
    new: Sequence[Any]
    kept: Sequence[int]

    @property
    def sizes(self) -> list[int]:
        """Bytes of the items that are kept."""
        places = self.came.places
        return [places[n][1] - places[n][0] for n in self.kept]

    @property
    def changed(self) -> bool:
        """Whether other items go than those that came."""
        return bool(self.new) or len(self.kept) != len(self.came.places)


def drafted(dialect: DialectName, came: Sifted) -> Draft:
    """The request as it came."""
    return Draft(dialect, came, came.fields, (), range(len(came.places)))


def prompted(draft: Draft, text: str, force: bool) -> Generator[None, None, Draft]:
    """With the agent's prompt, as `with_system` puts it there. The draft is as it came."""
    name = SHAPES[draft.dialect].items
    if not isinstance(draft.fields.get(name), list):
        return replace(draft, fields=with_system(draft.dialect, draft.fields, text, force))
    conversation = draft.fields[name]
    prompts: list[Any] = []
    others: list[int] = []
    for n, item in enumerate(conversation):
        if is_system(item):
            prompts.append(item)
        else:
            others.append(n)
        if n % _PAUSE == 0:
            yield None
    before = {**draft.fields, name: prompts}
    after = with_system(draft.dialect, before, text, force)
    if after is before:
        return draft
    if after[name] is prompts:  # none of them is touched
        return replace(draft, fields={**after, name: conversation})
    rest = [*after[name], *(conversation[n] for n in others)]
    return replace(draft, fields={**after, name: rest}, new=after[name], kept=others)


def tokens(draft: Draft, size: int) -> Generator[None, None, int]:
    """As `estimate_tokens` estimates them."""
    if SHAPES[draft.dialect].items not in draft.fields:
        return (size + 3) // 4
    fixed, each = yield from weights_large(draft.dialect, draft.fields, draft.sizes)
    return fixed + sum(each)


def shortened(draft: Draft, size: int, context: int, budget: int) -> Generator[None, None, Draft | None]:
    """With so little left out that it has `budget` tokens, if it has more than `context`: as `trim` does it. None if it
    cannot be made so short."""
    name = SHAPES[draft.dialect].items
    fixed, each = yield from weights_large(draft.dialect, draft.fields, draft.sizes)
    total = fixed + sum(each)
    if (total if name in draft.fields else (size + 3) // 4) <= context or total <= budget:
        return draft
    conversation = items(draft.dialect, draft.fields)
    dropped = yield from left_out(draft.dialect, conversation, each, total - budget)
    if dropped is None:
        return None
    ahead = len(draft.new)
    kept = [n for place, n in enumerate(draft.kept, ahead) if place not in dropped]
    yield None
    rest = [item for n, item in enumerate(conversation) if n not in dropped]
    new = [item for n, item in enumerate(draft.new) if n not in dropped]
    return replace(draft, fields={**draft.fields, name: rest}, new=new, kept=kept)


def written(body: bytes, draft: Draft, more: Sequence[Edit]) -> Generator[None, None, bytes]:
    """The body of the request. `more` are edits of what the draft does not change."""
    came, name = draft.came, SHAPES[draft.dialect].items
    before, after = came.fields, draft.fields
    changed = {key: value for key, value in after.items() if key not in before or before[key] is not value}
    listed = changed.pop(name, None) is not None and draft.changed
    if not changed and not listed and not more and len(before) == len(after):
        return body
    doomed = [member for key in before if key not in after for member in came.members[key]]
    doomed += [member for key in (*changed, *([name] if listed else [])) for member in came.members.get(key, [])[:-1]]
    doomed.sort(key=lambda member: member.at)
    edits: list[tuple[int, int, bytes | None]] = [(*place, b"") for place in spans.without(doomed)]
    edits += more
    for key in tuple(changed):
        if key in came.members:
            last = came.members[key][-1]
            edits.append((last.start, last.end, orjson.dumps(changed.pop(key))))
    if listed:
        last = came.members[name][-1]
        edits.append((last.start, last.end, None))
    if changed:
        text = orjson.dumps(changed)[1:-1]
        alone = came.empty or _all_of_it(doomed)
        edits.append(outline.first_member(body, text, empty=alone and not more))
    pieces = Pieces(body)
    for start, end, new in sorted(edits, key=lambda edit: edit[:2]):
        if new is not None:
            pieces.edit(start, end, new)
        else:
            pieces.edit(start, end)
            yield from _list(pieces, draft)
    return (yield from pieces.joined())


def _all_of_it(doomed: Sequence[Member]) -> bool:
    """Whether an object would lose every member that it has."""
    if not doomed or doomed[0].before or doomed[-1].after:
        return False
    return all(one.after == other.at for one, other in pairwise(doomed))


def _list(pieces: Pieces, draft: Draft) -> Generator[None, None, None]:
    """The items; those that stood beside each other stay together, with what is between them."""
    places, kept = draft.came.places, draft.kept
    between = b"["
    for item in draft.new:
        pieces.put(between + orjson.dumps(item))
        between = b","
    first = 0
    for n in range(1, len(kept) + 1):
        if n % _PAUSE == 0:
            yield None
        if n < len(kept) and kept[n] == kept[n - 1] + 1:
            continue
        pieces.put(between)
        between = b","
        pieces.copy(places[kept[first]][0], places[kept[n - 1]][1])
        first = n
    pieces.put(b"[]" if between == b"[" else b"]")
