"""Agents: names that stand for several models, and how one of these is chosen.

Targets are written `provider/model`, as a bare model (every provider that offers it), or as a pattern over both
(`openai-main/gpt-4*`); a text alone is a target without anything else to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic import ValidationInfo as Info

from gproxyd.config import fields
from gproxyd.config.fields import Items, Some, Timeout
from gproxyd.config.section import Section
from gproxyd.types import DialectName

Strategy = Literal["fallback", "round_robin", "weighted", "latency", "cost", "sticky"]
Capability = Literal[
    "vision", "audio_in", "audio_out", "pdf", "tools", "parallel_tools", "tool_choice", "json_schema", "reasoning",
    "prompt_caching", "web_search", "computer_use",
]  # fmt: skip
"""What a model may be asked to be able to do, as the table of known models calls it."""


def _target(text: str, info: Info) -> str:
    return fields.agent_target(text, info)


class AgentTarget(Section):
    """One target. `weight` counts against those of the others; the rest holds for requests that go there.

    max_output  tokens that an answer may have at most
    headers     added to the request, beside the provider's own
    format      requests of other dialects pass this target by
    """

    target: Annotated[fields.ModelGlob, AfterValidator(_target)]
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    max_output: Annotated[int, Field(ge=1, le=10**9)] | None = None
    headers: Annotated[Mapping[fields.HeaderName, fields.HeaderValue], fields.Section] = Field(
        default_factory=dict, repr=False
    )
    format: DialectName | None = None

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        return {"target": value} if isinstance(value, str) else value


class Sticky(Section):
    """What tells conversations apart: a header of the request, else their beginnings; and for how many seconds one
    stays where it is, None: as long as the prompt cache that it asks for."""

    header: fields.PlainHeader | None = None
    ttl: Timeout | None = None


class Agent(Section):
    """A name that stands for several models.

    required       what a model must be able to do to be a target
    system_prompt  put into each request that has none; with `force` in place of what it has
    overflow       what becomes of a request that is too long for every target: refused, or its oldest turns dropped
    sticky         conversations stay where they are, whatever the strategy
    """

    strategy: Strategy = "fallback"
    targets: Some[AgentTarget]
    required: Annotated[tuple[Capability, ...], Items] = ()
    system_prompt: Annotated[str, Field(min_length=1, max_length=100_000)] | None = Field(default=None, repr=False)
    force: bool = False
    overflow: Literal["refuse", "trim"] = "refuse"
    sticky: Sticky | None = None
    mcp: Annotated[tuple[fields.SecretName, ...], Items] = ()
