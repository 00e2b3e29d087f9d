"""What binds a long request to one vendor: the ids that it speaks of and the thoughts that it sends back, in steps.

Invariant: it is told what `identity.asked` and `reasoning.reasoning_origin` tell, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

from gproxyd.dialects import identity, reasoning
from gproxyd.dialects.identity import Named
from gproxyd.dialects.turns import SHAPES, Fields
from gproxyd.types import DialectName
from gproxyd.wire.operations import Operation

_AT_ONCE = 16  # items, of which many parts are looked at
_ASKED, _THOUGHT = 10 * identity.MOST, 2_000  # items that are looked at in all


def bonds(operation: Operation, dialect: DialectName, fields: Fields) -> tuple[Named, ...]:
    """All at once."""
    return (*identity.asked(operation, None, fields), *_thoughts(dialect, fields))


def bonds_large(operation: Operation, dialect: DialectName, fields: Fields) -> Generator[None, None, tuple[Named, ...]]:
    """The same in steps."""
    name = SHAPES[dialect].items
    conversation = fields.get(name)
    if not isinstance(conversation, list):
        return bonds(operation, dialect, fields)

    def newest(items: Sequence[object]) -> Fields:
        return {**fields, name: items}

    asked = yield from _first(
        lambda items: identity.asked(operation, None, newest(items)), conversation[-_ASKED:], identity.MOST
    )
    thought = yield from _first(
        lambda items: _thoughts(dialect, newest(items)), conversation[-_THOUGHT:], reasoning.MOST
    )
    return (*asked, *thought)


def _first(
    tell: Callable[[Sequence[object]], Iterable[Named]], conversation: Sequence[object], most: int
) -> Generator[None, None, list[Named]]:
    """What is told of some items after the others, newest first."""
    found: dict[Named, None] = dict.fromkeys(tell(()))
    for end in range(len(conversation), 0, -_AT_ONCE):
        if len(found) >= most:
            break
        found.update(dict.fromkeys(tell(conversation[max(0, end - _AT_ONCE) : end])))
        yield None
    return list(found)[:most]


def _thoughts(dialect: DialectName, fields: Fields) -> list[Named]:
    return [Named("reasoning", one.hex()) for one in reasoning.reasoning_origin(dialect, fields)]
