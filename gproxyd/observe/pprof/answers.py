"""What the HTTP layer gets of a profile: an answer to send, or a refusal to turn into one.

GproxydError
├── Busy          another profile is being taken: 409
└── Unavailable   this process cannot take that profile: answered here, as 501
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gproxyd.errors import GproxydError


class Busy(GproxydError):
    """One profile at a time: they would measure each other. The text is a sentence for the reader."""


class Unavailable(GproxydError):
    """The profile cannot be taken in this process. The text is a sentence for the reader."""


class Answer(NamedTuple):
    """An HTTP response: everything but its length and date. A profile's body is gzip, and that is its format,
    not a content coding."""

    status: int
    content_type: str
    headers: Mapping[str, str]
    body: bytes
