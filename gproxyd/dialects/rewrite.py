"""A request's body with some of its members replaced, byte for byte the old one everywhere else.

Invariant: the result is the JSON of the new members, provided that the body was that of the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from gproxyd.wire.pick import Picker


def rewrite(body: bytes, before: Mapping[str, Any], after: Mapping[str, Any]) -> bytes:
    """The body of a request that was `before` and is to be `after`. Members that are the very same object stay.

    `before` may be a part of the body's members, as an outline has it; `after` is made from it, and what changes has
    an ASCII name. Where a member is gone, or the body has one that changes twice, all of it is parsed and written anew.
    """
    changed = {name: value for name, value in after.items() if name not in before or before[name] is not value}
    gone = [name for name in before if name not in after]
    if not changed and not gone:
        return body
    picker = Picker(changed)
    picker.advance(body, 0, len(body))
    if gone or any(count > 1 for count in picker.counts.values()):
        rest = {name: value for name, value in orjson.loads(body).items() if name not in gone}
        return orjson.dumps({**rest, **changed})
    pieces, position = [], 0
    for (start, end), name in sorted((span, name) for name, span in picker.spans.items()):
        pieces += [body[position:start], orjson.dumps(changed.pop(name))]
        position = end
    pieces.append(body[position:])
    text = b"".join(pieces)
    if changed:
        opened = text.index(b"{") + 1
        new = orjson.dumps(changed)[1:-1]
        text = b"".join((text[:opened], new, b"," if picker.members else b"", text[opened:]))
    return text
