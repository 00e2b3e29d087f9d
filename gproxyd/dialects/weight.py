"""How many tokens a request's prompt probably is, without any vendor's tokenizer.

Invariants: linear in the number of values, of which at most MOST_VALUES are looked at one by one, and bounded in the
length of texts, of which long ones are sampled; media count by their kind, never by the length of their base64.

The weights were fitted to a public byte-pair tokenizer. Prose, code and JSON come out within a quarter of it, base64,
hexadecimal digits, Cyrillic and Chinese too; of scripts that it knew badly (Greek, Arabic, Thai) it made up to twice as
many. Vendors' tokenizers differ from each other by as much: who compares with a limit leaves room.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Final

import orjson

from gproxyd.dialects.sift import Unread
from gproxyd.dialects.turns import SHAPES, Fields, items
from gproxyd.types import DialectName

MOST_VALUES: Final = 20_000
"""Values that are looked at one by one in a request; what is beyond counts by its length."""

IMAGE: Final = 1_600
"""Tokens of a picture: what Anthropic takes for its largest standard size; OpenAI's and Google's are up to as many."""

LOW_IMAGE: Final = 85
"""Tokens of a picture that OpenAI is asked to see with `detail: low`."""

FILE: Final = 3_000
"""Tokens of a file that is only referred to."""

_ITEM = 4  # what marks the begin and the end of a message, and its speaker
_LONG, _SLICE, _SLICES = 32 * 1024, 2 * 1024, 8
_WORD = 12
_PAUSE = 1024  # values, and each 128 characters of their texts, that are weighed at once
_DENSE = 256  # characters without blanks beyond which a text is no words: base64, hexadecimal digits

# Hundredths of a token that a character takes.
_OF_LETTERS, _OF_DIGITS, _OF_PUNCTUATION = 23, 50, 55
_OF_TWO_BYTES, _OF_THREE_BYTES, _OF_FOUR_BYTES = 60, 100, 250

_NOT_ASCII = bytes(range(0x80, 0x100))
_PUNCTUATION = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_DIGITS = b"0123456789"
_THREE, _FOUR = bytes(range(0xE0, 0xF0)), bytes(range(0xF0, 0x100))

_PICTURES = ("image", "image_url", "input_image", "computer_screenshot", "video_url")
_FILES = ("file", "input_file", "document")
_SIGNED = frozenset({"signature", "thoughtSignature", "thought_signature", "cache_control", "id", "call_id"})
_ENCRYPTED = frozenset({"encrypted_content"})


def estimate_tokens(dialect: DialectName, fields: Fields, length: int) -> int:
    """Tokens of the prompt. `length` is the body's, in bytes: what counts if its items are not among the fields."""
    if SHAPES[dialect].items not in fields:
        return (length + 3) // 4
    fixed, each = weights(dialect, fields)
    return fixed + sum(each)


def weights(dialect: DialectName, fields: Fields) -> tuple[int, list[int]]:
    """(tokens of what is beside the items: system prompt, tools; tokens of each item)."""
    scale = Scale()
    shape = SHAPES[dialect]
    fixed = sum(scale.weigh(fields[name]) for name in (*shape.system, *shape.beside) if fields.get(name))
    return fixed, [_ITEM + scale.weigh(item) for item in items(dialect, fields)]


