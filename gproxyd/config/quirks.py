"""What a provider's section says of a vendor's ways: its quirks, and the parts of its addresses.

A quirk that is not given (None) is as the table of vendors has it. `dialects/quirks.py` says what each means.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from gproxyd.config.fields import Items
from gproxyd.config.section import Section

_PATH_PART = re.compile(r"(?!\.+\Z)[A-Za-z0-9._:-]{1,128}")
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")


def _path_part(text: str) -> str:
    if not _PATH_PART.fullmatch(text):
        raise ValueError("must be one part of a path: letters, digits and '._:-'")
    return text


def _member(text: str) -> str:
    if not _MEMBER.fullmatch(text):
        raise ValueError("must be the way to a member of a JSON object, as in error.code")
    return text


def _code(value: Any) -> Any:
    return str(value) if type(value) is int else value


PathPart = Annotated[str, AfterValidator(_path_part)]
"""What takes a place in an upstream's path: a project, a region, a version, a deployment."""
Codes = Annotated[tuple[Annotated[str, BeforeValidator(_code)], ...], Items]


class Limited(Section):
    """Answers that mean a rate limit: a status, and a word in the body where the status alone does not say so."""

    status: Annotated[int, Field(ge=400, le=599)]
    contains: str | None = None


class BodyErrors(Section):
    """Error codes inside answers, by what they mean; `at` leads to the code."""

    at: Annotated[str, AfterValidator(_member)]
    limited: Codes = ()
    refused: Codes = ()
    failed: Codes = ()


class Quirks(Section):
    """Where this upstream differs from the API that it speaks."""

    both_keys: bool | None = None
    stream_options: bool | None = None
    tool_choice_auto: bool | None = None
    reasoning_content: Literal["kept", "required", "removed"] | None = None
    flat_content: bool | None = None
    limited: Annotated[tuple[Limited, ...] | None, Items] = None
    body_errors: Annotated[tuple[BodyErrors, ...] | None, Items] = None
