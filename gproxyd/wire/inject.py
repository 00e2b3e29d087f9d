"""Members put into a JSON object that its sender left out, every other byte kept.

A member's name in its plain quotes cannot stand inside a JSON string, where quotes are escaped. So the only mention of
a name that a parser has found at the top is that member.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_OPTIONS = b'"stream_options"'
_OPTIONS_OPEN = re.compile(rb"\s*:\s*\{\s*")
_ASKED = b'"include_usage"'
_NOT = re.compile(rb"\s*:\s*(false|null)")


def member(body: bytes, text: bytes, *, empty: bool) -> bytes:
    """The object with `text` (a name and a value) as its first member. `empty` says that it has none yet."""
    brace = body.index(b"{") + 1
    return b"".join((body[:brace], text, b"" if empty else b",", memoryview(body)[brace:]))  # copied once


def usage_asked(body: bytes, fields: Mapping[str, object]) -> bytes:
    """A chat request for a stream that also asks for its usage; the same object where nothing is to be done.

    `fields` are the members of the body that the client sent. Where the place is in doubt, nothing is asked for.
    """
    options = fields.get("stream_options")
    if options is None and _OPTIONS not in body:
        return member(body, b'"stream_options":{"include_usage":true}', empty=False)
    if not isinstance(options, dict) or options.get("include_usage") is True or body.count(_OPTIONS) != 1:
        return body
    opened = _OPTIONS_OPEN.match(body, body.index(_OPTIONS) + len(_OPTIONS))
    if opened is None:
        return body
    if "include_usage" not in options:
        return body[: opened.end()] + _ASKED + (b":true," if options else b":true") + body[opened.end() :]
    refused = _NOT.match(body, body.find(_ASKED, opened.end()) + len(_ASKED))
    if body.count(_ASKED) != 1 or refused is None:
        return body
    return body[: refused.start(1)] + b"true" + body[refused.end(1) :]