def weights_large(
    dialect: DialectName, fields: Fields, sizes: Sequence[int]
) -> Generator[None, None, tuple[int, list[int]]]:
    """The same of a long request's members, in steps. `sizes` are those of its last items in bytes."""
    scale = Scale()
    shape = SHAPES[dialect]
    fixed = 0
    for name in (*shape.system, *shape.beside):
        if fields.get(name):
            fixed += yield from scale.weigh_large(fields[name])
    each: list[int] = []
    conversation = items(dialect, fields)
    ahead = len(conversation) - len(sizes)
    for n, item in enumerate(conversation):
        if scale.left <= 0 and n >= ahead:
            each.append(_ITEM + sizes[n - ahead] // 3)
            if n % _PAUSE == 0:
                yield None
        else:
            each.append(_ITEM + (yield from scale.weigh_large(item)))
    return fixed, each


class Scale:
    """Weighs values of one request. `left` is how many more of them are looked at one by one."""

    __slots__ = ("_spent", "left")

    def __init__(self, left: int = MOST_VALUES) -> None:
        self.left = left
        self._spent = 0  # since the last pause

    def weigh(self, value: object) -> int:
        """Tokens of a JSON value: its texts, the names of its members, its media."""
        if self.left <= 0:
            return _by_length(value)
        total, waiting = 0, [value]
        while waiting:
            self.left -= 1
            if self.left < 0:
                return total + sum(map(_by_length, waiting))
            total += _one(waiting.pop(), waiting)
        return total

    def weigh_large(self, value: object) -> Generator[None, None, int]:
        """The same in steps, of a value that may hold stand-ins of `sift`."""
        total, waiting = 0, [value]
        while waiting:
            self.left -= 1
            one = waiting.pop()
            total += _one(one, waiting) if self.left >= 0 else _length_of(one) // 3
            self._spent += 1 + (min(len(one), _LONG) // 128 if isinstance(one, str) else 0)
            if self._spent >= _PAUSE:
                self._spent = 0
                yield None
        return total


def _one(one: object, waiting: list[Any]) -> int:
    """Tokens of a value without those inside of it, which are to be weighed next."""
    if isinstance(one, str):
        return text_tokens(one)
    if isinstance(one, dict):
        media = _media(one)
        if media is not None:
            return media
        waiting += [inner for name, inner in one.items() if name not in _SIGNED and name not in _ENCRYPTED]
        return sum(1 + len(name) // 8 for name in one) + sum(_length(one.get(name)) // 6 for name in _ENCRYPTED)
    if isinstance(one, list):
        waiting += one
        return 0
    return one.size // 3 if isinstance(one, Unread) else 1


def _length_of(value: object) -> int:
    """Bytes of a value's JSON, about."""
    unread = 0

    def stands_in(one: Any) -> None:
        nonlocal unread
        unread += one.size

    try:
        return len(orjson.dumps(value, stands_in, orjson.OPT_PASSTHROUGH_SUBCLASS)) + unread
    except orjson.JSONEncodeError:  # nests deeper than it can write
        return 3 * MOST_VALUES


def _by_length(value: object) -> int:
    try:
        return len(orjson.dumps(value)) // 3
    except orjson.JSONEncodeError:  # nests deeper than it can write
        return MOST_VALUES


def _media(part: Mapping[str, Any]) -> int | None:
    """Tokens of a part that is a picture, a sound or a file; None if it is none of them."""
    kind = part.get("type")
    if kind in _PICTURES:
        return LOW_IMAGE if _detail(part) == "low" else IMAGE
    if kind == "input_audio" or kind == "audio_url":
        return _blob("audio/", _deepest(part, "data"))
    if kind in _FILES:
        return _file(part)
    for name in ("inlineData", "inline_data", "fileData", "file_data"):
        if isinstance(inner := part.get(name), dict):
            return _blob(str(inner.get("mimeType") or inner.get("mime_type") or ""), _length(inner.get("data")))
    return None


def _detail(part: Mapping[str, Any]) -> object:
    inner = part.get("image_url")
    return part.get("detail") or (inner.get("detail") if isinstance(inner, dict) else None)


def _file(part: Mapping[str, Any]) -> int | None:
    """OpenAI's files and Anthropic's documents; None for documents that are texts."""
    source = part.get("source")
    if isinstance(source, dict) and source.get("type") in ("text", "content"):
        return None
    return _blob("application/pdf", max(_deepest(part, "data"), _deepest(part, "file_data")))


def _deepest(part: Mapping[str, Any], name: str) -> int:
    """The length of a member of a part, or of the object in it."""
    inner = [value.get(name) for value in part.values() if isinstance(value, dict)]
    return max(map(_length, (part.get(name), *inner)))


def _blob(mime: str, size: int) -> int:
    """Tokens of data by its type and the length of its base64."""
    if mime.startswith("image/"):
        return IMAGE
    if mime.startswith(("audio/", "video/")):
        return FILE + size // 650  # 32 a second, of 16 kB each
    if mime.startswith("text/"):
        return FILE if not size else size * 3 // 16
    return max(FILE, size // 32)  # some 50 KiB and 2,000 tokens a page


def _length(value: object) -> int:
    return len(value) if isinstance(value, str) else 0


def text_tokens(text: str) -> int:
    """Tokens of a text by its script, rounded up. A long one is judged by slices of it."""
    length = len(text)
    if length <= _WORD and text.isascii():
        return (length + 2) // 3  # a role, a type, a name: most of a request's texts are no longer
    if length <= _LONG:
        return _slice_tokens(text)
    if text.startswith("data:") and ";base64," in text[:128]:
        return _blob(text[5:69], length)
    step = (length - _SLICE) // (_SLICES - 1)
    sample = sum(_slice_tokens(text[at : at + _SLICE]) for at in range(0, step * _SLICES, step))
    return -(-sample * length // (_SLICE * _SLICES))


def _slice_tokens(text: str) -> int:
    data = text.encode("utf-8", "replace")
    size = len(data)
    words = data.translate(None, _PUNCTUATION)
    letters = words.translate(None, _DIGITS)
    hundredths = (size - len(words)) * _OF_PUNCTUATION + (len(words) - len(letters)) * _OF_DIGITS
    if text.isascii():
        if size > _DENSE and _is_dense(data):
            return size * 5 // 8
        return -(-(hundredths + len(letters) * _OF_LETTERS) // 100)
    plain = len(letters.translate(None, _NOT_ASCII))
    three = size - len(data.translate(None, _THREE))
    four = size - len(data.translate(None, _FOUR))
    two = len(text) - len(text.encode("ascii", "ignore")) - three - four
    hundredths += plain * _OF_LETTERS + two * _OF_TWO_BYTES + three * _OF_THREE_BYTES + four * _OF_FOUR_BYTES
    return -(-hundredths // 100)


def _is_dense(data: bytes) -> bool:
    return (len(data) - len(data.translate(None, b" \n\r\t"))) * 50 < len(data)
